"""Particles against the tilted law of the discrete chain: closed forms for Gaussians, weighted chains for mixtures."""

import math
import warnings

import pytest
import torch

from bilevel_core import guidance, samplers, schedules, tempering
from bilevel_core.lab import oracles

T = 20
ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
TS = samplers.timesteps(T, T)
LAW = oracles.Gaussian(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
)
SLOPE = torch.tensor([0.7, -1.0], dtype=torch.float64)
MIXTURE = oracles.Mixture1D()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def particles(guide, shape, seed, abar=ABAR, ts=TS, **options):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return samplers.sample_particles(guide, x, abar, ts, generator=g, **options)


def within(values, exact, sigmas=4.0):
    """The mean of independent runs (R, ...) agrees with the exact value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - exact).abs() < sigmas * error).all())


# ---------------------------------------------------------------- a Gaussian: the tilted chain in closed form


@pytest.mark.parametrize("guided, temper", [(True, 0.0), (False, 0.0), (True, 1.0)])
@pytest.mark.parametrize("eta, abar_T", [(1.0, None), (0.5, None), (1.0, 0.3)])
def test_gaussian_particles_have_the_law_of_the_tilted_chain(guided, temper, eta, abar_T):
    """Mean, variance and log Z; with abar_T = 0.3 only because of the weight at the start."""
    abar = ABAR if abar_T is None else schedules.rescale_terminal(ABAR[: T // 2 + 1], abar_T)
    ts = samplers.timesteps(len(abar) - 1, 8)
    chain, lam = LAW.chain_law(abar, ts, eta), 0.8
    guide = guidance.LookAhead(LAW.denoiser(abar), lambda x: x @ SLOPE, lam, abar, ts, temper=temper)
    runs = [particles(guide, (400, 2), seed, abar, ts, eta=eta, guided=guided) for seed in range(40)]
    means = torch.stack([log_w.exp() @ x for x, log_w, _ in runs])
    assert within(means, chain.tilt(SLOPE, lam).mean)
    squares = torch.stack([log_w.exp() @ (x - chain.tilt(SLOPE, lam).mean) ** 2 for x, log_w, _ in runs])
    assert within(squares, chain.cov.diagonal())
    log_z = SLOPE @ chain.mean / lam + chain.kl_tilt(SLOPE, lam)
    assert within([math.exp(info["log_z"] - log_z) for _, _, info in runs], 1.0)
    assert all(log_w.exp().sum().item() == pytest.approx(1, abs=1e-9) for _, log_w, _ in runs)


def test_guided_proposals_waste_fewer_particles():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.3, ABAR, TS)
    sizes = [particles(guide, (500, 2), 1, guided=guided, threshold=0)[2] for guided in (True, False)]
    assert sizes[0]["ess"][-1] > 2 * sizes[1]["ess"][-1]
    assert sizes[0]["resampled"] == sizes[1]["resampled"] == []


# ---------------------------------------------------------------- a mixture, where guidance alone is biased


def reference(reward, lam, n=20_000):
    """Mean and variance of the chain's law tilted by reward/lam, from weighted plain samples."""
    g = torch.Generator().manual_seed(99)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    x = samplers.sample_ancestral(MIXTURE.denoiser(ABAR), x, ABAR, TS, generator=g)
    w = (reward(x) / lam).softmax(0)
    mean = w @ x
    return torch.stack([mean, w @ (x - mean) ** 2, w @ (x > 0).double()]), (w * (x - mean)).norm()


def summary(x, log_w):
    w = log_w.exp()
    return torch.stack([w @ x, w @ (x - w @ x) ** 2, w @ (x > 0).double()])


@pytest.mark.parametrize(
    "reward, lam",
    [(lambda x: x, 1.0), (lambda x: -((x - 0.5) ** 2) / 2, 0.5)],
    ids=["linear", "quadratic"],
)
def test_particles_remove_the_bias_of_guidance(reward, lam):
    exact, error = reference(reward, lam)
    guide = guidance.LookAhead(MIXTURE.denoiser(ABAR), reward, lam, ABAR, TS)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(5_000, generator=g, dtype=torch.float64)
    x = samplers.sample_ancestral(guide, x, ABAR, TS, generator=g)
    biased = summary(x, torch.full((5_000,), -math.log(5_000), dtype=torch.float64))
    assert (biased - exact).abs().max() > 0.1
    for guided in (True, False):
        runs = [summary(*particles(guide, (1000,), seed, guided=guided)[:2]) for seed in range(10)]
        found = torch.stack(runs)
        assert ((found.mean(0) - exact).abs() < 4 * (found.std(0) / 10**0.5 + error) + 2e-3).all()


def test_a_reward_without_gradient_needs_plain_proposals():
    def reward(x):
        return 2 * (x > 1).to(x)

    exact, error = reference(reward, 0.7)
    guide = guidance.LookAhead(MIXTURE.denoiser(ABAR), reward, 0.7, ABAR, TS)
    found = torch.stack([summary(*particles(guide, (1000,), seed, guided=False)[:2]) for seed in range(10)])
    assert ((found.mean(0) - exact).abs() < 4 * (found.std(0) / 10**0.5 + error)).all()
    with pytest.raises(ValueError, match="gives no gradient"):
        particles(guide, (10,), 0)


