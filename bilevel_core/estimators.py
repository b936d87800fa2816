"""Estimators of the upper-level gradient: pure functions, inputs in, (grad, info) out."""

import torch
from torch import Tensor


def penalty_grad(problem: object, x: Tensor, p_star: object, p_gamma: object, gamma: float) -> tuple[Tensor, dict]:
    """grad L_gamma(x) = d_x f(x, p_gamma) + gamma (d_x g(x, p_gamma) - d_x g(x, p_star)), with p held fixed.

    problem  an `algorithms.BilevelProblem`: f and g, differentiable in x
    x        any shape;  p_star, p_gamma: its two lower-level solutions at x;  gamma > 0
    Returns grad (shape of x) and info: "f" at p_gamma and "gap" = g(x, p_gamma) - g(x, p_star) >= 0, as floats. By
    Danskin's theorem no derivative of p_star or p_gamma is needed.
    """
    x = x.detach().requires_grad_()
    f = problem.f(x, p_gamma)
    gap = problem.g(x, p_gamma) - problem.g(x, p_star)
    (grad,) = torch.autograd.grad(f + gamma * gap, x)
    return grad, {"f": f.item(), "gap": gap.item()}
