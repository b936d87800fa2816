"""The project as a whole: dependencies agree, the core stays small and light, notebooks keep to their template."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "bilevel_core").glob("*.py"))
SOURCES = sorted(
    path
    for folder in ("bilevel_core", "book", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CORE_BUDGET = 1_800  # lines of code of the whole core
CELL_LIMIT = 45  # lines
PYTHONS = ("3.11", "3.12", "3.13")

on_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# ---------------------------------------------------------------- dependencies


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[tuple[str, Requirement]]:
    """Every direct dependency with the extra that asks for it."""
    asked = {"core": project()["dependencies"], **project()["optional-dependencies"]}
    return [(extra, Requirement(text)) for extra, texts in asked.items() for text in texts]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    versions = {}
    for pin in found:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"constraints.txt pins exact versions: {pin}"
        name = canonicalize_name(pin.name)
        assert name not in versions, f"{name} is pinned twice"
        versions[name] = specifier.version
    return versions


def test_core_depends_on_torch_alone():
    assert [Requirement(text).name for text in project()["dependencies"]] == ["torch"]


def test_every_direct_dependency_is_pinned_within_its_range():
    pinned = pins()
    for extra, requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name == project()["name"]:
            assert requirement.extras <= set(project()["optional-dependencies"]), requirement
            continue
        assert name in pinned, f"{name} of [{extra}] has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"
        assert requirement.specifier, f"{name} of [{extra}] has no lower bound"


def test_torch_and_torchvision_are_a_matched_pair():
    torch, vision = ([int(part) for part in pins()[name].split(".")] for name in ("torch", "torchvision"))
    assert vision[1] == torch[1] + 15  # torch 2.N goes with torchvision 0.(N + 15)


def test_conda_environment_names_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    python = next(entry for entry in plain if entry.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(project()["requires-python"])
    asked = {re.split(r"[<>=]", entry)[0] for entry in plain}
    assert asked == {"python", "pip"}, "packages are named in pyproject.toml alone"
    (pip,) = (entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pip[0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[1])[1].split(",")
    assert set(extras) <= set(project()["optional-dependencies"])
    assert f'-e ".[{",".join(extras)}]"' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_python_range_is_the_same_everywhere():
    supported = SpecifierSet(project()["requires-python"])
    assert [v for v in ("3.10", *PYTHONS, "3.14") if v in supported] == list(PYTHONS)
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    versions = {row["python"] for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert versions == set(PYTHONS)


# ---------------------------------------------------------------- the core


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_code_lines_counts_code(tmp_path):
    sample = tmp_path / "sample.py"
    sample.write_text(
        '"""Doc.\n\nMore."""\n\n# comment\ndef f(x):\n    """Doc."""\n    return (x +\n            1)  # why\n'
    )
    assert code_lines(sample) == 3


def test_core_stays_small():
    counts = {path.name: code_lines(path) for path in CORE}
    assert sum(counts.values()) <= CORE_BUDGET, counts


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it; relative imports as bilevel_core...."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "bilevel_core." * (node.level > 0) + (node.module or "")
            found |= {base.rstrip("."), *(f"{base}.{alias.name}".replace("..", ".") for alias in node.names)}
    return found


LIGHT = [
    ROOT / "bilevel_core" / "lab" / f"{name}.py" for name in ("certificates", "comparisons", "distances", "oracles")
]


@pytest.mark.parametrize("path", [*CORE, *LIGHT], ids=lambda path: path.stem)
def test_core_and_what_stands_beside_it_import_torch_and_the_standard_library_only(path):
    names = imported(path)
    roots = {name.partition(".")[0] for name in names}
    assert roots - sys.stdlib_module_names <= {"torch", "bilevel_core"}
    assert not {name for name in names if name.startswith("bilevel_core.lab")}
    assert not roots & {"urllib", "socket", "http", "subprocess"}


PROBE = """
import sys

touched = []
sys.addaudithook(lambda event, args: touched.append(event) if event.startswith(("socket.", "urllib.")) else None)
import torch

