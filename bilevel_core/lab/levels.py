"""Noise levels in training: fixed and learned distributions of them, and networks that were told t instead.

A distribution of levels is a table abar whose times 1..T, taken uniformly as Algorithm 3 does, have it: `train_score`
on `Density(...).abar(T)` with a `LevelDenoiser` of that table trains for every schedule within its range at once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import schedules
from ..algorithms import Inputs, ScoreTraining, in_mode, plain, refuse_changes, train_score
from ..guidance import CostMeter, LevelDenoiser
from ..samplers import sample_ddim
from ..schedule_learning import adam_step
from ..seeds import derive_seed

BROAD = (0.003 * math.pi / 2, 0.998 * math.pi / 2)  # angles: beyond what a grid of up to a hundred steps visits
FINE = 4096  # cells in which a density is summed


def time_scale(abar: Tensor, nearest: bool = False) -> schedules.Scale:
    """The scale on which a network that is told t reads levels: the times of its own schedule abar (T+1,), T >= 2.

    `LevelDenoiser(network, abar, time_scale(abar)).on(other)` is a denoiser of another schedule: at each of its levels
    the network is told when it knew that level. Between two times that is a number between them, by interpolation of
    the angle; beyond the table, one beyond 1..T (and a warning). nearest: a whole number, int64, without a derivative.
    Raises TypeError or ValueError without a schedule.
    """
    known, T = schedules.angle(schedules.check_abar(abar).detach()[1:]), schedules.integer("T", len(abar) - 1, 2)

    def time(abar_t: Tensor) -> Tensor:
        wanted, own = schedules.angle(abar_t), known.to(abar_t.device)
        i = torch.searchsorted(own, wanted.detach().contiguous()).clamp(1, T - 1)  # own[i - 1] is the angle at t = i
        t = i + (wanted - own[i - 1]) / (own[i] - own[i - 1]).clamp(min=1e-12)
        return t.round().long() if nearest else t

    def abar_of(t: Tensor) -> Tensor:
        own, i = known.to(t.device), t.detach().floor().long().clamp(1, T - 1)
        return torch.cos(torch.lerp(own[i - 1], own[i], t.double() - i)).square()

    return schedules.Scale("t", time, abar_of, (1.0, float(T)))


# ---------------------------------------------------------------- a density of levels, fixed or learned


@dataclass(frozen=True)
class Density:
    """A smooth density of training levels: that of the Gaussian problem, times a ratio between 1/bound and bound.

    For Gaussian data of standard deviation s, the best levels for any number of steps are equidistant in
    atan(tan(angle)/s) (chapter 9): there the density is uniform at first. s = 1: uniform in the angle.

    phi   (K,) weights of cos(k pi place), k = 1..K, in the ratio's logarithm; none: the density is what it was at first
    ends  lowest and highest angle;  place: where a level lies between them, in 0..1, on the scale above
    """

    phi: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    s: float = 1.0
    ends: tuple[float, float] = BROAD
    bound: float = 4.0

    def __post_init__(self):
        if not (0 <= self.ends[0] < self.ends[1] <= math.pi / 2 and 0 < self.s < float("inf") and self.bound >= 1):
            raise ValueError(f"ends must rise within 0..pi/2, s > 0 and bound >= 1; found {self}")

    def log_ratio(self, place: Tensor) -> Tensor:
        """Logarithm of the learned density over the first, (n,), for places (n,); differentiable in phi."""
        modes = torch.arange(1, len(self.phi) + 1, dtype=torch.float64)

        def bend(place: Tensor) -> Tensor:
            waves = torch.cos(math.pi * modes * place.double()[:, None])
            return math.log(self.bound) / 2 * torch.tanh(waves @ self.phi.double())

        return bend(place) - (bend(self._cells()).logsumexp(0) - math.log(FINE))

    def places(self, T: int) -> Tensor:
        """(T,): the middles of T parts of equal probability, rising."""
        with torch.no_grad():
            sums = torch.cat([torch.zeros(1, dtype=torch.float64), self.log_ratio(self._cells()).exp().cumsum(0)])
        wanted = (torch.arange(T, dtype=torch.float64) + 0.5) / T * sums[-1]
        i = torch.searchsorted(sums, wanted).clamp(1, FINE)
        return (i - 1 + (wanted - sums[i - 1]) / (sums[i] - sums[i - 1])) / FINE

    def abar(self, T: int = 1000) -> Tensor:
        """The table (T+1,) whose times 1..T, taken uniformly, have this density."""
        low, high = (math.atan2(math.sin(end), self.s * math.cos(end)) for end in self.ends)
        v = low + (high - low) * self.places(T)
        level = torch.atan2(self.s * torch.sin(v), torch.cos(v))
        return torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(level)])

    def slope(self, place: Tensor, rise: Tensor) -> Tensor:
        """d/dphi E[rise] over levels of this density, (K,), from a rise (n,) of the loss at places (n,) drawn from it.

        By the logarithm's derivative: nothing is differentiated in the level.
        """
        phi = self.phi.detach().requires_grad_()
        value = (dataclasses.replace(self, phi=phi).log_ratio(place) * rise.detach().double()).mean()
        return torch.autograd.grad(value, phi)[0]

    @staticmethod
    def _cells() -> Tensor:
        return (torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE


@dataclass(frozen=True)
class DensityStep:
    """One round of `learn_density`: training steps so far, f and its slope in phi, phi before and after, the cost."""

    step: int
    f: float
    grad: Tensor
    phi: Tensor
    phi_next: Tensor
    cost: int


@dataclass
class DensityLearning:
    """What `learn_density` carries from round to round, all of it saved by `tensors` and `meta`.

    training  Algorithm 3 of a `LevelDenoiser` that is told the angle
    quality   images -> (), differentiable;  grid: abar (N+1,) at which f is measured;  sampler: as for `learn_grid`
    density   where to start
    samples, batch   images of one evaluation of f, and levels of one comparison of losses
    every     training steps of a round;  rate: of Adam in phi
    reach     length of theta_gamma's one step, in units of the weights
    T         levels of the table that training draws from;  seed: of f and the comparison
    Raises ValueError for whatever is out of its range.
    """

    training: ScoreTraining
    quality: Callable[[Tensor], Tensor]
    grid: Tensor
    density: Density = dataclasses.field(default_factory=lambda: Density(torch.zeros(6, dtype=torch.float64)))
    sampler: Callable[..., Tensor] = sample_ddim
    samples: int = 128
    batch: int = 512
    every: int = 50
    rate: float = 0.05
    reach: float = 0.01
    T: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name, low in {"samples": 2, "batch": 2, "every": 1, "T": 2}.items():
            schedules.integer(name, getattr(self, name), low)
        if not (self.rate >= 0 and self.reach > 0 and len(self.density.phi)):
            raise ValueError(f"rate = {self.rate} and reach = {self.reach} must be positive, and phi not empty")
        if getattr(self.training.denoiser, "scale", None) != schedules.ANGLE:
            raise ValueError("the denoiser of this training must be a LevelDenoiser that is told the angle")
        self.start = self.density.phi.tolist()
        self.momentum, self.square = torch.zeros(2, len(self.start), dtype=torch.float64)
        self.spent, self.inputs = 0, Inputs()
        self._hand_out()

    @property
    def step(self) -> int:
        """Training steps so far."""
        return self.training.step

    @property
    def cost(self) -> int:
        """Image forwards so far, in training and besides."""
        return self.spent + self.training.cost

    def config(self) -> dict:
        """The parameters that a resumed run must share; functions by their names."""
        names = ("quality", "grid", "sampler", "samples", "batch", "every", "rate", "reach", "T", "seed", "start")
        density = {name: plain(getattr(self.density, name)) for name in ("s", "ends", "bound")}
        return {name: plain(getattr(self, name)) for name in names} | density

    def tensors(self) -> dict[str, Tensor]:
        """Those of the training, phi and its step rule, under flat names."""
        own = {"phi": self.density.phi, "momentum": self.momentum, "square": self.square}
        return own | {f"training.{name}": value for name, value in self.training.tensors().items()}

    def meta(self) -> dict:
        """Costs, configuration and fingerprints of the data, ready for JSON."""
        own = {"spent": self.spent, "given": self.inputs.prints, "config": self.config()}
        return own | {"training": self.training.meta()}

    def load(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Continues from a saved state, bit for bit. Raises ValueError, naming it, if a parameter or weight differs."""
        refuse_changes(meta["config"], self.config())
        inside = {n.removeprefix("training."): v for n, v in tensors.items() if n.startswith("training.")}
        self.training.load(inside, meta["training"])
        self.training.inputs.saved = {}  # data are compared below; the levels move between two rounds
        self.inputs.load(meta["given"])
        self.density = dataclasses.replace(self.density, phi=tensors["phi"].clone())
        self.momentum, self.square, self.spent = tensors["momentum"].clone(), tensors["square"].clone(), meta["spent"]
        self._hand_out()

    def _hand_out(self) -> Tensor:
        table = self.density.abar(self.T)
        for network in (self.training.denoiser, self.training.ema.module):
            network.abar = table
        return table


