"""Explorers: figures with sliders, the same in a live kernel and on a page that has none.

An `Explorer` is a list of controls, a list of panels and one function of the controls' values, written twice: in
Python (`compute`, the package's own code) and in a few lines of JavaScript (`js`). In a live kernel ipywidgets drive
the Python; in the built book the page carries the JavaScript, with no kernel and no network. tests/lab/explorers
runs the JavaScript in a browser and compares it with the Python.

    explorer = schedule_explorer(digit)
    explorer.show()
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from ..writing import format_number, markup, strip
from .controls import ROLES, Choice, Image, Line, Panel, Slider

_COLOURS = {  # the rest of the dark theme; the light one is in engine.css
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


class Explorer:
    """A figure with controls; see the module's text.

    name      letters, digits and hyphens: the base of all element ids
    compute   (**values) -> {panel id: [Line or Image, ...], "readout": [(label, number or string[, format]), ...],
              "message": text, "warn": whether it is a warning}
    js        body of a JavaScript function (values, data, memo, format) that returns the same as plain objects
              {label, x, y, role, shape} or {label, pixels}; memo is an object that is kept from call to call, format
              is `writing.format_number`
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
        key, runtime, css = assets()
        spec = {
            "title": self.title,
            "controls": [_control_spec(control) for control in self.controls],
            "panels": [asdict(panel) for panel in self.panels],
            "roles": {role: {"dash": dash, "width": width} for role, (_, _, dash, width) in ROLES.items()},
            "data": self.data,
        }
        first = self.evaluate()["readout"]
        shown = "; ".join(f"{strip(row[0])} = {format_number(*row[1:])}" for row in first)
        fallback = "This figure has sliders and needs JavaScript." + (
            f" At its first setting: {shown}." if shown else ""
        )
        caption = f'<div class="blx-caption">{markup(self.caption, True)}</div>' if self.caption else ""
        element, given, extra = f"blx-{self.name}", "(values, data, memo, format)", self.extra()
        return (
            f"<style>{css}</style>"
            f'<div class="blx" id="{element}" role="figure" aria-label="{html.escape(self.alt, quote=True)}">'
            f'<p class="blx-fallback">{html.escape(fallback)}</p>{caption}</div>'
            f"<script>{runtime}\n"
            f'window.{key}.mount("{element}", {embed_json(spec)}, {given} => {{\n{_slim(self.js)}\n}}{extra});'
            "</script>"
        )

    def extra(self) -> str:
        """A last argument of the runtime's `mount`, after a comma: what a figure adds to the page by itself."""
        return ""

    # ---- with a kernel ------------------------------------------------------------------------------------------
    def figure(self, result: dict[str, Any], width: float = 9.0) -> Any:
        """A matplotlib Figure of what `evaluate` returned."""
        from .live import Plots

        plots = Plots(self.panels, width)
        plots.update(result)
        return plots.figure

    def live(self) -> Any:
        """The explorer as ipywidgets that call `compute`. Returns a VBox; needs ipywidgets and matplotlib."""
        from .live import live

        return live(self)

    def show(self) -> Any:
        """For the last line of a cell: widgets in a live kernel, HTML in a batch run or where ipywidgets is missing."""
        from IPython.display import HTML

        from ..parameters import is_batch

        if not is_batch():
            try:
                return self.live()
            except ImportError:
                pass  # the HTML works without ipywidgets
        return HTML(self.html())


def embed_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `</`, no `<!--`, no bare line separators, no NaN."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for bad, good in (("</", "<\\/"), ("<!--", "<\\u0021--"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(bad, good)
    return text


def read_asset(file: str) -> str:
    return resources.files(__package__).joinpath(file).read_text("utf-8")


def _slim(source: str) -> str:
    """Without lines of comment and without indentation."""
    return re.sub(r"^\s+", "", re.sub(r"^\s*//.*\n", "", source, flags=re.MULTILINE), flags=re.MULTILINE)


@functools.cache
def assets() -> tuple[str, str, str]:
    """The runtime's global name (with a hash, so that two versions can share a page), its source, the styles."""
    runtime, css = read_asset("engine.js"), read_asset("engine.css")
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
