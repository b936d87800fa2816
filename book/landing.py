"""The figure that moves on the first page, and its still for the README: lambda learned from recorded rewards.

Algorithm 2 runs here, in the build, on what chapter 5 recorded: rewards of samples of the text-to-digit model, and
particles where these do not reach. It learns from one run of particles; the curve it is marked on is measured by the
three others. The page gets the path, the curve and recorded images, and a few lines that move a slider with time.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_core import algorithms
from bilevel_core.lab import explorers, places
from bilevel_core.lab.explorers import Choice, Explorer, Image, Line, Panel, Slider
from bilevel_core.lab.studies import lambda_race

HERE = Path(__file__).parent
STORIES = (("a bold two leaning right", 0.05), ("a bold two leaning right", 10.0), ("a medium nine", 0.05))
BOUNDS = (0.01, 100.0)
OVERLAP = 0.14  # above it neighbouring laws of which there are samples overlap
SHOWN = 8  # images of a prompt and lambda
LEVELS = 16  # of grey, two pixels to a byte
LAMS = [min(lam, BOUNDS[1]) for lam in lambda_race.SLIDER_LAMS]  # where the images stand; p_0 at the axis' end


@dataclass(frozen=True)
class Story:
    """One run of Algorithm 2: its path, by which ending, on which curve (at `lams`) and with which images.

    lams, curve  where the curve is measured, and by how much; it is drawn straight between them

    images  (len(LAMS), SHOWN, 28, 28), levels of grey from 0 to LEVELS - 1
    """

    prompt: str
    path: list[float]
    done: str
    lams: list[float]
    curve: list[float]
    images: Tensor
    samples: int

    def worth(self, lam: float) -> float:
        """The curve at lambda, straight between its points in log lambda."""
        return interpolate(self.lams, self.curve, lam)


def position(places: Sequence[float], lam: float) -> tuple[int, float]:
    """The interval of increasing places in which lambda lies, and how far along it is, in log lambda."""
    lam = min(max(lam, places[0]), places[-1])
    i = max(0, min(len(places) - 2, sum(place <= lam for place in places) - 1))
    return i, math.log(lam / places[i]) / math.log(places[i + 1] / places[i])


def interpolate(places: Sequence[float], values: Sequence[float], lam: float) -> float:
    """Straight between values at increasing places, in log lambda."""
    i, part = position(places, lam)
    return values[i] + part * (values[i + 1] - values[i])


def stories() -> list[Story]:
    """Runs Algorithm 2 on the recorded rewards, from each start."""
    kept = places.project_root() / "book" / "results" / "05_rewards.safetensors"
    materials, pictures = lambda_race.restore(kept)
    found = []
    for prompt, start in STORIES:
        learns, marks = (materials[prompt].bank("boldness", which) for which in (0, "other"))
        # Between two lambda so far apart that their laws do not overlap, no sample tells the curve.
        known = sorted({lam for lam, _ in marks.sharp})
        lams = [lam for lam in known if lam < OVERLAP]
        lams += [lam for k in range(81) if (lam := float(f"{10 ** (-2 + k / 20):.4g}")) > OVERLAP]
        steps = list(algorithms.learn_lam(learns.pooled, start, bounds=BOUNDS, min_ess=20))
        images = torch.stack([pictures[prompt, lam][:SHOWN, 0] for lam in lambda_race.SLIDER_LAMS])
        found.append(
            Story(
                prompt,
                [float(f"{step.lam:.4g}") for step in steps],
                steps[-1].done or "steps used up",
                lams,
                [round(marks.worth(lam)["up"], 3) for lam in lams],
                (images.double() / 255 * (LEVELS - 1)).round().to(torch.uint8),
                len(learns.r_up),
            )
        )
    return found


def named(story: Story) -> str:
    """How a story is called in the menu."""
    start = story.path[0]
    return f"“{story.prompt}”, from λ = {start:g}"


def summary(story: Story) -> str:
    """What came out, in a sentence."""
    end, worth, best = story.path[-1], story.worth(story.path[-1]), max(story.curve)
    at = story.lams[story.curve.index(best)]
    steps = len(story.path) - 1
    if end >= BOUNDS[1]:
        where = f"{steps} steps take λ to the end of its range: the best is not to pull at all"
    else:
        where = f"After {steps} steps λ stays at {end:.3g}"
    gap = f"the best on the curve, at λ = {at:.2g}, is worth {best - worth:.1f} more" if best - worth >= 0.05 else ""
    return f"{where}. CLIP score {story.worth(story.path[0]):.1f} → {worth:.1f}" + (f"; {gap}." if gap else ".")


def pack(images: Tensor) -> str:
    """Base64 of pixels, two levels of grey to a byte."""
    flat = images.reshape(-1)
    return base64.b64encode(bytes((flat[::2] * 16 + flat[1::2]).tolist())).decode()


def explorer(told: Sequence[Story] | None = None) -> Explorer:
    """The figure as an explorer: a story, and a slider for the steps of Algorithm 2."""
    told = list(told or stories())
    keys = {str(i): story for i, story in enumerate(told)}

    def compute(step: float, story: str) -> dict[str, Any]:
        now = keys[story]
        k = min(int(step + 1e-9), len(now.path) - 2)
        before, after = now.path[k], now.path[k + 1]
        lam = before * (after / before) ** (step - k)
        i, part = position(LAMS, lam)
        part = min(max((part - 0.4) / 0.2, 0.0), 1.0)  # the nearest recorded images; they dissolve halfway
        blend = (now.images[i].double() * (1 - part) + now.images[i + 1].double() * part) * 2 / (LEVELS - 1) - 1
        seen = now.path[: int(step + 1e-9) + 1]
        best = max(range(len(now.curve)), key=now.curve.__getitem__)
        return {
            "images": [Image("", pixels) for pixels in blend],
            "curve": [
                Line("best", [now.lams[best]], [], "marker", "vline"),
                Line("measured CLIP score", now.lams, now.curve, "star"),
                Line("steps of Algorithm 2", seen, [now.worth(at) for at in seen], "base", "points"),
                Line("now", [lam], [now.worth(lam)], "gamma", "points"),
            ],
            "readout": [
                ("step", f"{int(step + 1e-9)} of {len(now.path) - 1}"),
                ("λ", lam, ".3g"),
                ("CLIP score", now.worth(lam), ".1f"),
            ],
            "message": summary(now),
        }

    def steps(story: Story) -> dict[str, float]:
        last = len(story.path) - 1
        return {"min": 0.0, "max": float(last), "step": 0.05, "value": float(last)}

    first = steps(told[0])
    n = min(story.samples for story in told)
    return Explorer(
        "learning",
        [
            Choice(
                "story",
                "prompt and start",
                {key: named(story) for key, story in keys.items()},
                "0",
                {key: {"step": steps(story)} for key, story in keys.items()},
            ),
            Slider("step", "step of Algorithm 2", first["min"], first["max"], first["value"], 0.05, format=".1f"),
        ],
        [
            Panel("images", "What the model draws at this λ", kind="images", wide=True),
            Panel(
                "curve",
                "What Algorithm 2 climbs",
                "λ: strong pull on the left, none on the right",
                "E CLIP score",
                xlim=BOUNDS,
                xlog=True,
                wide=True,
            ),
        ],
        compute,
        (HERE / "landing.js").read_text(encoding="utf-8"),
        {
            "stories": {
                key: {
                    "path": story.path,
                    "curve": story.curve,
                    "prompt": story.prompt,
                    "message": summary(story),
                }
                for key, story in keys.items()
            },
            "images": {story.prompt: pack(story.images) for story in told},
            "lams": told[0].lams,
            "places": LAMS,
            "shown": SHOWN,
            "side": told[0].images.shape[-1],
        },
        title="A number learned by gradient: how strongly may a reward pull?",
        caption=(
            "The reward is boldness, the number is λ, the judge is a CLIP score of image and prompt. Pulled too hard, "
            "every image is a blot; pulled right, a bold two; for a medium nine the right answer is not to pull. "
            f"Recorded: {n:,} samples of the pre-trained model a prompt, and particles (Algorithm 5) at five small λ, "
            "200 in a run. Algorithm 2 runs in the build, on the samples and one run; the curve is measured by three "
            f"others, at each λ above {OVERLAP:g} and at the two below that have particles; it is straight between. "
            f"The images are {SHOWN} recorded ones at the nearest of ten λ. Exact chains have since found the curve "
            "too high below λ = 0.3: chapter 5 is being measured again."
        ),
        alt=(
            "Animation: eight generated digits, from blots to legible digits, while a dot climbs the measured curve of "
            "the CLIP score over lambda, step by step of Algorithm 2. A slider sets the step, a menu the run."
        ),
    )


def figure() -> str:
    """HTML of the figure that moves: the explorer, and what moves it."""
    player = (HERE / "player.js").read_text(encoding="utf-8")
    return f"{explorer().html()}<script>{player}</script>"


# ---------------------------------------------------------------- the still of the README


def png(pixels: Tensor) -> str:
    """A grey image (H, W), levels of grey from 0 to LEVELS - 1, as a data address."""
    from PIL import Image as Picture

    grey = (pixels.double() / (LEVELS - 1) * 255).round().to(torch.uint8)
    stream = io.BytesIO()
    Picture.fromarray(grey.numpy()).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def still(story: Story, rows: int = 3) -> str:
    """SVG: images at each recorded lambda above the measured curve, with the path of Algorithm 2 on it."""
    left, right, top, bottom, side = 56, 744, 152, 330, 28
    low, high = 10 * math.floor(min(story.curve) / 10), 10 * math.ceil(max(story.curve) / 10)
    star, warm = (explorers.ROLES[role][0] for role in ("star", "gamma"))

    def x(lam: float) -> float:
        return left + (right - left) * math.log(lam / BOUNDS[0]) / math.log(BOUNDS[1] / BOUNDS[0])

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    def text(at: float, height: float, words: str, rest: str = 'text-anchor="middle"') -> str:
        return f'<text x="{at:.1f}" y="{height:.1f}" {rest}>{words}</text>'

    parts = []
    for i, lam in enumerate(LAMS):
        column = torch.cat(list(story.images[i, :rows]))
        at = min(max(x(lam) - side / 2, left), right - side)
        parts.append(f'<image x="{at:.1f}" y="36" width="{side}" height="{side * rows}" href="{png(column)}"/>')
    for power in range(-2, 3):
        lam = 10.0**power
        parts.append(f'<path class="grid" d="M{x(lam):.1f},{top}V{bottom}"/>')
        parts.append(text(x(lam) - 18 * (power == 2), bottom + 17, f"{lam:g}" if power < 2 else "no pull"))
    for value in range(low, high + 1, 10):
        parts.append(f'<path class="grid" d="M{left},{y(value):.1f}H{right}"/>')
        parts.append(text(left - 7, y(value) + 4, f"{value}", 'text-anchor="end"'))
    points = " ".join(f"{x(lam):.1f},{y(value):.1f}" for lam, value in zip(story.lams, story.curve, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{star}" stroke-width="2.4"/>')
    for k, lam in enumerate(story.path):
        last = k == len(story.path) - 1
        parts.append(
            f'<circle cx="{x(lam):.1f}" cy="{y(story.worth(lam)):.1f}" r="{7 if last else 5}" '
            f'fill="{warm if last else "#ffffff"}" stroke="{warm}" stroke-width="1.8"><title>step {k}: '
            f"lambda = {lam:g}</title></circle>"
        )
    end = story.path[-1]
    said = f"learned: λ = {end:.2g}"
    parts.append(f'<path d="M{x(end):.1f},{y(story.worth(end)) + 8:.1f}v34" stroke="{warm}" fill="none"/>')
    parts.append(text(x(end), y(story.worth(end)) + 57, said, f'text-anchor="middle" fill="{warm}" font-weight="600"'))
    parts.append(text((left + right) / 2, bottom + 38, "entropy strength λ: the smaller, the harder the reward pulls"))
    parts.append(
        text(0, 0, "CLIP score", f'text-anchor="middle" transform="translate(16,{(top + bottom) / 2}) rotate(-90)"')
    )
    parts.append(text(left, 24, f"“{story.prompt}”: images by λ", 'font-weight="600"'))
    said = f"recorded: {story.samples:,} samples, and particles (chapter 5)"
    parts.append(text(right, 24, said, 'text-anchor="end" fill="#59636e"'))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 378" font-size="13" fill="#1f2328" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
        f"<title>Lambda learned by Algorithm 2 for the prompt {story.prompt}</title>"
        f"<desc>{summary(story)}</desc>"
        "<style>.grid{stroke:#e3e7eb;fill:none}image{image-rendering:pixelated}</style>"
        '<rect x="0.5" y="0.5" width="759" height="377" rx="10" fill="#ffffff" stroke="#d5dbe1"/>'
        + "".join(parts)
        + "</svg>\n"
    )
