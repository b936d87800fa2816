"""What the recorded runs took, beside what was estimated beforehand, and on which machines they ran."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .. import places


def _records(directory: str | Path | None) -> list[dict[str, Any]]:
    """The records of a folder, default book/results, in the order of their names."""
    folder = Path(directory) if directory else places.project_root() / "book" / "results"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if "provenance" in record]


def estimates(path: str | Path | None = None) -> dict[str, float]:
    """Seconds that each piece for a GPU was estimated to take before it ran; of a file like book/estimates.yml, the
    default. Raises ValueError that names a piece whose minutes are not a positive number."""
    import yaml

    path = Path(path) if path else places.project_root() / "book" / "estimates.yml"
    minutes = yaml.safe_load(path.read_text(encoding="utf-8"))["minutes"]
    for name, value in minutes.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{path.name}: minutes of {name} = {value!r} must be a positive number")
    return {name: 60.0 * value for name, value in minutes.items()}


def spent(directory: str | Path | None = None) -> list[dict[str, Any]]:
    """A row for each recorded result: what was estimated before it ran, and what it took.

    Each row has "result", "tier", "seconds" (of the last start alone where "resumed"), "units" of cost, "gpu" (None on
    a CPU), "cores" and "estimated": seconds, summed over its pieces (see `estimates`); None where nobody estimated.
    """
    guessed, rows = estimates(), []
    for record in _records(directory):
        made = record["provenance"]
        planned = [guessed[name] for name in made.get("pieces", {}) if name in guessed]
        row = {
            "result": record["name"],
            "tier": record["tier"],
            "seconds": made["wall_s"],
            "units": made["cost"]["units"],
        }
        row |= {"gpu": made["hardware"]["gpu"], "cores": made["hardware"]["cores"]}
        row |= {"resumed": "last start" in str(record["protocol"])}
        rows.append(row | {"estimated": sum(planned) if planned else None})
    return rows


def searches(directory: str | Path | None = None) -> tuple[int, int, int]:
    """(how many, planned, spent) searches of chapter 7's recorded race, the latter two in cost units of one search:
    what the plan allots, and the most that any of them took. Raises FileNotFoundError where the record is missing."""
    from ..results import read_result
    from ..studies.schedule_race import Plan

    record = read_result("07_noise_schedule_mnist", directory)
    plan = record["protocol"]["plan"]
    costs = [one["cost"] for one in record["data"]["searches"]]
    return len(costs), Plan(**plan | {"grids": tuple(plan["grids"])}).budget, max(costs)


def machines(directory: str | Path | None = None) -> dict[str, list[str]]:
    """Processors, GPUs, threads of torch and versions of torch that made the records of a folder, each sorted."""
    made = [record["provenance"] for record in _records(directory)]
    found = {
        "processors": {one["hardware"]["cpu"] for one in made},
        "GPUs": {one["hardware"]["gpu"] for one in made} - {None},
        "threads": {str(one["hardware"]["threads"]) for one in made},
        "versions of torch": {one["versions"]["torch"] for one in made},
    }
    return {name: sorted(values) for name, values in found.items()}
