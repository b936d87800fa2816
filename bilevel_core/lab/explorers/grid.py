"""The live explorer of chapter 7: a grid of noise levels, set by hand or learned, and what a network draws with it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import schedules
from ...samplers import timesteps
from .controls import Image, Line, Panel, Slider
from .worker import LiveExplorer, Pack, read_asset

T = 1000
EPSILON = schedules.DEFAULT_Q["cosine"][3]
START = {"start": 0.0, "end": 0.95, "tau": 1.0, "N": 5}  # where the figure begins
_IDLE = "Nothing runs yet. The button loads the network; then each release of a slider draws 64 digits anew."


def cosine_levels(start: float, end: float, tau: float, N: int, seen: tuple[float, float]) -> Tensor:
    """The angles of the cosine schedule at the trailing grid of N steps, rising, kept within those seen; (<= N,)."""
    q = torch.tensor([start, end, tau, EPSILON], dtype=torch.float64)
    abar = schedules.abar(q, T)
    level = schedules.angle(abar[timesteps(T, N)[::-1]])
    return torch.unique(level.clamp(*seen))


def mosaic(pixels: Tensor) -> Tensor:
    """Images (n, h, w) side by side, ceil(sqrt(n)) in a row, with a line of one grey pixel between them."""
    across = math.ceil(math.sqrt(len(pixels)))
    h, w = pixels.shape[1:]
    out = torch.zeros(-(-len(pixels) // across) * (h + 1) - 1, across * (w + 1) - 1, dtype=torch.float64)
    for k, image in enumerate(pixels):
        i, j = k // across * (h + 1), k % across * (w + 1)
        out[i : i + h, j : j + w] = image
    return out


def grid_explorer(
    grids: Mapping[int, Sequence[float]],
    recorded: Mapping[str, Mapping[int, float]],
    floor: float,
    drawn: Tensor,
    pack: Pack,
    *,
    seen: tuple[float, float],
    stretch: float,
    marked: int,
) -> LiveExplorer:
    """Levels for a few DDIM steps: by the ends and tau of a cosine schedule, by dragging, or as `learn_grid` left them.

    grids     number of steps -> the learned angles, rising;  recorded: name -> number of steps -> Frechet distance of
              `marked` images;  floor: that of as many real images as are drawn here
    drawn     (n, 8, 8) images of the first grid, START, shown until the network is loaded
    seen, stretch  of the network: the angles of its training, and its embedding's
    """
    pixels = ((drawn.double().clamp(-1, 1) + 1) * 127.5).round().int()
    shown = mosaic(pixels.double() / 127.5 - 1)
    marks = {name: [list(map(float, rows)), list(rows.values())] for name, rows in recorded.items()}

    def compute(start: float, end: float, tau: float, N: float) -> dict[str, Any]:
        level = cosine_levels(start, end, tau, int(N), seen)
        here = {"start": start, "end": end, "tau": tau, "N": int(N)} == START
        lines = [
            Line(name, *rows, role, "line") for (name, rows), role in zip(marks.items(), ("star", "base"), strict=True)
        ]
        lines.append(Line("64 real images", [], [floor], "zero", "hline"))
        return {
            "drawn": [Image("", shown)] if here else [],
            "frechet": lines,
            "readout": [("steps", str(len(level))), ("largest level / (π/2)", level[-1].item() / (math.pi / 2), ".4f")],
            "message": _IDLE,
        }

    return LiveExplorer(
        "grid",
        [
            Slider("start", "start", 0.0, 0.4, START["start"], 0.01, hint="of the cosine"),
            Slider("end", "end", 0.5, 1.0, START["end"], 0.005, format=".3f"),
            Slider("tau", "τ", 0.3, 3.0, START["tau"], 0.05),
            Slider("N", "N", 2, 12, START["N"], 1, format=".0f", hint="DDIM steps"),
        ],
        [
            Panel("drawn", "64 digits of this grid, always from the same noise", kind="images"),
            Panel(
                "frechet",
                "Fréchet distance to held-out digits",
                "N: DDIM steps",
                "distance",
                xlim=(1.5, 12.5),
                ylim=(0, 12),
            ),
        ],
        compute,
        read_asset("cosine.js") + read_asset("grid.js"),
        {
            "T": T,
            "epsilon": EPSILON,
            "maxBeta": schedules.MAX_BETA,
            "seen": list(seen),
            "stretch": stretch,
            "start": START,
            "grids": {str(N): [float(f"{v:.7g}") for v in levels] for N, levels in grids.items()},
            "marks": marks,
            "floor": floor,
            "first": base64.b64encode(bytes(pixels.flatten().tolist())).decode(),
            "idle": _IDLE,
        },
        run=read_asset("grid_run.js"),
        pack=pack,
        title="Set the levels yourself",
        caption=(
            "An 8×8 denoiser that is told the noise level, as angle = arccos √ᾱ, trained once and left as it is; in "
            "your browser. The sliders take the levels of a cosine schedule; each level can be dragged, or moved by "
            "the arrow keys. DDIM, η = 0, from the same 64 draws of N(0, I) each time. Distance: of the classifier's "
            "features, to MNIST's validation split, by which the grids were learned. Lines: recorded, "
            f"{marked:,} images each. Points: your 64, whose distance is larger for their small number alone: 64 real "
            "images have that of the thin line."
        ),
        alt=(
            "Live figure: sliders and draggable marks set the noise levels that a sampler visits; a mosaic of 64 small "
            "digits and their Fréchet distance follow."
        ),
    )
