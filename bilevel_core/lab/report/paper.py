"""The paper's own values, from `book/paper_values.yml`, and which claim each belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import places
from .entropy import FINETUNING
from .rules import Claim
from .schedule import SCHEDULES

_METHODS = {"entropy": ("bilevel", *FINETUNING), "schedule": ("bilevel", *SCHEDULES, "default")}
_MEASURES = {"entropy": ("upper reward", "FID", "execution time", "HPSv2"), "schedule": ("FID", "IS")}


def _value_ids() -> dict[str, str]:
    """Ids of the values to transcribe, with the claim beside which each is shown."""
    claim_of = {"entropy": "lambda-vs-", "schedule": "schedule-vs-"}
    ids = {}
    for application, methods in _METHODS.items():
        for method in methods:
            for measure in _MEASURES[application]:
                key = re.sub(r"[^a-z0-9]+", "-", f"{application} {method} {measure}".lower())
                shown_at = "stable-diffusion" if application == "entropy" else "mnist-28"
                rival = claim_of[application] + method.lower().replace(" ", "-")
                ids[key] = shown_at if method == "bilevel" else rival
    return ids


VALUE_IDS = _value_ids()
FIELDS = ("id", "table", "row", "column", "value", "unit", "page", "source")
TRUST = ("read", "second hand")  # in the paper itself; quoted by others


@dataclass(frozen=True)
class PaperSource:
    """Where something of the paper is known from: what is said there, and how far to trust it, one of TRUST."""

    said: str
    where: str
    trust: str


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper, or a place for one: value None until somebody transcribes it. See `paper_values`.

    source  name of a `PaperSource` that tells of the number; None where nothing but the paper does
    """

    id: str
    table: str | None
    row: str | None
    column: str | None
    value: float | None
    unit: str | None
    page: int | None
    source: str | None


def _load(path: str | Path | None) -> tuple[str, dict[str, Any], list[Any]]:
    """Name, sources and values of the file, unchecked but for their kind."""
    import yaml

    path = Path(path) if path else places.project_root() / "book" / "paper_values.yml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    sources, values = (found.get(key) if isinstance(found, dict) else None for key in ("sources", "values"))
    if not isinstance(sources, dict) or not isinstance(values, list):
        raise ValueError(f"{path.name}: the keys sources, a mapping, and values, a list of entries, were expected")
    return path.name, sources, values


def paper_sources(path: str | Path | None = None) -> dict[str, PaperSource]:
    """Public sources that tell of the paper's numbers, by name, of a YAML file, default book/paper_values.yml.

    Raises ValueError that names the source: an unknown, missing or empty field, or a trust that is not one of TRUST.
    """
    name, sources, _ = _load(path)
    for key, source in sources.items():
        fields = ("said", "where", "trust")
        if not isinstance(source, dict) or set(source) != set(fields) or not all(source.values()):
            raise ValueError(f"{name}, source {key}: the fields {', '.join(fields)} were expected, not {source!r}")
        if source["trust"] not in TRUST:
            raise ValueError(f"{name}, source {key}: trust = {source['trust']!r} must be one of {', '.join(TRUST)}")
    return {key: PaperSource(**source) for key, source in sources.items()}


def paper_values(path: str | Path | None = None) -> list[PaperValue]:
    """The transcribed values of a YAML file, default book/paper_values.yml.

    Raises ValueError that names the entry: an unknown or repeated id, an unknown or missing field, a value that is not
    a number, a number without table, row, column and page, or a source that the file does not have.
    """
    name, _, entries = _load(path)
    sources, values = paper_sources(path), {}
    for i, entry in enumerate(entries, 1):
        where = f"{name}, entry {i}"
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise ValueError(f"{where}: the fields {', '.join(FIELDS)} were expected, not {entry!r}")
        where += f" ({entry['id']})"
        if entry["id"] not in VALUE_IDS:
            raise ValueError(f"{where}: unknown id; known are {', '.join(VALUE_IDS)}")
        if entry["id"] in values:
            raise ValueError(f"{where}: this id comes twice")
        value = entry["value"]
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{where}: value = {value!r} is not a number")
            missing = [key for key in ("table", "row", "column", "page") if entry[key] in (None, "")]
            if missing:
                raise ValueError(f"{where}: a value needs its {', '.join(missing)}")
        page = entry["page"]
        if page is not None and (isinstance(page, bool) or not isinstance(page, int) or page < 1):
            raise ValueError(f"{where}: page = {page!r} is not a page number")
        if entry["source"] is not None and entry["source"] not in sources:
            raise ValueError(f"{where}: source = {entry['source']!r} must be null or one of {', '.join(sources)}")
        texts = {key: None if entry[key] is None else str(entry[key]) for key in ("table", "row", "column", "unit")}
        values[entry["id"]] = PaperValue(entry["id"], **texts, value=value, page=page, source=entry["source"])
    return list(values.values())


def paper_column(found: Iterable[Claim], values: Iterable[PaperValue]) -> dict[str, str]:
    """What the column "paper" says of each claim, by its id: values, "not transcribed", or "–" where none is asked."""
    by_claim: dict[str, list[PaperValue]] = {}
    for value in values:
        by_claim.setdefault(VALUE_IDS[value.id], []).append(value)
    said = {}
    for claim in found:
        places = by_claim.get(claim.id, [])
        numbers = [
            f"{v.row}, {v.column}: {v.value:g}{' ' + v.unit if v.unit else ''} (table {v.table}, p. {v.page})"
            for v in places
            if v.value is not None
        ]
        said[claim.id] = "; ".join(numbers) or ("not transcribed" if places else "–")
    return said
