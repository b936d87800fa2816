"""Chapter 6's experiment: every estimator of the gradient in a noise schedule against the measured truth.

The protocol, written down before the recorded run. Data: MNIST pooled to 8x8; denoiser "tiny"; cosine schedule with
T = 200; f(z, theta) is the Frechet distance of the features (classifier mnist8) of DDIM samples with `sample_steps`
steps from N(0, I), clamped to [-1, 1], to the fixed moments of the *validation* split. The test split is not read.

Truth. F(z) = f(z, theta(z)), where theta(z) is a whole short training at z (Algorithm 3 from scratch, cosine decay,
moving average). Central differences of F in each of the three coordinates of `schedules.reduce`, at the two POINTS,
with the distances WIDTHS, both sides with the same seed of weights, batches, noise and x_T; one gradient a seed.
The widths come from a pilot with one seed and 1,500 training steps at q = (0.05, 0.95, 1): F = 3.12, 3.19, 3.68 at
start = 0, 0.05, 0.15; 3.34, 3.19, 3.18 at end = 0.9, 0.95, 0.98; 3.00, 3.19, 3.48 at tau = 0.7, 1, 1.5: wide enough
to move F by about 0.1, narrow enough to see a slope. Half the width, with two seeds at "far", is run as a check.

Estimators are judged seed by seed: their mean over draws minus that seed's truth, with Student's t interval over
seeds, and |mean|/sd over the draws of one seed, scaled by the root of the cost to COST image forwards a gradient.
Partial estimators hold theta fixed at theta(z): they see d_z f alone. `warm` differences train a few steps at z + h and
z - h first. `penalty` is Algorithm 6 (`schedule_learning`) standing still at z: its networks train, z does not move.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import estimators, schedules
from ...algorithms import ScoreTraining, train_score
from ...guidance import CostMeter
from ...samplers import sample_ddim, timesteps
from ...schedule_learning import ScheduleLearning, learn_schedule
from ...seeds import derive_seed
from .. import comparisons, files, metrics
from ..models.fast import fast
from .setting import IMAGES, Setting, train_denoiser

POINTS = {"near": (0.05, 0.95, 1.0, 0.008), "far": (0.2, 0.85, 1.0, 0.008)}  # q: near the default, and a worse one
WIDTHS = (0.05, 0.03, 0.25)  # half distances of the truth's differences, in z: start, end, tau
COST = 100_000  # image forwards at which signal-to-noise ratios are compared
GAMMAS = {"far": (1.0, 1e2, 1e4, 1e6), "near": (1.0, 1e4)}  # of Algorithm 6
ABLATION = 1e4  # gamma at which the ways to move theta_gamma are compared:
ABLATIONS = ({"grad_steps": 1}, {"directions": 1}, {"inner": 120})


@dataclass(frozen=True)
class Study(Setting):
    """Sizes of the study, and where its pieces lie; everything but `folder` and `device` is part of a piece's identity.

    name         one of `setting.IMAGES`;  T, sample_steps: of the schedule, of DDIM
    train_steps, batch_size   of every training from scratch
    n_truth, n   samples of one evaluation of f: in the truth, in an estimator
    draws        independent draws of each partial estimator (zeroth order: three times as many)
    inner, outer training steps of both networks in an outer step of Algorithm 6, and outer steps; lr their rate
    """

    folder: Path
    name: str = "mnist8"
    T: int = 200
    sample_steps: int = 10
    train_steps: int = 1000
    batch_size: int = 64
    n_truth: int = 5000
    n: int = 256
    draws: int = 4
    inner: int = 30
    outer: int = 3
    lr: float = 1e-4
    device: str = "cpu"
    memory: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        if self.name not in IMAGES:
            raise ValueError(f"name = {self.name!r} is not one of {', '.join(IMAGES)}")

    def about(self, *names: str, **more: object) -> dict:
        """What identifies a piece: the named sizes, those that every piece shares, and `more`."""
        shared = {
            name: getattr(self, name) for name in ("name", "T", "sample_steps", "train_steps", "batch_size", *names)
        }
        if "point" in more:
            more |= {"q": list(POINTS[more["point"]]), "widths": list(WIDTHS)}
        return shared | more

    def abar(self, z: Tensor) -> Tensor:
        return schedules.abar(schedules.expand(z), self.T)

    def objective(self, denoiser: Callable, n: int, grad_steps: int | None = None) -> Callable[[Tensor, int], Tensor]:
        """f(z, seed) of a denoiser: the quality of n DDIM samples, x_T from the seed; differentiable."""
        shape, ts = (n, *self.x0.shape[1:]), timesteps(self.T, self.sample_steps)
        _ = self.reference, self.classifier  # loaded now: not within a forward-mode derivative

        def f(z: Tensor, seed: int) -> Tensor:
            generator = torch.Generator(self.device).manual_seed(seed)
            x = torch.randn(shape, generator=generator, device=self.device)
            return self.quality(sample_ddim(denoiser, x, self.abar(z), ts, grad_steps=grad_steps))

        return f

    def train(self, z: Tensor, seed: int) -> tuple[nn.Module, int]:
        """The denoiser of a whole training at z, frozen, and what it cost; kept in `folder`."""
        where = "_".join(f"{value:.4g}" for value in z.tolist())
        if (where, seed) not in self.memory:
            path = self.folder / f"train_{where}_{seed}.safetensors"
            options = {"steps": self.train_steps, "batch_size": self.batch_size, "seed": seed, "path": path}
            state = train_denoiser(self.x0, self.abar(z), self.size, **options)
            self.memory[where, seed] = state.ema.module.eval().requires_grad_(False), state.cost
        return self.memory[where, seed]


def coordinates(point: str) -> Tensor:
    """z (3,) of one of POINTS."""
    return schedules.reduce(torch.tensor(POINTS[point], dtype=torch.float64))


def shifted(z: Tensor, scale: float = 1.0) -> list[Tensor]:
    """z + h e_i and z - h e_i for each coordinate in turn, h = scale WIDTHS."""
    steps = torch.diag(scale * torch.tensor(WIDTHS, dtype=torch.float64))
    return [z + sign * step for step in steps for sign in (1, -1)]


def differences(values: Sequence[float], scale: float = 1.0) -> list[float]:
    """Central differences from values at `shifted`."""
    return [(high - low) / (2 * scale * h) for high, low, h in zip(values[::2], values[1::2], WIDTHS, strict=True)]


# ---------------------------------------------------------------- the pieces


def truth(study: Study, point: str, seed: int, scale: float = 1.0) -> dict:
    """The hypergradient "grad" by differences over whole trainings; "value" F(z), "values" at `shifted`, "cost".

    scale  of the widths
    """

    def compute() -> dict:
        values, cost = [], 0
        for z in (coordinates(point), *shifted(coordinates(point), scale)):
            denoiser, spent = study.train(z, seed)
            meter = CostMeter(fast(denoiser, study.x0[:1]) if study.device == "cpu" else denoiser)
            with torch.no_grad():
                values.append(study.objective(meter, study.n_truth)(z, seed).item())
            cost += spent + meter.cost
        return {"value": values[0], "values": values[1:], "grad": differences(values[1:], scale), "cost": cost}

    config = study.about("n_truth", point=point, seed=seed, scale=scale)
    return files.piece(study.folder / f"truth_{point}_{scale:g}_{seed}.json", config, compute)


def warm(study: Study, point: str, denoiser: nn.Module, steps: int, seed: int) -> tuple[Tensor, int]:
    """Differences of f after `steps` training steps at z + h and z - h, each from theta(z), common seeds; and cost."""
    values, cost = [], 0
    for z in shifted(coordinates(point)):
        options = {"batch_size": study.batch_size, "lr": study.lr, "warmup": 10, "ema_decay": 0.97, "seed": seed}
        state = ScoreTraining(copy.deepcopy(denoiser).requires_grad_(True), **options)
        for _ in train_score(state, study.x0, study.abar(z), steps=steps):
            pass
        meter = CostMeter(state.ema.eval())
        with torch.no_grad():
            values.append(study.objective(meter, study.n)(z, seed).item())
        cost += state.cost + meter.cost
    return torch.tensor(differences(values), dtype=torch.float64), cost


def partials(study: Study, denoiser: nn.Module) -> dict[str, tuple[Callable, int]]:
    """The partial estimators by name: (z, seed) -> (gradient, cost), and how many draws each gets.

    All evaluations of f have n samples but "released": two-point at n = 36, each side with its own x_T.
    """
    lengths = torch.tensor(WIDTHS, dtype=torch.float64) / 5
    many = 3 * study.draws

    def with_cost(estimate: Callable, n: int = study.n, grad_steps: int | None = None, **options: object) -> Callable:
        def run(z: Tensor, seed: int) -> tuple[Tensor, int]:
            meter = CostMeter(denoiser)
            f = study.objective(meter, n, grad_steps)
            if estimate is comparisons.q_grad_one_point:
                with torch.no_grad():  # what a loop has from its last step, for nothing: f nearby with another x_T
                    options["previous"] = study.objective(denoiser, n)(z, derive_seed("previous", seed)).item()
            return estimate(f, z, seed=seed, **options)[0], meter.cost

        return run

    zeroth = {"delta": lengths}
    found = {
        "released": (with_cost(estimators.q_grad_two_point, 36, common=False, **zeroth), many),
        "one point": (with_cost(comparisons.q_grad_one_point, **zeroth), many),
        "two points, fresh noise": (with_cost(estimators.q_grad_two_point, common=False, **zeroth), many),
        "two points": (with_cost(estimators.q_grad_two_point, **zeroth), many),
        "coordinates": (with_cost(estimators.q_grad_coordinates, **zeroth), study.draws),
        "forward": (with_cost(estimators.q_grad_forward), study.draws),
        "reverse": (with_cost(estimators.q_grad_reverse), study.draws),
    }
    for k in (1, 2, 5):
        found[f"reverse, last {k}"] = with_cost(estimators.q_grad_reverse, grad_steps=k), study.draws
    return found


def partial_draws(study: Study, point: str, seed: int) -> dict:
    """For every partial estimator its "draws" and the "cost" of one, in "rows" by name; at theta(z) of that seed."""

    def compute() -> dict:
        denoiser, _ = study.train(coordinates(point), seed)
        rows = {}
        for name, (estimate, count) in partials(study, denoiser).items():
            pairs = [estimate(coordinates(point), derive_seed("partial", seed, i)) for i in range(count)]
            rows[name] = {"draws": [g.tolist() for g, _ in pairs], "cost": pairs[0][1]}
        return {"rows": rows, "cost": sum(row["cost"] * len(row["draws"]) for row in rows.values())}

    config = study.about("n", "draws", point=point, seed=seed)
    return files.piece(study.folder / f"partial_{point}_{seed}.json", config, compute)


def warm_draws(study: Study, point: str, seed: int, steps: int) -> dict:
    """The "draws" of `warm` with that many training steps from theta(z) of that seed, and "cost" of one."""

    def compute() -> dict:
        denoiser, _ = study.train(coordinates(point), seed)
        pairs = [warm(study, point, denoiser, steps, derive_seed("warm", seed, i)) for i in range(2)]
        return {"draws": [g.tolist() for g, _ in pairs], "cost": pairs[0][1]}

    config = study.about("n", "lr", point=point, seed=seed, steps=steps)
    return files.piece(study.folder / f"warm_{point}_{steps}_{seed}.json", config, compute)


def penalty(study: Study, point: str, seed: int, gamma: float, **options: object) -> dict:
    """Algorithm 6 standing still at z, from theta(z): one row for each outer step, its networks kept warm.

    options  of `ScheduleLearning`, besides what the study fixes; part of the piece's identity
    "rows" hold what a `ScheduleStep` measures, without q; "cost" is that of all of them.
    """

    def compute() -> dict:
        denoiser, _ = study.train(coordinates(point), seed)
        state = ScheduleLearning(
            denoiser,
            torch.tensor(POINTS[point], dtype=torch.float64),
            study.quality,
            T=study.T,
            gamma=gamma,
            sample_steps=study.sample_steps,
            rate=lambda k, grad: torch.zeros_like(grad),
            margin=0.0,
            seed=seed,
            **chosen,
        )
        kept = ("f", "f_star", "g_gamma", "g_star", "gap", "gap_se", "absorbed", "moved", "cost", "warning")
        rows = [
            {"grad": step.grad.tolist(), "se": step.se.tolist()} | {name: getattr(step, name) for name in kept}
            for step in learn_schedule(state, study.x0, steps=study.outer)
        ]
        return {"rows": rows, "cost": state.cost}

    chosen = {"samples": 100, "draws": 2, "g_batch": 512, "warmup": 30, "ema_decay": 0.97, "grad_steps": None}
    chosen |= {"directions": 0}
    chosen |= {"inner": study.inner, "lr": study.lr, "batch_size": study.batch_size} | options
    config = study.about("outer", point=point, seed=seed, gamma=gamma, options=chosen)
    name = "_".join([f"penalty_{point}_{gamma:g}", *(f"{k}-{v}" for k, v in sorted(options.items())), str(seed)])
    return files.piece(study.folder / f"{name}.json", config, compute)


# ---------------------------------------------------------------- the whole


def pieces(study: Study, seeds: int, warm_steps: Sequence[int], first: int = 0) -> list[Callable[[], dict]]:
    """Every piece of the study as a function without arguments, in the order in which they are best made."""
    chosen = range(first, first + seeds)
    runs = list(itertools.product(chosen, POINTS))
    ablations = itertools.product(chosen, ABLATIONS)
    return [
        *(partial(truth, study, point, seed) for seed, point in runs),
        *(partial(partial_draws, study, point, seed) for seed, point in runs),
        *(partial(penalty, study, point, seed, gamma) for seed, point in runs for gamma in GAMMAS[point]),
        *(partial(warm_draws, study, point, seed, steps) for seed, point in runs for steps in warm_steps),
        *(partial(penalty, study, "far", seed, ABLATION, **options) for seed, options in ablations),
        *(partial(truth, study, "far", seed, 0.5) for seed in chosen[:2]),
    ]


def gather(
    study: Study, seeds: int, warm_steps: Sequence[int], share: tuple[int, int] = (0, 1), first: int = 0
) -> list[dict]:
    """Makes all pieces, or reads them; a killed run goes on where it stopped.

    seeds  how many, from `first` on
    share  (i, n): only every n-th piece from the i-th on, so that n processes can work on one folder
    Returns the pieces, each with the name of its function as "kind".
    """
    chosen = pieces(study, seeds, warm_steps, first)[share[0] :: share[1]]
    return [{"kind": make.func.__name__} | make() for make in chosen]


def verdicts(found: Sequence[dict], point: str) -> dict[str, dict]:
    """`judge` of every estimator among the pieces of `gather` at one of POINTS, by name, with "truth" first.

    Algorithm 6 is judged by its outer steps from the second on: in the first its optimisers have no memory yet.
    """

    def of(kind: str, scale: float = 1.0) -> list[dict]:
        here = [piece for piece in found if piece["kind"] == kind and piece["config"].get("point") == point]
        return [piece for piece in here if piece["config"].get("scale", 1.0) == scale]

    truths = {piece["config"]["seed"]: piece for piece in of("truth")}
    draws: dict[str, dict[int, list]] = {}
    costs: dict[str, float] = {}

    def add(name: str, seed: int, rows: list, cost: float) -> None:
        draws.setdefault(name, {})[seed] = rows
        costs[name] = cost

    for piece in of("partial_draws"):
        for name, row in piece["rows"].items():
            add(name, piece["config"]["seed"], row["draws"], row["cost"])
    for piece in of("warm_draws"):
        config = piece["config"]
        add(f"differences after {config['steps']} steps", config["seed"], piece["draws"], piece["cost"])
    usual = min((piece["config"]["options"]["inner"] for piece in of("penalty")), default=0)
    for piece in of("penalty"):
        config, rows = piece["config"], piece["rows"]
        name = f"Algorithm 6, gamma = {config['gamma']:g}"
        if config["options"]["directions"]:
            name += ", zeroth order"
        elif config["options"]["grad_steps"]:
            name += f", last {config['options']['grad_steps']}"
        if config["options"]["inner"] != usual:
            name += f", {config['options']['inner']} training steps"
        cost = (rows[-1]["cost"] - rows[0]["cost"]) / (len(rows) - 1)
        add(name, config["seed"], [row["grad"] for row in rows[1:]], cost)
    whole = [truths[seed]["grad"] for seed in sorted(truths)]
    cost = sum(piece["cost"] for piece in truths.values()) / len(truths)
    first = {"mean": [metrics.t_interval(column) for column in zip(*whole, strict=True)], "cost": cost}
    return {"truth": first} | {
        name: judge([truths[seed]["grad"] for seed in sorted(rows)], [rows[seed] for seed in sorted(rows)], costs[name])
        for name, rows in draws.items()
    }


def judge(truths: Sequence[Sequence[float]], draws: Sequence[Sequence[Sequence[float]]], cost: float) -> dict:
    """An estimator against the truth. truths (seeds, 3); draws (seeds, k, 3) with k >= 2; cost of one draw.

    "bias" and "mean": an interval over seeds for each coordinate; "z": the bias in its standard errors; "snr": the
    |mean|/sd of the draws of one seed, at COST; "off": |bias|/|truth| and "cosine" of mean and truth, both with each
    coordinate in units of its WIDTHS.
    """
    truth, all_draws = (torch.tensor(values, dtype=torch.float64) for values in (truths, draws))
    if len(truth) < 2 or all_draws.shape[1] < 2:
        raise ValueError(f"{len(truth)} seeds with {all_draws.shape[1]} draws each are too few: take two of each")
    per_seed = all_draws.mean(1)
    sd = all_draws.var(1).mean(0).sqrt()
    bias = per_seed - truth
    widths = torch.tensor(WIDTHS, dtype=torch.float64)
    scaled, target = per_seed.mean(0) * widths, truth.mean(0) * widths
    return {
        "mean": [metrics.t_interval(column) for column in per_seed.T.tolist()],
        "bias": [metrics.t_interval(column) for column in bias.T.tolist()],
        "z": (bias.mean(0) / (bias.std(0) / len(bias) ** 0.5)).tolist(),
        "snr": (per_seed.mean(0).abs() / sd * (COST / cost) ** 0.5).tolist(),
        "off": ((scaled - target).norm() / target.norm()).item(),
        "cosine": (scaled @ target / (scaled.norm() * target.norm())).item(),
        "cost": cost,
    }
