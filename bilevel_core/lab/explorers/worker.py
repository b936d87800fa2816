"""Live explorers: figures that run the book's own networks in the reader's browser, once a button has loaded them.

A `LiveExplorer` is an `Explorer` with a third piece of JavaScript, `run`, that adds buttons and asks a worker. The
worker is TensorFlow.js (vendor/) with a few small files: layers.js, networks.js, cosine.js, sampler.js, worker.js.
Weights come as one file of safetensors, a `Pack`. On the site both lie beside the pages, where book/build.py writes
them, and load by script elements, so that a page opened from a disk works; in a notebook with a kernel they stand in
the output itself.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .engine import Explorer, _slim, embed_json, read_asset

FOLDER = "../_static/live/"  # from every page of the site
OWN = ("layers.js", "networks.js", "cosine.js", "sampler.js", "worker.js")


@dataclass(frozen=True)
class Pack:
    """The weights of a figure: a name, and the bytes of a safetensors file that holds F16 and F32 alone."""

    name: str
    content: bytes

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def version(self) -> str:
        return self.checksum[:10]


def vendored(file: str) -> bytes:
    """A file of vendor/. Raises ValueError where its SHA-256 is not the one of vendor/versions.json."""
    folder = resources.files(__package__).joinpath("vendor")
    expected = json.loads(folder.joinpath("versions.json").read_text("utf-8"))["sha256"][file]
    content = folder.joinpath(file).read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"vendored file {file} was altered (its SHA-256 is not {expected}): install the package again")
    return content


@functools.cache
def runtime() -> tuple[str, str]:
    """What every worker runs, as a script for the page, and its version."""
    parts = [vendored(f"tf-{name}.es2017.min.js").decode() for name in ("core", "backend-wasm")]
    source = "\n".join([*parts, *(_slim(read_asset(name)) for name in OWN)])
    wasm = base64.b64encode(vendored("tfjs-backend-wasm-simd.wasm")).decode()
    version = hashlib.sha256((source + wasm).encode()).hexdigest()[:10]
    return _file("runtime", version, {"script": source, "wasm": wasm}), version


def pack_script(pack: Pack) -> str:
    """A pack as a script for the page."""
    return _file(pack.name, pack.version, {"safetensors": base64.b64encode(pack.content).decode()})


def _file(name: str, version: str, content: dict[str, str]) -> str:
    return f"(window.blxFiles = window.blxFiles || {{}})[{embed_json(f'{name} {version}')}] = {embed_json(content)};\n"


class LiveExplorer(Explorer):
    """An explorer whose page runs networks.

    run   body of a JavaScript function (figure) that calls `connect` of live.js; see engine.js for what it is given
    pack  the weights that its button loads
    """

    def __init__(self, *args: Any, run: str, pack: Pack, **options: Any) -> None:
        super().__init__(*args, **options)
        self.run, self.pack = run, pack
        size = sum(len(text) for text in (runtime()[0], pack_script(pack))) / 1e6
        files = {"runtime": runtime()[1], pack.name: pack.version}
        live = {"folder": FOLDER, "files": files, "pack": pack.name, "checksum": pack.checksum}
        self.data = {**self.data, "live": live | {"megabytes": f"{size:.1f}"}}

    def extra(self) -> str:
        return f",(figure) => {{\n{_slim(read_asset('live.js'))}\n{_slim(self.run)}\n}}"

    def standalone(self) -> str:
        """The HTML with runtime and weights in it, for an output that no file stands beside."""
        return "".join(f"<script>{text}</script>" for text in (runtime()[0], pack_script(self.pack))) + self.html()

    def show(self) -> Any:
        """For the last line of a cell: HTML, in a notebook with a kernel with everything in it."""
        from IPython.display import HTML

        from ..parameters import is_batch

        return HTML(self.html() if is_batch() else self.standalone())
