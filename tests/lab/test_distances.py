"""Differentiable distances: closed forms for Gaussians, torchmetrics on the same features, finite differences."""

import pytest
import torch

from bilevel_core.lab import distances, metrics


def features(n, d, seed, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    return shift + scale * torch.randn(n, d, generator=g, dtype=torch.float64) @ mix


def test_closed_form_where_covariances_commute():
    a, b = torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([1.0, 2.5, 0.1]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    turn = torch.linalg.qr(features(3, 3, 0))[0]
    found = distances.frechet(
        (mean, turn @ torch.diag(a) @ turn.T), (torch.zeros(3), turn @ torch.diag(b) @ turn.T), ridge=0.0
    )
    assert found.item() == pytest.approx((mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item(), rel=1e-12)


def test_agrees_with_torchmetrics():
    a, b = features(400, 16, 1), features(500, 16, 2, shift=0.3)
    ours = distances.frechet(distances.moments(a), distances.moments(b), ridge=0.0).item()
    assert ours == pytest.approx(metrics.frechet(a, b), rel=1e-6)
    size = 400
    ours = distances.kernel(a, b[:size]).item()
    assert ours == pytest.approx(metrics.kid(a, b[:size], subsets=2, subset_size=size)[0], rel=1e-6)


def test_symmetric_zero_at_home_and_positive_elsewhere():
    a, b = (distances.moments(features(300, 6, seed)) for seed in (1, 2))
    assert distances.frechet(a, b).item() == pytest.approx(distances.frechet(b, a).item(), rel=1e-5)
    assert abs(distances.frechet(a, a).item()) < 1e-9 < distances.frechet(a, b).item()


@pytest.mark.parametrize("n", [12, 3])  # with 3 samples in 4 dimensions the covariance is singular
def test_gradients_are_those_of_finite_differences(n):
    x, target = features(n, 4, 3).requires_grad_(), distances.moments(features(50, 4, 4))
    assert torch.autograd.gradcheck(lambda x: distances.frechet(distances.moments(x), target, ridge=1e-3), x)
    assert torch.autograd.gradcheck(lambda x: distances.kernel(x, features(9, 4, 5)), x)
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(
        lambda x: distances.frechet(distances.moments(x), target, ridge=1e-3), (x.detach(),), (tangent,)
    )
    (reverse,) = torch.autograd.grad(distances.frechet(distances.moments(x), target, ridge=1e-3), x)
    assert forward.item() == pytest.approx((reverse * tangent).sum().item(), rel=1e-8)


def test_kernel_distance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    draws = [distances.kernel(*torch.randn(2, 15, 3, generator=g)) for _ in range(400)]
    found = torch.stack(draws)
    assert abs(found.mean()) < 4 * found.std() / 20 and (found < 0).any()


def test_few_samples_are_biased_upwards():
    """The reason why a distance of 36 samples cannot steer: at d = 64 it is far above zero for equal laws."""
    g = torch.Generator().manual_seed(0)
    reference = torch.zeros(64), torch.eye(64)
    means = [
        torch.stack(
            [distances.frechet(distances.moments(torch.randn(n, 64, generator=g)), reference) for _ in range(5)]
        )
        for n in (36, 1000)
    ]
    assert means[0].mean() > 20 * means[1].mean() > 0


def test_bad_input():
    good = distances.moments(features(10, 3, 0))
    for bad in (torch.zeros(1, 3), torch.zeros(0, 3), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"they must be \(n, d\) with n >= 2"):
            distances.moments(bad)
    with pytest.raises(ValueError, match="NaN or infinity"):
        distances.moments(torch.full((4, 2), float("nan")))
    with pytest.raises(ValueError, match="with one d"):
        distances.frechet(good, distances.moments(features(10, 4, 0)))
    with pytest.raises(ValueError, match="share d"):
        distances.kernel(features(5, 3, 0), features(5, 4, 0))
    with pytest.raises(ValueError, match="with n >= 2"):
        distances.kernel(features(5, 3, 0), features(1, 3, 0))
