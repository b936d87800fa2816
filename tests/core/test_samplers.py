import itertools
import math

import diffusers
import numpy
import pytest
import torch

from bilevel_core import guidance, samplers, schedules
from bilevel_core.lab import oracles
from bilevel_core.lab.models import adapters

T = 100
COSINE = torch.tensor([0.0, 0.95, 1.0, 0.008], dtype=torch.float64)


def denoiser(x, t):
    """Any smooth function of x and t: agreement must not depend on a good denoiser."""
    return torch.tanh(x + 0.01 * t) * 0.7


def diffusers_loop(scheduler, x, steps, noise, **step_options):
    """diffusers' own sampling loop; our t is its time step plus one. Noise is passed in by patching its generator."""
    scheduler.set_timesteps(steps)
    source = iter(noise)
    for index in scheduler.timesteps:
        eps_hat = denoiser(x, int(index) + 1)
        if step_options.get("eta"):
            x = scheduler.step(eps_hat, index, x, variance_noise=next(source), **step_options).prev_sample
        else:
            x = scheduler.step(eps_hat, index, x, **step_options).prev_sample
    return x


def double_tables(scheduler, abar):
    """Replaces the float32 tables of a diffusers scheduler by float64 ones, to compare beyond float32."""
    scheduler.alphas_cumprod = abar[1:].clone()
    scheduler.alphas = abar[1:] / abar[:-1]
    scheduler.betas = 1 - scheduler.alphas
    scheduler.one = torch.ones((), dtype=abar.dtype)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.ones((), dtype=abar.dtype)
    return scheduler


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("steps, spacing", [(T, "trailing"), (20, "trailing"), (10, "leading"), (1, "trailing")])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_agrees_with_diffusers(dtype, tolerance, steps, spacing, eta):
    g = torch.Generator().manual_seed(1)
    abar = schedules.abar(COSINE, T)
    x, noise = torch.randn(5, 3, generator=g).to(dtype), torch.randn(steps, 5, 3, generator=g).to(dtype)
    scheduler = double_tables(adapters.to_diffusers(abar, timestep_spacing=spacing), abar.to(dtype))
    theirs = diffusers_loop(scheduler, x, steps, noise, eta=eta)
    ours = samplers.sample_ddim(denoiser, x, abar, samplers.timesteps(T, steps, spacing), eta=eta, noise=noise)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("steps, spacing", [(T, "trailing"), (20, "trailing"), (10, "leading")])
@pytest.mark.parametrize("variance, theirs", [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ancestral_agrees_with_diffusers(monkeypatch, dtype, tolerance, steps, spacing, variance, theirs):
    g = torch.Generator().manual_seed(2)
    abar = schedules.abar(COSINE, T)
    x, noise = torch.randn(5, 3, generator=g).to(dtype), torch.randn(steps, 5, 3, generator=g).to(dtype)
    options = {"variance_type": theirs, "timestep_spacing": spacing}
    scheduler = double_tables(adapters.to_diffusers(abar, diffusers.DDPMScheduler, **options), abar.to(dtype))
    noise[-1] = 0  # diffusers' "fixed_large" adds noise in the last step too, unless its time step is 0; we never do
    source = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(source))
    expected = diffusers_loop(scheduler, x, steps, ())
    ours = samplers.sample_ancestral(
        denoiser, x, abar, samplers.timesteps(T, steps, spacing), variance=variance, noise=noise
    )
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 20, 100])
def test_grid_agrees_with_diffusers(spacing, steps):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    if not (spacing == "linspace" and steps == 1):  # there diffusers starts at its time step 0, which cannot sample
        assert samplers.timesteps(T, steps, spacing) == [int(i) + 1 for i in scheduler.timesteps]


def test_linspace_has_both_ends():
    """One step starts at T, where diffusers starts at its time step 0 and cannot sample."""
    assert samplers.timesteps(T, 1, "linspace") == [T]
    assert samplers.timesteps(T, 2, "linspace") == [T, 1]
    assert samplers.timesteps(T, 4, "linspace") == [100, 67, 34, 1]


