"""Chapter 9's experiment: a schedule learned for few DDIM steps, which part of it matters, and whether it transfers.

The protocol, fixed before the test split was read:

- Source data: chapter 7's, with its networks, training, batch size and seeds. Algorithm 6 runs as it did there, with
  the same constants and the same number of trials to spend, but f is measured with `few` DDIM steps. Its competitors
  are what chapter 7 learned for `many` steps (the q of the same repetition), the best schedule for `few` steps if the
  training images were Gaussian (`best_schedule`: no network, no search), and three schedules that nobody searched for.
  Everyone's q trains a denoiser from scratch, with the same steps and seeds.
- Who trains, who steps. At `few` steps the denoisers of EARLY, of the Gaussian's schedule and of the default cosine
  also sample at other schedules' signal levels, that is at those of their own times whose levels are nearest. The rules
  of RULES get their ends from the cosine that stops at 0.95. "learned times" are the times of a denoiser of that
  schedule, by descent of the distance to the VALIDATION split through the sampler, with the weights fixed.
- Transfer: the q that chapter 7 learned on the source, unchanged, train denoisers of the target data, against the three
  schedules and against Algorithm 6 run on the target itself with `many` steps.
- Sampling starts from N(0, I), eta = 0. Searches and descents see training and validation splits only, and nothing in
  them was tuned here but the constants of `learn_times`, on the validation split with seed 9000. Whatever is reported
  is measured on the TEST split, by n samples. The features are those of the source's classifier on both data sets. The
  target's test split is small, so the Frechet distance has a bias there which all methods share; KID has none.
- Added after the rows of "few" had been read, because the Gaussian's schedule had won there: its denoisers and levels
  in "steps", and "gaussian", which carries it to the target beside the target's own.
- One seed is one repetition, search and training. Methods of one seed are compared in pairs. The run goes through PARTS
  in their order, from the questions to what rounds them off; a result names those that it has.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ... import schedules
from ...algorithms import ScoreTraining
from ...samplers import timesteps
from ...seeds import derive_seed
from .. import distances, places, results
from ..files import piece
from . import schedule_race
from .schedule_race import FIXED, Race, search_seed
from .setting import IMAGES, same_protocol, train_denoiser, training_end

EARLY = "cosine, end 0.95"  # the competitor that costs nothing
UNTUNED = (EARLY, "cosine", "linear")
PARTS = ("few", "steps", "transfer", "longer", "gaussian", "cliff", "untuned", "own")
RULES = ("log-SNR", "Karras", "angles")
TIMES = {"samples": 256, "rounds": 40, "rate": 0.02}  # of `learn_times`
SOURCE_RESULT = "07_noise_schedule_mnist"


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment; the defaults are those of the recorded run.

    source, target   two of `setting.IMAGES` with images of one size
    few, many        DDIM steps that schedules are learned for
    warm_steps, trials, trial_steps, n_val   the price of a search, as in `schedule_race.Plan`
    source_steps, target_steps   training steps of the denoisers that are compared
    n                samples that mark one;  grids: DDIM steps;  longer: more of them, where chapter 7 has no row
    """

    source: str = "mnist8"
    target: str = "digits8"
    few: int = 5
    many: int = 10
    T: int = 1000
    batch_size: int = 128
    warm_steps: int = 500
    trials: int = 15
    trial_steps: int = 60
    n_val: int = 1000
    source_steps: int = 1000
    target_steps: int = 400
    n: int = 5000
    grids: tuple[int, ...] = (3, 5, 10)
    longer: tuple[int, ...] = (20, 50)

    def __post_init__(self):
        for name in (self.source, self.target):
            if name not in IMAGES:
                raise ValueError(f"data {name!r} is not one of {', '.join(IMAGES)}")
        if IMAGES[self.source][1:] != IMAGES[self.target][1:]:
            raise ValueError(f"{self.source} and {self.target} must share size, denoiser and classifier")
        if not 1 <= self.few < self.many <= self.T:
            raise ValueError(f"few = {self.few} must be at least 1 and below many = {self.many}, within T = {self.T}")
        if self.few not in self.grids or self.many not in self.grids:
            raise ValueError(f"grids = {self.grids} must hold few = {self.few} and many = {self.many}")


