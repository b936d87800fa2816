"""Runs pieces within a given time: those that fit, in order; each in a process that the clock can end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import data, files, places, results

PACK = 16 * 2**20  # bytes of a file of the pack
TARS = 3  # of them, besides gpu.json


@dataclass(frozen=True)
class Context:
    """What a piece is given: a folder for what it keeps between two starts, its device, and whether sizes are tiny."""

    folder: Path
    device: torch.device
    smoke: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of the plan.

    name      of its file;  run: context -> its result, JSON-able; what it keeps in context.folder it may go on from
    minutes   that it takes by itself on an H100 or H200
    gib       of GPU memory;  needs: data sets that must be at hand;  after: pieces that must be finished first
    alone     it measures time or memory, so that nothing else may run
    busy      share of its time in which the card computes: pieces whose shares are more than one in all slow each
              other down, because a card serves one process at a time
    t4        how many times longer it takes on a T4
    settings  what decides its numbers besides the code
    """

    name: str
    run: Callable[[Context], Mapping[str, Any]]
    minutes: float
    gib: float = 2.0
    needs: Sequence[str] = ()
    after: Sequence[str] = ()
    alone: bool = False
    busy: float = 1.0
    t4: float = 8.0
    settings: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- what is kept


@cache
def code() -> str:
    """A hash of the package's source: pieces of another one are another piece."""
    root, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def identity(piece: Piece, smoke: bool) -> dict[str, Any]:
    """What a finished piece must share with this plan to count."""
    return {"name": piece.name, "smoke": smoke, "settings": json.loads(json.dumps(piece.settings)), "code": code()}


def path_of(folder: Path, name: str) -> Path:
    return folder / "pieces" / f"{name}.json"


def finished(pieces: Sequence[Piece], folder: Path, smoke: bool, keep: bool = False) -> set[str]:
    """Names of the pieces that are there. Raises ValueError where one is of other code or parameters.

    keep  counts those of other code as they are: their own provenance says which commit made them
    """
    there, other = set(), []
    for piece in pieces:
        path = path_of(folder, piece.name)
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it, and this piece is computed again") from error
        wanted = identity(piece, smoke)
        differs = [key for key in wanted if found["config"].get(key) != wanted[key]]
        if not differs or (keep and differs == ["code"]):
            there.add(piece.name)
        else:
            commit = str(found["provenance"]["commit"])[:12]
            other.append(f"{piece.name} (other {', '.join(differs)}; made by commit {commit})")
    if other:
        raise ValueError(
            f"in {folder} are pieces of another plan: {'; '.join(other)}. Nothing was touched: give another folder by "
            "--work, check out that commit, or take pieces of other code as they are by --keep"
        )
    return there


def compute(piece: Piece, context: Context, work: Path, ran: Mapping[str, Any]) -> dict[str, Any]:
    """The piece's result with the provenance of where it ran, kept as a whole."""

    def run() -> dict[str, Any]:
        began = results.provenance()
        return {"provenance": began | dict(ran), "result": piece.run(context)}

    return files.piece(path_of(work, piece.name), identity(piece, context.smoke), run)


# ---------------------------------------------------------------- the machine


