"""Look-ahead guidance against exact tilts, finite differences and known path-space divergences."""

import math
import warnings

import numpy
import pytest
import torch
from smooth import bumpy, crooked, some_x

from bilevel_core import estimators, guidance, samplers, schedules
from bilevel_core.lab import oracles

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


# ---------------------------------------------------------------- tables: what looks like abar and is none

SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
WRONG = {
    "alphas_cumprod": (
        (1 - SD_BETAS).cumprod(0),
        r"abar\[0\] = 0.99915, but .* Diffusers' alphas_cumprod lacks the lead",
    ),
    "float32 of it": ((1 - SD_BETAS.float()).cumprod(0), r"torch.cat\(\[torch.ones\(1\), alphas_cumprod\]\)"),
    "betas": (SD_BETAS, r"abar\[0\] = 0.00085, but .* These look like betas: abar_from_betas\(betas\)"),
    "rising": (torch.tensor([1.0, 0.5, 0.7, 0.1]), r"abar\[2\] = 0.7, but abar must fall from abar\[0\] = 1 and stay"),
    "negative": (torch.tensor([1.0, 0.5, -0.1]), r"abar\[2\] = -0.1, but"),
    "above one": (torch.tensor([1.2, 0.5, 0.1]), r"abar\[0\] = 1.2, but"),
    "nan": (torch.tensor([1.0, math.nan, 0.1]), r"abar\[1\] = nan, but"),
    "inf": (torch.tensor([math.inf, 0.5, 0.1]), r"abar\[0\] = inf, but"),
    "two axes": (ABAR[None], r"abar is torch.float64 of shape \(1, 51\); it must be floating, \(T\+1,\) with T >= 1"),
    "one level": (torch.ones(1), r"of shape \(1,\); it must be"),
    "integers": (torch.tensor([1, 0]), "abar is torch.int64 of shape"),
}
ZEROS = torch.zeros(3, 2, dtype=torch.float64)
ENTRIES = {
    "sample_ddim": lambda abar: samplers.sample_ddim(crooked, ZEROS, abar, [2, 1]),
    "sample_ancestral": lambda abar: samplers.sample_ancestral(crooked, ZEROS, abar, [2, 1]),
    "sample_particles": lambda abar: samplers.sample_particles(
        guidance.LookAhead(crooked, bumpy, 1.0, ABAR, [2, 1]), ZEROS, abar, [2, 1]
    ),
    "draw_x_T": lambda abar: samplers.draw_x_T((3, 2), abar),
    "draw_x_T of data": lambda abar: samplers.draw_x_T((3, 2), abar, x0=ZEROS),
    "LookAhead": lambda abar: guidance.LookAhead(crooked, bumpy, 1.0, abar, [2, 1]),
    "eps_from_x0": lambda abar: guidance.eps_from_x0(crooked, abar),
    "eps_from_v": lambda abar: guidance.eps_from_v(crooked, abar),
    "clip_x0": lambda abar: guidance.clip_x0(crooked, abar),
    "check_terminal": schedules.check_terminal,
    "rescale_terminal": lambda abar: schedules.rescale_terminal(abar, 1e-3),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_table_is_refused_wherever_it_enters(entry, wrong):
    table, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](table)
    with pytest.raises(TypeError, match="abar is a ndarray; it must be a tensor"):
        ENTRIES[entry](table.numpy())


def test_the_grid_that_would_have_hidden_a_wrong_table():
    """diffusers' table has T entries, so that only a grid which starts at T is refused for its length."""
    table = (1 - SD_BETAS).cumprod(0)
    for spacing in samplers.SPACINGS:
        with pytest.raises(ValueError, match="must be 1|lacks the leading 1"):
            samplers.sample_ddim(crooked, ZEROS, table, samplers.timesteps(1000, 20, spacing))


def test_right_tables_are_read_in_float64():
    """Also those of the float32 world, whose first neighbours may be equal; where the grid needs a fall they say so."""
    ts = samplers.timesteps(1000, 10)
    for table in (ABAR, torch.cat([torch.ones(1), (1 - SD_BETAS.float()).cumprod(0)])):
        found = schedules.check_abar(table)
        assert found.dtype == torch.float64 and torch.equal(found, table.double())
    same = schedules.check_abar(ABAR)
    assert same is ABAR
    flat = schedules.abar(torch.tensor([-4.0, 8.0, 0.1, 0.0]), 1000, "sigmoid", "normalised")  # falls by 1e-12 at first
    assert torch.isfinite(samplers.sample_ddim(crooked, ZEROS, flat, ts, eta=1.0)).all()
    short = flat.float()
    assert short[1] == 1
    with pytest.raises(
        ValueError, match=r"abar = 1 at t = 200 and at 100, but it must fall along the grid: keep the table"
    ):
        samplers.sample_ddim(crooked, ZEROS, short, ts, eta=1.0)
    with pytest.raises(ValueError, match="abar = 0 at t = 2 and at 1"):
        samplers.sample_ddim(crooked, ZEROS, torch.tensor([1.0, 0.0, 0.0]), [2, 1])


