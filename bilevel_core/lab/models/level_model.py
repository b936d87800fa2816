"""Training of the shipped 8x8 denoiser that is told the level: `python -m bilevel_core.lab.models.level_model`.

The network that chapter 7's live figure runs in the reader's browser. Needs MNIST; takes some twenty minutes of one
core. Stopped at any moment, it goes on from its checkpoint, or from the last grid that it has learned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import schedules
from ...algorithms import ScoreTraining, train_score
from ...guidance import LevelDenoiser
from ...samplers import sample_ddim, timesteps
from ...schedule_learning import learn_grid
from ...schedules import ANGLE
from ...seeds import derive_seed
from .. import data, distances, files, places, results
from ..training import checkpointed
from . import networks

NAME = "level_denoiser"
MARKED = ("learned", "cosine")  # grids: the learned one, and that of the cosine schedule that ends at 0.95


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights and the grids, besides the data and rounding.

    low, high     share of pi/2 at which the T angles of the training begin and end, evenly
    grids         numbers of steps for which a grid is learned, by `grid_steps` steps on `samples` images each
    marked        images that mark a grid
    """

    size: str = "tiny"
    steps: int = 6000
    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 200
    ema_decay: float = 0.999
    T: int = 1000
    low: float = 0.003
    high: float = 0.998
    grids: tuple[int, ...] = (3, 5, 10)
    grid_steps: int = 120
    samples: int = 256
    marked: int = 5000
    seed: int = 0
    threads: int = 1  # of torch: sums over another number of threads round otherwise


def even(low: float, high: float, T: int) -> Tensor:
    """abar (T+1,): T angles evenly from `low` to `high`, in shares of pi/2, and abar_0 = 1."""
    level = torch.linspace(low, high, T, dtype=torch.float64) * math.pi / 2
    return torch.cat([torch.ones(1, dtype=torch.float64), ANGLE.abar(level)])


def load() -> LevelDenoiser:
    """The shipped denoiser on the table of its training, frozen, in eval mode. Raises as `networks.shipped` does."""
    from safetensors.torch import load

    recipe = networks.card(NAME)["recipe"]
    network = networks.Denoiser(recipe["size"], told=ANGLE.name)
    network.load_state_dict(load(networks.shipped(NAME, f"{NAME}.safetensors")))
    abar = even(recipe["low"], recipe["high"], recipe["T"])
    return LevelDenoiser(network.eval().requires_grad_(False), abar).eval()


def mark(network: LevelDenoiser, abar: Tensor, n: int, seed: int) -> float:
    """The Frechet distance of n images drawn at the levels abar (N+1,) to MNIST's validation split."""
    classifier, drawn = networks.load_classifier("mnist8"), []
    for first in range(0, n, 500):
        generator = torch.Generator().manual_seed(derive_seed("marked", seed, first))
        x = torch.randn(min(500, n - first), 1, 8, 8, generator=generator)
        with torch.no_grad():
            x = sample_ddim(network.on(abar), x, abar, [*range(len(abar) - 1, 0, -1)]).clamp(-1, 1)
            drawn.append(classifier.features(x))
    real = distances.moments(networks.reference_features("mnist8", "val"))
    return round(distances.frechet(distances.moments(torch.cat(drawn)), real).item(), 4)


def grid(recipe: Recipe, network: LevelDenoiser, N: int) -> Tensor:
    """The grid of N levels, (N+1,), that `learn_grid` finds from even angles, on the validation split."""
    classifier = networks.load_classifier("mnist8")
    real = distances.moments(networks.reference_features("mnist8", "val"))

    def quality(images: Tensor) -> Tensor:
        return distances.frechet(distances.moments(classifier.features(images.clamp(-1, 1))), real)

    start, like = even(1 / (N + 1), N / (N + 1), N), torch.empty(recipe.samples, 1, 8, 8)
    sampler = partial(sample_ddim, checkpoint=True)
    options = {"steps": recipe.grid_steps, "seed": derive_seed("grid", recipe.seed, N), "sampler": sampler}
    return [*learn_grid(network, start, quality, like, **options)][-1].mean


def make(recipe: Recipe, folder: Path, work_dir: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, or goes on, learns the grids, and writes weights and card into `folder`; returns the card.

    The test split is not read.
    """
    from safetensors.torch import save

    torch.set_num_threads(recipe.threads)
    x0, abar = data.load("mnist", "train", 8)[0], even(recipe.low, recipe.high, recipe.T)
    network = LevelDenoiser(networks.Denoiser(recipe.size, told=ANGLE.name, seed=recipe.seed), abar)
    options = {name: getattr(recipe, name) for name in ("batch_size", "lr", "warmup", "ema_decay", "seed")}
    state = ScoreTraining(network, decay_steps=recipe.steps, **options)
    loop = train_score(state, x0, abar, steps=recipe.steps)
    for record in checkpointed(loop, state, work_dir / f"{NAME}.safetensors", steps=recipe.steps, every=200):
        if record.step % 500 == 0:
            say(f"step {record.step}, loss {sum(state.losses[-500:]) / 500:.4f}")
    weights = {name: value.contiguous() for name, value in state.ema.module.network.state_dict().items()}
    content, shown = save(weights), {}
    trained = LevelDenoiser(state.ema.module.network.eval().requires_grad_(False), abar, seen=network.seen).eval()
    for N in recipe.grids:
        about = json.loads(json.dumps(asdict(recipe))) | {"N": N, "weights": hashlib.sha256(content).hexdigest()}
        path = work_dir / f"{NAME}_grid_{N}.safetensors"
        learned = files.kept(path, about, lambda N=N: {"abar": grid(recipe, trained, N)})["abar"].double()
        usual = schedules.abar(torch.tensor((0.0, 0.95, 1.0, 0.008), dtype=torch.float64), recipe.T)
        usual = usual[[0, *reversed(timesteps(recipe.T, N))]]
        found = {
            name: mark(trained, table, recipe.marked, recipe.seed)
            for name, table in zip(MARKED, (learned, usual), strict=True)
        }
        shown[str(N)] = {"abar": learned.tolist()} | found
        say(f"{N} steps: Frechet distances {found}")
    card = {
        "recipe": asdict(recipe),
        "data": "MNIST: 50,000 training images (data.load), 8x8",
        "weights": "moving average, float32",
        "seen": list(network.seen),
        "cost": state.cost,
        "grids": shown,
        "log": {"loss": [round(loss, 6) for loss in state.losses]},
        "provenance": results.provenance(),
        "sha256": {f"{NAME}.safetensors": hashlib.sha256(content).hexdigest()},
    }
    files.write_atomic(folder / f"{NAME}.safetensors", content)
    files.write_atomic(folder / f"{NAME}.json", (json.dumps(card) + "\n").encode())
    return card


def main() -> None:
    """Command line: where to write, where to keep checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("weights"), help="for the weights")
    parser.add_argument("--work-dir", type=Path, default=None, help="for checkpoints (default: _runs/level_model)")
    options = parser.parse_args()
    make(
        Recipe(), options.folder, options.work_dir or places.work_dir() / "level_model", lambda s: print(s, flush=True)
    )


if __name__ == "__main__":
    main()