def learn_density(state: DensityLearning, x0: Tensor, *, steps: int) -> Iterator[DensityStep]:
    """Algorithm 3 on levels whose density is learned as training goes on, so that all training counts.

    The penalty's gradient without a second network: theta_gamma is theta (the moving average) after one step down f,
    measured by Adam's curvature as the weights' own steps are, and

        d_phi L ~ d_phi E_{level ~ phi}[ loss(theta_gamma) - loss(theta) ],

    with common images and noise. Levels at which a network with better samples would have a lower loss get more weight.
    It looks one step ahead, whereas the whole response of theta to phi is that of an infinitely long training.

    x0 (n, ...) data;  steps: training steps in all, those of `state` included, a multiple of `every`
    Yields a DensityStep for each round. Raises as `train_score` does, and ValueError for other steps.
    """
    if steps % state.every:
        raise ValueError(f"steps = {steps} must be a multiple of every = {state.every}")
    state.inputs.check(x0)
    while state.step < steps:
        table, training = state._hand_out(), state.training
        for _ in train_score(training, x0, table, steps=training.step + state.every):
            pass
        f, moved = _towards_quality(state, x0)
        place, rise = _rise(state, x0, table, moved)
        phi, grad = state.density.phi, state.density.slope(place, rise)
        k = training.step // state.every - 1
        step, state.momentum, state.square = adam_step(k, grad, state.momentum, state.square)
        state.density = dataclasses.replace(state.density, phi=phi - state.rate * step)
        state._hand_out()
        yield DensityStep(training.step, f, grad, phi, state.density.phi, state.cost)


