"""Algorithm 6 on the linear-Gaussian oracle: its gradient, its networks, its warnings, and resuming."""

import copy
import dataclasses
import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bilevel_core import estimators, guidance, schedules
from bilevel_core.lab import data, distances, files, oracles, training
from bilevel_core.lab.models import networks
from bilevel_core.schedule_learning import ScheduleLearning, ScheduleProblem, learn_schedule
from bilevel_core.seeds import derive_seed

ORACLE = oracles.LinearGaussianSchedule()
Q = torch.tensor([0.0, 0.9, 1.0, 0.008], dtype=torch.float64)
END_1 = torch.tensor([0.0, 1.0, 1.0, 0.008], dtype=torch.float64)
DATA = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = ORACLE.s * DATA / DATA.square().mean().sqrt()  # else the oracle's minimum is not that of these data


class Linear(nn.Module):
    """eps_hat = a_t x_t, the oracle's denoiser."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a.detach().clone())

    def forward(self, x, t):
        return self.a[torch.as_tensor(t) - 1].reshape(-1, 1) * x


class LinearX0(Linear):
    """The same as a prediction of x_0, turned into noise by the schedule that it is handed."""

    def __init__(self, b, abar):
        super().__init__(b)
        self.abar = abar

    def forward(self, x, t):
        a = self.abar[torch.as_tensor(t)].reshape(-1, 1)
        return (x - a.sqrt() * super().forward(x, t)) / (1 - a).sqrt()


def quality(x):
    """The oracle's f for samples whose mean is known to be 0."""
    return (x.square().mean().sqrt() - ORACLE.s) ** 2


def new_state(q=Q, net=None, **options):
    small = {
        "T": 50,
        "samples": 256,
        "g_batch": 256,
        "batch_size": 64,
        "inner": 3,
        "draws": 2,
        "warmup": 0,
        "gamma": 1e3,
    }
    return ScheduleLearning(net or Linear(ORACLE.solve_star(q)), q, quality, **(small | {"margin": 0.0} | options))


def solved(q, gamma, x0=DATA, to=torch.float64, **options):
    """State, gradient and info with both networks at their exact minima."""
    state = new_state(q, gamma=gamma, **({"samples": 20_000, "g_batch": 20_000, "draws": 4} | options))
    problem = ScheduleProblem(state, x0)
    star, tilted = Linear(ORACLE.solve_star(state.q)).to(to), Linear(ORACLE.solve_gamma(state.q, gamma)).to(to)
    return state, *problem.estimate(problem, state.z, star, tilted, gamma)


class Exact(ScheduleProblem):
    """Algorithm 6 with the expectations that f and g are samples of."""

    def f(self, z, net, seed, grad_steps=None):
        return ORACLE.f(schedules.expand(z), net.a)

    def g(self, z, net, seed):
        return ORACLE.g(schedules.expand(z), net.a)


def exact(q, gamma, share=1.0):
    """Gradient and info with both networks at their minima; theta_gamma: at that share of the way from theta_star."""
    state = new_state(q, gamma=gamma)
    problem, star, tilted = Exact(state, DATA), ORACLE.solve_star(state.q), ORACLE.solve_gamma(state.q, gamma)
    return problem.estimate(problem, state.z, Linear(star), Linear(star + share * (tilted - star)), gamma)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("q", [Q, END_1])
