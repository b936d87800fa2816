"""Every estimator of the gradient in lambda: closed forms by quadrature, finite differences, and Monte Carlo errors."""

import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from scipy import optimize

from bilevel_core import estimators
from bilevel_core.lab import comparisons, oracles

MIXTURE = oracles.Mixture1D()
PROBLEM = MIXTURE.problem()
LOG_W = PROBLEM.log_p0
R_UP, R_LOW = PROBLEM.r_up, PROBLEM.r_low
QUIET = pytest.mark.filterwarnings("ignore:the effective sample size")


def rewards(n, seed):
    x = MIXTURE.sample(n, torch.Generator().manual_seed(seed))
    return -((x - 1.2) ** 2) / 2, x


# ---------------------------------------------------------------- closed forms, by quadrature


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("gamma", [1.0, 10.0, 1000.0])
def test_closed_forms_to_rounding(lam, gamma):
    grad, info = estimators.lam_grad_penalty(R_UP, R_LOW, lam, gamma, LOG_W)
    assert grad.item() == pytest.approx(PROBLEM.penalty_grad(lam, gamma).item(), rel=1e-9, abs=1e-9)
    assert info["warning"] is None and info["ess"] > 100 and info["se"] > 0
    cov, _ = estimators.lam_grad_cov(R_UP, R_LOW, lam, LOG_W)
    assert cov.item() == pytest.approx(PROBLEM.hypergrad(lam).item(), rel=1e-9, abs=1e-9)
    at_infinity, _ = estimators.lam_grad_penalty(R_UP, R_LOW, lam, math.inf, LOG_W)
    assert torch.equal(at_infinity, cov)
    w, info = estimators.tilt_weights(R_LOW, lam, LOG_W)
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    assert info["kl"] == pytest.approx(PROBLEM.kl(PROBLEM.p_gamma(lam)).item(), rel=1e-10)
    assert info["log_z"] == pytest.approx(PROBLEM.logits(lam).logsumexp(-1).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lam, gamma", [(0.3, 1.0), (0.8, 20.0), (4.0, 1000.0)])
def test_they_are_derivatives(lam, gamma):
    h = 1e-5 * lam
    slope = (PROBLEM.penalty(lam + h, gamma) - PROBLEM.penalty(lam - h, gamma)) / (2 * h)
    grad, _ = estimators.lam_grad_penalty(R_UP, R_LOW, lam, gamma, LOG_W)
    assert grad.item() == pytest.approx(slope.item(), rel=1e-6)
    slope = (PROBLEM.value(lam + h) - PROBLEM.value(lam - h)) / (2 * h)
    assert estimators.lam_grad_cov(R_UP, R_LOW, lam, LOG_W)[0].item() == pytest.approx(slope.item(), rel=1e-6)


def test_large_gamma_with_common_samples_tends_to_the_covariance():
    """Its limit is the plug-in of (C) on the same samples; with separate samples the error grows with gamma."""
    up, low = rewards(2000, 1)
    other = rewards(2000, 2)
    cov, exact = estimators.lam_grad_cov(up, low, 1.0)
    for gamma, tolerance in [(1e3, 1e-2), (1e6, 1e-5)]:
        grad, info = estimators.lam_grad_penalty(up, low, 1.0, gamma)
        assert grad.item() == pytest.approx(cov.item(), rel=tolerance)
        assert info["se"].item() == pytest.approx(exact["se"].item(), rel=tolerance)
        first, second = oracles.Tilt(up, low), oracles.Tilt(*other)
        apart = gamma * (first.kl(first.p_gamma(1.0, gamma)) - second.kl(second.p_gamma(1.0)))
        assert abs(apart - cov) > gamma * 1e-3


@pytest.mark.parametrize("gamma, root", [(1.0, 0.160), (10.0, 0.412), (1000.0, 0.4612)])
def test_the_released_est1_stops_where_the_reward_has_fallen_back(gamma, root):
    def slope(lam):
        return comparisons.lam_grad_released_est1(R_UP, R_LOW, lam, gamma, LOG_W)[0].item()

    assert optimize.brentq(slope, 0.1, 3) == pytest.approx(root, abs=6e-4)
    if gamma == 1000.0:
        assert slope(0.5) == pytest.approx(0.54026, abs=6e-6) and slope(2.0) == pytest.approx(0.61363, abs=6e-6)


def test_several_lower_rewards_give_a_covariance_vector():
    """p_0 = N(0, I_2), r_low_j = x_j: p_star = N((1/lam_1, 1/lam_2), I), r_up = -|x - c|^2/2; by quadrature."""
    axis = torch.linspace(-9, 12, 71, dtype=torch.float64)
    x, y = (v.flatten() for v in torch.meshgrid(axis, axis, indexing="ij"))
    log_w = (-(x**2 + y**2) / 2).log_softmax(0)
    lam, c = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.8], dtype=torch.float64)
    r_up = -((x - c[0]) ** 2 + (y - c[1]) ** 2) / 2
    grad, info = estimators.lam_grad_cov(r_up, torch.stack([x, y]), lam, log_w)
    torch.testing.assert_close(grad, (c - 1 / lam) / lam**2, rtol=1e-8, atol=1e-8)
    assert info["se"].shape == grad.shape
    draws = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    r_up = -((draws - c[:, None]) ** 2).sum(0) / 2
    grad, info = estimators.lam_grad_cov(r_up, draws, 2 * lam)
    assert ((grad - (c - 0.5 / lam) / (4 * lam**2)).abs() < 4 * info["se"]).all()
    with pytest.raises(ValueError, match="takes one lower reward, not 2"):
        estimators.lam_grad_penalty(r_up, draws, lam, 10.0)


