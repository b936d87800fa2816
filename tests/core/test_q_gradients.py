"""Estimators of the gradient in q on the linear-Gaussian oracle: exact values, unbiasedness, agreement of modes."""

import math

import pytest
import torch

from bilevel_core import estimators, samplers
from bilevel_core.lab import comparisons, distances, oracles
from bilevel_core.seeds import derive_seed

ORACLE = oracles.LinearGaussianSchedule()
Q = torch.tensor([0.05, 0.9, 1.2, 0.02], dtype=torch.float64)
A = ORACLE.solve_star(Q).detach()


def exact(q, seed=0):
    return ORACLE.f(q, A)


def sampled(q, seed, n=32, **options):
    """The Frechet distance of n samples of the oracle's DDIM chain, by the package's sampler."""
    abar = ORACLE.abar(q)
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = samplers.sample_ddim(lambda x, t: A[t - 1] * x, x, abar, ORACLE.ts, **options)
    target = torch.zeros(1), torch.full((1, 1), ORACLE.s**2)
    return distances.frechet(distances.moments(x), target, ridge=1e-9)


def truth(f=exact, seed=0):
    q = Q.clone().requires_grad_()
    return torch.autograd.grad(f(q, seed), q)[0]


def test_coordinates_forward_and_reverse_are_exact():
    for f, seed in ((exact, 0), (sampled, 3)):
        grad = truth(f, seed)
        for found in (
            estimators.q_grad_coordinates(f, Q, seed=seed, delta=1e-5)[0],
            estimators.q_grad_forward(f, Q, seed=seed)[0],
            estimators.q_grad_reverse(f, Q, seed=seed)[0],
        ):
            torch.testing.assert_close(found, grad, atol=1e-8, rtol=1e-6)


def test_a_sampled_gradient_has_the_mean_of_the_exact_one():
    """As n grows the Frechet distance of samples tends to (|G| - s)^2, and so does its pathwise gradient."""
    found = torch.stack([estimators.q_grad_forward(lambda q, s: sampled(q, s, 4000), Q, seed=s)[0] for s in range(30)])
    error = found.std(0) / 30**0.5
    assert ((found.mean(0) - truth()).abs() < 4 * error + 0.02 * truth().abs()).all()


@pytest.mark.parametrize("common", [True, False])
def test_random_directions_are_unbiased(common):
    options = {"delta": 1e-3, "directions": 1000, "common": common}
    grad, info = estimators.q_grad_two_point(exact, Q, seed=1, **options)
    assert ((grad - truth()).abs() < 4 * info["se"]).all() and info["calls"] == 2000
    assert info["f"] == pytest.approx(exact(Q).item(), rel=0.05)


def test_lengths_by_coordinate_keep_the_estimate_unbiased():
    grad, info = estimators.q_grad_two_point(
        exact, Q, seed=2, delta=torch.tensor([1e-3, 2e-3, 5e-3, 1e-4]).double(), directions=1000
    )
    assert ((grad - truth()).abs() < 4 * info["se"]).all()


def test_one_direction_is_never_precise_and_coordinates_are():
    draws = torch.stack([estimators.q_grad_two_point(exact, Q, seed=s, delta=1e-3)[0] for s in range(400)])
    assert (draws.mean(0).abs() / draws.std(0) < 0.85).all()


def test_common_random_numbers_decide():
    spread = {}
    for common in (True, False):
        draws = [estimators.q_grad_coordinates(sampled, Q, seed=100 * s, common=common)[0] for s in range(50)]
        spread[common] = torch.stack(draws).std(0)
    assert (spread[False] > 5 * spread[True]).all()


def test_one_point_is_unbiased_whatever_it_is_centred_on():
    for previous in (exact(Q).item(), 0.01):
        draws = torch.stack(
            [comparisons.q_grad_one_point(exact, Q, previous, seed=s, delta=1e-3)[0] for s in range(3000)]
        )
        error = draws.std(0) / 3000**0.5
        assert ((draws.mean(0) - truth()).abs() < 4 * error).all()
    _, info = comparisons.q_grad_one_point(exact, Q, 0.0, seed=1)
    assert info["calls"] == 1 and math.isfinite(info["f"])


