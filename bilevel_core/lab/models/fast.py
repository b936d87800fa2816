"""The same denoiser, faster on a CPU, for sampling: its operations recorded, weights frozen in, channels last."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def fast(denoiser: nn.Module, example_x: Tensor, *given: Tensor) -> Callable[..., Tensor]:
    """A denoiser equal to `denoiser` to float32 rounding, in 0.6 to 0.9 of its time on a CPU (see `make bench`).

    denoiser   network in eval mode, called as denoiser(x, t) with t an int or (B,) int64, or with a level () or (B,);
               it is left as it is
    example_x  (B, ...) any input on the network's device; the batch size may differ later
    given      what else a conditional network is called with, such as the token ids (1, L) of a caption
    Weights (and a schedule inside the network) are copied as they are now: call `fast` again after they change. Where
    derivatives are wanted (no torch.no_grad, or a forward-mode tangent) the call goes to `denoiser` itself. Recording
    takes about a second. Where it is not possible, or the device is not a CPU, a warning says so and `denoiser` is
    returned. Raises ValueError for a network in training mode.
    """
    if denoiser.training:
        raise ValueError("the denoiser is in training mode; call denoiser.eval() before fast(denoiser, x)")
    if example_x.device.type != "cpu":
        warnings.warn(f"fast() helps on a CPU, not on {example_x.device}: the denoiser is used unchanged", stacklevel=2)
        return denoiser
    try:
        frozen = _freeze(denoiser, example_x, *given)
    except Exception as error:  # whatever this network, or this version of torch, does not allow
        warnings.warn(f"the denoiser cannot be traced, so it is used unchanged ({error})", stacklevel=2)
        return denoiser

    def fast_denoiser(x: Tensor, t: int | Tensor, *given: Tensor) -> Tensor:
        tangents = (torch.autograd.forward_ad.unpack_dual(v).tangent for v in (x, t) if isinstance(v, Tensor))
        if torch.is_grad_enabled() or any(tangent is not None for tangent in tangents):
            return denoiser(x, t, *given)
        return frozen(x, torch.as_tensor(t).reshape(-1), *given)

    fast_denoiser.passes = getattr(denoiser, "passes", 1)
    return fast_denoiser


def _freeze(denoiser: nn.Module, x: Tensor, *given: Tensor) -> torch.jit.ScriptModule:
    """The recorded operations of `denoiser` with its weights as constants, laid out for oneDNN's convolutions."""
    network = copy.deepcopy(denoiser).requires_grad_(False).to(memory_format=torch.channels_last)
    x, t = torch.zeros(2, *x.shape[1:], dtype=x.dtype), torch.tensor([1])  # t is broadcast: () or one for each image
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # shape checks become constants; torch.jit is no longer developed
        frozen = torch.jit.freeze(torch.jit.trace(network, (x, t, *given), check_trace=False))
        for _ in range(2):  # the first calls are the ones that optimise
            frozen(x, t, *given)
    return frozen
