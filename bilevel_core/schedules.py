"""Noise schedules as differentiable functions of q = (start, end, tau, epsilon).

A schedule is a decreasing curve F(u) of the time u = t/T, read on the window w = start + u (end - start), with
v = (w + epsilon) / (1 + epsilon):

    cosine   F = cos(v pi/2)^(2 tau)
    sigmoid  F = sigmoid((1 - w)/tau + epsilon)
    linear   F = exp(-tau (0.1 v + 19.9 v^2 / 2))          beta linear in time, as in DDPM

    released     beta_t = clip(1 - F(t/T)/F((t-1)/T), 1e-12, 0.999)
    normalised   the same after F(u) <- (F(u) - F(1))/(F(0) - F(1)), so that the end points are exact
                 (Chen, arXiv 2301.10972)

and abar_t = prod_{s<=t} (1 - beta_s), with abar_0 = 1. Everything is computed and returned in float64 (1 - abar_1 is
about 1e-5, so float32 would lose two digits of the noise level), from log F, so that no ratio is 0/0.

What a sampler visits is a grid of levels, whatever curve they are read from: a `Scale` names levels, `grid_abar` makes
the table of a free grid, with T = N.
"""

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("cosine", "sigmoid", "linear")
FORMS = ("released", "normalised")
NAMES = ("start", "end", "tau", "epsilon")
DEFAULT_Q = {"cosine": (0.0, 1.0, 1.0, 0.008), "sigmoid": (0.0, 4.0, 0.5, 0.0), "linear": (0.0, 1.0, 1.0, 0.0)}
BOUNDS = {  # admissible ranges; besides, end - start >= GAP and abar_T >= MIN_ABAR
    "cosine": ((0.0, 0.9), (0.0, 1.0), (0.1, 10.0), (0.0, 1.0)),
    "sigmoid": ((-4.0, 4.0), (-4.0, 8.0), (0.1, 10.0), (-4.0, 4.0)),
    "linear": ((0.0, 0.9), (0.0, 2.0), (0.1, 10.0), (0.0, 1.0)),
}
GAP = 0.05  # smallest end - start
MIN_ABAR = 1e-10  # smallest abar_T: below it 1/sqrt(abar_T) amplifies the first sampling step beyond float32
TERMINAL_ABAR = 1e-3  # above it a start at N(0, I) is visibly wrong (arXiv 2305.08891)
MIN_BETA, MAX_BETA = 1e-12, 0.999  # above 0 (the released floor), so that abar falls strictly


def log_curve(u: Tensor, q: Tensor, kind: str = "cosine") -> Tensor:
    """log F(u) of the schedule curve, before any normalisation.

    u  (...)  time t/T in [0, 1]
    q  (4,)   start, end, tau, epsilon
    Returns float64 (...), finite also where F underflows. Raises ValueError for an unknown kind.
    """
    start, end, tau, epsilon = q.double().unbind()
    w = start + u.double() * (end - start)
    v = (w + epsilon) / (1 + epsilon)
    if kind == "cosine":  # cos(v pi/2) = sin((1 - v) pi/2): exact near v = 1; the floor stands for F = 0
        return 2 * tau * torch.log(torch.sin((1 - v).clamp(1e-300, 1) * (math.pi / 2)))
    if kind == "sigmoid":
        return torch.nn.functional.logsigmoid((1 - w) / tau + epsilon)
    if kind == "linear":
        return -tau * (0.1 * v + 9.95 * v**2)
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")


def betas(q: Tensor, T: int, kind: str = "cosine", form: str = "released") -> Tensor:
    """beta_1..beta_T of a schedule, differentiable in q.

    q     (4,)  start, end, tau, epsilon (see `check` for the admissible set)
    T     number of steps, >= 2
    form  "released" or "normalised"
    Returns float64 (T,) in [1e-12, 0.999]. Raises ValueError for an unknown kind or form, or T < 2.
    """
    T = _check_names(T, kind, form)
    u = torch.arange(T + 1, dtype=torch.float64, device=q.device) / T
    log_f = log_curve(u, q, kind)
    if form == "normalised":  # log((F - F_T)/(F_0 - F_T)) up to a constant that cancels in the ratios below
        above = -torch.expm1(log_f[-1] - log_f[:-1])  # (F_t - F_T)/F_t, exactly 0 only at t = T
        log_f = log_f[:-1] + torch.log(above.clamp(min=1e-300))
        ratio = torch.expm1(log_f[1:] - log_f[:-1])
        last = torch.ones(1, dtype=ratio.dtype, device=q.device)  # F_T = 0 there, so beta_T = 1 before the clip
        return torch.cat([-ratio, last]).clamp(MIN_BETA, MAX_BETA)
    return (-torch.expm1(log_f[1:] - log_f[:-1])).clamp(MIN_BETA, MAX_BETA)


