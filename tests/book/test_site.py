"""The built site as a reader meets it: every page, without a network, in Chromium."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

import pages
from browser import settle

ROOT = Path(__file__).resolve().parents[2]
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


EQUATIONS = """() => {
  const found = { wide: [], hidden: [] };
  for (const line of document.querySelectorAll(".bd-article div.math")) {
    const edges = [...line.querySelectorAll("mjx-c")].map((c) => c.getBoundingClientRect().left);
    const begins = line.textContent.trim().slice(0, 30);
    if (line.scrollWidth > line.clientWidth + 2) found.wide.push(begins);
    if (Math.min(...edges) < line.getBoundingClientRect().left - 2) found.hidden.push(begins);
  }
  return found;
}"""


LOADED = """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""


def ready(page, url: str) -> None:
    """Load a page and wait until its mathematics is set."""
    page.goto(url, wait_until="load")
    settle(page)


AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")


def violations(page, unseen: str = "mjx-container", **options) -> list[str]:
    """What axe-core finds wrong with a page, by rule and element; what is `unseen` is taken out of it before."""
    page.add_style_tag(content="* { transition: none !important }")
    page.evaluate("(unseen) => document.querySelectorAll(unseen).forEach((node) => node.remove())", unseen)
    page.evaluate(AXE)
    run = "(options) => axe.run({ resultTypes: ['violations'], preload: false, ...options })"
    found = page.evaluate(run, options)["violations"]
    return [f"{one['id']}: {node['target']} {node['html'][:120]}" for one in found for node in one["nodes"]]


def darken(page) -> None:
    page.evaluate("Object.assign(document.documentElement.dataset, { theme: 'dark', mode: 'dark' })")


@pytest.mark.parametrize("address", PAGES)
def test_page_loads_and_sets_its_mathematics(page, site_url, address):
    # The fixtures assert that nothing was asked of another machine and no error was logged.
    ready(page, f"{site_url}/{address}")
    assert page.evaluate(LOADED) < 2_000_000
    assert page.locator(".bd-article h1").count() == 1
    written = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= written
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0
    if address in NOTEBOOK_PAGES:
        assert written > 0
    # Display equations fit a desktop's line; on a phone they begin where the line begins and scroll.
    assert page.evaluate(EQUATIONS)["wide"] == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate(EQUATIONS)["hidden"] == []


@pytest.mark.parametrize("address", PAGES)
def test_everybody_can_read_a_page(page, site_url, address):
    ready(page, f"{site_url}/{address}")
    unseen = "mjx-container"  # thousands of boxes, one a character
    if address != NOTEBOOK_PAGES[0]:
        unseen += ", div.highlight pre"  # one style for all code: seen on one page
    assert not violations(page, unseen)
    darken(page)
    assert not violations(page, unseen, runOnly=["color-contrast"])


def test_mathjax_is_our_own_copy(page, site_url):
    ready(page, f"{site_url}/{NOTEBOOK_PAGES[0]}")
    assert page.evaluate("MathJax.version").startswith("3.")
    fonts = page.evaluate("performance.getEntriesByType('resource').map(e => e.name).filter(n => /woff/.test(n))")
    assert any("jslib/mathjax/output/chtml/fonts" in name for name in fonts)
    assert all(name.startswith(site_url) for name in fonts)


def test_root_leads_to_the_first_page(page, site_url):
    page.goto(site_url + "/")
    page.wait_for_url(f"{site_url}/{PAGES[0]}")


def test_search_finds_a_word_and_leads_to_its_page(page, site_url):
    word = "hypergradient"
    page.goto(f"{site_url}/{PAGES[0]}")
    page.keyboard.press("Control+k")
    page.wait_for_function("document.activeElement.tagName === 'INPUT'")
    page.keyboard.type(word)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("search.html"))
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0", timeout=20_000)
    page.wait_for_function("/found|matching/i.test(document.querySelector('#search-results').innerText)")
    page.locator("#search-results li a").first.click()
    page.wait_for_url(re.compile("/(notebooks|book)/"))
    assert word in page.locator(".bd-article").inner_text().lower()


