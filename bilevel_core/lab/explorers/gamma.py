"""The explorer of chapter 6: the penalty gradient in a schedule over gamma, in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import estimators, schedules
from .. import oracles
from .controls import Choice, Line, Panel, Slider
from .engine import Explorer, read_asset

_GAMMA_SAYS = {
    "turned": "The penalty gradient points the wrong way here: θ_{γ} absorbs SHARE of f instead of asking q. Raise γ.",
    "weak": "θ_{γ} absorbs SHARE of f, and the gradient for q is off by more than a tenth. Raise γ.",
    "fine": "The penalty gradient is within a tenth of the hypergradient here; θ_{γ} absorbs SHARE of f.",
}


def linear_gaussian_gamma(oracle: oracles.LinearGaussianSchedule, q: Tensor, gamma: float) -> Tensor:
    """a_gamma (T,) of the linear-Gaussian oracle as `solve_gamma` gives it, without Newton's method, where G <= s.

    The gains p_k + c_k a_k along the grid couple only through their product m: stationarity fixes every a_k by m, and
    m lies between G(a_star) and s. Raises ValueError where the sampler overshoots (G > s).
    """
    abar, star = oracle.abar(q), oracle.solve_star(q)
    t = torch.tensor(oracle.ts)
    a_t, a_s = abar[t], abar[torch.tensor([*oracle.ts[1:], 0])]
    slope = (1 - a_s).sqrt() - ((1 - a_t) * a_s / a_t).sqrt()  # c_k
    gain = (a_s / a_t).sqrt() + slope * star[t - 1]
    width = a_t * oracle.s**2 + 1 - a_t
    low, high = gain.prod(), torch.tensor(oracle.s, dtype=torch.float64)
    if low > high or not (gain > 0).all():
        raise ValueError(f"G = {low.item():.4g} must not exceed s = {oracle.s:g}; take oracle.solve_gamma")
    for _ in range(80):  # bisection
        m = (low + high) / 2
        pull = oracle.T / gamma * (m - oracle.s) * m
        shift = -2 * pull * slope / (width * gain + ((width * gain) ** 2 - 4 * width * slope**2 * pull).sqrt())
        low, high = (m, high) if (gain + slope * shift).prod() > m else (low, m)
    found = star.clone()
    found[t - 1] += shift
    return found


def gamma_explorer() -> Explorer:
    """Algorithm 6 where everything is exact: what gamma does to the gradient in a schedule, and who absorbs f.

    The problem is `oracles.LinearGaussianSchedule()` at q = (0, end, 1, 0.008); values at every setting are embedded.
    """
    oracle, names = oracles.LinearGaussianSchedule(), ("start", "end", "tau")
    sliders = (
        Slider("gamma", "γ", 1.0, 1e9, 100.0, log=2, format=".2g", hint="penalty constant"),
        Slider("end", "end", 0.8, 1.0, 0.9, step=0.02, format=".2f", hint="of the schedule"),
    )
    gammas, ends = (slider.grid() for slider in sliders)
    x = torch.linspace(-2, 2, 81, dtype=torch.float64).tolist()
    table, limits = [], []  # by end, then by gamma
    for end in ends:
        q = torch.tensor([0.0, end, *schedules.DEFAULT_Q["cosine"][2:]], dtype=torch.float64)
        star, row = oracle.solve_star(q), []
        value = oracle.value(point := q.clone().requires_grad_())
        hyper = torch.autograd.grad(value, point)[0][:3].tolist()
        limits.append([value.item(), *hyper])
        for gamma in gammas:
            tilted = linear_gaussian_gamma(oracle, q, gamma)
            grad, info = estimators.penalty_grad(oracle, q, star, tilted, gamma)
            row.append([info["f"], info["f"] + gamma * info["gap"], *grad[:3].tolist()])
        table.append([[float(f"{v:.5g}") for v in entry] for entry in row])
    limits = [[float(f"{v:.6g}") for v in row] for row in limits]

    def compute(gamma: float, end: float, which: str) -> dict[str, Any]:
        i = min(range(len(ends)), key=lambda k: abs(ends[k] - end))
        j = min(range(len(gammas)), key=lambda k: abs(math.log(gammas[k] / gamma)))
        k = names.index(which)
        (f_star, *hyper), (f, _, *grad) = limits[i], table[i][j]
        share, off = 1 - f / f_star, abs(grad[k] - hyper[k])
        key = "turned" if grad[k] * hyper[k] < 0 else "weak" if off > 0.1 * abs(hyper[k]) else "fine"

        def law(std: float) -> list[float]:
            return [math.exp(-(v**2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi)) for v in x]

        return {
            "laws": [
                Line("data", x, law(oracle.s), "base", "area"),
                Line("θ_{∗}", x, law(oracle.s - math.sqrt(f_star)), "star"),
                Line("θ_{γ}", x, law(oracle.s - math.sqrt(f)), "gamma"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [gammas[j]], [], "marker", "vline"),
                Line("hypergradient", [gammas[0], gammas[-1]], [hyper[k]] * 2, "star"),
                Line("penalty gradient", gammas, [row[2 + k] for row in table[i]], "gamma"),
            ],
            "value": [
                Line("", [ends[i]], [], "marker", "vline"),
                Line("f(q, θ_{∗}(q))", ends, [row[0] for row in limits], "star"),
                Line("L_{γ}(q)", ends, [rows[j][1] for rows in table], "gamma"),
            ],
            "readout": [
                ("f at θ_{∗}", f_star, ".3g"),
                ("f at θ_{γ}", f, ".3g"),
                (f"penalty gradient in {which}", grad[k], ".3g"),
                (f"hypergradient in {which}", hyper[k], ".3g"),
            ],
            "message": _GAMMA_SAYS[key].replace("SHARE", f"{100 * share:.0f} %"),
            "warn": key != "fine",
        }

    return Explorer(
        "gamma",
        [*sliders, Choice("which", "derivative in", {name: name for name in names}, "end")],
        [
            Panel("grad", "Gradient in the schedule", "γ", "d/dq", xlog=True, xlim=(gammas[0], gammas[-1])),
            Panel("value", "Objective", "end", "f", xlim=(ends[0], ends[-1]), ylim=(0, None)),
            Panel("laws", "What the sampler draws", "x", "density", xlim=(-2, 2), ylim=(0, None), wide=True),
        ],
        compute,
        read_asset("gamma.js"),
        {
            "gammas": gammas,
            "ends": ends,
            "names": names,
            "table": table,
            "limits": limits,
            "s": oracle.s,
            "x": x,
            "says": _GAMMA_SAYS,
        },
        title="Who gets to improve the samples: the schedule, or θ_{γ}?",
        caption=(
            f"Data N(0, {oracle.s:g}²), a linear denoiser, T = {oracle.T}, {len(oracle.ts)} DDIM steps, cosine "
            "schedule with start = 0, τ = 1. Exact: both lower levels solved, no sampling."
        ),
        alt=(
            "Explorer of the penalty constant for a noise schedule: sliders for gamma and end change a gradient, an "
            "objective and the law of the samples."
        ),
    )
