"""Chapter 6's experiment once more: the gradient in a noise schedule for networks that are told the noise level.

The protocol, written down before the recorded run. Data, network, sampler, quality, POINTS, WIDTHS and training (1,000
steps of 64 images) are those of `schedule_gradients`. Three kinds of training are compared, KINDS:

    t       told t, trained at q's levels: Algorithm 3
    level   told the angle of the level, trained at q's levels
    broad   told the angle, trained on a fixed uniform distribution of angles that does not depend on q

Truth, a seed at a time: central differences of F(z) = f(z, theta(z)) over whole trainings with common seeds. For t that
is what chapter 6 has recorded (n = 5,000). For level it is measured here, n_truth samples. For broad theta does not
depend on z, so the truth is the difference at fixed theta by construction and proves nothing: what is compared there
is the exact derivative with the wide difference, and F with that of the other kinds.

Estimators at fixed theta(z), for every kind: "wide", the same differences at the same widths, and "exact", the pathwise
derivative in reverse mode; two draws of x_T of n samples, the first that of the truth. Judged seed by seed as in
`schedule_gradients.judge` (bias, cosine in units of the widths, |mean|/sd at COST), besides: the plain cosine; the
cosine of each seed with its own truth; the signs, counted where the truth's slope is told from zero by its interval.

The verdict at a point, by the wide differences (`Verdict`): that *the bilevel term repairs a network that is told the
wrong thing* holds if, told the level, all counted signs are right, and the cosine is higher than told t, seed by seed,
with an interval above zero. It fails if a sign is wrong told the level or that interval lies below zero; else it is
open.

Smoothness and range (VARIANTS, at "near", three seeds, one draw each): networks of the kind broad with the angle's
embedding stretched by 5, 20, 100 (broad) and 640 radians a radian, with noise of 0.01 on the level in training, told
log-SNR; and trained up to the grid's own end or up to the highest level of a difference instead of beyond it.

Re-labelling (`relabel`, three seeds): Frechet distance at 3, 5 and 10 steps at the levels of cosine end 0.95 of a
network told t that was trained there; of one trained at the default cosine, told t as it is, interpolated, nearest;
and of the kind broad. Besides, the default network at its own default schedule.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import estimators, schedules
from ...guidance import CostMeter, LevelDenoiser
from ...samplers import sample_ddim, timesteps
from ...seeds import derive_seed
from .. import files, metrics, places, results
from ..levels import BROAD, Density, time_scale
from ..models.fast import fast
from . import schedule_gradients
from .schedule_gradients import POINTS, WIDTHS, coordinates, differences, judge, shifted
from .setting import train_denoiser

EARLIER = "06_learning_noise_schedules"  # the result that holds the truth told t
SCALES = {"t": None, "angle": schedules.ANGLE, "log_nsr": schedules.LOG_NSR}
TOP = BROAD[1] / (math.pi / 2)  # highest level of a fixed distribution, in right angles
GRIDS = (3, 5, 10)  # numbers of steps in `relabel`
DEFAULT, SHIFTED = (0.0, 1.0, 1.0, 0.008), (0.0, 0.95, 1.0, 0.008)  # its two schedules


@dataclass(frozen=True)
class Kind:
    """What a network is told, and the levels that it is trained on.

    told   a name of SCALES
    top    None: q's own levels. Else angles uniform from BROAD's lowest to so many right angles, whatever q is
    stretch, jitter  as of `networks.Denoiser`
    """

    told: str = "angle"
    top: float | None = None
    stretch: float | None = None
    jitter: float = 0.0

    def table(self, own: Tensor) -> Tensor:
        """abar (M+1,) of its training, for q's own table."""
        return own if self.top is None else Density(ends=(BROAD[0], self.top * math.pi / 2)).abar(1000)


KINDS = {"t": Kind("t"), "level": Kind(), "broad": Kind(top=TOP)}
VARIANTS = {
    "stretch 20": Kind(top=TOP, stretch=20.0),
    "stretch 640": Kind(top=TOP, stretch=640.0),
    "log-SNR": Kind("log_nsr", top=TOP),
    "stretch 20, to the grid's end": Kind(top=0.951, stretch=20.0),  # near: 0.9504 at z, 0.9802 at end + h
    "stretch 20, to the last difference": Kind(top=0.981, stretch=20.0),
    "jitter 0.01": Kind(top=TOP, jitter=0.01),
    "stretch 5": Kind(top=TOP, stretch=5.0),
}


