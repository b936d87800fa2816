"""Chapter 7's race of schedules, second edition: networks that are told the noise level, and grids learned for them.

The protocol, fixed before the test split was read:

- Cost unit as in `schedule_race`: one image through one forward 1, backward into the weights 2, into the input 1. Data,
  network, recipe, batch size and training lengths are those of its first edition, and so are x_T and the samples' mark.
- OURS: a network told the level, trained once on the fixed density DENSITY, and for each number of steps a grid learned
  by `learn_grid` against the VALIDATION split. Everything is paid: the grids for all of `few` together are bought with
  training steps, whichever of them a row uses. Grids for `many` steps are read off the curve through that of the
  largest of `few` (`refined`), which costs nothing.
- RIVALS. The same kind of network on each of FIXED_GRIDS, and networks told t, trained on a fixed schedule, as in the
  first edition. Grids that need a network or the data's moments get them at no charge.
- SEARCHES look for a cosine schedule's grid for the network of ours, at exactly the price of our grids, in a BOX that
  holds the fixed ones: TRIALS of them, each by f of common samples. Random search begins with cosine, end 0.95, and
  the closed form of Gaussian data.
- DENSE: ours once more, with the density of training levels learned as training goes on (`levels.learn_density`).
  It stops earlier for that, and its constants are guesses.
- Budget "total": all have cost the same, `length` training steps. Ours stops `Plan.paid` steps earlier. A learned
  schedule of the first edition cost as much: its rows stand beside these as they were recorded.
- Budget "final": all train equally long, and grids are learned at no charge. For `length` they are those that "total"
  learned for the other network of the same seed; for `short`, and for the second-order solver, the network's own.
- Everything starts from N(0, I), eta = 0, and is marked by n samples against both splits; nothing reads the mark of
  the test split before it is recorded. One seed is one repetition; methods are compared in pairs of one seed.
- DENSITY and LEARN were chosen on the validation split with seed 9000, at a price that nobody is charged: TUNED names
  it. FIRST, and the ends between which `align` moves, are guesses. Nothing else was tuned. Seeds are 0 to 4.
- The run goes through PARTS in their order, from the question to what rounds it off; a result names those it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ... import schedules
from ...algorithms import ScoreTraining
from ...guidance import LevelDenoiser
from ...samplers import draw_x_T, sample_ddim, sample_dpm, timesteps
from ...schedule_learning import learn_grid
from ...seeds import derive_seed
from .. import files, levels, metrics, places, results
from ..models import networks
from ..training import checkpointed
from . import baselines, grids, schedule_race, schedule_transfer
from .grids import DENSITY, GRIDS, SEEN
from .schedule_race import FIXED
from .schedule_transfer import EARLY, GaussianImages
from .setting import IMAGES, Setting, generate, real_features, recipe, same_protocol, train_denoiser, training_end

OURS, CLOSED = "learned grid", "Gaussian schedule"
DENSE = "learned grid and density"
PARTS = ("total", "grids", "search", "density", "short", "more", "told t", "second order")
SOLVERS = {"DDIM": sample_ddim, "DPM-Solver++(2M)": sample_dpm}
LEARN = {"steps": 20, "samples": 64, "rate": 0.1}  # of one grid
TRIALS = 20  # of a search
BOX = ((0.0, 0.4), (0.8, 0.999), (0.3, 4.0), (0.005, 0.04))  # start, end, tau, epsilon
LEVELS = {"every": 250, "samples": 128, "batch": 512, "rate": 0.1, "modes": 6}  # of `learn_density`
FIRST = EARLY  # where the first of them starts
TUNED = (
    "six networks of seed 9000, 1,000 steps each: three densities (s = 1, 0.5, 0.3), of two of them with two stretches "
    "of the embedding, and one told t; learning of grids for them by 64 to 256 samples: about 2.5 million cost units"
)
SEARCHES = ("random search", "Bayesian search")
NEVER = 1e3  # what a schedule is worth that no network can follow
FIXED_GRIDS = (*GRIDS, "Gaussian, best grid", "constant rate", "aligned steps")


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment; the defaults are those of the recorded run.

    name           one of `setting.IMAGES`
    short, length  training steps: of a quick look, and of the race, where they are the whole budget
    few, many      numbers of steps: for which a grid is learned; for which it is refined
    learn          of one grid: "steps" of Adam, "samples" in each, "rate"
    fine, pairs    levels and images by which `align` measures a network
    n              samples of a mark
    """

    name: str = "mnist8"
    T: int = 1000
    batch_size: int = 128
    short: int = 1000
    length: int = 2790
    few: tuple[int, ...] = (3, 5, 10)
    many: tuple[int, ...] = (20, 50)
    learn: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(LEARN))
    fine: int = 64
    pairs: int = 500
    n: int = 5000

    def __post_init__(self):
        if self.name not in IMAGES:
            raise ValueError(f"data {self.name!r} is not one of {', '.join(IMAGES)}")
        if not self.few or list(self.few) != sorted(set(self.few)) or self.few[0] < 1:
            raise ValueError(f"few = {self.few} must be numbers of steps, rising")
        if self.paid >= self.length:
            raise ValueError(f"the grids cost {self.price:,}, all of {self.length} training steps: learn them by less")

    @property
    def price(self) -> int:
        """Of the learned grids, all of `few` together."""
        return sum(int(2 * steps * self.learn["steps"] * self.learn["samples"]) for steps in self.few)

    @property
    def paid(self) -> int:
        """The training steps that they cost."""
        return math.ceil(self.price / (3 * self.batch_size))

    @property
    def round(self) -> int:
        """What a round of learning the density costs besides its training: f with backward, and losses."""
        return LEVELS["samples"] * (4 * self.few[-1] - 1) + 2 * LEVELS["batch"]

    @property
    def dense(self) -> int:
        """Training steps of a network that learns its density and pays for it and for the grids, in whole rounds."""
        each = 3 * self.batch_size
        rounds = (each * self.length - self.price) // (each * LEVELS["every"] + self.round)
        if not rounds:
            raise ValueError(f"{self.length} training steps hold no round of {LEVELS['every']} and its price")
        return rounds * LEVELS["every"]


