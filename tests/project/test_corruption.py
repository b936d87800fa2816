"""One flipped byte in any file of tensors that comes with the book is an error that names file and remedy."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from bilevel_core.lab import files
from bilevel_core.lab.models import clip, level_model, networks
from bilevel_core.lab.studies import prompt_rewards, schedule_race, tilted_truth

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = sorted((ROOT / "bilevel_core" / "lab" / "models" / "weights").glob("*.safetensors"))
RESULTS = sorted((ROOT / "book" / "results").glob("*.safetensors"))
LOADERS = {
    "classifier_mnist28": lambda: networks.load_classifier("mnist28"),
    "classifier_mnist8": lambda: networks.load_classifier("mnist8"),
    "clip": clip.load,
    "level_denoiser": level_model.load,
    "text_denoiser": networks.load_text_denoiser,
} | {
    f"features_{name}_{split}": lambda name=name, split=split: networks.reference_features(name, split)
    for name in networks.CLASSIFIERS
    for split in ("train", "val", "test")
}


def places(path: Path) -> list[int]:
    """Of bytes: the length of the header, the header all over, the first and last of the data, and between them."""
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    chance = random.Random(path.name)
    inside = [chance.randrange(9, header) for _ in range(12)] + [chance.randrange(header, size) for _ in range(4)]
    return [0, 7, 8, header - 1, header, size - 1, *inside]


def flipped(path: Path, copy: Path):
    """Writes a copy with one byte changed, for each of `places`, and yields the place."""
    content = bytearray(path.read_bytes())
    for place in places(path):
        content[place] ^= 1
        copy.write_bytes(content)
        content[place] ^= 1
        yield place


def test_every_file_has_a_loader():
    assert {path.stem for path in WEIGHTS} == set(LOADERS) and RESULTS


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights(path, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_weights", lambda: tmp_path)
    cards = {file: card.stem for card in path.parent.glob("*.json") for file in json.loads(card.read_text())["sha256"]}
    name = cards[path.name]
    shutil.copy(path.with_name(f"{name}.json"), tmp_path)
    for place in flipped(path, tmp_path / path.name):
        with pytest.raises(ValueError, match=f"{path.name} was altered .*install the package again"):
            networks.shipped(name, path.name)
            pytest.fail(f"byte {place}")
    with pytest.raises(ValueError, match=f"{path.name} was altered .*install the package again"):
        LOADERS[path.stem]()
    shutil.copy(path, tmp_path)
    LOADERS[path.stem]()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_recorded_tensors(path, tmp_path):
    copy = tmp_path / path.name
    for place in flipped(path, copy):
        with pytest.raises(ValueError, match=f"{path.name} .*restore it with git, if it came with the book"):
            files.load_state(copy)
            pytest.fail(f"byte {place}")
    for restore in (prompt_rewards.restore, schedule_race.restore, tilted_truth.restore):
        with pytest.raises(ValueError, match=f"{path.name} was altered"):
            restore(copy)


def test_every_byte_of_a_small_checkpoint(tmp_path):
    """Also of `meta`, which holds numbers no less than the tensors do."""
    path = files.save_state(tmp_path / "s.safetensors", {"x": torch.arange(3.0)}, {"step": 12, "losses": [0.25, 0.5]})
    content = bytearray(path.read_bytes())
    for place in range(len(content)):
        for bit in (1, 16, 128):
            content[place] ^= bit
            path.write_bytes(content)
            content[place] ^= bit
            with pytest.raises(ValueError, match=r"s\.safetensors .*: delete it, the run then starts anew"):
                files.load_state(path)
                pytest.fail(f"byte {place}, bit {bit}")


def test_files_from_before_the_sum_of_meta_are_read(tmp_path):
    x = {"x": torch.arange(3.0)}
    old = save(x, metadata={"meta": json.dumps({"step": 3}), "sha256": files.digest(x)})
    (tmp_path / "old.safetensors").write_bytes(old)
    assert files.load_state(tmp_path / "old.safetensors")[1] == {"step": 3}
