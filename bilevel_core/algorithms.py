"""The bilevel loops as generators: each step yields a small frozen record, so a caller can plot, stop and resume."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from . import estimators, schedules


class BilevelProblem(Protocol):
    """min_x f(x, p) subject to p in argmin_p' g(x, p'): what Algorithm 1 needs to know.

    x is a tensor; p is whatever the problem takes for a distribution (log-probabilities, weights of a network, a set
    of samples). f and g return () and are differentiable in x.
    """

    def f(self, x: Tensor, p: object) -> Tensor:
        """Upper-level objective."""

    def g(self, x: Tensor, p: object) -> Tensor:
        """Lower-level objective."""

    def solve_star(self, x: Tensor, warm: object = None) -> object:
        """p_star ~ argmin_p g(x, p), started from `warm` (the last one) if given."""

    def solve_gamma(self, x: Tensor, gamma: float, warm: object = None) -> object:
        """p_gamma ~ argmin_p f(x, p)/gamma + g(x, p), started from `warm` if given."""


@dataclass(frozen=True)
class PenaltyStep:
    """One outer step of Algorithm 1, before x moves: everything measured at x with its two lower-level solutions."""

    k: int
    x: Tensor
    grad: Tensor
    gamma: float
    info: dict
    p_star: object = field(repr=False)
    p_gamma: object = field(repr=False)
    x_next: Tensor


def penalty_descent(
    problem: BilevelProblem,
    x: Tensor,
    *,
    gamma: float | Callable[[int], float],
    step: float | Callable[[int, Tensor], Tensor],
    steps: int,
    estimator: Callable[..., tuple[Tensor, dict]] = estimators.penalty_grad,
    project: Callable[[Tensor], Tensor] = lambda x: x,
    resume: PenaltyStep | None = None,
) -> Iterator[PenaltyStep]:
    """Algorithm 1: first-order penalty descent on L_gamma(x) = min_p f + gamma (g - min_p' g).

    x          start, any shape; projected first
    gamma      penalty constant > 0, or a function of k (an increasing one anneals the bias away)
    step       step size, or a function (k, grad) -> the increment to subtract
    steps      number of outer steps in all, those before `resume` included
    estimator  (problem, x, p_star, p_gamma, gamma) -> (grad, info)
    project    x -> the nearest admissible x
    resume     continue after this record, as if never stopped
    Yields one PenaltyStep for each k. Raises FloatingPointError if the gradient stops being finite.
    """
    x, p_star, p_gamma, first = project(x.detach()), None, None, 0
    if resume is not None:
        x, p_star, p_gamma, first = resume.x_next, resume.p_star, resume.p_gamma, resume.k + 1
    for k in range(first, steps):
        gamma_k = gamma(k) if callable(gamma) else gamma
        if not gamma_k > 0:
            raise ValueError(f"gamma = {gamma_k} at k = {k}; it must be positive")
        p_star = problem.solve_star(x, p_star)  # the lower level alone
        p_gamma = problem.solve_gamma(x, gamma_k, p_gamma)  # the lower level, helped by f/gamma
        grad, info = estimator(problem, x, p_star, p_gamma, gamma_k)
        if not torch.isfinite(grad).all():
            raise FloatingPointError(f"the gradient at k = {k}, x = {x.tolist()}, gamma = {gamma_k:g} is not finite")
        x_next = project(x - (step(k, grad) if callable(step) else step * grad))
        yield PenaltyStep(k, x, grad, gamma_k, info, p_star, p_gamma, x_next)
        x = x_next


@dataclass(frozen=True)
class TrainStep:
    """One step of Algorithm 3: its number from 1, the loss, and the cost so far in units of one image forward."""

    step: int
    loss: float
    cost: int


@dataclass
class ScoreTraining:
    """What Algorithm 3 carries from step to step, all of it saved by `tensors` and `meta`.

    denoiser    network, called as denoiser(x, t) with t a long tensor (B,) of values in 1..T
    batch_size  images per step
    lr          learning rate of AdamW
    warmup      steps over which the learning rate rises linearly
    decay_steps cosine decay of the learning rate to zero at this step; 0: constant
    ema_decay   decay of the moving average of the weights, itself warmed up as (1 + n)/(10 + n)
    seed        of the generator that draws batches, times and noise
    """

    denoiser: nn.Module
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    decay_steps: int = 0
    ema_decay: float = 0.999
    seed: int = 0
    step: int = field(default=0, init=False)
    cost: int = field(default=0, init=False)
    losses: list[float] = field(default_factory=list, init=False)

    def __post_init__(self):
        for name, low in (
            ("batch_size", 1),
            ("lr", 1e-12),
            ("warmup", 0),
            ("decay_steps", 0),
            ("ema_decay", 0),
        ):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {low}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay} must be below 1, or the average never moves")
        device = next(self.denoiser.parameters()).device
        self.generator = torch.Generator(device).manual_seed(self.seed)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=self.lr)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.denoiser,
            multi_avg_fn=lambda ema, now, n: torch._foreach_lerp_(ema, now, self._ema_weight(int(n))),
        ).requires_grad_(False)

    def _ema_weight(self, n: int) -> float:
        return 1 - min(self.ema_decay, (1 + n) / (10 + n))

    def learning_rate(self) -> float:
        """The rate of the next step, a function of the step number alone."""
        rise = min(1.0, (self.step + 1) / self.warmup) if self.warmup else 1.0
        if not self.decay_steps:
            return self.lr * rise
        done = torch.tensor(min(1.0, self.step / self.decay_steps), dtype=torch.float64)
        return self.lr * rise * float(1 + torch.cos(torch.pi * done)) / 2

    def config(self) -> dict:
        """The parameters that a resumed run must share."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "denoiser"}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average, optimiser moments, generator state and losses, under flat names."""
        out = {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        out |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        out["generator"] = self.generator.get_state()
        out["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return out

    def meta(self) -> dict:
        """Step, cost and configuration, ready for JSON."""
        return {"step": self.step, "cost": self.cost, "config": self.config()}

    def load(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Continues from a saved state, bit for bit. Raises ValueError if a parameter differs, naming it."""
        config = self.config()
        changed = {name for name in config if meta["config"].get(name) != config[name]}
        if changed:
            listed = ", ".join(f"{n}: {meta['config'].get(n)} -> {config[n]}" for n in sorted(changed))
            raise ValueError(f"the saved run has other parameters ({listed}); restore them or use another work_dir")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        self.denoiser.load_state_dict(part("denoiser."))
        self.ema.load_state_dict(part("ema."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            i, key = name.split(".", 1)
            moments.setdefault(int(i), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"].cpu())
        self.losses = tensors["losses"].tolist()
        self.step, self.cost = meta["step"], meta["cost"]


def train_score(state: ScoreTraining, x0: Tensor, abar: Tensor, *, steps: int) -> Iterator[TrainStep]:
    """Algorithm 3: trains eps_theta by E ||eps_theta(x_t, t) - eps||^2 over x_0, t ~ U{1..T}, eps ~ N(0, I).

    state  where to start and what is updated in place
    x0     (n, ...) data on the denoiser's device
    abar   (T+1,) signal levels
    steps  number of steps in all, those already in `state` included
    Yields a TrainStep for each. Raises FloatingPointError, before the weights are touched, if the loss is not finite.
    """
    T = len(abar) - 1
    while state.step < steps:
        draw = {"generator": state.generator, "device": x0.device}
        x = x0[torch.randint(len(x0), (state.batch_size,), **draw)]
        t = torch.randint(1, T + 1, (len(x),), **draw)
        eps = torch.randn(x.shape, **draw, dtype=x.dtype)
        x_t = schedules.noise(x, eps, abar[t.to(abar.device)])
        loss = (state.denoiser(x_t, t) - eps).square().mean()
        value = loss.item()
        if not value < float("inf"):
            raise FloatingPointError(
                f"the loss is {value} at step {state.step + 1}; lower lr = {state.lr} or resume the last checkpoint"
            )
        state.optimizer.param_groups[0]["lr"] = state.learning_rate()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.ema.update_parameters(state.denoiser)
        state.step += 1
        state.cost += 3 * len(x)
        state.losses.append(value)
        yield TrainStep(state.step, value, state.cost)
