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
from urllib.parse import unquote, urldefrag

import yaml
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, NullObject

import polish
from bilevel_core.lab import files
from browser import chromium, served, settle

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAPER = {"format": "A4", "print_background": True, "outline": True, "tagged": True}
MARGIN = {"top": "16mm", "bottom": "18mm", "left": "15mm", "right": "15mm"}
COUNT = "() => ['.math', 'mjx-container'].map((name) => document.querySelectorAll(name).length)"
TITLE = "(h) => [...h.childNodes].filter((n) => n.className !== 'headerlink').map((n) => n.textContent).join('').trim()"
OPEN = """async () => {
  document.documentElement.dataset.theme = document.documentElement.dataset.mode = "light";
  document.querySelectorAll("a.enlarge").forEach((node) => node.removeAttribute("href"));
  document.querySelectorAll("details").forEach((node) => { node.open = true; });
  document.querySelectorAll(".toggle-hidden").forEach((node) => node.classList.remove("toggle-hidden"));
  const width = document.querySelector(".bd-article").clientWidth;
  document.querySelectorAll(".bd-article div.math mjx-container").forEach((node) => {
    const wide = Math.max(node.scrollWidth, node.getBoundingClientRect().width) / width;
    if (wide > 1) node.style.setProperty("font-size", `${Math.floor(115 / wide)}%`, "important");
  });
  const frame = () => new Promise(requestAnimationFrame);
  for (let i = 0; i < 3; i += 1) await frame(); // plots are drawn again at the width of the paper
}"""


Parts = Sequence[tuple[str | None, list[str]]]


class PdfError(Exception):
    """The book cannot be printed; the message is for the person who asked for it."""


def toc(text: str) -> Parts:
    """(part, its pages) in the order of _toc.yml; the first page stands in a part without a name."""
    contents = yaml.safe_load(text)
    parts = [(part["caption"], [chapter["file"] for chapter in part["chapters"]]) for part in contents["parts"]]
    return [(None, [contents["root"]]), *parts]


def print_pages(browser: Any, html: Path, names: Sequence[str]) -> tuple[list[tuple[str, bytes]], str]:
    """(title, PDF) of each page as paper shows it, and the address the site had meanwhile."""
    printed = []
    with served(html) as url:
        paper = {"width": 680, "height": 1000}  # the width between the margins, at which plots are drawn
        context = browser.new_context(color_scheme="light", reduced_motion="reduce", viewport=paper)
        for name in names:
            page = context.new_page()
            page.emulate_media(media="print")
            page.goto(f"{url}/{name}.html", wait_until="load")
            page.add_style_tag(path=HERE / "print.css")
            settle(page)
            page.evaluate(OPEN)
            written, typeset = page.evaluate(COUNT)
            if typeset < written:
                raise PdfError(f"{name}: {written} formulas are written, {typeset} were set")
            title = page.locator(".bd-article h1").first.evaluate(TITLE)
            printed.append((title, page.pdf(**PAPER, margin=MARGIN)))
            page.close()
        context.close()
    return printed, url


def number_pages(browser: Any, count: int) -> bytes:
    """A PDF of empty pages with their numbers at the foot, to be laid over the book."""
    style = "@page{size:A4;margin:0}body{margin:0}p{height:296mm;margin:0;position:relative;break-after:page}"
    style += "span{position:absolute;bottom:9mm;width:100%;text-align:center;font:9pt sans-serif;color:#59636e}"
    body = "".join(f"<p><span>{number}</span></p>" for number in range(1, count + 1))
    page = browser.new_page()
    page.set_content(f"<!doctype html><style>{style}</style>{body}")
    numbers = page.pdf(format="A4", print_background=False, prefer_css_page_size=True)
    page.close()
    return numbers


