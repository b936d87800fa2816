"""Algorithm 2: learning lambda where the answer is known, from fixed samples, tilted samples and particles."""

import dataclasses
import itertools
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from bilevel_core import algorithms, estimators, guidance, samplers, schedules
from bilevel_core.lab import comparisons, oracles

MIXTURE = oracles.Mixture1D()
PROBLEM = MIXTURE.problem()
QUADRATURE = algorithms.TiltSamples(PROBLEM.r_up, PROBLEM.r_low, PROBLEM.log_p0)
OPTIMUM = 1.20841


def upper(x):
    return -((x - 1.2) ** 2) / 2


def plain(n, seed=0):
    x = MIXTURE.sample(n, torch.Generator().manual_seed(seed))
    return algorithms.TiltSamples(upper(x), x, cost=50 * n)


def exact_tilt(n=20_000):
    """Draws from the exact tilted law, seeded by the round."""

    def draw(lam, round):
        x = MIXTURE.tilt(1 / lam).sample(n, torch.Generator().manual_seed(round))
        log_w, log_z = torch.full((n,), -math.log(n), dtype=torch.float64), PROBLEM.logits(lam).logsumexp(-1).item()
        return algorithms.TiltSamples.from_tilt(upper(x), x, lam, log_w, log_z, cost=100 * n)

    return draw


# ---------------------------------------------------------------- the one-dimensional oracle


@pytest.mark.parametrize("lam_0", [0.01, 100.0])
@pytest.mark.parametrize("gamma, root", [(1.0, 1.0907), (1000.0, 1.20824), (math.inf, OPTIMUM)])
def test_it_ends_at_the_optimum(lam_0, gamma, root):
    records = list(algorithms.learn_lam(QUADRATURE, lam_0, gamma=gamma))
    assert records[-1].lam == pytest.approx(root, rel=0.02) and records[-1].done.startswith("converged")
    assert len(records) < 25 and all(record.done is None for record in records[:-1])
    exact = list(algorithms.learn_lam(QUADRATURE, lam_0, gamma=gamma, stop=0, tol=1e-6))[-1]
    assert exact.lam == pytest.approx(root, rel=1e-4)


@pytest.mark.parametrize("lam_0", [0.05, 100.0])
def test_the_released_est1_stops_at_less_than_half_of_it(lam_0):
    *_, last = algorithms.learn_lam(QUADRATURE, lam_0, gamma=1000.0, estimator=comparisons.lam_grad_released_est1)
    assert last.lam == pytest.approx(0.4612, rel=0.02) and last.done.startswith("converged")
    assert last.up == pytest.approx(PROBLEM.mean(PROBLEM.log_p0, PROBLEM.r_up).item(), abs=0.03)  # fallen back


def test_a_record_holds_what_it_says():
    record = next(algorithms.learn_lam(QUADRATURE, 0.7, gamma=50.0))
    p = PROBLEM.p_gamma(0.7)
    assert record.grad == pytest.approx(PROBLEM.penalty_grad(0.7, 50.0).item(), rel=1e-9)
    assert record.up == pytest.approx(PROBLEM.mean(p, PROBLEM.r_up).item(), rel=1e-9)
    assert record.low == pytest.approx(PROBLEM.mean(p, PROBLEM.r_low).item(), rel=1e-9)
    assert record.kl == pytest.approx(PROBLEM.kl(p).item(), rel=1e-9)
    assert (record.k, record.gamma, record.cost, record.round, record.warning) == (0, 50.0, 0, 0, None)


def test_it_is_algorithm_1():
    """With a plain step size the iterates are those of the generic loop and its generic gradient."""
    x = torch.tensor(0.7, dtype=torch.float64).log()
    generic = algorithms.penalty_descent(PROBLEM, x, gamma=50.0, step=0.2, steps=4)
    ours = algorithms.learn_lam(QUADRATURE, 0.7, gamma=50.0, step=0.2, steps=4)
    for one, other in zip(generic, ours, strict=True):
        torch.testing.assert_close(one.x_next, other.outer.x_next, rtol=1e-8, atol=1e-8)


def test_an_increasing_gamma_is_followed_to_its_end():
    def gamma(k):
        return min(4.0**k, 1000.0)

    records = list(algorithms.learn_lam(QUADRATURE, 2.0, gamma=gamma))
    assert [record.gamma for record in records[:5]] == [1, 4, 16, 64, 256]
    assert records[-1].gamma == 1000.0 and records[-1].lam == pytest.approx(OPTIMUM, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [1e9, 1e12, 1e14, 1e16, 1e20, 1e200, lambda k: 10.0 ** (4 * k + 8), math.inf])
