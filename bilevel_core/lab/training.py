"""Resumable loops: a checkpoint every so often, so that a killed run loses little and ends where it would have."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from . import files


class State(Protocol):
    """What a loop carries: `step` so far, and the means to save and restore it bit for bit."""

    step: int

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, under flat names."""

    def meta(self) -> dict[str, Any]:
        """Everything else, ready for JSON."""

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Restores both; ValueError if a parameter of the run differs."""


def checkpointed(
    loop: Iterator, state: State, path: str | Path, *, steps: int, every: int = 100, bar: str | None = None
) -> Iterator:
    """Yields what `loop` yields, from where the checkpoint at `path` left off, saving `state` on the way.

    loop   a generator that advances `state` in place and reads it only once started (as `train_score` does)
    steps  the number of the last step, for the progress bar
    every  steps between checkpoints; one more is written at the end, and when the caller stops early
    bar    title of a progress bar, None for no bar; the book's build shows none
    A run killed at any moment continues with the identical result: checkpoints are replaced as a whole.
    Raises RuntimeError where another process is at it (two would undo each other's steps), and ValueError, naming the
    file, where the checkpoint is damaged or of a run with other parameters.
    """
    from tqdm.auto import tqdm

    path = Path(path)
    with files.alone(path):
        if path.exists():
            tensors, meta = files.load_state(path)
            try:
                state.load(tensors, meta)
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"{path} does not fit this run: {error}; or delete it, to start anew") from error
        saved = state.step
        hidden = bar is None or os.environ.get("BILEVEL_STATIC") == "1"
        progress = tqdm(total=steps, initial=state.step, desc=bar, disable=hidden, mininterval=1)
        try:
            for record in loop:
                if state.step - saved >= every:
                    files.save_state(path, state.tensors(), state.meta())
                    saved = state.step
                progress.update()
                yield record
        finally:
            progress.close()
            if state.step > saved:
                files.save_state(path, state.tensors(), state.meta())