def join(
    chapters: Sequence[tuple[str, str, bytes]], parts: Sequence[tuple[str | None, list[str]]], url: str
) -> PdfWriter:
    """One PDF of (name, title, PDF of the page): bookmarks by part, numbers at the foot, links that lead inside."""
    writer, first, places, sections = PdfWriter(), {}, {}, {}
    for name, _, content in chapters:
        reader = PdfReader(io.BytesIO(content))
        first[name] = len(writer.pages)
        places[name] = {
            str(key).lstrip("/"): (first[name] + reader.get_destination_page_number(place), place.top)
            for key, place in reader.named_destinations.items()
        }
        under = [item for item in reader.outline if isinstance(item, list)][:1]  # what stands below the page's title
        inside = [item for item in (under[0] if under else ()) if not isinstance(item, list)]
        sections[name] = [(once(item.title), first[name] + reader.get_destination_page_number(item)) for item in inside]
        writer.append(reader, import_outline=False)
    starts = sorted((start, name) for name, start in first.items())
    for number, page in enumerate(writer.pages):
        here = [name for start, name in starts if start <= number][-1]
        for annotation in page.get("/Annots") or ():
            lead_inside(writer, annotation.get_object(), here, first, places, url)
    titles = {name: title for name, title, _ in chapters}
    for caption, names in parts:
        above = writer.add_outline_item(title=caption, page_number=first[names[0]], bold=True) if caption else None
        for name in names:
            place = {"page_number": first[name], "parent": above, "is_open": False}
            chapter = writer.add_outline_item(title=titles[name], **place)
            for title, number in sections[name]:
                writer.add_outline_item(title=title, page_number=number, parent=chapter)
    writer.page_mode = "/UseOutlines"
    return writer


def once(title: str) -> str:
    """A title; Chromium says one twice whose line it moved to the next page."""
    half = title[: len(title) // 2]
    return half if half * 2 == title else title


def lead_inside(
    writer: PdfWriter,
    link: DictionaryObject,
    here: str,
    first: dict[str, int],
    places: dict[str, dict[str, tuple[int, float]]],
    url: str,
) -> None:
    """Turns a link to a page of the site, or to a place on its own page, into one to the place in the book."""
    target = str(link.get("/A", {}).get("/URI", ""))
    if target.startswith(f"{url}/"):
        page, place = urldefrag(target.removeprefix(f"{url}/"))
        name, place = page.removesuffix(".html"), unquote(place)
    elif "/Dest" in link and not isinstance(link["/Dest"], ArrayObject):
        name, place = here, str(link["/Dest"]).lstrip("/")
    else:
        return
    if name not in first:
        raise PdfError(f"{here} links to {target or place}, which is no page of the book")
    number, top = places[name].get(place, (first[name], None))
    link.pop("/A", None)
    height = NullObject() if top is None else FloatObject(top)
    goal = [writer.pages[number].indirect_reference, NameObject("/XYZ"), NullObject(), height, NullObject()]
    link[NameObject("/Dest")] = ArrayObject(goal)


def make(profile: str, browser: Any) -> Path:
    """Print the book built at a profile. Raises PdfError if there is no such build or a formula is not set."""
    out = ROOT / "_build" / profile
    html = out / "site" / "_build" / "html"
    if not (html / "index.html").is_file():
        raise PdfError(f"there is no built site at profile {profile}: run `make book PROFILE={profile}` first")
    parts = toc((out / "src" / "_toc.yml").read_text(encoding="utf-8"))
    names = [name for _, inside in parts for name in inside]
    printed, url = print_pages(browser, html, names)
    book = join([(name, *page) for name, page in zip(names, printed, strict=True)], parts, url)
    numbers = PdfReader(io.BytesIO(number_pages(browser, len(book.pages))))
    for page, number in zip(book.pages, numbers.pages, strict=True):
        page.merge_page(number)
    config = yaml.safe_load((out / "src" / "_config.yml").read_text(encoding="utf-8"))
    book.add_metadata({"/Title": config["title"], "/Author": config["author"]})
    book.compress_identical_objects()
    stream = io.BytesIO()
    book.write(stream)
    offer(html, stream.getvalue())
    return files.write_atomic(out / "book.pdf", stream.getvalue())


def offer(html: Path, content: bytes) -> None:
    """Lays the book's file beside the pages of a site, and a link to it into their menu of downloads."""
    files.write_atomic(html / "book.pdf", content)
    link = '<li><a class="btn btn-sm dropdown-item" href="../book.pdf" download>The book as .pdf</a></li>'
    for path in (*html.glob("book/*.html"), *html.glob("notebooks/*.html")):
        text = path.read_text(encoding="utf-8")
        if polish.PDF in text:
            files.write_atomic(path, text.replace(polish.PDF, link).encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=("smoke", "quick", "full"), default="quick", help="which build to print")
    options = parser.parse_args(argv)
    try:
        with chromium() as browser:
            path = make(options.profile, browser)
    except (PdfError, RuntimeError) as error:
        print(f"no PDF: {error}", file=sys.stderr)
        return 1
    print(f"{len(PdfReader(path).pages)} pages, {path.stat().st_size / 1e6:.1f} MB: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
