"""Many strengths at once, at equal network cost: where a gradient should win. By gradients, and by four searches.

A vector of strengths x (m,), of either sign, is worth J(x) = E r_up - kappa KL(p_x || p_0), and nobody is told J: it is
estimated by drawing, and drawing is paid. Two problems. `Rewards`: a strength for each of several rewards, of the law
p_0 exp(sum_j x_j r_j), drawn exactly. `Steps`: a strength for each step of a guided sampler, whose own law counts. A
search pays for every value that it asks for; what goes by gradients pays for them (`climb`). All stop at one budget,
and what they return is marked by draws of no method (`contest`).

The protocol of `record`: SIZES, the box [-3, 3]^m of the searches and the price kappa were settled on the validation
digit of DIGITS, where gradients were looked at for every m and two searches at m = 9; the test digit is drawn once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ... import estimators
from ...guidance import LookAhead
from ...samplers import ddim_coefficients, sample_ddim, timesteps
from ...seeds import derive_seed
from ...tempering import NoiseMap, noise_map, sample_tempered
from .. import files
from ..certificates import effective_draws
from ..models import networks
from . import baselines
from .strength_race import Plan
from .strengths import Strengths

COUNTS = (1, 3, 9, 30)  # of strengths
RUNS = 5
GRADIENT = 5  # image forwards of a guided step with its derivative: by counted operations 4.7


class Found(NamedTuple):
    """What a method returns, x (m,), and what it cost; trials: values, or gradients, that it asked for."""

    x: Tensor
    cost: int
    trials: int


class Problem(Protocol):
    """m strengths;  each: the price of a value, in image forwards."""

    m: int
    each: int

    def value(self, x: Tensor, seed: int) -> float:
        """J at x (m,) by draws of its own; one seed, common noise."""

    def climb(self, budget: int, seed: int) -> Found:
        """By gradients, from x = 0."""


# ---------------------------------------------------------------- a strength for each of several rewards


class Drawn(NamedTuple):
    """Draws of the law with strengths `at` (m,): r_up (n,), r_low (m, n), worth `size` independent ones."""

    at: Tensor
    r_up: Tensor
    r_low: Tensor
    size: float
    cost: int


@dataclass(frozen=True)
class Rewards:
    """Laws p_0 exp(sum_j x_j r_j) of a sampler as a map of its noise, drawn by exchange runs over shares of x.

    r_up  of images -> (B,);  r_low: of images -> (B, m), standardised;  kappa > 0: the price of a nat
    forwards  paid for a value;  shares: of x at the levels of a run, 0 first and 1 last;  rounds: of `climb`
    """

    G: NoiseMap
    r_up: Callable[[Tensor], Tensor]
    r_low: Callable[[Tensor], Tensor]
    m: int
    kappa: float
    forwards: int
    shares: tuple[float, ...] = (0.0, 0.35, 0.7, 1.0)
    rounds: int = 6
    batch: int = 500
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def each(self) -> int:
        return self.forwards

    def draw(self, x: Tensor, forwards: int, seed: int) -> list[Drawn]:
        """A set for each level of a run down to x, or draws of p_0 alone at x = 0, for at most so many forwards."""
        generator = torch.Generator(self.device).manual_seed(seed)
        if not x.any():
            return [self._plain(forwards // self.G.cost, generator)]
        lams = [math.inf if share == 0 else 1 / share for share in self.shares]
        chains, warmup, sweeps = Plan(ladder=tuple(lams)).shape(lams[-1], self.G.cost, forwards)
        run = sample_tempered(
            self.G,
            lambda images: self.r_low(images).double() @ x.to(self.device),
            lams,
            sweeps=sweeps,
            warmup=warmup,
            chains=chains,
            measure=self._measure,
            generator=generator,
            dtype=self.dtype,
            micro_batch=self.batch,
        )
        rows, sets = run.history["measured"][warmup:], []  # (S, L, C, 1 + m)
        for i, share in enumerate(self.shares):
            seen = rows[:, i]
            size = min(effective_draws(seen[..., 0].T), effective_draws((seen[..., 1:] @ x).T))
            cost = run.cost * (i + 1) // len(lams) - run.cost * i // len(lams)
            flat = seen.flatten(0, 1)
            sets.append(Drawn(share * x, flat[:, 0], flat[:, 1:].T, size, cost))
        return sets

    def _measure(self, images: Tensor) -> Tensor:
        return torch.cat([self.r_up(images).double()[:, None], self.r_low(images).double()], 1)

    @torch.no_grad()
    def _plain(self, n: int, generator: torch.Generator) -> Drawn:
        sizes = [min(self.batch, n - first) for first in range(0, n, self.batch)]
        on = {"generator": generator, "device": self.device, "dtype": self.dtype}
        rows = [self._measure(self.G.run(torch.randn(size, *self.G.shape, **on))).cpu() for size in sizes]
        up, *low = torch.cat(rows).T
        return Drawn(torch.zeros(self.m, dtype=torch.float64), up, torch.stack(low), float(n), n * self.G.cost)

    def value(self, x: Tensor, seed: int) -> float:
        sets = self.draw(x, self.forwards, seed)
        return pooled(sets, self.kappa).worth(x)["J"]

    def climb(self, budget: int, seed: int) -> Found:
        """Natural gradient on the pool of everything drawn, as far as it reaches, then draws there; `rounds` of them.

        The first draws are of p_0. Nothing is thrown away, and the last word has the pool: x with its largest J.
        """
        part, x = budget // self.rounds, torch.zeros(self.m, dtype=torch.float64)
        sets = self.draw(x, part, derive_seed("climb", seed, 0))
        for k in range(1, self.rounds):
            x = ascend(pooled(sets, self.kappa), x, self.reach)
            sets += self.draw(x, part, derive_seed("climb", seed, k))
        return Found(ascend(pooled(sets, self.kappa), x, self.reach), sum(each.cost for each in sets), self.rounds)

    @property
    def reach(self) -> float:
        """The effective sample size down to which a pool is followed: for more strengths it must be larger."""
        return max(30.0, 2.0 * self.m)


def pooled(sets: Sequence[Drawn], kappa: float) -> Strengths:
    """All draws as one set that stands for p_0, by `estimators.pool`; the first set must be of p_0, at = 0."""
    laws: dict[tuple, list[Drawn]] = {}
    for each in sets:
        laws.setdefault(tuple(each.at.tolist()), []).append(each)
    flat = [each for law in laws.values() for each in law]
    r_up, r_low = torch.cat([each.r_up for each in flat]), torch.cat([each.r_low for each in flat], 1)
    sizes = torch.tensor([sum(each.size for each in law) for law in laws.values()], dtype=torch.float64)
    count = torch.cat([torch.full_like(each.r_up, each.size / len(each.r_up)) for each in flat])
    log_w, _ = estimators.pool(torch.tensor(list(laws), dtype=torch.float64) @ r_low, sizes, count)
    return Strengths(r_up, r_low, kappa, log_w)


def ascend(problem: Strengths, x: Tensor, min_ess: float, steps: int = 60) -> Tensor:
    """Natural gradient ascent of J from x; steps that do not help, or leave too few effective samples, are halved."""
    best, rate = problem.worth(x)["J"], 1.0
    ridge = 1e-3 * torch.eye(len(x), dtype=torch.float64)
    for _ in range(steps):
        step = -torch.linalg.solve(problem.fisher(x) + ridge, problem.hypergrad(x)) / problem.kappa
        found = problem.worth(x + rate * step)
        if found["J"] > best and found["ess"] >= min_ess:
            x, best, rate = x + rate * step, found["J"], min(1.0, 2 * rate)
        else:
            rate /= 2
        if rate < 1e-4:
            break
    return x


# ---------------------------------------------------------------- a strength for each step of a guided sampler


@dataclass(frozen=True)
class Steps:
    """DDIM guided by x_j r_low at the steps of group j, of m groups of equal length; J by the sampler's own law.

    denoiser, abar, ts, shape, eta > 0  as for `sample_ddim`;  r_low, r_up: of x_0 -> (B,), both differentiable
    n  samples for a value;  KL: of the paths (`comparisons.path_kl`), an upper bound of that of what is sampled
    The last step adds no noise and is not guided. A value takes forward and backward at each guided step; its
    derivative, by reverse mode, GRADIENT times a forward.
    """

    denoiser: Callable[[Tensor, int], Tensor]
    abar: Tensor
    ts: list[int]
    shape: tuple[int, ...]
    r_low: Callable[[Tensor], Tensor]
    r_up: Callable[[Tensor], Tensor]
    m: int
    kappa: float
    n: int
    eta: float = 1.0
    rate: float = 0.3
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if not 1 <= self.m < len(self.ts):
            raise ValueError(f"m = {self.m} strengths for {len(self.ts) - 1} guided steps: at least one step for each")

    def _price(self, guided: int, last: int) -> int:
        return self.n * getattr(self.denoiser, "passes", 1) * (guided * (len(self.ts) - 1) + last)

    @property
    def each(self) -> int:
        return self._price(2, 1)

    def _worth(self, x: Tensor, seed: int) -> Tensor:
        """J (), differentiable in x where gradients are enabled."""
        generator, kl = torch.Generator(self.device).manual_seed(seed), [torch.zeros((), device=self.device)]
        after = dict(zip(self.ts, [*self.ts[1:], 0], strict=True))
        group = {t: i * self.m // (len(self.ts) - 1) for i, t in enumerate(self.ts[:-1])}

        def denoise(z: Tensor, t: int) -> Tensor:
            if t not in group:
                return self.denoiser(z, t)
            strength = x[group[t]].to(self.device, self.dtype)
            guide = LookAhead(self.denoiser, lambda x0: strength * self.r_low(x0), 1.0, self.abar, self.ts)
            hat, guided, _ = guide.look(z, t)
            _, c_eps, sigma = ddim_coefficients(self.abar, t, after[t], self.eta)
            shift = (guided - hat).flatten(1).double().square().sum(1).mean()
            kl.append(shift * (c_eps**2 / (2 * sigma**2)).item())
            return guided

        start = torch.randn(self.n, *self.shape, generator=generator, device=self.device, dtype=self.dtype)
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # at x = 0 nothing is guided
            x0 = sample_ddim(denoise, start, self.abar, self.ts, eta=self.eta, generator=generator)
            return self.r_up(x0).double().mean() - self.kappa * torch.stack([each.double() for each in kl]).sum()

    @torch.no_grad()
    def value(self, x: Tensor, seed: int) -> float:
        return self._worth(x, seed).item()

    def gradient(self, x: Tensor, seed: int) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self._worth(x, seed), x)[0]

    def climb(self, budget: int, seed: int) -> Found:
        """Adam with fresh noise at each step and a rate that falls to zero; the mean of the last third of its path."""
        price = self._price(GRADIENT, 2)
        steps = budget // price
        if steps < 3:
            raise ValueError(f"a budget of {budget} has {steps} gradients at {price}, and at least 3 are needed")
        x = torch.zeros(self.m, dtype=torch.float64, requires_grad=True)
        adam, path = torch.optim.Adam([x], self.rate, maximize=True), []
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for k in range(steps):
            x.grad = self.gradient(x, derive_seed("climb", seed, k))
            adam.step()
            falling.step()
            path.append(x.detach().clone())
        return Found(torch.stack(path[-max(1, steps // 3) :]).mean(0), steps * price, steps)


# ---------------------------------------------------------------- searches: (problem, budget, seed, bound) -> Found


def _evaluations(problem: Problem, budget: int, least: int) -> int:
    count = budget // problem.each
    if count < least:
        raise ValueError(f"a budget of {budget} has {count} values at {problem.each}, and {least} are needed: raise it")
    return count


def by_random(problem: Problem, budget: int, seed: int, bound: float) -> Found:
    """The best of uniform draws in [-bound, bound]^m."""
    count, generator = _evaluations(problem, budget, 1), torch.Generator().manual_seed(seed)
    tried = (2 * torch.rand(count, problem.m, generator=generator, dtype=torch.float64) - 1) * bound
    values = [problem.value(x, derive_seed("value", seed, k)) for k, x in enumerate(tried)]
    return Found(tried[int(torch.tensor(values).argmax())], count * problem.each, count)


def by_gaussian_process(problem: Problem, budget: int, seed: int, bound: float) -> Found:
    """The best value of optuna's Gaussian process in that box."""
    import optuna

    count, before = _evaluations(problem, budget, 1), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=min(8, count))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for k in range(count):
            trial = study.ask()
            x = [trial.suggest_float(str(i), -bound, bound) for i in range(problem.m)]
            x = torch.tensor(x, dtype=torch.float64)
            study.tell(trial, problem.value(x, derive_seed("value", seed, k)))
        best = [study.best_params[str(i)] for i in range(problem.m)]
    finally:
        optuna.logging.set_verbosity(before)
    return Found(torch.tensor(best, dtype=torch.float64), count * problem.each, count)


