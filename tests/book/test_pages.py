"""book/pages.py: what a chapter is, the map, the status page, the citation and the README's table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_markdown_cell, new_notebook

import pages

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTED = [
    pages.Chapter("01_one", "One", "Why?"),
    pages.Chapter("10_reproduction_report", "Report", "What holds?"),
    pages.Chapter("appendix_two", "Appendix: two", "How?"),
]
CLAIMS = [("01_one", "reproduced"), ("01_one", "partly"), ("01_one", "reproduced"), ("appendix_two", "not reproduced")]


def status(profile: str = "smoke", **changes) -> dict:
    hardware = {"platform": "Linux", "cpu": "A CPU", "cores": 2, "threads": 1, "memory_gib": 23.5, "gpu": None}
    seconds = {"01_one": 3.2, "10_reproduction_report": 60.1, "appendix_two": 700.0}
    return {
        "profile": profile,
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "a" * 40,
        "dirty": False,
        "seconds": seconds,
        "peak_gib": dict.fromkeys(seconds, 0.5) | {"appendix_two": 1.25},
        "versions": {"python": "3.12.1", "torch": "2.9.0"},
        "hardware": hardware,
    } | changes


def record(name: str, tier: str, gpu: str | None = None, pieces: str = "", **changes) -> dict:
    made = {"commit": "b" * 40, "dirty": False, "date": "2026-02-03T00:00:00+00:00", "seeds": [0, 1], "wall_s": 9000.0}
    made |= {"parameters": {"PROFILE": tier}, "cost": {"units": 1234567.0}}
    made |= {"hardware": {"cpu": "Other CPU", "cores": 8, "gpu": gpu}} | changes
    return {"name": name, "tier": tier, "provenance": made, "protocol": {"pieces": pieces}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_says_what_it_is_and_asks(path):
    chapter = pages.Chapter.read(path)
    assert chapter.question.endswith("?") and chapter.question[0].isupper() and "*" not in chapter.question
    assert "\n" not in chapter.question and "|" not in chapter.question
    assert chapter.heading.startswith(("Appendix", f"{int(path.stem[:2])}. ") if path.stem[0].isdigit() else "Appendix")


def test_a_notebook_without_a_question_is_named(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title\n\nNo question.")]), tmp_path / "x.ipynb")
    with pytest.raises(ValueError, match=r"x\.ipynb.*question"):
        pages.Chapter.read(tmp_path / "x.ipynb")


def test_verdicts_are_counted_by_chapter_in_their_order():
    found = pages.verdicts(SimpleNamespace(chapter=chapter, verdict=verdict) for chapter, verdict in CLAIMS)
    assert pages.counted(found["01_one"]) == "2 reproduced, 1 partly"
    assert pages.counted(found["appendix_two"]) == "1 not reproduced"
    assert pages.counted(None) == pages.counted(Counter()) == ""


def test_the_map_shows_only_what_was_run():
    judged = pages.verdicts(SimpleNamespace(chapter=chapter, verdict=verdict) for chapter, verdict in CLAIMS)
    records = [record("01_study", "recorded"), record("01_one_full", "full"), record("appendix_two", "full", "A GPU")]
    names = [chapter.name for chapter in LISTED]
    full = pages.full_runs(records, names)
    assert (set(full[0]), full[1]) == ({"appendix_two"}, {})  # no recorded run is, nor a full one without a GPU
    text = pages.chapter_map(LISTED, status(), full, judged, lambda name: f"[badge]({name})" if name[0] == "0" else "")
    first, second, third = text.split("::::{grid-item-card}")[1:]
    assert "[1. One](../notebooks/01_one.ipynb)" in first and "Why?" in first
    assert "**CPU** 3 s (smoke) · **GPU** not yet run" in first
    assert "[2 reproduced, 1 partly](../notebooks/10_reproduction_report.ipynb)" in first and "[badge](01_one)" in first
    assert "Claims" not in second and "badge" not in second
    assert "**CPU** 12 min (smoke) · **GPU** 2.5 h on A GPU" in third
    alone = pages.chapter_map(LISTED[:1], status(), ({}, {}), judged, lambda name: "")
    assert "2 reproduced" in alone and "10_reproduction_report" not in alone  # no link to a page that is not there


def test_a_part_is_no_run():
    """What a card measured besides the profile never passes for the run of a chapter."""
    part = record("01_memory_full", "full", "B GPU", parameters={"n": 3})
    whole, parts = pages.full_runs([part], ["01_one"])
    assert whole == {} and parts == {"01_one": [part]}
    text = pages.chapter_map(LISTED[:1], status(), (whole, parts), {}, lambda name: "")
    assert "**GPU** not yet run as a whole, [in parts](status.md) on B GPU" in text
    page = pages.status_page(status(), [], LISTED, [part])
    assert "| 01_one | not yet run | 01_<wbr>memory_<wbr>full (2026-02-03, B GPU) |" in page
    both = pages.chapter_map(
        LISTED[:1], status(), pages.full_runs([part, record("01_one", "full", "A GPU")], ["01_one"]), {}, lambda n: ""
    )
    assert "**GPU** 2.5 h on A GPU" in both and "in parts" not in both


def test_results_belong_to_their_chapter():
    names = ["01_one", "05_five", "appendix_two"]
    found = [pages.belongs(name, names) for name in ("05_five", "05_five_full", "01_study", "appendix_two", "99_x")]
    assert found == ["05_five", "05_five", "01_one", "appendix_two", None]


def test_every_recorded_result_belongs_to_a_notebook():
    records = pages.results(ROOT / "book" / "results")
    assert records
    for found in records:
        assert pages.belongs(found["name"], [path.stem for path in NOTEBOOKS]), found["name"]


def test_the_status_page_tells_all():
    records = [record("01_study", "recorded"), record("appendix_two", "full", "A GPU", dirty=True)]
    text = pages.status_page(status(), [], LISTED, records)
    assert "| commit | `aaaaaaaaaaaa` |" in text and "2026-01-02 03:04:05 UTC" in text
    assert "Linux, A CPU, 2 cores, 1 thread(s) of torch, 24 GiB of memory, GPU: none" in text
    assert "| torch | 2.9.0 |" in text
    assert "| 3 s | 0.50 | SIZE-OF-01_one |" in text and "| all | 763 s | 1.25 |" in text
    assert "| 01_<wbr>study | recorded | 2026-02-03 | `bbbbbbb` | 2 | 2.5 h | 1.23e+06 | Other CPU, 8 cores |" in text
    assert "`bbbbbbb` (changed)" in text
    resumed = [record("01_study", "recorded", pieces="resumable; wall_s counts those of the last start")]
    assert "| 2 | > 2.5 h |" in pages.status_page(status(), [], LISTED, resumed)
    assert "| 01_one | not yet run | – |" in text and "| appendix_two | 2026-02-03, A GPU | – |" in text
    assert "Speed by profile" not in text
    assert "changes that are not committed" in pages.status_page(status(dirty=True), [], LISTED, [])
    assert "not a git checkout" in pages.status_page(status(commit=None, dirty=None), [], LISTED, [])


def test_the_plan_for_a_gpu_is_shown_whole():
    """Every piece is in a line; what was measured stands beside the estimate, what a T4 cannot hold is said."""
    from bilevel_core.lab.gpu import pieces

    made = record("08_memory_full", "full", "A GPU")
    made["provenance"]["pieces"] = {"sd15-512-float16": 2.2, "sd15-512-float32": 31.0}
    lines = [line.strip("| ").split(" | ") for line in pages.gpu_plan([made, record("01_x", "recorded")]).splitlines()]
    assert lines[0][3] == "Seconds, measured on A GPU"
    assert sum(int(line[1]) for line in lines[2:]) == len(pieces.all_pieces())
    steps = next(line for line in lines if line[0].startswith("A guided step of Stable Diffusion"))
    assert steps[3] == "2 to 31" and steps[5].endswith(", 2 do not fit")
    assert next(line[5] for line in lines if line[0].startswith("The five stages")) == "does not fit"
    assert {line[3] for line in lines if "schedule" in line[0]} == {"–"}
    assert "measured on a GPU" in pages.gpu_plan([])


def test_speed_is_compared_on_one_machine_only():
    quick = status("quick", seconds={"01_one": 30.0, "appendix_two": 5.0})
    text = pages.status_page(status(), [quick], LISTED, [])
    assert "| Notebook | smoke | quick |" in text
    assert "| 01_one | 3 s | 30 s |" in text and "| 10_reproduction_report | 60 s | – |" in text
    other = quick | {"hardware": quick["hardware"] | {"cpu": "Another"}}
    assert "Speed by profile" not in pages.status_page(status(), [other], LISTED, [])


def test_sizes_count_a_page_and_its_images(tmp_path):
    for folder in ("notebooks", "book", "_images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "_images" / "a b.png").write_bytes(b"x" * 5000)
    image = '<img alt="" src="../_images/a%20b.png"><img src="data:image/png;base64,AAAA">'
    (tmp_path / "notebooks" / "01_one.html").write_text(image * 2)
    page = tmp_path / "book" / "status.html"
    page.write_text(f"<td>{pages.size('01_one')}</td>")
    sizes = pages.fill_sizes(tmp_path, ["01_one"])
    assert sizes == {"01_one": 5000 + 2 * len(image)}
    assert page.read_text() == "<td>5</td>"


def test_the_citation_is_that_of_the_file():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = pages.citation(cff, "https://example.org/book")
    for who in cff["preferred-citation"]["authors"]:
        assert f"{who['given-names']} {who['family-names']}" in text
    assert "@inproceedings{xiao2025generative," in text and "68535--68558" in text
    assert "https://example.org/book" in text and "example.org" not in pages.citation(cff)
    assert text.count("{") == text.count("}")


def test_results_stand_with_what_makes_them():
    def claim(id: str, tier: str, *results: str, verdict: str = "partly") -> SimpleNamespace:
        told = {"claim": f"It is {id}.", "ours": "-0.5 of abar_T", "verdict": verdict}
        return SimpleNamespace(id=id, tier=tier, results=results, **told)

    names, tool = ["01_one", "05_five"], ".venv/bin/papermill --cwd notebooks notebooks/"
    made = {
        "exact": [f"{tool}10_reproduction_report.ipynb out.ipynb -k python3 -p PROFILE quick"],
        "recorded": [f"{tool}05_five.ipynb out.ipynb -k python3 -p PROFILE recorded"],
        "full": ["make gpu ONLY='sd15-*' && make gpu-merge"],
    }
    results = ("05_x.json", "05_x.safetensors", "05_five.json")
    for tier, told in made.items():
        assert pages.commands(claim("x", tier, *results), names) == told
    claims = [claim(id, "exact") for id in pages.MAIN]
    claims[1] = claim(pages.MAIN[1], "–", verdict="cannot be tested here")
    lines = pages.readme_results(claims, names).splitlines()
    assert len(lines) == 2 + len(claims) - 1 and pages.MAIN[1] not in "".join(lines)
    row = [f"It is {pages.MAIN[0]}.", "**partly**", "−0.5 of ᾱ_T", "exact", f"`{made['exact'][0]}`"]
    assert lines[2] == f"| {' | '.join(row)} |"


def test_a_marker_that_is_missing_is_named():
    assert pages.between("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="<!-- y -->"):
        pages.between("nothing", "y", "new")
