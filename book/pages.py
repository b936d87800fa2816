"""What the build writes into pages: the map of the chapters, the status of the build, the table of the README."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat

from bilevel_core.lab import report
from bilevel_core.lab.gpu import pieces
from bilevel_core.lab.writing import duration, strip, written

NOT_RUN = "not yet run"
REPORT = "10_reproduction_report"


# ---------------------------------------------------------------- what a chapter is


@dataclass(frozen=True)
class Chapter:
    """A notebook as its first cell introduces it."""

    name: str
    title: str
    question: str

    @property
    def heading(self) -> str:
        """The title with the chapter's number, which its file begins with."""
        number = re.match(r"(\d+)_", self.name)
        return f"{int(number[1])}. {self.title}" if number else self.title

    @classmethod
    def read(cls, path: Path) -> Chapter:
        """From a notebook. Raises ValueError if its first cells have no title or no question."""
        cells = nbformat.read(path, as_version=4).cells
        title = re.match(r"# (.+)", cells[0].source)
        question = re.search(r"\*\*The question[^*]*:\*\*\s*(.+?)(?:\n\n|$)", cells[0].source, re.DOTALL)
        if not title or not question:
            raise ValueError(f"{path.name}: the first cell has no line `# Title` or no `**The question ...:** ...`")
        text = " ".join(question[1].strip().strip("*").split())
        return cls(path.stem, title[1].strip(), text[0].upper() + text[1:])


def verdicts(claims: Iterable[Any] | None = None) -> dict[str, Counter[str]]:
    """Chapter -> how many of its claims have which verdict, from the register of the reproduction report."""
    if claims is None:
        claims = report.claims()
    found: dict[str, Counter[str]] = {}
    for claim in claims:
        found.setdefault(claim.chapter, Counter())[claim.verdict] += 1
    return found


def counted(verdict: Mapping[str, int] | None) -> str:
    """'3 reproduced, 1 partly'; empty where there is no claim."""
    return ", ".join(f"{verdict[name]} {name}" for name in report.VERDICTS if verdict and verdict.get(name))


def results(folder: Path) -> list[dict[str, Any]]:
    """The records of the runs that are kept, by name, without their data."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    kept = ("name", "tier", "protocol", "provenance")
    return [{key: record[key] for key in kept} for record in found if "provenance" in record]


def belongs(result: str, names: Sequence[str]) -> str | None:
    """The notebook that a result comes from: the one of its name, else the chapter of its number."""
    whole = [name for name in names if result == name or result.startswith(f"{name}_")]
    number = re.match(r"\d+_", result)
    same = [name for name in names if number and name.startswith(number[0])]
    return next(iter(whole or same), None)


def full_runs(
    records: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, list[Mapping[str, Any]]]]:
    """What was really run on a GPU: notebook -> the record of its profile `full`; notebook -> those of parts of it."""
    whole: dict[str, Mapping[str, Any]] = {}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        made, name = record["provenance"], belongs(record["name"], names)
        if record["tier"] != "full" or not made["hardware"]["gpu"] or not name:
            continue
        if made["parameters"].get("PROFILE") == "full":
            whole[name] = record
        else:
            parts.setdefault(name, []).append(record)
    return whole, parts


def cards(records: Iterable[Mapping[str, Any]]) -> str:
    """The GPUs that results were made on."""
    return ", ".join(sorted({record["provenance"]["hardware"]["gpu"] for record in records}))


# ---------------------------------------------------------------- the map of the chapters


def chapter_map(
    listed: Sequence[Chapter],
    status: Mapping[str, Any],
    full: tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Sequence[Mapping[str, Any]]]],
    judged: Mapping[str, Mapping[str, int]],
    badge: Callable[[str], str],
) -> str:
    """Markdown for book/index.md: a card for each chapter.

    full: as `full_runs` returns it;  badge: name -> Markdown of its badge, or nothing
    """
    lines = [":::::{grid} 1 1 2 2", ":gutter: 3", ":class-container: chapter-map", ""]
    linked = any(chapter.name == REPORT for chapter in listed)
    whole, parts = full
    for chapter in listed:
        gpu = NOT_RUN
        if chapter.name in whole:
            made = whole[chapter.name]["provenance"]
            gpu = f"{duration(made['wall_s'])} on {made['hardware']['gpu']}"
        elif chapter.name in parts:
            gpu = f"{NOT_RUN} as a whole, [in parts](status.md) on {cards(parts[chapter.name])}"
        cpu = f"{duration(status['seconds'][chapter.name])} ({status['profile']})"
        foot = [f"**CPU** {cpu} · **GPU** {gpu}"]
        said = counted(judged.get(chapter.name))
        if said:
            foot.append("**Claims** " + (f"[{said}](../notebooks/{REPORT}.ipynb)" if linked else said))
        if badge(chapter.name):
            foot.append(badge(chapter.name))
        lines += [
            f"::::{{grid-item-card}} [{chapter.heading}](../notebooks/{chapter.name}.ipynb)",
            chapter.question,
            "",
            ":::{card-footer}",
            "\n\n".join(foot),
            ":::",
            "::::",
            "",
        ]
    return "\n".join([*lines, ":::::"])


def readme_table(listed: Sequence[Chapter], judged: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown for README.md: a line for each chapter."""
    lines = ["| Chapter | The question it answers | Claims tested |", "|---|---|---|"]
    for chapter in listed:
        said = counted(judged.get(chapter.name)) or "–"
        lines.append(f"| [{chapter.heading}](notebooks/{chapter.name}.ipynb) | {chapter.question} | {said} |")
    return "\n".join(lines)