@dataclass(frozen=True)
class Study(schedule_gradients.Study):
    """As its parent, for networks of any `Kind`; n_truth samples in the truth, n in each draw at fixed theta."""

    n_truth: int = 2000
    n: int = 1000
    draws: int = 2

    def network(self, kind: Kind, z: Tensor, seed: int) -> tuple[nn.Module, int]:
        """The denoiser of a whole training, frozen, and what it cost; kept in `folder`. `at` tells it a schedule."""
        if kind.told == "t":
            return self.train(z, seed)
        where = "_".join(f"{value:.4g}" for value in (z.tolist() if kind.top is None else [kind.top]))
        options = {"jitter": kind.jitter} | ({"stretch": kind.stretch} if kind.stretch else {})
        said = "_".join([kind.told, *(f"{value:g}" for value in options.values())])
        if (said, where, seed) not in self.memory:
            path = self.folder / f"train_{said}_{where}_{seed}.safetensors"
            options |= {"steps": self.train_steps, "batch_size": self.batch_size, "seed": seed, "path": path}
            options["scale"] = SCALES[kind.told]
            state = train_denoiser(self.x0, kind.table(self.abar(z)), self.size, **options)
            self.memory[said, where, seed] = state.ema.module.eval().requires_grad_(False), state.cost
        return self.memory[said, where, seed]

    def at_fixed(self, network: nn.Module, n: int) -> tuple[Callable[[Tensor, int], Tensor], list[CostMeter]]:
        """f(z, seed) of n samples with the network as it is, told z's schedule; and the meters of its calls so far."""
        network, meters = faster(network, self.x0[:1]) if self.device == "cpu" else network, []

        def f(z: Tensor, seed: int) -> Tensor:
            meters.append(CostMeter(at(network, self.abar(z))))
            return self.objective(meters[-1], n)(z, seed)

        return f, meters


def at(network: Callable, abar: Tensor) -> Callable:
    """The denoiser of a schedule abar: what a network told t takes no notice of."""
    return network.on(abar) if isinstance(network, LevelDenoiser) else network


def faster(network: nn.Module, example_x: Tensor) -> Callable:
    """`fast` of a network, or of that inside a `LevelDenoiser`, which can then still be told another schedule."""
    if not isinstance(network, LevelDenoiser):
        return fast(network, example_x)
    return LevelDenoiser(fast(network.network, example_x), network.abar, network.scale, network.seen)


def both(f: Callable[[Tensor, int], Tensor], z: Tensor, seed: int) -> dict:
    """f(z, seed) and its gradient (3,) at fixed theta in two ways: "wide" differences at WIDTHS, and "exact"."""
    with torch.no_grad():
        values = [f(moved, seed).item() for moved in shifted(z)]
    exact, info = estimators.q_grad_reverse(f, z, seed=seed)
    return {"value": info["f"], "values": values, "wide": differences(values), "exact": exact.tolist()}


# ---------------------------------------------------------------- the pieces


def truth(study: Study, kind: str, point: str, seed: int) -> dict:
    """The hypergradient "grad" by differences over whole trainings of KINDS[kind], as `schedule_gradients.truth`."""
    chosen = KINDS[kind]

    def compute() -> dict:
        values, cost = [], 0
        for z in (coordinates(point), *shifted(coordinates(point))):
            network, spent = study.network(chosen, z, seed)
            f, meters = study.at_fixed(network, study.n_truth)
            with torch.no_grad():
                values.append(f(z, seed).item())
            cost += spent + meters[0].cost
        return {"value": values[0], "values": values[1:], "grad": differences(values[1:]), "cost": cost}

    config = study.about("n_truth", point=point, seed=seed, kind=asdict(chosen))
    return files.piece(study.folder / f"truth_{kind}_{point}_{seed}.json", config, compute)


