"""Stable Diffusion pipelines as chains, on tiny real ones: diffusers agrees, gradients and memory options are right."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch

from bilevel_core import guidance, samplers
from bilevel_core.lab.models import chains, networks, pipelines
from bilevel_core.lab.studies import memory

PROMPT = "a red fox"
pytestmark = pytest.mark.filterwarnings("ignore:abar_T = 0.0047", "ignore:abar_T = 0.00466")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline on the disk, as a user has one. With its v-prediction near zero, p_0 is nearly N(0, I) in latents."""
    place = tmp_path_factory.mktemp("pipeline")
    pipelines.random_pipeline("tiny", prediction_type="v_prediction").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def chain(folder):
    return pipelines.load(folder, steps=4, scale=3.0)


def start(chain, n, seed=0):
    return torch.randn(n, *chain.shape, generator=torch.Generator().manual_seed(seed))


def brightness(images):
    return images.mean((1, 2, 3))


def test_what_is_loaded_is_what_was_saved(folder, chain):
    fresh = pipelines.load(pipelines.random_pipeline("tiny", prediction_type="v_prediction"), steps=4, scale=3.0)
    x, t = start(chain, 3), 700
    assert torch.equal(chain.denoise(PROMPT)(x, t), fresh.denoise(PROMPT)(x, t))
    assert torch.equal(chain.decode(x), fresh.decode(x))
    other = pipelines.load(pipelines.random_pipeline("tiny", seed=1), steps=4, scale=3.0)
    assert not torch.allclose(chain.denoise(PROMPT)(x, t), other.denoise(PROMPT)(x, t))
    assert sum(w.numel() for w in chain.denoiser.parameters()) < 60_000 and chain.name == str(folder)
    assert not any(w.requires_grad for w in (*chain.denoiser.parameters(), *chain.vae.parameters()))
    assert chain.shape == (4, 8, 8) and chain.decode(x).shape == (3, 3, 16, 16) and chain.ts == [1000, 750, 500, 250]


