"""Files that are whole or absent: bytes, checkpoints, and the resumable pieces that studies are made of."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import places


def write_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` so that `path` holds the old bytes or the new ones, never a part, whenever it is killed.

    A temporary neighbour is written, flushed to the disk and renamed. Its name is this writer's own, so two that write
    to one path do not disturb each other: the last wins. Neighbours that killed processes left behind are removed.
    Raises OSError (a full disk, no permission) with path and remedy; nothing partial stays.
    """
    path = Path(path)
    machine = _machine()
    temporary = path.with_name(f".{path.name}.{machine}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror or error}): free some space there, or choose another, "
            "writable folder; what it held before is intact, and the run can be started again",
        ) from error
    for left in path.parent.glob(f".{glob.escape(path.name)}.{machine}.*.tmp"):
        if _is_dead(left.name.split(".")[-3]):
            with contextlib.suppress(OSError):
                left.unlink()
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


def _machine() -> str:
    """Eight letters for where a process number means something: the machine, and on Linux the container in it."""
    where = platform.node()
    with contextlib.suppress(OSError):
        where += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def _is_dead(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return True
    except OSError:
        pass  # another user's
    return False


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Keeps other processes from what is made at `path` for as long as the context lasts, by a lock beside it.

    The lock is the kernel's: it ends with its process, however that ends, and holds across machines where the file
    system has such locks; where it has none, nothing is locked. The same process may take it again.
    Raises RuntimeError at once, naming the other process, where it is held.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RuntimeError(
                f"{path} is being made by {holder}: wait until it has ended, and start again to use what it made; or "
                "choose another work_dir"
            ) from None
        except OSError:
            pass  # this file system has no locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close()  # its last holder removed it just now
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def save_state(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
    """Checkpoint: one safetensors file, with `meta` (JSON-able) and checksums of both in its header; atomic.

    Tensors are copied to the CPU and come back bit for bit (generator states too: they are uint8 tensors).
    """
    from safetensors.torch import save

    flat = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(meta), default=plain)
    header = {"meta": text, "sha256": digest(flat), "meta_sha256": hashlib.sha256(text.encode()).hexdigest()}
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
        text, sums = header.pop("meta"), {"sha256": digest(tensors)}
        if len(header) > 1:  # older files have no sum of `meta`
            sums["meta_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        meta, good = json.loads(text), header == sums
    except Exception as error:  # safetensors has its own error type, and a broken header can raise many
        raise ValueError(f"checkpoint {path} cannot be read ({error}): {remedy}") from error
    if not good:
        raise ValueError(f"checkpoint {path} was altered (its checksum differs): {remedy}")
    return tensors, meta


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """For json.dumps: tensors, arrays and scalars of numpy and torch as Python numbers and lists."""
    if hasattr(value, "detach"):
        value = value.detach()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON-able: {value!r}")


def piece(path: Path, config: dict, compute: Callable[[], dict]) -> dict:
    """compute(), or what it gave before if `path` holds it; written atomically with its configuration.

    Raises ValueError if the file was made with another configuration, naming what differs, the notebook's parameter
    behind it and the other files that it concerns.
    """
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it to compute this piece again") from error
        if found["config"] != config:
            raise ValueError(_made_otherwise(path, found["config"], config))
        return found
    start = time.perf_counter()
    found = {"config": config} | compute()
    found["wall_s"] = round(time.perf_counter() - start, 1)
    write_atomic(path, json.dumps(found).encode())
    return found


def begun(path: Path, config: dict) -> list[dict]:
    """The rows that an interrupted piece has left at `path`, as {"config": ..., "rows": ...}; none if there is no file.

    Raises ValueError as `piece`.
    """
    if not path.exists():
        return []
    return piece(path, config, dict)["rows"]


def kept(path: Path | None, config: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`piece` for tensors: compute(), or what it gave before if `path` (None: nowhere) holds it, checked and atomic."""
    if path is None or not path.exists():
        tensors = compute()
        if path is not None:
            save_state(path, tensors, config)
        return tensors
    tensors, found = load_state(path)
    if any(found.get(key) != config[key] for key in config):
        raise ValueError(_made_otherwise(path, found, config))
    return tensors


def _made_otherwise(path: Path, found: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What to say of a file that was made with `found` where `config` is wanted."""
    none = object()
    changed = [key for key in {**config, **found} if found.get(key, none) != config.get(key, none)]
    said = [f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir."]
    for key in changed:
        names = _parameters(key, config.get(key))
        behind = f" (parameter {' or '.join(names)})" if names else ""
        said.append(f"{key} is {_short(found.get(key))} there and {_short(config.get(key))} now{behind}.")
    others = []
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        made = _config_of(other) if other != path else {}
        if any(key in made and made[key] != config.get(key, none) for key in changed if key != "seed"):
            others.append(other.name)
    if others:
        listed = ", ".join(others[:5]) + f" and {len(others) - 5} more" * (len(others) > 5)
        said.append(f"So it is with {listed}; to compute all anew, delete the folder {path.parent}.")
    return " ".join(said)


def _parameters(key: str, value: Any) -> list[str]:
    """The notebook's parameters that a value of a configuration comes from, by value and name; n means samples."""
    known = places.RUN.parameters
    same = [name for name, given in known.items() if type(given) is type(value) and given == value]
    word = "samples" if key == "n" or key.startswith("n_") else key
    return [name for name in same if f"_{name}".endswith(f"_{word}")] or (same if len(same) == 1 else [])


def _config_of(path: Path) -> dict[str, Any]:
    """The configuration in a file of `piece` or `kept`; empty where there is none."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text())["config"])
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return dict(json.loads(json.loads(file.read(min(size, 10**7)))["__metadata__"]["meta"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
