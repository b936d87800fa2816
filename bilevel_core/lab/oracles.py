"""Problems with every answer in closed form, to test and to teach against. All arithmetic is float64.

`Tilt` is the fine-tuning problem on finitely many points, `Mixture1D` supplies such points and an exact denoiser,
`Mixture` is such a law in any dimension, `Gaussian` has exact tilts and an exact law of every discrete sampler,
`LinearGaussianSchedule` is the noise-schedule problem for one Gaussian coordinate and a linear denoiser, and
`LevelGaussianSchedule` the same for a denoiser of few parameters that is told t or the noise level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import schedules


def _vector(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


class Tilt:
    """Learning the entropy strength lam on a distribution p_0 with finite support.

    f(lam, p) = -E_p[r_up],   g(lam, p) = -E_p[r_low] + lam KL(p || p_0);   the upper variable is x = log lam.

    r_up, r_low  (n,)  upper and lower reward of each point
    log_p0       (n,)  log-probabilities of the points, normalised here; None: uniform, i.e. n samples of p_0
    A distribution is a vector of log-probabilities (n,). Methods broadcast over lam of any shape (...) unless they say
    otherwise. Raises ValueError for shapes that disagree or rewards that are not finite.
    """

    def __init__(self, r_up: Tensor, r_low: Tensor, log_p0: Tensor | None = None):
        self.r_up, self.r_low = _vector(r_up), _vector(r_low)
        log_p0 = torch.zeros_like(self.r_up) if log_p0 is None else _vector(log_p0)
        if not (self.r_up.shape == self.r_low.shape == log_p0.shape and self.r_up.dim() == 1):
            shapes = [tuple(v.shape) for v in (self.r_up, self.r_low, log_p0)]
            raise ValueError(f"r_up, r_low and log_p0 must be vectors of one length; their shapes are {shapes}")
        if not (torch.isfinite(self.r_up).all() and torch.isfinite(self.r_low).all()):
            raise ValueError("r_up and r_low must be finite; drop or mend the samples that are not")
        self.log_p0 = log_p0.log_softmax(0)

    def logits(self, lam: Tensor | float, gamma: float = float("inf")) -> Tensor:
        """log p_0 + (r_up/gamma + r_low)/lam, shape (..., n): p_gamma (p_star for gamma = inf) before normalisation."""
        lam = _vector(lam)[..., None]
        if not (lam > 0).all() or not gamma > 0:
            raise ValueError(f"lam and gamma must be positive; found lam = {lam.flatten().tolist()}, gamma = {gamma}")
        return self.log_p0 + (self.r_up / gamma + self.r_low) / lam

    def p_gamma(self, lam: Tensor | float, gamma: float = float("inf")) -> Tensor:
        """Log-probabilities (..., n) of p_gamma = argmin_p f/gamma + g; for gamma = inf of p_star = argmin_p g."""
        return self.logits(lam, gamma).log_softmax(-1)

    def mean(self, log_p: Tensor, r: Tensor) -> Tensor:
        """E_p[r], shape (...), for log_p (..., n) and r (n,)."""
        return (log_p.exp() * r).sum(-1)

    def kl(self, log_p: Tensor) -> Tensor:
        """KL(p || p_0) >= 0, shape (...), for log_p (..., n); points of probability zero count nothing."""
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - self.log_p0), 0.0).sum(-1)

    def penalty(self, lam: Tensor | float, gamma: float) -> Tensor:
        """L_gamma(lam) = -gamma lam (log Z_gamma - log Z), shape (...): the penalised objective, in closed form."""
        centre, _, _, rise = self._between(lam, gamma)
        return -centre - gamma * _vector(lam) * rise

    def penalty_grad(self, lam: Tensor | float, gamma: float) -> Tensor:
        """dL_gamma/dlam = gamma (KL(p_gamma || p_0) - KL(p_star || p_0)), shape (...): equation (A)."""
        _, p, ratio, rise = self._between(lam, gamma)
        own = torch.where(p > float("-inf"), p - self.log_p0, 0.0)
        return gamma * ((p.exp() * torch.expm1(ratio) * (own + ratio)).sum(-1) - rise)

    def _between(self, lam: Tensor | float, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E_star[r_up]; log p_star; log p_gamma/p_star; and log E_star exp(d), d = r_up/(gamma lam) less its mean.

        Differences of p_gamma and p_star, taken so that nothing cancels however large gamma is.
        """
        p = self.p_gamma(lam)
        self.logits(lam, gamma)  # refuses a bad gamma
        centre = self.mean(p, self.r_up)
        d = (self.r_up - centre[..., None]) / (gamma * _vector(lam)[..., None])
        near = torch.log1p((p.exp() * torch.expm1(d.clamp(max=1))).sum(-1))
        rise = torch.where(d.amax(-1) < 1, near, (p + d).logsumexp(-1))
        return centre, p, d - rise[..., None], rise

    def value(self, lam: Tensor | float) -> Tensor:
        """-E_{p_star}[r_up], shape (...): the true upper objective, the limit of L_gamma as gamma grows."""
        return -self.mean(self.p_gamma(lam), self.r_up)

    def hypergrad(self, lam: Tensor | float) -> Tensor:
        """Cov_{p_star}(r_up, r_low) / lam^2, shape (...): equation (C), the derivative of `value`."""
        p = self.p_gamma(lam)
        centred = self.r_low - self.mean(p, self.r_low)[..., None]
        return (p.exp() * centred * self.r_up).sum(-1) / _vector(lam) ** 2

    # The same problem as Algorithm 1 sees it, in x = log lam, with p a vector of log-probabilities.
    def f(self, x: Tensor, p: Tensor) -> Tensor:
        return -self.mean(p, self.r_up)

    def g(self, x: Tensor, p: Tensor) -> Tensor:
        return -self.mean(p, self.r_low) + x.exp() * self.kl(p)

    def solve_star(self, x: Tensor, warm: Tensor | None = None) -> Tensor:
        return self.p_gamma(x.exp())

    def solve_gamma(self, x: Tensor, gamma: float, warm: Tensor | None = None) -> Tensor:
        return self.p_gamma(x.exp(), gamma)


