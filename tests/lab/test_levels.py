"""Networks told t on other schedules, and densities of levels: closed forms, bounds, and an oracle's hypergradient."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from bilevel_core import guidance, samplers, schedules
from bilevel_core.algorithms import ScoreTraining, train_score
from bilevel_core.lab import levels, oracles, training

OWN = schedules.abar(torch.tensor([0.0, 0.95, 1.0, 0.008], dtype=torch.float64), 100)
LAW = oracles.Mixture1D()

# ---------------------------------------------------------------- told t


def test_times_are_read_off_the_networks_own_table():
    scale, t = levels.time_scale(OWN), torch.arange(1, 101, dtype=torch.float64)
    assert scale.name == "t" and scale.ends == (1, 100)
    torch.testing.assert_close(scale.level(OWN[1:]), t, rtol=1e-12, atol=0)
    torch.testing.assert_close(scale.abar(t), OWN[1:], rtol=1e-12, atol=0)
    between = schedules.ANGLE.abar((schedules.angle(OWN[7]) + 3 * schedules.angle(OWN[8])) / 4)
    assert scale.level(between).item() == pytest.approx(7.75, abs=1e-10)
    torch.testing.assert_close(
        scale.abar(torch.tensor([7.75, 60.2])), scale.abar(scale.level(scale.abar(torch.tensor([7.75, 60.2]))))
    )
    a = between.clone().requires_grad_()
    (slope,) = torch.autograd.grad(scale.level(a), a)
    (angle,) = torch.autograd.grad(schedules.angle(a), a)
    assert slope.item() == pytest.approx((angle / (schedules.angle(OWN[8]) - schedules.angle(OWN[7]))).item())
    nearest = levels.time_scale(OWN, nearest=True).level
    assert nearest(between) == 8 and nearest(OWN[3:5]).tolist() == [3, 4] and nearest(between).dtype == torch.int64
    assert nearest(between.reshape(1, 1)).shape == (1, 1)


def test_a_network_told_t_serves_another_schedule_at_the_levels_it_knows():
    """The exact denoiser of the own table, asked at levels that the table has: as exact, whatever the schedule."""
    own = LAW.denoiser(OWN)
    grid = OWN[[0, 4, 17, 50, 98]]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for nearest in (False, True):
        told = guidance.LevelDenoiser(own if nearest else by_time, OWN, levels.time_scale(OWN, nearest)).on(grid)
        for sampler in (samplers.sample_ddim, samplers.sample_dpm):
            wanted = sampler(LAW.denoiser(grid), x, grid, [4, 3, 2, 1])
            torch.testing.assert_close(sampler(told, x, grid, [4, 3, 2, 1]), wanted, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(wanted, sampler(own, x, OWN, [98, 50, 17, 4]), rtol=1e-10, atol=1e-10)
    with pytest.warns(UserWarning, match="the t is 10.* at t = 3, but the network has seen 1 to 100"):
        guidance.LevelDenoiser(by_time, OWN, levels.time_scale(OWN)).on(torch.tensor([1.0, 0.5, 0.1, 1e-5]))(x, 3)


def by_time(x, t):
    """The exact denoiser of the own table, also between its times."""
    scale = levels.time_scale(OWN)
    return LAW.denoiser(torch.cat([torch.ones_like(t), scale.abar(t)]))(x, 1)


def test_a_network_told_t_without_its_schedule_is_an_error():
    with pytest.raises(TypeError, match="abar is a NoneType; it must be a tensor"):
        levels.time_scale(None)
    with pytest.raises(ValueError, match="T is 1; it must be an integer of at least 2"):
        levels.time_scale(torch.tensor([1.0, 0.5]))
    flat = torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64)  # rounding may do that
    assert torch.isfinite(levels.time_scale(flat).level(torch.tensor([0.7, 0.5, 0.3]))).all()


# ---------------------------------------------------------------- densities


def test_the_default_is_uniform_in_the_angle_and_broad():
    table = levels.Density().abar(1000)
    angle = schedules.angle(table[1:])
    assert len(table) == 1001 and table[0] == 1
    torch.testing.assert_close(angle.diff(), torch.full((999,), 0.995 * math.pi / 2 / 1000).double(), rtol=1e-6, atol=0)
    assert angle[0] > levels.BROAD[0] and angle[-1] < levels.BROAD[1]
    torch.testing.assert_close(levels.Density().places(4), torch.tensor([1, 3, 5, 7]).double() / 8)


def test_the_gaussian_density_has_the_best_grids_for_its_levels():
    """N of its levels are a grid in equal steps of atan(sigma/s), as `schedule_transfer.spaced` has it."""
    s = 0.4
    table = levels.Density(s=s, ends=(0.01, 1.5)).abar(50)
    sigma = (1 / table[1:] - 1).sqrt()
    steps = torch.atan(sigma / s).diff()
    torch.testing.assert_close(steps, steps.mean().expand(49), rtol=1e-9, atol=0)
    low, high = (math.atan(math.tan(end) / s) for end in (0.01, 1.5))
    assert steps[0].item() == pytest.approx((high - low) / 50)


@pytest.mark.parametrize("size", [0.3, 30.0])
@pytest.mark.parametrize("bound", [1.0, 4.0])
def test_the_ratio_keeps_its_bounds_and_the_table_has_it(size, bound):
    phi = size * torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    density, place = levels.Density(phi, bound=bound), levels.Density._cells()
    ratio = density.log_ratio(place).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=1e-12)
    assert 1 / bound - 1e-12 <= ratio.min() and ratio.max() <= bound + 1e-12
    places = density.places(20_000)
    assert (places.diff() > 0).all() and places[0] > 0 and places[-1] < 1
    found = torch.histc(places, 16, 0, 1) / 20_000 * 16
    torch.testing.assert_close(found, ratio.reshape(16, -1).mean(1), rtol=0, atol=2e-3)
    samplers.check_grid([100, 50, 1], density.abar(100))


def test_a_slope_is_the_derivative_of_the_mean():
    phi = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)

    def rise(place):
        return torch.sin(5 * place) + place**2

    density = levels.Density(phi, bound=3.0)
    places = density.places(50_000)
    found = density.slope(places, rise(places))

    def mean(phi):
        place = levels.Density._cells()
        return (levels.Density(phi, bound=3.0).log_ratio(place).exp() * rise(place)).mean()

    torch.testing.assert_close(found, torch.func.grad(mean)(phi), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"ends": (0.5, 0.2)}, {"ends": (0.0, 2.0)}, {"s": 0.0}, {"bound": 0.5}])
def test_densities_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="ends must rise within 0..pi/2, s > 0 and bound >= 1"):
        levels.Density(**wrong)


# ---------------------------------------------------------------- a density learned in training

S = 0.5
DATA = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = S * DATA / DATA.square().mean().sqrt()
GRID = schedules.grid_abar(torch.zeros(6), ends=levels.BROAD)


class Few(nn.Module):
    """eps_hat = a(level) x with few parameters: what is right at one level is wrong at another."""

    told = "angle"

    def __init__(self, k=2):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(k, dtype=torch.float64))

    def basis(self, level):
        return torch.cos(torch.arange(len(self.c)) * torch.acos(level.reshape(-1) * 4 / math.pi - 1)[:, None])

    def forward(self, x, level):
        return (self.basis(level) @ self.c)[:, None] * x


def quality(x):
    return 100 * (x.square().mean().sqrt() - S) ** 2


def new_state(net=None, options=None, **more):
    recipe = {"batch_size": 256, "lr": 0.02, "warmup": 0, "ema_decay": 0.97, "seed": 1} | (options or {})
    denoiser = guidance.LevelDenoiser(net or Few(), levels.Density().abar(1000))
    return levels.DensityLearning(
        ScoreTraining(denoiser, **recipe), quality, GRID, **({"samples": 500, "batch": 500, "every": 20} | more)
    )


def test_what_one_step_down_f_says_of_the_levels_is_the_hypergradient():
    """With the inverse Hessian of the loss for Adam's curvature it is d f(theta_star(phi))/d phi, exactly."""
    net, phi = Few(3), torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    place = levels.Density._cells()
    level = levels.BROAD[0] + (levels.BROAD[1] - levels.BROAD[0]) * place
    a = schedules.ANGLE.abar(level)
    basis, v, noise = net.basis(level), a * S**2 + 1 - a, (1 - a).sqrt()

    def star(phi):
        w = levels.Density(phi).log_ratio(place).exp()
        return torch.linalg.solve(basis.T * (w * v) @ basis, basis.T @ (w * noise))

    def f(c):
        told = guidance.LevelDenoiser(lambda x, level: (net.basis(level) @ c)[:, None] * x, GRID)
        x = samplers.sample_ddim(told, torch.ones(1, 1, dtype=torch.float64), GRID, [5, 4, 3, 2, 1])
        return (x[0, 0].abs() - S) ** 2

    def losses(c):
        response = basis @ c
        return response**2 * v - 2 * response * noise + 1

    c, density = star(phi), levels.Density(phi)
    weights = density.log_ratio(place).exp()
    step = torch.linalg.solve(2 * basis.T * (weights * v) @ basis / len(place), torch.func.grad(f)(c))
    wanted = torch.func.grad(lambda phi: f(star(phi)))(phi)
    gamma = 1e6  # theta_gamma is a step of size 1/gamma away
    rise = gamma * (losses(c - step / gamma) - losses(c))
    # places here are even, not drawn from the density: the weights say how often each is
    slope = density.slope(place, rise * weights)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-9)


