"""Differentiable distances between sets of features: what a learned schedule minimises. float64, any device."""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), float64, differentiable.

    Raises ValueError for fewer than two rows, a wrong shape, or values that are not finite.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; they must be (n, d) with n >= 2")
    x = features.double()
    if not torch.isfinite(x).all():
        raise ValueError("features contain NaN or infinity: look at the samples, and at abar_T, before measuring them")
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], ridge: float = 1e-6) -> Tensor:
    """Frechet distance |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2) of two Gaussians, (), float64.

    a, b   (mean (d,), covariance (d, d)), as `moments` gives them; differentiable in both
    ridge  >= 0, added to both covariances in units of the mean variance of b: without it the gradient is infinite where
           a covariance is singular, as it is for fewer samples than d + 1
    The squared 2-Wasserstein distance of the Gaussians. Of samples it is biased upwards by O(1/n). Raises ValueError
    for shapes that do not fit.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ([part.double() for part in pair] for pair in (a, b))
    d = len(mean_b)
    if mean_a.shape != (d,) or cov_a.shape != (d, d) or cov_b.shape != (d, d):
        shapes = [tuple(part.shape) for part in (mean_a, cov_a, mean_b, cov_b)]
        raise ValueError(f"means and covariances have the shapes {shapes}; they must be (d,), (d, d) with one d")
    extra = ridge * cov_b.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=cov_b.device)
    cov_a, cov_b = cov_a + extra, cov_b + extra
    values, basis = torch.linalg.eigh(cov_b)
    root = basis * values.clamp(min=0).sqrt() @ basis.T
    middle = root @ cov_a @ root
    overlap = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=1e-300).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Kernel distance (squared MMD with the cubic kernel (x.y/d + 1)^3 of KID) of features (n, d) and (m, d), ().

    Unbiased at any n, so it may be negative. Differentiable in both. Raises ValueError as `moments`, or if d differs.
    """
    for x in (a, b):
        moments(x[:, :1] if x.dim() == 2 else x)  # its checks
    if a.shape[1] != b.shape[1] or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} must be finite and share d")
    a, b = a.double(), b.double()

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        gram = k(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * k(a, b).mean()