def abar(q: Tensor, T: int, kind: str = "cosine", form: str = "released") -> Tensor:
    """Signal level abar_0..abar_T: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Differentiable in q.

    Arguments as for `betas`. Returns float64 (T+1,), abar_0 = 1, decreasing, positive.
    """
    return abar_from_betas(betas(q, T, kind, form))


def abar_from_betas(betas: Tensor) -> Tensor:
    """abar_0..abar_T of any table of betas, e.g. of another library. Returns float64 (T+1,).

    betas (T,) in [0, 1); the last may be 1, so that abar_T = 0. Raises ValueError for others.
    """
    b = betas.double()
    if b.dim() != 1 or not len(b):
        raise ValueError(f"betas have shape {tuple(b.shape)}; they must be a table (T,)")
    if not read((b >= 0).all() & (b <= 1).all() & (b[:-1] < 1).all(), True):
        raise ValueError(
            f"betas must lie in [0, 1), the last in [0, 1]; found {b.min().item():.3g} to {b.max().item():.3g}"
        )
    return torch.cat([b.new_ones(1), torch.exp(torch.log1p(-b).cumsum(0))])


def check_abar(abar: Tensor) -> Tensor:
    """A table abar (T+1,) of signal levels in float64, checked: floating, abar_0 = 1, never rising, within [0, 1].

    Neighbours may be equal, as rounding to float32 makes them; along a grid `samplers.check_grid` wants a strict fall.
    Values that cannot be read (inside vmap, of fake or meta tensors) are not checked. Raises TypeError, or ValueError
    with the remedy.
    """
    if not isinstance(abar, Tensor):
        raise TypeError(f"abar is a {type(abar).__name__}; it must be a tensor (T+1,): torch.as_tensor(abar)")
    if abar.dim() != 1 or len(abar) < 2 or not abar.is_floating_point():
        raise ValueError(f"abar is {abar.dtype} of shape {tuple(abar.shape)}; it must be floating, (T+1,) with T >= 1")
    table, rounding = abar.double(), min(4 * torch.finfo(abar.dtype).eps, 1e-6)
    a = table.detach()
    fine = ((a[1:] <= a[:-1]).all() & (a[-1] >= 0)) & ((a[0] - 1).abs() <= rounding)  # false for NaN
    if not read(fine, True):
        wrong, remedy = (k for k in range(1, len(a)) if not 0 <= a[k] <= a[k - 1]), ""
        k = next(wrong, 0) if abs(a[0] - 1) <= rounding else 0
        if (a[1:] >= a[:-1]).all():
            remedy = ". These look like betas: abar_from_betas(betas)"
        elif k == 0 and a[0] < 1:
            remedy = ". Diffusers' alphas_cumprod lacks the leading 1: torch.cat([torch.ones(1), alphas_cumprod])"
        raise ValueError(f"abar[{k}] = {a[k]:.6g}, but abar must fall from abar[0] = 1 and stay within [0, 1]{remedy}")
    return table


def read(value: Tensor, otherwise: float) -> float:
    """The number in a 0-d tensor; `otherwise` where it has none to read: inside vmap, of fake or meta tensors."""
    try:
        return float(value.detach())
    except RuntimeError:
        return otherwise


def check_floating(x: Tensor) -> None:
    """Raises ValueError for images x of integers, in which noise and coefficients would be lost."""
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: make them float in [-1, 1], by images / 127.5 - 1 if they are bytes")


