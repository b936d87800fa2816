"""The browser that prints the book and that the tests click with: Chromium through playwright."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
INSTALL = "`sudo apt-get install chromium` (Debian, Ubuntu), or `.venv/bin/playwright install chromium`"


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium: the system's, else playwright's own. Raises RuntimeError that says how to install one."""
    from playwright.sync_api import Error, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    system = next(filter(None, map(shutil.which, names)), None)
    if system is None and Path("/Applications/Google Chrome.app").is_dir():
        system = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=system, args=FLAGS)
        except Error as error:
            raise RuntimeError(f"no browser ({str(error).splitlines()[0]}). Install one: {INSTALL}") from error
        try:
            yield browser
        finally:
            browser.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A server for a folder on this machine; its address, without a slash at the end."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def settle(page: Any) -> None:
    """Wait until a page's mathematics and fonts are there."""
    wait = "if (window.MathJax && MathJax.startup) await MathJax.startup.promise; await document.fonts.ready;"
    page.evaluate(f"async () => {{ {wait} }}")
