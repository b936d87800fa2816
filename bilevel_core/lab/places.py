"""Where things lie: the project, the folder of a run; and the profiles that a run can have."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In rising order: smoke checks the code, quick is live in the book, recorded takes up to hours on two cores and is
# committed under book/results, full wants a GPU. A chapter without a recorded study has no such profile.
PROFILES = ("smoke", "quick", "recorded", "full")


@dataclass
class Run:
    """What this process runs, as `parameters.resolve` last saw it; error messages and `results` read it.

    parameters  the notebook's, resolved
    results     where its results go instead of the book's; None: into the book's
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    results: Path | None = None


RUN = Run()


def project_root() -> Path:
    """The folder that contains `notebooks/profiles`.

    Looked for in the environment variable BILEVEL_ROOT, then upwards from the working directory, then upwards
    from this package. Raises FileNotFoundError where there is none.
    """
    given = os.environ.get("BILEVEL_ROOT")
    if given:
        root = expand(given, "BILEVEL_ROOT").resolve()
        if (root / "notebooks" / "profiles").is_dir():
            return root
        raise FileNotFoundError(f"BILEVEL_ROOT = {given!r} lacks notebooks/profiles: unset or correct it")
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "notebooks" / "profiles").is_dir():
                return folder
    raise FileNotFoundError(
        "no folder notebooks/profiles above the working directory or the package: "
        "work in a clone of the repository, or set BILEVEL_ROOT to one"
    )


def work_dir(path: str | Path | None = "") -> Path:
    """The folder for checkpoints and downloads, created if need be (it may lie on a mounted Drive).

    path: its place; empty means the environment variable BILEVEL_WORK_DIR, else `_runs` in the project.
    Raises OSError, with a remedy, where it cannot be created or written to; ValueError as `expand`.
    """
    chosen = path or os.environ.get("BILEVEL_WORK_DIR") or project_root() / "_runs"
    folder = expand(chosen, "work_dir" if path else "BILEVEL_WORK_DIR").resolve()
    return writable(folder, "work_dir")


def writable(folder: Path, name: str) -> Path:
    """`folder`, created if need be. Raises OSError, with a remedy, where it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{name} {str(folder)!r} cannot be created ({error}): choose a writable folder") from error
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} {str(folder)!r} cannot be written to ({error}): choose a writable folder") from error
    return folder


def expand(path: str | Path, name: str) -> Path:
    """`path` with ~ expanded. Raises ValueError, naming what it is the value of, where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ValueError(f"{name} = {str(path)!r}: {user} is no user's home here; write the folder out") from error


def relative(path: Path) -> str:
    try:
        return str(path.relative_to(project_root()))
    except (ValueError, FileNotFoundError):
        return str(path)