def test_truncation_is_biased_and_checkpoints_change_nothing():
    steps = len(ORACLE.ts)
    whole = truth(sampled, 3)

    def cut(k, **options):
        f = lambda q, seed: sampled(q, seed, grad_steps=k, **options)  # noqa: E731
        return estimators.q_grad_reverse(f, Q, seed=3)[0]

    torch.testing.assert_close(cut(steps), whole)
    torch.testing.assert_close(cut(steps + 5), whole)
    assert (cut(2) - whole).abs().max() > 1e-3 * whole.abs().max()

    weight = A.clone().requires_grad_()

    def loss(**options):
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = samplers.sample_ddim(lambda x, t: weight[t - 1] * x, x, ORACLE.abar(Q), ORACLE.ts, **options)
        return torch.autograd.grad(x.square().sum(), weight)[0]

    torch.testing.assert_close(loss(checkpoint=True), loss())
    truncated = loss(grad_steps=3, checkpoint=True)
    assert truncated.count_nonzero() == 3 and torch.equal(truncated[:15].nonzero(), loss()[:15].nonzero())


def test_penalty_gradient_by_gamma_is_the_published_table():
    q = torch.tensor([0.0, 1.0, 1.0, 0.008], dtype=torch.float64)
    rows = {1e4: (0.0011, -0.0168, -0.0005, 0.0011), 1e8: (0.0233, 0.0072, 0.0038, 0.0231)}
    for gamma, row in rows.items():
        star, tilted = ORACLE.solve_star(q).detach(), ORACLE.solve_gamma(q, gamma)
        grad, _ = estimators.penalty_grad(ORACLE, q, star, tilted, gamma)
        torch.testing.assert_close(grad, torch.tensor(row, dtype=torch.float64), atol=6e-5, rtol=0)


def test_bad_input():
    for estimate in (estimators.q_grad_two_point, estimators.q_grad_coordinates):
        for delta in (0.0, -1.0, math.nan, torch.ones(3)):
            with pytest.raises(ValueError, match=r"delta = .* must be positive, one number or one for each of 4"):
                estimate(exact, Q, seed=0, delta=delta)
        with pytest.raises(FloatingPointError, match=r"f = nan at q = .*: lower delta, or project q with a margin"):
            estimate(lambda q, seed: q.sum() * math.nan, Q, seed=0)
    with pytest.raises(ValueError, match="directions = 0 must be at least 1"):
        estimators.q_grad_two_point(exact, Q, seed=0, directions=0)
    with pytest.raises(ValueError, match="previous = nan must be finite"):
        comparisons.q_grad_one_point(exact, Q, math.nan, seed=0)
    with pytest.raises(ValueError, match="grad_steps = 0 must be at least 1"):
        sampled(Q, 0, grad_steps=0)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_forward_mode_takes_plain_attention_and_gives_back_the_fast_one():
    """Fused attention, for which torch has no tangent: on a CPU where keys need a gradient or there is no mask."""
    key = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def f(q, seed):
        x = q[0].float() * key + q[1].float()
        return torch.nn.functional.scaled_dot_product_attention(x, key, x * x).square().mean().double()

    with pytest.raises(NotImplementedError):  # else torch has learned it, and the plain kernels can go
        torch.func.jvp(lambda q: f(q, 0), (Q,), (torch.ones_like(Q),))
    forward, reverse = estimators.q_grad_forward(f, Q, seed=0)[0], estimators.q_grad_reverse(f, Q, seed=0)[0]
    torch.testing.assert_close(forward, reverse, rtol=1e-4, atol=1e-6)
    heads = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)

    def g(q, seed):
        x = q[0].float() * key[0].detach() + q[1].float()
        return heads(x, x, x)[0].square().mean().double()

    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        forward, reverse = estimators.q_grad_forward(g, Q, seed=0)[0], estimators.q_grad_reverse(g, Q, seed=0)[0]
        torch.testing.assert_close(forward, reverse, rtol=1e-4, atol=1e-6)
        assert torch.backends.mha.get_fastpath_enabled() == fast
    torch.backends.mha.set_fastpath_enabled(True)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_an_operation_without_forward_mode_is_named_with_the_remedy():
    def f(q, seed):
        return NoForwardMode.apply(q).sum()

    with pytest.raises(
        RuntimeError, match=r"f works, but not in forward mode \(.*\): pass estimator=estimators.q_grad_rev"
    ):
        estimators.q_grad_forward(f, Q, seed=0)
    assert torch.equal(estimators.q_grad_reverse(f, Q, seed=0)[0], torch.full_like(Q, 2.0))

    def broken(q, seed):
        return q[:3] @ torch.ones(4, dtype=q.dtype)

    def full(q, seed):
        if torch.autograd.forward_ad.unpack_dual(q).tangent is not None:
            raise torch.OutOfMemoryError("out of memory")
        return q.sum()

    with pytest.raises(RuntimeError, match="^(inconsistent tensor size|size mismatch)"):  # its own fault
        estimators.q_grad_forward(broken, Q, seed=0)
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory$"):
        estimators.q_grad_forward(full, Q, seed=0)


