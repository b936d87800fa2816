"""The book's figures and tables: one style, colours that the colour-blind can tell apart, the same roles everywhere."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .writing import format_number, markup, strip, written

# p_0 and other references, p_star and what is exact, p_gamma and what is penalised, rewards, what the text warns of
COLOURS = {"base": "#6b7480", "star": "#0067a8", "gamma": "#c24e00", "reward": "#00795c", "warn": "#a3317f"}
CYCLE = [COLOURS[role] for role in ("star", "gamma", "reward", "warn", "base")]


def style() -> None:
    """Sets matplotlib up for the book; call it once in a notebook, after its imports."""
    # torch's own notice, printed at the first torch.func call, is of no use to a reader.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.2),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=CYCLE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e3e7eb",
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.cmap": "gray",
        }
    )


def image_grid(
    images: Tensor, columns: int, *, rows: Sequence[str] = (), titles: Sequence[str] = (), scale: float = 0.75
) -> Figure:
    """Images (n, 1 or 3, H, W) in [-1, 1], row by row, with names of rows on the left and of columns on top."""
    count, margin = -(-len(images) // columns), 0.1 + 0.08 * max(map(len, rows), default=0)
    figure, axes = plt.subplots(count, columns, figsize=(scale * columns + margin, scale * count + 0.3))
    for i, axis in enumerate(np.atleast_1d(axes).flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)
        if i < len(images):
            image = images[i].detach().cpu().permute(1, 2, 0)
            axis.imshow(image if image.shape[2] == 1 else (image + 1) / 2, vmin=-1, vmax=1)
        if i < columns and i < len(titles):
            axis.set_title(titles[i], fontsize=9)
        if i % columns == 0 and i // columns < len(rows):
            axis.set_ylabel(rows[i // columns], rotation=0, ha="right", va="center", fontsize=9)
    return figure


def band(axis: Axes, x: Sequence[float], intervals: Sequence[tuple[float, float, float]], **options: Any) -> None:
    """A line through means with the band of their intervals (mean, lo, hi)."""
    mean, lo, hi = zip(*intervals, strict=True)
    (line,) = axis.plot(x, mean, **options)
    axis.fill_between(x, lo, hi, color=line.get_color(), alpha=0.18, linewidth=0)


class Table:
    """A table with a caption that names the tier of its numbers; shown as HTML in a notebook and on a page.

    rows     mappings, one per row
    columns  key -> heading
    tier     "exact", "smoke", "quick", "recorded" or "full": where the numbers come from
    note     what a reader must know: data, sizes, seeds, meaning of the intervals
    formats  key -> function that renders the value; the default shows four significant digits

    Headings, cells and note may hold _{...} and ^{...}; what Python wrote is made readable: 1e+04, -0.00, abar_T.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        columns: Mapping[str, str],
        *,
        tier: str,
        note: str,
        formats: Mapping[str, Callable[[Any], str]] | None = None,
    ):
        if tier not in ("exact", "smoke", "quick", "recorded", "full"):
            raise ValueError(f"tier = {tier!r} must be exact, smoke, quick, recorded or full")
        formats = formats or {}
        self.head, self.caption = [written(head) for head in columns.values()], f"{tier}: {written(note)}"
        self.body = [[written(formats.get(key, number)(row[key])) for key in columns] for row in rows]

    def _repr_html_(self) -> str:
        def line(cells: Iterable[str], tag: str) -> str:
            cells = [
                f'<{tag} style="{style(tag, i, cell)}">{markup(cell, True)}</{tag}>' for i, cell in enumerate(cells)
            ]
            return f"<tr>{''.join(cells)}</tr>"

        def style(tag: str, column: int, cell: str) -> str:
            whole = "; white-space: nowrap" if tag == "td" and any(map(str.isdigit, cell)) else ""
            return f"padding: 0.2em 0.5em; text-align: {'right' if column else 'left'}{whole}"

        tier, note = self.caption.split(": ", 1)
        caption = (
            f'<caption style="caption-side: bottom; min-width: 20em"><b>{tier}</b>: {markup(note, True)}</caption>'
        )
        body = "".join(line(row, "td") for row in self.body)
        head, table = line(self.head, "th"), '<table class="dataframe" style="font-size: 0.88em">'
        return f"{table}{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        table = [[strip(cell) for cell in row] for row in (self.head, *self.body)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*lines, strip(self.caption)])


def number(value: Any) -> str:
    """Four significant digits for a float, every digit of an integer, other things as they are."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return format_number(value) if isinstance(value, float) else str(value)


def interval(value: tuple[float, float, float]) -> str:
    """mean ± half width, with as many digits as the half width warrants."""
    mean, lo, hi = value
    half = (hi - lo) / 2
    digits = max(0, 1 - int(np.floor(np.log10(half)))) if half > 0 else 3
    return f"{format_number(mean, f'.{digits}f')} ± {half:.{digits}f}"
