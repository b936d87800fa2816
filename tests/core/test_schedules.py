import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_core import samplers, schedules

Q = {kind: torch.tensor(q, dtype=torch.float64) for kind, q in schedules.DEFAULT_Q.items()}


def by_hand(u, q, kind):
    """F(u) straight from its definition, as an independent check."""
    start, end, tau, epsilon = q
    w = u * (end - start) + start
    v = (w + epsilon) / (1 + epsilon)
    if kind == "cosine":
        return max(0.0, math.cos(v * math.pi / 2)) ** (2 * tau)
    if kind == "sigmoid":
        return 1 / (1 + math.exp(-((1 - w) / tau + epsilon)))
    return math.exp(-tau * (0.1 * v + 19.9 * v**2 / 2))


@pytest.mark.parametrize("kind", schedules.KINDS)
@pytest.mark.parametrize("form", schedules.FORMS)
@pytest.mark.parametrize("shift", [0.0, 0.03])
def test_abar_follows_its_definition(kind, form, shift):
    T, q = 40, (Q[kind] + torch.tensor([shift, -shift, shift, shift])).tolist()
    F = [by_hand(t / T, q, kind) for t in range(T + 1)]
    if form == "normalised":
        F = [(f - F[-1]) / (F[0] - F[-1]) for f in F]
    abar = [1.0]
    for t in range(1, T + 1):
        abar.append(abar[-1] * (1 - min(max(1 - F[t] / F[t - 1], 0), 0.999)))
    ours = schedules.abar(torch.tensor(q, dtype=torch.float64), T, kind, form)
    torch.testing.assert_close(ours, torch.tensor(abar, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_linear_is_the_ddpm_schedule():
    """Ho et al. let beta rise linearly from 1e-4 to 0.02 in 1000 steps; ours integrates the same line."""
    ddpm = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    ours = schedules.betas(Q["linear"], 1000, "linear")
    assert (ours - ddpm).abs().max() < 3e-4
    assert schedules.abar(Q["linear"], 1000, "linear")[-1].item() == pytest.approx(4.3e-5, rel=0.02)


def test_default_cosine_ends_where_the_clip_leaves_it():
    abar = schedules.abar(Q["cosine"], 1000)
    assert abar[-1].item() == pytest.approx(2.4288e-9, rel=1e-4)
    assert abar[-1].item() == pytest.approx(1e-3 * abar[-2].item(), rel=1e-9)


@pytest.mark.parametrize("kind", schedules.KINDS)
@pytest.mark.parametrize("form", schedules.FORMS)
def test_gradcheck(kind, form):
    q = (Q[kind] + torch.tensor([0.05, -0.1, 0.1, 0.05])).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: schedules.abar(q, 30, kind, form), q, atol=1e-7)
    assert torch.autograd.gradcheck(lambda q: schedules.log_snr(schedules.abar(q, 30, kind, form)[1:]), q, atol=1e-6)


@pytest.mark.parametrize("kind", schedules.KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_admissible_q_is_finite_with_gradient(kind, data):
    raw = [data.draw(st.floats(low - 1, high + 1)) for low, high in schedules.BOUNDS[kind]]
    form, T = data.draw(st.sampled_from(schedules.FORMS)), data.draw(st.sampled_from([2, 50, 1000]))
    margin = data.draw(st.sampled_from([0.0, 0.01]))
    try:
        q = schedules.project(torch.tensor(raw, dtype=torch.float64), T, kind, form, margin)
    except ValueError as error:
        assert "no end gives" in str(error)
        return
    schedules.check(q, T, kind, form)
    torch.testing.assert_close(schedules.project(q, T, kind, form, margin), q, rtol=0, atol=1e-12)
    q.requires_grad_()
    abar = schedules.abar(q, T, kind, form)
    (grad,) = torch.autograd.grad(abar.sum() + schedules.log_snr(abar[1:]).sum(), q)
    assert torch.isfinite(abar).all() and torch.isfinite(grad).all()
    assert (abar[1:] < abar[:-1]).all() and abar[-1] >= schedules.MIN_ABAR * (1 - 1e-9)
    for table in (abar, abar.float()):  # in float32 the first may be equal
        assert torch.equal(schedules.check_abar(table), table.double())
    assert samplers.check_grid(range(T, 0, -1), abar) == list(range(T, 0, -1))


def test_the_released_zero_over_zero_is_gone():
    """end - start > 1 gave F_t = F_{t-1} = 0: NaN in the released code, a finite schedule and a clear error here."""
    q = torch.tensor([0.0, 1.3, 1.0, 0.008], dtype=torch.float64, requires_grad=True)
    abar = schedules.abar(q, 1000)
    (grad,) = torch.autograd.grad(abar.sum(), q)
    assert torch.isfinite(abar).all() and torch.isfinite(grad).all()
    with pytest.raises(ValueError, match=r"end = 1.3 is outside \[0, 1\]"):
        schedules.check(q, 1000)
    assert schedules.project(q, 1000)[1] <= 1


@pytest.mark.parametrize(
    "q, message",
    [
        ((-0.1, 1.0, 1.0, 0.008), r"start = -0.1 is outside \[0, 0.9\]"),
        ((0.5, 0.5, 1.0, 0.008), "end - start = 0 is below 0.05"),
        ((0.0, 1.0, float("nan"), 0.008), "tau = nan is outside"),
        ((0.0, 1.0, 4.0, 0.008), r"abar_T = 3.5e-26 is below 1e-10 at T = 1000: lower end or tau"),
    ],
)
def test_check_names_parameter_value_and_range(q, message):
    with pytest.raises(ValueError, match=message):
        schedules.check(torch.tensor(q, dtype=torch.float64), 1000)


def test_bad_names_shapes_and_sizes():
    with pytest.raises(ValueError, match="kind is 'cosin'"):
        schedules.abar(Q["cosine"], 10, "cosin")
    with pytest.raises(ValueError, match="form is 'raw'"):
        schedules.abar(Q["cosine"], 10, "cosine", "raw")
    with pytest.raises(ValueError, match="T is 1"):
        schedules.abar(Q["cosine"], 1)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        schedules.check(Q["cosine"][:3], 10)
    with pytest.raises(ValueError, match="not finite"):
        schedules.project(torch.tensor([0, 1, float("inf"), 0]), 10)
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\)"):
        schedules.abar_from_betas(torch.tensor([0.1, 1.0, 0.1]))
    with pytest.raises(ValueError, match=r"betas have shape \(2, 1\); they must be a table \(T,\)"):
        schedules.abar_from_betas(torch.zeros(2, 1))


def test_projection_lowers_end_only_when_the_signal_would_vanish():
    q = torch.tensor([0.0, 1.0, 4.0, 0.008], dtype=torch.float64)
    new = schedules.project(q, 1000)
    assert (new[[0, 2, 3]] == q[[0, 2, 3]]).all() and 0.9 < new[1] < 1
    assert schedules.abar(new, 1000)[-1].item() == pytest.approx(schedules.MIN_ABAR, rel=1e-6)
    torch.testing.assert_close(schedules.project(Q["cosine"], 1000), Q["cosine"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, direction", [("cosine", lambda s, e, t, p: [(1 - s) / (1 + p), (1 - e) / (1 + p), 0, -1])]
)
def test_the_four_parameters_are_three(kind, direction):
    """cosine: d/d epsilon = [(1 - start) d/d start + (1 - end) d/d end]/(1 + epsilon)."""
    q = torch.tensor([0.1, 0.9, 1.2, 0.1], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda q: schedules.abar(q, 50, kind), q)
    assert (jacobian @ torch.tensor(direction(*q.tolist()), dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("kind, rank", [("cosine", 3), ("sigmoid", 2), ("linear", 2)])
def test_jacobian_rank(kind, rank):
    q = Q[kind] + torch.tensor([0.1, -0.1, 0.2, 0.1])
    jacobian = torch.autograd.functional.jacobian(lambda q: schedules.abar(q, 50, kind), q)
    singular = torch.linalg.svdvals(jacobian)
    assert singular[rank - 1] > 1e-4 * singular[0] and singular[rank] < 1e-12 * singular[0]


def test_terminal_warning_and_remedy():
    abar = schedules.abar(torch.tensor([0.0, 1.0, 1.0, 0.0]), 1000, "sigmoid")
    assert 0.5 < abar[-1] < 0.7
    with pytest.warns(UserWarning, match="N\\(0, I\\) is the wrong start"):
        assert schedules.check_terminal(abar)
    mended = schedules.rescale_terminal(abar)
    assert mended[0] == 1 and mended[-1].item() == pytest.approx(1e-5) and (mended.diff() < 0).all()
    assert not schedules.check_terminal(mended)
    assert not schedules.check_terminal(schedules.abar(Q["sigmoid"], 1000, "sigmoid", "normalised"))
    with pytest.raises(ValueError, match="last = 0 must lie"):
        schedules.rescale_terminal(abar, 0)


def test_noise_has_the_stated_moments_and_broadcasts():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.full((2, 1, 3, 3), 2.0), torch.randn(2, 1, 3, 3, generator=g)
    x_t = schedules.noise(x0, eps, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], 0.5 * x0[1] + 0.75**0.5 * eps[1])
    assert schedules.noise(x0, eps, 0.25).dtype == torch.float32


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_diffusers_round_trip(kind):
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    from bilevel_core.lab.models import adapters

    abar = schedules.abar(Q[kind], 200, kind)
    for scheduler in (None, DDPMScheduler):
        theirs = adapters.to_diffusers(abar, scheduler)
        torch.testing.assert_close(theirs.alphas_cumprod.double(), abar[1:], rtol=2e-4, atol=1e-12)
        torch.testing.assert_close(adapters.from_diffusers(theirs), abar, rtol=2e-4, atol=1e-12)
    bare = EulerDiscreteScheduler()
    torch.testing.assert_close(adapters.from_diffusers(bare)[1:].float(), bare.alphas_cumprod, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="no table of betas"):
        adapters.from_diffusers(object())


@pytest.mark.parametrize("form", schedules.FORMS)
@pytest.mark.parametrize("kind", schedules.KINDS)
def test_coordinates_without_redundancy_are_the_same_schedule(kind, form):
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        q = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
        q = q + torch.tensor([0.2, -0.2, 0.5, 0.1]) * torch.rand(4, generator=g, dtype=torch.float64)
        z = schedules.reduce(q, kind)
        again = schedules.expand(z, kind)
        torch.testing.assert_close(schedules.abar(again, 40, kind, form), schedules.abar(q, 40, kind, form))
        torch.testing.assert_close(schedules.reduce(again, kind), z)
        jacobian = torch.func.jacrev(lambda z: schedules.abar(schedules.expand(z, kind), 40, kind, form))(z)
        assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == len(schedules.FREE[kind]) == len(z)
    default = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
    torch.testing.assert_close(schedules.expand(schedules.reduce(default, kind), kind), default)


def test_four_parameters_have_the_rank_of_their_coordinates():
    for kind, free in schedules.FREE.items():
        q = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64) + torch.tensor([0.1, -0.1, 0.2, 0.05])
        jacobian = torch.func.jacrev(lambda q, kind=kind: schedules.abar(q, 40, kind))(q)
        assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == len(free)


def test_coordinates_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match=r"z has shape \(4,\); for the cosine schedule it must be \(3,\)"):
        schedules.expand(torch.zeros(4))
    for function in (schedules.reduce, schedules.expand):
        with pytest.raises(ValueError, match="kind is 'quadratic'"):
            function(torch.zeros(4), "quadratic")


# ---------------------------------------------------------------- defaults, edges and the last digit


def test_what_is_left_out_is_the_released_cosine():
    q, u = Q["cosine"], torch.linspace(0, 1, 5)
    assert torch.equal(schedules.betas(q, 20), schedules.betas(q, 20, "cosine", "released"))
    assert torch.equal(schedules.abar(q, 20), schedules.abar(q, 20, "cosine", "released"))
    assert torch.equal(schedules.log_curve(u, q), schedules.log_curve(u, q, "cosine"))
    assert torch.equal(schedules.reduce(q), schedules.reduce(q, "cosine"))
    assert torch.equal(schedules.expand(q[:3]), schedules.expand(q[:3], "cosine"))
    dark = torch.tensor([0.0, 1.0, 4.0, 0.008], dtype=torch.float64)  # only the cosine refuses tau = 4 at end = 1
    assert torch.equal(schedules.project(dark, 1000), schedules.project(dark, 1000, "cosine", "released", 0.0))
    assert not torch.equal(schedules.project(dark, 1000), schedules.project(dark, 1000, form="normalised"))


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_coordinates_hold_wherever_the_redundant_parameters_are_fixed(kind, monkeypatch):
    """Not only at tau_0 = 1 and epsilon_0 = 0, where a forgotten factor would not be seen."""
    monkeypatch.setitem(schedules.DEFAULT_Q, kind, (0.1, 0.8, 1.4, 0.3))
    q = torch.tensor([0.15, 0.9, 0.8, 0.1], dtype=torch.float64)
    again = schedules.expand(schedules.reduce(q, kind), kind)
    torch.testing.assert_close(schedules.abar(again, 40, kind), schedules.abar(q, 40, kind), rtol=1e-10, atol=0)
    assert again[3].item() == 0.3 and (kind == "cosine" or again[2].item() == 1.4)


def test_double_precision_and_the_device_of_the_input():
    assert schedules.expand(torch.tensor([0.0, 1.0, 1.0]))[3].item() == 0.008  # not the nearest float32
    assert schedules.expand(torch.zeros(3, device="meta")).device.type == "meta"
    for form in schedules.FORMS:
        betas = schedules.betas(Q["cosine"].to("meta"), 10, "cosine", form)
        assert (betas.device.type, betas.dtype, betas.shape) == ("meta", torch.float64, (10,))
        assert schedules.betas(Q["cosine"].float(), 10, "cosine", form).dtype == torch.float64
    assert schedules.per_sample(0.3, torch.zeros(2, device="meta")).device.type == "meta"
    assert schedules.per_sample(0.3, torch.zeros(2)).dtype == torch.float64
    assert schedules.per_sample(torch.tensor([0.3, 0.2]), torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert schedules.project(Q["cosine"].float(), 10).dtype == torch.float32


def test_signal_to_noise_and_tables_of_betas():
    abar = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
    expected = torch.tensor([math.inf, math.log(4), 0.0], dtype=torch.float64)
    torch.testing.assert_close(schedules.log_snr(abar), expected, rtol=0, atol=1e-15)
    found = schedules.abar_from_betas(torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64))  # zero is allowed
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.5, 0.4], dtype=torch.float64), rtol=0, atol=1e-15)
    found = schedules.abar_from_betas(torch.tensor([0.5, 1.0]))  # one at the end: zero terminal SNR
    assert found.tolist() == [1.0, 0.5, 0.0]
    assert schedules.log_snr(found).tolist() == [math.inf, 0.0, -math.inf]
    with pytest.raises(ValueError, match="found -0.1 to 0.3"):
        schedules.abar_from_betas(torch.tensor([0.3, -0.1]))
    assert schedules.betas(torch.tensor([0.0, 1.0, 1.0, 0.0]), 10)[-1] == 0.999
    flat = schedules.betas(torch.tensor([0.0, 0.05, 0.1, 1.0]), 1000, "linear")
    assert (flat > 0).all()


