"""A notebook's parameters: its profile, what papermill passed, the rules that each must obey, and the device."""

from __future__ import annotations

import ast
import difflib
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .places import PROFILES, RUN, project_root, relative, work_dir

# What a notebook's parameters cell may hold besides: where papermill found the notebook and leaves it.
PATHS = ("PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH")
WHERE = ("device", "work_dir")  # parameters that decide where is computed, not what


def resolve(notebook: str, scope: Mapping[str, Any], **rules: Any) -> SimpleNamespace:
    """Check a notebook's parameters, expand its profile, show and return them.

    notebook  its name without .ipynb; the profiles are notebooks/profiles/<profile>/<notebook>.yaml
    scope     the notebook's `globals()`
    rules     one per parameter (PROFILE needs none): a tuple of allowed strings; an inclusive range (lo, hi)
              with None for an open end (whole numbers only, if the quick value and the ends are); a type;
              a function that returns an error text or None; or [rule] for a non-empty list of such values

    A parameter that still has its quick value takes the value of the profile named by PROFILE, unless
    papermill passed it; what is set otherwise wins. Raises ValueError that names the parameter, its value and
    what is allowed; an unknown name in the `parameters` cell or among papermill's gets a suggestion.

    book/results holds runs of profiles as they are: a recorded or full run with anything else than the profile's values
    (another seed, say; WHERE does not count) has its results in a folder of its own below work_dir/results.
    """
    names = ("PROFILE", *rules)
    cell, passed = _assignments(scope.get("In", ()))
    for where, assigned in (("passed by papermill", passed), ("in the parameters cell", cell)):
        for name in assigned:
            if name not in (*names, *PATHS):
                raise ValueError(f"unknown parameter {name!r} {where}{_suggest(name, names)}")
    missing = [name for name in names if name not in scope]
    if missing:
        raise ValueError(f"parameter {missing[0]!r} of {notebook} has no value: define it in the parameters cell")

    profile = _check("PROFILE", scope["PROFILE"], PROFILES)
    quick, chosen = _profile(notebook, "quick", names), _profile(notebook, profile, names)
    values = {"PROFILE": profile}
    for name, rule in rules.items():
        value = scope[name]
        untouched = name in quick and _same(value, quick[name]) and name not in passed
        if untouched and name in chosen:
            value = chosen[name]
        values[name] = _check(name, value, rule, quick.get(name, value))
    table = Shown(notebook, values, quick)
    _show(table)
    RUN.parameters, RUN.results = dict(values), None
    usual = quick | chosen
    other = {k: v for k, v in values.items() if k not in WHERE and not _same(v, usual.get(k))}
    if profile in ("recorded", "full") and other and "work_dir" in values:
        RUN.results = work_dir(values["work_dir"]) / "results" / label(other)
        if "BILEVEL_RESULTS" not in os.environ:
            print(f"not the {profile} profile as it is ({', '.join(other)}): results go to {RUN.results}")
    return SimpleNamespace(**values)


class Shown:
    """The resolved parameters as a table that is folded in a notebook and on a page, and plain lines elsewhere."""

    def __init__(self, notebook: str, values: Mapping[str, Any], quick: Mapping[str, Any]):
        names = [name for name in values if name != "PROFILE"]
        self.rows = [
            (name, repr(values[name]), None if _same(values[name], quick.get(name)) else repr(quick.get(name)))
            for name in names
        ]
        changed = sum(before is not None for *_, before in self.rows)
        self.title = f"Parameters of {notebook}, profile {values['PROFILE']}: {len(names)}, "
        self.title += f"{changed} not as in quick" if changed else "all as in quick"

    def __repr__(self) -> str:
        wide = max((len(name) for name, *_ in self.rows), default=0)
        lines = [
            f"  {name:<{wide}} = {value}" + ("" if before is None else f"  (quick: {before})")
            for name, value, before in self.rows
        ]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            style = "text-align: left; vertical-align: top; padding: 0.1em 0.6em; overflow-wrap: anywhere"
            return "<tr>" + "".join(f'<{tag} style="{style}">{cell}</{tag}>' for cell in cells) + "</tr>"

        body = []
        for name, value, before in self.rows:
            value = html.escape(value)
            now, before = (value, "the same") if before is None else (f"<b>{value}</b>", html.escape(before))
            body.append(line((name, now, before), "td"))
        head = f"<thead>{line(('parameter', 'value', 'in quick'), 'th')}</thead>"
        table = f'<table class="dataframe" style="font-size: 0.88em">{head}<tbody>{"".join(body)}</tbody></table>'
        return f"<details><summary>{html.escape(self.title)}</summary>{table}</details>"


def _show(table: Shown) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(table)
        return
    if get_ipython() is None:
        print(table)
    else:
        display(table)


def label(shown: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> str:
    """A folder's name for a run with these values: those `shown`, cut at 60 letters, and a checksum of all."""
    named = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(f"{name}-{value}" for name, value in shown.items()))[:60]
    whole = json.dumps(dict(shown if values is None else values), sort_keys=True, default=str)
    return f"{named or 'run'}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def read_profile(notebook: str, profile: str) -> dict[str, Any]:
    """The values in notebooks/profiles/<profile>/<notebook>.yaml; errors name the file."""
    import yaml

    path = project_root() / "notebooks" / "profiles" / profile / f"{notebook}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no profile file {relative(path)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{relative(path)} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or values.get("PROFILE") != profile:
        raise ValueError(f"{relative(path)} must be a YAML mapping with PROFILE: {profile}")
    return values


