"""Denoisers around UNet2DModel, shipped classifiers and their reference features, training of the classifiers."""

import json
import subprocess

import pytest
import torch
from torch.nn import functional

from bilevel_core import guidance, schedules
from bilevel_core.lab import data, levels, places
from bilevel_core.lab.models import classifiers, networks

PARAMETERS = {"tiny": 70_000, "small": 270_000, "mnist28": 265_000, "mnist28_folded": 640_000}  # at most


def cosine_abar(T=10):
    return torch.cos(torch.linspace(0, 1.5, T + 1, dtype=torch.float64)) ** 2


@pytest.mark.parametrize("size", networks.SIZES)
def test_denoiser_protocol(size):
    denoiser = networks.Denoiser(size).eval()
    x = torch.randn(3, 1, denoiser.side, denoiser.side)
    with torch.no_grad():
        same = denoiser(x, 7)
        assert same.shape == x.shape
        torch.testing.assert_close(denoiser(x, torch.tensor([7, 7, 7])), same)
        mixed = denoiser(x, torch.tensor([1, 7, 1000]))
        torch.testing.assert_close(mixed[1:2], same[1:2], atol=1e-5, rtol=1e-5)
        assert (mixed[0] - same[0]).abs().max() > 1e-4  # the time matters
        if denoiser.fold == 1:  # diffusers counts from 0
            assert torch.equal(denoiser.unet(x, 6).sample, same)
    count = sum(weight.numel() for weight in denoiser.parameters())
    assert count < PARAMETERS[size], count


def test_folding_keeps_every_pixel_in_its_place():
    """A folded network that returned its input would return the image."""
    denoiser = networks.Denoiser("mnist28_folded")
    denoiser.unet.forward = lambda x, t: type("Output", (), {"sample": x})
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(denoiser(x, 3), x)


def test_x0_prediction_becomes_noise():
    abar = cosine_abar()
    eps_net, x0_net = networks.Denoiser("tiny"), networks.Denoiser("tiny", prediction="x0", abar=abar)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 3, 5, 9])
    a = abar[t].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        expected = (x.double() - a.sqrt() * eps_net(x, t).double()) / (1 - a).sqrt()
        torch.testing.assert_close(x0_net(x, t).double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x0_net(x[:1], 1), x0_net(x, t)[:1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs abar"):
        networks.Denoiser("tiny", prediction="x0")
    # Differentiable in the schedule.
    abar.requires_grad_()
    x0_net(x, t).sum().backward()
    assert abar.grad[[1, 3, 5, 9]].abs().min() > 0 and abar.grad[2] == 0


def test_initial_weights_follow_the_seed_alone():
    torch.manual_seed(1)
    first = networks.Denoiser("tiny", seed=3).state_dict()
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = networks.Denoiser("tiny", seed=3).state_dict()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(w, second[name]) for name, w in networks.Denoiser("tiny").state_dict().items())


def test_forward_mode_goes_through():
    denoiser = networks.Denoiser("tiny").double().requires_grad_(False)
    x, v = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda z: denoiser(z, 4), (x,), (v,))
    h = 1e-5
    finite = (denoiser(x + h * v, 4) - denoiser(x - h * v, 4)) / (2 * h)
    torch.testing.assert_close(tangent, finite, atol=1e-7, rtol=1e-6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="size 'big' is not one of tiny, small"):
        networks.Denoiser("big")
    with pytest.raises(ValueError, match="prediction 'v'"):
        networks.Denoiser("tiny", prediction="v")
    with pytest.raises(ValueError, match=r"tiny takes \(B, 1, 8, 8\)"):
        networks.Denoiser("tiny")(torch.zeros(2, 1, 28, 28), 1)
    with pytest.raises(ValueError, match="classifier 'cifar' is not one of mnist28, mnist8"):
        networks.load_classifier("cifar")
    with pytest.raises(ValueError, match="split 'all'"):
        networks.reference_features("mnist8", "all")
    with pytest.raises(ValueError, match=r"takes \(n, 1, 8, 8\)"):
        networks.Classifier8()(torch.zeros(2, 1, 28, 28))


# ---------------------------------------------------------------- shipped classifiers

REQUIRED_ACCURACY = {"mnist28": 0.99, "mnist8": 0.96}