def by_cma_es(problem: Problem, budget: int, seed: int, bound: float) -> Found:
    """The mean of CMA-ES (library cmaes) in that box after whole generations, from 0 with steps of a third of it."""
    import cmaes
    import numpy as np

    m = max(problem.m, 2)  # the library wants two: the second counts for nothing
    search = cmaes.CMA(np.zeros(m), bound / 3, bounds=np.array([[-bound, bound]] * m), seed=seed)
    count, k = _evaluations(problem, budget, search.population_size), 0
    while k + search.population_size <= count:
        told = []
        for _ in range(search.population_size):
            x = search.ask()
            told.append((x, -problem.value(torch.tensor(x[: problem.m]), derive_seed("value", seed, k))))
            k += 1
        search.tell(told)
    mean = torch.tensor(search.mean[: problem.m]).clamp(-bound, bound)
    return Found(mean, k * problem.each, k)


def by_differences(problem: Problem, budget: int, seed: int, bound: float, delta: float = 0.1) -> Found:
    """L-BFGS-B (scipy) in that box, from 0, on differences over delta with common noise; the best value seen.

    It ends where it converges, which may be before the budget does.
    """
    from scipy.optimize import minimize

    count, seen = _evaluations(problem, budget, problem.m + 1), []

    class Spent(Exception):
        pass

    def value(x: Tensor) -> float:
        if len(seen) == count:
            raise Spent
        seen.append((problem.value(x, derive_seed("value", seed)), x))
        return seen[-1][0]

    def loss(x: object) -> tuple[float, object]:
        x = torch.as_tensor(x, dtype=torch.float64).clone()
        here, steps = value(x), torch.diag(torch.where(x + delta > bound, -delta, delta).double())
        slope = [(value(x + step) - here) / step.sum().item() for step in steps]
        return -here, -torch.tensor(slope, dtype=torch.float64).numpy()

    try:
        start = torch.zeros(problem.m, dtype=torch.float64).numpy()
        minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(-bound, bound)] * problem.m)
    except Spent:
        pass
    return Found(max(seen, key=lambda pair: pair[0])[1], len(seen) * problem.each, len(seen))