@pytest.mark.parametrize("gamma", [1.0, 1e3, 1e6])
def test_without_noise_gradient_and_measurements_are_those_of_the_oracle(q, gamma):
    grad, info = exact(q, gamma)
    star, tilted = ORACLE.solve_star(q), ORACLE.solve_gamma(q, gamma)
    expected, _ = estimators.penalty_grad(ORACLE, q, star, tilted, gamma)
    torch.testing.assert_close(grad, expected[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(info["se"], torch.zeros(3, dtype=torch.float64))
    assert info["g_star"] == ORACLE.g(q, star).item() and info["g_gamma"] == ORACLE.g(q, tilted).item()
    assert info["f"] == ORACLE.f(q, tilted).item() and info["f_star"] == ORACLE.value(q).item()
    assert info["moved"] == pytest.approx(((tilted - star).norm() / star.norm()).item())


@pytest.mark.parametrize("gamma", [1e4, 1e6, 1e8])
def test_gradient_is_the_published_table(gamma):
    """With end = 1, where a small gamma gives a wrong sign: rows of the table in start, end and tau."""
    state, grad, info = solved(END_1, gamma)
    exact, _ = estimators.penalty_grad(
        ORACLE, state.q, ORACLE.solve_star(state.q), ORACLE.solve_gamma(state.q, gamma), gamma
    )
    rows = {1e4: (0.0011, -0.0168, -0.0005), 1e6: (0.0196, -0.0581, 0.0007), 1e8: (0.0233, 0.0072, 0.0038)}
    torch.testing.assert_close(exact[:3], torch.tensor(rows[gamma], dtype=torch.float64), atol=6e-5, rtol=0)
    assert ((grad - exact[:3]).abs() < 4 * info["se"] + 1e-4).all()
    assert (info["se"] < 0.02).all()


def test_gradient_at_large_gamma_is_the_hypergradient_and_its_error_shrinks():
    hyper = torch.func.grad(ORACLE.value)(Q)[:3]
    _, grad, info = solved(Q, 1e5, draws=16)
    assert ((grad - hyper).abs() < 4 * info["se"]).all() and (info["se"] < 0.15 * hyper.abs()).all()
    assert info["f_star"] == pytest.approx(ORACLE.value(Q).item(), rel=0.1)
    few = solved(Q, 1e5, draws=16, samples=1250, g_batch=1250)[2]["se"]
    assert (few / info["se"]).log().mean().exp().item() == pytest.approx(4, rel=0.4)  # 16 times the images


def test_measurements_tend_to_those_of_the_oracle():
    _, _, info = solved(Q, 100.0)
    star, tilted = ORACLE.solve_star(Q), ORACLE.solve_gamma(Q, 100.0)
    assert info["g_star"] == pytest.approx(ORACLE.g(Q, star).item(), rel=0.02)
    assert abs(info["gap"] - (ORACLE.g(Q, tilted) - ORACLE.g(Q, star)).item()) < 4 * info["gap_se"]
    assert info["gap_se"] < 0.01 * info["g_star"] * (2 / 20_000) ** 0.5  # the same (x_0, t, eps) on both sides
    absorbed = 1 - (ORACLE.f(Q, tilted) / ORACLE.f(Q, star)).item()
    assert info["absorbed"] == pytest.approx(absorbed, abs=0.03)


@pytest.mark.parametrize(
    "estimator", [estimators.q_grad_reverse, functools.partial(estimators.q_grad_coordinates, delta=1e-4)]
)
def test_any_estimator_of_the_upper_gradient_gives_the_same(estimator):
    expected = solved(Q, 1e3, samples=500, g_batch=500)[1]
    found = solved(Q, 1e3, samples=500, g_batch=500, estimator=estimator)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_denoiser_of_x0_feels_the_schedule_it_is_handed():
    """b_t = E[x_0 | x_t]/x_t held fixed: autograd of the exact objectives through the conversion to noise."""

    def eps(b, q):
        abar = ORACLE.abar(q)[1:]
        return (1 - abar.sqrt() * b) / (1 - abar).sqrt()

    abar = ORACLE.abar(Q)
    b = abar[1:].sqrt() * ORACLE.s**2 / (abar[1:] * ORACLE.s**2 + 1 - abar[1:])
    net, gamma = LinearX0(b, torch.ones(51, dtype=torch.float64)), 50.0
    state = new_state(net=net, gamma=gamma, samples=20_000, g_batch=20_000, draws=8)
    assert torch.equal(state.star.ema.module.abar, state.abar) and (net.abar == 1).all()
    problem, near = ScheduleProblem(state, DATA), LinearX0(1.02 * b, abar)
    state.star.denoiser, state.star.ema.module = net, net
    state.gamma_net.denoiser, state.gamma_net.ema.module = near, near
    grad, info = problem.estimate(problem, state.z, state.star.ema, state.gamma_net.ema, gamma)
    exact = torch.func.grad(
        lambda q: ORACLE.f(q, eps(1.02 * b, q)) + gamma * (ORACLE.g(q, eps(1.02 * b, q)) - ORACLE.g(q, eps(b, q)))
    )(Q)[:3]
    assert ((grad - exact).abs() < 4 * info["se"]).all() and (info["se"] < 0.3 * exact.abs()).any()


LEVELS = oracles.LevelGaussianSchedule(5)


class LinearLevel(nn.Module):
    """eps_hat = a(level) x, the denoiser of few parameters that is told the level."""

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(c.detach().clone())

    def forward(self, x, level):
        place = level.reshape(-1) * 4 / math.pi - 1
        return (torch.cos(torch.arange(len(self.c)) * torch.acos(place)[:, None]) @ self.c)[:, None] * x


def test_a_denoiser_told_the_level_feels_the_schedule_it_is_handed():
    """d_z f at fixed weights, and d_z g, are those of the oracle: both go through what the network is told as well."""
    net = guidance.LevelDenoiser(LinearLevel(LEVELS.solve_star(Q)), LEVELS.abar(Q))
    state = new_state(net=net, samples=20_000, g_batch=20_000)
    problem, z = ScheduleProblem(state, DATA), state.z
    for estimator in (estimators.q_grad_forward, estimators.q_grad_reverse):
        grads = torch.stack([estimator(lambda z, s: problem.f(z, state.star.ema, s), z, seed=i)[0] for i in range(8)])
        wanted = LEVELS.partial(Q)[:3]
        assert ((grads.mean(0) - wanted).abs() < 4 * grads.std(0) / 8**0.5).all()
        assert (grads.std(0) / 8**0.5 < 0.1 * wanted.abs()).all()
    wrong = torch.func.grad(lambda q: ORACLE.f(q, LEVELS.response(LEVELS.abar(Q), net.network.c.detach())))(Q)[:3]
    assert (wrong - wanted).abs().max() > 3 * wanted.abs().max()  # what a network told t would say
    slopes = []
    for i in range(8):
        moving = z.clone().requires_grad_()
        slopes += torch.autograd.grad(problem.g(moving, state.star.ema, i), moving)
    wanted = torch.func.grad(lambda q: LEVELS.g(q, net.network.c.detach()))(Q)[:3]
    slopes = torch.stack(slopes)
    assert ((slopes.mean(0) - wanted).abs() < 4 * slopes.std(0) / 8**0.5 + 1e-3 * wanted.abs()).all()


def test_algorithm_6_trains_and_saves_networks_that_are_told_the_level(tmp_path):
    def fresh():
        return new_state(net=guidance.LevelDenoiser(LinearLevel(LEVELS.solve_star(Q)), LEVELS.abar(Q)), rate=0.05)

    state = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the levels move, and the networks are trained on them
        list(learn_schedule(state, DATA, steps=2))
    for net in (state.star.denoiser, state.gamma_net.ema.module):
        assert torch.equal(net.abar, state.abar) and not torch.equal(net.abar, LEVELS.abar(Q))
    again = fresh()
    path = tmp_path / "state.safetensors"
    for _ in training.checkpointed(learn_schedule(again, DATA, steps=1), again, path, steps=1):
        pass
    resumed = fresh()
    for _ in training.checkpointed(learn_schedule(resumed, DATA, steps=2), resumed, path, steps=2):
        pass
    assert equal(resumed.tensors(), state.tensors()) and torch.equal(resumed.star.denoiser.abar, state.abar)
    scale = schedules.LOG_NSR
    other = new_state(net=guidance.LevelDenoiser(LinearLevel(LEVELS.solve_star(Q)), LEVELS.abar(Q), scale), rate=0.05)
    with pytest.raises(ValueError, match=r"the saved run has other weights .*told_angle.*told_log_nsr: None"):
        other.load(*files.load_state(path))


# ---------------------------------------------------------------- the networks


def test_training_theta_gamma_finds_the_displacement_of_the_oracle():
    """theta_gamma - theta_star after many inner steps, against Newton's solution; common draws cancel the noise."""
    state = new_state(gamma=100.0, samples=1000, batch_size=1000, inner=300, lr=2e-3, ema_decay=0.97, grad_steps=None)
    problem = ScheduleProblem(state, DATA)
    star, tilted = problem.solve_star(state.z), problem.solve_gamma(state.z, 100.0)
    found = (tilted.module.a - star.module.a).detach()
    exact = ORACLE.solve_gamma(state.q, 100.0) - ORACLE.solve_star(state.q)
    assert found @ exact / found.norm() / exact.norm() > 0.99
    assert found @ exact / (exact @ exact) == pytest.approx(1, abs=0.2)


def test_zeroth_order_in_the_weights_is_pathwise_with_noise():
    """200 directions in 50 weights: along the truth right to one part in ten, across it noise of |g| sqrt(50/200)."""
    state = new_state(grad_steps=None, sample_steps=3)
    exact, noisy = (
        torch.autograd.grad(ScheduleProblem(s, DATA)._upper(s.z, s.gamma_net.denoiser, 7), s.gamma_net.denoiser.a)[0]
        for s in (state, new_state(sample_steps=3, directions=200, delta=1e-4))
    )
    assert noisy @ exact / (exact @ exact) == pytest.approx(1, abs=0.4)
    assert (noisy - exact).norm() / exact.norm() == pytest.approx(0.5, abs=0.25)


def test_truncation_moves_only_what_the_last_steps_use():
    state = new_state(grad_steps=2, gamma=1.0, sample_steps=5)
    problem = ScheduleProblem(state, DATA)
    net = state.gamma_net.denoiser
    value = problem._upper(state.z, net, 0)
    (slope,) = torch.autograd.grad(value, net.a)
    assert (slope.nonzero()[:, 0] + 1).tolist() == sorted(state.ts)[:2]
    zeroth = dataclasses.replace(state, directions=1)
    assert torch.autograd.grad(ScheduleProblem(zeroth, DATA)._upper(state.z, net, 0), net.a)[0].count_nonzero() == 50


def test_both_networks_train_on_the_same_draws():
    """With f/gamma too small to be seen they stay equal, bit for bit."""
    state = new_state(gamma=1e300)
    record = next(learn_schedule(state, DATA, steps=1))
    assert torch.equal(state.star.denoiser.a, state.gamma_net.denoiser.a)
    assert record.moved == 0 and "theta_gamma is theta_star bit for bit" in record.warning
    assert not torch.equal(state.star.denoiser.a, ORACLE.solve_star(Q))


def test_the_schedule_moves_to_the_optimum_of_the_oracle():
    options = {"samples": 1000, "g_batch": 1000, "batch_size": 1000, "inner": 10, "grad_steps": None, "lr": 5e-3}
    state = new_state(gamma=100.0, ema_decay=0.9, rate=0.015, val=validate, val_every=1, **options)
    records = list(learn_schedule(state, DATA, steps=16))
    assert state.best_val < 0.1 * records[0].val and records[-1].val < 0.3 * records[0].val
    assert all(record.moved > 0 for record in records)
    schedules.check(state.q, 50)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_projection_keeps_a_margin_and_does_not_drift(kind):
    q = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
    state = ScheduleLearning(Linear(torch.zeros(50)), q, quality, kind=kind, T=50, margin=0.02)
    far = schedules.reduce(q, kind) + torch.tensor([-9.0, 9.0, 20.0][: len(state.z)], dtype=torch.float64)
    for z in (schedules.reduce(q, kind), far, -far):
        once = state.project(z)
        torch.testing.assert_close(state.project(once), once, rtol=0, atol=1e-12)
        expanded = schedules.expand(once, kind)
        schedules.check(expanded, 50, kind)
        for i, (low, high) in enumerate(schedules.BOUNDS[kind][: len(once)]):
            assert low + 0.02 - 1e-9 <= expanded[i] <= high - 0.02 + 1e-9


# ---------------------------------------------------------------- seeds


def test_every_stream_of_every_seed_draws_its_own():
    """x_T, batches and training draws of runs 0, 1, 2, ...: no two alike, though a seed keeps 32 bits."""
    runs, steps, drawn, records = [*range(6), 1000, 1002, 1004, -1, 2**31, 2**32, 2**32 + 2, 10**20], 2, {}, []
    net = Linear(ORACLE.solve_star(Q))
    for run in runs:
        seen = []

        def spy(f, z, seed, seen=seen):
            seen.append(seed)
            return estimators.q_grad_reverse(f, z, seed=seed)

        state = new_state(seed=run, estimator=spy, sample_steps=1, samples=8, g_batch=8, batch_size=8)
        drawn.setdefault("training", []).append(torch.rand(1, generator=state.star.generator).item())
        records += learn_schedule(state, DATA[:500], steps=steps)
        problem = ScheduleProblem(state, DATA[:500])
        seen += [derive_seed("theta_gamma", run, i) for i in range(steps * state.inner)]
        drawn.setdefault("seeds", []).extend(seen)
        drawn.setdefault("f", []).extend(problem.f(Q[:3], net, seed).item() for seed in seen)
        drawn.setdefault("g", []).extend(problem.g(Q[:3], net, seed).item() for seed in seen)
    drawn |= {name: [getattr(record, name) for record in records] for name in ("f_star", "g_star", "se")}
    assert len(drawn["seeds"]) == len(runs) * steps * (2 + 3)
    for name, values in drawn.items():
        assert len({str(value) for value in values}) == len(values), name


def test_the_seeds_of_training_and_of_the_gradient_by_hand(monkeypatch):
    seen, f = [], ScheduleProblem.f

    def spy(self, z, net, seed, grad_steps=None):
        seen.append((net is self.state.gamma_net.denoiser, seed))
        return f(self, z, net, seed, grad_steps)

    monkeypatch.setattr(ScheduleProblem, "f", spy)
    list(learn_schedule(new_state(seed=5, estimator=estimators.q_grad_reverse), DATA, steps=2))
    assert [seed for training, seed in seen if training] == [derive_seed("theta_gamma", 5, i) for i in range(6)]
    expected = [derive_seed("gradient", 5, k, i) for k in range(2) for i in range(2) for _ in ("f", "f_star")]
    assert [seed for training, seed in seen if not training] == expected


def test_x_T_is_independent_of_the_batch_of_the_same_seed():
    """f and g of one seed have streams of their own: else x_T would be the noise and the rows of g once more."""
    correlations = []
    for seed in range(400):
        x_T, eps = (
            torch.randn(256, 1, generator=torch.Generator().manual_seed(derive_seed(name, seed)), dtype=torch.float64)
            for name in ("x_T", "batch")
        )
        correlations.append((x_T * eps).mean().item())
    assert abs(sum(correlations)) / len(correlations) < 4 / (256 * 400) ** 0.5
    state, seen = new_state(sample_steps=1), []
    problem = ScheduleProblem(state, DATA)
    problem.f(state.z, lambda x, t: (seen.append(x), 0 * x)[1], 7)
    stream = torch.Generator().manual_seed(derive_seed("x_T", 7))
    assert torch.equal(seen[0], torch.randn(256, 1, generator=stream, dtype=torch.float64))


@pytest.mark.parametrize("seed", [1.5, True, None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(TypeError, match=f"a seed is derived from texts and integers, at least one, not from {seed}"):
        new_state(seed=seed)


# ---------------------------------------------------------------- networks with noise and statistics of their own


class Noisy(Linear):
    """With dropout, a batch norm and noise that no mode turns off."""

    def __init__(self, a, noise=0.0):
        super().__init__(a)
        self.drop, self.norm, self.noise = nn.Dropout(0.3), nn.BatchNorm1d(1).double(), noise

    def forward(self, x, t):
        return self.norm(super().forward(self.drop(x), t)) + self.noise * torch.randn_like(x)


def noisy(noise=0.0):
    net = Noisy(ORACLE.solve_star(Q), noise)
    net.norm.running_mean += 0.1
    return net


@pytest.mark.parametrize("training", [True, False])
def test_f_and_g_come_from_the_seed_alone_whatever_the_mode(training):
    """The values are those of the network in evaluation mode; modes and global generator are left as they were."""
    problem = ScheduleProblem(new_state(), DATA)
    net, still = noisy().train(training), noisy().eval()
    net.drop.train(not training)
    before, statistics = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    z = problem.state.z
    for part in (problem.f, problem.g):
        expected = part(z, lambda x, t: still(x, t), 5)
        for seed in (1, 2):
            torch.manual_seed(seed)
            assert torch.equal(part(z, net, 5), expected) and not torch.equal(part(z, net, 6), expected)
            drawn = torch.rand(3)
            torch.manual_seed(seed)
            assert torch.equal(drawn, torch.rand(3))
        assert [m.training for m in net.modules()] == before and equal(net.state_dict(), statistics)
        random = noisy(noise=0.1).train(training)
        torch.manual_seed(3)
        value = part(z, random, 5)
        assert torch.equal(part(z, random, 5), value) and not torch.equal(value, expected)


def test_dropout_and_batch_norm_in_the_gradient_and_in_training():
    """Forward mode, the default, with a batch norm; both modes of differentiation agree; training has its dropout."""
    states = [new_state(net=noisy(), estimator=e) for e in (estimators.q_grad_forward, estimators.q_grad_reverse)]
    seen = []
    for state in states:
        for part in (state.star, state.gamma_net):
            part.denoiser.drop.register_forward_hook(lambda m, *_: seen.append(m.training))
    forward, reverse = (next(learn_schedule(state, DATA, steps=1)) for state in states)
    torch.testing.assert_close(forward.grad, reverse.grad, rtol=1e-8, atol=1e-8)
    assert forward.f == reverse.f and forward.g_gamma == reverse.g_gamma
    one = (3 * [True]) + 3 * ([True] + 10 * [False])  # theta_star's steps; theta_gamma's, each with f in 10 DDIM steps
    assert seen == 2 * one
    problem, state = ScheduleProblem(states[0], DATA), states[0]
    again = [problem.estimate(problem, state.z, state.star.ema, state.gamma_net.ema, 1e3)[0] for _ in range(2)]
    assert torch.equal(*again)
    masks = [next(learn_schedule(new_state(net=net), DATA, steps=1)).f for net in (noisy(), noisy())]
    assert masks[0] == masks[1] == forward.f


def test_zeroth_order_in_the_weights_evaluates_too():
    state = new_state(net=noisy(), directions=2, sample_steps=3)
    problem, net = ScheduleProblem(state, DATA), state.gamma_net.denoiser.train()
    one, two = (problem._upper(state.z, net, 0).item() for _ in range(2))
    assert one == two and net.drop.training and net.norm.num_batches_tracked == 0


def test_resume_is_bit_for_bit_with_dropout_and_batch_norm(tmp_path):
    def run(path, steps):
        state = new_state(net=noisy(noise=0.01))
        loop = learn_schedule(state, DATA, steps=steps)
        return state, list(training.checkpointed(loop, state, tmp_path / path, steps=steps))

    whole, records = run("whole", 4)
    run("parts", 2)
    torch.rand(7)  # the global generator is elsewhere
    resumed, rest = run("parts", 4)
    assert all(equal(a, b) for a, b in zip(records[2:], rest, strict=True)) and equal(whole, resumed)


def test_a_quality_that_is_a_network_is_evaluated():
    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return quality(self.drop(x))

    state = new_state()
    plain = ScheduleProblem(state, DATA).f(state.z, Linear(ORACLE.solve_star(Q)), 3)
    state.quality = Judge()
    assert torch.equal(ScheduleProblem(state, DATA).f(state.z, Linear(ORACLE.solve_star(Q)), 3), plain)
    assert state.quality.drop.training


class Attention(nn.Module):
    """A denoiser of 4 x 4 images with the attention of torch: `how` names the call."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.outer = how, nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.heads, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.GroupNorm(2, 8)
        for i, w in enumerate(self.parameters()):
            w.data = 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(i))

    def forward(self, x, t):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            h = self.norm(self.inner(x)).flatten(2).transpose(1, 2)
            if self.how == "heads":
                h = h + self.heads(h, h, h)[0]
            else:
                q = h.unflatten(2, (2, 4)).transpose(1, 2)
                h = h + nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            return self.outer(h.transpose(1, 2).unflatten(2, x.shape[2:])).float()


IMAGES = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def on_images(net, **options):
    options = {"T": 20, "sample_steps": 2, "samples": 8, "g_batch": 8, "batch_size": 4, "inner": 2} | options
    return new_state(net=net, **options)


@pytest.mark.parametrize("how", ["fused", "heads"])
def test_attention_has_a_forward_mode(how):
    """By fused kernels it has none in torch: with the plain ones the default estimator and reverse mode agree."""
    records = [
        next(learn_schedule(on_images(Attention(how), estimator=estimator), IMAGES, steps=1))
        for estimator in (estimators.q_grad_forward, estimators.q_grad_reverse)
    ]
    torch.testing.assert_close(records[0].grad, records[1].grad, rtol=1e-3, atol=1e-3 * records[1].grad.abs().max())


def test_where_there_is_no_forward_mode_the_error_names_the_remedy():
    state = on_images(Attention("autocast"))
    before = copy.deepcopy(state.tensors())
    with pytest.raises(RuntimeError, match=r"not in forward mode \(.*\): pass estimator=estimators.q_grad_reverse"):
        next(learn_schedule(state, IMAGES, steps=1))
    assert equal(state.tensors(), before)
    remedied = on_images(Attention("autocast"), estimator=estimators.q_grad_reverse)
    assert torch.isfinite(next(learn_schedule(remedied, IMAGES, steps=1)).grad).all()


@pytest.mark.slow
def test_an_ordinary_unet_with_attention_and_dropout_is_learned_for():
    from diffusers import UNet2DModel

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "dropout": 0.1}
            torch.manual_seed(0)
            self.unet = UNet2DModel(8, 1, 1, **shape, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip

        def forward(self, x, t):
            return self.unet(x, torch.as_tensor(t) - 1).sample

    x0 = torch.nn.functional.interpolate(IMAGES, scale_factor=2)
    records = [
        next(learn_schedule(on_images(Net(), estimator=estimator), x0, steps=1))
        for estimator in (estimators.q_grad_forward, estimators.q_grad_reverse)
    ]
    torch.testing.assert_close(records[0].grad, records[1].grad, rtol=1e-3, atol=1e-3 * records[1].grad.abs().max())


@pytest.mark.slow
def test_images_in_single_precision_with_the_distance_of_features():
    """The shapes of the experiment, at the smallest size: U-Net, classifier, digits; forward and reverse mode agree."""
    x0, _ = data.load("digits", "train")
    classifier, net = networks.load_classifier("mnist8"), networks.Denoiser("tiny")
    reference = distances.moments(networks.reference_features("mnist8", "val"))
    small = {"T": 20, "sample_steps": 2, "samples": 40, "g_batch": 16, "batch_size": 8, "inner": 1, "draws": 2}

    def distance(images, reference=reference):
        return distances.frechet(distances.moments(classifier.features(images)), reference)

    states = [
        ScheduleLearning(net, Q, distance, estimator=estimator, **small)
        for estimator in (estimators.q_grad_forward, estimators.q_grad_reverse)
    ]
    forward, reverse = (next(learn_schedule(state, x0, steps=1)) for state in states)
    torch.testing.assert_close(forward.grad, reverse.grad, rtol=1e-3, atol=1e-3)
    assert forward.cost > reverse.cost and forward.moved == reverse.moved > 0
    assert not any(
        torch.equal(v, w) for v, w in zip(net.parameters(), states[0].star.denoiser.parameters(), strict=True)
    )
    states[0].quality = lambda images: distance(images, (torch.zeros(5), torch.eye(5)))
    with pytest.raises(ValueError, match=r"they must be \(d,\), \(d, d\) with one d"):
        next(learn_schedule(states[0], x0, steps=2))


# ---------------------------------------------------------------- what must be impossible to miss


def test_a_network_that_does_not_move_is_an_error():
    """The released code trains a copy: the optimiser of theta_gamma holds other tensors than the network it serves."""
    for name, word in (("gamma_net", "theta_gamma"), ("star", "theta_star")):
        state = new_state()
        before = copy.deepcopy(state.tensors())
        part = getattr(state, name)
        part.denoiser = copy.deepcopy(part.denoiser)
        with pytest.raises(
            RuntimeError, match=f"no weight of {word} moved in 3 training steps: its optimiser holds other"
        ):
            next(learn_schedule(state, DATA, steps=1))
        assert state.step == 0 and all(torch.equal(v, before[n]) for n, v in state.tensors().items())


@pytest.mark.slow
def test_gamma_in_the_good_range_is_not_complained_about_and_outside_it_is():
    for gamma in (1.0, 10.0):
        assert f"gamma = {gamma:g} is too small: theta_gamma absorbs" in exact(Q, gamma)[1]["warning"]
    for gamma in (1e3, 1e7):
        assert exact(Q, gamma)[1]["warning"] is None and solved(Q, gamma, samples=5000)[2]["warning"] is None
    for gamma in (1e4, 1e6):  # with end = 1 the gradient is wrong up to here: see the table
        assert "is too small" in exact(END_1, gamma)[1]["warning"]
    assert exact(END_1, 1e8)[1]["warning"] is None
    assert "gamma = 6e+12 is too large" in exact(Q, 6e12)[1]["warning"]
    single = {"x0": DATA.float(), "to": torch.float32, "samples": 5000}
    assert solved(Q, 1e3, **single)[2]["warning"] is None
    assert "gamma = 1e+06 is too large: the difference" in solved(Q, 1e6, **single)[2]["warning"]  # six digits earlier


def test_a_penalty_that_is_noise_is_said_so():
    state = new_state(gamma=1e4, samples=500, g_batch=8, draws=4)
    problem = ScheduleProblem(state, DATA)
    star = Linear(ORACLE.solve_star(Q))
    warned = 0
    for k in range(8):
        state.step = k
        noise = torch.randn(50, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        info = problem.estimate(problem, state.z, star, Linear(star.a * (1 + 1e-5 * noise)), 1e4)[1]
        warned += "gap and penalty are within two standard errors" in (info["warning"] or "")
    assert warned >= 3


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_how_far_theta_gamma_has_come_is_measured_and_said(share):
    """By the ratio of the gap to the fall of f, exact for a displacement so small that f is linear."""
    info = exact(Q, 1e3, share)[1]
    assert info["reached"] == pytest.approx(share, rel=0.05)
    said = f"theta_gamma has come {info['reached']:.0%} of its way; lower rate, or raise inner or lr"
    assert info["warning"] == (said if share < 0.5 else None)


def test_a_negative_gap_is_said_so():
    state = new_state(g_batch=5000)
    problem, star = ScheduleProblem(state, DATA), ORACLE.solve_star(Q)
    info = problem.estimate(problem, state.z, Linear(1.2 * star), Linear(star), 1e3)[1]
    assert "is negative: theta_star is not at its minimum" in info["warning"]


# ---------------------------------------------------------------- stopping, resuming, refusing


def test_validation_keeps_the_best_and_patience_ends_the_loop():
    values = iter([3.0, 1.0, 2.0, 2.5, 0.0])
    state = new_state(val=lambda state: next(values), val_every=2, patience=2)
    records = list(learn_schedule(state, DATA, steps=50))
    assert [record.val for record in records] == [3.0, None, 1.0, None, 2.0, None, 2.5]
    assert records[-1].done == "stopped at k = 6: no better validation than 1 in 2 attempts"
    assert state.best_val == 1.0 and torch.equal(state.best_q, records[2].q)
    assert not list(learn_schedule(state, DATA, steps=50))


def test_costs_are_counted():
    """Per step: 2 networks x 3 training steps of 64 at 3; f in theta_gamma's, f, f_star, d_z f and d_z g."""
    state = new_state(estimator=estimators.q_grad_reverse, grad_steps=2, sample_steps=5)
    record = next(learn_schedule(state, DATA, steps=1))
    trained = 2 * 3 * 64 * 3
    upper = 3 * 256 * (5 + 2 + 3)  # five forwards, backward into weights at the first kept step, then into x as well
    outer = 2 * 256 * (5 + 4) + 2 * 256 * 5 + 2 * 2 * 256 * 2
    assert record.cost == state.cost == trained + upper + outer


def annealed_by(factor, k):
    return 1e3 * factor**k


def annealed(k):
    return 1e3 * 1.5**k


def validate(state):
    return ORACLE.value(state.q).item()


def equal(a, b):
    """Equal records or states, tensors bit for bit."""
    if isinstance(a, ScheduleLearning):
        return a.meta() == b.meta() and equal(a.tensors(), b.tensors())
    a, b = (vars(v) if dataclasses.is_dataclass(v) else v for v in (a, b))
    same = [torch.equal(v, b[n]) if isinstance(v, torch.Tensor) else v == b[n] for n, v in a.items()]
    return a.keys() == b.keys() and all(same)


def checkpointed(path, steps, every=1, stop=None):
    state = new_state(gamma=annealed, val=validate, val_every=2)
    loop = training.checkpointed(learn_schedule(state, DATA, steps=steps), state, path, steps=steps, every=every)
    records = []
    for record in loop:
        records.append(record)
        if record.k == stop:
            loop.close()
    return state, records


def test_resume_is_bit_for_bit(tmp_path):
    whole, records = checkpointed(tmp_path / "whole", 7)
    checkpointed(tmp_path / "parts", 7, every=2, stop=2)
    resumed, rest = checkpointed(tmp_path / "parts", 7)
    assert [record.k for record in rest] == [3, 4, 5, 6]
    assert all(equal(a, b) for a, b in zip(records[3:], rest, strict=True)) and equal(whole, resumed)
    assert records[-1].gamma == annealed(6) and whole.best_val < float("inf")


def test_loading_shares_no_memory():
    state = new_state()
    next(learn_schedule(state, DATA, steps=1))
    tensors, meta = state.tensors(), state.meta()
    kept = copy.deepcopy(tensors)
    other = new_state()
    other.load(tensors, meta)
    list(learn_schedule(other, DATA, steps=3))
    assert equal(tensors, kept) and not equal(other.tensors(), kept)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"gamma": 5.0}, "gamma: 1000.0 -> 5.0"),
        ({"gamma": annealed}, "gamma: 1000.0 -> annealed"),
        ({"q": END_1}, r"q: \[0.0, 0.9, 1.0, 0.008\] -> \[0.0, 1.0, 1.0, 0.008\]"),
        ({"rate": (0.1, 0.1, 0.2)}, r"rate: 0.02 -> \[0.1, 0.1, 0.2\]"),
        ({"estimator": estimators.q_grad_reverse}, "estimator: q_grad_forward -> q_grad_reverse"),
        (
            {"estimator": functools.partial(estimators.q_grad_coordinates, delta=0.1)},
            r"estimator: q_grad_forward -> \['q_grad_coordinates', {'delta': 0.1}\]",
        ),
    ],
)
def test_resuming_with_other_parameters_is_refused(tmp_path, option, said):
    state = new_state()
    files.save_state(tmp_path / "state", state.tensors(), state.meta())
    with pytest.raises(ValueError, match=f"the saved run has other parameters \\({said}\\)"):
        new_state(**option).load(*files.load_state(tmp_path / "state"))
    new_state(rate=0.02).load(*files.load_state(tmp_path / "state"))


