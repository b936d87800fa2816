"""The tables that the book prints, to the digits printed, and each closed form against an independent computation."""

import itertools

import pytest
import torch
from scipy import integrate, optimize, stats

from bilevel_core import estimators, schedules
from bilevel_core.lab import oracles

MIXTURE = oracles.Mixture1D()
PROBLEM = MIXTURE.problem()

# gamma, lam, L_gamma, dL_gamma (A), hypergradient (C), the released code's "est1"
TABLE = [
    (1, 0.5, 0.9443, -1.32472, -6.21693, 3.13950),
    (10, 0.5, 1.9608, -4.85150, -6.21693, 1.10637),
    (10, 2.0, 1.2265, 0.34521, 0.34406, 0.64373),
    (1000, 0.5, 2.2439, -6.20023, -6.21693, 0.54026),
    (1000, 1.0, 1.1200, -0.46848, -0.46938, 1.39405),
    (1000, 2.0, 1.2867, 0.34408, 0.34406, 0.61363),
]


@pytest.mark.parametrize("gamma, lam, penalty, grad, hypergrad, est1", TABLE)
def test_entropy_strength_table(gamma, lam, penalty, grad, hypergrad, est1):
    assert PROBLEM.penalty(lam, gamma).item() == pytest.approx(penalty, abs=6e-5)
    assert PROBLEM.penalty_grad(lam, gamma).item() == pytest.approx(grad, abs=6e-6)
    assert PROBLEM.hypergrad(lam).item() == pytest.approx(hypergrad, abs=6e-6)
    log_ratio = PROBLEM.logits(lam, gamma).logsumexp(-1) - PROBLEM.logits(lam).logsumexp(-1)
    released = -PROBLEM.mean(PROBLEM.log_p0, PROBLEM.r_up) / lam + gamma * log_ratio
    assert released.item() == pytest.approx(est1, abs=6e-6)


def test_optimum_and_roots():
    def root(slope):
        return optimize.brentq(slope, 0.3, 5, xtol=1e-10)

    best = root(lambda lam: PROBLEM.hypergrad(lam).item())
    assert best == pytest.approx(1.20841, abs=6e-6)
    assert PROBLEM.value(best).item() == pytest.approx(1.07781, abs=6e-6)
    assert PROBLEM.value(1e9).item() == pytest.approx(2.5140, abs=6e-5)
    for gamma, expected in [(1, 1.0907), (10, 1.1931), (1000, 1.2082)]:
        found = root(lambda lam, gamma=gamma: PROBLEM.penalty_grad(lam, gamma).item())
        assert found == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("lam", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_gradients_are_derivatives(lam, gamma):
    h = 1e-5 * lam
    slope = (PROBLEM.penalty(lam + h, gamma) - PROBLEM.penalty(lam - h, gamma)) / (2 * h)
    assert PROBLEM.penalty_grad(lam, gamma).item() == pytest.approx(slope.item(), rel=1e-6)
    slope = (PROBLEM.value(lam + h) - PROBLEM.value(lam - h)) / (2 * h)
    assert PROBLEM.hypergrad(lam).item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [1e6, 1e12, 1e15])
def test_penalty_of_a_huge_gamma_is_the_value_itself(gamma):
    for lam in (0.3, torch.tensor([0.5, 2.0], dtype=torch.float64)):
        torch.testing.assert_close(PROBLEM.penalty(lam, gamma), PROBLEM.value(lam), rtol=3e3 / gamma + 1e-12, atol=0)
        torch.testing.assert_close(
            PROBLEM.penalty_grad(lam, gamma), PROBLEM.hypergrad(lam), rtol=3e3 / gamma + 1e-12, atol=0
        )


def test_penalty_bias_is_variance_over_two_gamma_lam():
    lam, p = 0.8, PROBLEM.p_gamma(0.8)
    variance = PROBLEM.mean(p, PROBLEM.r_up**2) - PROBLEM.mean(p, PROBLEM.r_up) ** 2
    for gamma, tolerance in [(1e3, 1e-2), (1e5, 1e-3)]:
        bias = PROBLEM.value(lam) - PROBLEM.penalty(lam, gamma)
        assert (bias * 2 * gamma * lam / variance).item() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("lam", [0.02, 0.5, 50.0])