@pytest.mark.parametrize("name", networks.CLASSIFIERS)
def test_shipped_classifier_and_features(name):
    classifier, card = networks.load_classifier(name), networks.classifier_card(name)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert card["accuracy"]["test"] >= REQUIRED_ACCURACY[name]
    for split, n in (("train", 50_000), ("val", 10_000), ("test", 10_000)):
        features = networks.reference_features(name, split)
        labels = networks.reference_labels(name, split)
        assert features.shape == (n, classifier.num_features) and features.dtype == torch.float64
        # The classifier's last layers read the stored features as the accuracy of the card says.
        accuracy = classifiers.accuracy(classifier.head(features.float()), labels)
        assert accuracy == pytest.approx(card["accuracy"][split], abs=3e-4)  # features were rounded to fp16
    spectrum = torch.linalg.eigvalsh(features.T.cov())
    assert features.T.cov().trace() == pytest.approx(classifier.num_features, rel=0.05)  # unit: see standardise
    rounding = (features.abs() * 2**-11).square().mean() / 3  # variance of an error uniform in half a unit of fp16
    assert spectrum[0] > 100 * rounding  # full rank beyond the rounding: a Fréchet distance makes sense
    assert sum(map(sum, card["confusion_test"])) == 10_000
    right = sum(card["confusion_test"][digit][digit] for digit in range(10))
    assert right / 10_000 == pytest.approx(card["accuracy"]["test"])


@pytest.mark.parametrize("name", networks.CLASSIFIERS)
def test_card_names_the_run(name):
    card = networks.classifier_card(name)
    source, recipe = card["provenance"], classifiers.Recipe(**card["recipe"])
    assert recipe == classifiers.RECIPES[name]
    assert source["dirty"] is False and len(source["commit"]) == 40
    assert len(card["log"]["loss"]) == recipe.epochs * (50_000 // recipe.batch_size)
    assert len(card["log"]["val_accuracy"]) == recipe.epochs and card["wall_s"] > 0
    assert card["log"]["val_accuracy"][-1] == card["accuracy"]["val"]
    try:
        root = places.project_root()
        shallow = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--is-shallow-repository"], capture_output=True, text=True
        )
    except (FileNotFoundError, OSError):
        return
    if shallow.stdout.strip() == "false":  # a full clone: the commit must be in it
        found = subprocess.run(["git", "-C", str(root), "cat-file", "-e", source["commit"]], check=False)
        assert found.returncode == 0


def test_shipped_files_stay_small():
    for file in networks._weights().iterdir():
        assert len(file.read_bytes()) < 6.5e6, file.name


@pytest.mark.mnist
@pytest.mark.parametrize("name", networks.CLASSIFIERS)
def test_shipped_classifier_on_the_real_images(name):
    classifier, card = networks.load_classifier(name), networks.classifier_card(name)
    images, labels = data.load("mnist", "test", classifier.side)
    features, logits = classifiers.outputs(classifier, images)
    assert classifiers.accuracy(logits, labels) == pytest.approx(card["accuracy"]["test"], abs=2e-4)
    assert torch.equal(labels, networks.reference_labels(name, "test"))
    torch.testing.assert_close(features, networks.reference_features(name, "test", torch.float32), rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------- training of the classifiers


def test_shift_moves_pads_and_pools():
    x = torch.rand(50, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    padded = functional.pad(x, (2, 2, 2, 2), value=-1.0)
    moved = classifiers.shifted(x, 28, 2, generator)
    offsets = set()
    for image, source in zip(moved[:, 0], padded[:, 0], strict=True):
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(source[r : r + 28, c : c + 28], image)]
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) > 15
    # Without a shift it is what `data.resize` makes.
    assert torch.equal(classifiers.shifted(x, 28, 0, generator), x)
    torch.testing.assert_close(classifiers.shifted(x, 8, 0, generator), data.resize(x, 8))


