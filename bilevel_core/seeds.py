"""Seeds by name: each purpose has a stream of random numbers of its own, which no sum of other seeds can meet."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch


def derive_seed(*parts: str | int) -> int:
    """The seed of the stream that names and numbers stand for, such as derive_seed("x_T", seed, k).

    parts  texts and integers of any size, at least one; their order counts, and 1 is not "1"
    Returns 32 bits of the parts' SHA-256, in 0..2^32 - 1: torch's generator on a CPU keeps no more of a seed, numpy's
    take no more. Different parts give unrelated seeds, equal by chance for one pair in 2^32. Raises TypeError for
    anything else, such as 1.0 or True.
    """
    for part in parts or (None,):
        if isinstance(part, bool) or not isinstance(part, str | Integral):
            raise TypeError(f"a seed is derived from texts and integers, at least one, not from {part!r}")
    text = json.dumps([part if isinstance(part, str) else int(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def check_seed(seed: int) -> int:
    """The seed as it is, if every generator keeps the whole of it: ValueError unless an integer in 0..2^32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed!r} must be an integer in 0..2^32 - 1; derive_seed makes one of any other")
    return int(seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch's global generators, those of the CPU and of `device`, start at the seed; after it they go on.

    For what draws without being handed a generator, such as dropout.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield
