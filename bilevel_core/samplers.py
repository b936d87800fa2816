"""Backward sampling (Algorithm 4): DDIM, ancestral, second order, particles, one function each; differentiable in abar.

A denoiser is any callable eps_hat = denoiser(x, t) with x (B, ...) and t an int in 1..T. Time runs down a grid
t_1 > t_2 > ... > 0; the caller passes the noise (or a generator), decides about no_grad, and may pass a progress bar
such as tqdm. The law of the samples is the law of this discrete chain, not of its continuous limit.

A table may end at abar_T = 0. There x_T is noise alone and eps_hat = x_T, so that only a denoiser which offers x0_hat
itself can take the step: those of `guidance.eps_from_x0` and `eps_from_v` do, and every wrapper passes it on.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from . import schedules

Denoiser = Callable[[Tensor, int], Tensor]


class Guide(Protocol):
    """What `sample_particles` needs of `guidance.LookAhead`."""

    def look(self, x: Tensor, t: int, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """eps_hat, the guided eps (the same if not guided), both (B, ...), and h(x0_hat(x)) (B,).

        Where abar_t = 0, x0_hat stands in both places.
        """

    def potential(self, x0: Tensor) -> Tensor:
        """h(x0), (B,)."""


MIN_FAMILIES = 10  # of particles: with fewer, an estimate is not to be trusted
SPACINGS = ("trailing", "leading", "linspace")


def timesteps(T: int, steps: int, spacing: str = "trailing", offset: int = 0) -> list[int]:
    """The sampling grid t_1 > ... > t_steps >= 1, a subset of 1..T; the final step from t_steps to 0 is implied.

    trailing (default) starts at T; leading ends at 1 + offset; linspace does both (names as in diffusers; t here is
    their index plus one; offset is their steps_offset, of leading alone). Raises ValueError unless 1 <= steps <= T, the
    spacing is known and the offset leaves the grid within 1..T.
    """
    T, steps, offset = (schedules.integer(*each) for each in (("T", T, 1), ("steps", steps, 1), ("offset", offset, 0)))
    if steps > T:
        raise ValueError(f"steps = {steps} must lie in 1..T = {T}")
    most = T - 1 - (steps - 1) * (T // steps) if spacing == "leading" else 0
    if offset > most:
        raise ValueError(f"offset = {offset} must be at most {most} for {steps} {spacing} steps of T = {T}")
    if spacing == "trailing":
        grid = [round(T - i * T / steps) for i in range(steps)]
    elif spacing == "leading":
        grid = [1 + offset + i * (T // steps) for i in reversed(range(steps))]
    elif spacing == "linspace":
        grid = [T] if steps == 1 else [1 + round(i * (T - 1) / (steps - 1)) for i in reversed(range(steps))]
    else:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}")
    return grid


def draw_x_T(
    shape: tuple[int, ...],
    abar: Tensor,
    *,
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws x_T of the given shape (B, ...): N(0, I), with a warning if abar_T is too large for it.

    x0  optional (n, ...) data: then x_T = sqrt(abar_T) x_0 + sqrt(1 - abar_T) eps with x_0 resampled from these rows,
        the right law for every abar_T, and no warning.
    Raises TypeError or ValueError for a wrong table, see `schedules.check_abar`, or x0 that is not floating.
    """
    abar = schedules.check_abar(abar)
    if x0 is not None:
        schedules.check_floating(x0)
        rows = torch.randint(len(x0), (shape[0],), generator=generator, device=x0.device)
        eps = torch.randn(shape, generator=generator, device=x0.device, dtype=x0.dtype)
        return schedules.noise(x0[rows], eps, abar[-1])
    schedules.check_terminal(abar)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    abar: Tensor,
    ts: list[int],
    *,
    eta: float = 0.0,
    widest: bool = False,
    generator: torch.Generator | None = None,
    noise: Iterable[Tensor] | None = None,
    trajectory: bool = False,
    grad_steps: int | None = None,
    checkpoint: bool = False,
    progress: Callable[[list], Iterable] | None = None,
) -> Tensor | list[Tensor]:
    """Algorithm 4 with the DDIM update of Song et al. (arXiv 2010.02502, eq. 12).

    x      (B, ...)  x_T, or more exactly x at t = ts[0]
    abar   (T+1,)    signal levels, abar[0] = 1
    ts     descending grid from `timesteps`
    eta    in [0, 1]; 0 is deterministic, 1 is ancestral sampling;  widest: with noise as large as that of q(x_t | x_s)
    noise  one tensor like x for each step, else drawn from the generator (only where sigma > 0)
    grad_steps  only the last so many steps keep a graph: a truncated, biased gradient. None: all, where enabled
    checkpoint  recomputes each denoiser call in the backward pass, so that memory holds one of them at a time
    Returns x_0 (B, ...), or the list [x_T, ..., x_0] if trajectory. Raises TypeError or ValueError for a bad eta, grid
    or table (`schedules.check_abar`), for x that is not floating, and for abar = 0 at ts[0] with a denoiser that gives
    eps alone.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie in [0, 1]")
    if grad_steps is not None and grad_steps < 1:
        raise ValueError(f"grad_steps = {grad_steps} must be at least 1, or None for all")
    path, noise = [x], iter(noise) if noise is not None else None
    abar, pairs, dark = _start(x, abar, ts, progress)
    cut = 0 if grad_steps is None else len(ts) - grad_steps
    for i, (t, s) in enumerate(pairs):
        with torch.no_grad() if i < cut else nullcontext():
            c_x, c_hat, sigma = ddim_coefficients(abar, t, s, eta, t == dark)
            network = x0_source(denoiser) if t == dark else denoiser
            hat = recompute(network, x, t, use_reentrant=False) if checkpoint else network(x, t)
            x = _scalar(c_x, x) * x + _scalar(c_hat, x) * hat
            if eta and s:
                x = x + _scalar((1 - abar[t] / abar[s]).sqrt() if widest else sigma, x) * _draw(x, noise, generator)
        if trajectory:
            path.append(x)
    return path if trajectory else x


def ddim_coefficients(abar: Tensor, t: int, s: int, eta: float, dark: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(c_x, c_eps, sigma) of the DDIM step from t to s, x_s = c_x x_t + c_eps eps_hat + sigma z; sigma = 0 at s = 0.

    dark  abar_t = 0: x0_hat takes the place of eps_hat, which is x_t
    """
    a_t, a_s = abar[t], abar[s]
    if dark:
        noise = (1 - a_s).sqrt() if s else torch.zeros_like(a_s)  # sqrt(0) has no derivative
        return (1 - eta**2) ** 0.5 * noise, a_s.sqrt(), eta * noise
    sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt() if eta and s else torch.zeros_like(a_t)
    # x_s = sqrt(a_s) x0_hat + sqrt(1 - a_s - sigma^2) eps_hat + sigma z, collected by x and eps_hat
    c_x = (a_s / a_t).sqrt()
    c_eps = (1 - a_s - sigma**2).clamp(min=0) ** 0.5 if s else torch.zeros_like(a_t)
    return c_x, c_eps - c_x * (1 - a_t).sqrt(), sigma