def literals(source: str) -> dict[str, Any] | None:
    """The assignments `name = literal` of a cell; None where the cell contains anything else."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return None
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            target = node.target
        if not isinstance(target, ast.Name):
            return None
        try:
            found[target.id] = ast.literal_eval(_Numbers().visit(node.value))
        except ValueError:
            return None
    return found


class _Numbers(ast.NodeTransformer):
    """Papermill writes nan and inf, wherever they stand, as float('nan') and float('inf'): as constants again."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        value = re.fullmatch(r"float\(['\"]([-+\w]+)['\"]\)", ast.unparse(node))
        return ast.Constant(float(value[1])) if value else node


def is_batch() -> bool:
    """True where no one can move a slider: the book's build (BILEVEL_STATIC=1), or a papermill run."""
    if os.environ.get("BILEVEL_STATIC") == "1":
        return True
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and any(_is_injected(source) for source in shell.user_ns.get("In", ()))


def _is_injected(source: str) -> bool:
    return source.lstrip().startswith("# Parameters\n") and literals(source) is not None


def _assignments(cells: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the last parameters cell assigns, and what papermill's cell after it does."""
    cell: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for source in cells:
        found = literals(source) or {}
        if _is_injected(source):
            passed = found
        elif "PROFILE" in found:
            # Run again by hand after papermill's cell: that one no longer speaks.
            cell, passed = found, {}
    return cell, passed


def _profile(notebook: str, profile: str, names: Sequence[str]) -> dict[str, Any]:
    values = read_profile(notebook, profile)
    for name in values:
        if name not in names:
            file = f"notebooks/profiles/{profile}/{notebook}.yaml"
            raise ValueError(f"unknown parameter {name!r} in {file}{_suggest(name, names)}")
    return values


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=1, cutoff=0.5)
    hint = [known for known in names if close and known.lower() == close[0]]
    return f": did you mean {hint[0]!r}?" if hint else f"; known are {', '.join(names)}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _check(name: str, value: Any, rule: Any, quick: Any = None) -> Any:
    """`value` if it obeys `rule` (an int made float where the parameter is a float), else ValueError."""

    def wrong(allowed: str) -> ValueError:
        hint = ""
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
            hint = f" (YAML reads {value} as text: write {float(value)!r} or, say, 1.0e-3)"
        return ValueError(f"parameter {name} = {value!r} is not allowed: it must be {allowed}{hint}")

    if isinstance(rule, list):
        if not isinstance(value, (list, tuple)) or not value:
            text = value if isinstance(value, str) else repr(value)
            example = text if text[:1] in "[(" else f"[{text}]"
            raise wrong("a list with at least one entry" + f" (papermill takes lists by -y '{name}: {example}')")
        samples = quick if isinstance(quick, (list, tuple)) and quick else value
        whole = next((q for q in samples if isinstance(q, float)), samples[0])
        return [_check(f"{name}[{i}]", entry, rule[0], whole) for i, entry in enumerate(value)]
    if isinstance(rule, tuple) and all(isinstance(entry, str) for entry in rule):
        if value not in rule:
            raise wrong("one of " + ", ".join(map(repr, rule)))
        return value
    if isinstance(rule, tuple):
        lo, hi = rule
        whole = all(isinstance(x, int) for x in (lo, hi, quick) if x is not None)
        bounds = " and ".join(
            f"{word} {bound}" for word, bound in (("at least", lo), ("at most", hi)) if bound is not None
        )
        allowed = f"a {'whole' if whole else 'finite'} number" + (f", {bounds}" if bounds else "")
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise wrong(allowed)
        if (lo is not None and value < lo) or (hi is not None and value > hi):
            raise wrong(allowed)
        return value if whole else float(value)
    if isinstance(rule, type):
        if rule is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, rule) or (isinstance(value, bool) and rule is not bool):
            raise wrong(f"of type {rule.__name__}")
        return value
    if isinstance(rule, Callable):
        complaint = rule(value)
        if complaint:
            raise wrong(f"otherwise: {complaint}")
        return value
    raise TypeError(f"rule of parameter {name}: {rule!r} is not a tuple, type, function or [rule]")


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" is the first of cuda, mps and cpu that is there.

    Raises ValueError for an unknown name and RuntimeError where the device asked for is not there.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"device = {name!r} is not one of 'auto', 'cpu', 'mps', 'cuda', 'cuda:<number>'")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device = {name!r}, but torch sees no NVIDIA GPU: set device = 'auto' or 'cpu', or attach one "
            "(in Colab: Runtime > Change runtime type > GPU; elsewhere check nvidia-smi)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device = {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type == "mps" and not has_mps:
        raise RuntimeError("device = 'mps', but torch sees no Apple GPU: set device = 'auto' or 'cpu'")
    return device
