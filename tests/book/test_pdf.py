"""The book as one PDF: every page of it in order, readable as text, with bookmarks and links that lead inside."""

from __future__ import annotations

import unicodedata
from contextlib import nullcontext

import pytest
import yaml
from pypdf import PdfReader
from pypdf.generic import ArrayObject

import pages
import pdf
import polish


def test_titles_that_chromium_says_twice():
    assert pdf.once("The chaptersThe chapters") == "The chapters"
    assert pdf.once("Cost") == "Cost" and pdf.once("") == "" and pdf.once("abab c") == "abab c"


def test_without_a_site_or_a_browser_there_is_no_pdf(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pdf, "ROOT", tmp_path)
    monkeypatch.setattr(pdf, "chromium", nullcontext)
    assert pdf.main(["--profile", "quick"]) == 1
    assert "run `make book PROFILE=quick` first" in capsys.readouterr().err

    def none():
        raise RuntimeError("no browser. Install one: ...")

    monkeypatch.setattr(pdf, "chromium", none)
    assert pdf.main([]) == 1
    assert "no PDF: no browser. Install one" in capsys.readouterr().err


def test_pages_offer_the_book_once_it_is_printed(tmp_path):
    for name in ("book/a", "notebooks/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.html").write_text(f"<ul><li>x</li>{polish.PDF}</ul>")
    for _ in range(2):  # printed again, it is offered once
        pdf.offer(tmp_path, b"%PDF")
        for name in ("book/a", "notebooks/b"):
            text = (tmp_path / f"{name}.html").read_text()
            assert text.count('href="../book.pdf" download') == 1 and polish.PDF not in text
    assert (tmp_path / "book.pdf").read_bytes() == b"%PDF"


@pytest.fixture(scope="module")
def book(site, browser):
    """The site of the tests, printed."""
    return PdfReader(pdf.make("smoke", browser))


def flat(outline, level=0):
    for item in outline:
        if isinstance(item, list):
            yield from flat(item, level + 1)
        else:
            yield level, item


@pytest.mark.browser
def test_the_whole_book_is_in_it(book, root):
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    assert len(book.pages) > 20
    found = [(level, item.title, book.get_destination_page_number(item)) for level, item in flat(book.outline)]
    parts = [title for level, title, _ in found if level == 0]
    assert parts[1:] == [part["caption"] for part in toc["parts"]]
    listed = [
        pages.Chapter.read(root / f"{chapter['file']}.ipynb")
        for part in toc["parts"]
        for chapter in part["chapters"]
        if chapter["file"].startswith("notebooks/")
    ]
    at = {title: number for level, title, number in found if level == 1}
    numbers = [at[chapter.heading] for chapter in listed]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    for chapter, number in zip(listed, numbers, strict=True):
        text = unicodedata.normalize("NFKC", book.pages[number].extract_text())  # without ligatures
        assert " ".join(text.split()).startswith(" ".join(chapter.heading.split()[:2])) and "The question" in text
    assert sum(level == 2 for level, *_ in found) > 3 * len(listed)  # sections


@pytest.mark.browser
def test_its_pages_are_numbered_and_its_text_is_text(book):
    for number in (1, len(book.pages) // 2, len(book.pages)):
        assert str(number) in book.pages[number - 1].extract_text().split()
    starts = {item.title: book.get_destination_page_number(item) for level, item in flat(book.outline) if level == 1}
    start = starts["1. Diffusion: from noise to digits"]
    chapter = [book.pages[start + i] for i in range(8)]
    text = "\n".join(page.extract_text() for page in chapter)
    assert "def algorithm_3" in text and "REPOSITORY, REF" not in text  # the algorithms, without the cells for Colab
    assert "\\frac" not in text and "$$" not in text
    # mathematics is drawn with MathJax's fonts, which Chromium embeds as drawings
    drawn = [font.get_object()["/Subtype"] for page in chapter for font in page["/Resources"]["/Font"].values()]
    assert drawn.count("/Type3") > len(chapter)
    citation = [font.get_object()["/Subtype"] for font in book.pages[0]["/Resources"]["/Font"].values()]
    assert "/Type3" not in citation  # a page without formulas


@pytest.mark.browser
def test_its_links_lead_inside_or_to_the_world(book):
    inside = 0
    for page in book.pages:
        for link in page.get("/Annots") or ():
            link = link.get_object()
            if "/Dest" in link:
                assert isinstance(link["/Dest"], ArrayObject)
                inside += 1
            else:
                assert "127.0.0.1" not in str(link.get("/A", {}).get("/URI", ""))
    assert inside > 50
