"""Parameters and profiles, devices, atomic files, checkpoints, results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bilevel_core.lab import files, parameters, places, results

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = {"PROFILE": "quick", "data": "digits", "steps": 100, "lr": 0.5, "gammas": [1.0, 10.0], "work_dir": ""}
RULES = {
    "data": ("digits", "mnist8"),
    "steps": (1, 1000),
    "lr": (0, None),
    "gammas": [(0.0, None)],
    "work_dir": str,
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook, `demo`, and its three profiles."""
    for profile, text in {
        "smoke": "PROFILE: smoke\nsteps: 2\n",
        "quick": json.dumps(QUICK),
        "full": "PROFILE: full\ndata: mnist8\nsteps: 1000\ngammas: [1.0, 10.0, 100.0]\n",
    }.items():
        folder = tmp_path / "notebooks" / "profiles" / profile
        folder.mkdir(parents=True)
        (folder / "demo.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_ROOT", raising=False)
    monkeypatch.delenv("BILEVEL_WORK_DIR", raising=False)
    return tmp_path


def resolve(passed=None, rules=RULES, **changes):
    """`parameters.resolve` in a simulated notebook: the parameters cell, then papermill's cell."""
    values = {**QUICK, **changes}
    cells = ["", "import math", "\n".join(f"{k} = {v!r}  # comment" for k, v in values.items())]
    if passed is not None:
        cells.append("# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in passed.items()) + "\n")
    return parameters.resolve("demo", {**values, **(passed or {}), "In": cells}, **rules)


def test_quick_profile_is_what_the_cell_says(project, capsys):
    assert vars(resolve()) == QUICK
    assert "demo, profile quick: data = 'digits', steps = 100, lr = 0.5" in capsys.readouterr().out


def test_profile_expands_what_was_not_set(project):
    full = {**QUICK, "PROFILE": "full", "data": "mnist8", "steps": 1000, "gammas": [1.0, 10.0, 100.0]}
    assert vars(resolve(PROFILE="full")) == full
    assert vars(resolve(passed={"PROFILE": "full"})) == full
    assert vars(resolve(PROFILE="full", steps=7)) == {**full, "steps": 7}
    # Passed explicitly, even at the quick value, wins over the profile.
    assert vars(resolve(passed={"PROFILE": "full", "steps": 100})) == {**full, "steps": 100}
    # ... unless the parameters cell was run again by hand after it.
    cells = ["# Parameters\nPROFILE = 'full'\nsteps = 100\n", "PROFILE = 'full'\nsteps = 100\n"]
    assert parameters.resolve("demo", {**QUICK, "PROFILE": "full", "In": cells}, **RULES).steps == 1000


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"step": 5}, "unknown parameter 'step' passed by papermill: did you mean 'steps'"),
        ({"profile": "full"}, "did you mean 'PROFILE'"),
        ({"zzz": 5}, "known are PROFILE, data, steps"),
        (
            {"PROFILE": "fast"},
            "PROFILE = 'fast' is not allowed: it must be one of 'smoke', 'quick', 'recorded', 'full'",
        ),
        ({"data": "cifar"}, "data = 'cifar' is not allowed: it must be one of 'digits', 'mnist8'"),
        ({"steps": 0}, "steps = 0 is not allowed: it must be a whole number, at least 1 and at most 1000"),
        ({"steps": 2.5}, "steps = 2.5 is not allowed"),
        ({"steps": True}, "steps = True is not allowed"),
        ({"lr": -1}, "lr = -1 is not allowed: it must be a finite number, at least 0"),
        ({"lr": float("nan")}, "lr = nan is not allowed"),
        ({"lr": "1e-3"}, "YAML reads 1e-3 as text: write 0.001"),
        ({"gammas": []}, "list with at least one entry"),
        ({"gammas": [1.0, -2.0]}, r"gammas\[1\] = -2.0 is not allowed"),
        ({"work_dir": 3}, "work_dir = 3 is not allowed: it must be of type str"),
    ],
)
def test_wrong_parameters_stop_with_a_clear_message(project, passed, message):
    with pytest.raises(ValueError, match=message):
        resolve(passed)


def test_unknown_name_in_the_cell_or_in_a_profile_file(project):
    with pytest.raises(ValueError, match="'stepss' in the parameters cell: did you mean 'steps'"):
        resolve(stepss=3)
    (project / "notebooks/profiles/full/demo.yaml").write_text("PROFILE: full\nstep: 3\n")
    with pytest.raises(ValueError, match=r"unknown parameter 'step' in notebooks/profiles/full/demo\.yaml"):
        resolve(PROFILE="full")
    with pytest.raises(ValueError, match="'other' of demo has no value"):
        resolve(rules={**RULES, "other": int})


def test_rules_by_function_and_number_types(project):
    odd = {**RULES, "steps": lambda v: None if v % 2 else "steps must be odd"}
    with pytest.raises(ValueError, match=r"steps = 100 .*steps must be odd"):
        resolve(rules=odd)
    P = resolve(rules=RULES, lr=2, gammas=[3, 4.5])
    assert isinstance(P.lr, float) and P.gammas == [3.0, 4.5] and isinstance(P.gammas[0], float)
    assert isinstance(P.steps, int)


