"""Beside the method: what its released code does instead, and estimators that the book compares with its own."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..estimators import Objective, _inputs, _lengths, _report, _two_laws, _value
from ..guidance import LookAhead, gradient_of, one_each
from ..samplers import check_grid, ddim_coefficients
from ..schedules import check_abar
from ..seeds import derive_seed


def released_target_matching(
    denoiser: Callable[[Tensor, int], Tensor],
    reward: Callable[[Tensor], Tensor],
    x0: Tensor,
    target: float,
    strength: float,
    abar: Tensor,
    ts: list[int],
) -> LookAhead:
    """One round of the released code's guidance: towards a reward of `target`, with the reward linearised at x0.

    Adds to the score -strength grad_{x_t} (target - <G, x0_hat> - b)^2/2, where G = grad reward(x0) and
    b = reward(x0) - <G, x0>. It aims at a value of the reward, not at p_0 exp(r/lam) (gradient-guided diffusion,
    arXiv 2404.14743).

    x0        (1, ...) or (B, ...)  the last round's images; the next round takes those that this one makes
    strength  beta/lam > 0;  the other arguments as for `LookAhead`, whose last step is unguided
    """
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        r = one_each(reward(x0), len(x0))
        slope = gradient_of(r, x0)
    slope, offset = slope.reshape(len(x0), -1), r.detach() - (slope * x0.detach()).reshape(len(x0), -1).sum(1)

    def closeness(x: Tensor) -> Tensor:
        return -((target - (slope * x.reshape(len(x), -1)).sum(1) - offset) ** 2) / 2

    return LookAhead(denoiser, closeness, 1 / strength, abar, ts)


def path_kl(record: list[tuple[int, Tensor]], abar: Tensor, ts: list[int], eta: float = 1.0) -> Tensor:
    """sum_t |mu_guided(x_t) - mu_0(x_t)|^2/(2 sigma_t^2) along each guided path (Girsanov); (n,), float64.

    record  what `LookAhead` recorded in one run of `sample_ddim` with the same abar, ts and eta in (0, 1]
    The mean bounds the KL between the output laws of the guided and the plain *sampler*; it is equal to it for the
    exact h-transform in the limit of many steps. Raises ValueError if a step without noise was guided: the KL is
    then infinite.
    """
    abar = check_abar(abar)
    ts = check_grid(ts, abar)
    after, kl = dict(zip(ts, [*ts[1:], 0], strict=True)), torch.zeros(())
    for t, square in record:
        if t not in after:
            raise ValueError(f"the record has a step at t = {t} that is not on the grid {ts}: it is of another run")
        _, c_eps, sigma = ddim_coefficients(abar, t, after[t], eta)
        if not sigma > 0:
            raise ValueError(f"the step at t = {t} adds no noise but was guided, so the path KL is infinite")
        kl = kl + (c_eps**2 * (1 - abar[t]) / (2 * sigma**2)).to(square.device) * square
    return kl


def guidance_norm(record: list[tuple[int, Tensor]]) -> Tensor:
    """|grad h| averaged over the steps of each path, (n,): what `lam_grad_released_est2` takes for a KL."""
    return torch.stack([square.sqrt() for _, square in record]).mean(0)


def lam_grad_released_est1(
    r_up: Tensor, r_low: Tensor, lam: Tensor | float, gamma: float, log_w: Tensor | None = None
) -> tuple[Tensor, dict]:
    """The released code's first estimator, for comparison only: gamma (KL(p_0 || p_gamma) - KL(p_0 || p_star)).

    The arguments of both KL are swapped. As gamma grows its root is where E_{p_star}[r_up] has fallen back to
    E_{p_0}[r_up], not where it is largest: (E_{p_star}[r_up] - E_{p_0}[r_up])/lam is the limit. Arguments, result and
    errors as for `estimators.lam_grad_penalty`.
    """
    r_up, rows, lams, log_w = _inputs(r_up, r_low, lam, log_w, gamma, rewards=1)
    gamma, p_0 = min(gamma, 1e100), log_w.softmax(0)  # so far out it is its limit
    p, _, p_gamma, d, rise, change = _two_laws(log_w, r_up, rows[0], lams[0], gamma)
    mean = (p_0 * d).sum()  # d is centred at E_star[d] = 0
    grad, influence = gamma * (rise - mean), gamma * (change - p_0 * (d - mean))
    return grad, _report(max(p_gamma.square().sum(), p.square().sum()), lam, influence)


def lam_grad_path(kl_gamma: Tensor, kl_star: Tensor, gamma: float) -> tuple[Tensor, dict]:
    """gamma (KL_path[guided by r_up/gamma + r_low] - KL_path[guided by r_low]): (A) from guided trajectories.

    kl_gamma, kl_star  (n,)  `path_kl` of trajectories under the two guidances, with common random numbers
    Right only where the guidance is the exact h-transform (then the path KL tends to the KL of the samples as steps
    grow). With look-ahead guidance the guided law is not the tilted one and even the sign can be wrong: don't learn
    lambda with it; draw from the tilt and use `estimators.lam_grad_penalty`, which returns alike; here "ess" is n.
    """
    return _paired(kl_gamma, kl_star, gamma)


def lam_grad_released_est2(norm_gamma: Tensor, norm_star: Tensor, gamma: float) -> tuple[Tensor, dict]:
    """The released code's second estimator, for comparison only: `lam_grad_path` with norms in place of KLs, halved.

    norm_gamma, norm_star  (n,)  norm (not squared) of the guidance, averaged over the steps of each trajectory
    It has no fixed relation to a KL. Returns as `lam_grad_path` does.
    """
    return _paired(norm_gamma / 2, norm_star / 2, gamma)


def _paired(kl_gamma: Tensor, kl_star: Tensor, gamma: float) -> tuple[Tensor, dict]:
    if kl_gamma.shape != kl_star.shape or kl_star.dim() != 1 or len(kl_star) < 2:
        raise ValueError(f"both must be (n,) with n >= 2, by trajectory: {[*kl_gamma.shape]}, {[*kl_star.shape]}")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma = {gamma} must be positive and finite")
    difference = gamma * (kl_gamma.double() - kl_star.double())
    if not torch.isfinite(difference).all():
        raise ValueError("the path KLs must be finite; leave the last step unguided, or lower the guidance")
    n, rounding = len(difference), gamma * torch.finfo(kl_star.dtype).eps * kl_star.abs().max()
    if rounding > difference.square().mean().sqrt() / 10:
        raise ValueError(f"at gamma = {gamma:g} the two agree to rounding; lower gamma, or check that r_up guides")
    return difference.mean(), {"se": difference.std() / n**0.5, "ess": float(n), "warning": None}


def q_grad_one_point(
    f: Objective, q: Tensor, previous: float, *, seed: int, delta: Tensor | float = 0.01, f_seed: int | None = None
) -> tuple[Tensor, dict]:
    """The one-point residual estimate (f(q + delta u) - previous) u/delta: one evaluation a step.

    previous  f at the last perturbed point: "f" of the last info. It centres the estimate: any constant leaves it
              unbiased, a close one lowers its variance. The first call needs a real value, f(q), not 0
    seed      of u;  f_seed: of f, the same in every step for common random numbers; None: `seed`
    The other arguments and the result are those of `estimators.q_grad_two_point`.
    """
    delta = _lengths(delta, q)
    if not math.isfinite(previous):
        raise ValueError(f"previous = {previous} must be finite: start with f(q)")
    generator = torch.Generator().manual_seed(derive_seed("directions", seed))
    u = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q)
    value = _value(f, q + delta * u, seed if f_seed is None else f_seed)
    return (value - previous) * u / delta, {"calls": 1, "f": value.item(), "se": None}
