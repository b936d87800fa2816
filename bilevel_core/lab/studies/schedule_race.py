"""Chapter 7's experiment: a noise schedule found by search, by descent, or not at all, at equal budgets.

The protocol, fixed before the test split was read:

- Cost unit: one image through one forward 1, backward into the weights 2, into the input 1, a tangent 1. Searches,
  their validation and the warm-up are counted in full, for every method that uses them.
- Every search gets `Plan.budget`: a denoiser warmed up at the default cosine schedule and `trials` trials, as many as
  the released Bayesian search has. A trial is a short fine-tune of the warm weights at q and the Frechet distance of
  its samples to the VALIDATION split; all trials of a search share batches and noise. Searches look at the released
  ranges, Algorithm 6 at what is admissible. Methods that move q step by step get the same budget, validation included,
  start from the default cosine schedule as the released code does, and return the mean of q over the second half.
- Budget "final": each method's q is trained from scratch with the same steps and seeds. Budget "total": methods that
  search nothing train longer, by what the others spent on searching.
- Everything steers by DDIM with `val_steps` steps, from N(0, I), eta = 0, and is marked with all of `grids` at budget
  "final", with every other one at budget "total".
- One seed is one whole repetition, search and training. Search seeds, training seeds and the seeds on which the
  constants below were chosen are disjoint. The TEST split's reference is read by `Race.final` alone. The ablation is
  marked on the validation split.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import estimators, schedules
from ...algorithms import ScoreTraining, train_score
from ...guidance import CostMeter
from ...samplers import sample_ddim, timesteps
from ...schedule_learning import ScheduleLearning, learn_schedule
from ...seeds import derive_seed
from .. import files
from ..files import piece
from ..models import graphs, networks
from ..training import checkpointed
from .setting import Setting, generate, recipe, same_protocol, train_denoiser, training_end

# What the released Bayesian search looks at: start, end, tau, epsilon of the cosine schedule.
RANGES = ((0.0, 0.4), (0.8, 1.0), (1.0, 4.0), (0.005, 0.04))
FIXED = {
    "cosine": ("cosine", schedules.DEFAULT_Q["cosine"]),
    "sigmoid": ("sigmoid", schedules.DEFAULT_Q["sigmoid"]),
    "linear": ("linear", schedules.DEFAULT_Q["linear"]),
    "cosine, end 0.95": ("cosine", (0.0, 0.95, 1.0, 0.008)),  # the one change that chapter 1 shows to matter
}


def search_seed(seed: int) -> int:
    """Of the search of a repetition; its trainings have the number of the repetition itself."""
    return derive_seed("schedule search", seed)


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment; the defaults are those of the recorded run.

    name         one of `setting.IMAGES`
    trials       of a search, a multiple of 3;  trial_steps: training steps of each
    n_val        samples of a trial, by val_steps DDIM steps
    final_steps  training steps of the final denoisers;  n: samples that mark one, for each grid of `grids`
    """

    name: str = "mnist8"
    T: int = 1000
    batch_size: int = 128
    warm_steps: int = 500
    trials: int = 15
    trial_steps: int = 60
    n_val: int = 1000
    val_steps: int = 10
    final_steps: int = 1000
    n: int = 5000
    grids: tuple[int, ...] = (10, 20, 50, 100)

    def __post_init__(self):
        if self.trials < 3 or self.trials % 3:
            raise ValueError(f"trials = {self.trials} must be a positive multiple of 3, for the grid")

    @property
    def warm_cost(self) -> int:
        """Cost of the warm-up that all searches share."""
        return 3 * self.batch_size * self.warm_steps

    @property
    def trial_cost(self) -> int:
        """Cost of one trial."""
        return 3 * self.batch_size * self.trial_steps + self.n_val * self.val_steps

    @property
    def budget(self) -> int:
        """Cost of a search, warm-up included."""
        return self.warm_cost + self.trials * self.trial_cost

    @property
    def longer(self) -> int:
        """Training steps that a method without a search gets at equal total cost."""
        return self.final_steps + self.budget // (3 * self.batch_size)


# ---------------------------------------------------------------- what to try next