def test_tables_without_values_are_not_read():
    """Inside vmap, and of fake tensors: there is nothing to check, and nothing is refused."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    run = lambda abar: samplers.sample_ddim(crooked, ZEROS, abar, [20, 10])  # noqa: E731
    both = torch.func.vmap(run)(torch.stack([ABAR, ABAR**1.1]))
    torch.testing.assert_close(both, torch.stack([run(ABAR), run(ABAR**1.1)]))
    slope = torch.func.jacfwd(run)(ABAR)
    torch.testing.assert_close(slope, torch.func.jacrev(run)(ABAR))
    with FakeTensorMode():
        guide = guidance.LookAhead(crooked, bumpy, 1.0, torch.ones(51), TS)
        assert samplers.sample_ddim(guide, torch.zeros(3, 2), torch.ones(51), TS).shape == (3, 2)


def test_levels_and_shapes_of_one_step():
    x, eps = some_x(), some_x(seed=1)
    for abar_t, message in (
        (20, "abar_t is torch.int64: pass the signal level abar\\[t\\], not the time t"),
        (torch.tensor(20), "not the time t"),
        (ABAR, r"abar_t has shape \(51,\) for x of shape \(7, 2\); it must be \(\) or \(B,\)"),
        (ABAR[:7, None], r"abar_t has shape \(7, 1\)"),
    ):
        for function in (guidance.x0_from_eps, schedules.noise):
            with pytest.raises(ValueError, match=message):
                function(x, eps, abar_t)
    for abar_t in (0.0, -0.1, 1.1, math.nan, torch.tensor([0.5] * 6 + [0.0])):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]: at 0, eps says nothing of x_0"):
            guidance.x0_from_eps(x, eps, abar_t)
    torch.testing.assert_close(guidance.x0_from_eps(schedules.noise(x, eps, 0.3), eps, 0.3), x)


# ---------------------------------------------------------------- networks that predict v or x_0


def test_the_wrappers_invert_what_the_network_predicts():
    """From the exact eps: v = sqrt(abar) eps - sqrt(1 - abar) x_0, for one t and for one a row, with more arguments."""
    eps, x = LAW.denoiser(ABAR), some_x()

    def predicts(what):
        def network(x, t, *given):
            assert given in ((), ("a prompt",))
            rows = [(eps(row, int(i)), guidance.x0_from_eps(row, eps(row, int(i)), ABAR[i])) for row, i in split(x, t)]
            noise, x0 = (torch.cat(part) for part in zip(*rows, strict=True))
            a = schedules.per_sample(ABAR[t], x)
            return x0 if what == "x0" else a.sqrt() * noise - (1 - a).sqrt() * x0

        return network

    def split(x, t):
        return zip(x.split(1), t if isinstance(t, torch.Tensor) else [t] * len(x), strict=True)

    times = torch.tensor([1, 5, 10, 20, 30, 40, 50])
    for wrapped in (guidance.eps_from_v(predicts("v"), ABAR), guidance.eps_from_x0(predicts("x0"), ABAR)):
        for t in (1, 20, 50):
            torch.testing.assert_close(wrapped(x, t), eps(x, t))
            torch.testing.assert_close(wrapped.denoise_x0(x, t), guidance.x0_from_eps(x, eps(x, t), ABAR[t]))
        found = wrapped(x, times, "a prompt")
        torch.testing.assert_close(found, torch.cat([eps(row, int(t)) for row, t in split(x, times)]))
        wrapped.denoise_x0(x, times, "a prompt")
        assert wrapped(x.float(), 20).dtype == torch.float32


def test_the_wrapper_of_v_is_differentiable():
    x = some_x(3).requires_grad_()
    abar = ABAR[:5].clone().requires_grad_()

    def run(x, tail):
        wrapped = guidance.eps_from_v(crooked, torch.cat([ABAR[:1], tail]))
        return wrapped(x, 3), wrapped.denoise_x0(x, 3)

    assert torch.autograd.gradcheck(run, (x, abar.detach()[1:].requires_grad_()), check_forward_ad=True)


def zero_end():
    return torch.cat([ABAR[:-1], ABAR.new_zeros(1)])


def predicts_v(abar):
    """The exact network of LAW for a table that ends at 0, where x0_hat is the mean."""
    eps = LAW.denoiser(abar)

    def v(x, t):
        a = abar[t]
        x0 = guidance.x0_from_eps(x, eps(x, t), a) if a > 0 else LAW.mean.expand(x.shape)
        return a.sqrt() * eps(x, t) - (1 - a).sqrt() * x0

    return guidance.eps_from_v(v, abar)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"checkpoint": True}])
def test_guidance_leaves_the_step_from_zero_alone(options):
    abar, ts, record = zero_end(), samplers.timesteps(T, 5), []
    meter = guidance.CostMeter(predicts_v(abar))
    guide = guidance.LookAhead(meter, linear, LAM, abar, ts, record=record, **options)
    with torch.no_grad():
        x = samplers.sample_ddim(guide, some_x(), abar, ts)
    assert [t for t, _ in record] == ts[1:-1] and meter.cost == 7 * (5 + 3)
    after = abar[ts[1]].sqrt() * LAW.mean + (1 - abar[ts[1]]).sqrt() * some_x()
    plain = guidance.LookAhead(LAW.denoiser(abar), linear, LAM, abar, ts[1:])
    torch.testing.assert_close(x, samplers.sample_ddim(plain, after, abar, ts[1:]))
    torch.testing.assert_close(guide(some_x(), T), some_x())  # eps_hat there is x_T
    torch.testing.assert_close(guide.denoise_x0(some_x(), T), LAW.mean.expand(7, 2))
    expected = guidance.x0_from_eps(some_x(), plain(some_x(), 20), abar[20])
    torch.testing.assert_close(guide.denoise_x0(some_x(), 20), expected)  # guided, elsewhere
    hat, same, h = guide.look(some_x(), T)
    assert hat is same
    torch.testing.assert_close(h, (LAW.mean @ SLOPE / LAM).expand(7))


def test_particles_from_zero_have_the_law_of_the_tilted_chain():
    abar, ts = zero_end(), samplers.timesteps(T, 8)
    near = torch.cat([ABAR[:-1], ABAR.new_tensor([1e-13])])
    exact = LAW.chain_law(near, ts, 1.0).tilt(SLOPE, LAM)
    guide = guidance.LookAhead(predicts_v(abar), linear, LAM, abar, ts)
    means = []
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x, log_w, _ = samplers.sample_particles(guide, torch.randn(400, 2, generator=g).double(), abar, ts, generator=g)
        means.append(log_w.exp() @ x)
    means = torch.stack(means)
    assert ((means.mean(0) - exact.mean).abs() < 4 * means.std(0) / 40**0.5).all()


def test_clipping_at_zero_takes_the_networks_own_estimate():
    abar = zero_end()
    x, clipped = some_x(), guidance.clip_x0(predicts_v(abar), abar, limit=0.7)
    torch.testing.assert_close(clipped.denoise_x0(x, T), LAW.mean.clamp(-0.7, 0.7).expand(7, 2))
    plain = guidance.x0_from_eps(x, LAW.denoiser(abar)(x, 20), abar[20]).clamp(-0.7, 0.7)
    torch.testing.assert_close(guidance.x0_from_eps(x, clipped(x, 20), abar[20]), plain)
    path = samplers.sample_ddim(clipped, x, abar, [T, 20], trajectory=True)
    expected = abar[20].sqrt() * LAW.mean.clamp(-0.7, 0.7) + (1 - abar[20]).sqrt() * x
    torch.testing.assert_close(path[1], expected)


# ---------------------------------------------------------------- rewards that cannot guide


@pytest.mark.parametrize(
    "reward, error, found",
    [
        (lambda x: bumpy(x)[:, None], ValueError, r"has shape \(7, 1\) for 7 samples"),
        (lambda x: bumpy(x).sum(), ValueError, r"has shape \(\) for 7 samples"),
        (lambda x: x, ValueError, r"has shape \(7, 2\) for 7 samples"),
        (lambda x: x[:, 0] > 0, ValueError, r"has shape \(7,\) for 7 samples, in torch.bool"),
        (lambda x: (x[:, 0] > 0).int(), ValueError, r"has shape \(7,\) for 7 samples, in torch.int32"),
        (lambda x: 1.5, TypeError, "is a float for 7 samples"),
        (lambda x: True, TypeError, "is a bool for 7 samples"),
        (lambda x: None, TypeError, "is a NoneType for 7 samples"),
        (lambda x: bumpy(x).tolist(), TypeError, "is a list for 7 samples"),
        (lambda x: bumpy(x).detach().numpy(), TypeError, "is a ndarray for 7 samples"),
    ],
)
def test_a_reward_is_one_floating_value_a_sample(reward, error, found):
    guided = guidance.LookAhead(crooked, reward, 1.0, ABAR, TS)
    for run in (
        lambda: guided(some_x(), 20),
        lambda: samplers.sample_particles(guided, some_x(), ABAR, TS, guided=False),
    ):
        with pytest.raises(
            error, match=rf"the reward {found}.*; it must be one value each, a floating tensor of shape \(7"
        ):
            run()


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
@pytest.mark.parametrize("steps", [2, 20])
def test_a_gradient_that_is_not_finite_is_named(options, steps):
    """The reward itself is 0; its root has no derivative there. With two steps NaN used to come back."""
    for reward, bad in (
        (lambda x: (x[:, 0] * 0).sqrt(), 7),
        (
            lambda x: torch.where(
                x[:, 1] > 1e9, 1.0, (x[:, 0] * torch.tensor([0.0] * 3 + [1.0] * 4).double()).abs().sqrt()
            ),
            3,
        ),
    ):
        if bad == 3 and options:
            continue  # the second knows the rows of the whole batch
        ts = samplers.timesteps(T, steps)
        guided = guidance.LookAhead(crooked, reward, 1.0, ABAR, ts, **options)
        message = f"the gradient of the reward is not finite for {bad} of 7 samples at t = 50, though the reward is"
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            samplers.sample_ddim(guided, some_x(), ABAR, ts)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            samplers.sample_particles(guided, some_x(), ABAR, ts)


def test_a_reward_that_steers_nothing_warns_once_a_run():
    ts, flat = samplers.timesteps(T, 5), "the gradient of the reward was zero for every sample at every step"
    rewards = [lambda x: bumpy(x).round(), lambda x: 0 * bumpy(x), lambda x: (x[:, 0] - 1e9).relu()]
    for reward in rewards:
        for options in ({}, {"guide_last": True}, {"micro_batch": 2}):
            guided = guidance.LookAhead(crooked, reward, 1.0, ABAR, ts, **options)
            for _ in range(2):  # each run anew
                with pytest.warns(UserWarning, match=flat) as caught:
                    x = samplers.sample_ddim(guided, some_x(), ABAR, ts)
                assert len(caught) == 1 and torch.equal(x, samplers.sample_ddim(crooked, some_x(), ABAR, ts))
        with pytest.warns(UserWarning, match=flat):
            samplers.sample_particles(guided, some_x(), ABAR, ts)
    late = iter([0.0] * 3 + [1.0] * 50)  # a clamp may act at first, where x0_hat is wild
    guided = guidance.LookAhead(crooked, lambda x: next(late) * bumpy(x), 1.0, ABAR, ts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samplers.sample_ddim(guided, some_x(), ABAR, ts)
        samplers.sample_ddim(
            guidance.LookAhead(crooked, lambda x: x[:, 0] * (x[:, 0] > 0), 1.0, ABAR, ts), some_x(), ABAR, ts
        )
        samplers.sample_particles(
            guidance.LookAhead(crooked, rewards[0], 1.0, ABAR, ts), some_x(), ABAR, ts, guided=False
        )


def test_a_reward_without_the_images_in_its_graph_gives_no_gradient():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for reward in (lambda x: weight * bumpy(x.detach()), lambda x: bumpy(x.detach()), lambda x: weight.expand(len(x))):
        with torch.no_grad(), pytest.raises(ValueError, match="gives no gradient in x_0; use sample_particles"):
            guidance.LookAhead(crooked, reward, 1.0, ABAR, TS)(some_x(), 20)


def test_a_potential_that_overflows_is_no_nan():
    guided = guidance.LookAhead(crooked, lambda x: 100 + x[:, 0], 1e-3, ABAR, TS)
    with pytest.raises(ValueError, match=r"reward/lam is not finite for 7 of 7 samples"):
        guided.potential(some_x().half())
    assert torch.isfinite(guided.potential(some_x())).all()


def test_rows_and_grids_of_guidance_in_any_integers():
    ts, x = samplers.timesteps(T, 5), some_x()
    plain = guidance.LookAhead(crooked, bumpy, 0.3, ABAR, ts)
    other = guidance.LookAhead(crooked, bumpy, 0.3, ABAR, numpy.array(ts), micro_batch=numpy.int64(2))
    assert torch.equal(other(x, ts[-1]), crooked(x, ts[-1]))
    torch.testing.assert_close(other(x, 20), plain(x, 20))
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"micro_batch is {wrong}; it must be an integer of at least 1"):
            guidance.LookAhead(crooked, bumpy, 0.3, ABAR, ts, micro_batch=wrong)
    for grid in ([], [51, 3], [3, 20]):
        with pytest.raises(ValueError, match="must descend within 1..T = 50"):
            guidance.LookAhead(crooked, bumpy, 0.3, ABAR, grid)


# ---------------------------------------------------------------- told the noise level


class Told(torch.nn.Module):
    """Any smooth network of x (B, 2) and the level, with one weight."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x, level, shift=0.0):
        return self.w * torch.tanh(x + level.reshape(-1, 1)) + 0.1 * x.flip(1) + shift


