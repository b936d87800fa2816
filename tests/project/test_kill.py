"""kill -9 at twenty random moments: what is resumed ends as if it had never been disturbed.

Each job runs in a child that is forked from a process with torch already imported, so that a restart costs
milliseconds. Half of the kills come at a random time, half at a random file operation, just before or just after it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from bilevel_core import schedules
from bilevel_core.algorithms import ScoreTraining, train_score
from bilevel_core.lab import data, files, training
from bilevel_core.lab.models import chains, networks
from bilevel_core.lab.studies import setting, tilted_truth

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
sys.path.append(str(ROOT / "tests" / "core"))  # Algorithm 6 is killed in the setting of its own tests

# ---------------------------------------------------------------- what is killed


@functools.cache
def digits() -> torch.Tensor:
    return data.load("digits", "train", 8)[0]


def network() -> ScoreTraining:
    """A network of chapter 1 with its optimiser and moving average."""
    return setting.recipe(networks.Denoiser("tiny", seed=0), steps=40, batch_size=8, seed=0)


def algorithm_3(folder: Path) -> None:
    state, abar = network(), schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"]), 50)
    loop = train_score(state, digits(), abar, steps=40)
    for _ in training.checkpointed(loop, state, folder / "final.safetensors", steps=40, every=2):
        pass


def algorithm_6(folder: Path) -> None:
    """The schedule with both its networks, step rule, annealed gamma and validation."""
    from test_schedule_learning import checkpointed

    checkpointed(folder / "final.safetensors", 20)


@functools.cache
def problem() -> tilted_truth.Problem:
    """A prompt of the shipped models, as a map of its noise with both rewards."""
    return tilted_truth.problem(chains.Chain.shipped(steps=3), "a bold two", draws=50)


def exchange_run(folder: Path) -> None:
    """Chains of two levels that start beyond the tilt, kept after every sweep."""
    sizes = {"sweeps": 20, "warmup": 2, "chains": 2, "seed": 0, "lams": (math.inf, 0.5), "block": 1}
    done, _ = tilted_truth.run(problem(), "beyond", **sizes, folder=folder)
    tensors = {f"history.{name}": value for name, value in done.history.items()}
    tensors |= {f"state.{name}": value for name, value in done.state.items()}
    files.save_state(folder / "final.safetensors", tensors, {"cost": done.cost, "refused": done.refused})


JOBS = {job.__name__: job for job in (exchange_run, algorithm_3, algorithm_6)}
OPERATIONS = 24  # at the latest at this one a child dies


def prepare(name: str) -> None:
    """What every child would otherwise import or load for itself; no backward pass, which is not to be forked."""
    import safetensors.torch  # noqa: F401
    import tqdm.auto  # noqa: F401

    digits(), network()
    if name == "exchange_run":
        problem()
    if name == "algorithm_6":
        import test_schedule_learning  # noqa: F401


# ---------------------------------------------------------------- who kills it


def die_at(operation: int) -> None:
    """This process kills itself at its so-and-so-many-th file operation: before the bytes are on disk (even), or
    before or after the new file takes the place of the old one."""
    count = 0

    def around(function: Callable) -> Callable:
        def counted(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    os.fsync, os.replace = around(os.fsync), around(os.replace)


def forked(job: Callable[[Path], None], folder: Path, operation: int = 0) -> int:
    """Process id of a child that does the job; it ends with 0, or with 1 and its traceback."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        try:
            if operation:
                die_at(operation)
            job(folder)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
    os._exit(code)


def drive(name: str, folder: Path, seed: int) -> None:
    """Does a job undisturbed, then again and again under fire; prints what was seen as JSON."""
    job, chance, found = JOBS[name], random.Random(seed), {"time": 0, "write": 0, "rounds": 1, "leftovers": 0}
    prepare(name)
    (folder / "whole").mkdir()
    begin = time.perf_counter()
    assert os.waitpid(forked(job, folder / "whole"), 0)[1] == 0
    whole, states = time.perf_counter() - begin, set()
    place = folder / "round_1"
    place.mkdir()
    while found["time"] + found["write"] < KILLS:
        kind = "time" if chance.random() < 0.5 else "write"
        child = forked(job, place, 0 if kind == "time" else chance.randint(1, OPERATIONS))
        if kind == "time":
            time.sleep(chance.uniform(0, whole / 5))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            found[kind] += 1
        else:  # it was done before the kill: the next round begins from nothing
            assert os.WEXITSTATUS(status) == 0
            found["rounds"] += 1
            place = folder / f"round_{found['rounds']}"
            place.mkdir()
        found["leftovers"] += bool(list(place.rglob(".*.tmp")))
        states.add(tuple(sorted((p.name, p.stat().st_mtime_ns) for p in place.rglob("*") if p.is_file())))
    assert os.waitpid(forked(job, place), 0)[1] == 0
    print(json.dumps(found | {"states": len(states), "whole": whole}))


# ---------------------------------------------------------------- the tests


