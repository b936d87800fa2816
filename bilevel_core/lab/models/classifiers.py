"""Training of the classifiers that measure samples: `python -m bilevel_core.lab.models.classifiers mnist28 mnist8`.

The appendix of the book explains the recipe and repeats its first steps. Needs MNIST; takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import data, files, results
from .networks import CLASSIFIERS


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data and rounding."""

    name: str = "mnist28"
    seed: int = 0
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 3e-3  # the highest of a one-cycle schedule
    weight_decay: float = 1e-2
    max_shift: int = 2  # pixels of the 28x28 image
    threads: int = 1  # of torch: sums over another number of threads round otherwise


# Chosen on the validation split. At 8x8, 8 epochs with shifts by up to two pixels reached 97.4 % there.
RECIPES = {"mnist28": Recipe("mnist28"), "mnist8": Recipe("mnist8", epochs=12, max_shift=1)}


@dataclass(frozen=True)
class Step:
    """One optimiser step: its number (from 1) and the loss before it."""

    step: int
    loss: float


def shifted(x: Tensor, side: int, max_shift: int, generator: torch.Generator) -> Tensor:
    """Images (n, 1, 28, 28), each moved by up to `max_shift` pixels either way, at the size of a classifier.

    side 28: as they are; side 8: padded to 32 and averaged over 4x4, as in `data.resize`. Filled with -1.
    """
    full = 28 if side == 28 else 32
    margin = (full - 28) // 2 + max_shift
    padded = functional.pad(x[:, 0], (margin,) * 4, value=-1.0)
    offset = torch.randint(0, 2 * max_shift + 1, (2, len(x), 1), generator=generator)
    rows, columns = offset + torch.arange(full)
    moved = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)
    return functional.avg_pool2d(moved, full // side) if side != 28 else moved


def build(recipe: Recipe) -> nn.Module:
    """The untrained classifier: deterministic in recipe.seed, torch's global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return CLASSIFIERS[recipe.name]()


def train(classifier: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> Iterator[Step]:
    """Train on images (n, 1, 28, 28) with labels (n,) by AdamW with a one-cycle learning rate, yielding each Step.

    Stop asking to stop early: the first steps do not depend on how many follow.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    per_epoch = len(images) // recipe.batch_size
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=recipe.learning_rate, total_steps=recipe.epochs * per_epoch
    )
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for k in range(per_epoch):
            batch = order[k * recipe.batch_size : (k + 1) * recipe.batch_size]
            x = shifted(images[batch], classifier.side, recipe.max_shift, generator)
            classifier.train()
            loss = functional.cross_entropy(classifier(x), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            yield Step(epoch * per_epoch + k + 1, loss.item())


@torch.no_grad()
def outputs(classifier: nn.Module, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """(features, logits) of images at the classifier's own size, in eval mode."""
    classifier.eval()
    features = torch.cat([classifier.features(batch) for batch in images.split(batch_size)])
    return features, classifier.head(features)


@torch.no_grad()
def standardise(classifier: nn.Module, images: Tensor) -> None:
    """Give the features of `images` mean 0 and, averaged over the features, variance 1; logits stay as they are.

    A common scale, not one per feature: the shape of the cloud is the classifier's. Images that are all one and the
    same, at the mean, then have a Fréchet distance of `num_features` to the training set.
    """
    features = outputs(classifier, images)[0].double()
    mean, scale = features.mean(0), features.var(0).mean().sqrt()
    classifier.centre.add_(mean * classifier.scale)
    classifier.scale.mul_(scale)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(10, 10) counts: row = true digit, column = predicted digit."""
    return torch.bincount(labels * 10 + logits.argmax(1), minlength=100).reshape(10, 10)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the predictions that are right."""
    return (logits.argmax(1) == labels).double().mean().item()


def make(recipe: Recipe, folder: Path, root: str | None = None) -> dict:
    """Train, measure and write weights, card and reference features into `folder`; returns the card.

    The validation split is looked at after every epoch, the test split once, at the end.
    """
    from safetensors.torch import save

    torch.set_num_threads(recipe.threads)
    start = time.perf_counter()
    images, labels = data.load("mnist", "train", root=root)
    classifier = build(recipe)
    held_out = data.load("mnist", "val", classifier.side, root)
    losses, val_accuracy = [], []
    per_epoch = len(images) // recipe.batch_size
    for record in train(classifier, images, labels, recipe):
        losses.append(record.loss)
        if record.step % per_epoch == 0:
            val_accuracy.append(accuracy(outputs(classifier, held_out[0])[1], held_out[1]))
            print(
                f"{recipe.name}: epoch {record.step // per_epoch}, loss {record.loss:.4f}, "
                f"validation accuracy {val_accuracy[-1]:.4f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    wall_s = time.perf_counter() - start

    standardise(classifier, data.load("mnist", "train", classifier.side, root)[0])
    made = {f"classifier_{recipe.name}.safetensors": save(classifier.state_dict())}
    accuracies, table = {}, []
    for split in data.SPLITS:
        x, y = data.load("mnist", split, classifier.side, root)
        features, logits = outputs(classifier, x)
        accuracies[split] = accuracy(logits, y)
        table = confusion(logits, y).tolist()
        stored = {"features": features.half(), "labels": y.to(torch.uint8)}
        made[f"features_{recipe.name}_{split}.safetensors"] = save(stored)
    card = {
        "recipe": asdict(recipe),
        "data": "MNIST: 50,000 training, 10,000 validation and 10,000 test images (data.load)",
        "features": "before the last SiLU, standardised on the training split; half precision; order of data.load",
        "accuracy": accuracies,
        "confusion_test": table,
        "log": {"loss": losses, "val_accuracy": val_accuracy},
        "wall_s": round(wall_s, 1),
        "provenance": results.provenance(),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in made.items()},
    }
    for file, content in made.items():
        files.write_atomic(folder / file, content)
    files.write_atomic(folder / f"classifier_{recipe.name}.json", (json.dumps(card) + "\n").encode())
    print(f"{recipe.name}: test accuracy {accuracies['test']:.4f}, {wall_s:.0f} s", flush=True)
    return card


def main() -> None:
    """Command line: names of classifiers and the folder to write to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(CLASSIFIERS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("weights"))
    arguments = parser.parse_args()
    for name in arguments.names:
        make(RECIPES[name], arguments.folder)


if __name__ == "__main__":
    main()
