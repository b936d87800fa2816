"""The race of grids: fixed grids, what they minimise on Gaussian data, and the whole at a tiny size."""

import itertools
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_core import guidance, samplers, schedules
from bilevel_core.lab import files, oracles
from bilevel_core.lab.models import adapters
from bilevel_core.lab.studies import grid_race, grids, schedule_transfer, setting
from bilevel_core.schedule_learning import learn_grid

LEARN = {"steps": 2, "samples": 70, "rate": 0.1}
PLAN = grid_race.Plan(
    name="digits8", T=50, batch_size=64, short=4, length=30, few=(1, 3), many=(6,), learn=LEARN, fine=20, pairs=30, n=70
)


ROUNDS = {"every": 10, "samples": 70, "batch": 32, "rate": 0.1, "modes": 2}
FEW = ("cosine, end 0.95", "constant rate", "aligned steps")


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    return grid_race.Race(PLAN, tmp_path_factory.mktemp("race"), force=True)


@pytest.fixture
def fewer(monkeypatch):
    """Rivals of each kind, and no time for all of them."""
    monkeypatch.setattr(grid_race, "FIXED_GRIDS", FEW)
    kinds = {name: grid_race.FIXED[name] for name in (grid_race.EARLY, "linear")}
    monkeypatch.setattr(grid_race, "FIXED", kinds)
    monkeypatch.setattr(grid_race, "LEVELS", ROUNDS)


def angles(grid):
    return schedules.angle(grid[1:])


def is_a_grid(grid, steps):
    low, high = grids.SEEN
    level = angles(grid)
    return (
        grid.shape == (steps + 1,)
        and grid.dtype == torch.float64
        and grid[0] == 1
        and bool((level.diff() > 0).all())
        and low - 1e-9 <= level[0]
        and level[-1] <= high + 1e-9
    )


# ---------------------------------------------------------------- grids


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([*grids.GRIDS]), st.integers(1, 60))
def test_fixed_grids_rise_within_what_networks_see(name, steps):
    assert is_a_grid(grids.GRIDS[name](steps), steps)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=12), st.integers(1, 60))
def test_refined_grids_rise_and_keep_their_levels(z, steps):
    grid = schedules.grid_abar(torch.tensor(z, dtype=torch.float64), ends=grids.SEEN)
    fine = grids.refined(grid, steps)
    assert is_a_grid(fine, steps)
    assert fine[-1] == pytest.approx(grid[-1].item(), abs=1e-12)
    again = grids.refined(grid, 3 * (len(grid) - 1))
    torch.testing.assert_close(angles(again)[2::3], angles(grid), rtol=0, atol=grids.SEEN[0])


def test_the_ends_of_published_grids():
    high, low = 80.0 ** (1 / 7), math.tan(grids.SEEN[0]) ** (1 / 7)
    edm = 1 / (1 + (high + torch.arange(4).double() / 3 * (low - high)) ** 14)
    torch.testing.assert_close(grids.GRIDS["EDM, rho = 7"](4)[1:], edm.flip(0), rtol=1e-6, atol=1e-12)
    snr = schedules.log_snr(grids.GRIDS["uniform log-SNR"](5)[1:])
    torch.testing.assert_close(snr.diff(), snr.diff()[:1].expand(4), rtol=1e-6, atol=0)
    table = schedules.abar(torch.tensor([0, 0.95, 1, 0.008], dtype=torch.float64), 1000)
    assert torch.equal(grids.GRIDS["cosine, end 0.95"](4)[1:], grids.within(table[[0, 250, 500, 750, 1000]])[1:])


@pytest.mark.parametrize(
    "abar", [[1.0, 0.5, 0.5], [1.0, 0.2, 0.5], [1.0, 1e-9, 1e-10]], ids=["repeats", "rises", "both below"]
)
def test_levels_that_do_not_rise_are_refused(abar):
    with pytest.raises(ValueError, match="levels must rise strictly|abar must fall"):
        grids.within(torch.tensor(abar, dtype=torch.float64))


