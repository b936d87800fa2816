"""Chapter 9: several strengths at once, one for each reward: learned under a limit on KL, and the front they span."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import algorithms


class Strengths:
    """Learning strengths beta (m,) of lower rewards, of either sign, as Algorithm 1 sees it, on samples of p_0.

    f(beta, p) = -E_p r_up + kappa KL(p || p_0),   g(beta, p) = -sum_j beta_j E_p r_j + KL(p || p_0)
    r_up (n,), r_low (m, n);  kappa >= 0: the price of a nat;  log_w (n,): of samples that stand for p_0 by weights, as
    those of `estimators.pool`. A law p is a vector of log-probabilities (n,). Where all beta_j are positive,
    lam_j = 1/beta_j are entropy strengths.
    """

    def __init__(self, r_up: Tensor, r_low: Tensor, kappa: float = 0.0, log_w: Tensor | None = None):
        if r_low.dim() != 2 or r_low.shape[1:] != r_up.shape or not kappa >= 0:
            raise ValueError(
                f"r_up (n,), r_low (m, n), kappa >= 0 are {tuple(r_up.shape)}, {tuple(r_low.shape)}, {kappa}"
            )
        self.r_up, self.r_low, self.kappa = r_up.double(), r_low.double(), kappa
        self.log_w = (torch.zeros_like(self.r_up) if log_w is None else log_w.double()).log_softmax(0)

    def kl(self, p: Tensor) -> Tensor:
        return (p.exp() * (p - self.log_w)).sum()

    def f(self, beta: Tensor, p: Tensor) -> Tensor:
        return -p.exp() @ self.r_up + self.kappa * self.kl(p)

    def g(self, beta: Tensor, p: Tensor) -> Tensor:
        return -beta @ (self.r_low @ p.exp()) + self.kl(p)

    def solve_star(self, beta: Tensor, warm: Tensor | None = None) -> Tensor:
        return (self.log_w + beta @ self.r_low).log_softmax(0)

    def solve_gamma(self, beta: Tensor, gamma: float, warm: Tensor | None = None) -> Tensor:
        """argmin f/gamma + g: again a tilt, by (sum beta_j r_j + r_up/gamma)/(1 + kappa/gamma)."""
        h = (beta @ self.r_low + self.r_up / gamma) / (1 + self.kappa / gamma)
        return (self.log_w + h).log_softmax(0)

    def hypergrad(self, beta: Tensor) -> Tensor:
        """-Cov_{p_star}(r_up - kappa h, r_j), (m,), with h = sum_j beta_j r_j: the limit of the penalty gradient."""
        p = self.solve_star(beta).exp()
        centred = self.r_low - (self.r_low @ p)[:, None]
        return -centred @ (p * (self.r_up - self.kappa * beta @ self.r_low))

    def fisher(self, beta: Tensor) -> Tensor:
        """Cov_{p_star}(r_i, r_j), (m, m)."""
        p = self.solve_star(beta).exp()
        centred = self.r_low - (self.r_low @ p)[:, None]
        return (centred * p) @ centred.T

    def worth(self, beta: Tensor) -> dict[str, float]:
        """E r_up, KL, ESS of the tilt at beta, and "J" = -f."""
        p = self.solve_star(beta)
        up, kl = (p.exp() @ self.r_up).item(), self.kl(p).item()
        return {"up": up, "kl": kl, "ess": 1 / p.exp().square().sum().item(), "J": up - self.kappa * kl}


def learn_strengths(problem: Strengths, gamma: float = 1e4, steps: int = 60) -> tuple[Tensor, list[Tensor]]:
    """beta by Algorithm 1 from 0, its steps preconditioned by kappa times the Fisher information; and the path."""

    def step(k: int, grad: Tensor) -> Tensor:
        ridge = 1e-3 * torch.eye(len(grad), dtype=torch.float64)
        return 0.5 * torch.linalg.solve(problem.fisher(path[-1]) + ridge, grad) / problem.kappa

    path = [torch.zeros(len(problem.r_low), dtype=torch.float64)]
    for record in algorithms.penalty_descent(problem, path[0], gamma=gamma, step=step, steps=steps):
        path.append(record.x_next)
    return path[-1], path


def front(r_up: Tensor, r: Tensor, budgets: Sequence[float], angles: Sequence[float]) -> list[list[dict]]:
    """Laws p_0 exp(s (cos(angle) r_1 + sin(angle) r_2)) with KL from p_0 equal to a budget: a row of points a budget.

    r (2, n) of samples of p_0. Each point: "angle", "s", the means "r1", "r2", "up", the last with its standard error
    "se", "kl" and "ess". With angles from 0 to pi/2 these are the laws that no other beats in E r_1, E r_2 and KL.
    """
    rows: list[list[dict]] = [[] for _ in budgets]
    for angle in angles:
        h = math.cos(angle) * r[0].double() + math.sin(angle) * r[1].double()
        for row, budget in zip(rows, budgets, strict=True):
            s = math.sqrt(2 * budget) / h.std().item()  # KL = s^2 Var(h)/2 for a weak tilt
            for _ in range(30):  # Newton's method: dKL/ds = s Var(h) under the tilt
                p, kl, ess = _tilt(s * h)
                if abs(kl - budget) < 1e-10:
                    break
                spread = (p @ h.square() - (p @ h) ** 2).item()
                s = min(max(s - (kl - budget) / (s * spread), s / 3), 3 * s)
            means = {"r1": r[0].double(), "r2": r[1].double(), "up": r_up.double()}
            point = {"angle": angle, "s": s} | {name: (p @ values).item() for name, values in means.items()}
            se = (p * (r_up.double() - point["up"])).norm().item()
            row.append(point | {"se": se, "kl": kl, "ess": ess})
    return rows


def _tilt(h: Tensor) -> tuple[Tensor, float, float]:
    log_p = h.log_softmax(0)
    p = log_p.exp()
    return p, (p @ (log_p + math.log(len(p)))).item(), 1 / p.square().sum().item()
