"""Files that are whole or absent: bytes, checkpoints, and the resumable pieces that studies are made of."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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

    Raises ValueError if the file was made with another configuration, naming what differs.
    """
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it to compute this piece again") from error
        if found["config"] != config:
            changed = [k for k in config if found["config"].get(k) != config[k]]
            raise ValueError(f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir")
        return found
    start = time.perf_counter()
    found = {"config": config} | compute()
    found["wall_s"] = round(time.perf_counter() - start, 1)
    write_atomic(path, json.dumps(found).encode())
    return found


def kept(path: Path | None, config: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`piece` for tensors: compute(), or what it gave before if `path` (None: nowhere) holds it, checked and atomic."""
    if path is None or not path.exists():
        tensors = compute()
        if path is not None:
            save_state(path, tensors, config)
        return tensors
    tensors, found = load_state(path)
    changed = [key for key in config if found.get(key) != config[key]]
    if changed:
        raise ValueError(f"{path} was made with other {', '.join(changed)}; delete it or use another work_dir")
    return tensors
