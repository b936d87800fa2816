"""Links in the built site: what its paragraphs name by number or word, a reader can follow.

Equation (2.6) leads to the equation of this tag. The first "chapter 5" and "Algorithm 2" of each section, and the first
name of the package, lead to the chapter and the reference; the first use of a word of the glossary on a page to its
entry. Only plain paragraphs of pages' texts, lists and tables are touched: no headings, code, formulas or other links.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

TOKEN = re.compile(r"(<(script|style)\b.*?</\2>|<!--.*?-->|<[^>]*>)", re.DOTALL)
CLOSED = {"a", "button", "code", "pre", "summary", "svg", "figcaption"}  # what is in these stays as it is
FORMULA = re.compile(r'<div class="math [^>]*>.*?</div>', re.DOTALL)
TAG = re.compile(r"\\tag\{([^}]*)\}")
ONE = re.compile(r"\b([Cc]hapter|Algorithm)\s+(\d+)\b(?!\.\d)")
SEVERAL = re.compile(r"\b([Cc]hapter|Algorithm)s\s+\d+(?:(?:,\s+(?:and\s+)?|\s+(?:and|or|to)\s+)\d+)*\b(?!\.\d)")
EQUATION = re.compile(r"\((\d+\.\d+[a-z]?|[A-Z](?:\.\d+)?)\)")
NO_WORDS = ("book/glossary", "book/api", "book/changelog", "book/status", "book/references")  # pages that stay plain


@dataclass
class Places:
    """Where links lead, as page or page#place.

    equations  by tag;  numbered: by ("chapter" or "algorithm", number);  names: by "module.name";  words: by entry
    """

    equations: dict[str, str] = field(default_factory=dict)
    numbered: dict[tuple[str, str], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def link(site: Path) -> None:
    """Links the pages of a built site. Raises ValueError where two equations have one tag."""
    found = sorted([*site.glob("book/*.html"), *site.glob("notebooks/*.html")])
    paths = {path.relative_to(site).as_posix(): path for path in found}
    pages = {page: path.read_text(encoding="utf-8") for page, path in paths.items()}
    places = find(pages)
    for page, text in pages.items():
        paths[page].write_text(linked(page, anchored(text), places), encoding="utf-8")


def find(pages: Mapping[str, str]) -> Places:
    """The places of a site, from its pages."""
    places = Places()
    for page, text in pages.items():
        for tag in (tag for formula in FORMULA.findall(text) for tag in TAG.findall(formula)):
            if tag in places.equations:
                raise ValueError(f"two equations have the tag {tag}: in {places.equations[tag]} and in {page}")
            places.equations[tag] = f"{page}#eq-{tag}"
        if number := re.match(r"notebooks/(\d+)_", page):
            places.numbered["chapter", str(int(number[1]))] = page
    rows = re.findall(r"<tr\b.*?</tr>", pages.get("book/numbering.html", ""), re.DOTALL)
    for row in rows:
        number, chapter = re.search(r"<td><p>(\d+)</p>", row), re.search(r'href="\.\./(notebooks/[^"#]+)', row)
        if number and chapter:
            places.numbered["algorithm", number[1]] = chapter[1]
    for name in re.findall(r'id="bilevel_core\.([\w.]+)"', pages.get("book/api.html", "")):
        places.names[name] = f"book/api.html#bilevel_core.{name}"
    entries = re.compile(r'<dt id="(term-[^"]+)">(.*?)<a class="headerlink"', re.DOTALL)
    for place, entry in entries.findall(pages.get("book/glossary.html", "")):
        plain = re.sub(r"<span class=\"math.*?</span>", "", entry)
        for word in re.split(r", | \(|\)", html.unescape(plain)):
            if word.strip():
                places.words[word.strip()] = f"book/glossary.html#{place}"
    return places


def anchored(text: str) -> str:
    """A page whose tagged equations can be led to."""

    def mark(formula: re.Match[str]) -> str:
        return "".join(f'<span id="eq-{tag}"></span>' for tag in TAG.findall(formula[0])) + formula[0]

    return FORMULA.sub(mark, text)


def linked(page: str, text: str, places: Places) -> str:
    """A page with its links."""
    begin, end = text.find('<article class="bd-article"'), text.find("</article>")
    tokens = TOKEN.split(text[begin:end])
    texts, tags, seen, closed, inside = tokens[::3], tokens[1::3], set(), 0, False
    known = re.compile("|".join(rf"\b{_loose(word)}s?\b" for word in sorted(places.words, key=len, reverse=True)))
    folded = {_folded(word): place for word, place in places.words.items()}

    def to(place: str, shown: str, once: tuple[str, str] | None = None) -> str:
        target, _, anchor = place.partition("#")
        if (target == page and not anchor) or once in seen:
            return shown
        if once:
            seen.add(once)
        address = f"#{anchor}" if target == page else posixpath.relpath(place, posixpath.dirname(page))
        return f'<a class="reference internal" href="{address}">{shown}</a>'

    def equation(hit: re.Match[str]) -> str:
        place = places.equations.get(hit[1], "")
        return to(place, hit[0]) if place and ("." in hit[1] or place.startswith(f"{page}#")) else hit[0]

    def numbered(kind: str, number: str, shown: str) -> str:
        place = places.numbered.get((kind.lower(), number))
        return to(place, shown, (kind.lower(), number)) if place else shown

    def one(hit: re.Match[str]) -> str:
        return numbered(hit[1], hit[2], hit[0])

    def several(hit: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda number: numbered(hit[1], number[0], number[0]), hit[0])

    def word(hit: re.Match[str]) -> str:
        entry = _folded(hit[0])
        place = folded.get(entry) or folded[entry.removesuffix("s")]
        return to(place, hit[0], ("word", place))

    steps = [partial(EQUATION.sub, equation), partial(ONE.sub, one), partial(SEVERAL.sub, several)]
    if places.words and not page.startswith(NO_WORDS):
        steps.append(partial(known.sub, word))
    for i, tag in enumerate(tags):
        name = re.match(r"</?([\w-]*)", tag)[1]
        if inside and not closed and 'class="math ' not in tags[i - 1]:
            texts[i] = _through(texts[i], steps)
        if name == "p":
            inside = tag == "<p>"
        elif name == "h2":
            seen = {once for once in seen if once[0] == "word"}
        if name == "code" and tag.startswith("<code") and inside and not closed and i + 2 < len(texts):
            place = places.names.get(texts[i + 2].removeprefix("bilevel_core."))
            if place and not page.startswith("book/api") and ("name", place) not in seen:
                opened, _, rest = to(place, "\0", ("name", place)).partition("\0")
                tags[i], tags[i + 3] = opened + tag, tags[i + 3] + rest
        if name in CLOSED:
            closed += -1 if tag.startswith("</") else 1
    done = "".join(part for pair in zip(texts, [*tags, ""], strict=True) for part in pair)
    return text[:begin] + done + text[end:]


def _through(text: str, steps: Iterable[Callable[[str], str]]) -> str:
    """Text through every step; what one has linked, the next leaves alone."""
    for step in steps:
        parts = re.split(r"(<a .*?</a>)", text, flags=re.DOTALL)
        text = "".join(part if part.startswith("<a ") else step(part) for part in parts)
    return text


def _loose(word: str) -> str:
    """A pattern of a word of the glossary: any white space between its parts, its first letter large or small."""
    first, rest = re.escape(word[0]), r"\s+".join(re.escape(part) for part in word[1:].split(" "))
    return (f"[{word[0].upper()}{word[0].lower()}]" if word[0].isalpha() and not word.isupper() else first) + rest


def _folded(word: str) -> str:
    return " ".join(word.split()).lower()