def x0_source(denoiser: Denoiser) -> Denoiser:
    """x0_hat(x, t) of a denoiser that offers it as `denoise_x0`: it needs no division by sqrt(abar_t).

    Raises ValueError, with remedies, if the denoiser gives eps alone.
    """
    source = getattr(denoiser, "denoise_x0", None)
    if source is None:
        raise ValueError(
            "abar is 0 at the first step, where eps says nothing of x_0, and the denoiser gives eps alone: take one "
            "that predicts v or x_0 (guidance.eps_from_v, eps_from_x0), or schedules.rescale_terminal(abar)"
        )
    return source


def sample_ancestral(
    denoiser: Denoiser, x: Tensor, abar: Tensor, ts: list[int], *, variance: str = "posterior", **options: object
) -> Tensor | list[Tensor]:
    """Algorithm 4 as DDPM ancestral sampling (Ho et al., arXiv 2006.11239, eqs. 6-7), on any grid.

    variance  "posterior": that of q(x_s | x_t, x_0), as DDIM with eta = 1; "beta": 1 - abar_t/abar_s, the larger one
    The other arguments, the result and the errors are those of `sample_ddim`. The last step adds no noise.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance is {variance!r}; it must be 'posterior' or 'beta'")
    return sample_ddim(denoiser, x, abar, ts, eta=1.0, widest=variance == "beta", **options)


def sample_dpm(denoiser: Denoiser, x: Tensor, abar: Tensor, ts: list[int], *, checkpoint: bool = False) -> Tensor:
    """Algorithm 4 with DPM-Solver++(2M), second order and deterministic (Lu et al., arXiv 2211.01095, Algorithm 2).

    A DDIM step whose x0_hat is extrapolated, along log-SNR, from the last step's; the first step and the last, to
    abar = 1, are plain DDIM (in diffusers: DPMSolverMultistepScheduler, whose last sigma is 0).
    Arguments, result and errors are those of `sample_ddim`.
    """
    abar, pairs, dark = _start(x, abar, ts, None)
    last = None
    for t, s in pairs:
        a_t, a_s = abar[t].clamp(min=1e-300), abar[s]
        network = x0_source(denoiser) if t == dark else denoiser
        hat = recompute(network, x, t, use_reentrant=False) if checkpoint else network(x, t)
        x0 = hat if t == dark else (x - _scalar((1 - a_t).sqrt(), x) * hat) / _scalar(a_t.sqrt(), x)
        snr, ahead = schedules.log_snr(a_t), x0
        if last and s:
            ahead = x0 + _scalar((schedules.log_snr(a_s) - snr) / (2 * (snr - last[1])), x) * (x0 - last[0])
        last = (x0, snr) if t != dark else None
        left = ((1 - a_s) / (1 - a_t)).sqrt() if s else torch.zeros_like(a_s)  # sqrt(0) has no derivative
        x = _scalar(left, x) * x + _scalar(a_s.sqrt() - left * a_t.sqrt(), x) * ahead
    return x


def sample_particles(
    guide: "Guide",
    x: Tensor,
    abar: Tensor,
    ts: list[int],
    *,
    eta: float = 1.0,
    guided: bool = True,
    threshold: float = 0.5,
    keep_noise: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[list], Iterable] | None = None,
) -> tuple[Tensor, Tensor, dict]:
    """Sequential Monte Carlo for the law of `sample_ddim`'s output tilted by exp(h): exact as the number of rows grows.

    Particles start with the weight exp(h(x0_hat(x_T))), move by the guided or plain kernel, and are weighted by
    (plain/proposal kernel) exp(h(x0_hat(x_s)) - h(x0_hat(x_t))), with x0_hat(x_0) = x_0. The last step is plain.

    guide      a `guidance.LookAhead` around the plain denoiser, which holds the potential h = reward/lam
    x          (n, ...)  x_T, one particle a row, drawn as for `sample_ddim`;  abar, ts, progress: as there
    eta        in (0, 1], the chain's own
    guided     False proposes with the plain kernel: then the reward needs no gradient
    threshold  systematic resampling where the effective sample size falls below threshold n; 0 never, 1 always
    keep_noise  info holds "z" (n, steps, ...) too: the noise with which the plain chain makes each x_0, as
               `tempering.noise_map` takes it. From rows of z drawn by their weights, `tempering.sample_tempered` at
               (infinity, lam) goes on to move them, which leaves their law as it is
    Returns x_0 (n, ...), log-weights (n,) whose exponentials sum to one, and info: "ess" before each resampling and at
    the end, "resampled" the times t at which it happened, "log_z" the estimate of log E exp(h(x_0)), "family" (n,), the
    row of x_T that each descends from, and "families", how many of these there are effectively, by their weights.
    Resampled particles are dependent: take standard errors from families (`algorithms.TiltSamples`, group) or
    independent calls. Warns if fewer than 10 families are left of 100 starts or more: then the law of a look-ahead that
    falls short is all there is, and nothing in the particles can tell. Raises ValueError for a bad eta or grid.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta = {eta} must lie in (0, 1]: without noise no weight can correct the proposal")
    n = len(x)
    log_w = torch.full((n,), -math.log(n), dtype=torch.float64, device=x.device)  # exp(log_w) sums to Z so far
    h, sizes, resampled, family, path = (
        torch.zeros_like(log_w),
        [],
        [],
        torch.arange(n, device=x.device),
        [x] * keep_noise,
    )
    abar, pairs, dark = _start(x, abar, ts, progress)
    for t, s in pairs:
        eps_hat, eps_proposal, h_next = guide.look(x, t, guided and s > 0)
        log_w, h = log_w + h_next - h, h_next.double()
        sizes.append(1 / log_w.softmax(0).square().sum().item())
        if sizes[-1] < threshold * n:
            rows = _systematic(log_w, generator)
            x, eps_hat, eps_proposal, h, family = (v[rows] for v in (x, eps_hat, eps_proposal, h, family))
            path = [v[rows] for v in path]
            log_w = torch.full_like(log_w, log_w.logsumexp(0).item() - math.log(n))
            resampled.append(t)
        c_x, c_eps, sigma = (_scalar(c, x) for c in ddim_coefficients(abar, t, s, eta, t == dark))
        x = c_x * x + c_eps * eps_proposal
        if s:
            z, shift = _draw(x, None, generator), c_eps * (eps_proposal - eps_hat) / sigma
            x = x + sigma * z
            log_w = log_w - (z * shift + shift**2 / 2).reshape(n, -1).double().sum(1)
            path += [z + shift] * keep_noise
    log_w = log_w + guide.potential(x) - h
    sizes.append(1 / log_w.softmax(0).square().sum().item())
    families = 1 / torch.zeros_like(log_w).index_add(0, family, log_w.softmax(0)).square().sum().item()
    if families < MIN_FAMILIES <= n / 10:
        said = f"the particles descend from {families:.1f} of {n} starts, by weight: their law may be the look-ahead's"
        warnings.warn(f"{said}; take more, a milder lam, or tempering.sample_tempered", stacklevel=2)
    info = {"ess": sizes, "resampled": resampled, "log_z": log_w.logsumexp(0).item(), "family": family}
    return x, log_w.log_softmax(0), info | {"families": families} | ({"z": torch.stack(path, 1)} if keep_noise else {})