MAIN = ("penalty-gradient", "algorithm-2", "algorithm-5", "lambda-vs-bayesian", "over-optimisation", "algorithm-6")
MAIN += ("schedule-vs-grid", "schedule-vs-hand", "released-gradient", "released-loop", "memory")
"""Ids of the claims whose results stand in the README."""


def commands(claim: Any, names: Sequence[str]) -> list[str]:
    """What a shell is told, from the root of a clone, to make the numbers of a claim again. names: of the notebooks."""
    if claim.tier == "full":
        return ["make gpu ONLY='sd15-*' && make gpu-merge"]
    results = [name.removesuffix(".json") for name in claim.results if name.endswith(".json")]
    recorded = dict.fromkeys(belongs(result, names) for result in results) if "recorded" in claim.tier else {}
    runs = [(name, "recorded") for name in recorded] or [(REPORT, "quick")]  # which computes what is exact
    tool = ".venv/bin/papermill --cwd notebooks"
    return [f"{tool} notebooks/{name}.ipynb out.ipynb -k python3 -p PROFILE {profile}" for name, profile in runs]


def readme_results(claims: Sequence[Any], names: Sequence[str]) -> str:
    """Markdown for README.md: a line for each of the main results that there is, with what makes it."""
    by_id = {claim.id: claim for claim in claims}
    rows = []
    for claim in (by_id[id] for id in MAIN if by_id[id].verdict != report.UNTESTED):
        told = "<br>".join(f"`{command}`" for command in commands(claim, names))
        rows.append([claim.claim, f"**{claim.verdict}**", strip(written(claim.ours)), claim.tier, told])
    return table(["Claim", "Verdict", "What came out", "Tier", "Command"], rows, left=5)


def between(text: str, marker: str, content: str) -> str:
    """Text with what stands between <!-- marker --> and <!-- /marker --> replaced. Raises ValueError without them."""
    pattern = rf"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"there are no lines <!-- {marker} --> and <!-- /{marker} -->")
    return re.sub(pattern, lambda hit: hit[1] + content + hit[2], text, flags=re.DOTALL)


