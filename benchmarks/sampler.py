"""Sampling: an N-step DDIM run of this package over N bare forwards, beside diffusers' loop on the same network."""

import statistics
import time
from collections.abc import Callable

import common
import torch
from torch.nn import functional

from bilevel_core import samplers, schedules
from bilevel_core.lab.models import adapters, networks
from bilevel_core.lab.models.fast import fast

T = 1000
BARE, OURS, DIFFUSERS, FAST, COMPILED = "bare forwards", "sample_ddim", "diffusers loop", "... fast", "... compiled"


def variants(size: str, args) -> dict[str, Callable[[], Callable[[], torch.Tensor]]]:
    """For each variant a function that prepares it and returns what is to be timed, which returns x_0."""
    denoiser = networks.Denoiser(size).eval().to(args.device)
    q = torch.tensor((0.0, 0.96, 1.0, 0.008), dtype=torch.float64)  # abar_T = 4e-3: rounding is not blown up
    abar, ts = schedules.abar(q, T), samplers.timesteps(T, args.steps)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(args.batch, 1, denoiser.side, denoiser.side, generator=generator).to(args.device)
    denoiser(x_T[:2], 1)  # oneDNN and CUDA load themselves at the first call, which is no run's memory

    def ours(network: Callable) -> Callable[[], torch.Tensor]:
        return lambda: samplers.sample_ddim(network, x_T, abar, ts)

    def bare() -> torch.Tensor:
        for t in ts:
            denoiser(x_T, t)
        return x_T

    def diffusers() -> Callable[[], torch.Tensor]:
        scheduler = adapters.to_diffusers(abar)

        def loop() -> torch.Tensor:
            scheduler.set_timesteps(args.steps)
            x = functional.pixel_unshuffle(x_T, denoiser.fold)
            for t in scheduler.timesteps:
                x = scheduler.step(denoiser.unet(x, t).sample, t, x).prev_sample
            return functional.pixel_shuffle(x, denoiser.fold)

        return loop

    found = {BARE: lambda: bare, OURS: lambda: ours(denoiser), DIFFUSERS: diffusers}
    if args.device.type == "cpu":
        found[FAST] = lambda: ours(fast(denoiser, x_T))
    if args.compile:
        found[COMPILED] = lambda: ours(torch.compile(denoiser))
    return found


@torch.no_grad()
def main() -> None:
    parser = common.options(__doc__, batch=64, steps=10, steps_help="DDIM steps N of a run")
    parser.add_argument("--compile", action="store_true", help="a row for torch.compile, which takes minutes")
    args = common.parse(parser)
    if args.memory:
        size, variant = args.memory
        run = variants(size, args)[variant]()
        return common.print_memory(run, args.device)
    print(common.header(args, "sampling"))
    common.print_row("network", "variant", "ms a step", "ratio", "cost units/s", "MiB")
    notes = []
    for size in args.sizes:
        runs = {}
        for name, prepare in variants(size, args).items():
            start = time.perf_counter()
            runs[name] = prepare()
            x0 = runs[name]()
            if name in (FAST, COMPILED):
                notes.append(f"{size}, {name.strip('. ')}: ready, first run included, in {_since(start)} s")
            if name == OURS:
                expected = x0
            elif name != BARE:  # the same samples, or the comparison means nothing
                torch.testing.assert_close(x0, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)
        seconds = common.interleave(runs, args.repeats, args.device)
        for name in runs:
            per_step = statistics.median(seconds[name]) / args.steps
            memory = "" if name == COMPILED else common.memory_of(args, size, name)
            ratio, units = common.ratios(seconds[name], seconds[BARE]), f"{args.batch / per_step:,.0f}"
            common.print_row(size, name, f"{per_step * 1e3:.1f}", ratio, units, memory)
    print("\n" + "\n".join(notes))


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f}"


if __name__ == "__main__":
    main()