def test_the_bounds_themselves_are_admissible():
    for q in ((0.9, 0.95, 0.1, 0.0), (0.0, 0.05, 10.0, 1.0)):
        schedules.check(torch.tensor(q, dtype=torch.float64), 10)
    for i, (low, high) in enumerate(schedules.BOUNDS["sigmoid"]):
        for value in (low - 1e-6, high + 1e-6):
            q = Q["sigmoid"].clone()
            q[i] = value
            with pytest.raises(ValueError, match=rf"{schedules.NAMES[i]} = .* is outside \[{low:g}, {high:g}\]"):
                schedules.check(q, 10, "sigmoid")
    with pytest.raises(ValueError, match=r"end - start = 0.0499 is below 0.05: raise end or lower start"):
        schedules.check(torch.tensor([0.5, 0.5499, 1.0, 0.0], dtype=torch.float64), 10)
    for T in (2.0, 1, True, "10", None):
        with pytest.raises(ValueError, match=f"T is {T!r}; it must be an integer of at least 2"):
            schedules.betas(Q["cosine"], T)
    assert len(schedules.betas(Q["cosine"], 2)) == 2
    for T in (numpy.int64(10), numpy.uint8(10), torch.tensor(10)):
        assert torch.equal(schedules.abar(Q["cosine"], T), schedules.abar(Q["cosine"], 10))
        assert torch.equal(schedules.project(Q["cosine"], T), schedules.project(Q["cosine"], 10))
        schedules.check(Q["cosine"], T)
    with pytest.raises(ValueError, match="kind is 'cosin'"):
        schedules.project(Q["cosine"], 10, "cosin")