def citation(cff: Mapping[str, Any], url: str | None = None) -> str:
    """Markdown and BibTeX of the paper and of the book, from CITATION.cff."""
    paper = cff["preferred-citation"]
    people = [f"{who['given-names']} {who['family-names']}" for who in paper["authors"]]
    venue = f"{paper['collection-title']}, volume {paper['volume']}"
    bibtex = {
        f"@inproceedings{{{paper['authors'][0]['family-names'].lower()}{paper['year']}generative": {
            "title": paper["title"],
            "author": " and ".join(people),
            "booktitle": paper["conference"]["name"],
            "series": paper["collection-title"],
            "volume": paper["volume"],
            "pages": f"{paper['start']}--{paper['end']}",
            "year": paper["year"],
            "url": paper["url"],
        },
        "@misc{bilevel_diffusion_book": {
            "title": cff["title"],
            "author": " and ".join(f"{{{who['name']}}}" for who in cff["authors"]),
            "note": f"Version {cff['version']}; unofficial",
        }
        | ({"url": url} if url else {}),
    }
    entries = [
        ",\n".join([head, *(f"  {key:<9} = {{{value}}}" for key, value in fields.items())]) + "\n}"
        for head, fields in bibtex.items()
    ]
    plain = f"> {', '.join(people)}. *{paper['title']}.* {paper['conference']['name']}, {paper['year']}. {venue}, "
    plain += f"{paper['start']}–{paper['end']}. [{paper['url'].removeprefix('https://')}]({paper['url']})"
    return plain + "\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"


# ---------------------------------------------------------------- the plan for a GPU

T4 = 14.6  # GiB of it that are free


