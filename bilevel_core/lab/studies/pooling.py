"""Chapter 9: does it pay to pool all that Algorithm 2 has drawn? On the mixture, where the answer is known.

On images the levels of an exchange run are pooled, and chapter 5 measures that (`strength_race`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ... import algorithms, estimators
from ...algorithms import TiltSamples
from ...seeds import derive_seed
from .. import metrics
from ..files import piece
from .guidance_bias import guidance_bias
from .mixture import Shifted

PROTOCOL = {
    "mixture": "400 samples of p_0 and rounds of exact draws, 1000 at most; paired over methods by the first samples",
    "bias": "exact denoiser of the mixture, eta = 1, common noise over lambda",
    "pieces": "resumable; wall_s counts those of the last start",
}
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


def study(*, repeats: int, bias: Mapping[str, object], folder: Path, first: int = 0) -> dict[str, object]:
    """All that chapter 9 records about lambda, in pieces in `folder`: "mixture" and "bias".

    first  of the seeds of what is drawn; another one wants its own folder;  bias: options of `guidance_bias`
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
    return found
