"""The rivals of Algorithm 2 where the answer is known: exact tilts of a mixture, costs counted, errors told."""

import math

import optuna
import pytest
import torch

from bilevel_core import algorithms
from bilevel_core.lab import oracles
from bilevel_core.lab.studies import baselines

MIXTURE = oracles.Mixture1D()
PROBLEM = MIXTURE.problem()
OPTIMUM = 1.20841
BEST = -PROBLEM.value(OPTIMUM).item()
COST = 50
SEEDS = range(5)


def upper(x):
    return -((x - 1.2) ** 2) / 2


def exact_kl(lam):
    return PROBLEM.kl(PROBLEM.p_gamma(lam)).item()


def evaluate(lam, n, seed, weight=0.0):
    law = MIXTURE.tilt((1 + 1.2 * weight) / lam, -weight / lam)
    r = upper(law.sample(n, torch.Generator().manual_seed(seed)))
    kl = None if weight else exact_kl(lam)
    return baselines.Evaluation(r.mean().item(), (r.std() / math.sqrt(n)).item(), COST * n, kl)


def samples(n=20_000, seed=0):
    x = MIXTURE.sample(n, torch.Generator().manual_seed(seed))
    return algorithms.TiltSamples(upper(x), x, cost=COST * n)


def regret(search):
    return BEST + PROBLEM.value(search.lam).item()