# ---------------------------------------------------------------- Gaussian images, where answers are known

S = torch.tensor([0.15, 0.4, 0.9], dtype=torch.float64)
PROBLEM = schedule_transfer.GaussianImages(torch.zeros(3, dtype=torch.float64), S)
LAW = oracles.Gaussian(PROBLEM.mean, torch.diag(S**2))


def told(x, level):
    """The exact denoiser, told the angle."""
    return LAW.denoiser(torch.cat([torch.ones_like(level), schedules.ANGLE.abar(level)]).double())(x, 1)


def exact(grid):
    return PROBLEM.value(grid[1:].flip(0)).item()


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_constant_rate_moves_the_law_by_equal_lengths(steps):
    problem = schedule_transfer.GaussianImages(torch.tensor([0.5, 0.0, -0.2]).double(), S)
    grid = grids.constant_rate(problem, steps)
    assert is_a_grid(grid, steps)

    def length(a, b):  # of the path, by small Frechet steps
        v = torch.linspace(a, b, 4001, dtype=torch.float64)[:, None]
        place = torch.cat([torch.cos(v) * problem.mean, (S**2 * torch.cos(v) ** 2 + torch.sin(v) ** 2).sqrt()], 1)
        return place.diff(dim=0).norm(dim=1).sum().item()

    edges = [grids.SEEN[0], *angles(grid).tolist()]
    lengths = [length(a, b) for a, b in itertools.pairwise(edges)]
    assert max(lengths) == pytest.approx(min(lengths), rel=2e-3)


def test_one_gaussian_width_has_equal_steps_of_constant_rate():
    one = schedule_transfer.GaussianImages(torch.zeros(1).double(), torch.tensor([0.5]).double())
    level, half = angles(grids.constant_rate(one, 4)), schedules.ANGLE
    spread = (0.25 * half.abar(level) + 1 - half.abar(level)).sqrt()
    torch.testing.assert_close(spread.diff(), spread.diff()[:1].expand(3), rtol=1e-3, atol=0)


def measured(steps_of_path=2000):
    x0 = torch.randn(steps_of_path, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * S
    return grids.changes(lambda x, v: told(x.double(), v.double()).float(), x0.float(), 30, seed=1)


def test_changes_are_those_of_the_closed_form():
    """x0_hat = s^2/(s^2 + sigma^2) x: along one path the mean square change is known."""
    level, change = measured(20_000)
    sigma2 = torch.tan(level) ** 2
    gain = S**2 / (S**2 + sigma2[:, None])  # (M, 3)
    i, j = 5, 21
    wanted = (gain[i] ** 2 * (S**2 + sigma2[i]) + gain[j] ** 2 * (S**2 + sigma2[j])).sum()
    wanted -= 2 * (gain[i] * gain[j] * (S**2 + sigma2[i])).sum()
    assert change[i, j].item() == pytest.approx(wanted.item(), rel=0.05)
    assert change.diag().abs().max() < 1e-9 and torch.allclose(change, change.T)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_aligned_steps_are_the_least_of_all_by_trying_all(steps):
    level, change = measured()
    sigma = torch.tan(level)

    def bound(points):
        total = 0.0
        for a, b in itertools.pairwise(points):
            for k in range(a, b):
                total += (sigma[k] ** -2 - sigma[k + 1] ** -2) / 2 * change[k, b]
        return float(total)

    M = len(level)
    every = [(0, *inner, M - 1) for inner in itertools.combinations(range(1, M - 1), steps - 1)]
    best = min(every, key=bound)
    grid = grids.align(level, change, steps)
    assert is_a_grid(grid, steps)
    torch.testing.assert_close(angles(grid), level[list(best[1:])], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 30])
