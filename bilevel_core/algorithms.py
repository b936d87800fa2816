"""The bilevel loops as generators: each step yields a small frozen record, so a caller can plot, stop and resume."""

import dataclasses
import functools
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from . import estimators, schedules
from .seeds import check_seed, derive_seed, seeded

LARGE = 5.0  # root mean square from which data are not of the scale of the noise: pixel values 0..255, or 0..16


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
class TiltSamples:
    """Samples that stand for p_0 by their rewards alone: sum_i exp(log_w_i) u(x_i) ~ E_{p_0}[u].

    r_up, r_low, log_w  (n,);  cost: what drawing them cost, in image forwards;  round: 0 for the first, then 1, 2, ...
    at     the lam whose tilt they were drawn from; infinity: p_0 itself;  parts: the sets that `pooled` joined
    group  (n,) integers: rows of one number depend on each other, as a family of particles does, or a chain's states;
           None: no rows do.  size: how many independent draws the rows are worth; None: as many as groups, by weight
    Raises ValueError, naming the reward, if one is not finite.
    """

    r_up: Tensor
    r_low: Tensor
    log_w: Tensor | None = None
    cost: int = 0
    round: int = 0
    at: float = math.inf
    parts: tuple["TiltSamples", ...] = field(default=(), repr=False)
    group: Tensor | None = field(default=None, repr=False)
    size: float | None = None

    def __post_init__(self):
        for name in ("r_up", "r_low"):
            estimators.check_rewards(name, getattr(self, name))

    @classmethod
    def from_tilt(cls, r_up: Tensor, r_low: Tensor, lam: float, log_w: Tensor, log_z: float, cost=0, **about: object):
        """From samples of the law tilted by r_low/lam, such as those of `sample_particles`, weighted back to p_0.

        about  further fields: `group`, which is "family" of the particles' info, and `size`
        """
        return cls(r_up, r_low, log_w.double() + log_z - r_low.double() / lam, cost, at=lam, **about)

    @classmethod
    def pooled(cls, *sets: "TiltSamples") -> "TiltSamples":
        """Sets drawn at several lam, the first of p_0 itself, as one set that stands for p_0; their costs add up.

        By `estimators.pool`: one constant Z for each lam, on which all rows agree; the sets' own estimates of it matter
        only between sets of one lam. A set that no other overlaps gets hardly any weight. Rows keep their order.
        """
        at = list(dict.fromkeys(s.at for s in sets))
        if at[0] < math.inf:
            raise ValueError(f"the first set must be of p_0 itself, at = infinity; they are drawn at {at}")
        sets = sorted(sets, key=lambda s: at.index(s.at))
        low, up = (torch.cat([getattr(s, name).double() for s in sets]) for name in ("r_low", "r_up"))
        own = [s.r_low.double() / s.at + (0.0 if s.log_w is None else s.log_w.double()) for s in sets]
        worth, sizes, count = [s._worth(w.softmax(0)) for s, w in zip(sets, own, strict=True)], [], []
        for lam in at:
            one_law = [i for i, s in enumerate(sets) if s.at == lam]
            sizes.append(sum(worth[i] for i in one_law))
            count.append(torch.cat([own[i] for i in one_law]).softmax(0) * sizes[-1])
        h = low / torch.tensor(at, dtype=torch.float64)[:, None]
        log_w, _ = estimators.pool(h, torch.tensor(sizes), torch.cat(count))
        group = [torch.arange(len(s.r_low)) if s.group is None else s.group.cpu() for s in sets]
        group = torch.cat(group) if any(s.group is not None for s in sets) else None
        return cls(up, low, log_w, sum(s.cost for s in sets), parts=tuple(sets), group=group)

    def _worth(self, p: Tensor) -> float:
        """How many independent draws the rows are worth, with weights p (n,) within their own law."""
        if self.size or self.group is None:
            return self.size or len(p)
        return 1 / torch.bincount(self.group.cpu(), p).square().sum().item()

    def tilt(self, lam: Tensor | float) -> tuple[Tensor, dict]:
        """Weights of p_star and info, as `estimators.tilt_weights`, without its warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return estimators.tilt_weights(self.r_low, lam, self.log_w)

    def curve(self, lams: Tensor | None = None, **options: float) -> estimators.LamCurve:
        """`estimators.lam_curve` of all rows, whose errors count groups."""
        return estimators.lam_curve(self.r_up, self.r_low, lams, self.log_w, group=self.group, **options)


@dataclass(frozen=True)
class LamStep:
    """One step of Algorithm 2 at lam: the gradient dL_gamma/dlam and its standard error, means under p_star, costs.

    up, up_se, low, kl  E r_up with its standard error, E r_low, and KL(p_star || p_0)
    ess, cost, round    effective sample size, image forwards so far, how often samples were drawn anew
    done                None, or why the loop ends here;  warning: None, or what is wrong with the estimate
    outer               the step of Algorithm 1, to resume from
    curve               at the end of a run that draws: that of all its samples, with the interval of lam
    """

    k: int
    lam: float
    grad: float
    se: float
    gamma: float
    up: float
    up_se: float
    low: float
    kl: float
    ess: float
    cost: int
    round: int
    done: str | None
    warning: str | None
    outer: PenaltyStep = field(repr=False)
    curve: estimators.LamCurve | None = field(default=None, repr=False)


@dataclass
class LamProblem:
    """Learning x = log lam as Algorithm 1 sees it: p_star is a set of samples, p_gamma the same set, weighted anew."""

    samples: TiltSamples
    draw: Callable[[float, int], TiltSamples] | None
    min_ess: float
    pool: bool = False
    again: bool = False

    def solve_star(self, x: Tensor, warm: TiltSamples | None = None) -> TiltSamples:
        """The first samples, else the last, whichever have an effective sample size of min_ess at lam; else new ones.

        It cannot see a mode that no sample is in: samples of a sharp tilt may miss one, those of p_0 cover every tilt.
        With `pool` every set drawn so far, the first included, counts at every lam; without, they are its `parts`. With
        `again` new ones are drawn in any case.
        """
        last, lam = warm or self.samples, x.exp().item()
        for samples in (last,) if self.pool else (self.samples, last):
            if self.draw is None or (not self.again and samples.tilt(lam)[1]["ess"] >= self.min_ess):
                return dataclasses.replace(samples, cost=last.cost, round=last.round, parts=last.parts)
        fresh = self.draw(lam, last.round + 1)
        parts = (*(last.parts or (last,)), *(fresh.parts or (fresh,)))
        new = TiltSamples.pooled(*parts) if self.pool else fresh
        return dataclasses.replace(new, cost=last.cost + fresh.cost, round=last.round + 1, parts=parts)

    def solve_gamma(self, x: Tensor, gamma: float, warm: None = None) -> None:
        """Nothing to do: common samples keep the difference of the two laws stable."""


def secant(previous: PenaltyStep | None, grad: Tensor, largest: float = 1.0) -> Tensor:
    """A step rule for one variable: the secant step where the slope of the gradient is positive, never above `largest`.

    Scale-free, so it crosses the flat regions of small and large lambda in a few steps. The first step is largest/2.
    After k draws of new samples `largest` is divided by 1 + k: a slope between two sets is noise for the greater part.
    """
    if previous is None:
        return largest / 2 * grad.sign()
    largest /= 1 + getattr(previous.p_star, "round", 0)
    slope = (grad - previous.grad) / (previous.x_next - previous.x)
    size = grad.abs() / slope if slope > 0 else torch.full_like(grad, largest)
    return grad.sign() * size.clamp(max=largest)


def learn_lam(
    samples: TiltSamples,
    lam: float,
    *,
    gamma: float | Callable[[int], float] = float("inf"),
    estimator: Callable[..., tuple[Tensor, dict]] = estimators.lam_grad_penalty,
    step: float | Callable[[PenaltyStep | None, Tensor], Tensor] = secant,
    steps: int = 50,
    draw: Callable[[float, int], TiltSamples] | None = None,
    min_ess: float = estimators.MIN_ESS,
    rounds: int | None = None,
    pool: bool = False,
    bounds: tuple[float, float] = (1e-4, 1e4),
    stop: float = 0.1,
    tol: float = 1e-4,
    resume: LamStep | None = None,
) -> Iterator[LamStep]:
    """Algorithm 2: learns the entropy strength lam by Algorithm 1 in log lam, from samples of a pre-trained p_0.

    samples    of p_0 and their rewards;  lam: where to start, within `bounds`
    gamma      penalty constant > 0, infinity for the true hypergradient, or a function of k
    estimator  (r_up, r_low, lam, gamma, log_w) -> (dL/dlam, info with "influence", "ess" and "warning")
    step       step size for dL/dlog lam, or a rule (last step of Algorithm 1, gradient) -> the decrease of log lam
    draw       (lam, round) -> new samples, called when the effective sample size at lam is below min_ess, for example
               particles by `TiltSamples.from_tilt`. None: lam is kept where the first samples have min_ess
    rounds     how often to draw: where the loop would converge before, it draws again; where lam would move out of
               reach after, it ends. None: as often as needed
    pool       True reweights all that was ever drawn, by `TiltSamples.pooled`, instead of the last samples alone
    stop, tol  ends where |grad| <= stop se, so that optimising further is lost in the noise of the samples, or where
               log lam moves by tol or less, once gamma is constant and unless the effective sample size is too small
    resume     continue after this record, as if never stopped; gamma and samples must be what they were
    Yields one LamStep for each k; the last has `done`: "converged ...", or "boundary ..." where the optimum is lam -> 0
    or infinity, or beyond the samples, or "draws used up ..."; None after `steps`. With `draw` there is one more, not
    where the path happens to end but at the top of the `curve` of all that was drawn, from the smallest lam of the path
    on. Standard errors count groups of samples, where they have any. Raises ValueError for a bad lam, gamma or samples,
    or if min_ess is out of reach.
    """
    if not 0 < bounds[0] <= lam <= bounds[1] < float("inf"):
        raise ValueError(f"lam = {lam} must be positive and lie within bounds = {bounds}")
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in bounds)
    reach = low if draw else _smallest_log_lam(samples, low, high, min_ess)
    previous = resume and resume.outer
    if resume and resume.round == 0:
        now = {"gamma": gamma(resume.k) if callable(gamma) else gamma, "samples": fingerprint(samples.r_low)}
        refuse_changes({"gamma": resume.gamma, "samples": fingerprint(previous.p_star.r_low)}, now)
    if resume and resume.done:
        return
    if reach > math.log(lam):
        warnings.warn(
            f"lam starts at {reach.exp():.3g}, not {lam:g}: the samples reach no further down; pass draw", stacklevel=2
        )

    def log_grad(_: object, x: Tensor, now: TiltSamples, __: None, gamma: float) -> tuple[Tensor, dict]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the record has it
            grad, info = estimator(now.r_up, now.r_low, x.exp(), gamma, now.log_w)
        return x.exp() * grad, info | {"lowest": min(previous.info["lowest"], x) if previous else x}

    def record(outer: PenaltyStep) -> LamStep:
        now, info, lam = outer.p_star, outer.info, outer.x.exp().item()
        p, tilted = now.tilt(lam)
        r_up, r_low = now.r_up.to(p), now.r_low.to(p)
        up = p @ r_up
        errors = (estimators.group_error(p, v, now.group).item() for v in (info["influence"], p * (r_up - up)))
        grad, up, low, (se, up_se) = outer.grad.item() / lam, up.item(), (p @ r_low).item(), errors
        size = min(info["ess"], tilted["ess"]), now.cost, now.round
        return LamStep(
            outer.k, lam, grad, se, outer.gamma, up, up_se, low, tilted["kl"], *size, None, info["warning"], outer
        )

    def ending(now: LamStep) -> str | None:
        """Why the loop ends here, or None; and whether it is to draw again."""
        x, grad, done = now.outer.x, now.outer.grad.item(), None
        limited = draw is not None and rounds is not None
        left = limited and now.round < rounds
        if (x <= reach and grad > 0) or (x >= high and grad < 0):
            where = "lam -> 0" if x <= low else "lam -> infinity" if x >= high else "below what the samples reach"
            done = f"boundary at lam = {now.lam:.4g}: the optimum is {where}"
        elif now.ess >= min_ess and (left or now.se < math.inf):
            if abs(grad) <= stop * now.lam * now.se or (now.outer.x_next - x).abs() <= tol:
                done = f"converged at lam = {now.lam:.4g}"
        if callable(gamma) and gamma(now.k + 1) != now.gamma:
            done = None
        problem.again = bool(left and done and done.startswith("converged"))
        if limited and not left:
            next_lam = now.outer.x_next.exp().item()
            if all(s.tilt(next_lam)[1]["ess"] < min_ess for s in (samples, now.outer.p_star)):
                done = done or f"draws used up at lam = {now.lam:.4g}"
        return None if problem.again else done

    problem = LamProblem(samples, draw, min_ess, pool)
    done = ending(resume) if resume and draw else None
    loop = penalty_descent(
        problem,
        torch.tensor(lam, dtype=torch.float64).log(),
        gamma=gamma,
        step=(lambda k, grad: step(previous, grad)) if callable(step) else step,
        steps=steps,
        estimator=log_grad,
        project=lambda x: x.clamp(reach, high),
        resume=previous,
    )
    for outer in () if done else loop:
        found = record(outer)
        done, previous = ending(found), outer
        yield found if draw else dataclasses.replace(found, done=done)
        if done:
            break
    if draw and previous:
        now = previous.p_star
        pooled = dataclasses.replace(TiltSamples.pooled(*(now.parts or (now,))), cost=now.cost, round=now.round)
        lams = torch.linspace(previous.info["lowest"], high, 161, dtype=torch.float64).exp()
        curve = pooled.curve(lams, min_ess=min(min_ess, pooled.tilt(lams[-1])[1]["ess"] / 2))
        x = torch.tensor(min(max(curve.best, curve.lam[0].item()), curve.lam[-1].item())).double().log()
        grad, info = log_grad(None, x, pooled, None, previous.gamma)
        found = record(dataclasses.replace(previous, k=previous.k + 1, x=x, grad=grad, info=info, p_star=pooled))
        done = done and f"{done}; best at lam = {found.lam:.4g}"
        yield dataclasses.replace(found, done=done, outer=previous, curve=curve)


def _smallest_log_lam(samples: TiltSamples, low: Tensor, high: Tensor, min_ess: float) -> Tensor:
    """Where the effective sample size, which falls with lam, reaches min_ess; `low` if it stays above."""
    if samples.tilt(high.exp())[1]["ess"] < min_ess:
        raise ValueError(f"{len(samples.r_low)} samples have no effective sample size of {min_ess:g}: draw more")
    grid = range(2**30 + 1)
    step = (high - low) / grid[-1]
    return low + step * bisect_left(grid, True, key=lambda i: samples.tilt((low + step * i).exp())[1]["ess"] >= min_ess)


def refuse_changes(saved: dict, config: dict, what: str = "parameters") -> None:
    """Raises ValueError, naming what differs, unless a saved run had the parameters (or `what`) `config`."""
    changed = [f"{n}: {saved.get(n)} -> {config[n]}" for n in sorted(config) if saved.get(n) != config[n]]
    if changed:
        said = ", ".join(changed[:9] + [f"and {len(changed) - 9} more"] * (len(changed) > 9))
        raise ValueError(f"the saved run has other {what} ({said}); restore them or use another work_dir")


def plain(value: object) -> object:
    """A parameter as JSON can hold it: functions and classes by name, tensors and numbers of numpy by their values."""
    if isinstance(value, functools.partial):
        value = [value.func, *value.args, {name: plain(v) for name, v in value.keywords.items()}]
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


@contextmanager
def in_mode(training: bool, *networks: object) -> Iterator[None]:
    """Networks in training or evaluation mode within it, and each of their modules as it was after it.

    Evaluation mode has no dropout and takes the running statistics of batch norms. What is no nn.Module is left alone.
    """
    networks = [network for network in networks if isinstance(network, nn.Module)]
    before = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


class Inputs:
    """What a loop is given besides its state: checked, and after `load` compared with what the saved run was given.

    x0      the data seen last, which are not looked at again
    prints  fingerprints of data and schedule, ready for JSON;  saved: those of the saved run, until they are compared
    """

    def __init__(self):
        self.x0, self.prints, self.saved = None, {}, {}

    def load(self, prints: dict) -> None:
        """Expects what a saved run was given, at the next `check`."""
        self.x0, self.prints, self.saved = None, prints, prints

    def check(self, x0: Tensor, abar: Tensor | None = None) -> None:
        """Raises ValueError unless x0 is finite floats of the scale of noise, and both are what the saved run had."""
        prints = dict(self.prints)
        if x0 is not self.x0:
            _check_data(x0)
            prints["x0"] = fingerprint(x0)
        if abar is not None:
            prints["abar"] = [len(abar) - 1, *(f"{a:.6g}" for a in abar[:: max(1, len(abar) // 8)].tolist())]
        refuse_changes(self.saved, {name: prints.get(name) for name in self.saved}, "data or schedule")
        self.x0, self.prints, self.saved = x0, prints, {}


def _check_data(x0: Tensor) -> None:
    what = f"x0 of shape {tuple(x0.shape)}"
    if not len(x0):
        raise ValueError(f"{what} is empty")
    low, high, size = x0.min().item(), x0.max().item(), LARGE * x0.numel() ** 0.5
    if not math.isfinite(high - low):
        raise ValueError(f"{what} must be finite")
    far = max(-low, high) > LARGE and torch.linalg.vector_norm(x0.float(), dtype=torch.float64) > size
    if far or not x0.is_floating_point():
        remedy = "scale it to about [-1, 1], from 0..255 by x0.float() / 127.5 - 1"
        raise ValueError(f"{what} has {x0.dtype} values from {low:g} to {high:g}: {remedy}")


def fingerprint(x: Tensor) -> list:
    """Type, shape and two sums over the bits of x (n, ...): the same on every device, another for other data."""
    rows, size = x.detach().contiguous().reshape(len(x), -1), x.element_size()
    if rows[0].nbytes % 8 == 0:  # eight bytes at once, where they begin at a multiple of eight
        rows, size = rows.clone() if rows.storage_offset() * size % 8 else rows, 8
    sums = [rows.view(getattr(torch, f"int{8 * size}")).sum(i, dtype=torch.int64) for i in (0, 1)]  # modulo 2^64
    return [str(x.dtype), list(x.shape), *(int((s * torch.arange(1, len(s) + 1).to(s)).sum()) for s in sums)]


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
    seed        of the generator that draws batches, times and noise, and of the network's own noise, in 0..2^32 - 1
    `ema`, the average, is in evaluation mode; buffers, such as a batch norm's statistics, are those of the last step.
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
    inputs: Inputs = field(default_factory=Inputs, init=False, repr=False)

    def __post_init__(self):
        for name, low in (("batch_size", 1), ("lr", 1e-12), ("warmup", 0), ("decay_steps", 0), ("ema_decay", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {low}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay = {self.ema_decay} must be below 1, or the average never moves")
        seed = check_seed(self.seed)
        device = next(self.denoiser.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=self.lr)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.denoiser, multi_avg_fn=lambda ema, now, n: torch._foreach_lerp_(ema, now, self._ema_weight(int(n)))
        )
        self.ema.requires_grad_(False).eval()

    def _ema_weight(self, n: int) -> float:
        return 1 - min(self.ema_decay, (1 + n) / (10 + n))

    def learning_rate(self) -> float:
        """The rate of the next step, a function of the step number alone."""
        rise = min(1.0, (self.step + 1) / self.warmup) if self.warmup else 1.0
        if not self.decay_steps:
            return self.lr * rise
        done = torch.tensor(min(1.0, self.step / self.decay_steps), dtype=torch.float64)
        return self.lr * rise * float(1 + torch.cos(torch.pi * done)) / 2

    def update(self, loss: Tensor, cost: int = 0) -> float:
        """One optimiser step down the gradient of `loss`, which cost that many image forwards; returns its value.

        Raises FloatingPointError, before the weights are touched, if the loss or its gradient is not finite.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step + 1}; lower lr = {self.lr} or resume the last checkpoint"
            )
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        slopes = [w.grad for w in self.denoiser.parameters() if w.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(slopes, float("inf"))):
            self.optimizer.zero_grad()
            where = f"at step {self.step + 1}, though the loss is {value:g}: something in it is like a square root at 0"
            raise FloatingPointError(f"the gradient of the loss is not finite {where}")
        self.optimizer.step()
        self.ema.update_parameters(self.denoiser)
        self.step += 1
        self.cost += cost
        self.losses.append(value)
        return value

    def config(self) -> dict:
        """The parameters that a resumed run must share."""
        names = [f.name for f in dataclasses.fields(self) if f.init and f.name != "denoiser"]
        return {name: plain(getattr(self, name)) for name in names}

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
        """Step, cost, configuration and fingerprints of the data and the schedule, ready for JSON."""
        return {"step": self.step, "cost": self.cost, "config": self.config(), "given": self.inputs.prints}

    def load(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Continues from a saved state, bit for bit. Raises ValueError, naming it, if a parameter or weight differs."""
        refuse_changes(meta["config"], self.config())

        def part(prefix: str) -> dict[str, Tensor]:
            # Clones: the optimiser would else go on in the given tensors themselves.
            return {n[len(prefix) :]: value.clone() for n, value in tensors.items() if n.startswith(prefix)}

        saved, own = (
            {name: f"{w.dtype} {tuple(w.shape)}" for name, w in weights.items()}
            for weights in (part("denoiser."), self.denoiser.state_dict())
        )
        refuse_changes(saved, dict.fromkeys(saved) | own, "weights")
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
        self.inputs.load(meta.get("given", {}))


def train_score(
    state: ScoreTraining,
    x0: Tensor,
    abar: Tensor,
    *,
    steps: int,
    condition: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    extra: Callable[[nn.Module, int], Tensor] | None = None,
) -> Iterator[TrainStep]:
    """Algorithm 3: trains eps_theta by E ||eps_theta(x_t, t) - eps||^2 over x_0, t ~ U{1..T}, eps ~ N(0, I).

    state      where to start and what is updated in place; its denoiser is in training mode within a step alone
    x0         (n, ...) data on the denoiser's device, floats of about [-1, 1]
    abar       (T+1,) signal levels
    steps      number of steps in all, those already in `state` included
    condition  (rows (B,) of x0, generator) -> what a conditional denoiser takes as its third argument, such as captions
    extra      (denoiser, step) -> a second loss (), added to the first, such as f/gamma in Algorithm 6; its cost is not
               counted here
    Yields a TrainStep for each. What the network draws itself, as in dropout, depends on seed and step alone, so that a
    resumed run equals an uninterrupted one. Raises FloatingPointError, before the weights are touched, if the loss or
    its gradient is not finite, ValueError if the data are not as above or a resumed run had other data or levels.
    """
    T = len(abar) - 1
    state.inputs.check(x0, abar)
    while state.step < steps:
        with in_mode(True, state.denoiser), seeded(derive_seed("network", state.seed, state.step), x0.device):
            draw = {"generator": state.generator, "device": x0.device}
            rows = torch.randint(len(x0), (state.batch_size,), **draw)
            x, given = x0[rows], () if condition is None else (condition(rows, state.generator),)
            t = torch.randint(1, T + 1, (len(x),), **draw)
            eps = torch.randn(x.shape, **draw, dtype=x.dtype)
            x_t = schedules.noise(x, eps, abar[t.to(abar.device)])
            loss = (state.denoiser(x_t, t, *given) - eps).square().mean()
            if extra is not None:
                loss = loss + extra(state.denoiser, state.step)
            value = state.update(loss, 3 * len(x))
        yield TrainStep(state.step, value, state.cost)
