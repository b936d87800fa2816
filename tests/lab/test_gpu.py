"""The plan for a GPU: what is started, stopped, kept and merged, by pieces of our own; the whole at smoke size."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bilevel_core.lab import files, places, results
from bilevel_core.lab.gpu import __main__ as command
from bilevel_core.lab.gpu import merge, pieces, plan, wheels
from bilevel_core.lab.studies import memory, schedule_race, tilted_truth

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = {"name": "A card", "driver": "580.1", "total": 16.0, "free": 10.0}


class Now:
    """A worker that runs its pieces at once, in this process: they take as many seconds as they say."""

    clock = 0.0

    def __init__(self, number, arguments, heard, log):
        self.busy, self.since, self.number, self.heard = None, 0.0, number, heard

    def start(self, piece):
        self.busy, self.since = piece, Now.clock
        Now.started.append(piece.name)
        seconds = piece.settings.get("seconds", 1)
        if seconds == float("inf"):
            Now.clock += 1000
            return
        Now.clock += seconds
        try:
            plan.compute(piece, plan.Context(Now.work, torch.device("cpu"), True), Now.work, {"driver": None})
            said = {"name": piece.name, "ok": True, "said": "well"}
        except RuntimeError as error:
            said = {"name": piece.name, "ok": False, "said": str(error)}
        self.heard.put((self, said))

    def end(self):
        self.busy = None


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Function that runs pieces by workers of the class above, at smoke size or on a card of our own."""
    Now.clock, Now.started, Now.work = 0.0, [], tmp_path / "work"
    monkeypatch.setattr(plan, "Worker", Now)
    waiting = itertools.count()
    monkeypatch.setattr(plan.time, "monotonic", lambda: Now.clock + 0.001 * next(waiting))
    monkeypatch.setenv("BILEVEL_COMMIT", COMMIT)
    said = []

    def run(found, minutes=1.0, **options):
        options = {"smoke": True, "lanes": 1} | options
        state = plan.run(found, minutes=minutes, work=Now.work, out=tmp_path / "out", say=said.append, **options)
        return state, "\n".join(said)

    return run


def piece(name, minutes=0.1, **options):
    return plan.Piece(name, lambda context: {"said": "", "name": name}, minutes, **options)


def failing(context):
    raise RuntimeError("it broke")


# ---------------------------------------------------------------- what is started


def test_pieces_run_in_order_and_are_kept(at):
    found = [piece("a"), piece("b", after=("a",)), piece("c")]
    assert at(found)[0] == {"a": "done", "b": "done", "c": "done"} and Now.started == ["a", "b", "c"]
    state, text = at(found)
    assert set(state.values()) == {"kept"} and len(Now.started) == 3 and "3 of them kept" in text
    kept = json.loads(plan.path_of(Now.work, "a").read_text())
    assert kept["provenance"]["commit"] == COMMIT and kept["provenance"]["dirty"] is False
    assert kept["provenance"]["driver"] is None and kept["provenance"]["versions"]["torch"] == str(torch.__version__)


def test_what_does_not_fit_is_left_and_smaller_ones_follow(at):
    found = [piece("first", 0.5, settings={"seconds": 40}), piece("long", 0.5), piece("small", 0.1)]
    state, text = at(found)
    assert state["first"] == state["small"] == "done" and state["long"] == "no time: wants 30 s"
    assert "not started: long" in text


def test_the_clock_stops_what_outlasts_its_estimate(at):
    found = [piece("endless", settings={"seconds": float("inf")}), piece("waits", after=("endless",))]
    state, text = at(found, minutes=0.5 / 60 * 30)
    assert state == {"endless": "stopped", "waits": "waits for endless"}
    assert "stopped by the clock; the next call goes on with it" in text
    assert not plan.path_of(Now.work, "endless").exists()


def test_a_failure_is_said_and_what_comes_after_it_waits(at):
    found = [plan.Piece("broken", failing, 0.1), piece("after", after=("broken",)), piece("other")]
    state, text = at(found)
    assert state == {"broken": "failed", "after": "waits for broken", "other": "done"} and "it broke" in text