def device() -> dict[str, Any] | None:
    """The first GPU: "name", "driver", "total" and "free" GiB; None without one."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        name, driver, total, free = (part.strip() for part in done.stdout.splitlines()[0].split(","))
        return {"name": name, "driver": driver, "total": float(total) / 1024, "free": float(free) / 1024}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        free, total = torch.cuda.mem_get_info()
        sizes = {"total": total / 2**30, "free": free / 2**30}
        return {"name": torch.cuda.get_device_name(), "driver": None} | sizes


def switches() -> dict[str, Any]:
    """Settings of torch that decide the last digits on a GPU."""
    return {
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


# ---------------------------------------------------------------- workers


class Worker:
    """A process that runs the pieces it is told of; the clock ends it."""

    def __init__(self, number: int, arguments: Sequence[str], heard: queue.Queue, log: Path) -> None:
        self.busy: Piece | None = None
        self.since, self.number = 0.0, number
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("ab")
        command = [sys.executable, "-m", "bilevel_core.lab.gpu", "worker", *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, start_new_session=True
        )

        def listen() -> None:
            for line in self.process.stdout:
                heard.put((self, json.loads(line)))
            heard.put((self, None))

        threading.Thread(target=listen, daemon=True).start()

    def start(self, piece: Piece) -> None:
        self.busy, self.since = piece, time.monotonic()
        with contextlib.suppress(OSError):  # of a process that has died: its silence is heard
            print(piece.name, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Kills it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def serve(pieces: Sequence[Piece], context: Context, work: Path, ran: Mapping[str, Any]) -> None:
    """A worker: reads names of pieces from its input, and says of each how it ended."""
    torch.set_num_threads(min(2, torch.get_num_threads()))  # several workers share the cores
    threading.Thread(target=_orphan, args=(os.getppid(),), daemon=True).start()
    say, by_name = os.fdopen(os.dup(1), "w"), {piece.name: piece for piece in pieces}
    os.dup2(2, 1)  # whatever a piece prints goes to the log
    for line in sys.stdin:
        name = line.strip()
        print(f"--- {name}", file=sys.stderr, flush=True)
        try:
            found = compute(by_name[name], context, work, ran)
            said = {"name": name, "ok": True, "said": str(found["result"].get("said", ""))}
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            said = {"name": name, "ok": False, "said": text[:600]}
        print(json.dumps(said), file=say, flush=True)


def _orphan(parent: int) -> None:
    """Ends this worker, with all that it has started, when the run that started it is gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(os.getpgrp(), signal.SIGKILL)


# ---------------------------------------------------------------- the run


