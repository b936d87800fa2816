"""The paper's own values, from `book/paper_values.yml`, and which claim each belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import places
from .entropy import FINETUNING
from .rules import Claim
from .schedule import SCHEDULES

_METHODS = {"entropy": ("bilevel", *FINETUNING), "schedule": ("bilevel", *SCHEDULES, "default")}
_MEASURES = {"entropy": ("upper reward", "FID"), "schedule": ("FID", "IS")}


def _value_ids() -> dict[str, str]:
    """Ids of the values to transcribe, with the claim beside which each is shown."""
    claim_of = {"entropy": "lambda-vs-", "schedule": "schedule-vs-"}
    ids = {}
    for application, methods in _METHODS.items():
        for method in methods:
            for measure in _MEASURES[application]:
                key = re.sub(r"[^a-z]+", "-", f"{application} {method} {measure}".lower())
                shown_at = "stable-diffusion" if application == "entropy" else "mnist-28"
                rival = claim_of[application] + method.lower().replace(" ", "-")
                ids[key] = shown_at if method == "bilevel" else rival
    return ids


VALUE_IDS = _value_ids()
FIELDS = ("id", "table", "row", "column", "value", "unit", "page")


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper, or a place for one: value None until somebody transcribes it. See `paper_values`."""

    id: str
    table: str | None
    row: str | None
    column: str | None
    value: float | None
    unit: str | None
    page: int | None


def paper_values(path: str | Path | None = None) -> list[PaperValue]:
    """The transcribed values of a YAML file, default book/paper_values.yml.

    Raises ValueError that names the entry: an unknown or repeated id, an unknown or missing field, a value that is not
    a number, or a number without table, row, column and page.
    """
    import yaml

    path = Path(path) if path else places.project_root() / "book" / "paper_values.yml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = found.get("values") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path.name}: a mapping with one key, values, a list of entries, was expected")
    values: dict[str, PaperValue] = {}
    for i, entry in enumerate(entries, 1):
        where = f"{path.name}, entry {i}"
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
        texts = {key: None if entry[key] is None else str(entry[key]) for key in ("table", "row", "column", "unit")}
        values[entry["id"]] = PaperValue(entry["id"], **texts, value=value, page=page)
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