def _systematic(log_w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Row numbers (n,), row i about n w_i times, from one uniform number."""
    n = len(log_w)
    u = torch.rand(1, generator=generator, device=log_w.device, dtype=torch.float64)
    grid = (torch.arange(n, device=log_w.device) + u) / n
    return torch.searchsorted(log_w.softmax(0).cumsum(0), grid).clamp(max=n - 1)


def check_grid(ts: Iterable[int], abar: Tensor) -> list[int]:
    """The grid as ints of Python. Raises ValueError unless it descends within 1..T and abar (T+1,) falls along it."""
    grid = [schedules.integer("a time of the grid", t, 0) for t in ts]
    if not grid or grid[0] >= len(abar) or grid[-1] < 1 or any(t <= s for t, s in itertools.pairwise(grid)):
        raise ValueError(f"the grid {ts} must descend within 1..T = {len(abar) - 1}, in integers")
    levels = abar.detach()[[*grid, 0]]
    if not schedules.read((levels[:-1] < levels[1:]).all(), True):
        k = int((levels[:-1] >= levels[1:]).nonzero()[0])
        raise ValueError(
            f"abar = {levels[k]:.6g} at t = {grid[k]} and at {[*grid, 0][k + 1]}, but it must fall along the grid: "
            "keep the table in float64, or take a coarser grid"
        )
    return grid


def _start(
    x: Tensor, abar: Tensor, ts: list[int], progress: Callable | None
) -> tuple[Tensor, Iterable[tuple[int, int]], int | None]:
    """abar, checked; the steps (t, s), from each grid point to the next and at last to 0; and t where abar_t = 0."""
    schedules.check_floating(x)
    abar = schedules.check_abar(abar)
    ts = check_grid(ts, abar)
    pairs = list(zip(ts, [*ts[1:], 0], strict=True))
    dark = ts[0] if schedules.read(abar[ts[0]], 1.0) == 0 else None
    return abar, progress(pairs) if progress else pairs, dark


def _draw(x: Tensor, noise: Iterable[Tensor] | None, generator: torch.Generator | None) -> Tensor:
    if noise is not None:
        return next(noise)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _scalar(value: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient, rounded once to the dtype and device of x."""
    return value.to(device=x.device, dtype=x.dtype)
