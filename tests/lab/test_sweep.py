"""A notebook run with many parameters on Dask: jobs of their own, done once, and a worker that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bilevel_core.lab import places, sweep
from bilevel_core.lab.studies import baselines

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMETERS = "seed = 0  # of the run\nwait = ''  # a file to wait for\nfail = ''  # with what error\nprompts = ['']"
BODY = """
import os, time
from pathlib import Path
from bilevel_core.lab import files, places, results

folder = places.work_dir()
with open(folder / "attempts", "a") as file:
    file.write(f"{os.getppid()}\\n")
part = folder / "part"
if not part.exists():
    files.write_atomic(part, str(time.time()).encode())
while wait and not Path(wait).exists():
    time.sleep(0.1)
if fail:
    raise {"value": ValueError, "other": RuntimeError}[fail](f"seed {seed} cannot")
results.write_result("sum", "smoke", {"value": seed + 1}, {"seed": seed}, seeds=seed, cost=0, wall_s=0.0)
"""


@pytest.fixture
def notebook(tmp_path):
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_every_combination_is_a_job_of_its_own(notebook, tmp_path):
    made = sweep.jobs(notebook, {"seed": [0, 1, 2], "fail": "", "wait": ["", "a/b"]}, tmp_path / "out")
    assert len(made) == 6 == len({job.folder for job in made})
    assert made[0].parameters == {"seed": 0, "fail": "", "wait": ""}
    assert all(job.folder.startswith(str(tmp_path / "out" / "seed-")) for job in made)
    lists = sweep.jobs(notebook, {"prompts": [["a fox"], ["a dog", "a cat"]]}, tmp_path)
    assert [job.parameters["prompts"] for job in lists] == [["a fox"], ["a dog", "a cat"]]
    assert sweep.jobs("01_diffusion", {"seed": 1}, tmp_path)[0].notebook.endswith("01_diffusion.ipynb")
    with pytest.raises(FileNotFoundError, match="there is no notebook"):
        sweep.jobs(tmp_path / "none.ipynb", {}, tmp_path)


@pytest.mark.slow
def test_a_job_is_done_once(notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("BILEVEL_RESULTS", raising=False)
    (job,) = sweep.jobs(notebook, {"seed": 4}, tmp_path / "out")
    first = sweep.run(job)
    assert first["results"] == ["sum.json"] and "BILEVEL_RESULTS" not in os.environ
    record = json.loads((tmp_path / job.folder / "results/sum.json").read_text())
    assert record["data"] == {"value": 5} and not (places.project_root() / "book/results/sum.json").exists()
    out = tmp_path / "out" / job.folder
    assert "seed = 4" in "".join(cell.source for cell in nbformat.read(out / "out.ipynb", 4).cells)
    assert not (out / "partial.ipynb").exists()
    assert sweep.run(job) == first and len((out / "work/attempts").read_text().split()) == 1
    notebook.write_text(notebook.read_text().replace("seed + 1", "seed + 2"))  # another notebook: another job
    assert sweep.run(job) != first
    assert json.loads((out / "results/sum.json").read_text())["data"] == {"value": 6}


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed(notebook, tmp_path):
    pytest.importorskip("distributed")
    go = tmp_path / "go"
    todo = sweep.jobs(notebook, {"seed": [0, 1, 2], "wait": str(go)}, tmp_path / "out")
    with sweep.connect(workers=2) as client:
        killed = []

        def kill():
            started = []
            while len(started) < 2:  # both workers are in the middle of a job
                started = [path for path in (tmp_path / "out").glob("*/*/part")]
                time.sleep(0.1)
            attempts = started[0].with_name("attempts")
            killed.append((attempts.parents[1], int(attempts.read_text().split()[0]), started[0].read_text()))
            os.kill(killed[0][1], signal.SIGKILL)
            time.sleep(1)
            go.touch()

        thread = threading.Thread(target=kill)
        thread.start()
        found = sweep.sweep(todo, client, bar=False)
        thread.join()
        client.cluster.close()
    assert [row["results"] for row in found] == [["sum.json"]] * 3
    values = [json.loads((tmp_path / job.folder / "results/sum.json").read_text())["data"]["value"] for job in todo]
    assert values == [1, 2, 3]
    folder, worker, part = killed[0]
    attempts = (folder / "work/attempts").read_text().split()
    assert len(attempts) >= 2 and int(attempts[0]) == worker and int(attempts[-1]) != worker
    assert (folder / "work/part").read_text() == part  # what was kept was used again
    assert worker not in {row["worker"] for row in found}


@pytest.mark.slow
def test_failures_are_named_and_the_others_kept(notebook, tmp_path):
    """A bad parameter is tried once; what may pass is tried again."""
    pytest.importorskip("distributed")
    todo = sweep.jobs(notebook, {"seed": 7, "fail": ["value", "other", ""]}, tmp_path / "out")
    with sweep.connect() as client:
        with pytest.raises(RuntimeError, match="2 of 3 jobs failed; see partial.ipynb ") as caught:
            sweep.sweep(todo, client, retries=1, bar=False)
        client.cluster.close()
    said = str(caught.value)
    assert f"{todo[0].folder}: ValueError: seed 7 cannot" in said and "Traceback" not in said
    assert f"{todo[1].folder}: RuntimeError: seed 7 cannot" in said and len(said.splitlines()) == 3
    bad, worse, good = (tmp_path / job.folder for job in todo)
    assert (good / "done.json").is_file() and not (bad / "done.json").exists() and (bad / "partial.ipynb").is_file()
    assert [len((folder / "work/attempts").read_text().split()) for folder in (bad, worse, good)] == [1, 2, 1]


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "bilevel_core.lab.sweep", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_says_what_matters_and_nothing_else(notebook, tmp_path):
    pytest.importorskip("distributed")
    grid, out = tmp_path / "my grid.yaml", tmp_path / "my out"
    grid.write_text("seed: [3, 4]\nfail: ['', value]\n")
    done = command(notebook, grid, out, "--workers", 2)
    assert done.returncode == 1 and done.stdout == f"4 jobs in {out}\n"
    said = done.stderr.splitlines()[-3:]
    assert said[0].startswith("2 of 4 jobs failed") and said[2].endswith("ValueError: seed 4 cannot")
    assert "Traceback" not in done.stderr and "distributed" not in done.stderr, done.stderr
    grid.write_text("seed: [3, 4]\nfail: ''\n")
    done = command(notebook, grid, out)
    assert done.returncode == 0 and done.stdout.count("sum.json") == 2, done.stderr
    assert "Traceback" not in done.stderr and "distributed" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (b"", "grid .*grid.yaml holds nothing: it must map parameters to values, such as\n    seed:"),
        (b"{}", "holds nothing"),
        (b"- seed\n- 3\n", "holds a list: it must map"),
        (b"seed", "holds a str: it must map"),
        (b"\x89PNG\xff\xfe\x00", "grid.yaml cannot be read"),
        (b"a: [", "grid.yaml cannot be read"),
        (b"seed: 2020-13-45", "grid.yaml cannot be read"),
        (None, "there is no grid .*grid.yaml: it must map"),
    ],
)
def test_a_grid_that_is_none_is_named(tmp_path, grid, message):
    path = tmp_path / "grid.yaml"
    if grid is not None:
        path.write_bytes(grid)
    with pytest.raises(ValueError, match=message):
        sweep.read_grid(path)
    with pytest.raises(ValueError, match="cannot be read"):
        sweep.read_grid(tmp_path)


def test_a_grid_with_a_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: [0, 1]\r\nPROFILE: full\r\n")
    assert sweep.read_grid(path) == {"seed": [0, 1], "PROFILE": "full"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"seed": date(2020, 1, 1)},
            r"seed: datetime.date\(2020, 1, 1\) cannot be passed .*where YAML reads it as a date",
        ),
        ({"prompts": [[date(2020, 1, 1)]]}, "prompts: .* cannot be passed"),
        ({"seed": [0, 1, 0]}, "seed has 0 twice: each alternative is one job"),
        ({"prompts": [["a"], ["b"], ["a"]]}, r"prompts has \['a'\] twice"),
        (
            {"prompts": ["a", "b"]},
            r"prompts is a list in the notebook, and 'a' is none: .*write prompts: \[\[\"a\", \"b\"\]\]",
        ),
        ({"sead": 1}, "unknown parameter 'sead'; small.ipynb has seed, wait, fail, prompts"),
        ({1: 2}, "unknown parameter 1"),
        ({"seed": []}, "seed has no alternatives"),
    ],
)
def test_a_bad_grid_stops_before_any_job(notebook, tmp_path, grid, message):
    with pytest.raises(ValueError, match=message):
        sweep.jobs(notebook, grid, tmp_path / "out")


def test_the_command_line_refuses_in_one_line(notebook, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text("seed: [0]")
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((notebook, grid, out, "--workers", "0"), "workers = 0 must be at least 1"),
        ((notebook, grid, out, "--retries", "-1"), "retries = -1 must not be negative"),
        ((notebook, tmp_path / "none", out), "there is no grid"),
        ((notebook, grid, tmp_path / "file"), "file' cannot be created"),
        (("98_none", grid, out), "there is no notebook"),
    ):
        monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            sweep.main()
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said


def test_a_bayesian_search_in_shared_storage_goes_on(tmp_path):
    looked = []

    def evaluate(lam, n, seed):
        looked.append(lam)
        if len(looked) == 4:
            raise KeyboardInterrupt
        return baselines.Evaluation(-abs(lam - 1), 0.1, n)

    with pytest.raises(KeyboardInterrupt):
        baselines.bayesian(evaluate, 3, 0, trials=6, storage=tmp_path / "journal")
    found = baselines.bayesian(evaluate, 3, 0, trials=6, storage=tmp_path / "journal")
    assert len(found.trials) == 6 and len(looked) == 7 and found.cost == 18
    assert [trial.lam for trial in found.trials] == [lam for i, lam in enumerate(looked) if i != 3]
    again = baselines.bayesian(evaluate, 3, 0, trials=6, storage=tmp_path / "journal")
    assert again == found and len(looked) == 7


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder with a space, where a Python that only tells its arguments is installed."""
    place = tmp_path / "my checkout"
    (place / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, place)
    python = place / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"; echo\n")
    python.chmod(0o755)
    (place / ".venv" / "installed").touch()
    return place


