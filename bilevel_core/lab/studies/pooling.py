"""Chapter 9: does it pay to pool all that Algorithm 2 has drawn? On the mixture, and on images.

Pooling on images. Algorithm 2 of chapter 5 (`lambda_race.race`) with the same samples, the same seeds of its rounds and
the same budget, but with `pool=True`; its last lambda, or the maximum of the curve of everything it has drawn. What was
open, the effective sample size to ask for and which of the two to report, is decided on bold VALIDATION prompts
(`validate_pooling`); TEST prompts are run once, against the rows that chapter 5 recorded without pooling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ... import algorithms, estimators
from ...algorithms import TiltSamples
from ...seeds import derive_seed
from .. import metrics
from ..files import piece
from ..models import rewards
from ..models.chains import Chain
from . import lambda_race
from .guidance_bias import guidance_bias, guided_on_images
from .mixture import Shifted

START = 1.0  # of Algorithm 2 on images, as in chapter 5
BOUNDS = (0.01, 100.0)
DRAWS, ROUNDS = 250, 4  # fresh particles a round, and rounds: what half of chapter 5's budget buys
MIN_ESS_TRIED = (100.0, 250.0)  # on validation prompts, of Algorithm 2 with pooling
MIN_ESS, REPORTED = 100.0, "last"  # what these chose: mean regret 0.21 against 0.40 (read off) and 0.65 (at 250, last)
PROTOCOL = {
    "mixture": "400 samples of p_0 and rounds of exact draws, 1000 at most; paired over methods by the first samples",
    "pooling": "chapter 5's samples, folds, seeds and budget; marked as there, by the other folds and runs",
    "chosen on validation": f"effective sample size {MIN_ESS:g}, reported: {REPORTED}",
    "bias": "exact denoiser of the mixture, eta = 1, common noise over lambda",
    "pieces": "resumable; wall_s counts those of the last start",
}


# ---------------------------------------------------------------- pooling, on the mixture

MIXTURE_LAMS = torch.logspace(-1.3, 2, 133, dtype=torch.float64)


def mixture_methods() -> dict[str, dict]:
    """Name -> options of `learn_lam`, with "batch" and "budget": the samples of a round, and of all rounds together."""
    small, large = {"batch": 100, "min_ess": 50.0}, {"batch": 200, "min_ess": 100.0}
    return {
        "penalty, γ = 10": small | {"gamma": 10.0},
        "penalty, γ = 1000": small | {"gamma": 1000.0},
        "covariance": small,
        "covariance, batches of 200": large,
        "covariance, pooled": small | {"pool": True},
        "covariance, pooled, ESS 100": small | {"pool": True, "min_ess": 100.0},
    }


def mixture_pooling(
    centre: float, repeats: int, *, n: int = 400, budget: int = 1000, start: float = 3.0, first: int = 0
) -> list[dict]:
    """A row for each way to learn lam on `Shifted(centre)`, from n samples of p_0 and rounds of exact draws.

    first   the draws are those of the so-and-so-many-th `repeats`, from 0 on
    budget  samples in all, at most. Two rows use no gradient: "pooled curve" reads the maximum off what the last method
            drew, "curve of p_0" off `budget` samples of p_0
    Rows: "method", and over repeats "error" (root mean square of log lam/lam*), "regret" with its t interval, "gain"
    (regret of "covariance" minus this one's, paired), "cost", and for curves "cover", the share of intervals with lam*.
    """
    one, found = Shifted(centre), {}
    for repeat in range(first * repeats, (first + 1) * repeats):
        given, seed = one.first(n, derive_seed("mixture, p_0", repeat)), derive_seed("mixture", repeat)
        for name, options in mixture_methods().items():
            options = dict(options)
            batch = options.pop("batch")

            def draw(lam: float, round: int, batch: int = batch, seed: int = seed) -> TiltSamples:
                return one.draw(lam, batch, derive_seed("round", seed, round))

            options |= {"draw": draw, "rounds": (budget - n) // batch, "bounds": (0.05, 100.0)}
            *_, last, _ = algorithms.learn_lam(given, start, **options)  # the end of the path, not the top of the curve
            found.setdefault(name, []).append((last.lam, last.cost, None))
        alone = one.first(budget, derive_seed("mixture, p_0", repeat))
        for name, samples, cost in (("pooled curve", last.outer.p_star, last.cost), ("curve of p_0", alone, budget)):
            curve = estimators.lam_curve(samples.r_up, samples.r_low, MIXTURE_LAMS, samples.log_w, min_ess=30)
            hit = curve.interval[0] <= one.lam <= curve.interval[1]
            found.setdefault(name, []).append((curve.best, cost, hit))
    regrets = {name: [one.regret(lam) for lam, *_ in tries] for name, tries in found.items()}
    rows = []
    for name, tries in found.items():
        errors = [math.log(min(max(lam, 0.05), 100.0) / one.lam) for lam, *_ in tries]
        gains = [a - b for a, b in zip(regrets["covariance"], regrets[name], strict=True)]
        row = {"centre": centre, "method": name, "error": math.sqrt(sum(e * e for e in errors) / repeats)}
        row |= {"bias": sum(errors) / repeats, "regret": list(metrics.t_interval(regrets[name]))}
        row |= {"gain": list(metrics.t_interval(gains)), "cost": sum(cost for _, cost, _ in tries) / repeats}
        hits = [hit for *_, hit in tries if hit is not None]
        rows.append(row | {"cover": sum(hits) / repeats if hits else None, "repeats": repeats})
    return rows


# ---------------------------------------------------------------- pooling, on images


def learn_on_images(
    chain: Chain,
    prompt: str,
    low: str,
    samples: TiltSamples,
    scale: tuple[float, float],
    seed: int,
    *,
    pool: bool,
    min_ess: float,
    folder: Path,
    device: torch.device | str = "cpu",
) -> dict:
    """Algorithm 2 as in `lambda_race.race` from samples of p_0, with or without pooling; a piece, kept in `folder`.

    scale  mean and standard deviation under p_0 of the lower reward
    Returns "last", the lambda of the last step; "read", the maximum of the curve of the samples it ended with, where
    that is inside what they reach, else "last"; "interval" of the latter; "rounds", "cost", "said" and "path".
    """
    mean, sd = scale

    def draw(lam: float, round: int) -> TiltSamples:
        options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
        found = lambda_race.particles(chain, prompt, low, lam, DRAWS, derive_seed("round", seed, round), **options)
        return lambda_race.weighted_back(found, low, lam, mean, sd)

    def compute() -> dict:
        options = {"draw": draw, "min_ess": min_ess, "rounds": ROUNDS, "bounds": BOUNDS, "pool": pool}
        *path, top = algorithms.learn_lam(samples, START, **options)
        last = path[-1]
        read, interval = read_off(last.outer.p_star, last.lam)
        found = {"last": last.lam, "read": read, "interval": interval, "rounds": last.round, "cost": last.cost}
        return found | {"said": top.done or "steps used up", "path": [[step.lam, step.round] for step in path]}

    config = {"prompt": prompt, "low": low, "seed": seed, "pool": pool, "min_ess": min_ess, "n": len(samples.r_low)}
    config |= {"draws": DRAWS, "rounds": ROUNDS, "start": START, "mean": mean, "sd": sd}
    name = f"pool_{prompt.replace(' ', '_')}_{low}_{seed}_{int(pool)}_{min_ess:g}.json"
    return piece(folder / name, config, compute)


def read_off(samples: TiltSamples, otherwise: float) -> tuple[float, tuple[float | None, float | None]]:
    """The maximum of the curve of some samples and its interval, ends None where they are 0 or infinite; `otherwise`
    where the maximum is not inside what the samples reach."""
    lams = torch.logspace(math.log10(BOUNDS[0]), math.log10(BOUNDS[1]), 161, dtype=torch.float64)
    try:
        curve = estimators.lam_curve(samples.r_up, samples.r_low, lams, samples.log_w)
    except ValueError:  # fewer than three values with enough effective samples
        return otherwise, (None, None)
    ends = tuple(end if 0 < end < math.inf else None for end in curve.interval)
    return (curve.best if curve.boundary is None else otherwise), ends


def validate_pooling(
    chain: Chain,
    prompts: Sequence[str],
    *,
    seeds: int,
    n: int,
    lams: Sequence[float],
    count: int,
    runs: int,
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Rows of Algorithm 2 without and with pooling on validation prompts, each with the regret of "last" and "read".

    n      samples of p_0 for each seed, all of which mark together with `runs` runs of `count` particles at `lams`
    """
    rows = []
    for prompt in prompts:
        drawn = lambda_race.draw(chain, prompt, seeds * n, 200 + first, folder=folder / "bank", device=device)
        mean, sd = rewards.scale(drawn[low])
        options = {"mean": mean, "sd": sd, "folder": folder / "particles", "device": device}
        sharp = {
            (lam, run): lambda_race.particles(
                chain, prompt, low, lam, count, derive_seed("validation, marks", first, run), **options
            )
            for lam, run in itertools.product(lams, range(runs))
        }
        marks = lambda_race.Bank.of(drawn, low, sharp)
        best = max(marks.worth(lam)["up"] for lam in lambda_race.candidates(marks))
        for seed in range(seeds):
            samples = marks.folds(seeds, seed)[0].samples()
            for pool, min_ess in ((False, 100.0), *((True, value) for value in MIN_ESS_TRIED)):
                options = {"pool": pool, "min_ess": min_ess, "folder": folder, "device": device}
                found = learn_on_images(
                    chain, prompt, low, samples, (mean, sd), derive_seed("validation", first, seed), **options
                )
                regret = {f"regret {key}": best - marks.worth(found[key])["up"] for key in ("last", "read")}
                row = {"prompt": prompt, "seed": seed, "pool": pool, "min_ess": min_ess} | regret
                rows.append(row | {key: found[key] for key in ("last", "read", "rounds", "cost", "said")})
    return rows


def report_pooling(
    chain: Chain,
    materials: Mapping[str, lambda_race.Material],
    before: Sequence[dict],
    *,
    seeds: int,
    min_ess: float,
    folder: Path,
    device: torch.device | str = "cpu",
    low: str = "boldness",
) -> list[dict]:
    """Algorithm 2 with pooling on chapter 5's test prompts: its folds, half of each, its seeds of particles.

    before  chapter 5's recorded rows of "Algorithm 2" with this reward
    Rows: prompt, seed, and for each of "before" (chapter 5's), "last" and "read" lambda, "up ..." and "regret ...", all
    marked alike: by the other folds and the runs of particles that no method drew from; "rounds", "cost", "said".
    """
    rows, old = [], {(row["prompt"], row["seed"]): row for row in before}
    for prompt, material in materials.items():
        whole, marks = material.bank(low), material.bank(low, "other")
        scale = rewards.scale(material.drawn[low])
        for seed in range(seeds):
            half = whole.folds(seeds, seed)[0].folds(2, 0)[0].samples()
            options = {"pool": True, "min_ess": min_ess, "folder": folder, "device": device}
            found = learn_on_images(chain, prompt, low, half, scale, seed, **options)
            rest = marks.folds(seeds, seed)[1]
            best = max(rest.worth(lam)["up"] for lam in lambda_race.candidates(rest))
            lams = {"before": old[prompt, seed]["lam"], "last": found["last"], "read": found["read"]}
            row = {"prompt": prompt, "seed": seed}
            for key, lam in lams.items():  # None: infinity
                up = rest.worth(math.inf if lam is None else lam)["up"]
                row |= {f"lam {key}": lam, f"up {key}": up, f"regret {key}": best - up}
            row |= {"cost before": old[prompt, seed]["cost"], "path": found["path"]}
            rows.append(row | {key: found[key] for key in ("rounds", "cost", "said", "interval")})
    return rows


# ---------------------------------------------------------------- several strengths


# ---------------------------------------------------------------- the bias of guidance


# ---------------------------------------------------------------- what is recorded


def study(
    chain: Chain,
    materials: Mapping[str, lambda_race.Material],
    before: Sequence[dict],
    *,
    repeats: int,
    bias: Mapping[str, object],
    validation: Mapping[str, object],
    seeds: int,
    guided: Mapping[str, object],
    guided_prompts: Sequence[str],
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """All that chapter 9 records about lambda, in pieces in `folder`: "mixture", "bias", "guided", "validation" and
    "pooling"; with the "cost" of what was drawn on images, in image forwards.

    first                     of the seeds of what is drawn here; "pooling" stays on chapter 5's. Wants its own folder
    bias, validation, guided  options of `guidance_bias`, `validate_pooling` and `guided_on_images`
    materials, before         what chapter 5 recorded: `lambda_race.restore`, and its rows of Algorithm 2 with boldness
    """
    found: dict[str, object] = {"mixture": []}
    own = {"first": first} if first else {}
    bias = dict(bias) | own
    for centre in (1.2, 3.0):
        config = {"centre": centre, "repeats": repeats} | own

        def mixture(centre: float = centre) -> dict:
            return {"rows": mixture_pooling(centre, repeats, **own)}

        rows = piece(folder / f"mixture_{centre:g}.json", config, mixture)
        found["mixture"] += rows["rows"]
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in bias.items()}
    found["bias"] = piece(folder / "bias.json", config, lambda: guidance_bias(**bias))
    shared = {"folder": folder / "images", "device": device}
    found["guided"] = []
    for prompt in guided_prompts:
        scale = rewards.scale(materials[prompt].drawn["boldness"])
        found["guided"] += guided_on_images(chain, prompt, scale=scale, **guided, **shared, **own)
    found["validation"] = validate_pooling(chain, **validation, **shared, **own)
    found["pooling"] = report_pooling(chain, materials, before, seeds=seeds, min_ess=MIN_ESS, **shared)
    found["cost"] = sum(row["cost"] for key in ("guided", "validation", "pooling") for row in found[key])
    return found
