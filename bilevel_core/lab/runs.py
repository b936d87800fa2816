"""Parameters and profiles, devices, atomic files, checkpoints, and results with their provenance."""

from __future__ import annotations

import ast
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# In rising order: smoke checks the code, quick is live in the book, recorded takes up to hours on two cores and is
# committed under book/results, full wants a GPU. A chapter without a recorded study has no such profile.
PROFILES = ("smoke", "quick", "recorded", "full")
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


# ---------------------------------------------------------------- places


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


# ---------------------------------------------------------------- parameters and profiles


def parameters(notebook: str, scope: Mapping[str, Any], **rules: Any) -> SimpleNamespace:
    """Check a notebook's parameters, expand its profile, print and return them.

    notebook  its name without .ipynb; the profiles are notebooks/profiles/<profile>/<notebook>.yaml
    scope     the notebook's `globals()`
    rules     one per parameter (PROFILE needs none): a tuple of allowed strings; an inclusive range (lo, hi)
              with None for an open end (whole numbers only, if the quick value and the ends are); a type;
              a function that returns an error text or None; or [rule] for a non-empty list of such values

    A parameter that still has its quick value takes the value of the profile named by PROFILE, unless
    papermill passed it; what is set otherwise wins. Raises ValueError that names the parameter, its value and
    what is allowed; an unknown name in the `parameters` cell or among papermill's gets a suggestion.
    """
    names = ("PROFILE", *rules)
    cell, passed = _assignments(scope.get("In", ()))
    for where, assigned in (("passed by papermill", passed), ("in the parameters cell", cell)):
        for name in assigned:
            if name not in names:
                raise ValueError(f"unknown parameter {name!r} {where}{_suggest(name, names)}")
    missing = [name for name in names if name not in scope]
    if missing:
        raise ValueError(f"parameter {missing[0]!r} of {notebook} has no value: define it in the parameters cell")

    profile = _check("PROFILE", scope["PROFILE"], PROFILES)
    quick, chosen = _profile(notebook, "quick", names), _profile(notebook, profile, names)
    values = {"PROFILE": profile}
    for name, rule in rules.items():
        value = scope[name]
        untouched = name in quick and _same(value, quick[name]) and name not in passed
        if untouched and name in chosen:
            value = chosen[name]
        values[name] = _check(name, value, rule, quick.get(name, value))
    shown = ", ".join(f"{name} = {value!r}" for name, value in values.items() if name != "PROFILE")
    print(f"{notebook}, profile {profile}: {shown}")
    return SimpleNamespace(**values)


def read_profile(notebook: str, profile: str) -> dict[str, Any]:
    """The values in notebooks/profiles/<profile>/<notebook>.yaml; errors name the file."""
    import yaml

    path = project_root() / "notebooks" / "profiles" / profile / f"{notebook}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no profile file {_relative(path)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{_relative(path)} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or values.get("PROFILE") != profile:
        raise ValueError(f"{_relative(path)} must be a YAML mapping with PROFILE: {profile}")
    return values


def literals(source: str) -> dict[str, Any] | None:
    """The assignments `name = literal` of a cell; None where the cell contains anything else."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return None
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            target = node.target
        if not isinstance(target, ast.Name):
            return None
        try:
            found[target.id] = ast.literal_eval(node.value)
        except ValueError:
            # papermill writes nan and inf as float('nan'), float('inf')
            value = re.fullmatch(r"float\(['\"]([-+\w]+)['\"]\)", ast.unparse(node.value))
            if value is None:
                return None
            found[target.id] = float(value[1])
    return found


def is_batch() -> bool:
    """True where no one can move a slider: the book's build (BILEVEL_STATIC=1), or a papermill run."""
    if os.environ.get("BILEVEL_STATIC") == "1":
        return True
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and any(_is_injected(source) for source in shell.user_ns.get("In", ()))


def _is_injected(source: str) -> bool:
    return source.lstrip().startswith("# Parameters\n") and literals(source) is not None