def test_error_shrinks_as_the_root_of_the_number_of_particles():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.5, ABAR, samplers.timesteps(T, 8))
    exact, spread = LAW.chain_law(ABAR, samplers.timesteps(T, 8), 1.0).tilt(SLOPE, 0.5).mean, []
    for n in (100, 1600):
        runs = [particles(guide, (n, 2), seed, ts=samplers.timesteps(T, 8)) for seed in range(20)]
        errors = torch.stack([log_w.exp() @ x - exact for x, log_w, _ in runs])
        spread.append(errors.square().mean().sqrt().item())
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.35)


# ---------------------------------------------------------------- the mechanics


def test_systematic_resampling_keeps_floor_or_ceiling_of_the_expected_number():
    log_w = torch.tensor([0.0, -1.0, -2.0, -50.0, 0.5], dtype=torch.float64)
    expected, counts = 5 * log_w.softmax(0), torch.zeros(5, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for _ in range(800):
        n = torch.bincount(samplers._systematic(log_w, g), minlength=5)
        assert (n >= expected.floor()).all() and (n <= expected.ceil()).all()
        counts += n
    assert ((counts / 800 - expected).abs() < 0.07).all()


def test_resampling_is_triggered_by_the_effective_sample_size():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.3, ABAR, TS)
    _, _, info = particles(guide, (200, 2), 3, guided=False)
    assert info["resampled"] == [t for t, ess in zip(TS, info["ess"], strict=False) if ess < 100]
    assert 0 < len(info["resampled"]) < T and len(info["ess"]) == T + 1
    assert particles(guide, (200, 2), 3, threshold=1.1)[2]["resampled"] == TS
    first, again = (particles(guide, (200, 2), 3) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_families_are_counted_by_the_rows_that_particles_descend_from():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.3, ABAR, TS)
    none = particles(guide, (200, 2), 3, guided=False, threshold=0)
    assert none[2]["family"].tolist() == list(range(200))
    assert none[2]["families"] == pytest.approx(none[2]["ess"][-1], rel=1e-12)
    _, log_w, info = particles(guide, (200, 2), 3, guided=False, threshold=1.1)
    shares = torch.zeros(200, dtype=torch.float64)
    for row, family in enumerate(info["family"].tolist()):
        shares[family] += log_w[row].exp()
    assert info["families"] == pytest.approx(1 / shares.square().sum().item()) and info["families"] < info["ess"][-1]
    # The last resampling lets few survive, and they are of the families of the resamplings before it.
    assert 1 < len(info["family"].unique()) < 150


def test_few_families_are_a_warning():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.03, ABAR, TS)
    with pytest.warns(UserWarning, match=r"the particles descend from \d\.\d of 200 starts, by weight"):
        few = particles(guide, (200, 2), 3, guided=False)
    assert few[2]["families"] < samplers.MIN_FAMILIES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        particles(guide, (99, 2), 3, guided=False)  # too few starts to tell
        particles(guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 1.0, ABAR, TS), (200, 2), 3)


@pytest.mark.parametrize("guided", [True, False])
def test_noise_that_is_kept_makes_the_same_images_in_the_plain_chain(guided):
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.3, ABAR, TS)
    x, _, info = particles(guide, (100, 2), 3, guided=guided, eta=0.7, keep_noise=True)
    G = tempering.noise_map(LAW.denoiser(ABAR), ABAR, TS, (2,), eta=0.7)
    assert info["z"].shape == (100, T, 2) and info["resampled"]
    torch.testing.assert_close(G.run(info["z"]), x, rtol=1e-9, atol=1e-9)
    assert "z" not in particles(guide, (100, 2), 3, guided=guided, eta=0.7)[2]


def test_moves_rejuvenate_particles_and_leave_their_law_as_it_is():
    """Many families out of few: means of independent runs are those of the tilt, with a smaller spread than before."""
    ts, lam = samplers.timesteps(T, 5), 0.3
    chain = LAW.chain_law(ABAR, ts, 1.0).tilt(SLOPE, lam).mean
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, lam, ABAR, ts)
    G, before, after = tempering.noise_map(LAW.denoiser(ABAR), ABAR, ts, (2,), eta=1.0), [], []
    for seed in range(30):
        x, log_w, info = particles(guide, (64, 2), seed, ts=ts, guided=False, keep_noise=True)
        g = torch.Generator().manual_seed(seed)
        z = info["z"][torch.multinomial(log_w.exp(), 64, replacement=True, generator=g)]
        options = {"measure": lambda x: x, "chains": 64, "dtype": torch.float64, "generator": g}
        moved = tempering.sample_tempered(G, lambda x: x @ SLOPE, (math.inf, lam), z=z, sweeps=20, warmup=10, **options)
        before.append(log_w.exp() @ x)
        after.append(moved.history["measured"][-1, 1].mean(0))
    before, after = torch.stack(before), torch.stack(after)
    assert within(before, chain) and within(after, chain)
    assert (after - chain).square().mean() < 0.7 * (before - chain).square().mean()