# ---------------------------------------------------------------- levels, and the times that have them


def spaced(abar: Tensor, steps: int, rule: str, s: float = 1.0) -> Tensor:
    """Signal levels (steps,), rising from abar_T, for a grid that nobody learned; a jump to 1 follows the last.

    abar  (T+1,) gives the ends, abar_T and abar_1
    rule  "log-SNR": in equal steps of log-SNR, as many steps as lead from abar_T to abar_1, the last one left out
          "Karras": sigma^(1/7) in equal steps, sigma = sqrt(1/abar - 1), both ends included (arXiv 2206.00364)
          "angles": atan(sigma/s) in equal steps down to 0: the best grid for Gaussian data of standard deviation s
    """
    share = torch.arange(steps, dtype=torch.float64) / steps
    ends = schedules.log_snr(abar[[-1, 1]].double())
    high, low = (-ends / 2).exp()  # sigma
    if rule == "log-SNR":
        return torch.sigmoid(ends[0] + share * (ends[1] - ends[0]))
    if rule == "Karras":
        share = share * steps / max(steps - 1, 1)
        sigma = (high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif rule == "angles":
        sigma = s * torch.tan((1 - share) * torch.atan(high / s))
    else:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    return 1 / (1 + sigma**2)


def times_of(levels: Tensor, abar: Tensor) -> list[int]:
    """The times in 1..T, falling, whose log-SNR in a schedule abar (T+1,) is nearest to that of levels (steps,)."""
    if (levels[1:] <= levels[:-1]).any() or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"levels must rise within (0, 1); found {levels.tolist()}")
    known, wanted = schedules.log_snr(abar[1:].double()), schedules.log_snr(levels.double())
    ts, last = [], len(abar)
    for i, one in enumerate((known - wanted[:, None]).abs().argmin(1).tolist()):
        last = max(min(one + 1, last - 1), len(levels) - i)
        ts.append(last)
    return ts


def sample_at(denoiser: Callable, x: Tensor, abar: Tensor, times: Tensor) -> Tensor:
    """DDIM (eta = 0) at times (steps,) that need not be whole, falling within [1, T]; differentiable in them.

    The log-SNR between whole times is interpolated. At whole times the result is that of `samplers.sample_ddim`.
    """
    ell = schedules.log_snr(abar.double())
    below = times.detach().floor().long().clamp(1, len(abar) - 2)
    share = times - below
    at = (1 - share) * ell[below] + share * ell[below + 1]
    for i, t in enumerate(times):
        eps_hat = denoiser(x, t.float())
        x0_hat = (x - torch.sigmoid(-at[i]).sqrt().float() * eps_hat) / torch.sigmoid(at[i]).sqrt().float()
        if i + 1 == len(times):
            return x0_hat
        x = torch.sigmoid(at[i + 1]).sqrt().float() * x0_hat + torch.sigmoid(-at[i + 1]).sqrt().float() * eps_hat
    raise ValueError("times is empty")


