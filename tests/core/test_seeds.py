"""Seeds by name: known values, no collisions, no traces; and nobody makes one from another by arithmetic."""

import ast
import enum
import itertools
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel_core.seeds import check_seed, derive_seed, seeded

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bilevel_core", "notebooks", "book", "benchmarks")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".ipynb") and not {"__pycache__", ".ipynb_checkpoints", "_build"} & {*path.parts}
)


def test_known_values():
    """Recorded runs name their seeds: the function never changes. SHA-256 of the parts as JSON, its first 32 bits."""
    assert derive_seed("x_T", 0) == 501745618
    assert derive_seed("x_T", 1) == 1250846263
    assert derive_seed("gradient", 1000, 3, 1) == 3777970684
    assert derive_seed(-1) == 3508843068
    assert derive_seed(2**32) == 3283855813
    assert derive_seed("θ*", 10**40) == 3548704929


def test_parts_are_told_apart():
    parts = [("a", 1), ("a1",), ("a", "1"), ("a", 1, 0), (1, "a"), ("a", -1), ("a", 2**32 + 1), ("a", 2**64 + 1)]
    parts += [(1,), ("1",), ("",), ("", ""), ('a", 1',), ('["a", 1]',), ("a,1",), ("A", 1), ("é",), ("e\u0301",)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed("a", np.int64(1)) == derive_seed("a", 1) == derive_seed(np.str_("a"), np.uint8(1))
    assert derive_seed("a", enum.IntEnum("Number", {"one": 1}).one) == derive_seed("a", 1)
    for bad in (1.0, math.nan, True, np.bool_(True), np.float32(1), None, b"a", (1,), torch.tensor(1)):
        with pytest.raises(TypeError, match="a seed is derived from texts and integers, at least one, not from"):
            derive_seed("a", bad)
    with pytest.raises(TypeError, match="at least one"):
        derive_seed()


def test_thousands_of_seeds_and_their_draws_differ():
    """Of n seeds about n^2/2^33 pairs would be equal by chance: 0.003 of 5,000. A CPU keeps all of their bits."""
    names = itertools.product(("f", "g"), range(50), range(50))
    found = [derive_seed(*parts) for parts in names]
    assert len(set(found)) == len(found) == 5000 and all(0 <= seed < 2**32 for seed in found)
    assert max(found) > 2**31  # all 32 bits are used
    draws = [tuple(torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in found]
    assert len(set(draws)) == len(draws)
    np.random.RandomState(max(found)), np.random.default_rng(max(found)), random.Random(max(found))


def test_what_a_generator_keeps_of_a_seed():
    """Why sums and products of seeds collide: 7 and 7 + 2^32 are one seed for a generator on the CPU."""
    same, other = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + 2**32))
    assert torch.equal(same, other)
    for seed in (0, 7, 2**32 - 1, np.int64(3)):
        assert check_seed(seed) == seed and type(check_seed(seed)) is int
    for seed in (-1, 2**32, 7 + 2**32, 10**30, 1.0, True, "7", None):
        with pytest.raises(ValueError, match=re.escape(f"seed = {seed!r} must be an integer in 0..2^32 - 1")):
            check_seed(seed)


def test_global_generators_are_lent_and_given_back():
    torch.manual_seed(1)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(1)
    first = torch.rand(3)
    with seeded(5, torch.device("cpu")):
        inside = torch.rand(3)
        with pytest.raises(KeyError), seeded(6, torch.device("cpu")):
            other = torch.rand(3)
            raise KeyError
        again = torch.rand(3)
    assert torch.equal(first, expected[0]) and torch.equal(torch.rand(3), expected[1])
    torch.manual_seed(5)
    assert torch.equal(inside, torch.rand(3)) and torch.equal(again, torch.rand(3)) and not torch.equal(other, inside)


# ---------------------------------------------------------------- in the source