def integer(name: str, value: object, low: int) -> int:
    """An int of any integer type, numpy's and torch's included. Raises ValueError for others and below `low`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")
    return number


def log_snr(abar: Tensor) -> Tensor:
    """log(abar / (1 - abar)): the logarithm of the signal-to-noise ratio; +inf where abar = 1, -inf where it is 0.

    Any shape, kept.
    """
    return torch.log(abar) - torch.log1p(-abar)


def noise(x0: Tensor, eps: Tensor, abar_t: Tensor | float) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, the forward process in one jump.

    x0, eps  (B, ...), floating
    abar_t   () or (B,), in [0, 1]; the square roots are taken in float64
    Returns (B, ...) in the dtype of x0. Raises ValueError as `per_sample` does.
    """
    a = per_sample(abar_t, x0)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


def per_sample(abar_t: Tensor | float, x: Tensor) -> Tensor:
    """abar_t, () or (B,), in float64 on x's device, with trailing axes so that it multiplies x (B, ...).

    Raises ValueError for integers, which would be times t or pixels in bytes, and for another shape of abar_t.
    """
    check_floating(x)
    a = torch.as_tensor(abar_t)
    if not a.is_floating_point():
        raise ValueError(f"abar_t is {a.dtype}: pass the signal level abar[t], not the time t")
    if a.dim() and tuple(a.shape) not in ((len(x),), (1,)):
        raise ValueError(f"abar_t has shape {tuple(a.shape)} for x of shape {tuple(x.shape)}; it must be () or (B,)")
    a = a.to(device=x.device, dtype=torch.float64)
    return a.reshape(a.shape + (1,) * (x.dim() - 1)) if a.dim() else a


FREE = {"cosine": (0, 1, 2), "sigmoid": (0, 1), "linear": (0, 1)}  # the others are redundant: see `reduce`


def reduce(q: Tensor, kind: str = "cosine") -> Tensor:
    """Coordinates without redundancy: `FREE` of NAMES, once the other parameters are at their values in DEFAULT_Q.

    The four parameters are not independent: epsilon only shifts the window of the cosine (rank 3), tau and epsilon only
    shift and stretch that of the sigmoid (rank 2), and of the linear schedule (rank 2). q (4,) and `expand(reduce(q))`
    give the same abar. Returns (3,) or (2,), differentiable; start may come out a little below its bound.
    """
    start, end, tau, epsilon = q.double().unbind()
    *_, tau_0, epsilon_0 = DEFAULT_Q[_known(kind)]
    if kind == "cosine":
        low, high = ((w + epsilon) / (1 + epsilon) * (1 + epsilon_0) - epsilon_0 for w in (start, end))
        return torch.stack([low, high, tau])
    if kind == "sigmoid":
        return torch.stack([1 - tau_0 * ((1 - w) / tau + epsilon - epsilon_0) for w in (start, end)])
    # log F along v = a + u d, up to a constant: -tau d (0.1 + 19.9 a) u - 9.95 tau d^2 u^2
    a, d = (start + epsilon) / (1 + epsilon), (end - start) / (1 + epsilon)
    length = d * (tau / tau_0).sqrt()
    low = (tau * d * (0.1 + 19.9 * a) / (tau_0 * length) - 0.1) / 19.9
    return torch.stack([low, low + length]) * (1 + epsilon_0) - epsilon_0


def expand(z: Tensor, kind: str = "cosine") -> Tensor:
    """q (4,) float64 from the coordinates z of `reduce`, differentiable. Raises ValueError for a wrong shape."""
    free = FREE[_known(kind)]
    if z.shape != (len(free),):
        raise ValueError(f"z has shape {tuple(z.shape)}; for the {kind} schedule it must be ({len(free)},)")
    rest = torch.tensor(DEFAULT_Q[kind][len(free) :], dtype=torch.float64, device=z.device)
    return torch.cat([z.double(), rest])


