"""Many strengths at once where J is known: Gaussian laws, and chains that guidance shifts."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bilevel_core import samplers, schedules, tempering
from bilevel_core.guidance import CostMeter, LookAhead
from bilevel_core.lab import comparisons, oracles
from bilevel_core.lab.models import chains, networks, text_models
from bilevel_core.lab.studies import many_strengths, strengths
from bilevel_core.lab.studies.many_strengths import Rewards, Steps

KAPPA = 0.5
TARGET = torch.tensor([1.2, -0.8, 0.5], dtype=torch.float64)


def rewards(m=3, forwards=3000, **options):
    """r_j = z_j of m numbers of noise, r_up = -|z - a|^2/2: the best x is a/(1 + kappa). Counts what is run."""
    rows, a = [0], TARGET[:m]

    def run(z):
        rows[0] += len(z)
        return z.double()

    G = tempering.NoiseMap(run, (m,), 10)
    return Rewards(G, lambda x: -(x - a).square().sum(1) / 2, lambda x: x, m, KAPPA, forwards, **options), rows


def exact(x):
    a = TARGET[: len(x)]
    return (-((x - a).square().sum() + len(x)) / 2 - KAPPA * x.square().sum() / 2).item()


# ---------------------------------------------------------------- a strength for each of several rewards


def test_samples_may_stand_for_p_0_by_weights():
    r = torch.tensor([[0.1, 0.9, -0.4]], dtype=torch.float64)
    up, twice = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), [0, 0, 1, 2]
    weighted = strengths.Strengths(up, r, 0.3, torch.tensor([2.0, 1.0, 1.0]).double().log() + 5)
    plain = strengths.Strengths(up[twice], r[:, twice], 0.3)
    x = torch.tensor([0.7], dtype=torch.float64)
    assert weighted.worth(x)["J"] == pytest.approx(plain.worth(x)["J"], abs=1e-12)
    assert weighted.worth(0 * x)["kl"] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(weighted.hypergrad(x), plain.hypergrad(x))
    torch.testing.assert_close(weighted.fisher(x), plain.fisher(x))
    star, tilted = weighted.solve_star(x), weighted.solve_gamma(x, 2.0)
    assert weighted.g(x, star) < weighted.g(x, tilted)
    assert weighted.f(x, tilted) / 2 + weighted.g(x, tilted) < weighted.f(x, star) / 2 + weighted.g(x, star)


def test_draws_have_their_laws_and_are_paid():
    problem, rows = rewards(forwards=20_000)
    x = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    sets = problem.draw(x, 20_000, 1)
    assert rows[0] * 10 == sum(each.cost for each in sets) and 18_000 < rows[0] * 10 <= 20_000
    for share, each in zip(problem.shares, sets, strict=True):
        torch.testing.assert_close(each.at, share * x)
        assert each.r_low.shape[0] == 3 and 1 < each.size <= len(each.r_up)
        assert ((each.r_low.mean(1) - share * x).abs() < 5 / each.size**0.5).all()
        torch.testing.assert_close(each.r_up, -(each.r_low.T - TARGET).square().sum(1) / 2)
    (plain,) = problem.draw(0 * x, 5009, 1)
    assert plain.cost == 5000 and plain.r_low.shape == (3, 500) and plain.size == 500
    assert plain.r_low.mean(1).abs().max() < 0.2


def test_a_value_is_J_with_noise():
    problem, rows = rewards(forwards=4000)
    x = torch.tensor([0.9, -0.6, 0.0], dtype=torch.float64)
    found = torch.tensor([problem.value(x, seed) for seed in range(16)])
    assert abs(found.mean() - exact(x)) < 4 * found.std() / 4 and 3600 * 16 < rows[0] * 10 <= problem.each * 16
    assert problem.value(x, 3) == found[3]
    plain = torch.tensor([problem.value(0 * x, seed) for seed in range(8)])
    assert abs(plain.mean() - exact(0 * x)) < 4 * plain.std() / 8**0.5


def test_everything_drawn_is_pooled():
    problem, _ = rewards()
    x = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    sets = [*problem.draw(0 * x, 6000, 1), *problem.draw(x, 6000, 2), *problem.draw(0 * x, 6000, 3)]
    whole = many_strengths.pooled(sets, KAPPA)
    assert len(whole.r_up) == sum(len(each.r_up) for each in sets)
    for at in (0 * x, 0.5 * x, x):
        assert whole.worth(at)["J"] == pytest.approx(exact(at), abs=0.25)
        torch.testing.assert_close(-whole.hypergrad(at), TARGET - at - KAPPA * at, atol=0.4, rtol=0)
    assert whole.worth(0.5 * x)["ess"] > many_strengths.pooled(sets[:1], KAPPA).worth(0.5 * x)["ess"]


def test_steps_that_leave_too_few_samples_are_halved():
    problem, _ = rewards()
    few = many_strengths.pooled(problem.draw(torch.zeros(3, dtype=torch.float64), 2000, 0), KAPPA)  # 200 draws
    far = many_strengths.ascend(few, torch.zeros(3, dtype=torch.float64), 100.0)
    assert 100 <= few.worth(far)["ess"] < 130 and few.worth(far)["J"] > few.worth(0 * far)["J"]
    free = many_strengths.ascend(few, torch.zeros(3, dtype=torch.float64), 1.0)
    assert few.hypergrad(free).abs().max() < 1e-3


@pytest.mark.parametrize("m", [1, 3])
def test_gradients_find_the_optimum_within_the_budget(m):
    problem, rows = rewards(m)
    found = problem.climb(30_000, 0)
    assert rows[0] * 10 == found.cost <= 30_000 and found.cost > 25_000 and found.trials == problem.rounds
    best = TARGET[:m] / (1 + KAPPA)
    assert exact(best) - exact(found.x) < 0.1 and torch.equal(found.x, rewards(m)[0].climb(30_000, 0).x)


# ---------------------------------------------------------------- a strength for each step


T = 40
ABAR = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
LAW = oracles.Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) * 0.5)
SLOPE = torch.tensor([1.0, 0.5], dtype=torch.float64)


def steps(m=3, n=64, count=8, denoiser=None):
    def up(x):
        return -(x - torch.tensor([0.8, 0.2])).square().sum(1) / 2

    ts = samplers.timesteps(T, count)
    denoiser = denoiser or LAW.denoiser(ABAR)
    return Steps(denoiser, ABAR, ts, (2,), lambda x: x @ SLOPE, up, m, 0.3, n, dtype=torch.float64)


def test_one_strength_for_all_steps_is_guidance():
    problem, x = steps(1, n=400), torch.tensor([0.7], dtype=torch.float64)
    generator, record = torch.Generator().manual_seed(5), []
    guide = LookAhead(LAW.denoiser(ABAR), lambda x: x @ SLOPE, 1 / 0.7, ABAR, problem.ts, record=record)
    start = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    x0 = samplers.sample_ddim(guide, start, ABAR, problem.ts, eta=1.0, generator=generator)
    kl = comparisons.path_kl(record, ABAR, problem.ts).mean()
    assert problem.value(x, 5) == pytest.approx((problem.r_up(x0).mean() - 0.3 * kl).item(), abs=1e-9)


def test_each_strength_has_its_own_steps_and_its_derivative():
    problem, x = steps(3), torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    slope = problem.gradient(x, 1)
    for j, unit in enumerate(torch.eye(3, dtype=torch.float64)):
        difference = (problem.value(x + 1e-4 * unit, 1) - problem.value(x - 1e-4 * unit, 1)) / 2e-4
        assert slope[j].item() == pytest.approx(difference, abs=1e-6) and abs(difference) > 1e-3
    assert problem.value(x, 1) != problem.value(x, 2)


def test_values_of_a_chain_cost_what_the_meter_says():
    meter = CostMeter(LAW.denoiser(ABAR))
    problem = steps(3, denoiser=meter)
    problem.value(torch.ones(3, dtype=torch.float64), 0)
    assert meter.cost == problem.each == 64 * (7 * 2 + 1)


class Operations(TorchDispatchMode):
    """Counts floating point operations, derivatives of derivatives included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def test_a_derivative_costs_no_more_than_it_is_charged():
    net = networks.TextDenoiser("tiny_text", seed=3).eval().requires_grad_(False)
    chain = chains.Chain(net, text_models.abar(text_models.RECIPES["denoiser"]), steps=4)
    denoiser, counts = chain.denoise("a two"), []

    def low(x):
        return x.flatten(1).square().mean(1)

    problem = Steps(denoiser, chain.abar, chain.ts, (1, 28, 28), low, lambda x: x.flatten(1).mean(1), 3, 0.1, 2)
    x = torch.tensor([0.5, 1.0, -0.5], dtype=torch.float64)
    for call in (
        lambda: denoiser(torch.randn(2, 1, 28, 28), 5),
        lambda: problem.value(x, 0),
        lambda: problem.gradient(x, 0),
    ):
        with torch.set_grad_enabled(bool(counts)), sdpa_kernel(SDPBackend.MATH), Operations() as counter:
            call()
        counts.append(counter.count)
    one, value, slope = counts
    assert problem._price(2, 1) / 4 == pytest.approx(value / one, rel=0.02)  # two samples, two passes each
    charged = problem._price(many_strengths.GRADIENT, 2) / 4
    assert 0.85 * charged < slope / one <= charged