# ---------------------------------------------------------------- the race


@dataclass
class Race(Setting):
    """The experiment at one size, on a CPU. Every result is a piece in `folder`: a killed race goes on where it was.

    bar: progress bars;  force: allows too few samples for a distance, for tests
    """

    plan: Plan
    folder: Path
    bar: bool = False
    force: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.plan.name

    @cached_property
    def problem(self) -> GaussianImages:
        """The training images as a Gaussian."""
        return GaussianImages.of(self.x0)

    def config(self, **others: object) -> dict:
        """What a piece must share with this code."""
        plan = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.plan).items()}
        return plan | {"classifier": self.classifier_hash} | others

    def schedule(self, told: str) -> Tensor:
        """abar (T+1,) that a network is trained on: "level", or the name of a fixed schedule."""
        if told == "level":
            return DENSITY.abar()
        if told == CLOSED:
            q = schedule_transfer.best_schedule(self.problem, self.plan.few[-1], self.plan.T)[0]
            return schedules.abar(q, self.plan.T)
        kind, q = FIXED[told]
        return schedules.abar(torch.tensor(q, dtype=torch.float64), self.plan.T, kind)

    def trained(self, told: str, steps: int, seed: int) -> ScoreTraining:
        """A denoiser that is told the level, or t on a fixed schedule; resumable."""
        scale = schedules.ANGLE if told == "level" else None
        name = _slug(told, steps, seed)
        bar = f"{name}: training" if self.bar else None
        options = {"steps": steps, "batch_size": self.plan.batch_size, "seed": seed, "scale": scale, "bar": bar}
        path = self.folder / f"network_{name}.safetensors"
        return train_denoiser(self.x0, self.schedule(told), self.size, **options, path=path)

    def dense(self, seed: int) -> levels.DensityLearning:
        """A denoiser that is told the level, and the density it was trained on; resumable."""
        plan, name = self.plan, _slug("network", "density", self.plan.dense, seed)
        own = {key: value for key, value in LEVELS.items() if key != "modes"} | {"seed": derive_seed("density", seed)}
        density = dataclasses.replace(DENSITY, phi=torch.zeros(LEVELS["modes"], dtype=torch.float64))
        network = networks.Denoiser(self.size, told="angle", seed=seed)
        training = recipe(
            LevelDenoiser(network, density.abar(), seen=SEEN), steps=plan.dense, batch_size=plan.batch_size, seed=seed
        )
        state = levels.DensityLearning(training, self.quality, GRIDS[FIRST](plan.few[-1]), density, **own)
        loop, path = levels.learn_density(state, self.x0, steps=plan.dense), self.folder / f"{name}.safetensors"
        options = {"steps": plan.dense, "every": LEVELS["every"], "bar": f"{name}: training" if self.bar else None}
        for _ in checkpointed(loop, state, path, **options):
            pass
        return state

    def network(self, told: str, steps: int, seed: int) -> torch.nn.Module:
        """Its moving average, frozen; told the "density", that of `dense`."""
        if told == "density":
            return self.dense(seed).training.ema.module.eval().requires_grad_(False)
        return self.trained(told, steps, seed).ema.module.eval().requires_grad_(False)

    def learned(self, train_steps: int, seed: int, steps: int, solver: str = "DDIM", told: str = "level") -> dict:
        """The grid of `learn_grid` for a network told the level: "grid", "start", "f" at each step, "cost".

        It starts from the learned grid of the next smaller number of steps, refined; the smallest from `FIRST`.
        """
        plan, name = self.plan, _slug("grid", train_steps, seed, steps, "" if solver == "DDIM" else "second")
        name += "_density" * (told == "density")
        smaller = [n for n in plan.few if n < steps]

        def compute() -> dict:
            network, start = self.network(told, train_steps, seed), GRIDS[FIRST](steps)
            if smaller:
                found = self.learned(train_steps, seed, smaller[-1], solver, told)["grid"]
                start = grids.refined(torch.tensor(found, dtype=torch.float64), steps)
            like, f = self.x0[: int(plan.learn["samples"])], []
            options = {"steps": int(plan.learn["steps"]), "rate": plan.learn["rate"], "sampler": SOLVERS[solver]}
            for record in learn_grid(network, start, self.quality, like, **options, seed=derive_seed("grids", seed)):
                f.append(record.f)
            return {"grid": record.mean.tolist(), "start": start.tolist(), "f": f, "cost": record.cost}

        config = self.config(train_steps=train_steps, seed=seed, steps=steps, solver=solver, first=FIRST)
        config |= {"told": told, "levels": LEVELS} if told == "density" else {}
        return files.piece(self.folder / f"{name}.json", config, compute)

    def searched(self, name: str, train_steps: int, seed: int, steps: int) -> dict:
        """The best of TRIALS schedules for a network told the level, as `learned` has it; "q", "f" of each in turn.

        A schedule whose levels do not rise within what the network has seen counts as NEVER.
        """
        n = self.plan.learn["samples"] * 2 * self.plan.learn["steps"] // TRIALS

        def compute() -> dict:
            network, tried = self.sampler(self.network("level", train_steps, seed).network), []
            g = torch.Generator().manual_seed(derive_seed("search", seed))
            x = torch.randn((int(n), 1, self.side, self.side), generator=g)
            ask = self.proposals(name, steps, derive_seed(name, seed))
            q = next(ask)
            while True:
                try:
                    grid = grids.of_schedule("cosine", q, steps)
                    on = LevelDenoiser(network, grid, seen=SEEN)
                    with torch.no_grad():
                        value = self.quality(sample_ddim(on, x, grid, [*range(steps, 0, -1)])).item()
                except ValueError:
                    value = NEVER
                tried.append((value, list(q)))
                try:
                    q = ask.send(value)
                except StopIteration:
                    break
            best = min(tried)[1]
            found = {"grid": grids.of_schedule("cosine", best, steps).tolist(), "q": best, "f": [f for f, _ in tried]}
            return found | {"cost": int(n) * steps * len(tried)}

        config = self.config(train_steps=train_steps, seed=seed, steps=steps, search=name, box=[list(b) for b in BOX])
        return files.piece(self.folder / f"{_slug(name, train_steps, seed, steps)}.json", config, compute)

    def proposals(self, name: str, steps: int, seed: int) -> schedule_race.Proposals:
        """What a search tries: of random search two schedules are those that are known to be good."""
        if name == "random search":
            known = [schedule_transfer.best_schedule(self.problem, steps, self.plan.T)[0].tolist()]
            known = [list(FIXED[EARLY][1]), *known][:TRIALS]
            for q in known:
                yield tuple(q)
            yield from schedule_race.random_search(TRIALS - len(known), seed, BOX)
        else:
            yield from schedule_race.bayesian(TRIALS, seed, BOX)

    def fixed(self, name: str, steps: int, network: LevelDenoiser | None = None) -> Tensor:
        """One of FIXED_GRIDS, (N+1,); "aligned steps" are those of a network."""
        if name in GRIDS:
            return GRIDS[name](steps)
        if name == "Gaussian, best grid":
            return grids.of_levels(schedule_transfer.best_levels(self.problem, steps)[0])
        if name == "constant rate":
            return grids.constant_rate(self.problem, steps)
        if name != "aligned steps" or network is None:
            raise ValueError(f"grid {name!r} is not one of {', '.join(FIXED_GRIDS)}, or lacks its network")
        seed = derive_seed("align", 0)
        return grids.align(*grids.changes(network.network, self.x0[: self.plan.pairs], self.plan.fine, seed), steps)

    @torch.no_grad()
    def mark(self, denoiser: Callable, abar: Tensor, ts: list[int], seed: int, solver: str) -> dict[str, float]:
        """Fréchet distance of n samples to the validation and to the test split, from the x_T of `setting.generate`."""
        features = []
        for start in range(0, self.plan.n, 500):
            g = torch.Generator().manual_seed(derive_seed("generate", seed, start))
            x = draw_x_T((min(500, self.plan.n - start), 1, self.side, self.side), abar, generator=g)
            features.append(self.classifier.features(SOLVERS[solver](denoiser, x, abar, ts).clamp(-1, 1)).double())
        features = torch.cat(features)
        splits = {split: real_features(self.name, split) for split in ("val", "test")}
        return {k: metrics.frechet(features, real, force=self.force) for k, real in splits.items()}

    def marks(
        self, told: str, train_steps: int, seed: int, table: Mapping[str, Mapping], **about: object
    ) -> list[dict]:
        """Rows of one network on grids, by name {"steps": ..., "grid": ..., "search_cost": ...}; a piece for each.

        A network told t has one grid, that of its schedule, where "grid" is None.
        """
        rows, solver, fast = [], about.get("solver", "DDIM"), []

        def compute(steps: int, grid: Sequence[float] | None) -> dict:
            state = self.dense(seed).training if told == "density" else self.trained(told, train_steps, seed)
            if not fast:
                network = state.ema.module.eval()
                fast.append(self.sampler(network.network if isinstance(network, LevelDenoiser) else network))
            ts, denoiser = timesteps(self.plan.T, steps), fast[0]
            if grid is None:
                abar = self.schedule(told)
            else:
                table = torch.tensor(grid, dtype=torch.float64)
                denoiser, abar, ts = LevelDenoiser(fast[0], table, seen=SEEN), table, [*range(steps, 0, -1)]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "abar_T =")  # starts at N(0, I), whatever abar_T
                return self.mark(denoiser, abar, ts, seed, solver) | training_end(state)

        for key, one in table.items():
            config = self.config(told=told, train_steps=train_steps, seed=seed, solver=solver, **one)
            name = _slug("mark", told, train_steps, seed, key, "" if solver == "DDIM" else "second")
            found = files.piece(self.folder / f"{name}.json", config, partial(compute, one["steps"], one["grid"]))
            row = {"told": "level" if told in ("level", "density") else "t", "seed": seed, "train_steps": train_steps}
            row |= {"solver": solver, "budget": "total", "method": told} | about | dict(one)
            rows.append(row | {k: found[k] for k in ("val", "test", "train_cost", "loss", "wall_s")})
        return rows

    def on_grids(self, train_steps: int, seed: int, names: Sequence[str], numbers: Sequence[int], **about: object):
        """Rows of a network told the level on fixed grids."""
        network = self.network("level", train_steps, seed)
        one = {(n, N): self.fixed(n, N, network).tolist() for n in names for N in numbers}
        return self.marks("level", train_steps, seed, _grids(one), **about)

    def ours(
        self, train_steps: int, seed: int, numbers: Sequence[int], learned_on: int, charged: bool, **about: object
    ) -> list[dict]:
        """Rows of a network told the level on the grids that were learned for the network of `learned_on` steps."""
        solver, largest, one = about.get("solver", "DDIM"), self.plan.few[-1], {}
        for N in numbers:
            found = self.learned(learned_on, seed, N if N in self.plan.few else largest, solver)
            grid = torch.tensor(found["grid"], dtype=torch.float64)
            one[OURS, N] = (grid if N in self.plan.few else grids.refined(grid, N)).tolist()
        cost = self.plan.price if charged else 0
        return self.marks("level", train_steps, seed, _grids(one, cost), **about)

    def told_t(self, name: str, train_steps: int, seed: int, numbers: Sequence[int], **about: object) -> list[dict]:
        """Rows of a network told t, on its own schedule."""
        own = {f"{name} {N}": {"steps": N, "grid": None, "search_cost": 0} for N in numbers}
        return self.marks(name, train_steps, seed, own, **about)

    def part(self, part: str, seed: int) -> list[dict]:
        """The rows of one of PARTS."""
        plan = self.plan
        less, few, every = plan.length - plan.paid, plan.few, (*plan.few, *plan.many)
        if part == "total":
            return self.ours(less, seed, few, less, True) + self.told_t(EARLY, plan.length, seed, few)
        if part == "grids":
            rows = self.on_grids(plan.length, seed, FIXED_GRIDS, few)
            return rows + self.ours(plan.length, seed, few, less, False, budget="final")
        if part == "search":
            found = {(n, N): self.searched(n, less, seed, N)["grid"] for n in SEARCHES for N in few}
            return self.marks("level", less, seed, _grids(found, plan.price))
        if part == "density":
            found = {(DENSE, N): self.learned(plan.dense, seed, N, told="density")["grid"] for N in few}
            price = plan.price + plan.dense // LEVELS["every"] * plan.round
            return self.marks("density", plan.dense, seed, _grids(found, price))
        if part == "more":
            rows = self.ours(less, seed, plan.many, less, True) + self.told_t(EARLY, plan.length, seed, plan.many)
            return rows + self.on_grids(plan.length, seed, FIXED_GRIDS, plan.many)
        if part == "short":
            rows = self.ours(plan.short, seed, few, plan.short, False, budget="final")
            rows += self.told_t(EARLY, plan.short, seed, few, budget="final")
            return rows + self.on_grids(plan.short, seed, FIXED_GRIDS, few, budget="final")
        if part == "told t":
            names = (CLOSED, *(name for name in FIXED if name != EARLY))
            return [row for one in names for row in self.told_t(one, plan.length, seed, every)]
        if part == "second order":
            about = {"solver": "DPM-Solver++(2M)", "budget": "final"}
            return self.ours(plan.length, seed, few, plan.length, False, **about) + self.on_grids(
                plan.length, seed, FIXED_GRIDS, few, **about
            )
        raise ValueError(f"part {part!r} is not one of {', '.join(PARTS)}")

    def run(self, seeds: Sequence[int], parts: Sequence[str] = PARTS) -> dict[str, object]:
        """The experiment: "rows", and the "grids" that were learned for "total"."""
        jobs = [(part, seed) for part in parts for seed in seeds]
        jobs = tqdm(jobs, "grid race", disable=not self.bar)
        rows = [{"part": part} | row for part, seed in jobs for row in self.part(part, seed)]
        less = self.plan.length - self.plan.paid
        found = [{"seed": seed, "steps": N} | self.learned(less, seed, N) for seed in seeds for N in self.plan.few]
        for one in found:
            del one["config"]
        return {"rows": rows, "grids": found, "parts": list(parts)}

    @torch.no_grad()
    def store(self, path: Path, seed: int, count: int = 10) -> None:
        """Keeps in one file what `restore` gives back: our network of "total", its grids, and its images by each."""
        less, tensors = self.plan.length - self.plan.paid, {}
        network = self.network("level", less, seed)
        for N in self.plan.few:
            grid = torch.tensor(self.learned(less, seed, N)["grid"], dtype=torch.float64)
            images = generate(network.on(grid), grid, [*range(N, 0, -1)], count, self.side, eta=0.0, seed=seed)
            tensors |= {f"grid|{N}": grid, f"images|{N}": ((images + 1) * 127.5).round().byte()}
        tensors |= {f"network|{name}": value for name, value in network.network.state_dict().items()}
        files.save_state(path, tensors, {"size": self.size, "seed": seed, "seen": SEEN})

    def protocol(self) -> dict[str, object]:
        """What a recorded result must share with this code, and its plan; JSON-able."""
        return about() | {"plan": self.config(), "pieces": "resumable; wall_s is the sum of theirs"}


