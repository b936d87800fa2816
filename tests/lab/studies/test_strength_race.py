"""The race for lambda where the truth is known: r_low is N(0, 1) under p_0, r_up a parabola of it and noise."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from bilevel_core import tempering
from bilevel_core.lab.studies import strength_race, tilted_truth
from bilevel_core.lab.studies.strength_race import OURS, Exact, Plan, Recorded
from bilevel_core.seeds import derive_seed

PEAK = 1.4  # of r_up in r_low
BEST = 1 / PEAK  # E r_up at lam is 55 - 5 (1/lam - PEAK)^2
EACH = 20
PLAN = Plan(
    ladder=(math.inf, 2.0, 1.0, 0.7, 0.5), bounds=(0.5, 10.0), warmup=10, aligned=(0.6, 1.0), targets=(0.5, 0.2)
)


class Known:
    """Two numbers of noise, of which one is r_low; counts what is run."""

    def __init__(self):
        self.rows, self.G = 0, tempering.NoiseMap(self.run, (2,), EACH)

    def run(self, z):
        self.rows += len(z)
        return z.double()

    def low(self, x):
        return x[:, 0]

    def up(self, x):
        return 60 - 5 * (x[:, 0] - PEAK) ** 2 + 2 * x[:, 1]

    def measure(self, x):
        return torch.stack([self.up(x), x[:, 0], (x[:, 0] > 0).double(), (x[:, 0] > PEAK).double()], 1)

    def exact(self, seed=0, plan=PLAN):
        return Exact(self.G, self.low, self.measure, seed, plan)


def value(lam):
    return 55 - 5 * (1 / lam - PEAK) ** 2


def make_truth(sweeps=200, chains=6):
    known, runs = Known(), []
    for i, start in enumerate((None, torch.full((chains, 2), 3.0))):
        generator = torch.Generator().manual_seed(derive_seed("known truth", i))
        options = {"sweeps": sweeps, "warmup": 20, "chains": chains, "measure": known.measure, "z": start}
        runs.append(tempering.sample_tempered(known.G, known.low, PLAN.ladder, generator=generator, **options))
    return tilted_truth.Truth("a bold two", tuple(runs))


@pytest.fixture(scope="module")
def truth():
    return make_truth()


# ---------------------------------------------------------------- what a run costs


@pytest.mark.parametrize("lam", [0.5, 0.6, 2.0, 7.0])
@pytest.mark.parametrize("forwards", [3000, 9000, 100_000])
def test_a_run_is_as_long_as_its_money_goes(lam, forwards):
    chains, warmup, sweeps = PLAN.shape(lam, EACH, forwards)
    price = EACH * len(PLAN.levels(lam)) * chains
    cost = price * (1 + warmup + sweeps)
    assert cost <= forwards < cost + price and 1 <= chains <= 8 and sweeps >= 2
    assert warmup >= 10 and (warmup + 1) / (warmup + sweeps) >= 0.5
    assert chains == 1 or warmup + sweeps >= 2 * 10
    assert PLAN.shape(lam, EACH, forwards, 2)[0] == min(chains, 2)


def test_levels_end_at_lambda():
    assert PLAN.levels(0.8) == [math.inf, 2.0, 1.0, 0.8] and PLAN.levels(5.0) == [math.inf, 5.0]
    assert PLAN.levels(1.0) == [math.inf, 2.0, 1.0] and PLAN.levels(0.5) == [*PLAN.ladder]
    with pytest.raises(
        ValueError, match=r"1000 forwards leave -1 sweeps of a run down to lambda = 0.5 after .* at least"
    ):
        PLAN.shape(0.5, EACH, 1000)
    assert PLAN.shape(0.5, EACH, 1300)[2] == 2  # the least that the message names
    assert [PLAN.count(budget) for budget in (10_000, 40_000, 160_000)] == [5, 10, 20]


# ---------------------------------------------------------------- real runs


def test_everything_that_is_run_is_paid():
    known = Known()
    sampler = known.exact()
    spent = sampler.plain(1010).cost
    assert spent == 1000 == known.rows * EACH
    for lam, forwards, weight in ((0.7, 6000, 0.0), (2.0, 6000, 0.0), (1.0, 6000, 0.1)):
        found = sampler.mean(lam, forwards, weight)
        assert 0.9 * forwards < found.cost <= forwards
        spent += found.cost
    sets = sampler.ladder(0.6, 9999)
    assert [each.at for each in sets] == [math.inf, 2.0, 1.0, 0.7, 0.6]
    assert spent + sum(each.cost for each in sets) == known.rows * EACH


def test_moves_by_gradients_cost_twice_and_have_the_same_law():
    known = Known()
    moves = {"moves": {"gradient": True, "accept": 0.5}, "dtype": torch.float64}
    sampler = Exact(known.G, known.low, known.measure, 0, PLAN, **moves)
    sets = sampler.ladder(0.7, 60_000)
    assert sum(each.cost for each in sets) == 2 * known.rows * EACH and 50_000 < 2 * known.rows * EACH <= 60_000
    last = sets[-1]
    assert abs(last.r_low.mean() - 1 / 0.7) < 4 / last.size**0.5 and last.size > 50
    found = [Exact(Known().G, known.low, known.measure, seed, PLAN, **moves).mean(0.7, 24_000) for seed in range(6)]
    assert abs(sum(each.mean for each in found) / 6 - value(0.7)) < 4 * (sum(e.se**2 for e in found) / 36) ** 0.5


def test_real_means_are_those_of_the_law():
    for lam, weight in ((0.7, 0.0), (1.0, 0.0), (1.0, 0.1)):
        found = [Known().exact(seed).mean(lam, 12_000, weight) for seed in range(12)]
        precision = 1 + 10 * weight / lam  # exp(w r_up/lam) makes the law of r_low a narrower one, and moves the noise
        mean = (1 + 10 * weight * PEAK) / lam / precision
        wanted = 60 - 5 * ((mean - PEAK) ** 2 + 1 / precision) + 4 * weight / lam
        values = torch.tensor([each.mean for each in found])
        assert abs(values.mean() - wanted) < 4 * values.std() / 12**0.5, (lam, weight)
        assert 0.5 < torch.tensor([each.se for each in found]).mean() / values.std() < 2


def test_the_same_seed_draws_the_same_and_another_does_not():
    one, same, other = (Known().exact(seed) for seed in (0, 0, 1))
    assert one.mean(0.8, 3000) == same.mean(0.8, 3000) != other.mean(0.8, 3000)
    assert one.mean(0.8, 3000) == same.mean(0.8, 3000)  # the second call too
    assert torch.equal(one.plain(1000).r_up, same.plain(1000).r_up)


def test_a_run_starts_where_the_one_before_ended():
    sampler = Known().exact()
    generator = torch.Generator().manual_seed(0)
    assert sampler._start([math.inf, 1.0], 2, generator) is None
    sampler.ladder(0.7, 6000)
    ends = [(beta, z.clone()) for beta, z in sampler.ends]
    assert [beta for beta, _ in ends] == [0, 0.5, 1, 1 / 0.7]
    start = sampler._start([math.inf, 2.0, 0.5], 5, generator)
    assert torch.equal(start[1], ends[1][1][torch.arange(5) % len(ends[1][1])])
    assert torch.equal(start[2, 0], ends[3][1][0])  # the nearest
    sampler.ladder(1.0, 6000)
    assert not torch.equal(sampler._start([1.0], 2, generator)[0], start[1, :2])  # the last


def test_a_run_starts_at_draws_of_p_0_where_they_reach():
    sampler = Known().exact()
    drawn = sampler.plain(10_000)
    generator = torch.Generator().manual_seed(0)
    start = sampler._start([math.inf, 1.0, 0.2], 40, generator)
    assert start.shape == (3, 40, 2) and start[0, :, 0].mean().abs() < 0.7
    assert start[1, :, 0].mean() == pytest.approx(1, abs=0.6)  # the mean of the tilt
    assert start[2, :, 0].mean() > drawn.r_low.quantile(0.9)  # the tilt is beyond them: the largest
    assert all(len(level.unique(dim=0)) == 40 for level in start)
    sampler.ladder(0.7, 6000)
    again = sampler._start([1.0, 0.3], 4, generator)
    rows = {tuple(z) for z in sampler.first[1].tolist()}
    assert all(tuple(z) in rows for z in again[0].tolist())
    assert torch.equal(again[1, 0], sampler.ends[-1][1][0])


# ---------------------------------------------------------------- segments of a record


def numbered(truth):
    """The truth with a number for each state in place of its score."""
    numbers = itertools.count(1, 10**6)
    runs = []
    for run in truth.runs:
        measured = run.history["measured"].clone()
        measured[..., 0] = torch.arange(measured[..., 0].numel()).reshape(measured.shape[:3]) + next(numbers)
        runs.append(replace(run, history=run.history | {"measured": measured}))
    return tilted_truth.Truth("numbered", tuple(runs))


def test_segments_cost_what_the_run_would_and_no_state_comes_twice(truth):
    own, _ = numbered(truth).split(3, 0)
    sampler, seen = Recorded(own, EACH, PLAN), []
    recorded = tempering.kept("measured", *own.runs)[..., 0]
    for lam, forwards in ((0.8, 5000), (0.5, 6000), (1.05, 4000), (4.2, 3000)):
        sets = sampler.ladder(lam, forwards)
        chains, warmup, sweeps = PLAN.shape(lam, EACH, forwards, 4)
        assert sum(each.cost for each in sets) == chains * len(PLAN.levels(lam)) * (1 + warmup + sweeps) * EACH
        assert [each.at for each in sets[:-1]] == PLAN.levels(lam)[:-1]
        for each in sets:
            assert len(each.r_low) == chains * sweeps and len(each.group.unique()) <= chains
            level = PLAN.ladder.index(each.at)
            assert set(each.r_up.tolist()) <= set(recorded[:, level].flatten().tolist())
            for chain in each.group.unique():  # contiguous, in order, and of the chain that the group names
                where = recorded[:, level, int(chain)]
                at = torch.searchsorted(where.contiguous(), each.r_up[each.group == chain])
                assert (where[at] == each.r_up[each.group == chain]).all()
                assert (at.reshape(-1, sweeps).diff(dim=1) == 1).all()
            seen += each.r_up.tolist()
            torch.testing.assert_close(each.log_w, -each.r_low / each.at)
    seen += sampler.mean(0.5, 5000).cost * [] + sampler.plain(1000).r_up.tolist()
    assert len(seen) == len(set(seen))


def test_a_mean_takes_the_nearest_level_alone_and_reweights_it(truth):
    lams, means = (0.55, 0.7, 0.9), []
    for fold in range(3):
        sampler = Recorded(truth.split(3, fold)[0], EACH, PLAN)
        found = [sampler.mean(lam, 8000) for lam in lams]
        means.append([each.mean for each in found])
        assert sampler.used.sum(1).gt(0).tolist() == [False, False, True, True, True]
        assert found[0].cost == Known().exact().mean(0.55, 8000).cost
        errors = torch.tensor([each.se for each in found])
        assert ((torch.tensor(means[-1]) - torch.tensor([value(lam) for lam in lams])).abs() < 6 * errors).all()
    assert torch.tensor(means).std(0).min() > 0
    sampler = Recorded(truth.split(3, 0)[0], EACH, PLAN)
    precision, mean = 2.0, (1 + PEAK) / 2  # of r_low at lam = 1, weight 0.1, as above
    wanted = 60 - 5 * ((mean - PEAK) ** 2 + 1 / precision) + 0.4
    found = sampler.mean(1.0, 12_000, 0.1)
    assert abs(found.mean - wanted) < 4 * found.se and found.se < 0.8


def test_where_a_level_is_used_up_the_next_one_stands_in(truth):
    sampler = Recorded(truth.split(3, 0)[0], EACH, PLAN)
    sampler.used[3] = 195
    found = sampler.mean(0.75, 6000)
    assert abs(found.mean - value(0.75)) < 4 * found.se and found.se < 3
    assert sampler.used[2].sum() > 0 and (sampler.used[3] == 195).all()


def test_a_record_that_is_too_short_says_so(truth):
    sampler = Recorded(truth.split(3, 0)[0], EACH, PLAN)
    with pytest.raises(
        ValueError, match=r"the record is too short: 4 segments of 212 .* inf, 2, 1, .* 800 sweeps of one"
    ):
        sampler.ladder(0.5, 170_000)
    sampler.ladder(0.5, 40_000)
    with pytest.raises(ValueError, match="record more sweeps or chains, lower the budget, or draw for real"):
        for _ in range(20):
            sampler.mean(0.5, 40_000)
    with pytest.raises(ValueError, match="the record has the levels .* pass a plan with those"):
        Recorded(truth.split(3, 0)[0], EACH, Plan())


def test_segments_are_cut_where_whole_ones_do_not_fit(truth):
    sampler = Recorded(truth.split(3, 0)[0], EACH, PLAN)
    sampler.used[:] = 160  # 40 sweeps are left of each of 4 chains
    assert sampler._cut([4], 2, 60) == (4, 30) and sampler._cut([4], 2, 40) == (2, 40)
    assert sampler._cut([4], 3, 60) is None and sampler._cut([4, 4], 4, 20) == (4, 20)
    assert sampler._cut([4, 4], 4, 21) is None


def test_draws_of_p_0_are_handed_out_once(truth):
    own, _ = truth.split(3, 0)
    bank = torch.randn(100, 2)
    sampler = Recorded(own, EACH, PLAN, bank)
    first, second = sampler.plain(1000), sampler.plain(800)
    assert torch.equal(torch.cat([first.r_low, second.r_low]), bank[:90, 0].double())
    assert torch.equal(second.r_up, bank[50:90, 1].double()) and (first.cost, second.cost) == (1000, 800)
    with pytest.raises(ValueError, match="the record holds 10 more draws of p_0, and 11 were asked for"):
        sampler.plain(220)
    level = Recorded(own, EACH, PLAN)
    found = level.plain(4000)
    assert len(found.r_low) == 200 and level.used[0].sum() == 200 and level.used[1:].sum() == 0
    assert found.r_low.mean().abs() < 0.3 and found.r_low.std() == pytest.approx(1, abs=0.2)


# ---------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def choices():
    """Every method for real, at two budgets."""
    made, contestants = {}, strength_race.contestants(PLAN)
    assert len(contestants) == len(strength_race.METHODS) + 4
    for name, budget in itertools.product(contestants, (20_000, 60_000)):
        for seed in (0,) if budget < 60_000 else (0, 1)[: 1 + ("Bayesian" not in name)]:
            known = Known()
            found = contestants[name](known.exact(derive_seed("methods", seed)), budget, seed, PLAN)
            assert found.cost == known.rows * EACH <= budget, name
            made.setdefault((name, budget), []).append(found)
    return made


def test_costs_add_up_and_paths_lead_there(choices):
    for (name, budget), found in choices.items():
        for choice in found:
            assert (
                choice.method == name
                and choice.path[-1][0] == choice.cost
                and choice.trials == len(choice.path) - (name == "none")
            )
            assert [cost for cost, *_ in choice.path] == sorted(cost for cost, *_ in choice.path)
            assert choice.cost > 0.8 * budget or name == "none"
            if name != "none" and not name.startswith(strength_race.KL):
                assert choice.path[-1][1] == choice.lam and PLAN.bounds[0] <= choice.lam <= PLAN.bounds[1]


def test_pooled_methods_find_the_optimum(choices):
    for name in (OURS, "Algorithm 2", "Bayesian, all draws"):
        for choice in choices[name, 60_000]:
            assert choice.lam == pytest.approx(BEST, rel=0.2), name
        assert all(value(BEST) - value(choice.lam) < 2 for choice in choices[name, 20_000])


def test_ours_grows_its_ladder_until_the_curve_has_turned(choices):
    for choice in choices[OURS, 60_000]:
        assert choice.interval[0] < choice.lam < choice.interval[1] < 1.1
    ends = []

    class Spy(Exact):
        def ladder(self, lam, forwards, weight=0.0):
            ends.append((lam, forwards))
            return super().ladder(lam, forwards, weight)

    for peak, reach, wanted in ((0.3, 1e9, [2.0, 1.0, 1.0]), (PEAK, 1e9, [2.0, 1.0, 0.7, 0.5]), (PEAK, 30.0, [0.5])):
        known, plan = Known(), replace(PLAN, reach=reach)
        sampler = Spy(known.G, known.low, lambda x, peak=peak: 60 - 5 * (x[:, 0] - peak) ** 2, 1, plan)
        ends.clear()
        found = strength_race.exchange(sampler, 60_000, 0, plan)
        assert [lam for lam, _ in ends] == wanted and found.trials == len(ends)
        assert all(forwards == 12_000 for _, forwards in ends[:-1]) and ends[-1][1] > 12_000
        assert found.cost == known.rows * EACH and found.lam == pytest.approx(1 / peak, rel=0.3)


def test_what_does_not_look_below_stays_above(choices):
    for budget in (20_000, 60_000):
        for end in PLAN.aligned:
            assert all(choice.lam >= end for choice in choices[f"one aligned law, {end:g}", budget])
        assert all(choice.lam == math.inf and choice.cost == 0 for choice in choices["none", budget])
        assert all(0.5 <= choice.lam <= 10 for choice in choices["grid", budget])
    for choice in choices["one aligned law, 0.6", 60_000]:
        assert choice.lam == pytest.approx(BEST, rel=0.15)
    for choice in choices["curve of p_0", 60_000]:
        assert choice.lam == pytest.approx(BEST, rel=0.25)


def test_a_divergence_is_steered_to_and_weights_are_in_standard_deviations(choices):
    for target in PLAN.targets:
        for choice in choices[f"adaptive KL, {target:g} nats", 60_000]:
            assert 1 / (2 * choice.lam**2) == pytest.approx(target, rel=0.3)
    for choice in choices["weighted sum", 60_000]:
        sd = math.sqrt(2 * 25 + (10 * PEAK) ** 2 + 4)  # of 60 - 5 (x - PEAK)^2 + 2 y
        assert any(choice.weight == pytest.approx(w / sd, rel=0.3) for w in PLAN.weights if w) and choice.lam == 1.0


def test_searches_end_after_their_trials(choices):
    for name in ("random", "Bayesian", "Bayesian, all draws", "adaptive KL, 0.5 nats"):
        assert {choice.trials for choice in choices[name, 20_000]} == {5}
        assert {choice.trials for choice in choices[name, 60_000]} == {15}
    assert {choice.trials for choice in choices["grid", 60_000]} == {5}


# ---------------------------------------------------------------- the race


RACE = {"seed": 0, "plan": PLAN, "budgets": (9000, 18_000), "folds": 3, "methods": (OURS, "none", "grid", "Bayesian")}


@pytest.fixture(scope="module")
def rows(truth, tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    assert truth.certificate.down_to == 0.5
    return strength_race.race(truth, EACH, **RACE, folder=folder), folder


def test_a_race_has_a_row_for_everything(rows):
    found, _ = rows
    keys = {(row["repetition"], row["budget"], row["method"]) for row in found}
    assert len(found) == 3 * 2 * 4 == len(keys) and {row["prompt"] for row in found} == {"a bold two"}
    assert all(row["cost"] <= row["budget"] and not row["below"] for row in found)
    assert json.loads(json.dumps(found)) == found


def test_choices_are_marked_by_the_other_chains(truth, rows):
    for row in rows[0]:
        rest = truth.split(3, row["repetition"])[1]
        lam = math.inf if row["lam"] is None else row["lam"]
        curve = {known: rest.means(known)["clip"] for known in (0.5, *truth.strengths())}
        best = max(curve, key=curve.get)
        assert row["best"] == best and row["clip"] == rest.means(lam)["clip"]
        assert row["regret"] == pytest.approx(curve[best] - row["clip"], abs=1e-9)
        assert row["regret_se"] == pytest.approx(rest.gap(best, lam)[1])
        assert {"caption", "digit", "kl", "ess", "clip_se", "low"} <= set(row)


def test_a_method_sees_its_own_fold_alone(truth, monkeypatch, tmp_path):
    seen = {}

    def spy(sampler, budget, seed, plan):
        sets = sampler.ladder(plan.bounds[0], budget)
        seen[len(seen)] = {value for each in sets for value in each.r_low.tolist()}
        return strength_race.Choice("spy", 1.0, budget, [[budget, 1.0, 0.0]])

    monkeypatch.setitem(strength_race.METHODS, "spy", spy)
    options = RACE | {"methods": ("spy",), "budgets": (9000,)}
    strength_race.race(truth, EACH, **options, folder=tmp_path)
    for fold, states in seen.items():
        own, rest = truth.split(3, fold)
        ours, theirs = (set(tempering.kept("low", *side.runs).flatten().tolist()) for side in (own, rest))
        assert states <= ours and not states & theirs
    assert len(seen) == 3


def test_a_killed_race_goes_on(truth, rows):
    found, folder = rows
    pieces = sorted(folder.glob("race_a_bold_two_recorded_*.json"))
    assert len(pieces) == 6
    stamps = [path.stat().st_mtime_ns for path in pieces]
    pieces[3].unlink()
    assert strength_race.race(truth, EACH, **RACE, folder=folder) == found
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(pieces, stamps, strict=True)].count(False) == 1
    with pytest.raises(ValueError, match="was made with other plan; delete it or use another work_dir"):
        strength_race.race(truth, EACH, **RACE | {"plan": replace(PLAN, warmup=11)}, folder=folder)


def test_what_is_not_certified_does_not_vote(truth):
    row = {"prompt": "a bold two", "repetition": 0, "budget": 1, "method": "x", "weight": 0.0, "cost": 1}
    (found,) = strength_race.mark(truth, [row | {"lam": 0.1}], 3)
    end = truth.certificate.down_to
    assert found["below"] and found["clip"] == truth.split(3, 0)[1].means(end)["clip"] and found["lam"] == 0.1
    cut = tilted_truth.Truth(
        "cut", tuple(replace(r, history={n: x[:25] for n, x in r.history.items()}) for r in truth.runs)
    )
    assert cut.certificate.down_to is None
    with pytest.raises(ValueError, match="'cut' is certified nowhere; .* no regret can be told"):
        strength_race.mark(cut, [row | {"lam": 0.6}], 3)


def test_real_draws_and_recorded_ones_run_one_race(truth, rows, tmp_path):
    known = Known()
    problem = tilted_truth.Problem("a bold two", known.G, known.low, known.measure, {"known": 1})
    options = RACE | {"methods": (OURS, "grid"), "folder": tmp_path}
    drawn = strength_race.race(truth, EACH, **options, problem=problem)
    assert len(drawn) == 12 and known.rows * EACH == sum(row["cost"] for row in drawn)
    table = strength_race.emulation(drawn, rows[0])
    wanted = {*itertools.product((OURS, "grid"), (9000, 18_000))}
    assert {(row["method"], row["budget"]) for row in table} == wanted and len(table) == 4
    for row in table:
        gap = row["drawn"].mean - row["recorded"].mean
        assert row["difference"].mean == pytest.approx(gap) and row["difference"].lo <= gap <= row["difference"].hi


def test_the_table_says_who_wins_at_which_cost(rows):
    found = [row | {"prompt": prompt} for row in rows[0] for prompt in ("a bold two", "a thin two")]
    table = {(row["budget"], row["method"]): row for row in strength_race.summaries(found)}
    assert len(table) == 8
    for (budget, method), row in table.items():
        mine = [r for r in rows[0] if (r["budget"], r["method"]) == (budget, method)]
        ours = {r["repetition"]: r["regret"] for r in rows[0] if (r["budget"], r["method"]) == (budget, OURS)}
        assert row["regret"].mean == pytest.approx(sum(r["regret"] for r in mine) / 3)
        gaps = [r["regret"] - ours[r["repetition"]] for r in mine]
        assert row["difference"].mean == pytest.approx(sum(gaps) / 3) == pytest.approx(row["by prompt"].mean)
        assert row["worst"] == max(r["regret"] for r in mine) and row["below"] == 0
    assert table[18_000, "none"]["verdict"] == "worse" and table[18_000, OURS]["verdict"] == "reference"
    assert table[18_000, "none"]["regret"].mean == pytest.approx(5 * PEAK**2, abs=1.5)
    assert strength_race.summaries(rows[0])[0]["by prompt"] is None


def test_where_the_record_is_too_short_nothing_is_told(truth, tmp_path):
    options = RACE | {"methods": (OURS, "none", "curve of p_0"), "budgets": (9000, 40_000), "folds": 3}
    found = strength_race.race(truth, EACH, **options, folder=tmp_path)
    short = [row for row in found if "short" in row]
    assert {(row["method"], row["budget"]) for row in short} == {("curve of p_0", 40_000)} and len(short) == 3
    assert all("the record is too short" in row["short"] and "regret" not in row for row in short)
    told = {(row["budget"], row["method"]) for row in strength_race.summaries(found)}
    assert told == {(9000, OURS), (9000, "none"), (9000, "curve of p_0"), (40_000, OURS), (40_000, "none")}


def test_a_method_is_compared_where_the_record_held_it():
    """On the prompts that it and ours have, and nowhere below half of them."""
    about = dict.fromkeys(("cost", "below", "clip", "caption", "digit"), 1.0) | {"budget": 1}

    def rows(method, regrets, short=()):
        return [
            about
            | {"method": method, "prompt": prompt, "repetition": fold}
            | ({"short": "too short"} if (prompt, fold) in short else {"regret": value + 0.1 * fold * value})
            for prompt, value in zip("abcd", regrets, strict=True)
            for fold in range(3)
        ]

    ours, rival = rows(OURS, [1, 2, 3, 4]), rows("rival", [2, 3, 9, 9], short={("d", 1), ("c", 0)})
    table = {row["method"]: row for row in strength_race.summaries([*ours, *rival])}
    assert table[OURS]["prompts"] == 4 and table["rival"]["prompts"] == 2
    assert table[OURS]["regret"].mean == pytest.approx(2.75) and table["rival"]["regret"].mean == pytest.approx(2.75)
    assert table["rival"]["difference"].mean == pytest.approx(1.1) and table["rival"]["by prompt"].mean > 0
    rival = rows("rival", [2, 3, 9, 9], short={("d", 1), ("c", 0), ("a", 2)})
    assert [row["method"] for row in strength_race.summaries([*ours, *rival])] == [OURS]
    ours = rows(OURS, [1, 2, 3, 4], short={("a", 0)})
    table = {row["method"]: row for row in strength_race.summaries([*ours, *rows("rival", [2, 3, 9, 9])])}
    assert table["rival"]["prompts"] == table[OURS]["prompts"] == 3