def test_plan_spends_the_budget_and_no_more():
    assert baselines.plan(50_000, COST, 5) == (5, 200) and baselines.plan(50_999, COST, 20) == (20, 50)
    with pytest.raises(ValueError, match="a budget of 900 gives 0 samples to each of 20 .* raise it to 2000"):
        baselines.plan(900, COST, 20)
    with pytest.raises(ValueError, match="must be positive"):
        baselines.plan(900, 0, 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_none_and_the_grid(seed):
    plain = baselines.none(evaluate, 10_000, seed)
    assert plain.lam == math.inf and plain.cost == COST * 10_000 and len(plain.trials) == 1
    exact = PROBLEM.mean(PROBLEM.log_p0, PROBLEM.r_up).item()
    assert abs(plain.value - exact) < 5 * plain.se
    grid = baselines.grid(evaluate, 2000, seed)
    assert grid.lam == 1.0 and grid.cost == COST * 10_000 and [t.lam for t in grid.trials] == list(baselines.GRID)
    assert 0 < regret(grid) < 0.05 and regret(grid) < regret(plain) / 5


@pytest.mark.slow
def test_random_and_bayesian_search_improve_with_trials():
    for search, bound in ((baselines.random_search, 0.2), (baselines.bayesian, 0.01)):
        few = [regret(search(evaluate, 4000, seed, 4)) for seed in SEEDS]
        many = [regret(search(evaluate, 4000, seed, 14)) for seed in SEEDS]
        assert sum(many) < sum(few) and sum(many) / 5 < bound and min(many) >= 0


def test_searches_are_deterministic_count_their_cost_and_stay_within_bounds():
    for search in (baselines.random_search, baselines.bayesian):
        trials, n = baselines.plan(100_000, COST, 6)
        a, b, c = (search(evaluate, n, seed, trials, (0.1, 10.0)) for seed in (3, 3, 4))
        assert a == b and a.trials != c.trials and a.cost == COST * n * trials <= 100_000
        assert len(a.trials) == 6 and all(0.1 <= t.lam <= 10 for t in a.trials)
        assert a.value == max(t.mean for t in a.trials)
    five = baselines.random_search(evaluate, 100, 0, 5).trials
    assert baselines.random_search(evaluate, 100, 0, 8).trials[:5] == five
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    baselines.bayesian(evaluate, 100, 0, 2)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weighted_sum_leaves_the_family(seed):
    search = baselines.weighted_sum(evaluate, 2000, seed)
    assert search.weight == 10.0 and search.cost == 5 * 2000 * COST  # the largest w wins: it maximises r_up itself
    assert search.value > BEST + 0.05
    values = [trial.mean for trial in search.trials]
    assert values == sorted(values)
    assert values[0] == evaluate(1.0, 2000, seed).mean


@pytest.mark.parametrize("start", [0.05, 1.0, 80.0])
def test_adaptive_kl_hits_its_target_which_need_not_be_the_best(start):
    for target in (0.05, exact_kl(OPTIMUM), 1.5):
        search = baselines.adaptive_kl(evaluate, 500, 0, target, start, trials=40)
        assert exact_kl(search.lam) == pytest.approx(target, rel=0.05)
        assert search.cost == 40 * 500 * COST
    assert regret(baselines.adaptive_kl(evaluate, 500, 0, exact_kl(OPTIMUM), start, trials=40)) < 1e-3
    assert regret(baselines.adaptive_kl(evaluate, 500, 0, 0.05, start, trials=40)) > 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_algorithm_2_and_its_rivals_on_the_same_batch(seed):
    batch = samples(seed=seed)
    curve, bayes = baselines.reweighted_curve(batch), baselines.reweighted_bayesian(batch, seed, 12)
    ours = baselines.algorithm_2(batch, 1.0, stop=0)
    for search in (curve, bayes, ours):
        assert search.cost == batch.cost and abs(regret(search)) < 0.01
    assert ours.lam == pytest.approx(curve.lam, rel=1e-3) and ours.value == pytest.approx(curve.value, abs=1e-6)
    assert bayes.value <= curve.value + 1e-9  # the curve's maximum is the maximum
    assert sum(t.cost for t in ours.trials) == ours.cost and ours.said.startswith("converged")


def test_algorithm_2_counts_fresh_draws():
    def draw(lam, round):
        x = MIXTURE.tilt(1 / lam).sample(2000, torch.Generator().manual_seed(round))
        log_z = PROBLEM.logits(lam).logsumexp(-1).item()
        log_w = torch.full((2000,), -math.log(2000), dtype=torch.float64)
        return algorithms.TiltSamples.from_tilt(upper(x), x, lam, log_w, log_z, cost=100 * 2000)

    search = baselines.algorithm_2(samples(2000), 0.05, draw=draw)
    assert search.cost > COST * 2000 and (search.cost - COST * 2000) % 200_000 == 0
    assert sum(t.cost for t in search.trials) == search.cost


def test_a_kept_search_is_the_one_that_was_asked_for(tmp_path):
    """Others are refused by name; `trials` are those in all, whatever the journal holds."""
    journal = tmp_path / "new" / "journal"
    long = baselines.bayesian(evaluate, 10, 0, 6, storage=journal)
    assert len(long.trials) == 6 and long == baselines.bayesian(evaluate, 10, 0, 6)
    short = baselines.bayesian(evaluate, 10, 0, 3, storage=journal)
    assert short.trials == long.trials[:3] and short.cost == 3 * 10 * COST
    longer = baselines.bayesian(evaluate, 10, 0, 7, storage=journal)
    assert longer.trials[:6] == long.trials and len(longer.trials) == 7
    for n, seed, bounds, changed in (
        (10, 0, (50.0, 100.0), r"bounds = \[0.01, 100.0\], now \[50.0, 100.0\]"),
        (20, 0, baselines.BOUNDS, "n = 10, now 20"),
        (10, 1, baselines.BOUNDS, "seed = 0, now 1"),
    ):
        with pytest.raises(ValueError, match=f"journal is of a search with other settings .{changed}.: delete it"):
            baselines.bayesian(evaluate, n, seed, 9, bounds, storage=journal)
    assert baselines.bayesian(evaluate, 10, 0, 7, storage=journal) == longer  # the refused left nothing behind
    other = baselines.bayesian(evaluate, 10, 1, 2, name="other", storage=journal)  # a search by another name
    assert len(other.trials) == 2


def test_a_damaged_journal_is_named(tmp_path):
    journal = tmp_path / "journal"
    baselines.bayesian(evaluate, 10, 0, 2, storage=journal)
    whole = journal.read_bytes()
    for bad in (b"<html>\n" * 3, whole[:5] + b"\n" + whole, bytes(64) + b"\n" + whole, b"[]\n", b"{}\n"):
        journal.write_bytes(bad)
        with pytest.raises(ValueError, match="journal cannot be read as a journal of optuna .*: delete it, the search"):
            baselines.bayesian(evaluate, 10, 0, 2, storage=journal)
    with pytest.raises(ValueError, match="cannot be read as a journal"):
        baselines.bayesian(evaluate, 10, 0, 2, storage=tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_seeds_out_of_range_are_named(seed):
    for search in (baselines.random_search, baselines.bayesian):
        with pytest.raises(ValueError, match=rf"seed = {seed} must be a whole number from 0 to 2\*\*32 - 1"):
            search(evaluate, 10, seed, 2)
    assert len(baselines.bayesian(evaluate, 10, 2**32 - 1, 2).trials) == 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="lam = -1.0 must be positive"):
        baselines.grid(evaluate, 10, 0, [-1.0])
    with pytest.raises(ValueError, match="n = 1 is too small"):
        baselines.grid(evaluate, 1, 0)
    with pytest.raises(ValueError, match="nothing to try"):
        baselines.grid(evaluate, 10, 0, [])
    for search in (baselines.random_search, baselines.bayesian):
        with pytest.raises(ValueError, match="bounds"):
            search(evaluate, 10, 0, 4, (1.0, 0.1))
        with pytest.raises(ValueError, match="trials = 0"):
            search(evaluate, 10, 0, 0)
    with pytest.raises(ValueError, match=r"lam = 0.1 is not finite: mean = nan"):
        baselines.grid(lambda *_: baselines.Evaluation(math.nan, 1.0, 10), 10, 0, [0.1])
    with pytest.raises(ValueError, match="weights"):
        baselines.weighted_sum(evaluate, 10, 0, weights=[-1.0])
    with pytest.raises(ValueError, match="target = 0"):
        baselines.adaptive_kl(evaluate, 10, 0, 0)
    with pytest.raises(ValueError, match="lam = 1 has none"):
        baselines.adaptive_kl(lambda *_: baselines.Evaluation(0.0, 1.0, 10), 10, 0, 1.0)


def rows(method, regrets):
    return [{"method": method, "seed": s, "prompt": p, "regret": r} for (s, p), r in regrets.items()]


def test_the_summary_is_paired_and_tells_ties():
    base = {(s, p): 0.1 * s + 0.01 * (p == "a") for s in range(5) for p in "ab"}
    worse = {pair: r + 0.02 + 0.001 * (pair[0] % 2) for pair, r in base.items()}
    tied = {pair: r + (0.01 if pair[0] % 2 else -0.01) * (pair[1] == "a") for pair, r in base.items()}
    found = baselines.summarise(rows("grid", worse) + rows("Algorithm 2", base) + rows("even", tied))
    grid, ours, even = found
    assert [s.method for s in found] == ["grid", "Algorithm 2", "even"]
    assert ours.verdict == "reference" and tuple(ours.difference) == (0, 0, 0) and ours.tied == 10
    # five seed means: standard deviation 0.1 sqrt(2.5), Student's t 2.776
    assert ours.regret.mean == pytest.approx(0.205)
    assert ours.regret.hi - ours.regret.mean == pytest.approx(2.776 * 0.1 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert grid.verdict == "worse" and (grid.won, grid.tied, grid.lost) == (0, 0, 10)
    assert grid.difference.mean == pytest.approx(0.0204)
    assert grid.regret.lo < ours.regret.mean < grid.regret.hi  # unpaired, the intervals overlap
    assert even.verdict == "tie" and (even.won, even.tied, even.lost) == (3, 5, 2)
    turned = baselines.summarise(rows("grid", worse) + rows("Algorithm 2", base), reference="grid")
    assert turned[1].verdict == "better"


def test_the_summary_refuses_unpaired_rows():
    base = {(s, "a"): 0.1 * s for s in range(3)}
    with pytest.raises(ValueError, match="no rows of the reference"):
        baselines.summarise(rows("grid", base))
    with pytest.raises(ValueError, match="differ in their pairs"):
        baselines.summarise(rows("Algorithm 2", base) + rows("grid", {(0, "a"): 1.0}))
    with pytest.raises(ValueError, match="two rows"):
        baselines.summarise(rows("Algorithm 2", base) * 2)
    with pytest.raises(ValueError, match="at least two"):
        baselines.summarise(rows("Algorithm 2", {(0, "a"): 0.1}))
