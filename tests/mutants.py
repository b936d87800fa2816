"""Writes tests/mutants.md: what `make mutants` found, with the reason why each surviving fault is not caught.

The reasons stand in tests/survivors.yml, by the changed line, so that they outlive the numbers mutmut gives to faults.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections import Counter
from pathlib import Path

import yaml

from bilevel_core.lab import results

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mutants" / "bilevel_core"
MODULES = ("schedules", "samplers", "estimators", "tempering", "lab/oracles")
# mutmut's exit codes of a fault's tests; a fault that makes them hang is as good as caught.
CODES = {0: "survived", 1: "killed", 3: "killed", 24: "timeout", 33: "no test", 36: "timeout", -24: "timeout"}


def faults(module: str) -> dict[str, tuple[str, str]]:
    """name -> (line as it is, line with the fault), of all faults in a module."""
    text = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    lines, bodies = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name:
            body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            bodies[node.name] = body.replace(node.name, re.sub(r"^x_?|ǁ.*ǁ|__mutmut_.*", "", node.name)).splitlines()
    found = {}
    for name, body in bodies.items():
        base, _, number = name.rpartition("__mutmut_")
        if number != "orig":
            changes = list(difflib.ndiff(bodies[f"{base}__mutmut_orig"], body))
            sides = [" ".join(c[2:].strip() for c in changes if c.startswith(sign)) for sign in ("- ", "+ ")]
            found[name] = (sides[0], sides[1])
    return found


def report() -> str:
    """The page, as Markdown."""
    given = yaml.safe_load((ROOT / "tests" / "survivors.yml").read_text(encoding="utf-8"))
    reasons = {(r["old"], r["new"]): r["reason"] for r in given["reasons"]}
    rows, survivors, totals = [], [], Counter()
    for module in MODULES:
        codes = json.loads((FOLDER / f"{module}.py.meta").read_text())["exit_code_by_key"]
        known = {name.rpartition(".")[2]: code for name, code in codes.items() if code is not None}
        counts = Counter(CODES.get(code, "timeout") for code in known.values())
        counts["faults"], counts["tried"] = len(codes), len(known)
        totals += counts
        rows.append((module, counts))
        made = faults(module)
        for name, code in known.items():
            if CODES.get(code) in ("survived", "no test"):
                old, new = made[name]
                survivors.append((module, old, new, reasons.get((old, new), "**not looked at yet**")))
    about = results.provenance()
    share = (totals["killed"] + totals["timeout"]) / max(totals["tried"], 1)
    lines = [
        "# Mutation testing",
        "",
        "Written by `make mutants`; the reasons stand in `survivors.yml`. mutmut changes one number, operator, "
        "argument or text of the core at a time and runs the fast tests of these modules, until one fails.",
        "",
        f"{about['date'][:10]}, commit {str(about['commit'])[:12]}: {share:.1%} of {totals['tried']} faults tried are "
        f"caught, of {totals['faults']} in all. " + (given["sample"] if totals["tried"] < totals["faults"] else ""),
        "",
        "| Module | Faults | Tried | Killed | Timeout | Survived | No test |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    columns = ("faults", "tried", "killed", "timeout", "survived", "no test")
    for module, counts in [*rows, ("all", totals)]:
        lines.append(f"| {module} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    lines += ["", "## Survivors", ""]
    for module, old, new, reason in survivors:
        lines += [f"- `{module}`: {reason}", "", "  ```diff", f"  - {old}", f"  + {new}", "  ```", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "tests" / "mutants.md").write_text(report(), encoding="utf-8")
    print(f"{ROOT / 'tests' / 'mutants.md'} is written")