def check(q: Tensor, T: int, kind: str = "cosine", form: str = "released") -> None:
    """Raises ValueError, naming parameter, value and range, unless q is admissible.

    Admissible: finite, inside BOUNDS[kind], end - start >= GAP, and abar_T >= MIN_ABAR for this T and form.
    """
    T = _check_names(T, kind, form)
    if q.shape != (4,):
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (4,): {', '.join(NAMES)}")
    values = [float(value) for value in q.detach()]
    for name, value, (low, high) in zip(NAMES, values, BOUNDS[kind], strict=True):
        if not low <= value <= high:  # also catches NaN
            raise ValueError(f"{name} = {value:g} is outside [{low:g}, {high:g}] for the {kind} schedule")
    if values[1] - values[0] < GAP - 1e-9:
        raise ValueError(f"end - start = {values[1] - values[0]:g} is below {GAP}: raise end or lower start")
    last = abar(q.detach(), T, kind, form)[-1].item()
    if last < MIN_ABAR * (1 - 1e-9):
        raise ValueError(f"abar_T = {last:.2g} is below {MIN_ABAR:g} at T = {T}: lower end or tau, or call project()")


def project(q: Tensor, T: int, kind: str = "cosine", form: str = "released", margin: float = 0.0) -> Tensor:
    """A nearby admissible q: clip to the bounds, open the gap, then lower end until abar_T >= MIN_ABAR.

    margin  distance kept from the bounds and added to GAP, >= 0 (in units of the parameter)
    Returns (4,), in q's dtype, detached. Idempotent; admissible q (margin 0) come back unchanged. Raises ValueError
    if q is not finite, or if no end gives abar_T >= MIN_ABAR.
    """
    T = _check_names(T, kind, form)
    if not torch.isfinite(q).all():
        raise ValueError(f"q = {q.tolist()} is not finite, so there is nothing to project; was the step too large?")
    bounds = torch.tensor(BOUNDS[kind], dtype=torch.float64)
    new = q.detach().double().cpu().clamp(bounds[:, 0] + margin, bounds[:, 1] - margin)
    gap = GAP + margin
    new[0] = torch.minimum(new[0], bounds[1, 1] - margin - gap)
    new[1] = torch.maximum(new[1], new[0] + gap)

    def too_dark(end: float) -> bool:
        return abar(torch.stack([new[0], new.new_tensor(end), new[2], new[3]]), T, kind, form)[-1] < MIN_ABAR

    low, high = float(new[0] + gap), float(new[1])
    if too_dark(high):
        if too_dark(low):
            raise ValueError(f"no end gives abar_T >= {MIN_ABAR:g} at start, tau, epsilon = {new[[0, 2, 3]].tolist()}")
        for _ in range(60):  # bisection: abar_T falls as end grows
            middle = (low + high) / 2
            low, high = (low, middle) if too_dark(middle) else (middle, high)
        new[1] = low
    return new.to(q)


def check_terminal(abar: Tensor) -> bool:
    """Warns if abar_T > TERMINAL_ABAR, where sampling must not start from N(0, I) unnoticed. Returns whether it did."""
    last = float(check_abar(abar)[-1])
    if last <= TERMINAL_ABAR:
        return False
    warnings.warn(
        f"abar_T = {last:.3g}: x_T still holds sqrt(abar_T) = {last**0.5:.3g} of the signal, so N(0, I) is the wrong "
        "start. Raise end, use form='normalised', rescale_terminal(abar), or draw_x_T(..., x0=data).",
        stacklevel=2,
    )
    return True


def rescale_terminal(abar: Tensor, last: float = 1e-5) -> Tensor:
    """Shifts and scales sqrt(abar) so that abar_T = last and abar_0 is kept (Lin et al., arXiv 2305.08891).

    abar  (T+1,);  last in (0, abar_T], not 0, so that a denoiser that predicts eps can still be inverted at T; where
        abar_T = 0 it may be up to TERMINAL_ABAR
    Returns (T+1,), float64, differentiable.
    """
    abar = check_abar(abar)
    most, name = float(abar[-1]) or TERMINAL_ABAR, "abar_T" if abar[-1] > 0 else "TERMINAL_ABAR"
    if not 0 < last <= most:
        raise ValueError(f"last = {last:g} must lie in (0, {name} = {most:.3g}]")
    root = abar.sqrt()
    slope = (root[0] - last**0.5) / (root[0] - root[-1])
    return (last**0.5 + (root - root[-1]) * slope).square()


# ---------------------------------------------------------------- noise levels, and grids of them

FLOOR = 1e-4  # share of its range that a grid deals out evenly, so that neighbours stay apart