def test_search_puts_titles_first_and_quotes_sentences(page, site_url, site):
    page.goto(f"{site_url}/search.html?q=lambda")
    page.wait_for_function("document.querySelectorAll('#search-results li .context').length > 9", timeout=20_000)
    assert "03_learning_lambda" in page.locator("#search-results li a").first.get_attribute("href")
    said = " ".join(page.locator("#search-results .context").all_inner_texts())
    assert not re.search(r"\\\\[a-z(\[]|import |= plots\.", said), said
    for address in NOTEBOOK_PAGES:  # the cell for Colab is in the download, not on the page or in the index
        assert "Set-up for Colab" not in (site / address).read_text(encoding="utf-8"), address


def test_what_is_printed_is_light(page, site_url):
    page.goto(f"{site_url}/{NOTEBOOK_PAGES[0]}")
    darken(page)
    theme = "(event) => (window.dispatchEvent(new Event(event)), document.documentElement.dataset.theme)"
    assert [page.evaluate(theme, event) for event in ("beforeprint", "afterprint")] == ["light", "dark"]


def test_pictures_open_and_plots_turn_round_in_the_dark(page, site_url):
    page.goto(f"{site_url}/{NOTEBOOK_PAGES[0]}")
    look = "(nodes) => nodes.map((node) => getComputedStyle(node).filter)"
    plots, images = page.locator("a.plot img"), page.locator("a.enlarge:not(.plot) img")
    assert plots.count() >= 3 and images.count() >= 2
    assert set(plots.evaluate_all(look)) == {"none"}
    darken(page)
    assert {"invert" in found for found in plots.evaluate_all(look)} == {True}
    assert {"invert" in found for found in images.evaluate_all(look)} == {False}
    plots.first.click()
    page.wait_for_url(re.compile(r"_images/.*\.png$"))


def test_a_phone_scrolls_what_is_wide(new_page, site_url):
    """The first column of a wide table stays; no formula is cut off; formulas that fit are no stops of the keyboard."""
    page = new_page(viewport={"width": 375, "height": 812}, is_mobile=True, has_touch=True)
    ready(page, f"{site_url}/{NOTEBOOK_PAGES[1]}")
    cut = """(nodes) => nodes.filter((node) => node.scrollWidth > node.clientWidth + 1
        && getComputedStyle(node).overflowX !== "auto").map((node) => node.textContent)"""
    assert page.locator(".bd-article .math").evaluate_all(cut) == []
    assert page.locator("mjx-container[tabindex], .math[tabindex]").count() == 0
    wide = """(tables) => tables.map((table) => [table, table.parentElement])
        .filter(([, box]) => box.scrollWidth > box.clientWidth + 60).map(([table, box]) => {
          box.scrollLeft = 50;
          const first = table.querySelector("tbody tr > :first-child").getBoundingClientRect();
          return Math.abs(first.left - box.getBoundingClientRect().left);
        })"""
    moved = page.locator(".pst-scrollable-table-container > table, .output.text_html > table").evaluate_all(wide)
    assert moved and max(moved) < 3, moved


def test_what_pages_name_by_number_is_a_link(site):
    links = [link for page in NOTEBOOK_PAGES for link in parsed(site / page).links]
    counts = {name: sum(name in link for link in links) for name in ("#eq-", "glossary.html#term-", "api.html#")}
    assert counts["#eq-"] > 60 and counts["glossary.html#term-"] > 60 and counts["api.html#"] > 8, counts


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_what_the_search_finds(new_page, site_url, scheme):
    page = new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page.goto(f"{site_url}/search.html?q=lambda")
    page.wait_for_function("document.querySelectorAll('#search-results li .context').length > 5", timeout=20_000)
    assert not violations(page)


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


def test_keyboard_reaches_everything_and_shows_where_it_is(page, site_url):
    """Tab, from the top of a chapter with sliders: search, menu, content, sliders, each with a visible focus."""
    address = next(page for page in NOTEBOOK_PAGES if "03" in page)
    page.goto(f"{site_url}/{address}")
    focus = """() => {
        const node = document.activeElement, style = getComputedStyle(node);
        const place = node.closest(".bd-sidebar-primary") ? "menu" : node.closest(".bd-header-article") ? "header"
            : node.closest(".blx") ? "explorer" : node.closest(".bd-article") ? "content" : "other";
        const box = node.getBoundingClientRect();
        const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
        const shadow = style.boxShadow !== "none";
        return [place, node.tagName, node.className, ring || shadow, box.width > 0 && box.height > 0];
    }"""
    reached, dim = set(), []
    for _ in range(400):
        page.keyboard.press("Tab")
        place, tag, name, visible, there = page.evaluate(focus)
        reached.add((place, tag))
        if there and not visible:
            dim.append(f"{place} {tag}.{name}")
        if ("explorer", "INPUT") in reached:
            break
    wanted = {("menu", "A"), ("menu", "BUTTON"), ("header", "BUTTON"), ("content", "A"), ("explorer", "INPUT")}
    assert wanted <= reached, reached
    assert not dim, dim


