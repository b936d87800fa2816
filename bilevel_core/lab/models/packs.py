"""The shipped networks as a page loads them: one file of safetensors for each live figure, in half precision.

Made from the shipped weights where they are needed and kept nowhere, so that the repository holds each network once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...seeds import derive_seed
from .. import distances
from . import captions, clip, level_model, networks

SHOWN = 64  # images that the figure of grids draws at once


def halved(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights in half precision under a prefix; counters are left out. ValueError for one that half cannot hold."""
    found = {f"{prefix}{name}": value.half() for name, value in state.items() if value.is_floating_point()}
    bad = [name for name, value in found.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{', '.join(bad)} hold numbers beyond half precision: ship them in float32")
    return found


def digits(prompts: Sequence[str]) -> bytes:
    """The text-to-digit denoiser, the picture side of the small CLIP, and its vector of each prompt (float32)."""
    from safetensors.torch import save

    model = clip.load()
    pictures = {name: value for name, value in model.state_dict().items() if name.startswith("visual.")}
    tensors = halved(networks.load_text_denoiser().state_dict(), "text_denoiser.") | halved(pictures, "clip.")
    with torch.no_grad():
        texts = model.encode_text(captions.encode(list(prompts)), normalize=True)
    tensors |= {f"text.{prompt}": text for prompt, text in zip(prompts, texts, strict=True)}
    return save({name: value.contiguous() for name, value in tensors.items()})


def levels() -> bytes:
    """The 8x8 denoiser that is told the level, the classifier, and what a grid is marked with (float32).

    "noise" (SHOWN, 64): x_T, the same for every grid. "reference.mean" (d,) and "reference.root" (d, d): of the
    features of MNIST's validation split, the root of their covariance with the ridge of `distances.frechet`.
    """
    from safetensors.torch import save

    tensors = halved(level_model.load().network.state_dict(), "level_denoiser.")
    tensors |= halved(networks.load_classifier("mnist8").state_dict(), "classifier.")
    mean, cov = distances.moments(networks.reference_features("mnist8", "val"))
    values, basis = torch.linalg.eigh(cov + 1e-6 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype))
    root = basis * values.clamp(min=0).sqrt() @ basis.T
    tensors |= {"reference.mean": mean.float(), "reference.root": root.float(), "noise": noise().flatten(1)}
    return save({name: value.contiguous() for name, value in tensors.items()})


def noise() -> Tensor:
    """x_T (SHOWN, 1, 8, 8), the same for every grid."""
    return torch.randn(SHOWN, 1, 8, 8, generator=torch.Generator().manual_seed(derive_seed("shown", 0)))
