"""One question for every reward and measure: are these images (B, C, H, W) in [-1, 1]?"""

import warnings

import pytest
import torch

from bilevel_core import guidance, samplers
from bilevel_core.lab.models import captions, chains, clip, networks, pipelines, pixels, rewards, text_models

# Relative agreement of half precision with float32: the image itself is rounded to three digits.
ROUNDED = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    """Everything that reads images, by name, with the channels and the side that it is shown here."""
    tower = rewards.open_clip_model(f"local-dir:{pipelines.random_clip(tmp_path_factory.mktemp('clip'), side=16)}")
    head = tmp_path_factory.mktemp("head") / "head.safetensors"
    from safetensors.torch import save_file

    save_file({"weight": torch.full((1, 16), 0.25), "bias": torch.ones(1)}, head)
    small, classifier = clip.load(), networks.load_classifier("mnist28")
    return {
        "ink": (rewards.ink, 1),
        "boldness": (rewards.boldness, 1),
        "resnet": (rewards.RandomResNet(), 3),
        "clip": (clip.score(small, "a two"), 1),
        "open_clip": (lambda x: tower.embed(x)[:, 0], 3),
        "aesthetic": (rewards.aesthetic(head, tower), 3),
        "thickness": (captions.thickness, 1),
        "slant": (captions.slant, 1),
        "classifier": (lambda x: classifier.features(x)[:, 0], 1),
    }


NAMES = "ink boldness resnet clip open_clip aesthetic thickness slant classifier".split()


def drawn(channels, n=3):
    """A thick bar on a dark ground, with a little structure: (n, channels, 28, 28) in [-1, 1]."""
    x = torch.rand(n, channels, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.2 - 1
    x[:, :, 4:24, 11:16] += 1.6
    return x


@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_convention_are_refused(measures, name):
    measure, channels = measures[name]
    x = drawn(channels)
    byte = ((x + 1) * 127.5).round()
    for images, message in (
        (byte.to(torch.uint8), r"uint8.*images / 127\.5 - 1"),
        (byte.long(), "int64"),
        (x > 0, "bool"),
        (byte, r"lie in \[0, 2\d\d\], not in \[-1, 1\].*images / 127\.5 - 1"),
        (x.clone().index_fill_(0, torch.tensor([1]), float("nan")), "1 of 3 images hold NaN"),
        (x.clone().index_fill_(0, torch.tensor([1]), float("inf")), "1 of 3 images hold NaN or infinity"),
        (x[0], r"shape \(\d, 28, 28\)"),
        (x[:, :1].expand(-1, 4, -1, -1), r"shape \(3, 4, 28, 28\)"),
        (x.permute(0, 2, 3, 1), r"shape \(3, 28, 28, \d\)"),
        (x[:, :, :0], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(images)
    with pytest.warns(UserWarning, match=r"in \[0, 1\], pass 2 \* images - 1"):
        measure((x + 1) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_of_the_images_does_not_matter(measures, name):
    measure, channels = measures[name]
    x = drawn(channels)
    expected = measure(x)
    for dtype, error in {torch.float64: 1e-5, **ROUNDED}.items():
        leaf = x.to(dtype).requires_grad_()
        values = measure(leaf)
        assert values.dtype in (torch.float32, torch.float64) and expected.dtype == torch.float32
        assert (values - expected).abs().max() <= error * expected.abs().max()
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        assert grad.dtype == dtype and grad.isfinite().all() and grad.any()


def test_a_half_precision_reward_keeps_the_digits_of_float32():
    x = torch.full((2, 1, 28, 28), -1.0)
    assert rewards.ink(x.double()).dtype == torch.float64  # no network, so nothing is lost
    x[1, 0, 0, 0] = -0.75  # one pixel of 784: ink 1.6e-4, which a mean near -1 in half precision cannot hold
    assert rewards.ink(x.half())[1].item() == pytest.approx(0.125 / 784, rel=1e-3)


def test_channels_last_says_which_permutation():
    with pytest.raises(
        ValueError, match=r"not \(B, 1 or 3, H, W\): channels come second, images.permute\(0, 3, 1, 2\)"
    ):
        pixels.checked(torch.zeros(2, 28, 28, 3), 1, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 32, 32\), not \(B, 1, 28, 28\)"):
        clip.score(clip.load(), "a two")(torch.zeros(2, 1, 32, 32))
    with pytest.raises(TypeError, match="images are ndarray, not a tensor"):
        rewards.ink(torch.zeros(2, 1, 28, 28).numpy())
    assert rewards.ink(torch.zeros(0, 1, 28, 28)).shape == (0,)


def test_estimates_may_leave_the_range_but_images_may_not():
    wide = drawn(1) * 3  # what guidance asks of a reward: an x0_hat beyond [-1, 1], with a gradient
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixels.checked(wide, 1), wide)
        pixels.checked(wide.abs().clamp(max=1).requires_grad_(), 1)
    with pytest.raises(ValueError, match="clamp them"):
        pixels.checked(wide, 1, bounded=True)
    with pytest.raises(ValueError, match="lie in"):
        chains.rewarded(wide, {"ink": rewards.ink})


@pytest.mark.parametrize("name", ["ink", "boldness", "resnet", "clip"])
def test_guidance_of_the_shipped_model_warns_of_nothing(measures, name):
    """Its x0_hat leaves [-1, 1] by far at the first steps; nothing is clamped here."""
    chain = chains.Chain(networks.load_text_denoiser(), text_models.abar(text_models.RECIPES["denoiser"]), steps=4)
    reward, seen = measures[name][0], []

    def watched(x0):
        seen.append(x0.detach().abs().max().item())
        return reward(x0)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 1, 28, 28, generator=generator)
        guide = guidance.LookAhead(chain.denoise("a two"), watched, 10.0, chain.abar, chain.ts)
        x, _, _ = samplers.sample_particles(guide, x, chain.abar, chain.ts, generator=generator)
    assert x.isfinite().all() and max(seen) > 1.2
