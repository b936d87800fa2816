"""Atomic files, checkpoints, pieces, and two runs in one folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bilevel_core.lab import files, places, training

REPOSITORY = Path(__file__).resolve().parents[2]


def some_state():
    tensors = {
        "weights": torch.randn(3, 4),
        "transposed": torch.randn(3, 4, dtype=torch.float64).T,
        "half": torch.randn(5).half(),
        "generator": torch.Generator().manual_seed(5).get_state(),
        "step": torch.tensor(7),
    }
    tensors["alias"] = tensors["weights"]
    return tensors, {"losses": [0.1, 1 / 3], "name": "run", "nested": {"k": None}}


def test_state_round_trip_is_exact(tmp_path):
    tensors, meta = some_state()
    path = files.save_state(tmp_path / "new" / "state.safetensors", tensors, meta)
    loaded, loaded_meta = files.load_state(path)
    assert loaded_meta == meta and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_damaged_state_is_an_error_with_a_remedy(tmp_path):
    path = files.save_state(tmp_path / "state.safetensors", *some_state())
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    for bad in (b"", good[: len(good) // 2], bytes(flipped), b"\xff" * 100):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="delete it, the run then starts anew"):
            files.load_state(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        files.load_state(tmp_path / "absent")


KILLED = """
import os, signal, sys, torch
from bilevel_core.lab import files
path, way = sys.argv[1:]
if way == "half-written":  # the worst moment: the new bytes are on disk, but not yet renamed
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
k = 0
while True:
    k += 1
    files.save_state(path, {"x": torch.full((500_000,), float(k))}, {"k": k})
    print(k, flush=True)
"""


@pytest.mark.slow
def test_sigkill_while_saving_leaves_a_whole_file(tmp_path):
    """Two processes do nothing but save, and are killed: what is on disk is a whole state all the same."""
    paths = {way: tmp_path / f"{way}.safetensors" for way in ("half-written", "any-moment")}
    old = torch.zeros(4)
    files.save_state(paths["half-written"], {"x": old}, {"k": 0})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), way], stdout=subprocess.PIPE, text=True, env=environment
        )
        for way, path in paths.items()
    }
    with processes["any-moment"] as process:
        seen = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    tensors, meta = files.load_state(paths["any-moment"])
    assert meta["k"] >= seen[-1]
    assert torch.equal(tensors["x"], torch.full((500_000,), float(meta["k"])))

    with processes["half-written"] as process:
        assert process.wait() == -signal.SIGKILL and process.stdout.read() == ""
    tensors, meta = files.load_state(paths["half-written"])
    assert meta == {"k": 0} and torch.equal(tensors["x"], old)
    files.save_state(paths["half-written"], {"x": torch.ones(4)}, {"k": 3})  # the leftover is overwritten
    assert files.load_state(paths["half-written"])[1] == {"k": 3}
    assert not list(tmp_path.glob(".half-written*"))


HAMMER = """
import sys, time, torch
from bilevel_core.lab import files
end, k = time.time() + 2, 0
while time.time() < end:
    k += 1
    files.save_state(sys.argv[1], {"x": torch.full((20_000,), float(k))}, {"k": k})
"""


def python(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, **options)


@pytest.mark.slow
def test_two_writers_of_one_file_and_a_reader(tmp_path):
    path = files.save_state(tmp_path / "x.safetensors", {"x": torch.zeros(20_000)}, {"k": 0})
    writers = [python(HAMMER, path, stderr=subprocess.PIPE) for _ in range(2)]
    read = 0
    while any(writer.poll() is None for writer in writers):
        tensors, meta = files.load_state(path)  # raises where it is broken
        assert torch.equal(tensors["x"], torch.full((20_000,), float(meta["k"])))
        read += 1
    for writer in writers:
        assert writer.communicate()[1] == "" and writer.returncode == 0
    assert read > 20 and meta["k"] > 10
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_of_temporary_files_are_the_writers_own(tmp_path, monkeypatch):
    """Another's file is neither renamed nor removed while that process lives; a dead one's is removed."""
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(a)), replace(a, b)))
    path = tmp_path / "a[1]*"
    for _ in range(2):
        files.write_atomic(path, b"mine")
    assert renamed[0] != renamed[1] and f".{os.getpid()}." in renamed[0].name
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, dead, far = (
        tmp_path / renamed[0].name.replace(f".{os.getpid()}.", f".{pid}.") for pid in (os.getppid(), gone.pid, 0)
    )
    far = far.with_name(f".{path.name}.00000000.{gone.pid}.ab.tmp")  # on another machine: who knows
    for other in (alive, dead, far):
        other.write_bytes(b"half")
    files.write_atomic(path, b"again")
    assert path.read_bytes() == b"again"
    assert alive.read_bytes() == b"half" and far.exists() and not dead.exists()


def test_a_full_disk_names_path_and_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    path = files.write_atomic(tmp_path / "kept", b"old")
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"kept could not be written \(File too large\): free some space .*is intact"):
            files.write_atomic(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["kept"]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="kept could not be written .No space left on device") as caught:
        files.write_atomic(path, b"new")
    assert caught.value.errno == 28 and [p.name for p in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="below could not be written"):
        files.write_atomic(tmp_path / "file" / "below", b"x")


HOLD = """
import sys, time
from bilevel_core.lab import files
with files.alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
    path = tmp_path / "new" / "x"
    process = python(HOLD, path, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"x is being made by process {process.pid} on .*: wait until"):
                with files.alone(path):
                    raise AssertionError("two at once")
        with files.alone(path.with_name("y")):
            pass
    finally:
        process.kill()
        process.wait()
    assert (path.parent / ".x.lock").exists()  # killed: the file is left, the lock is not
    with files.alone(path), files.alone(path):  # the same process may
        pass
    assert list(path.parent.iterdir()) == []


def test_without_locks_in_the_file_system_nothing_is_locked(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", none)
    with files.alone(tmp_path / "x"):
        pass


class Count:
    """A loop's state that counts."""

    def __init__(self, name="a"):
        self.step, self.name = 0, name

    def tensors(self):
        return {"step": torch.tensor(self.step)}

    def meta(self):
        return {"name": self.name}

    def load(self, tensors, meta):
        if meta["name"] != self.name:
            raise ValueError(f"name: {meta['name']} -> {self.name}")
        self.step = int(tensors["step"])

    def loop(self, steps):
        while self.step < steps:
            self.step += 1
            yield self.step


def test_a_training_is_one_processs_alone(tmp_path):
    path = tmp_path / "count.safetensors"
    process = python(HOLD, path, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "held\n"
        state = Count()
        with pytest.raises(RuntimeError, match="count.safetensors is being made by process"):
            list(training.checkpointed(state.loop(5), state, path, steps=5))
        assert state.step == 0 and not path.exists()
    finally:
        process.kill()
        process.wait()
    assert list(training.checkpointed(state.loop(5), state, path, steps=5)) == [1, 2, 3, 4, 5]
    state = Count()
    assert list(training.checkpointed(state.loop(7), state, path, steps=7)) == [6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["count.safetensors"]
    state = Count("b")
    with pytest.raises(ValueError, match="count.safetensors does not fit this run: name: a -> b; or delete it"):
        list(training.checkpointed(state.loop(7), state, path, steps=7))


def test_a_piece_made_otherwise_says_all_that_there_is_to_know(tmp_path, monkeypatch):
    given = {"study_train_steps": 4, "study_samples": 64, "val_samples": 70, "T": 40, "seed": 4, "trials": 4}
    monkeypatch.setattr(places.RUN, "parameters", given)
    config = {"train_steps": 3, "n": 64, "T": 40, "grids": [5]}
    for seed in range(2):
        files.piece(tmp_path / f"a_{seed}.json", config | {"seed": seed}, lambda: {"x": 1})
        files.kept(tmp_path / f"a_{seed}.safetensors", config | {"seed": seed}, lambda: {"x": torch.zeros(1)})
    assert files.piece(tmp_path / "a_0.json", config | {"seed": 0}, None)["x"] == 1
    (tmp_path / "other.json").write_text("[]")
    for suffix, make in (("json", files.piece), ("safetensors", files.kept)):
        with pytest.raises(ValueError) as caught:
            make(tmp_path / f"a_0.{suffix}", config | {"seed": 0, "train_steps": 4}, None)
        assert str(caught.value) == (
            f"{tmp_path}/a_0.{suffix} was made with other train_steps; delete it or use another work_dir. "
            "train_steps is 3 there and 4 now (parameter study_train_steps). "
            f"So it is with a_1.{suffix}; to compute all anew, delete the folder {tmp_path}."
        )
    with pytest.raises(ValueError, match=r"n is 64 there and 70 now \(parameter val_samples\)"):
        files.piece(tmp_path / "a_0.json", config | {"seed": 0, "n": 70}, None)
    with pytest.raises(ValueError, match=r"grids is \[5\] there and \[6\] now\. So it is with a_1"):
        files.piece(tmp_path / "a_0.json", config | {"seed": 0, "grids": [6]}, None)
    with pytest.raises(ValueError, match="with other old; delete it"):  # what this code no longer has
        files.piece(files.write_atomic(tmp_path / "b.json", b'{"config": {"old": 1}}'), {}, None)
