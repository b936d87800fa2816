"""What a guided step of Stable Diffusion takes: counted without any memory, or measured at full size.

`python -m bilevel_core.lab.studies.memory --side 256` measures one setting in a process of its own, printed as JSON.
Weights are random, which changes neither time nor memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .. import parameters
from ..files import piece
from ..models import networks, pipelines

GIB = 2**30

# What chapter 8 counts, and of it what a CPU with 16 GiB can run in minutes: (options, measured there)
FULL = {"side": 512, "dtype": "float16"}
SETTINGS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({**FULL, "dtype": "float32", "checkpoint": False}, False),
    ({**FULL, "dtype": "float32"}, False),
    ({**FULL, "checkpoint": False}, False),
    ({**FULL}, False),
    ({**FULL, "block_checkpoint": True}, False),
    ({**FULL, "rows": 4, "micro_batch": 4}, False),
    ({**FULL, "rows": 4, "micro_batch": 1}, False),
    ({**FULL, "side": 768, "block_checkpoint": True}, False),
    ({**FULL, "dtype": "float32", "block_checkpoint": True}, True),
    ({"side": 256, "dtype": "float32", "checkpoint": False}, True),
    ({"side": 256, "dtype": "float32"}, True),
    ({"side": 256, "dtype": "float32", "block_checkpoint": True}, True),
    ({"side": 256, "dtype": "bfloat16"}, True),
)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on: `now`, and `peak`, the most at any time.

    It sees tensors as the program does: what kernels use inside, and what an allocator loses, is not counted. Works on
    fake tensors, which have shapes and no memory.
    given  tensors that are there already, such as weights: views of them are not counted
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
        return output

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def remedies() -> Iterator[None]:
    """Turns torch's errors of a full memory into a MemoryError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise MemoryError(
                f"the memory is full ({' '.join(str(error).split())[:160]}). What was finished is kept; go on with "
                "dtype = 'float16', micro_batch = 1, block_checkpoint = True, offload = True, or a smaller side"
            ) from error
        raise


def check_fits(needed: float, device: torch.device | str) -> float:
    """GiB free on a device; MemoryError, saying what to change, if fewer than `needed`."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / GIB
    else:
        import psutil

        free = psutil.virtual_memory().available / GIB
    if needed > free:
        raise MemoryError(
            f"a guided step needs about {needed:.1f} GiB and {free:.1f} are free on {device}: dtype = 'float16', "
            "micro_batch = 1, checkpoint = True and block_checkpoint = True need least, then a smaller side"
        )
    return free


def counted(size: str = "sd15", **options: Any) -> dict[str, float]:
    """GiB of one guided step by PeakMemory on fake tensors: "weights", "step" (above them) and "peak", their sum.

    options  as for `_set_up`, without device. Raises ValueError for a setting that `pipelines.load` refuses.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights, step = _set_up(size, mode, **options)
    with mode, PeakMemory(weights) as memory:
        step()
    return _report(weights, memory.peak)


