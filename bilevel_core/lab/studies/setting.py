"""What the studies on images share: the data sets, Algorithm 3's recipe, sampling, and how samples are measured."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...algorithms import ScoreTraining, train_score
from ...guidance import CostMeter
from ...samplers import draw_x_T, sample_ddim, timesteps
from .. import data, metrics
from ..models import networks
from ..training import checkpointed

# name: data set, side, denoiser, classifier whose features measure
IMAGES = {
    "digits8": ("digits", 8, "tiny", "mnist8"),
    "mnist8": ("mnist", 8, "tiny", "mnist8"),
    "mnist28": ("mnist", 28, "mnist28", "mnist28"),
}


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
