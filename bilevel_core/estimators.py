"""Estimators of the upper-level gradient: pure functions, inputs in, (grad, info) out."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .seeds import derive_seed


def penalty_grad(problem: object, x: Tensor, p_star: object, p_gamma: object, gamma: float) -> tuple[Tensor, dict]:
    """grad L_gamma(x) = d_x f(x, p_gamma) + gamma (d_x g(x, p_gamma) - d_x g(x, p_star)), with p held fixed.

    problem  an `algorithms.BilevelProblem`: f and g, differentiable in x
    x        any shape;  p_star, p_gamma: its two lower-level solutions at x;  gamma > 0
    Returns grad (shape of x) and info: "f" at p_gamma and "gap" = g(x, p_gamma) - g(x, p_star) >= 0, as floats. By
    Danskin's theorem no derivative of p_star or p_gamma is needed. Warns where gamma is so large that the difference of
    the two slopes of g, of order 1/gamma, is lost in their rounding: then p_gamma is p_star, and f is not descended.
    """
    x = x.detach().requires_grad_()
    f, g_star = problem.f(x, p_gamma), problem.g(x, p_star)
    gap, rounding = problem.g(x, p_gamma) - g_star, gamma * torch.finfo(x.dtype).eps
    (grad,) = torch.autograd.grad(f + gamma * gap, x, retain_graph=True)
    if rounding > 1e-3 and rounding * torch.autograd.grad(g_star, x)[0].abs().max() > grad.abs().max() / 10:
        warnings.warn(f"gamma = {gamma:g} is too large: the gradient is of the size of its rounding", stacklevel=2)
    return grad, {"f": f.item(), "gap": gap.item()}


# ---------------------------------------------------------------- the gradient of a sampled objective in q
#
# f(q, seed) -> () draws whatever is random in it (x_T, a minibatch) from the seed alone. Common random numbers, the
# default, give both sides of a difference the same seed; without them the noise of f is divided by delta. Directions,
# and draws of f that are not common, have streams of their own (`derive_seed`), apart from f's and from other seeds'.

Objective = Callable[[Tensor, int], Tensor]


def q_grad_two_point(
    f: Objective, q: Tensor, *, seed: int, delta: Tensor | float = 0.01, directions: int = 1, common: bool = True
) -> tuple[Tensor, dict]:
    """Zeroth order along random directions: mean over u ~ N(0, I) of (f(q + delta u) - f(q - delta u))/2 * u/delta.

    q           (m,);  seed: of the directions, and of f
    delta       > 0, () or (m,): a length for each coordinate
    directions  how many u; two evaluations each
    common      False draws f anew for each evaluation
    Returns (m,), unbiased for the gradient of f smoothed over that length, and info: "calls" of f, "f" their mean, and
    "se" (m,) over directions (None for one). One direction has |gradient|/sd <= 0.71 per coordinate even without noise.
    """
    delta = _lengths(delta, q)
    if directions < 1:
        raise ValueError(f"directions = {directions} must be at least 1")
    generator, draws, values = torch.Generator().manual_seed(derive_seed("directions", seed)), [], []
    for k in range(directions):
        u = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q)
        high, low = (_value(f, q + sign * delta * u, _seed(seed, common, k, sign)) for sign in (1, -1))
        draws.append((high - low) / 2 * u / delta)
        values += [high, low]
    draws = torch.stack(draws)
    se = draws.std(0) / directions**0.5 if directions > 1 else None
    return draws.mean(0), {"calls": 2 * directions, "f": torch.stack(values).mean().item(), "se": se}


def q_grad_coordinates(
    f: Objective, q: Tensor, *, seed: int, delta: Tensor | float = 0.01, common: bool = True
) -> tuple[Tensor, dict]:
    """Central differences, coordinate by coordinate: 2 m evaluations, error O(delta^2) and, with common random numbers,
    no noise from directions. Arguments and result as for `q_grad_two_point`."""
    delta = _lengths(delta, q)
    grad, values = torch.zeros_like(q), []
    for i, step in enumerate(torch.diag(delta)):
        high, low = (_value(f, q + sign * step, _seed(seed, common, i, sign)) for sign in (1, -1))
        grad[i] = (high - low) / (2 * delta[i])
        values += [high, low]
    return grad, {"calls": 2 * len(q), "f": torch.stack(values).mean().item(), "se": None}


def q_grad_forward(f: Objective, q: Tensor, *, seed: int) -> tuple[Tensor, dict]:
    """Pathwise, forward mode: one jvp through all of f for each coordinate. Exact for this seed; memory does not grow
    with the number of sampling steps. "calls": 1 for the value and one for each tangent.

    Fused kernels of attention have no forward mode, so torch's plain ones are used within. Raises RuntimeError, naming
    the remedy, where some other operation has none (torch's GroupNorm under autocast, kernels of other packages).
    """

    def run(q: Tensor) -> Tensor:
        return f(q, seed)

    grad = []
    try:
        with _plain_attention():
            for direction in torch.eye(len(q), dtype=q.dtype, device=q.device):
                value, slope = torch.func.jvp(run, (q.detach(),), (direction,))
                grad.append(slope.to(q))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        with torch.no_grad():
            run(q)  # raises its own error where forward mode is not to blame
        said = f"f works, but not in forward mode ({str(error).splitlines()[0]})"
        raise RuntimeError(f"{said}: pass estimator=estimators.q_grad_reverse") from error
    return torch.stack(grad).detach(), {"calls": 1 + len(q), "f": value.item(), "se": None}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by matrix products and softmax, which can be differentiated in any mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of nn.MultiheadAttention in evaluation mode
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def q_grad_reverse(f: Objective, q: Tensor, *, seed: int) -> tuple[Tensor, dict]:
    """Pathwise, reverse mode: one backward pass through f. Exact for this seed if f keeps its whole graph; biased if f
    cuts it, as `samplers.sample_ddim(..., grad_steps=K)` does. "calls": 1 forward and 1 for the backward pass."""
    q = q.detach().requires_grad_()
    value = f(q, seed)
    (grad,) = torch.autograd.grad(value, q)
    return grad, {"calls": 2, "f": value.item(), "se": None}


def _lengths(delta: Tensor | float, q: Tensor) -> Tensor:
    delta = torch.as_tensor(delta, dtype=q.dtype, device=q.device)
    if not ((delta > 0) & torch.isfinite(delta)).all() or delta.shape not in ((), q.shape):
        raise ValueError(f"delta = {delta.tolist()} must be positive, one number or one for each of {len(q)}")
    return delta.expand(q.shape)


def _seed(seed: int, common: bool, k: int, sign: int) -> int:
    return seed if common else derive_seed("f", seed, k, sign)


def _value(f: Objective, q: Tensor, seed: int) -> Tensor:
    with torch.no_grad():
        value = f(q, seed).double().to(q.device)
    if not torch.isfinite(value):
        raise FloatingPointError(f"f = {value.item()} at q = {q.tolist()}: lower delta, or project q with a margin")
    return value


# ---------------------------------------------------------------- the gradient in the entropy strength lambda
#
# With samples x_i ~ p_0 and their rewards, computed once, every law p_0 exp(h) has the self-normalised weights
# softmax_i(log_w_i + h_i): no network call, for every lambda at once, in float64. Standard errors are those of the
# influence function, sqrt(sum_i (w_i IF_i)^2): right for independent samples, optimistic for resampled particles,
# without meaning for quadrature nodes.

MIN_ESS = 100.0  # below this effective sample size an estimate is not to be trusted


def tilt_weights(r: Tensor, lam: Tensor | float, log_w: Tensor | None = None) -> tuple[Tensor, dict]:
    """Self-normalised weights of the tilted law p_0(x) exp(r(x)/lam).

    r      (n,)  rewards of samples from p_0
    lam    ()    entropy strength, > 0
    log_w  (n,)  log-weights with sum_i exp(log_w_i) u(x_i) ~ E_{p_0}[u]; None: -log n, plain samples of p_0. A constant
                 added to them shifts log_z and kl, and changes nothing else.
    Returns (n,), summing to one, biased by O(1/n), and info: "ess" = 1/sum w^2, "log_z" = log E_{p_0} exp(r/lam), "kl"
    = KL of the tilted law from p_0, and "warning", a text where ess < MIN_ESS (also given as a warning), else None.
    Raises ValueError if lam <= 0 or too small for r/lam, a value is not finite, shapes disagree or n < 2.
    """
    _, rows, lams, log_w = _inputs(r, r, lam, log_w)
    p, log_z, kl = _tilt(log_w, rows[0] / lams[0])
    return p, _report(p.square().sum(), lam) | {"log_z": log_z.item(), "kl": kl.item()}


def lam_grad_penalty(
    r_up: Tensor, r_low: Tensor, lam: Tensor | float, gamma: float, log_w: Tensor | None = None
) -> tuple[Tensor, dict]:
    """dL_gamma/dlam = gamma (KL(p_gamma || p_0) - KL(p_star || p_0)), equations (A) and (B), by reweighting.

    r_up, r_low  (n,)  upper and lower rewards of the same samples of p_0
    lam          ()    entropy strength > 0;  gamma > 0, may be infinite
    log_w        (n,)  optional log-weights of the samples, as in `tilt_weights`
    Returns the gradient (), float64, and info: "se" its standard error, which is the norm of "influence" (n,), what
    each sample adds to the error; "ess" the smaller effective sample size of the two laws; "warning" as in
    `tilt_weights`. Both laws share the samples, and their difference is taken before it is multiplied, so standard
    error and rounding stay bounded as gamma grows: the limit is `lam_grad_cov`, at infinity and before. Raises
    ValueError as `tilt_weights` does, and if gamma <= 0 or a reward is constant.
    """
    r_up, rows, lams, log_w = _inputs(r_up, r_low, lam, log_w, gamma, rewards=1)
    if gamma == float("inf"):
        return lam_grad_cov(r_up, rows[0], lam, log_w)
    p, h, p_gamma, d, rise, change = _two_laws(log_w, r_up, rows[0], lams[0], gamma)
    # KL_gamma - KL_star = E_gamma[h + d] - E_star[h] - rise, its influence p_gamma (h + d - E_gamma[h + d] - 1)
    # - p_star (h - E_star[h] - 1), with h centred at E_star[h] = 0
    further = (change * h).sum()
    grad = gamma * (further + (p_gamma * (d - rise)).sum())
    influence = gamma * (change * (h - 1) + p_gamma * (d - (p_gamma * d).sum() - further))
    return grad, _report(max(p_gamma.square().sum(), p.square().sum()), lam, influence)


def lam_grad_cov(r_up: Tensor, r_low: Tensor, lam: Tensor | float, log_w: Tensor | None = None) -> tuple[Tensor, dict]:
    """The hypergradient d/dlam(-E_{p_star}[r_up]) = Cov_{p_star}(r_up, r_low)/lam^2, equation (C): gamma = infinity.

    r_low  (n,) with lam (), or m lower rewards (m, n) with lam (m,): p_star = p_0 exp(sum_j r_low_j/lam_j), and the
           gradient is the vector Cov_{p_star}(r_up, r_low_j)/lam_j^2
    The other arguments, the result (shape of lam) and the errors are those of `lam_grad_penalty`.
    """
    r_up, rows, lams, log_w = _inputs(r_up, r_low, lam, log_w, rewards=None)
    p, _, _ = _tilt(log_w, (rows / lams[:, None]).sum(0))
    up = r_up - (p * r_up).sum()
    low = rows - (p * rows).sum(1, keepdim=True)
    cov = (p * up * low).sum(1, keepdim=True)
    influence = p * (up * low - cov) / lams[:, None] ** 2
    shape = torch.as_tensor(lam).shape
    return (cov[:, 0] / lams**2).reshape(shape), _report(p.square().sum(), lam, influence.reshape(*shape, -1))


def pool(h: Tensor, sizes: Tensor, count: Tensor, log_z: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lets samples of K laws p_0 exp(h_k)/Z_k stand for p_0 together (multistate reweighting, Shirts & Chodera 2008).

    h      (K, n)  every h_k at every sample, law by law in one order; h_0 = 0 up to a constant, so that law 0 is p_0
    sizes  (K,)    how many of the n samples each law gave
    count  (n,)    how many of its law's samples a row stands for: 1, or n_k times its weight within the law
    log_z  (K,)    where to start the search for log Z
    Returns log-weights (n,), as `tilt_weights` takes them, and log Z (K,), with log Z_0 = 0. A row gets one over the
    density of the mixture of all laws, sizes_k exp(h_k)/Z_k summed over k (the balance heuristic of Veach & Guibas
    1995), and log Z minimises a convex function of K - 1 numbers, by Newton's method. Unlike the effective sample size
    of one set, this cannot take a far corner, whose samples have nearly even weights under every milder tilt, for the
    law itself. Where neighbouring laws do not overlap Z is rough, and with it log-weights between them.
    """
    h, sizes, count = h.double(), sizes.double(), count.double()
    log_z = h[:, : int(sizes[0])].logsumexp(1) - sizes[0].log() if log_z is None else log_z
    step, little = torch.zeros_like(log_z), 1e-12 * sizes.sum() * torch.eye(len(sizes)).double()

    def look(log_z: Tensor) -> tuple[Tensor, Tensor]:
        """Each law's share in each row, and minus the slope: by how much the shares of a law exceed its size."""
        share = (h + (sizes.log() - log_z)[:, None]).softmax(0)
        return share, share @ count - sizes

    for _ in range(500):
        share, off = look(log_z)
        if off.abs().max() <= 1e-12 * sizes.sum():
            break
        curve = torch.diag(share @ count) - (share * count) @ share.T + little
        step[1:] = torch.linalg.solve(curve[1:, 1:], off[1:]).clamp(-50, 50)  # log Z_0 stays where it is, at 0
        while step.abs().max() > 1e-12 and look(log_z + step)[1] @ step < -(off @ step) / 2:
            step /= 2  # it went too far: the slope along it has turned
        log_z = log_z + step
    return count.clamp(min=1e-300).log() - (h + (sizes.log() - log_z)[:, None]).logsumexp(0), log_z


def group_error(p: Tensor, influence: Tensor, group: Tensor | None = None) -> Tensor:
    """The standard error () of an estimate with weights p, of which each row adds `influence` to the error, both (n,).

    group  (n,) integers: rows of one number depend on each other, and only groups are independent; None: all rows are
    For the families of particles that is the estimate of Chan & Lai (2013). Infinite where one group has all weight.
    """
    if group is None:
        return influence.norm()
    share, sums = (torch.bincount(group.cpu(), values) for values in (p, influence))
    rest = 1 - share.square().sum()
    return sums.norm() / rest.sqrt() if rest > 1e-9 else torch.full_like(rest, float("inf"))


@dataclass(frozen=True)
class LamCurve:
    """lambda -> E_{p_star}[r_up] with everything read off it; see `lam_curve`. Vectors (m,) run over `lam`."""

    lam: Tensor
    mean: Tensor
    se: Tensor
    ess: Tensor
    grad: Tensor
    grad_se: Tensor
    best: float
    interval: tuple[float, float]
    boundary: str | None
    said: str


def lam_curve(
    r_up: Tensor,
    r_low: Tensor,
    lams: Tensor | None = None,
    log_w: Tensor | None = None,
    *,
    z: float = 1.96,
    min_ess: float = MIN_ESS,
    group: Tensor | None = None,
) -> LamCurve:
    """The whole curve lambda -> E_{p_star}[r_up] with its band, its maximum and the maximum's interval, from one batch.

    lams   (m,) increasing, > 0; None: 161 values over eight decades around the spread of r_low
    z      quantile of the interval, 1.96 for 95 %;  group: as for `group_error`;  the others as in `lam_grad_penalty`
    Kept are the values with ESS >= min_ess. "best" maximises over them; "interval" holds the neighbouring lambda at
    which the gradient (C) is within z standard errors of zero (asymptotic: a few thousand samples make it somewhat too
    narrow). "boundary" is "low" or "high" (then best is 0 or infinity if the kept values end where `lams` does; else
    their end, since the samples reach no further), or None; "said" puts it in words. Raises ValueError as
    `lam_grad_penalty`, and if fewer than 3 values have enough ESS.
    """
    r_up, rows, _, log_w = _inputs(r_up, r_low, 1.0, log_w, rewards=1)
    low = rows[0]
    if lams is None:
        lams = low.std() * torch.logspace(-4, 4, 161, dtype=torch.float64)
    lams = torch.as_tensor(lams, dtype=torch.float64, device="cpu")
    if lams.dim() != 1 or not (lams > 0).all() or not (lams.diff() > 0).all():
        raise ValueError("lams must be a vector of positive, increasing values")

    def measure(lam: Tensor) -> list[Tensor]:
        p, _, _ = _tilt(log_w, low / lam)
        up, centred = r_up - (p * r_up).sum(), low - (p * low).sum()
        cov = (p * up * centred).sum()
        se, grad_se = (group_error(p, p * each, group) for each in (up, up * centred - cov))
        return [(p * r_up).sum(), se, 1 / p.square().sum(), cov / lam**2, grad_se / lam**2]

    table = torch.stack([torch.stack(measure(lam)) for lam in lams])
    kept = (table[:, 2] >= min_ess).nonzero()[:, 0]
    if len(kept) < 3:
        raise ValueError(
            f"only {len(kept)} values of lam have an effective sample size of {min_ess:g} or more (n = {len(low)}, "
            f"largest {table[:, 2].max():.0f}); draw more samples, or lower min_ess"
        )
    first, last = int(kept[0]), int(kept[-1])
    whole = (first == 0, last == len(lams) - 1)
    lams, table = lams[first : last + 1], table[first : last + 1]
    mean, se, ess, grad, grad_se = table.T
    i = int(mean.argmax())
    boundary = {0: "low", len(lams) - 1: "high"}.get(i)
    if boundary:
        limit, reached = (0.0, whole[0]) if boundary == "low" else (float("inf"), whole[1])
        best = limit if reached else lams[i].item()
        said = f"the reward is largest at the {boundary} end, lam = {lams[i]:.3g}: " + (
            f"the optimum is lam -> {limit:g}" if reached else "the samples reach no further; draw some at this lam"
        )
    else:
        a, b = lams[i - 1].log(), lams[i + 1].log()
        for _ in range(60):  # grad < 0 at a: the reward still rises with lam
            middle = (a + b) / 2
            a, b = (middle, b) if measure(middle.exp())[3] < 0 else (a, middle)
        best = b.exp().item()
        said = f"the reward is largest at lam = {best:.4g}"
    score = torch.where(grad_se > 0, grad / grad_se, 0.0)
    j, k = i, i
    while j > 0 and score[j] > -z:
        j -= 1
    while k < len(lams) - 1 and score[k] < z:
        k += 1

    def crossing(j: int, k: int, level: float) -> float:
        share = ((level - score[j]) / (score[k] - score[j])).clamp(0, 1)
        return ((1 - share) * lams[j].log() + share * lams[k].log()).exp().item()

    from_lam = 0.0 if score[j] > -z else crossing(j, min(j + 1, len(lams) - 1), -z)
    to_lam = float("inf") if score[k] < z else crossing(max(k - 1, 0), k, z)
    return LamCurve(lams, mean, se, ess, grad, grad_se, best, (from_lam, to_lam), boundary, said)


def _inputs(
    r_up: Tensor, r_low: Tensor, lam: Tensor | float, log_w: Tensor | None, gamma: float = 1.0, rewards: int | None = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r_up (n,), r_low (m, n), lam (m,), log_w (n,), checked, float64 on the CPU. rewards: m; None: any; 0: a tilt."""
    n = r_up.shape[-1] if r_up.dim() else 0
    log_w = torch.full((n,), -math.log(max(n, 1)), dtype=torch.float64) if log_w is None else log_w
    r_up, r_low, lam, log_w = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (r_up, r_low, lam, log_w)
    )
    named = {"r": r_low} if rewards == 0 else {"r_up": r_up, "r_low": r_low}
    if r_up.shape != (n,) or r_low.shape != (*lam.shape, n) or lam.dim() > 1 or log_w.shape != (n,):
        shapes = [tuple(value.shape) for value in (*named.values(), lam, log_w)]
        takes = "r (n,), lam ()" if rewards == 0 else "r_up (n,), r_low (n,) or (m, n), lam () or (m,)"
        raise ValueError(f"{takes}, log_w (n,) have the shapes {shapes}")
    if n < 2:
        raise ValueError(f"n = {n} is too small: at least 2 samples, and at least {MIN_ESS:g} for a result to trust")
    if not ((lam > 0) & torch.isfinite(lam)).all():
        raise ValueError(f"lam = {lam.tolist()} must be positive and finite")
    if not gamma > 0:
        raise ValueError(f"gamma = {gamma} must be positive")
    rows, lams = r_low.reshape(-1, n), lam.reshape(-1)
    if rewards and len(rows) != rewards:
        raise ValueError(f"this estimator takes one lower reward, not {len(rows)}; use lam_grad_cov")
    for name, values in named.items():
        check_rewards(name, values)
        for r in values.reshape(-1, n):
            if rewards != 0 and r.max() == r.min():
                raise ValueError(f"{name} is {r[0]:g} for every sample, so no lambda is better than another; check it")
    if torch.isnan(log_w).any() or (log_w == float("inf")).any() or not log_w.max() > -float("inf"):
        raise ValueError("log_w must be finite, or -inf for samples that count nothing")
    return r_up, rows, lams, log_w


def check_rewards(name: str, r: Tensor) -> None:
    """Raises ValueError, naming r (..., n), unless every reward is finite."""
    if not torch.isfinite(r).all():
        bad = (~torch.isfinite(r)).reshape(-1, r.shape[-1]).any(0).sum()
        raise ValueError(f"{name} is not finite for {bad} of {r.shape[-1]} samples; drop or mend them")


def _tilt(log_w: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (n,) of p_0 exp(h), log Z and KL from p_0."""
    log_z = torch.logsumexp(log_w + h, 0)
    if not torch.isfinite(log_z):
        raise ValueError(f"reward/lam reaches {h.abs().max():g}, beyond what can be weighted: raise lam or gamma")
    p = (log_w + h - log_z).exp()
    p = p / p.sum()
    return p, log_z, (p * (h - log_z)).sum()


def _two_laws(log_w: Tensor, r_up: Tensor, r_low: Tensor, lam: Tensor, gamma: float) -> tuple[Tensor, ...]:
    """p_star ~ p_0 exp(h), p_gamma ~ p_star exp(d), and their difference, without cancellation for any gamma.

    h and d (n,) are r_low/lam and r_up/(gamma lam), centred under p_star.
    Returns p_star, h, p_gamma, d, rise = log E_star exp(d), change = p_gamma - p_star; (n,), rise ().
    """
    p, _, _ = _tilt(log_w, (r_low - r_low.mean()) / lam)
    h, d = ((r - (p * r).sum()) / size for r, size in ((r_low, lam), (r_up, gamma * lam)))
    p_gamma, log_z_gamma, _ = _tilt(log_w, h + d)
    rise = torch.log1p((p * torch.expm1(d)).sum()) if d.max() < 1 else log_z_gamma - _tilt(log_w, h)[1]
    return p, h, p_gamma, d, rise, torch.where((d - rise).abs() < 1, p * torch.expm1(d - rise), p_gamma - p)


def _report(sum_of_squares: Tensor, lam: Tensor | float, influence: Tensor | None = None) -> dict:
    ess, warning = 1 / sum_of_squares.item(), None
    if ess < MIN_ESS:
        at = ", ".join(f"{float(value):g}" for value in torch.as_tensor(lam).reshape(-1))
        warning = (
            f"the effective sample size is {ess:.1f} at lam = {at}: reweighting these samples says little here; "
            "raise lam, draw more samples, or draw them guided or as particles at this lam"
        )
        warnings.warn(warning, stacklevel=3)
    error = {} if influence is None else {"influence": influence, "se": influence.square().sum(-1).sqrt()}
    return {"ess": ess, "warning": warning} | error
