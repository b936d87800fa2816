"""Look-ahead guidance against exact tilts, finite differences and known path-space divergences."""

import math

import pytest
import torch

from bilevel_core import estimators, guidance, oracles, samplers, schedules

T = 50
ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
TS = samplers.timesteps(T, T)
LAW = oracles.Gaussian(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
)
SLOPE = torch.tensor([0.7, -1.0], dtype=torch.float64)
LAM = 0.4


def linear(x):
    return x @ SLOPE


def crooked(x, t):
    """Any smooth denoiser."""
    return torch.tanh(x + 0.01 * t) * 0.7 + 0.1 * x.flip(1)


def bumpy(x):
    """Any smooth reward, (B,)."""
    return torch.sin(2 * x).sum(1) - x[:, 0] * x[:, 1] ** 2


def some_x(n=7, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- Algorithm 5


@pytest.mark.parametrize("t", [1, 10, 30, 50])
def test_gaussian_and_linear_reward_give_the_exact_tilted_denoiser(t):
    """So every sampler run with it has the law `p_star.chain_law`: mean and variance of the discrete recursion."""
    guided = guidance.LookAhead(LAW.denoiser(ABAR), linear, LAM, ABAR, TS, guide_last=True)
    exact = LAW.tilt(SLOPE, LAM).denoiser(ABAR)
    torch.testing.assert_close(guided(some_x(), t), exact(some_x(), t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_guided_samples_have_the_mean_of_the_tilt_and_the_variance_of_the_chain(eta):
    n, ts, g, star = 10_000, samplers.timesteps(T, 10), torch.Generator().manual_seed(1), LAW.tilt(SLOPE, LAM)
    eye = torch.eye(2, dtype=torch.float64)
    start = oracles.Gaussian(ABAR[-1].sqrt() * star.mean, ABAR[-1] * star.cov + (1 - ABAR[-1]) * eye)
    law = star.chain_law(ABAR, ts, eta, start)
    torch.testing.assert_close(law.mean, star.mean, rtol=0, atol=1e-9)  # at any number of steps
    guided = guidance.LookAhead(LAW.denoiser(ABAR), linear, LAM, ABAR, ts, guide_last=True)
    x_T = start.mean + (1 - ABAR[-1] + ABAR[-1] * 0.4).sqrt() * torch.randn(n, 2, generator=g, dtype=torch.float64)
    with torch.no_grad():
        x = samplers.sample_ddim(guided, x_T, ABAR, ts, eta=eta, generator=g)
    assert ((x.mean(0) - star.mean).abs() < 4 * (law.cov.diagonal() / n).sqrt()).all()
    assert ((x.T.cov() - law.cov).abs() < 4 * (2 / n) ** 0.5 * law.cov.max()).all()
    if eta == 1.0:
        g = torch.Generator().manual_seed(2)
        y = samplers.sample_ancestral(guided, x_T, ABAR, ts, generator=g)
        assert ((y.mean(0) - star.mean).abs() < 4 * (law.cov.diagonal() / n).sqrt()).all()


def test_the_guidance_is_the_derivative_of_the_look_ahead():
    x, t, h = some_x(), 20, 1e-5
    guided = guidance.LookAhead(crooked, bumpy, 0.3, ABAR, TS)
    eps_hat, eps_guided, value = guided.look(x, t)
    grad = (eps_hat - eps_guided) / (1 - ABAR[t]).sqrt()
    torch.testing.assert_close(eps_hat, crooked(x, t))
    torch.testing.assert_close(value, bumpy(guidance.x0_from_eps(x, eps_hat, ABAR[t])) / 0.3)
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        slope = (guided.look(x + step, t)[2] - guided.look(x - step, t)[2]) / (2 * h)
        torch.testing.assert_close(grad[:, i], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"checkpoint": True}])
def test_guidance_is_per_sample(options):
    x = some_x()
    whole = guidance.LookAhead(crooked, bumpy, 0.3, ABAR, TS)(x, 20)
    torch.testing.assert_close(guidance.LookAhead(crooked, bumpy, 0.3, ABAR, TS)(x[2:4], 20), whole[2:4])
    torch.testing.assert_close(guidance.LookAhead(crooked, bumpy, 0.3, ABAR, TS, **options)(x, 20), whole)


def test_one_network_call_a_step_and_none_guided_without_noise():
    meter, record, ts = guidance.CostMeter(crooked), [], samplers.timesteps(T, 5)
    guided = guidance.LookAhead(meter, bumpy, 0.3, ABAR, ts, record=record)
    with torch.no_grad():
        samplers.sample_ddim(guided, some_x(), ABAR, ts, eta=1.0, generator=torch.Generator().manual_seed(0))
    assert meter.calls == 5 and meter.cost == 7 * (5 + 4)  # each guided step one input-backward, the last none
    assert [t for t, _ in record] == ts[:-1] and all(square.shape == (7,) for _, square in record)
    assert torch.equal(guided(some_x(), ts[-1]), crooked(some_x(), ts[-1]))


def test_the_caller_decides_about_gradients():
    guided = guidance.LookAhead(crooked, bumpy, 0.3, ABAR, TS)
    with torch.no_grad():
        assert not guided(some_x(), 20).requires_grad

    def run(q):
        abar, ts = schedules.abar(q, 20), samplers.timesteps(20, 4)
        return samplers.sample_ddim(guidance.LookAhead(crooked, bumpy, 2.0, abar, ts), some_x(2), abar, ts)

    q = torch.tensor([0.05, 0.9, 1.1, 0.02], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, q, atol=1e-5)


def test_a_tempered_potential_is_that_of_a_larger_lambda_except_at_the_end():
    x, t = some_x(), 10
    tempered = guidance.LookAhead(crooked, bumpy, 0.7, ABAR, TS, temper=2.0)
    weaker = guidance.LookAhead(crooked, bumpy, 0.7 / float(ABAR[t]) ** 2, ABAR, TS)
    for a, b in zip(tempered.look(x, t), weaker.look(x, t), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(tempered.potential(x), bumpy(x) / 0.7)


def test_bad_input():
    for lam in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            guidance.LookAhead(crooked, bumpy, lam, ABAR, TS)
    for temper in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temper = .* must be at least 0 and finite"):
            guidance.LookAhead(crooked, bumpy, 1.0, ABAR, TS, temper=temper)
    for reward, message in [
        (lambda x: bumpy(x).mean(), r"the reward has shape \(\) for 7 samples"),
        (lambda x: bumpy(x) / 0, "the reward is not finite for 7 of 7 samples"),
        (lambda x: (x[:, 0] > 0).double(), r"gives no gradient in x_0; use sample_particles\(..., guided=False\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            guidance.LookAhead(crooked, reward, 1.0, ABAR, TS)(some_x(), 20)


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
        guided = guidance.released_target_matching(crooked, bumpy, at, target, strength, ABAR, TS)
        expected = crooked(x, t) + (1 - ABAR[t]).sqrt() * strength * down
        torch.testing.assert_close(guided(x.detach(), t), expected.detach())


def test_released_target_matching_aims_at_a_value_and_not_at_the_tilted_law():
    """p_0 = N(0, 1), r = x: the pull to r = 2 narrows the law, where every tilt by r has variance one."""
    law = oracles.Gaussian(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    g, reward = torch.Generator().manual_seed(3), lambda x: x[:, 0]
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    guided = guidance.released_target_matching(law.denoiser(ABAR), reward, x0, 2.0, 4.0, ABAR, TS)
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
    kl = guidance.path_kl(record, abar, ts)
    assert kl.dtype == torch.float64 and kl.item() == pytest.approx(expected, abs=6e-4)
    norms = [square.sqrt() for _, square in record]
    torch.testing.assert_close(guidance.guidance_norm(record), sum(norms) / (steps - 1))


def test_path_kl_is_infinite_without_noise():
    record = []
    guided = guidance.LookAhead(crooked, bumpy, 1.0, ABAR, TS, guide_last=True, record=record)
    guided(some_x(), 1)
    with pytest.raises(ValueError, match="t = 1 adds no noise but was guided"):
        guidance.path_kl(record, ABAR, TS)
    with pytest.raises(ValueError, match="adds no noise"):
        guidance.path_kl([(20, torch.ones(3))], ABAR, TS, eta=0.0)


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
        kls = [guidance.path_kl(record, ABAR, TS) for record in (with_up, without)]
        found[name] = estimators.lam_grad_path(*kls, gamma)
        norms = [guidance.guidance_norm(record) for record in (with_up, without)]
        found["est2 " + name] = estimators.lam_grad_released_est2(*norms, gamma)
    grad, info = found["exact"]
    assert abs(grad - mixture.problem().penalty_grad(lam, gamma)) < 4 * info["se"] + 0.08  # 50 steps
    grad, info = found["look-ahead"]
    assert grad > 10 * info["se"]
    grad, info = found["est2 exact"]
    assert abs(grad - mixture.problem().penalty_grad(lam, gamma)) > 20 * info["se"]  # it is not a KL