def _assignments(cells: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the last parameters cell assigns, and what papermill's cell after it does."""
    cell: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for source in cells:
        found = literals(source) or {}
        if _is_injected(source):
            passed = found
        elif "PROFILE" in found:
            # Run again by hand after papermill's cell: that one no longer speaks.
            cell, passed = found, {}
    return cell, passed


def _profile(notebook: str, profile: str, names: Sequence[str]) -> dict[str, Any]:
    values = read_profile(notebook, profile)
    for name in values:
        if name not in names:
            file = f"notebooks/profiles/{profile}/{notebook}.yaml"
            raise ValueError(f"unknown parameter {name!r} in {file}{_suggest(name, names)}")
    return values


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=1, cutoff=0.5)
    hint = [known for known in names if close and known.lower() == close[0]]
    return f": did you mean {hint[0]!r}?" if hint else f"; known are {', '.join(names)}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _check(name: str, value: Any, rule: Any, quick: Any = None) -> Any:
    """`value` if it obeys `rule` (an int made float where the parameter is a float), else ValueError."""

    def wrong(allowed: str) -> ValueError:
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
            hint = f" (YAML reads {value} as text: write {float(value)!r} or, say, 1.0e-3)"
        return ValueError(f"parameter {name} = {value!r} is not allowed: it must be {allowed}{hint}")

    if isinstance(rule, list):
        if not isinstance(value, (list, tuple)) or not value:
            raise wrong("a list with at least one entry")
        samples = quick if isinstance(quick, (list, tuple)) and quick else value
        whole = next((q for q in samples if isinstance(q, float)), samples[0])
        return [_check(f"{name}[{i}]", entry, rule[0], whole) for i, entry in enumerate(value)]
    if isinstance(rule, tuple) and all(isinstance(entry, str) for entry in rule):
        if value not in rule:
            raise wrong("one of " + ", ".join(map(repr, rule)))
        return value
    if isinstance(rule, tuple):
        lo, hi = rule
        whole = all(isinstance(x, int) for x in (lo, hi, quick) if x is not None)
        bounds = " and ".join(
            f"{word} {bound}" for word, bound in (("at least", lo), ("at most", hi)) if bound is not None
        )
        allowed = f"a {'whole' if whole else 'finite'} number" + (f", {bounds}" if bounds else "")
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise wrong(allowed)
        if (lo is not None and value < lo) or (hi is not None and value > hi):
            raise wrong(allowed)
        return value if whole else float(value)
    if isinstance(rule, type):
        if rule is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, rule) or (isinstance(value, bool) and rule is not bool):
            raise wrong(f"of type {rule.__name__}")
        return value
    if isinstance(rule, Callable):
        complaint = rule(value)
        if complaint:
            raise wrong(f"otherwise: {complaint}")
        return value
    raise TypeError(f"rule of parameter {name}: {rule!r} is not a tuple, type, function or [rule]")


# ---------------------------------------------------------------- devices


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" is the first of cuda, mps and cpu that is there.

    Raises ValueError for an unknown name and RuntimeError where the device asked for is not there.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"device = {name!r} is not one of 'auto', 'cpu', 'mps', 'cuda', 'cuda:<number>'")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device = {name!r}, but torch sees no NVIDIA GPU: set device = 'auto' or 'cpu', or attach one "
            "(in Colab: Runtime > Change runtime type > GPU; elsewhere check nvidia-smi)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device = {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type == "mps" and not has_mps:
        raise RuntimeError("device = 'mps', but torch sees no Apple GPU: set device = 'auto' or 'cpu'")
    return device


# ---------------------------------------------------------------- files that are whole or absent


