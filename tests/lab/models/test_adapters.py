"""Every scheduler class of diffusers, with our schedule and an exact denoiser; and our table from each of theirs."""

import copy
import inspect
import warnings

import diffusers
import pytest
import torch

from bilevel_core import guidance, samplers, schedules
from bilevel_core.lab import oracles
from bilevel_core.lab.models import adapters

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' arithmetic of numpy and torch

T = 1000
MIXTURE = oracles.Mixture1D()
MEAN, SD = -0.3, 1.667
SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64).square()
SD_TABLE = schedules.abar_from_betas(SD_BETAS)  # Stable Diffusion's
ABAR = schedules.rescale_terminal(SD_TABLE, 1e-4)
ZERO = ((SD_TABLE.sqrt() - SD_TABLE[-1].sqrt()) / (1 - SD_TABLE[-1].sqrt())).square()  # of zero terminal SNR


def classes():
    """All scheduler classes of the installed diffusers that take trained_betas; DPMSolverSDE wants torchsde besides."""
    found = {}
    for name in dir(diffusers.schedulers):
        thing = getattr(diffusers.schedulers, name)
        if isinstance(thing, type) and not name.startswith(("Flax", "DPMSolverSDE")):
            if "trained_betas" in inspect.signature(thing.__init__).parameters:
                found[name.removesuffix("Scheduler")] = thing
    return found


CLASSES = classes()
# What they do with a denoiser: follow the probability flow at first or higher order, or draw; the others go the other
# way, want more than a denoiser in a step, or are for distilled networks.
FIRST = {"DDIM", "DDIMParallel", "CogVideoXDDIM", "EulerDiscrete"}
HIGHER = {"DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"}
HIGHER |= {"PNDM", "UniPCMultistep"}
DRAWN = {"DDPM", "DDPMParallel", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "SASolver"}
OTHERS = {"CogVideoXDPM", "DDIMInverse", "DPMSolverMultistepInverse", "LCM", "RePaint", "TCD"}
REFUSED = {"IPNDM"}  # its trained_betas are noise levels
INFINITE = HIGHER - {"PNDM"} | {"EulerDiscrete", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "SASolver"}
INFINITE |= {"DPMSolverMultistepInverse"}  # their sigma is sqrt((1 - abar)/abar)


def made(name, abar=ABAR, **options):
    taken = inspect.signature(CLASSES[name].__init__).parameters
    return adapters.to_diffusers(abar, CLASSES[name], **{k: v for k, v in options.items() if k in taken})


def exact(abar, t, x, prediction="epsilon"):
    """What a perfect network would say at t, which may lie between two whole times."""
    low = int(t)
    a = torch.lerp(abar[low].log(), abar[min(low + 1, T)].log(), t - low).exp() if t > low else abar[low]
    eps = MIXTURE.denoiser(torch.stack([a, a]))(x, 1)
    if prediction == "epsilon":
        return eps
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt() if a > 0 else torch.full_like(x, MEAN)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def loop(scheduler, abar, steps, n=2000, seed=1, prediction="epsilon", **options):
    """diffusers' own sampling loop, from x_T ~ N(0, I), (n,) float64."""
    x = start(n, seed)[:, None] * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    if "generator" in inspect.signature(scheduler.step).parameters and not isinstance(
        scheduler, diffusers.PNDMScheduler
    ):
        options["generator"] = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        output = exact(abar, float(t) + 1, scheduler.scale_model_input(x, t), prediction)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x[:, 0]


def start(n=2000, seed=1):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def flow():
    """The probability flow by 1000 steps of DDIM."""
    return samplers.sample_ddim(MIXTURE.denoiser(ABAR), start(), ABAR, samplers.timesteps(T, T))


# ---------------------------------------------------------------- to diffusers


def test_no_class_of_diffusers_is_forgotten():
    assert set(CLASSES) == FIRST | HIGHER | DRAWN | OTHERS | REFUSED


@pytest.mark.parametrize("name", sorted(set(CLASSES) - REFUSED))
def test_every_class_holds_our_schedule(name):
    scheduler = made(name)
    assert isinstance(scheduler, CLASSES[name]) and type(scheduler).__name__ == CLASSES[name].__name__
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ABAR[1:], rtol=1e-5, atol=0)
    for key in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        assert not scheduler.config.get(key, False)
    torch.testing.assert_close(adapters.from_diffusers(scheduler), ABAR, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(FIRST | HIGHER))
