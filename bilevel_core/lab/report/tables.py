"""Claims as tables of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from .. import parameters, results
from ..writing import markup, written
from .opening import label, numbered
from .rules import PARTS, VERDICTS, Claim


class ProseTable:
    """A table of sentences, wrapped and flush left, some of them links; shown as HTML in a notebook and on a page.

    rows     mappings, one per row; of a text with a line break the first line is bold
    columns  key -> heading;  tier, note: as for `plots.Table`
    links    key of a column -> key of the row's link, from the root of the site as in `Claim.link`
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, str]],
        columns: Mapping[str, str],
        *,
        tier: str,
        note: str,
        links: Mapping[str, str] | None = None,
    ):
        if tier not in ("exact", *results.TIERS):
            raise ValueError(f"tier = {tier!r} must be one of exact, {', '.join(results.TIERS)}")
        self.rows, self.columns, self.tier, self.note, self.links = list(rows), columns, tier, note, links or {}

    def _repr_html_(self) -> str:
        style = "padding: 0.3em 0.5em; text-align: left; vertical-align: top"

        def text(plain: str) -> str:
            return markup(written(plain), True)

        def cell(row: Mapping[str, str], key: str) -> str:
            first, line_break, rest = (text(part) for part in row[key].partition("\n"))
            shown = f"<strong>{first}</strong><br>{rest}" if line_break else first
            if key in self.links:
                shown = f'<a href="{html.escape(href(row[self.links[key]]))}">{shown}</a>'
            return f'<td style="{style}">{shown}</td>'

        head = "".join(f'<th scope="col" style="{style}">{text(name)}</th>' for name in self.columns.values())
        body = "".join(f"<tr>{''.join(cell(row, key) for key in self.columns)}</tr>" for row in self.rows)
        caption = f'<caption style="caption-side: bottom"><b>{self.tier}</b>: {text(self.note)}</caption>'
        table = '<table class="dataframe" style="font-size: 0.85em; min-width: 46em">'
        return f"{table}{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        rows = [
            "\n  ".join(f"{head}: {': '.join(row[key].splitlines())}" for key, head in self.columns.items())
            for row in self.rows
        ]
        return "\n".join([*rows, f"{self.tier}: {self.note}"])


MARKS = dict(zip(VERDICTS, "●◐○×", strict=True))


class Board:
    """All claims at a glance: a line for each part, a column for each verdict, a mark with number and name for each
    claim, which links to where it is shown; HTML in a notebook and on a page."""

    def __init__(self, found: Sequence[Claim], *, note: str):
        self.found, self.note, self.numbers = list(found), note, numbered(found)

    def _cell(self, part: str, verdict: str) -> list[Claim]:
        return [claim for claim in self.found if (claim.part, claim.verdict) == (part, verdict)]

    def _repr_html_(self) -> str:
        style = "padding: 0.3em 0.5em; text-align: left; vertical-align: top"

        def mark(claim: Claim) -> str:
            told = html.escape(f"{claim.claim} {claim.verdict}: {claim.ours}")
            name = f"{MARKS[claim.verdict]}\u00a0{self.numbers[claim.id]}\u00a0{html.escape(label(claim.id))}"
            return f'<a href="{html.escape(href(claim.link))}" title="{told}">{name}</a>'

        head = "".join(f'<th scope="col" style="{style}">{MARKS[name]} {name}</th>' for name in VERDICTS)
        body = ""
        for part in PARTS:
            cells = ["<br>".join(mark(claim) for claim in self._cell(part, verdict)) for verdict in VERDICTS]
            cells = [f'<td style="{style}">{cell}</td>' for cell in cells]
            body += f'<tr><th scope="row" style="{style}">{part}</th>{"".join(cells)}</tr>'
        caption = f'<caption style="caption-side: bottom">{markup(written(self.note), True)}</caption>'
        table = '<table class="dataframe" style="font-size: 0.85em">'
        head = f'<tr><th scope="col" style="{style}">part</th>{head}</tr>'
        return f"{table}{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        lines = []
        for part in PARTS:
            lines.append(f"{part}:")
            for verdict in VERDICTS:
                names = [f"{self.numbers[claim.id]} {label(claim.id)}" for claim in self._cell(part, verdict)]
                lines += [f"  {MARKS[verdict]} {verdict}: {', '.join(names)}"] if names else []
        return "\n".join([*lines, self.note])


def place(chapter: str) -> str:
    """What a reader calls a notebook: "chapter 5", "appendix"."""
    number = re.match(r"\d+", chapter)
    return f"chapter {int(number[0])}" if number else chapter.partition("_")[0]


def href(link: str) -> str:
    """A `Claim.link` as a notebook must write it: a page of the site in a build, the notebook's file in a live one."""
    target = link.removeprefix("notebooks/")
    return target if parameters.is_batch() else target.partition("#")[0].replace(".html", ".ipynb")
