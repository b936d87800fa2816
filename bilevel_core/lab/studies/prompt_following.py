"""Does the text-to-digit model draw what its prompts say? Digit, thickness and slant, by measurement."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import metrics
from ..files import piece
from ..models import captions, networks
from ..models.chains import Chain

FULL_CAPTIONS = [text for text, place in captions.CAPTIONS.items() if captions.ABSENT not in place]


@torch.no_grad()
def follow(images: Tensor, classifier: nn.Module, reference: Tensor | None = None) -> dict[str, float]:
    """How well images of FULL_CAPTIONS in turn, (n, 1, 28, 28), follow their captions.

    reference  features of real images, for a Fréchet distance where n allows it
    Returns the shares "digit" (by the classifier), "thickness" and "slant" (measured terciles; chance 1/3) that are as
    asked; the mean thickness in pixels for each word, "thin" ..., and the mean slant for "leaning left" ..., each with
    its standard error "... se"; and "frechet".
    """
    x = images.clamp(-1, 1)
    wanted = torch.tensor([captions.CAPTIONS[text] for text in FULL_CAPTIONS], device=x.device)
    wanted = wanted.repeat(-(-len(x) // len(wanted)), 1)[: len(x)]
    features = torch.cat([classifier.features(part) for part in x.split(1000)])
    predicted, found = classifier.head(features).argmax(1), captions.attributes(x, wanted[:, 0])
    right = found == wanted
    right[:, 0] = predicted == wanted[:, 0]
    report = dict(zip(("digit", "thickness", "slant"), right.double().mean(0).tolist(), strict=True))
    for column, words, measure in ((1, captions.THICKNESS, captions.thickness), (2, captions.SLANT, captions.slant)):
        values = measure(x).double()
        for k, word in enumerate(words):
            chosen = values[wanted[:, column] == k]
            report[word], report[f"{word} se"] = chosen.mean().item(), (chosen.std() / len(chosen) ** 0.5).item()
    if reference is not None:
        report["frechet"] = metrics.frechet(features.double().cpu(), reference)
    return report


def prompt_study(
    settings: Sequence[tuple[float, int]],
    *,
    split: str,
    seeds: int,
    n: int,
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable | None = None,
) -> list[dict]:
    """`follow` for the shipped chain at each (scale, steps), against the reference features of a split.

    seeds  how many, from `first` on
    n      images for each seed and setting, the 90 complete captions in turn
    folder where pieces live; a killed study goes on there
    Returns a row for each setting and seed: scale, steps, seed, cost, wall_s and what `follow` reports.
    """
    classifier = networks.load_classifier("mnist28").to(device)
    hashes = {name: networks.card(name)["sha256"] for name in ("text_denoiser", "classifier_mnist28")}
    reference = networks.reference_features("mnist28", split)

    def compute(scale: float, steps: int, seed: int) -> dict:
        chain = Chain.shipped(device, scale=scale, steps=steps)
        images, cost = chain.sample(FULL_CAPTIONS, n, seed, device=device, progress=progress)
        enough = n >= 2 * classifier.num_features
        return {"cost": cost} | follow(images, classifier, reference if enough else None)

    rows = []
    for (scale, steps), seed in itertools.product(settings, range(first, first + seeds)):
        config = {"scale": scale, "steps": steps, "seed": seed, "n": n, "split": split, "weights": hashes}
        path = folder / f"prompts_{split}_{scale:g}_{steps}_{seed}.json"
        found = piece(path, config, lambda s=scale, k=steps, i=seed: compute(s, k, i))
        rows.append({"scale": scale, "steps": steps, "seed": seed} | {k: v for k, v in found.items() if k != "config"})
    return rows
