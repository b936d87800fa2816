"""What the theme leaves to do on the built pages: plots in the dark, pictures that open, true names and roles."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

PICTURE = re.compile(r'<img\b[^>]*\bsrc="(?P<src>\.\./_images/(?P<name>[^"/]+\.png))"[^>]*/>')
DARK = 96  # of 255: what is darker is ink, or the ground of an image
INK, WHITE = 0.1, 0.5  # shares of a plot: at most so much ink, at least so much white

# Where the theme would print a single page stands the book's own file, once `make pdf` has made it.
PDF = "<!-- book.pdf -->"
MENDED = (
    (r'<li>\s*<button onclick="window\.print\(\)"(?s:.*?)</button>\s*</li>', PDF),
    # A summary is called what it shows, not something else to those who hear it.
    ('<summary aria-label="Toggle hidden content">', "<summary>"),
    # The book's name leads to its first page.
    (r'(<div class="sidebar-primary-item")(>\s*<a class="navbar-brand)', r'\1 role="navigation" aria-label="Book"\2'),
    # An empty corner of a table heads nothing.
    (r"<th\b([^>]*)>(?:<p></p>)?</th>", r"<td\1></td>"),
    # Entries of the list of references are its items; the role that docutils gives them is no longer one.
    ('role="doc-biblioentry"', 'role="listitem"'),
)


def polish(site: Path) -> None:
    """Mends the pages of a built site: see `page`."""
    plots = cache(lambda name: is_plot(site / "_images" / name))
    for path in (*site.glob("*.html"), *site.glob("book/*.html"), *site.glob("notebooks/*.html")):
        path.write_text(page(path.read_text(encoding="utf-8"), plots), encoding="utf-8")


def page(text: str, plots: Callable[[str], bool]) -> str:
    """A page whose pictures open when they are touched, and are marked where they are plots; with what `MENDED` says.

    plots  name of a picture -> whether it is a plot, whose lightness may be turned round in the dark
    """
    for old, new in MENDED:
        text = re.sub(old, new, text)

    def opened(picture: re.Match[str]) -> str:
        kind = "enlarge plot" if plots(picture["name"]) else "enlarge"
        return f'<a class="{kind}" href="{picture["src"]}">{picture[0]}</a>'

    return PICTURE.sub(opened, text)


def is_plot(picture: Path) -> bool:
    """Lines and text on white; not one with images in it, whose black is part of what they show."""
    from PIL import Image

    with Image.open(picture) as found:
        grey = found.convert("RGBA")
        ground = Image.new("RGBA", grey.size, "white")
        counts = Image.alpha_composite(ground, grey).convert("L").histogram()
    return sum(counts[:DARK]) <= INK * sum(counts) and counts[255] >= WHITE * sum(counts)
