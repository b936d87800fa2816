"""Results with their provenance: recorded under book/results, checked by a schema, read by tier."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .files import plain, write_atomic
from .places import PROFILES, RUN, expand, project_root, relative

TIERS = PROFILES
SCHEMA_NAME = "bilevel-result/1"

RESULT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "name", "tier", "data", "protocol", "provenance"],
    "properties": {
        "schema": {"const": SCHEMA_NAME},
        "name": {"type": "string", "pattern": "^[a-z0-9_]+$"},
        "tier": {"enum": list(TIERS)},
        "data": {"type": "object"},
        "protocol": {"type": ["object", "string", "null"]},
        "provenance": {
            "type": "object",
            "required": [
                "commit",
                "dirty",
                "date",
                "parameters",
                "seeds",
                "versions",
                "hardware",
                "wall_s",
                "cost",
            ],
            "properties": {
                "commit": {"type": ["string", "null"], "pattern": "^[0-9a-f]{40}$"},
                "dirty": {"type": ["boolean", "null"]},
                "date": {"type": "string"},
                "parameters": {"type": "object"},
                "seeds": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                "versions": {"type": "object", "required": ["python", "torch"]},
                "hardware": {"type": "object", "required": ["platform", "cpu", "cores", "threads", "gpu"]},
                "wall_s": {"type": "number", "minimum": 0},
                "cost": {
                    "type": "object",
                    "required": ["units", "calls"],
                    "properties": {
                        "units": {"type": "number", "minimum": 0},
                        "calls": {"type": ["integer", "null"], "minimum": 0},
                    },
                },
            },
        },
    },
}


def write_result(
    name: str,
    tier: str,
    data: Mapping[str, Any],
    P: SimpleNamespace | Mapping[str, Any],
    *,
    seeds: int | Sequence[int],
    cost: float | Mapping[str, Any],
    wall_s: float,
    protocol: Mapping[str, Any] | str | None = None,
    directory: str | Path | None = None,
    ran: Mapping[str, Any] | None = None,
) -> Path:
    """Record a result as <name>.json in `folder`, with its provenance: atomic, checked by RESULT_SCHEMA.

    tier      "smoke", "quick", "recorded" or "full"; a result is never replaced by one of a lower tier
    data      JSON-able numbers; tensors and arrays become lists; NaN and infinity are refused
    P         the resolved parameters (what `parameters.resolve` returned); where they have a PROFILE, it is the tier
    seeds     every seed used
    cost      cost units (one image through one network forward = 1), or {"units": ..., "calls": ...}
    wall_s    seconds
    protocol  how it was measured: n, reference size, split, batch sizes, ...
    ran       `provenance()` of where it was computed, if that was another machine
    directory elsewhere than `folder`
    Returns the path. Raises ValueError where the record is not valid or its tier is not the profile's.
    """
    values = dict(P) if isinstance(P, Mapping) else vars(P)
    profile = values.get("PROFILE", tier)
    if profile != tier:
        raise ValueError(f"result {name!r} was computed with PROFILE {profile!r}: its tier cannot be {tier!r}")
    record = {
        "schema": SCHEMA_NAME,
        "name": name,
        "tier": tier,
        "data": data,
        "protocol": protocol,
        "provenance": dict(ran or provenance())
        | {
            "parameters": {key: _no_path(value) for key, value in values.items()},
            "seeds": [seeds] if isinstance(seeds, int) else list(seeds),
            "wall_s": round(float(wall_s), 3),
            "cost": {"calls": None, **cost} if isinstance(cost, Mapping) else {"units": cost, "calls": None},
        },
    }
    try:
        text = json.dumps(record, indent=1, allow_nan=False, default=plain) + "\n"
    except ValueError as error:
        raise ValueError(f"result {name!r} contains NaN or infinity, which JSON has not: {error}") from error
    _validate(json.loads(text), f"result {name!r}")
    path = (folder() if directory is None else Path(directory)) / f"{name}.json"
    if path.exists():
        old = _read(path)["tier"]
        if TIERS.index(old) > TIERS.index(tier):
            raise ValueError(f"{relative(path)} holds a {old} result: a {tier} one must not replace it")
    write_atomic(path, text.encode())
    if path.parent == RUN.results:
        print(f"{name}: this run's result is {path}; the book's own stays as it is")
    return path


def folder() -> Path:
    """Where results of this run go, and the files that belong to them: book/results for a run of a profile as it is.

    The environment variable BILEVEL_RESULTS (a sweep sets it) names another; and a recorded or full run with
    parameters other than the profile's has a folder of its own in its work_dir, which `parameters.resolve` prints.
    """
    given = os.environ.get("BILEVEL_RESULTS")
    return expand(given, "BILEVEL_RESULTS").absolute() if given else RUN.results or book()


def book() -> Path:
    """The folder of the results that the book shows."""
    return project_root() / "book" / "results"


def find(file: str, directory: str | Path | None = None) -> Path:
    """Where a file that belongs to a result is read from, there or not: `directory`, else beside the record that
    `read_result` shows, which is the book's wherever the book has one."""
    if directory is not None:
        return Path(directory) / file
    own, shown = folder() / file, book() / file
    return own if own.is_file() and not shown.is_file() else shown


