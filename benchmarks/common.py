"""What the benchmarks share: options, interleaved timing, peak memory in a fresh process, and the table."""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bilevel_core.lab import parameters, results
from bilevel_core.lab.models import networks

COST_UNIT = """cost unit: one image through one network forward = 1; its backward into the weights 2, into the input 1;
           one forward-mode (jvp) tangent 1. A sampling step costs 1 an image, a training step 3."""


def options(description: str, *, batch: int, steps: int, steps_help: str) -> argparse.ArgumentParser:
    """The options of every script; `--memory SIZE VARIANT` is how they call themselves."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["mnist28", "small", "tiny"], choices=networks.SIZES)
    parser.add_argument("--batch", type=int, default=batch, help="images in a batch")
    parser.add_argument("--steps", type=int, default=steps, help=steps_help)
    parser.add_argument("--repeats", type=int, default=5, help="times that every variant is measured, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    for name in ("batch", "steps", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    args.device = parameters.choose_device(args.device)
    torch.set_num_threads(args.threads)
    return args


def header(args: argparse.Namespace, title: str) -> str:
    machine = results.hardware()
    where = machine["gpu"] if args.device.type == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{title}\n"
        f"hardware:  {where} ({machine['platform']}); device {args.device.type}, {args.threads} threads\n"
        f"software:  torch {torch.__version__}, Python {sys.version.split()[0]}\n"
        f"sizes:     batch {args.batch}, {args.steps} steps a run, {args.repeats} repeats of all variants in turn\n"
        f"{COST_UNIT}\n"
        "ratio:     to the first variant within the same repeat: median [smallest, largest]\n"
        "memory:    peak above the loaded network, in a fresh process\n"
    )


def interleave(variants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times in turn (A B C, B C A, ...), after one run each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for run in variants.values():
        run()
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            synchronise(device)
            start = time.perf_counter()
            variants[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Sequence[float], base: Sequence[float]) -> str:
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_of(args: argparse.Namespace, size: str, variant: str) -> str:
    """MiB that a run of one variant takes above the loaded network, measured in a fresh process."""
    command = [sys.executable, sys.argv[0], "--memory", size, variant, "--device", args.device.type]
    command += [text for name in ("batch", "steps", "threads") for text in (f"--{name}", str(getattr(args, name)))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def print_memory(run: Callable[[], object], device: torch.device) -> None:
    """In that fresh process: prints the MiB by which `run` raises the peak."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        print(round((torch.cuda.max_memory_allocated(device) - before) / 2**20))
        return
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset.exists():
        reset.write_text("5")  # Linux: the peak starts again from what is in use now
    before = _peak_mib(status)
    run()
    print(round(_peak_mib(status) - before))


def _peak_mib(status: Path) -> float:
    if status.exists():  # not ru_maxrss, which on Linux starts from the parent's
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def print_row(*cells: str, widths: Sequence[int] = (14, 14, 9, 19, 12, 6)) -> None:
    """One line of the table, at once; the first two columns to the left."""
    padded = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(cells, widths, strict=True))]
    print("  ".join(padded).rstrip(), flush=True)
