import copy
import math

import pytest
import torch
from torch import nn

from bilevel_core import algorithms, estimators, guidance, oracles, schedules
from bilevel_core.lab import runs, training

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


def new_state(**options):
    return algorithms.ScoreTraining(Net(), **({"batch_size": 16, "lr": 1e-2, "warmup": 5, "seed": 3} | options))


# ---------------------------------------------------------------- Algorithm 1


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
        other.load(*runs.load_state(tmp_path / "s"))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    state = new_state()
    weights = copy.deepcopy(state.denoiser.state_dict())
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match=rf"the loss is {value} at step 1; lower lr = 0\.01"):
            next(algorithms.train_score(state, DATA, ABAR, steps=5, extra=lambda net, i, v=value: torch.tensor(v)))
    assert all(torch.equal(weights[k], v) for k, v in state.denoiser.state_dict().items()) and state.step == 0


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"lr": -1.0}, {"ema_decay": 1.0}, {"warmup": -1}])
def test_training_parameters_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        new_state(**option)


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