def test_learning_the_density_lowers_f_of_a_network_of_small_capacity():
    fixed, learned = (
        list(levels.learn_density(new_state(rate=rate, samples=2000), DATA, steps=1000)) for rate in (0.0, 0.1)
    )
    first, last = (sum(r.f for r in records[-10:]) / 10 for records in (fixed, learned))
    assert last < first / 5
    assert all(torch.equal(r.phi, torch.zeros(6).double()) for r in fixed)
    assert [r.step for r in learned] == list(range(20, 1001, 20))
    for a, b in itertools.pairwise(learned):
        assert torch.equal(a.phi_next, b.phi) and not torch.equal(a.phi, b.phi)


def test_without_a_rate_it_is_plain_training_and_its_cost_is_counted():
    state, plain = new_state(rate=0.0), new_state(rate=0.0).training
    records = list(levels.learn_density(state, DATA, steps=60))
    list(train_score(plain, DATA, levels.Density().abar(1000), steps=60))
    assert torch.equal(state.training.denoiser.network.c, plain.denoiser.network.c)
    # f: 5 steps forward, backward into weights in all and into x in all but the first; two losses
    each = 20 * 256 * 3 + 500 * (5 * 3 + 4) + 2 * 500
    assert [r.cost for r in records] == [each, 2 * each, 3 * each]