def learn_times(
    denoiser: Callable,
    abar: Tensor,
    steps: int,
    quality: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    samples: int,
    rounds: int,
    rate: float,
    seed: int = 0,
) -> dict:
    """The DDIM times of a fixed denoiser, by descent of quality(images) -> () through the sampler.

    shape          of one image;  samples: images in a round, with fresh x_T
    rounds, rate   Adam steps from the uniform grid, of size rate T at first and falling to nothing
    Returns "ts", whole times from the mean over the second half, "path" (a row for each round) and "cost". The
    first time moves as well: where it leaves T, sampling starts later, from N(0, I) all the same.
    """
    T = len(abar) - 1
    u = torch.tensor(timesteps(T, steps), dtype=torch.float64) / T
    u.requires_grad_()
    adam, path, kept = torch.optim.Adam([u], lr=rate, betas=(0.5, 0.9)), [], []
    for k in range(rounds):
        generator = torch.Generator().manual_seed(derive_seed("times", seed, k))
        x = torch.randn((samples, *shape), generator=generator)
        value = quality(sample_at(denoiser, x, abar, u * T))
        (u.grad,) = torch.autograd.grad(value, u)
        adam.param_groups[0]["lr"] = rate * (1 - k / rounds)
        path.append({"f": value.item(), "times": (u.detach() * T).tolist()})
        adam.step()
        with torch.no_grad():
            for i in range(steps):  # within [1, T] and falling, whatever the step was
                u[i] = u[i].clamp((steps - i) / T, (u[i - 1] if i else 1 + 1 / T) - 1 / T)
        kept.append(u.detach().clone())
    mean = (torch.stack(kept[len(kept) // 2 :]).mean(0) * T).round().long().tolist()
    ts = [min([mean[i]] + [mean[j] - (i - j) for j in range(i)]) for i in range(steps)]
    return {"ts": ts, "path": path, "cost": rounds * samples * 2 * steps}


# ---------------------------------------------------------------- the same questions with exact answers


@dataclass(frozen=True)
class GaussianImages:
    """Images replaced by the Gaussian of their mean and covariance, in its principal axes; the denoiser is exact.

    mean, s  (d,)  mean and standard deviation along each axis
    """

    mean: Tensor
    s: Tensor

    @classmethod
    def of(cls, images: Tensor) -> GaussianImages:
        """That of images (n, ...)."""
        mean, cov = distances.moments(images.flatten(1))
        values, basis = torch.linalg.eigh(cov)
        return cls(mean @ basis, values.clamp(min=0).sqrt())

    def gains(self, levels: Tensor) -> Tensor:
        """(d,): what DDIM from N(0, I) at these signal levels (steps,) makes of a standard deviation of 1."""
        a, s2 = levels[:, None], self.s**2
        var = a * s2 + 1 - a
        into = ((a[:-1] * a[1:]).sqrt() * s2 + ((1 - a[:-1]) * (1 - a[1:])).sqrt()) / var[:-1]
        return into.prod(0) * a[-1].sqrt() * s2 / var[-1]

    def value(self, levels: Tensor) -> Tensor:
        """f, (): the Frechet distance, in pixels, of the samples' law to this one; differentiable in levels.

        The second term is what a start at N(0, I) instead of the law of x_T costs in the mean.
        """
        gains = self.gains(levels)
        return ((gains - self.s) ** 2 + levels[0] * gains**2 * self.mean**2).sum()


def levels(q: Sequence[float] | Tensor, steps: int, T: int = 1000, kind: str = "cosine") -> Tensor:
    """The signal levels (steps,), rising, that DDIM with so many steps visits; differentiable in q."""
    q = torch.as_tensor(q, dtype=torch.float64)
    return schedules.abar(q, T, kind)[timesteps(T, steps)]


def best_schedule(problem: GaussianImages, steps: int, T: int = 1000) -> tuple[Tensor, float]:
    """(q, f): the best cosine schedule for so many DDIM steps, by its exact hypergradient (L-BFGS, a few starts)."""

    def value(z: Tensor) -> Tensor:
        return problem.value(levels(schedules.expand(z), steps, T))

    bounds = [(0.0, 0.5), (0.6, 0.999), (0.1, 3.0)]
    starts = ([0.0, 0.95, 1.0], [0.05, 0.9, 0.7], [0.02, 0.98, 1.5])
    z, found = min((_minimise(value, start, bounds) for start in starts), key=lambda one: one[1])
    q = schedules.expand(z)
    schedules.check(q, T)
    return q, found


def best_levels(problem: GaussianImages, steps: int) -> tuple[Tensor, float]:
    """(levels (steps,), f): the best grid of all, whatever the schedule; no cosine can be below it."""

    def unfold(v: Tensor) -> Tensor:
        return torch.sigmoid(torch.cat([v[:1], v[:1] + v[1:].exp().cumsum(0)]))

    def value(v: Tensor) -> Tensor:
        return problem.value(unfold(v))

    starts = []
    for end in (0.9, 0.95, 0.98):
        ell = schedules.log_snr(levels((0.0, end, 1.0, 0.008), steps))
        starts.append([ell[0].item(), *ell.diff().log().tolist()])
    v, found = min((_minimise(value, start) for start in starts), key=lambda one: one[1])
    return unfold(v), found


def _minimise(value: Callable[[Tensor], Tensor], start: Sequence[float], bounds: object = None) -> tuple[Tensor, float]:
    from scipy.optimize import minimize

    def both(x):
        x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        y = value(x)
        return y.item(), torch.autograd.grad(y, x)[0].numpy()

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(both, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return torch.tensor(found.x, dtype=torch.float64), float(found.fun)


# ---------------------------------------------------------------- the study


@dataclass
class Study:
    """The experiment at one size. Every result is a piece in `folder`: a killed run goes on where it was.

    given   by seed, the q (4,) that was learned for `many` steps on the source
    device  of training and sampling;  bar: progress bars;  force: allows too few samples for a distance, for tests
    """

    plan: Plan
    folder: Path
    given: Mapping[int, Sequence[float]]
    device: torch.device | str = "cpu"
    bar: bool = False
    force: bool = False

    @property
    def few(self) -> str:
        return f"learned for {self.plan.few}"

    @property
    def many(self) -> str:
        return f"learned for {self.plan.many}"

    @property
    def own(self) -> str:
        return f"learned on {self.plan.target}"

    @property
    def exact(self) -> str:
        return f"Gaussian, for {self.plan.few}"

    @property
    def exact_own(self) -> str:
        return f"Gaussian of {self.plan.target}, for {self.plan.few}"

    @cached_property
    def problems(self) -> dict[str, GaussianImages]:
        """The training images of both data sets as Gaussians."""
        return {name: GaussianImages.of(self.race(name).x0.cpu()) for name in (self.plan.source, self.plan.target)}

    @cached_property
    def exact_q(self) -> dict[str, list[float]]:
        """What `best_schedule` says of them, rounded."""
        few, T = self.plan.few, self.plan.T
        best = {name: best_schedule(problem, few, T)[0].tolist() for name, problem in self.problems.items()}
        return {name: [round(value, 4) for value in q] for name, q in best.items()}

    def jobs(self, part: str) -> list[tuple[str, str, str]]:
        """(data, method, what to mark) of one of PARTS."""
        source, target = self.plan.source, self.plan.target
        return {
            "few": [(source, method, "grids") for method in (self.few, EARLY, self.many, self.exact)],
            "steps": [(source, method, "rules") for method in (EARLY, self.exact)],
            "transfer": [(target, method, "grids") for method in (self.many, EARLY)],
            "longer": [(source, self.exact, "longer")],
            "gaussian": [(target, method, "grids") for method in (self.exact_own, self.exact)],
            "cliff": [(source, "cosine", what) for what in ("rules", "grids")],
            "untuned": [(target, "linear", "grids"), (target, "cosine", "grids"), (source, "linear", "grids")],
            "own": [(target, self.own, "grids")],
        }[part]

    def race(self, name: str) -> Race:
        """Chapter 7's experiment, for its Algorithm 6: for `few` steps on the source, for `many` on the target."""
        plan = self.plan
        steps = plan.few if name == plan.source else plan.many
        sizes = {key: getattr(plan, key) for key in ("T", "batch_size", "warm_steps", "trials", "trial_steps", "n_val")}
        sizes = schedule_race.Plan(name=name, val_steps=steps, n=plan.n, grids=plan.grids, **sizes)
        return Race(sizes, self.folder / f"race_{name}_{steps}", self.device, bar=self.bar, force=self.force)

    def choose(self, name: str, method: str, seed: int) -> dict:
        """A method's schedule: "kind", "q", and what it "cost" here."""
        if method in UNTUNED:
            kind, q = FIXED[method]
            return {"kind": kind, "q": list(q), "cost": 0}
        if method == self.many:
            if seed not in self.given:
                raise ValueError(f"no q was given for seed {seed}, only for {sorted(self.given)}")
            return {"kind": "cosine", "q": list(self.given[seed]), "cost": 0}
        if method in (self.exact, self.exact_own):
            of = self.plan.source if method == self.exact else self.plan.target
            return {"kind": "cosine", "q": self.exact_q[of], "cost": 0}
        return self.race(name).learn("Algorithm 6", seed)

    def trained(self, name: str, method: str, seed: int) -> tuple[ScoreTraining, Tensor]:
        """A denoiser trained from scratch at a method's schedule, resumable, and its abar."""
        race, chosen = self.race(name), self.choose(name, method, seed)
        abar = race.abar(chosen["kind"], chosen["q"])
        steps = self.plan.source_steps if name == self.plan.source else self.plan.target_steps
        slug = schedule_race._slug(name, method, seed)
        state = train_denoiser(
            race.x0,
            abar,
            race.size,
            steps=steps,
            batch_size=self.plan.batch_size,
            seed=seed,
            path=self.folder / f"{slug}.safetensors",
            bar=f"{slug}: training" if self.bar else None,
        )
        return state, abar

    @cached_property
    def classifier_hash(self) -> str:
        return self.race(self.plan.source).classifier_hash

    def config(self, **others: object) -> dict:
        """What a piece must share with this code."""
        lists = {key: list(value) for key, value in vars(self.plan).items() if isinstance(value, tuple)}
        return dataclasses.asdict(self.plan) | lists | {"classifier": self.classifier_hash} | others

    def learned_times(self, seed: int) -> dict:
        """`learn_times` for the denoiser of EARLY on the source: "ts", "path", "cost"."""
        race = self.race(self.plan.source)

        def compute() -> dict:
            state, abar = self.trained(self.plan.source, EARLY, seed)
            network = state.ema.module.requires_grad_(False).eval()
            return learn_times(
                network.cpu(),
                abar.cpu(),
                self.plan.few,
                race.quality,
                race.x0.shape[1:],
                seed=search_seed(seed),
                **TIMES,
            )

        return piece(self.folder / f"times_{seed}.json", self.config(seed=seed, times=TIMES), compute)

    def steps(self, seed: int) -> dict[str, list[float]]:
        """By rule, the signal levels at which denoisers of the source sample in `few` steps."""
        plan = self.plan
        early = schedules.abar(torch.tensor(FIXED[EARLY][1], dtype=torch.float64), plan.T)
        found = {EARLY: levels(FIXED[EARLY][1], plan.few, plan.T)}
        found[self.few] = levels(self.choose(plan.source, self.few, seed)["q"], plan.few, plan.T)
        found[self.exact] = levels(self.exact_q[plan.source], plan.few, plan.T)
        s = self.problems[plan.source].s.square().mean().sqrt().item()
        found |= {rule: spaced(early, plan.few, rule, s) for rule in RULES}
        found["learned times"] = early[self.learned_times(seed)["ts"]]
        return {rule: one.tolist() for rule, one in found.items()}

    def marked(self, name: str, method: str, seed: int, what: str) -> list[dict]:
        """A denoiser of `trained`, marked on the test split: a row for each grid, or for each rule of `steps`.

        what  "grids" and "longer": the plan's (on the target `few` and `many`), uniform in t; "rules"
        """
        plan, chosen, race = self.plan, self.choose(name, method, seed), self.race(name)
        rules = self.steps(seed) if what == "rules" else {}
        grids = plan.longer if what == "longer" else plan.grids if name == plan.source else (plan.few, plan.many)

        def compute() -> dict:
            state, abar = self.trained(name, method, seed)
            sampler = race.sampler(state.ema.eval())
            wanted = {rule: times_of(torch.tensor(at, dtype=torch.float64), abar.cpu()) for rule, at in rules.items()}
            wanted = wanted or {grid: timesteps(plan.T, grid) for grid in grids}
            options, rows = {"n": plan.n, "seed": seed, "force": self.force}, []
            for rule, ts in wanted.items():
                found = race.mark(sampler, abar, ts, "test", **options)
                rows.append({"rule": rule if rules else "uniform", "steps": len(ts), "ts": ts} | found)
            return {"rows": rows} | training_end(state)

        config = self.config(data=name, method=method, seed=seed, what=what, q=chosen["q"], rules=rules)
        path = self.folder / f"{schedule_race._slug('marks', what, name, method, seed)}.json"
        found = piece(path, config, compute)
        about = {"data": name, "method": method, "seed": seed, "what": what, "kind": chosen["kind"], "q": chosen["q"]}
        about |= {"search_cost": chosen["cost"]} | {key: found[key] for key in ("train_cost", "loss", "wall_s")}
        return [about | row for row in found["rows"]]

    def protocol(self) -> dict[str, object]:
        """What a recorded result must share with this code, and its plan; JSON-able."""
        return about() | {"plan": dataclasses.asdict(self.plan), "pieces": "resumable; wall_s is the sum of theirs"}

    def run(self, seeds: Sequence[int], parts: Sequence[str] = PARTS) -> dict[str, object]:
        """The experiment, or some of PARTS: "parts", "rows", "searches", "times", "gaussians" (of both training sets).

        Raises ValueError for a part that is not known.
        """
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"part {part!r} is not one of {', '.join(PARTS)}")
        jobs = [(job, seed) for part in PARTS if part in parts for job in self.jobs(part) for seed in seeds]
        rows, searches = [], []
        for (name, method, what), seed in tqdm(jobs, "schedule transfer", disable=not self.bar):
            rows += self.marked(name, method, seed, what)
        for method in dict.fromkeys(row["method"] for row in rows if row["search_cost"]):
            name = self.plan.source if method == self.few else self.plan.target
            for seed in seeds:
                found = self.choose(name, method, seed)
                path = [{key: row[key] for key in ("cost", "q", "f_star", "val")} for row in found["path"]]
                about = {"data": name, "method": method, "seed": seed, "path": path}
                searches.append(about | {key: found[key] for key in ("q", "cost", "wall_s")})
        times = [{"seed": seed} | self.learned_times(seed) for seed in seeds] if "steps" in parts else []
        for one in times:
            del one["config"]
        moments = {name: {"mean": one.mean.tolist(), "s": one.s.tolist()} for name, one in self.problems.items()}
        return {"parts": list(parts), "rows": rows, "searches": searches, "times": times, "gaussians": moments}


def given_by(result: Mapping[str, object]) -> dict[int, list[float]]:
    """By seed, the q that Algorithm 6 learned in chapter 7's recorded result."""
    searches = result["data"]["searches"]
    return {one["seed"]: one["q"] for one in searches if one["method"] == "Algorithm 6"}


def gaussians(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, GaussianImages]:
    """The problems whose moments `Study.run` kept."""
    return {
        name: GaussianImages(*(torch.tensor(one[key], dtype=torch.float64) for key in ("mean", "s")))
        for name, one in found.items()
    }


def record(study: Study, seeds: Sequence[int], parts: Sequence[str] = PARTS, tier: str = "recorded") -> Path:
    """Runs the study and writes the result 09_schedules."""
    found = study.run(seeds, parts)
    pieces = {(row["data"], row["method"], row["seed"], row["what"]): row for row in found["rows"]}
    trained = {key[:3]: row["train_cost"] for key, row in pieces.items()}
    cost = sum(trained.values()) + sum(row["cost"] for row in found["rows"])
    cost += sum(one["cost"] for one in (*found["searches"], *found["times"]))
    # A piece holds the seconds of the training that it was the first to ask for; searches and times have their own.
    seconds = sum(one["wall_s"] for one in (*pieces.values(), *found["searches"], *found["times"]))
    parameters = dataclasses.asdict(study.plan) | {"seeds": len(seeds), "parts": list(parts)}
    options = {"seeds": list(seeds), "wall_s": seconds, "cost": cost, "protocol": study.protocol()}
    return results.write_result("09_schedules", tier, found, parameters, **options)


def about() -> dict[str, object]:
    """Everything but the sizes."""
    return {
        "parts": list(PARTS),
        "untuned": {name: [FIXED[name][0], list(FIXED[name][1])] for name in UNTUNED},
        "rules": list(RULES),
        "times": dict(TIMES),
        **{key: schedule_race.about()[key] for key in ("Algorithm 6", "clipped at")},
        "start": "x_T from N(0, I), eta = 0",
    }


def check_protocol(found: Mapping[str, object]) -> None:
    """Raises ValueError, naming what differs, if a result was made by another protocol than this module's."""
    same_protocol(found, about(), "run this module again")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default="", help="where the pieces go; default BILEVEL_WORK_DIR, else _runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    options = parser.parse_args(arguments)
    folder = places.work_dir(options.work_dir) / "schedule_transfer"
    study = Study(Plan(), folder, given_by(results.read_result(SOURCE_RESULT)), bar=True)
    print(record(study, range(options.seeds), options.parts))


if __name__ == "__main__":
    main()
