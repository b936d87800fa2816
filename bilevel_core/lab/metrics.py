"""Measures of samples: Fréchet distance, KID (both through torchmetrics), classifier score, intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    mean: float
    lo: float
    hi: float


class FeatureNetwork(nn.Module):
    """What torchmetrics asks for: images (n, ...) -> features (n, num_features), here in float64.

    extract  function of a batch of images, such as `classifier.features`; None: the images are the features
    """

    def __init__(self, num_features: int, extract: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.num_features, self.extract = num_features, extract

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = (self.extract(images) if self.extract else images).double()
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features have shape {tuple(features.shape)}, not (n, {self.num_features})")
        if not features.isfinite().all():
            raise ValueError("features contain NaN or infinity: look at the samples before measuring them")
        return features


def frechet(features_a: Tensor, features_b: Tensor, *, force: bool = False) -> float:
    """Fréchet distance |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, d) and (m, d), in float64.

    Biased upwards by O(1/n): compare at equal n and equal reference size only, and report with n >= 5,000.
    Raises ValueError where n or m is below 2 d (force=True computes all the same), or the features are not finite.
    """
    return frechet_of_images(features_a, features_b, _identity(features_a), force=force)


def frechet_of_images(
    images_a: Tensor, images_b: Tensor, network: FeatureNetwork, *, force: bool = False, batch_size: int = 1000
) -> float:
    """`frechet` of the features that `network` gives to images (n, ...) and (m, ...)."""
    if not force:
        for n in (len(images_a), len(images_b)):
            _refuse_few(n, network.num_features)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=network).to(images_a.device)
    return float(_feed(metric, images_a, images_b, batch_size).compute())


def kid(
    features_a: Tensor, features_b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (KID, cubic kernel) of features (n, d) and (m, d), in float64: mean and spread over subsets.

    Unbiased at any n, so it may be negative. The spread (standard deviation over random subsets) is not a
    confidence interval. subset_size is lowered to the number of samples where there are fewer.
    """
    network = _identity(features_a)
    return kid_of_images(features_a, features_b, network, subsets=subsets, subset_size=subset_size, seed=seed)


def kid_of_images(
    images_a: Tensor,
    images_b: Tensor,
    network: FeatureNetwork,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    batch_size: int = 1000,
) -> tuple[float, float]:
    """`kid` of the features that `network` gives to images (n, ...) and (m, ...)."""
    size = min(subset_size, len(images_a), len(images_b))
    if size < 2:
        raise ValueError("KID needs at least two samples on each side")
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        torch.manual_seed(seed)  # torchmetrics draws the subsets from the global generator
        metric = KernelInceptionDistance(feature=network, subsets=subsets, subset_size=size)
        mean, spread = _feed(metric.to(images_a.device), images_a, images_b, batch_size).compute()
    return float(mean), float(spread)


def classifier_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) over samples: the Inception Score with logits (n, classes) of a classifier.

    From 1 (all predictions alike) to the number of classes (sure and evenly spread). Raises ValueError where there are
    no samples or a logit is not finite.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, not (n, classes) with at least one of each")
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"logits contain NaN or infinity for {bad} of {len(logits)} samples: look at those samples")
    log_p = logits.double().log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item()


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent values (one per training seed, say) with Student's t interval for its expectation.

    level  of confidence, within (0, 1). Raises ValueError where it is not, or below two finite values.
    """
    from scipy import stats

    if not 0 < level < 1:
        raise ValueError(f"level = {level} must lie within (0, 1), such as 0.95")
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.ndim != 1 or len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"an interval needs at least two finite values, not {values!r}")
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * x.std().item() / math.sqrt(len(x))
    return Interval(x.mean().item(), x.mean().item() - half, x.mean().item() + half)


def _identity(features: Tensor) -> FeatureNetwork:
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}, not (n, d)")
    return FeatureNetwork(features.shape[1])


def _feed(metric: nn.Module, images_a: Tensor, images_b: Tensor, batch_size: int) -> nn.Module:
    for images, real in ((images_a, True), (images_b, False)):
        for batch in images.split(batch_size):
            metric.update(batch, real=real)
    return metric


def _refuse_few(n: int, dimension: int) -> None:
    if n < 2 * dimension:
        why = f"has rank at most {n - 1}" if n <= dimension else "is hardly determined"
        raise ValueError(
            f"n = {n} samples are too few for a Fréchet distance of {dimension} features: their covariance {why} "
            f"and the distance is far too large (a bias of O(1/n)). Take at least {2 * dimension} samples, and "
            "5,000 for a number to report; or KID, which is unbiased; or force=True to see it all the same"
        )