def final(folder: Path) -> object:
    """What a job leaves in the end, ready to be compared bit for bit."""
    tensors, meta = files.load_state(folder / "final.safetensors")
    return meta, {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_twenty_kills_change_nothing(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), name, str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["time"] + found["write"] == KILLS and min(found["time"], found["write"]) >= 5
    assert found["states"] >= KILLS / 3, "the kills must be spread over the run"
    assert found["leftovers"] >= 3, "some kills must leave a half-made file behind"
    whole = final(tmp_path / "whole")
    for number in range(1, found["rounds"] + 1):
        assert final(tmp_path / f"round_{number}") == whole


# ---------------------------------------------------------------- a build of the book

BUILD = """
import importlib.util, os, shutil, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("book_build", sys.argv[1])
sys.path.insert(0, str(Path(sys.argv[1]).parent))
build = sys.modules["book_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
tree, die_at = Path(sys.argv[2]), sys.argv[3]
build.ROOT, build.NOTEBOOKS = tree, tree / "notebooks"
if die_at == "swap":
    rmtree = shutil.rmtree
    def removed(path, **options):  # the old site, moved aside, is the last to be removed
        rmtree(path, **options) if Path(path).name != "site-old" else os.kill(os.getpid(), signal.SIGKILL)
    shutil.rmtree = removed
build.execute("one", "smoke", tree / "executed", force=False)
shutil.copy(tree / "executed" / "one.ipynb", tree / "src")
build.build_site(tree / "src", tree / "site")
"""
CELL = """
import pathlib, time
here = pathlib.Path(r"{tree}")
(here / "running").touch()
while (here / "wait").exists():
    time.sleep(0.05)
print("version {version}")
"""


@pytest.fixture
def tree(tmp_path):
    """A book of one page and one notebook."""
    (tmp_path / "notebooks" / "profiles" / "smoke").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "smoke" / "one.yaml").write_text("PROFILE: smoke\n")
    for folder in ("src", "bilevel_core", "book/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src" / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n  - file: one\n")
    config = "title: A book\nonly_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\nrepository: {url: ''}\n"
    (tmp_path / "src" / "_config.yml").write_text(config)
    (tmp_path / "src" / "index.md").write_text("# A book\n\nOf one notebook.\n")
    return tmp_path


def write_version(tree: Path, version: int) -> None:
    parameters = new_code_cell('PROFILE = "quick"', metadata={"tags": ["parameters"]})
    cell = new_code_cell(CELL.format(tree=tree, version=version))
    cells = [new_markdown_cell("# One"), parameters, cell]
    nbformat.write(new_notebook(cells=cells), tree / "notebooks" / "one.ipynb")


def start_build(tree: Path, die_at: str = "") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BILEVEL_ROOT": str(ROOT)}
    command = [sys.executable, "-c", BUILD, str(ROOT / "book" / "build.py"), str(tree), die_at]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> int:
    output, _ = process.communicate(timeout=180)
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happened for two minutes"
        time.sleep(0.01)


def published(tree: Path) -> dict[str, str]:
    """Every file of the site that a reader sees, by its hash."""
    html = tree / "site" / "_build" / "html"
    return {
        str(p.relative_to(html)): hashlib.sha256(p.read_bytes()).hexdigest() for p in html.rglob("*") if p.is_file()
    }


def shown(tree: Path) -> str:
    return re.search(r"version \d", (tree / "site" / "_build" / "html" / "one.html").read_text())[0]


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_half_done(tree):
    write_version(tree, 1)
    assert finish(start_build(tree)) == 0
    whole, first = published(tree), (tree / "executed" / "one.ipynb").read_bytes()
    assert shown(tree) == "version 1" and "index.html" in whole
    write_version(tree, 2)

    (tree / "wait").touch()  # in the middle of a cell
    (tree / "running").unlink()
    process = start_build(tree)
    until((tree / "running").exists)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    (tree / "wait").unlink()
    assert published(tree) == whole and (tree / "executed" / "one.ipynb").read_bytes() == first
    assert not (tree / "executed" / "one.json").exists(), "an interrupted notebook must not be taken for done"

    process = start_build(tree)  # in the middle of the site, which goes on being written by an orphan
    until(lambda: any(path.is_file() for new in tree.glob("site-new-*") for path in new.rglob("*.html")))
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert published(tree) == whole
    nbformat.validate(nbformat.read(tree / "executed" / "one.ipynb", as_version=4))
    assert json.loads((tree / "executed" / "one.json").read_text())["seconds"] > 0

    assert finish(start_build(tree, "swap")) == -signal.SIGKILL  # the new site in its place, the old one not yet gone
    assert shown(tree) == "version 2" and published(tree).keys() == whole.keys()
    stamp = (tree / "executed" / "one.ipynb").stat().st_mtime_ns
    assert finish(start_build(tree)) == 0
    assert shown(tree) == "version 2" and published(tree).keys() == whole.keys()
    assert (tree / "executed" / "one.ipynb").stat().st_mtime_ns == stamp, "finished work is used again"
    assert sorted(path.name for path in (tree / "executed").iterdir()) == ["one.ipynb", "one.json"]
    assert not list(tree.glob("site-old"))


if __name__ == "__main__":
    drive(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
