"""What the studies on images share: the data sets, Algorithm 3's recipe, sampling, and how samples are measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import schedules
from ...algorithms import ScoreTraining, train_score
from ...guidance import CostMeter, LevelDenoiser
from ...samplers import draw_x_T, sample_ddim, timesteps
from ...seeds import derive_seed
from .. import data, distances, metrics
from ..models import graphs, networks
from ..models.fast import fast
from ..training import checkpointed

# name: data set, side, denoiser, classifier whose features measure
IMAGES = {
    "digits8": ("digits", 8, "tiny", "mnist8"),
    "mnist8": ("mnist", 8, "tiny", "mnist8"),
    "mnist28": ("mnist", 28, "mnist28", "mnist28"),
    "mnist28_folded": ("mnist", 28, "mnist28_folded", "mnist28"),
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
        g = torch.Generator(device).manual_seed(derive_seed("generate", seed, start))
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
    scale: schedules.Scale | None = None,
    **options: float,
) -> ScoreTraining:
    """`recipe` on images x0, resumable at `path`; weights begin at random, or as the state dict `start` has them.

    scale  None: a network that is told t. Or on which it is told the level of abar_t, as a `LevelDenoiser`
    options   of `networks.Denoiser`, such as stretch and jitter
    """
    told = "t" if scale is None else scale.name
    network = networks.Denoiser(size, told=told, seed=seed, **options).to(x0.device)
    if scale is not None:
        network = LevelDenoiser(network, abar.to(x0.device), scale)
    if start is not None:
        network.load_state_dict(start)
    state = recipe(network, steps=steps, batch_size=batch_size, seed=seed)
    loop = train_score(state, x0, abar, steps=steps)
    with graphs.training(network, (batch_size, *x0.shape[1:])):
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


class Setting:
    """A data set of IMAGES and what measures samples of it, loaded when first asked for; its subclass gives both names.

    name    one of IMAGES;  device: where images and networks lie
    """

    name: str
    device: torch.device | str

    @cached_property
    def x0(self) -> Tensor:
        """The training images (n, 1, side, side)."""
        dataset, side, *_ = IMAGES[self.name]
        return data.load(dataset, "train", side)[0].to(self.device)

    @property
    def side(self) -> int:
        return IMAGES[self.name][1]

    @property
    def size(self) -> str:
        """Of the denoiser: see `networks.Denoiser`."""
        return IMAGES[self.name][2]

    @cached_property
    def classifier(self) -> networks._Classifier:
        """Whose features measure distances."""
        return networks.load_classifier(IMAGES[self.name][3]).to(self.device)

    @property
    def classifier_hash(self) -> str:
        """SHA-256 of its weights."""
        name = IMAGES[self.name][3]
        return networks.classifier_card(name)["sha256"][f"classifier_{name}.safetensors"]

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the validation split's features."""
        return distances.moments(real_features(self.name, "val").to(self.device))

    def quality(self, images: Tensor) -> Tensor:
        """Frechet distance (), float64, of samples, clamped, to the validation split; differentiable."""
        return distances.frechet(distances.moments(self.classifier.features(images.clamp(-1, 1))), self.reference)

    def sampler(self, network: nn.Module) -> Callable:
        """The network as `measure` wants it: on a CPU a faster copy, on CUDA recorded for the batches of `generate`."""
        if torch.device(self.device).type == "cpu":
            return fast(network, self.x0[:1])
        return graphs.sampling(network, self.x0.new_zeros(500, *self.x0.shape[1:]))

    def mark(
        self, sampler: Callable, abar: Tensor, steps: int | list[int], split: str, **options: object
    ) -> dict[str, float]:
        """`measure` against a split, from N(0, I) whatever abar_T; KID over 20 subsets, a fifth of the usual time."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = real_features(self.name, split)
            options = {"device": self.device, "subsets": 20, **options}
            return measure(sampler, abar, steps, self.side, self.classifier, reference, **options)


def training_end(state: ScoreTraining) -> dict[str, float]:
    """What a training cost, "train_cost", and the mean "loss" of its last 100 steps."""
    return {"train_cost": state.cost, "loss": sum(state.losses[-100:]) / len(state.losses[-100:])}


def same_protocol(found: Mapping[str, object], own: Mapping[str, object], remedy: str) -> None:
    """Raises ValueError, naming what differs, if a recorded result was made by another protocol than the code's own."""
    changed = [key for key, value in own.items() if found.get(key) != value]
    if changed:
        raise ValueError(f"the result was made by another protocol ({', '.join(changed)}): {remedy}")
