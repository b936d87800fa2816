"""The kernel's side of an explorer: ipywidgets that drive its Python, and a matplotlib picture."""

from __future__ import annotations

import asyncio
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..writing import format_number, markup, strip
from .controls import ROLES, Choice, Panel, Slider


class Plots:
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
        axes.set_title(markup(panel.title, False), fontsize=10, weight="bold", loc="left")
        artists = []
        for i, image in enumerate(images):
            rows, columns = len(image["pixels"]), len(image["pixels"][0])
            place, look = (i * 1.1, i * 1.1 + 1, rows / columns, 0), {"vmin": -1, "vmax": 1, "cmap": "gray"}
            artists.append(axes.imshow(image["pixels"], extent=place, interpolation="nearest", **look))
            axes.text(
                i * 1.1 + 0.5, rows / columns + 0.08, markup(image["label"], False), ha="center", va="top", size=8
            )
        axes.set_xlim(0, len(images) * 1.1 - 0.1)
        axes.set_ylim(max((len(i["pixels"]) / len(i["pixels"][0]) for i in images), default=1) + 0.3, 0)
        axes.set_axis_off()
        if panel.xlabel:
            look = {"transform": axes.transAxes, "ha": "center", "va": "top", "size": 9}
            axes.text(0.5, 0, markup(panel.xlabel, False), **look)
        return artists

    def _new_lines(self, axes: Any, panel: Panel, lines: Sequence[dict[str, Any]]) -> list[Any]:
        artists, named = [], set()
        for line in lines:
            entry = (line["label"], line["role"], line["shape"])
            label = None if entry in named else markup(line["label"], False) or None
            named.add(entry)
            colour, _, dash, width = ROLES[line["role"]]
            style = (0, tuple(float(d) / width for d in dash.split())) if dash else "-"
            look = {"color": colour, "linewidth": 0.8 * width, "label": label}
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
        axes.set_title(markup(panel.title, False), fontsize=10, weight="bold", loc="left", pad=22)
        axes.set_xlabel(markup(panel.xlabel, False))
        axes.set_ylabel(markup(panel.ylabel, False))
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


def live(explorer: Any) -> Any:
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
    readout = ipywidgets.HTML()
    plots = Plots(explorer.panels)
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
            f'<span style="margin-right:1.5em">{markup(row[0], True)} '
            f"<b>{html.escape(format_number(*row[1:]))}</b></span>"
            for row in result["readout"]
        )
        sign = "⚠" if result["warn"] else "✓"
        note = f"<div>{sign} {markup(result['message'], True)}</div>" if result["message"] else ""
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
        text = strip(control.label) + (f" ({control.hint})" if control.hint else "")
        look = {"style": {"description_width": "initial"}, "layout": ipywidgets.Layout(width="auto", min_width="280px")}
        if isinstance(control, Choice):
            widget = ipywidgets.Dropdown(
                options=[(label, value) for value, label in control.options.items()],
                value=control.value,
                description=text,
                **look,
            )
        elif control.names:
            options = list(zip(control.names, control.grid(), strict=True))
            widget = ipywidgets.SelectionSlider(options=options, value=control.value, description=text, **look)
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
            if control.log or control.names:
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
        parts.insert(0, ipywidgets.HTML(f"<b>{markup(explorer.title, True)}</b>"))
    if explorer.caption:
        parts.append(ipywidgets.HTML(f'<div style="line-height:1.4">{markup(explorer.caption, True)}</div>'))
    redraw()
    return ipywidgets.VBox(parts)


def _set_range(widget: Any, new: Mapping[str, float]) -> None:
    """New limits and value of a slider; the limits are widened first, since min must never exceed max on the way."""
    widget.min = min(widget.min, new["min"])
    widget.max = max(widget.max, new["max"])
    widget.value = new["value"]
    widget.min, widget.max = new["min"], new["max"]
    widget.step = new.get("step", widget.step)
