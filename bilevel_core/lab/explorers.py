"""Explorers: figures with sliders, the same in a live kernel and on a page that has none.

An `Explorer` is a list of controls, a list of panels and one function of the controls' values, written twice: in
Python (`compute`, the package's own code) and in a few lines of JavaScript (`js`). In a live kernel ipywidgets drive
the Python; in the built book the page carries the JavaScript, with no kernel and no network. tests/test_explorers.py
runs the JavaScript in a browser and compares it with the Python.

    explorer = schedule_explorer(digit)
    explorer.show()
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from bilevel_core import estimators, guidance, oracles, samplers, schedules

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
_COLOURS = {  # the rest of the dark theme; the light one is in explorer.css
    "bg": "#171b21",
    "panel": "#20262e",
    "text": "#e8ecf0",
    "soft": "#a4aeb9",
    "edge": "#3c454f",
    "grid": "#2b323a",
    "accent": "#5ab8f0",
    "warn-bg": "#3a2f12",
    "warn-text": "#ffe2a0",
    "warn-edge": "#d9a520",
}
SHAPES = ("line", "area", "points", "vline", "hline")


@dataclass(frozen=True)
class Slider:
    """One number. `label` may hold _{...} and ^{...}; `hint` is a word or two beside it.

    step    distance of neighbouring values of a linear slider
    log     values per decade of a logarithmic one (its values are rounded to two digits: 1, 1.1, 1.3, ...)
    format  ".2f" decimals or ".3g" significant digits
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

    def __post_init__(self) -> None:
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
    """A curve, or with `shape` "area", "points", "vline" (x holds one value), "hline" (y holds one value)."""

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


class Explorer:
    """A figure with controls; see the module's text.

    name      letters, digits and hyphens: the base of all element ids
    compute   (**values) -> {panel id: [Line or Image, ...], "readout": [(label, number or string[, format]), ...],
              "message": text, "warn": whether it is a warning}
    js        body of a JavaScript function (values, data, memo) that returns the same as plain objects
              {label, x, y, role, shape} or {label, pixels}; memo is an object that is kept from call to call
    data      constants for the JavaScript, anything that JSON can hold
    title, caption, alt   the heading, the text below, and the description read out by a screen reader
    """

    def __init__(
        self,
        name: str,
        controls: Sequence[Slider | Choice],
        panels: Sequence[Panel],
        compute: Callable[..., dict[str, Any]],
        js: str,
        data: Any = None,
        *,
        title: str = "",
        caption: str = "",
        alt: str = "",
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(f"name is {name!r}; it must be lower-case letters, digits and hyphens")
        if re.search(r"</script|<!--", js, re.IGNORECASE):
            raise ValueError("the JavaScript holds '</script' or '<!--', which would end the script on the page")
        self.name, self.controls, self.panels = name, list(controls), list(panels)
        self.compute, self.js, self.data = compute, js, data
        self.title, self.caption, self.alt = title, caption, alt or title or name

    # ---- values and results -------------------------------------------------------------------------------------
    def defaults(self) -> dict[str, Any]:
        """The values at the start and after a reset."""
        return {control.name: control.value for control in self.controls}

    def evaluate(self, **values: Any) -> dict[str, Any]:
        """What `compute` returns at the defaults changed by `values`, as the plain objects that the page uses."""
        unknown = set(values) - set(self.defaults())
        if unknown:
            raise ValueError(f"no control named {', '.join(sorted(unknown))}; there are {', '.join(self.defaults())}")
        result = self.compute(**{**self.defaults(), **values})
        out: dict[str, Any] = {panel.id: [_plain(item) for item in result.get(panel.id, [])] for panel in self.panels}
        out["readout"] = [list(row) for row in result.get("readout", [])]
        out["message"], out["warn"] = result.get("message", ""), bool(result.get("warn", False))
        return out

    # ---- without a kernel ---------------------------------------------------------------------------------------
    def html(self) -> str:
        """The explorer as HTML that stands alone: styles, runtime, constants and the JavaScript, nothing fetched."""
        key, runtime, css = _assets()
        spec = {
            "title": self.title,
            "controls": [_control_spec(control) for control in self.controls],
            "panels": [asdict(panel) for panel in self.panels],
            "roles": {role: {"dash": dash, "width": width} for role, (_, _, dash, width) in ROLES.items()},
            "data": self.data,
        }
        first = self.evaluate()["readout"]
        shown = "; ".join(f"{_strip(row[0])} = {format_number(*row[1:])}" for row in first)
        fallback = "This figure has sliders and needs JavaScript." + (
            f" At its first setting: {shown}." if shown else ""
        )
        caption = f'<div class="blx-caption">{_markup(self.caption, True)}</div>' if self.caption else ""
        element = f"blx-{self.name}"
        return (
            f"<style>{css}</style>"
            f'<div class="blx" id="{element}" role="figure" aria-label="{html.escape(self.alt, quote=True)}">'
            f'<p class="blx-fallback">{html.escape(fallback)}</p>{caption}</div>'
            f"<script>{runtime}\n"
            f'window.{key}.mount("{element}", {embed_json(spec)}, (values, data, memo) => {{\n{_slim(self.js)}\n}});'
            "</script>"
        )

    # ---- with a kernel ------------------------------------------------------------------------------------------
    def figure(self, result: dict[str, Any], width: float = 9.0) -> Any:
        """A matplotlib Figure of what `evaluate` returned."""
        plots = _Plots(self.panels, width)
        plots.update(result)
        return plots.figure

    def live(self) -> Any:
        """The explorer as ipywidgets that call `compute`. Returns a VBox; needs ipywidgets and matplotlib."""
        return _live(self)

    def show(self) -> Any:
        """For the last line of a cell: widgets in a live kernel, HTML in a batch run or where ipywidgets is missing."""
        from IPython.display import HTML

        from bilevel_core.lab import runs

        if not runs.is_batch():
            try:
                return self.live()
            except ImportError:
                pass  # the HTML works without ipywidgets
        return HTML(self.html())


# ---- text ---------------------------------------------------------------------------------------------------------
def format_number(value: float | str, spec: str = ".4g") -> str:
    """A number as the page writes it: ".2f" decimals, ".3g" digits and 1.2 × 10⁻⁵ where very small or large."""
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    digits = int(spec[1:-1])
    if spec.endswith("f"):
        text = f"{value:.{digits}f}"
        return (text.replace("-", "") if float(text) == 0 else text).replace("-", "−")
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)

    def bare(text: str) -> str:
        return text.rstrip("0").rstrip(".") if "." in text else text

    if -4 <= power < 6:
        return bare(f"{value:.{max(0, digits - 1 - power)}f}").replace("-", "−")
    return f"{bare(mantissa)} × 10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}".replace("-", "−")


def embed_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `</`, no `<!--`, no bare line separators, no NaN."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for bad, good in (("</", "<\\/"), ("<!--", "<\\u0021--"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(bad, good)
    return text


def _strip(text: str) -> str:
    return re.sub(r"([_^])\{([^}]*)\}", r"\1\2", text)


def _markup(text: str, tag: bool) -> str:
    """_{...} and ^{...} as HTML (tag) or as matplotlib's mathtext."""
    if tag:
        names = {"_": "sub", "^": "sup"}
        return re.sub(r"([_^])\{([^}]*)\}", lambda m: f"<{names[m[1]]}>{m[2]}</{names[m[1]]}>", html.escape(text))
    return re.sub(r"([_^])\{([^}]*)\}", lambda m: f"$\\mathrm{{{{}}}}{m[1]}{{{m[2]}}}$", text)


