"""Grids of levels, learned for a network that stays as it is: against the best grid of Gaussian data."""

import functools
import warnings

import pytest
import torch
from torch import nn

from bilevel_core import estimators, guidance, samplers, schedules
from bilevel_core.lab import distances, oracles
from bilevel_core.lab.studies import schedule_transfer
from bilevel_core.schedule_learning import learn_grid

S = torch.tensor([0.1, 0.3, 0.6, 1.5], dtype=torch.float64)
LAW = oracles.Gaussian(torch.zeros(4, dtype=torch.float64), torch.diag(S**2))
PROBLEM = schedule_transfer.GaussianImages(LAW.mean, S)
LIKE = torch.zeros(4000, 4, dtype=torch.float64)
ENDS = (0.01, 1.56)


def network(x, level):
    return LAW.denoiser(torch.cat([torch.ones_like(level), schedules.ANGLE.abar(level)]))(x, 1)


NET = guidance.LevelDenoiser(network, schedules.grid_abar(torch.zeros(3)), seen=ENDS)


def quality(x):
    """The Frechet distance to the law, its moments exact; of the samples only the variances, as their law has it."""
    return distances.frechet((x.new_zeros(4), torch.diag(x.square().mean(0))), (LAW.mean, LAW.cov), 0.0)


def exact(grid):
    """f of a grid (N+1,) in closed form."""
    return PROBLEM.value(grid[1:].flip(0)).item()


def start(n):
    """A bad grid: its steps grow with the noise."""
    return schedules.grid_abar(torch.linspace(-1, 1, n + 1, dtype=torch.float64), ends=ENDS)


def learn(n=3, like=LIKE, net=NET, **options):
    return list(learn_grid(net, start(n), quality, like, **({"steps": 40, "seed": 1} | options)))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_grid_tends_to_the_best_one(n):
    records = learn(n, steps=60)
    _, best = schedule_transfer.best_levels(PROBLEM, n)
    first, last = exact(start(n)), exact(records[-1].mean)
    assert first > 1.2 * best and last < best + 0.01 * (first - best)
    assert [r.k for r in records] == list(range(60))
    torch.testing.assert_close(records[0].abar, start(n), rtol=0, atol=1e-12)
    assert records[0].f == pytest.approx(first, rel=0.1)  # 4000 samples
    for r in records:
        level = schedules.angle(r.abar[1:])
        assert (level.diff() > 0).all() and ENDS[0] < level[0] and level[-1] < ENDS[1]