def test_no_gamma_is_too_large(gamma, dtype):
    """It ends where gamma = infinity does, and not at a boundary that rounding makes, or where it began."""
    samples = plain(20_000)
    samples = algorithms.TiltSamples(samples.r_up.to(dtype), samples.r_low.to(dtype))
    limit, last = (list(algorithms.learn_lam(samples, 20.0, gamma=g, steps=12))[-1] for g in (math.inf, gamma))
    rel = 1e-3 if callable(gamma) else 1e-6  # on another path
    assert last.lam == pytest.approx(limit.lam, rel=rel) and last.lam == pytest.approx(1.245, abs=1e-3)
    assert last.se == pytest.approx(limit.se, rel=10 * rel) and last.warning is None
    assert callable(gamma) or last.done == "converged at lam = 1.245"


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("gamma", [1000.0, math.inf])
def test_from_one_batch_it_ends_where_the_curve_of_that_batch_has_its_maximum(gamma):
    samples = plain(20_000)
    curve = estimators.lam_curve(samples.r_up, samples.r_low)
    *_, last = algorithms.learn_lam(samples, 30.0, gamma=gamma)
    assert last.lam == pytest.approx(curve.best, rel=0.02) and curve.interval[0] < last.lam < curve.interval[1]
    assert abs(last.grad) <= 0.1 * last.se and last.cost == 50 * 20_000


def test_samples_are_drawn_anew_where_the_effective_sample_size_falls():
    records = list(algorithms.learn_lam(plain(20_000), 0.05, draw=exact_tilt()))
    assert records[0].round == 1 and records[0].ess == pytest.approx(20_000, rel=1e-6)
    assert records[-1].round >= 2 and all(record.ess >= estimators.MIN_ESS for record in records)
    assert records[-1].cost == 20_000 * (50 + 100 * records[-1].round)
    assert records[-1].lam == pytest.approx(OPTIMUM, rel=0.06)
    for record in records[1:]:  # KL from p_0, also far from where p_0 has samples
        assert record.kl == pytest.approx(PROBLEM.kl(PROBLEM.p_gamma(record.lam)).item(), rel=0.15)


def test_without_a_way_to_draw_it_stays_within_reach():
    with pytest.warns(UserWarning, match=r"lam starts at .*, not 0\.01: the samples reach no further down"):
        first, *_, last = algorithms.learn_lam(plain(20_000), 0.01)
    assert first.ess == pytest.approx(estimators.MIN_ESS, rel=0.01) and last.lam == pytest.approx(OPTIMUM, rel=0.1)


def test_particles_serve_as_samples():
    """p_0 is the law of a chain of 30 steps; the samples are particles of its tilt wherever reweighting fails."""
    T, n = 30, 2000
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
    ts, denoiser = samplers.timesteps(T, T), MIXTURE.denoiser(abar)

    def chain(count, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, generator=g, dtype=torch.float64)
        return samplers.sample_ancestral(denoiser, x, abar, ts, generator=g)

    def draw(lam, round):
        guide, g = guidance.LookAhead(denoiser, lambda x: x, lam, abar, ts), torch.Generator().manual_seed(round)
        with torch.no_grad():
            x = torch.randn(n, generator=g, dtype=torch.float64)
            x, log_w, info = samplers.sample_particles(guide, x, abar, ts, generator=g)
        return algorithms.TiltSamples.from_tilt(upper(x), x, lam, log_w, info["log_z"], cost=n * (2 * T - 1))

    reference = chain(20_000, 1)
    curve = estimators.lam_curve(upper(reference), reference)
    x = chain(n, 2)
    records = list(algorithms.learn_lam(algorithms.TiltSamples(upper(x), x, cost=n * T), 0.4, draw=draw, min_ess=300))
    assert records[-1].round >= 1 and records[-1].cost > n * T
    assert records[-1].lam == pytest.approx(curve.best, rel=0.15) and records[-1].done