def _read(file: str) -> str:
    return resources.files(__package__).joinpath(file).read_text("utf-8")


def _slim(source: str) -> str:
    """Without lines of comment and without indentation."""
    return re.sub(r"^\s+", "", re.sub(r"^\s*//.*\n", "", source, flags=re.MULTILINE), flags=re.MULTILINE)


@functools.cache
def _assets() -> tuple[str, str, str]:
    """The runtime's global name (with a hash, so that two versions can share a page), its source, the styles."""
    runtime, css = _read("explorer.js"), _read("explorer.css")
    dark = "".join(f"--blx-{name}:{colour};" for name, colour in _COLOURS.items())
    dark += "".join(f"--blx-{role}:{values[1]};" for role, values in ROLES.items()) + "color-scheme:dark;"
    light = "".join(f"--blx-{role}:{values[0]};" for role, values in ROLES.items())
    css = re.sub(r"/\*(?!DARK|LIGHT).*?\*/\n?", "", css).replace("/*DARK*/", dark).replace("/*LIGHT*/", light)
    runtime, css = _slim(runtime), _slim(css)
    key = "blx" + hashlib.sha256((runtime + css).encode()).hexdigest()[:10]
    return key, runtime.replace("/*KEY*/", key).strip(), css.strip()


def _control_spec(control: Slider | Choice) -> dict[str, Any]:
    if isinstance(control, Slider):
        return {"type": "slider", **asdict(control)}
    spec = asdict(control)
    return {"type": "choice", **spec, "options": [list(option) for option in control.options.items()]}


def _plain(item: Line | Image) -> dict[str, Any]:
    def numbers(values: Any) -> list[Any]:
        values = values.tolist() if hasattr(values, "tolist") else values
        return [numbers(v) if isinstance(v, list | tuple) or hasattr(v, "tolist") else float(v) for v in values]

    if isinstance(item, Image):
        return {"label": item.label, "pixels": numbers(item.pixels)}
    return {"label": item.label, "x": numbers(item.x), "y": numbers(item.y), "role": item.role, "shape": item.shape}