def test_training_repeats_and_learns():
    """Ten bright patterns: learnt in 40 steps; the same seed gives the same losses, another one does not."""
    generator = torch.Generator().manual_seed(0)
    patterns = (torch.rand(10, 1, 7, 7, generator=generator) > 0.5).float() * 2 - 1
    labels = torch.arange(10).repeat(32)
    images = functional.interpolate(patterns, 28)[labels]
    recipe = classifiers.Recipe(name="mnist8", epochs=8, batch_size=64)

    def losses(**changes):
        chosen = classifiers.Recipe(**{**vars(recipe), **changes})
        model = classifiers.build(chosen)
        return [record.loss for record in classifiers.train(model, images, labels, chosen)], model

    first, model = losses()
    assert len(first) == 40 and first[-1] < 0.3 * first[0]
    assert losses()[0] == first
    assert losses(seed=1)[0][0] != first[0]
    small = data.resize(images, 8)
    logits = classifiers.outputs(model, small)[1]
    assert classifiers.accuracy(logits, labels) > 0.9
    for _ in range(2):  # the second time it finds nothing to do
        classifiers.standardise(model, small)
        features, standardised = classifiers.outputs(model, small)
        torch.testing.assert_close(standardised, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
        assert features.var(0).mean().item() == pytest.approx(1, rel=1e-4)
    assert classifiers.confusion(logits, labels).sum() == 320


def test_cards_are_plain_json():
    for name in networks.CLASSIFIERS:
        json.dumps(networks.classifier_card(name), allow_nan=False)


# ---------------------------------------------------------------- told the level


@pytest.mark.parametrize("told", sorted(networks.LEVELS))
def test_a_network_told_the_level(told):
    network = networks.Denoiser("tiny", told=told).eval()
    x, level = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 0.7, 1.4])
    with torch.no_grad():
        mixed = network(x, level)
        torch.testing.assert_close(network(x[1:2], torch.tensor(0.7)), mixed[1:2], atol=1e-5, rtol=1e-5)
        assert torch.equal(mixed, network.unet(x, networks.LEVELS[told] * level).sample)
        assert not torch.equal(networks.Denoiser("tiny", told=told, stretch=20.0).eval()(x, level), mixed)
        plain = networks.Denoiser("tiny").eval()
        torch.testing.assert_close(plain(x, networks.LEVELS[told] * level + 1), mixed, atol=1e-5, rtol=1e-5)


def test_derivatives_go_through_the_level_and_the_embedding():
    network = networks.Denoiser("tiny", told="angle", stretch=3.0).double().requires_grad_(False).eval()
    x, level = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda v: network(x, v), (level,), (torch.ones_like(level),))
    h = 1e-3  # the embedding is in single precision
    finite = (network(x, level + h) - network(x, level - h)) / (2 * h)
    assert tangent.abs().max() > 0
    torch.testing.assert_close(tangent, finite, atol=1e-3 * tangent.abs().max().item(), rtol=1e-2)


def test_jitter_is_noise_on_the_level_in_training_alone():
    network, x, level = (
        networks.Denoiser("tiny", told="angle", jitter=0.1),
        torch.randn(64, 1, 8, 8),
        torch.full((64,), 0.7),
    )
    seen = []
    network.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    torch.manual_seed(0)
    network.train()(x, level)
    torch.manual_seed(0)
    torch.testing.assert_close(seen[0], 100 * (level + 0.1 * torch.randn(64)))
    network.eval()(x, level)
    assert torch.equal(seen[1], 100 * level)


def test_networks_are_told_what_they_were_made_for():
    for options, said in (
        ({"told": "noise"}, "told 'noise' is not one of t, angle, log_nsr"),
        ({"told": "angle", "prediction": "x0", "abar": cosine_abar()}, "told the angle predicts eps"),
        ({"told": "angle", "jitter": -0.1}, "jitter = -0.1 must be at least 0"),
        ({"told": "angle", "stretch": 0.0}, "stretch = 0.0 positive"),
        ({"jitter": 0.1}, "jitter and stretch are of levels: the network is told t"),
    ):
        with pytest.raises(ValueError, match=said):
            networks.Denoiser("tiny", **options)
    with pytest.raises(ValueError, match="the network is told the t, but the scale is the angle"):
        guidance.LevelDenoiser(networks.Denoiser("tiny"), cosine_abar())
    with pytest.raises(ValueError, match="the network is told the angle, but the scale is the log_nsr"):
        guidance.LevelDenoiser(networks.Denoiser("tiny", told="angle"), cosine_abar(), schedules.LOG_NSR)
    own = cosine_abar()
    for nearest in (False, True):  # a network told t, on its own table and another
        told = guidance.LevelDenoiser(networks.Denoiser("tiny"), own, levels.time_scale(own, nearest)).eval()
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(told(x, 7), told.network(x, 7), atol=1e-5, rtol=1e-5)
            both = told.on(own[[0, 2, 7]])(x, torch.tensor([1, 2]))
            torch.testing.assert_close(both, told.network(x, torch.tensor([2, 7])), atol=1e-5, rtol=1e-5)
