"""Training: steps per second of `train_score` beside a bare forward, backward and AdamW step on the same network."""

import statistics
from collections.abc import Callable

import common
import torch

from bilevel_core import schedules
from bilevel_core.algorithms import ScoreTraining, train_score
from bilevel_core.lab.models import networks

T = 1000
BARE, OURS = "bare steps", "train_score"


def variants(size: str, args) -> dict[str, Callable[[], Callable[[], None]]]:
    """For each variant a function that prepares it, on its own copy of the network, and returns what is to be timed."""
    generator = torch.Generator().manual_seed(0)
    side = networks.SIZES[size]["side"]
    x0 = torch.rand(4 * args.batch, 1, side, side, generator=generator).to(args.device) * 2 - 1
    t = torch.randint(1, T + 1, (args.batch,), generator=generator).to(args.device)
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), T).to(args.device)
    networks.Denoiser(size).to(args.device)(x0[:2], 1).sum().backward()  # loads oneDNN or CUDA, no run's memory

    def bare() -> Callable[[], None]:
        denoiser = networks.Denoiser(size).to(args.device)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
        x_t, eps = torch.randn(2, *x0[: args.batch].shape, generator=generator).to(args.device)

        def steps() -> None:
            for _ in range(args.steps):
                optimizer.zero_grad()
                (denoiser(x_t, t) - eps).square().mean().backward()
                optimizer.step()

        return steps

    def ours() -> Callable[[], None]:
        state = ScoreTraining(networks.Denoiser(size).to(args.device), batch_size=args.batch)
        loop = train_score(state, x0, abar, steps=10**9)

        def steps() -> None:
            for _ in range(args.steps):
                next(loop)

        return steps

    return {BARE: bare, OURS: ours}


def main() -> None:
    parser = common.options(__doc__, batch=128, steps=3, steps_help="training steps in a run")
    args = common.parse(parser)
    if args.memory:
        size, variant = args.memory
        return common.print_memory(variants(size, args)[variant](), args.device)
    print(common.header(args, "training"))
    common.print_row("network", "variant", "steps/s", "ratio of time", "cost units/s", "MiB")
    for size in args.sizes:
        runs = {name: prepare() for name, prepare in variants(size, args).items()}
        seconds = common.interleave(runs, args.repeats, args.device)
        for name in runs:
            rate = args.steps / statistics.median(seconds[name])
            ratio, units = common.ratios(seconds[name], seconds[BARE]), f"{3 * args.batch * rate:,.0f}"
            common.print_row(size, name, f"{rate:.2f}", ratio, units, common.memory_of(args, size, name))


if __name__ == "__main__":
    main()