def test_resuming_with_other_data_or_another_network_is_refused(tmp_path):
    state = new_state()
    next(learn_schedule(state, DATA, steps=1))
    files.save_state(tmp_path / "state", state.tensors(), state.meta())
    for x0 in (DATA * 1.0001, DATA.flip(0), DATA[1:], DATA.float()):
        other = new_state()
        loop = learn_schedule(other, x0, steps=3)
        with pytest.raises(
            ValueError, match=r"the saved run has other data or schedule \(x0: \['torch.float64', \[20000, 1\]"
        ):
            list(training.checkpointed(loop, other, tmp_path / "state", steps=3))
    assert files.load_state(tmp_path / "state")[1]["step"] == 1
    same = new_state()
    loop = learn_schedule(same, DATA.clone(), steps=3)
    assert len(list(training.checkpointed(loop, same, tmp_path / "state", steps=3))) == 2
    with pytest.raises(ValueError, match=r"other weights \(a: torch.float64 \(50,\) -> torch.float64 \(60,\)\)"):
        new_state(net=Linear(torch.zeros(60).double())).load(*files.load_state(tmp_path / "state"))


def test_arguments_of_functions_and_tensors_among_them_are_compared():
    lengths = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)

    def state(*args, scale=1.0, **options):
        estimator = functools.partial(estimators.q_grad_coordinates, delta=scale * lengths)
        return new_state(estimator=estimator, gamma=functools.partial(annealed_by, *args), **options)

    first = state(1.5)
    meta = json.loads(json.dumps(first.meta()))
    state(1.5, inner=np.int64(3)).load(first.tensors(), meta)
    with pytest.raises(ValueError, match=r"gamma: \['annealed_by', 1.5, {}\] -> \['annealed_by', 2.0, {}\]"):
        state(2.0).load(first.tensors(), meta)
    with pytest.raises(
        ValueError, match=r"estimator: .*'delta': \[0.01, 0.02, 0.03\].* -> .*'delta': \[0.02, 0.04, 0.06\]"
    ):
        state(1.5, scale=2.0).load(first.tensors(), meta)


