"""Images and labels: scikit-learn's 8x8 digits (bundled), MNIST and Fashion-MNIST, with fixed splits."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import places

NAMES = ("digits", "mnist", "fashion")
SPLITS = ("train", "val", "test")
SIZES = (28, 32, 16, 8)  # of MNIST and Fashion-MNIST; 32 is padded, 16 and 8 are averages over 2x2 and 4x4 of it
FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}  # as torchvision names them, each with a folder raw/

# MD5 of the *uncompressed* files: the gzip wrapping differs between mirrors, the content must not.
CHECKSUMS = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def load(
    name: str = "digits", split: str = "train", size: int | None = None, root: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Images (n, 1, H, W) float32 in [-1, 1], background -1, and labels (n,) int64 in 0..9.

    name   "digits": 1,797 images 8x8 that come with scikit-learn, for demonstrations (too few for any metric);
           "mnist", "fashion": 60,000 + 10,000 images
    split  mnist, fashion: train 50,000 and val 10,000 of the official training set, in a fixed random order;
           test: the official 10,000. digits: 60, 20 and 20 % of every class
    size   H = W: 8 for digits; 28 (as published, the default), 32 (padded), 16 or 8 (averages) for the others
    root   folder with MNIST/raw or FashionMNIST/raw, files gzipped or not; default: the environment variable
           BILEVEL_DATA, else torchvision downloads into <work_dir>/data
    Raises ValueError for a wrong name, split or size and for a damaged file, FileNotFoundError for a missing one.
    """
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is not one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    sizes = (8,) if name == "digits" else SIZES
    size = sizes[0] if size is None else size
    if size not in sizes:
        raise ValueError(f"size {size!r} of {name} is not one of {', '.join(map(str, sizes))}")
    if name == "digits":
        return _digits(split)

    part = "t10k" if split == "test" else "train"
    folder = _folder(name, root)
    images = _read(folder, f"{part}-images-idx3-ubyte", name)
    labels = _read(folder, f"{part}-labels-idx1-ubyte", name)
    if split != "test":
        chosen = split_indices(len(labels))[split]
        images, labels = images[chosen], labels[chosen]
    x = torch.from_numpy(images).unsqueeze(1).float().div_(127.5).sub_(1)
    return resize(x, size), torch.from_numpy(labels).long()


def resize(x: Tensor, size: int) -> Tensor:
    """28x28 images (n, C, 28, 28) at another of the SIZES: padded by 2 with -1, then averaged over blocks."""
    if size == 28:
        return x
    return functional.avg_pool2d(functional.pad(x, (2, 2, 2, 2), value=-1.0), 32 // size)


def split_indices(n: int) -> dict[str, np.ndarray]:
    """A fixed random order of 0..n-1: the first five sixths are "train", the others "val"."""
    order = np.random.RandomState(0).permutation(n)  # RandomState: its stream is frozen across numpy versions
    return {"train": order[: 5 * n // 6], "val": order[5 * n // 6 :]}


def read_idx(path: Path, md5: str | None = None) -> np.ndarray:
    """The uint8 array of an idx file, gzipped (.gz) or not; checked against the MD5 of its uncompressed bytes.

    Raises FileNotFoundError where there is none, ValueError where it is cut short, altered or of another kind.
    """
    remedy = "delete it and let it be downloaded again, or point BILEVEL_DATA to a good copy"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: point BILEVEL_DATA to a folder with it, or unset it to download")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or corrupt ({error}): {remedy}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an idx file of bytes: {remedy}")
    shape = tuple(int(side) for side in np.frombuffer(data, ">u4", count=data[3], offset=4))
    start = 4 + 4 * len(shape)
    if len(data) != start + math.prod(shape):
        raise ValueError(f"{path} holds {len(data) - start} values where its header {shape} says otherwise: {remedy}")
    if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is corrupt (MD5 of its uncompressed bytes is not {md5}): {remedy}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it


def _read(folder: Path, file: str, name: str) -> np.ndarray:
    path = folder / file
    return read_idx(path if path.exists() else path.with_name(f"{file}.gz"), CHECKSUMS[name][file])


def available(name: str, root: str | Path | None = None) -> bool:
    """True where `load` needs no download: the files lie in `root`, BILEVEL_DATA or <work_dir>/data (unchecked)."""
    if name == "digits":
        return True
    given = root or os.environ.get("BILEVEL_DATA") or places.work_dir() / "data"
    return _complete(name, places.expand(given, "root" if root else "BILEVEL_DATA") / FOLDERS[name] / "raw")


def _complete(name: str, folder: Path) -> bool:
    return all((folder / file).exists() or (folder / f"{file}.gz").exists() for file in CHECKSUMS[name])


def _folder(name: str, root: str | Path | None) -> Path:
    """The folder raw/ of a data set; without a root it is downloaded first, where it is not there already."""
    given = root or os.environ.get("BILEVEL_DATA")
    given_as = "root" if root else "BILEVEL_DATA"
    folder = places.expand(given or places.work_dir() / "data", given_as) / FOLDERS[name] / "raw"
    if not given and not _complete(name, folder):
        _download(name, folder.parents[1])
    return folder


def _download(name: str, root: Path) -> None:
    remedy = f"copy the four files into {root / FOLDERS[name] / 'raw'}, or set BILEVEL_DATA to a folder that has them"
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(
            f"{name} must be downloaded, and that needs torchvision, which cannot be imported ({error}): "
            f"install the version that fits your torch; or {remedy}"
        ) from error
    try:
        getattr(datasets, FOLDERS[name])(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{name} could not be downloaded ({error}): try again with a network; or {remedy}"
        ) from error


def _digits(split: str) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    random = np.random.RandomState(0)
    chosen = []
    for digit in range(10):
        members = random.permutation(np.flatnonzero(bunch.target == digit))
        cuts = np.array([0.6, 0.8]) * len(members)
        chosen.append(np.split(members, cuts.round().astype(int))[SPLITS.index(split)])
    order = random.permutation(np.concatenate(chosen))
    x = torch.from_numpy(bunch.images[order]).unsqueeze(1).float().div_(8).sub_(1)
    return x, torch.from_numpy(bunch.target[order]).long()
