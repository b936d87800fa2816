"""Captions for MNIST such as "a bold seven leaning right": measured attributes, words, and their token ids."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import pixels

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THICKNESS = ("thin", "medium", "bold")
SLANT = ("leaning left", "standing upright", "leaning right")
ABSENT = -1  # an attribute that a caption does not mention

# Every word once, in the order of its first use; "<end>" has the largest id, where open_clip's text tower looks for it.
WORDS = ("<pad>", "<start>", "a", *DIGITS, *THICKNESS, *dict.fromkeys(" ".join(SLANT).split()), "<end>")
CONTEXT = 8  # tokens of a caption: <start>, up to five words, <end>, padding

# Terciles over the training split within each digit, so that "bold" means bold for a one, and every combination of
# words is about equally frequent: (lower, upper) for digits 0..9. `measure_terciles` computes them.
THICKNESS_TERCILES = (
    (2.481, 3.073),
    (2.241, 2.728),
    (2.362, 2.899),
    (2.236, 2.685),
    (2.189, 2.662),
    (2.09, 2.507),
    (2.297, 2.837),
    (2.24, 2.709),
    (2.262, 2.751),
    (2.178, 2.624),
)
SLANT_TERCILES = (
    (0.118, 0.31),
    (0.083, 0.354),
    (-0.021, 0.206),
    (-0.047, 0.161),
    (-0.079, 0.191),
    (0.066, 0.352),
    (-0.069, 0.122),
    (-0.079, 0.145),
    (0.065, 0.288),
    (-0.111, 0.112),
)


def thickness(images: Tensor) -> Tensor:
    """Stroke width in pixels, (n,), of images (n, 1, H, W) in [-1, 1]: twice the ink over the length of its edge.

    A stroke of length L and width w has the ink L w and the edge 2 L, and the edge of a grey image is its total
    variation. Differentiable; 0 for an empty image.
    """
    ink = (pixels.checked(images, 1)[:, 0] + 1) / 2
    p = functional.pad(ink, (1, 1, 1, 1))
    right, below = p[:, :, 1:] - p[:, :, :-1], p[:, 1:] - p[:, :-1]
    square = ((right[:, 1:] + right[:, :-1]) / 2).square() + ((below[:, :, 1:] + below[:, :, :-1]) / 2).square()
    return 2 * ink.sum((1, 2)) / (square + 1e-12).sqrt().sum((1, 2))


def slant(images: Tensor) -> Tensor:
    """Pixels that the digit leans to the right per pixel of height, (n,), of images (n, 1, H, W) in [-1, 1].

    The slope of the regression of column on height, weighted by the ink: what deskewing undoes. Differentiable; 0 for
    an empty image.
    """
    images = pixels.checked(images, 1)
    ink = (images[:, 0].double() + 1) / 2 + 1e-9
    ink = ink / ink.sum((1, 2), keepdim=True)
    height = -torch.arange(ink.shape[1], dtype=ink.dtype, device=ink.device)[:, None]
    column = torch.arange(ink.shape[2], dtype=ink.dtype, device=ink.device)
    height = height - (ink * height).sum((1, 2), keepdim=True)
    column = column - (ink * column).sum((1, 2), keepdim=True)
    return ((ink * height * column).sum((1, 2)) / (ink * height.square()).sum((1, 2))).to(images.dtype)


def attributes(images: Tensor, digits: Tensor) -> Tensor:
    """(n, 3) int64: digit, index into THICKNESS and index into SLANT of images (n, 1, 28, 28) of known digits (n,)."""
    images, columns = pixels.checked(images, 1, side=28), [digits]
    for measure, terciles in ((thickness, THICKNESS_TERCILES), (slant, SLANT_TERCILES)):
        bounds = torch.tensor(terciles, dtype=images.dtype, device=images.device)[digits]
        columns.append((measure(images)[:, None] > bounds).sum(1))
    return torch.stack(columns, 1)


def measure_terciles(images: Tensor, digits: Tensor) -> tuple[list, list]:
    """THICKNESS_TERCILES and SLANT_TERCILES from images (n, 1, 28, 28) with digits (n,), to three decimals."""
    levels = torch.tensor([1 / 3, 2 / 3])
    found = []
    for measure in (thickness, slant):
        values = measure(images)
        found.append([[round(v, 3) for v in values[digits == d].quantile(levels).tolist()] for d in range(10)])
    return found[0], found[1]


def caption(digit: int, thickness: int = ABSENT, slant: int = ABSENT) -> str:
    """The caption of attribute indices, for example caption(7, 2, 2) = "a bold seven leaning right"."""
    words = ["a", THICKNESS[thickness] if thickness != ABSENT else "", DIGITS[digit]]
    return " ".join(filter(None, [*words, SLANT[slant] if slant != ABSENT else ""]))


CAPTIONS = {
    caption(d, w, s): (d, w, s)
    for d, w, s in itertools.product(range(10), (ABSENT, *range(len(THICKNESS))), (ABSENT, *range(len(SLANT))))
}
"""Every caption with the attributes that it asks for: 160, of which 90 mention all three."""


def parse(prompt: str) -> tuple[int, int, int]:
    """(digit, thickness, slant) that a prompt asks for, ABSENT where it is silent; case and spaces do not matter.

    Raises ValueError for a word outside the vocabulary, with a suggestion, and for an order that is no caption.
    """
    words = prompt.lower().split()
    for word in words:
        if word not in WORDS[2:-1]:
            close = difflib.get_close_matches(word, WORDS[2:-1], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(WORDS[2:-1])}"
            raise ValueError(f"the prompt {prompt!r} has an unknown word {word!r}: {hint}")
    text = " ".join(words)
    if text not in CAPTIONS:
        close = difflib.get_close_matches(text, CAPTIONS, n=1, cutoff=0)
        raise ValueError(f"the prompt {prompt!r} is no caption of the form 'a bold seven leaning right': {close[0]!r}?")
    return CAPTIONS[text]


def encode(prompts: Sequence[str]) -> Tensor:
    """Token ids (n, CONTEXT) int64 of captions; the empty one, "", is what classifier-free guidance pushes away from.

    Raises ValueError as `parse` does.
    """
    for prompt in prompts:
        if prompt:
            parse(prompt)
    rows = [["<start>", *prompt.lower().split(), "<end>"] for prompt in prompts]
    return torch.tensor([[WORDS.index(word) for word in row] + [0] * (CONTEXT - len(row)) for row in rows])


def fits(wanted: Tensor, found: Tensor) -> Tensor:
    """Whether captions (..., 3) are true of images with attributes (..., 3): every attribute mentioned agrees."""
    return ((wanted == ABSENT) | (wanted == found)).all(-1)


class CaptionSampler:
    """Random captions for training: all attributes, some of them, or none at all.

    found     (n, 3) attributes of the images
    drop      probability of leaving out thickness, and of leaving out slant
    drop_all  probability of the empty caption, which trains the unconditional model
    """

    def __init__(self, found: Tensor, drop: float = 0.2, drop_all: float = 0.0) -> None:
        for name, value in (("drop", drop), ("drop_all", drop_all)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value} is not a probability")
        self.found, self.drop, self.drop_all = found, drop, drop_all
        self.table = torch.zeros(11, 4, 4, CONTEXT, dtype=torch.int64, device=found.device)  # -1 is the last index
        for text, place in CAPTIONS.items():
            self.table[place] = encode([text])[0].to(found.device)
        self.table[ABSENT] = encode([""])[0].to(found.device)

    def wanted(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3) attributes that random captions of the images `rows` (B,) mention."""
        wanted = self.found[rows].clone()
        random = torch.rand(len(rows), 3, generator=generator, device=self.found.device)
        wanted[:, 1:][random[:, 1:] < self.drop] = ABSENT
        wanted[random[:, 0] < self.drop_all] = ABSENT
        return wanted

    def ids(self, wanted: Tensor) -> Tensor:
        """Token ids (B, CONTEXT) of captions that mention `wanted` (B, 3)."""
        return self.table[tuple(wanted.T)]

    def __call__(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Token ids (B, CONTEXT) of random captions of the images `rows` (B,)."""
        return self.ids(self.wanted(rows, generator))
