"""Bridges to diffusers: schedules as its schedulers, and back."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import schedules

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, SchedulerMixin


def to_diffusers(abar: Tensor, scheduler: type | None = None, **options: object) -> "DDIMScheduler":
    """A diffusers scheduler with this schedule (`trained_betas`), sampling as this package does.

    abar       (T+1,), abar[0] = 1
    scheduler  a diffusers class with `trained_betas`, default DDIMScheduler
    options    passed on; the defaults are no clipping of x0_hat, abar = 1 at the end, trailing time steps
    diffusers' time step t is ours minus one. Its tables are float32, so they agree to float32 rounding.
    """
    import diffusers
    import numpy as np

    scheduler = scheduler or diffusers.DDIMScheduler
    betas = -torch.expm1(torch.log(abar[1:].detach()) - torch.log(abar[:-1].detach()))
    defaults = {"clip_sample": False, "timestep_spacing": "trailing", "num_train_timesteps": len(betas)}
    if scheduler is diffusers.DDIMScheduler:
        defaults["set_alpha_to_one"] = True
    return scheduler(trained_betas=betas.cpu().numpy().astype(np.float32), **(defaults | options))


def from_diffusers(scheduler: "SchedulerMixin") -> Tensor:
    """The abar (T+1,), float64, of any diffusers scheduler that has a table of betas. Raises ValueError if none."""
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        raise ValueError(f"{type(scheduler).__name__} has no table of betas; pass a DDPM- or DDIM-like scheduler")
    return schedules.abar_from_betas(torch.as_tensor(betas))
