"""The text-conditional denoiser with classifier-free guidance, the small CLIP, and the training of both."""

import dataclasses
import hashlib
import json

import pytest
import torch

from bilevel_core import guidance, schedules
from bilevel_core.algorithms import ScoreTraining
from bilevel_core.lab.models import captions, clip, networks, text_models
from bilevel_core.lab.models.fast import fast

PROMPT = "a bold seven leaning right"


@pytest.fixture(scope="module")
def denoiser():
    return networks.TextDenoiser("tiny_text", seed=1).eval().requires_grad_(False)


def noise(n, seed=0):
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", networks.TEXT_SIZES)
def test_time_and_text_matter_row_by_row(size):
    net = networks.TextDenoiser(size).eval().requires_grad_(False)
    x, ids = noise(3), captions.encode([PROMPT, "a seven", ""])
    together = net(x, torch.tensor([1, 50, 900]), ids)
    assert together.shape == x.shape
    for row, t in enumerate((1, 50, 900)):
        torch.testing.assert_close(net(x[row : row + 1], t, ids[row]), together[row : row + 1], atol=2e-5, rtol=1e-4)
    assert (net(x, 50, ids[0]) - net(x, 50, ids[1])).abs().max() > 1e-4
    assert (net(x, 50, ids[0]) - net(x, 51, ids[0])).abs().max() > 1e-4
    assert sum(weight.numel() for weight in net.parameters()) * 4 < 6e6
    with pytest.raises(ValueError, match=r"takes \(B, 1, 28, 28\)"):
        net(x[..., :8], 1, ids)
    with pytest.raises(ValueError, match="'huge' is not one of"):
        networks.TextDenoiser("huge")


def test_classifier_free_guidance_is_its_formula_at_one_or_two_passes(denoiser):
    x, empty, ids = noise(4), captions.encode([""]), captions.encode([PROMPT])
    with_text, without = denoiser(x, 30, ids), denoiser(x, 30, empty)
    for scale, passes in ((0.0, 1), (1.0, 1), (2.5, 2)):
        prompted = networks.Prompted(denoiser, PROMPT, scale)
        torch.testing.assert_close(prompted(x, 30), without + scale * (with_text - without), atol=2e-5, rtol=1e-4)
        meter = guidance.CostMeter(prompted)
        meter(x, 30)
        assert meter.cost == 4 * passes and meter.calls == 1
        x_grad = x.clone().requires_grad_()
        meter(x_grad, 30).sum().backward()
        assert meter.cost == 4 * passes * 3 and x_grad.grad.abs().max() > 0
    by_row = networks.Prompted(denoiser, captions.encode([PROMPT, "a two", "a two", ""]), 2.0)
    single = networks.Prompted(denoiser, "a two", 2.0)
    torch.testing.assert_close(by_row(x, torch.tensor([3, 30, 30, 7]))[1:3], single(x, 30)[1:3], atol=2e-5, rtol=1e-4)


def test_a_prompted_denoiser_is_fast_and_guided_like_any_other(denoiser):
    prompted, x = networks.Prompted(denoiser, PROMPT, 2.0), noise(3)
    quick = fast(prompted, x)
    assert quick is not prompted and quick.passes == 2
    with torch.no_grad():
        for n, t in ((3, 5), (7, torch.tensor([1, 2, 3, 4, 5, 6, 7]))):
            torch.testing.assert_close(quick(noise(n), t), prompted(noise(n), t), atol=2e-5, rtol=1e-4)
        recorded = fast(denoiser, x, captions.encode([PROMPT]))  # once for all prompts
        for prompt in (PROMPT, "a two", captions.encode(["a one", "a two", "a three"])):
            expected = networks.Prompted(denoiser, prompt, 2.0)(x, 5)
            torch.testing.assert_close(networks.Prompted(recorded, prompt, 2.0)(x, 5), expected, atol=2e-5, rtol=1e-4)
    abar = text_models.abar(text_models.RECIPES["denoiser"])
    guide = guidance.LookAhead(prompted, lambda x0: x0.mean((1, 2, 3)), 1e-3, abar, [1000, 500, 1])
    with torch.no_grad():
        moved = prompted(x, 500) - guide(x, 500)
        again = guidance.LookAhead(prompted, lambda x0: x0.mean((1, 2, 3)), 1e-3, abar, [1000, 500, 1], micro_batch=1)
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(prompted(x, 500) - again(x, 500), moved, atol=1e-4, rtol=1e-3)


def test_bad_prompts_and_scales_are_refused(denoiser):
    with pytest.raises(ValueError, match="unknown word 'cat'"):
        networks.Prompted(denoiser, "a cat")
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            networks.Prompted(denoiser, PROMPT, scale)


def test_the_schedule_of_the_recipe_may_start_from_noise():
    abar = text_models.abar(text_models.RECIPES["denoiser"])
    assert len(abar) == 1001 and not schedules.check_terminal(abar)


# ---------------------------------------------------------------- CLIP


