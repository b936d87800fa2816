"""The live explorer of chapter 5: eight digits pulled by a reward, exactly, in the reader's browser."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .controls import Choice, Image, Line, Panel, Slider
from .worker import LiveExplorer, Pack, read_asset

CHAINS = 8
WARMUP = 10  # sweeps at a strength before its means
PATIENCE = 6000  # milliseconds of a sweep, above which there are half as many chains
CLIMB = 2.5  # standard errors by which the later sweeps exceed the earlier ones, from which the figure warns
_IDLE = "Nothing runs yet. The button loads the networks; then your browser draws these digits itself."


@dataclass(frozen=True)
class Pulled:
    """A prompt of the figure.

    heard   what p_0 hears of it
    chain   what the worker is told of the sampler and of the lower reward, see `Digit` in worker.js
    up      name of the attribute that is pulled
    curve   the recorded worth of each strength, falling or rising in "lam": rows of "lam", "clip", "pull"; or none
    """

    heard: str
    chain: Mapping[str, Any]
    up: str
    curve: Sequence[Mapping[str, float]] = ()


def pull_explorer(prompts: Mapping[str, Pulled], untuned: Tensor, pack: Pack) -> LiveExplorer:
    """The tilt p_0 exp(r_low/lam) of the text-to-digit model, moved by the reader.

    untuned  (n, H, W) recorded draws of p_0 for the first prompt, shown until the networks are loaded
    Raises ValueError for pictures outside [-1, 1] and for a curve without finite rows.
    """
    if not (untuned.abs() <= 1).all():
        raise ValueError(f"untuned has values from {untuned.min():g} to {untuned.max():g}; they must lie in [-1, 1]")
    first = next(iter(prompts))
    pixels = ((untuned.double() + 1) * 127.5).round().int()
    shown = pixels.double() / 127.5 - 1
    curves = {}
    for prompt, one in prompts.items():
        rows = sorted((row for row in one.curve if math.isfinite(row["lam"])), key=lambda row: row["lam"])
        if one.curve and not rows:
            raise ValueError(f"the curve of {prompt!r} has no row at a finite lam")
        columns = (
            {name: [float(f"{row[name]:.5g}") for row in rows] for name in ("lam", "clip", "pull")} if rows else {}
        )
        curves[prompt] = columns

    def compute(prompt: str, lam: float) -> dict[str, Any]:
        curve = curves[prompt]
        images = [Image("p_{0}", image) for image in shown] if prompt == first else []
        lines = {name: [Line("now", [lam], [], "marker", "vline")] for name in ("clip", "pull")}
        if curve:
            for name, found in lines.items():
                found.append(Line("recorded", curve["lam"], curve[name], "star"))
        return {
            "untuned": images,
            "tilted": [],
            **lines,
            "readout": [("λ", lam, ".2g"), ("p_{0} hears", prompts[prompt].heard), ("pulled up", prompts[prompt].up)],
            "message": _IDLE,
        }

    told = {prompt: {"heard": one.heard, "up": one.up, "chain": dict(one.chain)} for prompt, one in prompts.items()}
    axis = {"xlim": (0.02, 10.0), "xlog": True}
    return LiveExplorer(
        "pull",
        [
            Choice("prompt", "prompt", {prompt: f"“{prompt}”" for prompt in prompts}, first),
            Slider("lam", "λ", 0.02, 10.0, 1.0, log=20, format=".2g", hint="entropy strength"),
        ],
        [
            Panel("untuned", "Untuned: what the pre-trained model draws", kind="images", wide=True),
            Panel("tilted", "Tilted: the same chains at this λ", kind="images", wide=True),
            Panel("clip", "What we want", "λ: strong pull on the left", "E CLIP score", ylim=(0, 80), **axis),
            Panel("pull", "What pulls", "λ: strong pull on the left", "E z, in sd of p_{0}", ylim=(-2, 8), **axis),
        ],
        compute,
        read_asset("pull.js"),
        {
            "prompts": told,
            "curves": curves,
            "first": first,
            "untuned": {
                "side": untuned.shape[-1],
                "pixels": base64.b64encode(bytes(pixels.flatten().tolist())).decode(),
            },
            "idle": _IDLE,
            "chains": CHAINS,
            "warmup": WARMUP,
            "patience": PATIENCE,
            "climb": CLIMB,
            "seed": 0,
        },
        run=read_asset("pull_run.js"),
        pack=pack,
        title="Pull on the model yourself",
        caption=(
            "The text-to-digit model and the small CLIP of this book, in your browser: nothing leaves it. Eight chains "
            "move in the noise of the sampler (ten DDIM steps, η = 1) by z′ = √(1 − s²) z + s ξ, taken with "
            "probability min(1, exp((r′ − r)/λ)): their pictures follow p_{0} exp(r_{low}/λ), exactly in the long run. "
            "r_{low} = 5 tanh(z/5) of the measured attribute z in standard deviations of p_{0}, which hears all of the "
            f"prompt but that word. Means are over the sweeps after the first {WARMUP} at a λ; bars are 1.96 standard "
            "errors, from the chains, and say nothing of pictures that no chain has reached: at small λ they climb for "
            "long, and the figure says so where it sees it."
        ),
        alt=(
            "Live figure: a button loads the networks; a menu sets the prompt, a slider lambda; eight digits drift, "
            "and the reader's means of CLIP score and pulled attribute appear on two plots over lambda."
        ),
    )
