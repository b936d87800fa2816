"""What stands beside the method: the released code's guidance and estimators made of guided trajectories."""

import math
import re

import numpy
import pytest
import torch
from smooth import bumpy, crooked, some_x

from bilevel_core import guidance, samplers, schedules
from bilevel_core.lab import comparisons, oracles

T = 50
ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
TS = samplers.timesteps(T, T)


# ---------------------------------------------------------------- the released variant


def test_released_target_matching_is_the_gradient_of_half_the_squared_miss():
    x, t, strength, target = some_x().requires_grad_(), 20, 0.8, 3.0
    for at in (some_x(1, 5), some_x(7, 5)):
        leaf = at.clone().requires_grad_()
        value = bumpy(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        offset = (value - (slope * leaf).sum(1)).detach()
        x0_hat = guidance.x0_from_eps(x, crooked(x, t), ABAR[t])
        miss = (target - (slope * x0_hat).sum(1) - offset) ** 2 / 2
        (down,) = torch.autograd.grad(miss.sum(), x)
        guided = comparisons.released_target_matching(crooked, bumpy, at, target, strength, ABAR, TS)
        expected = crooked(x, t) + (1 - ABAR[t]).sqrt() * strength * down
        torch.testing.assert_close(guided(x.detach(), t), expected.detach())


def test_released_target_matching_aims_at_a_value_and_not_at_the_tilted_law():
    """p_0 = N(0, 1), r = x: the pull to r = 2 narrows the law, where every tilt by r has variance one."""
    law = oracles.Gaussian(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    g, reward = torch.Generator().manual_seed(3), lambda x: x[:, 0]
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    guided = comparisons.released_target_matching(law.denoiser(ABAR), reward, x0, 2.0, 4.0, ABAR, TS)
    x_T = torch.randn(2000, 1, generator=g, dtype=torch.float64)
    with torch.no_grad():
        x = samplers.sample_ancestral(guided, x_T, ABAR, TS, generator=g)
    assert 1.4 < x.mean() < 2 and x.var() < 0.3


# ---------------------------------------------------------------- the path-space KL


@pytest.mark.parametrize("steps, expected", [(50, 0.584), (100, 0.541)])
def test_path_kl_of_a_gaussian(steps, expected):
    """N(0, 1/4), slope 2: the KL of the tilt is 0.5. The guidance does not depend on x, so one path tells it."""
    law = oracles.Gaussian(torch.zeros(1, dtype=torch.float64), 0.25 * torch.eye(1, dtype=torch.float64))
    abar, ts, record = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), steps), list(range(steps, 0, -1)), []
    guided = guidance.LookAhead(law.denoiser(abar), lambda x: 2 * x[:, 0], 1.0, abar, ts, record=record)
    with torch.no_grad():
        samplers.sample_ddim(guided, torch.zeros(1, 1, dtype=torch.float64), abar, ts, eta=1.0)
    kl = comparisons.path_kl(record, abar, ts)
    assert kl.dtype == torch.float64 and kl.item() == pytest.approx(expected, abs=6e-4)
    norms = [square.sqrt() for _, square in record]
    torch.testing.assert_close(comparisons.guidance_norm(record), sum(norms) / (steps - 1))


def test_path_kl_is_infinite_without_noise():
    record = []
    guided = guidance.LookAhead(crooked, bumpy, 1.0, ABAR, TS, guide_last=True, record=record)
    guided(some_x(), 1)
    with pytest.raises(ValueError, match="t = 1 adds no noise but was guided"):
        comparisons.path_kl(record, ABAR, TS)
    with pytest.raises(ValueError, match="adds no noise"):
        comparisons.path_kl([(20, torch.ones(3))], ABAR, TS, eta=0.0)


def test_the_path_estimator_is_right_for_the_h_transform_and_wrong_for_look_ahead():
    """1-D oracle, gamma = 10, lam = 1: (A) is -0.39; with the exact h-transform -0.41, with look-ahead +0.89."""
    mixture, gamma, lam, n = oracles.Mixture1D(), 10.0, 1.0, 2000
    plain = mixture.denoiser(ABAR)
    x_T = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(make):
        record = []
        guided, g = make(record), torch.Generator().manual_seed(2)
        with torch.no_grad():
            samplers.sample_ddim(guided, x_T, ABAR, TS, eta=1.0, generator=g)
        return record

    def h_transform(curvature, slope):
        exact = mixture.tilt(slope, curvature).denoiser(ABAR)

        def make(record):
            def guided(x, t):
                if t == TS[-1]:
                    return plain(x, t)
                record.append((t, (exact(x, t) - plain(x, t)).square() / (1 - ABAR[t])))
                return exact(x, t)

            return guided

        return make

    def look_ahead(curvature, slope):
        def reward(x):
            return slope * x + curvature * x**2 / 2

        return lambda record: guidance.LookAhead(plain, reward, 1.0, ABAR, TS, record=record)

    found = {}
    for name, guide in (("exact", h_transform), ("look-ahead", look_ahead)):
        with_up, without = run(guide(-1 / (gamma * lam), (1 + 1.2 / gamma) / lam)), run(guide(0.0, 1 / lam))
        kls = [comparisons.path_kl(record, ABAR, TS) for record in (with_up, without)]
        found[name] = comparisons.lam_grad_path(*kls, gamma)
        norms = [comparisons.guidance_norm(record) for record in (with_up, without)]
        found["est2 " + name] = comparisons.lam_grad_released_est2(*norms, gamma)
    grad, info = found["exact"]
    assert abs(grad - mixture.problem().penalty_grad(lam, gamma)) < 4 * info["se"] + 0.08  # 50 steps
    grad, info = found["look-ahead"]
    assert grad > 10 * info["se"]
    grad, info = found["est2 exact"]
    assert abs(grad - mixture.problem().penalty_grad(lam, gamma)) > 20 * info["se"]  # it is not a KL