def exact_network(law, scale):
    """E[eps | x] as a function of x and the level."""

    def network(x, level):
        one = torch.ones((), dtype=torch.float64)
        return law.denoiser(torch.stack([one, scale.abar(level[0].double())]))(x, 1)

    return network


@pytest.mark.parametrize("scale", [schedules.ANGLE, schedules.LOG_NSR], ids=lambda scale: scale.name)
def test_a_network_told_the_level_serves_every_schedule(scale):
    level_net = guidance.LevelDenoiser(exact_network(LAW, scale), ABAR, scale)
    other = schedules.abar(torch.tensor(schedules.DEFAULT_Q["sigmoid"], dtype=torch.float64), 30, "sigmoid")
    grid = schedules.grid_abar(torch.zeros(6, dtype=torch.float64), scale, level_net.seen)
    x = some_x()
    for abar, ts in ((ABAR, TS), (other, samplers.timesteps(30, 7)), (grid, [5, 4, 3, 2, 1])):
        told, exact = level_net.on(abar), LAW.denoiser(abar)
        for t in ts:
            torch.testing.assert_close(told(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            samplers.sample_ddim(told, x, abar, ts), samplers.sample_ddim(exact, x, abar, ts), rtol=1e-7, atol=1e-7
        )
        guided = [guidance.LookAhead(d, linear, LAM, abar, ts) for d in (told, exact)]
        results = [samplers.sample_ddim(d, x, abar, ts) for d in guided]
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


def test_it_is_told_one_level_for_each_row_in_the_type_of_x():
    seen = []

    def network(x, level, shift=0.0):
        seen.append(level)
        return x + shift

    told, x = guidance.LevelDenoiser(network, ABAR), some_x(3)
    t = torch.tensor([1, 20, 50])
    assert torch.equal(told(x.float(), t, 2.0), x.float() + 2)
    torch.testing.assert_close(seen[-1], schedules.angle(ABAR[t]).float())
    told(x, 7)
    assert seen[-1].shape == (1,) and seen[-1].dtype == torch.float64
    assert seen[-1] == schedules.angle(ABAR[7])
    assert told.passes == 1 and guidance.LevelDenoiser(told, ABAR).passes == 1


def test_derivatives_go_through_the_level_in_both_modes():
    """Against differences, and against the same network told a level that stands still: that part alone is not all."""
    network, ts, x = Told().requires_grad_(False), [5, 4, 3, 2, 1], some_x()
    level_net = guidance.LevelDenoiser(network, ABAR, seen=(0.0, 1.6))
    z = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)

    def f(z, seed):
        grid = schedules.grid_abar(z)
        return samplers.sample_ddim(level_net.on(grid), x, grid, ts).square().mean()

    def still(z, seed):
        grid = schedules.grid_abar(z)
        return samplers.sample_ddim(level_net.on(grid.detach()), x, grid, ts).square().mean()

    narrow = Told().requires_grad_(False).float()
    low = guidance.LevelDenoiser(lambda x, level: narrow(x, 0.5 * (2 * level)), ABAR, seen=(0.0, 1.6))

    def single(z, seed):
        """In single precision, by a network that scales its level."""
        grid = schedules.grid_abar(z)
        return samplers.sample_ddim(low.on(grid), x.float(), grid, ts).square().mean()

    wanted, _ = estimators.q_grad_coordinates(f, z, seed=0, delta=1e-5)
    for estimator in (estimators.q_grad_forward, estimators.q_grad_reverse):
        torch.testing.assert_close(estimator(f, z, seed=0)[0], wanted, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(estimator(single, z, seed=0)[0], wanted, rtol=1e-4, atol=1e-4)
        assert (estimator(still, z, seed=0)[0] - wanted).abs().max() > 0.05 * wanted.abs().max()


def test_levels_beyond_those_of_the_training_are_told_with_their_range():
    level_net = guidance.LevelDenoiser(Told(), ABAR[:40])
    low, high = level_net.seen
    assert (low, high) == tuple(schedules.angle(ABAR[[1, 39]]).tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        level_net(some_x(), 39)
        level_net.on(ABAR[:40])(some_x(), 39)
        level_net.on(ABAR)(some_x(), 20)
        level_net.on(ABAR)(some_x(), torch.tensor([50]))  # as in training: not read, which a GPU would have to wait for
        level_net.abar = ABAR  # it is trained on this from now on
        level_net(some_x(), 50)
    level_net.abar = ABAR[:40]
    with pytest.warns(UserWarning, match=rf"angle is {schedules.angle(ABAR[50]):.5g} at t = 50, .* seen {low:.5g} to"):
        level_net.on(ABAR)(some_x(), 50)
    with pytest.warns(UserWarning, match="seen 0.5 to 1: train it on more levels, or keep the grid within these") as at:
        guidance.LevelDenoiser(Told(), ABAR, seen=(0.5, 1.0))(some_x(), 1)
    assert at[0].filename == __file__
    assert level_net.on(ABAR).on(ABAR[:10]).seen == (low, high)


def test_a_network_that_is_told_something_else_is_refused():
    network = Told()
    network.told = "t"
    with pytest.raises(
        ValueError, match=r"is told the t, but the scale is the angle; .*time_scale\(abar\) of the sched"
    ):
        guidance.LevelDenoiser(network, ABAR)
    network.told = "angle"
    guidance.LevelDenoiser(network, ABAR)
    with pytest.raises(ValueError, match="is told the angle, but the scale is the log_nsr"):
        guidance.LevelDenoiser(network, ABAR, schedules.LOG_NSR)
    with pytest.raises(ValueError, match="abar must fall"):
        guidance.LevelDenoiser(network, ABAR.flip(0))
    with pytest.raises(TypeError, match="abar is a NoneType"):
        guidance.LevelDenoiser(network, None)


def test_networks_of_v_and_x0_that_are_told_the_level():
    """They predict v or x_0 of the same law; the wrapper that turns it into eps is around the level's."""
    scale, x = schedules.ANGLE, some_x()
    network = exact_network(LAW, scale)

    def v(x, level):
        a = scale.abar(level)
        eps = network(x, level)
        return a.sqrt() * eps - (1 - a).sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt()

    told = guidance.eps_from_v(guidance.LevelDenoiser(v, ABAR), ABAR)
    torch.testing.assert_close(told(x, 20), LAW.denoiser(ABAR)(x, 20), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        told.denoise_x0(x, 20), guidance.x0_from_eps(x, LAW.denoiser(ABAR)(x, 20), ABAR[20]), rtol=1e-9, atol=1e-9
    )


def test_what_a_derivative_in_the_schedule_costs():
    """Backward into the level counts as into x, a tangent of the level as one of x: at the first step x has neither."""
    network, x, ts = Told().requires_grad_(False), some_x(), [3, 2, 1]
    level_net = guidance.LevelDenoiser(network, ABAR, seen=(0.0, 1.6))
    z, meters = torch.zeros(4, dtype=torch.float64), []

    def f(z, seed):
        grid = schedules.grid_abar(z)
        meters.append(guidance.CostMeter(level_net.on(grid)))
        return samplers.sample_ddim(meters[-1], x, grid, ts).square().mean()

    for estimator, cost in ((estimators.q_grad_reverse, 2 * 3), (estimators.q_grad_forward, 2 * 3 * 4)):
        meters.clear()
        estimator(f, z, seed=0)
        assert sum(meter.cost for meter in meters) == 7 * cost
    network.requires_grad_(True)
    meters.clear()
    f(z, 0).backward()
    assert meters[0].cost == 7 * (1 + 2 + 1 + 1 + 2 + 1 + 1 + 2)  # into the weights, and from the second step into x