def test_a_killed_run_goes_on_bit_for_bit_and_another_is_refused(tmp_path):
    def run(steps, path, **options):
        state = new_state(**options)
        loop = levels.learn_density(state, DATA, steps=steps)
        records = list(training.checkpointed(loop, state, path, steps=steps, every=20))
        return state, records

    whole, records = run(80, tmp_path / "a")
    run(40, tmp_path / "b")
    resumed, rest = run(80, tmp_path / "b")
    assert [r.step for r in rest] == [60, 80]
    assert [(r.f, r.cost) for r in rest] == [(r.f, r.cost) for r in records[2:]]
    saved, own = resumed.tensors(), whole.tensors()
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    assert torch.equal(resumed.training.denoiser.abar, resumed.density.abar(1000))
    for other, named in (
        ({"rate": 0.2}, "rate: 0.05 -> 0.2"),
        ({"density": levels.Density(torch.zeros(3, dtype=torch.float64))}, "start: "),
        ({"density": levels.Density(torch.zeros(6, dtype=torch.float64), s=0.5)}, "s: 1.0 -> 0.5"),
        ({"options": {"lr": 0.1}}, "lr: 0.02 -> 0.1"),
        ({"net": Few(3)}, "other weights"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this run: .*{named}"):
            run(80, tmp_path / "b", **other)
    state = new_state()
    with pytest.raises(ValueError, match="the saved run has other data"):
        list(training.checkpointed(levels.learn_density(state, DATA[1:], steps=100), state, tmp_path / "b", steps=100))


def test_bad_input():
    with pytest.raises(ValueError, match="steps = 30 must be a multiple of every = 20"):
        next(levels.learn_density(new_state(), DATA, steps=30))
    for wrong, said in (
        ({"reach": 0.0}, "reach = 0.0 must be positive"),
        ({"density": levels.Density()}, "phi not empty"),
        ({"every": 0}, "every is 0; it must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            new_state(**wrong)
    plain = ScoreTraining(Few())
    with pytest.raises(ValueError, match="must be a LevelDenoiser that is told the angle"):
        levels.DensityLearning(plain, quality, GRID)
    state = new_state()
    state.quality = lambda x: x.sum() * float("nan")
    with pytest.raises(FloatingPointError, match="the gradient of f = nan at step 20 is not finite"):
        next(levels.learn_density(state, DATA, steps=20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is asked beyond the levels of the training
        list(levels.learn_density(new_state(), DATA, steps=40))