METHODS: dict[str, Callable[[Problem, int, int, float], Found]] = {
    "gradient": lambda problem, budget, seed, bound: problem.climb(budget, seed),
    "random": by_random,
    "Gaussian process": by_gaussian_process,
    "CMA-ES": by_cma_es,
    "L-BFGS on differences": by_differences,
}


def contest(
    problem: Problem,
    mark: Callable[[Tensor], float],
    budget: int,
    *,
    name: str,
    config: dict,
    folder: Path,
    runs: int = RUNS,
    seed: int = 0,
    bound: float = 3.0,
    methods: Sequence[str] = tuple(METHODS),
) -> list[dict]:
    """Every method `runs` times on a problem at one budget: a row each, of which `mark` says J at what it returned.

    mark    x (m,) -> J by draws that no method saw;  config: what decides the problem, ready for JSON
    A piece for each run, in `folder`: a killed contest goes on there. Rows: "name", "m", "run", "method", "x", "cost",
    "trials", "J".
    """
    config, rows = config | {"name": name, "m": problem.m, "budget": budget, "seed": seed, "bound": bound}, []
    for run in range(runs):

        def compute(run: int = run) -> dict:
            found = []
            for method in methods:
                got = METHODS[method](problem, budget, derive_seed("many strengths", name, problem.m, seed, run), bound)
                row = {"method": method, "x": got.x.tolist(), "cost": got.cost, "trials": got.trials}
                found.append(row | {"J": mark(got.x)})
            return {"rows": found}

        path = folder / f"strengths_{name}_{problem.m}_{run}.json"
        made = files.piece(path, config | {"run": run, "methods": [*methods]}, compute)["rows"]
        rows += [{"name": name, "m": problem.m, "run": run} | row for row in made]
    return rows