def write_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` so that `path` holds the old bytes or the new ones, never a part, whenever it is killed.

    A temporary neighbour is written, flushed to the disk and renamed. One writer per path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    try:  # the rename itself; some mounted drives cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return path
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)
    return path


def save_state(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
    """Checkpoint: one safetensors file, with `meta` (JSON-able) and checksums of both in its header; atomic.

    Tensors are copied to the CPU and come back bit for bit (generator states too: they are uint8 tensors).
    """
    from safetensors.torch import save

    flat = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(meta), default=_plain)
    header = {"meta": text, "sha256": _digest(flat), "meta_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return write_atomic(path, save(flat, metadata=header))


def load_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`(tensors, meta)` of a file written by `save_state`, on the CPU.

    Raises FileNotFoundError, or ValueError with a remedy where it is cut short, altered or of another kind.
    """
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    data = path.read_bytes()
    remedy = "delete it, the run then starts anew (or restore it with git, if it came with the book)"
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        text, sums = header.pop("meta"), {"sha256": _digest(tensors)}
        if len(header) > 1:  # older files have no sum of `meta`
            sums["meta_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        meta, good = json.loads(text), header == sums
    except Exception as error:  # safetensors has its own error type, and a broken header can raise many
        raise ValueError(f"checkpoint {path} cannot be read ({error}): {remedy}") from error
    if not good:
        raise ValueError(f"checkpoint {path} was altered (its checksum differs): {remedy}")
    return tensors, meta


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- results


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
) -> Path:
    """Record a result as book/results/<name>.json, with its provenance: atomic, checked by RESULT_SCHEMA.

    tier      "smoke", "quick", "recorded" or "full"; a result is never replaced by one of a lower tier
    data      JSON-able numbers; tensors and arrays become lists; NaN and infinity are refused
    P         the resolved parameters (what `parameters` returned)
    seeds     every seed used
    cost      cost units (one image through one network forward = 1), or {"units": ..., "calls": ...}
    wall_s    seconds
    protocol  how it was measured: n, reference size, split, batch sizes, ...
    directory elsewhere than book/results; default the environment variable BILEVEL_RESULTS, which a sweep sets
    Returns the path. Raises ValueError where the record is not valid.
    """
    values = dict(P) if isinstance(P, Mapping) else vars(P)
    record = {
        "schema": SCHEMA_NAME,
        "name": name,
        "tier": tier,
        "data": data,
        "protocol": protocol,
        "provenance": provenance()
        | {
            "parameters": {key: _no_path(value) for key, value in values.items()},
            "seeds": [seeds] if isinstance(seeds, int) else list(seeds),
            "wall_s": round(float(wall_s), 3),
            "cost": {"calls": None, **cost} if isinstance(cost, Mapping) else {"units": cost, "calls": None},
        },
    }
    try:
        text = json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise ValueError(f"result {name!r} contains NaN or infinity, which JSON has not: {error}") from error
    _validate(json.loads(text), f"result {name!r}")
    path = _results(directory) / f"{name}.json"
    if path.exists():
        old = read_result(name, directory=directory)["tier"]
        if TIERS.index(old) > TIERS.index(tier):
            raise ValueError(f"{_relative(path)} holds a {old} result: a {tier} one must not replace it")
    return write_atomic(path, text.encode())


def read_result(name: str, directory: str | Path | None = None) -> dict[str, Any]:
    """The record book/results/<name>.json; FileNotFoundError or ValueError (not JSON, not of the schema)."""
    path = _results(directory) / f"{name}.json"
    if not path.is_file() and directory is None and "BILEVEL_RESULTS" in os.environ:  # a sweep reads the book's too
        path = project_root() / "book" / "results" / path.name
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.json"))
        raise FileNotFoundError(f"no result {name!r} in {_relative(path.parent)}; there are {there}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_relative(path)} is not JSON ({error}): restore it or run again") from error
    _validate(record, _relative(path))
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


def _results(directory: str | Path | None) -> Path:
    directory = directory or os.environ.get("BILEVEL_RESULTS")
    return Path(directory) if directory else project_root() / "book" / "results"


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(project_root()))
    except (ValueError, FileNotFoundError):
        return str(path)


def _no_path(value: Any) -> Any:
    """Absolute paths say nothing to a reader and may name a person: keep their last part."""
    is_path = isinstance(value, (str, Path)) and Path(value).is_absolute()
    return f".../{Path(value).name}" if is_path else value


def _plain(value: Any) -> Any:
    """For json.dumps: tensors, arrays and scalars of numpy and torch as Python numbers and lists."""
    if hasattr(value, "detach"):
        value = value.detach()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON-able: {value!r}")
