"""The chain whose output law is p_0, its bank of rewarded samples, and how prompts are followed."""

import json

import pytest
import torch

from bilevel_core import samplers
from bilevel_core.lab import data
from bilevel_core.lab.models import captions, chains, networks, text_models
from bilevel_core.lab.studies import prompt_following
from bilevel_core.seeds import derive_seed


@pytest.fixture(scope="module")
def chain():
    net = networks.TextDenoiser("tiny_text", seed=3).eval().requires_grad_(False)
    return chains.Chain(net, text_models.abar(text_models.RECIPES["denoiser"]), scale=2.0, steps=3)


def test_the_chain_is_ddim_with_the_prompted_denoiser(chain):
    images, cost = chain.sample("a bold seven", 5, 7)
    generator = torch.Generator().manual_seed(derive_seed("sample", 7, 0))
    x = samplers.draw_x_T((5, 1, 28, 28), chain.abar, generator=generator)
    with torch.no_grad():
        denoiser = networks.Prompted(chain.denoiser, "a bold seven", 2.0)
        expected = samplers.sample_ddim(denoiser, x, chain.abar, chain.ts, eta=1.0, generator=generator)
    torch.testing.assert_close(images, expected)
    assert cost == 5 * 3 * 2 and chain.ts[0] == 1000 and len(chain.ts) == 3


def test_images_do_not_depend_on_how_they_are_asked_for(chain):
    prompts = ["a one", "a two", "a bold three"]
    whole, cost = chain.sample(prompts, 8, 1, batch=4)
    pieces = [chain.sample(prompts, 4, 1, first=first, batch=4) for first in (0, 4)]
    torch.testing.assert_close(torch.cat([images for images, _ in pieces]), whole)
    assert cost == sum(spent for _, spent in pieces) == 8 * 6
    single = chain.sample("a two", 4, 1, batch=4)[0]
    torch.testing.assert_close(whole[1], single[1])  # the second row asks for a two; its noise is shared
    assert (chain.sample(prompts, 4, 2, batch=4)[0] - whole[:4]).abs().max() > 1e-3


def test_noise_belongs_to_whole_batches(chain):
    """As the docstring of `Chain.sample` has it: to the seed, a batch's first row and its length, not to a sample."""
    forty = chain.sample("a two", 40, 3, batch=20)[0]
    torch.testing.assert_close(chain.sample("a two", 20, 3, batch=20)[0], forty[:20])
    torch.testing.assert_close(chain.sample("a two", 20, 3)[0], forty[:20])  # one batch of 20 rows
    torch.testing.assert_close(chain.sample("a two", 20, 3, first=20)[0], forty[20:])
    assert (chain.sample("a two", 40, 3)[0][:20] - forty[:20]).abs().max() > 0.1  # a batch of 40 is another one
    for options in ({"n": 0}, {"n": 4, "batch": 0}, {"n": 4, "first": -4}):
        with pytest.raises(ValueError, match="must be at least 1, first ="):
            chain.sample("a two", seed=0, **options)


def test_a_bank_is_drawn_once_goes_on_and_notices_what_changed(chain, tmp_path):
    rewards = {"ink": lambda x: (x.mean((1, 2, 3)) + 1) / 2, "corner": lambda x: x[:, 0, 0, 0]}
    options = {"folder": tmp_path, "about": {"weights": "abc"}, "batch": 4}
    few = chains.bank(chain, "a two", rewards, 4, 0, **options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    more = chains.bank(chain, "a two", rewards, 10, 0, **options)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items()) and len(list(tmp_path.iterdir())) == 3
    assert more["ink"].shape == (10,) and more["images"].shape == (10, 1, 28, 28) and more["cost"] == 12 * 6
    assert torch.equal(more["ink"][:4], few["ink"])
    images = chain.sample("a two", 12, 0, batch=4)[0][:10]  # whole batches, as in the bank
    torch.testing.assert_close(more["corner"], images.clamp(-1, 1)[:, 0, 0, 0])
    torch.testing.assert_close(more["images"].float() / 127.5 - 1, images.clamp(-1, 1), atol=0.004, rtol=0)
    with pytest.raises(ValueError, match="was made with other weights; delete it or use another work_dir"):
        chains.bank(chain, "a two", rewards, 4, 0, **(options | {"about": {"weights": "other"}}))
    with pytest.raises(ValueError, match="unknown word"):
        chains.bank(chain, "a cat", rewards, 4, 0, **options)
    path = next(iter(files))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="was altered"):
        chains.bank(chain, "a two", rewards, 4, 0, **options)


@pytest.mark.mnist
def test_real_images_follow_the_captions_that_are_true_of_them():
    """Test images in the order of the 90 captions: all measures agree, and the words are in their order."""
    x, y = data.load("mnist", "test")
    found = captions.attributes(x, y)
    chosen = []
    for text in prompt_following.FULL_CAPTIONS:
        chosen.append((found == torch.tensor(captions.CAPTIONS[text])).all(1).nonzero()[:3, 0])
    rows = torch.stack(chosen, 1).flatten()  # three rounds of the 90 captions
    report = prompt_following.follow(
        x[rows], networks.load_classifier("mnist28"), networks.reference_features("mnist28", "val")
    )
    assert report["digit"] > 0.97 and report["thickness"] == report["slant"] == 1.0
    assert report["thin"] < report["medium"] < report["bold"]
    assert report["leaning left"] < report["standing upright"] < report["leaning right"]
    assert 0 < report["frechet"] < 15
    wrong = prompt_following.follow(x[rows].roll(90 // 2, 0), networks.load_classifier("mnist28"))
    assert wrong["digit"] < 0.2 and "frechet" not in wrong


def test_the_study_resumes_and_refuses_other_weights(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(chains.Chain, "shipped", classmethod(lambda cls, device, **options: chain))
    cards = {"text_denoiser": {"sha256": {"a": "1"}}, "classifier_mnist28": networks.classifier_card("mnist28")}
    monkeypatch.setattr(networks, "card", cards.__getitem__)
    options = {"split": "val", "seeds": 2, "n": 9, "folder": tmp_path}
    rows = prompt_following.prompt_study([(2.0, 3)], **options)
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["thin"] != rows[1]["thin"]
    assert rows[0]["cost"] == 9 * 6 and "frechet" not in rows[0]  # too few images for a distance
    assert prompt_following.prompt_study([(2.0, 3)], **options) == rows
    cards["text_denoiser"] = {"sha256": {"a": "2"}}
    with pytest.raises(ValueError, match="made with other weights"):
        prompt_following.prompt_study([(2.0, 3)], **options)
    assert json.loads((tmp_path / "prompts_val_2_3_0.json").read_text())["config"]["n"] == 9
