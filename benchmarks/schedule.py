"""Learning a schedule: an outer iteration beside the released one, estimators of d_z f, memory, training rates."""

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import common
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bilevel_core import estimators, guidance, samplers, schedules
from bilevel_core.algorithms import ScoreTraining, train_score
from bilevel_core.guidance import CostMeter
from bilevel_core.lab import comparisons, data, distances, levels
from bilevel_core.lab.models import networks
from bilevel_core.schedule_learning import ScheduleLearning, ScheduleProblem, learn_schedule
from bilevel_core.seeds import derive_seed

Q = torch.tensor((0.05, 0.9, 1.2, 0.02), dtype=torch.float64)  # inside the admissible set by more than delta
DELTA, GAMMA, INNER = 0.01, 1000.0, 10  # the released radius; our gamma; the released number of inner steps
RACE = {"samples": 64, "draws": 4, "inner": 4, "grad_steps": None}  # what chapter 7 races with, besides
NOTES = """
outer iteration: batch {batch}, {images} images for every distance, T = {T}. Released, emulated with this package:
  {inner} training steps, then T, 2N, N, N, N and N DDIM steps with N = {steps}, and three denoising losses; its
  gradient is a two-point zeroth-order estimate in all four of q, radius {delta}, without common random numbers,
  over gamma = 1, and the difference of the lower-level gradients at one and the same network. Ours: {ours} DDIM steps,
  one training step, reverse mode, 2 draws, gamma = {gamma:g}. Both on the network named in the table (cost units do not
  depend on it), with the distance in the features of this package's classifier, not in Inception's. "chapter 7": ours
  with {race[samples]} samples, {race[draws]} draws, {race[inner]} training steps and all of the path. "told the level":
  a network that is told the noise level, trained on a fixed range of levels as long as the other, has no theta_gamma:
  one reverse-mode gradient, the same samples.
SNR: |truth| / standard deviation over {draws} independent gradients at one point, in start, end and tau; truth is the
  mean of exact pathwise gradients of the same objective. "x sqrt": the SNR of as many of them averaged as cost together
  what one forward-mode gradient costs.
"""


def images_of(size: str, device: torch.device) -> Tensor:
    """Training images (n, 1, side, side): MNIST's, or the bundled digits for 8x8 where it is not at hand."""
    side = networks.SIZES[size]["side"]
    x0, _ = data.load("mnist", "train", side) if data.available("mnist") or side == 28 else data.load("digits", "train")
    return x0[:10_000].to(device)


