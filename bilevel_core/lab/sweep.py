"""Many runs of one notebook with other parameters, on this machine or on a Dask cluster: what `make sweep` calls.

    python -m bilevel_core.lab.sweep 08_stable_diffusion grid.yaml FOLDER --workers 2
    python -m bilevel_core.lab.sweep 08_stable_diffusion grid.yaml FOLDER --cluster tcp://host:8786

grid.yaml maps parameters to values; a list is a list of alternatives, and every combination is a job:

    PROFILE: full
    seed: [0, 1, 2]
    prompts: [["A beautiful landscape"], ["a red fox in the snow"]]

FOLDER is seen by all workers. Each job has a folder of its own there, with its notebook, its results and its work_dir.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, places

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

    notebook  its name among the chapters, or a path. Raises ValueError for an empty list, FileNotFoundError.
    """
    path = Path(notebook)
    if not path.suffix:
        path = places.project_root() / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    choices = {name: value if isinstance(value, list) else [value] for name, value in grid.items()}
    empty = [name for name, values in choices.items() if not values]
    if empty:
        raise ValueError(f"{empty[0]} has no alternatives: give a value, or a list of at least one")
    made = []
    for values in itertools.product(*choices.values()):
        parameters = dict(zip(choices, values, strict=True))
        varied = [f"{name}-{value}" for name, value in parameters.items() if len(choices[name]) > 1]
        label = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(varied))[:60] or "run"
        digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
        made.append(Job(str(path.resolve()), str(Path(folder).resolve() / f"{label}_{digest}"), parameters))
    return made


def run(job: Job) -> dict[str, Any]:
    """Executes a job, or returns what it said before if it is done: "folder", "seconds", "worker", "results".

    The notebook finds its work_dir in the job's folder (unless given) and leaves its results there, not in the book's.
    It is called out.ipynb when it has ended, partial.ipynb until then. Raises what the notebook raises.
    """
    import papermill

    folder, source = Path(job.folder), Path(job.notebook)
    done = folder / "done.json"
    config = {"parameters": job.parameters, "notebook": hashlib.sha256(source.read_bytes()).hexdigest()}
    if done.is_file():
        found = json.loads(done.read_text())
        if found["config"] == config:
            return found
    folder.mkdir(parents=True, exist_ok=True)
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


def sweep(todo: Sequence[Job], client: Client, *, retries: int = 2, bar: bool = True) -> list[dict[str, Any]]:
    """`run` of every job on the workers of a Dask client, in any order; returns what they say, in the order of `todo`.

    A job that fails is tried again `retries` times, one whose worker dies by Dask itself; each goes on from its
    work_dir. Raises RuntimeError at the end if some failed for good, naming them; the others are done and kept.
    """
    from distributed import as_completed
    from tqdm.auto import tqdm

    futures = client.map(run, todo, retries=retries, pure=False)
    places, failed = {future: i for i, future in enumerate(futures)}, {}
    found: list[dict[str, Any]] = [{}] * len(todo)
    for future in tqdm(as_completed(futures), "jobs", total=len(todo), disable=not bar):
        i = places[future]
        if future.status == "finished":
            found[i] = future.result()
        else:
            failed[todo[i].folder] = " ".join(str(future.exception()).split())[-300:]
    if failed:
        listed = "\n".join(f"  {folder}: {reason}" for folder, reason in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(todo)} jobs failed; see partial.ipynb in their folders, and start the sweep again "
            f"to go on:\n{listed}"
        )
    return found


def connect(cluster: str = "", workers: int = 1) -> Client:
    """A Dask client: of the scheduler at an address such as tcp://host:8786, else of `workers` processes here."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ImportError("distributed is not installed: pip install 'bilevel-core[sweep]'") from error

    if cluster:
        return Client(cluster, timeout=30)
    return Client(LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None))


def main() -> int:
    """Command line; prints a line for each job."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", help="a chapter, such as 08_stable_diffusion, or a path")
    parser.add_argument("grid", type=Path, help="YAML: parameters and their alternatives")
    parser.add_argument("folder", type=Path, help="where jobs are kept")
    parser.add_argument("--cluster", default="", help="address of a Dask scheduler; default: a cluster of its own here")
    parser.add_argument("--workers", type=int, default=1, help="local processes, one job each at a time")
    parser.add_argument("--retries", type=int, default=2, help="of a job that fails")
    options = parser.parse_args()
    todo = jobs(options.notebook, yaml.safe_load(options.grid.read_text()), options.folder)
    print(f"{len(todo)} jobs in {options.folder}")
    with connect(options.cluster, options.workers) as client:
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