def gpu_plan(records: Iterable[Mapping[str, Any]]) -> str:
    """Markdown for book/running.md: what each kind of piece takes, by measurement and by estimate."""
    records = [record for record in records if "pieces" in record["provenance"]]
    measured = {name: s for record in records for name, s in record["provenance"]["pieces"].items()}
    gpus = {record["provenance"]["hardware"]["gpu"] for record in records}
    kinds: dict[str, list[pieces.Piece]] = {}
    for piece in pieces.all_pieces():
        run = getattr(piece.run, "func", piece.run)
        kinds.setdefault(run.__doc__.split("\n")[0].rstrip("."), []).append(piece)

    def span(values: Sequence[float]) -> str:
        low, high = (f"{value:.0f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    rows = []
    for about, found in kinds.items():
        fits = [piece for piece in found if piece.gib <= T4]
        small = span([60 * piece.minutes * piece.t4 for piece in fits]) if fits else "does not fit"
        small += f", {len(found) - len(fits)} do not fit" if 0 < len(fits) < len(found) else ""
        seen = [measured[piece.name] for piece in found if piece.name in measured]
        named = re.sub(r"(\d)x(\d)", r"\1×\2", about)
        row = [named, len(found), span([piece.gib for piece in found]), span(seen) if seen else "–"]
        rows.append([*row, span([60 * piece.minutes for piece in found]), small])
    where = ", ".join(sorted(gpus)) or "a GPU"
    head = [
        "A piece",
        "How many",
        "Memory (GiB)",
        f"Seconds, measured on {where}",
        "by estimate",
        "on a T4, by estimate",
    ]
    return table(head, rows)


# ---------------------------------------------------------------- the status of the build


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table; columns from `left` on are numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def status_page(
    status: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    listed: Sequence[Chapter],
    records: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown for book/status.md. others: status of builds at other profiles on the same machine."""
    names = [chapter.name for chapter in listed]
    parts = [_made(status), _notebooks(status, listed), _speed(status, others, names), _recorded(records)]
    whole, some = full_runs(records, names)

    def ran(record: Mapping[str, Any]) -> str:
        return f"{record['provenance']['date'][:10]}, {record['provenance']['hardware']['gpu']}"

    rows = []
    for name in names:
        measured = [f"{_breakable(record['name'])} ({ran(record)})" for record in some.get(name, ())]
        rows.append([name, ran(whole[name]) if name in whole else NOT_RUN, ", ".join(measured) or "–"])
    parts.append(
        "## Full runs\n\nThe profile `full` on a GPU, with provenance; and what was measured on one apart from it: "
        "[a plan](running.md) of pieces that need minutes.\n\n"
    )
    parts[-1] += table(["Notebook", "Run", "In parts"], rows, left=3)
    return "\n\n".join(part for part in parts if part)


def _breakable(name: str) -> str:
    return name.replace("_", "_<wbr>")


def _made(status: Mapping[str, Any]) -> str:
    hardware, commit = status["hardware"], status["commit"]
    clean = {True: ", with changes that are not committed", False: "", None: ""}[status["dirty"]]
    memory = f", {hardware['memory_gib']:.0f} GiB of memory" if hardware.get("memory_gib") else ""
    rows = [
        ["profile", status["profile"]],
        ["date", status["date"].replace("T", " ").replace("+00:00", " UTC")],
        ["commit", f"`{commit[:12]}`{clean}" if commit else "not a git checkout"],
        [
            "machine",
            f"{hardware['platform']}, {hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s) of "
            f"torch{memory}, GPU: {hardware['gpu'] or 'none'}",
        ],
        *([name, version] for name, version in status["versions"].items()),
    ]
    return "## This build\n\n" + table(["What", "Value"], rows, left=2)


def _notebooks(status: Mapping[str, Any], listed: Sequence[Chapter]) -> str:
    seconds, peak = status["seconds"], status["peak_gib"]
    rows = [
        [f"[{c.heading}](../notebooks/{c.name}.ipynb)", f"{seconds[c.name]:.0f} s", f"{peak[c.name]:.2f}", size(c.name)]
        for c in listed
    ]
    rows.append(["all", f"{sum(seconds.values()):.0f} s", f"{max(peak.values()):.2f}", ""])
    return (
        "## The notebooks\n\nSeconds to execute, from the start of the kernel to its end; the largest resident memory "
        "of any of its processes; and what a browser loads of the page itself, with its images.\n\n"
        + table(["Notebook", "Time", "Memory (GiB)", "Page (KB)"], rows)
    )


def _speed(status: Mapping[str, Any], others: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    machine = [status["hardware"][key] for key in ("platform", "cpu", "cores", "gpu")]
    same = [b for b in others if [b["hardware"][key] for key in ("platform", "cpu", "cores", "gpu")] == machine]
    if not same:
        return ""
    builds = sorted([*same, status], key=lambda build: ("smoke", "quick", "full").index(build["profile"]))
    rows = [[name, *(f"{b['seconds'][name]:.0f} s" if name in b["seconds"] else "–" for b in builds)] for name in names]
    rows.append(["all", *(f"{sum(build['seconds'].values()):.0f} s" for build in builds)])
    dates = "; ".join(f"{build['profile']}: {build['date'][:10]}" for build in builds)
    head = ["Notebook", *(build["profile"] for build in builds)]
    return f"## Speed by profile\n\nOn the same machine ({dates}).\n\n" + table(head, rows)


def _recorded(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in records:
        made = record["provenance"]
        hardware, commit = made["hardware"], made["commit"] or "unknown"
        rows.append(
            [
                _breakable(record["name"]),
                record["tier"],
                made["date"][:10],
                f"`{commit[:7]}`" + (" (changed)" if made["dirty"] else ""),
                len(made["seeds"]),
                ("> " if "last start" in str(record["protocol"]) else "") + duration(made["wall_s"]),
                f"{made['cost']['units']:.3g}",
                hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores",
            ]
        )
    head = ["Result", "Tier", "Date", "Commit", "Seeds", "Wall time", "Cost units", "Hardware"]
    return (
        "## Recorded runs\n\nThe results in `book/results` that chapters read, each with the commit it was made from. "
        "A cost unit is what one image costs in one call of the network. A study is computed in pieces; *>*: it was "
        "taken up again, and only the seconds since its last start were counted.\n\n" + table(head, rows, left=4)
    )


# ---------------------------------------------------------------- sizes of pages, known when the site is built


def size(name: str) -> str:
    """What stands for the size of a page until the site is built."""
    return f"SIZE-OF-{name}"


def weight(page: Path) -> int:
    """Bytes of a page and of the images that it shows."""
    text = page.read_text(encoding="utf-8")
    images = {unquote(hit) for hit in re.findall(r'<img\b[^>]*?\bsrc="([^":?]+)"', text)}
    return page.stat().st_size + sum((page.parent / image).stat().st_size for image in images)


def fill_sizes(html: Path, names: Iterable[str]) -> dict[str, int]:
    """Writes the sizes of the notebooks' pages into the page of the status; returns them in bytes."""
    sizes = {name: weight(html / "notebooks" / f"{name}.html") for name in names}
    page = html / "book" / "status.html"
    text = page.read_text(encoding="utf-8")
    for name in sorted(sizes, key=len, reverse=True):
        text = text.replace(size(name), f"{sizes[name] / 1000:.0f}")
    page.write_text(text, encoding="utf-8")
    return sizes