# ---- matplotlib and ipywidgets ------------------------------------------------------------------------------------
class _Plots:
    """The panels as one matplotlib figure, drawn again and again; artists are kept from one result to the next."""

    def __init__(self, panels: Sequence[Panel], width: float = 9.0) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows: list[list[Panel]] = []
        for panel in panels:
            if panel.wide or not rows or len(rows[-1]) == 2 or rows[-1][0].wide or rows[-1][0].kind != panel.kind:
                rows.append([panel])
            else:
                rows[-1].append(panel)
        heights = [1.7 if row[0].kind == "images" else 3.1 for row in rows]
        self.figure = Figure(figsize=(width, sum(heights)), dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        parts = self.figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        self.axes: dict[str, Any] = {}
        self.panels = {panel.id: panel for panel in panels}
        for part, row in zip(parts, rows, strict=True):
            if row[0].kind == "lines":  # fixed margins: an automatic layout is slow and lets the plots jump
                part.subplots_adjust(left=0.085, right=0.98, bottom=0.17, top=0.83, wspace=0.24)
            else:
                part.subplots_adjust(left=0.02, right=0.98, bottom=0.14, top=0.84)
            for panel, axes in zip(row, part.subplots(1, len(row), squeeze=False)[0], strict=True):
                self.axes[panel.id] = axes
        self.artists: dict[str, tuple[Any, list[Any]]] = {}

    def update(self, result: dict[str, Any]) -> None:
        """Show another result of Explorer.evaluate."""
        for name, panel in self.panels.items():
            items, axes = result[name], self.axes[name]
            kinds = [(item["label"], item.get("role"), item.get("shape")) for item in items]
            images = panel.kind == "images"
            if name not in self.artists or self.artists[name][0] != kinds:
                axes.clear()
                artists = self._new_images(axes, panel, items) if images else self._new_lines(axes, panel, items)
                self.artists[name] = (kinds, artists)
            elif images:
                for artist, item in zip(self.artists[name][1], items, strict=True):
                    artist.set_data(item["pixels"])
            else:
                for pair, item in zip(self.artists[name][1], items, strict=True):
                    self._move(axes, pair, item)
            if not images:
                axes.relim()
                axes.autoscale_view()
                low, high = _y_limits(panel, items)
                axes.set_ylim(low, high)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
        return buffer.getvalue()

    @staticmethod
    def _new_images(axes: Any, panel: Panel, images: Sequence[dict[str, Any]]) -> list[Any]:
        axes.set_title(_markup(panel.title, False), fontsize=10, weight="bold", loc="left")
        artists = []
        for i, image in enumerate(images):
            rows, columns = len(image["pixels"]), len(image["pixels"][0])
            place, look = (i * 1.1, i * 1.1 + 1, rows / columns, 0), {"vmin": -1, "vmax": 1, "cmap": "gray"}
            artists.append(axes.imshow(image["pixels"], extent=place, interpolation="nearest", **look))
            axes.text(
                i * 1.1 + 0.5, rows / columns + 0.08, _markup(image["label"], False), ha="center", va="top", size=8
            )
        axes.set_xlim(0, len(images) * 1.1 - 0.1)
        axes.set_ylim(max((len(i["pixels"]) / len(i["pixels"][0]) for i in images), default=1) + 0.3, 0)
        axes.set_axis_off()
        if panel.xlabel:
            look = {"transform": axes.transAxes, "ha": "center", "va": "top", "size": 9}
            axes.text(0.5, 0, _markup(panel.xlabel, False), **look)
        return artists

    def _new_lines(self, axes: Any, panel: Panel, lines: Sequence[dict[str, Any]]) -> list[Any]:
        artists = []
        for line in lines:
            colour, _, dash, width = ROLES[line["role"]]
            style = (0, tuple(float(d) / width for d in dash.split())) if dash else "-"
            look = {"color": colour, "linewidth": 0.8 * width, "label": _markup(line["label"], False) or None}
            if line["shape"] == "vline":
                artist = axes.axvline(1, linestyle=style, **look)
            elif line["shape"] == "hline":
                artist = axes.axhline(0, linestyle=style, **look)
            elif line["shape"] == "points":
                artist = axes.plot([], [], "o", markersize=5, clip_on=False, **look)[0]
            else:
                artist = axes.plot([], [], linestyle=style, **look)[0]
            pair = [artist, None]
            self._move(axes, pair, line)
            artists.append(pair)
        axes.set_title(_markup(panel.title, False), fontsize=10, weight="bold", loc="left", pad=22)
        axes.set_xlabel(_markup(panel.xlabel, False))
        axes.set_ylabel(_markup(panel.ylabel, False))
        axes.set_xscale("log" if panel.xlog else "linear")
        axes.set_yscale("log" if panel.ylog else "linear")
        if panel.xlim:
            axes.set_xlim(*panel.xlim)
        axes.grid(alpha=0.3, linewidth=0.6)
        if any(line["label"] for line in lines):
            above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncol": 5, "frameon": False}
            axes.legend(fontsize=8.5, columnspacing=1.2, handlelength=2.2, **above)
        return artists

    @staticmethod
    def _move(axes: Any, pair: list[Any], line: dict[str, Any]) -> None:
        artist, area = pair
        if line["shape"] == "vline":
            artist.set_xdata([line["x"][0]] * 2)
        elif line["shape"] == "hline":
            artist.set_ydata([line["y"][0]] * 2)
        else:
            artist.set_data(line["x"], line["y"])
        if line["shape"] == "area":
            if area is not None:
                area.remove()
            pair[1] = axes.fill_between(line["x"], line["y"], color=artist.get_color(), alpha=0.13, linewidth=0)


def _y_limits(panel: Panel, lines: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The panel's limits, with the data's range and a little air where they are left open."""
    fixed = panel.ylim or (None, None)
    values = [v for line in lines if line["shape"] not in ("vline", "hline") for v in line["y"] if math.isfinite(v)]
    if panel.ylog or not values:
        return fixed
    air = 0.05 * ((max(values) - min(values)) or abs(values[0]) or 1.0)
    return (
        min(values) - air if fixed[0] is None else fixed[0],
        max(values) + air if fixed[1] is None else fixed[1],
    )


def _live(explorer: Explorer) -> Any:
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
    readout = ipywidgets.HTML()
    plots = _Plots(explorer.panels)
    sliders = {control.name: control for control in explorer.controls if isinstance(control, Slider)}
    widgets: dict[str, Any] = {}
    busy = {"ranges": False, "timer": None}

    def redraw() -> None:
        busy["timer"] = None
        values = {
            name: sliders[name].snap(widget.value) if name in sliders else widget.value
            for name, widget in widgets.items()
        }
        result = explorer.evaluate(**values)
        rows = "".join(
            f'<span style="margin-right:1.5em">{_markup(row[0], True)} '
            f"<b>{html.escape(format_number(*row[1:]))}</b></span>"
            for row in result["readout"]
        )
        sign = "⚠" if result["warn"] else "✓"
        note = f"<div>{sign} {_markup(result['message'], True)}</div>" if result["message"] else ""
        readout.value = f'<div style="line-height:1.6">{rows}{note}</div>'
        plots.update(result)
        picture.value = plots.png()

    def changed(_: Any = None) -> None:
        """Draw a little later, once for all the changes that arrive until then; at once where no event loop runs."""
        if busy["ranges"] or busy["timer"] is not None:
            return
        try:
            busy["timer"] = asyncio.get_running_loop().call_later(0.04, redraw)
        except RuntimeError:
            redraw()

    def apply_ranges(choice: Choice) -> None:
        for name, new in choice.ranges.get(widgets[choice.name].value, {}).items():
            _set_range(widgets[name], new)

    for control in explorer.controls:
        text = _strip(control.label) + (f" ({control.hint})" if control.hint else "")
        look = {"style": {"description_width": "initial"}, "layout": ipywidgets.Layout(width="auto", min_width="280px")}
        if isinstance(control, Choice):
            widget = ipywidgets.Dropdown(
                options=[(label, value) for value, label in control.options.items()],
                value=control.value,
                description=text,
                **look,
            )
        elif control.log:
            widget = ipywidgets.FloatLogSlider(
                value=control.value,
                base=10,
                min=round(math.log10(control.min) * control.log) / control.log,
                max=round(math.log10(control.max) * control.log) / control.log,
                step=1 / control.log,
                description=text,
                readout_format=".3g",
                **look,
            )
        else:
            widget = ipywidgets.FloatSlider(
                value=control.value,
                min=control.min,
                max=control.max,
                step=control.step,
                description=text,
                readout_format=control.format,
                **look,
            )
        widgets[control.name] = widget

    def choice_changed(choice: Choice) -> None:
        busy["ranges"] = True  # the sliders' own changes would each draw
        apply_ranges(choice)
        busy["ranges"] = False
        changed()

    def reset(_: Any = None) -> None:
        busy["ranges"] = True
        for name, control in sliders.items():
            if control.log:
                widgets[name].value = control.value
            else:
                _set_range(widgets[name], asdict(control))
        for control in explorer.controls:
            if isinstance(control, Choice):
                widgets[control.name].value = control.value
                apply_ranges(control)
        busy["ranges"] = False
        changed()

    for control in explorer.controls:
        if isinstance(control, Choice):
            apply_ranges(control)
            widgets[control.name].observe(lambda _, c=control: choice_changed(c), names="value")
        else:
            widgets[control.name].observe(changed, names="value")
    button = ipywidgets.Button(description="Reset")
    button.on_click(reset)
    box = ipywidgets.Layout(
        display="grid", grid_template_columns="repeat(auto-fit, minmax(280px, 1fr))", grid_gap="4px 18px"
    )
    parts = [ipywidgets.GridBox([*widgets.values(), button], layout=box), readout, picture]
    if explorer.title:
        parts.insert(0, ipywidgets.HTML(f"<b>{_markup(explorer.title, True)}</b>"))
    if explorer.caption:
        parts.append(ipywidgets.HTML(f'<div style="line-height:1.4">{_markup(explorer.caption, True)}</div>'))
    redraw()
    return ipywidgets.VBox(parts)


def _set_range(widget: Any, new: Mapping[str, float]) -> None:
    """New limits and value of a slider; the limits are widened first, since min must never exceed max on the way."""
    widget.min = min(widget.min, new["min"])
    widget.max = max(widget.max, new["max"])
    widget.value = new["value"]
    widget.min, widget.max = new["min"], new["max"]
    widget.step = new.get("step", widget.step)


# ---- the schedule explorer ----------------------------------------------------------------------------------------
EXPLORER_T = 200  # steps of the schedules drawn by the explorer
_FRAMES = tuple(i / 8 for i in range(9))  # the times u at which a noised digit is shown

# Ranges of the sliders, inside schedules.BOUNDS: where the curves are worth looking at.
_SLIDERS = {
    "cosine": {
        "start": (0.0, 0.9, 0.01),
        "end": (0.1, 1.0, 0.01),
        "tau": (0.5, 4.0, 0.05),
        "epsilon": (0.0, 0.5, 0.004),
    },
    "sigmoid": {
        "start": (-1.0, 3.0, 0.05),
        "end": (-0.5, 6.0, 0.05),
        "tau": (0.2, 3.0, 0.05),
        "epsilon": (-2.0, 2.0, 0.05),
    },
    "linear": {
        "start": (0.0, 0.9, 0.01),
        "end": (0.1, 2.0, 0.01),
        "tau": (0.2, 4.0, 0.05),
        "epsilon": (0.0, 1.0, 0.01),
    },
}

_TERMINAL_WARNING = (
    f"ᾱ_{{T}} = ABAR is above {schedules.TERMINAL_ABAR:g}: x_{{T}} still holds √ᾱ_{{T}} = ROOT of the signal, so "
    "N(0, I) is the wrong start for sampling. Raise end, take the normalised form, rescale (rescale_terminal), or "
    "start from the right law (draw_x_T)."
)
_TERMINAL_FINE = "Admissible, and ᾱ_{T} is about 0: sampling may start from N(0, I)."


def schedule_explorer(digit: Tensor | Sequence[Sequence[float]], noise_seed: int = 0) -> Explorer:
    """What each of the four schedule parameters does: abar, log-SNR and one noised digit, for T = 200.

    digit       (H, W), values in [-1, 1]
    noise_seed  seed of the one noise field that every frame shares
    Values outside the admissible set are projected, and the figure says so. Raises ValueError for another shape.
    """
    x0 = torch.as_tensor(digit, dtype=torch.float64).detach().cpu()
    if x0.dim() != 2:
        raise ValueError(f"digit has shape {tuple(x0.shape)}; it must be one picture, (H, W)")
    if not (x0.abs() <= 1).all():
        raise ValueError(f"digit has values from {x0.min():g} to {x0.max():g}; they must lie in [-1, 1]")
    generator = torch.Generator().manual_seed(noise_seed)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64).mul(1e4).round().div(1e4)  # short in JSON
    x0 = x0.mul(1e4).round().div(1e4)
    T = EXPLORER_T
    frames = [round(u * T) for u in _FRAMES]

    def compute(kind: str, form: str, start: float, end: float, tau: float, epsilon: float) -> dict[str, Any]:
        q, message = torch.tensor([start, end, tau, epsilon], dtype=torch.float64), ""
        try:
            schedules.check(q, T, kind, form)
        except ValueError as reason:
            message = f"Not admissible: {reason}."
            try:
                q = schedules.project(q, T, kind, form)
            except ValueError:
                return {"readout": [], "message": message, "warn": True}
            message += f" Drawn instead is its projection, start = {q[0]:.4g}, end = {q[1]:.4g}."
        beta = schedules.betas(q, T, kind, form)
        abar = schedules.abar_from_betas(beta)
        default = torch.tensor(schedules.DEFAULT_Q[kind], dtype=torch.float64)
        usual = schedules.abar(default, T, kind, form)
        last = float(abar[-1])
        if not message and last > schedules.TERMINAL_ABAR:
            message = _TERMINAL_WARNING.replace("ABAR", f"{last:.3g}").replace("ROOT", f"{last**0.5:.3g}")
        warn = bool(message)
        u, snr = torch.arange(T + 1, dtype=torch.float64) / T, schedules.log_snr(abar)
        return {
            "abar": [
                Line("default q", u, usual, "base"),
                Line("this q", u, abar, "star"),
                Line("digits below", u[frames], abar[frames], "star", "points"),
            ],
            "snr": [
                Line("default q", u[1:], schedules.log_snr(usual)[1:], "base"),
                Line("this q", u[1:], snr[1:], "star"),
                Line("digits below", u[frames[1:]], snr[frames[1:]], "star", "points"),
            ],
            "digits": [Image(f"u = {u[t]:g}", schedules.noise(x0, eps, abar[t])) for t in frames],
            "readout": [
                ("ᾱ_{T}", last, ".3g"),
                ("√ᾱ_{T}", last**0.5, ".3g"),
                ("largest β_{t}", float(beta.max()), ".3g"),
            ],
            "message": message or _TERMINAL_FINE,
            "warn": warn,
        }

    ranges = {
        kind: {
            name: {"min": low, "max": high, "step": step, "value": value}
            for (name, (low, high, step)), value in zip(sliders.items(), schedules.DEFAULT_Q[kind], strict=True)
        }
        for kind, sliders in _SLIDERS.items()
    }
    kinds = {"cosine": "cosine", "sigmoid": "sigmoid", "linear": "linear (DDPM)"}
    forms = {"released": "as released", "normalised": "normalised: exact ends"}
    texts = {
        "start": ("start", "", ".2f"),
        "end": ("end", "", ".2f"),
        "tau": ("τ", "shape", ".2f"),
        "epsilon": ("ε", "offset", ".3f"),
    }
    return Explorer(
        "schedule",
        [
            Choice("kind", "schedule", kinds, "cosine", ranges),
            Choice("form", "form", forms, "released"),
            *(
                Slider(name, label, **ranges["cosine"][name], format=spec, hint=hint)
                for name, (label, hint, spec) in texts.items()
            ),
        ],
        [
            Panel("abar", "Signal kept", "time u = t/T", "ᾱ(u)", xlim=(0, 1), ylim=(0, 1)),
            Panel("snr", "Log signal-to-noise ratio", "time u = t/T", "log ᾱ/(1−ᾱ)", xlim=(0, 1), ylim=(-24, 12)),
            Panel(
                "digits",
                "The digit at nine times",
                "x_{t} = √ᾱ_{t} x_{0} + √(1−ᾱ_{t}) ε, with the same ε in every picture",
                kind="images",
                wide=True,
            ),
        ],
        compute,
        _read("explorer_schedule.js"),
        {
            "T": T,
            "frames": _FRAMES,
            "gap": schedules.GAP,
            "minAbar": schedules.MIN_ABAR,
            "maxBeta": schedules.MAX_BETA,
            "terminal": schedules.TERMINAL_ABAR,
            "bounds": schedules.BOUNDS,
            "defaults": schedules.DEFAULT_Q,
            "warning": _TERMINAL_WARNING,
            "fine": _TERMINAL_FINE,
            "digit": x0.tolist(),
            "noise": eps.tolist(),
        },
        title="What the four schedule parameters do",
        caption=(
            f"T = {T} steps. Dotted: the same kind of schedule at its default parameters. "
            "Choosing a kind sets its defaults."
        ),
        alt=(
            "Explorer of noise schedules: sliders for start, end, tau and epsilon change two curves and nine "
            "noised digits."
        ),
    )


# ---- the penalty explorer -----------------------------------------------------------------------------------------
_NODES = (-10.0, 27.0, 1481)  # quadrature; p_star moves as far as 1.5 + 0.81/lambda = 17.7 at lambda = 0.05
_LAMS = (0.05, 50.0, 121)  # the axis of the panels over lambda

_WRONG_SIGN = (
    "The penalty gradient (A) has the wrong sign here: at this γ it pushes λ away from the true optimum. Raise γ."
)
_RIGHT_SIGN = "The penalty gradient (A) and the hypergradient (C) have the same sign here."


def penalty_explorer() -> Explorer:
    """The penalty on the 1-D mixture: p_0, p_star, p_gamma, L_gamma and its gradient as gamma and lambda move.

    The problem and its closed forms are those of `oracles.Mixture1D().problem()`, on a quadrature that is as exact for
    the sliders' ranges (lambda >= 0.05) and ten times smaller.
    """
    mixture = oracles.Mixture1D()
    x, log_p0 = mixture.quadrature(*_NODES)
    problem = oracles.Tilt(-((x - 1.2) ** 2) / 2, x, log_p0)
    spacing = (_NODES[1] - _NODES[0]) / (_NODES[2] - 1)
    lams = _LAMS[0] * (_LAMS[1] / _LAMS[0]) ** (torch.arange(_LAMS[2], dtype=torch.float64) / (_LAMS[2] - 1))
    limit, hypergrads = problem.value(lams), problem.hypergrad(lams)

    def root(slope: Callable[[float], Tensor]) -> float:
        """Where a gradient that is negative at small lambda and positive at large lambda vanishes, by bisection."""
        low, high = math.log(_LAMS[0]), math.log(_LAMS[1])
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
        return math.exp((low + high) / 2)

    lam_star = root(problem.hypergrad)

    @functools.lru_cache(maxsize=4)
    def curves(gamma: float) -> tuple[Tensor, Tensor, float]:
        best = root(lambda lam: problem.penalty_grad(lam, gamma))
        return problem.penalty(lams, gamma), problem.penalty_grad(lams, gamma), best

    def compute(gamma: float, lam: float) -> dict[str, Any]:
        values, grads, best = curves(gamma)
        star, tilted = problem.p_gamma(lam), problem.p_gamma(lam, gamma)
        grad, hyper = float(problem.penalty_grad(lam, gamma)), float(problem.hypergrad(lam))

        def reach(log_p: Tensor) -> float:
            mean = problem.mean(log_p, x)
            return float(mean + 4 * problem.mean(log_p, (x - mean) ** 2).sqrt())

        to = max(5, math.ceil(max(reach(star), reach(tilted))))
        first, count = round((-5 - _NODES[0]) / spacing), round((to + 5) / spacing) + 1
        view = slice(first, first + count)
        return {
            "laws": [
                Line("0.4 exp(r_{up})", x[view], 0.4 * problem.r_up[view].exp(), "reward", "area"),
                Line("p_{0}", x[view], problem.log_p0[view].exp() / spacing, "base"),
                Line("p_{∗}", x[view], star[view].exp() / spacing, "star"),
                Line("p_{γ}", x[view], tilted[view].exp() / spacing, "gamma"),
            ],
            "value": [
                Line("", [lam], [], "marker", "vline"),
                Line("its limit, γ → ∞", lams, limit, "star"),
                Line("L_{γ}", lams, values, "gamma"),
                Line("its minimum", [best], [float(problem.penalty(best, gamma))], "gamma", "points"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [lam], [], "marker", "vline"),
                Line("hypergradient (C)", lams, hypergrads, "star"),
                Line("dL_{γ}/dλ (A)", lams, grads, "gamma"),
            ],
            "readout": [
                ("L_{γ}(λ)", float(problem.penalty(lam, gamma))),
                ("dL_{γ}/dλ (A)", grad),
                ("hypergradient (C)", hyper),
                ("KL(p_{∗} ‖ p_{0})", float(problem.kl(star))),
                ("KL(p_{γ} ‖ p_{0})", float(problem.kl(tilted))),
                ("argmin L_{γ}", best),
                ("λ^{∗}", lam_star),
            ],
            "message": _WRONG_SIGN if grad * hyper < 0 else _RIGHT_SIGN,
            "warn": grad * hyper < 0,
        }

    return Explorer(
        "penalty",
        [
            Slider("gamma", "γ", 0.1, 1e4, 1.0, log=20, format=".2g", hint="penalty constant"),
            Slider("lam", "λ", 0.05, 50.0, 1.0, log=20, format=".2g", hint="entropy strength"),
        ],
        [
            Panel("laws", "The laws and the upper reward", "x", "density", ylim=(0, None), wide=True),
            Panel("value", "The penalised objective", "λ", "L_{γ}(λ)", xlog=True, xlim=_LAMS[:2], ylim=(0, 4)),
            Panel("grad", "Its gradient", "λ", "d/dλ", xlog=True, xlim=_LAMS[:2], ylim=(-2, 0.8)),
        ],
        compute,
        _read("explorer_penalty.js"),
        {
            "weights": mixture.weights,
            "means": mixture.means,
            "stds": mixture.stds,
            "nodes": _NODES,
            "lams": _LAMS,
            "lamStar": lam_star,
            "wrong": _WRONG_SIGN,
            "right": _RIGHT_SIGN,
        },
        title="How large must γ be?",
        caption=(
            "p_{0} = 0.6 N(−1.5, 0.7²) + 0.4 N(1.5, 0.9²), r_{low} = x, r_{up} = −(x − 1.2)²/2; exact, by quadrature. "
            "The vertical line is the chosen λ; λ^{∗} is the optimum as γ → ∞."
        ),
        alt=(
            "Explorer of the penalty method: sliders for gamma and lambda change three densities, the objective and "
            "its gradient."
        ),
    )


# ---- the lambda explorer ------------------------------------------------------------------------------------------
_LAM_AXIS = (0.2, 20.0, 61)  # the axis of its panels over lambda
_DOTS = 80  # samples drawn as dots, at equal steps of their weight

_LAM_SAYS = {
    "few": "Fewer than 100 effective samples: this batch says little here. Take more samples, or draw them at this λ.",
    "stop": "The gradient is within its error of zero: these samples cannot tell a better λ.",
    "raise": "Under p* the two rewards disagree (the line falls): raise λ.",
    "lower": "Under p* the two rewards agree (the line rises): lower λ.",
}


def lam_explorer(seed: int = 0) -> Explorer:
    """Algorithm 2 on the 1-D mixture: one batch of samples against the exact answer as lambda and gamma move.

    The estimates are those of `estimators` on 200 or 2,000 samples of p_0 (seed); the exact curves are those of
    `oracles.Mixture1D().problem()`, on the quadrature of `penalty_explorer`.
    """
    mixture = oracles.Mixture1D()
    nodes, log_p0 = mixture.quadrature(*_NODES)
    problem = oracles.Tilt(-((nodes - 1.2) ** 2) / 2, nodes, log_p0)
    lams = _LAM_AXIS[0] * (_LAM_AXIS[1] / _LAM_AXIS[0]) ** (torch.arange(_LAM_AXIS[2]).double() / (_LAM_AXIS[2] - 1))
    batch = (1000 * mixture.sample(2000, torch.Generator().manual_seed(seed))).round() / 1000
    level = problem.mean(problem.log_p0, problem.r_up)

    def estimate(n: int, lam: float, gamma: float) -> tuple[Tensor, Tensor, float, float, float, float]:
        """Weights and rewards of the batch, the gradient with its error, the mean reward with its error."""
        x = batch[:n]
        r_up = -((x - 1.2) ** 2) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad, info = estimators.lam_grad_penalty(r_up, x, lam, gamma)
            p, _ = estimators.tilt_weights(x, lam)
        up = p @ r_up
        return p, r_up, grad.item(), info["se"].item(), up.item(), (p * (r_up - up)).norm().item()

    @functools.lru_cache(maxsize=8)
    def curves(n: int, gamma: float) -> tuple[list, list, Tensor, Tensor]:
        found = [estimate(n, lam, gamma)[2:] for lam in lams.tolist()]
        log_ratio = problem.logits(lams, gamma).logsumexp(1) - problem.logits(lams).logsumexp(1)
        return [f[0] for f in found], found, problem.penalty_grad(lams, gamma), gamma * log_ratio - level / lams

    def compute(lam: float, gamma: float, n: str) -> dict[str, Any]:
        x = batch[: int(n)]
        p, r_up, grad, se, up, _ = estimate(int(n), lam, gamma)
        ess = 1 / p.square().sum().item()
        mean = (p @ x).item()
        slope = (p @ ((x - mean) * (r_up - up)) / (p @ (x - mean) ** 2)).item()
        order = x.argsort(stable=True)
        marks = (torch.arange(_DOTS).double() + 0.5) / _DOTS
        dots = x[order][torch.searchsorted(p[order].cumsum(0), marks).clamp(max=len(x) - 1)]
        grads, found, exact, est1 = curves(int(n), gamma)
        key = "few" if ess < estimators.MIN_ESS else "stop" if abs(grad) <= 1.96 * se else None
        key = key or ("raise" if grad < 0 else "lower")
        arch = torch.linspace(-3.5, 5.5, 91, dtype=torch.float64)
        return {
            "rewards": [
                Line("r_{up} over r_{low}", arch, -((arch - 1.2) ** 2) / 2, "reward"),
                Line("samples, by weight", dots, -((dots - 1.2) ** 2) / 2, "star", "points"),
                Line("their regression", [-3.5, 5.5], [up + slope * (end - mean) for end in (-3.5, 5.5)], "gamma"),
            ],
            "curve": [
                Line("", [lam], [], "marker", "vline"),
                Line("exact", lams, -problem.value(lams), "base"),
                Line("batch + 1.96 se", lams, [f[2] + 1.96 * f[3] for f in found], "zero"),
                Line("batch − 1.96 se", lams, [f[2] - 1.96 * f[3] for f in found], "zero"),
                Line("batch", lams, [f[2] for f in found], "star"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [lam], [], "marker", "vline"),
                Line("(A), exact", lams, exact, "base"),
                Line("(A), batch", lams, grads, "star"),
                Line("est1, exact", lams, est1, "gamma"),
            ],
            "readout": [
                ("(A), batch", grad, ".3f"),
                ("its standard error", se, ".2g"),
                ("(A), exact", float(problem.penalty_grad(lam, gamma)), ".3f"),
                ("E r_{up}, batch", up, ".3f"),
                ("E r_{up}, exact", float(-problem.value(lam)), ".3f"),
                ("effective samples", ess, ".3g"),
            ],
            "message": _LAM_SAYS[key],
            "warn": key == "few",
        }

    return Explorer(
        "lam",
        [
            Slider("lam", "λ", 0.2, 20.0, 3.2, log=20, format=".2g", hint="entropy strength"),
            Slider("gamma", "γ", 1.0, 1e4, 1000.0, log=10, format=".2g", hint="penalty constant"),
            Choice("n", "samples of p_{0}", {"200": "200", "2000": "2,000"}, "2000"),
        ],
        [
            Panel("rewards", "Do the rewards agree under p*?", "r_{low} = x", "r_{up}", ylim=(-10, 2), wide=True),
            Panel("curve", "The upper reward", "λ", "E r_{up}", xlog=True, xlim=_LAM_AXIS[:2], ylim=(-4, -0.5)),
            Panel("grad", "Its gradient", "λ", "d/dλ", xlog=True, xlim=_LAM_AXIS[:2], ylim=(-3, 3)),
        ],
        compute,
        _read("explorer_lam.js"),
        {
            "nodes": _NODES,
            "axis": _LAM_AXIS,
            "dots": _DOTS,
            "batch": batch.tolist(),
            "logP0": {"weights": mixture.weights, "means": mixture.means, "stds": mixture.stds},
            "says": _LAM_SAYS,
            "minEss": estimators.MIN_ESS,
        },
        title="Raise λ or lower it?",
        caption=(
            "p_{0}, r_{low} and r_{up} as in the text. Dots: samples of p_{0} at equal steps of their weight under "
            "p_{∗}, so that they look like samples of p_{∗}. Exact curves by quadrature."
        ),
        alt=(
            "Explorer of Algorithm 2: sliders for lambda and gamma change a regression of one reward on the other, "
            "the reward's curve over lambda and its gradient, from a batch of samples and exactly."
        ),
    )


# ---- the tilt explorer --------------------------------------------------------------------------------------------
_BINS = (-4.0, 7.0, 55)  # of the histograms on the line
_PLANE = oracles.Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-1.6, 0.0], [1.4, 1.3], [1.0, -1.5]], dtype=torch.float64),
    torch.tensor([[[0.35, 0.1], [0.1, 0.3]], [[0.2, 0.0], [0.0, 0.3]], [[0.3, -0.1], [-0.1, 0.2]]]).double(),
)
_TILT_SAYS = {
    "close": "Guidance is close to the exact tilt, on the line and in the plane.",
    "biased": "Guidance runs ahead of the exact tilt on the line, or shrinks too much in the plane. Particles do not.",
}


def tilt_explorer(samples: int = 4000, points: int = 250, steps: int = 100) -> Explorer:
    """The tilted law, exact, by look-ahead guidance and by particles, as lambda moves: on the line and in the plane.

    On the line p_0 is `oracles.Mixture1D` and r_low = x, in the plane a mixture of three modes and r_low = -|x|^2. The
    two samplers were run at each value of the slider (one seed) and are embedded; so is the exact law. Takes seconds.

    samples  of each law on the line (for its histogram);  points: of each law in the plane;  steps: of the chain
    """
    slider = Slider("lam", "λ", 0.4, 10.0, 2.0, log=10, format=".2g", hint="entropy strength")
    abar = schedules.abar(torch.tensor(schedules.DEFAULT_Q["cosine"], dtype=torch.float64), steps)
    ts, line = samplers.timesteps(steps, steps), oracles.Mixture1D()
    grid = torch.linspace(_BINS[0], _BINS[1], 111, dtype=torch.float64)
    edges = torch.linspace(_BINS[0], _BINS[1], _BINS[2] + 1, dtype=torch.float64)
    turn = torch.linspace(0, 2 * math.pi, 37, dtype=torch.float64)
    circle = 2 * torch.stack([turn.cos(), turn.sin()], 1)

    def run(denoiser: Callable, reward: Callable, lam: float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Guided samples, and particles with their weights, from the same start."""
        guide = guidance.LookAhead(denoiser, reward, lam, abar, ts)
        x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = (torch.Generator().manual_seed(1) for _ in range(2))
        with torch.no_grad():
            guided = samplers.sample_ddim(guide, x_T, abar, ts, eta=1.0, generator=next(noise))
            drawn, log_w, _ = samplers.sample_particles(guide, x_T, abar, ts, generator=next(noise))
        return guided, drawn, log_w.exp()

    def frame(lam: float) -> dict[str, Any]:
        tilted = line.tilt(1 / lam)
        w, m = (torch.tensor(v, dtype=torch.float64) for v in (tilted.weights, tilted.means))
        exact, spread = float(w @ m), float((w @ (torch.tensor(tilted.stds) ** 2 + m**2) - (w @ m) ** 2).sqrt())
        guided, drawn, w = run(line.denoiser(abar), lambda x: x, lam, (samples,))
        width = float(edges[1] - edges[0])

        def bars(x: Tensor, weights: Tensor) -> list[float]:
            found, _ = torch.histogram(x, edges, weight=weights)
            return [round(v, 3) for v in (found / (weights.sum() * width)).tolist()]

        mean, cov = (flat := _PLANE.tilt(torch.zeros(2, dtype=torch.float64), -2 / lam)).mean_cov()
        size = (cov.trace() + mean.square().sum()).sqrt().item()
        guided_2, drawn_2, w_2 = run(_PLANE.denoiser(abar), lambda x: -x.square().sum(1), lam, (8 * points, 2))
        rows = ((torch.arange(points) + 0.5) / points).double()
        rows = torch.searchsorted(w_2.cumsum(0), rows).clamp(max=len(w_2) - 1)
        rings = [m + circle @ torch.linalg.cholesky(c).T for m, c in zip(flat.means, flat.covs, strict=True)]
        sizes = [guided_2.square().sum(1).mean().sqrt().item(), (w_2 @ drawn_2.square().sum(1)).sqrt().item()]
        means = [guided.mean().item(), (w @ drawn).item()]
        close = abs(means[0] - exact) < 0.1 * spread and abs(sizes[0] / size - 1) < 0.06
        return {
            "exact": [round(v, 4) for v in tilted.log_prob(grid).exp().tolist()],
            "guided": bars(guided, torch.ones_like(guided)),
            "particles": bars(drawn, w),
            "rings": [[[round(v, 3) for v in axis] for axis in ring.T.tolist()] for ring in rings],
            "cloud": [[round(v, 2) for v in axis] for axis in guided_2[:points].T.tolist()],
            "swarm": [[round(v, 2) for v in axis] for axis in drawn_2[rows].T.tolist()],
            "readout": [exact, *means, size, *sizes, 100 / (w.square().sum() * len(w)).item()],
            "key": "close" if close else "biased",
        }

    values = slider.grid()
    frames = [frame(lam) for lam in values]
    names = ("mean, exact", "mean, guided", "mean, particles", "distance, exact", "distance, guided")
    names = (*names, "distance, particles", "effective particles (%)")
    base = [round(v, 4) for v in line.log_prob(grid).exp().tolist()]
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()

    def compute(lam: float) -> dict[str, Any]:
        now = frames[min(range(len(values)), key=lambda i: abs(math.log(values[i] / lam)))]
        rings = [
            Line("exact: 2 sd of each mode" if k == 0 else "", *ring, "star") for k, ring in enumerate(now["rings"])
        ]
        return {
            "line": [
                Line("guided", middles, now["guided"], "gamma", "area"),
                Line("p_{0}", grid, base, "base"),
                Line("exact tilt", grid, now["exact"], "star"),
                Line("particles", middles, now["particles"], "reward"),
            ],
            "cloud": [*rings, Line("guided", *now["cloud"], "gamma", "points")],
            "swarm": [*rings, Line("particles", *now["swarm"], "reward", "points")],
            "readout": [(name, value, ".3g") for name, value in zip(names, now["readout"], strict=True)],
            "message": _TILT_SAYS[now["key"]],
            "warn": now["key"] == "biased",
        }

    box = {"xlim": (-4, 4), "ylim": (-4, 4)}
    return Explorer(
        "tilt",
        [slider],
        [
            Panel("line", "On the line, r_{low} = x", "x", "density", xlim=_BINS[:2], ylim=(0, 0.62), wide=True),
            Panel("cloud", "In the plane, r_{low} = −|x|²: guided", "x_{1}", "x_{2}", **box),
            Panel("swarm", "In the plane: particles", "x_{1}", "x_{2}", **box),
        ],
        compute,
        _read("explorer_tilt.js"),
        {
            "lams": values,
            "frames": frames,
            "names": names,
            "base": base,
            "grid": grid.tolist(),
            "middles": middles,
            "says": _TILT_SAYS,
        },
        title="The tilted law, three ways",
        caption=(
            f"A chain of {steps} steps, η = 1, exact denoiser. On the line {samples:,} samples or particles, in the "
            f"plane {points:,} shown of {8 * points:,}; one seed. Mean: on the line. Distance: rms from the middle, in "
            "the plane."
        ),
        alt=(
            "Explorer of tilted laws: a slider for lambda changes a density on the line and two clouds in the plane, "
            "exact, guided and by particles."
        ),
    )


# ---- the gamma explorer -------------------------------------------------------------------------------------------
_GAMMA_SAYS = {
    "turned": "The penalty gradient points the wrong way here: θ_{γ} absorbs SHARE of f instead of asking q. Raise γ.",
    "weak": "θ_{γ} absorbs SHARE of f, and the gradient for q is off by more than a tenth. Raise γ.",
    "fine": "The penalty gradient is within a tenth of the hypergradient here; θ_{γ} absorbs SHARE of f.",
}


def linear_gaussian_gamma(oracle: oracles.LinearGaussianSchedule, q: Tensor, gamma: float) -> Tensor:
    """a_gamma (T,) of the linear-Gaussian oracle as `solve_gamma` gives it, without Newton's method, where G <= s.

    The gains p_k + c_k a_k along the grid couple only through their product m: stationarity fixes every a_k by m, and
    m lies between G(a_star) and s. Raises ValueError where the sampler overshoots (G > s).
    """
    abar, star = oracle.abar(q), oracle.solve_star(q)
    t = torch.tensor(oracle.ts)
    a_t, a_s = abar[t], abar[torch.tensor([*oracle.ts[1:], 0])]
    slope = (1 - a_s).sqrt() - ((1 - a_t) * a_s / a_t).sqrt()  # c_k
    gain = (a_s / a_t).sqrt() + slope * star[t - 1]
    width = a_t * oracle.s**2 + 1 - a_t
    low, high = gain.prod(), torch.tensor(oracle.s, dtype=torch.float64)
    if low > high or not (gain > 0).all():
        raise ValueError(f"G = {low.item():.4g} must not exceed s = {oracle.s:g}; take oracle.solve_gamma")
    for _ in range(80):  # bisection
        m = (low + high) / 2
        pull = oracle.T / gamma * (m - oracle.s) * m
        shift = -2 * pull * slope / (width * gain + ((width * gain) ** 2 - 4 * width * slope**2 * pull).sqrt())
        low, high = (m, high) if (gain + slope * shift).prod() > m else (low, m)
    found = star.clone()
    found[t - 1] += shift
    return found


def gamma_explorer() -> Explorer:
    """Algorithm 6 where everything is exact: what gamma does to the gradient in a schedule, and who absorbs f.

    The problem is `oracles.LinearGaussianSchedule()` at q = (0, end, 1, 0.008); values at every setting are embedded.
    """
    oracle, names = oracles.LinearGaussianSchedule(), ("start", "end", "tau")
    sliders = (
        Slider("gamma", "γ", 1.0, 1e9, 100.0, log=2, format=".2g", hint="penalty constant"),
        Slider("end", "end", 0.8, 1.0, 0.9, step=0.02, format=".2f", hint="of the schedule"),
    )
    gammas, ends = (slider.grid() for slider in sliders)
    x = torch.linspace(-2, 2, 81, dtype=torch.float64).tolist()
    table, limits = [], []  # by end, then by gamma
    for end in ends:
        q = torch.tensor([0.0, end, *schedules.DEFAULT_Q["cosine"][2:]], dtype=torch.float64)
        star, row = oracle.solve_star(q), []
        value = oracle.value(point := q.clone().requires_grad_())
        hyper = torch.autograd.grad(value, point)[0][:3].tolist()
        limits.append([value.item(), *hyper])
        for gamma in gammas:
            tilted = linear_gaussian_gamma(oracle, q, gamma)
            grad, info = estimators.penalty_grad(oracle, q, star, tilted, gamma)
            row.append([info["f"], info["f"] + gamma * info["gap"], *grad[:3].tolist()])
        table.append([[float(f"{v:.6g}") for v in entry] for entry in row])
    limits = [[float(f"{v:.6g}") for v in row] for row in limits]

    def compute(gamma: float, end: float, which: str) -> dict[str, Any]:
        i = min(range(len(ends)), key=lambda k: abs(ends[k] - end))
        j = min(range(len(gammas)), key=lambda k: abs(math.log(gammas[k] / gamma)))
        k = names.index(which)
        (f_star, *hyper), (f, _, *grad) = limits[i], table[i][j]
        share, off = 1 - f / f_star, abs(grad[k] - hyper[k])
        key = "turned" if grad[k] * hyper[k] < 0 else "weak" if off > 0.1 * abs(hyper[k]) else "fine"

        def law(std: float) -> list[float]:
            return [math.exp(-(v**2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi)) for v in x]

        return {
            "laws": [
                Line("data", x, law(oracle.s), "base", "area"),
                Line("θ_{∗}", x, law(oracle.s - math.sqrt(f_star)), "star"),
                Line("θ_{γ}", x, law(oracle.s - math.sqrt(f)), "gamma"),
            ],
            "grad": [
                Line("", [], [0.0], "zero", "hline"),
                Line("", [gammas[j]], [], "marker", "vline"),
                Line("hypergradient", [gammas[0], gammas[-1]], [hyper[k]] * 2, "star"),
                Line("penalty gradient", gammas, [row[2 + k] for row in table[i]], "gamma"),
            ],
            "value": [
                Line("", [ends[i]], [], "marker", "vline"),
                Line("f(q, θ_{∗}(q))", ends, [row[0] for row in limits], "star"),
                Line("L_{γ}(q)", ends, [rows[j][1] for rows in table], "gamma"),
            ],
            "readout": [
                ("f at θ_{∗}", f_star, ".3g"),
                ("f at θ_{γ}", f, ".3g"),
                (f"penalty gradient in {which}", grad[k], ".3g"),
                (f"hypergradient in {which}", hyper[k], ".3g"),
            ],
            "message": _GAMMA_SAYS[key].replace("SHARE", f"{100 * share:.0f} %"),
            "warn": key != "fine",
        }

    return Explorer(
        "gamma",
        [*sliders, Choice("which", "derivative in", {name: name for name in names}, "end")],
        [
            Panel("grad", "Gradient in the schedule", "γ", "d/dq", xlog=True, xlim=(gammas[0], gammas[-1])),
            Panel("value", "Objective", "end", "f", xlim=(ends[0], ends[-1]), ylim=(0, None)),
            Panel("laws", "What the sampler draws", "x", "density", xlim=(-2, 2), ylim=(0, None), wide=True),
        ],
        compute,
        _read("explorer_gamma.js"),
        {
            "gammas": gammas,
            "ends": ends,
            "names": names,
            "table": table,
            "limits": limits,
            "s": oracle.s,
            "x": x,
            "says": _GAMMA_SAYS,
        },
        title="Who gets to improve the samples: the schedule, or θ_{γ}?",
        caption=(
            f"Data N(0, {oracle.s:g}²), a linear denoiser, T = {oracle.T}, {len(oracle.ts)} DDIM steps, cosine "
            "schedule with start = 0, τ = 1. Exact: both lower levels solved, no sampling."
        ),
        alt=(
            "Explorer of the penalty constant for a noise schedule: sliders for gamma and end change a gradient, an "
            "objective and the law of the samples."
        ),
    )


# ---- the samples explorer -----------------------------------------------------------------------------------------
_GREYS = 64  # levels that a pixel is kept in, each a character from "0" on


@dataclass(frozen=True)
class Tilted:
    """What `samples_explorer` shows at one lambda: images (k, H, W) in [-1, 1], E r_up with its error, E r_low, KL."""

    lam: float
    images: Tensor
    up: float
    up_se: float
    low: float
    kl: float
    how: str


def samples_explorer(frames: Mapping[str, Sequence[Tilted]], *, up: str, low: str, note: str) -> Explorer:
    """Real samples of the tilted law as lambda moves, for each prompt, above the curve of the upper reward.

    frames  prompt -> what there is at increasing lambda, the same values and numbers of images for every prompt;
            lambda = infinity is the pre-trained model
    up, low  names of the rewards;  note: where samples and numbers come from
    Raises ValueError if prompts differ in their values of lambda, or these do not increase.
    """
    prompts = list(frames)
    lams = [frame.lam for frame in frames[prompts[0]]]
    for prompt in prompts:
        if [frame.lam for frame in frames[prompt]] != lams or lams != sorted(set(lams)):
            raise ValueError(f"lambda of {prompt!r} must increase and be the same for every prompt: {lams}")
    names = ["∞ (pre-trained)" if math.isinf(lam) else format_number(lam, ".2g") for lam in lams]
    finite = [lam for lam in lams if math.isfinite(lam)]

    def pack(image: Tensor) -> list[str]:
        levels = ((image.double().clamp(-1, 1) + 1) / 2 * (_GREYS - 1)).round().long()
        return ["".join(chr(48 + level) for level in row) for row in levels.tolist()]

    data = {
        prompt: {
            "images": [[pack(image) for image in frame.images] for frame in found],
            "up": [round(frame.up, 3) for frame in found],
            "se": [round(frame.up_se, 3) for frame in found],
            "low": [round(frame.low, 3) for frame in found],
            "kl": [round(frame.kl, 3) for frame in found],
            "how": [frame.how for frame in found],
        }
        for prompt, found in frames.items()
    }

    def compute(at: float, prompt: str) -> dict[str, Any]:
        now, i, n = data[prompt], round(at), len(finite)
        best = max(range(len(lams)), key=lambda k: now["up"][k])

        def unpack(rows: list[str]) -> list[list[float]]:
            return [[2 * (ord(c) - 48) / (_GREYS - 1) - 1 for c in row] for row in rows]

        level = now["up"][-1] if n < len(lams) else None
        return {
            "samples": [Image(str(k + 1), unpack(rows)) for k, rows in enumerate(now["images"][i])],
            "curve": [
                *([Line("pre-trained", [], [level], "base", "hline")] if level is not None else []),
                *([Line("", [lams[i]], [], "marker", "vline")] if i < n else []),
                Line(
                    "+ 1.96 se", finite, [u + 1.96 * s for u, s in zip(now["up"][:n], now["se"], strict=False)], "zero"
                ),
                Line(
                    "− 1.96 se", finite, [u - 1.96 * s for u, s in zip(now["up"][:n], now["se"], strict=False)], "zero"
                ),
                Line(f"E {up}", finite, now["up"][:n], "star"),
            ],
            "readout": [
                ("λ", names[i], ".3g"),
                (f"E {up}", now["up"][i], ".2f"),
                (f"E {low}", now["low"][i], ".2f"),
                ("KL from p_{0}", now["kl"][i], ".2f"),
                ("measured by", now["how"][i], ".3g"),
                ("best of these", names[best], ".3g"),
            ],
            "message": "",
            "warn": False,
        }

    return Explorer(
        "samples",
        [
            Slider("at", "from over-optimised to pre-trained", 0, len(lams) - 1, len(lams) - 1, step=1, format=".0f"),
            Choice("prompt", "prompt", {prompt: prompt for prompt in prompts}, prompts[0]),
        ],
        [
            Panel("samples", "Samples", kind="images", wide=True),
            Panel("curve", "The upper reward", "λ", f"E {up}", xlog=True, xlim=(finite[0], finite[-1]), wide=True),
        ],
        compute,
        _read("explorer_samples.js"),
        {
            "prompts": data,
            "lams": finite,
            "names": names,
            "greys": _GREYS,
            "labels": {"up": f"E {up}", "low": f"E {low}"},
        },
        title="What the reward does to the images",
        caption=note,
        alt="Explorer of samples: a slider for lambda changes a row of generated digits and marks a place on a curve.",
    )