@dataclass(frozen=True)
class Mixture1D:
    """The mixture sum_k weights_k N(means_k, stds_k^2) on the line; the defaults are the book's running example."""

    weights: tuple[float, ...] = (0.6, 0.4)
    means: tuple[float, ...] = (-1.5, 1.5)
    stds: tuple[float, ...] = (0.7, 0.9)

    def __post_init__(self):
        lengths, sizes = {len(self.weights), len(self.means), len(self.stds)}, self.weights
        # A weight may be 0: a strong tilt leaves nothing of the components behind.
        if len(lengths) > 1 or min(self.stds) <= 0 or min(sizes) < 0 or not max(sizes) > 0:
            raise ValueError(f"weights (at least 0, not all 0), means and stds (positive) must have one length: {self}")

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), any shape."""
        return self._components(_vector(x), _vector(self.means), _vector(self.stds)).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, (n,)."""
        k = torch.multinomial(_vector(self.weights), n, replacement=True, generator=generator)
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        return _vector(self.means)[k] + _vector(self.stds)[k] * z

    def tilt(self, slope: float, curvature: float = 0.0) -> "Mixture1D":
        """The law p(x) exp(slope x + curvature x^2 / 2), again a mixture.

        Raises ValueError if it cannot be normalised: curvature must stay below 1/s^2 for every component.
        """
        w, m, s = _vector(self.weights), _vector(self.means), _vector(self.stds)
        precision = 1 / s**2 - curvature
        if not (precision > 0).all():
            raise ValueError(f"curvature = {curvature:g} must be below 1/s^2 = {(1 / s**2).min():g} of every component")
        mean = (m / s**2 + slope) / precision
        log_w = w.log() - s.log() - precision.log() / 2 + (mean**2 * precision - m**2 / s**2) / 2
        return Mixture1D(*(tuple(v.tolist()) for v in (log_w.softmax(0), mean, precision.rsqrt())))

    def quadrature(self, low: float = -20.0, high: float = 120.0, n: int = 14001) -> tuple[Tensor, Tensor]:
        """Nodes x (n,) and log-weights (n,) with sum_i w_i h(x_i) = E_p[h] to rounding for smooth h, also after tilts.

        Trapezoidal sums of smooth decaying functions converge faster than any power of the spacing. The default range
        covers tilts exp(x/lam) down to lam = 0.01.
        """
        x = torch.linspace(low, high, n, dtype=torch.float64)
        return x, self.log_prob(x).log_softmax(0)

    def problem(
        self,
        r_up: Callable[[Tensor], Tensor] = lambda x: -((x - 1.2) ** 2) / 2,
        r_low: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tilt:
        """The fine-tuning problem with this p_0 and two reward functions, by quadrature."""
        x, log_w = self.quadrature()
        return Tilt(r_up(x), r_low(x), log_w)

    def denoiser(self, abar: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The exact denoiser E[eps | x_t] for data from this mixture; x any shape, t an int in 1..T."""

        def eps_hat(x: Tensor, t: int) -> Tensor:
            a, m, s = abar[t].double(), _vector(self.means), _vector(self.stds)
            var = a * s**2 + 1 - a
            share = self._components(x.double(), a.sqrt() * m, var.sqrt()).softmax(-1)
            score = (share * (a.sqrt() * m - x.double()[..., None]) / var).sum(-1)
            return (-(1 - a).sqrt() * score).to(x.dtype)

        return eps_hat

    def _components(self, x: Tensor, means: Tensor, stds: Tensor) -> Tensor:
        """log(weight_k N(x; mean_k, std_k^2)), shape (..., K)."""
        z = (x[..., None] - means) / stds
        return _vector(self.weights).log() - z**2 / 2 - stds.log() - 0.9189385332046727  # log(2 pi)/2


@dataclass(frozen=True)
class Mixture:
    """The mixture sum_k weights_k N(means_k, covs_k) in d dimensions, with exact tilts and an exact denoiser.

    weights (K,), at least 0 and not all 0; means (K, d); covs (K, d, d), symmetric positive definite
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self):
        (k, d), w = self.means.shape, self.weights
        if w.shape != (k,) or self.covs.shape != (k, d, d) or not (w >= 0).all() or not w.max() > 0:
            shapes = [tuple(v.shape) for v in (w, self.means, self.covs)]
            raise ValueError(
                f"weights (K,), at least 0, means (K, d) and covs (K, d, d) are {w.tolist()} with {shapes}"
            )

    def _components(self, x: Tensor) -> Tensor:
        """log N(x; mean_k, cov_k), (..., K)."""
        return torch.distributions.MultivariateNormal(self.means, self.covs).log_prob(x[..., None, :])

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), shape (...), for x (..., d)."""
        return (self._components(x) + (self.weights / self.weights.sum()).log()).logsumexp(-1)

    def share(self, x: Tensor) -> Tensor:
        """Probability (..., K) that x (..., d) comes from each component."""
        return (self._components(x) + self.weights.log()).softmax(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ z[..., None])[..., 0]

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d)."""
        w = self.weights / self.weights.sum()
        mean = w @ self.means
        apart = self.means - mean
        return mean, (w[:, None, None] * (self.covs + apart[:, :, None] * apart[:, None])).sum(0)

    def tilt(self, slope: Tensor, curvature: Tensor | float = 0.0) -> "Mixture":
        """The law p(x) exp(<slope, x> + <x, curvature x>/2), again a mixture; slope (d,), curvature (d, d) or a number.

        Raises ValueError if it cannot be normalised.
        """
        d = self.means.shape[1]
        precision = torch.linalg.inv(self.covs)
        bend = curvature if isinstance(curvature, Tensor) else curvature * torch.eye(d, dtype=self.means.dtype)
        narrowed = precision - bend
        if not (torch.linalg.eigvalsh(narrowed) > 0).all():
            raise ValueError(f"curvature = {curvature} must be below the inverse covariance of every component")
        pull = (precision @ self.means[..., None])[..., 0] + slope
        means = torch.linalg.solve(narrowed, pull)
        log_w = self.weights.log() + (torch.logdet(precision) - torch.logdet(narrowed)) / 2
        log_w = log_w + ((means * pull).sum(1) - (self.means * (pull - slope)).sum(1)) / 2
        return Mixture(log_w.softmax(0), means, torch.linalg.inv(narrowed))

    def diffused(self, abar_t: Tensor) -> "Mixture":
        """The law of x_t."""
        identity = torch.eye(self.means.shape[1], dtype=self.means.dtype)
        return Mixture(self.weights, abar_t.sqrt() * self.means, abar_t * self.covs + (1 - abar_t) * identity)

    def denoiser(self, abar: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The exact denoiser E[eps | x_t]; x (B, d), t an int in 1..T."""

        def eps_hat(x: Tensor, t: int) -> Tensor:
            law = self.diffused(abar[t])
            towards = torch.linalg.solve(law.covs, (law.means - x[:, None])[..., None])[..., 0]
            return -(1 - abar[t]).sqrt() * (law.share(x)[..., None] * towards).sum(1)

        return eps_hat


@dataclass(frozen=True)
class Gaussian:
    """N(mean, cov) in d dimensions: exact tilts by a linear reward, exact denoiser, exact law of discrete samplers.

    mean (d,), cov (d, d) symmetric positive definite.
    """

    mean: Tensor
    cov: Tensor

    def tilt(self, slope: Tensor, lam: float = 1.0) -> "Gaussian":
        """The law proportional to p(x) exp(<slope, x>/lam): N(mean + cov slope/lam, cov)."""
        return Gaussian(self.mean + self.cov @ slope / lam, self.cov)

    def kl_tilt(self, slope: Tensor, lam: float = 1.0) -> Tensor:
        """KL of that tilted law from this one: slope' cov slope / (2 lam^2)."""
        return slope @ self.cov @ slope / (2 * lam**2)

    def denoiser(self, abar: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The exact denoiser E[eps | x_t], affine in x (B, d)."""

        def eps_hat(x: Tensor, t: int) -> Tensor:
            gain, offset = self.affine(abar[t])
            return x @ gain.T.to(x.dtype) + offset.to(x.dtype)

        return eps_hat

    def affine(self, abar_t: Tensor) -> tuple[Tensor, Tensor]:
        """(A, b) with E[eps | x_t = x] = A x + b; A (d, d), b (d,)."""
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        gain = (1 - abar_t).sqrt() * torch.linalg.inv(abar_t * self.cov + (1 - abar_t) * identity)
        return gain, -gain @ self.mean * abar_t.sqrt()

    def chain_law(self, abar: Tensor, ts: list[int], eta: float = 0.0, start: "Gaussian | None" = None) -> "Gaussian":
        """The exact law of `sample_ddim` with this law's denoiser: the affine recursion of the discrete chain.

        start  law of x_T, default N(0, I). As the grid gets finer and abar_T vanishes, the result tends to this law.
        """
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        law = start or Gaussian(torch.zeros_like(self.mean), identity)
        mean, cov = law.mean, law.cov
        for t, s in zip(ts, [*ts[1:], 0], strict=True):
            a, b = abar[t], abar[s]
            gain, offset = self.affine(a)
            var = eta**2 * (1 - b) / (1 - a) * (1 - a / b)  # x0_hat = (x - sqrt(1-a) eps)/sqrt(a), then the DDIM update
            x0_gain = (identity - (1 - a).sqrt() * gain) / a.sqrt()
            step = b.sqrt() * x0_gain + (1 - b - var).sqrt() * gain
            mean = step @ mean + ((1 - b - var).sqrt() - (b * (1 - a) / a).sqrt()) * offset
            cov = step @ cov @ step.T + var * identity
        return Gaussian(mean, cov)


class LinearGaussianSchedule:
    """Learning a noise schedule for data N(0, s^2) with the denoiser eps_hat = a_t x_t: one number a_t per step.

    g(q, a) = mean_t E (a_t x_t - eps)^2,   f(q, a) = (|G| - s)^2,   where the DDIM output is N(0, G^2): f is
    the squared 2-Wasserstein (here also the Frechet) distance. The upper variable is q, the lower one a (T,).
    """

    def __init__(self, s: float = 0.5, T: int = 50, ts: list[int] | None = None, kind: str = "cosine"):
        self.s, self.T, self.kind = s, T, kind
        self.ts = ts or list(range(T, 0, -5))

    def abar(self, q: Tensor) -> Tensor:
        return schedules.abar(q, self.T, self.kind)

    def f(self, q: Tensor, a: Tensor) -> Tensor:
        """(|G| - s)^2 with G the product of the DDIM gains along the grid."""
        abar, gain = self.abar(q), torch.ones((), dtype=torch.float64)
        for t, s in zip(self.ts, [*self.ts[1:], 0], strict=True):
            x0_gain = (1 - (1 - abar[t]).sqrt() * a[t - 1]) / abar[t].sqrt()
            noise = (1 - abar[s]).sqrt() if s else 0.0  # sqrt(0) has no tangent in forward mode
            gain = gain * (abar[s].sqrt() * x0_gain + noise * a[t - 1])
        return (gain.abs() - self.s) ** 2

    def g(self, q: Tensor, a: Tensor) -> Tensor:
        """The denoising loss, averaged over t = 1..T."""
        abar = self.abar(q)[1:]
        return (a**2 * (abar * self.s**2 + 1 - abar) - 2 * a * (1 - abar).sqrt() + 1).mean()

    def solve_star(self, q: Tensor, warm: Tensor | None = None) -> Tensor:
        """a_star(q) = sqrt(1 - abar)/(abar s^2 + 1 - abar), (T,), differentiable in q."""
        abar = self.abar(q)[1:]
        return (1 - abar).sqrt() / (abar * self.s**2 + 1 - abar)

    def solve_gamma(self, q: Tensor, gamma: float, warm: Tensor | None = None) -> Tensor:
        """argmin_a f/gamma + g by damped Newton steps, (T,), from `warm` or a_star. RuntimeError if they stall."""
        q = q.detach()
        a = (self.solve_star(q) if warm is None else warm).detach()

        def objective(a: Tensor) -> Tensor:
            return self.f(q, a) / gamma + self.g(q, a)

        for _ in range(200):
            grad = torch.func.grad(objective)(a)
            curvature, basis = torch.linalg.eigh(torch.func.hessian(objective)(a))
            step = -basis @ ((basis.T @ grad) / curvature.abs().clamp(min=1e-12))
            if grad @ step > -1e-26:
                return a
            size, before = 1.0, objective(a)
            while objective(a + size * step) > before + 1e-4 * size * (grad @ step) + 1e-16 and size > 1e-8:
                size /= 2
            a = a + size * step
        raise RuntimeError(f"Newton's method did not converge at gamma = {gamma:g}, q = {q.tolist()}")

    def value(self, q: Tensor) -> Tensor:
        """f(q, a_star(q)): the true upper objective; its gradient by autograd is the hypergradient."""
        return self.f(q, self.solve_star(q))


class LevelGaussianSchedule(LinearGaussianSchedule):
    """The same problem for eps_hat = a x_t, where a = sum_i c_i B_i is a smooth function of t or of the noise level.

    B_i are k Chebyshev polynomials of t/T, or of the angle arccos sqrt(abar_t). The best a is a function of the level:
    a denoiser that is told the level needs no other c when q moves, if it has enough parameters; one told t does. The
    lower variable is c (k,).

    told    "t" or "level"
    train   None: g is over q's own levels. Or abar (M+1,), a fixed table of levels: then g does not hold q, c_star does
            not move, and the derivative of f at fixed c is the hypergradient for every k
    wiggle  size of a wave in a that vanishes at every level of `uniform(M)` and so is never seen in training on it
    """

    def __init__(
        self, k: int, told: str = "level", train: Tensor | None = None, wiggle: float = 0.0, **options: object
    ):
        super().__init__(**options)
        if told not in ("t", "level") or not 1 <= k <= self.T:
            raise ValueError(f"told = {told!r} must be 't' or 'level', and k = {k} lie in 1..T = {self.T}")
        if (told == "t" and train is not None) or (wiggle and train is None):
            raise ValueError("a fixed table of levels is for a denoiser told the level, and the wave needs one")
        self.k, self.told, self.train, self.wiggle = k, told, train, wiggle

    @staticmethod
    def uniform(M: int) -> Tensor:
        """The table (M+1,) whose angles are the middles of M equal parts of 0..pi/2."""
        middles = (torch.arange(M, dtype=torch.float64) + 0.5) * torch.pi / (2 * M)
        return torch.cat([torch.ones(1, dtype=torch.float64), middles.cos().square()])

    def response(self, abar: Tensor, c: Tensor) -> Tensor:
        """a (T,) along a table (T+1,)."""
        wave = torch.cos(torch.pi * len(self.train[1:]) * self._place(abar)) if self.wiggle else 0.0
        return self._basis(abar) @ c + self.wiggle * wave

    def f(self, q: Tensor, c: Tensor) -> Tensor:
        """(|G| - s)^2 with a along q's own levels."""
        return super().f(q, self.response(self.abar(q), c))

    def g(self, q: Tensor, c: Tensor) -> Tensor:
        """The denoising loss, averaged over the levels of training."""
        table = self._training(q)
        a, v, noise = self.response(table, c), self._variance(table), (1 - table[1:]).sqrt()
        return (a**2 * v - 2 * a * noise + 1).mean()

    def solve_star(self, q: Tensor, warm: Tensor | None = None) -> Tensor:
        """c_star(q) (k,), a least squares fit, differentiable in q."""
        table = self._training(q)
        basis = self._basis(table)
        return torch.linalg.solve(basis.T * self._variance(table) @ basis, basis.T @ (1 - table[1:]).sqrt())

    def partial(self, q: Tensor) -> Tensor:
        """d_q f at fixed c = c_star(q), (4,): the hypergradient without the response of c."""
        c = self.solve_star(q).detach()
        return torch.func.grad(lambda q: self.f(q, c))(q)

    def _training(self, q: Tensor) -> Tensor:
        return self.abar(q) if self.train is None else self.train

    def _variance(self, abar: Tensor) -> Tensor:
        return abar[1:] * self.s**2 + 1 - abar[1:]

    def _place(self, abar: Tensor) -> Tensor:
        """What the denoiser is told, (T,), in 0..1."""
        if self.told == "t":
            return (torch.arange(self.T, dtype=torch.float64) + 0.5) / self.T
        return schedules.angle(abar[1:]) * 2 / torch.pi

    def _basis(self, abar: Tensor) -> Tensor:
        order = torch.arange(self.k, dtype=torch.float64)
        return torch.cos(order * torch.acos(2 * self._place(abar) - 1)[:, None])
