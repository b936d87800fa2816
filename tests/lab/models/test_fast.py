"""The fast denoiser gives what the plain one gives, and steps aside where it cannot."""

import pytest
import torch

from bilevel_core import guidance, samplers, schedules
from bilevel_core.algorithms import ScoreTraining
from bilevel_core.lab.models import networks
from bilevel_core.lab.models.fast import fast

ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), 100)


def images(denoiser, n):
    side = denoiser.side
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("size", networks.SIZES)
def test_equals_the_plain_denoiser_at_every_batch_and_time(size):
    denoiser = networks.Denoiser(size).eval()
    quick = fast(denoiser, images(denoiser, 3))
    assert quick is not denoiser
    with torch.no_grad():
        for n, t in ((1, 1), (5, 70), (5, torch.tensor([1, 20, 50, 99, 100])), (65, 100)):
            x = images(denoiser, n)
            torch.testing.assert_close(quick(x, t), denoiser(x, t), atol=2e-5, rtol=1e-4)


def test_x0_prediction_average_of_weights_and_whole_runs():
    x0_net = networks.Denoiser("tiny", prediction="x0", abar=ABAR).eval()
    x, t = images(x0_net, 3), torch.tensor([3, 50, 80])
    average = ScoreTraining(networks.Denoiser("tiny")).ema.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x0_net, x)(x, t), x0_net(x, t), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast(average, x)(x, 5), average(x, 5), atol=2e-5, rtol=1e-4)
        ts, meter = samplers.timesteps(100, 10), guidance.CostMeter(fast(average, x))
        plain = samplers.sample_ddim(average, x, ABAR, ts)
        # Rounding is amplified by the first step, which divides by sqrt(abar_T).
        torch.testing.assert_close(
            samplers.sample_ddim(meter, x, ABAR, ts), plain, atol=1e-3 * plain.abs().max(), rtol=0
        )
    assert meter.cost == 30


def test_derivatives_come_from_the_plain_denoiser():
    denoiser = networks.Denoiser("tiny").eval()
    x = images(denoiser, 2).requires_grad_()
    quick = fast(denoiser, x)
    (expected,) = torch.autograd.grad(denoiser(x, 5).square().sum(), x)
    (found,) = torch.autograd.grad(quick(x, 5).square().sum(), x)
    assert torch.equal(found, expected)
    with torch.no_grad():
        direction = torch.ones_like(x)
        found, expected = (
            torch.func.jvp(lambda y, f=f: f(y, 5), (x.detach(),), (direction,))[1] for f in (quick, denoiser)
        )
        assert found.abs().max() > 0 and torch.equal(found, expected)


def test_a_copy_of_the_weights():
    denoiser = networks.Denoiser("tiny").eval()
    x = images(denoiser, 2)
    flags, format_ = [w.requires_grad for w in denoiser.parameters()], denoiser.unet.conv_out.weight.stride()
    quick = fast(denoiser, x)
    assert [w.requires_grad for w in denoiser.parameters()] == flags
    assert denoiser.unet.conv_out.weight.stride() == format_
    with torch.no_grad():
        before = quick(x, 5)
        denoiser.unet.conv_out.weight.mul_(2)
        assert torch.equal(quick(x, 5), before)
        torch.testing.assert_close(fast(denoiser, x)(x, 5), denoiser(x, 5), atol=2e-5, rtol=1e-4)


def test_steps_aside_with_a_note():
    class Untraceable(torch.nn.Module):
        def forward(self, x, t):
            raise RuntimeError("no trace of this")

    x, broken = torch.randn(2, 1, 8, 8), Untraceable().eval()
    with pytest.warns(UserWarning, match="cannot be traced.*no trace of this"):
        assert fast(broken, x) is broken
    denoiser = networks.Denoiser("tiny")
    with pytest.warns(UserWarning, match="not on meta"):
        assert fast(denoiser.eval(), x.to("meta")) is denoiser
    with pytest.raises(ValueError, match=r"training mode; call denoiser.eval\(\)"):
        fast(denoiser.train(), x)


def test_networks_told_the_level_as_they_are_and_on_a_schedule():
    """Recorded with a whole number, called with any level; a tangent of the level alone is not lost."""
    network = networks.Denoiser("tiny", told="angle", stretch=20.0).eval().requires_grad_(False)
    x, grid = images(network, 3), ABAR[[0, 10, 40, 90]]
    on_grid, quick = guidance.LevelDenoiser(network, grid), fast(network, x)
    recorded = [fast(on_grid, x), guidance.LevelDenoiser(quick, grid)]
    assert quick is not network and recorded[0] is not on_grid
    with torch.no_grad():
        for level in (torch.tensor(0.37), torch.tensor([0.1, 0.37, 1.5])):
            torch.testing.assert_close(quick(x, level), network(x, level), atol=2e-5, rtol=1e-4)
        for each in recorded:
            for t in (2, torch.tensor([1, 2, 3])):
                torch.testing.assert_close(each(x, t), on_grid(x, t), atol=2e-5, rtol=1e-4)
        found, wanted = (
            torch.func.jvp(lambda v, f=f: f(x, v), (torch.tensor(0.37),), (torch.tensor(1.0),))[1]
            for f in (quick, network)
        )
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)