def test_solvers_follow_the_flow_of_our_schedule(name, flow):
    """At 20 steps DDIM is 0.07 off; the solvers of higher order are nearer, Euler is the same in another time."""
    gap = (loop(made(name), ABAR, 20) - flow).abs().mean().item()
    assert gap < (0.075 if name in FIRST else 0.03), gap


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_samplers_draw_from_our_law(name):
    x = loop(made(name), ABAR, 50, n=10_000)
    assert abs(x.mean().item() - MEAN) < 0.08 and abs(x.std().item() - SD) < 0.08


@pytest.mark.parametrize("kind", ["cosine", "sd"])
@pytest.mark.parametrize("length, steps", [(n, k) for n in (1000, 100) for k in (13, 20, 30, 64)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_any_number_of_steps_gives_our_samples(kind, length, steps, eta):
    q = torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64)
    abar = schedules.abar(q, length) if kind == "cosine" else schedules.rescale_terminal(SD_TABLE[: length + 1], 1e-4)
    x, noise, ts = start(500)[:, None], torch.randn(steps, 500, 1).double(), samplers.timesteps(length, steps)
    denoiser = MIXTURE.denoiser(abar)
    ours = samplers.sample_ddim(denoiser, x, abar, ts, eta=eta, noise=noise)
    for scheduler in (adapters.to_diffusers(abar), copy.deepcopy(adapters.to_diffusers(abar))):
        scheduler.set_timesteps(steps)
        assert [int(t) + 1 for t in scheduler.timesteps] == ts
        theirs = x
        for t, z in zip(scheduler.timesteps, noise, strict=True):
            extra = {"eta": eta, "variance_noise": z} if eta else {}
            theirs = scheduler.step(denoiser(theirs, int(t) + 1), t, theirs, **extra).prev_sample
        assert scheduler.num_inference_steps == steps
        gap = (theirs - ours).abs().mean().item()
        # float32 tables: 6e-8 over sqrt(abar_T), which is 5e-5 for the cosine at T = 1000
        assert gap < (5e-4 if kind == "cosine" else 1e-5), gap


@pytest.mark.parametrize("steps", [13, 30, 64])
def test_ddpm_gives_our_ancestral_samples(steps):
    scheduler, x, denoiser = made("DDPM"), start(500)[:, None], MIXTURE.denoiser(ABAR)
    g = torch.Generator().manual_seed(2)
    ours = samplers.sample_ancestral(denoiser, x, ABAR, samplers.timesteps(T, steps), generator=g)
    g = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, int(t) + 1), t, x, generator=g).prev_sample
    torch.testing.assert_close(x, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", adapters.BY_DIVISION)
def test_classes_that_would_leave_their_grid_say_so(name):
    scheduler = made(name)
    with pytest.raises(
        ValueError, match=rf"steps = 30 does not divide T = 1000, and {name}Scheduler goes by T // steps"
    ):
        scheduler.set_timesteps(30)
    scheduler.set_timesteps(num_inference_steps=40)
    made(name, timestep_spacing="leading").set_timesteps(30)


def test_what_pipelines_ask_of_the_scheduler_is_as_before(tmp_path):
    """They read the signature of step, save by the class's name, and step before set_timesteps is an error."""
    scheduler = adapters.to_diffusers(ABAR)
    assert {"eta", "generator"} <= set(inspect.signature(scheduler.step).parameters)
    with pytest.raises(ValueError, match="run 'set_timesteps'"):
        scheduler.step(torch.zeros(1), 0, torch.zeros(1))
    scheduler.save_pretrained(tmp_path)
    again = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=0)
    other = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    torch.testing.assert_close(other.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=0)


