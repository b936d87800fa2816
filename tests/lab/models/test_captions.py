"""Measured attributes, captions and their token ids."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel_core.lab import data
from bilevel_core.lab.models import captions


def bar(width: float, lean: float, side: int = 28) -> torch.Tensor:
    """A soft-edged bar (1, 1, side, side) of the given width, sheared by `lean` pixels per pixel of height."""
    row = torch.arange(side, dtype=torch.float64)[:, None]
    column = torch.arange(side, dtype=torch.float64)
    centre = 13.5 + lean * (13.5 - row)
    ink = (width / 2 + 0.5 - (column - centre).abs()).clamp(0, 1)
    ink[:4], ink[-4:] = 0, 0
    return (2 * ink - 1)[None, None]


@pytest.mark.parametrize("width", [2.0, 3.0, 4.5])
def test_thickness_of_a_bar_is_its_width(width):
    """A bar of length L = 20 has the ink L w and the edge 2 (L + w)."""
    assert captions.thickness(bar(width, 0)).item() == pytest.approx(width * 20 / (20 + width), rel=0.05)


@pytest.mark.parametrize("lean", [-0.4, 0.0, 0.25])
def test_slant_of_a_bar_is_its_shear(lean):
    assert captions.slant(bar(3, lean)).item() == pytest.approx(lean, abs=0.02)


def test_measures_are_differentiable_and_defined_everywhere():
    empty = torch.full((2, 1, 28, 28), -1.0)
    for measure in (captions.thickness, captions.slant):
        assert measure(empty).abs().max() < 1e-5
        x = torch.cat([empty[:1].double(), bar(3, 0.2)]).requires_grad_()
        (grad,) = torch.autograd.grad(measure(x).sum(), x)
        assert grad.isfinite().all() and grad[1].abs().max() > 0
    x, step = bar(3, 0.2), 1e-5 * torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    x = (0.9 * x).requires_grad_()  # off the corners of the clamp
    for measure in (captions.thickness, captions.slant):
        (grad,) = torch.autograd.grad(measure(x).sum(), x)
        change = (measure(x + step) - measure(x - step)).item() / 2
        assert change == pytest.approx((grad * step).sum().item(), rel=1e-3)


def test_every_caption_is_parsed_back_and_has_its_own_ids():
    assert len(captions.CAPTIONS) == 160
    for text, place in captions.CAPTIONS.items():
        assert captions.caption(*place) == text and captions.parse(text) == place
    ids = captions.encode(list(captions.CAPTIONS))
    assert ids.shape == (160, captions.CONTEXT) and len(ids.unique(dim=0)) == 160
    assert (ids == len(captions.WORDS) - 1).sum(1).eq(1).all()  # one <end> each, the largest id
    assert captions.parse("  A bold SEVEN leaning right ") == (7, 2, 2)
    assert torch.equal(captions.encode(["A BOLD seven"]), captions.encode(["a bold seven"]))


def test_bad_prompts_name_the_word_and_a_remedy():
    with pytest.raises(ValueError, match=r"unknown word 'blod': did you mean 'bold'\?"):
        captions.parse("a blod seven")
    with pytest.raises(ValueError, match="unknown word 'photograph'"):
        captions.encode(["a seven", "a photograph"])
    for order in ("seven", "a seven bold", "a", "a seven leaning", "a one two"):
        with pytest.raises(ValueError, match="no caption of the form"):
            captions.parse(order)
    with pytest.raises(ValueError, match="<end>"):
        captions.parse("a seven <end>")
    with pytest.raises(ValueError, match=r"drop = 1\.5 is not a probability"):
        captions.CaptionSampler(torch.zeros(1, 3, dtype=torch.int64), drop=1.5)


@given(st.text(max_size=30))
def test_any_text_is_a_caption_or_an_error(text):
    try:
        assert captions.caption(*captions.parse(text)) == " ".join(text.lower().split())
    except ValueError as error:
        assert "the prompt" in str(error)


def test_random_captions_are_true_and_drop_at_their_rates():
    n = 20_000
    found = torch.stack([torch.arange(n) % 10, torch.arange(n) % 3, torch.arange(n) % 2], 1)
    sampler, rows = captions.CaptionSampler(found, drop=0.2, drop_all=0.1), torch.arange(n)
    wanted = sampler.wanted(rows, torch.Generator().manual_seed(0))
    assert captions.fits(wanted, found).all()
    silent = (wanted == captions.ABSENT).double().mean(0)
    for share, expected in zip(silent, (0.1, 0.1 + 0.9 * 0.2, 0.1 + 0.9 * 0.2), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    ids = sampler.ids(wanted)
    for row in range(50):
        text = "" if wanted[row, 0] == captions.ABSENT else captions.caption(*wanted[row].tolist())
        assert torch.equal(ids[row], captions.encode([text])[0])
    again = sampler(rows, torch.Generator().manual_seed(0))
    assert torch.equal(again, ids)


@pytest.mark.mnist
def test_terciles_divide_the_training_split_in_three():
    """Every tenth image; the slow test has all of them, and the values themselves."""
    images, labels = (part[::10] for part in data.load("mnist", "train"))
    found = captions.attributes(images, labels)
    assert torch.equal(found[:, 0], labels)
    for column in (1, 2):
        share = torch.bincount(found[:, column], minlength=3) / len(found)
        assert (share - 1 / 3).abs().max() < 4 * (2 / 9 / len(found)) ** 0.5


@pytest.mark.slow
@pytest.mark.mnist
def test_terciles_are_those_of_the_training_split():
    images, labels = data.load("mnist", "train")
    thickness, slant = captions.measure_terciles(images, labels)
    for measured, stored in ((thickness, captions.THICKNESS_TERCILES), (slant, captions.SLANT_TERCILES)):
        torch.testing.assert_close(torch.tensor(measured), torch.tensor(stored), atol=0.0015, rtol=0)
    held_out, digits = data.load("mnist", "val")
    found = captions.attributes(held_out, digits)
    share = torch.bincount(found[:, 1] * 3 + found[:, 2], minlength=9) / len(found)
    assert (share - 1 / 9).abs().max() < 0.02