def test_the_gradient_is_that_of_the_closed_form():
    n, x = 3, torch.zeros(200_000, 4, dtype=torch.float64)
    (record,) = learn(n, x, steps=1)
    z = torch.linspace(-1, 1, n + 1, dtype=torch.float64).requires_grad_()
    value = PROBLEM.value(schedules.grid_abar(z, ends=ENDS)[1:].flip(0))
    (wanted,) = torch.autograd.grad(value, z)
    assert (record.grad - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert abs(record.grad.sum().item()) < 1e-12  # a constant added to z changes nothing


def test_adam_by_hand_with_falling_steps_and_the_mean_of_the_last_third():
    records = learn(2, LIKE[:50], steps=7, rate=0.3)
    z, m, v, visited = torch.tensor([-1.0, 0.0, 1.0]).double(), 0.0, 0.0, []
    for k, r in enumerate(records):
        torch.testing.assert_close(r.abar, schedules.grid_abar(z, ends=ENDS), rtol=1e-10, atol=1e-14)
        visited.append(z)
        kept = visited[5:] or [z]  # of 7 steps the last 2
        torch.testing.assert_close(r.mean, schedules.grid_abar(sum(kept) / len(kept), ends=ENDS), rtol=1e-10, atol=0)
        m, v = (m + r.grad) / 2, 0.9 * v + 0.1 * r.grad**2
        z = z - 0.3 * (1 - k / 7) * (m / (1 - 0.5 ** (k + 1))) / (v / (1 - 0.9 ** (k + 1))).sqrt()
        torch.testing.assert_close(r.state[0], z, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_is_the_uninterrupted_one_and_another_is_refused():
    options = {"like": LIKE[:50], "steps": 12, "batches": 5}
    whole = learn(**options)
    for k in (0, 7, 9, 11):
        rest = learn(**options, resume=whole[k])
        assert [r.k for r in rest] == list(range(k + 1, 12))
        for a, b in zip(rest, whole[k + 1 :], strict=True):
            assert a.f == b.f and a.cost == b.cost and torch.equal(a.mean, b.mean) and torch.equal(a.state, b.state)
    log_snr = guidance.LevelDenoiser(network, start(3), schedules.LOG_NSR, seen=(-4.0, 4.0))
    for other, named in (
        ({"rate": 0.2}, "rate: 0.1 -> 0.2"),
        ({"steps": 13}, "steps: 12 -> 13"),
        ({"net": log_snr}, "scale: angle -> log_nsr"),
        ({"net": guidance.LevelDenoiser(network, start(3), seen=(0.005, 1.56))}, r"seen: \[0.01, 1.56\] -> \[0.005"),
        ({"n": 4}, "start: "),
        ({"sampler": samplers.sample_dpm}, "sampler: sample_ddim -> sample_dpm"),
    ):
        with pytest.raises(ValueError, match=f"the saved run has other parameters .*{named}"):
            learn(**(options | other), resume=whole[3])


@pytest.mark.parametrize("n", [1, 4])
def test_solvers_costs_and_one_step(n):
    small = {"like": LIKE[:20], "steps": 2}
    for sampler in (samplers.sample_ddim, samplers.sample_dpm):
        plain, again = (
            learn(n, sampler=sampler, **small),
            learn(n, sampler=functools.partial(sampler, checkpoint=True), **small),
        )
        assert [r.cost for r in plain] == [20 * 2 * n, 2 * 20 * 2 * n]
        assert plain[1].f == again[1].f and torch.equal(plain[1].grad, again[1].grad)
        forward = learn(n, sampler=sampler, estimator=estimators.q_grad_forward, **small)
        torch.testing.assert_close(forward[0].grad, plain[0].grad, rtol=1e-9, atol=1e-12)
    assert n == 1 or plain[0].f != learn(n, **small)[0].f


def test_batches_of_noise_come_again():
    def values(**options):
        return [r.f for r in learn(2, LIKE[:20], steps=5, rate=1e-12, **options)]

    one, two, fresh = values(batches=1), values(batches=2), values()
    assert one == pytest.approx([one[0]] * 5, rel=1e-9)
    assert two[0] == pytest.approx(two[2], rel=1e-9) and abs(two[1] / two[0] - 1) > 1e-3
    assert len({round(f, 9) for f in fresh}) == 5 and values(seed=2) != fresh


def test_a_jagged_network_is_learned_by_differences_alone():
    """A wave in the level, too small to be seen in f and fast enough to rule its derivative."""

    def jagged(x, level):
        return network(x, level) + 0.001 * torch.sin(5000 * level) * x

    def slope(net, **options):
        return learn(net=net, like=LIKE[:500], steps=1, **options)[0].grad

    net = guidance.LevelDenoiser(jagged, start(3), seen=ENDS)
    wide, smooth = functools.partial(estimators.q_grad_coordinates, delta=0.3), slope(NET)
    assert (slope(NET, estimator=wide) - smooth).abs().max() < 0.1 * smooth.abs().max()
    assert (slope(net, estimator=wide) - smooth).abs().max() < 0.1 * smooth.abs().max()
    assert (slope(net) - smooth).abs().max() > 5 * smooth.abs().max()


def test_networks_are_in_evaluation_mode_and_left_as_they_were():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, level):
            assert not self.training
            return network(self.drop(x), level)

    noisy = Noisy()
    net = guidance.LevelDenoiser(noisy, start(2), seen=ENDS)
    assert [r.f for r in learn(2, LIKE[:20], net, steps=2)] == [r.f for r in learn(2, LIKE[:20], steps=2)]
    assert noisy.training and noisy.drop.training


def test_bad_input():
    with pytest.raises(ValueError, match="the angle goes from 1.5.* to 1.56 at level 4, but must rise strictly within"):
        list(learn_grid(NET, schedules.grid_abar(torch.tensor([9.0, 0, 0, 0]), ends=(0.0, 1.57)), quality, LIKE))
    for bad, said in (
        (lambda x: x.mean() * float("nan"), "quality is nan for 4000 samples that are finite"),
        (lambda x: (0 * x.sum()).abs().sqrt(), "the gradient at k = 0, z = .* is not finite"),
    ):
        with pytest.raises(FloatingPointError, match=said):
            next(learn_grid(NET, start(2), bad, LIKE))
    with pytest.raises(ValueError, match="it must give one number"):
        next(learn_grid(NET, start(2), lambda x: x.mean(0), LIKE))
    broken = guidance.LevelDenoiser(lambda x, level: x / 0, start(2), seen=ENDS)
    with pytest.raises(FloatingPointError, match=r"the samples at abar = \[1.0, .* are not finite"):
        next(learn_grid(broken, start(2), quality, LIKE))
    with warnings.catch_warnings():  # within what the network has seen, so without a warning
        warnings.simplefilter("error")
        learn(2, LIKE[:20], steps=3, rate=50.0)