def test_eta_one_is_ancestral():
    g = torch.Generator().manual_seed(3)
    abar, ts = schedules.abar(COSINE, T), samplers.timesteps(T, 25)
    x, noise = torch.randn(4, 2, generator=g).double(), torch.randn(25, 4, 2, generator=g).double()
    ddim = samplers.sample_ddim(denoiser, x, abar, ts, eta=1.0, noise=noise)
    torch.testing.assert_close(ddim, samplers.sample_ancestral(denoiser, x, abar, ts, noise=noise), rtol=0, atol=1e-12)


def test_differentiable_in_q():
    """The gradient of the samples in the four schedule parameters, through x_t, against finite differences."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noise = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ts = samplers.timesteps(30, 6)
    q = torch.tensor([0.05, 0.9, 1.1, 0.02], dtype=torch.float64, requires_grad=True)
    for sampler, options in [
        (samplers.sample_ddim, {"eta": 0.0}),
        (samplers.sample_ddim, {"eta": 0.7}),
        (samplers.sample_ancestral, {"variance": "beta"}),
    ]:
        run = lambda q, f=sampler, o=options: f(denoiser, x, schedules.abar(q, 30), ts, noise=noise, **o)  # noqa: E731
        assert torch.autograd.gradcheck(run, q, atol=1e-6)


GAUSSIAN = oracles.Gaussian(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_samples_have_the_law_of_the_discrete_chain(eta, steps):
    n, abar, ts = 40_000, schedules.abar(COSINE, T), samplers.timesteps(T, steps)
    g = torch.Generator().manual_seed(6)
    law = GAUSSIAN.chain_law(abar, ts, eta)
    x_T = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = samplers.sample_ddim(GAUSSIAN.denoiser(abar), x_T, abar, ts, eta=eta, generator=g)
    error = (law.cov.diagonal() / n).sqrt()
    assert ((x.mean(0) - law.mean).abs() < 4 * error).all()
    var = law.cov.diagonal()
    assert ((x.T.cov() - law.cov).abs() < 4 * (2 / n) ** 0.5 * var.max()).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_chain_tends_to_the_data_law_as_one_over_steps(eta):
    """Doubling the steps halves the error of the covariance: the discrete chain converges at first order."""
    errors = []
    for steps in (100, 200, 400, 800):
        abar = schedules.abar(torch.tensor([0.0, 0.995, 1.0, 0.008], dtype=torch.float64), 800)
        start = oracles.Gaussian(
            abar[-1].sqrt() * GAUSSIAN.mean, abar[-1] * GAUSSIAN.cov + (1 - abar[-1]) * torch.eye(2)
        )
        law = GAUSSIAN.chain_law(abar, samplers.timesteps(800, steps), eta, start)
        torch.testing.assert_close(law.mean, GAUSSIAN.mean, rtol=0, atol=1e-10)
        errors.append((law.cov - GAUSSIAN.cov).norm().item())
    rates = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[0] > errors[-1] and all(1.6 < rate < 2.5 for rate in rates), rates


def test_mixture_samples_follow_the_mixture():
    n, mixture, abar = 10_000, oracles.Mixture1D(), schedules.abar(COSINE, 100)
    g = torch.Generator().manual_seed(7)
    x_T = samplers.draw_x_T((n,), abar, x0=mixture.sample(n, g), generator=g)
    x = samplers.sample_ancestral(mixture.denoiser(abar), x_T, abar, samplers.timesteps(100, 100), generator=g)
    assert abs((x > 0).double().mean().item() - 0.39) < 0.025  # 0.6 Phi(-1.5/0.7) + 0.4 Phi(1.5/0.9) = 0.3906
    assert abs(x.mean().item() + 0.3) < 0.08


def test_trajectory_progress_and_reproducibility():
    abar, ts = schedules.abar(COSINE, T), samplers.timesteps(T, 5)
    x = torch.randn(2, 3)
    seen = []

    def progress(pairs):
        for pair in pairs:
            seen.append(pair)
            yield pair

    for sampler, options in [(samplers.sample_ddim, {"eta": 1.0}), (samplers.sample_ancestral, {})]:
        seen.clear()
        run = [
            sampler(denoiser, x, abar, ts, generator=torch.Generator().manual_seed(0), trajectory=True, **options)
            for _ in range(2)
        ]
        assert len(run[0]) == 6 and torch.equal(run[0][0], x)
        assert all(torch.equal(a, b) for a, b in zip(*run, strict=True))
        last = sampler(denoiser, x, abar, ts, generator=torch.Generator().manual_seed(0), progress=progress, **options)
        assert torch.equal(last, run[0][-1]) and seen == [(100, 80), (80, 60), (60, 40), (40, 20), (20, 0)]


def test_draw_x_T_warns_and_mends_the_start():
    abar = schedules.abar(torch.tensor([0.0, 1.0, 1.0, 0.0]), 100, "sigmoid")
    g = torch.Generator().manual_seed(8)
    with pytest.warns(UserWarning, match=r"wrong start"):
        samplers.draw_x_T((4, 2), abar, generator=g)
    data = torch.full((10, 2), 3.0)
    x_T = samplers.draw_x_T((20_000, 2), abar, x0=data, generator=g)
    assert (x_T.mean(0) - 3 * abar[-1].sqrt()).abs().max() < 4 * (1 / 20_000) ** 0.5


def test_bad_input():
    abar, x = schedules.abar(COSINE, T), torch.zeros(1, 2)
    for steps, message in (
        (0, "steps is 0; it must be an integer of at least 1"),
        (20.0, "steps is 20.0; it must be an integer"),
        (101, "steps = 101 must lie in 1..T = 100"),
    ):
        with pytest.raises(ValueError, match=message):
            samplers.timesteps(T, steps)
    with pytest.raises(ValueError, match="spacing is 'even'"):
        samplers.timesteps(T, 5, "even")
    with pytest.raises(ValueError, match="eta = 1.5"):
        samplers.sample_ddim(denoiser, x, abar, [100, 50], eta=1.5)
    with pytest.raises(ValueError, match="variance is 'small'"):
        samplers.sample_ancestral(denoiser, x, abar, [100], variance="small")
    for grid in ([], [101, 50], [50, 50], [20, 40], [50, 0]):
        with pytest.raises(ValueError, match="must descend"):
            samplers.sample_ddim(denoiser, x, abar, grid)


# ---------------------------------------------------------------- coefficients, defaults and draws, by hand


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_coefficients_are_those_of_the_paper(eta):
    """Song et al., eqs. 12 and 16, written out: x_s = sqrt(a_s) x0_hat + sqrt(1 - a_s - sigma^2) eps_hat + sigma z."""
    abar = schedules.abar(COSINE, T)
    for t, s in ((100, 80), (37, 1), (5, 0)):
        a, b = abar[t].item(), abar[s].item()
        sigma = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
        c_x, c_eps, spread = samplers.ddim_coefficients(abar, t, s, eta)
        assert c_x.item() == pytest.approx((b / a) ** 0.5, rel=1e-12)
        expected = (max(1 - b - sigma**2, 0)) ** 0.5 - (b / a) ** 0.5 * (1 - a) ** 0.5
        assert c_eps.item() == pytest.approx(expected, rel=1e-12)
        assert spread.item() == pytest.approx(sigma, rel=1e-12, abs=1e-15)


def test_what_is_left_out():
    """eta = 0 without noise, a posterior variance, all steps with a graph, x_0 alone."""
    abar, ts = schedules.abar(COSINE, T), samplers.timesteps(T, 4)
    assert ts == [100, 75, 50, 25] == samplers.timesteps(T, 4, "trailing")
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    plain = samplers.sample_ddim(denoiser, x, abar, ts)
    assert torch.equal(plain, samplers.sample_ddim(denoiser, x, abar, ts, eta=0.0, noise=iter(())))
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2))
    by_default = samplers.sample_ancestral(denoiser, x, abar, ts, noise=noise)
    assert torch.equal(by_default, samplers.sample_ancestral(denoiser, x, abar, ts, variance="posterior", noise=noise))
    assert not torch.equal(by_default, samplers.sample_ancestral(denoiser, x, abar, ts, variance="beta", noise=noise))
    for sampler, options in ((samplers.sample_ddim, {"eta": 1.0}), (samplers.sample_ancestral, {})):
        g = torch.Generator().manual_seed(3)  # one tensor a step, none in the last
        given = sampler(denoiser, x, abar, ts, noise=[torch.randn(3, 2, generator=g) for _ in range(3)], **options)
        found = sampler(denoiser, x, abar, ts, generator=torch.Generator().manual_seed(3), **options)
        assert torch.equal(found, given) and isinstance(found, torch.Tensor)


def test_graphs_and_checkpoints_of_the_last_steps():
    abar, ts = schedules.abar(COSINE, T), samplers.timesteps(T, 4)
    x, calls = torch.randn(3, 2, dtype=torch.float64), []

    def counted(x, t):
        calls.append((t, torch.is_grad_enabled()))
        return weight * denoiser(x, t)

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    samplers.sample_ddim(counted, x, abar, ts, grad_steps=1)
    assert calls == [(100, False), (75, False), (50, False), (25, True)]
    calls.clear()
    samplers.sample_ddim(counted, x, abar, ts)
    assert all(enabled for _, enabled in calls) and len(calls) == 4
    calls.clear()
    samplers.sample_ddim(counted, x, abar, ts, checkpoint=True).sum().backward()
    assert len(calls) == 8, "each call is made once more on the way back"
    with pytest.raises(ValueError, match="grad_steps = 0 must be at least 1, or None for all"):
        samplers.sample_ddim(counted, x, abar, ts, grad_steps=0)
    with pytest.raises(ValueError, match=r"eta = -0.1 must lie in \[0, 1\]"):
        samplers.sample_ddim(counted, x, abar, ts, eta=-0.1)
    one = samplers.sample_ddim(denoiser, x, abar, [T, 1])  # the ends of 1..T are allowed
    assert torch.isfinite(one).all()


@pytest.mark.filterwarnings("ignore:abar_T")
def test_the_device_and_the_type_are_those_of_x():
    abar, ts = schedules.abar(COSINE, T), samplers.timesteps(T, 3)
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 3, device="meta", dtype=dtype)
        for sampler, options in ((samplers.sample_ddim, {"eta": 0.5}), (samplers.sample_ancestral, {})):
            found = sampler(denoiser, x, abar, ts, **options)
            assert (found.device.type, found.dtype) == ("meta", dtype)
    x_T = samplers.draw_x_T((2, 3), abar, device="meta", dtype=torch.float64)
    assert (x_T.device.type, x_T.dtype) == ("meta", torch.float64)
    x_T = samplers.draw_x_T((2, 3), abar, x0=torch.zeros(5, 3, device="meta", dtype=torch.float64))
    assert (x_T.device.type, x_T.dtype) == ("meta", torch.float64)


def test_draw_x_T_by_hand():
    """Rows first, then noise, both from the generator; the last signal level and no other."""
    data = torch.arange(20, dtype=torch.float64).reshape(10, 2)
    abar = torch.tensor([1.0, 0.7, 0.36], dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    rows, eps = torch.randint(10, (6,), generator=g), torch.randn(6, 2, generator=g, dtype=torch.float64)
    found = samplers.draw_x_T((6, 2), abar, x0=data, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, 0.6 * data[rows] + 0.8 * eps, rtol=0, atol=1e-14)
    dark, g = torch.tensor([1.0, 0.5, 1e-6]), torch.Generator().manual_seed(5)
    found = samplers.draw_x_T((6, 2), dark, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(found, torch.randn(6, 2, generator=g, dtype=torch.float64))


def test_one_ancestral_step_by_hand():
    abar = schedules.abar(COSINE, T)
    a, b, x = abar[60].item(), abar[40].item(), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    z, beta = torch.tensor([[0.5, 2.0]], dtype=torch.float64), 1 - a / b
    mean = (x - beta / (1 - a) ** 0.5 * denoiser(x, 60)) * (b / a) ** 0.5
    for variance, sigma in (("posterior", (beta * (1 - b) / (1 - a)) ** 0.5), ("beta", beta**0.5)):
        path = samplers.sample_ancestral(denoiser, x, abar, [60, 40], variance=variance, noise=[z], trajectory=True)
        assert len(path) == 3 and torch.equal(path[0], x)
        torch.testing.assert_close(path[1], mean + sigma * z, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- zero terminal SNR: abar_T = 0


def zero_end(q=COSINE, T=T):
    """A table that ends at 0 exactly, and the same with 1e-13 there, from which eps tells x_0 in float64."""
    abar = schedules.abar(q, T)
    return (torch.cat([abar[:-1], abar.new_tensor([last])]) for last in (0.0, 1e-13))


def predicts(law, abar, what):
    """The exact network that predicts v or x_0, wrapped; at abar_t = 0 x0_hat is the mean."""
    eps = law.denoiser(abar)

    def network(x, t):
        a = abar[t]
        x0 = (x - (1 - a).sqrt() * eps(x, t)) / a.sqrt() if a > 0 else law.mean.expand(x.shape)
        return x0 if what == "x0" else a.sqrt() * eps(x, t) - (1 - a).sqrt() * x0

    return {"x0": guidance.eps_from_x0, "v": guidance.eps_from_v}[what](network, abar)


@pytest.mark.parametrize("what", ["v", "x0"])
@pytest.mark.parametrize(
    "sampler, options",
    [(samplers.sample_ddim, {"eta": eta}) for eta in (0.0, 0.6, 1.0)]
    + [(samplers.sample_ancestral, {"variance": name}) for name in ("posterior", "beta")],
)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_abar_of_zero_at_the_end_is_the_limit(what, sampler, options, steps):
    zero, near = zero_end()
    g, ts = torch.Generator().manual_seed(1), samplers.timesteps(T, steps)
    x, noise = torch.randn(6, 2, generator=g).double(), torch.randn(steps, 6, 2, generator=g).double()
    limit = sampler(GAUSSIAN.denoiser(near), x, near, ts, noise=noise, **options)
    found = sampler(predicts(GAUSSIAN, zero, what), x, zero, ts, noise=noise, **options)
    torch.testing.assert_close(found, limit, rtol=0, atol=1e-5)


def test_the_step_from_zero_by_hand():
    """x_s = sqrt(a_s) x0_hat + sqrt(1 - a_s - sigma^2) x_T + sigma z with sigma = eta sqrt(1 - a_s)."""
    zero, _ = zero_end()
    x, z = torch.tensor([[0.3, -1.0]], dtype=torch.float64), torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    x0, a = x**2, zero[40].item()
    denoiser = guidance.eps_from_x0(lambda x, t: x**2, zero)
    path = samplers.sample_ddim(denoiser, x, zero, [T, 40], eta=0.6, noise=[z], trajectory=True)
    expected = a**0.5 * x0 + 0.8 * (1 - a) ** 0.5 * x + 0.6 * (1 - a) ** 0.5 * z
    torch.testing.assert_close(path[1], expected, rtol=1e-12, atol=0)
    assert torch.equal(samplers.sample_ddim(denoiser, x, zero, [T], checkpoint=True), x0)
    torch.testing.assert_close(denoiser(x, T), x)  # eps_hat there is x_T


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_differentiable_through_the_step_from_zero(eta):
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def run(q):
        abar = torch.cat([schedules.abar(q, 29), q.new_zeros(1)])
        return samplers.sample_ddim(
            guidance.eps_from_v(denoiser, abar), x, abar, samplers.timesteps(30, 4), eta=eta, noise=noise
        )

    q = torch.tensor([0.05, 0.9, 1.1, 0.02], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, q, atol=1e-6, check_forward_ad=True)


def test_eps_alone_cannot_leave_zero():
    zero, _ = zero_end()
    x, ts = torch.randn(3, 2, dtype=torch.float64), samplers.timesteps(T, 5)
    look = guidance.LookAhead(denoiser, lambda x: x.sum(1), 1.0, zero, ts)
    for run in (
        lambda: samplers.sample_ddim(denoiser, x, zero, ts),
        lambda: samplers.sample_ddim(look, x, zero, ts),
        lambda: samplers.sample_ddim(guidance.clip_x0(denoiser, zero), x, zero, ts),
        lambda: samplers.sample_ddim(guidance.CostMeter(denoiser), x, zero, ts),
        lambda: samplers.sample_ancestral(denoiser, x, zero, ts),
        lambda: samplers.sample_particles(look, x, zero, ts),
    ):
        with pytest.raises(
            ValueError, match=r"eps says nothing of x_0.*eps_from_v, eps_from_x0\), or schedules.rescale_"
        ):
            run()
    assert torch.isfinite(samplers.sample_ddim(denoiser, x, zero, [T - 1, 50])).all()  # a grid that starts below
    mended = schedules.rescale_terminal(zero, 1e-4)
    assert (
        mended[-1].item() == pytest.approx(1e-4) and torch.isfinite(samplers.sample_ddim(denoiser, x, mended, ts)).all()
    )
    with pytest.raises(ValueError, match=r"last = 0.01 must lie in \(0, TERMINAL_ABAR = 0.001\]"):
        schedules.rescale_terminal(zero, 0.01)


# ---------------------------------------------------------------- numbers of other types, and too short ones


def test_integers_of_any_type():
    abar, x = schedules.abar(COSINE, numpy.int64(T)), torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(abar, schedules.abar(COSINE, T))
    ts = samplers.timesteps(numpy.int32(T), torch.tensor(7), "leading", offset=numpy.int8(2))
    assert ts == samplers.timesteps(T, 7, "leading", 2) == [87, 73, 59, 45, 31, 17, 3]
    assert all(type(t) is int for t in ts + samplers.timesteps(numpy.int64(T), 1, "linspace"))
    seen = []

    def watch(x, t):
        seen.append(type(t))
        return denoiser(x, t)

    plain = samplers.sample_ddim(watch, x, abar, ts)
    for grid in (numpy.array(ts), torch.tensor(ts), tuple(ts)):
        assert torch.equal(samplers.sample_ddim(watch, x, abar, grid, grad_steps=2), plain)
    assert set(seen) == {int}
    for grid in ([80.0, 40.0], torch.tensor([80.0, 40.0]), [80, -1]):
        with pytest.raises(ValueError, match="a time of the grid is .*; it must be an integer of at least 0"):
            samplers.sample_ddim(denoiser, x, abar, grid)
    with pytest.raises(TypeError, match="not iterable"):
        samplers.sample_ddim(denoiser, x, abar, 80)
    for steps, offset, message in (
        (7, 16, "offset = 16 must be at most 15 for 7 leading"),  # 1 + 15 + 6 * 14 = 100
        (7, -1, "offset is -1; it must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            samplers.timesteps(T, steps, "leading", offset)
    with pytest.raises(ValueError, match="offset = 1 must be at most 0 for 7 trailing steps"):
        samplers.timesteps(T, 7, offset=1)
    assert samplers.timesteps(T, 7, "leading", 15)[0] == 100


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_of_integers_are_refused(dtype):
    abar, x = schedules.abar(COSINE, T), torch.ones(3, 2).to(dtype)
    guide = guidance.LookAhead(denoiser, lambda x: x.sum(1), 1.0, abar, [50, 20])
    for run in (
        lambda: samplers.sample_ddim(denoiser, x, abar, [50, 20]),
        lambda: samplers.sample_ancestral(denoiser, x, abar, [50, 20]),
        lambda: samplers.sample_particles(guide, x, abar, [50, 20]),
        lambda: samplers.draw_x_T((3, 2), abar, x0=x),
        lambda: schedules.noise(x, torch.zeros(3, 2), abar[3]),
        lambda: guidance.x0_from_eps(x, torch.zeros(3, 2), abar[3]),
    ):
        with pytest.raises(ValueError, match=rf"{dtype}: make them float.*/ 127.5 - 1"):
            run()


# ---------------------------------------------------------------- second order


def curve(x, t):
    """Any smooth denoiser that also offers x0_hat, for a table that ends at 0."""
    return torch.tanh(x + 0.1 * t) * 0.7


curve.denoise_x0 = lambda x, t: torch.tanh(x) * 0.3


def test_second_order_by_hand():
    abar, x = torch.tensor([1.0, 0.9, 0.5, 0.2], dtype=torch.float64), torch.tensor([0.3, -1.2], dtype=torch.float64)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    half = (alpha[1:] / sigma[1:]).log()  # lambda_1, lambda_2, lambda_3 of the paper
    y, hats = x, []
    for t, s in ((3, 2), (2, 1)):
        hats.append((y - sigma[t] * curve(y, t)) / alpha[t])
        h = half[s - 1] - half[t - 1]
        D = hats[-1]
        if len(hats) > 1:
            r = (half[t - 1] - half[t]) / h
            D = (1 + 1 / (2 * r)) * hats[-1] - 1 / (2 * r) * hats[-2]
        y = sigma[s] / sigma[t] * y - alpha[s] * torch.expm1(-h) * D
    y = (y - sigma[1] * curve(y, 1)) / alpha[1]
    torch.testing.assert_close(samplers.sample_dpm(curve, x, abar, [3, 2, 1]), y, rtol=1e-13, atol=1e-14)
    assert samplers.sample_dpm(curve, x.float(), abar, [3, 2, 1]).dtype == torch.float32
    for ts in ([3], [3, 1]):  # nothing to extrapolate from, or nothing to do it for
        both = [f(curve, x, abar, ts) for f in (samplers.sample_dpm, samplers.sample_ddim)]
        torch.testing.assert_close(*both, rtol=1e-13, atol=1e-14)


def test_second_order_is_second_order():
    """The error of a smooth problem falls as 1/steps^2 on grids even in log-SNR, that of DDIM as 1/steps."""
    law = oracles.Mixture1D()
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def at(sampler, n):
        ell = torch.linspace(2.0, -2.0, n + 1, dtype=torch.float64)  # -log-SNR/4 would be the same
        table = torch.cat([torch.ones(1, dtype=torch.float64), torch.sigmoid(ell)])
        return sampler(law.denoiser(table), x, table, list(range(n + 1, 0, -1)))

    exact = at(samplers.sample_dpm, 4000)
    errors = {
        f: [(at(f, n) - exact).abs().max().item() for n in (20, 80)]
        for f in (samplers.sample_ddim, samplers.sample_dpm)
    }
    ddim, dpm = (math.log(a / b, 4) for a, b in errors.values())
    assert 0.8 < ddim < 1.2 and 1.8 < dpm < 2.3
    assert errors[samplers.sample_dpm][0] < errors[samplers.sample_ddim][0] / 3


def test_second_order_from_zero_and_its_gradients():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for last in (0.0, 0.05):
        abar = torch.tensor([1.0, 0.9, 0.5, 0.2, last], dtype=torch.float64, requires_grad=True)
        values = [samplers.sample_dpm(curve, x, abar, [4, 3, 2, 1], checkpoint=c).square().sum() for c in (False, True)]
        slopes = [torch.autograd.grad(value, abar)[0] for value in values]
        assert values[0] == values[1] and torch.equal(*slopes) and torch.isfinite(slopes[0]).all()
        for k in range(1, 4 + (last > 0)):
            h = torch.zeros(5, dtype=torch.float64)
            h[k] = 1e-6
            high, low = (
                samplers.sample_dpm(curve, x, abar.detach() + s * h, [4, 3, 2, 1]).square().sum() for s in (1, -1)
            )
            assert slopes[0][k].item() == pytest.approx((high - low).item() / 2e-6, rel=1e-6, abs=1e-8)
    with pytest.raises(ValueError, match="must descend within"):
        samplers.sample_dpm(curve, x, abar, [1, 2])
    with pytest.raises(ValueError, match="where eps says nothing of x_0"):
        samplers.sample_dpm(denoiser, x, abar.detach() * torch.tensor([1, 1, 1, 1, 0.0]), [4, 1])