def test_quadrature_tilts_are_the_closed_form_mixture(lam):
    x, _ = MIXTURE.quadrature()
    exact, p = MIXTURE.tilt(1 / lam), PROBLEM.p_gamma(lam)
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (exact.weights, exact.means, exact.stds))
    assert (p.exp() * x).sum().item() == pytest.approx((w * m).sum().item(), rel=1e-10)
    assert (p.exp() * x**2).sum().item() == pytest.approx((w * (m**2 + s**2)).sum().item(), rel=1e-10)
    curved = MIXTURE.tilt(1 / lam, -0.5 / lam)  # (r_up/gamma + r_low)/lam at gamma = 2, r_up = -x^2/2
    p = oracles.Tilt(-(x**2) / 2, x, MIXTURE.quadrature()[1]).p_gamma(lam, 2.0)
    mean = sum(a * b for a, b in zip(curved.weights, curved.means, strict=True))
    assert (p.exp() * x).sum().item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    with pytest.raises(ValueError, match=r"curvature = 1\.3 must be below"):
        MIXTURE.tilt(0, 1.3)


def test_mixture_density_samples_and_denoiser():
    assert integrate.quad(lambda x: MIXTURE.log_prob(x).exp().item(), -12, 12)[0] == pytest.approx(1, abs=1e-8)
    draws = MIXTURE.sample(20_000, torch.Generator().manual_seed(0))

    def cdf(x):
        return 0.6 * stats.norm.cdf(x, -1.5, 0.7) + 0.4 * stats.norm.cdf(x, 1.5, 0.9)

    assert stats.kstest(draws.numpy(), cdf).pvalue > 1e-3
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 50)
    for t in (1, 20, 50):  # score = -eps_hat/sqrt(1 - abar) by finite differences of the diffused density
        a = abar[t].item()
        stds = tuple((a * s**2 + 1 - a) ** 0.5 for s in MIXTURE.stds)
        diffused = oracles.Mixture1D(MIXTURE.weights, tuple(a**0.5 * m for m in MIXTURE.means), stds)
        x = torch.linspace(-3, 3, 13, dtype=torch.float64)
        score = (diffused.log_prob(x + 1e-5) - diffused.log_prob(x - 1e-5)) / 2e-5
        torch.testing.assert_close(MIXTURE.denoiser(abar)(x, t), -((1 - a) ** 0.5) * score, rtol=1e-6, atol=1e-8)


def test_gaussian_tilt_and_denoiser():
    law = oracles.Gaussian(
        torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    )
    slope, lam = torch.tensor([0.7, -1.0], dtype=torch.float64), 0.4
    tilted = law.tilt(slope, lam)

    def log_density(gaussian):
        return torch.distributions.MultivariateNormal(gaussian.mean, gaussian.cov).log_prob

    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = log_density(tilted)(x) - log_density(law)(x) - x @ slope / lam
    torch.testing.assert_close(ratio, ratio[:1].expand(9))  # p_star is p_0 exp(r/lam) up to a constant
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(tilted.mean, tilted.cov),
        torch.distributions.MultivariateNormal(law.mean, law.cov),
    )
    torch.testing.assert_close(law.kl_tilt(slope, lam), kl)
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 50)
    x.requires_grad_()
    a = abar[20]
    diffused = oracles.Gaussian(a.sqrt() * law.mean, a * law.cov + (1 - a) * torch.eye(2))
    (score,) = torch.autograd.grad(log_density(diffused)(x).sum(), x)
    torch.testing.assert_close(law.denoiser(abar)(x, 20), -(1 - a).sqrt() * score)


# gamma: penalty gradient in (start, end, tau, epsilon); T = 50, s = 0.5, q = (0, 1, 1, 0.008)
SCHEDULE_TABLE = {
    1e4: (0.0011, -0.0168, -0.0005, 0.0011),
    1e5: (0.0080, -0.0880, -0.0023, 0.0079),
    1e6: (0.0196, -0.0581, 0.0007, 0.0195),
    1e7: (0.0229, -0.0013, 0.0034, 0.0227),
    1e8: (0.0233, 0.0072, 0.0038, 0.0231),
    1e9: (0.0233, 0.0081, 0.0038, 0.0231),
}
SCHEDULE = oracles.LinearGaussianSchedule()
Q = torch.tensor([0.0, 1.0, 1.0, 0.008], dtype=torch.float64)


