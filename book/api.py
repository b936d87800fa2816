"""The API reference: what the source says of its public functions and classes, as Markdown for book/api.md.

Read from the source, not from the imported modules: signatures as they are written, in the order of the file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bilevel_core"
CORE = ("schedules", "samplers", "guidance", "estimators", "algorithms", "tempering", "schedule_learning", "seeds")
LAB = ("oracles", "certificates", "comparisons", "distances")  # what imports torch and the core alone
Definition = ast.FunctionDef | ast.ClassDef


def markdown() -> str:
    """The reference of the core, then that of the part of the laboratory which imports nothing else either."""
    names = [f"bilevel_core.{name}" for name in CORE] + [f"bilevel_core.lab.{name}" for name in LAB]
    return "\n\n".join(_module(name) for name in names)


def public(name: str) -> list[Definition]:
    """The definitions of a module that its readers may use: those without an underscore."""
    path = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if _shown(node)]


def _shown(node: ast.stmt) -> bool:
    return isinstance(node, Definition) and not node.name.startswith("_") and bool(ast.get_docstring(node))


def _module(name: str) -> str:
    path = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    parts = [f"## {name.partition('.')[2]}", f"```{{py:module}} {name}\n```", "\n\n".join(_text(about))]
    return "\n\n".join([*parts, *(_entry(node) for node in public(name))])


def _entry(node: Definition, inside: str = "") -> str:
    """A directive of Sphinx's Python domain: signature, docstring, and a class's public methods."""
    decorators = {ast.unparse(found.func if isinstance(found, ast.Call) else found) for found in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        kind, signature = "class", _fields(node, "dataclass" in decorators)
    elif "property" in decorators:
        kind, signature = "property", ""
    else:
        kind = "method" if inside else "function"
        signature = _arguments(node.args, bound=bool(inside) and "staticmethod" not in decorators)
    options = [f":{name}:" for name in ("classmethod", "staticmethod") if name in decorators]
    body = [*options, "", "\n\n".join(_text(ast.get_docstring(node) or ""))]
    if isinstance(node, ast.ClassDef):
        body += ["", *(f"{_entry(method, node.name)}\n" for method in node.body if _shown(method))]
    fence = "`" * (4 if inside else 5)  # a docstring's own has three
    return f"{fence}{{py:{kind}}} {node.name}{signature}\n" + "\n".join(body).rstrip() + f"\n{fence}"


def _arguments(arguments: ast.arguments, bound: bool = False) -> str:
    """(x, *, eta=0.0): without annotations, which the docstring tells better; bound: without self."""
    bare = ast.parse(f"def f({ast.unparse(arguments)}): pass").body[0].args
    for argument in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg):
        if argument:
            argument.annotation = None
    if bound:
        (bare.posonlyargs or bare.args).pop(0)
    return f"({ast.unparse(bare)})"


def _fields(node: ast.ClassDef, dataclass: bool) -> str:
    """What makes an object: the arguments of __init__, or a dataclass's fields; nothing for a protocol."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return _arguments(method.args, bound=True)
    if not dataclass:
        return ""
    said = []
    for found in node.body:
        if isinstance(found, ast.AnnAssign):
            default = found.value
            if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
                given = {option.arg: option.value for option in default.keywords}
                default = given.get("default") or given.get("default_factory")
            said.append(found.target.id + (f"={ast.unparse(default)}" if default else ""))
    return f"({', '.join(said)})"


def _text(docstring: str) -> Iterator[str]:
    """A docstring's first paragraph as text; the rest as it stands: its columns are names, shapes and meanings."""
    first, _, rest = docstring.partition("\n\n")
    if not first:
        return
    parts = re.split(r"(`[^`]*`)", " ".join(first.split()))
    yield "".join(part if part[:1] == "`" else re.sub(r"([\\*_<>\[\]$|~{}.])", r"\\\1", part) for part in parts)
    if rest:
        yield f"```text\n{rest}\n```"