def read_result(name: str, directory: str | Path | None = None) -> dict[str, Any]:
    """The record <name>.json of `directory`; by default the book's, or this run's own (in `folder`) if it is a full one
    or the book has none: what the pages say is about the book's. FileNotFoundError, or ValueError (not JSON, not of
    the schema)."""
    if directory is not None:
        return _read(Path(directory) / f"{name}.json")
    own, shown = (place / f"{name}.json" for place in (folder(), book()))
    if not own.is_file():
        return _read(shown)
    record = _read(own)
    return record if record["tier"] == "full" or not shown.is_file() else _read(shown)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.json"))
        raise FileNotFoundError(f"no result {path.stem!r} in {relative(path.parent)}; there are {there}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{relative(path)} is not JSON ({error}): restore it or run again") from error
    _validate(record, relative(path))
    return record


def provenance() -> dict[str, Any]:
    """Commit, whether the tree was altered, date (UTC), versions and hardware. No host name, no path."""
    commit, dirty = _git_state()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit, "dirty": dirty, "date": date, "versions": versions(), "hardware": hardware()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, where they are installed."""
    found = {"python": platform.python_version()}
    for package in (
        "bilevel-core",
        "torch",
        "numpy",
        "scipy",
        "diffusers",
        "transformers",
        "torchmetrics",
        "torchvision",
        "scikit-learn",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)
    return found


def hardware() -> dict[str, Any]:
    """Platform, processor, cores, torch threads, memory in GiB and GPU (None without one)."""
    cpu, memory = platform.processor() or platform.machine(), None
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = models[0] if models else cpu
    except OSError:
        pass
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        pass
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_state() -> tuple[str | None, bool | None]:
    """Commit, and whether the tree was altered: by BILEVEL_COMMIT (40 digits, perhaps "-dirty") for a copy, or git."""
    given = re.fullmatch(r"([0-9a-f]{40})(-dirty)?", os.environ.get("BILEVEL_COMMIT", ""))
    if given:
        return given[1], bool(given[2])
    try:
        root = project_root()
    except FileNotFoundError:
        return None, None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # Results written before this one do not make the code another.
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)book/results")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _validate(record: Any, where: str) -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(RESULT_SCHEMA)
    error = jsonschema.exceptions.best_match(validator.iter_errors(record))
    if error is not None:
        place = ".".join(map(str, error.absolute_path)) or "record"
        raise ValueError(f"{where} is not a valid result: {place}: {error.message}")


def _no_path(value: Any) -> Any:
    """Absolute paths say nothing to a reader and may name a person: keep their last part."""
    is_path = isinstance(value, (str, Path)) and Path(value).is_absolute()
    return f".../{Path(value).name}" if is_path else value