def test_resume_is_bit_for_bit():
    whole = list(algorithms.learn_lam(plain(5_000), 0.05, draw=exact_tilt(5_000)))
    half = list(itertools.islice(algorithms.learn_lam(plain(5_000), 0.05, draw=exact_tilt(5_000)), 3))
    rest = list(algorithms.learn_lam(plain(5_000), 0.05, draw=exact_tilt(5_000), resume=half[-1]))

    def numbers(record):
        return [
            getattr(record, name) for name in ("k", "lam", "grad", "se", "up", "kl", "ess", "cost", "round", "done")
        ]

    assert [numbers(r) for r in half + rest] == [numbers(r) for r in whole] and len(rest) > 1
    assert not list(algorithms.learn_lam(plain(5_000), 0.05, draw=exact_tilt(5_000), resume=whole[-1]))


def test_pooling_keeps_all_that_was_drawn_and_resumes_bit_for_bit():
    def run(**options):
        samples, draw = plain(1000), exact_tilt(300)
        return algorithms.learn_lam(samples, 0.3, draw=draw, min_ess=700, pool=True, stop=0, steps=8, **options)

    whole, half = list(run()), list(itertools.islice(run(), 3))
    last = whole[-1]
    assert last.round >= 2 and last.cost == 50_000 + last.round * 30_000
    kept = last.outer.p_star
    assert len(kept.r_low) == 1000 + 300 * last.round and len(kept.parts) == 1 + last.round
    assert kept.parts[0].at == math.inf and all(0 < part.at < math.inf for part in kept.parts[1:])
    rest = list(run(resume=half[-1]))
    names = ("k", "lam", "grad", "se", "up", "kl", "ess", "cost", "round", "done")
    rows = [[[getattr(record, name) for name in names] for record in run] for run in (half + rest, whole)]
    assert rows[0] == rows[1] and len(rest) > 1


def test_pooling_learns_better_from_the_same_draws():
    def error(pool, seed):
        samples, draw = plain(300, seed), exact_tilt(100)
        options = {"draw": lambda lam, round: draw(lam, 1000 * seed + round), "min_ess": 60, "rounds": 5}
        *_, end, _ = algorithms.learn_lam(samples, 0.5, pool=pool, **options)  # the last pools in any case
        return math.log(end.lam / OPTIMUM) ** 2

    with_pool, without = (sum(error(pool, seed) for seed in range(20)) for pool in (True, False))
    assert with_pool < 0.7 * without


def test_pooled_sets_are_joined_by_law_and_need_p_0_first():
    draw = exact_tilt(200)
    first, sharp, sharper = plain(400), draw(1.0, 1), draw(0.6, 2)
    pooled = algorithms.TiltSamples.pooled(first, sharp, sharper, draw(1.0, 3))
    assert [part.at for part in pooled.parts] == [math.inf, 1.0, 1.0, 0.6] and pooled.cost == 400 * 50 + 3 * 20_000
    for lam in (0.7, 1.0, 2.0):
        truth = PROBLEM.mean(PROBLEM.p_gamma(lam), PROBLEM.r_low).item()
        p, info = pooled.tilt(lam)
        assert (p @ pooled.r_low).item() == pytest.approx(truth, abs=4 * (info["ess"] ** -0.5))
    h = torch.stack([pooled.r_low / at for at in (math.inf, 1.0, 0.6)])
    log_w, _ = estimators.pool(h, torch.tensor([400, 400, 200]), torch.ones(1000))  # unweighted draws count one each
    assert (pooled.log_w - log_w).abs().max() < 1e-9
    with pytest.raises(ValueError, match="the first set must be of p_0 itself"):
        algorithms.TiltSamples.pooled(sharp, first)
    alone = algorithms.TiltSamples.pooled(first)
    assert alone.tilt(1.0)[0].tolist() == pytest.approx(first.tilt(1.0)[0].tolist(), rel=1e-9)


# ---------------------------------------------------------------- the boundary, steps, bad input


def test_draws_are_limited_and_used_up():
    def run(rounds):
        return list(algorithms.learn_lam(plain(4000), 0.05, draw=exact_tilt(2000), rounds=rounds))

    free, one, many = run(None), run(1), run(9)
    assert free[-1].round > 1 and free[-1].done.startswith("converged at lam = ")
    assert one[-1].round == 1 and one[-1].done.startswith("draws used up at lam = 0.05")
    assert one[0].lam == free[0].lam
    assert many[-1].round == 9 and many[-1].cost == 4000 * 50 + 9 * 2000 * 100  # it does not stop before
    assert [s.lam for s in many[: len(free) - 1]] == [s.lam for s in free[:-1]]
    for run_ in (free, one, many):
        assert all(step.done is None and step.curve is None for step in run_[:-1])


# ---------------------------------------------------------------- the end of a run, and independent rows