def _grids(one: Mapping[tuple[str, int], Sequence[float]], cost: int = 0) -> dict[str, dict]:
    return {
        f"{name} {N}": {"method": name, "steps": N, "grid": grid, "search_cost": cost}
        for (name, N), grid in one.items()
    }


_slug = schedule_race._slug


def about() -> dict[str, object]:
    """Everything but the sizes."""
    own = {"fixed": list(FIXED_GRIDS), "align": list(grids.ALIGN), "tuned": TUNED, "first": FIRST}
    own |= {"box": [list(range_) for range_ in BOX], "trials": TRIALS, "levels": LEVELS}
    return own | {"density": [DENSITY.s, *DENSITY.ends], "told t": [EARLY, CLOSED, *FIXED]}


def check_protocol(found: Mapping[str, object]) -> None:
    """Raises ValueError, naming what differs, if a result was made by another protocol than this module's."""
    same_protocol(found, about(), "run `python -m bilevel_core.lab.studies.grid_race`")


def restore(path: Path) -> tuple[LevelDenoiser, dict[int, Tensor], dict[int, Tensor]]:
    """What `Race.store` kept: the network, frozen, on its training levels; grids (N+1,) and images, uint8, by N."""
    tensors, about = files.load_state(path)
    parts: dict[str, dict] = {part: {} for part in ("network", "grid", "images")}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("|")
        parts[part][rest if part == "network" else int(rest)] = tensor
    network = networks.Denoiser(about["size"], told="angle")
    network.load_state_dict(parts["network"])
    network = LevelDenoiser(network.eval().requires_grad_(False), DENSITY.abar(), seen=tuple(about["seen"]))
    return network.eval(), parts["grid"], parts["images"]


