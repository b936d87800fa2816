"""Wrappers of a denoiser: a wrapped denoiser is again a denoiser, so samplers need no options."""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedules import per_sample


def x0_from_eps(x: Tensor, eps_hat: Tensor, abar_t: Tensor) -> Tensor:
    """x0_hat = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t); shapes (B, ...), abar_t () or (B,), positive."""
    a = per_sample(abar_t, x)
    return (x - (1 - a).sqrt().to(x.dtype) * eps_hat) / a.sqrt().to(x.dtype)


def eps_from_x0(denoise_x0: Callable[[Tensor, int | Tensor], Tensor], abar: Tensor) -> Callable:
    """A denoiser (predicting eps) from a network that predicts x_0: eps = (x_t - sqrt(abar) x0_hat)/sqrt(1 - abar).

    denoise_x0  callable (x, t) -> x0_hat, shapes (B, ...)
    abar        (T+1,)
    """

    def denoiser(x: Tensor, t: int | Tensor) -> Tensor:
        a = per_sample(abar[t], x)
        return (x - a.sqrt().to(x.dtype) * denoise_x0(x, t)) / (1 - a).sqrt().to(x.dtype)

    return denoiser


def clip_x0(denoiser: Callable[[Tensor, int | Tensor], Tensor], abar: Tensor, limit: float = 1.0) -> Callable:
    """A denoiser whose x0_hat stays in [-limit, limit]: eps_hat is recomputed from the clipped estimate.

    abar (T+1,). Exact for data in that range if the denoiser is; keeps an error of eps_hat from being amplified by
    1/sqrt(abar_t). (In diffusers: clip_sample with use_clipped_model_output.) No gradient where the clip acts.
    """

    def denoise_x0(x: Tensor, t: int | Tensor) -> Tensor:
        return x0_from_eps(x, denoiser(x, t), abar[t]).clamp(-limit, limit)

    return eps_from_x0(denoise_x0, abar)


class CostMeter:
    """A denoiser that counts what it costs, in units of one image through one forward pass.

    forward 1, backward into the weights 2, backward into the input 1, one forward-mode (jvp) tangent 1; each per image.
    What a backward costs is counted when it runs. Read or reset `cost`; `calls` counts network calls.
    """

    def __init__(self, denoiser: Callable[[Tensor, int | Tensor], Tensor]):
        self.denoiser, self.cost, self.calls = denoiser, 0, 0

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        eps_hat = self.denoiser(x, t)
        self.calls += 1
        self.cost += len(x) * (1 + _has_tangent(x, t))
        if eps_hat.requires_grad:
            weights = getattr(self.denoiser, "parameters", tuple)()
            backward = 2 * any(w.requires_grad for w in weights) + x.requires_grad

            def count(_: Tensor, images: int = len(x)) -> None:
                self.cost += images * backward

            eps_hat.register_hook(count)
        return eps_hat


def _has_tangent(*inputs: Tensor | int) -> bool:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return any(torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in tensors)