def _towards_quality(state: DensityLearning, x0: Tensor) -> tuple[float, LevelDenoiser]:
    """f at the moving average, and theta_gamma: a copy of it after one step down f of length `reach`."""
    training, network = state.training, copy.deepcopy(state.training.ema.module).requires_grad_(True)
    generator = torch.Generator(x0.device).manual_seed(derive_seed("x_T", state.seed, state.step))
    x = torch.randn((state.samples, *x0.shape[1:]), generator=generator, device=x0.device, dtype=x0.dtype)
    weights, meter = list(network.parameters()), CostMeter(network.on(state.grid))
    with torch.enable_grad(), in_mode(False, network, state.quality):
        f = state.quality(state.sampler(meter, x, state.grid, [*range(len(state.grid) - 1, 0, -1)]))
        slopes = torch.autograd.grad(f, weights, materialize_grads=True)
    state.spent += meter.cost
    own = [training.optimizer.state[w]["exp_avg_sq"] for w in training.denoiser.parameters()]
    with torch.no_grad():
        steps = [slope / (square.sqrt() + 1e-8) for slope, square in zip(slopes, own, strict=True)]
        sizes = [torch.stack([v.double().norm() for v in values]).norm() for values in (weights, steps)]
        if not torch.isfinite(sizes[1]):
            raise FloatingPointError(f"the gradient of f = {f.item()} at step {state.step} is not finite")
        for weight, step in zip(weights, steps, strict=True):
            weight -= (state.reach * sizes[0] / sizes[1].clamp(min=1e-300)).to(weight) * step
    return f.item(), network


@torch.no_grad()
def _rise(state: DensityLearning, x0: Tensor, table: Tensor, moved: nn.Module) -> tuple[Tensor, Tensor]:
    """Places (n,) of levels drawn from the density, stratified, and loss(moved) - loss(moving average) there, (n,)."""
    n, generator = state.batch, torch.Generator(x0.device).manual_seed(derive_seed("rise", state.seed, state.step))
    draw = {"generator": generator, "device": x0.device}
    rows = torch.randint(len(x0), (n,), **draw)
    t = ((torch.arange(n, device=x0.device) + torch.rand(n, **draw)) * (state.T / n)).long().clamp(max=state.T - 1) + 1
    eps = torch.randn((n, *x0.shape[1:]), **draw, dtype=x0.dtype)
    x_t = schedules.noise(x0[rows], eps, table[t.cpu()])
    with in_mode(False, moved):
        losses = [(net(x_t, t) - eps).double().square().flatten(1).mean(1) for net in (moved, state.training.ema)]
    state.spent += 2 * n
    return state.density.places(state.T)[t.cpu() - 1], (losses[0] - losses[1]).cpu()
