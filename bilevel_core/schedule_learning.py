"""Algorithm 6: learns a noise schedule with the denoiser it is for, as an instance of Algorithm 1.

    f(z, theta) = quality of DDIM samples,    g(z, theta) = E ||eps_theta(x_t, t) - eps||^2
    theta_star ~ argmin g,    theta_gamma ~ argmin f/gamma + g,    both kept warm, a few training steps an outer step
    d_z L = d_z f(z, theta_gamma) + gamma (d_z g(z, theta_gamma) - d_z g(z, theta_star))

z are the coordinates of `schedules.reduce`. What is random in f and g comes from a seed alone, so that both networks
see the same (x_0, t, eps) and the same x_T, in training as well as in the gradient: what is left is what f does. In
both, networks are in evaluation mode (no dropout, running statistics), in the training steps in training mode.

A network that is told the noise level, and was trained on levels that do not depend on the schedule, needs no second
network: theta_star does not move, and d_z f alone is the gradient. `learn_grid` takes the levels themselves for z.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import estimators, schedules
from .algorithms import Inputs, PenaltyStep, ScoreTraining, in_mode, penalty_descent, plain, refuse_changes, train_score
from .guidance import CostMeter, LevelDenoiser
from .samplers import Denoiser, sample_ddim, timesteps
from .seeds import derive_seed, seeded

ABSORBED = 0.1  # share of f that theta_gamma may take away before gamma counts as too small

SLOW = 0.5  # share of its way that theta_gamma must have come


@dataclass(frozen=True)
class ScheduleStep:
    """One outer step of Algorithm 6, measured at q before it moves; the networks are moving averages of the weights.

    k             number of the step, from 0
    q, q_next     (4,) the schedule before and after
    grad, se      of L_gamma in z, (3,) or (2,), with its standard error over `draws`
    gamma, f      penalty constant, and f at theta_gamma
    f_star        f at theta_star with the same x_T: the upper objective itself
    g_gamma, g_star, gap, gap_se   both lower losses on one batch, and their difference with its error
    absorbed      (f_star - f)/|f_star|, the share of f that theta_gamma takes away without any help of the schedule
    moved         |theta_gamma - theta_star|/|theta_star|
    reached       2 gamma gap/(f_star - f): how far theta_gamma has come, of error 2 gamma gap_se/(f_star - f). At the
                  minimum of f/gamma + g, f falls by about 2 gamma gap; at the share s of the way there by s of that,
                  with s^2 of the gap. The gradient then holds but s of the networks' response to the schedule
    val           what `val` said, or None;  cost: image forwards so far
    done          None, or why the loop ends here;  warning: None, or what is wrong with gamma or the lower level
    """

    k: int
    q: Tensor
    q_next: Tensor
    grad: Tensor
    se: Tensor
    gamma: float
    f: float
    f_star: float
    g_gamma: float
    g_star: float
    gap: float
    gap_se: float
    absorbed: float
    moved: float
    reached: float
    val: float | None
    cost: int
    done: str | None
    warning: str | None


@dataclass
class ScheduleLearning:
    """What Algorithm 6 carries from step to step, all of it saved by `tensors` and `meta`.

    denoiser    trained for q (Algorithm 3): theta_star and theta_gamma start as copies of it, it is left as it is
    q           (4,) admissible start, later the current schedule;  kind, form, T: of the schedule
    quality     images (n, ...) as the sampler leaves them -> (), differentiable, such as the Frechet distance
                (`lab.distances.frechet`) of a classifier's features to fixed moments
    gamma       > 0, or a function of k. The gradient is biased by O(1/gamma), its error grows with gamma: see `warning`
    sample_steps, samples   DDIM steps and images of one evaluation of f
    estimator   (f, z, seed) -> (d_z f, info), one of `estimators.q_grad_*`. Where its memory fits, which grows with
                sample_steps, q_grad_reverse gives the same as the default for a third of the cost
    draws       >= 2 independent evaluations of the gradient, averaged; their spread is its error
    g_batch     images of one evaluation of g
    inner       training steps of each network in an outer step, of batch_size images by AdamW at the rate lr
    grad_steps  theta_gamma descends f by the last so many DDIM steps: biased, cheap. None: all of them
    directions  0: that. More: by zeroth order along so many random directions of the weights, at distance delta
    rate        size of a step in z, a number or one for each coordinate, or a rule (k, grad) -> the decrease of z. The
                numbers set Adam's: f has no scale of its own, and where the gradient is noise its average shrinks
    margin      distance kept from the bounds of the admissible set
    val         state -> a number, lower is better, asked every `val_every` steps; the loop ends after `patience`
                without a better one (0: never); best_q and best_val keep the best. What it costs it may add to `spent`
    seed        any integer; every draw has a stream derived from it (`seeds.derive_seed`)
    Raises ValueError for whatever is out of its range.
    """

    denoiser: nn.Module
    q: Tensor
    quality: Callable[[Tensor], Tensor]
    kind: str = "cosine"
    form: str = "released"
    T: int = 1000
    gamma: float | Callable[[int], float] = 100.0
    sample_steps: int = 10
    samples: int = 128
    estimator: Callable[..., tuple[Tensor, dict]] = estimators.q_grad_forward
    draws: int = 4
    g_batch: int = 256
    inner: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    ema_decay: float = 0.99
    grad_steps: int | None = 1
    directions: int = 0
    delta: float = 1e-3
    rate: float | tuple[float, ...] | Callable[[int, Tensor], Tensor] = 0.02
    margin: float = 0.005
    val: Callable[["ScheduleLearning"], float] | None = None
    val_every: int = 10
    patience: int = 0
    seed: int = 0

    def __post_init__(self):
        least = {"sample_steps": 1, "samples": 2, "draws": 2, "g_batch": 1, "inner": 1, "directions": 0}
        least |= {"delta": 1e-12, "margin": 0.0, "val_every": 1, "patience": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {low}")
        if self.grad_steps is not None and self.grad_steps < 1:
            raise ValueError(f"grad_steps = {self.grad_steps} must be at least 1, or None for all")
        if not callable(self.gamma) and not 0 < self.gamma < float("inf"):
            raise ValueError(f"gamma = {self.gamma} must be positive and finite")
        schedules.check(self.q, self.T, self.kind, self.form)
        if self.sample_steps > self.T:
            raise ValueError(f"sample_steps = {self.sample_steps} must lie in 1..T = {self.T}")
        self.ts = timesteps(self.T, self.sample_steps)
        z = schedules.reduce(self.q.detach().cpu(), self.kind)
        sizes = torch.as_tensor(1.0 if callable(self.rate) else self.rate, dtype=torch.float64)
        if sizes.shape not in ((), z.shape) or not (sizes > 0).all():
            raise ValueError(f"rate = {self.rate} must be positive, one number or one for each of {len(z)} coordinates")
        self.q_start, self.z = self.q.tolist(), self.project(z)
        self.q = self.best_q = schedules.expand(self.z, self.kind)
        self.momentum, self.square = torch.zeros_like(z), torch.zeros_like(z)
        self.step, self.spent, self.stale = 0, 0, 0
        self.best_val, self.done, self.inputs = float("inf"), None, Inputs()
        training = {name: getattr(self, name) for name in ("batch_size", "lr", "warmup", "ema_decay")}
        training["seed"] = derive_seed("training", self.seed)
        copies = [copy.deepcopy(self.denoiser).requires_grad_(True) for _ in range(2)]
        self.star, self.gamma_net = (ScoreTraining(network, **training) for network in copies)
        self._hand_out(self.abar)

    @property
    def cost(self) -> int:
        """Image forwards so far, in training and in every evaluation."""
        return self.spent + self.star.cost + self.gamma_net.cost

    @property
    def abar(self) -> Tensor:
        """(T+1,) signal levels of the current schedule."""
        return schedules.abar(self.q, self.T, self.kind, self.form)

    def project(self, z: Tensor) -> Tensor:
        """The nearest admissible z, at the margin from the bounds; only the coordinates of z are moved."""
        for margin in (self.margin, 0.0):  # the margin may move what z leaves at its default, and with it abar_T
            q = schedules.project(schedules.expand(z, self.kind), self.T, self.kind, self.form, margin)
            z = q[: len(z)]
        return z

    def config(self) -> dict:
        """The parameters that a resumed run must share; functions by their names."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("denoiser", "q")]
        return {name: plain(getattr(self, name)) for name in names} | {"q": self.q_start}

    def tensors(self) -> dict[str, Tensor]:
        """Both networks with their averages and optimisers, z, its step rule, and the best q, under flat names."""
        own = {name: getattr(self, name) for name in ("z", "momentum", "square", "best_q")}
        parts = (("star", self.star), ("gamma_net", self.gamma_net))
        return own | {f"{part}.{name}": value for part, net in parts for name, value in net.tensors().items()}

    def meta(self) -> dict:
        """Steps, costs, validation, configuration and a fingerprint of the data, ready for JSON."""
        own = {name: getattr(self, name) for name in ("step", "spent", "stale", "done")}
        own["given"] = self.inputs.prints
        own["best_val"] = None if self.best_val == float("inf") else self.best_val
        return own | {"config": self.config(), "star": self.star.meta(), "gamma_net": self.gamma_net.meta()}

    def load(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Continues from a saved state, bit for bit. Raises ValueError, naming it, if a parameter or weight differs."""
        refuse_changes(meta["config"], self.config())
        for part in ("star", "gamma_net"):
            inside = {n.removeprefix(f"{part}."): v for n, v in tensors.items() if n.startswith(f"{part}.")}
            getattr(self, part).load(inside, meta[part])
            getattr(self, part).inputs.saved = {}  # data are compared below; the schedule moves between two steps
        for name in ("z", "momentum", "square", "best_q"):
            setattr(self, name, tensors[name].clone())
        for name in ("step", "spent", "stale", "done"):
            setattr(self, name, meta[name])
        self.inputs.load(meta.get("given", {}))
        self.q = schedules.expand(self.z, self.kind)
        self.best_val = float("inf") if meta["best_val"] is None else meta["best_val"]
        self._hand_out(self.abar)

    def _hand_out(self, abar: Tensor) -> None:
        """Gives the schedule to denoisers that keep one (told the level, or predicting x_0), averages included."""
        for net in (self.star, self.gamma_net):
            for module in (net.denoiser, net.ema.module):
                if getattr(module, "abar", None) is not None:
                    module.abar = abar


@dataclass(frozen=True)
class ScheduleProblem:
    """Algorithm 6 as Algorithm 1 sees it at one outer step: x is z, p the weights of a network.

    state  the schedule's parameters and both networks, which the solvers train on;  x0 (n, ...) the data
    meters count what f and g cost
    """

    state: ScheduleLearning
    x0: Tensor
    meters: list[CostMeter] = field(default_factory=list)

    def f(self, z: Tensor, net: Denoiser, seed: int, grad_steps: int | None = None) -> Tensor:
        """Quality of DDIM samples from x_T ~ N(0, I), drawn from the seed alone; (), float64, differentiable in z.

        It is N(0, I) also where abar_T is not small: then the wrong start is part of what f measures. The network, and
        the quality if it is one, are in evaluation mode meanwhile.
        """
        s, x0 = self.state, self.x0
        draw = {"generator": self._generator("x_T", seed), "device": x0.device, "dtype": x0.dtype}
        x = torch.randn((s.samples, *x0.shape[1:]), **draw)
        with _evaluation(seed, x0.device, net, s.quality):
            images = sample_ddim(self._meter(net), x, self._abar(z), s.ts, grad_steps=grad_steps)
            return _measured(s.quality, images, f"q = {s.q.tolist()} are not finite: lower lr = {s.lr} or rate")

    def g(self, z: Tensor, net: Denoiser, seed: int) -> Tensor:
        """The denoising loss on g_batch images, (), float64, with t stratified over 1..T; differentiable in z.

        Drawn from the seed alone, the network in evaluation mode.
        """
        s, x0, n = self.state, self.x0, self.state.g_batch
        draw = {"generator": self._generator("batch", seed), "device": x0.device}
        rows = torch.randint(len(x0), (n,), **draw)
        t = ((torch.arange(n, device=x0.device) + torch.rand(n, **draw)) * (s.T / n)).long().clamp(max=s.T - 1) + 1
        eps = torch.randn((n, *x0.shape[1:]), **draw, dtype=x0.dtype)
        x_t = schedules.noise(x0[rows], eps, self._abar(z)[t.cpu()])
        with _evaluation(seed, x0.device, net):
            return (self._meter(net)(x_t, t) - eps).double().square().mean()

    def solve_star(self, z: Tensor, warm: nn.Module | None = None) -> nn.Module:
        """A few steps of Algorithm 3 on theta_star; returns its moving average."""
        return self._train(self.state.star, z, None)

    def solve_gamma(self, z: Tensor, gamma: float, warm: nn.Module | None = None) -> nn.Module:
        """The same steps, on the same draws, with f/gamma besides, on theta_gamma; returns its moving average."""

        def extra(net: nn.Module, i: int) -> Tensor:
            return self._upper(z, net, derive_seed("theta_gamma", self.state.seed, i)) / gamma

        return self._train(self.state.gamma_net, z, extra)

    def estimate(
        self, _: "ScheduleProblem", z: Tensor, star: nn.Module, gamma_net: nn.Module, gamma: float
    ) -> tuple[Tensor, dict]:
        """d_z L over `draws` seeds: the mean, and info with its error "se" and all that a ScheduleStep measures."""
        s, rows = self.state, []
        for i in range(s.draws):
            seed = derive_seed("gradient", s.seed, s.step, i)
            upper, info = s.estimator(lambda z, seed: self.f(z, gamma_net, seed), z, seed=seed)
            with torch.no_grad():
                f_star = self.f(z, star, seed)
            z = z.detach().requires_grad_()
            losses = [self.g(z, net, seed) for net in (gamma_net, star)]
            slopes = [torch.autograd.grad(loss, z)[0] for loss in losses]
            values = [torch.as_tensor(v, dtype=torch.float64) for v in (info["f"], f_star, *losses)]
            rows.append([upper, *slopes, *values])
        upper, d_gamma, d_star, *values = (torch.stack(column).detach() for column in zip(*rows, strict=True))
        f, f_star, g_gamma, g_star = values
        n = s.draws**0.5
        penalty, gap = gamma * (d_gamma - d_star), g_gamma - g_star
        grad = upper + penalty
        a, b = ([w.detach().double() for w in net.parameters()] for net in (gamma_net, star))
        apart = sum((v - w).square().sum().item() for v, w in zip(a, b, strict=True))
        info = {"se": grad.std(0) / n, "f": f.mean().item(), "f_star": f_star.mean().item()}
        info["absorbed"] = (info["f_star"] - info["f"]) / max(abs(info["f_star"]), 1e-300)
        info |= {"g_gamma": g_gamma.mean().item(), "g_star": g_star.mean().item(), "gap": gap.mean().item()}
        size = max(sum(w.square().sum().item() for w in b), 1e-300)
        info |= {"gap_se": (gap.std() / n).item(), "moved": (apart / size) ** 0.5}
        info["reached"] = 2 * gamma * info["gap"] / ((info["f_star"] - info["f"]) or 1e-300)
        noisy = bool((penalty.mean(0).abs() < 2 * penalty.std(0) / n).all()) and abs(info["gap"]) < 2 * info["gap_se"]
        rounding = gamma * torch.finfo(self.x0.dtype).eps * d_star.mean(0).abs()
        lost = bool((rounding > grad.mean(0).abs().max() / 10).any())
        info["warning"] = _warning(gamma, info, noisy, lost)
        return grad.mean(0), info

    def _abar(self, z: Tensor) -> Tensor:
        s = self.state
        abar = schedules.abar(schedules.expand(z, s.kind), s.T, s.kind, s.form)
        s._hand_out(abar)
        return abar

    def _upper(self, z: Tensor, net: nn.Module, seed: int) -> Tensor:
        """f with a graph to the weights: pathwise, or a value whose gradient is the zeroth-order estimate."""
        s = self.state
        if not s.directions:
            return self.f(z, net, seed, s.grad_steps)
        weights = dict(net.named_parameters())
        generator, slope, values = self._generator("directions", seed), dict.fromkeys(weights, 0.0), []
        for _ in range(s.directions):
            u = {
                n: torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype) for n, w in weights.items()
            }
            for d in (s.delta, -s.delta):
                moved = {n: w.detach() + d * u[n] for n, w in weights.items()}
                with torch.no_grad(), in_mode(False, net):
                    values.append(self.f(z, lambda x, t, w=moved: torch.func.functional_call(net, w, (x, t)), seed))
            rise = (values[-2] - values[-1]) / (2 * s.delta * s.directions)
            slope = {n: slope[n] + rise * u[n] for n in weights}
        return torch.stack(values).mean() + sum(((w - w.detach()) * slope[n]).sum() for n, w in weights.items())

    def _train(self, training: ScoreTraining, z: Tensor, extra: Callable | None) -> nn.Module:
        before = [w.detach().clone() for w in training.denoiser.parameters()]
        steps = training.step + self.state.inner
        for _ in train_score(training, self.x0, self._abar(z.detach()), steps=steps, extra=extra):
            pass
        if all(torch.equal(v, w) for v, w in zip(before, training.denoiser.parameters(), strict=True)):
            which = "theta_star" if extra is None else "theta_gamma"
            why = "its optimiser holds other tensors than the network (was it replaced by a copy?), or lr is too small"
            raise RuntimeError(f"no weight of {which} moved in {self.state.inner} training steps: {why}")
        return training.ema

    def _meter(self, net: Denoiser) -> CostMeter:
        self.meters.append(CostMeter(net))
        return self.meters[-1]

    def _generator(self, stream: str, seed: int) -> torch.Generator:
        return torch.Generator(self.x0.device).manual_seed(derive_seed(stream, seed))


@contextmanager
def _evaluation(seed: int, device: torch.device, *networks: object) -> Iterator[None]:
    """Evaluation mode; and what is drawn all the same from torch's global generators comes from the seed."""
    with in_mode(False, *networks), seeded(derive_seed("network", seed), device):
        yield


def _measured(quality: Callable[[Tensor], Tensor], images: Tensor, otherwise: str) -> Tensor:
    """quality(images), (), float64. Raises where images or quality are not finite, or it is not one number."""
    if not torch.isfinite(images).all():
        raise FloatingPointError(f"the samples at {otherwise}")
    value = quality(images)
    if value.shape != ():
        raise ValueError(f"quality gave shape {tuple(value.shape)}; it must give one number, ()")
    if not torch.isfinite(value):
        raise FloatingPointError(f"quality is {value.item()} for {len(images)} samples that are finite")
    return value.double()


def learn_schedule(state: ScheduleLearning, x0: Tensor, *, steps: int) -> Iterator[ScheduleStep]:
    """Algorithm 6: learns the schedule of a denoiser by Algorithm 1, one outer step after the other.

    state  where to start and what is updated in place
    x0     (n, ...) data on the denoiser's device, n >= 2, floats of about [-1, 1]
    steps  number of outer steps in all, those already in `state` included
    Yields a ScheduleStep each; the last has `done` where `patience` is used up. Raises FloatingPointError if a loss,
    a sample or a gradient is not finite, RuntimeError if a network does not move; `state` is then what it was before
    the step, so that a checkpoint of it is good. Raises ValueError if x0 is not as above, or a resumed run had another.
    """
    if len(x0) < 2:
        raise ValueError(f"x0 of shape {tuple(x0.shape)} must have at least 2 rows")
    state.inputs.check(x0)
    while state.step < steps and not state.done:
        before = {name: value.clone() for name, value in state.tensors().items()}, state.meta()
        try:
            record = _outer_step(state, x0)
        except BaseException:  # also an interruption: a step is done as a whole or not at all
            state.load(*before)
            raise
        yield record


def _outer_step(state: ScheduleLearning, x0: Tensor) -> ScheduleStep:
    k, problem = state.step, ScheduleProblem(state, x0)
    rule, before = state.rate if callable(state.rate) else functools.partial(_adam, state), state.z
    options = {"gamma": state.gamma, "step": rule, "estimator": problem.estimate, "project": state.project}
    last = PenaltyStep(k - 1, before, before, 0.0, {}, None, None, before)
    outer = next(penalty_descent(problem, before, steps=k + 1, resume=last, **options))
    state._hand_out(state.abar)  # without the graph to z
    val, q = None, state.q
    if state.val and k % state.val_every == 0:
        val = float(state.val(state))
        if not val == val:
            raise FloatingPointError(f"val is {val} at k = {k}")
        state.stale += 1
        if val < state.best_val:
            state.best_q, state.best_val, state.stale = q, val, 0
        if state.patience and state.stale >= state.patience:
            state.done = f"stopped at k = {k}: no better validation than {state.best_val:.4g} in {state.stale} attempts"
    state.z, state.q = outer.x_next, schedules.expand(outer.x_next, state.kind)
    state.spent += sum(meter.cost for meter in problem.meters)
    state.step += 1
    state._hand_out(state.abar)
    measured = {"grad": outer.grad, "gamma": outer.gamma, "cost": state.cost} | outer.info
    return ScheduleStep(k=k, q=q, q_next=state.q, val=val, done=state.done, **measured)


def _adam(state: ScheduleLearning, k: int, grad: Tensor) -> Tensor:
    """Adam's step in z with short memories: sizes in units of z whatever the scale of f, smaller where signs vary."""
    step, state.momentum, state.square = adam_step(k, grad, state.momentum, state.square)
    return torch.as_tensor(state.rate, dtype=grad.dtype) * step


def adam_step(k: int, grad: Tensor, momentum: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's step of size about one, and the new moments."""
    momentum, square = 0.5 * momentum + (1 - 0.5) * grad, 0.9 * square + (1 - 0.9) * grad.square()
    mean, spread = momentum / (1 - 0.5 ** (k + 1)), (square / (1 - 0.9 ** (k + 1))).sqrt()
    return mean / (spread + 1e-30), momentum, square


def _warning(gamma: float, info: dict, noisy: bool, lost: bool) -> str | None:
    said, at = [], f"gamma = {gamma:g}"
    if info["absorbed"] > ABSORBED:
        said.append(f"{at} is too small: theta_gamma absorbs {info['absorbed']:.0%} of f; raise gamma")
    if info["gap"] < -4 * info["gap_se"] - 1e-9 * abs(info["g_star"]):
        said.append(f"gap = {info['gap']:.2g} is negative: theta_star is not at its minimum; train longer")
    if info["moved"] == 0:
        said.append(
            f"theta_gamma is theta_star bit for bit, so f does not act on it: {at} is too large, or it is frozen"
        )
    elif lost:
        said.append(f"{at} is too large: the difference of the lower-level gradients is rounding; lower gamma")
    elif noisy:
        said.append(f"{at}: gap and penalty are within two standard errors; lower gamma, or raise g_batch, inner or lr")
    fall, error = info["f_star"] - info["f"], 2 * gamma * info["gap_se"]
    if 0 < info["reached"] < SLOW and 2 * error < (SLOW - info["reached"]) * fall:
        said.append(f"theta_gamma has come {info['reached']:.0%} of its way; lower rate, or raise inner or lr")
    return "; ".join(said) or None


# ---------------------------------------------------------------- a grid of levels, for a network that stays as it is


@dataclass(frozen=True)
class GridStep:
    """One step of `learn_grid`, measured at the grid abar before it moves.

    k, f, grad  number of the step from 0; f there; its slope in the increments z, (N+1,)
    abar, mean  (N+1,) the grid; and the one to use, that of the mean of z over the last third of the steps so far
    cost        image forwards so far
    state       (4, N+1): the next z, Adam's moments, the sum of that mean;  config: what a resumed run must share
    """

    k: int
    f: float
    grad: Tensor
    abar: Tensor
    mean: Tensor
    cost: int
    state: Tensor = field(repr=False)
    config: dict = field(repr=False)


def learn_grid(
    network: LevelDenoiser,
    abar: Tensor,
    quality: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    steps: int = 120,
    rate: float = 0.1,
    sampler: Callable[..., Tensor] = sample_ddim,
    estimator: Callable[..., tuple[Tensor, dict]] = estimators.q_grad_reverse,
    batches: int = 0,
    seed: int = 0,
    resume: GridStep | None = None,
) -> Iterator[GridStep]:
    """Learns the N levels that a sampler visits, for a network that stays as it is: descent of f in their increments.

    network    on its scale the increments are taken, and the levels stay within those it has seen. With frozen weights:
               else the cost counts a backward into them
    abar       (N+1,), the grid to start from, such as abar[[0, *reversed(ts)]] of a longer table
    quality    images -> (), differentiable
    like       (n, ...), such as n images: x_T ~ N(0, I) has its shape, type and device
    steps      number of steps in all, those before `resume` included;  rate: of Adam at the first, falling to nothing
    sampler    (denoiser, x_T, abar, ts) -> images: `sample_ddim`, `sample_dpm`, or a partial, with checkpoint=True
    estimator  (f, z, seed) -> (d_z f, info). For a network that is jagged in its level, whose derivatives say nothing,
               `estimators.q_grad_coordinates` with a wide delta
    batches    so many batches of x_T in turn; 0: another at each step
    resume     continue after this record, as if never stopped
    Yields one GridStep for each k. Raises FloatingPointError if a sample, f or the gradient is not finite, ValueError
    for a grid that is not as `schedules.grid_increments` wants it, or a resumed run with other parameters.
    """
    scale, ends, ts = network.scale, network.seen, [*range(len(abar) - 1, 0, -1)]
    z, first, spent, meters = schedules.grid_increments(abar.detach().cpu(), scale, ends), 0, 0, []
    config = {"start": z, "steps": steps, "rate": rate, "sampler": sampler, "estimator": estimator, "scale": scale.name}
    config |= {"seen": ends, "shape": like.shape, "batches": batches, "seed": seed}
    config = {name: plain(value) for name, value in config.items()}
    momentum, square, total = torch.zeros(3, len(z), dtype=z.dtype)
    if resume is not None:
        refuse_changes(resume.config, config)
        (z, momentum, square, total), first, spent = resume.state, resume.k + 1, resume.cost

    def f(z: Tensor, seed: int) -> Tensor:
        table = schedules.grid_abar(z, scale, ends)
        meters.append(CostMeter(network.on(table)))
        generator = torch.Generator(like.device).manual_seed(derive_seed("x_T", seed))
        x = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        with _evaluation(seed, like.device, network, quality):
            return _measured(quality, sampler(meters[-1], x, table, ts), f"abar = {table.tolist()} are not finite")

    for k in range(first, steps):
        grad, info = estimator(f, z, seed=derive_seed("grid", seed, k % batches if batches else k))
        if not torch.isfinite(grad).all():
            raise FloatingPointError(f"the gradient at k = {k}, z = {z.tolist()} is not finite: lower rate = {rate}")
        step, momentum, square = adam_step(k, grad, momentum, square)
        n, total = k + 1 - steps + max(1, steps // 3), total + z  # of the tail, the last third
        total = total if n > 0 else torch.zeros_like(z)
        tables = [schedules.grid_abar(v, scale, ends) for v in (z, total / n if n > 0 else z)]
        z, cost = z - rate * (1 - k / steps) * step, spent + sum(meter.cost for meter in meters)
        yield GridStep(k, info["f"], grad, *tables, cost, torch.stack([z, momentum, square, total]), config)