def standing(
    rows: Sequence[Mapping], steps: int, *, split: str = "test", **wanted: object
) -> dict[str, baselines.Summary]:
    """Every method beside ours at a number of steps, by paired differences over seeds, best first.

    wanted  what rows must have, by default budget="total" and solver="DDIM". A network told t says so in its name
    """
    wanted = {"budget": "total", "solver": "DDIM", "steps": steps} | wanted
    kept = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    kept = [row | {"method": row["method"] + ", told t" * (row["told"] == "t"), "prompt": ""} for row in kept]
    found = baselines.summarise([row | {"regret": row[split]} for row in kept], reference=OURS)
    return {one.method: one for one in sorted(found, key=lambda one: one.regret.mean)}


def pays_from(total: float, final: float) -> float:
    """From how many trainings K a grid that is learned once pays; infinity: never.

    total, final  a rival's distance minus ours at equal total cost (K = 1) and where the grid costs nothing: between
                  them the share 1/K of its price is charged to each training, and the difference taken as linear in it
    """
    return 1 if total > 0 else math.inf if final <= 0 else math.floor((final - total) / final) + 1


def record(race: Race, seeds: Sequence[int], parts: Sequence[str]) -> Path:
    """Runs the race, or finds its pieces, and writes the book's result."""
    found = race.run(seeds, parts)
    trained = {(r["method"] if r["told"] == "t" else "", r["train_steps"], r["seed"]): r for r in found["rows"]}
    units = sum(r["train_cost"] for r in trained.values()) + sum(g["cost"] for g in found["grids"])
    units += sum(race.plan.n * r["steps"] for r in found["rows"])
    searches = {(r["method"], r["seed"]): r["search_cost"] for r in found["rows"] if r["method"] in (*SEARCHES, DENSE)}
    units += sum(searches.values())
    wall = sum(r["wall_s"] for r in (*found["rows"], *found["grids"]))
    options = {"seeds": list(seeds), "wall_s": wall, "cost": units, "protocol": race.protocol()}
    path = results.write_result("07_grids", "recorded", found, {"PROFILE": "recorded"}, **options)
    race.store(path.with_suffix(".safetensors"), min(seeds))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default="", help="where the pieces go; default BILEVEL_WORK_DIR, else _runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--no-record", action="store_true", help="make the pieces, and write no result")
    options = parser.parse_args(arguments)
    race = Race(Plan(), places.work_dir(options.work_dir) / "grid_race", bar=True)
    if options.no_record:
        race.run(range(options.seeds), options.parts)
    else:
        print(record(race, range(options.seeds), options.parts))


if __name__ == "__main__":
    main()