@pytest.mark.parametrize(
    "prediction, zero",
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True), ("sample", True)],
)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_diffusers_own_pipeline_agrees(prediction, zero, scale):
    """Its sampler, its classifier-free guidance and its decoding, from one x_T, at eta = 0; also from abar_T = 0."""
    from diffusers import DDIMScheduler

    pipe = pipelines.random_pipeline("tiny", seed=2, prediction_type=prediction, rescale_betas_zero_snr=zero)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of this scheduler is lost
        chain = pipelines.load(pipe, steps=5, scale=scale, eta=0.0)
    assert (chain.abar[-1] == 0) == zero
    x_T = start(chain, 2)
    with torch.no_grad():
        x = samplers.sample_ddim(chain.denoise(PROMPT), x_T, chain.abar, chain.ts)
        images = chain.decode(x)
    pipe.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 5,
        "guidance_scale": scale,
        "eta": 0.0,
        "latents": x_T,
        "num_images_per_prompt": 2,
    }
    theirs = pipe(PROMPT, output_type="latent", **options).images
    torch.testing.assert_close(x, theirs, atol=2e-4 * theirs.abs().max().item(), rtol=0)
    theirs = pipe(PROMPT, output_type="pt", **options).images
    torch.testing.assert_close((images + 1) / 2, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_zero_terminal_snr_is_guided_drawn_as_particles_and_counted(scale):
    """abar_T = 0 through prompts, meter, guidance and micro-batches; the first step is unguided there."""
    pipe = pipelines.random_pipeline("tiny", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    chain, passes = pipelines.load(pipe, steps=4, scale=scale), 1 if scale == 1 else 2
    plain, cost = chain.sample(PROMPT, 3, 0)
    guided, spent = chain.sample(PROMPT, 3, 0, wrap=lambda d: chain.guide(d, brightness, 0.002))
    assert cost == 3 * 4 * passes and spent == cost + 2 * 3 * passes  # two guided steps, each with a backward pass
    assert (brightness(chain.decode(guided)) > brightness(chain.decode(plain)) + 0.003).all()
    found = chains.particles(chain, PROMPT, brightness, 1.0, 4, 0, {"low": brightness})
    assert all(torch.isfinite(found[name]).all() for name in ("low", "log_w", "log_z"))


def test_what_the_scheduler_would_do_besides_is_said():
    from diffusers import DDIMScheduler

    pipe = pipelines.random_pipeline("tiny", prediction_type="v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.warns(UserWarning, match="only the table abar is kept, not clip_sample = True"):
        pipelines.load(pipe)


def test_zero_strength_changes_nothing_bit_for_bit(chain):
    plain, cost = chain.sample(PROMPT, 3, 0)
    for checkpoint in (True, False):
        same = dataclasses.replace(chain, checkpoint=checkpoint)
        with pytest.warns(UserWarning, match="gradient of the reward was zero for every sample at every step"):
            guided, spent = same.sample(
                PROMPT, 3, 0, wrap=lambda d, c=same: c.guide(d, lambda x: 0 * brightness(x), 1.0)
            )
        assert torch.equal(guided, plain)
        assert cost == 3 * 4 * 2  # four steps, two passes
        assert spent == 3 * 2 * (3 * 2 + 1)  # the last step is plain; what a checkpoint computes again is not counted
    stronger, _ = chain.sample(PROMPT, 3, 0, wrap=lambda d: chain.guide(d, brightness, 0.002))
    assert (brightness(chain.decode(stronger)) > brightness(chain.decode(plain)) + 0.003).all()


def double(chain):
    """The chain in float64, so that finite differences are sharp."""
    pipe = pipelines.random_pipeline("tiny", prediction_type="v_prediction")
    for network in (pipe.unet, pipe.vae):
        network.double()
    return pipelines.load(pipe, steps=4, scale=3.0)


@pytest.mark.parametrize("block_checkpoint", [False, True])
def test_the_guidance_is_the_gradient_of_finite_differences(chain, block_checkpoint):
    exact = double(chain)
    if block_checkpoint:
        exact.denoiser.unet.enable_gradient_checkpointing()
        exact.vae.enable_gradient_checkpointing()
    x, t = start(chain, 2).double(), 500
    guide = exact.guide(exact.denoise(PROMPT), brightness, 0.1)
    with torch.no_grad():
        eps_hat, eps_guided, h = guide.look(x, t)
        grad = (eps_hat - eps_guided) / (1 - exact.abar[t]).sqrt()
        direction, step = start(chain, 2, 1).double(), 1e-5
        up, down = (guide.look(x + sign * step * direction, t, guided=False)[2] for sign in (1, -1))
    slope = (up - down) / (2 * step)
    torch.testing.assert_close((grad * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)
    assert slope.abs().min() > 1e-3
    torch.testing.assert_close(h, brightness(exact.decode(guidance.x0_from_eps(x, eps_hat, exact.abar[t]))) / 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 2},
        pytest.param({"micro_batch": None}, marks=pytest.mark.slow),
        pytest.param({"checkpoint": False}, marks=pytest.mark.slow),
        pytest.param({"block_checkpoint": True}, marks=pytest.mark.slow),
        {"slicing": False, "micro_batch": 3},
    ],
)
def test_memory_options_do_not_change_the_samples(folder, chain, options):
    def draw(chain):
        return chain.sample(PROMPT, 5, 3, wrap=lambda d: chain.guide(d, brightness, 0.01))[0]

    other = pipelines.load(folder, steps=4, scale=3.0, **options)
    torch.testing.assert_close(draw(other), draw(chain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "close"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_half_precision_keeps_small_gradients(folder, chain, dtype, close):
    half, x, t = pipelines.load(folder, steps=4, scale=3.0, dtype=dtype), start(chain, 3), 500
    assert half.denoiser.unet.dtype == half.vae.dtype == pipelines.DTYPES[dtype]

    def look(chain, size, x=x):
        guide = chain.guide(chain.denoise(PROMPT), lambda images: size * brightness(images), 1.0)
        with torch.no_grad():
            eps_hat, eps_guided, h = guide.look(x, t)
        assert eps_hat.dtype == eps_guided.dtype == h.dtype == torch.float32
        record = []
        guide.record = record
        with torch.no_grad():
            guide.look(x, t)
        return eps_hat, record[0][1].sqrt()

    eps, norm = look(chain, 1.0)
    eps_half, norm_half = look(half, 1.0)
    assert (eps_half - eps).norm() / eps.norm() < close / 4
    torch.testing.assert_close(norm_half, norm, rtol=close, atol=0)
    tiny = look(half, 1e-12)[1]  # float16 ends at 6e-8: without the scaling this is zero
    torch.testing.assert_close(tiny * 1e12, norm_half, rtol=close / 2, atol=0)
    alone = torch.cat([look(half, 1e-12, row[None])[1] for row in x])
    torch.testing.assert_close(alone, tiny, rtol=1e-3, atol=0)
    if dtype == "float16":
        z = x.half().requires_grad_()
        images = half.vae.decode(z / half.vae.config.scaling_factor).sample.clamp(-1, 1)
        (naive,) = torch.autograd.grad((1e-12 * brightness(images).float()).sum(), z)
        assert not naive.any()


def test_rows_with_several_prompts_and_times(chain):
    x, texts = start(chain, 3), ["a red fox", "two dogs", ""]
    times = torch.tensor([900, 500, 20])
    together = chain.denoise(texts)(x, times)
    for row, (text, t) in enumerate(zip(texts, times.tolist(), strict=True)):
        torch.testing.assert_close(
            chain.denoise(text)(x[row : row + 1], t), together[row : row + 1], atol=1e-4, rtol=1e-4
        )
    plain = dataclasses.replace(chain, scale=1.0).denoise(texts)(x, times)
    torch.testing.assert_close(plain[2], together[2], atol=1e-4, rtol=1e-4)  # the empty prompt guides nowhere
    assert (plain[0] - together[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_particles_and_algorithm_2_run_on_latents(chain):
    from bilevel_core.algorithms import TiltSamples, learn_lam

    def bright(images):
        return 300 * brightness(images)

    def contrast(images):
        return images.square().mean((1, 2, 3))

    chain = dataclasses.replace(chain, micro_batch=None, checkpoint=False)
    found = chains.particles(chain, PROMPT, bright, 1.0, 30, 0, {"up": contrast, "low": bright})
    assert found["images"].shape == (30, 3, 16, 16) and found["images"].dtype == torch.uint8
    assert found["log_w"].exp().sum().item() == pytest.approx(1)
    plain = chain.decode(chain.sample(PROMPT, 100, 5, batch=100)[0])
    tilted = (found["log_w"].exp() * found["low"]).sum()
    assert tilted > bright(plain).mean() + 0.3 * bright(plain).std()  # the tilt moves the mean by about a variance
    samples = TiltSamples(contrast(plain), bright(plain))
    steps = list(learn_lam(samples, 1.0, steps=20, min_ess=20))
    assert steps[-1].done and steps[0].lam == 1.0 and len({step.lam for step in steps}) > 1


def test_the_bank_keeps_images_of_a_chain_in_latent_space(chain, tmp_path):
    text = "a photo of: foxes / dogs, 4k (HDR)"
    options = {"folder": tmp_path, "about": {"model": chain.name}, "batch": 2}
    found = chains.bank(chain, text, {"low": brightness}, 3, 0, **options)
    assert found["images"].shape == (3, 3, 16, 16) and found["cost"] == 4 * 4 * 2
    images = chain.decode(chain.sample(text, 4, 0, batch=2)[0])
    torch.testing.assert_close(found["low"], brightness(images)[:3])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(name.startswith("a_photo_of_foxes_dogs_4k_HDR") for name in names)
    assert chains.slug("a bold two") == "a_bold_two" and chains.slug("a/b") != chains.slug("a b")


def test_the_tokenizer_is_clips(chain):
    import open_clip

    text = "A beautiful landscape, 4k; isn't it? naïve 東京"
    words = pipelines.clip_tokenizer()
    theirs = open_clip.get_tokenizer("ViT-B-16")([text])[0]
    ours = words(text).input_ids
    assert len(words) == 49408 and ours == theirs[: len(ours)].tolist() and not theirs[len(ours) :].any()
    with pytest.warns(UserWarning, match="the prompt has 202 tokens; the model reads the first 77"):
        chain.encode("a " * 200)


def test_what_cannot_be_loaded_says_what_to_do(folder, tmp_path, monkeypatch):
    def broken(name, change):
        copy = shutil.copytree(folder, tmp_path / name)
        change(copy)
        return copy

    with pytest.raises(OSError, match="there is no home of this user"):
        pipelines.load("~nobody-of-this-name/model")
    with pytest.raises(OSError, match="there is no folder .*save_pretrained, or a model id"):
        pipelines.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no model_index.json"):
        pipelines.load(tmp_path / "empty")
    cut = broken("cut", lambda place: next((place / "unet").glob("*.safetensors")).write_bytes(b"12345678 cut"))
    with pytest.raises(OSError, match="cannot be loaded .* if a download was cut off, run again"):
        pipelines.load(cut)
    gone = broken("gone", lambda place: next((place / "vae").glob("*.safetensors")).unlink())
    with pytest.raises(OSError, match="cannot be loaded"):
        pipelines.load(gone)

    def rename(place):
        index = json.loads((place / "model_index.json").read_text())
        (place / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))

    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline, not a StableDiffusionPipeline"):
        pipelines.load(broken("xl", rename))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="example/none cannot be loaded .*offline, give a folder .*gated.*hf auth login"):
        pipelines.load("example/none")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'bilevel-core\[full\]'"):
        pipelines.load(folder)


def test_schedulers_and_options_that_do_not_fit_are_refused(folder):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    pipe = pipelines.random_pipeline("tiny")
    betas = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no table of betas"):
        pipelines.load(pipe)
    pipe.scheduler = DDIMScheduler.from_config(betas, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="ends at abar = 0, where no eps .*: set its rescale_betas_zero_snr to False"):
        pipelines.load(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    assert pipelines.load(pipe).abar[-1] > 0
    pipe.scheduler = DDIMScheduler.from_config(betas, prediction_type="sample")
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction = 'flow' is not"):
        pipelines.load(pipe)
    for options, message in (
        ({"dtype": "float8"}, "dtype = 'float8' is not one of float32, float16, bfloat16"),
        ({"side": 18}, "side = 18 must be a multiple of 4"),
        ({"side": 2}, "side = 2 must be"),
        ({"side": 0}, "side is 0; it must be an integer of at least 1"),
        ({"micro_batch": 0}, "micro_batch is 0; it must be an integer of at least 1"),
        ({"offload": True, "checkpoint": False}, "offload = True needs checkpoint = True"),
        ({"offload": True}, "device is the CPU"),
        ({"scale": -1.0}, "scale = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipelines.load(folder, **options).denoise(PROMPT)
    assert pipelines.load(folder, side=32).shape == (4, 16, 16)
    with pytest.raises(ValueError, match="size 'huge' is not one of sd15, tiny"):
        pipelines.random_pipeline("huge")


# ---------------------------------------------------------------- memory


def test_peak_memory_counts_what_is_alive():
    weight = torch.zeros(100, 100)
    with memory.PeakMemory([weight]) as seen:
        a = torch.zeros(1000)  # 4,000 bytes
        b = weight.t() @ torch.zeros(100)  # a view of what is given, and 400 + 400 bytes of which one is freed
        del a
        c = torch.zeros(500) + 1  # 2,000 + 2,000
        del b
    assert seen.peak == 4800 and seen.now == c.numel() * 4


@pytest.mark.slow
def test_fake_tensors_need_what_real_ones_need():
    """The count on fake tensors is the count on real ones, and each option saves what it says."""
    from contextlib import nullcontext

    options = {"side": 32, "reward": None, "rows": 4}
    weights, step = memory._set_up("tiny", nullcontext(), **options)
    with memory.PeakMemory(weights) as real:
        step()
    fake = memory.counted("tiny", **options)
    assert fake["step"] * memory.GIB == pytest.approx(real.peak, rel=0.02)
    assert fake["weights"] * memory.GIB == sum(w.numel() for w in weights) * 4
    all_rows = memory.counted("tiny", **options | {"micro_batch": None, "checkpoint": False})["step"]
    assert fake["step"] < memory.counted("tiny", **options | {"micro_batch": None})["step"] < all_rows
    assert fake["step"] * 2 > memory.counted("tiny", **options | {"block_checkpoint": True})["step"]
    assert memory.counted("tiny", **options | {"dtype": "float16"})["weights"] == fake["weights"] / 2


@pytest.mark.slow
def test_one_guided_image_of_the_full_size_fits_a_free_gpu():
    found = memory.counted("sd15", dtype="float16")
    assert found["peak"] < 12 * 1e9 / memory.GIB, found
    assert memory.counted("sd15", dtype="float16", block_checkpoint=True)["peak"] < found["peak"]


@pytest.mark.slow
def test_a_measurement_runs_in_a_process_of_its_own(root):
    import subprocess
    import sys

    command = [sys.executable, "-m", memory.__name__, "--size", "tiny", "--side", "16", "--reward", ""]
    done = subprocess.run([*command, "--device", "cpu"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["plain"] < found["seconds"] < 60 and 0.1 < found["peak"] < 4


def test_the_prompted_denoiser_of_any_text():
    """networks.Prompted with another encoding of text than the captions'."""
    denoiser = lambda x, t, text: x * 0 + text.mean((1, 2))[:, None, None, None]  # noqa: E731
    x, text, empty = torch.zeros(2, 1, 2, 2), torch.full((1, 3, 5), 4.0), torch.ones(1, 3, 5)
    assert networks.Prompted(denoiser, text, 2.0, empty)(x, 1).unique().tolist() == [1 + 2 * 3]
    assert networks.Prompted(denoiser, text, 0.0, empty)(x, 1).unique().tolist() == [1]
    rows = torch.cat([text, 2 * text])
    assert networks.Prompted(denoiser, rows, 2.0, empty)(x, 1)[:, 0, 0, 0].tolist() == [7, 15]
