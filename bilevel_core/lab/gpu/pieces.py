"""The pieces of the plan, in the order of their worth. One more is a few lines in `all_pieces`."""

from __future__ import annotations

import fnmatch
import json
import math
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ... import schedules
from ...algorithms import ScoreTraining, train_score
from ...samplers import draw_x_T, sample_particles
from .. import places, results
from ..models import chains, graphs, networks, pipelines, rewards
from ..studies import memory, rewards_on_any_chain, schedule_race, tilted_truth
from .plan import Context, Piece

PROMPTS = ("A beautiful landscape", "a red fox in the snow")
CAP = 12.0  # GB that one guided 512x512 sample is to fit

# Chapter 7 at 28x28: a search warms up, tries and trains more than at 8x8, where the digits are easier. The network is
# the folded one: a step has three quarters of the kernels of "mnist28" and half of its bytes, for the same FLOP, and
# kernels and bytes are what a card's time goes into.
RACE = schedule_race.Plan(name="mnist28_folded", warm_steps=1000, trial_steps=100, final_steps=2000)
SMALL_RACE = schedule_race.Plan(
    name="digits8", T=20, batch_size=16, warm_steps=4, trials=3, trial_steps=2, n_val=70, val_steps=2, final_steps=4,
    n=70, grids=(2, 4),
)  # fmt: skip
SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4)
NEEDED = (*schedule_race.FIXED, "random", "Bayesian", "Algorithm 6")  # what three seeds must have to be a result


@dataclass(frozen=True)
class Speed:
    """Seconds by which the race's pieces are estimated: of the card, a step of training on 128 images and a call of the
    network on 500; of the host, what a recorded step leaves to it, and a forward and backward pass launched one by one.
    """

    step: float
    call: float
    host: float
    eager: float


# Measured on an H200 with "mnist28", six pieces at a time: 6.7 ms a step and 4.4 ms a call, all of it the card's; and
# 31 ms a step whose kernels are launched one by one. The folded network's kernels and bytes make it 0.63 and 0.57 of
# the card's time. A T4 has a sixteenth of the H200's memory bandwidth, at the same latency of a kernel.
H200, T4 = Speed(0.0042, 0.0025, 0.015, 0.025), Speed(0.027, 0.03, 0.02, 0.04)


def estimate(steps: int = 0, calls: int = 0, passes: int = 0, rest: float = 0.0) -> dict[str, float]:
    """ "minutes", "busy" and "t4" of a piece of the race: its recorded training steps, its calls of the network, its
    forward and backward passes launched one by one, and seconds of the host besides."""

    def seconds(at: Speed) -> tuple[float, float]:
        card = (steps + passes) * at.step + calls * at.call
        return card, steps * (at.step + at.host) + calls * at.call + passes * max(at.eager, at.step) + rest

    (card, whole), (_, slow) = seconds(H200), seconds(T4)
    return {"minutes": whole / 60, "busy": card / whole, "t4": slow / whole}


# ---------------------------------------------------------------- 1. checks