@pytest.mark.parametrize("gamma", [1e7, 1e10, 1e12, 1e14, 1e16, 1e20, 1e100, 1e300])
@pytest.mark.parametrize("lam", [0.1, 1.2, 20.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_gamma_is_too_large(gamma, lam, dtype):
    """gamma (KL - KL) in floating point would be noise of size 1e-16 gamma, and 0 from 1e20 on."""
    up, low = (r.to(dtype) for r in rewards(20_000, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cov, exact = estimators.lam_grad_cov(up, low, lam)
        grad, info = estimators.lam_grad_penalty(up, low, lam, gamma)
        shifted, _ = estimators.lam_grad_penalty(up.double() + 1e6, low.double() - 1e6, lam, gamma)
        swapped, at = comparisons.lam_grad_released_est1(up, low, lam, gamma)
        limit, _ = comparisons.lam_grad_released_est1(up, low, lam, math.inf)
        p, _ = estimators.tilt_weights(low, lam)
    rel = 1e-9 + 30 / gamma * max(1, 1 / lam)  # how far the limit is
    assert grad.item() == pytest.approx(cov.item(), rel=rel, abs=rel * exact["se"].item() * 1e3)
    assert info["se"].item() == pytest.approx(exact["se"].item(), rel=10 * rel)
    assert shifted.item() == pytest.approx(cov.item(), rel=1e-6 + rel, abs=1e-6 * exact["se"].item() * 1e3)
    mean, mean_star = up.double().mean(), p @ up.double()
    assert swapped.item() == pytest.approx(((mean_star - mean) / lam).item(), rel=1e-7 + 10 * rel, abs=1e-12)
    assert limit.item() == pytest.approx(((mean_star - mean) / lam).item(), rel=1e-9, abs=1e-13)
    influence = (p * (up.double() - mean_star) - (up.double() - mean) / 20_000) / lam
    assert at["se"].item() == pytest.approx(influence.norm().item(), rel=1e-7 + 10 * rel)


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("lam", [0.05, 1.0, 300.0])
def test_the_difference_of_two_laws_is_that_of_their_closed_forms(gamma, lam):
    """Both KLs and log Z apart, as the equations have them, where that loses little; also the standard errors."""
    up, low = rewards(300, 5)
    problem = oracles.Tilt(up, low)
    influence, log_z = [], []
    for g in (gamma, math.inf):
        h = problem.logits(lam, g)
        p, log_z = h.softmax(0), [*log_z, h.logsumexp(0)]
        influence.append(p * (h - (p * h).sum() - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad, info = estimators.lam_grad_penalty(up, low, lam, gamma)
        swapped, at = comparisons.lam_grad_released_est1(up, low, lam, gamma)
    loss = 1e-13 * gamma + 1e-15 * up.abs().max().item() / lam  # rounding of the two apart
    assert grad.item() == pytest.approx(problem.penalty_grad(lam, gamma).item(), rel=1e-9, abs=loss)
    assert info["se"].item() == pytest.approx(gamma * (influence[0] - influence[1]).norm().item(), rel=1e-9, abs=loss)
    expected = gamma * (log_z[0] - log_z[1]) - up.mean() / lam
    assert swapped.item() == pytest.approx(expected.item(), rel=1e-9, abs=loss)
    change = gamma * (problem.p_gamma(lam, gamma).exp() - problem.p_gamma(lam).exp()) - (up - up.mean()) / 300 / lam
    assert at["se"].item() == pytest.approx(change.norm().item(), rel=1e-9, abs=loss)


# ---------------------------------------------------------------- Monte Carlo


@pytest.mark.parametrize("lam", [0.8, 1.5, 6.0])
@pytest.mark.parametrize("gamma", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("n", [4_000, 20_000])
def test_monte_carlo_within_four_standard_errors(lam, gamma, n):
    r = rewards(n, 7)
    for (grad, info), exact in [
        (estimators.lam_grad_penalty(*r, lam, gamma), PROBLEM.penalty_grad(lam, gamma)),
        (estimators.lam_grad_cov(*r, lam), PROBLEM.hypergrad(lam)),
        (
            comparisons.lam_grad_released_est1(*r, lam, gamma),
            comparisons.lam_grad_released_est1(R_UP, R_LOW, lam, gamma, LOG_W)[0],
        ),
    ]:
        assert abs(grad - exact) < 4 * info["se"]


@pytest.mark.parametrize("estimator", [estimators.lam_grad_penalty, comparisons.lam_grad_released_est1])
def test_error_shrinks_as_the_root_of_n_and_the_standard_error_tells_it(estimator):
    spread, (exact, _) = [], estimator(R_UP, R_LOW, 2.0, 10.0, LOG_W)
    for n in (500, 8_000):
        runs = [estimator(*rewards(n, seed), 2.0, 10.0) for seed in range(80)]
        z = torch.stack([(grad - exact) / info["se"] for grad, info in runs])
        assert 0.8 < z.square().mean().sqrt() < 1.25
        spread.append(torch.stack([grad for grad, _ in runs]).std().item())
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.25)


def test_importance_weights_stand_for_samples_of_p_0():
    """Samples of the law tilted at lam = 2, weighted back to p_0, give the same gradients elsewhere."""
    g = torch.Generator().manual_seed(4)
    x = MIXTURE.tilt(0.5).sample(40_000, g)
    log_w = MIXTURE.log_prob(x) - MIXTURE.tilt(0.5).log_prob(x) - math.log(40_000)
    up = -((x - 1.2) ** 2) / 2
    for lam in (0.6, 1.0):
        grad, info = estimators.lam_grad_penalty(up, x, lam, 50.0, log_w)
        assert abs(grad - PROBLEM.penalty_grad(lam, 50.0)) < 4 * info["se"]
        assert info["ess"] > 3 * estimators.lam_grad_penalty(*rewards(40_000, 4), lam, 50.0)[1]["ess"]
        shifted, _ = estimators.lam_grad_penalty(up, x, lam, 50.0, log_w + 30)
        assert shifted.item() == pytest.approx(grad.item(), rel=1e-9)
        _, tilt = estimators.tilt_weights(x, lam, log_w)
        assert tilt["kl"] == pytest.approx(PROBLEM.kl(PROBLEM.p_gamma(lam)).item(), rel=0.03)


# ---------------------------------------------------------------- the whole curve


def test_the_curve_finds_the_optimum_and_its_interval():
    curve = estimators.lam_curve(R_UP, R_LOW, log_w=LOG_W)
    assert curve.best == pytest.approx(1.20841, abs=6e-5) and curve.boundary is None
    torch.testing.assert_close(curve.mean, -PROBLEM.value(curve.lam), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(curve.grad, PROBLEM.hypergrad(curve.lam), rtol=1e-8, atol=1e-8)
    widths = []
    for n in (4_000, 40_000):
        curve = estimators.lam_curve(*rewards(n, 11))
        low, high = curve.interval
        assert low < curve.best < high and low < 1.20841 < high
        assert ((curve.mean + PROBLEM.value(curve.lam)).abs() < 4 * curve.se)[curve.ess > 400].all()
        assert (curve.ess >= estimators.MIN_ESS).all()
        widths.append(math.log(high / low))
    assert 2 < widths[0] / widths[1] < 5


@pytest.mark.slow
def test_the_interval_covers_the_optimum_about_as_often_as_it_says():
    """Asymptotic: 89 % at n = 2,000 and 95 % at 32,000, over 200 and 80 batches; here fewer batches."""
    lams = torch.logspace(-0.4, 0.8, 25, dtype=torch.float64)
    intervals = [estimators.lam_curve(*rewards(2_000, seed), lams).interval for seed in range(100, 160)]
    assert sum(low < 1.20841 < high for low, high in intervals) >= 0.8 * 60


def test_an_optimum_at_the_boundary_is_said():
    up, low = rewards(5_000, 12)
    always = estimators.lam_curve(-low, low)  # rewards in conflict: don't tilt at all
    assert (always.best, always.boundary, always.interval[1]) == (math.inf, "high", math.inf)
    assert "the optimum is lam -> inf" in always.said
    never = estimators.lam_curve(low, low)  # one reward: tilt as far as the samples reach
    assert never.boundary == "low" and never.best == never.lam[0] and never.interval[0] == 0
    assert "the samples reach no further" in never.said
    wide = estimators.lam_curve(low, low, torch.logspace(0.5, 3, 30, dtype=torch.float64))
    assert wide.best == 0 and "the optimum is lam -> 0" in wide.said
    with pytest.raises(ValueError, match="only 0 values of lam have an effective sample size of 100"):
        estimators.lam_curve(up[:50], low[:50])
    for bad in (torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="positive, increasing"):
            estimators.lam_curve(up, low, bad)


# ---------------------------------------------------------------- bad input and extremes


def test_low_effective_sample_size_is_said():
    with pytest.warns(UserWarning, match="or draw them guided or as particles at this lam"):
        _, info = estimators.lam_grad_cov(*rewards(500, 1), 0.05)
    assert info["ess"] < 10 and "effective sample size is" in info["warning"]


ESTIMATORS = [
    lambda up, low, lam, log_w=None: estimators.lam_grad_penalty(up, low, lam, 10.0, log_w),
    lambda up, low, lam, log_w=None: comparisons.lam_grad_released_est1(up, low, lam, 10.0, log_w),
    estimators.lam_grad_cov,
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bad_input(estimator):
    up, low = rewards(200, 1)
    for lam in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            estimator(up, low, lam)
    holed = torch.where(torch.arange(200) == 3, math.nan, 1.0)
    for arguments, name in [((up * holed, low), "r_up"), ((up, low * holed), "r_low")]:
        with pytest.raises(ValueError, match=f"{name} is not finite for 1 of 200"):
            estimator(*arguments, 1.0)
    for arguments, name in [((up * 0 + 2, low), "r_up is 2"), ((up, low * 0 + 2), "r_low is 2")]:
        with pytest.raises(ValueError, match=f"{name} for every sample"):
            estimator(*arguments, 1.0)
    for arguments in [(up, low[:-1], 1.0), (up, low, torch.ones(2)), (up, low, 1.0, up[:3])]:
        with pytest.raises(ValueError, match="have the shapes"):
            estimator(*arguments)
    with pytest.raises(ValueError, match="n = 1 is too small"):
        estimator(up[:1], low[:1], 1.0)
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log_w must be finite"):
            estimator(up, low, 1.0, torch.full((200,), weight))


def test_bad_gamma_and_the_weights_checks():
    up, low = rewards(200, 1)
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="gamma = "):
            estimators.lam_grad_penalty(up, low, 1.0, gamma)
    with pytest.raises(ValueError, match="must be positive and finite"):
        estimators.tilt_weights(low, 0.0)
    with pytest.raises(ValueError, match="^r is not finite for 1 of 200 samples; drop or mend them"):
        estimators.tilt_weights(torch.where(torch.arange(200) == 3, math.nan, low), 1.0)
    with pytest.raises(
        ValueError, match=r"^r \(n,\), lam \(\), log_w \(n,\) have the shapes \[\(200,\), \(\), \(3,\)\]"
    ):
        estimators.tilt_weights(low, 1.0, up[:3])
    several = torch.stack([low, torch.where(torch.arange(200) < 2, math.inf, low)])
    with pytest.raises(ValueError, match="^r_low is not finite for 2 of 200 samples"):
        estimators.lam_grad_cov(up, several, torch.ones(2))
    for arguments in ((low, 1e-310), (low * 1e300, 1e-10)):
        with pytest.raises(
            ValueError, match=r"reward/lam reaches inf, beyond what can be weighted: raise lam or gamma"
        ):
            estimators.tilt_weights(*arguments)
    with pytest.raises(ValueError, match="raise lam or gamma"):
        estimators.lam_grad_penalty(up, low, 1.0, 1e-310)
    weights, _ = estimators.tilt_weights(torch.ones(200), 1.0)  # a constant reward tilts nothing
    torch.testing.assert_close(weights, torch.full((200,), 1 / 200, dtype=torch.float64))


@QUIET
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    values=st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 2), min_size=2, max_size=30),
    log_lam=st.floats(-4, 4),
    log_gamma=st.floats(-2, 6),
)
def test_no_valid_input_gives_nan(values, log_lam, log_gamma):
    up, low = torch.tensor(values, dtype=torch.float64).T
    hypothesis.assume(up.max() > up.min() and low.max() > low.min())
    lam, gamma = 10**log_lam, 10**log_gamma
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [estimators.lam_grad_penalty(up, low, lam, gamma), estimators.lam_grad_cov(up, low, lam)]
        results.append(comparisons.lam_grad_released_est1(up, low, lam, gamma))
        _, tilt = estimators.tilt_weights(low, lam)
        curve = estimators.lam_curve(up, low, lam * torch.logspace(-4, 4, 15, dtype=torch.float64), min_ess=1.0)
    for grad, info in results:
        assert torch.isfinite(grad) and torch.isfinite(info["se"]) and 1 <= info["ess"] * (1 + 1e-9)
    assert math.isfinite(tilt["kl"]) and tilt["kl"] > -1e-9
    assert torch.isfinite(curve.mean).all() and torch.isfinite(curve.grad_se).all() and not math.isnan(curve.best)
    assert curve.interval[0] <= curve.interval[1]


# ---------------------------------------------------------------- samples of several tilts as one set


def of_tilts(lams, n, seed=0):
    """n samples each of p_0 and of exact tilts: x (N,), h (K, N), sizes (K,), and the exact log Z."""
    laws = [oracles.Mixture1D(), *(oracles.Mixture1D().tilt(1 / lam) for lam in lams)]
    x = torch.cat([law.sample(n, torch.Generator().manual_seed(seed + i)) for i, law in enumerate(laws)])
    h = torch.stack([0 * x, *(x / lam for lam in lams)])
    exact = [0.0, *(PROBLEM.logits(lam).logsumexp(-1).item() for lam in lams)]
    return x, h, torch.full((len(laws),), float(n)).double(), exact


def test_pooled_constants_are_those_of_a_convex_function_and_near_the_truth():
    from scipy.optimize import minimize

    x, h, sizes, exact = of_tilts((1.5, 0.8, 0.5), 2000)
    log_w, log_z = estimators.pool(h, sizes, torch.ones_like(x))
    assert log_z.tolist() == pytest.approx(exact, abs=0.08) and log_z[0] == 0
    # every law's shares add up to its size; in particular the weights to one
    shares = (h + (sizes.log() - log_z)[:, None] + log_w).exp().sum(1)
    assert shares.tolist() == pytest.approx(sizes.tolist(), rel=1e-9)
    assert log_w.exp().sum().item() == pytest.approx(1, abs=1e-9) and log_w.exp().max() <= 1 / 2000

    def objective(free):
        z = torch.cat([torch.zeros(1).double(), torch.as_tensor(free)])
        return ((h + (sizes.log() - z)[:, None]).logsumexp(0).sum() + sizes @ z).item()

    found = minimize(objective, log_z[1:].numpy() + 0.1, method="Nelder-Mead", options={"xatol": 1e-7, "maxiter": 4000})
    assert log_z[1:].tolist() == pytest.approx(found.x.tolist(), abs=1e-5)


def test_pooling_beats_each_set_alone_and_shrinks_with_n():
    def errors(n):
        found = []
        for seed in range(30):
            x, h, sizes, _ = of_tilts((1.5, 0.8, 0.5), n, 100 * seed)
            log_w, _ = estimators.pool(h, sizes, torch.ones_like(x))
            p = (log_w + x / 0.65).softmax(0)
            alone = (x[:n] / 0.65).softmax(0)
            truth = PROBLEM.mean(PROBLEM.p_gamma(0.65), PROBLEM.r_low)
            found.append([(p @ x - truth).square(), (alone @ x[:n] - truth).square()])
        return torch.tensor(found).mean(0).sqrt()

    few, many = errors(250), errors(4000)
    assert few[0] < 0.4 * few[1] and many[0] < 0.4 * many[1]
    assert 0.15 < many[0] / few[0] < 0.4  # sixteen times the samples


def test_weighted_rows_count_for_what_they_stand():
    """A row of weight two is two equal rows."""
    _, h, _, _ = of_tilts((0.8,), 500)
    twice = torch.cat([torch.arange(1000), torch.arange(500, 600)])
    log_w, log_z = estimators.pool(h[:, twice], torch.tensor([500, 600]), torch.ones(1100))
    count = torch.ones(1000)
    count[500:600] = 2
    again, log_z_again = estimators.pool(h, torch.tensor([500, 600]), count)
    assert log_z_again.tolist() == pytest.approx(log_z.tolist(), abs=1e-9)
    assert again[500:600].exp().tolist() == pytest.approx((2 * log_w[1000:].exp()).tolist(), rel=1e-9)


def test_laws_that_do_not_overlap_leave_what_they_leave():
    """A set far off gets hardly any weight where it has no business, and Newton's method still ends."""
    x, h, sizes, _ = of_tilts((0.8, 0.02), 400)
    log_w, log_z = estimators.pool(h, sizes, torch.ones_like(x))
    assert torch.isfinite(log_z).all() and torch.isfinite(log_w).all()
    p = (log_w + x / 0.8).softmax(0)
    assert p[800:].sum() < 1e-6
    assert (p @ x).item() == pytest.approx(PROBLEM.mean(PROBLEM.p_gamma(0.8), PROBLEM.r_low).item(), abs=0.15)


# ---------------------------------------------------------------- by hand: two samples, and the influence function


def test_two_samples_by_hand():
    """r = (0, 2 log 3) at lam = 2 gives the weights 1/4 and 3/4, Z = 2, and everything else."""
    with pytest.warns(UserWarning, match=r"sample size is 1.6 at lam = 2: reweighting these samples says") as caught:
        weights, info = estimators.tilt_weights(torch.tensor([0.0, 2 * math.log(3)], dtype=torch.float64), 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=0, atol=1e-12)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert info["ess"] == pytest.approx(1.6) and info["log_z"] == pytest.approx(math.log(2), abs=1e-14)
    assert info["kl"] == pytest.approx(kl) and set(info) == {"ess", "log_z", "kl", "warning"}
    assert info["warning"] == str(caught[0].message)
    several = torch.tensor([0.5, 2.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="at lam = 0.5, 2: reweighting"):
        estimators.lam_grad_cov(torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 1.0], [1.0, 0.5]]), several)


def test_a_sample_more_or_less_decides_about_the_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimators.tilt_weights(torch.ones(101), 1.0)[1]["warning"] is None
    with pytest.warns(UserWarning, match="is 99.0 at"):
        estimators.tilt_weights(torch.ones(99), 1.0)


SMALL_UP, SMALL_LOW = (v[:400] for v in rewards(400, 21))
SMALL_W = 0.3 * torch.randn(400, generator=torch.Generator().manual_seed(22), dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["penalty", "cov", "est1", "vector"])
def test_standard_errors_are_the_derivative_in_the_log_weights(estimator):
    """d estimate/d log w_i is w_i IF_i, the influence of sample i: autograd knows nothing of the formulas used."""
    gamma, lam = 7.0, 1.3
    if estimator == "vector":
        lam, low = torch.tensor([1.3, 4.0], dtype=torch.float64), torch.stack([SMALL_LOW, SMALL_UP.sin()])
    else:
        low = SMALL_LOW
    run = {
        "penalty": lambda w: estimators.lam_grad_penalty(SMALL_UP, low, lam, gamma, w),
        "cov": lambda w: estimators.lam_grad_cov(SMALL_UP, low, lam, w),
        "vector": lambda w: estimators.lam_grad_cov(SMALL_UP, low, lam, w),
        "est1": lambda w: comparisons.lam_grad_released_est1(SMALL_UP, low, lam, gamma, w),
    }[estimator]
    influence = torch.autograd.functional.jacobian(lambda w: run(w)[0], SMALL_W)
    grad, info = run(SMALL_W)
    torch.testing.assert_close(info["se"], influence.norm(dim=-1), rtol=1e-9, atol=0)
    assert (
        set(info) == {"se", "influence", "ess", "warning"}
        and info["se"].shape == grad.shape == torch.as_tensor(lam).shape
    )


def test_effective_sample_size_is_that_of_the_worse_law():
    lam, gamma = 1.3, 2.0
    for estimator in (estimators.lam_grad_penalty, comparisons.lam_grad_released_est1):
        for up in (SMALL_UP, -SMALL_UP):
            _, info = estimator(up, SMALL_LOW, lam, gamma, SMALL_W)
            laws = [estimators.tilt_weights(h, lam, SMALL_W)[1]["ess"] for h in (SMALL_LOW, up / gamma + SMALL_LOW)]
            assert info["ess"] == pytest.approx(min(laws), rel=1e-9)
    _, info = estimators.lam_grad_cov(SMALL_UP, SMALL_LOW, lam, SMALL_W)
    assert info["ess"] == pytest.approx(estimators.tilt_weights(SMALL_LOW, lam, SMALL_W)[1]["ess"], rel=1e-9)


def test_est1_checks_gamma_and_the_number_of_rewards():
    with pytest.raises(ValueError, match="gamma = -1.0 must be positive"):
        comparisons.lam_grad_released_est1(SMALL_UP, SMALL_LOW, 1.0, -1.0)
    two = torch.stack([SMALL_LOW, SMALL_UP])
    for estimator in (estimators.lam_grad_penalty, comparisons.lam_grad_released_est1):
        with pytest.raises(ValueError, match="takes one lower reward, not 2; use lam_grad_cov"):
            estimator(SMALL_UP, two, torch.ones(2), 1.0)
        grad, _ = estimator(SMALL_UP, SMALL_LOW[None], 2 * torch.ones(1), 10.0)  # one row is one reward
        assert torch.isfinite(grad).all()


def test_inputs_at_their_limits():
    up, low = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad, _ = estimators.lam_grad_cov(up, low, 1.0)  # two samples are the fewest
        weight, _ = estimators.tilt_weights(torch.zeros(3), 1.0, torch.tensor([0.0, -math.inf, 0.0]))
    p = 1 / (1 + math.e)  # of the second sample, whose r_low is the smaller: Cov = -p (1 - p)
    assert grad.item() == pytest.approx(-p * (1 - p)) and grad.dtype == torch.float64
    assert weight.tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match="log_w must be finite, or -inf for samples that count nothing"):
        estimators.tilt_weights(torch.zeros(3), 1.0, torch.full((3,), -math.inf))
    with pytest.raises(ValueError, match=r"shapes \[\(\), \(2,\), \(\), \(0,\)\]"):
        estimators.lam_grad_cov(torch.tensor(1.0), low, 1.0)
    with pytest.raises(ValueError, match=r"r_up \(n,\), r_low \(n,\) or \(m, n\), lam \(\) or \(m,\), log_w \(n,\)"):
        estimators.lam_grad_cov(up, low, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"have the shapes"):
        estimators.lam_grad_cov(up, low[None, None], torch.ones(1, 1))


def test_the_curve_point_by_point():
    """Mean, error, ESS, gradient and its error at each lambda are those of the estimators there."""
    up, low = rewards(3_000, 23)
    lams = torch.logspace(-0.3, 1, 9, dtype=torch.float64)
    curve = estimators.lam_curve(up, low, lams)
    for i, lam in enumerate(curve.lam):
        p, info = estimators.tilt_weights(low, lam)
        grad, at = estimators.lam_grad_cov(up, low, lam)
        assert curve.mean[i].item() == pytest.approx((p @ up).item(), rel=1e-10)
        assert curve.se[i].item() == pytest.approx((p * (up - p @ up)).norm().item(), rel=1e-10)
        assert curve.ess[i].item() == pytest.approx(info["ess"], rel=1e-10)
        assert curve.grad[i].item() == pytest.approx(grad.item(), rel=1e-9)
        assert curve.grad_se[i].item() == pytest.approx(at["se"].item(), rel=1e-9)
    assert curve.said == f"the reward is largest at lam = {curve.best:.4g}" and curve.boundary is None
    assert abs(estimators.lam_grad_cov(up, low, curve.best)[0]) < 1e-9


@pytest.mark.parametrize("z", [1.0, 1.96])
def test_the_interval_ends_where_the_gradient_is_z_errors_from_zero(z):
    up, low = rewards(20_000, 24)
    options = {} if z == 1.96 else {"z": z}  # 1.96 is the default
    curve = estimators.lam_curve(up, low, torch.logspace(-0.5, 1, 300, dtype=torch.float64), **options)
    for lam, sign in zip(curve.interval, (-1, 1), strict=True):
        grad, info = estimators.lam_grad_cov(up, low, lam)
        assert (grad / info["se"]).item() == pytest.approx(sign * z, abs=5e-3)


def test_the_default_grid_spans_eight_decades_and_keeps_what_the_samples_say():
    up, low = rewards(2_000, 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = estimators.lam_curve(up, low, min_ess=0.0)
    assert len(everything.lam) == 161
    torch.testing.assert_close(everything.lam[[0, -1]], low.std() * torch.tensor([1e-4, 1e4]).double())
    kept = estimators.lam_curve(up, low)
    assert torch.equal(kept.lam, everything.lam[everything.ess >= 100.0])
    with pytest.raises(ValueError, match=r"only 2 values of lam .* 100 or more \(n = 2000, largest \d+\); draw more"):
        estimators.lam_curve(up, low, torch.tensor([0.01, 1.0, 2.0]))
    three = estimators.lam_curve(up, low, torch.tensor([0.8, 1.0, 2.0]))  # three are enough
    assert len(three.lam) == 3


@pytest.mark.parametrize("estimator", [*ESTIMATORS, lambda up, low, lam: estimators.tilt_weights(low, lam)])
def test_the_warning_points_at_the_callers_line(estimator):
    with pytest.warns(UserWarning, match="effective sample size") as caught:
        estimator(*rewards(50, 1), 1.0)
    assert caught[0].filename == __file__


def test_an_interval_that_no_lambda_bounds_is_open_on_that_side():
    """So few samples that the gradient is nowhere z errors from zero, on either side of the maximum or on one."""
    up, low = rewards(400, 26)
    lams = torch.logspace(-0.2, 1, 12, dtype=torch.float64)
    curve = estimators.lam_curve(up, low, lams, min_ess=10.0, z=60.0)
    assert curve.boundary is None and curve.interval == (0.0, math.inf)
    score = curve.grad / curve.grad_se
    middle = (-score[0].item() + score[-1].item()) / 2
    assert score[0] < 0 < score[-1] and -score[0].item() != pytest.approx(score[-1].item(), rel=0.2)
    curve = estimators.lam_curve(up, low, lams, min_ess=10.0, z=middle)  # reached on one side only
    assert (curve.interval[0] == 0.0) == (-score[0].item() < middle) and (curve.interval[1] == math.inf) == (
        score[-1].item() < middle
    )
    assert (curve.interval[0] == 0.0) != (curve.interval[1] == math.inf)


def test_an_interval_may_end_between_the_last_two_lambdas():
    up, low = rewards(3_000, 23)
    lams = torch.logspace(-0.2, 1, 12, dtype=torch.float64)
    curve = estimators.lam_curve(up, low, lams)
    score = (curve.grad / curve.grad_se).tolist()
    steep, flat = min(score), max(score)
    assert steep == score[0] < score[1] < 0 < score[-2] < score[-1] == flat
    low_end = estimators.lam_curve(up, low, lams, z=-(score[0] + score[1]) / 2).interval[0]
    assert curve.lam[0] < low_end < curve.lam[1]
    high_end = estimators.lam_curve(up, low, lams, z=(score[-2] + score[-1]) / 2).interval[1]
    assert curve.lam[-2] < high_end < curve.lam[-1]


def test_an_error_by_groups_by_hand():
    p, influence = torch.full((6,), 1 / 6, dtype=torch.float64), torch.tensor([1.0, -1, 2, 0, -1, 3]).double()
    group = torch.tensor([0, 0, 2, 2, 2, 5])
    error = ((0 + 1 + 9) / (1 - 4 / 36 - 9 / 36 - 1 / 36)) ** 0.5  # sums 0, 1, 3
    assert estimators.group_error(p, influence, group).item() == pytest.approx(error, rel=1e-12)
    assert estimators.group_error(p, influence).item() == pytest.approx(4, rel=1e-12)
    assert estimators.group_error(p, influence, torch.zeros(6).long()) == math.inf
    assert estimators.group_error(p, 0 * influence, torch.zeros(6).long()) == math.inf
