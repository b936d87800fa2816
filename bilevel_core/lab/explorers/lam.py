"""The explorer of chapter 3: what a set of samples knows of lambda."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ... import estimators
from .. import oracles
from .controls import Choice, Line, Panel, Slider
from .engine import Explorer, read_asset
from .penalty import NODES

_LAM_AXIS = (0.2, 20.0, 61)  # the axis of its panels over lambda
_DOTS = 80  # samples drawn as dots, at equal steps of their weight
_LAM_SAYS = {
    "few": "Fewer than 100 effective samples: this batch says little here. Take more samples, or draw them at this λ.",
    "stop": "The gradient is within its error of zero: these samples cannot tell a better λ.",
    "raise": "Under p* the two rewards disagree (the line falls): raise λ.",
    "lower": "Under p* the two rewards agree (the line rises): lower λ.",
}


def lam_explorer(seed: int = 0) -> Explorer:
    """Algorithm 2 on the 1-D mixture: one batch of samples against the exact answer as lambda and gamma move.

    The estimates are those of `estimators` on 200 or 2,000 samples of p_0 (seed); the exact curves are those of
    `oracles.Mixture1D().problem()`, on the quadrature of `penalty_explorer`.
    """
    mixture = oracles.Mixture1D()
    nodes, log_p0 = mixture.quadrature(*NODES)
    problem = oracles.Tilt(-((nodes - 1.2) ** 2) / 2, nodes, log_p0)
    lams = _LAM_AXIS[0] * (_LAM_AXIS[1] / _LAM_AXIS[0]) ** (torch.arange(_LAM_AXIS[2]).double() / (_LAM_AXIS[2] - 1))
    batch = (1000 * mixture.sample(2000, torch.Generator().manual_seed(seed))).round() / 1000
    level = problem.mean(problem.log_p0, problem.r_up)

    def estimate(n: int, lam: float, gamma: float) -> tuple[Tensor, Tensor, float, float, float, float]:
        """Weights and rewards of the batch, the gradient with its error, the mean reward with its error."""
        x = batch[:n]
        r_up = -((x - 1.2) ** 2) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad, info = estimators.lam_grad_penalty(r_up, x, lam, gamma)
            p, _ = estimators.tilt_weights(x, lam)
        up = p @ r_up
        return p, r_up, grad.item(), info["se"].item(), up.item(), (p * (r_up - up)).norm().item()

    @functools.lru_cache(maxsize=8)
    def curves(n: int, gamma: float) -> tuple[list, list, Tensor, Tensor]:
        found = [estimate(n, lam, gamma)[2:] for lam in lams.tolist()]
        log_ratio = problem.logits(lams, gamma).logsumexp(1) - problem.logits(lams).logsumexp(1)
        return [f[0] for f in found], found, problem.penalty_grad(lams, gamma), gamma * log_ratio - level / lams

    def compute(lam: float, gamma: float, n: str) -> dict[str, Any]:
        x = batch[: int(n)]
        p, r_up, grad, se, up, _ = estimate(int(n), lam, gamma)
        ess = 1 / p.square().sum().item()
        mean = (p @ x).item()
        slope = (p @ ((x - mean) * (r_up - up)) / (p @ (x - mean) ** 2)).item()
        order = x.argsort(stable=True)
        marks = (torch.arange(_DOTS).double() + 0.5) / _DOTS
        dots = x[order][torch.searchsorted(p[order].cumsum(0), marks).clamp(max=len(x) - 1)]
        grads, found, exact, est1 = curves(int(n), gamma)
        key = "few" if ess < estimators.MIN_ESS else "stop" if abs(grad) <= 1.96 * se else None
        key = key or ("raise" if grad < 0 else "lower")
        arch = torch.linspace(-3.5, 5.5, 91, dtype=torch.float64)
        return {
            "rewards": [
                Line("r_{up} over r_{low}", arch, -((arch - 1.2) ** 2) / 2, "reward"),
                Line("samples, by weight", dots, -((dots - 1.2) ** 2) / 2, "star", "points"),
                Line("their regression", [-3.5, 5.5], [up + slope * (end - mean) for end in (-3.5, 5.5)], "gamma"),
            ],
            "curve": [
                Line("", [lam], [], "marker", "vline"),
                Line("exact", lams, -problem.value(lams), "base"),
                Line("batch ± 1.96 standard errors", lams, [f[2] + 1.96 * f[3] for f in found], "zero"),
                Line("batch ± 1.96 standard errors", lams, [f[2] - 1.96 * f[3] for f in found], "zero"),
                Line("batch", lams, [f[2] for f in found], "star"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [lam], [], "marker", "vline"),
                Line("(A), exact", lams, exact, "base"),
                Line("(A), batch", lams, grads, "star"),
                Line("est1, exact", lams, est1, "gamma"),
            ],
            "readout": [
                ("(A), batch", grad, ".3f"),
                ("its standard error", se, ".2g"),
                ("(A), exact", float(problem.penalty_grad(lam, gamma)), ".3f"),
                ("E r_{up}, batch", up, ".3f"),
                ("E r_{up}, exact", float(-problem.value(lam)), ".3f"),
                ("effective samples", ess, ".3g"),
            ],
            "message": _LAM_SAYS[key],
            "warn": key == "few",
        }

    return Explorer(
        "lam",
        [
            Slider("lam", "λ", 0.2, 20.0, 3.2, log=20, format=".2g", hint="entropy strength"),
            Slider("gamma", "γ", 1.0, 1e4, 1000.0, log=10, format=".2g", hint="penalty constant"),
            Choice("n", "samples of p_{0}", {"200": "200", "2000": "2,000"}, "2000"),
        ],
        [
            Panel("rewards", "Do the rewards agree under p*?", "r_{low} = x", "r_{up}", ylim=(-10, 2), wide=True),
            Panel("curve", "The upper reward", "λ", "E r_{up}", xlog=True, xlim=_LAM_AXIS[:2], ylim=(-4, -0.5)),
            Panel("grad", "Its gradient", "λ", "d/dλ", xlog=True, xlim=_LAM_AXIS[:2], ylim=(-3, 3)),
        ],
        compute,
        read_asset("lam.js"),
        {
            "nodes": NODES,
            "axis": _LAM_AXIS,
            "dots": _DOTS,
            "batch": batch.tolist(),
            "logP0": {"weights": mixture.weights, "means": mixture.means, "stds": mixture.stds},
            "says": _LAM_SAYS,
            "minEss": estimators.MIN_ESS,
        },
        title="Raise λ or lower it?",
        caption=(
            "p_{0}, r_{low} and r_{up} as in the text. Dots: samples of p_{0} at equal steps of their weight under "
            "p_{∗}, so that they look like samples of p_{∗}. Exact curves by quadrature."
        ),
        alt=(
            "Explorer of Algorithm 2: sliders for lambda and gamma change a regression of one reward on the other, "
            "the reward's curve over lambda and its gradient, from a batch of samples and exactly."
        ),
    )
