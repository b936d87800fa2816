"""The head of the report: its sentences turn with the verdicts; what runs took stands beside what was estimated."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from bilevel_core.lab import report
from bilevel_core.lab.report.rules import REGISTERED
from bilevel_core.lab.writing import duration

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "book" / "results"
GOOD, PARTLY, BAD, UNTESTED = report.VERDICTS


def judged(verdict=BAD, **others):
    """Every registered claim with a verdict, by its part or id ("_" for "-"), else the first."""
    found = []
    for fixed, _ in REGISTERED:
        told = others.get(fixed["id"].replace("-", "_"), others.get(fixed["part"].replace(" ", "_"), verdict))
        found.append(report.Claim(**fixed, ours=f"numbers of {fixed['id']}", tier="exact", verdict=told, why="a rule"))
    return found


def test_claims_are_numbered_as_the_tables_stand():
    found = judged()
    numbers = report.numbered(found)
    assert sorted(numbers.values()) == list(range(1, len(found) + 1)) and len(numbers) == len(found)
    parts = [claim.part for claim in sorted(found, key=lambda claim: numbers[claim.id])]
    assert [part for i, part in enumerate(parts) if part not in parts[:i]] == list(report.PARTS)
    assert parts == sorted(parts, key=report.PARTS.index)


def test_labels_are_short_and_distinct():
    labels = [report.label(claim.id) for claim in judged()]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 20
    assert {"λ vs Bayesian", "λ vs weighted sum", "γ one", "Algorithm 6", "MNIST 28×28", "stand-ins"} <= set(labels)


def test_the_answer_counts():
    found = judged(BAD, the_method=GOOD, full_size=UNTESTED)
    said = report.answer(found)
    counted = {name: sum(claim.verdict == name for claim in found) for name in report.VERDICTS}
    assert sum(counted.values()) == len(found)
    for name, count in counted.items():
        assert (f"**{count} {name}**" in said) == (count > 0)
    method = counted[GOOD]
    assert f"of the {method} about the method itself {method} hold" in said


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        ((GOOD, GOOD, GOOD), "beats all 3 searches"),
        ((GOOD, GOOD, PARTLY), "beats 2 of 3 searches throughout and 1 in part"),
        ((BAD, BAD, BAD), "beats none of 3 searches throughout"),
        ((UNTESTED, UNTESTED, UNTESTED), "could not be tested against search"),
    ],
)
@pytest.mark.parametrize(("application", "what"), [("lambda", "the strength λ"), ("schedule", "a noise schedule")])
def test_the_answer_turns_with_the_races(application, what, verdicts, sentence):
    rivals = (f"{application}_vs_{rival}" for rival in ("grid", "random", "bayesian"))
    said = report.answer(judged(GOOD, **dict(zip(rivals, verdicts, strict=True))))
    assert f"learning {what} {sentence}" in said


def test_the_answer_turns_with_the_change_by_hand_and_the_code():
    numbers = "(numbers of schedule-vs-hand)"
    assert "and it beats one number changed by hand" in report.answer(judged(GOOD))
    assert f"but not one number changed by hand where all of the cost goes into training {numbers}" in report.answer(
        judged(GOOD, schedule_vs_hand=BAD)
    )
    assert "takes for granted, none holds: it is another method." in report.answer(judged(GOOD, released_code=BAD))
    code = sum(claim.part == "released code" for claim in judged())
    assert f"takes for granted, {code} hold." in report.answer(judged(GOOD))


def test_the_board_has_every_claim_once_in_its_place(monkeypatch):
    found = judged(PARTLY, the_method=GOOD)
    board = report.Board(found, note="n < 3")
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    text = board._repr_html_()
    assert text.count("<a href=") == len(found) and "n &lt; 3" in text
    rows = {row[1]: row[2] for row in re.finditer(r'<tr><th scope="row"[^>]*>([^<]*)</th>(.*?)</tr>', text)}
    assert list(rows) == list(report.PARTS)
    good, partly, *others = re.findall("<td[^>]*>(.*?)</td>", rows["the method"])
    assert good.count("●") == sum(claim.part == "the method" for claim in found) and partly == "" == "".join(others)
    assert not re.findall("<td[^>]*>(.*?)</td>", rows["released code"])[0]
    for claim, number in ((claim, report.numbered(found)[claim.id]) for claim in found):
        assert f"{report.MARKS[claim.verdict]}\u00a0{number}\u00a0{report.label(claim.id)}<" in text
    assert "◐ partly: 8 stand-ins" in repr(board)


def test_the_letter_tells_what_the_claims_say():
    found = judged(GOOD, algorithm_6=PARTLY, released_code=BAD, mnist_28=UNTESTED)
    said = report.letter(found)
    parts = re.split(r"\*\*[A-Z].*?:\*\*", said)
    assert len(parts) == 6
    for claim in found:
        inside = [i for i, part in enumerate(parts) if f"{claim.claim} *{claim.verdict}*: {claim.ours}." in part]
        place = {"the method": [1], "released code": [3], "full size": []}.get(claim.part, [])
        assert inside == {"algorithm-6": [2], "mnist-28": [4]}.get(claim.id, place), claim.id
    assert said.count("?") >= 6 and not re.search(r"\n{3}", said)


# ---------------------------------------------------------------- what it took


def test_every_result_has_a_row_of_what_it_took():
    rows = {row["result"]: row for row in report.spent()}
    for path in RESULTS.glob("*.json"):
        made, row = json.loads(path.read_text(encoding="utf-8"))["provenance"], rows[path.stem]
        assert (row["seconds"], row["units"]) == (made["wall_s"], made["cost"]["units"])
        guessed = [report.estimates()[name] for name in made.get("pieces", {}) if name in report.estimates()]
        assert row["estimated"] == (sum(guessed) if guessed else None), path.stem
    assert {row["estimated"] for row in rows.values()} > {None, 60.0}
    assert len(rows) == len(list(RESULTS.glob("*.json")))


def test_a_run_that_nobody_estimated_has_no_estimate(tmp_path):
    record = json.loads((RESULTS / "08_checks_full.json").read_text(encoding="utf-8"))
    record["provenance"]["pieces"] = {"unheard of": 3.0}
    (tmp_path / "08_checks_full.json").write_text(json.dumps(record))
    (row,) = report.spent(tmp_path)
    assert row["estimated"] is None and row["gpu"] == "NVIDIA H200"


def test_the_estimates_are_those_of_the_commits_that_ran():
    found = yaml.safe_load((ROOT / "book" / "estimates.yml").read_text(encoding="utf-8"))
    for commit in found["commits"]:
        shown = ["git", "show", f"{commit}:bilevel_core/lab/gpu/pieces.py"]
        done = subprocess.run(shown, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            pytest.skip("not a clone with its whole history")
        stood = dict(re.findall(r'Piece\("([\w-]+)", \w+, ([\d.]+)', done.stdout))
        (setting,) = re.findall(r"Piece\(name, partial\(setting.*?\), ([\d.]+)", done.stdout)
        for name, minutes in found["minutes"].items():
            assert float(stood.get(name, setting)) == minutes, name
    ran = {
        commit
        for path in RESULTS.glob("*_full.json")
        for commit in json.loads(path.read_text(encoding="utf-8"))["provenance"]["commits"]
    }
    assert set(found["commits"]) <= ran


@pytest.mark.parametrize("minutes", [0, -1.0, True, "1", float("nan"), float("inf")])
def test_wrong_estimates_are_refused(tmp_path, minutes):
    (tmp_path / "e.yml").write_text(yaml.safe_dump({"minutes": {"checks": minutes}}))
    with pytest.raises(ValueError, match="e.yml: minutes of checks"):
        report.estimates(tmp_path / "e.yml")


def test_searches_kept_to_their_plan():
    count, planned, most = report.searches()
    searches = json.loads((RESULTS / "07_noise_schedule_mnist.json").read_text(encoding="utf-8"))["data"]["searches"]
    assert (count, most) == (len(searches), max(one["cost"] for one in searches))
    assert planned == 3 * 128 * 500 + 15 * (3 * 128 * 60 + 1000 * 10)  # warm-up; trials, each trained and sampled
    assert most <= planned


def test_machines_are_those_of_the_records():
    found = report.machines()
    made = [json.loads(path.read_text(encoding="utf-8"))["provenance"] for path in RESULTS.glob("*.json")]
    assert found["threads"] == sorted({str(one["hardware"]["threads"]) for one in made})
    assert found["GPUs"] == sorted({one["hardware"]["gpu"] for one in made if one["hardware"]["gpu"]})
    assert all(values == sorted(set(values)) for values in found.values())


def test_durations():
    assert [duration(s) for s in (90, 600, 7200)] == ["90 s", "10 min", "2.0 h"]