def test_aligned_steps_need_enough_levels(steps):
    with pytest.raises(ValueError, match=f"steps = {steps} must be at least 1 and below the 30 levels"):
        grids.align(*measured(), steps)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_learned_grid_is_not_worse_than_any_fixed_one(steps):
    """On Gaussian images f is known exactly, and so is the best grid."""
    network = guidance.LevelDenoiser(told, schedules.grid_abar(torch.zeros(3)), seen=grids.SEEN)

    def quality(x):
        return (x.square().mean(0).sqrt() - S).square().sum()

    start, like = grids.GRIDS["cosine, end 0.95"](steps), torch.zeros(4000, 3, dtype=torch.float64)
    *_, last = learn_grid(network, start, quality, like, steps=80, seed=3)
    fixed = {name: exact(make(steps)) for name, make in grids.GRIDS.items()}
    fixed["constant rate"] = exact(grids.constant_rate(PROBLEM, steps))
    fixed["aligned steps"] = exact(grids.align(*measured(), steps))
    _, best = schedule_transfer.best_levels(PROBLEM, steps)  # to a local minimum
    assert exact(last.mean) <= best + 0.02 * (min(fixed.values()) - best) + 1e-5, fixed


# ---------------------------------------------------------------- the race


def test_what_is_charged_adds_up():
    plan = grid_race.Plan()
    each = 2 * plan.learn["steps"] * plan.learn["samples"]
    assert plan.price == each * sum(plan.few) and 0 <= 384 * plan.paid - plan.price < 384
    with pytest.raises(ValueError, match="learn them by less"):
        replace(plan, length=plan.paid)
    with pytest.raises(ValueError, match=r"few = \(5, 3\) must be numbers of steps, rising"):
        replace(plan, few=(5, 3))
    with pytest.raises(ValueError, match="data 'cifar' is not one of"):
        replace(plan, name="cifar")


def test_the_price_of_a_grid_is_what_it_cost(race):
    costs = [race.learned(4, 0, steps)["cost"] for steps in PLAN.few]
    assert sum(costs) == PLAN.price


def test_a_density_pays_for_itself(race, fewer):
    state = race.dense(0)
    assert state.step == PLAN.dense == 10 and state.spent == PLAN.round
    assert state.cost + PLAN.price <= 3 * PLAN.batch_size * PLAN.length
    assert state.density.phi.abs().max() > 0 and state.density.s == grids.DENSITY.s
    with pytest.raises(ValueError, match="11 training steps hold no round of 10 and its price"):
        _ = replace(PLAN, length=11).dense


def iter_sent(points):
    """A search that tries these, whatever it is told."""
    for q in points:
        assert (yield q) > 0


def test_searches_cost_what_learned_grids_do_and_keep_the_best(race, monkeypatch):
    for name in grid_race.SEARCHES:
        found = [race.searched(name, PLAN.short, 0, steps) for steps in PLAN.few]
        assert sum(one["cost"] for one in found) == PLAN.price
        for one in found:
            assert len(one["f"]) == grid_race.TRIALS and is_a_grid(
                torch.tensor(one["grid"]).double(), len(one["grid"]) - 1
            )
    hopeless = (0.0, 0.0001, 4.0, 0.008)  # all its levels lie below what the network has seen
    tried = list(itertools.islice(race.proposals("random search", 3, 0), 30))
    closed = schedule_transfer.best_schedule(race.problem, 3, PLAN.T)[0].tolist()
    assert len(tried) == grid_race.TRIALS and [list(q) for q in tried[:2]] == [[0.0, 0.95, 1.0, 0.008], closed]
    for q in tried[2:]:
        assert all(low <= v <= high for v, (low, high) in zip(q, grid_race.BOX, strict=True))
    with pytest.raises(ValueError, match="levels must rise strictly"):
        grids.of_schedule("cosine", hopeless, 3)
    monkeypatch.setattr(race, "proposals", lambda *_: iter_sent([hopeless, tried[0], tried[5]]))
    (race.folder / "random_search_4_0_3.json").unlink()
    found = race.searched("random search", PLAN.short, 0, 3)
    assert found["f"][0] == grid_race.NEVER > max(found["f"][1:])
    assert tuple(found["q"]) == (tried[0], tried[5])[found["f"][1:].index(min(found["f"]))]