def fixed(study: Study, kind: str, point: str, seed: int, draws: int = 1) -> dict:
    """`both` at theta(z) of one of KINDS or VARIANTS, so many "draws"; F(z) as "value", costs of one "wide", "exact".

    "beyond" counts the calls with a level beyond those that the network has seen.
    """
    chosen = (KINDS | VARIANTS)[kind]

    def compute() -> dict:
        z, (network, spent) = coordinates(point), study.network(chosen, coordinates(point), seed)
        with torch.no_grad():
            value = study.at_fixed(network, study.n_truth)[0](z, seed).item()
        f, meters = study.at_fixed(network, study.n)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rows = [both(f, z, derive_seed("fixed", seed, i) if i else seed) for i in range(draws)]
        beyond = sum("has seen" in str(warning.message) for warning in said)
        costs = [meter.cost for meter in meters[: len(meters) // draws]]
        costs = {"wide": sum(costs[:-1]), "exact": costs[-1]}
        return {"value": value, "draws": rows, "costs": costs, "train_cost": spent, "beyond": beyond} | {
            "cost": spent + sum(meter.cost for meter in meters)
        }

    config = study.about("n_truth", "n", point=point, seed=seed, kind=asdict(chosen), draws=draws)
    name = kind.replace(" ", "-").replace(",", "").replace("'", "")
    return files.piece(study.folder / f"fixed_{name}_{point}_{seed}.json", config, compute)


def relabel(study: Study, seed: int) -> dict:
    """Frechet distances "rows": {"network", "steps", "frechet"} of networks at the levels of SHIFTED; see above."""
    own, there = (study.abar(coordinates_of(q)) for q in (DEFAULT, SHIFTED))

    def compute() -> dict:
        trained = [study.network(KINDS["t"], coordinates_of(q), seed) for q in (DEFAULT, SHIFTED)]
        trained.append(study.network(KINDS["broad"], coordinates_of(SHIFTED), seed))
        default, special, broad = (faster(network, study.x0[:1]) for network, _ in trained)
        told = {
            "default, own schedule": (default, own),
            "default, as it is": (default, there),
            "default, interpolated t": (LevelDenoiser(default, own, time_scale(own)).on(there), there),
            "default, nearest t": (LevelDenoiser(default, own, time_scale(own, nearest=True)).on(there), there),
            "trained there": (special, there),
            "told the level": (at(broad, there), there),
        }
        rows, cost = [], sum(spent for _, spent in trained)
        generator = torch.Generator(study.device).manual_seed(derive_seed("relabel", seed))
        x_T = torch.randn((study.n_truth, *study.x0.shape[1:]), generator=generator, device=study.device)
        for (name, (denoiser, abar)), steps in itertools.product(told.items(), GRIDS):
            meter = CostMeter(denoiser)
            with torch.no_grad():
                distance = study.quality(sample_ddim(meter, x_T, abar, timesteps(study.T, steps))).item()
            rows.append({"network": name, "steps": steps, "frechet": distance})
            cost += meter.cost
        return {"rows": rows, "cost": cost}

    config = study.about("n_truth", seed=seed, schedules=[list(DEFAULT), list(SHIFTED)], grids=list(GRIDS))
    return files.piece(study.folder / f"relabel_{seed}.json", config, compute)


def coordinates_of(q: Sequence[float]) -> Tensor:
    """z (3,) of a schedule q."""
    return schedules.reduce(torch.tensor(q, dtype=torch.float64))


# ---------------------------------------------------------------- the whole


def pieces(
    study: Study, seeds: int, short: int, far: int, earlier: Sequence[Mapping] = (), first: int = 0
) -> list[Callable[[], dict]]:
    """Every piece as a function without arguments, in the order in which a run that is cut short says most.

    seeds, far, short  how many at "near", at "far" (broad: `seeds` there as well), of VARIANTS and `relabel`
    earlier   pieces of `schedule_gradients`: its truth told t is made only for the points and seeds that these lack
    """
    known, made = truths_told_t(earlier), []

    def judged(kind: str, point: str, seed: int) -> None:
        if kind == "t" and (point, seed) not in known:
            made.append(partial(schedule_gradients.truth, study, point, seed))
        if kind == "level":
            made.append(partial(truth, study, kind, point, seed))
        made.append(partial(fixed, study, kind, point, seed, study.draws))

    def nearby(chosen: Sequence[int]) -> None:
        for seed, kind in itertools.product(chosen, ("broad", "t", "level")):
            judged(kind, "near", seed)

    def varied(names: Sequence[str]) -> None:
        made.extend(partial(fixed, study, name, "near", seed) for name in names for seed in chosen[:short])

    chosen, names = range(first, first + seeds), list(VARIANTS)
    nearby(chosen[:short])
    made += [partial(relabel, study, seed) for seed in chosen[:short]]
    varied(names[:3])
    nearby(chosen[short:])
    varied(names[3:])
    for kind, count in {"broad": seeds, "t": far, "level": far}.items():
        for seed in chosen[:count]:
            judged(kind, "far", seed)
    return made


def gather(makers: Sequence[Callable[[], dict]]) -> list[dict]:
    """Makes `pieces`, or reads them, each with the name of its function as "made_by"; a killed run goes on."""
    return [{"made_by": make.func.__name__} | make() for make in makers]


def record(study: Study, makers: Sequence[Callable[[], dict]], seeds: Sequence[int], tier: str = "recorded") -> Path:
    """Makes the pieces and writes them as the result 06_levels."""
    found = gather(makers)
    twice = 0  # a network that two pieces use was trained once
    for piece in found:
        which = piece["made_by"], name_of(piece), piece["config"].get("point")
        twice += which[0] == "relabel" or which[:2] == ("fixed", "level") or which[1:] == ("broad", "far")
    cost = sum(piece["cost"] for piece in found) - twice * 3 * study.train_steps * study.batch_size
    parameters = study.about("n_truth", "n", "draws") | {"pieces": len(found)}
    return results.write_result(
        "06_levels",
        tier,
        {"pieces": found},
        parameters,
        seeds=list(seeds),
        wall_s=sum(piece["wall_s"] for piece in found),
        cost=cost,
        protocol=about() | {"wall_s": "of all pieces, on shared cores"},
    )


def about() -> dict[str, object]:
    """The protocol but for the sizes."""
    kinds = {name: asdict(kind) for name, kind in (KINDS | VARIANTS).items()}
    shared = {"points": {name: list(q) for name, q in POINTS.items()}, "widths": list(WIDTHS), "kinds": kinds}
    return shared | {"schedules": [list(DEFAULT), list(SHIFTED)], "grids": list(GRIDS), "told t": EARLIER}


def truths_told_t(earlier: Sequence[Mapping]) -> dict[tuple[str, int], list[float]]:
    """The truth (3,) by (point, seed) in pieces of `schedule_gradients`, as `gather` there or here gives them."""
    found = {}
    for piece in earlier:
        if piece.get("kind", piece.get("made_by")) == "truth" and "kind" not in piece["config"]:
            if piece["config"]["scale"] == 1.0:
                found[piece["config"]["point"], piece["config"]["seed"]] = piece["grad"]
    return found


def name_of(piece: Mapping) -> str | None:
    """Which of KINDS or VARIANTS a piece is of."""
    return next(
        (name for name, kind in (KINDS | VARIANTS).items() if piece["config"].get("kind") == asdict(kind)), None
    )


def verdicts(found: Sequence[Mapping], point: str, earlier: Sequence[Mapping] = ()) -> dict[str, dict]:
    """For each of KINDS whose pieces are there: "value" F (interval), "truth", and "wide" and "exact", each judged.

    Besides what `judge` gives: "plain" cosine, "cosines" (one a seed, in units of the widths) and "signs" (right or
    wrong, where the truth is told from zero). The truth of broad is its own wide difference.
    """
    told_t, result = truths_told_t([*earlier, *found]), {}
    for kind in KINDS:
        own = [piece for piece in found if name_of(piece) == kind and piece["config"]["point"] == point]
        fixes = {piece["config"]["seed"]: piece for piece in own if piece["made_by"] == "fixed"}
        truths = {piece["config"]["seed"]: piece["grad"] for piece in own if piece["made_by"] == "truth"}
        if kind == "t":
            truths = {seed: grad for (where, seed), grad in told_t.items() if where == point}
        if kind == "broad":
            truths = {seed: mean_of(piece, "wide") for seed, piece in fixes.items()}
        seeds = sorted(fixes.keys() & truths.keys())
        if len(seeds) < 2:
            continue
        rows = {
            "seeds": seeds,
            "value": metrics.t_interval([fixes[seed]["value"] for seed in seeds]),
            "truth": [metrics.t_interval(column) for column in zip(*(truths[seed] for seed in seeds), strict=True)],
        }
        for way in ("wide", "exact"):
            draws = [[row[way] for row in fixes[seed]["draws"]] for seed in seeds]
            judged = judge([truths[seed] for seed in seeds], draws, fixes[seeds[0]]["costs"][way])
            judged["cosines"] = [cosine(mean_of(fixes[seed], way), truths[seed]) for seed in seeds]
            means = [[m.mean for m in values] for values in (judged["mean"], rows["truth"])]
            judged["plain"] = cosine(*means, units=(1.0, 1.0, 1.0))
            pairs = zip(*means, rows["truth"], strict=True)
            judged["signs"] = [ours * true > 0 for ours, true, interval in pairs if interval.lo * interval.hi > 0]
            rows[way] = judged
        result[kind] = rows
    return result


def mean_of(piece: Mapping, way: str) -> list[float]:
    """Mean (3,) over the draws of a piece of `fixed`."""
    return torch.tensor([row[way] for row in piece["draws"]], dtype=torch.float64).mean(0).tolist()


def cosine(a: Sequence[float], b: Sequence[float], units: Sequence[float] = WIDTHS) -> float:
    """Of two gradients (3,), with coordinates in these units."""
    a, b, units = (torch.as_tensor(values, dtype=torch.float64) for values in (a, b, units))
    return torch.cosine_similarity(a * units, b * units, 0).item()


@dataclass(frozen=True)
class Verdict:
    """What the protocol says at a point: "holds", "fails" or "open"; signs told the level, and how much the cosine
    with the truth rises from told t, paired by seeds."""

    said: str
    signs: list[bool]
    rise: metrics.Interval


def decide(found: Mapping[str, Mapping]) -> Verdict:
    """The verdict from `verdicts` of one point, over the seeds that both kinds share."""
    level, told_t = ({**dict(zip(found[k]["seeds"], found[k]["wide"]["cosines"], strict=True))} for k in ("level", "t"))
    rise = metrics.t_interval([level[seed] - told_t[seed] for seed in sorted(level.keys() & told_t.keys())])
    signs = found["level"]["wide"]["signs"]
    said = "holds" if all(signs) and rise.lo > 0 else "fails" if not all(signs) or rise.hi < 0 else "open"
    return Verdict(said, signs, rise)


def smoothness(found: Sequence[Mapping], truth: Sequence[float]) -> dict[str, dict]:
    """For the kind broad and each of VARIANTS at "near": F and, one a seed, cosines of "wide" and "exact" with a given
    truth (3,) and with each other ("agree"); "beyond", calls with levels that the network has not seen."""
    result = {}
    for name in ("broad", *VARIANTS):
        own = [p for p in found if p["made_by"] == "fixed" and name_of(p) == name and p["config"]["point"] == "near"]
        if own:
            pairs = [(mean_of(piece, "wide"), mean_of(piece, "exact")) for piece in own]
            result[name] = {
                "value": [piece["value"] for piece in own],
                "wide": [cosine(wide, truth) for wide, _ in pairs],
                "exact": [cosine(exact, truth) for _, exact in pairs],
                "agree": [cosine(wide, exact) for wide, exact in pairs],
                "beyond": sum(piece["beyond"] for piece in own),
            }
    return result


def relabelled(found: Sequence[Mapping]) -> dict[str, dict[int, list[float]]]:
    """Frechet distances of `relabel`: network -> steps -> one a seed."""
    result: dict[str, dict[int, list[float]]] = {}
    for piece in found:
        for row in piece["rows"] if piece["made_by"] == "relabel" else []:
            result.setdefault(row["network"], {}).setdefault(row["steps"], []).append(row["frechet"])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default="", help="where the pieces go; default BILEVEL_WORK_DIR, else _runs")
    parser.add_argument("--seeds", type=int, default=5, help="at near")
    parser.add_argument("--short", type=int, default=3, help="seeds of the variants and of re-labelling")
    parser.add_argument("--far", type=int, default=3, help="seeds at far")
    parser.add_argument("--pieces", type=int, help="only the first so many")
    options = parser.parse_args(arguments)
    study = Study(places.work_dir(options.work_dir) / "level_gradients")
    earlier = results.read_result(EARLIER)["data"]["pieces"]
    makers = pieces(study, options.seeds, options.short, options.far, earlier)[: options.pieces]
    print(record(study, makers, range(options.seeds)))


if __name__ == "__main__":
    main()