def test_a_class_or_table_that_does_not_fit_is_refused():
    for wrong, name in (
        (diffusers.FlowMatchEulerDiscreteScheduler, "FlowMatchEulerDiscreteScheduler"),
        (adapters.to_diffusers(ABAR), "an instance of DDIMScheduler"),
        (torch.nn.Linear, "Linear"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not a scheduler class with trained_betas, such as DDIM"):
            adapters.to_diffusers(ABAR, wrong)
    with pytest.raises(ValueError, match="IPNDMScheduler would not have this schedule but another"):
        adapters.to_diffusers(ABAR, diffusers.IPNDMScheduler)
    with pytest.raises(ValueError, match="DDIMScheduler would not have this schedule"):
        adapters.to_diffusers(ABAR, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"more in one step than float32 betas can say \(raise its end\)"):
        adapters.to_diffusers(torch.tensor([1.0, 0.5, 1e-9], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"abar\[0\] = 0.9999, .*lacks the leading 1: torch.cat\(\[torch.ones\(1\), "):
        adapters.to_diffusers(diffusers.DDPMScheduler().alphas_cumprod)
    with pytest.raises(ValueError, match=r"abar\[2\] = 0.7, but abar must fall"):
        adapters.to_diffusers(torch.tensor([1.0, 0.5, 0.7, 0.1]))
    with pytest.raises(ValueError, match="These look like betas"):
        adapters.to_diffusers(SD_BETAS)


# ---------------------------------------------------------------- grids of levels


def free_grid(n, seed=0):
    """Some grid, uneven, (n+1,)."""
    z = torch.randn(n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return schedules.grid_abar(z, ends=(0.05, 1.54))


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_second_order_is_that_of_diffusers_on_a_free_grid(steps, seed):
    grid, x = free_grid(steps, seed), start(500)
    scheduler, denoiser = adapters.to_diffusers(grid, diffusers.DPMSolverMultistepScheduler), MIXTURE.denoiser(grid)
    scheduler.set_timesteps(steps)
    theirs, ts = x, list(range(steps, 0, -1))
    for t in scheduler.timesteps:
        theirs = scheduler.step(denoiser(theirs, int(t) + 1), t, theirs).prev_sample
    ours = samplers.sample_dpm(denoiser, x, grid, ts)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    first = samplers.sample_ddim(denoiser, x, grid, ts)
    assert (ours - first).abs().max() > 0.02 or (steps == 2 and torch.allclose(ours, first))


def test_a_grid_becomes_the_timesteps_of_second_order_and_the_sigmas_of_euler():
    grid, x, denoiser = free_grid(6), start(500), MIXTURE.denoiser(ABAR)
    options = adapters.grid_to_diffusers(grid, ABAR)
    second = made("DPMSolverMultistep")
    second.set_timesteps(timesteps=options["timesteps"])
    y, ts = x, [t + 1 for t in options["timesteps"]]
    assert second.timesteps.tolist() == options["timesteps"] and ts == sorted(ts, reverse=True)
    levels, nearest = schedules.angle(ABAR[1:]), schedules.angle(grid[1:]).flip(0)
    assert [int((levels - one).abs().argmin()) + 1 for one in nearest] == ts
    for t in second.timesteps:
        y = second.step(denoiser(y, int(t) + 1), t, y).prev_sample
    torch.testing.assert_close(y, samplers.sample_dpm(denoiser, x, ABAR, ts), rtol=0, atol=2e-5)

    euler, exact_there = made("EulerDiscrete"), MIXTURE.denoiser(grid)
    euler.set_timesteps(sigmas=options["sigmas"])
    assert len(euler.timesteps) == 6 and euler.sigmas[-1] == 0
    y = x * (euler.sigmas[0] ** 2 + 1) ** 0.5  # it starts at N(0, I) in units of sigma; ours is x over that root
    for i, t in enumerate(euler.timesteps):
        y = euler.step(exact_there(euler.scale_model_input(y, t), 6 - i), t, y).prev_sample
    ours = samplers.sample_ddim(exact_there, x, grid, list(range(6, 0, -1)))
    torch.testing.assert_close(y, ours, rtol=0, atol=2e-5)


def test_a_grid_that_the_schedule_cannot_say_is_refused():
    close = torch.tensor([1.0, 0.5, 0.4999, 0.1], dtype=torch.float64)
    with pytest.raises(ValueError, match="must descend within 1..T = 1000"):
        adapters.grid_to_diffusers(close, ABAR)
    beyond = torch.tensor([1.0, 0.5, 1e-6], dtype=torch.float64)
    with pytest.raises(ValueError, match="must descend within 1..T = 1000"):
        adapters.grid_to_diffusers(beyond, SD_TABLE)
    with pytest.raises(ValueError, match="abar must fall"):
        adapters.grid_to_diffusers(torch.tensor([1.0, 0.5, 0.7]), ABAR)


# ---------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("name", sorted(set(CLASSES) - REFUSED))
def test_zero_terminal_snr_is_sampled_or_refused(name):
    """No class may give NaN: those that divide by abar_T say so at once."""
    with pytest.raises(ValueError, match=f"{name}Scheduler would divide by abar_T = 0: take DDIMScheduler with pred"):
        made(name, ZERO)
    if name in INFINITE or name in ("PNDM", "RePaint"):
        with pytest.raises(ValueError, match="would divide by abar_T = 0"):
            made(name, ZERO, prediction_type="v_prediction")
        return
    scheduler = made(name, ZERO, prediction_type="v_prediction")
    if name == "CogVideoXDPM":
        return  # its step takes more than this loop knows
    x = loop(scheduler, ZERO, 20, prediction="v_prediction")
    assert torch.isfinite(x).all()
    if name in FIRST:
        v = guidance.eps_from_v(lambda x, t: exact(ZERO, t, x, "v"), ZERO)
        ours = samplers.sample_ddim(v, start(), ZERO, samplers.timesteps(T, 20))
        torch.testing.assert_close(x, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_rescaled_schedulers_are_read_with_their_zero(name):
    taken = inspect.signature(CLASSES[name].__init__).parameters
    if "rescale_betas_zero_snr" not in taken:
        return
    scheduler = CLASSES[name](rescale_betas_zero_snr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip_sample
        abar = adapters.from_diffusers(scheduler)
    assert abar[0] == 1 and abar[-1] == 0 and len(abar) == T + 1 and (abar.diff() < 0).all()
    torch.testing.assert_close(abar[1:-1], scheduler.alphas_cumprod[:-1].double(), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- from diffusers


@pytest.mark.parametrize("name", sorted(set(CLASSES) - REFUSED))
@pytest.mark.filterwarnings("ignore:of this")
def test_the_table_of_every_class_is_its_own(name):
    """Also where it is not the product of the betas, as in CogVideoX, whose SNR is shifted."""
    scheduler = CLASSES[name]()
    abar = adapters.from_diffusers(scheduler)
    assert abar[0] == 1 and abar.dtype == torch.float64
    torch.testing.assert_close(abar[1:], scheduler.alphas_cumprod.double(), rtol=1e-5, atol=0)


def test_a_scheduler_without_such_a_table_is_refused():
    for scheduler in (diffusers.IPNDMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(), object()):
        with pytest.raises(ValueError, match=f"{type(scheduler).__name__} has no table of betas"):
            adapters.from_diffusers(scheduler)


def test_what_is_not_kept_is_named():
    plain = {"clip_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.from_diffusers(diffusers.DDIMScheduler(**plain))
        adapters.from_diffusers(diffusers.DDIMScheduler(**plain, prediction_type="v_prediction"), "v_prediction")
    for options, message in (
        (
            {"clip_sample_range": 2.0},
            r"not clip_sample = True: wrap the denoiser by guidance.clip_x0\(denoiser, abar, 2",
        ),
        (plain | {"thresholding": True}, "not thresholding = True: nothing here does it"),
        (
            plain | {"prediction_type": "sample"},
            r"not prediction_type = 'sample': .* guidance.eps_from_x0\(network, abar",
        ),
        (
            {"prediction_type": "v_prediction"},
            r"not prediction_type = 'v_prediction': .*guidance.eps_from_v\(network, abar\); clip_sample =",
        ),
    ):
        with pytest.warns(UserWarning, match=f"of this DDIMScheduler only the table abar is kept, {message}") as caught:
            adapters.from_diffusers(diffusers.DDIMScheduler(**options))
        assert caught[0].filename == __file__


def test_the_grid_of_stable_diffusion():
    """leading, steps_offset=1; set_alpha_to_one=False has no counterpart here."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    for steps in (50, 30, 7):
        scheduler = diffusers.DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=True)
        abar = adapters.from_diffusers(scheduler)
        ts = samplers.timesteps(T, steps, "leading", offset=1)
        scheduler.set_timesteps(steps)
        assert ts == [int(t) + 1 for t in scheduler.timesteps]
        ours = samplers.sample_ddim(MIXTURE.denoiser(abar), start(100), abar, ts)
        torch.testing.assert_close(loop(scheduler, abar, steps, n=100), ours, rtol=0, atol=1e-5)
