"""Shared fixtures: the built site, a server for it, and a browser that sees nothing but it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from browser import chromium, served

torch.set_num_threads(1)  # the tensors of the tests are small: more threads only wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:  # nor may the kernels of tests that share the cores: ten times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "smoke" / "site" / "_build" / "html"


def mnist_root() -> Path | None:
    """The folder named by BILEVEL_DATA when it holds MNIST, else None."""
    root = os.environ.get("BILEVEL_DATA")
    return Path(root) if root and (Path(root) / "MNIST").is_dir() else None


def pytest_report_header() -> str:
    return f"MNIST: {mnist_root() or 'BILEVEL_DATA names no folder with MNIST/; tests marked mnist are left out'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (and count as deselected) the tests that read MNIST, or want a GPU, where there is none at hand."""
    absent = ["mnist"] * (mnist_root() is None) + ["cuda"] * (not torch.cuda.is_available())
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    if not (SITE / "index.html").is_file():
        pytest.fail(f"no built site in {SITE}: run `make book PROFILE=smoke` first", pytrace=False)
    return SITE


@pytest.fixture(scope="session")
def site_url(site: Path) -> Iterator[str]:
    """Address of the site on this machine, without a slash at its end."""
    with served(site) as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, as the book is printed with."""
    try:
        with chromium() as found:
            yield found
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def new_page(browser):
    """Function that opens a page in a context of its own, e.g. new_page(viewport={"width": 390, "height": 844}).

    Requests to anything but 127.0.0.1 are refused and listed in `page.outside`; errors of the console
    and uncaught exceptions in `page.problems`. When the test ends both must be empty.
    """
    opened = []

    def open_page(**options):
        page = browser.new_context(**options).new_page()
        page.outside, page.problems = [], []

        def only_here(route):
            if urlsplit(route.request.url).hostname == "127.0.0.1":
                route.continue_()
            else:
                page.outside.append(route.request.url)
                route.abort()

        page.context.route(lambda url: url.startswith(("http:", "https:")), only_here)
        page.on("console", lambda m: page.problems.append(f"{m.text} {m.location}") if m.type == "error" else 0)
        page.on("pageerror", lambda error: page.problems.append(f"uncaught: {error}"))
        opened.append(page)
        return page

    yield open_page
    outside = [url for page in opened for url in page.outside]
    problems = [text for page in opened for text in page.problems]
    for page in opened:
        page.context.close()
    assert not outside, f"requests that left this machine: {outside}"
    assert not problems, f"errors in the browser's console: {problems}"


@pytest.fixture
def page(new_page):
    """One page on a desktop screen; see new_page."""
    return new_page(viewport={"width": 1280, "height": 900})
