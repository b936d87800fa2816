"""Schedules for few steps: exact answers against the oracles, grids and their times, and the study at a tiny size."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from bilevel_core import samplers, schedules
from bilevel_core.lab import oracles, results
from bilevel_core.lab.studies import schedule_transfer
from bilevel_core.lab.studies.schedule_transfer import GaussianImages, levels, spaced, times_of

Q = (0.02, 0.93, 0.9, 0.008)
ABAR = schedules.abar(torch.tensor(Q, dtype=torch.float64), 200)
PLAN = schedule_transfer.Plan(
    source="mnist8",
    few=2,
    many=4,
    T=20,
    batch_size=16,
    warm_steps=4,
    trials=3,
    trial_steps=2,
    n_val=70,
    source_steps=4,
    target_steps=3,
    n=70,
    grids=(2, 4),
    longer=(5,),
)
GIVEN = {0: Q, 1: (0.0, 0.9, 1.0, 0.008)}


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("steps", [1, 4])
def test_the_distance_is_that_of_the_chain_s_law(steps):
    problem = GaussianImages(vector(0.5, -1.0, 0.0), vector(0.7, 0.1, 0.0))
    law = oracles.Gaussian(problem.mean, torch.diag(problem.s**2 + 1e-14))
    drawn = law.chain_law(ABAR, samplers.timesteps(200, steps))
    std = drawn.cov.diagonal().sqrt()
    expected = ((std - problem.s) ** 2 + (drawn.mean - problem.mean) ** 2).sum()
    assert problem.value(levels(Q, steps, 200)).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("s", [0.3, 1.4])
def test_one_coordinate_is_the_linear_gaussian_oracle(s):
    """The value, and the hypergradient in q."""
    oracle = oracles.LinearGaussianSchedule(s=s, T=200, ts=samplers.timesteps(200, 5))
    problem = GaussianImages(vector(0.0), vector(s))
    q = vector(*Q).requires_grad_()
    ours, theirs = problem.value(levels(q, 5, 200)), oracle.value(q)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    grads = (torch.autograd.grad(value, q)[0] for value in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


def test_gains_are_products_of_cosines_and_equal_angles_are_best():
    s, at = 0.6, spaced(ABAR, 6, "angles", 0.6)
    problem = GaussianImages(vector(0.0), vector(s))
    angles = torch.atan((1 / at - 1).sqrt() / s)
    start = s / (at[0] * s**2 + 1 - at[0]).sqrt()
    turned = torch.cat([angles, vector(0.0)]).diff()
    assert problem.gains(at).item() == pytest.approx((start * turned.cos().prod()).item(), rel=1e-12)
    torch.testing.assert_close(turned, turned[:1].expand(6))
    for i in range(1, 6):
        for shift in (-0.02, 0.02):
            other = at.clone()
            other[i] += shift * other[i] * (1 - other[i])
            assert problem.gains(other) < problem.gains(at)


def test_the_cosine_schedule_is_the_best_grid_of_data_with_variance_one():
    abar = schedules.abar(vector(0.0, 0.9, 1.0, 0.0), 1000)
    torch.testing.assert_close(spaced(abar, 5, "angles", 1.0), levels((0.0, 0.9, 1.0, 0.0), 5))


def test_best_schedules_and_grids_are_stationary_and_ordered():
    problem = GaussianImages(vector(1.0, 0.3, 0.0), vector(0.8, 0.3, 0.05))
    q, best = schedule_transfer.best_schedule(problem, 4)
    assert problem.value(levels(q, 4)).item() == pytest.approx(best, rel=1e-9)
    for i, name in enumerate(("start", "end", "tau")):
        for shift in (-0.01, 0.01):
            moved = q.clone()
            moved[i] += shift
            low, high = ((0.0, 0.5), (0.6, 0.999), (0.1, 3.0))[i]
            if low <= moved[i] <= high:
                assert problem.value(levels(moved, 4)) > best, name
    at, least = schedule_transfer.best_levels(problem, 4)
    at.requires_grad_()
    (slope,) = torch.autograd.grad(problem.value(at), at)
    assert slope.abs().max() < 1e-3 and least <= best < problem.value(levels((0.0, 0.95, 1.0, 0.008), 4))


# ---------------------------------------------------------------- grids and times


def test_spaced_levels_are_what_they_say():
    ell = schedules.log_snr(spaced(ABAR, 5, "log-SNR"))
    ends = schedules.log_snr(ABAR[[-1, 1]])
    torch.testing.assert_close(ell.diff(), ((ends[1] - ends[0]) / 5).expand(4))
    sigma = (1 / spaced(ABAR, 5, "Karras") - 1).sqrt()
    torch.testing.assert_close(sigma[[0, -1]], (1 / ABAR[[-1, 1]] - 1).sqrt())
    root = (sigma ** (1 / 7)).diff()
    torch.testing.assert_close(root, root[:1].expand(4))
    for rule in schedule_transfer.RULES:
        assert spaced(ABAR, 1, rule)[0].item() == pytest.approx(ABAR[-1].item())
    with pytest.raises(ValueError, match="rule 'log' is not one of log-SNR, Karras, angles"):
        spaced(ABAR, 5, "log")


def test_times_of_levels_invert_the_schedule():
    assert times_of(ABAR[[200, 120, 7, 1]], ABAR) == [200, 120, 7, 1]
    crowded = times_of(torch.tensor([1e-9, 2e-9, 3e-9, 0.5], dtype=torch.float64), ABAR)
    assert crowded[:3] == [200, 199, 198] and abs(ABAR[crowded[3]] - 0.5) < 0.01
    assert times_of(1 - vector(3e-9, 2e-9, 1e-9), ABAR) == [3, 2, 1]
    for bad in (vector(0.5, 0.4), vector(0.5, 1.0), vector(0.0, 0.4)):
        with pytest.raises(ValueError, match="levels must rise within"):
            times_of(bad, ABAR)


def gaussian_denoiser(s):
    """The exact denoiser of N(0, s^2) at any time, from the interpolated log-SNR; shape (n, 1)."""
    ell = schedules.log_snr(ABAR)

    def denoiser(x, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        below = t.detach().floor().long().clamp(1, 199)
        at = ell[below] + (t - below) * (ell[below + 1] - ell[below])
        a, b = torch.sigmoid(at), torch.sigmoid(-at)
        return (b.sqrt() / (a * s**2 + b)).float() * x

    return denoiser


def test_sampling_at_whole_times_is_ddim_and_differentiable_between_them():
    x, ts, denoiser = (
        torch.randn(5, 1, generator=torch.Generator().manual_seed(0)),
        [200, 90, 31],
        gaussian_denoiser(0.5),
    )
    ours = schedule_transfer.sample_at(denoiser, x, ABAR, vector(*ts))
    torch.testing.assert_close(ours, samplers.sample_ddim(denoiser, x, ABAR, ts), rtol=1e-5, atol=1e-6)

    def total(times):
        return schedule_transfer.sample_at(denoiser, 100 * torch.ones(1, 1), ABAR, times).sum().double()

    times = vector(180.4, 90.5, 31.3).requires_grad_()
    (slope,) = torch.autograd.grad(total(times), times)
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 0.2
        difference = (total(times.detach() + step) - total(times.detach() - step)) / 0.4
        assert slope[i].item() == pytest.approx(difference.item(), rel=0.02, abs=2e-3)


def test_learned_times_approach_the_best_grid():
    """Data N(0, 0.3^2), a fixed x_T: the closed form says how good the times are."""
    s, problem = 0.3, GaussianImages(vector(0.0), vector(0.3))

    def quality(images):
        return (images.double().square().mean().sqrt() - s) ** 2 * 100

    options = {"samples": 500, "rounds": 60, "rate": 0.03}
    found = schedule_transfer.learn_times(gaussian_denoiser(s), ABAR, 3, quality, (1,), **options)
    ts = found["ts"]
    assert all(a > b for a, b in itertools.pairwise(ts)) and ts[0] <= 200 and ts[-1] >= 1
    uniform, learned = (problem.value(ABAR[grid]).item() for grid in (samplers.timesteps(200, 3), ts))
    assert learned < 0.1 * uniform
    assert found["cost"] == 60 * 500 * 6 and len(found["path"]) == 60
    again = schedule_transfer.learn_times(gaussian_denoiser(s), ABAR, 3, quality, (1,), **options)
    assert again == found


# ---------------------------------------------------------------- the study


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="data 'cifar' is not one of"):
        schedule_transfer.Plan(target="cifar")
    with pytest.raises(ValueError, match="must share size"):
        schedule_transfer.Plan(target="mnist28")
    with pytest.raises(ValueError, match="few = 10 must be"):
        schedule_transfer.Plan(few=10)
    with pytest.raises(ValueError, match=r"grids = \(3, 10\) must hold few = 5"):
        schedule_transfer.Plan(grids=(3, 10))
    study = schedule_transfer.Study(PLAN, tmp_path, GIVEN)
    with pytest.raises(ValueError, match=r"no q was given for seed 7, only for \[0, 1\]"):
        study.choose("mnist8", study.many, 7)
    with pytest.raises(ValueError, match="part 'all' is not one of few, steps, transfer, longer, gaussian"):
        study.run([0], ["all"])
    changed = study.protocol() | {"times": {}}
    with pytest.raises(ValueError, match="another protocol \\(times\\)"):
        schedule_transfer.check_protocol(changed)
    schedule_transfer.check_protocol(json.loads(json.dumps(study.protocol())))


def test_given_schedules_are_those_of_chapter_7(tmp_path):
    given = schedule_transfer.given_by(results.read_result(schedule_transfer.SOURCE_RESULT))
    assert sorted(given) == [0, 1, 2, 3, 4]
    study = schedule_transfer.Study(schedule_transfer.Plan(), tmp_path, given)
    for seed, q in given.items():
        schedules.check(vector(*q), 1000)
        assert study.choose("mnist8", "learned for 10", seed) == {"kind": "cosine", "q": q, "cost": 0}
    assert study.race("mnist8").plan.val_steps == 5 and study.race("digits8").plan.val_steps == 10


@pytest.mark.slow
@pytest.mark.mnist
def test_the_whole_study_resumes_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_RESULTS", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(schedule_transfer, "TIMES", {"samples": 70, "rounds": 2, "rate": 0.02})
    study = schedule_transfer.Study(PLAN, tmp_path / "a", GIVEN, force=True)
    path = schedule_transfer.record(study, [0], tier="smoke")
    result = results.read_result("09_schedules", path.parent)
    schedule_transfer.check_protocol(result["protocol"])
    found = result["data"]
    assert path.name == "09_schedules.json" and result["provenance"]["cost"]["units"] > 0
    rows = found["rows"]
    assert all(math.isfinite(row["frechet"]) for row in rows)
    of_exact = [row for row in rows if (row["data"], row["method"], row["seed"]) == ("mnist8", study.exact, 0)]
    assert [row["steps"] for row in of_exact if row["what"] != "rules"] == [2, 4, 5]
    rules = {row["rule"]: row for row in of_exact if row["what"] == "rules"}
    assert set(rules) == {schedule_transfer.EARLY, study.few, study.exact, *schedule_transfer.RULES, "learned times"}
    assert rules[study.exact]["ts"] == [20, 10] and rules[study.exact]["frechet"] == of_exact[0]["frechet"]
    assert {row["method"] for row in rows if row["data"] == "digits8"} == set(schedule_transfer.UNTUNED) | {
        study.many,
        study.own,
        study.exact,
        study.exact_own,
    }
    assert {row["train_cost"] for row in rows if row["data"] == "mnist8"} == {3 * 16 * 4}
    assert {row["train_cost"] for row in rows if row["data"] == "digits8"} == {3 * 16 * 3}
    assert {(one["data"], one["method"]) for one in found["searches"]} == {
        ("mnist8", study.few),
        ("digits8", study.own),
    }
    problems = schedule_transfer.gaussians(found["gaussians"])
    assert problems["mnist8"].s.shape == (64,)
    for name, problem in problems.items():
        q, _ = schedule_transfer.best_schedule(problem, 2, 20)
        assert study.exact_q[name] == [round(value, 4) for value in q.tolist()]

    # A run that is cut after some pieces and goes on gives the same numbers.
    again = schedule_transfer.Study(PLAN, tmp_path / "b", GIVEN, force=True)
    again.run([0], ["few", "steps"])
    pieces = sorted((tmp_path / "b").glob("marks_*.json"))
    for one in pieces[::2]:
        one.unlink()
    resumed = schedule_transfer.Study(PLAN, tmp_path / "b", GIVEN, force=True).run([0])

    def timeless(found):
        drop = ("wall_s",)
        return {
            key: [{k: v for k, v in row.items() if k not in drop} for row in found[key]]
            for key in ("rows", "searches", "times")
        }

    assert timeless(json.loads(json.dumps(resumed))) == timeless(found)
    with pytest.raises(ValueError, match="made with other n"):
        schedule_transfer.Study(replace(PLAN, n=80), tmp_path / "b", GIVEN, force=True).run([0])