def penalty_grad(q, gamma):
    return estimators.penalty_grad(SCHEDULE, q, SCHEDULE.solve_star(q), SCHEDULE.solve_gamma(q, gamma), gamma)[0]


def hypergrad(q):
    return torch.func.grad(SCHEDULE.value)(q)


def test_schedule_hypergradient():
    assert SCHEDULE.value(Q).item() == pytest.approx(0.00535207, abs=6e-9)
    torch.testing.assert_close(
        hypergrad(Q), torch.tensor([0.0233, 0.0082, 0.0038, 0.0231], dtype=torch.float64), rtol=0, atol=6e-5
    )


@pytest.mark.parametrize("gamma", SCHEDULE_TABLE)
def test_schedule_gamma_table(gamma):
    expected = torch.tensor(SCHEDULE_TABLE[gamma], dtype=torch.float64)
    torch.testing.assert_close(penalty_grad(Q, gamma), expected, rtol=0, atol=6e-5)


def test_how_large_gamma_must_be_depends_on_the_last_signal():
    q = torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64)
    assert (penalty_grad(q, 1e3) / hypergrad(q) - 1).abs().max() < 0.065
    q = torch.tensor([0.0, 0.8, 1.0, 0.008], dtype=torch.float64)
    assert (penalty_grad(q, 10.0) * hypergrad(q) > 0).all()
    shrunk = hypergrad(q) / penalty_grad(q, 1.0)
    assert (shrunk.abs() > 4).all()


def test_schedule_gradients_are_derivatives():
    small = oracles.LinearGaussianSchedule(T=20, ts=[20, 15, 10, 5])
    q, gamma = torch.tensor([0.05, 0.85, 1.1, 0.02], dtype=torch.float64), 300.0

    def penalised(q):
        a = small.solve_gamma(q, gamma)
        return small.f(q, a) + gamma * (small.g(q, a) - small.g(q, small.solve_star(q)))

    grad, _ = estimators.penalty_grad(small, q, small.solve_star(q), small.solve_gamma(q, gamma), gamma)
    for i, h in enumerate(1e-5 * torch.eye(4, dtype=torch.float64)):
        slope = (small.value(q + h) - small.value(q - h)) / 2e-5
        assert torch.func.grad(small.value)(q)[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-10)
        slope = (penalised(q + h) - penalised(q - h)) / 2e-5
        assert grad[i].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


def test_the_linear_denoiser_is_optimal_and_f_is_the_sampled_distance():
    from bilevel_core import samplers

    q = torch.tensor([0.05, 0.85, 1.1, 0.02], dtype=torch.float64)
    a = SCHEDULE.solve_star(q).requires_grad_()
    (slope,) = torch.autograd.grad(SCHEDULE.g(q, a), a)
    assert slope.abs().max() < 1e-12
    a = a.detach()
    x = samplers.sample_ddim(
        lambda x, t: a[t - 1] * x, torch.ones(1, dtype=torch.float64), SCHEDULE.abar(q), SCHEDULE.ts
    )
    assert ((x.abs() - SCHEDULE.s) ** 2).item() == pytest.approx(SCHEDULE.f(q, a).item(), rel=1e-10)


def test_bad_input():
    r = torch.zeros(3)
    with pytest.raises(ValueError, match="must be vectors of one length"):
        oracles.Tilt(r, torch.zeros(4))
    with pytest.raises(ValueError, match="must be finite"):
        oracles.Tilt(r, torch.tensor([0.0, float("nan"), 1.0]))
    for lam, gamma in [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)]:
        with pytest.raises(ValueError, match="must be positive"):
            PROBLEM.p_gamma(lam, gamma)
    with pytest.raises(ValueError, match="must have one length"):
        oracles.Mixture1D((0.5, 0.5), (0.0,), (1.0,))
    for weights, stds in [((1.0,), (0.0,)), ((-0.1,), (1.0,)), ((0.0,), (1.0,))]:
        with pytest.raises(ValueError, match=r"weights \(at least 0, not all 0\), means and stds \(positive\)"):
            oracles.Mixture1D(weights, (0.0,), stds)


