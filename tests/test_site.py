"""The built site as a reader meets it: every page, without a network, in Chromium."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser


def toc_pages() -> list[str]:
    """Addresses of the pages of _toc.yml, relative to the site."""
    text = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    toc = yaml.safe_load(text)
    files = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    return [f"{file}.html" for file in files]


PAGES = toc_pages()
NOTEBOOK_PAGES = [page for page in PAGES if page.startswith("notebooks/")]


class Links(HTMLParser):
    """Collects what a page refers to, and the ids that can be referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := found.get(name)))
        link = found.get("href") if tag in ("a", "link") else found.get("src")
        if link and tag in ("a", "link", "img", "script"):
            self.links.append(link)
        if tag == "img":
            self.images.append(found)


def parsed(path: Path) -> Links:
    return Links(path.read_text(encoding="utf-8"))


def ready(page, url: str) -> None:
    """Load a page and wait until its mathematics is set."""
    page.goto(url, wait_until="load")
    page.evaluate("async () => { if (window.MathJax && MathJax.startup) await MathJax.startup.promise }")


@pytest.mark.parametrize("address", PAGES)
def test_page_loads_and_sets_its_mathematics(page, site_url, address):
    # The fixtures assert that nothing was asked of another machine and no error was logged.
    ready(page, f"{site_url}/{address}")
    assert page.locator(".bd-article h1").count() == 1
    written = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= written
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0
    if address in NOTEBOOK_PAGES:
        assert written > 0


def test_mathjax_is_our_own_copy(page, site_url):
    ready(page, f"{site_url}/{NOTEBOOK_PAGES[0]}")
    assert page.evaluate("MathJax.version").startswith("3.")
    fonts = page.evaluate("performance.getEntriesByType('resource').map(e => e.name).filter(n => /woff/.test(n))")
    assert any("jslib/mathjax/output/chtml/fonts" in name for name in fonts)
    assert all(name.startswith(site_url) for name in fonts)


def test_root_leads_to_the_first_page(page, site_url):
    page.goto(site_url + "/")
    page.wait_for_url(f"{site_url}/{PAGES[0]}")


def test_search_finds_a_word(page, site_url):
    word = "diffusion"
    page.goto(f"{site_url}/search.html?q={word}")
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0", timeout=20_000)
    page.wait_for_function("/found|matching/i.test(document.querySelector('#search-results').innerText)")


def test_dark_mode_toggles_and_is_kept(page, site_url):
    page.goto(f"{site_url}/{PAGES[0]}")
    background = "getComputedStyle(document.body).backgroundColor"
    button = page.locator("button.theme-switch-button:visible").first
    seen = {}
    for _ in range(3):
        button.click()
        seen[page.evaluate("document.documentElement.dataset.mode")] = page.evaluate(background)
    assert set(seen) == {"light", "dark", "auto"}
    assert seen["light"] != seen["dark"]
    while page.evaluate("document.documentElement.dataset.mode") != "dark":
        button.click()
    page.goto(f"{site_url}/{PAGES[1]}")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("address", PAGES)
def test_phone_has_no_sideways_scrolling(new_page, site_url, address):
    page = new_page(viewport={"width": 375, "height": 812}, device_scale_factor=2, is_mobile=True, has_touch=True)
    ready(page, f"{site_url}/{address}")
    wide = page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            return [...document.querySelectorAll('.bd-article *')]
                .filter(e => e.getBoundingClientRect().right > width + 1)
                .map(e => e.tagName + '.' + e.className).slice(0, 5);
        }"""
    )
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, wide


def test_keyboard_reaches_the_content_and_the_search(page, site_url):
    page.goto(f"{site_url}/{PAGES[0]}")
    page.keyboard.press("Tab")
    assert "skip" in page.evaluate("document.activeElement.textContent").lower()
    page.keyboard.press("Control+k")
    page.wait_for_function("document.activeElement.tagName === 'INPUT'")


def test_internal_links_lead_somewhere(site):
    broken = []
    pages = {path: parsed(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    for path, found in pages.items():
        for link in found.links:
            where = urlsplit(link)
            if where.scheme or where.netloc or not (where.path or where.fragment):
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif where.fragment and target in pages and unquote(where.fragment) not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: no place {link}")
    assert not broken, broken


def test_every_image_has_a_text_alternative(site):
    bad = [
        f"{page}: {image.get('src')}"
        for page in PAGES
        for image in parsed(site / page).images
        if not (image.get("alt") or "").strip() and "logo" not in (image.get("class") or "")
    ]
    assert not bad, bad


def test_no_dead_controls(site):
    """No widget without a kernel, no launch button or badge without an address."""
    address = yaml.safe_load((site.parents[2] / "src" / "_config.yml").read_text())["repository"]["url"]
    for page in PAGES:
        text = (site / page).read_text(encoding="utf-8")
        assert "application/vnd.jupyter.widget" not in text, page
        assert "interactive(children=" not in text, page
        body = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
        assert "thebe-launch" not in body, page
        colab = body.count("colab.research.google.com/github")
        assert (colab >= 2 if page in NOTEBOOK_PAGES else colab == 0) if address else colab == 0, page


def test_pages_tell_nothing_about_the_machine(site):
    home = str(Path.home())
    for page in PAGES:
        text = (site / page).read_text(encoding="utf-8")
        assert str(ROOT) not in text, page
        if len(home) > 5:
            assert home not in text, page