def test_a_weak_tilt_is_plain_sampling():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 1e9, ABAR, TS)
    g = torch.Generator().manual_seed(4)
    x_T = torch.randn(50, 2, generator=g, dtype=torch.float64)
    x, log_w, info = particles(guide, (50, 2), 4)
    plain = samplers.sample_ddim(LAW.denoiser(ABAR), x_T, ABAR, TS, eta=1.0, generator=g)
    torch.testing.assert_close(x, plain, rtol=1e-6, atol=1e-6)
    assert log_w.exp().max().item() == pytest.approx(1 / 50, rel=1e-6) and abs(info["log_z"]) < 1e-6


def test_costs_one_network_call_a_step():
    meter = guidance.CostMeter(LAW.denoiser(ABAR))
    guide = guidance.LookAhead(meter, lambda x: x @ SLOPE, 0.5, ABAR, TS)
    particles(guide, (10, 2), 0)
    assert meter.calls == T and meter.cost == 10 * (2 * T - 1)
    meter.cost = 0
    particles(guide, (10, 2), 0, guided=False)
    assert meter.cost == 10 * T


def test_bad_input():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.5, ABAR, TS)
    for eta in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"eta = .* must lie in \(0, 1\]"):
            particles(guide, (4, 2), 0, eta=eta)
    with pytest.raises(ValueError, match="must descend"):
        particles(guide, (4, 2), 0, ts=[1, 2])
    broken = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x[:, 0] / 0, 0.5, ABAR, TS)
    with pytest.raises(ValueError, match="the reward is not finite"):
        particles(broken, (4, 2), 0)


def test_defaults_are_the_guided_chain_with_its_own_noise():
    guide = guidance.LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 0.4, ABAR, TS)
    x, log_w, info = particles(guide, (64, 2), 7)
    again = particles(guide, (64, 2), 7, eta=1.0, guided=True, threshold=0.5)
    assert torch.equal(x, again[0]) and torch.equal(log_w, again[1])
    assert torch.equal(info.pop("family"), again[2].pop("family")) and info == again[2]
    assert set(info) == {"ess", "resampled", "log_z", "families"} and log_w.dtype == torch.float64
    half = particles(guide, (64, 2), 7, eta=1.0, guided=True, threshold=0.9)
    assert len(half[2]["resampled"]) > len(info["resampled"])


def test_two_steps_by_hand():
    """The weights of two particles over two steps, from the kernels' densities themselves."""
    abar, ts = ABAR, [20, 10]
    guide = guidance.LookAhead(LAW.denoiser(abar), lambda x: x @ SLOPE, 0.5, abar, ts)
    g = torch.Generator().manual_seed(8)
    start = torch.randn(2, 2, generator=g, dtype=torch.float64)
    z = torch.randn(2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x, log_w, info = samplers.sample_particles(
        guide, start, abar, ts, eta=0.7, threshold=0.0, generator=torch.Generator().manual_seed(9)
    )
    eps_hat, eps_guided, first = guide.look(start, 20, True)
    c_x, c_eps, sigma = samplers.ddim_coefficients(abar, 20, 10, 0.7)
    plain, guided = (torch.distributions.Normal(c_x * start + c_eps * eps, sigma) for eps in (eps_hat, eps_guided))
    middle = guided.mean + sigma * z
    expected = -math.log(2) + first + (plain.log_prob(middle) - guided.log_prob(middle)).sum(1)
    eps_hat, _, second = guide.look(middle, 10, False)
    c_x, c_eps, _ = samplers.ddim_coefficients(abar, 10, 0, 0.7)
    end = c_x * middle + c_eps * eps_hat
    expected = expected + second - first + guide.potential(end) - second
    torch.testing.assert_close(x, end)
    torch.testing.assert_close(log_w, expected.log_softmax(0))
    assert info["log_z"] == pytest.approx(expected.logsumexp(0).item(), rel=1e-10)
    assert info["ess"][-1] == pytest.approx(1 / expected.softmax(0).square().sum().item(), rel=1e-10)
    assert info["ess"][0] == pytest.approx(1 / first.softmax(0).square().sum().item(), rel=1e-10)


def test_resampling_draws_one_number_and_never_a_row_too_many():
    log_w = torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)
    rows = samplers._systematic(log_w, torch.Generator().manual_seed(0))
    assert sorted(set(rows.tolist())) == [0, 2] and len(rows) == 3
    g = torch.Generator().manual_seed(1)
    u = torch.rand(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).item()
    weights, n = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), 4
    edges, expected = [0.1, 0.3, 0.6, 1.0], []
    for i in range(n):
        expected.append(next(k for k, edge in enumerate(edges) if (i + u) / n <= edge))
    assert samplers._systematic(weights.log(), g).tolist() == expected