def test_draws_of_neighbouring_seeds_differ():
    """Without common numbers no two evaluations share a draw, whatever the seeds; the directions are apart from f's."""
    for estimate in (estimators.q_grad_two_point, estimators.q_grad_coordinates):
        f = Spy()
        for seed in (*range(50), -1, 2**32, 2**32 + 1):
            estimate(f, Q, seed=seed, common=False)
        assert len(set(f.seeds)) == len(f.seeds)
    u = [Spy(), Spy()]
    for f, seed in zip(u, (3, 3 + 2**32), strict=True):
        comparisons.q_grad_one_point(f, Q, 0.0, seed=seed)
    own = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert not torch.equal(u[0].points[0], u[1].points[0]) and not torch.allclose(u[0].points[0], Q + 0.01 * own)


# ---------------------------------------------------------------- by hand: seeds, lengths, counts


def directions(seed):
    return torch.Generator().manual_seed(derive_seed("directions", seed))


class Spy:
    """A smooth function whose noise depends on the seed alone; remembers how it was called."""

    def __init__(self):
        self.seeds, self.points, self.grads = [], [], []

    def __call__(self, q, seed):
        self.seeds.append(seed)
        self.points.append(q.detach().clone())
        self.grads.append(torch.is_grad_enabled())
        return (q**3).sum() + q[0] * q[1] + math.sin(seed)