def quality(size: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Frechet distance to MNIST's validation split in the features of the shipped classifier."""
    name = "mnist8" if networks.SIZES[size]["side"] == 8 else "mnist28"
    classifier = networks.load_classifier(name).to(device)
    reference = tuple(part.to(device) for part in distances.moments(networks.reference_features(name, "val")))

    def distance(images: Tensor) -> Tensor:
        return distances.frechet(distances.moments(classifier.features(images.clamp(-1, 1))), reference)

    return distance


def learning(size: str, args: argparse.Namespace, denoiser: torch.nn.Module, **options) -> ScheduleLearning:
    """Our state, with its schedule held where it is."""
    ours = {"T": 20 * args.steps, "samples": args.images, "sample_steps": max(1, args.steps // 5), "gamma": GAMMA}
    ours |= {"estimator": estimators.q_grad_reverse, "draws": 2, "inner": 1, "batch_size": args.batch}
    ours |= {"g_batch": max(1, args.batch // 2), "rate": 1e-9, "lr": 2e-4, "warmup": 0}
    return ScheduleLearning(denoiser, Q, quality(size, args.device), **(ours | options))


# ---------------------------------------------------------------- the released procedure


def released_grad(problem: ScheduleProblem, net: Callable, seed: int) -> Tensor:
    """d_q f/gamma + d_q g(theta_gamma) - d_q g(theta_star), with gamma = 1 and theta_gamma = theta_star; (4,)."""
    kind = problem.state.kind

    def f(q: Tensor, s: int) -> Tensor:
        return problem.f(schedules.reduce(q, kind), net, s)

    upper, _ = estimators.q_grad_two_point(f, Q, seed=seed, delta=DELTA, common=False)
    q = Q.clone().requires_grad_()
    z = schedules.reduce(q, kind)
    difference = problem.g(z, net, derive_seed("g", seed, 0)) - problem.g(z, net, derive_seed("g", seed, 1))
    return upper + torch.autograd.grad(difference, q)[0]


def released_iteration(
    size: str, args: argparse.Namespace, denoiser: torch.nn.Module, x0: Tensor
) -> dict[str, tuple[int, int]]:
    """One outer iteration with all that it computes: (network calls, cost units) by what becomes of the result."""
    spent = {}
    options = {"sample_steps": args.steps, "g_batch": args.batch}

    def count(name: str, run: Callable[[ScheduleProblem], object], **other) -> None:
        problem = ScheduleProblem(learning(size, args, denoiser, **(options | other)), x0)
        run(problem)
        (calls, cost), meters = spent.get(name, (0, 0)), problem.meters
        spent[name] = calls + sum(m.calls for m in meters), cost + sum(m.cost for m in meters)

    training = ScoreTraining(denoiser, batch_size=args.batch)
    for _ in train_score(training, x0, schedules.abar(Q, 20 * args.steps), steps=INNER):
        pass
    spent["used"] = INNER, training.cost

    def sample(problem: ScheduleProblem) -> None:
        with torch.no_grad():
            problem.f(problem.state.z, denoiser, 0)

    def twice(problem: ScheduleProblem) -> None:
        sample(problem)
        sample(problem)

    count("without effect", sample, sample_steps=20 * args.steps)  # its distance is overwritten before it is read
    count("without effect", lambda p: p.g(p.state.z, denoiser, 0).backward())  # the gradient of orphaned weights
    count("without effect", twice)  # zeroth order in weights that no optimiser holds
    count("only logged", sample, sample_steps=2 * args.steps)
    denoiser.requires_grad_(False)
    count("used", lambda problem: released_grad(problem, denoiser, 0))
    return spent


# ---------------------------------------------------------------- signal and noise


def snr(draws: Tensor, truth: Tensor) -> Tensor:
    """|truth|/sd of draws (R, m), in the first coordinates that both have."""
    m = min(draws.shape[1], len(truth))
    return truth[:m].abs() / draws[:, :m].std(0)


def shown(values: Tensor) -> str:
    return " ".join(f"{v:7.2f}" for v in values)


def estimate_variants(problem: ScheduleProblem, net: Callable) -> dict[str, Callable[[int], Tensor]]:
    """Estimators of d_z f at one point by name: seed -> gradient."""
    s, last = problem.state, {}

    def f(z: Tensor, seed: int, **options) -> Tensor:
        return problem.f(z, net, seed, **options)

    def one_point(seed: int) -> Tensor:
        if not last:
            last["f"] = f(s.z, seed).item()
        grad, info = comparisons.q_grad_one_point(f, s.z, last["f"], seed=seed, delta=DELTA)
        last["f"] = info["f"]
        return grad

    def truncated(seed: int) -> Tensor:
        cut = functools.partial(f, grad_steps=max(1, s.sample_steps // 3))
        return estimators.q_grad_reverse(cut, s.z, seed=seed)[0]

    def two_point(seed: int, common: bool) -> Tensor:
        return estimators.q_grad_two_point(f, s.z, seed=seed, delta=DELTA, common=common)[0]

    return {
        "forward": lambda seed: estimators.q_grad_forward(f, s.z, seed=seed)[0],
        "reverse": lambda seed: estimators.q_grad_reverse(f, s.z, seed=seed)[0],
        "... last third": truncated,
        "coordinates, CRN": lambda seed: estimators.q_grad_coordinates(f, s.z, seed=seed, delta=DELTA)[0],
        "two-point, CRN": lambda seed: two_point(seed, True),
        "two-point": lambda seed: two_point(seed, False),
        "one-point": one_point,
    }


def gradients(run: Callable[[int], Tensor], draws: int) -> tuple[Tensor, float]:
    """`draws` gradients (draws, m) from as many seeds, and the seconds of one."""
    start = time.perf_counter()
    found = torch.stack([run(1000 * (i + 1)) for i in range(draws)])
    return found, (time.perf_counter() - start) / draws


def print_estimators(size: str, args: argparse.Namespace, denoiser: torch.nn.Module, x0: Tensor) -> None:
    state = learning(size, args, denoiser)
    problem = ScheduleProblem(state, x0)
    print(f"\nestimators of d_z f, {size}: {args.images} images, {state.sample_steps} DDIM steps")
    print(f"{'estimator':<18}{'cost units':>11}{'ms':>9}  {'SNR in start, end, tau':<25}{'... x sqrt':<25}bias/|truth|")
    for name, run in estimate_variants(problem, denoiser).items():
        problem.meters.clear()
        draws, seconds = gradients(run, args.draws)
        cost = sum(meter.cost for meter in problem.meters) / args.draws
        if name == "forward":
            truth, budget = draws.mean(0), cost
        found, bias = snr(draws, truth), (draws.mean(0) - truth).norm() / truth.norm()
        equal = shown(found * (budget / cost) ** 0.5)
        print(f"{name:<18}{cost:>11,.0f}{seconds * 1e3:>9.1f}  {shown(found):<25}{equal:<25}{bias:.2f}", flush=True)


def print_outer(size: str, args: argparse.Namespace, denoiser: torch.nn.Module, x0: Tensor) -> None:
    """Cost and SNR of an outer iteration, released and ours, at one point and in one run."""
    start = time.perf_counter()
    spent = released_iteration(size, args, copy.deepcopy(denoiser).requires_grad_(True), x0)
    seconds = time.perf_counter() - start
    calls, cost = (sum(pair[i] for pair in spent.values()) for i in range(2))
    shares = ", ".join(f"{name} {pair[0] / calls:.1%}" for name, pair in spent.items())
    print(f"\nouter iteration, {size}: the released one makes {calls} network calls: {shares}")
    print(f"{'procedure':<22}{'cost units':>11}{'ratio':>7}{'s':>8}  SNR in start, end, tau")
    problem = ScheduleProblem(learning(size, args, denoiser, sample_steps=args.steps, g_batch=args.batch), x0)

    def exact(seed: int) -> Tensor:
        f = lambda q, s: problem.f(schedules.reduce(q), denoiser, s)  # noqa: E731
        return estimators.q_grad_reverse(f, Q, seed=seed)[0]

    truth = gradients(exact, args.draws)[0].mean(0)
    draws, _ = gradients(lambda seed: released_grad(problem, denoiser, seed), args.draws)
    released = snr(draws, truth)[:3]
    print(f"{'released':<22}{cost:>11,}{1:>7.3f}{seconds:>8.2f}  {shown(released)}", flush=True)
    ours = {"ours": {}, f"... at {args.steps} DDIM steps": {"sample_steps": args.steps}}
    ours["chapter 7"] = RACE | {"g_batch": 2 * args.batch}
    for name, options in ours.items():
        state = learning(size, args, denoiser, **options)
        start = time.perf_counter()
        *_, last = learn_schedule(state, x0, steps=args.warm)  # theta_gamma leaves theta_star
        seconds = (time.perf_counter() - start) / args.warm
        ours, problem = last.cost // args.warm, ScheduleProblem(state, x0)

        def ours_grad(seed: int, problem: ScheduleProblem = problem, state: ScheduleLearning = state) -> Tensor:
            state.step = seed
            return problem.estimate(problem, state.z, state.star.ema, state.gamma_net.ema, GAMMA)[0]

        draws, _ = gradients(ours_grad, args.draws)
        found = snr(draws, draws.mean(0))
        gain = shown(found / released) + " times the released"
        print(f"{name:<22}{ours:>11,}{ours / cost:>7.3f}{seconds:>8.2f}  {shown(found)}  {gain}", flush=True)
        print(
            f"{'':<22}theta_gamma moved by {last.moved:.1e}, absorbs {last.absorbed:.1%} of f; {last.warning or 'ok'}"
        )
    meters, level_grad = told_the_level(size, args, x0)
    draws, seconds = gradients(level_grad, args.draws)
    found, one = snr(draws, draws.mean(0)), sum(meter.cost for meter in meters) // args.draws
    gain = shown(found / released) + " times the released"
    print(f"{'told the level':<22}{one:>11,}{one / cost:>7.3f}{seconds:>8.2f}  {shown(found)}  {gain}", flush=True)


def told_the_level(size: str, args: argparse.Namespace, x0: Tensor) -> tuple[list[CostMeter], Callable[[int], Tensor]]:
    """The outer gradient of chapter 7's setting without theta_gamma, seed -> (3,), and the meters of what it cost.

    Theta is held fixed: its training levels do not depend on q, and neither does it.
    """
    network = guidance.LevelDenoiser(networks.Denoiser(size, told="angle"), levels.Density().abar(1000))
    training = ScoreTraining(network.to(args.device), batch_size=args.batch, ema_decay=0.99)
    for _ in train_score(training, x0, network.abar, steps=args.train):
        pass
    trained = training.ema.module.eval().requires_grad_(False)
    state, distance, meters = learning(size, args, trained, **RACE), quality(size, args.device), []
    ts = samplers.timesteps(state.T, state.sample_steps)

    def f(z: Tensor, seed: int) -> Tensor:
        abar = schedules.abar(schedules.expand(z), state.T)
        generator = torch.Generator().manual_seed(seed)
        x_T = torch.randn(state.samples, *x0.shape[1:], generator=generator).to(args.device)
        meters.append(CostMeter(trained.on(abar)))
        return distance(samplers.sample_ddim(meters[-1], x_T, abar, ts))

    def grad(seed: int) -> Tensor:
        draws = [derive_seed("level", seed, i) for i in range(state.draws)]
        return torch.stack([estimators.q_grad_reverse(f, state.z, seed=s)[0] for s in draws]).mean(0)

    return meters, grad


# ---------------------------------------------------------------- memory and training


def memory_run(size: str, args: argparse.Namespace, variant: str) -> Callable[[], object]:
    """One d_z f by `variant`, such as "reverse@20" with 20 DDIM steps."""
    name, steps = variant.split("@")
    net = networks.Denoiser(size).to(args.device).eval().requires_grad_(False)
    distance, ts = quality(size, args.device), samplers.timesteps(1000, int(steps))
    x_T = torch.randn(args.batch, 1, net.side, net.side, device=args.device)

    def f(z: Tensor, seed: int, **options) -> Tensor:
        return distance(samplers.sample_ddim(net, x_T, schedules.abar(schedules.expand(z), 1000), ts, **options))

    options = {"checkpointed": {"checkpoint": True}, "truncated": {"grad_steps": 1}}.get(name, {})
    estimate = estimators.q_grad_forward if name == "forward" else estimators.q_grad_reverse
    z, f = schedules.reduce(Q), functools.partial(f, **options)
    x = x_T[:2].clone().requires_grad_()
    (distance(x) + net(x, 1).sum()).backward()  # loads libraries, which is no run's memory, and so does the next line
    torch.func.jvp(lambda x: distance(x) + net(x, 1).sum(), (x_T[:2],), (x_T[:2],))
    return lambda: estimate(f, z, seed=0)


def print_memory_growth(size: str, args: argparse.Namespace) -> None:
    grids = [max(1, args.steps // 10) * k for k in (1, 2, 4)]
    print(f"\nmemory of one d_z f in MiB, {size}, {args.batch} images, by the number of DDIM steps")
    print(f"{'estimator':<18}" + "".join(f"{grid:>8}" for grid in grids))
    for name in ("forward", "reverse", "checkpointed", "truncated"):
        cells = [common.memory_of(args, size, f"{name}@{grid}") for grid in grids]
        print(f"{name:<18}" + "".join(f"{cell:>8}" for cell in cells), flush=True)


def matrix_rate(dtype: torch.dtype, device: torch.device, n: int = 1024) -> float:
    """Floating-point operations a second of a product of n x n matrices, the best of five."""
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        common.synchronise(device)
        start = time.perf_counter()
        a @ a
        common.synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def training_variants(
    size: str, args: argparse.Namespace, x0: Tensor
) -> dict[str, tuple[torch.dtype, Callable[[], None]]]:
    """A training step by name, with the type of its products."""
    abar = schedules.abar(Q, 20 * args.steps)

    def prepare(dtype: torch.dtype = torch.float32, layout=torch.contiguous_format, compiled: bool = False):
        net = networks.Denoiser(size).to(args.device, memory_format=layout)
        training = ScoreTraining(net, batch_size=args.batch)
        if compiled:
            training.denoiser = torch.compile(net)
        loop = train_score(training, x0.to(memory_format=layout), abar, steps=10**9)

        def step() -> None:
            with torch.autocast(args.device.type, dtype) if dtype != torch.float32 else nullcontext():
                next(loop)

        return dtype, step

    found = {"float32": prepare(), "... channels last": prepare(layout=torch.channels_last)}
    found["bfloat16"] = prepare(torch.bfloat16)
    found["... bf16, last"] = prepare(torch.bfloat16, torch.channels_last)
    if args.compile:
        found["... compiled"] = prepare(compiled=True)
    return found


def print_training(size: str, args: argparse.Namespace, x0: Tensor) -> None:
    variants = training_variants(size, args, x0)
    with FlopCounterMode(display=False) as counter:
        variants["float32"][1]()
    work = counter.get_total_flops()
    rates = {dtype: matrix_rate(dtype, args.device) for dtype in (torch.float32, torch.bfloat16)}
    print(f"\ntraining, {size}, batch {args.batch}: {work / 1e9:.2f} GFLOP a step")
    print(f"{'variant':<18}{'steps/s':>9}{'ratio of time':>21}{'GFLOP/s':>9}{'matrix product':>16}{'share':>7}")
    seconds = common.interleave({name: step for name, (_, step) in variants.items()}, args.repeats, args.device)
    for name, (dtype, _) in variants.items():
        rate = 1 / statistics.median(seconds[name])
        ratio, peak = common.ratios(seconds[name], seconds["float32"]), rates[dtype]
        print(
            f"{name:<18}{rate:>9.2f}{ratio:>21}{work * rate / 1e9:>9.1f}{peak / 1e9:>16.1f}{work * rate / peak:>7.1%}",
            flush=True,
        )


def main() -> None:
    parser = common.options(__doc__, batch=128, steps=50, steps_help="N, the released DDIM steps; T is 20 N, ours N/5")
    parser.set_defaults(sizes=["tiny"])
    parser.add_argument("--images", type=int, default=36, help="images of one distance")
    parser.add_argument("--draws", type=int, default=30, help="gradients of which the SNR is taken")
    parser.add_argument("--train", type=int, default=300, help="training steps before anything is measured")
    parser.add_argument("--warm", type=int, default=20, help="outer steps at a fixed schedule before ours is measured")
    parser.add_argument("--compile", action="store_true", help="a row for torch.compile, which takes minutes")
    args = common.parse(parser)
    for name, low in (("images", 2), ("draws", 3), ("train", 1), ("warm", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} must be at least {low}")
    if args.memory:
        return common.print_memory(memory_run(args.memory[0], args, args.memory[1]), args.device)
    print(common.header(args, "learning a schedule"))
    words = vars(args) | {
        "race": RACE,
        "T": 20 * args.steps,
        "ours": max(1, args.steps // 5),
        "delta": DELTA,
        "gamma": GAMMA,
    }
    print(NOTES.strip("\n").format(**(words | {"inner": INNER})))
    for size in args.sizes:
        x0 = images_of(size, args.device)
        training = ScoreTraining(networks.Denoiser(size).to(args.device), batch_size=args.batch, ema_decay=0.99)
        for _ in train_score(training, x0, schedules.abar(Q, 20 * args.steps), steps=args.train):
            pass
        denoiser = training.ema.module.eval()
        print_outer(size, args, denoiser, x0)
        print_estimators(size, args, denoiser, x0)
        print_memory_growth(size, args)
        print_training(size, args, x0)


if __name__ == "__main__":
    main()
