"""A denoiser's kernels recorded as CUDA graphs: small networks spend most of their time on launching kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...algorithms import in_mode

FAR = 1e-2  # of the largest value: how far a recording may be from the network before it is not used


@contextmanager
def training(network: nn.Module, shape: tuple[int, ...]) -> Iterator[bool]:
    """Within it, calls network(x, t) with x of `shape` and t (B,), as `train_score` makes, replay a recording.

    Forward and backward are those of the network itself, whose weights may change in place; other calls, such as those
    that want a gradient in x, go to it as before. On a CPU, and where recording fails or gives other numbers (a warning
    says so), nothing is changed. Yields whether there is a recording.
    """
    device = next(network.parameters()).device
    done = False
    if _records(device):
        try:
            with in_mode(True, network):  # as `train_score` calls it
                _record(network, shape, device)
            done = True
        except Exception as error:  # whatever this network, torch or driver does not allow
            warnings.warn(f"no CUDA graph of the training step ({error}): it runs as it is", stacklevel=3)
            vars(network).pop("forward", None)
    try:
        yield done
    finally:
        vars(network).pop("forward", None)


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _record(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=g, device=device)
    t = torch.randint(1, 100, shape[:1], generator=g, device=device)
    plain, weights = network.forward, [w for w in network.parameters() if w.requires_grad]

    def gradients() -> list[Tensor]:
        output = network(x, t)
        return [output.detach().clone(), *(v.clone() for v in torch.autograd.grad(output.square().mean(), weights))]

    before = gradients()
    torch.cuda.make_graphed_callables(network, (torch.empty_like(x), torch.ones_like(t)))
    recorded = network.forward

    def forward(x: Tensor, t: int | Tensor) -> Tensor:
        same = isinstance(t, Tensor) and x.shape == shape and t.shape == shape[:1]
        same = same and torch.is_grad_enabled() and not x.requires_grad
        return (recorded if same else plain)(x, t)

    network.forward = forward
    _compare(gradients(), before)


def sampling(network: nn.Module, x: Tensor) -> Callable[[Tensor, int | Tensor], Tensor]:
    """A denoiser equal to `network` that replays a recording for inputs of the shape of x, without gradients.

    Weights are those of the network, also after they change in place. Other shapes, and calls that want derivatives,
    go to the network; where there is no CUDA, or recording fails (a warning says so), all do.
    """
    if not _records(x.device):
        return network
    try:
        return _sampling(network, x)
    except Exception as error:
        warnings.warn(f"no CUDA graph of the denoiser ({error}): it runs as it is", stacklevel=2)
        return network


def _sampling(network: nn.Module, x: Tensor) -> Callable[[Tensor, int | Tensor], Tensor]:
    here, t = torch.randn_like(x), torch.ones(len(x), dtype=torch.long, device=x.device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                network(here, t)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            output = network(here, t)

    def recorded(x: Tensor, at: int | Tensor) -> Tensor:
        tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
        if x.shape != here.shape or torch.is_grad_enabled() or tangent is not None:
            return network(x, at)
        here.copy_(x)
        t.copy_(at) if isinstance(at, Tensor) else t.fill_(at)
        graph.replay()
        return output.clone()

    recorded.passes = getattr(network, "passes", 1)
    with torch.no_grad():
        probe = torch.randn_like(x)
        _compare([recorded(probe, 7)], [network(probe, 7)])
    return recorded


def _compare(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        gap = (a - b).abs().max() / b.abs().max().clamp(min=1e-12)
        if not gap < FAR:
            raise RuntimeError(f"the recording is off by {gap:.1e} of the largest value")
