"""Bridges to diffusers: schedules as its schedulers, and back."""

import functools
import inspect
import warnings
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import samplers, schedules
from ..levels import time_scale

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, SchedulerMixin

# What every scheduler gets that takes it: no clipping of x0_hat, abar = 1 at the end, and the schedule left as it is.
DEFAULTS = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True, "snr_shift_scale": 1.0}

# They go from t to t - T // steps, which is off their own grid unless steps divides T or the spacing is "leading".
BY_DIVISION = ("CogVideoXDDIM", "CogVideoXDPM", "DDIMInverse", "DDIMParallel", "PNDM")

WRAPPERS = {"v_prediction": "guidance.eps_from_v(network, abar)", "sample": "guidance.eps_from_x0(network, abar)"}


def to_diffusers(abar: Tensor, scheduler: type | None = None, **options: object) -> "DDIMScheduler":
    """A diffusers scheduler with this schedule (`trained_betas`).

    abar       (T+1,), abar[0] = 1
    scheduler  a diffusers class with `trained_betas`, default DDIMScheduler
    options    passed on; the defaults are DEFAULTS, where the class takes them
    DDIMScheduler then samples as `samplers.sample_ddim`, DDPMScheduler as `sample_ancestral`, on the trailing grid, for
    any number of steps, to the rounding of their float32 tables (which 1/sqrt(abar_T) amplifies); other classes are
    other solvers of the same schedule. diffusers' time step t is ours minus one.
    Raises ValueError for a wrong table (`schedules.check_abar`), for a class that cannot hold this one, and, from the
    scheduler's `set_timesteps`, for a number of steps that would take a class of BY_DIVISION off its grid.
    """
    import diffusers
    import numpy as np

    scheduler = diffusers.DDIMScheduler if scheduler is None else scheduler
    known = inspect.signature(scheduler.__init__).parameters
    if not isinstance(scheduler, type) or "trained_betas" not in known:
        name = getattr(scheduler, "__name__", f"an instance of {type(scheduler).__name__}")
        raise ValueError(f"{name} is not a scheduler class with trained_betas, such as DDIMScheduler or DDPMScheduler")
    abar = schedules.check_abar(abar).detach().cpu()
    betas = -torch.expm1(torch.log(abar[1:]) - torch.log(abar[:-1]))
    defaults = {name: value for name, value in DEFAULTS.items() if name in known}
    options = defaults | {"num_train_timesteps": len(betas)} | options
    made = _on_grid(scheduler)(trained_betas=betas.numpy().astype(np.float32), **options)
    name, own = scheduler.__name__, getattr(made, "alphas_cumprod", None)
    if own is None or own.shape != betas.shape or not torch.allclose(own.double(), abar[1:], rtol=1e-3, atol=0):
        raise ValueError(
            f"{name} would not have this schedule but another: an option changes the table, the class reads "
            "trained_betas in its own way, or abar falls by more in one step than float32 betas can say (raise its end)"
        )
    divides = options.get("prediction_type", "epsilon") == "epsilon" or name == "PNDMScheduler"
    if abar[-1] == 0 and (divides or not torch.isfinite(getattr(made, "sigmas", own)).all()):
        raise ValueError(
            f"{name} would divide by abar_T = 0: take DDIMScheduler with prediction_type='v_prediction' for a network "
            "that predicts v, or schedules.rescale_terminal(abar)"
        )
    return made


def grid_to_diffusers(grid: Tensor, abar: Tensor) -> dict[str, list]:
    """A grid of levels in diffusers' words, for the `set_timesteps` of a scheduler of the network's own schedule.

    grid  (N+1,) levels, such as `learn_grid` gives;  abar: (T+1,) the schedule that the network was trained on
    Returns "timesteps" (N), falling, those whose levels are nearest (diffusers counts from 0), for classes that take
    them, such as DPMSolverMultistepScheduler, and "sigmas" (N+1), falling to 0, the levels as they are, for those such
    as EulerDiscreteScheduler. Pass one of the two. A network that is told the level needs neither: its scheduler is
    `to_diffusers(grid)`. Raises ValueError if two levels have the same time, or lie beyond the schedule's.
    """
    grid = schedules.check_abar(grid).detach()
    times = time_scale(abar, nearest=True).level(grid[1:])
    ts = samplers.check_grid(times.flip(0).tolist(), abar)
    return {"timesteps": [t - 1 for t in ts], "sigmas": (1 / grid - 1).sqrt().flip(0).tolist()}