def test_missing_profile_file_is_named(project):
    (project / "notebooks/profiles/full/demo.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"notebooks/profiles/full/demo\.yaml"):
        resolve(PROFILE="full")


def test_parameters_cells_are_the_quick_profiles():
    for path in sorted(REPOSITORY.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
        quick = parameters.read_profile(path.stem, "quick")
        assert parameters.literals("".join(cell["source"])) == quick, path.name
        for profile in ("smoke", "full"):
            assert parameters.read_profile(path.stem, profile).keys() <= quick.keys(), path.name


def test_literals_refuse_code():
    assert parameters.literals("a = 1\nb = [1, 'x']  # note\nc: float = -2.5") == {"a": 1, "b": [1, "x"], "c": -2.5}
    assert parameters.literals("a = f(1)") is None
    assert parameters.literals("import os") is None
    assert parameters.literals("%matplotlib inline") is None


def test_is_batch(monkeypatch):
    monkeypatch.delenv("BILEVEL_STATIC", raising=False)
    assert not parameters.is_batch()
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    assert parameters.is_batch()


def test_folders(project, tmp_path_factory, monkeypatch):
    assert places.project_root() == project
    assert places.work_dir("") == project / "_runs" and (project / "_runs").is_dir()
    monkeypatch.setenv("BILEVEL_WORK_DIR", str(project / "drive" / "here"))
    assert places.work_dir("") == project / "drive" / "here"
    assert places.work_dir(project / "other").is_dir()
    (project / "file").write_text("")
    with pytest.raises(OSError, match="choose a writable folder"):
        places.work_dir(project / "file" / "below")
    monkeypatch.setenv("BILEVEL_ROOT", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(FileNotFoundError, match="BILEVEL_ROOT"):
        places.project_root()


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert parameters.choose_device() == torch.device("cpu")
    with pytest.raises(RuntimeError, match="no NVIDIA GPU: set device = 'auto' or 'cpu'"):
        parameters.choose_device("cuda")
    with pytest.raises(RuntimeError, match="no Apple GPU"):
        parameters.choose_device("mps")
    with pytest.raises(ValueError, match="device = 'gpu'"):
        parameters.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parameters.choose_device("auto") == torch.device("cuda")
    with pytest.raises(RuntimeError, match="there are 1 GPUs"):
        parameters.choose_device("cuda:1")


def some_state():
    tensors = {
        "weights": torch.randn(3, 4),
        "transposed": torch.randn(3, 4, dtype=torch.float64).T,
        "half": torch.randn(5).half(),
        "generator": torch.Generator().manual_seed(5).get_state(),
        "step": torch.tensor(7),
    }
    tensors["alias"] = tensors["weights"]
    return tensors, {"losses": [0.1, 1 / 3], "name": "run", "nested": {"k": None}}


def test_state_round_trip_is_exact(tmp_path):
    tensors, meta = some_state()
    path = files.save_state(tmp_path / "new" / "state.safetensors", tensors, meta)
    loaded, loaded_meta = files.load_state(path)
    assert loaded_meta == meta and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_damaged_state_is_an_error_with_a_remedy(tmp_path):
    path = files.save_state(tmp_path / "state.safetensors", *some_state())
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    for bad in (b"", good[: len(good) // 2], bytes(flipped), b"\xff" * 100):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="delete it, the run then starts anew"):
            files.load_state(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        files.load_state(tmp_path / "absent")


KILLED = """
import os, signal, sys, torch
from bilevel_core.lab import runs
path, way = sys.argv[1:]
if way == "half-written":  # the worst moment: the new bytes are on disk, but not yet renamed
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
k = 0
while True:
    k += 1
    files.save_state(path, {"x": torch.full((500_000,), float(k))}, {"k": k})
    print(k, flush=True)
"""


@pytest.mark.slow
def test_sigkill_while_saving_leaves_a_whole_file(tmp_path):
    """Two processes do nothing but save, and are killed: what is on disk is a whole state all the same."""
    paths = {way: tmp_path / f"{way}.safetensors" for way in ("half-written", "any-moment")}
    old = torch.zeros(4)
    files.save_state(paths["half-written"], {"x": old}, {"k": 0})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), way], stdout=subprocess.PIPE, text=True, env=environment
        )
        for way, path in paths.items()
    }
    with processes["any-moment"] as process:
        seen = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    tensors, meta = files.load_state(paths["any-moment"])
    assert meta["k"] >= seen[-1]
    assert torch.equal(tensors["x"], torch.full((500_000,), float(meta["k"])))

    with processes["half-written"] as process:
        assert process.wait() == -signal.SIGKILL and process.stdout.read() == ""
    tensors, meta = files.load_state(paths["half-written"])
    assert meta == {"k": 0} and torch.equal(tensors["x"], old)
    files.save_state(paths["half-written"], {"x": torch.ones(4)}, {"k": 3})  # the leftover is overwritten
    assert files.load_state(paths["half-written"])[1] == {"k": 3}
    assert not list(tmp_path.glob(".half-written*"))


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
    assert results.find("a.safetensors") == tmp_path / "own" / "a.safetensors"
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
