"""What is taken off the built site, on styles, pages and fonts of its own; tests/book/test_site.py sees the whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

import light

FONTS = "../vendor/fontawesome/webfonts/fa-solid-900"
CSS = (
    '@charset "UTF-8";/* .gone{} " */:root{--icon:"\\f0c9";--sign:"\uf071"}.used,.gone:hover{a:b}.gone .used{c:d}'
    ".fa-bars:before{content:'}'}.fa-ghost:before{content:\"\\f6e2\"}@media (min-width:1px){.gone{e:f}}"
    "@media print{.used:not(.gone){g:h}.gone>.used{i:j}}@font-face{font-family:x;"
    f'src:url({FONTS}.woff2) format("woff2"),url({FONTS}.ttf) format("truetype")}}'
)


def test_rules_that_no_page_can_match_go_and_nothing_else():
    kept = light.purge(CSS, {"used", "fa-bars"})
    assert kept.startswith(
        '@charset "UTF-8";:root{--icon:"\\f0c9";--sign:"\uf071"}.used{a:b}.fa-bars:before{content:\'}\'}'
    )
    assert "gone{" not in kept and "ghost" not in kept and "c:d" not in kept and "e:f" not in kept
    assert "@media print{.used:not(.gone){g:h}}" in kept and "@font-face{font-family:x;" in kept
    assert light.purge(kept, {"used", "fa-bars"}) == kept


def test_scripts_go_by_their_names():
    page = (
        '<head>\n <script defer src="../_static/a.js?digest=1"></script>\n <script src="../a.json.js"></script></head>'
    )
    assert light.without_scripts(page, ["a.js"]) == '<head>\n <script src="../a.json.js"></script></head>'


@pytest.fixture
def site(tmp_path):
    """A site of two pages with the theme's own font, icons by script and the search index in each head."""
    import pydata_sphinx_theme

    source = next(iter(pydata_sphinx_theme.__path__))
    theme = Path(source) / "theme" / "pydata_sphinx_theme" / "static" / "vendor" / "fontawesome" / "webfonts"
    fonts, static = tmp_path / "_static" / "vendor" / "fontawesome" / "webfonts", tmp_path / "_static"
    for folder in (fonts, static / "scripts", static / "styles"):
        folder.mkdir(parents=True)
    for name in ("fa-solid-900.ttf", "fa-solid-900.woff2"):
        (fonts / name).write_bytes((theme / name).read_bytes())
    (static / "styles" / "theme.css").write_text(CSS)
    (static / "scripts" / "fontawesome.js").write_text("fa-ghost")
    (static / "scripts" / "fontawesome.js.map").write_text("{}")
    (static / "own.js").write_text("node.className = 'used'")
    head = "".join(f'<script src="_static/{name}"></script>' for name in ("scripts/fontawesome.js", "searchtools.js"))
    for page in ("index.html", "search.html"):
        (tmp_path / page).write_text(f'{head}<script src="searchindex.js"></script><i class="fa-bars"></i>')
    return tmp_path


def test_a_site_keeps_its_search_page_and_the_glyphs_it_shows(site):
    from fontTools.ttLib import TTFont

    light.lighten(site)
    index, search = ((site / name).read_text() for name in ("index.html", "search.html"))
    assert "<script" not in index and "searchindex.js" in search and "searchtools.js" in search
    assert "fontawesome.js" not in search and not list(site.rglob("*.map")) and not list(site.rglob("fontawesome.js"))
    css = (site / "_static" / "styles" / "theme.css").read_text()
    assert f'src:url({FONTS}.woff) format("woff")}}' in css and ".used{a:b}" in css
    fonts = site / "_static" / "vendor" / "fontawesome" / "webfonts"
    assert [file.name for file in fonts.iterdir()] == ["fa-solid-900.woff"]
    assert set(TTFont(fonts / "fa-solid-900.woff").getBestCmap()) == {0xF0C9, 0xF071}
    assert (fonts / "fa-solid-900.woff").stat().st_size < 3000


def test_a_theme_that_names_its_fonts_otherwise_is_an_error(site):
    sheet = site / "_static" / "styles" / "theme.css"
    sheet.write_text(sheet.read_text().replace("),url(", "), url("))
    with pytest.raises(ValueError, match="bring book/light.py up to date"):
        light.lighten(site)


def test_pictures_keep_their_colours(tmp_path):
    flat = Image.new("RGBA", (90, 90), (250, 10, 10, 255))
    flat.paste((1, 2, 3, 255), (5, 5, 60, 60))
    noise = Image.frombytes("RGB", (90, 90), random.Random(0).randbytes(3 * 90 * 90))
    clear = Image.new("RGBA", (90, 90), (0, 0, 0, 0))
    for name, image in {"flat": flat, "noise": noise, "clear": clear}.items():
        path = tmp_path / f"{name}.png"
        image.save(path, "PNG", compress_level=0, dpi=(144, 144))
        before = path.read_bytes()
        light.shrink(path)
        with Image.open(path) as now:
            assert now.convert("RGBA").tobytes() == image.convert("RGBA").tobytes(), name
            assert round(now.info["dpi"][0]) == 144
        assert (len(path.read_bytes()) < len(before) / 10) == (name == "flat")