def summaries(rows: Sequence[dict], reference: str = "gradient") -> list[dict]:
    """For each problem, number of strengths and method: mean "J" and its "gain" over the reference's, paired by run,
    with Student's intervals over runs, the "verdict" on the method and its mean "cost"."""
    found = []
    for name, m in dict.fromkeys((row["name"], row["m"]) for row in rows):
        own = [row for row in rows if (row["name"], row["m"]) == (name, m)]
        turned = [{"method": r["method"], "seed": r["run"], "prompt": name, "regret": -r["J"]} for r in own]
        for each in baselines.summarise(turned, reference):
            cost = [row["cost"] for row in own if row["method"] == each.method]
            J, gain = (type(v)(-v.mean, -v.hi, -v.lo) for v in (each.regret, each.difference))
            row = {"name": name, "m": m, "method": each.method, "J": J, "gain": gain, "verdict": each.verdict}
            found.append(row | {"cost": sum(cost) / len(cost)})
    return found


# ---------------------------------------------------------------- both problems on 8x8 digits

DIGITS = {"validation": 5, "test": 3}  # what the upper reward asks for
SIZES = {
    "rewards": {"kappa": 0.2, "steps": 10, "forwards": 1000, "budget": 40_000, "mark": 15_000},
    "steps": {"kappa": 0.2, "steps": 32, "n": 16, "budget": 40_000, "mark": 256},
}