@dataclass(frozen=True)
class Scale:
    """How noise levels are named, rising with the noise: what a network is told, and where grids are learned.

    name   of the scale
    level  abar_t (...) -> level (...), differentiable;  abar: its inverse
    ends   the lowest and highest level that a grid on this scale may have
    """

    name: str
    level: Callable[[Tensor], Tensor]
    abar: Callable[[Tensor], Tensor]
    ends: tuple[float, float]


def angle(abar_t: Tensor) -> Tensor:
    """arccos sqrt(abar_t) in [0, pi/2], where x_t = cos(angle) x_0 + sin(angle) eps; any shape, float64.

    Exact near both ends, where its derivative is infinite and comes out as 0.
    """
    a = abar_t.double()
    return torch.atan2((1 - a).clamp(min=1e-300).sqrt(), a.clamp(min=1e-300).sqrt())


INSIDE = (1e-300, 1 - 1e-16)  # where log-SNR is finite
ANGLE = Scale("angle", angle, lambda level: torch.cos(level).square(), (0.0, math.pi / 2))
# a quarter of minus log-SNR, a usual input of networks
LOG_NSR = Scale("log_nsr", lambda a: -log_snr(a.double().clamp(*INSIDE)) / 4, lambda v: (-4 * v).sigmoid(), (-5.0, 5.0))


def grid_abar(z: Tensor, scale: Scale = ANGLE, ends: tuple[float, float] | None = None) -> Tensor:
    """The table abar_0..abar_N of a free grid of N levels, both its ends free as well: sample it with ts = N..1.

    z     (N+1,), any finite numbers: the scale's range is cut into N+1 increments, in proportion to softmax(z)
    ends  lowest and highest level allowed, within `scale.ends`, such as those that a network has seen; None: these
    Returns float64 (N+1,), abar_0 = 1, strictly falling, differentiable. Raises ValueError for another z or ends.
    """
    low, high = _ends(scale, ends)
    if z.dim() != 1 or len(z) < 2 or not read(torch.isfinite(z).all(), True):
        raise ValueError(f"z = {z.tolist()} must be (N+1,) finite numbers for a grid of N >= 1 levels")
    share = (1 - FLOOR) * z.double().softmax(0) + FLOOR / len(z)
    level = low + (high - low) * share.cumsum(0)[:-1]
    return torch.cat([level.new_ones(1), scale.abar(level)])


def grid_increments(abar: Tensor, scale: Scale = ANGLE, ends: tuple[float, float] | None = None) -> Tensor:
    """z (N+1,) with `grid_abar(z, scale, ends)` = abar (N+1,), of mean 0: where to start learning from a known grid.

    The grid of N steps of a longer table is abar[[0, *reversed(ts)]]. A level at an end starts FLOOR of the range away
    from it. Raises ValueError, naming the level, unless the levels rise strictly within the ends.
    """
    low, high = _ends(scale, ends)
    level = scale.level(check_abar(abar).detach()[1:])
    edges = torch.cat([level.new_tensor([low]), level, level.new_tensor([high])])
    share = (edges.diff() / (high - low) - FLOOR / (len(level) + 1)) / (1 - FLOOR)
    outer = share[:: len(level)]  # before the first level, and beyond the last
    outer[(outer <= 0) & (outer > -2 * FLOOR)] = FLOOR
    if not (share > 0).all():
        k = int((~(share > 0)).nonzero()[0])
        raise ValueError(
            f"the {scale.name} goes from {edges[k]:.6g} to {edges[k + 1]:.6g} at level {k + 1}, but must rise strictly "
            f"within ({low:.6g}, {high:.6g}): drop levels that repeat, or clamp abar to the range"
        )
    return share.log() - share.log().mean()


def _ends(scale: Scale, ends: tuple[float, float] | None) -> tuple[float, float]:
    low, high = ends or scale.ends
    if not scale.ends[0] <= low < high <= scale.ends[1]:
        raise ValueError(f"ends = {ends} must rise within {scale.ends}, the range of the scale {scale.name!r}")
    return low, high


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return kind


def _check_names(T: int, kind: str, form: str) -> int:
    _known(kind)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    return integer("T", T, 2)