def test_pieces_that_are_alone_wait_for_the_others(at, monkeypatch):
    found = [piece("x"), piece("y"), piece("z"), piece("alone", alone=True), piece("late")]
    none = plan._startable(found, {}, [], 100, 2)
    assert [p.name for p in none] == ["x", "y"]
    assert plan._startable(found[3:], {}, found[:1], 100, 2) == []
    assert [p.name for p in plan._startable(found[3:], {}, [], 100, 2)] == ["alone"]
    assert plan._startable(found[:3], {}, found[3:4], 100, 2) == []


def test_pieces_that_share_the_card_slow_each_other_down():
    """Two of them take twice as long, and are not started where that does not fit; the host's time is not shared."""
    full, half = [piece(name) for name in "ab"], [piece(name, busy=0.5) for name in "ab"]
    assert [p.name for p in plan._startable(full, {}, [], 8, 2)] == ["a"]
    assert [p.name for p in plan._startable(full, {}, [], 12, 2)] == ["a", "b"]
    assert [p.name for p in plan._startable(half, {}, [], 8, 2)] == ["a", "b"]


def test_a_forecast_follows_the_order_the_needs_and_the_shares():
    found = [piece("alone", 1.0, alone=True), piece("a", 1.0), piece("b", 2.0), piece("c", 1.0, after=("a",))]
    assert plan.forecast(found, set(), 1) == pytest.approx({"alone": 1, "a": 2, "b": 4, "c": 5})
    # a and b share the card: a ends in minute 3, then b and c, of which one minute each is left
    assert plan.forecast(found, set(), 2) == pytest.approx({"alone": 1, "a": 3, "b": 5, "c": 5})
    assert plan.forecast(found, {"alone", "a"}, 2) == pytest.approx({"c": 2, "b": 3})
    halves = [piece("a", 1.0, busy=0.5), piece("b", 1.0, busy=0.5)]
    assert plan.forecast(halves, set(), 2) == pytest.approx({"a": 1, "b": 1})
    assert plan.forecast([piece("x", after=("nothing",))], set(), 2) == {}
    text = plan.table(found, {"a"}, 2, 3.5)
    assert "2 at a time, 2 of 3 end within 3.5 minutes" in text and " kept " in text


def test_too_little_memory_and_missing_data_are_said(at, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "device", lambda: CARD)
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    found = [piece("large", gib=24.0), piece("digits", needs=("mnist",)), piece("small", gib=2.0)]
    monkeypatch.setattr(Now, "start", lambda self, piece: self.heard.put((self, {"name": "", "ok": True, "said": ""})))
    state, text = at(found[:2], smoke=False)
    assert state["large"] == "left out: needs 24.0 GiB, 10.0 are free; 14.0 are missing"
    assert state["digits"] == "left out: no mnist at hand; name its folder by --data"
    assert "A card, driver 580.1, 10 GiB free" in text


def test_without_a_gpu_the_remedy_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--work", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "torch sees no NVIDIA GPU" in said and "--smoke" in said and "--dry" in said
    assert not list(tmp_path.iterdir())


def test_the_card_is_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = "NVIDIA H100 80GB HBM3, 580.159.04, 81559, 81000\n"
    monkeypatch.setattr(plan.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, line, ""))
    assert plan.device() == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "580.159.04",
        "total": pytest.approx(79.65, abs=0.01),
        "free": pytest.approx(79.1, abs=0.01),
    }


# ---------------------------------------------------------------- what counts as the same piece


@pytest.mark.parametrize("change", ["code", "settings"])
def test_a_piece_of_another_plan_stops_the_run_and_loses_nothing(at, monkeypatch, change):
    at([piece("a"), piece("b")])
    before = {path: path.read_bytes() for path in Now.work.rglob("*") if path.is_file()}
    found = [piece("a", settings={"n": 2} if change == "settings" else {}), piece("b"), piece("c")]
    if change == "code":
        monkeypatch.setattr(plan, "code", lambda: "another")
    with pytest.raises(ValueError, match=f"a \\(other {change}; made by commit {COMMIT[:12]}\\).*--work.*--keep"):
        at(found)
    assert before == {path: path.read_bytes() for path in Now.work.rglob("*") if path.is_file()}
    if change == "code":
        assert at(found, keep=True)[0] == {"a": "kept", "b": "kept", "c": "done"}
    else:
        with pytest.raises(ValueError, match="other settings"):
            at(found, keep=True)


def test_the_code_is_the_source_of_the_package():
    root = Path(plan.__file__).resolve().parents[2]
    assert root.name == "bilevel_core" and len(plan.code()) == 16