def test_the_skip_link_leads_to_the_content(page, site_url):
    page.goto(f"{site_url}/{NOTEBOOK_PAGES[0]}")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.bd-main') !== null")


@pytest.mark.parametrize("address", NOTEBOOK_PAGES[:1])
def test_the_download_is_the_clean_notebook(page, site_url, address):
    page.goto(f"{site_url}/{address}")
    page.locator(".dropdown-download-buttons > button").click()
    with page.expect_download() as caught:
        page.locator(".dropdown-download-buttons a.btn-download-source-button").click()
    nb = nbformat.read(caught.value.path(), as_version=4)
    assert caught.value.suggested_filename == Path(address).with_suffix(".ipynb").name
    source = nbformat.read(ROOT / Path(address).with_suffix(".ipynb"), as_version=4)
    assert [cell.cell_type for cell in nb.cells] == [cell.cell_type for cell in source.cells]
    assert not any(cell.get("outputs") for cell in nb.cells)
    assert not any("injected-parameters" in cell.metadata.get("tags", ()) for cell in nb.cells)


def test_every_download_is_clean(site):
    for address in NOTEBOOK_PAGES:
        nb = nbformat.read(site / "_sources" / Path(address).with_suffix(".ipynb"), as_version=4)
        assert not any(cell.get("outputs") for cell in nb.cells), address


def test_pages_are_light(site):
    heavy = {address: pages.weight(site / address) for address in PAGES}
    assert max(heavy.values()) < 1_500_000, heavy


@pytest.mark.parametrize("address, name", [(PAGES[0], "pull"), (NOTEBOOK_PAGES[6], "grid")])
def test_a_live_figure_runs_from_the_disk(browser, site, address, name):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / address).as_uri())
    figure = page.locator(f"#blx-{name}")
    figure.locator(".blx-load").click()
    figure.locator(".blx-readout", has_text="second").wait_for(timeout=120_000)
    assert figure.locator("canvas").count() == {"pull": 16, "grid": 1}[name]
    page.close()


def test_icons_are_drawn_without_a_script(page, site_url):
    page.goto(f"{site_url}/{PAGES[0]}")
    page.evaluate("document.fonts.ready")
    button = page.locator(".primary-toggle .fa-bars").first
    assert button.evaluate("(node) => getComputedStyle(node, '::before').content") == '"\uf0c9"'
    assert page.evaluate("document.fonts.check('900 16px \"Font Awesome 6 Free\"')")
    assert button.bounding_box()["width"] > 8


def test_the_map_names_every_chapter_with_its_time(page, site_url, site):
    page.goto(f"{site_url}/{PAGES[0]}")
    cards = page.locator(".chapter-map .sd-card")
    assert cards.count() == len(NOTEBOOK_PAGES)
    for card, address in zip(cards.all(), NOTEBOOK_PAGES, strict=True):
        assert card.locator("a").first.get_attribute("href").endswith(Path(address).name)
        assert re.search(r"CPU \d+(\.\d)? (s|min|h) \(smoke\) · GPU", card.inner_text())
    for number in (0, len(NOTEBOOK_PAGES) - 1):
        cards.nth(number).locator("a").first.click()
        page.wait_for_url(f"{site_url}/{NOTEBOOK_PAGES[number]}")
        page.go_back()


def test_the_status_page_is_filled_in(page, site_url, site):
    page.goto(f"{site_url}/book/status.html")
    text = page.locator(".bd-article").inner_text()
    status = json.loads((site.parents[2] / "status.json").read_text())
    assert "SIZE-OF" not in text and "<!--" not in page.content().split('class="bd-article"')[1][:3000]
    assert status["versions"]["torch"] in text and status["hardware"]["cpu"] in text
    for name, size in status["page_bytes"].items():
        row = page.locator("#the-notebooks tr", has=page.locator(f'a[href$="{name}.html"]')).inner_text()
        assert f"{size / 1000:.0f}" in row and f"{status['peak_gib'][name]:.2f}" in row
    for result in (ROOT / "book" / "results").glob("*.json"):
        assert result.stem in text.replace("\u200b", ""), result.stem


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
        if not address:
            assert colab == 0, page
        elif page in NOTEBOOK_PAGES:
            assert colab >= 2, page
        else:
            assert colab == (len(NOTEBOOK_PAGES) if page == PAGES[0] else 0), page