def test_the_contrastive_loss_is_clips_where_every_caption_fits_its_own_image_alone():
    model, x = clip.build().eval(), noise(4)
    ids = captions.encode(["a one", "a two", "a three", "a four"])
    picture, text = clip.encode_images(model, x), model.encode_text(ids, normalize=True)
    logits = model.logit_scale.exp() * picture @ text.T
    right = torch.arange(4)
    expected = (
        torch.nn.functional.cross_entropy(logits, right) + torch.nn.functional.cross_entropy(logits.T, right)
    ) / 2
    found = clip.contrastive_loss(model, x, ids, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():  # the same caption four times: every assignment is as good, the loss is log 4
        same = clip.contrastive_loss(model, x, ids[:1].expand(4, -1), torch.ones(4, 4, dtype=torch.bool))
    assert same.item() >= 1.3862 and same.item() == pytest.approx(1.3863, abs=0.05)


def test_the_clip_score_is_torchmetrics_scaled_cosine_with_gradients():
    model, x = clip.build().eval().requires_grad_(False), noise(3).clamp(-1, 1)
    picture = model.encode_image(x.expand(-1, 3, -1, -1))
    text = model.encode_text(captions.encode([PROMPT]))
    expected = 100 * torch.nn.functional.cosine_similarity(picture, text)
    reward = clip.score(model, PROMPT)
    torch.testing.assert_close(reward(x), expected.clamp(min=0))
    positive = x[expected > 0][:1].double()
    if len(positive) == 0:  # flip what the score rewards, so that there is something to differentiate
        model.text_projection.neg_()
        reward, positive = clip.score(model, PROMPT), x[:1].double()
    double = clip.score(model.double(), PROMPT)
    positive.requires_grad_()
    (grad,) = torch.autograd.grad(double(positive).sum(), positive)
    step = 1e-5 * torch.randn(positive.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = (double(positive + step) - double(positive - step)).item() / 2
    assert change == pytest.approx((grad * step).sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="unknown word"):
        clip.score(model, "a cat")


def test_retrieval_of_a_model_that_knows_and_of_one_that_guesses():
    """A stand-in whose image vector is the text vector of the true caption retrieves everything."""
    places = torch.tensor([place for place in captions.CAPTIONS.values() if captions.ABSENT not in place])
    model = clip.build().eval()
    vectors = model.encode_text(captions.encode([captions.caption(*p) for p in places.tolist()]), normalize=True)
    images = noise(len(places))
    model.encode_image = lambda x, normalize: vectors[: len(x)]
    found = clip.retrieval(model, images, places)
    assert found["caption"] == found["thickness"] == found["slant"] == 1.0
    shuffled = clip.retrieval(model, images, places[torch.randperm(90, generator=torch.Generator().manual_seed(0))])
    assert shuffled["caption"] < 0.1 and shuffled["thickness"] < 0.6 and shuffled["slant"] < 0.6


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", text_models.RECIPES)
def test_training_learns_and_a_resumed_run_is_the_same(name):
    recipe = dataclasses.replace(text_models.RECIPES[name], batch_size=8, steps=30, warmup=3)
    if name == "denoiser":
        recipe = dataclasses.replace(recipe, size="tiny_text")
    images, found = noise(40).clamp(-1, 1), torch.stack([torch.arange(40) % k for k in (10, 3, 2)], 1)
    whole = text_models.start(recipe)
    for _ in text_models.train(whole, recipe, images, found):
        pass
    assert len(whole.losses) == 30 and sum(whole.losses[-5:]) < sum(whole.losses[:5])
    first = text_models.start(recipe)
    for record in text_models.train(first, recipe, images, found):
        if record.step == 11:
            break
    second = text_models.start(recipe)
    second.load(first.tensors(), json.loads(json.dumps(first.meta())))
    for _ in text_models.train(second, recipe, images, found):
        pass
    assert second.losses == whole.losses and second.cost == whole.cost == 30 * 8 * 3
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    other = text_models.start(dataclasses.replace(recipe, lr=recipe.lr / 2))
    with pytest.raises(ValueError, match="lr"):
        other.load(first.tensors(), first.meta())


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    state = ScoreTraining(networks.TextDenoiser("tiny_text"))
    before = [weight.clone() for weight in state.denoiser.parameters()]
    with pytest.raises(FloatingPointError, match=r"nan at step 1; lower lr = 0\.001"):
        state.update(sum(weight.sum() for weight in state.denoiser.parameters()) * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, state.denoiser.parameters(), strict=True))
    assert state.step == state.cost == 0 and not state.losses


def test_missing_or_altered_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_weights", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no card text_denoiser\.json"):
        networks.load_text_denoiser()
    content = b"weights"
    (tmp_path / "m.json").write_text(json.dumps({"sha256": {"m.bin": hashlib.sha256(content).hexdigest()}}))
    with pytest.raises(FileNotFoundError, match=r"m\.bin is missing"):
        networks.shipped("m", "m.bin")
    (tmp_path / "m.bin").write_bytes(content)
    assert networks.shipped("m", "m.bin") == content
    (tmp_path / "m.bin").write_bytes(b"weighty")
    with pytest.raises(ValueError, match=r"m\.bin was altered"):
        networks.shipped("m", "m.bin")
