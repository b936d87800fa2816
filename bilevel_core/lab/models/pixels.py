"""What every reward and every measure asks of its images: shape, dtype and range, said once."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def checked(images: Tensor, *channels: int, side: int | None = None, bounded: bool = False) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], as float32 or float64: half precision would round a reward to three digits.

    channels  the admissible C, none: any;  side: the admissible H = W, None: any
    bounded   refuses what lies outside [-1, 1]. An x0_hat of guidance may leave it, so the default refuses only what
              must be of another convention: integers, or bytes made float
    Warns of what may be in [0, 1], unless a gradient is wanted: of an x0_hat that says nothing. One pass over the
    pixels. Raises TypeError for no tensor, ValueError for a wrong shape, dtype or range and for NaN or infinity.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images are {type(images).__name__}, not a tensor (B, C, H, W): use torch.as_tensor")
    shape, wanted = tuple(images.shape), " or ".join(map(str, channels)) or "C"
    if images.ndim != 4 or (channels and shape[1] not in channels) or 0 in shape[1:]:
        last = images.ndim == 4 and shape[3] in channels
        hint = ": channels come second, images.permute(0, 3, 1, 2)" if last else ""
        raise ValueError(f"images have shape {shape}, not (B, {wanted}, H, W){hint}")
    if side and shape[2:] != (side, side):
        raise ValueError(f"images have shape {shape}, not (B, {wanted}, {side}, {side})")
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: make them float in [-1, 1], by images / 127.5 - 1 if they are bytes"
        )
    images = images if images.dtype == torch.float64 else images.float()
    if not len(images):
        return images
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~images.isfinite()).flatten(1).any(1).sum()
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity: look at what made them")
    if (bounded and not -1.001 <= low <= high <= 1.001) or (low >= 0 and high > 2):
        raise ValueError(
            f"images lie in [{low:.3g}, {high:.3g}], not in [-1, 1]: clamp them, or take images / 127.5 - 1 of bytes"
        )
    if low >= 0 and high > 0 and not (torch.is_grad_enabled() and images.requires_grad):
        warnings.warn("no pixel is below 0: if these images are in [0, 1], pass 2 * images - 1", stacklevel=3)
    return images


def unit(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as (B, 3, H, W) in [0, 1]; a grey channel enters three times."""
    return ((checked(images, 1, 3, bounded=True) + 1) / 2).expand(-1, 3, -1, -1)
