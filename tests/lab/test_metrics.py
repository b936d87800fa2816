"""Fréchet distance, KID, classifier score and intervals against closed forms."""

import math

import pytest
import torch
from scipy import linalg, stats

from bilevel_core.lab import metrics


def with_moments(mean, covariance, n, seed=0):
    """n samples whose sample mean and covariance are exactly the given ones."""
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (n - 1)).T)
    return mean + z @ torch.linalg.cholesky(covariance).T


def spd(d, seed):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize(("d", "shift"), [(1, 0.0), (3, 2.0), (8, -0.5)])
def test_frechet_of_gaussians_in_closed_form(d, shift):
    covariance_a, covariance_b = spd(d, 1), spd(d, 2)  # they do not commute
    mean_a, mean_b = torch.zeros(d, dtype=torch.float64), torch.full((d,), shift, dtype=torch.float64)
    root = torch.as_tensor(linalg.sqrtm((covariance_a @ covariance_b).numpy()).real)
    expected = d * shift**2 + torch.trace(covariance_a + covariance_b - 2 * root).item()
    a, b = with_moments(mean_a, covariance_a, 50), with_moments(mean_b, covariance_b, 70, seed=1)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_computed_in_float64():
    """Features far from 0: in float32 the covariance would drown in rounding."""
    eye = torch.eye(2, dtype=torch.float64)
    a = with_moments(torch.full((2,), 3000.0, dtype=torch.float64), eye, 2500)
    b = with_moments(torch.full((2,), 3000.0, dtype=torch.float64), 4 * eye, 2500, seed=1)
    assert metrics.frechet(a, b) == pytest.approx(2.0, rel=1e-6)


def test_too_few_samples_are_refused_with_the_reason():
    few, many = torch.randn(36, 64), torch.randn(500, 64)
    message = r"n = 36 .*rank at most 35.*O\(1/n\).*at least 128"
    for pair in ((few, many), (many, few)):
        with pytest.raises(ValueError, match=message):
            metrics.frechet(*pair)
    with pytest.raises(ValueError, match=r"n = 100 .*hardly determined"):
        metrics.frechet(many, many[:100])
    assert metrics.frechet(few, many, force=True) > 10  # the true distance is 0: this is why


def test_frechet_bias_falls_like_one_over_n():
    generator = torch.Generator().manual_seed(0)
    bias = [
        metrics.frechet(torch.randn(n, 16, generator=generator), torch.randn(50_000, 16, generator=generator))
        for n in (200, 2000)
    ]
    assert bias[0] > 5 * bias[1] > 0


def test_broken_features_are_refused():
    good = torch.randn(100, 4)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.frechet(good, good / 0)
    with pytest.raises(ValueError, match=r"not \(n, 4\)"):
        metrics.frechet(good, good[:, :3])
    with pytest.raises(ValueError, match=r"not \(n, d\)"):
        metrics.kid(good[0], good)


def test_images_with_a_network_equal_their_features():
    images = torch.rand(300, 1, 4, 4), torch.rand(200, 1, 4, 4) ** 2
    weight = torch.randn(16, 5)

    def extract(x):
        return x.flatten(1) @ weight

    network = metrics.FeatureNetwork(5, extract)
    features = [extract(x) for x in images]
    assert metrics.frechet_of_images(*images, network, batch_size=64) == pytest.approx(
        metrics.frechet(*features), rel=1e-4
    )
    first = metrics.kid_of_images(*images, network, subsets=5, batch_size=64)
    assert first == pytest.approx(metrics.kid(*features, subsets=5), rel=1e-4)


def test_kid_is_unbiased():
    """Over many pairs of small samples of one law the mean is 0 within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            metrics.kid(*torch.randn(2, 40, 3, generator=generator, dtype=torch.float64), subsets=1)[0]
            for _ in range(150)
        ]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()


def test_kid_against_its_kernel_written_out():
    a, b = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64) + 1

    def kernel(x, y):
        return (x @ y.T / 2 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.trace()) / 30

    expected = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()
    value, spread = metrics.kid(a, b, subsets=3)
    assert value == pytest.approx(expected.item(), rel=1e-9) and spread == pytest.approx(0, abs=1e-9)


def test_kid_repeats_and_leaves_the_global_generator_alone():
    a, b = torch.randn(2, 60, 3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert metrics.kid(a, b, subset_size=20, seed=4) == metrics.kid(a, b, subset_size=20, seed=4)
    assert torch.equal(torch.rand(3), expected)


def test_classifier_score():
    sure = 100 * torch.eye(10)
    assert metrics.classifier_score(sure) == pytest.approx(10)
    assert metrics.classifier_score(sure[:1].repeat(5, 1)) == pytest.approx(1)
    assert metrics.classifier_score(torch.zeros(7, 10)) == pytest.approx(1)
    p = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=torch.float64)
    expected = math.exp(sum(stats.entropy(row, p.mean(0).numpy()) for row in p.numpy()) / 2)
    assert metrics.classifier_score(p.log()) == pytest.approx(expected)


def test_t_interval_of_five_seeds():
    mean, lo, hi = metrics.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (mean, lo, hi) == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-6)
    values = [0.3, -1.2, 4.0]
    expected = stats.t.interval(0.9, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert metrics.t_interval(values, level=0.9)[1:] == pytest.approx(expected)
    for bad in ([1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="at least two finite values"):
            metrics.t_interval(bad)


def test_a_score_of_nothing_or_of_what_is_not_finite_is_refused():
    for shape in ((0, 10), (5, 0), (10,)):
        with pytest.raises(ValueError, match=f"logits have shape .{shape[0]},.*at least one of each"):
            metrics.classifier_score(torch.zeros(shape))
    for bad in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(3, 4)
        logits[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity for 1 of 3 samples"):
            metrics.classifier_score(logits)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match=f"level = {level} must lie within"):
            metrics.t_interval([1.0, 2.0], level)