Proposals = Generator[tuple[float, ...], float, None]  # yields q, is sent its distance


def grid(trials: int, seed: int) -> Proposals:
    """end x tau over the released ranges, start and epsilon at their defaults: a user who knows what matters."""
    (_, (low, high), _, _), (start, *_, epsilon) = RANGES, schedules.DEFAULT_Q["cosine"]
    ends = torch.linspace(low, high, trials // 3).tolist() if trials > 3 else [high]
    for end, tau in itertools.product(ends, (1.0, 2.5, 4.0)):
        yield (start, end, tau, epsilon)


def random_search(trials: int, seed: int, ranges: Sequence[tuple[float, float]] = RANGES) -> Proposals:
    """Uniform over the released ranges, or others."""
    u = torch.rand(trials, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for row in u.tolist():
        yield tuple(low + v * (high - low) for v, (low, high) in zip(row, ranges, strict=True))


def bayesian(trials: int, seed: int, ranges: Sequence[tuple[float, float]] = RANGES) -> Proposals:
    """optuna's Gaussian process on the logarithm of the distance, a third at random first; ranges as above."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPSampler is marked experimental
            study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=trials // 3))
            for _ in range(trials):
                ask = study.ask()
                value = yield tuple(
                    ask.suggest_float(name, *range_) for name, range_ in zip(schedules.NAMES, ranges, strict=True)
                )
                study.tell(ask, math.log(value))
    finally:
        optuna.logging.set_verbosity(before)


SEARCHES: dict[str, Callable[[int, int], Proposals]] = {
    "grid": grid,
    "random": random_search,
    "Bayesian": bayesian,
}


# ---------------------------------------------------------------- moving q step by step

# Chosen on the validation split with seeds 9000 and 9001: see `ALGORITHM_6`.
RATE, SCALE = (0.02, 0.02, 0.05), (20.0, 100.0, 10.0)


def clipped(k: int, grad: Tensor) -> Tensor:
    """The decrease of (start, end, tau): at most RATE, in proportion to the gradient where that is below SCALE.

    The slope in end is some two thousand at the default schedule and some ten at the optimum: an average of squares, as
    Adam's, would remember the first for the rest of the run.
    """
    rate, scale = (torch.tensor(v, dtype=grad.dtype) for v in (RATE, SCALE))
    return rate * (grad / scale).clamp(-1, 1)


def released(k: int, grad: Tensor) -> Tensor:
    """The released code's step sizes, in start, end, tau and epsilon."""
    return torch.tensor((0.05, 0.05, 1.0, 0.05), dtype=grad.dtype) * grad


@dataclass(frozen=True)
class Descent:
    """Descent of f alone: `inner` training steps of one network, then a step against an estimate of df/dq.

    rule  (k, gradient) -> the decrease, in the coordinates of `schedules.reduce` if `reduced`, else in all four
    """

    estimator: Callable[..., tuple[Tensor, dict]]
    samples: int
    inner: int
    rule: Callable[[int, Tensor], Tensor]
    reduced: bool


# gamma and the rest by what the validation split said: with theta_gamma descending f through its last step only, or at
# gamma = 100, the penalty term misses how training answers to `start`, and start runs away (0.25 instead of 0.01).
ALGORITHM_6: dict[str, object] = {
    "gamma": 1000.0,
    "estimator": estimators.q_grad_reverse,
    "grad_steps": None,
    "samples": 64,
    "draws": 4,
    "inner": 4,
    "rate": clipped,
    "val_every": 8,
}
VARIANTS: dict[str, dict[str, object]] = {
    "Algorithm 6": {},
    "gamma = 1": {"gamma": 1.0},
    "gamma = 100": {"gamma": 100.0},
    "gamma = 10,000": {"gamma": 10_000.0},
    "last step only": {"grad_steps": 1},  # of the sampler, in the gradient that theta_gamma descends
    "random directions": {"estimator": estimators.q_grad_two_point},
}
DESCENTS = {
    # As the released code in effect: 36 samples, fresh noise, one random direction. (Its own schedules give NaN at half
    # of the perturbed q; ours do not.)
    "zeroth order": Descent(partial(estimators.q_grad_two_point, common=False), 36, 10, released, reduced=False),
    "no bilevel term": Descent(estimators.q_grad_reverse, 256, 4, clipped, reduced=True),
}
METHODS = (*FIXED, *SEARCHES, "zeroth order", "Algorithm 6")
ABLATION = (*(name for name in VARIANTS if name != "Algorithm 6"), "no bilevel term")


# ---------------------------------------------------------------- the race


@dataclass
class _Walk:
    """Algorithm 6 and the rows of its path, which `checkpointed` keeps together."""

    state: ScheduleLearning
    path: list[dict] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return self.state.step

    def tensors(self) -> dict[str, Tensor]:
        return self.state.tensors()

    def meta(self) -> dict:
        return self.state.meta() | {"path": self.path}

    def load(self, tensors: dict[str, Tensor], meta: dict) -> None:
        self.state.load(tensors, meta)
        self.path = meta["path"]


@dataclass
class Race(Setting):
    """The experiment at one size. Every result is a piece in `folder`: a killed race goes on where it was.

    device  of training and sampling;  bar: progress bars;  force: allows too few samples for a distance, for tests
    """

    plan: Plan
    folder: Path
    device: torch.device | str = "cpu"
    bar: bool = False
    force: bool = False

    @property
    def name(self) -> str:
        return self.plan.name

    def abar(self, kind: str, q: Sequence[float] | Tensor) -> Tensor:
        """(T+1,) of a schedule, on the device."""
        q = torch.as_tensor(q, dtype=torch.float64)
        schedules.check(q, self.plan.T, kind)
        return schedules.abar(q, self.plan.T, kind).to(self.device)

    def config(self, **others: object) -> dict:
        """What a piece must share with this code."""
        shared = {"grids": list(self.plan.grids), "classifier": self.classifier_hash}
        return dataclasses.asdict(self.plan) | shared | others

    def warm(self, seed: int) -> nn.Module:
        """A denoiser trained for `warm_steps` at the default cosine schedule: where all searches start."""
        abar = self.abar(*FIXED["cosine"])
        options = {"steps": self.plan.warm_steps, "batch_size": self.plan.batch_size, "seed": seed}
        return train_denoiser(
            self.x0, abar, self.size, **options, path=self.folder / f"warm_{seed}.safetensors"
        ).ema.module

    def trial(self, warm: nn.Module, q: Tensor, seed: int, kind: str = "cosine") -> float:
        """Frechet distance to the validation split after a short fine-tune of (a copy of) the warm weights at q."""
        network, abar = copy.deepcopy(warm).requires_grad_(True), self.abar(kind, q)
        state = recipe(network, steps=self.plan.trial_steps, batch_size=self.plan.batch_size, seed=seed)
        with graphs.training(network, (self.plan.batch_size, *self.x0.shape[1:])):
            for _ in train_score(state, self.x0, abar, steps=self.plan.trial_steps):
                pass
        return self.value(state.ema, abar, seed)

    @torch.no_grad()
    def value(self, network: Callable, abar: Tensor, seed: int) -> float:
        """Frechet distance of `n_val` samples to the validation split."""
        plan = self.plan
        ts = timesteps(plan.T, plan.val_steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # starts at N(0, I), whatever abar_T
            images = generate(network, abar, ts, plan.n_val, self.side, eta=0.0, seed=seed, device=self.device)
        return self.quality(images).item()

    def search(self, method: str, seed: int) -> dict:
        """What a search found: "kind", "q", "cost", and "path", for each trial the cost so far, its q and value.

        Resumable from trial to trial.
        """
        seed = search_seed(seed)
        name, config = _slug("search", method, seed), self.config(method=method, seed=seed)
        begun = self.folder / f"{name}.begun.json"

        def compute() -> dict:
            warm, propose = self.warm(seed), SEARCHES[method](self.plan.trials, seed)
            path, q = files.begun(begun, config), next(propose)
            for k in range(self.plan.trials):
                if k == len(path):
                    q = schedules.project(torch.tensor(q, dtype=torch.float64), self.plan.T)
                    cost = self.plan.warm_cost + (k + 1) * self.plan.trial_cost
                    path.append({"cost": cost, "q": q.tolist(), "value": self.trial(warm, q, seed)})
                    files.write_atomic(begun, json.dumps({"config": config, "rows": path}).encode())
                try:
                    q = propose.send(path[k]["value"])
                except StopIteration:
                    break
            best = min(path, key=lambda trial: trial["value"])
            return {"kind": "cosine", "q": best["q"], "cost": path[-1]["cost"], "path": path}

        found = piece(self.folder / f"{name}.json", config, compute)
        begun.unlink(missing_ok=True)
        return found

    def learning(self, seed: int, variant: str = "Algorithm 6") -> ScheduleLearning:
        """Algorithm 6 at its start, warmed up, with the options of VARIANTS; it validates as trials do."""

        def val(state: ScheduleLearning) -> float:
            state.spent += self.plan.n_val * self.plan.val_steps
            return self.value(state.star.ema, state.abar, seed)

        shared = {"T": self.plan.T, "sample_steps": self.plan.val_steps, "batch_size": self.plan.batch_size}
        q = torch.tensor(FIXED["cosine"][1], dtype=torch.float64)
        options = shared | ALGORITHM_6 | VARIANTS[variant]
        return ScheduleLearning(self.warm(seed), q, self.quality, val=val, seed=seed, **options)

    def learn(self, variant: str, seed: int) -> dict:
        """Algorithm 6 within the budget of a search, from the same warm weights: as `search`, with its records as path.

        The weights of theta_star stay in `folder`, as learned_*.safetensors. Resumable every few steps.
        """
        seed = search_seed(seed)
        name = _slug(variant, seed)
        begun = self.folder / f"learning_{name}.safetensors"

        def compute() -> dict:
            walk = _Walk(self.learning(seed, variant))
            for _ in checkpointed(self._walk(walk), walk, begun, steps=10**6, every=4):
                pass
            path = walk.path
            q = settled(path, self.plan.T)
            weights = walk.state.star.ema.module.state_dict()
            files.save_state(self.folder / f"learned_{name}.safetensors", weights, {"q": q})
            return {"kind": "cosine", "q": q, "cost": path[-1]["cost"], "path": path}

        config = self.config(method=variant, seed=seed, options=_plain(ALGORITHM_6 | VARIANTS[variant]))
        found = piece(self.folder / f"search_{name}.json", config, compute)
        begun.unlink(missing_ok=True)
        return found

    def _walk(self, walk: _Walk) -> Iterator[dict]:
        """The rows of Algorithm 6's path, while one more step as dear as the dearest fits into the budget."""
        steps = learn_schedule(walk.state, self.x0, steps=10**6)
        while True:
            costs = [self.plan.warm_cost, *(row["cost"] for row in walk.path)]
            if costs[-1] + max((b - a for a, b in itertools.pairwise(costs)), default=0) > self.plan.budget:
                return
            record = next(steps, None)
            if record is None:
                return
            row = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(record).items()}
            walk.path.append(row | {"cost": self.plan.warm_cost + walk.state.cost, "q": row["q_next"]})
            yield walk.path[-1]

    def descend(self, method: str, seed: int) -> dict:
        """Descent of f alone, with one network and no bilevel term, within the same budget: as `search`."""
        seed = search_seed(seed)
        way, plan = DESCENTS[method], self.plan

        def compute() -> dict:
            state = ScoreTraining(
                self.warm(seed).requires_grad_(True), plan.batch_size, lr=1e-3, seed=seed, ema_decay=0.99
            )
            meter, ts = CostMeter(state.ema), timesteps(plan.T, plan.val_steps)

            def f(z: Tensor, draw: int) -> Tensor:
                g = torch.Generator(self.device).manual_seed(draw)
                x = torch.randn(way.samples, *self.x0.shape[1:], generator=g, device=self.device)
                q = schedules.expand(z) if way.reduced else z
                return self.quality(sample_ddim(meter, x, schedules.abar(q, plan.T).to(self.device), ts))

            q = torch.tensor(FIXED["cosine"][1], dtype=torch.float64)
            path, largest, spent = [], 0, 0
            while plan.warm_cost + spent + largest <= plan.budget:
                abar = schedules.abar(q, plan.T).to(self.device)
                for _ in train_score(state, self.x0, abar, steps=state.step + way.inner):
                    pass
                z = schedules.reduce(q) if way.reduced else q
                grad, info = way.estimator(f, z, seed=derive_seed("descent", seed, len(path)))
                z = z - way.rule(len(path), grad)
                q = schedules.project(schedules.expand(z) if way.reduced else z, plan.T)
                largest, spent = max(largest, state.cost + meter.cost - spent), state.cost + meter.cost
                path.append({"cost": plan.warm_cost + spent, "q": q.tolist(), "value": info["f"]})
            return {"kind": "cosine", "q": settled(path, plan.T), "cost": path[-1]["cost"], "path": path}

        config = self.config(method=method, seed=seed, way=_plain(way))
        return piece(self.folder / f"{_slug('search', method, seed)}.json", config, compute)

    def choose(self, method: str, seed: int) -> dict:
        """What a method chose, whichever it is: at least "kind", "q" and "cost"."""
        if method in FIXED:
            kind, q = FIXED[method]
            return {"kind": kind, "q": list(q), "cost": 0}
        found = self.search if method in SEARCHES else self.descend if method in DESCENTS else self.learn
        return found(method, seed)

    def trained(
        self, method: str, seed: int, *, total: bool = False, own: bool = False
    ) -> tuple[ScoreTraining, Tensor]:
        """A denoiser trained at a method's q, resumable, and its abar.

        total  trained longer where the method spent nothing on a search
        own    trained on from Algorithm 6's own weights instead of from scratch
        """
        chosen, start = self.choose(method, seed), None
        if own:
            start, _ = files.load_state(self.folder / f"{_slug('learned', method, search_seed(seed))}.safetensors")
        steps = self.plan.longer if total and method in FIXED else self.plan.final_steps
        name, abar = _slug(method, seed, "own" * own, "total" * total), self.abar(chosen["kind"], chosen["q"])
        options = {"steps": steps, "batch_size": self.plan.batch_size, "seed": seed, "start": start}
        path, bar = self.folder / f"final_{name}.safetensors", f"{name}: training" if self.bar else None
        return train_denoiser(self.x0, abar, self.size, **options, path=path, bar=bar), abar

    def final(self, method: str, seed: int, *, total: bool = False, own: bool = False, test: bool = True) -> list[dict]:
        """A denoiser of `trained`, marked: a row for each split and grid.

        test  marked on the test split, besides the validation split with the grid of the searches
        """
        plan, chosen = self.plan, self.choose(method, seed)
        steps = plan.longer if total and method in FIXED else plan.final_steps

        def compute() -> dict:
            state, abar = self.trained(method, seed, total=total, own=own)
            sampler, rows = self.sampler(state.ema.eval()), []
            options = {"n": plan.n, "seed": seed, "force": self.force}
            tested = () if not test else plan.grids if not total and not own else plan.grids[::2]
            for split, grids in (("val", (plan.val_steps,)), ("test", tested)):
                for grid in grids:
                    found = self.mark(sampler, abar, grid, split, **options)
                    rows.append({"split": split, "steps": grid} | found)
            return {"rows": rows} | training_end(state)

        config = self.config(method=method, seed=seed, test=test, own=own, train_steps=steps, q=chosen["q"])
        name = _slug("final", method, seed, "own" * own, "total" * total)
        found = piece(self.folder / f"{name}.json", config, compute)
        about = {"method": method + ", own weights" * own, "seed": seed, "budget": "total" if total else "final"}
        about |= {"kind": chosen["kind"], "q": chosen["q"], "search_cost": chosen["cost"], "train_steps": steps}
        about |= {key: found[key] for key in ("train_cost", "loss", "wall_s")}
        return [about | row for row in found["rows"]]

    @torch.no_grad()
    def store(self, path: Path, seed: int, count: int) -> None:
        """Keeps in one file what `restore` gives back: of one seed, `count` images of each method from the same x_T, by
        the grid of the searches, and the network and abar that Algorithm 6 led to."""
        ts, tensors = timesteps(self.plan.T, self.plan.val_steps), {}
        for method in METHODS:
            state, abar = self.trained(method, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                images = generate(state.ema.eval(), abar, ts, count, self.side, eta=0.0, seed=seed, device=self.device)
            tensors[f"images|{method}"] = ((images + 1) * 127.5).round().byte()
            if method == "Algorithm 6":
                tensors |= {f"network|{name}": value for name, value in state.ema.module.state_dict().items()}
                tensors["abar"] = abar
        files.save_state(path, tensors, {"size": self.size, "seed": seed, "steps": self.plan.val_steps})

    def protocol(self) -> dict[str, object]:
        """What a recorded result must share with this code, and its plan; JSON-able."""
        return about() | {"plan": dataclasses.asdict(self.plan), "pieces": "resumable; wall_s is the sum of theirs"}

    def run(self, seeds: Sequence[int], ablation_seeds: Sequence[int] = ()) -> dict[str, list[dict]]:
        """The whole experiment: "searches", "rows" of both budgets, and "ablation", marked on the validation split.

        Processes share the work by calling this with seeds of their own and one folder; a last call with all seeds
        finds every piece.
        """
        jobs = [(method, seed, {}) for seed in seeds for method in METHODS]
        jobs += [(method, seed, {"total": True}) for seed in seeds for method in FIXED]
        jobs += [("Algorithm 6", seed, {"own": True}) for seed in seeds]
        rows = [row for method, seed, options in self._listed(jobs) for row in self.final(method, seed, **options)]
        jobs = [(method, seed, {"test": False}) for seed in ablation_seeds for method in ABLATION]
        others = [row for method, seed, options in self._listed(jobs) for row in self.final(method, seed, **options)]
        searches = [(method, seed) for method in METHODS if method not in FIXED for seed in seeds]
        searches += [(method, seed) for method in ABLATION for seed in ablation_seeds]
        found = [{"method": method, "seed": seed} | self.choose(method, seed) for method, seed in searches]
        for one in found:
            del one["config"]
        return {"searches": found, "rows": rows, "ablation": others}

    def _listed(self, jobs: list) -> Iterable:
        return tqdm(jobs, "schedule race", disable=not self.bar)


def about() -> dict[str, object]:
    """Everything but the sizes."""
    return {
        "ranges": [list(range_) for range_ in RANGES],
        "fixed": {name: [kind, list(q)] for name, (kind, q) in FIXED.items()},
        "Algorithm 6": _plain(ALGORITHM_6),
        "clipped at": [list(RATE), list(SCALE)],
        "variants": _plain(VARIANTS),
        "descents": _plain(DESCENTS),
        "start": "x_T from N(0, I), eta = 0",
    }


def check_protocol(found: Mapping[str, object]) -> None:
    """Raises ValueError, naming what differs, if a result was made by another protocol than this module's."""
    same_protocol(found, about(), "run the recorded profile")


def restore(path: Path) -> tuple[dict[str, Tensor], networks.Denoiser, Tensor, dict]:
    """What `Race.store` kept: images (count, 1, side, side) uint8 by method, the network, its abar, and about it."""
    tensors, about = files.load_state(path)
    network = networks.Denoiser(about["size"])
    parts = {part: {} for part in ("images", "network")}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("|")
        parts.get(part, {})[rest] = tensor
    network.load_state_dict(parts["network"])
    return parts["images"], network.eval().requires_grad_(False), tensors["abar"], about


def settled(path: Sequence[dict], T: int) -> list[float]:
    """The mean of q over the second half of a path: its last point is where the last noise took it."""
    half = torch.tensor([step["q"] for step in path[len(path) // 2 :]], dtype=torch.float64)
    return schedules.project(half.mean(0), T).tolist()


def _plain(options: object) -> str:
    """Options as text that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(options))


def _slug(*parts: object) -> str:
    """Part of a file's name; empty parts are left out."""
    return "_".join(re.sub(r"\W", "_", str(part)) for part in parts if part != "")
