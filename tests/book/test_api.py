"""book/api.py: the reference says of each public function and class what its source says."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

import api

TEXT = api.markdown()
MODULES = [f"bilevel_core.{name}" for name in api.CORE] + [f"bilevel_core.lab.{name}" for name in api.LAB]


def entry(source: str) -> str:
    return api._entry(ast.parse(source).body[0])


def test_the_whole_core_is_in_it():
    assert {path.stem for path in api.PACKAGE.glob("*.py")} - {"__init__"} == set(api.CORE)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_stands_once_with_its_own_words(name):
    module = importlib.import_module(name)
    part = TEXT.split(f"{{py:module}} {name}\n")[1].split("{py:module}")[0]
    own = [value for key, value in vars(module).items() if not key.startswith("_") and inspect.getdoc(value)]
    own = [v for v in own if (inspect.isfunction(v) or inspect.isclass(v)) and v.__module__ == name]
    assert own
    for thing in own:
        kind = "class" if inspect.isclass(thing) else "function"
        assert len(re.findall(rf"\{{py:{kind}\}} {thing.__name__}\b", part)) == 1, thing
        rest = inspect.getdoc(thing).partition("\n\n")[2]
        assert rest in part, thing
        if kind == "function":
            arguments = re.search(rf"\{{py:function\}} {thing.__name__}(\(.*\))\n", part)[1]
            given = ast.parse(f"def f{arguments}: pass").body[0].args
            names = [found.arg for found in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            asked = inspect.signature(inspect.unwrap(thing)).parameters.values()
            assert names == [
                found.name for found in asked if found.kind not in (found.VAR_POSITIONAL, found.VAR_KEYWORD)
            ]


def test_text_is_no_markup_and_columns_stay():
    made = entry(
        'def f(a: int, *, b: float = 1e-5) -> int:\n    """Of `a_b`: x_t * [y] <z>.\n\n    a   (n,)  *one*\n    """'
    )
    assert made.splitlines()[0] == "`````{py:function} f(a, *, b=1e-05)"
    assert "Of `a_b`: x\\_t \\* \\[y\\] \\<z\\>\\." in made and "```text\na   (n,)  *one*\n```" in made


def test_classes_show_what_makes_them_and_their_public_methods():
    fields = "    x: int\n    y: int = field(repr=False)\n    z: list = field(default_factory=list)\n"
    methods = '    @classmethod\n    def made(cls, n):\n        """Made."""\n    def _hidden(self): """No."""\n'
    methods += '    @property\n    def size(self):\n        """Its size."""\n    def bare(self): pass\n'
    made = entry(f'@dataclass(frozen=True)\nclass C:\n    """A class."""\n{fields}{methods}')
    assert made.startswith("`````{py:class} C(x, y, z=list)\n")
    assert "````{py:method} made(n)\n:classmethod:\n\nMade\\.\n````" in made
    assert "````{py:property} size\n" in made and "hidden" not in made and "bare" not in made
    init = entry('class D:\n    """A class."""\n    def __init__(self, a, *b, **c): pass')
    assert init.startswith("`````{py:class} D(a, *b, **c)\n")
    assert entry('class P(Protocol):\n    """What is asked."""\n    x: int').startswith("`````{py:class} P\n")
