import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bilevel_core import algorithms, estimators, guidance, schedules
from bilevel_core.lab import files, oracles, training
from bilevel_core.seeds import derive_seed

ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 20)


class Net(nn.Module):
    """A small denoiser of (B, 2) points."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))
        for i, w in enumerate(self.parameters()):
            w.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))

    def forward(self, x, t):
        time = torch.as_tensor(t).expand(len(x)).to(x)[:, None] / 20
        return self.layers(torch.cat([x, time], 1))


DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(9)) * 0.3 + 1


class Noisy(Net):
    """With dropout, a batch norm, one that is frozen, and noise that no mode turns off."""

    def __init__(self, share=0.5, noise=0.0):
        super().__init__()
        self.drop, self.norm, self.frozen, self.noise = nn.Dropout(share), nn.BatchNorm1d(2), nn.BatchNorm1d(2), noise
        self.frozen.eval()

    def forward(self, x, t):
        return self.frozen(self.norm(super().forward(self.drop(x), t))) + self.noise * torch.randn_like(x)


SEEDS = (-1, 2**32, 3 + 2**32, 1.5, True, "3")  # what a generator does not keep as it is


def new_state(net=None, **options):
    return algorithms.ScoreTraining(net or Net(), **({"batch_size": 16, "lr": 1e-2, "warmup": 5, "seed": 3} | options))


# ---------------------------------------------------------------- Algorithm 1


@pytest.mark.filterwarnings("error:gamma = ")  # at convergence every gradient is small, and that is no rounding
@pytest.mark.parametrize("gamma, root", [(1.0, 1.0907), (10.0, 1.1931), (1000.0, 1.2082)])
@pytest.mark.parametrize("lam_0", [0.3, 20.0])
def test_algorithm_1_learns_lambda_on_the_mixture(gamma, root, lam_0):
    """It stops at the root of the penalised gradient, so at the true optimum 1.2084 only for large gamma."""
    problem = oracles.Mixture1D().problem()
    x = torch.tensor(lam_0, dtype=torch.float64).log()

    def clipped(k, grad):  # steps of at most 0.3 in log lam
        return (0.25 * grad).clamp(-0.3, 0.3)

    *_, last = algorithms.penalty_descent(problem, x, gamma=gamma, step=clipped, steps=60)
    assert last.x_next.exp().item() == pytest.approx(root, abs=2e-3)
    assert last.info["gap"] >= 0


def test_algorithm_1_gradient_is_the_closed_form():
    problem = oracles.Mixture1D().problem()
    lam = torch.tensor(0.7, dtype=torch.float64)
    step = next(algorithms.penalty_descent(problem, lam.log(), gamma=50.0, step=0.1, steps=1))
    expected = lam * problem.penalty_grad(lam, 50.0)  # in log lam
    torch.testing.assert_close(step.grad, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.x_next, lam.log() - 0.1 * expected)
    assert step.info["f"] + 50 * step.info["gap"] == pytest.approx(problem.penalty(lam, 50.0).item(), rel=1e-9)


def test_algorithm_1_learns_a_schedule_and_resumes():
    problem = oracles.LinearGaussianSchedule(T=20, ts=[20, 15, 10, 5])
    q = torch.tensor([0.1, 0.7, 1.0, 0.1], dtype=torch.float64)
    seen = []

    def project(q):
        seen.append(q)
        return schedules.project(q, 20, margin=0.01)

    def run(**options):
        return algorithms.penalty_descent(problem, q, gamma=lambda k: 1e3 * 2**k, step=0.3, project=project, **options)

    whole = list(run(steps=6))
    values = [problem.value(record.x).item() for record in whole]
    assert values[-1] < 0.5 * values[0]
    assert [record.gamma for record in whole] == [1e3 * 2**k for k in range(6)] and len(seen) == 7
    half = list(run(steps=3))
    rest = list(run(steps=6, resume=half[-1]))
    assert [record.k for record in rest] == [3, 4, 5]
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(whole[3:], rest, strict=True))


def test_algorithm_1_refuses_bad_gamma_and_gradients_that_are_not_finite():
    problem = oracles.Mixture1D().problem()
    x = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="gamma = -1"):
        next(algorithms.penalty_descent(problem, x, gamma=-1.0, step=0.1, steps=1))

    def broken(problem, x, p_star, p_gamma, gamma):
        return x * float("nan"), {}

    with pytest.raises(FloatingPointError, match="not finite"):
        next(algorithms.penalty_descent(problem, x, gamma=1.0, step=0.1, steps=1, estimator=broken))


def test_a_gradient_that_is_rounding_is_said_so():
    """The smallest difference of two slopes of g times gamma; at a good gamma, nothing is said even at convergence."""
    problem = oracles.Mixture1D().problem()
    for gamma, warned in ((1e3, False), (1e8, False), (1e16, True), (1e20, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for lam in (0.5, 1.2084, 20.0):
                x = torch.tensor(lam, dtype=torch.float64).log()
                p_star, p_gamma = problem.solve_star(x), problem.solve_gamma(x, gamma)
                estimators.penalty_grad(problem, x, p_star, p_gamma, gamma)
        said = f"gamma = {gamma:g} is too large: the gradient is of the size of its rounding"
        assert {str(one.message) for one in caught} == ({said} if warned else set())


def test_a_sign_error_in_the_penalty_would_be_seen():
    problem = oracles.Mixture1D().problem()
    x, gamma = torch.tensor(-0.5, dtype=torch.float64), 10.0
    p_star, p_gamma = problem.solve_star(x), problem.solve_gamma(x, gamma)
    right, _ = estimators.penalty_grad(problem, x, p_star, p_gamma, gamma)
    swapped, _ = estimators.penalty_grad(problem, x, p_gamma, p_star, gamma)
    assert right * swapped < 0


# ---------------------------------------------------------------- Algorithm 3


def test_training_learns_the_exact_denoiser_of_a_gaussian():
    state = new_state(batch_size=256, lr=2e-2, warmup=10, decay_steps=600, ema_decay=0.98)
    law = oracles.Gaussian(torch.ones(2, dtype=torch.float64), 0.09 * torch.eye(2, dtype=torch.float64))
    data = (1 + 0.3 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))).float()
    *_, record = algorithms.train_score(state, data, ABAR, steps=600)
    assert record.step == 600 and record.cost == 600 * 256 * 3
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    before, after = [], []
    for t in (5, 10, 15, 20):
        x_t = schedules.noise(1 + 0.3 * x, x.flip(0), ABAR[t])
        exact = law.denoiser(ABAR)(x_t, t)
        after.append((state.ema(x_t, t) - exact).square().mean().item())
        before.append((Net()(x_t, t) - exact).square().mean().item())
    assert max(after) < 0.02 and sum(after) < 0.05 * sum(before)


def test_the_first_step_is_what_algorithm_3_says():
    """One step by hand: the same draws, the same loss, AdamW at the warmed-up rate, and the average follows."""
    state = new_state()
    by_hand, g = copy.deepcopy(state.denoiser), torch.Generator().manual_seed(3)
    x = DATA[torch.randint(64, (16,), generator=g)]
    t = torch.randint(1, 21, (16,), generator=g)
    eps = torch.randn(x.shape, generator=g)
    a = ABAR[t][:, None]
    loss = (by_hand((a.sqrt() * x + (1 - a).sqrt() * eps).float(), t) - eps).square().mean()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2 / 5)
    loss.backward()
    optimizer.step()
    record = next(algorithms.train_score(state, DATA, ABAR, steps=1))
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    for ours, ema, theirs in zip(
        state.denoiser.parameters(), state.ema.parameters(), by_hand.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ema, theirs)  # the first average is the first iterate


def test_moving_average_and_learning_rate():
    state = new_state(ema_decay=0.9, decay_steps=40)
    expected, rates = None, []
    for n, _ in enumerate(algorithms.train_score(state, DATA, ABAR, steps=30)):
        now = next(state.denoiser.parameters()).detach().clone()
        keep = min(0.9, (1 + n) / (10 + n))
        expected = now if expected is None else keep * expected + (1 - keep) * now
        rates.append(state.optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(next(state.ema.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert rates[0] == pytest.approx(1e-2 / 5) and max(rates) <= 1e-2 and rates[29] < 0.2 * max(rates)


def equal_states(a, b):
    tensors = b.tensors()
    return a.meta() == b.meta() and all(torch.equal(v, tensors[k]) for k, v in a.tensors().items())


def test_resume_is_bit_for_bit(tmp_path):
    whole = new_state()
    records = list(
        training.checkpointed(algorithms.train_score(whole, DATA, ABAR, steps=30), whole, tmp_path / "a", steps=30)
    )
    first = new_state()
    loop = training.checkpointed(
        algorithms.train_score(first, DATA, ABAR, steps=30), first, tmp_path / "b", steps=30, every=4
    )
    for record in loop:
        if record.step == 13:
            loop.close()
    second = new_state()
    rest = list(
        training.checkpointed(algorithms.train_score(second, DATA, ABAR, steps=30), second, tmp_path / "b", steps=30)
    )
    assert [r.step for r in rest] == list(range(14, 31)) and rest == records[13:]
    assert equal_states(second, whole) and len(second.losses) == 30
    done = new_state()
    assert not list(
        training.checkpointed(algorithms.train_score(done, DATA, ABAR, steps=30), done, tmp_path / "b", steps=30)
    )


def test_resume_with_other_parameters_is_refused(tmp_path):
    state = new_state()
    list(training.checkpointed(algorithms.train_score(state, DATA, ABAR, steps=3), state, tmp_path / "s", steps=3))
    other = new_state(lr=5e-3)
    with pytest.raises(ValueError, match=r"lr: 0.01 -> 0.005"):
        other.load(*files.load_state(tmp_path / "s"))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    state = new_state()
    weights = copy.deepcopy(state.denoiser.state_dict())
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step 1; lower lr = 0\.01"):
            next(algorithms.train_score(state, DATA, ABAR, steps=5, extra=lambda net, i, v=value: torch.tensor(v)))
    assert all(torch.equal(weights[k], v) for k, v in state.denoiser.state_dict().items()) and state.step == 0


def test_a_gradient_that_is_not_finite_is_named_and_stops_before_the_weights_change():
    state = new_state()
    weights = copy.deepcopy(state.denoiser.state_dict())

    def norm_at_zero(net, i):
        return (0 * next(net.parameters())).square().sum().sqrt()

    with pytest.raises(FloatingPointError, match=r"the gradient of the loss is not finite at step 1, though .* is \d"):
        next(algorithms.train_score(state, DATA, ABAR, steps=5, extra=norm_at_zero))
    assert all(torch.equal(weights[k], v) for k, v in state.denoiser.state_dict().items()) and state.step == 0
    assert all(w.grad is None for w in state.denoiser.parameters())


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"lr": -1.0}, {"ema_decay": 1.0}, {"warmup": -1}, *({"seed": s} for s in SEEDS)]
)
def test_training_parameters_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        new_state(**option)


# ---------------------------------------------------------------- networks with noise and statistics of their own


def modes(net):
    return [module.training for module in net.modules()]


def test_training_mode_lasts_for_a_step_and_modes_come_back():
    for start in (True, False):
        state, seen = new_state(Noisy().train(start)), []
        state.denoiser.frozen.train(not start)
        state.denoiser.drop.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        before = modes(state.denoiser)
        for _ in algorithms.train_score(state, DATA, ABAR, steps=3):
            assert modes(state.denoiser) == before and not any(modes(state.ema))
        assert seen == [True] * 3 and state.denoiser.norm.num_batches_tracked == 3

        def broken(net, i):
            raise KeyError

        with pytest.raises(KeyError):
            next(algorithms.train_score(state, DATA, ABAR, steps=4, extra=broken))
        assert modes(state.denoiser) == before


def test_dropout_acts_in_training_and_comes_from_the_seed():
    """By hand: the first loss, with the mask of the stream "network" of seed and step; other masks in other steps."""
    by_hand, state = Noisy().train(), new_state(Noisy())
    g = torch.Generator().manual_seed(3)
    x = DATA[torch.randint(64, (16,), generator=g)]
    t = torch.randint(1, 21, (16,), generator=g)
    eps = torch.randn(x.shape, generator=g)
    torch.manual_seed(derive_seed("network", 3, 0))
    loss = (by_hand(schedules.noise(x, eps, ABAR[t]), t) - eps).square().mean().item()
    assert next(algorithms.train_score(state, DATA, ABAR, steps=1)).loss == pytest.approx(loss, rel=1e-6)
    masks, state = [], new_state(Noisy(), lr=1e-12)
    state.denoiser.drop.register_forward_hook(lambda _, x, y: masks.append(y[0] != 0))
    list(algorithms.train_score(state, DATA, ABAR, steps=2))
    assert 0.2 < torch.cat(masks).float().mean() < 0.8 and not torch.equal(*masks)


def test_training_neither_sees_nor_moves_the_global_generator():
    finals = []
    for seed in (1, 2):
        state = new_state(Noisy(noise=0.1))
        torch.manual_seed(seed)
        losses = [record.loss for record in algorithms.train_score(state, DATA, ABAR, steps=5)]
        finals.append((losses, state))
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(3))
    assert finals[0][0] == finals[1][0] and equal_states(finals[0][1], finals[1][1])


def test_the_average_is_evaluated_without_dropout_and_with_the_statistics_of_the_last_step():
    state = new_state(Noisy())
    list(algorithms.train_score(state, DATA, ABAR, steps=10))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    one, two = state.ema(x, 3), state.ema(x, 3)
    assert torch.equal(one, two)
    torch.testing.assert_close(state.ema(x[:1], 3), one[:1])  # a batch norm of the batch would differ
    assert torch.equal(state.ema.module.norm.running_mean, state.denoiser.norm.running_mean)
    assert not torch.equal(state.denoiser.norm.running_mean, torch.zeros(2))
    assert not torch.equal(state.ema.module.norm.weight, state.denoiser.norm.weight)


def test_resume_is_bit_for_bit_with_dropout_and_batch_norm(tmp_path):
    def run(state, path, steps):
        loop = algorithms.train_score(state, DATA, ABAR, steps=steps)
        return list(training.checkpointed(loop, state, path, steps=steps))

    whole, second = new_state(Noisy(noise=0.1)), new_state(Noisy(noise=0.1))
    records = run(whole, tmp_path / "a", 12)
    run(new_state(Noisy(noise=0.1)), tmp_path / "b", 5)
    torch.rand(7)  # the global generator is elsewhere
    assert run(second, tmp_path / "b", 12) == records[5:] and equal_states(whole, second)


# ---------------------------------------------------------------- the right data, and the same again


@pytest.mark.parametrize(
    ("x0", "said"),
    [
        ((DATA * 40 + 128).byte(), r"has torch.uint8 values from \d+ to \d+: scale it to about \[-1, 1\], from 0..255"),
        (
            (DATA * 40 + 128),
            r"\(64, 2\) has torch.float32 values from \d+\.?\d* to \d+\.?\d*: scale it to about \[-1, 1\]",
        ),
        (torch.arange(17.0).expand(20, 17), r"has torch.float32 values from 0 to 16: scale it"),
        (torch.ones(4, 2, dtype=torch.bool), r"has torch.bool values from 1 to 1"),
        (torch.tensor([[0.0, math.nan]]), "must be finite"),
        (torch.tensor([[0.0, -math.inf]]), "must be finite"),
        (DATA[:0], "is empty"),
    ],
)
def test_data_that_are_not_of_the_scale_of_noise_are_refused(x0, said):
    with pytest.raises(ValueError, match=f"^x0 of shape .*{said}"):
        next(algorithms.train_score(new_state(), x0, ABAR, steps=1))


def test_data_with_an_outlier_or_of_other_types_are_taken():
    outlier = torch.cat([DATA, torch.full((1, 2), 20.0)])
    for x0, net in ((outlier, Net()), (DATA.double(), Net().double()), (DATA.bfloat16(), Net().bfloat16())):
        next(algorithms.train_score(new_state(net), x0, ABAR, steps=1))


def saved(net=None):
    state = new_state(net)
    list(algorithms.train_score(state, DATA, ABAR, steps=2))
    return copy.deepcopy(state.tensors()), state.meta()


@pytest.mark.parametrize(
    ("x0", "abar"),
    [
        (DATA + 1e-6, ABAR),
        (DATA.flip(0), ABAR),
        (DATA.flip(1), ABAR),
        (DATA[:-1], ABAR),
        (DATA.double(), ABAR),
        (DATA, ABAR**1.0001),
        (DATA, ABAR[:-1]),
    ],
)
def test_a_resumed_run_with_other_data_or_another_schedule_is_refused(x0, abar):
    state = new_state()
    state.load(*saved())
    for _ in range(2):  # also when tried again
        with pytest.raises(ValueError, match=r"the saved run has other data or schedule \((x0|abar): .* -> .*\)"):
            next(algorithms.train_score(state, x0, abar, steps=3))
    assert state.step == 2 and state.meta() == saved()[1]
    next(algorithms.train_score(state, DATA.clone(), ABAR.clone(), steps=3))


def test_a_state_that_has_seen_other_data_compares_them_with_those_of_the_run_it_is_loaded_from():
    state, other = new_state(), DATA / 2
    next(algorithms.train_score(state, other, ABAR, steps=1))
    state.load(*saved())
    with pytest.raises(ValueError, match="the saved run has other data or schedule"):
        next(algorithms.train_score(state, other, ABAR, steps=3))


def test_a_run_that_goes_on_may_be_given_other_data_and_old_checkpoints_say_nothing_about_them():
    state = new_state()
    next(algorithms.train_score(state, DATA, ABAR, steps=1))
    next(algorithms.train_score(state, DATA / 2, ABAR**2, steps=2))
    tensors, meta = saved()
    old = new_state()
    old.load(tensors, {name: value for name, value in meta.items() if name != "given"})
    next(algorithms.train_score(old, DATA / 2, ABAR, steps=3))


def test_a_fingerprint_is_of_the_values_not_of_the_memory():
    x = torch.randn(4, 3, 6, 5)
    print_ = algorithms.fingerprint(x)
    assert print_[:2] == ["torch.float32", [4, 3, 6, 5]]
    assert print_ == algorithms.fingerprint(x.contiguous(memory_format=torch.channels_last))
    assert print_ == algorithms.fingerprint(torch.cat([x, x])[:4].requires_grad_())
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    assert shifted.storage_offset() == 1 and print_ == algorithms.fingerprint(shifted)
    others = [x.flip(i) for i in range(4)] + [x.transpose(2, 3).reshape(x.shape), x.double(), x.half(), x[:3]]
    assert len({str(algorithms.fingerprint(y)) for y in [x, *others]}) == 1 + len(others)
    assert len({str(algorithms.fingerprint(v)) for v in (x[:, 0, 0, 0], x[:1, :1, 0, 0], x[:2, 0].bfloat16())}) == 3


def test_resuming_with_another_network_is_refused_and_says_what_differs():
    wide = Net()
    wide.layers[0], wide.layers[2] = nn.Linear(3, 32), nn.Linear(32, 2)
    with pytest.raises(ValueError, match="the saved run has other weights ") as caught:
        new_state(wide).load(*saved())
    said = "layers.0.bias: torch.float32 (16,) -> torch.float32 (32,), layers.0.weight: torch.float32 (16, 3) -> "
    assert said in str(caught.value) and "restore them or use another work_dir" in str(caught.value)
    with pytest.raises(ValueError, match=r"norm.bias: None -> torch.float32 \(2,\), .*, and 1 more\)"):
        new_state(Noisy()).load(*saved())
    with pytest.raises(ValueError, match=r"norm.bias: torch.float32 \(2,\) -> None"):
        new_state().load(*saved(Noisy()))
    with pytest.raises(ValueError, match=r"layers.0.bias: torch.float32 \(16,\) -> torch.float64 \(16,\)"):
        new_state(Net().double()).load(*saved())


def test_numbers_of_numpy_are_as_good_as_pythons(tmp_path):
    numpy = new_state(seed=np.int64(3), lr=np.float64(1e-2), batch_size=np.int32(16))
    list(training.checkpointed(algorithms.train_score(numpy, DATA, ABAR, steps=2), numpy, tmp_path / "s", steps=2))
    state = new_state()
    state.load(*files.load_state(tmp_path / "s"))
    assert equal_states(state, numpy) and json.loads(json.dumps(numpy.meta())) == state.meta()


# ---------------------------------------------------------------- wrappers of a denoiser


def test_cost_meter_counts_forward_backward_and_tangents():
    net = Net()
    meter, x = guidance.CostMeter(net), torch.randn(5, 2)
    with torch.no_grad():
        meter(x, 3)
    assert (meter.cost, meter.calls) == (5, 1)
    meter.cost = 0
    meter(x, 3).sum().backward()  # weights only
    assert meter.cost == 5 * 3
    meter.cost = 0
    meter(x.requires_grad_(), 3).sum().backward()  # weights and input
    assert meter.cost == 5 * 4
    meter.cost, frozen = 0, guidance.CostMeter(Net().requires_grad_(False))
    frozen(x, 3).sum().backward()
    assert frozen.cost == 5 * 2
    frozen.cost = 0
    torch.func.jvp(lambda x: frozen(x, 3), (x.detach(),), (torch.ones(5, 2),))
    assert frozen.cost == 5 * 2


def test_x0_and_eps_are_two_views_of_one_prediction():
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([1, 5, 10, 20])
    denoise_x0 = lambda x, t: 0.3 * x + 1  # noqa: E731
    eps_hat = guidance.eps_from_x0(denoise_x0, ABAR)(x, t)
    torch.testing.assert_close(guidance.x0_from_eps(x, eps_hat, ABAR[t]), denoise_x0(x, t))
    torch.testing.assert_close(schedules.noise(denoise_x0(x, t), eps_hat, ABAR[t]), x)


def test_clipping_x0_bounds_the_guess_and_changes_nothing_inside():
    x, t = torch.randn(50, 2, dtype=torch.float64), 15
    denoiser = lambda x, t: 0.5 * x  # noqa: E731
    plain = guidance.x0_from_eps(x, denoiser(x, t), ABAR[t])
    clipped = guidance.x0_from_eps(x, guidance.clip_x0(denoiser, ABAR, 0.7)(x, t), ABAR[t])
    assert (plain.abs() > 0.7).any() and (plain.abs() < 0.7).any()
    torch.testing.assert_close(clipped, plain.clamp(-0.7, 0.7))
