"""Data sets: bundled digits, idx files (good and damaged), splits, sizes."""

import gzip
import hashlib
import sys

import numpy as np
import pytest
import torch

from bilevel_core.lab import data


def idx(array):
    """The bytes of an idx file."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(int(side).to_bytes(4, "big") for side in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small "MNIST" of 60 + 10 random images, whose checksums are made the expected ones."""
    random = np.random.RandomState(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays, checksums = {}, {}
    for part, n in (("train", 60), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = random.randint(0, 256, (n, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = random.randint(0, 10, n)
    for name, array in arrays.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        checksums[name] = hashlib.md5(idx(array)).hexdigest()
    monkeypatch.setattr(data, "CHECKSUMS", {**data.CHECKSUMS, "mnist": checksums})
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    return tmp_path, raw, arrays


def test_digits_are_bundled_and_stratified():
    parts = {split: data.load("digits", split) for split in data.SPLITS}
    assert [len(labels) for _, labels in parts.values()] == [1078, 360, 359]
    for images, labels in parts.values():
        assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert share.min() > 0.09 and share.max() < 0.11
    images = torch.cat([images for images, _ in parts.values()]).flatten(1)
    assert len(images) == 1797 == len(images.unique(dim=0))
    assert torch.equal(data.load("digits", "val")[0], parts["val"][0])


def test_small_mnist_round_trip(small):
    root, _, arrays = small
    train, labels = data.load("mnist", "train", root=root)
    val, val_labels = data.load("mnist", "val", root=root)
    test, test_labels = data.load("mnist", "test", root=root)
    assert train.shape == (50, 1, 28, 28) and val.shape == (10, 1, 28, 28) and test.shape == (10, 1, 28, 28)
    assert train.dtype == torch.float32 and labels.dtype == torch.int64
    expected = torch.as_tensor(arrays["t10k-images-idx3-ubyte"]).float() / 255 * 2 - 1
    torch.testing.assert_close(test[:, 0], expected)
    assert torch.equal(test_labels, torch.as_tensor(arrays["t10k-labels-idx1-ubyte"]))
    # Together train and val are the official training set, each image with its label.
    official = torch.as_tensor(arrays["train-images-idx3-ubyte"]).flatten(1).float() / 127.5 - 1
    seen = torch.cat([train, val]).flatten(1)
    nearest = torch.cdist(seen, official).argmin(1)
    assert sorted(nearest.tolist()) == list(range(60)) and nearest.tolist() != list(range(60))
    official_labels = torch.as_tensor(arrays["train-labels-idx1-ubyte"])
    assert torch.equal(torch.cat([labels, val_labels]), official_labels[nearest])


def test_uncompressed_files_come_first_and_the_environment_gives_the_root(small, monkeypatch):
    root, raw, _ = small
    compressed = raw / "t10k-images-idx3-ubyte.gz"
    compressed.with_suffix("").write_bytes(gzip.decompress(compressed.read_bytes()))
    compressed.write_bytes(b"never read")
    monkeypatch.setenv("BILEVEL_DATA", str(root))
    assert len(data.load("mnist", "test")[0]) == 10


def test_sizes(small):
    root = small[0]
    full = data.load("mnist", "test", root=root)[0]
    padded = data.load("mnist", "test", 32, root)[0]
    assert torch.equal(padded[..., 2:30, 2:30], full)
    assert (padded[..., :2, :] == -1).all() and (padded[..., -2:] == -1).all()
    for size in (16, 8):
        k = 32 // size
        pooled = data.load("mnist", "test", size, root)[0]
        blocks = padded.reshape(10, 1, size, k, size, k).mean((3, 5))
        assert pooled.shape == (10, 1, size, size)
        torch.testing.assert_close(pooled, blocks)


def test_splits_are_fixed():
    """The order is part of every recorded result: it must never change."""
    chosen = data.split_indices(60_000)
    assert len(chosen["train"]) == 50_000 and len(chosen["val"]) == 10_000
    assert len(np.union1d(chosen["train"], chosen["val"])) == 60_000
    assert chosen["train"][:3].tolist() == [3048, 19563, 58303] and chosen["val"][-2:].tolist() == [43567, 2732]


@pytest.mark.parametrize("damage", ["cut gzip", "cut content", "flipped", "not gzip", "empty", "not idx"])
def test_damaged_files_are_named_with_a_remedy(small, damage):
    root, raw, arrays = small
    path = raw / "t10k-images-idx3-ubyte.gz"
    good = path.read_bytes()
    content = bytearray(idx(arrays["t10k-images-idx3-ubyte"]))
    flipped = content.copy()
    flipped[500] ^= 1
    path.write_bytes(
        {
            "cut gzip": good[: len(good) // 2],
            "cut content": gzip.compress(bytes(content[:-7])),
            "flipped": gzip.compress(bytes(flipped)),
            "not gzip": b"<html>404</html>",
            "empty": b"",
            "not idx": gzip.compress(b"hello, this is not it"),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz .*delete it.*BILEVEL_DATA"):
        data.load("mnist", "test", root=root)


def test_missing_file_is_named_with_a_remedy(small, monkeypatch):
    root, raw, _ = small
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz: point BILEVEL_DATA"):
        data.load("mnist", "test", root=root)
    monkeypatch.setenv("BILEVEL_DATA", str(root / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*unset it to download"):
        data.load("fashion", "train")


def test_without_a_root_torchvision_downloads_into_the_work_dir(small, tmp_path, monkeypatch):
    """Simulated: torchvision's class fails as it does without a network, or puts the files there."""
    root, raw, _ = small
    monkeypatch.setenv("BILEVEL_WORK_DIR", str(tmp_path / "work"))
    calls = []

    class Datasets:
        @staticmethod
        def MNIST(folder, download):
            calls.append(folder)
            if len(calls) == 1:
                raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
            target = tmp_path / "work" / "data" / "MNIST" / "raw"
            target.mkdir(parents=True)
            for file in raw.iterdir():
                (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setitem(sys.modules, "torchvision", type("torchvision", (), {"datasets": Datasets}))
    assert not data.available("mnist") and data.available("mnist", root) and data.available("digits")
    with pytest.raises(RuntimeError, match=r"mnist could not be downloaded .*set BILEVEL_DATA"):
        data.load("mnist", "test")
    assert len(data.load("mnist", "test")[0]) == 10
    data.load("mnist", "train")  # is there already
    assert data.available("mnist") and not data.available("fashion")
    assert calls == [str(tmp_path / "work" / "data")] * 2

    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if not installed
    with pytest.raises(RuntimeError, match="needs torchvision, which cannot be imported"):
        data.load("fashion", "test")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="data set 'cifar' is not one of digits, mnist, fashion"):
        data.load("cifar")
    with pytest.raises(ValueError, match="split 'valid' is not one of train, val, test"):
        data.load("digits", "valid")
    with pytest.raises(ValueError, match="size 28 of digits is not one of 8"):
        data.load("digits", size=28)


@pytest.mark.mnist
def test_the_real_mnist():
    images, labels = data.load("mnist", "test")
    assert images.shape == (10_000, 1, 28, 28) and labels[:5].tolist() == [7, 2, 1, 0, 4]
    val, val_labels = data.load("mnist", "val", 8)
    assert val.shape == (10_000, 1, 8, 8) and torch.bincount(val_labels).min() > 850
    # The mean grey of the official training set is 0.1307 (in [0, 1]); padding dilutes it by (28/32)^2.
    assert ((val + 1) / 2).mean().item() / (28 / 32) ** 2 == pytest.approx(0.1307, abs=0.002)