def run(
    pieces: Sequence[Piece],
    *,
    minutes: float,
    work: Path,
    out: Path,
    smoke: bool = False,
    lanes: int = 4,
    keep: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Runs what fits into the time, and packs what is there; name -> "kept", "done", "failed", "stopped" or why not.

    A piece is started while its estimate fits into the time that is left; one that outlasts it is killed, and goes on
    from its own checkpoints next time. Raises RuntimeError without a GPU, ValueError as `finished`.
    """
    end, card = time.monotonic() + 60 * minutes, None if smoke else device()
    if card is None and not smoke:
        raise RuntimeError(
            "torch sees no NVIDIA GPU: run this where nvidia-smi lists one, with a torch built for CUDA; "
            "--smoke runs every piece at a tiny size on the CPU, --dry prints the plan"
        )
    there = finished(pieces, work, smoke, keep)
    state = {piece.name: "kept" for piece in pieces if piece.name in there}
    say(f"{card['name']}, driver {card['driver']}, {card['free']:.0f} GiB free" if card else "smoke sizes, on the CPU")
    say(f"{len(pieces)} pieces, {len(state)} of them kept, {minutes:g} minutes")
    pending, workers, heard = [piece for piece in pieces if piece.name not in state], [], queue.Queue()
    for piece in list(pending):
        missing = [name for name in piece.needs if not data.available(name)]
        if missing:
            state[piece.name] = f"left out: no {', '.join(missing)} at hand; name its folder by --data"
        elif card and card["free"] < piece.gib:
            short = piece.gib - card["free"]
            state[piece.name] = (
                f"left out: needs {piece.gib:.1f} GiB, {card['free']:.1f} are free; {short:.1f} are missing"
            )
        if piece.name in state:
            pending.remove(piece)
            say(f"{piece.name:34s} {state[piece.name]}")
    arguments = ["--work", str(work), *(["--smoke"] if smoke else [])]
    number = 0
    try:
        while pending or any(worker.busy for worker in workers):
            left = end - time.monotonic()
            if left <= 0:
                break
            busy = [worker.busy for worker in workers if worker.busy]
            for piece in _startable(pending, state, busy, left, lanes):
                free = [worker for worker in workers if not worker.busy]
                if not free:
                    free = [Worker(number, arguments, heard, work / "logs" / f"{number}.txt")]
                    workers += free
                    number += 1
                free[0].start(piece)
                pending.remove(piece)
            if not any(worker.busy for worker in workers):
                break  # nothing that is left fits
            try:
                worker, message = heard.get(timeout=max(0.05, min(left, 1.0)))
            except queue.Empty:
                continue
            piece = worker.busy
            if message is None or not message["ok"]:
                worker.end()  # a GPU may not recover from an error within the process
                if worker in workers:
                    workers.remove(worker)
            if piece is None:
                continue
            worker.busy = None
            message = message or {"ok": False, "said": f"its process died; see logs/{worker.number}.txt"}
            state[piece.name] = "done" if message["ok"] else "failed"
            took = time.monotonic() - worker.since
            say(f"{piece.name:34s} {state[piece.name]:7s} {took:6.1f} s  {message['said']}")
            pack(work, out, checkpoints=False)
    finally:
        for worker in workers:
            if worker.busy:
                state[worker.busy.name] = "stopped"
                say(f"{worker.busy.name:34s} stopped by the clock; the next call goes on with it")
            worker.end()
        said = pack(work, out)
    late = [piece for piece in pieces if piece.name not in state]
    for piece in late:
        waits = [name for name in piece.after if state.get(name) not in ("kept", "done")]
        state[piece.name] = f"waits for {', '.join(waits)}" if waits else f"no time: wants {60 * piece.minutes:.0f} s"
    if late:
        say(f"not started: {', '.join(piece.name for piece in late)}")
    say(f"{said} in {places.relative(out)}")
    return state


def slowed(pieces: Sequence[Piece]) -> float:
    """How many times longer each takes where these run at a time."""
    return max(1.0, sum(piece.busy for piece in pieces))


def _startable(
    pending: Sequence[Piece], state: Mapping[str, str], busy: Sequence[Piece], left: float, lanes: int
) -> list[Piece]:
    """What to start now: in order, one that must be alone only where nothing runs, others up to `lanes` of them."""
    if any(piece.alone for piece in busy):
        return []
    chosen: list[Piece] = []
    for piece in pending:
        if any(state.get(name) not in ("kept", "done") for name in piece.after):
            continue
        if 60 * piece.minutes * (1 if piece.alone else slowed([*busy, *chosen, piece])) > left:
            continue
        if piece.alone:
            if not busy and not chosen:
                return [piece]
            break  # it waits for its turn, and what comes later waits for it
        if len(busy) + len(chosen) >= lanes:
            break
        chosen.append(piece)
    return chosen


def forecast(pieces: Sequence[Piece], there: set[str], lanes: int) -> dict[str, float]:
    """Minute in which each piece that is not there would end, by the estimates, without the starts of processes."""
    state, ends, now = dict.fromkeys(there, "kept"), {}, 0.0
    pending = [piece for piece in pieces if piece.name not in there]
    running: list[tuple[Piece, float]] = []  # with minutes of its own that are left
    while True:
        for piece in _startable(pending, state, [one for one, _ in running], float("inf"), lanes):
            running.append((piece, piece.minutes))
            pending.remove(piece)
        if not running:
            return ends
        by = min(left for _, left in running)
        now += by * slowed([one for one, _ in running])
        ended = [one.name for one, left in running if left - by < 1e-9]
        running = [(one, left - by) for one, left in running if one.name not in ended]
        ends |= dict.fromkeys(ended, now)
        state |= dict.fromkeys(ended, "done")


def table(pieces: Sequence[Piece], there: set[str], lanes: int, minutes: float) -> str:
    """The plan as text: minutes, memory, what a piece needs, when it would end, and what fits into the time."""
    ends = forecast(pieces, there, lanes)
    lines = [f"{'piece':34s} {'minutes':>7s} {'GiB':>5s}  alone  {'ends':>5s}  needs"]
    for p in pieces:
        needs = ", ".join([*p.needs, *(f"after {name}" for name in p.after)])
        at = "kept" if p.name in there else f"{ends[p.name]:.1f}" if p.name in ends else "–"
        lines.append(f"{p.name:34s} {p.minutes:7.2f} {p.gib:5.1f}  {'yes' if p.alone else '   '}    {at:>5s}  {needs}")
    alone = sum(p.minutes for p in pieces if p.alone and p.name not in there)
    card = sum(p.minutes * p.busy for p in pieces if not p.alone and p.name not in there)
    lines.append(f"{alone:.1f} minutes of pieces that run alone, {card:.1f} of the card for those that share it")
    done = [name for name, end in ends.items() if end <= minutes]
    lines.append(
        f"{lanes} at a time, {len(done)} of {len(ends)} end within {minutes:g} minutes, starts of processes apart"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------- the pack


def pack(work: Path, out: Path, checkpoints: bool = True) -> str:
    """Writes gpu.json with all finished pieces, and what unfinished ones go on from as gpu-1.tar ...; says what.

    Those are one archive, cut where a file of the pack is full; gpu.json holds its SHA-256.
    """
    there = {path.stem: json.loads(path.read_text()) for path in sorted((work / "pieces").glob("*.json"))}
    before = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").is_file() else {}
    said, archive = "", before.get("archive")
    if checkpoints:
        whole, said = _archive(work / "kept")
        for i in range(TARS):
            path, part = out / f"gpu-{i + 1}.tar", whole[i * PACK : (i + 1) * PACK]
            files.write_atomic(path, part) if part else path.unlink(missing_ok=True)
        archive = hashlib.sha256(whole).hexdigest()
    text = json.dumps({"pieces": there, "archive": archive}).encode()
    if len(text) > PACK:
        raise ValueError(f"the pieces take {len(text):,} bytes, more than the {PACK:,} of a file of the pack")
    files.write_atomic(out / "gpu.json", text)
    return f"gpu.json ({len(there)} pieces, {len(text) / 1e6:.1f} MB){said}"


def _archive(kept: Path) -> tuple[bytes, str]:
    """A tar of the files in a folder, as many as the pack has room for, and what is in it in words."""
    found = [path for path in kept.rglob("*") if path.is_file() and not path.name.startswith(".")]
    found.sort(key=lambda path: (path.suffix != ".json", -path.stat().st_mtime))
    buffer, packed = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in found:
            if buffer.tell() + path.stat().st_size + 16384 <= TARS * PACK:  # with its header and the end of the archive
                tar.add(path, arcname=path.relative_to(kept).as_posix())
                packed += 1
    whole = buffer.getvalue() if packed else b""
    said = f", gpu-*.tar ({packed} files, {len(whole) / 1e6:.1f} MB)" if packed else ""
    if packed < len(found):
        said += f"; {len(found) - packed} checkpoints found no room and stay in {places.relative(kept)}"
    return whole, said


def unpack(source: Path, work: Path) -> int:
    """Puts a pack's pieces and checkpoints into the folder of the work, where they are not there yet; how many."""
    if not (source / "gpu.json").is_file():
        raise FileNotFoundError(f"no gpu.json in {source}: name the folder that an earlier call wrote its pack to")
    count, known = 0, json.loads((source / "gpu.json").read_text())
    for name, piece in known["pieces"].items():
        path = path_of(work, name)
        if not path.exists():
            files.write_atomic(path, json.dumps(piece).encode())
            count += 1
    whole = b"".join(path.read_bytes() for path in sorted(source.glob("gpu-*.tar")))
    # Packs that say nothing of their archive are older: several whole ones, with zeros between them.
    if whole and known.get("archive") and hashlib.sha256(whole).hexdigest() != known["archive"]:
        raise ValueError(f"{source}/gpu-*.tar are not those of its gpu.json: fetch all of them again, or none")
    if not whole:
        return count
    with tarfile.open(fileobj=io.BytesIO(whole), ignore_zeros=True) as tar:
        for member in tar:
            target = work / "kept" / member.name
            if ".." in Path(member.name).parts or (work / "kept") not in target.parents:
                raise ValueError(f"{source} holds {member.name!r}, which leaves its folder")
            if member.isfile() and not target.exists():
                files.write_atomic(target, tar.extractfile(member).read())
                count += 1
    return count
