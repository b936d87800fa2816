"""The packages that a bare machine with Python 3.12 and its own torch lacks, as wheels to carry there."""

from __future__ import annotations

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
    for platform in PLATFORMS:
        command += ["--platform", platform]
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
    if sys.version_info[:2] != (3, 12):
        print(f"not imported: this is Python {sys.version.split()[0]}, and the wheels are for 3.12")
        return 0
    return check(found)


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
