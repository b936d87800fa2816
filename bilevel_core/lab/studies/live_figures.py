"""What the live figures are given: the shipped networks as packs, and what is recorded beside what the reader finds.

`pull()` and `grid()` return the figures of chapters 5 and 7; `pack_files()` is what the build lays beside the pages.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ... import schedules
from ...guidance import LevelDenoiser
from ...samplers import sample_ddim
from ...seeds import derive_seed
from .. import distances, explorers, results
from ..explorers import Pack, Pulled
from ..explorers.grid import START, cosine_levels
from ..models import captions, level_model, networks, packs, text_models
from ..models.chains import Chain
from . import tilted_truth

SCALES = "05_pulls"  # the recorded result that holds the scales of the lower rewards
TILTS = "05_tilts"  # the recorded result that may hold "curves"
ATTRIBUTES = {1: ("thinness", "boldness", "boldness"), 2: ("lean to the left", "uprightness", "lean to the right")}


def record_scales(
    prompts: Sequence[str], folder: Path, tier: str = "recorded", directory: Path | None = None, **options: object
) -> Path:
    """Records mean and standard deviation, under p_0, of what each prompt's lower reward measures.

    folder     of the draws, which are kept there;  options: of `tilted_truth.problem`, such as draws
    directory  of the result, see `results.write_result`
    """
    began, chain = time.perf_counter(), Chain.shipped()
    found = [tilted_truth.problem(chain, prompt, folder=folder, **options) for prompt in prompts]
    scales = {one.prompt: {"mean": one.pull.mean, "sd": one.pull.sd, "at": one.pull.at} for one in found}
    about = {name: value for name, value in found[0].about.items() if name in ("scale", "steps", "eta", "draws")}
    cost = sum(one.about["draws"] for one in found) * found[0].G.cost
    said = (
        "mean and standard deviation of the measured attribute, signed towards the word, under p_0 of what it hears; "
    )
    said += "seconds since the last start: draws that were there are read"
    spent = {"cost": cost, "wall_s": time.perf_counter() - began, "directory": directory}
    return results.write_result(SCALES, tier, {"scales": scales}, about, seeds=0, protocol=said, **spent)


@functools.cache
def _scales() -> dict[str, dict[str, float]]:
    return results.read_result(SCALES)["data"]["scales"]


@functools.cache
def _pack(name: str) -> Pack:
    return Pack(name, packs.digits([*_scales()]) if name == "digits" else packs.levels())


def pack_files() -> list[Pack]:
    """The packs of both figures."""
    return [_pack("digits"), _pack("levels")]


def pulled(prompt: str, scale: Mapping[str, float], curve: Sequence[Mapping[str, float]] = ()) -> Pulled:
    """A prompt as the figure takes it, with its lower reward's scale and, if any, its recorded curve."""
    chain, heard, recipe = Chain(None, torch.ones(2)), tilted_truth.heard(prompt), text_models.RECIPES["denoiser"]
    _, stroke, slant = captions.CAPTIONS[prompt]
    slanted = stroke == captions.ABSENT
    place = slant if slanted else stroke
    ids = captions.encode([heard, ""]).tolist()
    told = {"prompt": ids[0], "empty": ids[1], "scale": chain.scale, "steps": chain.steps, "eta": chain.eta}
    told |= {"T": recipe.T, "q": list(recipe.q), "maxBeta": schedules.MAX_BETA}
    told |= {"pull": {"measure": "slant" if slanted else "thickness", "sign": -1 if place == 0 else 1, **scale}}
    return Pulled(heard, told, ATTRIBUTES[2 if slanted else 1][place], curve)


def recorded_curves() -> dict[str, Sequence[Mapping[str, float]]]:
    """The curves of the recorded tilts, prompt -> rows as `Truth.curve` returns them; none where none is recorded."""
    try:
        return results.read_result(TILTS)["data"].get("curves", {})
    except FileNotFoundError:
        return {}


def pull(curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None) -> explorers.LiveExplorer:
    """The figure of chapter 5. curves: prompt -> rows of "lam", "clip" and "pull"; None: `recorded_curves`.

    Prompts without a curve are offered without one. Raises ValueError for a prompt whose scale is not recorded.
    """
    curves, found = recorded_curves() if curves is None else curves, _scales()
    unknown = set(curves) - set(found)
    if unknown:
        raise ValueError(f"no scale is recorded for {', '.join(sorted(unknown))}: call record_scales for all prompts")
    prompts = {prompt: pulled(prompt, scale, curves.get(prompt, ())) for prompt, scale in found.items()}
    chain = Chain(networks.load_text_denoiser(), text_models.abar(text_models.RECIPES["denoiser"]))
    first = next(iter(prompts.values())).heard
    untuned = chain.decode(chain.sample(first, 8, derive_seed("untuned", 0))[0])[:, 0]
    return explorers.pull_explorer(prompts, untuned, _pack("digits"))


def drawn(network: LevelDenoiser, levels: torch.Tensor) -> torch.Tensor:
    """Images (SHOWN, 1, 8, 8) in [-1, 1] at angles (N,), rising, from the noise of every grid."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(levels.double())])
    with torch.no_grad():
        return sample_ddim(network.on(abar), packs.noise(), abar, [*range(len(levels), 0, -1)]).clamp(-1, 1)


def grid() -> explorers.LiveExplorer:
    """The figure of chapter 7."""
    card, network = networks.card(level_model.NAME), level_model.load()
    seen, grids = tuple(card["seen"]), card["grids"]
    levels = {int(N): schedules.angle(torch.tensor(row["abar"], dtype=torch.float64)[1:]) for N, row in grids.items()}
    names = {"learned": "learned grid, recorded", "cosine": "cosine end 0.95, recorded"}
    recorded = {said: {int(N): row[name] for N, row in grids.items()} for name, said in names.items()}
    features = networks.reference_features("mnist8", "val")
    real = distances.moments(features)
    parts = [features[i * packs.SHOWN : (i + 1) * packs.SHOWN] for i in range(50)]
    floor = sum(distances.frechet(distances.moments(part), real).item() for part in parts) / len(parts)
    return explorers.grid_explorer(
        {N: value.tolist() for N, value in levels.items()},
        recorded,
        floor,
        drawn(network, cosine_levels(**START, seen=seen))[:, 0],
        _pack("levels"),
        seen=seen,
        stretch=network.network.stretch,
        marked=card["recipe"]["marked"],
    )
