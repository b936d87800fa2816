"""Chapter 5's race for lambda, in which every method draws for itself, by one exact sampler, and pays for all it draws.

A method sees a `Sampler`: draws of p_0, and ladders of chains from p_0 down to a lambda (`tempering.sample_tempered`),
of which it pays every level, every sweep of the warm-up and every refused move: twice the price of a draw of p_0 where
moves follow the gradient of the lower reward. There are two. `Exact` runs the chains.
`Recorded` hands out contiguous segments of the chains that `tilted_truth` kept, where running everything is too slow:
at the price of the run that they stand for, its warm-up included, of the level nearest to the lambda that was asked
for, reweighted to it, and no state twice within a repetition. It starts in the law, where a short warm-up only comes
near it, and so is kind to the methods that make many short runs.

A repetition has a fold of the chains, and what its methods choose is marked by the truth without that fold. Only what
is certified votes: a lambda below the certified range is marked at its end, and counted (`below`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...algorithms import TiltSamples
from ...seeds import derive_seed
from ...tempering import NoiseMap, kept, sample_tempered
from .. import files
from ..certificates import effective_draws, tilt_samples
from ..models.chains import slug
from . import baselines
from .baselines import Evaluation, Search
from .tilted_truth import LADDER, Problem, Truth

BUDGETS = (20_000, 40_000, 80_000, 160_000)  # image forwards
FOLDS = 5
OURS, KL, ALIGNED = "one exchange run", "adaptive KL", "one aligned law"


@dataclass(frozen=True)
class Plan:
    """What the methods leave open: guesses, and what problems with known answers suggested; none was tuned on digits.

    ladder   levels above a lambda, from infinity on;  bounds: of lambda, for every method
    reach    effective sample size at which draws of p_0 are said to reach a level
    chains   at most, of a run;  warmup: sweeps at least, of a run, and `share` of all its sweeps at least
    trial    forwards of a search's trial at least, with `trials` at least and at most;  start: of what steers
    rounds   of Algorithm 2, each as dear as its draws of p_0
    targets  KL that adaptive control steers to, a method each;  aligned: lambdas of the aligned law from which a
             strength is chosen when sampling, a method each
    weights  of the upper reward, in its standard deviations under p_0
    """

    ladder: tuple[float, ...] = LADDER
    bounds: tuple[float, float] = (LADDER[-1], 10.0)
    chains: int = 8
    reach: float = 30.0
    warmup: int = 6
    share: float = 0.5
    trial: int = 4000
    trials: tuple[int, int] = (5, 20)
    start: float = 1.0
    rounds: int = 3
    targets: tuple[float, ...] = (0.5, 1.5, 3.0)
    weights: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    aligned: tuple[float, ...] = (0.35, 0.22, 0.14)

    def levels(self, lam: float) -> list[float]:
        """The ladder of a run down to lam."""
        return [*(level for level in self.ladder if level > lam), lam]

    def shape(self, lam: float, each: int, forwards: int, most: int | None = None) -> tuple[int, int, int]:
        """(chains, warm-up, sweeps to keep) of a run down to lam at so many forwards, `each` a state; chains <= most.

        Raises ValueError where the warm-up leaves fewer than two sweeps.
        """
        rows = forwards // (each * len(self.levels(lam)))
        chains = max(1, min(most or self.chains, self.chains, rows // (2 * (self.warmup + 1))))
        sweeps = rows // chains - 1
        warmup = max(self.warmup, int(self.share * sweeps))
        if sweeps - warmup < 2:
            least = each * len(self.levels(lam)) * (self.warmup + 3)
            raise ValueError(
                f"{forwards} forwards leave {sweeps - warmup} sweeps of a run down to lambda = {lam:g} after a warm-up "
                f"of {warmup}: at least {least} are needed, so raise the budget or make fewer trials"
            )
        return chains, warmup, sweeps - warmup

    def count(self, budget: int) -> int:
        """How many trials a search makes."""
        return min(max(budget // self.trial, self.trials[0]), self.trials[1])


class ShortRecord(ValueError):
    """A method asks for more than was recorded."""


class Sampler(Protocol):
    """What a method may draw from; `each`: the price of a draw of p_0, in image forwards; `move`: of a state moved."""

    each: int
    move: int

    def plain(self, forwards: int) -> TiltSamples:
        """Independent draws of p_0, as many as they buy."""

    def ladder(self, lam: float, forwards: int) -> tuple[TiltSamples, ...]:
        """What a run down to lam keeps, a set for each level, p_0 first; their costs are those of the whole run."""

    def mean(self, lam: float, forwards: int, weight: float = 0.0) -> Evaluation:
        """Mean r_up by the last level of such a run, for p_0 exp((r_low + weight r_up)/lam); the whole run is paid."""


class Exact:
    """A `Sampler` that runs the chains.

    G, r_low, r_up  the sampler as a map of its noise, and the rewards of its images;  r_up may give more columns
    seed   of everything that is drawn: the same calls give the same draws;  batch: rows through G at once
    moves  options of `sample_tempered`, such as `tilted_truth.MOVES`
    """

    def __init__(
        self,
        G: NoiseMap,
        r_low: Callable[[Tensor], Tensor],
        r_up: Callable[[Tensor], Tensor],
        seed: int,
        plan: Plan,
        *,
        moves: Mapping[str, object] = MappingProxyType({}),
        batch: int = 500,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.G, self.r_low, self.r_up, self.seed, self.plan = G, r_low, r_up, seed, plan
        self.each, self.batch, self.device, self.dtype, self.calls = G.cost, batch, device, dtype, 0
        self.moves, self.move = dict(moves), G.cost * (1 + bool(moves.get("gradient")))
        self.ends: list[tuple[float, Tensor]] = []  # 1/lam of each level of the runs so far, and where its chains ended
        self.first: tuple[Tensor, Tensor] | None = None  # r_low of draws of p_0, and their noise

    def _generator(self) -> torch.Generator:
        self.calls += 1
        return torch.Generator(self.device).manual_seed(derive_seed("race", self.seed, self.calls))

    def _up(self, images: Tensor) -> Tensor:
        return self.r_up(images).reshape(len(images), -1)[:, 0]

    @torch.no_grad()
    def plain(self, forwards: int) -> TiltSamples:
        n, generator, found = forwards // self.each, self._generator(), []
        on = {"generator": generator, "device": self.device, "dtype": self.dtype}
        for first in range(0, n, self.batch):
            z = torch.randn(min(self.batch, n - first), *self.G.shape, **on)
            images = self.G.run(z)
            found.append(torch.stack([self._up(images), self.r_low(images)]).double().cpu())
            if first == 0:
                self.first = found[0][1], z
        return TiltSamples(*torch.cat(found, 1), cost=n * self.each)

    def ladder(self, lam: float, forwards: int, weight: float = 0.0) -> tuple[TiltSamples, ...]:
        chains, warmup, sweeps = self.plan.shape(lam, self.move, forwards)
        generator = self._generator()
        run = sample_tempered(
            self.G,
            (lambda x: self.r_low(x) + weight * self._up(x)) if weight else self.r_low,
            lams := self.plan.levels(lam),
            sweeps=sweeps,
            warmup=warmup,
            chains=chains,
            z=self._start(lams, chains, generator),
            measure=self._up,
            generator=generator,
            micro_batch=self.batch,
            dtype=self.dtype,
            **self.moves,
        )
        self.ends += [(1 / level, z) for level, z in zip(lams, run.state["z"], strict=True)]
        return tilt_samples(run)

    def _start(self, lams: Sequence[float], chains: int, generator: torch.Generator) -> Tensor | None:
        """Where each level starts: at draws of p_0, resampled by their tilt, where they reach, else where the last run
        ended that has the nearest level (a chain goes on as that chain)."""
        if not self.ends and self.first is None:
            return None
        start = []
        for lam in lams:
            p = None if self.first is None else (self.first[0] / lam).softmax(0)
            if p is not None and (not self.ends or 1 / p.square().sum() >= 2 * chains):
                rows = torch.multinomial(p.clamp(min=1e-12).to(self.device), chains, generator=generator)
                start.append(self.first[1][rows])
            else:
                z = min(reversed(self.ends), key=lambda end: abs(end[0] - 1 / lam))[1]
                start.append(z[torch.arange(chains) % len(z)])
        return torch.stack(start)

    def mean(self, lam: float, forwards: int, weight: float = 0.0) -> Evaluation:
        sets = self.ladder(lam, forwards, weight)
        last, cost = sets[-1], sum(each.cost for each in sets)
        return Evaluation(last.r_up.mean().item(), (last.r_up.std() / last.size**0.5).item(), cost)


class Recorded:
    """A `Sampler` that hands out what was recorded: segments of the chains of a fold, no state twice.

    own    the fold, as `Truth.split` makes it;  each: the price of a draw of p_0
    plain  draws of p_0 (n, 2 or more), r_low and r_up first;  None: those of the ladder's first level serve
    Lost sweeps of a warm-up are paid, and as nothing is learned from them not taken out of the record. Raises
    ShortRecord, with what is left, where the record is too short for what a method asks for.
    """

    def __init__(self, own: Truth, each: int, plan: Plan, plain: Tensor | None = None):
        self.low, self.up = kept("low", *own.runs), kept("measured", *own.runs)[..., 0]
        self.lams, self.each, self.plan, self.draws = own.runs[0].config["lams"], each, plan, plain
        self.move = each * (1 + own.runs[0].config["gradient"])
        if self.lams != [*plan.ladder]:
            raise ValueError(
                f"the record has the levels {self.lams}, the plan {[*plan.ladder]}: pass a plan with those"
            )
        self.used = torch.zeros(self.low.shape[1:], dtype=torch.int64)  # sweeps of each level and chain
        self.drawn = 0

    def plain(self, forwards: int) -> TiltSamples:
        n = forwards // self.each
        if self.draws is None:
            chains = min(self.low.shape[2], n)
            places = self._take([0], chains, -(-n // chains))
            low, up = (torch.cat([x[t : t + k, 0, c] for c, (t,), k in places])[:n] for x in (self.low, self.up))
        else:
            rows = self.draws[self.drawn : self.drawn + n].double()
            if len(rows) < n:
                raise ShortRecord(
                    f"the record holds {len(self.draws) - self.drawn} more draws of p_0, and {n} were asked for: "
                    "record more, or lower the budget"
                )
            low, up = rows[:, 0], rows[:, 1]
        self.drawn += n
        return TiltSamples(up, low, cost=n * self.each)

    def ladder(self, lam: float, forwards: int) -> tuple[TiltSamples, ...]:
        return self._run(lam, forwards, [self.lams.index(level) for level in self.plan.levels(lam)[:-1]])

    def mean(self, lam: float, forwards: int, weight: float = 0.0) -> Evaluation:
        (last,) = self._run(lam, forwards, [])
        p, info = replace(last, r_low=last.r_low + weight * last.r_up).tilt(lam)
        mean = p @ last.r_up
        spread = (p @ (last.r_up - mean).square()).sqrt()
        size = last.size * info["ess"] / len(p)
        return Evaluation(mean.item(), (spread / max(size, 1.0) ** 0.5).item(), last.cost)

    def _run(self, lam: float, forwards: int, above: list[int]) -> tuple[TiltSamples, ...]:
        """Sets of the levels `above` and, for lam, of that nearest to it which has room; at the price of the run."""
        chains, warmup, sweeps = self.plan.shape(lam, self.move, forwards, self.low.shape[2])
        beta = 1 / torch.tensor(self.lams, dtype=torch.float64)
        near = (beta - 1 / lam).abs().argsort()[:2].tolist()
        fits = [bool(self._cut([*above, level], chains, sweeps)) for level in near]
        level = near[1] if fits[1] and not fits[0] else near[0]
        wanted = [*above, level]
        places = self._take(wanted, chains, sweeps)
        cost, sets = chains * len(self.plan.levels(lam)) * (warmup + 1 + sweeps) * self.move, []
        for i, level in enumerate(wanted):
            low, up = (
                torch.stack([x[starts[i] : starts[i] + k, level, c] for c, starts, k in places])
                for x in (self.low, self.up)
            )
            group = torch.tensor([c for c, *_ in places])[:, None].expand_as(low)
            size, at = min(effective_draws(low), effective_draws(up)), self.lams[level]
            share = cost * (i + 1) // len(wanted) - cost * i // len(wanted)
            rows = (up.flatten(), low.flatten(), -low.flatten() / at)
            sets.append(TiltSamples(*rows, share, at=at, group=group.flatten(), size=size))
        return tuple(sets)

    def _room(self, wanted: list[int], sweeps: int) -> Tensor:
        """How many segments of so many sweeps each chain has left (C,) of every level that is wanted."""
        levels = torch.tensor(wanted)
        times = torch.bincount(levels, minlength=len(self.lams))[levels][:, None]
        return ((len(self.low) - self.used[levels]) // (sweeps * times)).amin(0)

    def _cut(self, wanted: list[int], chains: int, sweeps: int) -> tuple[int, int] | None:
        """How many segments of how many sweeps there is room for: in two or more parts where whole ones do not fit."""
        cuts = [(chains * parts, -(-sweeps // parts)) for parts in (1, 2, 3, 4) if sweeps >= 8 * parts or parts == 1]
        return next((cut for cut in cuts if self._room(wanted, cut[1]).sum() >= cut[0]), None)

    def _take(self, wanted: list[int], chains: int, sweeps: int) -> list[tuple[int, list[int], int]]:
        """(chain, start at each level that is wanted, sweeps) of segments, from the chains with most left."""
        cut, places = self._cut(wanted, chains, sweeps), []
        if cut is None:
            left = (len(self.low) - self.used[wanted]).sum(1).min()
            raise ShortRecord(
                f"the record is too short: {chains} segments of {sweeps} sweeps were asked for of the levels "
                f"{', '.join(f'{self.lams[i]:g}' for i in wanted)}, and {left} sweeps of one are left in all: record "
                "more sweeps or chains, lower the budget, or draw for real"
            )
        for _ in range(cut[0]):
            chain, starts = int(self._room(wanted, cut[1]).argmax()), []
            for level in wanted:
                starts.append(int(self.used[level, chain]))
                self.used[level, chain] += cut[1]
            places.append((chain, starts, cut[1]))
        return places


@dataclass(frozen=True)
class Choice:
    """What a method chose, and its path: [cost so far, lambda by then, weight].

    interval  of lambda, from its chains, where the method has one;  trials: how often it looked;  said: how it ended
    """

    method: str
    lam: float
    cost: int
    path: list[list[float]]
    weight: float = 0.0
    interval: tuple[float, float] | None = None
    trials: int = 1
    said: str = ""


# ---------------------------------------------------------------- methods: (sampler, budget, seed, plan) -> Choice


def exchange(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """Ours: draws of p_0, then an exchange run whose ladder grows, and the top of the curve of both, pooled.

    A fifth of the budget goes to draws of p_0, and the ladder ends at the first level that they do not reach. A fifth
    at a time, a level is added, until the top of the curve lies at the last level but one or above, so that it has been
    seen to fall; the rest of the budget goes to that ladder, and it ends. Of a shorter ladder only the draws of p_0
    count: its other levels were a warm-up of the longer one.
    """
    part, turned, last, path = budget // 5, False, False, []
    sets = [sampler.plain(part)]
    spent = sets[0].cost
    reached = [level for level in plan.ladder[1:] if sets[0].tilt(level)[1]["ess"] >= plan.reach]
    depth = min(len(reached) + 1, len(plan.ladder) - 1)
    while not last:
        left = budget - spent
        last = turned or depth == len(plan.ladder) - 1 or left < 2 * part
        run = sampler.ladder(plan.ladder[depth], left if last else part)
        sets, spent = [*(each for each in sets if each.at == math.inf), *run], spent + sum(each.cost for each in run)
        top = _Top.of(sets, (plan.ladder[depth], plan.bounds[1]))
        path.append([spent, top.lam, 0.0])
        turned = top.lam >= plan.ladder[depth - 1]
        depth += not turned
    return Choice(OURS, top.lam, spent, path, interval=top.interval, trials=len(path), said=top.said)


def algorithm_2(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """`learn_lam`: draws of p_0, then a run at each lambda where all draws together do not reach.

    Each of `rounds` runs has as much of the budget as those first draws; it ends when they are used up, at the top of
    the curve of everything drawn.
    """
    part = budget // (plan.rounds + 1)
    samples = sampler.plain(part)

    def draw(lam: float, round: int) -> TiltSamples:
        return TiltSamples.pooled(*sampler.ladder(lam, part))

    options = {"draw": draw, "rounds": plan.rounds, "pool": True, "min_ess": min(100.0, len(samples.r_up) / 4)}
    return _of(baselines.algorithm_2(samples, plan.start, plan.bounds, **options))


def none(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """No tilt: p_0 itself, for nothing."""
    return Choice("none", math.inf, 0, [[0, math.inf, 0.0]], trials=0)


def grid(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """The best mean of five values, evenly in log lambda between the bounds, a run for each; it ends after them."""
    low, high = map(math.log, plan.bounds)
    lams = torch.linspace(low, high, 5, dtype=torch.float64).exp().tolist()
    return _of(baselines.grid(_mean(sampler), budget // len(lams), seed, [plan.bounds[0], *lams[1:-1], plan.bounds[1]]))


def random(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """The best mean of log-uniform draws of lambda, a run for each; it ends after `Plan.count` of them."""
    trials = plan.count(budget)
    return _of(baselines.random_search(_mean(sampler), budget // trials, seed, trials, plan.bounds))


def bayesian(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """The best mean of a search by a Gaussian process (optuna), a run a trial; it ends after `Plan.count` of them."""
    trials = plan.count(budget)
    return _of(baselines.bayesian(_mean(sampler), budget // trials, seed, trials, plan.bounds))


def bayesian_pooled(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """That search with re-use of everything: before each trial the process sees the pooled curve of all draws so far,
    at each lambda tried, and after `Plan.count` trials it ends at the top of that curve."""
    import optuna

    trials, sets, tried, path, best = plan.count(budget), [], [], [], None
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        for k in range(trials):
            gp = optuna.samplers.GPSampler(seed=derive_seed("Bayesian", seed, k), n_startup_trials=4)
            study = optuna.create_study(direction="maximize", sampler=gp)
            range_ = optuna.distributions.FloatDistribution(*plan.bounds, log=True)
            for lam in tried:
                value = math.asinh(_pooled_mean(best.samples, lam))
                given = {"params": {"lam": lam}, "distributions": {"lam": range_}, "value": value}
                study.add_trial(optuna.trial.create_trial(**given))
            tried.append(study.ask({"lam": range_}).params["lam"])
            sets += sampler.ladder(tried[-1], budget // trials)
            best = _Top.of(sets, plan.bounds)
            path.append([best.samples.cost, best.lam, 0.0])
    finally:
        optuna.logging.set_verbosity(before)
    name = "Bayesian, all draws"
    return Choice(name, best.lam, best.samples.cost, path, interval=best.interval, trials=trials, said=best.said)


def weighted_sum(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """The best mean of a few weights w of the law p_0 exp((r_low + w r_up)/start), a run for each; it ends after them.

    A tenth of the budget goes to draws of p_0, for the standard deviation that w is told in. Another family of laws.
    """
    first = sampler.plain(budget // 10)
    weights = [w / first.r_up.std().item() for w in plan.weights]
    forwards = (budget - first.cost) // len(weights)
    found = baselines.weighted_sum(lambda lam, n, _, w: sampler.mean(lam, n, w), forwards, seed, plan.start, weights)
    return _of(replace(found, cost=found.cost + first.cost))


def adaptive_kl(sampler: Sampler, budget: int, seed: int, plan: Plan, target: int = 0) -> Choice:
    """Control of the divergence from p_0, by pooling of each run, to one of `targets`; r_up is never looked at.

    It ends after `Plan.count` runs, at the geometric mean of the second half of its lambdas.
    """
    trials = plan.count(budget)

    def evaluate(lam: float, forwards: int, _: int) -> Evaluation:
        sets = sampler.ladder(lam, forwards)
        pooled = TiltSamples.pooled(*sets)
        return Evaluation(_pooled_mean(pooled, lam), 0.0, pooled.cost, pooled.tilt(lam)[1]["kl"])

    options = {"target": plan.targets[target], "lam": plan.start, "trials": trials, "bounds": plan.bounds}
    found = baselines.adaptive_kl(evaluate, budget // trials, seed, **options)
    return _of(found, f"{KL}, {plan.targets[target]:g} nats")


def plain_curve(sampler: Sampler, budget: int, seed: int, plan: Plan) -> Choice:
    """The top of the reweighted curve of draws of p_0 alone, where their effective sample size suffices."""
    return _of(baselines.reweighted_curve(sampler.plain(budget), plan.bounds), "curve of p_0")


def aligned(sampler: Sampler, budget: int, seed: int, plan: Plan, which: int = 0) -> Choice:
    """A strength chosen when sampling, from one aligned law: the geometric mixtures p_0^(1-a) p_aligned^a of two laws.

    The idea of DeRaDiff (arXiv 2601.20198). Where the aligned law is the tilt at lambda_0 the mixture is, exactly, the
    tilt at lambda_0/a, for a in (0, 1]: one run down to a lambda_0 of `Plan.aligned`, of which the first and the last
    level count, and the top of their pooled curve above lambda_0.
    """
    end = plan.aligned[which]
    sets = sampler.ladder(end, budget)
    found = _read_off(f"{ALIGNED}, {end:g}", (sets[0], sets[-1]), (end, plan.bounds[1]))
    cost = sum(each.cost for each in sets)
    return replace(found, cost=cost, path=[[cost, found.lam, 0.0]])


METHODS: dict[str, Callable[[Sampler, int, int, Plan], Choice]] = {
    OURS: exchange,
    "Algorithm 2": algorithm_2,
    "none": none,
    "grid": grid,
    "random": random,
    "Bayesian": bayesian,
    "Bayesian, all draws": bayesian_pooled,
    "weighted sum": weighted_sum,
    "curve of p_0": plain_curve,
}


def contestants(plan: Plan) -> dict[str, Callable[[Sampler, int, int, Plan], Choice]]:
    """METHODS, and the two that have a constant to choose, once for each value of it in the plan."""
    steered = {f"{KL}, {at:g} nats": partial(adaptive_kl, target=i) for i, at in enumerate(plan.targets)}
    mixed = {f"{ALIGNED}, {at:g}": partial(aligned, which=i) for i, at in enumerate(plan.aligned)}
    return METHODS | steered | mixed


@dataclass(frozen=True)
class _Top:
    """The top of the pooled curve of sets between bounds, with its interval, whose errors count chains."""

    samples: TiltSamples
    lam: float
    interval: tuple[float, float]
    said: str

    @classmethod
    def of(cls, sets: Sequence[TiltSamples], bounds: tuple[float, float]) -> _Top:
        samples = TiltSamples.pooled(*sets)
        low, high = map(math.log, bounds)
        lams = torch.linspace(low, high, 161, dtype=torch.float64).exp()
        curve = samples.curve(lams, min_ess=min(10.0, samples.tilt(bounds[1])[1]["ess"] / 2))
        lam = min(max(curve.best, curve.lam[0].item()), curve.lam[-1].item())
        return cls(samples, lam, tuple(min(max(end, bounds[0]), bounds[1]) for end in curve.interval), curve.said)


def _read_off(name: str, sets: Sequence[TiltSamples], bounds: tuple[float, float]) -> Choice:
    top = _Top.of(sets, bounds)
    cost = top.samples.cost
    return Choice(name, top.lam, cost, [[cost, top.lam, 0.0]], interval=top.interval, said=top.said)


def _pooled_mean(samples: TiltSamples, lam: float) -> float:
    return (samples.tilt(lam)[0] @ samples.r_up).item()


def _mean(sampler: Sampler) -> baselines.Evaluate:
    return lambda lam, forwards, _: sampler.mean(lam, forwards)


def _of(found: Search, name: str = "") -> Choice:
    path, trials = baselines.path(found), len(found.trials)
    return Choice(name or found.name, found.lam, found.cost, path, found.weight, trials=trials, said=found.said)


# ---------------------------------------------------------------- the race


def race(
    truth: Truth,
    each: int,
    *,
    seed: int,
    folder: Path,
    plan: Plan | None = None,
    budgets: Sequence[int] = BUDGETS,
    methods: Sequence[str] = (),
    folds: int = FOLDS,
    plain: Tensor | None = None,
    problem: Problem | None = None,
    device: torch.device | str = "cpu",
    bar: bool = False,
) -> list[dict]:
    """Every method at every budget on each fold of a prompt's chains, marked by the others: a row each.

    each     the price of a draw of p_0 in image forwards;  methods: names of `contestants`; none: all
    plain    draws of p_0, (n, 2 or more), r_low and r_up first, shared out over folds, as `tilted_truth.plain` makes
    problem  draw for real with it instead of from the record, on `device`
    A piece for each fold and budget, in `folder`: a killed race goes on there. Rows: "prompt", "repetition", "budget",
    what the method chose as in `Choice`, and what `mark` says; or "short", why the record did not suffice.
    """
    plan, rows = plan or Plan(), []
    known = contestants(plan)
    names = [*(methods or known)]
    record = [[run.config["chains"], len(run.history["low"]), run.cost] for run in truth.runs]
    config = {"prompt": truth.prompt, "each": each, "seed": seed, "plan": _plain(asdict(plan)), "folds": folds}
    config |= {"methods": names, "record": record, "plain": 0 if plain is None else len(plain)}
    config |= {"drawn": problem.about if problem else None}
    jobs = [(fold, budget) for fold in range(folds) for budget in budgets]
    for fold, budget in tqdm(jobs, f"{truth.prompt}: race", disable=not bar):
        one = derive_seed("race", truth.prompt, seed, fold, budget)

        def sampler(method: str, fold: int = fold, one: int = one) -> Sampler:
            if problem:
                own = derive_seed(method, one)
                moves = {name: truth.runs[0].config[name] for name in ("gradient", "accept")}
                options = {"moves": moves, "device": device, "batch": 48 if str(device) == "cpu" else 128}
                return Exact(problem.G, problem.pull, problem.measure, own, plan, **options)
            return Recorded(truth.split(folds, fold)[0], each, plan, None if plain is None else plain[fold::folds])

        def attempt(name: str, sampler: Sampler, budget: int, one: int) -> dict:
            try:
                return _row(known[name](sampler, budget, one, plan))
            except ShortRecord as error:
                return {"method": name, "short": str(error)}

        def compute(budget: int = budget, one: int = one, sampler: Callable = sampler) -> dict:
            return {"rows": [attempt(name, sampler(name), budget, one) for name in names]}

        path = folder / f"race_{slug(truth.prompt)}_{'drawn' if problem else 'recorded'}_{fold}_{budget}.json"
        found = files.piece(path, config | {"fold": fold, "budget": budget}, compute)["rows"]
        rows += [{"prompt": truth.prompt, "repetition": fold, "budget": budget} | row for row in found]
    return mark(truth, rows, folds)


def _row(choice: Choice) -> dict:
    path = [[cost, _number(lam), weight] for cost, lam, weight in choice.path]
    interval = choice.interval and [*choice.interval]
    return asdict(choice) | {"lam": _number(choice.lam), "path": path, "interval": interval}


def _number(lam: float) -> float | None:
    return lam if math.isfinite(lam) else None  # JSON has no infinity


def _plain(values: Mapping) -> dict:
    """As JSON gives it back."""
    return {name: [_number(v) for v in x] if isinstance(x, tuple) else x for name, x in values.items()}


def mark(truth: Truth, rows: Sequence[dict], folds: int) -> list[dict]:
    """Rows of a prompt with the means at the chosen lambda ("clip", "caption", "digit", ...) and the "regret", by the
    chains outside of the fold of their "repetition".

    "regret", "regret_se"  the best certified mean score minus that at lambda, with the error of the difference
    "below"                lambda lies below the certified range, and is marked at its end
    Raises ValueError where nothing is certified.
    """
    known = [lam for lam in (truth.certificate.down_to, *truth.strengths()) if lam and truth.certifies(lam)]
    if not known:
        raise ValueError(f"{truth.prompt!r} is {truth.certificate}, so that no regret can be told")
    down_to, rests, marked = truth.certificate.down_to, {}, []
    for row in rows:
        if "short" in row:
            marked.append(row)
            continue
        if row["repetition"] not in rests:
            rest = truth.split(folds, row["repetition"])[1]
            rests[row["repetition"]] = rest, max(known, key=lambda lam: rest.look(lam)[0][0])
        rest, best = rests[row["repetition"]]
        lam = math.inf if row["lam"] is None else row["lam"]
        below = not truth.certifies(lam)
        lam = down_to if below else lam
        regret, error = rest.gap(best, lam, row["weight"])
        found = {"regret": regret, "regret_se": error, "below": below, "best": _number(best)}
        marked.append(row | found | rest.means(lam, row["weight"]))
    return marked


def summaries(rows: Sequence[dict], reference: str = OURS, tie: float = 1e-9) -> list[dict]:
    """What `race` of several prompts says, for each budget and method: the curves from cost to regret.

    "regret", "difference"  Student's intervals over repetitions, each the mean over prompts; the difference is regret
                            minus that of the reference, paired by prompt and repetition, with its "verdict"
    "by prompt"             the same difference, its interval over prompts, each the mean over repetitions; None for one
    "worst", "cost", "below", "clip", "caption", "digit"   the largest regret, and means over all rows
    "prompts"               of how many: those at which the record sufficed for the method in every repetition and for
                            the reference; at fewer than half of all prompts it has no row
    """
    found, prompts = [], {row["prompt"] for row in rows}
    for budget in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == budget]
        short = {(row["method"], row["prompt"]) for row in own if "short" in row}
        for method in dict.fromkeys(row["method"] for row in own):
            held = [p for p in prompts if not {(method, p), (reference, p)} & short]
            pair = [row for row in own if row["method"] in (method, reference) and row["prompt"] in held]
            if 2 * len(held) < len(prompts):
                continue
            tables = []
            for seed, prompt in (("repetition", "prompt"), ("prompt", "repetition")):
                turned = [
                    {"method": r["method"], "regret": r["regret"], "seed": r[seed], "prompt": r[prompt]} for r in pair
                ]
                enough = seed == "repetition" or len(held) > 1
                tables.append({s.method: s for s in baselines.summarise(turned, reference, tie)} if enough else {})
            summary, mine = tables[0][method], [row for row in pair if row["method"] == method]
            mean = {n: sum(r[n] for r in mine) / len(mine) for n in ("cost", "below", "clip", "caption", "digit")}
            found.append(
                {"budget": budget, "method": method, "regret": summary.regret, "difference": summary.difference}
                | {"verdict": summary.verdict, "worst": max(row["regret"] for row in mine), "prompts": len(held)}
                | mean
                | {"by prompt": tables[1][method].difference if tables[1] else None}
            )
    return found


def emulation(drawn: Sequence[dict], recorded: Sequence[dict]) -> list[dict]:
    """How far the regrets of real runs lie from those of recorded segments, where both ran: a row a method and budget.

    "drawn", "recorded", "difference" (drawn minus recorded)  Student's intervals over repetitions, each the mean over
    prompts
    """
    sides = []
    for name, rows in (("drawn", drawn), ("recorded", recorded)):
        whole = [row for row in rows if "short" not in row]
        keys = {(r["method"], r["budget"], r["repetition"], r["prompt"]): r["regret"] for r in whole}
        sides.append((name, keys))
    both, found = [key for key in sides[0][1] if key in sides[1][1]], []
    for method, budget in dict.fromkeys(key[:2] for key in both):
        rows = [
            {"method": name, "seed": key[2], "prompt": key[3], "regret": keys[key]}
            for name, keys in sides
            for key in both
            if key[:2] == (method, budget)
        ]
        real, played = baselines.summarise(rows, "recorded")
        found.append({"method": method, "budget": budget, "drawn": real.regret, "recorded": played.regret})
        found[-1]["difference"] = real.difference
    return found
