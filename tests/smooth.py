"""A smooth denoiser, a smooth reward and some noise of two coordinates, for tests of what guides."""

import torch


def crooked(x, t):
    """Any smooth denoiser."""
    return torch.tanh(x + 0.01 * t) * 0.7 + 0.1 * x.flip(1)


def bumpy(x):
    """Any smooth reward, (B,)."""
    return torch.sin(2 * x).sum(1) - x[:, 0] * x[:, 1] ** 2


def some_x(n=7, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
