"""The noise-schedule race: budgets, searches and descents where the answer is known, and the whole at a tiny size."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bilevel_core import schedules
from bilevel_core.lab import files
from bilevel_core.lab.studies import schedule_race, setting

PLAN = schedule_race.Plan(
    name="digits8",
    T=20,
    batch_size=16,
    warm_steps=4,
    trials=3,
    trial_steps=2,
    n_val=70,
    val_steps=2,
    final_steps=4,
    n=70,
    grids=(2, 4),
)


def truth(q):
    """A distance whose minimum over the released ranges is 1, at end = 0.9 and tau = 2."""
    return 1 + 400 * (float(q[1]) - 0.9) ** 2 + (float(q[2]) - 2) ** 2


def proposed(search, trials, seed):
    """What a search asks for when each value is the truth."""
    found, propose = [], search(trials, seed)
    q = next(propose)
    for _ in range(trials):
        found.append(q)
        try:
            q = propose.send(truth(q))
        except StopIteration:
            break
    return found


def test_budgets_add_up():
    plan = schedule_race.Plan()
    assert plan.warm_cost == 3 * 128 * 500
    assert plan.trial_cost == 3 * 128 * 60 + 1000 * 10
    assert plan.budget == plan.warm_cost + 15 * plan.trial_cost
    assert plan.final_steps + (plan.budget - 383) / 384 <= plan.longer <= plan.final_steps + plan.budget / 384
    with pytest.raises(ValueError, match="trials = 4 must be a positive multiple of 3"):
        schedule_race.Plan(trials=4)


@pytest.mark.parametrize("name", schedule_race.SEARCHES)
def test_searches_stay_in_the_released_ranges_and_repeat(name):
    search = schedule_race.SEARCHES[name]
    found = proposed(search, 9, seed=3)
    assert len(found) == 9 and len(set(found)) == 9
    for q in found:
        assert all(low <= value <= high for value, (low, high) in zip(q, schedule_race.RANGES, strict=True)), q
    assert proposed(search, 9, seed=3) == found
    assert name == "grid" or proposed(search, 9, seed=4) != found


def test_the_grid_is_end_by_tau():
    found = proposed(schedule_race.grid, 15, seed=0)
    assert {(round(q[1], 6), q[2]) for q in found} == {
        (e, tau) for e in (0.8, 0.85, 0.9, 0.95, 1.0) for tau in (1.0, 2.5, 4.0)
    }
    assert {(q[0], q[3]) for q in found} == {(0.0, 0.008)}


@pytest.mark.slow
def test_the_bayesian_search_uses_what_it_is_told():
    for seed in range(3):
        values = [truth(q) for q in proposed(schedule_race.bayesian, 15, seed)]
        assert sum(values[:5]) / 5 > 2 and sorted(values[-5:])[2] < 1.1  # at random first, near the optimum at last


def test_steps_are_clipped_far_off_and_proportional_near():
    far = schedule_race.clipped(0, torch.tensor([-1e4, 1e4, 1e4]).double())
    assert far.tolist() == pytest.approx([-0.02, 0.02, 0.05])
    near = schedule_race.clipped(0, torch.tensor([2.0, 10.0, -1.0]).double())
    assert near.tolist() == pytest.approx([0.002, 0.002, -0.005])


def test_the_mean_of_the_second_half_is_returned():
    path = [{"q": [0.0, end, 1.0, 0.008]} for end in (0.5, 0.6, 0.9, 0.8)]
    assert schedule_race.settled(path, 20) == pytest.approx([0.0, 0.85, 1.0, 0.008])


@pytest.fixture
def race(tmp_path, monkeypatch):
    """A race whose trials cost nothing and know the truth."""
    made = schedule_race.Race(replace(PLAN, trials=9), tmp_path, force=True)
    monkeypatch.setattr(schedule_race.Race, "warm", lambda self, seed: None)
    monkeypatch.setattr(schedule_race.Race, "trial", lambda self, warm, q, seed: truth(q))
    return made


@pytest.mark.parametrize("name", schedule_race.SEARCHES)
def test_a_search_returns_its_best_trial_at_the_budget(race, name):
    found = race.search(name, 0)
    assert len(found["path"]) == 9 and found["cost"] == race.plan.budget
    best = min(found["path"], key=lambda trial: truth(trial["q"]))
    assert found["q"] == best["q"] and best["value"] == pytest.approx(truth(best["q"]))
    for trial in found["path"]:
        schedules.check(torch.tensor(trial["q"], dtype=torch.float64), race.plan.T)
    costs = [trial["cost"] for trial in found["path"]]
    assert costs == [race.plan.warm_cost + (k + 1) * race.plan.trial_cost for k in range(9)]


def test_a_piece_of_another_plan_is_refused(race):
    race.search("random", 0)
    other = schedule_race.Race(replace(race.plan, n_val=80), race.folder)
    with pytest.raises(ValueError, match="made with other n_val"):
        other.search("random", 0)


class Killed(BaseException):
    """What a clock does."""


def without_time(found):
    return {key: value for key, value in found.items() if key != "wall_s"}


@pytest.mark.parametrize("name", schedule_race.SEARCHES)
def test_a_search_goes_on_from_the_trial_it_was_killed_in(race, name, tmp_path, monkeypatch):
    tried, whole = [], without_time(schedule_race.Race(race.plan, tmp_path / "whole", force=True).search(name, 0))

    def trial(self, warm, q, seed):
        tried.append(q.tolist())
        if len(tried) == 5:
            raise Killed
        return truth(q)

    monkeypatch.setattr(schedule_race.Race, "trial", trial)
    with pytest.raises(Killed):
        race.search(name, 0)
    assert [path.name for path in race.folder.glob("*.json")] == [
        f"search_{name}_{schedule_race.search_seed(0)}.begun.json"
    ]
    with pytest.raises(ValueError, match="begun.json was made with other n_val"):
        schedule_race.Race(replace(race.plan, n_val=80), race.folder).search(name, 0)
    found = without_time(race.search(name, 0))
    assert found == whole and len(tried) == 10 and tried[5] == tried[4]
    assert not list(race.folder.glob("*.begun.json"))


@pytest.mark.slow
def test_algorithm_6_goes_on_from_the_step_it_was_killed_in(tmp_path, monkeypatch):
    few = {"samples": 4, "draws": 2, "inner": 1, "g_batch": 8, "val_every": 3}
    monkeypatch.setattr(schedule_race, "ALGORITHM_6", schedule_race.ALGORITHM_6 | few)
    plan = replace(PLAN, trials=9)
    whole = schedule_race.Race(plan, tmp_path / "whole").learn("Algorithm 6", 0)
    assert len(whole["path"]) > 6
    race, learn, saved = schedule_race.Race(plan, tmp_path / "cut"), schedule_race.learn_schedule, []

    def cut(state, x0, steps):
        for record in learn(state, x0, steps=steps):
            if record.k == 5:
                saved.append(next(race.folder.glob("learning_*")).read_bytes())
                raise Killed
            yield record

    monkeypatch.setattr(schedule_race, "learn_schedule", cut)
    with pytest.raises(Killed):
        race.learn("Algorithm 6", 0)
    begun = next(race.folder.glob("learning_*"))
    begun.write_bytes(saved[0])  # as if killed without a last word: step 4
    monkeypatch.setattr(schedule_race, "learn_schedule", learn)
    found = race.learn("Algorithm 6", 0)
    assert without_time(found) == without_time(whole) and not begun.exists()
    weights = [files.load_state(next((tmp_path / at).glob("learned_*")))[0] for at in ("whole", "cut")]
    assert files.digest(weights[0]) == files.digest(weights[1])


def test_measures_are_those_of_a_perfect_and_a_blind_model():
    """Real images against real ones are near; one and the same image is far, and scores 1."""
    from bilevel_core.lab import data
    from bilevel_core.lab.models import networks

    classifier = networks.load_classifier("mnist8")
    real, reference = data.load("digits", "train", 8)[0], setting.real_features("digits8", "val")
    assert reference.shape == (len(data.load("digits", "val", 8)[0]), 32)
    abar = schedules.abar(torch.tensor([0.0, 0.95, 1.0, 0.008], dtype=torch.float64), 20)

    def oracle(images):  # eps that leads from any x_t to these images in one step
        def denoiser(x, t):
            target = images[: len(x)]
            return (x - abar[t].sqrt().float() * target) / (1 - abar[t]).sqrt().float()

        return denoiser

    options = {"n": 500, "seed": 0}
    good, blind = (
        setting.measure(oracle(images), abar, 2, 8, classifier, reference, **options)
        for images in (real[:500], real[:1].expand(500, -1, -1, -1))
    )
    assert good["cost"] == blind["cost"] == 1000
    assert good["frechet"] < 1 < 20 < blind["frechet"] and abs(good["kid"]) < 0.1 < blind["kid"]
    assert blind["score"] == pytest.approx(1, abs=1e-3) and good["score"] > 5


@pytest.mark.slow
def test_descent_without_a_bilevel_term_follows_the_gradient(tmp_path, monkeypatch):
    """With an estimator that knows the truth it walks to the optimum, inside the budget."""

    def estimator(f, z, *, seed):
        return torch.tensor([0.0, 100 * (float(z[1]) - 0.9), 0.0]).double(), {"f": f(z, seed).item()}

    way = schedule_race.Descent(estimator, 40, 1, lambda k, grad: 0.005 * grad, reduced=True)
    monkeypatch.setitem(schedule_race.DESCENTS, "known", way)
    plan = replace(PLAN, trials=30)
    found = schedule_race.Race(plan, tmp_path).descend("known", 0)
    step = 3 * plan.batch_size + 40 * plan.val_steps
    assert [row["cost"] for row in found["path"][:2]] == [plan.warm_cost + step, plan.warm_cost + 2 * step]
    assert plan.budget - 2 * step < found["cost"] <= plan.budget
    assert found["q"][1] == pytest.approx(0.9, abs=2e-3) and all(math.isfinite(row["value"]) for row in found["path"])


@pytest.mark.slow
def test_the_whole_race_resumes_and_is_stored(tmp_path):
    race = schedule_race.Race(PLAN, tmp_path, force=True)
    found = race.run([0], [0])
    json.dumps(found, allow_nan=False)
    rows = found["rows"]
    final = [row for row in rows if row["budget"] == "final" and "own" not in row["method"]]
    assert list(dict.fromkeys(row["method"] for row in final)) == list(schedule_race.METHODS)
    marks = [(row["split"], row["steps"]) for row in final if row["method"] == "Algorithm 6"]
    assert marks == [("val", 2), ("test", 2), ("test", 4)]
    total = [row for row in rows if row["budget"] == "total"]
    assert {row["method"] for row in total} == set(schedule_race.FIXED)
    for row in total:
        assert row["train_steps"] == PLAN.longer and row["train_cost"] == 3 * 16 * PLAN.longer
        assert PLAN.final_steps * 48 + PLAN.budget - row["train_cost"] in range(48)
    for row in final:
        assert row["train_cost"] == 3 * 16 * PLAN.final_steps
        assert (row["search_cost"] > 0) == (row["method"] not in schedule_race.FIXED)
    learned = next(one for one in found["searches"] if one["method"] == "Algorithm 6")["path"]
    assert all(row["moved"] > 0 and row["g_star"] > 0 for row in learned)
    own = [row for row in rows if row["method"] == "Algorithm 6, own weights"]
    assert own and own[0]["q"] == final[-1]["q"] and own[0]["loss"] < final[-1]["loss"]  # the weights are warm
    assert {row["split"] for row in found["ablation"]} == {"val"}
    assert {row["method"] for row in found["ablation"]} == set(schedule_race.ABLATION)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert schedule_race.Race(PLAN, tmp_path, force=True).run([0], [0]) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times

    race.store(tmp_path / "stored.safetensors", 0, 5)
    images, network, abar, about = schedule_race.restore(tmp_path / "stored.safetensors")
    assert set(images) == set(schedule_race.METHODS) and about["seed"] == 0
    assert torch.equal(abar, schedules.abar(torch.tensor(final[-1]["q"], dtype=torch.float64), PLAN.T))
    again = setting.generate(network, abar, [20, 10], 5, 8, eta=0.0, seed=0)
    gap = (again + 1) * 127.5 - images["Algorithm 6"].float()
    assert gap.abs().max() < 0.51
