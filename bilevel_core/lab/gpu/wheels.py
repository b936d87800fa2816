"""The packages that a bare machine with Python 3.12 and its own torch lacks, as wheels to carry there."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .. import places

# Beside torch, torchvision, transformers, accelerate, torchmetrics, scikit-learn and what those bring: what the pieces
# import, and what that imports.
NAMES = (
    "diffusers", "importlib_metadata", "lazy-importer",
    "open_clip_torch", "ftfy", "wcwidth",
    "optuna", "alembic", "Mako", "SQLAlchemy", "colorlog",
    "jsonschema", "jsonschema-specifications", "referencing", "rpds-py",
)  # fmt: skip
IMPORTS = ("diffusers", "open_clip", "optuna", "jsonschema")
COMPILED = ("rpds",)  # of what they import: made for one version of Python, and useless to another
PYTHON = (3, 12)  # that the wheels are for
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 60 * 10**6  # bytes of all of them


def pinned() -> list[str]:
    """NAME==VERSION of each, by constraints.txt."""
    text = (places.project_root() / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    missing = [name for name in NAMES if name not in pins]
    if missing:
        raise ValueError(f"constraints.txt pins no version of {', '.join(missing)}: add them")
    return [f"{name}=={pins[name]}" for name in NAMES]


def main(folder: Path) -> int:
    """Downloads them, lists them with their sizes, and imports them here if this is such a Python; 1 if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    for tag in PLATFORMS:
        command += ["--platform", tag]
    done = subprocess.run([*command, *pinned()], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not fetch the wheels: {done.stderr[-800:]}")
    found = sorted(folder.glob("*.whl"))
    for wheel in found:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    whole = sum(wheel.stat().st_size for wheel in found)
    print(f"{whole / 1e6:7.2f} MB  in all, of {LIMIT / 1e6:.0f} allowed")
    if whole > LIMIT:
        raise ValueError(f"{whole:,} bytes are more than {LIMIT:,}: leave a package out, or carry it otherwise")
    if len(found) != len(NAMES):
        raise ValueError(f"{len(found)} wheels for {len(NAMES)} packages: empty {folder} first")
    for wheel in found:
        if not fits(wheel.name):
            raise ValueError(f"{wheel.name} is not for Python 3.12: delete it, and call this again")
    if _mine() != PYTHON:
        print(f"not imported: this is Python {platform.python_version()}, and the wheels are for 3.12")
        return 0
    return check(found)


def _mine() -> tuple[int, int]:
    return sys.version_info[:2]


def fits(name: str) -> bool:
    """Whether a wheel of this name is for PYTHON: by its tags py3, cp312, or an older one's abi3."""
    *_, python, abi, _platform = name.split("-")
    major, minor = PYTHON
    older = re.fullmatch(rf"cp{major}(\d+)", python)
    return (
        f"py{major}" in python.split(".")
        or python == f"cp{major}{minor}"
        or (older is not None and abi == "abi3" and int(older[1]) <= minor)
    )


def demand() -> None:
    """Raises RuntimeError, with the remedy, where this Python lacks what the pieces import, or has it for another."""
    remedy = "install the wheels that `wheels DIR` fetches (pip install --no-index --no-deps DIR/*.whl), or '.[lab]'"
    absent = [name for name in (*IMPORTS, *COMPILED) if importlib.util.find_spec(name) is None]
    if absent:
        raise RuntimeError(f"{sys.executable} has no {', '.join(absent)}: {remedy}")
    for name in COMPILED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            mine, theirs = platform.python_version(), ".".join(map(str, PYTHON))
            raise RuntimeError(
                f"{name} is there, but not for this Python {mine} ({error}); the wheels are for {theirs}: {remedy}"
            ) from error


def check(wheels: list[Path]) -> int:
    """Imports them from a folder of their own, before all that is installed here."""
    with tempfile.TemporaryDirectory() as place:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
        code = f"import sys; sys.path.insert(0, {place!r})\n"
        code += "".join(f"import {name}; print({name}.__name__, {name}.__file__)\n" for name in IMPORTS)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(done.stdout + done.stderr[-1500:], end="")
    return int(done.returncode != 0)
