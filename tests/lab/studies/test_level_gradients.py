"""The study of networks told the level: its estimators and verdicts on problems with closed forms, and its pieces."""

import json
import math

import pytest
import torch

from bilevel_core import guidance, schedules
from bilevel_core.lab import levels, oracles, results
from bilevel_core.lab.studies import level_gradients as study_of
from bilevel_core.lab.studies import schedule_gradients

Z = study_of.coordinates("near")


def stands_in(problem):
    """The oracle's f at its own best response, as f(z, seed) with theta fixed."""
    c = problem.solve_star(schedules.expand(Z)).detach()
    return lambda z, seed: problem.f(schedules.expand(z), c)


def retrained(problem):
    """The truth of the study for the oracle: differences of F at the widths."""
    return study_of.differences([problem.value(schedules.expand(z)).item() for z in study_of.shifted(Z)])


def pieces_of(kind, problem, seed, truth):
    """What `truth` and `fixed` would have written of the oracle; seeds differ by a factor."""
    scale, chosen = 1 + 0.1 * seed, study_of.KINDS[kind]
    row = study_of.both(stands_in(problem), Z, seed)
    row |= {way: [scale * value for value in row[way]] for way in ("wide", "exact")}
    second = row | {way: [1.001 * value for value in row[way]] for way in ("wide", "exact")}
    config = {"point": "near", "seed": seed, "kind": study_of.asdict(chosen)}
    made = {"made_by": "fixed", "config": config, "value": row["value"], "draws": [row, second], "beyond": 0}
    made |= {"costs": {"wide": 60, "exact": 20}}
    grad = [scale * value for value in truth]
    if kind == "t":
        return [made, {"made_by": "truth", "config": {"point": "near", "seed": seed, "scale": 1.0}, "grad": grad}]
    return [made, {"made_by": "truth", "config": config, "grad": grad}]


def problems(k=12):
    told_t, level = (oracles.LevelGaussianSchedule(k, told=told) for told in ("t", "level"))
    return {"t": told_t, "level": level, "broad": oracles.LevelGaussianSchedule(k, train=level.uniform(200))}


def test_both_ways_are_the_partial_derivative_where_f_is_smooth():
    for problem in problems().values():
        found = study_of.both(stands_in(problem), Z, 0)
        wanted = problem.partial(schedules.expand(Z))[:3]  # epsilon is where `reduce` keeps it
        torch.testing.assert_close(torch.tensor(found["exact"], dtype=torch.float64), wanted, rtol=1e-8, atol=1e-12)
        assert study_of.cosine(found["wide"], wanted) > 0.97
        assert found["value"] == pytest.approx(problem.value(schedules.expand(Z)).item())


def test_where_the_response_is_jagged_the_wide_difference_is_right_and_the_derivative_useless():
    broad = oracles.LevelGaussianSchedule.uniform(200)
    problem = oracles.LevelGaussianSchedule(12, train=broad, wiggle=0.003)
    found, truth = study_of.both(stands_in(problem), Z, 0), retrained(problem)
    assert study_of.cosine(found["wide"], truth) == pytest.approx(1)
    assert study_of.cosine(found["exact"], truth) < 0
    rows = [p for seed in (0, 1) for p in pieces_of("broad", problem, seed, truth)]
    short = study_of.smoothness(rows, truth)["broad"]
    assert min(short["wide"]) > 0.999 and max(short["exact"] + short["agree"]) < 0


def test_the_verdict_is_the_oracle_s():
    """Told t the partial gradient has wrong signs and the verdict holds; exchanged, it fails; alike, it is open."""
    told = problems()
    rows = [p for seed in range(4) for kind, one in told.items() for p in pieces_of(kind, one, seed, retrained(one))]
    found = study_of.verdicts(rows, "near")
    assert list(found) == ["t", "level", "broad"]
    assert not all(found["t"]["wide"]["signs"]) and all(found["level"]["wide"]["signs"])
    assert found["level"]["wide"]["cosine"] > 0.99 > 0.5 > found["t"]["wide"]["cosine"]
    assert found["broad"]["wide"]["off"] == pytest.approx(0, abs=1e-12)
    for verdict in (found["level"]["wide"], found["level"]["exact"]):
        assert len(verdict["cosines"]) == 4 and min(verdict["snr"]) > 100
    held = study_of.decide(found)
    assert held.said == "holds" and held.rise.lo > 0 and all(held.signs)
    assert study_of.decide({"t": found["level"], "level": found["t"]}).said == "fails"
    assert study_of.decide({"t": found["level"], "level": found["level"]}).said == "open"