def test_what_is_not_finite_stops_before_anything_is_touched(tmp_path):
    state, _ = checkpointed(tmp_path / "state", 4, every=100)
    before = copy.deepcopy(state.tensors()), state.meta()

    def check(error, said):
        with pytest.raises(error, match=said):
            loop = learn_schedule(state, DATA, steps=9)
            list(training.checkpointed(loop, state, tmp_path / "state", steps=9))
        assert equal(state.tensors(), before[0]) and state.meta() == before[1]
        assert equal(files.load_state(tmp_path / "state")[0], before[0])

    @functools.wraps(quality)  # another function of the same name
    def broken(x):
        return quality(x) * math.nan

    @functools.wraps(quality)
    def broken_in_the_gradient(x):
        return quality(x) if x.requires_grad else quality(x) * math.nan

    @functools.wraps(quality)
    def without_slope(x):
        return quality(x) + (0 * x.mean()).sqrt()

    state.quality = broken
    check(FloatingPointError, "quality is nan for 256 samples that are finite")
    state.quality = broken_in_the_gradient
    check(FloatingPointError, "quality is nan for 256 samples that are finite")
    state.quality = without_slope
    check(FloatingPointError, r"the gradient of the loss is not finite at step 13, though the loss is 0\.")
    state.quality = quality

    @functools.wraps(validate)
    def no_number(state):
        return math.nan

    state.val = no_number
    check(FloatingPointError, "val is nan at k = 4")
    state.val = validate

    @functools.wraps(quality)
    def interrupt(x):
        raise KeyboardInterrupt

    state.quality = interrupt
    check(KeyboardInterrupt, "^$")
    state.quality = quality
    assert [record.k for record in learn_schedule(state, DATA, steps=6)] == [4, 5]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"q": torch.tensor([0.0, 1.5, 1.0, 0.008])}, r"end = 1.5 is outside \[0, 1\] for the cosine schedule"),
        ({"q": Q[:3]}, r"q has shape \(3,\); it must be \(4,\)"),
        ({"q": Q * math.nan}, "start = nan is outside"),
        ({"kind": "quadratic"}, "kind is 'quadratic'"),
        ({"form": "half"}, "form is 'half'"),
        ({"T": 1}, "T is 1; it must be an integer of at least 2"),
        ({"T": 5, "sample_steps": 6}, "sample_steps = 6 must lie in 1..T = 5"),
        ({"sample_steps": 0}, "sample_steps = 0 must be at least 1"),
        ({"samples": 1}, "samples = 1 must be at least 2"),
        ({"samples": 0}, "samples = 0 must be at least 2"),
        ({"draws": 1}, "draws = 1 must be at least 2"),
        ({"inner": 0}, "inner = 0 must be at least 1"),
        ({"gamma": 0.0}, "gamma = 0.0 must be positive and finite"),
        ({"gamma": math.inf}, "gamma = inf must be positive and finite"),
        ({"grad_steps": 0}, "grad_steps = 0 must be at least 1, or None for all"),
        ({"directions": -1}, "directions = -1 must be at least 0"),
        ({"delta": 0.0}, "delta = 0.0 must be at least"),
        ({"rate": 0.0}, "rate = 0.0 must be positive, one number or one for each of 3 coordinates"),
        ({"rate": (0.1, 0.1)}, "one number or one for each of 3 coordinates"),
        ({"margin": math.nan}, "margin = nan must be at least 0"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"lr": -1.0}, "lr = -1.0 must be at least"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0 must be below 1"),
        ({"patience": -1}, "patience = -1 must be at least 0"),
    ],
)
def test_bad_parameters(option, said):
    with pytest.raises(ValueError, match=said):
        new_state(net=Linear(ORACLE.solve_star(Q)), **option)


