"""book/polish.py: which pictures are plots, and what becomes of a page."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

import polish

IMAGE = '<img alt="A curve" src="../_images/{}.png"/>'


@pytest.fixture
def site(tmp_path):
    """A site of one page with a plot, and images of digits as black squares on white."""
    for folder in ("_images", "book", "notebooks"):
        (tmp_path / folder).mkdir()
    for name, dark in {"plot": 3, "digits": 60}.items():
        picture = Image.new("RGB", (100, 100), "white")
        ImageDraw.Draw(picture).rectangle((10, 10, 10 + dark, 10 + dark), fill="black")
        picture.save(tmp_path / "_images" / f"{name}.png")
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "_images" / "clear.png")
    text = "".join(IMAGE.format(name) for name in ("plot", "digits", "clear"))
    (tmp_path / "notebooks" / "one.html").write_text(text + '<img alt="x" src="data:image/png;base64,AA"/>')
    return tmp_path


def test_plots_are_told_from_pictures_of_images(site):
    pictures = {path.stem: polish.is_plot(path) for path in (site / "_images").iterdir()}
    assert pictures == {"plot": True, "digits": False, "clear": True}


def test_pictures_open_and_plots_are_marked(site):
    polish.polish(site)
    text = (site / "notebooks" / "one.html").read_text()
    for name, kind in {"plot": "enlarge plot", "digits": "enlarge", "clear": "enlarge plot"}.items():
        assert f'<a class="{kind}" href="../_images/{name}.png">{IMAGE.format(name)}</a>' in text
    assert text.count("<a ") == 3 and text.endswith('<img alt="x" src="data:image/png;base64,AA"/>')


@pytest.mark.parametrize(
    "found, mended",
    [
        ('<summary aria-label="Toggle hidden content">Show</summary>', "<summary>Show</summary>"),
        (
            '<th class="head"><p></p></th><th class="head"><p>x</p></th>',
            '<td class="head"></td><th class="head"><p>x</p></th>',
        ),
        (
            '<th style="a: b"></th><th> x</th><thead><tr></tr></thead>',
            '<td style="a: b"></td><th> x</th><thead><tr></tr></thead>',
        ),
        ('<div class="citation" role="doc-biblioentry">', '<div class="citation" role="listitem">'),
        (
            '<div class="sidebar-primary-item">\n<a class="navbar-brand logo">',
            '<div class="sidebar-primary-item" role="navigation" aria-label="Book">\n<a class="navbar-brand logo">',
        ),
        (
            '<li>a</li>\n<li>\n<button onclick="window.print()"\n class="btn">\n<i></i>.pdf\n</button>\n</li>',
            "<li>a</li>\n<!-- book.pdf -->",
        ),
        ('<div class="sidebar-primary-item">\n<nav>', '<div class="sidebar-primary-item">\n<nav>'),
    ],
)
def test_names_heads_and_roles_are_true(found, mended):
    assert polish.page(found, bool) == mended