@dataclass(frozen=True)
class Likeness:
    """log of the probability that images show a digit, by a frozen classifier, in its standard deviations under p_0."""

    classifier: Callable[[Tensor], Tensor]
    digit: int
    mean: float = 0.0
    sd: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        found = self.classifier(images.clamp(-1, 1)).log_softmax(1)[:, self.digit]
        return (found - self.mean) / self.sd


@dataclass(frozen=True)
class Features:
    """The first m of the classifier's features of images (B, m), standardised: mean, sd (m,) are those under p_0."""

    classifier: networks.Classifier8
    m: int
    mean: Tensor | float = 0.0
    sd: Tensor | float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        if not 1 <= self.m <= self.classifier.num_features:
            raise ValueError(
                f"m = {self.m} is not among 1 to {self.classifier.num_features}, the classifier's features"
            )
        return (self.classifier.features(images.clamp(-1, 1))[:, : self.m] - self.mean) / self.sd


def digits8(kind: str, m: int, digit: int, *, draws: int = 2000, **sizes: float) -> tuple[Problem, Callable, dict]:
    """`Rewards` or `Steps` ("rewards", "steps") with m strengths: the upper reward is likeness to a digit.

    The sampler is that of chapter 7's recorded network for 8x8 digits, which hears no prompt. "rewards" tilts it by the
    first m features of the classifier; "steps" guides it by likeness itself, m strengths for its steps.
    sizes  as in SIZES;  draws: samples of p_0 that standardise
    Returns the problem, `mark` for `contest` and what decides both. Raises ValueError for another kind.
    """
    from .. import results
    from ..models.fast import fast
    from . import schedule_race

    if kind not in SIZES:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(SIZES)}")
    sizes = SIZES[kind] | sizes
    _, network, abar, _ = schedule_race.restore(results.find("07_noise_schedule.safetensors"))
    network.requires_grad_(False)
    side, ts = network.side, timesteps(len(abar) - 1, int(sizes["steps"]))
    quick = fast(network, torch.zeros(2, 1, side, side))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that abar_T is not 0: what this sampler draws from N(0, I) is p_0
        G = noise_map(quick, abar, ts, (1, side, side), eta=1.0)
        generator = torch.Generator().manual_seed(derive_seed("many strengths", "scale"))
        images = G.run(torch.randn(draws, *G.shape, generator=generator))
        classifier = networks.load_classifier("mnist8")
        up, low = Likeness(classifier, digit)(images).double(), Features(classifier, m)(images)
    likeness = Likeness(classifier, digit, up.mean().item(), up.std().item())
    features = Features(classifier, m, low.mean(0), low.std(0))
    about = {"kind": kind, "m": m, "digit": digit, "draws": draws, "classifier": "mnist8"} | sizes
    if kind == "rewards":
        own = (G, likeness, features, m, sizes["kappa"])
        problem, marks = (Rewards(*own, forwards=int(sizes[key])) for key in ("forwards", "mark"))
    else:
        own = (network, abar, ts, (1, side, side), likeness, likeness, m, sizes["kappa"])
        problem, marks = (Steps(*own, n=int(sizes[key])) for key in ("n", "mark"))
    return problem, lambda x: marks.value(x, derive_seed("many strengths", "mark")), about


def record(
    digit: int, *, folder: Path, counts: Sequence[int] = COUNTS, runs: int = RUNS, bar: bool = False, **sizes: float
) -> list[dict]:
    """`contest` on both problems of `digits8` for every number of strengths; in pieces, in `folder`."""
    rows, jobs = [], [(kind, m) for kind in SIZES for m in counts]
    for kind, m in tqdm(jobs, "many strengths", disable=not bar):
        problem, mark, about = digits8(kind, m, digit, **sizes)
        about = {name: value for name, value in about.items() if name not in ("m", "budget")}
        rows += contest(
            problem, mark, int((SIZES[kind] | sizes)["budget"]), name=kind, config=about, folder=folder, runs=runs
        )
    return rows