def test_pages_tell_nothing_about_the_machine(site):
    home = str(Path.home())
    for page in PAGES:
        text = (site / page).read_text(encoding="utf-8")
        assert str(ROOT) not in text, page
        if len(home) > 5:
            assert home not in text, page


# What a reader must not meet in the output of a cell; the last three in tables only, where text is no code.
RAW = {
    "a tensor": r"\btensor\(",
    "a string in quotes": r"\A(['\"]).*\1\Z",
    "minus zero": r"(?<![\w.])[-−]0(?:\.0+)?(?![\w.])",
    "an exponent": r"\de\+\d",
    "a machine's path": r"site-packages|Warning:",
    "a range in dots": r"\d \.\. |\.\. \d",
}
RAW_IN_TABLES = {
    "a hyphen as a minus": r"(?<![\w.)\]])-[\d.(]",
    "an exponent in a table": r"\b\d(?:\.\d+)?e[+-]?\d{1,3}\b",
    "a name of the code": r"\babar|\beps_hat|\b[A-Za-zθλγᾱ]_(?:gamma|star|hat|\w\b)|\btheta_",
}


def raw_output(text: str, table: bool) -> list[str]:
    """What in the output of a cell is written for a machine."""
    text, patterns = text.strip(), RAW | (RAW_IN_TABLES if table else {})
    found = [f"{name}: {hit[0]!r}" for name, pattern in patterns.items() for hit in re.finditer(pattern, text)]
    numbers = re.findall(r"(?<![\w.])\d+\.\d+", text)
    return found + [f"too many digits: {n}" for n in numbers if len(n.replace(".", "").lstrip("0")) > 8]


def outputs_of(notebook: Path) -> list[tuple[str, str, bool]]:
    """Cell, text and whether it is a table, for what a page shows of each output that is no picture or explorer."""
    shown = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if {"remove-cell", "remove-output", "injected-parameters"} & set(cell.metadata.get("tags", ())):
            continue
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            page = data.get("text/html", "")
            if "blx" in page or any(kind.startswith("image/") for kind in data):
                continue
            text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<su[bp]>", "", page)))
            text = text or data.get("text/markdown") or output.get("text") or data.get("text/plain", "")
            shown.append((cell.get("id", "?"), text, bool(page)))
    return shown


@pytest.mark.parametrize("address", NOTEBOOK_PAGES)
def test_outputs_are_written_for_readers(site, address):
    shown = outputs_of(site.parents[2] / "src" / Path(address).with_suffix(".ipynb"))
    assert shown
    raw = {(cell, what) for cell, text, table in shown for what in raw_output(text, table)}
    assert not raw, sorted(raw)


@pytest.mark.parametrize(
    "text, table, what",
    [
        ("tensor([2.36, 3.55])", False, "a tensor"),
        ("'Full run: not yet run.'", False, "a string in quotes"),
        ("at -0.05440000000000001", False, "too many digits"),
        ("[1.6666666666666667]", False, "too many digits"),
        ("boundary at lam = 1e+04", False, "an exponent"),
        ("-0.00", False, "minus zero"),
        ("0.16 .. 100", True, "a range in dots"),
        ("-9.74", True, "a hyphen as a minus"),
        ("2.4e-06", True, "an exponent in a table"),
        ("abar_T", True, "a name of the code"),
        ("root of L_gamma", True, "a name of the code"),
    ],
)
def test_raw_output_is_noticed(text, table, what):
    assert [found.split(":")[0] for found in raw_output(text, table)] == [what]


def test_readable_output_passes():
    text = "q = 0.05, -3.1; 2.3e-05 apart; 'bold' in a prompt; 2.14.1+cu130; 2026-11-27; commit 39cd9929; 0.00012345678"
    assert raw_output(text, False) == []
    assert raw_output("−9.74 ± 0.5, 10⁴, 2.4 × 10⁻⁶, ᾱ T, r up, 0.16 to 100, h-transform, 8-bit, mnist28", True) == []