def test_a_reward_of_target_matching_is_one_value_a_sample_with_a_gradient():
    for reward, error, said in (
        (lambda x: x, ValueError, r"the reward has shape \(7, 2\) for 7 samples"),
        (lambda x: 1.5, TypeError, "is a float for 7 samples"),
        (lambda x: bumpy(x.detach()), ValueError, "gives no gradient in x_0"),
    ):
        with pytest.raises(error, match=said):
            comparisons.released_target_matching(crooked, reward, some_x(), 1.0, 1.0, ABAR, TS)


@pytest.mark.parametrize(
    "entry",
    [
        lambda abar: comparisons.released_target_matching(crooked, bumpy, some_x(), 1.0, 1.0, abar, [2, 1]),
        lambda abar: comparisons.path_kl([(2, torch.ones(3))], abar, [2, 1]),
    ],
)
def test_a_wrong_table_is_refused(entry):
    with pytest.raises(ValueError, match=r"abar\[2\] = 0.7, but abar must fall"):
        entry(torch.tensor([1.0, 0.5, 0.7, 0.1]))


def test_a_record_is_of_the_grid():
    record = [(20, torch.ones(3))]
    whole = comparisons.path_kl(record, ABAR, numpy.array([20, 10]))
    torch.testing.assert_close(whole, comparisons.path_kl(record, ABAR, [20, 10]))
    with pytest.raises(ValueError, match="the record has a step at t = 20 that is not on the grid"):
        comparisons.path_kl(record, ABAR, [21, 10])


# ---------------------------------------------------------------- differences of trajectories


def test_path_estimators_use_common_random_numbers():
    g = torch.Generator().manual_seed(5)
    common, extra = torch.rand(1000, generator=g), 1e-3 * torch.rand(1000, generator=g)
    grad, info = comparisons.lam_grad_path(common + extra, common, 100.0)
    assert grad.item() == pytest.approx(0.05, rel=0.05) and info["se"] < 0.002
    half, _ = comparisons.lam_grad_released_est2(common + extra, common, 100.0)
    assert half.item() == pytest.approx(grad.item() / 2, rel=1e-4)
    for estimator in (comparisons.lam_grad_path, comparisons.lam_grad_released_est2):
        with pytest.raises(ValueError, match=r"must be \(n,\) with n >= 2"):
            estimator(common, common[:-1], 1.0)
        with pytest.raises(ValueError, match="gamma = inf must be positive and finite"):
            estimator(common, common, math.inf)
        with pytest.raises(ValueError, match="the path KLs must be finite"):
            estimator(common + math.inf, common, 1.0)
        for dtype, gamma in ((torch.float32, 1e8), (torch.float64, 1e18)):
            kl = common.to(dtype)
            other = kl * (1 + torch.finfo(dtype).eps * (extra > 5e-4))  # they differ in the last bit at most
            for pair in ((other, kl), (kl, kl)):
                with pytest.raises(
                    ValueError,
                    match=rf"at gamma = {re.escape(format(gamma, 'g'))} the two agree to rounding; lower gamma",
                ):
                    estimator(*pair, gamma)


def test_paired_differences_by_hand():
    """gamma times the mean difference, and its standard error s/sqrt(n) over trajectories."""
    high, low = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 1.0])
    grad, info = comparisons.lam_grad_path(high, low, 10.0)  # differences 5, 10, 30
    assert grad.item() == pytest.approx(15) and grad.dtype == torch.float64
    assert info == {"se": pytest.approx((175 / 3) ** 0.5), "ess": 3.0, "warning": None}
    half, info_half = comparisons.lam_grad_released_est2(high, low, 10.0)
    assert half.item() == pytest.approx(7.5) and info_half["se"].item() == pytest.approx(info["se"].item() / 2)
    grad, _ = comparisons.lam_grad_path(high[:2], low[:2], 10.0)  # two are enough
    assert grad.item() == pytest.approx(7.5)
    for bad in ((high[:1], low[:1]), (high.reshape(1, 3), low.reshape(1, 3))):
        with pytest.raises(ValueError, match="n >= 2, by trajectory"):
            comparisons.lam_grad_path(*bad, 1.0)
    for gamma in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive and finite"):
            comparisons.lam_grad_path(high, low, gamma)
