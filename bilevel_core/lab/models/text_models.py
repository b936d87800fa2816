"""Training of the shipped text models: `python -m bilevel_core.lab.models.text_models clip denoiser`.

The appendix of the book explains the recipes and repeats their first steps. Needs MNIST; the CLIP takes some ten
minutes on two cores, the denoiser an hour or two. Stopped at any moment, each goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import schedules
from ...algorithms import ScoreTraining, TrainStep, train_score
from .. import data, files, parameters, places, results
from ..training import checkpointed
from . import captions, clip, networks


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data and rounding.

    drop, drop_all  how often a caption leaves out an attribute, or everything (`captions.CaptionSampler`)
    T, q            cosine noise schedule of the denoiser; the CLIP has none
    """

    name: str
    size: str
    steps: int
    batch_size: int
    lr: float
    warmup: int
    ema_decay: float
    drop: float
    drop_all: float = 0.0
    T: int = 0
    q: tuple[float, ...] = ()
    seed: int = 0
    threads: int = 2  # of torch: sums over another number of threads round otherwise


RECIPES = {
    "clip": Recipe("clip", "28x28", 3000, 128, 1e-3, 200, 0.995, drop=0.3),
    "denoiser": Recipe(
        "text_denoiser", "mnist28_text", 5000, 128, 2e-3, 200, 0.999, 0.2, 0.1, T=1000, q=(0.0, 0.98, 1.0, 0.008)
    ),
}


def abar(recipe: Recipe) -> Tensor:
    """(T+1,) float64: the noise schedule that a denoiser is trained with."""
    return schedules.abar(torch.tensor(recipe.q, dtype=torch.float64), recipe.T)


def start(recipe: Recipe, device: torch.device | str = "cpu") -> ScoreTraining:
    """The untrained model with its optimiser, deterministic in recipe.seed."""
    if recipe.name == "clip":
        model = clip.build(recipe.seed)
    else:
        model = networks.TextDenoiser(recipe.size, seed=recipe.seed)
    options = ("batch_size", "lr", "warmup", "ema_decay", "seed")
    chosen = {name: getattr(recipe, name) for name in options}
    return ScoreTraining(model.to(device), decay_steps=recipe.steps, **chosen)


def train(state: ScoreTraining, recipe: Recipe, images: Tensor, found: Tensor) -> Iterator[TrainStep]:
    """Trains on images (n, 1, 28, 28) with attributes (n, 3), yielding a TrainStep each; `state` is updated in place.

    Stop asking to stop early: the first steps do not depend on how many follow.
    """
    if recipe.name == "clip":
        return clip.train(state, images, found, drop=recipe.drop, steps=recipe.steps)
    sampler = captions.CaptionSampler(found, recipe.drop, recipe.drop_all)
    return train_score(state, images, abar(recipe), steps=recipe.steps, condition=sampler)


def make(recipe: Recipe, folder: Path, work_dir: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Trains, or goes on, and writes weights and card into `folder`; returns the card. The test split is not read."""
    from safetensors.torch import save

    torch.set_num_threads(recipe.threads)
    images, labels = (part.to(device) for part in data.load("mnist", "train"))
    found, state = captions.attributes(images, labels), start(recipe, device)
    begin = time.perf_counter()
    path = work_dir / f"{recipe.name}.safetensors"
    for record in checkpointed(
        train(state, recipe, images, found), state, path, steps=recipe.steps, every=100, bar=recipe.name
    ):
        if record.step % 100 == 0:
            loss = sum(state.losses[-100:]) / 100
            print(
                f"{recipe.name}: step {record.step}, loss {loss:.4f}, {time.perf_counter() - begin:.0f} s", flush=True
            )
    content = save({name: value.cpu().contiguous() for name, value in state.ema.module.state_dict().items()})
    file = f"{recipe.name}.safetensors"
    card = {
        "recipe": asdict(recipe),
        "data": "MNIST: 50,000 training images (data.load) with random true captions (captions.CaptionSampler)",
        "weights": "moving average, float32",
        "cost": state.cost,
        "log": {"loss": [round(loss, 6) for loss in state.losses]},
        "provenance": results.provenance(),
        "sha256": {file: hashlib.sha256(content).hexdigest()},
    }
    files.write_atomic(folder / file, content)
    files.write_atomic(folder / f"{recipe.name}.json", (json.dumps(card) + "\n").encode())
    return card


def main() -> None:
    """Command line: names of models, where to write them, where to keep checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("weights"), help="for the weights")
    parser.add_argument("--work-dir", type=Path, default=None, help="for checkpoints (default: _runs/text_models)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    arguments = parser.parse_args()
    work_dir = arguments.work_dir or places.work_dir() / "text_models"
    for name in arguments.names:
        make(RECIPES[name], arguments.folder, work_dir, parameters.choose_device(arguments.device))


if __name__ == "__main__":
    main()
