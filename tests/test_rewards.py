"""Lower-level rewards: values, gradients, determinism, standardisation."""

import pytest
import torch

from bilevel_core.lab import rewards


def bar(width, ink=1.0):
    images = torch.full((1, 1, 28, 28), -1.0, dtype=torch.float64)
    images[..., 4:24, 10 : 10 + width] = 2 * ink - 1
    return images


def noise(n, seed=0):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_values_on_simple_images():
    assert rewards.ink(bar(3)).item() == pytest.approx(60 / 784)
    assert rewards.ink(bar(3, 0.5)).item() == pytest.approx(30 / 784)
    widths = torch.cat([rewards.boldness(bar(w)) for w in (1, 2, 4)])
    assert (widths.diff() > 0.5).all() and widths[2].item() == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(
    "make", [lambda: rewards.ink, lambda: rewards.boldness, lambda: rewards.RandomResNet().double()]
)
def test_gradients_are_those_of_finite_differences(make):
    reward, x = make(), noise(2).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(reward(x).sum(), x)
    with torch.no_grad():
        h = 1e-6
        slope = (reward(x + h * direction) - reward(x - h * direction)).sum() / (2 * h)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_random_network_is_seeded_and_leaves_the_global_generator_alone():
    state, x = torch.get_rng_state(), noise(3).float()
    a, b, c = (rewards.RandomResNet(seed)(x) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b) and not torch.allclose(a, c) and a.shape == (3,) and a.std() > 0
    network = rewards.RandomResNet(0)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert torch.allclose(network(x)[:1], network(x[:1]), rtol=1e-3, atol=1e-5)  # eval mode: no batch statistics


def test_standardised_has_mean_0_and_sd_1():
    samples = noise(120)
    reward = rewards.standardised(rewards.ink, samples, batch=50)
    values = reward(samples)
    assert values.mean().item() == pytest.approx(0, abs=1e-9) and values.std().item() == pytest.approx(1)
    assert reward.mean == pytest.approx(rewards.ink(samples).mean().item()) and reward.sd > 0
    x = noise(1).requires_grad_()
    (grad,) = torch.autograd.grad(reward(x).sum(), x)
    assert torch.allclose(grad, torch.full_like(grad, 1 / (2 * 784 * reward.sd)))


def test_errors():
    with pytest.raises(ValueError, match="n = 99 samples are too few"):
        rewards.standardised(rewards.ink, noise(99))
    with pytest.raises(ValueError, match="for every sample"):
        rewards.standardised(lambda x: torch.full((len(x),), 0.1), noise(100))
    with pytest.raises(ValueError, match="not finite for 100 of 100"):
        rewards.standardised(lambda x: rewards.ink(x) * float("nan"), noise(100))
    with pytest.raises(ValueError, match="not \\(B, 1, H, W\\)"):
        rewards.ink(torch.zeros(2, 28, 28))
    with pytest.raises(ValueError, match="size = 16"):
        rewards.RandomResNet(size=16)
