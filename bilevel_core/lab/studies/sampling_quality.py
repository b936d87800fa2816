"""Chapter 1's experiment: sample quality against the end of the schedule, the number of DDIM steps and eta."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from ... import schedules
from .. import data
from ..files import piece
from ..models import networks
from ..models.fast import fast
from .setting import IMAGES, measure, real_features, train_denoiser


def sampling_study(
    name: str,
    *,
    seeds: int,
    ends: Sequence[float],
    train_steps: int,
    batch_size: int,
    T: int,
    grids: Sequence[int],
    etas: Sequence[float],
    n: int,
    folder: Path,
    first: int = 0,
    device: torch.device | str = "cpu",
    force: bool = False,
) -> list[dict]:
    """Quality of samples against the schedule's end, the number of DDIM steps and eta; a denoiser per end and seed.

    name   one of IMAGES
    seeds  how many, from `first` on
    ends   values of `end` in the cosine schedule, the other parameters at their defaults
    n      samples for each row; force=True allows too few for a distance (its numbers then mean nothing)
    folder where checkpoints and pieces live; a killed study goes on there
    Returns a row for each seed, end, grid and eta: Frechet distance and KID of the classifier's features to those of
    the test split, classifier score, cost units of training and of sampling, the mean loss of the last 100 training
    steps, and seconds.
    """
    dataset, side, size, classifier_name = IMAGES[name]
    classifier = networks.load_classifier(classifier_name).to(device)
    weights = networks.classifier_card(classifier_name)["sha256"][f"classifier_{classifier_name}.safetensors"]
    shared = {"name": name, "size": size, "train_steps": train_steps, "batch_size": batch_size, "T": T, "n": n}
    shared |= {"grids": list(grids), "etas": list(etas), "classifier": weights}

    def compute(seed: int, end: float) -> dict:
        q = torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64)
        q[1] = end
        schedules.check(q, T)
        abar = schedules.abar(q, T)
        x0, _ = data.load(dataset, "train", side)
        bar, path = f"{name}, end {end:g}, seed {seed}: training", folder / f"{name}_{end:g}_{seed}.safetensors"
        options = {"steps": train_steps, "batch_size": batch_size, "seed": seed, "path": path, "bar": bar}
        state = train_denoiser(x0.to(device), abar, size, **options)
        reference = real_features(name, "test")
        network = state.ema.eval()
        sampler = fast(network, x0[:1]) if torch.device(device).type == "cpu" else network
        found = []
        for grid, eta in itertools.product(grids, etas):
            row = {"seed": seed, "end": end, "steps": grid, "eta": eta}
            options = {"n": n, "eta": eta, "seed": seed, "device": device, "force": force}
            row |= measure(sampler, abar, grid, side, classifier, reference, **options)
            found.append(row)
        loss = sum(state.losses[-100:]) / len(state.losses[-100:])
        return {"rows": found, "train_cost": state.cost, "final_loss": loss}

    rows = []
    for seed, end in itertools.product(range(first, first + seeds), ends):
        config = shared | {"seed": seed, "end": end}
        found = piece(folder / f"{name}_{end:g}_{seed}.json", config, lambda s=seed, e=end: compute(s, e))
        about = {key: found[key] for key in ("train_cost", "final_loss", "wall_s")}
        rows += [row | about for row in found["rows"]]
    return rows