def measured(
    size: str | pipelines.LatentChain = "sd15",
    *,
    device: torch.device | str = "cpu",
    repeats: int = 1,
    **options: Any,
) -> dict[str, float]:
    """As `counted`, but run: "seconds" of a guided and "plain" of an unguided step, and "peak" as the system saw it.

    size  a chain of `pipelines.load` on that device takes the steps itself; of the options it knows rows and reward
    On CUDA the peak is what torch's allocator held at most during the steps, elsewhere that of the whole process since
    its start.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    mode = device if on_gpu else nullcontext()  # a billion random numbers, where they are drawn fastest
    weights, step = _set_up(size, mode, device=device, **options)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    timed = {"plain": [], "seconds": []}
    for _ in range(repeats):
        for name, guided in (("plain", False), ("seconds", True)):
            _wait(device)
            start = time.perf_counter()
            step(guided)
            _wait(device)
            timed[name].append(time.perf_counter() - start)
    found = {name: statistics.median(values) for name, values in timed.items()}
    return _report(weights, 0) | found | {"peak": _peak_bytes(device) / GIB}


def survey(
    folder: Path, device: torch.device | str = "cpu", settings: Sequence[tuple[dict[str, Any], bool]] = SETTINGS
) -> list[dict[str, Any]]:
    """A row for each setting: its options, what `counted` says, and what `measured` says, each in a new process, where
    the setting is marked or the device is no CPU. Kept in `folder`, setting by setting."""
    rows = []
    for options, here in settings:

        def compute(options: dict = options, here: bool = here) -> dict[str, Any]:
            found: dict[str, Any] = {"counted": counted(**options), "measured": None}
            if here or torch.device(device).type != "cpu":
                command = [sys.executable, "-m", "bilevel_core.lab.studies.memory", "--device", str(device)]
                for name, value in options.items():
                    flag = name.replace("_", "-")
                    on = ["--" + flag] if value else ["--no-" + flag]
                    command += on if isinstance(value, bool) else ["--" + flag, str(value)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"measuring {options} failed: {done.stderr[-500:]}")
                found["measured"] = json.loads(done.stdout.splitlines()[-1])
            return found

        name = "_".join(f"{key}-{value}" for key, value in options.items())
        found = piece(folder / f"memory_{name}.json", {"options": options, "device": str(device)}, compute)
        rows.append(options | {key: found[key] for key in ("counted", "measured")})
    return rows


def _set_up(
    size: str | pipelines.LatentChain,
    mode: AbstractContextManager,
    *,
    side: int = 512,
    dtype: str = "float32",
    rows: int = 1,
    scale: float = 7.5,
    reward: str | None = "ViT-B-16",
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[list[Tensor], Callable]:
    """The weights of a random model, or a chain's, with a function that takes one guided step of `rows` samples.

    reward   name of an open_clip model whose image embedding is the reward, None: the mean pixel
    options  of `pipelines.load`: micro_batch, checkpoint, block_checkpoint, slicing, offload
    """
    if isinstance(size, str):
        pipe = pipelines.random_pipeline(size, dtype=dtype, mode=mode)
        chain = pipelines.load(pipe, device=device, dtype=dtype, side=side, scale=scale, **options)
        owned = [pipe.unet, pipe.vae, pipe.text_encoder]
    else:
        chain, scale, owned = size, size.scale, [size.denoiser, size.vae]
    tower, score = None, lambda images: images.mean((1, 2, 3))
    if reward:
        import open_clip

        with mode, torch.device(device):
            tower = open_clip.model.CLIP(**open_clip.get_model_config(reward)).visual.eval().requires_grad_(False)
        shape = (tower.image_size[0],) * 2

        def score(images: Tensor) -> Tensor:
            resized = torch.nn.functional.interpolate(images, shape, mode="bicubic", antialias=True)
            return tower(resized).mean(1)

    weights = [weight for network in (*owned, *([tower] if tower else [])) for weight in network.parameters()]

    @torch.no_grad()
    def step(guided: bool = True) -> None:
        text = torch.zeros(1, 77, chain.denoiser.unet.config.cross_attention_dim, device=device)
        denoiser = networks.Prompted(chain.denoiser, text, scale, text)
        x = torch.randn(rows, *chain.shape, device=device)
        guide = chain.guide(denoiser, score, 1.0)
        guide.potential = lambda x0: score(chain.decode(x0))  # no check of values, which fake tensors do not have
        guide.look(x, chain.ts[0], guided) if guided else denoiser(x, chain.ts[0])

    return weights, step


def _report(weights: list[Tensor], peak: int) -> dict[str, float]:
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"weights": size / GIB, "step": peak / GIB, "peak": (size + peak) / GIB}


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told: an accelerator computes behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which on Linux starts from the parent's
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=pipelines.SIZES, default="sd15")
    parser.add_argument("--side", type=int, default=512, help="of the image, in pixels")
    parser.add_argument("--dtype", choices=pipelines.DTYPES, default="float32")
    parser.add_argument("--rows", type=int, default=1, help="samples in the step")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--reward", default="ViT-B-16", help="an open_clip model, or '' for the mean pixel")
    for name in ("checkpoint", "block-checkpoint", "slicing", "offload"):
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=name in ("checkpoint", "slicing")
        )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    options = vars(parser.parse_args())
    options["device"] = parameters.choose_device(options["device"])
    print(json.dumps(measured(options.pop("size"), **options)))


if __name__ == "__main__":
    main()
