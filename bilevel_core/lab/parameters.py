"""A notebook's parameters: its profile, what papermill passed, the rules that each must obey, and the device."""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .places import PROFILES, project_root, relative


def resolve(notebook: str, scope: Mapping[str, Any], **rules: Any) -> SimpleNamespace:
    """Check a notebook's parameters, expand its profile, print and return them.

    notebook  its name without .ipynb; the profiles are notebooks/profiles/<profile>/<notebook>.yaml
    scope     the notebook's `globals()`
    rules     one per parameter (PROFILE needs none): a tuple of allowed strings; an inclusive range (lo, hi)
              with None for an open end (whole numbers only, if the quick value and the ends are); a type;
              a function that returns an error text or None; or [rule] for a non-empty list of such values

    A parameter that still has its quick value takes the value of the profile named by PROFILE, unless
    papermill passed it; what is set otherwise wins. Raises ValueError that names the parameter, its value and
    what is allowed; an unknown name in the `parameters` cell or among papermill's gets a suggestion.
    """
    names = ("PROFILE", *rules)
    cell, passed = _assignments(scope.get("In", ()))
    for where, assigned in (("passed by papermill", passed), ("in the parameters cell", cell)):
        for name in assigned:
            if name not in names:
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
    shown = ", ".join(f"{name} = {value!r}" for name, value in values.items() if name != "PROFILE")
    print(f"{notebook}, profile {profile}: {shown}")
    return SimpleNamespace(**values)


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
            found[target.id] = ast.literal_eval(node.value)
        except ValueError:
            # papermill writes nan and inf as float('nan'), float('inf')
            value = re.fullmatch(r"float\(['\"]([-+\w]+)['\"]\)", ast.unparse(node.value))
            if value is None:
                return None
            found[target.id] = float(value[1])
    return found


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
            raise wrong("a list with at least one entry")
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