def test_gradients_climb_the_chain():
    problem = steps(7, n=32)
    price = problem._price(many_strengths.GRADIENT, 2)
    found = problem.climb(60 * price + 5, 0)
    assert found.cost == 60 * price and found.trials == 60
    zero = torch.zeros(7, dtype=torch.float64)
    fresh = [(problem.value(found.x, seed) - problem.value(zero, seed)) for seed in range(900, 910)]
    assert min(fresh) > 0.1
    slopes = torch.stack([problem.gradient(found.x, seed) for seed in range(900, 940)])
    first = torch.stack([problem.gradient(zero, seed) for seed in range(900, 940)]).mean(0).norm()
    assert slopes.mean(0).norm() < 0.25 * first
    with pytest.raises(ValueError, match="has 2 gradients at .* at least 3"):
        problem.climb(2 * price, 0)
    with pytest.raises(ValueError, match="m = 8 strengths for 7 guided steps"):
        steps(8)


# ---------------------------------------------------------------- searches


class Hill:
    """-|x - a|^2 with or without noise; counts its values."""

    each = 7

    def __init__(self, m, noise=0.0):
        self.m, self.noise, self.count = m, noise, 0
        self.a = torch.linspace(1.0, -1.0, m, dtype=torch.float64) if m > 1 else torch.tensor([0.8]).double()

    def worth(self, x):
        return -(x - self.a).square().sum().item()

    def value(self, x, seed):
        self.count += 1
        assert x.shape == (self.m,) and x.abs().max() <= 3 + 1e-9
        e = torch.randn(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        return self.worth(x) + self.noise * e

    def climb(self, budget, seed):
        return many_strengths.Found(self.a * 0.99, budget, 1)


@pytest.mark.parametrize("m, budget", [(1, 200), (3, 350), (9, 1400)])
@pytest.mark.parametrize("method", ["random", "CMA-ES", "L-BFGS on differences"])
def test_searches_spend_their_budget_and_get_there(method, m, budget):
    hill = Hill(m)
    found = many_strengths.METHODS[method](hill, budget, 1, 3.0)
    assert found.cost == hill.count * 7 <= budget and found.trials == hill.count and found.x.abs().max() <= 3
    start = hill.worth(torch.zeros(m, dtype=torch.float64))
    if method == "random":
        assert hill.count == budget // 7
        assert hill.worth(found.x) > (-0.5 if m == 1 else -6 if m == 3 else -50)
    else:
        assert hill.worth(found.x) > start * 0.3
        assert method == "CMA-ES" or hill.worth(found.x) > -0.05  # a parabola, and delta/2 off


def test_a_gaussian_process_gets_there():
    hill = Hill(2)
    found = many_strengths.by_gaussian_process(hill, 150, 0, 3.0)
    assert found.cost == hill.count * 7 == 147 and hill.worth(found.x) > -0.3


def test_differences_have_common_noise_and_end_where_money_does():
    hill = Hill(3, noise=100.0)  # the same for every value of a search, so that it does not matter
    found = many_strengths.by_differences(hill, 700, 2, 3.0)
    assert hill.worth(found.x) > -0.05
    short = Hill(9)
    found = many_strengths.by_differences(short, 7 * 15, 0, 3.0)
    assert short.count == 15 and short.worth(found.x) >= short.worth(torch.zeros(9, dtype=torch.float64))
    for method, least in ((many_strengths.by_differences, 10), (many_strengths.by_cma_es, 10)):
        with pytest.raises(ValueError, match=f"a budget of 50 has 7 values at 7, and {least} are needed"):
            method(Hill(9), 50, 0, 3.0)


def test_a_contest_is_kept_in_pieces_and_said_with_intervals(tmp_path):
    def contest(**changed):
        hill = Hill(3)
        options = {"name": "hill", "config": {"a": 1}, "folder": tmp_path, "runs": 3} | changed
        methods = ("gradient", "random", "CMA-ES")
        return many_strengths.contest(hill, hill.worth, 200, methods=methods, **options), hill

    rows, _ = contest()
    assert len(rows) == 9 and all(row["cost"] <= 200 and len(row["x"]) == 3 for row in rows)
    assert len({tuple(row["x"]) for row in rows if row["method"] == "random"}) == 3  # seeds of their own
    pieces = sorted(tmp_path.iterdir())
    assert len(pieces) == 3
    pieces[1].unlink()
    again, hill = contest()
    assert again == rows and hill.count == (200 // 7) + (200 // 7) // 7 * 7
    with pytest.raises(ValueError, match="was made with other bound"):
        contest(bound=2.0)
    table = {row["method"]: row for row in many_strengths.summaries(rows)}
    assert table["gradient"]["verdict"] == "reference" and table["gradient"]["J"].mean > -0.01
    for method in ("random", "CMA-ES"):
        J = [row["J"] for row in rows if row["method"] == method]
        gap = sum(J) / 3 - table["gradient"]["J"].mean
        assert table[method]["J"].mean == pytest.approx(sum(J) / 3) and table[method]["gain"].mean == pytest.approx(gap)
        assert table[method]["J"].lo < table[method]["J"].mean < table[method]["J"].hi
    assert table["random"]["verdict"] in ("worse", "tie") and not math.isnan(table["random"]["cost"])


def test_all_methods_meet_on_several_rewards(tmp_path):
    problem, rows = rewards(3, forwards=1500)
    found = many_strengths.contest(
        problem, exact, 18_000, name="gaussian", config={}, folder=tmp_path, runs=2, bound=2.0
    )
    assert {row["method"] for row in found} == set(many_strengths.METHODS)
    assert rows[0] * 10 <= sum(row["cost"] for row in found) and all(row["cost"] <= 18_000 for row in found)
    J = {method: sum(r["J"] for r in found if r["method"] == method) / 2 for method in many_strengths.METHODS}
    best = exact(TARGET / (1 + KAPPA))
    assert best - J["gradient"] < 0.15 and all(best >= value - 1e-9 for value in J.values())
    assert J["gradient"] > J["random"]


# ---------------------------------------------------------------- both problems on 8x8 digits


def test_upper_and_lower_rewards_of_digits_are_standardised():
    problem, mark, about = many_strengths.digits8("rewards", 3, 5, draws=200, forwards=400, mark=2000)
    (drawn,) = problem.draw(torch.zeros(3, dtype=torch.float64), 8000, 0)
    assert abs(drawn.r_up.mean()) < 0.3 and abs(drawn.r_up.std() - 1) < 0.3
    assert (drawn.r_low.mean(1).abs() < 0.4).all() and ((drawn.r_low.std(1) - 1).abs() < 0.4).all()
    assert about["digit"] == 5 and about["kappa"] == problem.kappa and problem.each == 400
    zero = torch.zeros(3, dtype=torch.float64)
    assert mark(zero) == mark(zero) and abs(mark(zero)) < 0.4
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifier = networks.load_classifier("mnist8")
    likely = many_strengths.Likeness(classifier, 5, -1.0, 2.0)(images)
    torch.testing.assert_close(likely, (classifier(images).softmax(1)[:, 5].log() + 1) / 2)
    torch.testing.assert_close(many_strengths.Features(classifier, 3)(images), classifier.features(images)[:, :3])
    with pytest.raises(ValueError, match="m = 33 is not among 1 to 32"):
        many_strengths.Features(classifier, 33)(images)
    with pytest.raises(ValueError, match="kind 'both' is not one of rewards, steps"):
        many_strengths.digits8("both", 3, 5)


def test_a_strength_for_each_step_guides_towards_the_digit():
    problem, mark, _ = many_strengths.digits8("steps", 3, 5, draws=100, steps=6, n=8, mark=64, kappa=0.0)
    zero, pull = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64)
    assert mark(pull) > mark(zero) + 0.3 and problem.each == 8 * (2 * 5 + 1)