def families(lam, round, count=6, n=240, seed=0):
    """As a few families of particles: n rows of `count` draws of the exact tilt."""
    g = torch.Generator().manual_seed(1000 * seed + round)
    family = torch.randint(count, (n,), generator=g)
    x = MIXTURE.tilt(1 / lam).sample(count, g)[family]
    log_w = torch.full((n,), -math.log(n), dtype=torch.float64)
    return algorithms.TiltSamples.from_tilt(upper(x), x, lam, log_w, 0.0, cost=n, group=family)


def test_errors_count_groups():
    r = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = algorithms.TiltSamples(r, r**2, group=torch.arange(300))
    copies = algorithms.TiltSamples(r.repeat(4), r.repeat(4) ** 2, group=torch.arange(300).repeat(4))
    one, four = (next(algorithms.learn_lam(samples, 9.0)) for samples in (alone, copies))
    assert (one.up, one.up_se, one.se) == pytest.approx((four.up, four.up_se, four.se), rel=1e-9)
    rows = next(algorithms.learn_lam(algorithms.TiltSamples(r, r**2), 9.0))
    assert (rows.up_se, rows.se) == pytest.approx((one.up_se, one.se), rel=0.02) and rows.se < one.se
    curves = [samples.curve(torch.logspace(0.7, 2, 41).double(), min_ess=50) for samples in (alone, copies)]
    torch.testing.assert_close(curves[0].grad_se, curves[1].grad_se)
    torch.testing.assert_close(curves[0].se, curves[1].se)


@pytest.mark.filterwarnings("ignore:the particles descend from")
def test_the_spread_of_families_is_the_error_of_particles():
    """Over independent runs: the estimate from the families of one against the spread of all."""
    T, n, lam = 20, 400, 0.4
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), T)
    ts, means, errors, naive = samplers.timesteps(T, T), [], [], []
    guide = guidance.LookAhead(MIXTURE.denoiser(abar), lambda x: x, lam, abar, ts)
    with torch.no_grad():
        for seed in range(60):
            g = torch.Generator().manual_seed(seed)
            x = torch.randn(n, generator=g, dtype=torch.float64)
            x, log_w, info = samplers.sample_particles(guide, x, abar, ts, guided=False, threshold=1.1, generator=g)
            options = {"group": info["family"]}
            samples = algorithms.TiltSamples.from_tilt(x, x, lam, log_w, info["log_z"], **options)
            p = log_w.exp()
            means.append(p @ x)
            errors.append(estimators.group_error(p, p * (x - p @ x), samples.group) ** 2)
            naive.append((p * (x - p @ x)).square().sum())
    spread, found, rows = torch.stack(means).var(), torch.tensor(errors).mean(), torch.stack(naive).mean()
    assert 0.5 < found / spread < 1.7 and rows / spread < 0.4


def test_the_size_of_a_set_is_its_weight_in_a_pool():
    first, draw = plain(400), exact_tilt(200)
    copies = draw(1.0, 1)
    copies = dataclasses.replace(copies, **{n: getattr(copies, n).repeat(5) for n in ("r_up", "r_low", "log_w")})
    alone = algorithms.TiltSamples.pooled(first, draw(1.0, 1))
    told = algorithms.TiltSamples.pooled(first, dataclasses.replace(copies, size=200.0))
    for lam in (0.8, 1.5, 4.0):
        means = [s.tilt(lam)[0] @ s.r_low for s in (alone, told, algorithms.TiltSamples.pooled(first, copies))]
        assert means[0] == pytest.approx(means[1].item(), abs=1e-9) and abs(means[0] - means[2]) > 1e-3