def make(place, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", *arguments], cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_keeps_what_has_a_space_together(checkout):
    given = ["NOTEBOOK=my notebook.ipynb", "GRID=my grid.yaml", "OUT=a b"]
    called = "<-m><bilevel_core.lab.sweep><my notebook.ipynb><my grid.yaml><a b><--workers>"
    assert make(checkout, "sweep", *given)[-1] == f"{called}<1><--cluster><>"
    assert make(checkout, "sweep", *given, "WORKERS=2", "CLUSTER=tcp://a:1")[-1] == f"{called}<2><--cluster><tcp://a:1>"
    assert make(checkout, "pdf", "PROFILE=smoke")[-1] == "<book/pdf.py><--profile><smoke>"
    (checkout / "my constraints").touch()
    (checkout / ".venv" / "installed").unlink()
    installed = "<-m><pip><install><--quiet><--disable-pip-version-check>"
    lines = make(checkout, "book", "CONSTRAINTS=my constraints")
    assert f"{installed}<-c><my constraints><-e><.[book,test]>" in lines
    (checkout / ".venv" / "installed").unlink()
    assert f"{installed}<-e><.[book,test]>" in make(checkout, "book", "CONSTRAINTS=")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_python_in_a_folder_with_a_space(checkout):
    python = checkout / "a python" / "python3"
    python.parent.mkdir()
    script = checkout / ".venv" / "bin" / "python"
    python.write_text(
        f"#!/bin/sh\ncase $1 in -m) mkdir -p .venv/bin; mv kept '{script}';; --version) echo Python 3.12;; esac\n"
    )
    python.chmod(0o755)
    script.rename(checkout / "kept")
    (checkout / ".venv" / "installed").unlink()
    lines = make(checkout, "book", f"PYTHON={python}")
    assert lines[0] == "Creating .venv with Python 3.12" and lines[-1] == "<book/build.py><--profile><quick>"