def test_a_tilt_may_leave_nothing_of_a_component():
    """A strong tilt multiplies one weight by less than the smallest float: the law stays usable."""
    strong = MIXTURE.tilt(100.0)
    assert strong.weights == (0.0, 1.0) and strong.means[1] == pytest.approx(1.5 + 81)
    x = strong.sample(1000, torch.Generator().manual_seed(0))
    assert (x > 70).all() and torch.isfinite(strong.log_prob(x)).all()
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 50)
    assert torch.isfinite(strong.denoiser(abar)(x, 25)).all()


# ---------------------------------------------------------------- mixtures in several dimensions

PLANE = oracles.Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-1.5, 0.0], [1.5, 1.0], [1.0, -1.5]], dtype=torch.float64),
    torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.6]], [[0.4, -0.1], [-0.1, 0.3]]], dtype=torch.float64),
)


def lattice(low=-8.0, high=8.0, n=321):
    line = torch.linspace(low, high, n, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    return x, ((high - low) / (n - 1)) ** 2


@pytest.mark.parametrize("slope, curvature", [((0.0, 0.0), 0.0), ((0.7, -1.1), 0.0), ((0.4, 0.3), -0.8)])
def test_mixture_in_the_plane_and_its_tilts_against_quadrature(slope, curvature):
    x, cell = lattice()
    slope = torch.tensor(slope, dtype=torch.float64)
    direct = PLANE.log_prob(x) + x @ slope + curvature * x.square().sum(1) / 2
    direct = direct - (direct.exp().sum() * cell).log()
    law = PLANE.tilt(slope, curvature)
    torch.testing.assert_close(law.log_prob(x), direct, rtol=0, atol=1e-8)
    p = direct.exp() * cell
    mean, cov = law.mean_cov()
    torch.testing.assert_close(p @ x, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close((p[:, None] * (x - mean)).T @ (x - mean), cov, rtol=0, atol=1e-8)
    torch.testing.assert_close(law.share(x).sum(1), torch.ones(len(x), dtype=torch.float64))
    torch.testing.assert_close(p @ law.share(x), law.weights, rtol=0, atol=1e-8)


def test_mixture_in_the_plane_samples_denoises_and_agrees_with_the_line():
    draws = PLANE.sample(40_000, torch.Generator().manual_seed(0))
    mean, cov = PLANE.mean_cov()
    assert ((draws.mean(0) - mean).abs() < 4 * (cov.diagonal() / 40_000).sqrt()).all()
    assert (draws.T.cov() - cov).abs().max() < 0.05
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), 50)
    x, denoiser = draws[:20].clone().requires_grad_(), PLANE.denoiser(abar)
    for t in (1, 20, 50):  # the denoiser is the score of the diffused law
        (score,) = torch.autograd.grad(PLANE.diffused(abar[t]).log_prob(x).sum(), x)
        torch.testing.assert_close(denoiser(x, t), -(1 - abar[t]).sqrt() * score, rtol=0, atol=1e-9)
    line = oracles.Mixture(
        *(torch.tensor(v, dtype=torch.float64) for v in (MIXTURE.weights, [[m] for m in MIXTURE.means])),
        torch.tensor([[[s**2]] for s in MIXTURE.stds], dtype=torch.float64),
    )
    points = torch.linspace(-4, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(line.log_prob(points[:, None]), MIXTURE.log_prob(points))
    one, other = line.tilt(torch.tensor([0.8], dtype=torch.float64), -0.3), MIXTURE.tilt(0.8, -0.3)
    torch.testing.assert_close(one.log_prob(points[:, None]), other.log_prob(points))
    torch.testing.assert_close(line.denoiser(abar)(points[:, None], 20)[:, 0], MIXTURE.denoiser(abar)(points, 20))


def test_bad_mixtures_are_named():
    with pytest.raises(ValueError, match="must be below the inverse covariance"):
        PLANE.tilt(torch.zeros(2, dtype=torch.float64), 5.0)
    with pytest.raises(ValueError, match=r"weights \(K,\), at least 0"):
        oracles.Mixture(-PLANE.weights, PLANE.means, PLANE.covs)
    with pytest.raises(ValueError, match=r"covs \(K, d, d\)"):
        oracles.Mixture(PLANE.weights, PLANE.means, PLANE.covs[0])


# ---------------------------------------------------------------- small laws by hand, defaults and edges


def test_a_tilt_of_three_points_by_hand():
    """p_0 = (1/2, 1/4, 1/4), r_low = (0, log 2, log 4), lam = 1: p_star = (1/4, 1/4, 1/2)."""
    tilt = oracles.Tilt(
        torch.tensor([3.0, 1.0, 2.0]),
        torch.tensor([1, 2, 4.0]).double().log(),
        torch.tensor([2, 1, 1.0]).double().log(),
    )
    p = tilt.p_gamma(1.0)
    torch.testing.assert_close(p.exp(), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64), rtol=0, atol=1e-12)
    kl = 0.25 * torch.tensor(0.5).double().log() + 0.5 * torch.tensor(2.0).double().log()
    torch.testing.assert_close(tilt.kl(p), kl)
    assert tilt.value(1.0).item() == pytest.approx(-2.0) and tilt.mean(p, tilt.r_up).item() == pytest.approx(2.0)
    lams = torch.tensor([[0.5, 1.0], [2.0, 9.0]], dtype=torch.float64)
    for function in (
        tilt.value,
        tilt.hypergrad,
        lambda lam: tilt.penalty(lam, 5.0),
        lambda lam: tilt.penalty_grad(lam, 5.0),
    ):
        together = function(lams)
        assert together.shape == (2, 2)
        for i in range(4):
            torch.testing.assert_close(together.flatten()[i], function(lams.flatten()[i]))
    lost = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()  # a point of probability zero counts nothing
    assert tilt.kl(lost).item() == pytest.approx(0.5 * torch.tensor(2.0).double().log().item())