@pytest.mark.slow
def test_the_race_runs_through_and_comes_again(race, fewer):
    found = race.run([0])
    rows = found["rows"]
    assert all(math.isfinite(row[split]) for row in rows for split in ("val", "test"))
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(grid_race.PARTS)
    keys = [tuple(row[k] for k in ("told", "method", "steps", "solver", "budget", "train_steps")) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        if row["budget"] == "total":
            whole = 3 * PLAN.batch_size * PLAN.length
            least = 0 if row["method"] == grid_race.DENSE else whole - 3 * PLAN.batch_size  # in whole rounds
            assert least < row["train_cost"] + row["search_cost"] <= whole
    assert {*grid_race.SEARCHES, grid_race.DENSE} < {row["method"] for row in rows}
    for method in (grid_race.OURS, *FEW):
        mine = {row["steps"] for row in rows if row["method"] == method and row["budget"] == "total"}
        assert mine == {1, 3, 6}, method
    assert {row["method"] for row in rows if row["told"] == "t"} == {*FEW[:1], "linear", grid_race.CLOSED}
    again = grid_race.Race(PLAN, race.folder, force=True)
    assert json.loads(json.dumps(again.run([0]))) == json.loads(json.dumps(found))
    with pytest.raises(ValueError, match="was made with other n;"):
        grid_race.Race(replace(PLAN, n=80), race.folder, force=True).part("short", 0)


def test_a_race_that_was_cut_off_is_the_uninterrupted_one(race, fewer, tmp_path, monkeypatch):
    plain, calls, again = files.piece, [], grid_race.Race(PLAN, tmp_path, force=True)

    def cut(path, config, compute):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(path, config, compute)

    def without_time(rows):
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]

    monkeypatch.setattr(files, "piece", cut)
    with pytest.raises(KeyboardInterrupt):
        again.part("total", 0)
    monkeypatch.setattr(files, "piece", plain)
    assert without_time(again.part("total", 0)) == without_time(race.part("total", 0))


def test_a_mark_is_that_of_the_first_edition(race):
    """The same images and distances as `setting.measure` has, for a network told t."""
    state = race.trained("linear", PLAN.length, 0)
    (row,) = race.told_t("linear", PLAN.length, 0, [3])
    for split in ("val", "test"):
        sampler = race.sampler(state.ema.module.eval())
        found = setting.Setting.mark(race, sampler, race.schedule("linear"), 3, split, n=PLAN.n, seed=0, force=True)
        assert row[split] == pytest.approx(found["frechet"], rel=1e-6)


def test_unknown_names_are_refused(race):
    with pytest.raises(ValueError, match="grid 'best' is not one of cosine, "):
        race.fixed("best", 3)
    with pytest.raises(ValueError, match="or lacks its network"):
        race.fixed("aligned steps", 3)
    with pytest.raises(ValueError, match="part 'all' is not one of total"):
        race.part("all", 0)