def test_projection_keeps_its_margin_and_opens_the_gap():
    """By hand: start <= 1 - margin - gap with gap = 0.05 + margin, and end >= start + gap."""
    q = torch.tensor([0.9, 0.2, 20.0, -1.0], dtype=torch.float64)
    found = schedules.project(q, 10, margin=0.06)
    torch.testing.assert_close(found, torch.tensor([0.83, 0.94, 9.94, 0.06], dtype=torch.float64), rtol=0, atol=1e-9)
    q = torch.tensor([0.3, 0.2, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = schedules.project(q, 10)
    assert not found.requires_grad and found.tolist() == pytest.approx([0.3, 0.35, 1.0, 0.0], abs=1e-12)
    with pytest.raises(ValueError, match=r"no end gives abar_T >= 1e-10 at start, tau, epsilon = \[0.9, 10.0, 0.0\]"):
        schedules.project(torch.tensor([0.9, 1.0, 10.0, 0.0], dtype=torch.float64), 1000, "cosine", "normalised")


def test_the_terminal_warning_names_its_numbers():
    abar = torch.tensor([1.0, 0.5, 0.04])
    with pytest.warns(UserWarning, match=r"abar_T = 0.04: x_T still holds sqrt\(abar_T\) = 0.2 of"):
        assert schedules.check_terminal(abar) is True
    assert schedules.check_terminal(torch.tensor([1.0, 0.5, schedules.TERMINAL_ABAR], dtype=torch.float64)) is False


def test_rescaling_is_affine_in_the_root():
    abar = torch.tensor([1.0, 0.64, 0.25, 0.04], dtype=torch.float64)  # roots 1, 0.8, 0.5, 0.2 -> 1, 0.775, 0.4375, 0.1
    expected = torch.tensor([1.0, 0.775, 0.4375, 0.1], dtype=torch.float64) ** 2
    torch.testing.assert_close(schedules.rescale_terminal(abar, 0.01), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedules.rescale_terminal(abar, 0.04), abar, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"last = 0.05 must lie in \(0, abar_T = 0.04\]"):
        schedules.rescale_terminal(abar, 0.05)


def test_the_terminal_warning_points_at_the_callers_line():
    with pytest.warns(UserWarning) as caught:
        schedules.check_terminal(torch.tensor([1.0, 0.04]))
    assert caught[0].filename == __file__


# ---------------------------------------------------------------- noise levels, and grids of them

SCALES = {"angle": schedules.ANGLE, "log-SNR": schedules.LOG_NSR}
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def slope_of(z, scale, ends=None):
    """Of all levels of the grid with some weights, so that nothing cancels."""
    z = z.clone().requires_grad_()
    table = schedules.grid_abar(z, scale, ends)
    return torch.autograd.grad((table * torch.arange(len(table)).double().cos()).sum(), z)[0]


def test_levels_rise_with_the_noise_and_come_back():
    abar = torch.tensor([1 - 1e-12, 0.9, 0.5, 0.1, 1e-12], dtype=torch.float64)
    for scale in SCALES.values():
        level = scale.level(abar)
        assert (level.diff() > 0).all()
        torch.testing.assert_close(scale.abar(level), abar, rtol=1e-9, atol=0)
    assert schedules.angle(torch.tensor([0.5])).item() == pytest.approx(math.pi / 4, abs=1e-15)
    torch.testing.assert_close(schedules.angle(abar[1:4]), torch.arccos(abar[1:4].sqrt()), rtol=0, atol=1e-15)
    torch.testing.assert_close(schedules.LOG_NSR.level(abar[1:4]), -schedules.log_snr(abar[1:4]) / 4, rtol=0, atol=0)
    # near abar = 1 arccos has lost half its digits, and the angle none: tan^2 = (1 - abar)/abar
    near = 1 - torch.tensor([1e-6, 1e-12, 1e-15], dtype=torch.float64)
    torch.testing.assert_close(schedules.angle(near).tan().square(), (1 - near) / near, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_levels_and_their_slopes_are_finite_also_at_both_ends(scale):
    abar = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    level = scale.level(abar)
    assert torch.isfinite(level).all() and (level.diff() > 0).all()
    (slope,) = torch.autograd.grad(level.sum(), abar)
    assert torch.isfinite(slope).all() and slope[1] < 0
    assert schedules.angle(abar.detach()).tolist() == pytest.approx([0.0, math.pi / 4, math.pi / 2], abs=1e-12)


def test_a_grid_cuts_its_range_in_proportion():
    z = torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    level = schedules.angle(schedules.grid_abar(z)[1:])
    torch.testing.assert_close(level, torch.tensor([0.1, 0.3, 0.6]).double() * math.pi / 2, rtol=1e-3, atol=0)
    ell = schedules.LOG_NSR.level(schedules.grid_abar(z, schedules.LOG_NSR, (-2.0, 3.0))[1:])
    torch.testing.assert_close(ell, -2 + 5 * torch.tensor([0.1, 0.3, 0.6]).double(), rtol=1e-3, atol=0)
    assert schedules.grid_abar(torch.zeros(2))[0] == 1 and schedules.grid_abar(torch.zeros(2)).dtype == torch.float64
    torch.testing.assert_close(schedules.grid_abar(torch.zeros(2)), torch.tensor([1.0, 0.5]).double())  # one step


@given(z=st.lists(FINITE, min_size=2, max_size=60), name=st.sampled_from(sorted(SCALES)))
@settings(max_examples=300, deadline=None)
def test_any_increments_give_a_strictly_monotone_grid_with_finite_slopes(z, name):
    scale, z = SCALES[name], torch.tensor(z, dtype=torch.float64)
    for ends in (None, (scale.ends[0] + 0.05, scale.ends[1] - 0.05)):
        table = schedules.grid_abar(z, scale, ends)
        assert table[0] == 1 and (table.diff() < 0).all() and 0 < table[-1] and torch.isfinite(table).all()
        samplers.check_grid(range(len(z) - 1, 0, -1), table)
        low, high = ends or scale.ends
        level = scale.level(table[1:])
        assert (level >= low - 1e-9).all() and (level <= high + 1e-9).all()
        assert torch.isfinite(slope_of(z, scale, ends)).all()


@given(z=st.lists(st.floats(-6, 6), min_size=2, max_size=30), name=st.sampled_from(sorted(SCALES)))
@settings(max_examples=100, deadline=None)
def test_increments_come_back_from_their_grid(z, name):
    z = torch.tensor(z, dtype=torch.float64)
    z = z - z.mean()
    ends = (SCALES[name].ends[0] + 0.1, SCALES[name].ends[1] - 0.1)
    table = schedules.grid_abar(z, SCALES[name], ends)
    back = schedules.grid_increments(table, SCALES[name], ends)
    torch.testing.assert_close(schedules.grid_abar(back, SCALES[name], ends), table, rtol=0, atol=1e-6)
    wide = z.softmax(0).min() > 2e-3  # else the floor has a share in it
    assert not wide or (back - z).abs().max() < 1e-4


def test_slopes_of_a_grid_are_derivatives_in_both_modes():
    z = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, h = torch.arange(6).double().cos(), 1e-6 * torch.eye(6, dtype=torch.float64)
    for scale in SCALES.values():
        wanted = [(schedules.grid_abar(z + v, scale) - schedules.grid_abar(z - v, scale)) @ weights / 2e-6 for v in h]
        torch.testing.assert_close(slope_of(z, scale), torch.stack(wanted), rtol=1e-5, atol=1e-9)
        forward = torch.func.jacfwd(lambda z, scale=scale: schedules.grid_abar(z, scale))(z).T @ weights
        torch.testing.assert_close(forward, slope_of(z, scale), rtol=1e-10, atol=1e-14)


def test_a_grid_starts_anywhere_within_its_range_and_nowhere_else():
    abar = schedules.abar(Q["cosine"] - torch.tensor([0.0, 0.05, 0.0, 0.0]), 200)
    grid = abar[[0, *reversed(samplers.timesteps(200, 10))]]
    z = schedules.grid_increments(grid)
    assert z.shape == (11,) and abs(z.mean().item()) < 1e-12
    torch.testing.assert_close(schedules.grid_abar(z), grid, rtol=0, atol=1e-12)
    seen = tuple(schedules.angle(grid[[1, -1]]).tolist())  # both end levels are at an end: they start just inside
    inside = schedules.grid_abar(schedules.grid_increments(grid, ends=seen), ends=seen)
    assert 0 < (schedules.angle(inside[1:]) - schedules.angle(grid[1:])).abs().max() < 1e-3
    for wrong, said in (
        (grid[[0, 2, 2, 5]], "the angle goes from 0.3.* to 0.3.* at level 2, but must rise strictly within"),
        (grid[[0, 3, 10]], r"at level 3, but must rise strictly within \(0.1, 1.4\): drop .*, or clamp abar"),
        (grid[[0, 1, 10]], "the angle goes from 0.2 to 0.1.* at level 1, but must rise strictly within"),
    ):
        ends = (0.1, 1.4) if "0.1, 1.4" in said else (0.2, 1.5) if "level 1" in said else None
        with pytest.raises(ValueError, match=said):
            schedules.grid_increments(wrong, ends=ends)
    with pytest.raises(ValueError, match="abar must fall"):
        schedules.grid_increments(torch.tensor([1.0, 0.5, 0.7]))
    for ends in ((-0.1, 1.0), (1.0, 1.0), (0.5, 0.2), (0.0, 1.6), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must rise within .*the range of the scale 'angle'"):
            schedules.grid_abar(torch.zeros(3), ends=ends)
    for z in (torch.zeros(1), torch.zeros(2, 2), torch.tensor([0.0, float("inf")]), torch.tensor([0.0, float("nan")])):
        with pytest.raises(ValueError, match=r"must be \(N\+1,\) finite numbers for a grid of N >= 1 levels"):
            schedules.grid_abar(z)
