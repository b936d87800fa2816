"""Guided sampling: a chain steered by `LookAhead` over as many bare forwards with their input-backwards."""

import statistics
from collections.abc import Callable

import common
import torch

from bilevel_core import guidance, samplers, schedules
from bilevel_core.lab.models import networks

T = 1000
BARE, OURS, MICRO, CHECKPOINT = "bare pairs", "LookAhead", "... micro-batch", "... checkpoint"


def ink(x0: torch.Tensor) -> torch.Tensor:
    """The mean of the pixels, a reward that costs next to nothing."""
    return x0.mean((1, 2, 3))


def variants(size: str, args) -> dict[str, Callable[[], torch.Tensor]]:
    """What is to be timed by name; all but the first return x_0."""
    denoiser = networks.Denoiser(size).eval().to(args.device).requires_grad_(False)
    abar, ts = schedules.abar(torch.tensor((0.0, 0.96, 1.0, 0.008)).double(), T), samplers.timesteps(T, args.steps)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(args.batch, 1, denoiser.side, denoiser.side, generator=generator).to(args.device)

    def bare() -> torch.Tensor:
        x = x_T.clone().requires_grad_()
        for t in ts:
            (grad,) = torch.autograd.grad(denoiser(x, t).sum(), x)
        return grad

    def guided(**options) -> Callable[[], torch.Tensor]:
        guide = guidance.LookAhead(denoiser, ink, 0.01, abar, ts, guide_last=True, **options)

        @torch.no_grad()
        def run() -> torch.Tensor:
            return samplers.sample_ddim(guide, x_T, abar, ts)

        return run

    x = x_T[:2].clone().requires_grad_()  # oneDNN and CUDA load themselves at the first call, which is no run's memory
    torch.autograd.grad(denoiser(x, 1).sum(), x)
    part = max(1, args.batch // 4)
    return {BARE: bare, OURS: guided(), MICRO: guided(micro_batch=part), CHECKPOINT: guided(checkpoint=True)}


def main() -> None:
    args = common.parse(common.options(__doc__, batch=32, steps=5, steps_help="guided steps of a run"))
    if args.memory:
        size, variant = args.memory
        return common.print_memory(variants(size, args)[variant], args.device)
    print(common.header(args, "guidance"))
    print("a bare pair is a forward and its backward into the input: cost 2; micro-batch: a quarter of the batch\n")
    common.print_row("network", "variant", "ms a step", "ratio", "cost units/s", "MiB")
    for size in args.sizes:
        runs = variants(size, args)
        x0 = {name: run() for name, run in runs.items()}
        for name in (MICRO, CHECKPOINT):  # they may change the memory, not the samples
            torch.testing.assert_close(x0[name], x0[OURS], atol=1e-3 * float(x0[OURS].abs().max()), rtol=0)
        seconds = common.interleave(runs, args.repeats, args.device)
        for name in runs:
            per_step = statistics.median(seconds[name]) / args.steps
            units = f"{(3 if name == CHECKPOINT else 2) * args.batch / per_step:,.0f}"
            ratio, memory = common.ratios(seconds[name], seconds[BARE]), common.memory_of(args, size, name)
            common.print_row(size, name, f"{per_step * 1e3:.1f}", ratio, units, memory)


if __name__ == "__main__":
    main()