def _on_grid(scheduler: type) -> type:
    """The class, kept on its grid: DDIMScheduler too steps by T // steps, and is made to take the next grid point."""
    import diffusers

    @functools.wraps(scheduler.step)
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, *args: object, **options: object) -> object:
        steps, T = self.num_inference_steps, self.config.num_train_timesteps
        if steps is None:
            return scheduler.step(self, model_output, timestep, sample, *args, **options)
        following = max((t for t in self.timesteps.tolist() if t < timestep), default=-1)
        self.num_inference_steps = Fraction(T, int(timestep) - following)  # T // this is the way to go
        try:
            return scheduler.step(self, model_output, timestep, sample, *args, **options)
        finally:
            self.num_inference_steps = steps

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: int, *args: object, **options: object) -> None:
        T = self.config.num_train_timesteps
        if T % num_inference_steps and self.config.timestep_spacing != "leading":
            raise ValueError(
                f"steps = {num_inference_steps} does not divide T = {T}, and {scheduler.__name__} goes by T // steps: "
                "take a divisor, timestep_spacing='leading' or DDIMScheduler"
            )
        scheduler.set_timesteps(self, num_inference_steps, *args, **options)

    if issubclass(scheduler, diffusers.DDIMScheduler):
        changed = {"step": step}
    elif scheduler.__name__.removesuffix("Scheduler") in BY_DIVISION:
        changed = {"set_timesteps": set_timesteps}
    else:
        return scheduler
    same = {"__module__": scheduler.__module__, "__doc__": scheduler.__doc__}  # pipelines save a scheduler by its name
    return type(scheduler.__name__, (scheduler,), changed | same)


def from_diffusers(scheduler: "SchedulerMixin", prediction: str = "epsilon") -> Tensor:
    """The abar (T+1,), float64, of any diffusers scheduler with a table of betas.

    It ends at 0 where the betas do so (rescale_betas_zero_snr), also in classes that write 2**-24 for it.
    prediction  what the caller takes the network's output for, in diffusers' words
    A table is all that is kept. A warning names what else the scheduler would do to the samples: another prediction,
    clipping, thresholding. The grid is the caller's: that of Stable Diffusion's DDIM is
    `timesteps(T, steps, "leading", offset=1)`, though with set_alpha_to_one=False it ends at abar_1, and we at abar_0.
    Raises ValueError if there is no table, or a wrong one.
    """
    betas, own = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    if betas is None or own is None:
        raise ValueError(f"{name} has no table of betas with its alphas_cumprod; pass a DDPM- or DDIM-like scheduler")
    abar, own = schedules.abar_from_betas(torch.as_tensor(betas)), torch.as_tensor(own).double()
    if not ((abar[1:] == 0) | torch.isclose(abar[1:], own, rtol=1e-3, atol=0)).all():
        abar = torch.cat([torch.ones(1).to(own), own])  # made otherwise than from the betas, as by a shift of the SNR
    abar = schedules.check_abar(abar)
    config, dropped = getattr(scheduler, "config", {}), []
    theirs = config.get("prediction_type", "epsilon")
    if theirs != prediction:
        remedy = f": wrap the network by {WRAPPERS[theirs]}" if theirs in WRAPPERS else ""
        dropped.append(f"prediction_type = {theirs!r}{remedy}")
    if config.get("clip_sample"):
        limit = config.get("clip_sample_range", 1.0)
        dropped.append(f"clip_sample = True: wrap the denoiser by guidance.clip_x0(denoiser, abar, {limit:g})")
    if config.get("thresholding"):
        dropped.append("thresholding = True: nothing here does it")
    if dropped:
        warnings.warn(f"of this {name} only the table abar is kept, not {'; '.join(dropped)}", stacklevel=2)
    return abar
