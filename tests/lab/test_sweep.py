"""A notebook run with many parameters on Dask: jobs of their own, done once, and a worker that dies."""

import json
import os
import signal
import threading
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bilevel_core.lab import places, sweep
from bilevel_core.lab.studies import baselines

PARAMETERS = "seed = 0  # of the run\nwait = ''  # a file to wait for\nfail = False  # whether to fail"
BODY = """
import os, time
from pathlib import Path
from bilevel_core.lab import runs

folder = places.work_dir()
with open(folder / "attempts", "a") as file:
    file.write(f"{os.getppid()}\\n")
part = folder / "part"
if not part.exists():
    files.write_atomic(part, str(time.time()).encode())
while wait and not Path(wait).exists():
    time.sleep(0.1)
if fail:
    raise ValueError(f"seed {seed} cannot")
results.write_result("sum", "smoke", {"value": seed + 1}, {"seed": seed}, seeds=seed, cost=0, wall_s=0.0)
"""


@pytest.fixture
def notebook(tmp_path):
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_every_combination_is_a_job_of_its_own(notebook, tmp_path):
    made = sweep.jobs(notebook, {"seed": [0, 1, 2], "fail": False, "wait": ["", "a/b"]}, tmp_path / "out")
    assert len(made) == 6 == len({job.folder for job in made})
    assert made[0].parameters == {"seed": 0, "fail": False, "wait": ""}
    assert all(job.folder.startswith(str(tmp_path / "out" / "seed-")) for job in made)
    lists = sweep.jobs(notebook, {"prompts": [["a fox"], ["a dog", "a cat"]]}, tmp_path)
    assert [job.parameters["prompts"] for job in lists] == [["a fox"], ["a dog", "a cat"]]
    assert sweep.jobs("01_diffusion", {"seed": 1}, tmp_path)[0].notebook.endswith("01_diffusion.ipynb")
    with pytest.raises(ValueError, match="seed has no alternatives"):
        sweep.jobs(notebook, {"seed": []}, tmp_path)
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
    pytest.importorskip("distributed")
    todo = sweep.jobs(notebook, {"seed": 7, "fail": [True, False]}, tmp_path / "out")
    with sweep.connect() as client:
        with pytest.raises(RuntimeError, match="(?s)1 of 2 jobs failed; see partial.ipynb .*fail-True.*seed 7 cannot"):
            sweep.sweep(todo, client, retries=1, bar=False)
        client.cluster.close()
    bad, good = (tmp_path / job.folder for job in todo)
    assert (good / "done.json").is_file() and not (bad / "done.json").exists() and (bad / "partial.ipynb").is_file()
    assert len((bad / "work/attempts").read_text().split()) == 2  # tried again once


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
