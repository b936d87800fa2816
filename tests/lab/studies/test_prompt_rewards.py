"""Rewards of samples of p_0: drawn once, standardised, stored and restored; the recorded ones are what they claim."""

import pytest
import torch

from bilevel_core.lab import files, places
from bilevel_core.lab.models import captions, chains, clip, networks, rewards, text_models
from bilevel_core.lab.studies import prompt_rewards

PROMPT = "a bold two"
RECORDED = places.project_root() / "book" / "results" / "09_prompt_rewards.safetensors"


@pytest.fixture(scope="module")
def chain():
    net = networks.TextDenoiser("tiny_text", seed=3).eval().requires_grad_(False)
    return chains.Chain(net, text_models.abar(text_models.RECIPES["denoiser"]), steps=2)


@pytest.fixture(scope="module")
def drawn(chain, tmp_path_factory):
    return prompt_rewards.draw(chain, PROMPT, 12, 5, folder=tmp_path_factory.mktemp("bank"))


def test_rewards_are_those_of_what_p_0_draws(chain, drawn):
    x, cost = chain.sample("a two", 12, 5, batch=12)
    images = chain.decode(x)
    with torch.no_grad():
        torch.testing.assert_close(drawn["clip"], clip.score(clip.load(), PROMPT)(images))
    torch.testing.assert_close(drawn["boldness"], captions.thickness(images))
    torch.testing.assert_close(drawn["ink"], (images.mean((1, 2, 3)) + 1) / 2)
    torch.testing.assert_close(drawn["resnet"], rewards.RandomResNet()(images))
    assert int(drawn["cost"]) == cost == 12 * 2 * 2  # two steps, with the caption and without


def test_draws_are_kept(chain, drawn, tmp_path, monkeypatch):
    first = prompt_rewards.draw(chain, PROMPT, 12, 5, folder=tmp_path)
    assert torch.equal(first["clip"], drawn["clip"])
    (path,) = tmp_path.rglob("*.safetensors")
    stamp = path.stat().st_mtime_ns
    again = prompt_rewards.draw(chain, PROMPT, 12, 5, folder=tmp_path)
    assert path.stat().st_mtime_ns == stamp and torch.equal(again["resnet"], drawn["resnet"])
    other = prompt_rewards.draw(chain, PROMPT, 12, 6, folder=tmp_path)
    assert not torch.equal(other["boldness"], drawn["boldness"])
    changed = prompt_rewards._about() | {"resnet": "seed 1"}
    monkeypatch.setattr(prompt_rewards, "_about", lambda: changed)
    with pytest.raises(ValueError, match="was made with other resnet; delete it or use another work_dir"):
        prompt_rewards.draw(chain, PROMPT, 12, 5, folder=tmp_path)


def test_samples_are_standardised_under_p_0():
    values = torch.tensor([3.0, 5.0, 10.0])
    drawn = {"clip": 10 * values, "boldness": values, "resnet": -values, "cost": torch.tensor(60)}
    found = prompt_rewards.samples(drawn, "boldness")
    expected = (values.double() - 6) / 13**0.5  # variance (9 + 1 + 16)/2
    torch.testing.assert_close(found.r_low, expected)
    torch.testing.assert_close(prompt_rewards.samples(drawn, "resnet").r_low, -expected)
    assert found.r_up.tolist() == [30.0, 50.0, 100.0] and found.cost == 60 and found.log_w is None


def test_what_is_stored_comes_back(drawn, tmp_path, monkeypatch):
    path = prompt_rewards.store(tmp_path / "rewards.safetensors", {PROMPT: drawn})
    back = prompt_rewards.restore(path)
    assert list(back) == [PROMPT] and set(back[PROMPT]) == {*prompt_rewards.NAMES, "cost"}
    assert all(torch.equal(value, drawn[name]) for name, value in back[PROMPT].items())
    tensors, meta = files.load_state(path)
    files.save_state(tmp_path / "old.safetensors", tensors, {k: v for k, v in meta.items() if k != "prompts"})
    with pytest.raises(ValueError, match=r"old.safetensors was made with other prompts: run the recorded profile"):
        prompt_rewards.restore(tmp_path / "old.safetensors")
    monkeypatch.setattr(prompt_rewards, "_about", lambda: meta | {"clip": "another hash"})
    with pytest.raises(ValueError, match=r"rewards.safetensors was made with other clip: run the recorded profile"):
        prompt_rewards.restore(path)


def test_the_book_has_twenty_thousand_samples_of_each_prompt():
    found = prompt_rewards.restore(RECORDED)
    assert tuple(found) == prompt_rewards.PROMPTS
    for drawn in found.values():
        assert {len(drawn[name]) for name in prompt_rewards.NAMES} == {20_000} and int(drawn["cost"]) == 400_000
        for low in prompt_rewards.LOW:
            r_low = prompt_rewards.samples(drawn, low).r_low
            assert abs(r_low.mean()) < 1e-9 and r_low.std().item() == pytest.approx(1)


@pytest.mark.slow
def test_the_books_samples_are_those_of_the_shipped_models(tmp_path):
    """Other noise, so the same means and spreads up to four standard errors."""
    kept = prompt_rewards.restore(RECORDED)["a bold two leaning right"]
    chain = chains.Chain.shipped()
    fresh = prompt_rewards.draw(chain, "a bold two leaning right", 500, 0, folder=tmp_path)
    for name in prompt_rewards.NAMES:
        error = kept[name].std() / 500**0.5
        assert abs(fresh[name].mean() - kept[name].mean()) < 4 * error, name
        assert abs(fresh[name].std() / kept[name].std() - 1) < 0.3, name