@pytest.mark.parametrize("x0", [(IMAGES * 127 + 128).byte(), IMAGES * 127.5 + 127.5, IMAGES * 8 + 8])
def test_pixel_values_are_refused(x0):
    said = (
        r"x0 of shape \(40, 1, 4, 4\) has .*values from [01] to (255|16): scale it to about \[-1, 1\], from 0..255 by "
    )
    with pytest.raises(ValueError, match=said):
        next(learn_schedule(on_images(Attention("fused")), x0, steps=1))


def test_weights_that_are_all_zero_have_a_distance():
    problem = ScheduleProblem(new_state(), DATA)
    zero = Linear(torch.zeros(50, dtype=torch.float64))
    info = problem.estimate(problem, problem.state.z, zero, zero, 1e3)[1]
    assert info["moved"] == 0


def test_bad_data_and_bad_quality():
    for x0, said in ((DATA[:1], "at least 2 rows"), (DATA[:0], "at least 2 rows"), (DATA * math.inf, "be finite")):
        with pytest.raises(ValueError, match=f"x0 of shape .* must .*{said}"):
            next(learn_schedule(new_state(), x0, steps=1))
    state = new_state()
    with pytest.raises(FloatingPointError, match="the samples at q = .* are not finite: lower lr = 0.001 or rate"):
        ScheduleProblem(state, DATA).f(state.z, Linear(torch.full((50,), math.inf)), 0)
    state.quality = lambda x: x.mean(1)
    with pytest.raises(ValueError, match=r"quality gave shape \(256,\); it must give one number"):
        next(learn_schedule(state, DATA, steps=1))
    with pytest.raises(ValueError, match=r"gamma = -1.0 at k = 0; it must be positive"):
        next(learn_schedule(new_state(gamma=lambda k: -1.0), DATA, steps=1))
