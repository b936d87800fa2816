"""The built book as one PDF: every page printed by Chromium, joined with bookmarks, page numbers and working links.

    python book/pdf.py --profile smoke|quick|full     what `make pdf` calls, after the site is built
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import yaml
from browser import chromium, served, settle
from pypdf import PdfReader, PdfWriter
from pypdf.annotations import Link
from pypdf.generic import ArrayObject, DictionaryObject, Fit, NameObject

from bilevel_core.lab import runs

ROOT = Path(__file__).resolve().parents[1]
PAPER = {"format": "A4", "print_background": True, "prefer_css_page_size": False}
MARGIN = {"top": "16mm", "bottom": "18mm", "left": "15mm", "right": "15mm"}
# What paper has no use for; what would be cut at its edge; and what the theme hides in print although it says something.
CSS = """
@page { size: A4; }
.bd-header, .bd-header-article, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-footer, .bd-footer-content,
.prev-next-footer, .footer-article, #pst-back-to-top, .skip-link, #pst-skip-link, .copybtn, .headerlink, .blx button,
.blx-controls input, .toggle-button, .tb-button, #jb-print-docs-body, .pst-scroll-pixel-helper { display: none !important; }
html, body { background: #fff !important; font-size: 10.5pt; }
.bd-main, .bd-content, .bd-article-container, .bd-article, .bd-container, .bd-container__inner {
  display: block !important; max-width: 100% !important; width: 100% !important; padding: 0 !important; margin: 0 !important;
}
.bd-article pre, .bd-article code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.bd-article pre { font-size: 8pt; }
.bd-article table { font-size: 8.5pt; width: 100%; }
.bd-article .pst-scrollable-table-container, .bd-article div.math, .bd-article .output { overflow: visible !important; }
.bd-article h1, .bd-article h2, .bd-article h3 { break-after: avoid; }
.bd-article figure, .bd-article img, .blx, .sd-card, .bd-article tr { break-inside: avoid; }
.toggle-hidden, .toggle > *, details > * { display: revert; }
"""
OPEN = """() => {
  document.documentElement.dataset.theme = document.documentElement.dataset.mode = "light";
  document.querySelectorAll("details").forEach((node) => { node.open = true; });
  document.querySelectorAll(".toggle-hidden").forEach((node) => node.classList.remove("toggle-hidden"));
  const width = document.querySelector(".bd-article").clientWidth;
  document.querySelectorAll(".bd-article div.math mjx-container").forEach((node) => {
    const wide = node.scrollWidth / width;
    if (wide > 1) node.style.setProperty("font-size", `${Math.floor(100 / wide)}%`, "important");
  });
}"""


class PdfError(Exception):
    """The book cannot be printed; the message is for the person who asked for it."""


def toc(text: str) -> list[tuple[str | None, list[str]]]:
    """(part, its pages) in the order of _toc.yml; the first page stands in a part without a name."""
    contents = yaml.safe_load(text)
    parts = [(part["caption"], [chapter["file"] for chapter in part["chapters"]]) for part in contents["parts"]]
    return [(None, [contents["root"]]), *parts]


def print_pages(html: Path, names: Sequence[str]) -> tuple[list[tuple[str, bytes]], str]:
    """(title, PDF) of each page as paper shows it, and the address the site had meanwhile."""
    printed = []
    with served(html) as url, chromium() as browser:
        context = browser.new_context(color_scheme="light", reduced_motion="reduce", viewport={"width": 760, "height": 1000})
        for name in names:
            page = context.new_page()
            page.emulate_media(media="print")
            page.goto(f"{url}/{name}.html", wait_until="load")
            page.add_style_tag(content=CSS)
            settle(page)
            page.evaluate(OPEN)
            title = page.locator(".bd-article h1").first.evaluate("(h) => h.childNodes[0].textContent.trim()")
            printed.append((title, page.pdf(**PAPER, margin=MARGIN)))
            page.close()
        context.close()
    return printed, url


def number_pages(count: int) -> bytes:
    """A PDF of empty pages with their numbers at the foot, to be laid over the book."""
    style = "@page{size:A4;margin:0}body{margin:0}p{height:296mm;margin:0;position:relative;break-after:page}"
    style += "span{position:absolute;bottom:9mm;width:100%;text-align:center;font:9pt sans-serif;color:#59636e}"
    body = "".join(f"<p><span>{number}</span></p>" for number in range(1, count + 1))
    with chromium() as browser:
        page = browser.new_page()
        page.set_content(f"<!doctype html><style>{style}</style>{body}")
        return page.pdf(format="A4", print_background=False, prefer_css_page_size=True)