def test_levels_that_the_network_has_not_seen_are_said(race):
    network = race.network("level", PLAN.short, 0)
    dark = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), 1000)[[0, 500, 1000]]
    x = torch.zeros(1, 1, 8, 8)
    with pytest.warns(UserWarning, match=r"the angle is 1\.57.* but the network has seen 0\.0051.* to 1\.56"):
        samplers.sample_ddim(network.on(dark), x, dark, [2, 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the angle is")
        inside = grids.within(dark)
        samplers.sample_ddim(network.on(inside), x, inside, [2, 1])


@pytest.mark.parametrize("name", ["cosine, end 0.95", "EDM, rho = 7"])
def test_exported_grids_agree_with_diffusers(race, name):
    from diffusers import DDIMScheduler

    network, grid = race.network("level", PLAN.short, 0), grids.GRIDS[name](5)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler, denoiser = adapters.to_diffusers(grid), network.on(grid)
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(5)
    theirs = x
    with torch.no_grad():
        for i in scheduler.timesteps:
            theirs = scheduler.step(denoiser(theirs, int(i) + 1), i, theirs, eta=0.0).prev_sample
        ours = samplers.sample_ddim(denoiser, x, grid, [5, 4, 3, 2, 1])
    assert (ours - theirs).abs().max() < 2e-3 * ours.abs().max()
    table = grids.DENSITY.abar()
    words = adapters.grid_to_diffusers(grid, table)
    torch.testing.assert_close(
        torch.tensor(words["sigmas"]).flip(0)[1:], torch.tan(angles(grid)), rtol=1e-6, atol=0, check_dtype=False
    )
    assert words["timesteps"] == sorted(words["timesteps"], reverse=True)


def test_a_record_of_another_protocol_is_refused(race):
    found = race.protocol()
    grid_race.check_protocol(found)
    with pytest.raises(ValueError, match=r"another protocol \(align\)"):
        grid_race.check_protocol(found | {"align": [0.1, 80.0]})


def test_the_copy_that_samples_is_the_network(race):
    network = race.network("level", PLAN.short, 0)
    fast = race.sampler(network.network)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for level in (0.0123, 0.777, 1.5):
            wanted = network.network(x, torch.tensor([level]))
            torch.testing.assert_close(fast(x, torch.tensor([level])), wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is told of it


def test_what_is_stored_comes_back(race, tmp_path):
    race.store(tmp_path / "kept.safetensors", 0, count=2)
    network, learned, images = grid_race.restore(tmp_path / "kept.safetensors")
    own = race.network("level", PLAN.length - PLAN.paid, 0)
    assert set(learned) == set(images) == set(PLAN.few) and network.seen == grids.SEEN
    x, grid = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), learned[3]
    found = samplers.sample_ddim(network.on(grid), x, grid, [3, 2, 1])
    assert torch.equal(found, samplers.sample_ddim(own.on(grid), x, grid, [3, 2, 1]))
    assert images[3].shape == (2, 1, 8, 8) and images[3].dtype == torch.uint8


def rows_of(**values):
    about = {"told": "level", "solver": "DDIM", "budget": "total", "steps": 5}
    return [
        about | {"method": method, "seed": seed, "test": value, "val": 0.0}
        for method, column in values.items()
        for seed, value in enumerate(column)
    ]


def test_methods_stand_in_order_with_paired_differences():
    rows = rows_of(linear=[3.0, 3.1, 3.2], sigmoid=[1.0, 1.4, 1.2]) + [
        row | {"method": grid_race.OURS} for row in rows_of(ours=[1.0, 1.1, 1.2])
    ]
    rows += [row | {"told": "t", "test": 5.0} for row in rows_of(linear=[0, 0, 0])]
    rows += [row | {"steps": 10} for row in rows_of(other=[0, 0, 0])]
    found = grid_race.standing(rows, 5)
    assert list(found) == [grid_race.OURS, "sigmoid", "linear", "linear, told t"]
    assert found["linear"].verdict == "worse" and found["sigmoid"].verdict == "tie"
    assert found["linear"].difference.mean == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("total", "final", "wanted"), [(0.1, 0.2, 1), (-0.1, 0.2, 2), (-0.3, 0.1, 5), (-0.1, 0.0, math.inf), (0.0, 0.1, 2)]
)
def test_from_how_many_trainings_a_grid_pays(total, final, wanted):
    assert grid_race.pays_from(total, final) == wanted
    if wanted not in (1, math.inf):
        assert final + (total - final) / wanted > 0 >= final + (total - final) / (wanted - 1) - 1e-12
