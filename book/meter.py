"""How much memory the processes of a notebook take."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil


class PeakMemory:
    """Largest resident memory, in bytes, of any process that this one starts while the context is open.

    with PeakMemory() as peak:
        ...                       # starts processes, such as a kernel
    peak.bytes

    A thread looks at them `every` so many seconds. On Linux it reads each one's own record of its peak (VmHWM), so that
    nothing between two looks is lost; elsewhere the size that it has at that moment.
    """

    def __init__(self, every: float = 0.2) -> None:
        self.bytes = 0
        self.every, self._stop, self._known = every, threading.Event(), set()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._known = {child.pid for child in psutil.Process().children(recursive=True)}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        parent = psutil.Process()
        while not self._stop.wait(self.every):
            for child in parent.children(recursive=True):
                if child.pid not in self._known:
                    self.bytes = max(self.bytes, resident(child))


def resident(process: psutil.Process) -> int:
    """Bytes of a process: on Linux the most that it has had, elsewhere what it has; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no /proc; or a process that has ended and has no memory any more
        pass
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
