"""What an explorer is made of: sliders, choices, panels, lines and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# role: (colour on light, colour on dark, dash pattern, width). Colours after Okabe and Ito, told apart by the
# colour-blind; the dashes tell the lines apart without any colour.
ROLES: dict[str, tuple[str, str, str, float]] = {
    "base": ("#6b7480", "#98a3b0", "2 4", 2.0),
    "star": ("#0067a8", "#5ab8f0", "", 2.2),
    "gamma": ("#c24e00", "#ff9d5c", "8 4", 2.2),
    "reward": ("#00795c", "#35cfa0", "9 3 2 3", 1.8),
    "marker": ("#1f2328", "#f0f3f6", "3 3", 1.3),
    "zero": ("#8b949e", "#7d8590", "", 1.0),
}
SHAPES = ("line", "area", "points", "vline", "hline")


@dataclass(frozen=True)
class Slider:
    """One number. `label` may hold _{...} and ^{...}; `hint` is a word or two beside it.

    step    distance of neighbouring values of a linear slider
    log     values per decade of a logarithmic one (its values are rounded to two digits: 1, 1.1, 1.3, ...)
    format  ".2f" decimals or ".3g" significant digits
    names   what is shown in place of each of its values
    """

    name: str
    label: str
    min: float
    max: float
    value: float
    step: float = 0.01
    log: int = 0
    format: str = ".2f"
    hint: str = ""
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.grid()):
            raise ValueError(f"slider {self.name}: {len(self.names)} names for {len(self.grid())} values")
        if not self.min < self.max or not self.min <= self.value <= self.max:
            raise ValueError(f"slider {self.name}: need min < max and min <= value <= max, got {self}")
        if self.log and self.min <= 0:
            raise ValueError(f"slider {self.name}: a logarithmic slider needs min > 0, got {self.min}")
        if min(abs(self.value - v) for v in self.grid()) > 1e-9 * max(1.0, abs(self.value)):
            raise ValueError(f"slider {self.name}: value = {self.value} is not one of its steps")

    def grid(self) -> list[float]:
        """The values it can take on a page."""
        if self.log:
            first, last = (round(math.log10(end) * self.log) for end in (self.min, self.max))
            return [float(f"{10 ** (k / self.log):.2g}") for k in range(first, last + 1)]
        steps = round((self.max - self.min) / self.step)
        return [float(f"{self.min + i * self.step:.12g}") for i in range(steps + 1)]

    def snap(self, value: float) -> float:
        """The number that a widget's position stands for; a number that was typed in stays as it is."""
        if self.log:
            position = 10 ** (round(math.log10(value) * self.log) / self.log)
            return float(f"{value:.2g}") if abs(position - value) <= 1e-6 * value else value
        return float(f"{value:.12g}")


@dataclass(frozen=True)
class Choice:
    """One of several named options, {value: label}.

    ranges  {value: {slider name: {"min", "max", "step", "value"}}}: choosing sets these sliders' ranges and values
    """

    name: str
    label: str
    options: Mapping[str, str]
    value: str
    ranges: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    hint: str = ""

    def __post_init__(self) -> None:
        if self.value not in self.options:
            raise ValueError(f"choice {self.name}: {self.value!r} is not one of {', '.join(self.options)}")


@dataclass(frozen=True)
class Panel:
    """One plot (`kind` "lines") or strip of pictures ("images"). A limit that is None follows the data."""

    id: str
    title: str
    xlabel: str = ""
    ylabel: str = ""
    kind: str = "lines"
    xlim: tuple[float | None, float | None] | None = None
    ylim: tuple[float | None, float | None] | None = None
    xlog: bool = False
    ylog: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """A curve, or with `shape` "area", "points", "vline" (x holds one value), "hline" (y holds one value).

    Lines of one panel that share label, role and shape share an entry of the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    role: str = "star"
    shape: str = "line"

    def __post_init__(self) -> None:
        if self.role not in ROLES or self.shape not in SHAPES:
            raise ValueError(f"line {self.label!r}: role {self.role!r} or shape {self.shape!r} is unknown")


@dataclass(frozen=True)
class Image:
    """A grey picture: rows of pixels in [-1, 1] (clipped when shown)."""

    label: str
    pixels: Sequence[Sequence[float]]
