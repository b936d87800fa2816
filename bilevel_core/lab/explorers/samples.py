"""The explorer of chapter 5: pictures of a tilted law over lambda, from recorded samples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..writing import format_number
from .controls import Choice, Image, Line, Panel, Slider
from .engine import Explorer, read_asset

_GREYS = 64  # levels that a pixel is kept in, each a character from "0" on


@dataclass(frozen=True)
class Tilted:
    """What `samples_explorer` shows at one lambda: images (k, H, W) in [-1, 1], E r_up with its error, E r_low, KL."""

    lam: float
    images: Tensor
    up: float
    up_se: float
    low: float
    kl: float
    how: str


def samples_explorer(frames: Mapping[str, Sequence[Tilted]], *, up: str, low: str, note: str) -> Explorer:
    """Real samples of the tilted law as lambda moves, for each prompt, above the curve of the upper reward.

    frames  prompt -> what there is at increasing lambda, the same values and numbers of images for every prompt;
            lambda = infinity is the pre-trained model
    up, low  names of the rewards;  note: where samples and numbers come from
    Raises ValueError if prompts differ in their values of lambda, or these do not increase.
    """
    prompts = list(frames)
    lams = [frame.lam for frame in frames[prompts[0]]]
    for prompt in prompts:
        if [frame.lam for frame in frames[prompt]] != lams or lams != sorted(set(lams)):
            raise ValueError(f"lambda of {prompt!r} must increase and be the same for every prompt: {lams}")
    names = ["∞ (pre-trained)" if math.isinf(lam) else format_number(lam, ".2g") for lam in lams]
    finite = [lam for lam in lams if math.isfinite(lam)]
    first = frames[prompts[0]]
    hint = "from over-optimised to pre-trained"
    opening = max(range(len(lams)), key=lambda k: first[k].up)  # where there is something to see

    def pack(image: Tensor) -> list[str]:
        """A character for each pixel of a row; runs of black as "~" and a character for their length."""
        levels = ((image.double().clamp(-1, 1) + 1) / 2 * (_GREYS - 1)).round().long()
        rows = ("".join(chr(48 + level) for level in row) for row in levels.tolist())
        return [re.sub("0{3,64}", lambda run: "~" + chr(48 + len(run[0])), row) for row in rows]

    data = {
        prompt: {
            "images": [[pack(image) for image in frame.images] for frame in found],
            "up": [round(frame.up, 3) for frame in found],
            "se": [round(frame.up_se, 3) for frame in found],
            "low": [round(frame.low, 3) for frame in found],
            "kl": [round(frame.kl, 3) for frame in found],
            "how": [frame.how for frame in found],
        }
        for prompt, found in frames.items()
    }

    def compute(at: float, prompt: str) -> dict[str, Any]:
        now, i, n = data[prompt], round(at), len(finite)
        best = max(range(len(lams)), key=lambda k: now["up"][k])

        def unpack(rows: list[str]) -> list[list[float]]:
            whole = (re.sub("~(.)", lambda run: "0" * (ord(run[1]) - 48), row) for row in rows)
            return [[2 * (ord(c) - 48) / (_GREYS - 1) - 1 for c in row] for row in whole]

        def edge(errors: float) -> list[float]:
            return [u + errors * se for u, se in zip(now["up"][:n], now["se"], strict=False)]

        level = now["up"][-1] if n < len(lams) else None
        return {
            "samples": [Image(str(k + 1), unpack(rows)) for k, rows in enumerate(now["images"][i])],
            "curve": [
                *([Line("pre-trained", [], [level], "base", "hline")] if level is not None else []),
                *([Line("", [lams[i]], [], "marker", "vline")] if i < n else []),
                Line("± 1.96 standard errors", finite, edge(1.96), "zero"),
                Line("± 1.96 standard errors", finite, edge(-1.96), "zero"),
                Line(f"E {up}", finite, now["up"][:n], "star"),
            ],
            "readout": [
                ("λ", names[i], ".3g"),
                (f"E {up}", now["up"][i], ".2f"),
                (f"E {low}", now["low"][i], ".2f"),
                ("KL from p_{0}", now["kl"][i], ".2f"),
                ("measured by", now["how"][i], ".3g"),
                ("best of these", names[best], ".3g"),
            ],
            "message": "",
            "warn": False,
        }

    return Explorer(
        "samples",
        [
            Slider("at", "λ", 0, len(lams) - 1, opening, step=1, hint=hint, names=names),
            Choice("prompt", "prompt", {prompt: prompt for prompt in prompts}, prompts[0]),
        ],
        [
            Panel("samples", "Samples", kind="images", wide=True),
            Panel("curve", "The upper reward", "λ", f"E {up}", xlog=True, xlim=(finite[0], finite[-1]), wide=True),
        ],
        compute,
        read_asset("samples.js"),
        {
            "prompts": data,
            "lams": finite,
            "names": names,
            "greys": _GREYS,
            "labels": {"up": f"E {up}", "low": f"E {low}"},
        },
        title="What the reward does to the images",
        caption=note,
        alt="Explorer of samples: a slider for lambda changes a row of generated digits and marks a place on a curve.",
    )
