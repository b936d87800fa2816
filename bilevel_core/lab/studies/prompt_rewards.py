"""Samples of p_0 with their rewards for four prompts, on which chapter 9 learns several strengths.

p_0 hears of a prompt all but the thickness. No tilt is drawn: what samples of p_0 do not reach, nothing here says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...algorithms import TiltSamples
from .. import files
from ..models import clip, networks, rewards
from ..models.chains import Chain, bank, slug
from .tilted_truth import heard

PROMPTS = ("a bold eight", "a bold two leaning right", "a bold five", "a medium nine")
LOW = ("boldness", "resnet")  # lower rewards; "ink" is a second one beside boldness
NAMES = ("clip", "ink", *LOW)


def draw(
    chain: Chain, prompt: str, n: int, seed: int, *, folder: Path, device: torch.device | str = "cpu", bar: bool = False
) -> dict[str, Tensor]:
    """`chains.bank` of what p_0 hears, with the rewards of NAMES as they come; kept in `folder`, a batch a file."""
    found = {"clip": clip.score(clip.load().to(device), prompt), "ink": rewards.ink, "boldness": rewards.boldness}
    found["resnet"] = rewards.RandomResNet().to(device)
    options = {"folder": folder / slug(prompt), "about": _about(), "device": device, "batch": min(n, 500)}
    return bank(chain, heard(prompt), found, n, seed, **options, bar=prompt if bar else None)


def samples(drawn: Mapping[str, Tensor], low: str) -> TiltSamples:
    """What `draw` returned as `learn_lam` takes it: r_up in CLIP points, r_low in its standard deviations under p_0."""
    mean, sd = rewards.scale(drawn[low])
    return TiltSamples(drawn["clip"].double(), (drawn[low].double() - mean) / sd, cost=int(drawn["cost"]))


def store(path: Path, drawn: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Keeps the rewards of every prompt and what they cost in one file, for `restore`."""
    tensors = {f"{prompt}|{name}": one[name].reshape(-1) for prompt, one in drawn.items() for name in (*NAMES, "cost")}
    return files.save_state(path, tensors, _about() | {"prompts": list(drawn)})


def restore(path: Path) -> dict[str, dict[str, Tensor]]:
    """By prompt the rewards of NAMES (n,) float32 and the "cost" (), in image forwards, as `store` kept them.

    Raises as `files.load_state` does, and ValueError where other weights or rewards made them, naming what differs.
    """
    tensors, found = files.load_state(path)
    wanted = _about()
    changed = [key for key in wanted if found.get(key) != wanted[key]] or ["prompts"] * ("prompts" not in found)
    if changed:
        raise ValueError(f"{path.name} was made with other {', '.join(changed)}: run the recorded profile again")
    return {
        prompt: {name: tensors[f"{prompt}|{name}"] for name in NAMES} | {"cost": tensors[f"{prompt}|cost"][0]}
        for prompt in found["prompts"]
    }


def _about() -> dict[str, object]:
    """What decides a reward besides the image: the weights of both models, and the random network's settings."""
    hashes = {name: networks.card(name)["sha256"] for name in ("text_denoiser", "clip")}
    return hashes | {"resnet": "seed 0, 64 pixels"}
