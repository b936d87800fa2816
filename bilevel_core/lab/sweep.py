"""Many runs of one notebook with other parameters, on this machine or on a Dask cluster: what `make sweep` calls.

    python -m bilevel_core.lab.sweep 08_stable_diffusion grid.yaml FOLDER --workers 2
    python -m bilevel_core.lab.sweep 08_stable_diffusion grid.yaml FOLDER --cluster tcp://host:8786

grid.yaml maps parameters to values; a list is a list of alternatives, and every combination is a job:

    PROFILE: full
    seed: [0, 1, 2]
    prompts: [["A beautiful landscape"], ["a red fox in the snow"]]

A parameter that is a list itself needs a list of lists: lam_starts: [[0.5, 5]] is one value, [0.5, 5] are two, neither
a list. FOLDER is seen by all workers. Each job has a folder of its own there, with its notebook, its results and its
work_dir.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, parameters, places

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Job:
    """One run: the notebook's path, its folder, and the parameters that papermill passes."""

    notebook: str
    folder: str
    parameters: dict[str, Any]


def jobs(notebook: str | Path, grid: Mapping[str, Any], folder: str | Path) -> list[Job]:
    """Every combination of the alternatives of `grid` (parameter -> value, or list of values), each with a folder.

    notebook  its name among the chapters, or a path
    Raises FileNotFoundError; ValueError for an empty list, a value given twice (two jobs in one folder), an unknown
    parameter, one that is a list in the notebook and no list in a job, and a value that papermill cannot pass.
    """
    path = Path(notebook)
    if not path.suffix:
        path = places.project_root() / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    choices = {name: value if isinstance(value, list) else [value] for name, value in grid.items()}
    known = _parameters(path)
    for name, values in choices.items():
        if not isinstance(name, str) or (known and name not in known):
            raise ValueError(f"unknown parameter {name!r}; {path.name} has {', '.join(known)}")
        if not values:
            raise ValueError(f"{name} has no alternatives: give a value, or a list of at least one")
        for i, value in enumerate(values):
            try:
                text = json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{name}: {value!r} cannot be passed ({error}): give numbers, text (in quotes, where YAML reads it "
                    "as a date), true, false, null, or lists of them"
                ) from error
            if text in map(json.dumps, values[:i]):
                raise ValueError(f"{name} has {value!r} twice: each alternative is one job, with a folder of its own")
            if isinstance(known.get(name), list) and not isinstance(value, list):
                raise ValueError(
                    f"{name} is a list in the notebook, and {value!r} is none: a list in the grid is a list of "
                    f"alternatives, so for one job with {values} write {name}: [{json.dumps(values)}]"
                )
    made = []
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        varied = {name: value for name, value in given.items() if len(choices[name]) > 1}
        name = parameters.label(varied, given)
        made.append(Job(str(path.resolve()), str(Path(folder).resolve() / name), given))
    return made


def read_grid(path: Path) -> dict[str, Any]:
    """The grid in a YAML file. Raises ValueError, naming the file and what it must be, where it is something else."""
    import yaml

    example = "it must map parameters to values, such as\n    seed: [0, 1, 2]"
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no grid {path}: {example}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"grid {path} cannot be read ({error}): {example}") from error
    if not isinstance(grid, dict) or not grid:
        what = "nothing" if grid is None or grid == {} else f"a {type(grid).__name__}"
        raise ValueError(f"grid {path} holds {what}: {example}")
    return grid


