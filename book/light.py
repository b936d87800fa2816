"""Dead weight off the built site: scripts, style rules, glyphs and maps that no page uses; pictures with palettes.

The theme draws a dozen icons by a script of 1.5 MB and two fonts, and gives every page the search index, for a search
that is switched off. Icons come from the theme's own style rules instead, in a font of just their glyphs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bilevel_core.lab.explorers import engine

ICONS = "scripts/fontawesome.js"
ONLY_FOR_SEARCH = ("searchtools.js", "language_data.js", "searchindex.js")
FONT = re.compile(
    r'url\((\.\./vendor/fontawesome/webfonts/)([\w-]+)\.woff2\) format\("woff2"\),url\([^)]*\) format\("[a-z]+"\)'
)
TOKEN = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[{}]"""
)  # strings, whose braces count for nothing, and braces


def lighten(html: Path) -> None:
    """Takes from the site in the folder what no page of it uses, and shrinks its pictures.

    Raises ValueError where the theme has changed.
    """
    _, runtime, styles = engine.assets()
    pages = {page: page.read_text(encoding="utf-8") for page in html.rglob("*.html")}
    once = [f"<style>{styles}</style>", runtime]  # a page with several explorers needs them once
    for page, text in pages.items():
        for piece in once:
            first, found, rest = text.partition(piece)
            text = first + found + rest.replace(piece, "")
        if text != pages[page] or f"_static/{ICONS}" in text:
            unused = (ICONS,) if page.name == "search.html" else (ICONS, *ONLY_FOR_SEARCH)
            pages[page] = without_scripts(text, unused)
            page.write_text(pages[page], encoding="utf-8")
    static = html / "_static"
    for left in (static / ICONS, *static.rglob("*.map")):
        left.unlink(missing_ok=True)
    own = [path for path in static.rglob("*.js") if not {"jslib", "live", "locales"} & set(path.parts)]
    words = set(re.findall(r"[A-Za-z_][\w-]*", " ".join([*pages.values(), *(path.read_text("utf-8") for path in own)])))
    for sheet in sorted(static.rglob("*.css")):
        text = purge(sheet.read_text(encoding="utf-8"), words)
        sheet.write_text(FONT.sub(r'url(\1\2.woff) format("woff")', text), encoding="utf-8")
    styles = " ".join(path.read_text(encoding="utf-8") for path in static.rglob("*.css"))
    glyphs = {int(code, 16) for code in re.findall(r'"\\([ef][0-9a-f]{3})"', styles)}
    glyphs |= {ord(character) for character in re.findall("[\ue000-\uf8ff]", styles)}  # some stand there as they are
    fonts = static / "vendor" / "fontawesome" / "webfonts"
    for font in sorted(fonts.glob("*.ttf")):
        subset(font, glyphs)
    if "webfonts" not in styles or ".woff2" in styles:
        raise ValueError("the theme's styles name its icons' fonts in another way: bring book/light.py up to date")
    for image in sorted((html / "_images").glob("*.png")):
        shrink(image)


def without_scripts(text: str, names: Iterable[str]) -> str:
    """A page without the elements that load scripts of these names."""
    for name in names:
        text = re.sub(rf'\s*<script\b[^>]*\bsrc="[^"]*\b{re.escape(name)}(?:\?[^"]*)?"[^>]*></script>', "", text)
    return text


def rules(css: str) -> Iterator[tuple[str, str]]:
    """(what stands before its braces, what stands in them) of each rule; ("", text) for what has none."""
    at = 0
    while at < len(css):
        opened = re.compile(r"[{;]").search(css, at)
        if not opened or opened[0] == ";":
            end = opened.end() if opened else len(css)
            yield "", css[at:end]
            at = end
            continue
        depth, end = 1, opened.end()
        for token in TOKEN.finditer(css, end):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                end = token.end()
                break
        yield css[at : opened.start()], css[opened.end() : end - 1]
        at = end


def purge(css: str, words: set[str]) -> str:
    """Style rules without those whose every selector names a class that is no word of any page or script."""
    kept = []
    for head, body in rules(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)):
        if not head:
            kept.append(body)
        elif head.lstrip().startswith(("@media", "@supports")):
            if inner := purge(body, words):
                kept.append(f"{head}{{{inner}}}")
        elif head.lstrip().startswith("@"):
            kept.append(f"{head}{{{body}}}")
        else:
            plain = re.compile(r":(?:not|is|where|has)\([^()]*(?:\([^()]*\)[^()]*)*\)")
            seen = [s for s in _selectors(head) if set(re.findall(r"\.(-?[A-Za-z_][\w-]*)", plain.sub("", s))) <= words]
            if seen:
                kept.append(f"{','.join(seen)}{{{body}}}")
    return "".join(kept)


def _selectors(head: str) -> list[str]:
    """The selectors of a rule; a comma in brackets parts none."""
    parts, depth = [""], 0
    for character in head:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def shrink(image: Path, most: int = 24) -> None:
    """Gives an opaque PNG a palette: exact up to 256 colours, else if no channel moves by more than `most` of 255."""
    from PIL import Image, ImageChops

    with Image.open(image) as found:
        if found.mode == "P" or ("A" in found.getbands() and found.getchannel("A").getextrema() != (255, 255)):
            return
        plain, density = found.convert("RGB"), found.info.get("dpi")
    fewer = plain.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    if max(high for _, high in ImageChops.difference(plain, fewer.convert("RGB")).getextrema()) <= most:
        stream = io.BytesIO()
        fewer.save(stream, "PNG", optimize=True, **({"dpi": density} if density else {}))
        if len(stream.getvalue()) < image.stat().st_size:
            image.write_bytes(stream.getvalue())


def subset(font: Path, glyphs: set[int]) -> None:
    """Puts a font of these code points, as WOFF, in place of a TrueType font and its WOFF2."""
    from fontTools import subset as tools

    options = tools.Options(flavor="woff", notdef_outline=True, ignore_missing_unicodes=True, drop_tables=["FFTM"])
    loaded = tools.load_font(str(font), options)
    smaller = tools.Subsetter(options)
    smaller.populate(unicodes=glyphs)
    smaller.subset(loaded)
    tools.save_font(loaded, str(font.with_suffix(".woff")), options)
    font.unlink()
    font.with_suffix(".woff2").unlink(missing_ok=True)