def test_the_commit_of_a_copy_is_given(monkeypatch):
    monkeypatch.setenv("BILEVEL_COMMIT", COMMIT + "-dirty")
    assert results._git_state() == (COMMIT, True)
    monkeypatch.setenv("BILEVEL_COMMIT", "main")  # no commit: what git says counts
    assert results._git_state()[0] != "main"


# ---------------------------------------------------------------- the pack


def test_a_pack_holds_pieces_and_checkpoints_and_another_place_goes_on(at, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PACK", 50_000)
    kept = Now.work / "kept" / "race28"
    kept.mkdir(parents=True)
    for i in range(5):
        (kept / f"final_{i}.safetensors").write_bytes(bytes([i]) * 20_000)
    (kept / "search.json").write_text("{}")
    (kept / "learning.safetensors").write_bytes(b"large" * 12_000)  # larger than a file of the pack
    os.utime(kept / "learning.safetensors", (2e9, 2e9))
    _, text = at([piece("a")])
    assert "2 checkpoints found no room" in text
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu-1.tar", "gpu-2.tar", "gpu-3.tar"}
    assert all(path.stat().st_size <= 50_000 for path in out.iterdir())
    again = tmp_path / "again"
    assert plan.unpack(out, again) == 1 + 1 + 1 + 3
    assert (again / "kept" / "race28" / "search.json").exists()
    for path in (kept / file.name for file in (again / "kept" / "race28").iterdir()):
        assert (again / "kept" / "race28" / path.name).read_bytes() == path.read_bytes()
    assert plan.path_of(again, "a").read_text() == json.dumps(json.loads(plan.path_of(Now.work, "a").read_text()))
    assert plan.unpack(out, again) == 0
    with pytest.raises(FileNotFoundError, match="no gpu.json in"):
        plan.unpack(tmp_path / "nowhere", again)
    (out / "gpu-2.tar").unlink()
    with pytest.raises(ValueError, match=r"gpu-\*.tar are not those of its gpu.json"):
        plan.unpack(out, tmp_path / "third")
    for path in out.glob("*.tar"):
        path.unlink()
    assert plan.unpack(out, tmp_path / "fourth") == 1  # pieces alone


def test_a_pack_of_several_archives_is_read(tmp_path):
    """As an earlier version wrote it; and nothing is written outside of the folder."""
    (tmp_path / "gpu.json").write_text(json.dumps({"pieces": {}}))
    for i in (1, 2):
        (tmp_path / f"{i}").write_text(f"file {i}")
        with tarfile.open(tmp_path / f"gpu-{i}.tar", "w") as tar:
            tar.add(tmp_path / f"{i}", arcname=f"race/{i}")
    assert plan.unpack(tmp_path, tmp_path / "work") == 2
    assert (tmp_path / "work" / "kept" / "race" / "2").read_text() == "file 2"
    with tarfile.open(tmp_path / "gpu-2.tar", "w") as tar:
        tar.add(tmp_path / "1", arcname="../../1")
    with pytest.raises(ValueError, match="leaves its folder"):
        plan.unpack(tmp_path, tmp_path / "other")


# ---------------------------------------------------------------- the plan itself


def test_the_dry_run_prints_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--dry", "--work", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "checks" in text and "race28-Algorithm_6-2" in text and "minutes of pieces that run alone" in text
    assert "three repetitions of the race are whole in minute" in text
    assert command.main(["--dry", "--work", str(tmp_path), "--only", "race28-random-0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("race28")]
    assert names == ["race28-warm-0", "race28-search-random-0", "race28-random-0"]
    assert lines[-1].startswith("5 at a time, 3 of 3 end within 8 minutes")
    assert command.main(["--dry", "--work", str(tmp_path), "--only", "nothing"]) == 2
    assert "no piece is called 'nothing'" in capsys.readouterr().err


def test_pieces_have_names_of_their_own_and_come_after_earlier_ones():
    found = pieces.all_pieces()
    names = [p.name for p in found]
    assert len(set(names)) == len(names)
    for i, p in enumerate(found):
        assert set(p.after) <= set(names[:i]) and 0 < p.busy <= 1 and p.t4 >= 1
        assert p.minutes <= (2.5 if p.alone else 2), p.name
        assert json.loads(json.dumps(p.settings)) == plan.identity(p, False)["settings"]
    shown = [options for options, _ in memory.SETTINGS if options["side"] >= 512]
    assert [dict(p.settings) for p in found if p.settings in shown] == shown


def test_estimates_give_back_the_measured_time_of_an_earlier_race(monkeypatch):
    """4,000 steps of "mnist28" and marks of 5,000 samples took 215 to 221 s, six at a time on an H200."""
    monkeypatch.setattr(pieces, "H200", pieces.Speed(0.0067, 0.0044, pieces.H200.host, pieces.H200.eager))
    entries = [
        plan.Piece(f"{i}", failing, **pieces.estimate(4000, 10 * (10 + 10 + 20 + 50 + 100), rest=8.0)) for i in range(6)
    ]
    assert 60 * plan.forecast(entries, set(), 6)["0"] == pytest.approx(218, rel=0.05)


def test_a_few_minutes_are_enough_for_three_repetitions_of_the_race():
    """With the checks before it, by the estimates: 8.7 minutes are what a call of ten leaves."""
    chosen = pieces.only(pieces.all_pieces(), ["checks", *(f"race28-*-{seed}" for seed in pieces.SEEDS)])
    ends = plan.forecast(chosen, set(), command.LANES)
    assert pieces.race_ends(ends, set()) < 8.7
    assert pieces.race_ends({}, set()) == float("inf") and pieces.race_ends({}, set(ends)) == 0.0
    first, more = pieces.race_pieces(pieces.RACE, ())
    assert pieces.race_ends(plan.forecast(first, set(), command.LANES), set()) < float("inf")
    assert not {p.name for p in first} & {p.name for p in more}


def test_tilts_are_merged_when_every_prompt_is_there(tmp_path, monkeypatch, capsys):
    """Of made-up pieces: what is in them goes through, and one prompt too few is named."""
    work, rows = tmp_path / "work", []
    named = {p.name: p for p in pieces.all_pieces() if p.name.startswith("tilts-")}
    for (name, piece), prompt in zip(named.items(), tilted_truth.TEST, strict=True):
        level = {"lam": None, "low": 0.0, "failed": []}
        row = {"prompt": prompt, "down_to": 0.35, "levels": [level], "curve": [{"lam": 0.5, "clip": 60.0}]}
        rows.append(row)
        hardware = results.provenance()["hardware"] | {"gpu": "A card"}
        ran = results.provenance() | {"hardware": hardware, "driver": "1", "date": "2026-01-01", "switches": {}}
        found = {"config": plan.identity(piece, False), "provenance": ran, "wall_s": 60.0}
        files.write_atomic(
            plan.path_of(work, name), json.dumps(found | {"result": row | {"said": "", "cost": 5, "seed": 0}}).encode()
        )
    (path,) = merge.merge(work, directory=tmp_path)
    record = results.read_result("05_curves_full", tmp_path)
    assert path.name == "05_curves_full.json" and record["data"]["prompts"] == rows
    assert record["provenance"]["cost"]["units"] == 40 and record["tier"] == "full"
    plan.path_of(work, "tilts-a_thin_six").unlink()
    assert merge.merge(work, directory=tmp_path) == []
    assert "missing are a thin six" in capsys.readouterr().out


def test_wheels_are_pinned_where_the_book_is():
    pins = dict(line.split("==") for line in wheels.pinned())
    assert set(pins) == set(wheels.NAMES) and {"diffusers", "optuna", "jsonschema"} <= set(pins)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A pip that leaves files of these names and sizes, and a folder for them."""

    def put(names, size=10, code=0):
        def run(command, **options):
            at = Path(command[command.index("--dest") + 1])
            for name in names:
                (at / name).write_bytes(b"x" * size)
            return subprocess.CompletedProcess(command, code, "", "no network")

        monkeypatch.setattr(wheels.subprocess, "run", run)

    return put, tmp_path / "wheels"


def test_wheels_are_listed_and_those_for_another_python_refused(pip, capsys, monkeypatch):
    put, folder = pip
    names = [f"{name.lower().replace('-', '_')}-1.0-py3-none-any.whl" for name in wheels.NAMES]
    put(names)
    monkeypatch.setattr(wheels, "check", lambda found: len(found))
    monkeypatch.setattr(wheels, "_mine", lambda: (3, 11))
    assert command.main(["wheels", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "0.00 MB  diffusers-1.0-py3-none-any.whl" in said and "0.00 MB  in all, of 60 allowed" in said
    assert "not imported: this is Python" in said and "the wheels are for 3.12" in said
    monkeypatch.setattr(wheels, "_mine", lambda: (3, 12))
    assert wheels.main(folder) == len(wheels.NAMES)  # as many are imported
    put([*names, "rpds_py-0.9-cp312-cp312-manylinux_2_17_x86_64.whl"])
    assert command.main(["wheels", str(folder)]) == 2
    assert "16 wheels for 15 packages: empty" in capsys.readouterr().err
    for path in folder.iterdir():
        path.unlink()
    put([*names[:-1], "rpds_py-0.9-cp311-cp311-manylinux_2_17_x86_64.whl"])
    assert command.main(["wheels", str(folder)]) == 2
    assert "rpds_py-0.9-cp311-cp311-manylinux_2_17_x86_64.whl is not for Python 3.12" in capsys.readouterr().err
    monkeypatch.setattr(wheels, "LIMIT", 100)
    assert command.main(["wheels", str(folder)]) == 2
    assert "150 bytes are more than 100" in capsys.readouterr().err
    put([], code=1)
    assert command.main(["wheels", str(folder)]) == 2
    assert "pip could not fetch the wheels: no network" in capsys.readouterr().err
    assert command.main(["wheels"]) == 2


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a-1.0-py3-none-any.whl", True),
        ("a-1.0-py2.py3-none-any.whl", True),
        ("a-1.0-cp312-cp312-manylinux_2_17_x86_64.whl", True),
        ("a-1.0-cp310-abi3-manylinux_2_17_x86_64.whl", True),
        ("a-1.0-cp313-abi3-manylinux_2_17_x86_64.whl", False),
        ("a-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("a-1.0-cp313-cp313-manylinux_2_17_x86_64.whl", False),
        ("a-1.0-py2-none-any.whl", False),
    ],
)
def test_wheels_have_the_tags_of_their_python(name, good):
    assert wheels.fits(name) is good


def test_what_is_not_installed_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    found = wheels.importlib.util.find_spec
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None if name == "optuna" else found(name))
    assert command.main(["--smoke", "--work", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{sys.executable} has no optuna: install the wheels that `wheels DIR` fetches" in said
    monkeypatch.undo()

    def fail(name):
        raise ImportError("No module named 'rpds.rpds'")

    monkeypatch.setattr(wheels.importlib, "import_module", fail)
    assert command.main(["--smoke", "--work", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "rpds is there, but not for this Python 3." in said and "rpds.rpds" in said and "for 3.12" in said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- merge


def made(work, seeds=(0, 1, 2), smoke=False, methods=pieces.NEEDED, dirty=False):
    """Pieces of chapter 7 as a GPU would leave them, with numbers of our own."""
    settings = json.loads(json.dumps(pieces.asdict(pieces.RACE)))
    own = results.provenance() | {"commit": COMMIT, "dirty": dirty, "driver": "580.1", "switches": {"tf32": True}}
    own["hardware"] = own["hardware"] | {"gpu": "A card"}
    for i, (seed, method) in enumerate(itertools.product(seeds, methods)):
        about = {"method": method, "seed": seed, "budget": "final", "kind": "cosine", "q": [0.0, 1.0, 1.0, 0.008]}
        about |= {"search_cost": 10, "train_steps": 4000, "train_cost": 100, "loss": 0.1, "wall_s": 2.0}
        marks = {"cost": 5, "frechet": 1.0 + i, "kid": 0.1, "score": 5.0}
        rows = [about | {"split": "test", "steps": steps} | marks for steps in (10, 20, 50, 100)]
        one = {"method": method, "seed": seed, "kind": "cosine", "q": about["q"], "cost": 10, "path": [], "wall_s": 1.0}
        found = {f"{schedule_race._slug(method)}-{seed}": {"rows": rows, "said": ""}}
        if method not in schedule_race.FIXED:
            found[f"search-{schedule_race._slug(method)}-{seed}"] = {"searches": [one], "said": ""}
        dated = own | {"date": f"2026-01-0{1 + seed}T00:00:00+00:00"}
        for part, result in found.items():
            config = {"name": f"race28-{part}", "smoke": smoke, "settings": settings, "code": "some"}
            path = plan.path_of(work, config["name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"config": config, "provenance": dated, "result": result, "wall_s": 3.0}))


def test_merge_writes_the_race_as_the_report_reads_it(tmp_path, capsys):
    from bilevel_core.lab.report import schedule

    made(tmp_path / "work")
    (path,) = merge.merge(tmp_path / "work", directory=tmp_path / "results")
    record = results.read_result("07_noise_schedule_mnist_full", tmp_path / "results")
    assert path.name == "07_noise_schedule_mnist_full.json" and record["tier"] == "full"
    own = record["provenance"]
    assert own["commit"] == COMMIT and own["hardware"]["gpu"] == "A card" and own["cards"] == ["A card, driver 580.1"]
    assert own["seeds"] == [0, 1, 2] and own["date"].startswith("2026-01-03") and own["first"].startswith("2026-01-01")
    assert own["wall_s"] == 3.0 * 30 and own["parameters"]["final_steps"] == pieces.RACE.final_steps
    assert own["cost"]["units"] == 21 * 100 + 84 * 5 + 9 * 10
    assert len(own["pieces"]) == 30 and own["pieces"]["race28-search-random-2"] == 3.0
    schedule_race.check_protocol(record["protocol"])
    assert record["protocol"]["plan"]["name"] == "mnist28_folded" and record["protocol"]["switches"] == {"tf32": True}
    assert len(record["data"]["rows"]) == 84 and len(record["data"]["searches"]) == 9
    assert record["data"]["ablation"] == []
    gap = schedule.race(record, "random", 10)  # rival minus ours is two in every seed
    assert gap[0] == pytest.approx(-2.0)
    assert "08_memory_full: not written" in capsys.readouterr().out


def test_merge_wants_three_whole_seeds_and_no_smoke(tmp_path, capsys):
    made(tmp_path / "two", seeds=(0, 1))
    made(tmp_path / "two", seeds=(2,), methods=pieces.NEEDED[:-1])
    assert merge.merge(tmp_path / "two", directory=tmp_path / "results") == []
    assert "missing are {2: ['Algorithm 6']}" in capsys.readouterr().out
    made(tmp_path / "smoke", smoke=True)
    with pytest.raises(ValueError, match="are smoke pieces"):
        merge.merge(tmp_path / "smoke", directory=tmp_path / "results")
    with pytest.raises(ValueError, match="no pieces in"):
        merge.merge(tmp_path / "none", directory=tmp_path / "results")
    made(tmp_path / "other")
    path = plan.path_of(tmp_path / "other", "race28-cosine-0")
    found = json.loads(path.read_text())
    found["config"]["settings"]["final_steps"] = 7
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="race28-cosine-0 in .* is not of this plan's parameters"):
        merge.merge(tmp_path / "other", directory=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def other(work, name, result, commit=COMMIT, settings=None):
    """A finished piece of another kind, as a GPU would leave it."""
    own = results.provenance() | {"commit": commit, "dirty": False, "driver": "580.1", "switches": {}}
    own["hardware"] = own["hardware"] | {"gpu": "A card"}
    config = {"name": name, "smoke": False, "settings": settings or {}, "code": "some"}
    path = plan.path_of(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": config, "provenance": own, "result": result, "wall_s": 3.0}))


def test_merge_takes_chosen_pieces_of_several_packs_the_first_first(tmp_path, capsys):
    """What one pack lacks comes from the next; pieces of other parameters may be left aside, and are named if not."""
    failure = {"tests.test_x": "def test_x():\n>  assert a\nE  AssertionError: far\nE    off by 2"}
    checked = {"passed": 30, "skipped": 0, "failures": failure, "seconds": {}}
    other(tmp_path / "a", "checks", checked)
    other(tmp_path / "b", "checks", checked | {"passed": 25}, "f" * 40)
    options = {"side": 512, "dtype": "float16"}
    measured = {"weights": 2.3, "step": 0.0, "peak": 5.9, "plain": 0.05, "seconds": 0.27}
    other(tmp_path / "b", "sd15-512-float16", {"options": options, "measured": measured}, "f" * 40, options)
    other(tmp_path / "b", "race28-cosine-0", {"rows": [], "searches": []}, "f" * 40, {"final_steps": 1})
    packs = []
    for name in "ab":
        at = tmp_path / name
        plan.pack(at, at / "pack")
        packs.append(at / "pack")
    with pytest.raises(ValueError, match="race28-cosine-0 .* commit that made it, ffffffffffff, or .* --only"):
        merge.merge(tmp_path / "work", packs, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    arguments = ["merge", "--work", str(tmp_path / "new"), "--results", str(tmp_path / "results")]
    assert command.main([*arguments, "--from", *map(str, packs), "--only", "checks", "sd15-*"]) == 0
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {"08_checks_full", "08_memory_full"}
    found = results.read_result("08_checks_full", tmp_path / "results")
    assert found["data"] == {
        "passed": 30,
        "skipped": 0,
        "failed": {"tests.test_x": ["AssertionError: far", "off by 2"]},
    }
    assert found["provenance"]["commit"] == COMMIT
    (row,) = results.read_result("08_memory_full", tmp_path / "results")["data"]["rows"]
    assert row["measured"] == measured and row["counted"]["peak"] == pytest.approx(5.2, abs=0.1)
    assert command.main([*arguments, "--only", "nothing"]) == 2
    assert "no pieces called nothing in" in capsys.readouterr().err


def test_a_piece_of_which_no_result_is_made_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "all_pieces", lambda smoke=False: [piece("new-kind-0")])
    other(tmp_path, "new-kind-0", {"x": 1})
    assert merge.merge(tmp_path, directory=tmp_path / "results") == []
    assert "new-kind-0: left aside, no result is made of it" in capsys.readouterr().out


def test_merge_says_that_a_piece_came_from_an_altered_tree(tmp_path):
    made(tmp_path, seeds=(0, 1))
    made(tmp_path, seeds=(2,), dirty=True)
    merge.merge(tmp_path, directory=tmp_path / "results")
    record = results.read_result("07_noise_schedule_mnist_full", tmp_path / "results")
    assert record["provenance"]["dirty"] is True


# ---------------------------------------------------------------- the whole


def call(work, *options, data="/nonexistent"):
    environment = os.environ | {"PYTHONPATH": str(places.project_root()), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "bilevel_core.lab.gpu", "--smoke", "--work", str(work), *options]
    return subprocess.Popen(
        arguments,
        env=environment,
        cwd=places.project_root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_plan_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path):
    """Every kind of piece at smoke size, with SIGKILL to the run, its worker with it; a second call goes on."""
    names = ["checks", "sd15-sample", "sd15-512-float16", "sd15-particles", "throughput-compiled", "sd15-stages-0"]
    names += ["tilts-a_bold_zero"]
    names += ["race28-random-0", "race28-linear-0-total", "race28-Algorithm_6-0-own"]
    work = tmp_path / "work"
    first = call(work, "--minutes", "5", "--only", *names)
    end = time.time() + 240
    while not plan.path_of(work, "race28-warm-0").exists() and time.time() < end:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(1)  # its worker notices
    before = {path.name: path.read_bytes() for path in (work / "pieces").glob("*.json")}
    assert before and "race28-Algorithm_6-0-own.json" not in before
    text = call(work, "--minutes", "5", "--only", *names).communicate()[0]
    assert " failed  " not in text and f"{len(before)} of them kept" in text, text
    after = {path.stem: path for path in (work / "pieces").glob("*.json")}
    assert set(after) == {p.name for p in pieces.only(pieces.all_pieces(True), names)}
    assert all((work / "pieces" / name).read_bytes() == data for name, data in before.items())
    found = {name: json.loads(path.read_text())["result"] for name, path in after.items()}
    assert found["throughput-compiled"]["failed"] == {} and len(found["throughput-compiled"]["rows"]) == 3
    assert not list((work / "kept" / "race28").glob("final_*.safetensors"))
    tilts = found["tilts-a_bold_zero"]
    assert [row["lam"] for row in tilts["levels"]] == [None, *tilted_truth.LADDER[1:]]
    assert tilts["down_to"] is None and len(tilts["curve"]) == 82 and not list((work / "kept" / "tilts").glob("*"))
    whole = schedule_race.Race(pieces.SMALL_RACE, tmp_path / "whole", force=True)
    for method in ("random", "linear"):
        name, total = f"race28-{method}-0", method == "linear"
        rows = whole.final(method, 0, total=total)
        timed = [row | {"wall_s": 0} for row in found[name + "-total" * total]["rows"]]
        assert timed == [row | {"wall_s": 0} for row in rows]
    with pytest.raises(ValueError, match="smoke pieces"):
        merge.merge(work, directory=tmp_path / "results")