def texts(path: Path) -> list[tuple[str, str]]:
    """Where and what: the whole of a module, or each code cell of a notebook, without IPython's own lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [("", text)]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [(f" {cell['id']}", re.sub(r"(?m)^(\s*)[%!?].*$", r"\1pass", "".join(cell["source"]))) for cell in cells]


def is_seed(node: ast.AST) -> bool:
    """A variable, attribute or entry called seed or something_seed (but results per_seed, by_seed)."""
    name = getattr(node, "id", getattr(node, "attr", ""))
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name = str(node.slice.value)
    return bool(re.search(r"(?<!per)(?<!by)(^|_)seed$", name, re.IGNORECASE))


def computed(node: ast.AST) -> bool:
    """An expression with arithmetic on variables, but within a call of its own, such as derive_seed(...)."""
    if isinstance(node, ast.BinOp):
        return any(isinstance(part, ast.Name) for part in ast.walk(node))
    return not isinstance(node, ast.Call) and any(map(computed, ast.iter_child_nodes(node)))


def arithmetic_on_seeds(text: str) -> list[str]:
    """Line and text of each sum, product, ... of a seed, and of each that is handed over as one."""
    found, tree = {}, ast.parse(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ends = {id(part) for node in calls if ast.unparse(node.func) == "range" for part in node.args}
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.BinOp) and id(node) not in ends:  # consecutive repetitions: range(seed, seed + n)
            parts = [node.left, node.right]
            if any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", 0), str) for part in parts):
                continue
        elif isinstance(node, ast.AugAssign):
            parts = [node.target, node.value]
        seeds = [part for part in parts if is_seed(part)]
        if isinstance(node, ast.Assign) and any(map(is_seed, node.targets)) and computed(node.value):
            seeds.append(node.value)
        if isinstance(node, ast.For | ast.comprehension) and is_seed(node.target) and computed(node.iter):
            seeds.append(node.iter)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("manual_seed"):
            seeds += [part for part in node.args if computed(part)]
        if isinstance(node, ast.keyword) and is_seed(ast.Name(node.arg or "")) and computed(node.value):
            seeds.append(node.value)
        if seeds:
            found.setdefault(seeds[0].lineno, ast.unparse(node).partition("\n")[0])
    return [f"{line}: {said}" for line, said in sorted(found.items())]


@pytest.mark.parametrize(
    "text",
    [
        "x = 2 * seed + 1",
        "seed += 5",
        "n = P.seed + 1",
        "a = (2 * self.state.seed + stream) * 2**30",
        "a = seed << 8",
        "a = row['seed'] * 7",
        "a = f(START_SEED + k)",
        "torch.Generator().manual_seed(1000 * i)",
        "g.manual_seed([k + 1][0])",
        "f(x, seed=100 * s)",
        "f(x, f_seed=s + 1)",
        "a = seed ^ 3",
        "a = -1 * seed",
        "seed = 100 * k",
        "for seed in (200 * k, 200 * k + 100): f(seed)",
        "a = [f(seed) for seed in (k, k + 1)]",
    ],
)
def test_arithmetic_on_seeds_is_seen(text):
    assert arithmetic_on_seeds(text)


@pytest.mark.parametrize(
    "text",
    [
        "x = derive_seed('f', seed, k + 1)",
        "for seed in range(first, first + seeds): f(seed)",
        "rows = torch.arange(n) % seeds == seed",
        "name = f'{seed}_{k + 1}' + '.json'",
        "name = 'seed %d' % seed",
        "torch.Generator().manual_seed(derive_seed('x', 2 * k))",
        "f(x, seed=derive_seed('x', k + 1), seeds=n + 1)",
        "seeds = [s + 1 for s in counts]",
        "rules = integer(seed=(0, 2**31))",
        "error = per_seed - truth",
        "if seed == P.seed and seed > 0: pass",
    ],
)
def test_what_is_no_arithmetic_on_seeds(text):
    assert not arithmetic_on_seeds(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_seeds_are_derived_by_name_and_not_computed(path):
    """`derive_seed("what for", seed, k)`: sums and products of seeds meet one another, and 32 bits of them are kept."""
    assert not [f"{path.name}{where}:{line}" for where, text in texts(path) for line in arithmetic_on_seeds(text)]