def test_a_family_weighs_in_a_pool_as_one_draw():
    first, draw = plain(400), exact_tilt(200)
    one = dataclasses.replace(draw(1.0, 1), group=torch.arange(200) // 50)
    told = algorithms.TiltSamples.pooled(first, dataclasses.replace(one, group=None, size=4.0))
    assert algorithms.TiltSamples.pooled(first, one).log_w.tolist() == pytest.approx(told.log_w.tolist(), abs=1e-9)
    both = algorithms.TiltSamples.pooled(first, one, draw(2.0, 2))
    assert both.group.tolist() == [*range(400), *(i // 50 for i in range(200)), *range(200)]


def test_the_top_of_the_curve_has_an_error_that_is_right():
    lams, found, draw = torch.logspace(-0.6, 1.5, 61, dtype=torch.float64), [], exact_tilt(100)
    for seed in range(40):
        sets = [plain(200, seed), *(draw(lam, 100 * seed + i) for i, lam in enumerate((1.0, 2.0)))]
        sets[1] = dataclasses.replace(sets[1], group=torch.arange(100))
        found.append(algorithms.TiltSamples.pooled(*sets).curve(lams, min_ess=50))
    for lam in (0.8, 1.2, 2.0):
        i = [int((curve.lam - lam).abs().argmin()) for curve in found]
        off = torch.stack([c.mean[j] + PROBLEM.value(c.lam[j]) for c, j in zip(found, i, strict=True)])
        spread = torch.stack([c.se[j] for c, j in zip(found, i, strict=True)]).square().mean().sqrt()
        assert abs(off.mean()) < 4 * off.std() / 40**0.5 and 0.6 < off.std() / spread < 1.5
    assert sum(curve.interval[0] <= OPTIMUM <= curve.interval[1] for curve in found) >= 35


def test_few_families_at_the_top_do_not_make_it_the_best():
    """One lucky family far down, hundreds of rows of it, against an honest set."""
    first = plain(2000)
    lucky = torch.full((400,), 1.2, dtype=torch.float64) + 1e-3 * torch.arange(400)
    log_w = torch.full((400,), -math.log(400), dtype=torch.float64)
    lams = torch.logspace(-1, 1.5, 61, dtype=torch.float64)
    for group, far in ((None, True), (torch.zeros(400).long(), False)):
        bad = algorithms.TiltSamples.from_tilt(upper(lucky), lucky, 0.1, log_w, 0.0, group=group)
        assert (algorithms.TiltSamples.pooled(first, bad).curve(lams).best < 0.5) == far


def test_a_run_that_draws_ends_at_the_best_of_all_it_drew():
    def run(**options):
        return list(algorithms.learn_lam(plain(400), 0.3, draw=families, min_ess=60, rounds=5, **options))

    steps = run()
    last, before = steps[-1], steps[-2]
    assert last.curve.best == pytest.approx(last.lam) and last.k == before.k + 1 and last.round == before.round == 5
    assert last.done.endswith(f"; best at lam = {last.lam:.4g}") and last.outer is before.outer
    assert last.curve.interval[0] <= last.lam <= last.curve.interval[1]
    parts = last.outer.p_star.parts
    assert [part.at for part in parts[:1]] == [math.inf] and len(parts) == 6
    pooled = algorithms.TiltSamples.pooled(*parts)
    p, info = pooled.tilt(last.lam)
    assert last.up == pytest.approx((p @ pooled.r_up).item(), rel=1e-9) and last.kl == pytest.approx(info["kl"])
    assert abs(last.grad) < 0.01 * last.se and last.cost == before.cost == 20_000 + 5 * 240
    short = run(steps=2)
    assert len(short) == 3 and short[-1].done is None and short[-1].curve is not None
    assert [s.lam for s in run(resume=short[-1])] == [s.lam for s in steps[2:]]
    assert [(s.lam, s.done) for s in run(resume=before)] == [(last.lam, last.done)] and not run(resume=last)


def test_the_best_is_better_than_the_end_of_the_path():
    """Draws of three independent rows that look like 240: the path ends anywhere, the best of all does not."""
    ends, bests = [], []
    for seed in range(16):

        def draw(lam, round, seed=seed):
            return families(lam, round, 3, seed=seed)

        *_, end, best = algorithms.learn_lam(plain(300, seed), 0.3, draw=draw, min_ess=60, rounds=4)
        ends.append(PROBLEM.value(end.lam) - PROBLEM.value(OPTIMUM))
        bests.append(PROBLEM.value(best.lam) - PROBLEM.value(OPTIMUM))
    assert torch.stack(bests).mean() < 0.4 * torch.stack(ends).mean() and max(bests) < 0.3 * max(ends)


# ---------------------------------------------------------------- the boundary, steps, bad input


def test_an_optimum_at_the_boundary_is_an_outcome():
    samples = plain(5_000)
    conflict = algorithms.TiltSamples(-samples.r_low, samples.r_low)
    *_, last = algorithms.learn_lam(conflict, 1.0)
    assert last.done == "boundary at lam = 1e+04: the optimum is lam -> infinity"
    agree = algorithms.TiltSamples(samples.r_low, samples.r_low)
    *_, last = algorithms.learn_lam(agree, 5.0)
    assert "below what the samples reach" in last.done
    *_, last = algorithms.learn_lam(agree, 20.0, bounds=(2.0, 100.0))
    assert last.done == "boundary at lam = 2: the optimum is lam -> 0"


def test_the_secant_rule():
    x, lr = torch.tensor(0.0, dtype=torch.float64), torch.tensor

    def after(x_old, grad_old):
        return algorithms.PenaltyStep(0, lr(x_old), lr(grad_old), 1.0, {}, None, None, x)

    assert algorithms.secant(None, lr(-3.0)) == -0.5
    assert algorithms.secant(after(-1.0, -2.0), lr(-0.5)).item() == pytest.approx(-0.5 / 1.5)  # convex: to the root
    assert algorithms.secant(after(-1.0, -0.5), lr(-2.0)) == -1  # concave: the largest step down
    assert algorithms.secant(after(0.0, -0.5), lr(-0.5)) == -1  # it did not move
    drawn = algorithms.TiltSamples(torch.rand(3), torch.rand(3), round=3)
    later = algorithms.PenaltyStep(0, lr(-1.0), lr(-0.5), 1.0, {}, drawn, None, x)
    assert algorithms.secant(later, lr(-2.0)) == -1 / 4  # three sets were drawn: slopes between them are noise
    assert algorithms.secant(dataclasses.replace(later, grad=lr(-2.0)), lr(-0.2)).item() == pytest.approx(-0.2 / 1.8)


def test_bad_input():
    for lam in (0.0, -1.0, math.nan, 1e5):
        with pytest.raises(ValueError, match="must be positive and lie within bounds"):
            next(algorithms.learn_lam(QUADRATURE, lam))
    with pytest.raises(ValueError, match="gamma = 0"):
        next(algorithms.learn_lam(QUADRATURE, 1.0, gamma=0.0))
    with pytest.raises(ValueError, match="50 samples have no effective sample size of 100: draw more"):
        next(algorithms.learn_lam(plain(50), 1.0))
    with pytest.raises(ValueError, match="r_low is 1 for every sample"):
        next(algorithms.learn_lam(algorithms.TiltSamples(torch.rand(200), torch.ones(200)), 1.0))
    with pytest.raises(ValueError, match="have the shapes"):
        next(algorithms.learn_lam(algorithms.TiltSamples(torch.rand(200), torch.rand(300)), 1.0))
    good, bad = torch.rand(200), torch.where(torch.arange(200) == 7, math.nan, 1.0)
    for name, rewards in (("r_up", (bad, good)), ("r_low", (good, bad))):
        with pytest.raises(ValueError, match=f"^{name} is not finite for 1 of 200 samples"):
            next(algorithms.learn_lam(algorithms.TiltSamples(*rewards), 3.0))

    def draw(lam, round):
        return algorithms.TiltSamples.from_tilt(good, bad, lam, torch.zeros(200), 0.0)

    with pytest.raises(ValueError, match="^r_low is not finite for 1 of 200 samples"):
        next(algorithms.learn_lam(plain(200), 0.1, draw=draw))


def test_a_run_is_resumed_with_the_gamma_and_the_samples_it_had():
    first = next(algorithms.learn_lam(plain(2000), 3.0, gamma=10.0))
    for samples, gamma, said in ((plain(2000), 20.0, "gamma: 10.0 -> 20.0"), (plain(2000, 1), 10.0, "samples: .* -> ")):
        with pytest.raises(ValueError, match=rf"the saved run has other parameters \({said}"):
            next(algorithms.learn_lam(samples, 3.0, gamma=gamma, resume=first))
    next(algorithms.learn_lam(plain(2000), 3.0, gamma=lambda k: 10.0 + k, resume=first))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    values=st.lists(st.tuples(*[st.floats(-40, 40, width=32)] * 2), min_size=2, max_size=20),
    log_lam=st.floats(-4, 4),
    gamma=st.sampled_from([1.0, 1000.0, math.inf]),
)
def test_no_valid_input_gives_nan(values, log_lam, gamma):
    up, low = torch.tensor(values, dtype=torch.float64).T
    hypothesis.assume(up.max() - up.min() > 1e-3 and low.max() - low.min() > 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = list(
            algorithms.learn_lam(
                algorithms.TiltSamples(up, low), min(max(10**log_lam, 1e-4), 1e4), gamma=gamma, min_ess=1.0, steps=12
            )
        )
    for record in records:
        values = (record.lam, record.grad, record.se, record.up, record.up_se, record.low, record.kl, record.ess)
        assert all(map(math.isfinite, values)) and 1e-4 * 0.999 <= record.lam <= 1e4 * 1.001