def test_two_point_by_hand():
    f, delta = Spy(), torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)
    grad, info = estimators.q_grad_two_point(f, Q, seed=5, delta=delta, directions=3)
    g, draws, values = directions(5), [], []
    for _ in range(3):
        u = torch.randn(4, generator=g, dtype=torch.float64)
        high, low = Spy()(Q + delta * u, 5), Spy()(Q - delta * u, 5)
        draws.append((high - low) / 2 * u / delta)
        values += [high.item(), low.item()]
    draws = torch.stack(draws)
    torch.testing.assert_close(grad, draws.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(info["se"], draws.std(0) / 3**0.5, rtol=1e-12, atol=0)
    assert info["f"] == pytest.approx(sum(values) / 6, rel=1e-12) and info["calls"] == 6 == len(f.seeds)
    assert f.seeds == [5] * 6 and not any(f.grads) and set(info) == {"calls", "f", "se"}
    f = Spy()
    estimators.q_grad_two_point(f, Q, seed=5, directions=3, common=False)
    assert f.seeds == [derive_seed("f", 5, k, sign) for k in range(3) for sign in (1, -1)]
    _, info = estimators.q_grad_two_point(Spy(), Q, seed=5, delta=delta, directions=2)
    torch.testing.assert_close(info["se"], draws[:2].std(0) / 2**0.5, rtol=1e-12, atol=0)
    f = Spy()  # what is left out: one direction, at distance 0.01, with common numbers
    grad, info = estimators.q_grad_two_point(f, Q, seed=6)
    explicit, _ = estimators.q_grad_two_point(Spy(), Q, seed=6, delta=0.01, directions=1, common=True)
    assert torch.equal(grad, explicit) and info["se"] is None and info["calls"] == 2 and f.seeds == [6, 6]
    u = torch.randn(4, generator=directions(6), dtype=torch.float64)
    torch.testing.assert_close(f.points[0], Q + 0.01 * u, rtol=0, atol=1e-14)


def test_one_point_by_hand():
    delta = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)
    u = torch.randn(4, generator=directions(5), dtype=torch.float64)
    for f_seed, used in ((None, 5), (0, 0), (9, 9)):
        f = Spy()
        grad, info = comparisons.q_grad_one_point(f, Q, 2.0, seed=5, delta=delta, f_seed=f_seed)
        value = Spy()(Q + delta * u, used)
        torch.testing.assert_close(grad, (value - 2.0) * u / delta, rtol=1e-12, atol=0)
        assert info == {"calls": 1, "f": value.item(), "se": None} and f.seeds == [used]
    f = Spy()
    comparisons.q_grad_one_point(f, Q, 2.0, seed=5)
    torch.testing.assert_close(f.points[0], Q + 0.01 * u, rtol=0, atol=1e-14)


def test_coordinates_by_hand():
    f, delta = Spy(), torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)
    grad, info = estimators.q_grad_coordinates(f, Q, seed=5, delta=delta)
    slope = 3 * Q**2 + delta**2 + torch.stack([Q[1], Q[0], 0 * Q[2], 0 * Q[3]])  # of a cubic: delta^2 is all the error
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-12)
    middle = Spy()(Q, 5) + (3 * Q * delta**2).sum() / 4  # the odd powers cancel
    assert info["f"] == pytest.approx(middle.item(), rel=1e-12)
    assert (info["calls"], info["se"], set(info)) == (8, None, {"calls", "f", "se"})
    assert f.seeds == [5] * 8 and not any(f.grads)
    f = Spy()
    estimators.q_grad_coordinates(f, Q, seed=5, common=False)
    assert f.seeds == [derive_seed("f", 5, i, sign) for i in range(4) for sign in (1, -1)]
    f = Spy()
    estimators.q_grad_coordinates(f, Q, seed=5)
    torch.testing.assert_close(f.points[1][0], Q[0] - 0.01, rtol=0, atol=1e-14)


def test_pathwise_modes_report_what_they_did():
    q = Q.clone().requires_grad_()
    value = Spy()(Q, 5).item()
    for estimate, calls in ((estimators.q_grad_forward, 5), (estimators.q_grad_reverse, 2)):
        f = Spy()
        grad, info = estimate(f, q, seed=5)
        assert info == {"calls": calls, "f": pytest.approx(value, rel=1e-12), "se": None}
        assert set(f.seeds) == {5} and not grad.requires_grad and grad.dtype == torch.float64
        assert grad.device == Q.device and q.grad is None
    assert estimators.q_grad_forward(lambda q, seed: q.float().sum(), Q.float(), seed=0)[0].dtype == torch.float32


def test_penalty_gradient_reports_both_objectives():
    q = torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64)
    star, tilted = ORACLE.solve_star(q).detach(), ORACLE.solve_gamma(q, 50.0)
    _, info = estimators.penalty_grad(ORACLE, q, star, tilted, 50.0)
    gap = (ORACLE.g(q, tilted) - ORACLE.g(q, star)).item()
    assert info == {"f": pytest.approx(ORACLE.f(q, tilted).item()), "gap": pytest.approx(gap)} and gap > 0