def checks(context: Context) -> dict[str, Any]:
    """What runs on a GPU, against the CPU's numbers.

    The tests of tests/gpu by pytest in a process of its own: counts, and the text of failures.
    """
    folder = places.project_root() / "tests" / "gpu"
    chosen = ["-k", "cpu and ddim"] if context.smoke else ["-m", "cuda"]
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *chosen]
        command.append(f"--junitxml={report}")
        done = subprocess.run(command, cwd=places.project_root(), capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest made no report: {(done.stdout + done.stderr)[-1500:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = {}
    for case in cases:
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        if bad is not None:
            failures[f"{case.get('classname')}.{case.get('name')}"] = (bad.text or bad.get("message") or "")[-3000:]
    if not cases:
        raise RuntimeError(f"no test was chosen: {done.stdout[-500:]}")
    skipped = sum(any(child.tag == "skipped" for child in case) for case in cases)
    seconds = {case.get("name"): float(case.get("time")) for case in cases}
    passed = len(cases) - len(failures) - skipped
    said = f"{passed} passed, {len(failures)} failed, {skipped} skipped"
    found = {"said": said, "passed": passed, "skipped": skipped, "failures": failures, "seconds": seconds}
    return found


# ---------------------------------------------------------------- 2. Stable Diffusion


def _clear(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def setting(context: Context, options: dict[str, Any]) -> dict[str, Any]:
    """A guided step of Stable Diffusion in one setting of memory.

    Its time and memory at one of `memory.SETTINGS`; `merge` sets beside it what chapter 8 counts.
    """
    size = "sd15"
    if context.smoke:
        size, options = "tiny", options | {"side": 32, "reward": None}
    _clear(context.device)
    found = memory.measured(size, device=context.device, repeats=1 if context.smoke else 3, **options)
    _clear(context.device)
    said = f"peak {found['peak']:.2f} GiB, guided step {found['seconds']:.3f} s"
    return {"said": said, "options": options, "measured": found}


def _chain(context: Context, steps: int, **options: Any) -> chains.Chain:
    """Stable Diffusion 1.5 with random weights, on the device; tiny in smoke."""
    pipelines.quiet()
    size, side = ("tiny", 32) if context.smoke else ("sd15", 512)
    dtype = options.pop("dtype", "float32" if context.smoke else "float16")
    mode = torch.device(context.device) if context.device.type == "cuda" else None
    pipe = pipelines.random_pipeline(size, dtype=dtype, mode=mode)
    return pipelines.load(pipe, device=context.device, dtype=dtype, side=side, steps=steps, **options)


def capped_sample(folder: str, device: str, smoke: bool) -> None:
    """Prints what one guided sample takes where torch may use CAP GB and no more; run in a process of its own."""
    context = Context(Path(folder), torch.device(device), smoke)
    if context.device.type == "cuda":
        total = torch.cuda.get_device_properties(context.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 1e9 / total))
    steps = 3 if smoke else 50
    chain = _chain(context, steps, micro_batch=1, block_checkpoint=False)
    reward = rewards.RandomResNet().to(context.device)
    rows = []
    for prompt in PROMPTS:
        for guided in (False, True):
            _clear(context.device)
            began = time.perf_counter()
            wrap = {"wrap": lambda denoiser: chain.guide(denoiser, reward, 0.1)} if guided else {}
            x, cost = chain.sample(prompt, 1, 0, batch=1, device=context.device, **wrap)
            with torch.no_grad():
                image = chain.decode(x)
            finite, seconds = bool(image.isfinite().all()), time.perf_counter() - began
            row = {"prompt": prompt, "guided": guided, "seconds": seconds, "cost": cost, "finite": finite}
            row |= {"shape": list(image.shape), "reward": reward(image).item()}
            if context.device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
            rows.append(row)
    print(json.dumps({"steps": steps, "cap_gb": CAP, "rows": rows}))


def sample(context: Context) -> dict[str, Any]:
    """Two guided samples of Stable Diffusion under a cap of memory.

    512x512 within CAP GB, for each of PROMPTS, in a process of its own.
    """
    call = f"capped_sample({str(context.folder)!r}, {str(context.device)!r}, {context.smoke})"
    command = [sys.executable, "-c", f"from bilevel_core.lab.gpu import pieces; pieces.{call}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the sample failed: {done.stderr[-1500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    guided = [row for row in found["rows"] if row["guided"]]
    peak = f"peak {max(row.get('peak_gb', math.nan) for row in guided):.1f} GB of {CAP:g}"
    return {"said": f"{peak}, {guided[-1]['seconds']:.1f} s an image of {found['steps']} steps"} | found


def particles(context: Context) -> dict[str, Any]:
    """A step of guided particles of Stable Diffusion, in several ways to save memory."""
    steps, n, rows = (2, 2, []) if context.smoke else (4, 4, [])
    reward = rewards.RandomResNet().to(context.device)
    for options in (
        {"micro_batch": n},
        {"micro_batch": 1},
        {"micro_batch": n, "checkpoint": False},
        {"micro_batch": 1, "block_checkpoint": True},
    ):
        chain = _chain(context, steps, **options)
        denoiser = chain.denoise(PROMPTS[0])
        guide = chain.guide(denoiser, reward, 0.1)
        for timed in (False, True):
            _clear(context.device)
            g = torch.Generator(context.device).manual_seed(0)
            x = draw_x_T((n, *chain.shape), chain.abar, generator=g, device=context.device)
            began = time.perf_counter()
            with torch.no_grad():
                x, log_w, info = sample_particles(guide, x, chain.abar, chain.ts, eta=1.0, generator=g)
            finite = bool(x.isfinite().all() and log_w.isfinite().all())
            if timed:
                row = {"particles": n} | options | {"seconds": (time.perf_counter() - began) / steps}
                row |= {"finite": finite, "ess": info["ess"]}
                if context.device.type == "cuda":
                    row["peak"] = torch.cuda.max_memory_allocated() / memory.GIB
                rows.append(row)
        del chain, denoiser, guide, x
    return {"said": f"{rows[0]['seconds']:.2f} s a step of {n} particles", "steps": steps, "rows": rows}


def stages(context: Context, prompt: str) -> dict[str, Any]:
    """The five stages of chapter 8 for a prompt, at 512x512.

    Weights are random, so rewards mean nothing.
    """
    n, batch, steps = (20, 4, 2) if context.smoke else (20, 4, 10)
    chain = _chain(context, steps, micro_batch=batch)
    folder = context.folder / "sd15"
    tower = pipelines.random_clip(folder / "clip")
    of_prompt, features = rewards_on_any_chain.load_rewards(
        "clip", "random", clip=(f"local-dir:{tower}", "openai"), device=context.device
    )
    study = rewards_on_any_chain.Study(
        chain,
        of_prompt,
        folder / "stages",
        {"model": "random weights", "smoke": context.smoke},
        features,
        n=n,
        batch=batch,
        shown=batch,
        trials=2,
        methods=("none", "Algorithm 2", "random"),
        device=context.device,
    )
    began, seconds = time.perf_counter(), {}
    for name in ("samples", "learn", "rivals", "marks"):
        at = time.perf_counter()
        found = getattr(study, name)(prompt)
        seconds[name] = time.perf_counter() - at
    learned = study.learn(prompt)
    for path in sorted(study.folder.rglob("*.safetensors")):
        path.unlink()  # images of noise
    said = f"all stages in {time.perf_counter() - began:.1f} s: {learned['said']}"
    return {"said": said, "prompt": prompt, "n": n, "steps": steps, "rows": found, "lam": learned["lam"]} | {
        "seconds": seconds
    }


# ---------------------------------------------------------------- 3. throughput


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor whole: what a device without caches must move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if not getattr(function, "is_view", False):
            found = [x for x in tree_iter((args, kwargs, output)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in found)
        return output


def _seconds(run: Callable[[], None], device: torch.device, least: float) -> float:
    """Seconds of a call, of as many as fill `least` seconds, after three that do not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    wait()
    count, began = 0, time.perf_counter()
    while True:
        for _ in range(10):
            run()
        wait()
        count += 10
        if time.perf_counter() - began > least:
            return (time.perf_counter() - began) / count


# How a training step may be taken; those with a CUDA graph wait for a GPU, and may fail on one.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"strict": True},
    "tf32": {},
    "bfloat16": {"half": True},
    "bfloat16, channels last": {"half": True, "last": True},
    "tf32, CUDA graph": {"graph": True},
    "tf32, channels last, CUDA graph": {"last": True, "graph": True},
    "tf32, best convolutions, CUDA graph": {"best": True, "graph": True},
    "tf32, fused AdamW, CUDA graph": {"fused": True, "graph": True},
    "bfloat16, channels last, CUDA graph": {"half": True, "last": True, "graph": True},
    "bfloat16 weights, channels last, CUDA graph": {"weights": True, "last": True, "graph": True},
    "bfloat16 weights, channels last, best convolutions, fused AdamW, CUDA graph": {"weights": True, "last": True}
    | {"best": True, "fused": True, "graph": True},
}
COMPILED: dict[str, dict[str, Any]] = {
    f"{name}, compiled": VARIANTS[name] | {"compiled": True}
    for name in ("tf32, CUDA graph", "bfloat16, channels last, CUDA graph")
} | {"bfloat16 weights, compiled": {"weights": True, "fused": True, "compiled": True}}
FOLDED = {name: VARIANTS[name] for name in ("float32", "tf32, CUDA graph", "bfloat16, channels last, CUDA graph")}


def _trainer(
    size: str,
    batch: int,
    device: torch.device,
    *,
    half: bool = False,
    weights: bool = False,
    last: bool = False,
    fused: bool = False,
    graph: bool = False,
    compiled: bool = False,
) -> Callable[[], None]:
    """A bare training step: forward, backward, AdamW.

    half   in bfloat16 by autocast;  weights: these in bfloat16 as well;  last: channels last
    fused  AdamW in one kernel;  graph: as a CUDA graph;  compiled: by torch.compile, on a CPU by its eager backend
    """
    layout = torch.channels_last if last else torch.contiguous_format
    dtype = torch.bfloat16 if weights else torch.float32
    network = networks.Denoiser(size).to(device, dtype).to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, capturable=graph, fused=fused or None)
    call = torch.compile(network, backend="inductor" if device.type == "cuda" else "eager") if compiled else network
    side = networks.SIZES[size]["side"]
    x, eps = (torch.randn(batch, 1, side, side, device=device, dtype=dtype).to(memory_format=layout) for _ in range(2))
    t = torch.randint(1, 1001, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = call(x, t)
        (output.float() - eps.float()).square().mean().backward()
        optimizer.step()

    if not graph:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    return recorded.replay


def _in_full(strict: bool) -> None:
    """float32 as it is (strict), or products and convolutions in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not strict


def _rates(device: torch.device, least: float) -> tuple[float, float]:
    """FLOP/s of a bfloat16 product of 8192x8192 matrices, and bytes/s, read and written, of a copy of a GiB."""
    edge, length = (8192, 2**28) if device.type == "cuda" else (64, 2**12)
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    product = 2 * edge**3 / _seconds(lambda: a @ b, device, least)
    return product, 8 * length / _seconds(lambda: target.copy_(source), device, least)


def throughput(
    context: Context,
    size: str = "mnist28",
    variants: Mapping[str, dict[str, Any]] = VARIANTS,
    batches: Sequence[int] = (128, 1024, 4096),
) -> dict[str, Any]:
    """The rate of training at 28x28, beside what the card can do.

    Images and FLOP a second of a step of the network in each of `variants`.
    "rows": a row each, with "share" of the rate of a large product, and "roofline": how much of the time is due where
    every operation of the float32 network moves its tensors and computes at the card's best, and the same for that in
    bfloat16; "ours" is `train_score` as it is, and with its
    forward and backward passes recorded, as the race trains.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device, gpu = context.device, context.device.type == "cuda"
    if context.smoke:
        size, batches = "tiny", (4,)
    least, rows, failed = 0.4 if gpu else 0.01, [], {}
    product, bandwidth = _rates(device, least)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        for batch in batches:
            due = {}
            for key, half in (("roofline", False), ("roofline_bfloat16", True)):
                with FlopCounterMode(display=False) as counter, Traffic() as moved:
                    _trainer(size, batch, device, weights=half)()
                flops = counter.get_total_flops()
                due[key] = max(flops / product, moved.bytes / bandwidth)

            def add(name: str, seconds: float, batch: int = batch, flops: int = flops, due: dict = due) -> None:
                row = {"variant": name, "batch": batch, "seconds": seconds, "images_per_s": batch / seconds}
                row |= {"flop_per_s": flops / seconds, "share": flops / seconds / product, "flops": flops}
                rows.append(row | {key: value / seconds for key, value in due.items()})

            for name, options in variants.items():
                if options.get("graph") and not gpu:
                    continue
                torch.backends.cudnn.benchmark = options.get("best", False)
                _in_full(options.get("strict", False))
                options = {key: value for key, value in options.items() if key not in ("strict", "best")}
                try:
                    add(name, _seconds(_trainer(size, batch, device, **options), device, least))
                except Exception as error:  # a variant that this torch, compiler or card does not have
                    failed[f"{name}, {batch}"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            torch.backends.cudnn.benchmark = before[2]
            _in_full(True)
            for name, recorded in (("ours, float32", False), ("ours, float32, recorded", True)):
                add(name, _ours(size, batch, device, least, recorded))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
        torch.backends.cudnn.benchmark = before[2]
        _clear(device)
    best = max(rows, key=lambda row: row["images_per_s"])
    weights = sum(w.numel() for w in networks.Denoiser(size).parameters())
    ours = next(row for row in rows if row["variant"].startswith("ours"))
    said = f"{product / 1e12:.0f} TFLOP/s at best; ours {ours['images_per_s']:,.0f} images/s at {ours['batch']}, "
    said += f"most {best['images_per_s']:,.0f} ({best['variant']}, {best['batch']})"
    found = {"said": said, "size": size, "weights": weights, "product_flop_per_s": product, "failed": failed}
    return found | {"bandwidth_bytes_per_s": bandwidth, "rows": rows}


def _ours(size: str, batch: int, device: torch.device, least: float, recorded: bool) -> float:
    """Seconds of a step of `train_score`, its passes recorded or not."""
    side = networks.SIZES[size]["side"]
    x0 = torch.randn(4 * batch, 1, side, side, device=device)
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 1000).to(device)
    training = ScoreTraining(networks.Denoiser(size).to(device), batch_size=batch)
    loop = train_score(training, x0, abar, steps=10**9)
    with graphs.training(training.denoiser, (batch, *x0.shape[1:])) if recorded else nullcontext():
        return _seconds(lambda: next(loop), device, least)


# ---------------------------------------------------------------- 4. the race


def race(context: Context) -> schedule_race.Race:
    plan = SMALL_RACE if context.smoke else RACE
    return schedule_race.Race(plan, context.folder / "race28", context.device, force=context.smoke)


def warm(context: Context, seed: int) -> dict[str, Any]:
    """The denoiser that all searches of a repetition start from."""
    race(context).warm(schedule_race.search_seed(seed))
    return {"seed": seed}


def search(context: Context, method: str, seed: int) -> dict[str, Any]:
    """The schedule that a search, or Algorithm 6, chooses in a repetition."""
    chosen = {key: value for key, value in race(context).choose(method, seed).items() if key != "config"}
    q = ", ".join(f"{value:.3f}" for value in chosen["q"])
    return {"said": f"q = ({q})", "searches": [{"method": method, "seed": seed} | chosen]}


def contest(context: Context, method: str, seed: int, **options: bool) -> dict[str, Any]:
    """A denoiser trained at the schedule that a method chose, and marked.

    As `Race.run` lists them.
    """
    own = race(context)
    rows = own.final(method, seed, **options)
    name = schedule_race._slug("final", method, seed, *(key * value for key, value in sorted(options.items())))
    (own.folder / f"{name}.safetensors").unlink(missing_ok=True)  # its checkpoint
    distances = [f"{row['frechet']:.2f} at {row['steps']}" for row in rows if row["split"] == "test"]
    return {"said": "Fréchet " + ", ".join(distances), "rows": rows}


# ---------------------------------------------------------------- what a strength is worth

TRUTH = {"sweeps": 100, "warmup": 40, "chains": 48}  # moves by gradients: each sweep is three times as dear
SMALL_TRUTH = {"sweeps": 8, "warmup": 2, "chains": 2}


def truth(context: Context, prompt: str) -> dict[str, Any]:
    """The exact tilts of the text-to-digit model for a prompt, from both starts, with their certificate."""
    sizes, steps = (SMALL_TRUTH, {"steps": 2}) if context.smoke else (TRUTH, {})
    chain, folder = chains.Chain.shipped(context.device, **steps), context.folder / "tilts"
    draws = 20 if context.smoke else tilted_truth.SCALE_DRAWS
    problem = tilted_truth.problem(chain, prompt, draws=draws, folder=folder, device=context.device)
    runs = []
    for start in tilted_truth.STARTS:
        options = {"seed": 0, "folder": folder, "block": sizes["sweeps"] // 4, "device": context.device}
        runs.append(tilted_truth.run(problem, start, **sizes, **options)[0])
    found = tilted_truth.Truth(prompt, tuple(runs))
    for path in folder.glob(f"{chains.slug(prompt)}_*.safetensors"):
        path.unlink()  # megabytes of chains
    curve = [row | {"lam": row["lam"] if math.isfinite(row["lam"]) else None} for row in found.curve()]
    levels = [row | {"lam": row["lam"] if math.isfinite(row["lam"]) else None} for row in found.certificate.rows]
    down_to = found.certificate.down_to
    down_to = down_to if down_to is None or math.isfinite(down_to) else None
    numbers = {"prompt": prompt, "down_to": down_to, "levels": levels, "curve": curve}
    return {"said": str(found.certificate), "cost": sum(run.cost for run in runs), "seed": 0} | numbers


# ---------------------------------------------------------------- the plan


def all_pieces(smoke: bool = False) -> list[Piece]:
    """The plan, the most worth first."""
    found = [Piece("checks", checks, 1.0, alone=True, t4=1.5)]
    found.append(Piece("sd15-sample", sample, 1.1, gib=7, alone=True, t4=5))
    for options, _ in memory.SETTINGS:
        if options["side"] >= 512:
            values = (str(v if type(v) is not bool else f"{key}_{v}") for key, v in options.items())
            name, slow = "-".join(("sd15", *values)), 16.0 if options["dtype"] == "float32" else 9.0
            run = partial(setting, options=dict(options))
            found.append(Piece(name, run, 0.1, gib=_gib(options), alone=True, t4=slow, settings=options))
    found.append(Piece("sd15-particles", particles, 0.5, gib=22, alone=True, t4=9))
    found += [
        _speed("throughput", 1.0, "mnist28", VARIANTS, (128, 1024, 4096)),
        _speed("throughput-folded", 0.3, RACE.name, FOLDED, (128, 4096)),
    ]
    for text in tilted_truth.TEST:  # here is the place of what is worth more than the race
        sizes, run = TRUTH | {"ladder": list(tilted_truth.LADDER[1:])}, partial(truth, prompt=text)
        found.append(Piece(f"tilts-{chains.slug(text)}", run, 1.2, gib=6, settings=sizes))
    first, more = race_pieces(SMALL_RACE if smoke else RACE, () if smoke else ("mnist",))
    found += first
    for i, text in enumerate(PROMPTS):
        found.append(Piece(f"sd15-stages-{i}", partial(stages, prompt=text), 1.5, gib=18, alone=True, t4=9))
    found.append(_speed("throughput-compiled", 2.5, "mnist28", COMPILED, (128, 4096)))
    return found + more


def _speed(name: str, minutes: float, size: str, variants: Mapping[str, Any], batches: Sequence[int]) -> Piece:
    options = {"size": size, "variants": variants, "batches": batches}
    return Piece(name, partial(throughput, **options), minutes, gib=14, alone=True, t4=4, settings=options)


def race_pieces(plan: schedule_race.Plan, needs: Sequence[str]) -> tuple[list[Piece], list[Piece]]:
    """Chapter 7 at 28x28: what three repetitions must have, the longest first; and the rest."""
    shared = {"gib": 3, "needs": needs, "settings": asdict(plan)}
    marks = plan.n // 500 * (sum(plan.grids) + plan.val_steps)
    trial = {"steps": plan.trial_steps, "calls": plan.n_val // 500 * plan.val_steps, "rest": 1.0}
    searching = estimate(**{key: plan.trials * value for key, value in trial.items()})
    spent = plan.budget - plan.warm_cost  # by steps that are as dear as at 8x8
    taken = dict.fromkeys(schedule_race.SEARCHES, searching)
    taken |= {"Algorithm 6": estimate(passes=100 * (spent // 24_600), rest=5.0)}
    taken |= {"zeroth order": estimate(passes=20 * (spent // 4_560), rest=5.0)}

    def warming(seed: int) -> Piece:
        return Piece(f"race28-warm-{seed}", partial(warm, seed=seed), **estimate(plan.warm_steps, rest=5.0), **shared)

    def looking(method: str, seed: int) -> Piece:
        name, run = f"race28-search-{schedule_race._slug(method)}-{seed}", partial(search, method=method, seed=seed)
        return Piece(name, run, after=(f"race28-warm-{seed}",), **taken[method], **shared)

    def entry(method: str, seed: int, **options: bool) -> Piece:
        slug = schedule_race._slug(method)
        run = partial(contest, method=method, seed=seed, **options)
        before = () if method in schedule_race.FIXED else (f"race28-search-{slug}-{seed}",)
        steps = plan.longer if options.get("total") else plan.final_steps
        return Piece(
            "-".join(["race28", slug, str(seed), *options]),
            run,
            after=before,
            **estimate(steps, marks, rest=8.0),
            **shared,
        )

    def repetitions(seeds: Sequence[int]) -> list[Piece]:
        searches = [method for method in NEEDED if method not in schedule_race.FIXED]
        return [
            *(warming(seed) for seed in seeds),
            *(looking(method, seed) for method in reversed(searches) for seed in seeds),
            *(entry(method, seed) for seed in seeds for method in reversed(NEEDED)),
        ]

    more = [make(method, seed) for method in ("grid", "zeroth order") for seed in SEEDS for make in (looking, entry)]
    more += [entry(method, seed, total=True) for seed in SEEDS for method in schedule_race.FIXED]
    more += [entry("Algorithm 6", seed, own=True) for seed in SEEDS]
    return repetitions(SEEDS), more + repetitions(MORE_SEEDS)


def race_ends(ends: Mapping[str, float], there: set[str]) -> float:
    """Minute in which the repetitions of SEEDS have all of NEEDED, by a forecast; infinity where it has not all."""
    wanted = [f"race28-{schedule_race._slug(method)}-{seed}" for method in NEEDED for seed in SEEDS]
    return max(0.0 if name in there else ends.get(name, math.inf) for name in wanted)


@cache
def _counted() -> list[dict[str, Any]]:
    return results.read_result("08_memory", results.book())["data"]["rows"]


def _gib(options: dict[str, Any]) -> float:
    """Memory that a setting needs: what chapter 8 counts, and two GiB for what kernels and the driver take."""
    row = next(row for row in _counted() if {k: row[k] for k in row if k not in ("counted", "measured")} == options)
    return row["counted"]["peak"] + 2


def only(found: Sequence[Piece], names: Sequence[str]) -> list[Piece]:
    """The pieces with these names (* stands for anything) and those that they come after; ValueError for no such."""
    by_name = {piece.name: piece for piece in found}
    chosen: set[str] = set()
    for name in names:
        matching = fnmatch.filter(by_name, name)
        if not matching:
            raise ValueError(f"no piece is called {name!r}; there are {', '.join(by_name)}")
        chosen.update(matching)
    while True:
        more = {name for piece in found if piece.name in chosen for name in piece.after} - chosen
        if not more:
            return [piece for piece in found if piece.name in chosen]
        chosen |= more