before = set(sys.modules)
import bilevel_core
{imports}
new = set(sys.modules) - before
print(sorted(m for m in new if m.partition(".")[0] not in ("torch", "bilevel_core", *sys.stdlib_module_names)))
print(sorted(m for m in sys.modules if m.startswith("bilevel_core.lab")))
print(sorted({{m.partition(".")[0] for m in sys.modules}} & {{"diffusers", "matplotlib", "torchvision", "scipy"}}))
print(touched)
print(torch.cuda.is_initialized())
"""


def test_importing_the_core_touches_no_network_and_no_gpu(tmp_path):
    modules = [path.stem for path in CORE if path.stem != "__init__"]
    probe = PROBE.format(imports="\n".join(f"import bilevel_core.{module}" for module in modules))
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]", "[]", "[]", "False"]


@pytest.mark.slow
def test_wheel_carries_weights_scripts_and_styles(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("bilevel_core-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("bilevel_core/")}
    tracked = subprocess.check_output(["git", "ls-files", "bilevel_core"], cwd=ROOT, text=True).split()
    assert inside == set(tracked)
    assert any(name.endswith(".safetensors") for name in inside)
    assert any(name.endswith(".js") for name in inside)
    assert any(name.endswith(".css") for name in inside)


# ---------------------------------------------------------------- safety


def called(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def notebook_code(path: Path) -> list[tuple[int, str]]:
    """Number and text of each code cell, with IPython's own lines taken out."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]
    return [(i, re.sub(r"(?m)^\s*[%!?].*$", "", text)) for i, text in texts]


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    texts = [text for _, text in notebook_code(path)] if path.suffix == ".ipynb" else [path.read_text("utf-8")]
    examples = path.name in ("test_bring_your_own.py", "test_notebook_branches.py")  # they execute the book's own code
    unsafe = () if examples else ("eval", "exec")
    for text in texts:
        tree = ast.parse(text)
        for call in called(tree):
            name = ast.unparse(call.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            assert name != "torch.load" or safe, f"line {call.lineno}: {ast.unparse(call)}"
            assert name not in ("torch.save", "joblib.load", *unsafe), f"line {call.lineno}: {name}"
            pickles = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not pickles, f"line {call.lineno}: {ast.unparse(call)}"
        roots = {a.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {(n.module or "").partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not roots & {"pickle", "cloudpickle", "dill", "shelve"}


# ---------------------------------------------------------------- notebooks


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


@on_notebooks
def test_notebook_is_committed_without_outputs(path):
    for cell in cells_of(path):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert "papermill" not in cell["metadata"]


@on_notebooks
def test_notebook_follows_the_template(path):
    cells = cells_of(path)
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    places = {tag: [i for i, cell in enumerate(cells) if tag in tags(cell)] for tag in ("setup", "parameters")}
    assert [len(found) for found in places.values()] == [1, 1], places
    assert places["setup"] < places["parameters"]
    assert all(
        i <= places["setup"][0] for i, c in enumerate(cells[: places["setup"][0] + 1]) if c["cell_type"] == "code"
    )
    headings = [
        m for c in cells if c["cell_type"] == "markdown" for m in re.findall(r"(?m)^# .*$", "".join(c["source"]))
    ]
    assert len(headings) == 1, "one title; sections begin with ##"


@on_notebooks
def test_parameters_are_commented_literals(path):
    (cell,) = (cell for cell in cells_of(path) if "parameters" in tags(cell))
    text = "".join(cell["source"])
    names = {}
    for node in ast.parse(text).body:
        assert isinstance(node, ast.Assign), ast.unparse(node)
        json.dumps(names.setdefault(node.targets[0].id, ast.literal_eval(node.value)))
        lines = text.splitlines()[max(0, node.lineno - 2) : node.end_lineno]
        assert any("#" in line for line in lines), f"{node.targets[0].id} has no comment"
    assert names["PROFILE"] == "quick"


@on_notebooks
def test_cells_stay_short(path):
    long = {i: text.count("\n") + 1 for i, text in enumerate("".join(c["source"]) for c in cells_of(path))}
    code = {i for i, cell in enumerate(cells_of(path)) if cell["cell_type"] == "code"}
    assert not {i: n for i, n in long.items() if i in code and n > CELL_LIMIT}


@on_notebooks
def test_figures_have_a_caption_and_a_text_alternative(path):
    """A cell that draws (plt.show, or a figure as its last line) carries both in its metadata."""
    for i, text in notebook_code(path):
        if not re.search(r"\bplt\.show\(|\bplt\.subplots\(|\bplots\.image_grid\(", text):
            continue
        cell = cells_of(path)[i]
        if set(tags(cell)) & {"remove-output", "remove-cell", "setup"}:
            continue
        mystnb = cell["metadata"].get("mystnb", {})
        caption = mystnb.get("figure", {}).get("caption", "")
        assert len(caption.split()) >= 12, f"cell {i} draws without a caption that says what is seen: {caption!r}"
        assert mystnb.get("image", {}).get("alt"), f"cell {i} draws without a text alternative"
        last = text.rstrip().splitlines()[-1]
        quiet = last.endswith((";", "plt.show()")) or last.startswith((" ", "print(")) or "image_grid(" in text
        assert quiet, f"cell {i} ends in {last!r}: the page would show its value beside the figure"


# ---------------------------------------------------------------- the tree


def test_tracked_files_are_small_and_name_no_machine():
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
    texts = (".py", ".md", ".yml", ".yaml", ".toml", ".json", ".ipynb", ".txt", ".js", ".css", ".bib")
    for name in files:
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 6_500_000, name
        if path.suffix in texts and not name.startswith("tests/"):
            found = re.search(r"(?<![\w.])/(?:home|Users|root)/\w+", path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"