def test_the_tilt_as_algorithm_1_sees_it():
    """The minima of g and f/gamma + g are -lam log Z and -lam log Z_gamma, and no other law does better."""
    x, gamma = torch.tensor(0.3, dtype=torch.float64), 4.0
    lam, star, tilted = x.exp(), PROBLEM.solve_star(x), PROBLEM.solve_gamma(x, gamma)
    torch.testing.assert_close(PROBLEM.f(x, star), -(star.exp() * PROBLEM.r_up).sum())
    torch.testing.assert_close(PROBLEM.g(x, star), -lam * PROBLEM.logits(lam).logsumexp(-1))
    both = PROBLEM.f(x, tilted) / gamma + PROBLEM.g(x, tilted)
    torch.testing.assert_close(both, -lam * PROBLEM.logits(lam, gamma).logsumexp(-1))
    for other in (PROBLEM.log_p0, PROBLEM.p_gamma(2 * lam), star):
        assert PROBLEM.f(x, other) / gamma + PROBLEM.g(x, other) > both
    assert torch.equal(PROBLEM.solve_star(x, warm=tilted), star)


def test_the_running_example_is_what_the_book_says():
    law = oracles.Mixture1D()
    assert (law.weights, law.means, law.stds) == ((0.6, 0.4), (-1.5, 1.5), (0.7, 0.9))
    x, log_w = law.quadrature()
    assert (x[0].item(), x[-1].item(), len(x)) == (-20.0, 120.0, 14001) and x.dtype == torch.float64
    assert log_w.exp().sum().item() == pytest.approx(1, abs=1e-12)
    few, _ = law.quadrature(-1.0, 1.0, 5)
    assert few.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    problem = law.problem()
    torch.testing.assert_close(problem.r_up, -((x - 1.2) ** 2) / 2)
    assert torch.equal(problem.r_low, x)
    torch.testing.assert_close(problem.log_p0, log_w)
    other = law.problem(torch.sin, torch.cos)
    assert torch.equal(other.r_up, x.sin()) and torch.equal(other.r_low, x.cos())
    one, two = (law.sample(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.float64


def test_which_curvatures_can_be_normalised():
    """1/s^2 is 2.04 and 1.235: a curvature of 1 leaves precisions 1.04 and 0.235, at 1/s^2 itself nothing is left."""
    bent = MIXTURE.tilt(0.0, 1.0)
    assert bent.stds[1] == pytest.approx((1 / (1 / 0.81 - 1)) ** 0.5) and MIXTURE.tilt(0.3) == MIXTURE.tilt(0.3, 0.0)
    unit = oracles.Mixture1D((1.0,), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"curvature = 1 must be below 1/s\^2 = 1 of every component"):
        unit.tilt(0.0, 1.0)
    with pytest.raises(ValueError, match=r"below 1/s\^2 = 1.23457 of every component"):
        MIXTURE.tilt(0.0, 2.0)
    flat = oracles.Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    with pytest.raises(ValueError, match="curvature = 1.0 must be below the inverse covariance"):
        flat.tilt(torch.zeros(2).double(), 1.0)
    narrow = flat.tilt(torch.zeros(2).double(), 0.75)  # a precision of 1/4 is left
    torch.testing.assert_close(narrow.covs[0], 4 * torch.eye(2).double())


def test_a_mixture_is_tilted_by_a_matrix_and_may_have_any_scale_of_weights():
    x, cell = lattice()
    slope = torch.tensor([0.4, -0.2], dtype=torch.float64)
    curvature = torch.tensor([[-0.5, 0.3], [0.3, -0.2]], dtype=torch.float64)
    direct = PLANE.log_prob(x) + x @ slope + (x @ curvature * x).sum(1) / 2
    direct = direct - (direct.exp().sum() * cell).log()
    torch.testing.assert_close(PLANE.tilt(slope, curvature).log_prob(x), direct, rtol=0, atol=1e-8)
    torch.testing.assert_close(PLANE.tilt(slope).means, PLANE.tilt(slope, 0.0).means)
    scaled = oracles.Mixture(7 * PLANE.weights, PLANE.means, PLANE.covs)
    torch.testing.assert_close(scaled.log_prob(x[:9]), PLANE.log_prob(x[:9]))
    for ours, theirs in zip(scaled.mean_cov(), PLANE.mean_cov(), strict=True):
        torch.testing.assert_close(ours, theirs)
    box = x[:6].reshape(2, 3, 2)  # any leading axes
    torch.testing.assert_close(PLANE.log_prob(box).flatten(), PLANE.log_prob(x[:6]))
    torch.testing.assert_close(PLANE.share(box).reshape(6, 3), PLANE.share(x[:6]))
    one, two = (PLANE.sample(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.float64
    absent = oracles.Mixture(
        torch.tensor([1.0, 0.0, 2.0]).double(), PLANE.means, PLANE.covs
    )  # a zero weight is allowed
    assert torch.isfinite(absent.log_prob(x[:9])).all()
    for weights in ([0.5, -0.1, 0.6], [0.0, 0.0, 0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match=r"weights \(K,\), at least 0, .* are .* with \[\("):
            oracles.Mixture(torch.tensor(weights).double(), PLANE.means, PLANE.covs)


def test_a_gaussian_with_what_is_left_out():
    law = oracles.Gaussian(torch.tensor([1.0, -0.5]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double())
    slope = torch.tensor([0.7, -1.0], dtype=torch.float64)
    assert torch.equal(law.tilt(slope).mean, law.tilt(slope, 1.0).mean)
    assert torch.equal(law.kl_tilt(slope), law.kl_tilt(slope, 1.0))
    abar = schedules.abar(torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64), 20)
    standard = oracles.Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    left_out, given = law.chain_law(abar, [20, 10]), law.chain_law(abar, [20, 10], 0.0, standard)
    assert torch.equal(left_out.mean, given.mean) and torch.equal(left_out.cov, given.cov)
    gain, offset = law.affine(abar[10])
    x = torch.randn(3, 2)
    found = law.denoiser(abar)(x, 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.double() @ gain.T + offset).float())


def test_the_schedule_oracle_by_default_and_at_its_solution():
    default = oracles.LinearGaussianSchedule()
    assert (default.s, default.T, default.kind, default.ts) == (0.5, 50, "cosine", list(range(50, 0, -5)))
    assert oracles.LinearGaussianSchedule(T=11).ts == [11, 6, 1]
    other = oracles.LinearGaussianSchedule(s=0.8, T=10, ts=[10, 4], kind="linear")
    q = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(other.abar(q), schedules.abar(q, 10, "linear")) and other.ts == [10, 4]
    q, gamma = torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64), 20.0
    a = SCHEDULE.solve_gamma(q, gamma)

    def objective(a):
        return SCHEDULE.f(q, a) / gamma + SCHEDULE.g(q, a)

    assert torch.func.grad(objective)(a).abs().max() < 1e-10
    assert (torch.linalg.eigvalsh(torch.func.hessian(objective)(a)) > 0).all()
    assert objective(a) < objective(SCHEDULE.solve_star(q))
    torch.testing.assert_close(SCHEDULE.solve_gamma(q, gamma, warm=0.9 * a), a, rtol=0, atol=1e-8)
    assert not SCHEDULE.solve_gamma(q.clone().requires_grad_(), gamma).requires_grad
    flipped = SCHEDULE.f(q, 5 * a)  # a gain of the other sign counts by its size
    assert flipped >= 0


def test_newton_takes_shorter_steps_where_whole_ones_overshoot():
    small, q = oracles.LinearGaussianSchedule(T=10, ts=[10, 7, 4]), torch.tensor([0.0, 0.9, 1.0, 0.008]).double()
    far = small.solve_gamma(q, 5.0, warm=torch.full((10,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(far, small.solve_gamma(q, 5.0), rtol=0, atol=1e-9)


def test_newton_says_where_it_stalls(monkeypatch):
    monkeypatch.setattr(torch.func, "hessian", lambda f: lambda a: 1e9 * torch.eye(len(a), dtype=a.dtype))
    small = oracles.LinearGaussianSchedule(T=2, ts=[2, 1])
    with pytest.raises(RuntimeError, match=r"did not converge at gamma = 20, q = \[0.0, 0.9"):
        small.solve_gamma(torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64), 20.0)


# ---------------------------------------------------------------- told t, or the noise level

Q9 = torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64)


def bias(problem, q=Q9):
    """Of the derivative at fixed parameters, in units of the hypergradient; start, end, tau."""
    exact = torch.func.grad(problem.value)(q)[:3]
    return ((problem.partial(q)[:3] - exact).norm() / exact.norm()).item()


def test_with_a_parameter_for_each_step_the_level_problem_is_the_first_one():
    told_t = oracles.LevelGaussianSchedule(20, "t", T=20, ts=[20, 14, 8, 3])
    first = oracles.LinearGaussianSchedule(T=20, ts=[20, 14, 8, 3])
    torch.testing.assert_close(told_t.response(told_t.abar(Q9), told_t.solve_star(Q9)), first.solve_star(Q9))
    assert told_t.value(Q9).item() == pytest.approx(first.value(Q9).item(), rel=1e-6)
    c = told_t.solve_star(Q9) * 1.1
    a = told_t.response(told_t.abar(Q9), c)
    assert told_t.g(Q9, c).item() == pytest.approx(first.g(Q9, a).item(), rel=1e-12)
    assert told_t.f(Q9, c).item() == pytest.approx(first.f(Q9, a).item(), rel=1e-12)


@pytest.mark.parametrize("told, train", [("t", None), ("level", None), ("level", 30)])
def test_the_fit_is_the_minimum_and_its_derivative_the_response(told, train):
    table = train and oracles.LevelGaussianSchedule.uniform(train)
    problem = oracles.LevelGaussianSchedule(4, told, table, T=20, ts=[20, 14, 8, 3])
    c = problem.solve_star(Q9).requires_grad_()
    (slope,) = torch.autograd.grad(problem.g(Q9, c), c)
    assert slope.abs().max() < 1e-12
    exact = torch.func.grad(problem.value)(Q9)
    for i, h in enumerate(1e-5 * torch.eye(4, dtype=torch.float64)):
        both = (problem.value(Q9 + h) - problem.value(Q9 - h)) / 2e-5
        alone = (problem.f(Q9 + h, c) - problem.f(Q9 - h, c)).detach() / 2e-5
        assert exact[i].item() == pytest.approx(both.item(), rel=1e-5, abs=1e-9)
        assert problem.partial(Q9)[i].item() == pytest.approx(alone.item(), rel=1e-5, abs=1e-9)
    if train is None:  # Newton on f/gamma + g is that of the first problem; far out it is the fit
        torch.testing.assert_close(problem.solve_gamma(Q9, 1e9), c.detach(), rtol=0, atol=1e-6)


def test_told_the_level_the_bias_goes_to_zero_with_capacity_and_told_t_it_does_not():
    """Told t, the derivative at fixed parameters has the wrong sign in start, as with the networks of chapter 6."""
    level = [bias(oracles.LevelGaussianSchedule(k)) for k in (4, 6, 8, 10, 12)]
    assert all(b < a / 2 for a, b in itertools.pairwise(level)) and level[0] > 1 and level[-1] < 0.01
    for k in (4, 6, 8, 10, 12):
        problem = oracles.LevelGaussianSchedule(k, "t")
        assert bias(problem) > 1
        assert problem.partial(Q9)[0] < -0.03 < 0.01 < torch.func.grad(problem.value)(Q9)[0]


def test_trained_on_levels_that_do_not_hold_q_there_is_no_bias_at_any_capacity():
    broad = oracles.LevelGaussianSchedule.uniform(200)
    exact = torch.func.grad(oracles.LinearGaussianSchedule().value)(Q9)
    for k in (1, 2, 4, 8, 12):
        problem = oracles.LevelGaussianSchedule(k, train=broad)
        assert bias(problem) < 1e-12
        assert torch.func.grad(lambda q, p=problem: p.g(q, p.solve_star(q)))(Q9).abs().max() == 0
    torch.testing.assert_close(problem.partial(Q9), exact, rtol=5e-3, atol=0)  # and enough of it is the exact denoiser


def test_where_the_response_to_the_level_is_jagged_derivatives_say_nothing_and_differences_do():
    """A wave that no level of the training sees: f hardly moves, its derivative is another one altogether."""
    broad, widths = oracles.LevelGaussianSchedule.uniform(200), torch.tensor([0.05, 0.03, 0.25], dtype=torch.float64)
    smooth, jagged = (oracles.LevelGaussianSchedule(8, train=broad, wiggle=w) for w in (0.0, 0.003))
    torch.testing.assert_close(smooth.solve_star(Q9), jagged.solve_star(Q9))
    assert jagged.g(Q9, jagged.solve_star(Q9)).item() == pytest.approx(smooth.g(Q9, smooth.solve_star(Q9)).item())
    assert jagged.value(Q9).item() == pytest.approx(smooth.value(Q9).item(), rel=0.02)
    truth = smooth.partial(Q9)[:3]
    pathwise = jagged.partial(Q9)[:3]
    assert pathwise[1] < -5 * truth[1] < 0 and torch.cosine_similarity(pathwise, truth, 0) < 0

    def wide(problem):
        c = problem.solve_star(Q9)
        moved = torch.cat([torch.diag(widths), torch.zeros(3, 1)], 1)
        return torch.stack([problem.f(Q9 + h, c) - problem.f(Q9 - h, c) for h in moved]) / (2 * widths)

    assert (wide(jagged) - wide(smooth)).norm() < 0.2 * wide(smooth).norm()
    assert torch.cosine_similarity(wide(jagged), truth, 0) > 0.97


def test_level_problems_that_make_no_sense_are_refused():
    broad = oracles.LevelGaussianSchedule.uniform(20)
    assert broad[0] == 1 and (broad.diff() < 0).all() and len(broad) == 21
    for arguments, said in (
        ({"k": 0}, "k = 0 lie in 1..T = 50"),
        ({"k": 51}, "k = 51 lie in 1..T = 50"),
        ({"k": 3, "told": "noise"}, "told = 'noise' must be 't' or 'level'"),
        ({"k": 3, "told": "t", "train": broad}, "a fixed table of levels is for a denoiser told the level"),
        ({"k": 3, "wiggle": 0.1}, "the wave needs one"),
    ):
        with pytest.raises(ValueError, match=said):
            oracles.LevelGaussianSchedule(**arguments)
