"""What of the paper and of its released code is reproduced: each claim's verdict, computed from `book/results`.

A claim is a line of the paper's title or abstract, or something that its released code takes for granted; the paper's
tables are not known here. `claims` reads the recorded results, computes what is exact by the core's oracles, and turns
both into one of VERDICTS by the rule that the claim's function states. No verdict is typed by hand.

Two rules are used again and again. Against a rival, paired differences by seed are judged by Student's 95 % interval
(`baselines.summarise`): the rival is "better", "worse" or a "tie". "Outperforms" is *reproduced* where the rival is
worse in every study, *partly* where it is worse in some and better in none, else *not reproduced*.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import places, results

VERDICTS = ("reproduced", "partly", "not reproduced", "cannot be tested here")
REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTED = VERDICTS
PARTS = ("the method", "entropy strength", "noise schedule", "released code", "full size")
METHOD, ENTROPY, SCHEDULE, CODE, SIZE = PARTS
ORDER = ("method", "entropy", "schedule", "size")  # of the files that register claims
TIE = 0.1  # CLIP points within which two regrets of chapter 5 count as equal


@dataclass(frozen=True)
class Claim:
    """One line of the report.

    id       unique;  part: one of PARTS;  chapter: the notebook that shows it, without .ipynb
    claim    what was claimed;  ran: what was run for it;  link: where that is shown, from the root of the site
    results  the files of book/results it rests on
    ours     the numbers, with 95 % intervals;  tier: of these;  verdict: one of VERDICTS;  why: the rule applied
    """

    id: str
    part: str
    chapter: str
    claim: str
    ran: str
    link: str
    results: tuple[str, ...]
    ours: str
    tier: str
    verdict: str
    why: str


class Finding(NamedTuple):
    """What a claim's function returns; see `Claim`."""

    ours: str
    tier: str
    verdict: str
    why: str


class NoData(Exception):
    """A result that a claim rests on is missing."""


class Records:
    """The recorded results in a folder: records["name"] of name.json; raises NoData where it is missing."""

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory else places.project_root() / "book" / "results"
        self.read: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            try:
                self.read[name] = results.read_result(name, self.directory)
            except FileNotFoundError as error:
                raise NoData(f"no data: book/results/{name}.json is missing") from error
        return self.read[name]

    def __contains__(self, name: str) -> bool:
        return (self.directory / f"{name}.json").is_file()

    def path(self, name: str) -> Path:
        """Of a file of tensors."""
        if not (self.directory / name).is_file():
            raise NoData(f"no data: book/results/{name} is missing")
        return self.directory / name


Find = Callable[[Records], Finding]
REGISTERED: list[tuple[dict[str, Any], Find]] = []


def claim(id: str, part: str, at: str, claim: str, ran: str, *results: str) -> Callable[[Find], Find]:
    """Registers a function as the judge of a claim; at: "notebook#heading"."""
    chapter, _, heading = at.partition("#")
    link = f"notebooks/{chapter}.html#{heading}"
    fixed = {"id": id, "part": part, "chapter": chapter, "claim": claim, "ran": ran, "link": link, "results": results}

    def register(find: Find) -> Find:
        REGISTERED.append((fixed, find))
        return find

    return register


def claims(directory: str | Path | None = None, ids: Iterable[str] | None = None) -> list[Claim]:
    """Every claim with its verdict, or those of some ids, from the results in a folder (default book/results).

    A missing result makes the claims that rest on it "cannot be tested here", never an error. Takes a second or three.
    """
    records, found, wanted = Records(directory), [], None if ids is None else set(ids)
    for fixed, find in sorted(REGISTERED, key=lambda pair: ORDER.index(pair[1].__module__.rpartition(".")[2])):
        if wanted is not None and fixed["id"] not in wanted:
            continue
        try:
            finding = find(records)
        except NoData as missing:
            finding = Finding("no data", "–", UNTESTED, str(missing))
        found.append(Claim(**fixed, **finding._asdict()))
    return found


def counts(found: Iterable[Claim]) -> dict[str, dict[str, int]]:
    """How many claims of each part got each verdict."""
    by_part = {part: Counter() for part in PARTS}
    for claim in found:
        by_part[claim.part][claim.verdict] += 1
    return {part: {verdict: counted[verdict] for verdict in VERDICTS} for part, counted in by_part.items()}


def without_seed(seed: int, folder: str | Path, directory: str | Path | None = None) -> Path:
    """Copies the recorded results into a folder, leaving out all that one seed gave; returns the folder."""
    folder, records = Path(folder), Records(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(records.directory.iterdir()):
        if path.suffix != ".json":
            shutil.copy(path, folder)
            continue
        record = records[path.stem]
        record = record | {"data": _without(record["data"], seed)}
        (folder / path.name).write_text(json.dumps(record), encoding="utf-8")
    return folder


def _without(value: Any, seed: int) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, seed) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    own = [x.get("config", x) if isinstance(x, dict) else {} for x in value]
    runs = [about.get("seed", about.get("repetition")) for about in own]
    return [_without(x, seed) for x, run in zip(value, runs, strict=True) if run != seed]


# ---------------------------------------------------------------- rules


def outperforms(verdicts: Mapping[str, str]) -> tuple[str, str]:
    """(verdict, why) of "outperforms a rival" from the rival's "better", "worse" or "tie" in each study."""
    if not verdicts:
        raise NoData("no data: no study has this rival")
    said = "; ".join(f"{study}: the rival is {'level' if v == 'tie' else v}" for study, v in verdicts.items())
    kinds = set(verdicts.values())
    if kinds == {"worse"}:
        return REPRODUCED, said
    return (PARTLY if "worse" in kinds and "better" not in kinds else NOT_REPRODUCED), said


def shown(interval: tuple[float, float, float]) -> str:
    """mean ± half width."""
    from ..plots import interval as text

    return text(interval)


def paired(rows: Iterable[Mapping[str, Any]], key: str, method: str, reference: str) -> Any:
    """Student's interval over seeds of key's paired difference, method minus reference, mean over prompts."""
    from ..metrics import t_interval

    values: dict[str, dict] = {method: {}, reference: {}}
    for row in rows:
        if row["method"] in values:
            values[row["method"]][row["seed"], row.get("prompt", "")] = row[key]
    ours, base = values[method], values[reference]
    if not ours or ours.keys() != base.keys():
        raise NoData(f"no data: {method} and {reference} have no common pairs")
    seeds: dict[int, list[float]] = {}
    for pair, value in ours.items():
        seeds.setdefault(pair[0], []).append(value - base[pair])
    return t_interval([sum(v) / len(v) for v in seeds.values()])


def sign(interval: tuple[float, float, float], tie: float = 0.0) -> str:
    """Where an interval lies: "below" -tie, "above" tie, or it "holds" a value that counts as zero."""
    _, lo, hi = interval
    return "below" if hi < -tie else "above" if lo > tie else "holds"
