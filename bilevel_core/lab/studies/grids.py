"""Grids of noise levels that nobody learned, abar (N+1,): the usual ones, published rules, and refined ones.

All have their levels within SEEN, what a network that was trained on DENSITY knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ... import schedules
from ...samplers import timesteps
from .. import levels
from . import schedule_transfer
from .schedule_race import FIXED
from .schedule_transfer import GaussianImages

DENSITY = levels.Density(s=0.5)  # of training levels: uniform in atan(tan(angle)/s)
SEEN = tuple(schedules.angle(DENSITY.abar()[[1, -1]]).tolist())  # the angles that a network so trained knows


def within(abar: Tensor, ends: tuple[float, float] = SEEN) -> Tensor:
    """A grid (N+1,) with what lies beyond the angles `ends` moved there. Raises ValueError unless levels then rise."""
    level = schedules.angle(schedules.check_abar(abar)[1:]).clamp(*ends)
    if not (level.diff() > 0).all():
        raise ValueError(f"levels must rise strictly within the angles {ends}; found {level.tolist()}")
    return torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(level)])


def of_levels(rising: Tensor) -> Tensor:
    """Of signal levels (N,) that rise, as `schedule_transfer` has them."""
    return within(torch.cat([rising, torch.ones(1, dtype=torch.float64)]).flip(0))


def of_schedule(kind: str, q: Sequence[float], steps: int, T: int = 1000) -> Tensor:
    """The levels of a schedule at the usual times."""
    table = schedules.abar(torch.tensor(q, dtype=torch.float64), T, kind)
    return within(table[[0, *reversed(timesteps(T, steps))]])


def ruled(rule: str, sigmas: tuple[float, float], steps: int) -> Tensor:
    """By a rule of `schedule_transfer.spaced` between two noise-to-signal ratios."""
    return of_levels(schedule_transfer.spaced(1 / (1 + torch.tensor((0.0, *sigmas)).double().square()), steps, rule))


def constant_rate(problem: GaussianImages, steps: int, fine: int = 4096) -> Tensor:
    """Equal changes of the noisy images' law (Okada et al., arXiv 2411.12188), by the Fréchet distance of its moments.

    int v = i/N at level i, v^2 = |mean|^2 (d cos/d angle)^2 + sum_k (d/d angle sqrt(s_k^2 cos^2 + sin^2))^2, over the
    angles that networks see.
    """
    v, s2 = torch.linspace(*SEEN, fine, dtype=torch.float64), problem.s**2
    cos, sin = torch.cos(v)[:, None], torch.sin(v)[:, None]
    rate = ((1 - s2) * sin * cos / (s2 * cos**2 + sin**2).sqrt()).square().sum(1)
    rate = (rate + problem.mean.square().sum() * sin[:, 0] ** 2).sqrt()
    way = torch.cat([rate.new_zeros(1), ((rate[1:] + rate[:-1]) / 2).cumsum(0)])
    wanted = way[-1] * torch.arange(1, steps + 1, dtype=torch.float64) / steps
    i = torch.searchsorted(way, wanted).clamp(1, fine - 1)
    level = v[i - 1] + (wanted - way[i - 1]) / (way[i] - way[i - 1]) * (v[i] - v[i - 1])
    return within(torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(level)]))


ALIGN = (0.03, 80.0)  # noise-to-signal ratios between which `align` moves its levels


@torch.no_grad()
def changes(network: Callable, x0: Tensor, fine: int, seed: int) -> tuple[Tensor, Tensor]:
    """Angles (M,) and E |x0_hat(x_i) - x0_hat(x_j)|^2 (M, M) along the forward process of images x0, by one path each.

    network  (x, level) -> eps_hat
    """
    low, high = (math.atan(sigma) for sigma in ALIGN)
    level = torch.linspace(low, high, fine, dtype=torch.float64).clamp(*SEEN)
    generator, sigma = torch.Generator().manual_seed(seed), torch.tan(level)
    more = torch.cat([sigma[:1] ** 2, (sigma**2).diff()]).sqrt()
    hats, x = [], x0.double()
    for v, step in zip(level, more, strict=True):
        x = x + step * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x_t = (torch.cos(v) * x).float()
        eps_hat = network(x_t, v.float().reshape(1))
        hats.append(((x_t - torch.sin(v).float() * eps_hat) / torch.cos(v).float()).flatten().double())
    hats = torch.stack(hats)
    gram = hats @ hats.T / len(x0)
    return level, (gram.diag()[:, None] + gram.diag() - 2 * gram).clamp(min=0)


def align(level: Tensor, change: Tensor, steps: int) -> Tensor:
    """The grid with the least bound of Align Your Steps (Sabour et al., arXiv 2404.14507), among levels (M,).

    sum over steps from sigma_j to sigma_i of int_i^j E |x0_hat(sigma) - x0_hat(sigma_j)|^2 dsigma/sigma^3, exactly
    least, by dynamic programming over what `changes` measured; from the highest level down to the lowest, after which
    the last step goes to the clean image: of N + 1 levels the lowest stands for it.
    """
    M, sigma = len(level), torch.tan(level)
    if not 1 <= steps < M:
        raise ValueError(f"steps = {steps} must be at least 1 and below the {M} levels")
    cell = torch.cat([(sigma[:-1] ** -2 - sigma[1:] ** -2) / 2, sigma.new_zeros(1)])
    sums = torch.cat([change.new_zeros(1, M), (cell[:, None] * change).cumsum(0)])
    cost = sums.diagonal()[None, :] - sums[:-1]  # [i, j]: of a step from j down to i
    cost = torch.where(torch.ones(M, M, dtype=torch.bool).triu(1), cost, math.inf)
    best, came = torch.full((M,), math.inf, dtype=torch.float64), []
    best[0] = 0.0
    for _ in range(steps):
        best, back = (best[:, None] + cost).min(0)
        came.append(back)
    j, chosen = M - 1, []
    for back in reversed(came):
        chosen.append(j)
        j = int(back[j])
    return within(torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(level[chosen[::-1]])]))


def refined(grid: Tensor, steps: int) -> Tensor:
    """A grid of another number of steps on the monotone curve (PCHIP) through the angles of `grid` (N+1,) over i/N."""
    from scipy.interpolate import PchipInterpolator

    angle = torch.cat([grid.new_zeros(1), schedules.angle(grid[1:])])
    curve = PchipInterpolator(torch.linspace(0, 1, len(grid), dtype=torch.float64).numpy(), angle.numpy())
    level = torch.as_tensor(curve(torch.arange(1, steps + 1).numpy() / steps))
    level = torch.maximum(level, SEEN[0] * (1 + torch.arange(steps) / (4 * steps)))  # apart, where they are too low
    return within(torch.cat([torch.ones(1, dtype=torch.float64), schedules.ANGLE.abar(level)]))


GRIDS: dict[str, Callable[[int], Tensor]] = {name: partial(of_schedule, *FIXED[name]) for name in FIXED} | {
    "cosine, end 0.999, tau 0.5": partial(of_schedule, "cosine", (0.0, 0.999, 0.5, 0.008)),
    "EDM, rho = 7": partial(ruled, "Karras", (math.tan(SEEN[0]), 80.0)),  # its own lowest is 0.002
    "uniform log-SNR": partial(ruled, "log-SNR", tuple(math.tan(end) for end in SEEN)),
}
