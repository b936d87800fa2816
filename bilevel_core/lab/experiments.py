"""The experiments that chapters record: resumable by piece, each piece a JSON file with its configuration."""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import schedules
from ..algorithms import ScoreTraining, train_score
from ..guidance import CostMeter
from ..samplers import draw_x_T, sample_ddim, timesteps
from . import data, metrics, networks, runs
from .fast import fast
from .training import checkpointed

# name: data set, side, denoiser, classifier whose features measure
IMAGES = {
    "digits8": ("digits", 8, "tiny", "mnist8"),
    "mnist8": ("mnist", 8, "tiny", "mnist8"),
    "mnist28": ("mnist", 28, "mnist28", "mnist28"),
}


def piece(path: Path, config: dict, compute: Callable[[], dict]) -> dict:
    """compute(), or what it gave before if `path` holds it; written atomically with its configuration.

    Raises ValueError if the file was made with another configuration, naming what differs.
    """
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it to compute this piece again") from error
        if found["config"] != config:
            changed = [k for k in config if found["config"].get(k) != config[k]]
            raise ValueError(f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir")
        return found
    start = time.perf_counter()
    found = {"config": config} | compute()
    found["wall_s"] = round(time.perf_counter() - start, 1)
    runs.write_atomic(path, json.dumps(found).encode())
    return found


def kept(path: Path | None, config: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`piece` for tensors: compute(), or what it gave before if `path` (None: nowhere) holds it, checked and atomic."""
    if path is None or not path.exists():
        tensors = compute()
        if path is not None:
            runs.save_state(path, tensors, config)
        return tensors
    tensors, found = runs.load_state(path)
    changed = [key for key in config if found.get(key) != config[key]]
    if changed:
        raise ValueError(f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir")
    return tensors


@torch.no_grad()
def generate(
    denoiser: Callable,
    abar: Tensor,
    ts: list[int],
    n: int,
    side: int,
    *,
    eta: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n images (n, 1, side, side) by DDIM, in batches of 500; the same seed gives the same x_T at every grid."""
    images = []
    for start in range(0, n, 500):
        g = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        x = draw_x_T((min(500, n - start), 1, side, side), abar, generator=g, device=device)
        images.append(sample_ddim(denoiser, x, abar, ts, eta=eta, generator=g).clamp(-1, 1))
    return torch.cat(images)


def recipe(network: nn.Module, *, steps: int, batch_size: int, seed: int) -> ScoreTraining:
    """Algorithm 3 as all experiments train: AdamW 2e-3, warm-up, cosine decay to zero at `steps`, moving average."""
    warmup = min(200, steps // 5)
    options = {"lr": 2e-3, "warmup": warmup, "decay_steps": steps, "ema_decay": 0.995, "seed": seed}
    return ScoreTraining(network, batch_size=batch_size, **options)


def train_denoiser(
    x0: Tensor,
    abar: Tensor,
    size: str,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    path: Path,
    start: dict[str, Tensor] | None = None,
    bar: str | None = None,
) -> ScoreTraining:
    """`recipe` on images x0, resumable at `path`; weights begin at random, or as the state dict `start` has them."""
    network = networks.Denoiser(size, seed=seed).to(x0.device)
    if start is not None:
        network.load_state_dict(start)
    state = recipe(network, steps=steps, batch_size=batch_size, seed=seed)
    loop = train_score(state, x0, abar, steps=steps)
    for _ in checkpointed(loop, state, path, steps=steps, every=200, bar=bar):
        pass
    return state


def real_features(name: str, split: str) -> Tensor:
    """Features (m, d), float64 on the CPU, of a split of IMAGES[name] by its classifier; MNIST's are shipped."""
    dataset, side, _, classifier = IMAGES[name]
    if dataset == "mnist":
        return networks.reference_features(classifier, split)
    return networks.load_classifier(classifier).features(data.load(dataset, split, side)[0]).double()


def measure(
    sampler: Callable,
    abar: Tensor,
    steps: int | list[int],
    side: int,
    classifier: networks._Classifier,
    reference: Tensor,
    *,
    n: int,
    eta: float = 0.0,
    seed: int,
    device: torch.device | str = "cpu",
    force: bool = False,
    subsets: int = 100,
) -> dict[str, float]:
    """What n samples of `generate` in so many DDIM steps are worth, against the features (m, d) of real images.

    steps  their number, or the times themselves, falling
    Returns "frechet" and "kid" (over so many subsets) of the classifier's features, the classifier's "score", and the
    "cost" of sampling in image forwards. force=True allows too few samples for a distance, which then means nothing.
    """
    meter = CostMeter(sampler)
    ts = timesteps(len(abar) - 1, steps) if isinstance(steps, int) else steps
    images = generate(meter, abar, ts, n, side, eta=eta, seed=seed, device=device)
    with torch.no_grad():
        features = torch.cat([classifier.features(x) for x in images.split(1000)])
        logits = classifier.head(features).cpu()
    features = features.double().cpu()
    return {
        "cost": meter.cost,
        "frechet": metrics.frechet(features, reference, force=force),
        "kid": metrics.kid(features, reference, subsets=subsets, seed=seed)[0],
        "score": metrics.classifier_score(logits),
    }


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
    device: torch.device | str = "cpu",
    force: bool = False,
) -> list[dict]:
    """Quality of samples against the schedule's end, the number of DDIM steps and eta; a denoiser per end and seed.

    name   one of IMAGES
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
    for seed, end in itertools.product(range(seeds), ends):
        config = shared | {"seed": seed, "end": end}
        found = piece(folder / f"{name}_{end:g}_{seed}.json", config, lambda s=seed, e=end: compute(s, e))
        about = {key: found[key] for key in ("train_cost", "final_loss", "wall_s")}
        rows += [row | about for row in found["rows"]]
    return rows
