"""The explorer of chapter 2: both lower levels and both gradients over gamma and lambda."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import oracles
from ..writing import format_number
from .controls import Line, Panel, Slider
from .engine import Explorer, read_asset

NODES = (-10.0, 27.0, 1481)  # quadrature; p_star moves as far as 1.5 + 0.81/lambda = 17.7 at lambda = 0.05
_LAMS = (0.05, 50.0, 121)  # the axis of the panels over lambda
_WRONG_SIGN = (
    "The penalty gradient (A) has the wrong sign here: at this γ it pushes λ away from the true optimum. Raise γ."
)
_WRONG_SIZE = (
    "The penalty gradient (A) has the right sign here, but RATIO times the size of the hypergradient (C): p_{γ} is not "
    "yet near p_{∗}. Raise γ."
)
_CLOSE = "The penalty gradient (A) and the hypergradient (C) have the same sign here, and nearly the same size."
_SAME_SIZE = 2.0  # a ratio of their sizes beyond this, or below its inverse, is a warning


def penalty_explorer() -> Explorer:
    """The penalty on the 1-D mixture: p_0, p_star, p_gamma, L_gamma and its gradient as gamma and lambda move.

    The problem and its closed forms are those of `oracles.Mixture1D().problem()`, on a quadrature that is as exact for
    the sliders' ranges (lambda >= 0.05) and ten times smaller.
    """
    mixture = oracles.Mixture1D()
    x, log_p0 = mixture.quadrature(*NODES)
    problem = oracles.Tilt(-((x - 1.2) ** 2) / 2, x, log_p0)
    spacing = (NODES[1] - NODES[0]) / (NODES[2] - 1)
    lams = _LAMS[0] * (_LAMS[1] / _LAMS[0]) ** (torch.arange(_LAMS[2], dtype=torch.float64) / (_LAMS[2] - 1))
    limit, hypergrads = problem.value(lams), problem.hypergrad(lams)

    def root(slope: Callable[[float], Tensor]) -> float:
        """Where a gradient that is negative at small lambda and positive at large lambda vanishes, by bisection."""
        low, high = math.log(_LAMS[0]), math.log(_LAMS[1])
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
        return math.exp((low + high) / 2)

    lam_star = root(problem.hypergrad)

    @functools.lru_cache(maxsize=4)
    def curves(gamma: float) -> tuple[Tensor, Tensor, float]:
        best = root(lambda lam: problem.penalty_grad(lam, gamma))
        return problem.penalty(lams, gamma), problem.penalty_grad(lams, gamma), best

    def compute(gamma: float, lam: float) -> dict[str, Any]:
        values, grads, best = curves(gamma)
        star, tilted = problem.p_gamma(lam), problem.p_gamma(lam, gamma)
        grad, hyper = float(problem.penalty_grad(lam, gamma)), float(problem.hypergrad(lam))

        ratio = grad / hyper
        message = _WRONG_SIGN if ratio < 0 else _CLOSE
        if ratio >= 0 and not 1 / _SAME_SIZE <= ratio <= _SAME_SIZE:
            message = _WRONG_SIZE.replace("RATIO", format_number(ratio, ".2g"))

        def reach(log_p: Tensor) -> float:
            mean = problem.mean(log_p, x)
            return float(mean + 4 * problem.mean(log_p, (x - mean) ** 2).sqrt())

        to = max(5, math.ceil(max(reach(star), reach(tilted))))
        first, count = round((-5 - NODES[0]) / spacing), round((to + 5) / spacing) + 1
        view = slice(first, first + count)
        return {
            "laws": [
                Line("0.4 exp(r_{up})", x[view], 0.4 * problem.r_up[view].exp(), "reward", "area"),
                Line("p_{0}", x[view], problem.log_p0[view].exp() / spacing, "base"),
                Line("p_{∗}", x[view], star[view].exp() / spacing, "star"),
                Line("p_{γ}", x[view], tilted[view].exp() / spacing, "gamma"),
            ],
            "value": [
                Line("", [lam], [], "marker", "vline"),
                Line("its limit, γ → ∞", lams, limit, "star"),
                Line("L_{γ}", lams, values, "gamma"),
                Line("its minimum", [best], [float(problem.penalty(best, gamma))], "gamma", "points"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [lam], [], "marker", "vline"),
                Line("hypergradient (C)", lams, hypergrads, "star"),
                Line("dL_{γ}/dλ (A)", lams, grads, "gamma"),
            ],
            "readout": [
                ("L_{γ}(λ)", float(problem.penalty(lam, gamma))),
                ("dL_{γ}/dλ (A)", grad),
                ("hypergradient (C)", hyper),
                ("KL(p_{∗} ‖ p_{0})", float(problem.kl(star))),
                ("KL(p_{γ} ‖ p_{0})", float(problem.kl(tilted))),
                ("argmin L_{γ}", best),
                ("λ^{∗}", lam_star),
            ],
            "message": message,
            "warn": message != _CLOSE,
        }

    return Explorer(
        "penalty",
        [
            Slider("gamma", "γ", 0.1, 1e4, 1.0, log=20, format=".2g", hint="penalty constant"),
            Slider("lam", "λ", 0.05, 50.0, 1.0, log=20, format=".2g", hint="entropy strength"),
        ],
        [
            Panel("laws", "The laws and the upper reward", "y", "density", ylim=(0, None), wide=True),
            Panel("value", "The penalised objective", "λ", "L_{γ}(λ)", xlog=True, xlim=_LAMS[:2], ylim=(0, 4)),
            Panel("grad", "Its gradient", "λ", "d/dλ", xlog=True, xlim=_LAMS[:2], ylim=(-2, 0.8)),
        ],
        compute,
        read_asset("penalty.js"),
        {
            "weights": mixture.weights,
            "means": mixture.means,
            "stds": mixture.stds,
            "nodes": NODES,
            "lams": _LAMS,
            "lamStar": lam_star,
            "wrong": _WRONG_SIGN,
            "wrongSize": _WRONG_SIZE,
            "close": _CLOSE,
            "sameSize": _SAME_SIZE,
        },
        title="How large must γ be?",
        caption=(
            "p_{0} = 0.6 N(−1.5, 0.7²) + 0.4 N(1.5, 0.9²), r_{low} = y, r_{up} = −(y − 1.2)²/2; exact, by quadrature. "
            "The vertical line is the chosen λ; λ^{∗} is the optimum as γ → ∞."
        ),
        alt=(
            "Explorer of the penalty method: sliders for gamma and lambda change three densities, the objective and "
            "its gradient."
        ),
    )
