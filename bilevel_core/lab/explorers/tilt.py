"""The explorer of chapter 4: guided samples and particles beside the exact tilted law."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import guidance, samplers, schedules
from .. import oracles
from .controls import Line, Panel, Slider
from .engine import Explorer, read_asset

_BINS = (-4.0, 7.0, 55)  # of the histograms on the line
_PLANE = oracles.Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-1.6, 0.0], [1.4, 1.3], [1.0, -1.5]], dtype=torch.float64),
    torch.tensor([[[0.35, 0.1], [0.1, 0.3]], [[0.2, 0.0], [0.0, 0.3]], [[0.3, -0.1], [-0.1, 0.2]]]).double(),
)
_TILT_SAYS = {
    "close": "Guidance is close to the exact tilt, on the line and in the plane.",
    "biased": "Guidance runs ahead of the exact tilt on the line, or shrinks too much in the plane. Particles do not.",
}


def tilt_explorer(samples: int = 4000, points: int = 250, steps: int = 100) -> Explorer:
    """The tilted law, exact, by look-ahead guidance and by particles, as lambda moves: on the line and in the plane.

    On the line p_0 is `oracles.Mixture1D` and r_low = x, in the plane a mixture of three modes and r_low = -|x|^2. The
    two samplers were run at each value of the slider (one seed) and are embedded; so is the exact law. Takes seconds.

    samples  of each law on the line (for its histogram);  points: of each law in the plane;  steps: of the chain
    """
    slider = Slider("lam", "λ", 0.4, 10.0, 2.0, log=10, format=".2g", hint="entropy strength")
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), steps)
    ts, line = samplers.timesteps(steps, steps), oracles.Mixture1D()
    grid = torch.linspace(_BINS[0], _BINS[1], 111, dtype=torch.float64)
    edges = torch.linspace(_BINS[0], _BINS[1], _BINS[2] + 1, dtype=torch.float64)
    turn = torch.linspace(0, 2 * math.pi, 37, dtype=torch.float64)
    circle = 2 * torch.stack([turn.cos(), turn.sin()], 1)

    def run(denoiser: Callable, reward: Callable, lam: float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Guided samples, and particles with their weights, from the same start."""
        guide = guidance.LookAhead(denoiser, reward, lam, abar, ts)
        x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = (torch.Generator().manual_seed(1) for _ in range(2))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few families at the sharpest tilt: the exact law stands beside them
            guided = samplers.sample_ddim(guide, x_T, abar, ts, eta=1.0, generator=next(noise))
            drawn, log_w, _ = samplers.sample_particles(guide, x_T, abar, ts, generator=next(noise))
        return guided, drawn, log_w.exp()

    def frame(lam: float) -> dict[str, Any]:
        tilted = line.tilt(1 / lam)
        w, m = (torch.tensor(v, dtype=torch.float64) for v in (tilted.weights, tilted.means))
        exact, spread = float(w @ m), float((w @ (torch.tensor(tilted.stds) ** 2 + m**2) - (w @ m) ** 2).sqrt())
        guided, drawn, w = run(line.denoiser(abar), lambda x: x, lam, (samples,))
        width = float(edges[1] - edges[0])

        def bars(x: Tensor, weights: Tensor) -> list[float]:
            found, _ = torch.histogram(x, edges, weight=weights)
            return [round(v, 3) for v in (found / (weights.sum() * width)).tolist()]

        mean, cov = (flat := _PLANE.tilt(torch.zeros(2, dtype=torch.float64), -2 / lam)).mean_cov()
        size = (cov.trace() + mean.square().sum()).sqrt().item()
        guided_2, drawn_2, w_2 = run(_PLANE.denoiser(abar), lambda x: -x.square().sum(1), lam, (8 * points, 2))
        rows = ((torch.arange(points) + 0.5) / points).double()
        rows = torch.searchsorted(w_2.cumsum(0), rows).clamp(max=len(w_2) - 1)
        rings = [m + circle @ torch.linalg.cholesky(c).T for m, c in zip(flat.means, flat.covs, strict=True)]
        sizes = [guided_2.square().sum(1).mean().sqrt().item(), (w_2 @ drawn_2.square().sum(1)).sqrt().item()]
        means = [guided.mean().item(), (w @ drawn).item()]
        close = abs(means[0] - exact) < 0.1 * spread and abs(sizes[0] / size - 1) < 0.06
        return {
            "exact": [round(v, 4) for v in tilted.log_prob(grid).exp().tolist()],
            "guided": bars(guided, torch.ones_like(guided)),
            "particles": bars(drawn, w),
            "rings": [[[round(v, 3) for v in axis] for axis in ring.T.tolist()] for ring in rings],
            "cloud": [[round(v, 2) for v in axis] for axis in guided_2[:points].T.tolist()],
            "swarm": [[round(v, 2) for v in axis] for axis in drawn_2[rows].T.tolist()],
            "readout": [exact, *means, size, *sizes, 100 / (w.square().sum() * len(w)).item()],
            "key": "close" if close else "biased",
        }

    values = slider.grid()
    frames = [frame(lam) for lam in values]
    names = ("mean, exact", "mean, guided", "mean, particles", "distance, exact", "distance, guided")
    names = (*names, "distance, particles", "effective particles (%)")
    base = [round(v, 4) for v in line.log_prob(grid).exp().tolist()]
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()

    def compute(lam: float) -> dict[str, Any]:
        now = frames[min(range(len(values)), key=lambda i: abs(math.log(values[i] / lam)))]
        rings = [
            Line("exact: 2 sd of each mode" if k == 0 else "", *ring, "star") for k, ring in enumerate(now["rings"])
        ]
        return {
            "line": [
                Line("guided", middles, now["guided"], "gamma", "area"),
                Line("p_{0}", grid, base, "base"),
                Line("exact tilt", grid, now["exact"], "star"),
                Line("particles", middles, now["particles"], "reward"),
            ],
            "cloud": [*rings, Line("guided", *now["cloud"], "gamma", "points")],
            "swarm": [*rings, Line("particles", *now["swarm"], "reward", "points")],
            "readout": [(name, value, ".3g") for name, value in zip(names, now["readout"], strict=True)],
            "message": _TILT_SAYS[now["key"]],
            "warn": now["key"] == "biased",
        }

    box = {"xlim": (-4, 4), "ylim": (-4, 4)}
    return Explorer(
        "tilt",
        [slider],
        [
            Panel("line", "On the line, r_{low} = x", "x", "density", xlim=_BINS[:2], ylim=(0, 0.62), wide=True),
            Panel("cloud", "In the plane, r_{low} = −|x|²: guided", "x_{1}", "x_{2}", **box),
            Panel("swarm", "In the plane: particles", "x_{1}", "x_{2}", **box),
        ],
        compute,
        read_asset("tilt.js"),
        {
            "lams": values,
            "frames": frames,
            "names": names,
            "base": base,
            "grid": grid.tolist(),
            "middles": middles,
            "says": _TILT_SAYS,
        },
        title="The tilted law, three ways",
        caption=(
            f"A chain of {steps} steps, η = 1, exact denoiser. On the line {samples:,} samples or particles, in the "
            f"plane {points:,} shown of {8 * points:,}; one seed. Mean: on the line. Distance: rms from the middle, in "
            "the plane."
        ),
        alt=(
            "Explorer of tilted laws: a slider for lambda changes a density on the line and two clouds in the plane, "
            "exact, guided and by particles."
        ),
    )
