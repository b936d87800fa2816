"""Results with their provenance, and whose they are."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from bilevel_core.lab import parameters, results


def write(project, tier="full", name="demo", data=None, **changes):
    settings = {"seeds": [0, 1], "cost": 1234, "wall_s": 1.5, "protocol": {"n": 5000}, **changes}
    P = SimpleNamespace(PROFILE=tier, work_dir="/home/somebody/drive", steps=3)
    return results.write_result(name, tier, data or {"mean": torch.tensor([1.5, 2.5])}, P, **settings)


def test_result_round_trip_with_provenance(project):
    path = write(project, cost={"units": 10.0, "calls": 4})
    assert path == project / "book" / "results" / "demo.json"
    record = results.read_result("demo")
    assert record["data"] == {"mean": [1.5, 2.5]} and record["tier"] == "full"
    source = record["provenance"]
    assert source["seeds"] == [0, 1] and source["cost"] == {"units": 10.0, "calls": 4}
    assert source["parameters"]["work_dir"] == ".../drive" and "somebody" not in path.read_text()
    assert source["versions"]["torch"] == torch.__version__ and source["commit"] is None


def test_commit_and_dirty_flag(project):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *args], cwd=project, check=True, capture_output=True)

    git("init")
    git("add", "notebooks")
    git("commit", "-m", "first")
    write(project)
    write(project)
    source = results.read_result("demo")["provenance"]
    assert len(source["commit"]) == 40 and source["dirty"] is False
    (project / "notebooks/profiles/full/demo.yaml").write_text("PROFILE: full\n")
    write(project)
    assert results.read_result("demo")["provenance"]["dirty"] is True


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
@pytest.mark.parametrize("tier", results.TIERS)
@pytest.mark.parametrize("profile", results.TIERS)
def test_a_tier_is_the_profile_that_computed_it(tmp_path, profile, tier, kind):
    where = {"seeds": 0, "cost": 0, "wall_s": 0, "directory": tmp_path}
    if profile == tier:
        path = results.write_result("demo", tier, {}, kind(PROFILE=profile), **where)
        assert json.loads(path.read_text())["tier"] == profile
    else:
        with pytest.raises(
            ValueError, match=f"'demo' was computed with PROFILE '{profile}': its tier cannot be '{tier}'"
        ):
            results.write_result("demo", tier, {}, kind(PROFILE=profile), **where)
        assert not (tmp_path / "demo.json").exists()


def test_files_of_results_are_found_where_the_run_left_them(project, tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_RESULTS", str(tmp_path / "own"))
    book = project / "book" / "results" / "a.safetensors"
    assert results.find("a.safetensors") == book  # what the run has not left is the book's
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.safetensors").touch()
    assert results.find("a.safetensors") == tmp_path / "own" / "a.safetensors"  # the book has none
    book.parent.mkdir(parents=True, exist_ok=True)
    book.write_bytes(b"b")
    assert results.find("a.safetensors") == book  # beside the record that pages show
    assert results.find("a.safetensors", tmp_path) == tmp_path / "a.safetensors"


def test_bad_results_are_refused(project):
    for changes, message in (
        ({"tier": "best"}, "tier: 'best' is not one of"),
        ({"name": "A b"}, "name: 'A b' does not match"),
        ({"data": {"x": float("nan")}}, "NaN or infinity"),
        ({"seeds": []}, "seeds"),
        ({"wall_s": -1}, "wall_s"),
        ({"cost": -1}, "cost.units"),
    ):
        with pytest.raises(ValueError, match=message):
            write(project, **changes)
    path = write(project)
    with pytest.raises(ValueError, match="holds a full result: a quick one must not replace it"):
        write(project, tier="quick")
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"book/results/demo.json is not JSON"):
        results.read_result("demo")
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="not a valid result"):
        results.read_result("demo")
    with pytest.raises(FileNotFoundError, match="no result 'absent'"):
        results.read_result("absent")


def run(values, **passed):
    """What a notebook `demo` of these quick values does at its start."""
    cell = "# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in passed.items())
    rules = {"data": str, "steps": int, "lr": float, "gammas": [float], "work_dir": str}
    cells = ["", "\n".join(f"{k} = {v!r}" for k, v in values.items()), cell]
    return parameters.resolve("demo", {**values, **passed, "In": cells}, **rules)


def test_a_run_that_is_not_the_profile_as_it_is_leaves_the_books_results_alone(project, quick, capsys, monkeypatch):
    book = write(project, "recorded", "demo", {"x": 0})
    other = run(quick, PROFILE="recorded", steps=7, work_dir=str(project / "w"))
    own = results.folder()
    assert own.parent == project / "w" / "results" and own.name.startswith("steps-7_")
    assert f"not the recorded profile as it is (steps): results go to {own}" in capsys.readouterr().out
    path = results.write_result("demo", "recorded", {"x": 7}, other, seeds=0, cost=0, wall_s=0)
    assert path == own / "demo.json" and f"demo: this run's result is {path}" in capsys.readouterr().out
    assert results.read_result("demo")["data"] == {"x": 0}  # the book's: its pages speak of that
    assert results.read_result("demo", own)["data"] == {"x": 7}
    results.write_result("new", "recorded", {"x": 8}, other, seeds=0, cost=0, wall_s=0)
    assert results.read_result("new")["data"] == {"x": 8}  # the book has none
    again = run(quick, PROFILE="full", steps=8, work_dir=str(project / "w"))
    assert results.folder() != own  # nor does it replace another run's
    results.write_result("demo", "full", {"x": 9}, again, seeds=0, cost=0, wall_s=0)
    assert results.read_result("demo")["data"] == {"x": 9}  # a full run shows what it made
    monkeypatch.setenv("BILEVEL_RESULTS", str(project / "given"))
    assert results.folder() == project / "given"
    monkeypatch.delenv("BILEVEL_RESULTS")
    for same in ({}, {"steps": 500}, {"work_dir": str(project / "elsewhere")}):
        run(quick, **{"PROFILE": "recorded", **same})
        assert results.folder() == book.parent == results.book()
    run(quick, steps=3)  # quick and smoke record nothing
    assert results.folder() == results.book()
    with pytest.raises(FileNotFoundError, match="no result 'new'"):
        results.read_result("new")
