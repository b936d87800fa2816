"""The mixture on the line with a movable upper reward: where every answer is known to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...algorithms import TiltSamples
from .. import oracles


class Shifted:
    """The mixture oracle with r_low = x and r_up = -(x - centre)^2/2, its optimum, and exact draws of every tilt."""

    def __init__(self, centre: float):
        from scipy.optimize import brentq

        self.mixture, self.centre = oracles.Mixture1D(), centre
        self.problem = self.mixture.problem(self.r_up)
        self.lam = brentq(lambda lam: self.problem.hypergrad(lam).item(), 0.05, 50.0, xtol=1e-12)

    def r_up(self, x: Tensor) -> Tensor:
        return -((x - self.centre) ** 2) / 2

    def regret(self, lam: float) -> float:
        """What lam lacks to the optimum in E r_up."""
        return (self.problem.value(min(max(lam, 0.05), 100.0)) - self.problem.value(self.lam)).item()

    def first(self, n: int, seed: int) -> TiltSamples:
        """n samples of p_0."""
        x = self.mixture.sample(n, torch.Generator().manual_seed(seed))
        return TiltSamples(self.r_up(x), x, cost=n)

    def draw(self, lam: float, n: int, seed: int) -> TiltSamples:
        """n exact samples of the tilt at lam, weighted back to p_0."""
        x = self.mixture.tilt(1 / lam).sample(n, torch.Generator().manual_seed(seed))
        log_z = self.problem.logits(lam).logsumexp(0).item()
        return TiltSamples.from_tilt(self.r_up(x), x, lam, torch.full_like(x, -math.log(n)), log_z, cost=n)