def test_told_t_the_truth_may_be_an_earlier_one():
    told, far = problems(), {"kind": "truth", "config": {"point": "far", "seed": 0, "scale": 1.0}, "grad": [1, 2, 3]}
    half = {"kind": "truth", "config": {"point": "near", "seed": 0, "scale": 0.5}, "grad": [9, 9, 9]}
    truth = retrained(told["t"])
    rows = [pieces_of("t", told["t"], seed, truth) for seed in range(3)]
    earlier = [{"kind": "truth"} | {k: v for k, v in row[1].items() if k != "made_by"} for row in rows]
    found = study_of.verdicts([row[0] for row in rows], "near", [far, half, *earlier])
    assert found["t"]["seeds"] == [0, 1, 2]
    assert [m.mean for m in found["t"]["truth"]] == pytest.approx([1.1 * value for value in truth])
    study = study_of.Study(None, name="digits8")
    sizes = {"seeds": 2, "short": 1, "far": 1}
    every, fewer = (study_of.pieces(study, **sizes, earlier=known) for known in ((), earlier))
    made = [make for make in every if make.func is schedule_gradients.truth]
    assert len(made) == 3 and len(every) - len(fewer) == 2  # near is known, far is not


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(study_of, "faster", lambda network, x: network)  # recording takes longer than all the rest
    monkeypatch.setattr(study_of, "VARIANTS", {"stretch 20": study_of.VARIANTS["stretch 20"]})
    sizes = {"T": 20, "sample_steps": 3, "train_steps": 2, "batch_size": 16, "n_truth": 60, "n": 50}
    return study_of.Study(tmp_path, name="digits8", **sizes)


@pytest.mark.slow
def test_pieces_are_made_once_judged_and_recorded(study, monkeypatch):
    sizes = {"seeds": 2, "short": 1, "far": 2}
    found = json.loads(json.dumps(study_of.gather(study_of.pieces(study, **sizes))))
    before = {path: path.stat().st_mtime_ns for path in study.folder.iterdir()}
    assert json.loads(json.dumps(study_of.gather(study_of.pieces(study, **sizes)))) == found
    assert {path: path.stat().st_mtime_ns for path in study.folder.iterdir()} == before
    for point in ("near", "far"):
        known = study_of.verdicts(found, point)
        assert list(known) == ["t", "level", "broad"]
        assert all(math.isfinite(v) for kind in known.values() for way in ("wide", "exact") for v in kind[way]["snr"])
        assert known["level"]["wide"]["cost"] == 6 * 3 * 50 and known["level"]["exact"]["cost"] == 2 * 3 * 50
    assert set(study_of.smoothness(found, [1.0, -1.0, 0.1])) == {"broad", "stretch 20"}
    table = study_of.relabelled(found)
    assert len(table) == 6 and all(len(row[steps]) == 1 for row in table.values() for steps in study_of.GRIDS)
    level = [piece for piece in found if study_of.name_of(piece) == "level" and piece["made_by"] == "fixed"]
    assert all(piece["beyond"] > 0 for piece in level)  # end + h lies beyond q's own levels
    broad = [piece for piece in found if study_of.name_of(piece) == "broad"]
    assert all(piece["beyond"] == 0 for piece in broad)
    monkeypatch.setenv("BILEVEL_RESULTS", str(study.folder / "results"))
    path = study_of.record(study, study_of.pieces(study, **sizes), [0, 1], tier="smoke")
    written = results.read_result("06_levels", path.parent)
    assert written["data"]["pieces"] == found and written["protocol"]["kinds"]["broad"]["top"] == study_of.TOP
    units = sum(piece["cost"] for piece in found) - written["provenance"]["cost"]["units"]
    assert units == (2 + 2 + 2 + 1) * 2 * 16 * 3  # told the level near and far, broad far, relabel: trained once
    other = study_of.Study(study.folder, name="digits8", T=20, sample_steps=4, train_steps=2, batch_size=16)
    with pytest.raises(ValueError, match="was made with other .*sample_steps"):
        study_of.truth(other, "level", "near", 0)


def test_a_network_is_one_of_its_kind_and_point(study):
    """Broad: one network for every z; level: one for each; another stretch or jitter is another network."""
    kinds, moved = study_of.KINDS, study_of.shifted(Z)[0]
    broad, cost = study.network(kinds["broad"], Z, 0)
    assert study.network(kinds["broad"], moved, 0)[0] is broad and cost == 2 * 16 * 3
    level = study.network(kinds["level"], Z, 0)[0]
    assert study.network(kinds["level"], moved, 0)[0] is not level
    other = study.network(study_of.Kind(top=study_of.TOP, stretch=20.0), Z, 0)[0]
    assert other is not broad and (broad.network.stretch, other.network.stretch) == (100, 20)
    seen = [schedules.angle(kind.table(study.abar(Z))[[1, -1]]) for kind in (kinds["broad"], kinds["level"])]
    assert seen[0][0] < seen[1][0] and seen[0][1] > seen[1][1]
    assert not any(weight.requires_grad for weight in broad.parameters())


def test_what_the_range_must_reach():
    """Every difference of the study lies within the kind broad and "to the last difference"; not within the others."""
    study = study_of.Study(None)
    highest = max(schedules.angle(study.abar(z)[-1]).item() for z in study_of.shifted(Z))
    own = schedules.angle(study.abar(Z)[-1]).item()
    tops = {name: schedules.angle(kind.table(study.abar(Z))[-1]).item() for name, kind in study_of.VARIANTS.items()}
    assert own <= tops["stretch 20, to the grid's end"] < highest <= tops["stretch 20, to the last difference"]
    assert tops["stretch 20"] > highest and levels.BROAD[1] == pytest.approx(study_of.TOP * math.pi / 2)


def test_levels_that_a_network_has_not_seen_are_named():
    study = study_of.Study(None)
    network = guidance.LevelDenoiser(lambda x, level: x * level, study.abar(Z)).on(study.abar(study_of.shifted(Z)[2]))
    x = torch.zeros(1, 1, 8, 8)
    with pytest.warns(UserWarning, match="the angle is 1.5.* at t = 200, but the network has seen .* to 1.49"):
        network(x, 200)
