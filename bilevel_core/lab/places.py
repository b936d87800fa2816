"""Where things lie: the project, the folder of a run; and the profiles that a run can have."""

from __future__ import annotations

import os
from pathlib import Path

# In rising order: smoke checks the code, quick is live in the book, recorded takes up to hours on two cores and is
# committed under book/results, full wants a GPU. A chapter without a recorded study has no such profile.
PROFILES = ("smoke", "quick", "recorded", "full")


def project_root() -> Path:
    """The folder that contains `notebooks/profiles`.

    Looked for in the environment variable BILEVEL_ROOT, then upwards from the working directory, then upwards
    from this package. Raises FileNotFoundError where there is none.
    """
    given = os.environ.get("BILEVEL_ROOT")
    if given:
        root = Path(given).expanduser().resolve()
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
    Raises OSError, with a remedy, where it cannot be created.
    """
    chosen = path or os.environ.get("BILEVEL_WORK_DIR") or project_root() / "_runs"
    folder = Path(chosen).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"work_dir {str(folder)!r} cannot be created ({error}): choose a writable folder") from error
    return folder


def relative(path: Path) -> str:
    try:
        return str(path.relative_to(project_root()))
    except (ValueError, FileNotFoundError):
        return str(path)