def _parameters(notebook: Path) -> dict[str, Any]:
    """The parameters cell of a notebook; empty where it has none."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            return parameters.literals("".join(cell["source"])) or {}
    return {}


def run(job: Job) -> dict[str, Any]:
    """Executes a job, or returns what it said before if it is done: "folder", "seconds", "worker", "results".

    The notebook finds its work_dir in the job's folder (unless given) and leaves its results there, not in the book's.
    It is called out.ipynb when it has ended, partial.ipynb until then. Raises what the notebook raises.
    """
    import papermill

    folder, source = Path(job.folder), Path(job.notebook)
    done = folder / "done.json"
    config = {"parameters": job.parameters, "notebook": hashlib.sha256(source.read_bytes()).hexdigest()}
    with files.alone(folder / "partial.ipynb"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # not done, or the file is damaged
            found = json.loads(done.read_text())
            if found["config"] == config:
                return found
        began, before = time.perf_counter(), dict(os.environ)
        os.environ |= {"BILEVEL_RESULTS": str(folder / "results"), "BILEVEL_WORK_DIR": str(folder / "work")}
        os.environ["BILEVEL_ROOT"] = str(places.project_root())
        try:
            papermill.execute_notebook(
                str(source),
                str(folder / "partial.ipynb"),
                parameters=job.parameters,
                kernel_name="python3",
                language="python",
                cwd=str(source.parent),
                progress_bar=False,
                log_output=False,
            )
        finally:
            os.environ.clear()
            os.environ |= before
        os.replace(folder / "partial.ipynb", folder / "out.ipynb")
        results = sorted(path.name for path in (folder / "results").glob("*.json"))
        found = {"config": config, "folder": str(folder), "seconds": round(time.perf_counter() - began, 1)}
        found |= {"worker": os.getpid(), "results": results}
        files.write_atomic(done, json.dumps(found).encode())
        return found


def attempt(job: Job) -> dict[str, Any]:
    """`run`, with "failed" and the reason where a ValueError or TypeError ends the notebook: it would come again.

    Other errors are raised, in one line.
    """
    from papermill import PapermillExecutionError

    try:
        return run(job)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
        if error.ename in ("ValueError", "TypeError"):
            return {"failed": reason}
        raise RuntimeError(reason) from None


def sweep(todo: Sequence[Job], client: Client, *, retries: int = 2, bar: bool = True) -> list[dict[str, Any]]:
    """`run` of every job on the workers of a Dask client, in any order; returns what they say, in the order of `todo`.

    A job that fails is tried again `retries` times (but not after a ValueError or TypeError: a bad parameter stays
    bad), one whose worker dies by Dask itself; each goes on from its work_dir. Raises RuntimeError at the end if some
    failed for good, naming them; the others are done and kept.
    """
    from distributed import as_completed
    from tqdm.auto import tqdm

    futures = client.map(attempt, todo, retries=retries, pure=False)
    places, failed = {future: i for i, future in enumerate(futures)}, {}
    found: list[dict[str, Any]] = [{}] * len(todo)
    for future in tqdm(as_completed(futures), "jobs", total=len(todo), disable=not bar):
        i = places[future]
        found[i] = future.result() if future.status == "finished" else {"failed": str(future.exception())}
        if "failed" in found[i]:
            failed[todo[i].folder] = " ".join(found[i]["failed"].split())[:600]
    if failed:
        listed = "\n".join(f"  {folder}: {reason}" for folder, reason in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(todo)} jobs failed; see partial.ipynb in their folders, and start the sweep again "
            f"to go on:\n{listed}"
        )
    return found


def connect(cluster: str = "", workers: int = 1) -> Client:
    """A Dask client: of the scheduler at an address such as tcp://host:8786, else of `workers` processes here."""
    if workers < 1:
        raise ValueError(f"workers = {workers} must be at least 1")
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ImportError("distributed is not installed: pip install 'bilevel-core[sweep]'") from error

    if cluster:
        return Client(cluster, timeout=30)
    options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.ERROR}
    return Client(LocalCluster(n_workers=workers, **options))


def main() -> int:
    """Command line; prints a line for each job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", help="a chapter, such as 08_stable_diffusion, or a path")
    parser.add_argument("grid", type=Path, help="YAML: parameters and their alternatives")
    parser.add_argument("folder", type=Path, help="where jobs are kept")
    parser.add_argument("--cluster", default="", help="address of a Dask scheduler; default: a cluster of its own here")
    parser.add_argument("--workers", type=int, default=1, help="local processes, one job each at a time")
    parser.add_argument("--retries", type=int, default=2, help="of a job that fails")
    options = parser.parse_args()
    if options.retries < 0:
        parser.error(f"retries = {options.retries} must not be negative")
    try:
        todo = jobs(options.notebook, read_grid(options.grid), options.folder)
        places.writable(options.folder.resolve(), "folder")
        client = connect(options.cluster, options.workers)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"{len(todo)} jobs in {options.folder}", flush=True)
    with client:
        try:
            found = sweep(todo, client, retries=options.retries)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            if client.cluster:
                client.cluster.close()
    for row in found:
        print(f"{row['seconds']:8.1f} s  {Path(row['folder']).name}  {', '.join(row['results'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
