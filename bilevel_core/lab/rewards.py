"""Lower-level rewards of images (B, 1, 28, 28) in [-1, 1]: callables to (B,), differentiable in the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import captions

Reward = Callable[[Tensor], Tensor]


def ink(images: Tensor) -> Tensor:
    """Mean ink, (B,), from 0 for an empty image to 1 for a full one."""
    return (_checked(images) + 1).mean((1, 2, 3)) / 2


def boldness(images: Tensor) -> Tensor:
    """Stroke width in pixels, (B,): `captions.thickness`."""
    return captions.thickness(_checked(images))


class RandomResNet(nn.Module):
    """A ResNet-18 with a random scalar head, the lower-level reward of the released code's fine-tuning.

    Here every weight is random (`weights=None`), the network is in eval mode and frozen, the grey channel enters three
    times, and images are resized to `size` x `size` pixels by bilinear interpolation. Such a reward is smooth and
    reproducible but says nothing about beauty: it stands in for an aesthetic model, and `ink` and `boldness` are the
    ones to interpret. Its scale is arbitrary, so use it `standardised`.

    seed  of the weights; torch's global generator is left as it was
    size  side of the resized images, at least 28
    """

    def __init__(self, seed: int = 0, size: int = 64) -> None:
        super().__init__()
        if size < 28:
            raise ValueError(f"size = {size} is smaller than the images: take at least 28")
        from torchvision.models import resnet18

        self.size = size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = resnet18(weights=None, num_classes=1)
        self.network.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B,) of images (B, 1, H, W)."""
        x = functional.interpolate(_checked(images), (self.size, self.size), mode="bilinear", align_corners=False)
        return self.network(x.expand(-1, 3, -1, -1))[:, 0]


@dataclass(frozen=True)
class Standardised:
    """(reward - mean) / sd: a reward of mean 0 and standard deviation 1 under p_0; see `standardised`."""

    reward: Reward
    mean: float
    sd: float

    def __call__(self, images: Tensor) -> Tensor:
        return (self.reward(images) - self.mean) / self.sd


@torch.no_grad()
def standardised(reward: Reward, samples: Tensor, *, batch: int = 500) -> Standardised:
    """`reward` in units of its standard deviation under p_0, so that one lambda means the same for every reward.

    samples  (n, 1, 28, 28) of p_0, n >= 100
    Raises ValueError for too few samples, and for a reward that is constant or not finite on them.
    """
    if len(samples) < 100:
        raise ValueError(f"n = {len(samples)} samples are too few for a standard deviation: take at least 100")
    return Standardised(reward, *scale(torch.cat([reward(part) for part in samples.split(batch)])))


def scale(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a reward's values (n,); raises ValueError where it is constant or not finite."""
    values = values.double()
    if not values.isfinite().all():
        raise ValueError(f"the reward is not finite for {(~values.isfinite()).sum()} of {len(values)} samples")
    mean, sd = values.mean().item(), values.std().item()
    if sd <= 1e-6 * max(abs(mean), 1e-6):
        raise ValueError(f"the reward is {mean:g} for every sample, so it has no scale; check it")
    return mean, sd


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (B, 1, H, W)")
    return images
