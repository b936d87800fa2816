"""Parameters and profiles, what papermill passes, the table that is shown, devices."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from bilevel_core.lab import parameters, places

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = {"PROFILE": "quick", "data": "digits", "steps": 100, "lr": 0.5, "gammas": [1.0, 10.0], "work_dir": ""}
RULES = {
    "data": ("digits", "mnist8"),
    "steps": (1, 1000),
    "lr": (0, None),
    "gammas": [(0.0, None)],
    "work_dir": str,
}


def resolve(passed=None, rules=RULES, **changes):
    """`parameters.resolve` in a simulated notebook: the parameters cell, then papermill's cell."""
    values = {**QUICK, **changes}
    cells = ["", "import math", "\n".join(f"{k} = {v!r}  # comment" for k, v in values.items())]
    if passed is not None:
        cells.append("# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in passed.items()) + "\n")
    return parameters.resolve("demo", {**values, **(passed or {}), "In": cells}, **rules)


def test_quick_profile_is_what_the_cell_says(project, capsys):
    assert vars(resolve()) == QUICK
    out = capsys.readouterr().out
    assert out.startswith("Parameters of demo, profile quick: 5, all as in quick\n  data     = 'digits'\n")


def test_profile_expands_what_was_not_set(project):
    full = {**QUICK, "PROFILE": "full", "data": "mnist8", "steps": 1000, "gammas": [1.0, 10.0, 100.0]}
    assert vars(resolve(PROFILE="full")) == full
    assert vars(resolve(passed={"PROFILE": "full"})) == full
    assert vars(resolve(PROFILE="full", steps=7)) == {**full, "steps": 7}
    # Passed explicitly, even at the quick value, wins over the profile.
    assert vars(resolve(passed={"PROFILE": "full", "steps": 100})) == {**full, "steps": 100}
    # ... unless the parameters cell was run again by hand after it.
    cells = ["# Parameters\nPROFILE = 'full'\nsteps = 100\n", "PROFILE = 'full'\nsteps = 100\n"]
    assert parameters.resolve("demo", {**QUICK, "PROFILE": "full", "In": cells}, **RULES).steps == 1000


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"step": 5}, "unknown parameter 'step' passed by papermill: did you mean 'steps'"),
        ({"profile": "full"}, "did you mean 'PROFILE'"),
        ({"zzz": 5}, "known are PROFILE, data, steps"),
        (
            {"PROFILE": "fast"},
            "PROFILE = 'fast' is not allowed: it must be one of 'smoke', 'quick', 'recorded', 'full'",
        ),
        ({"data": "cifar"}, "data = 'cifar' is not allowed: it must be one of 'digits', 'mnist8'"),
        ({"steps": 0}, "steps = 0 is not allowed: it must be a whole number, at least 1 and at most 1000"),
        ({"steps": 2.5}, "steps = 2.5 is not allowed"),
        ({"steps": True}, "steps = True is not allowed"),
        ({"lr": -1}, "lr = -1 is not allowed: it must be a finite number, at least 0"),
        ({"lr": float("nan")}, "lr = nan is not allowed"),
        ({"lr": "1e-3"}, "YAML reads 1e-3 as text: write 0.001"),
        ({"gammas": []}, "list with at least one entry"),
        (
            {"gammas": "[1.0, 2.0]"},
            r"list with at least one entry \(papermill takes lists by -y 'gammas: \[1.0, 2.0\]'\)",
        ),
        ({"gammas": 3.0}, r"list with at least one entry \(papermill takes lists by -y 'gammas: \[3.0\]'\)"),
        ({"gammas": [1.0, -2.0]}, r"gammas\[1\] = -2.0 is not allowed"),
        ({"work_dir": 3}, "work_dir = 3 is not allowed: it must be of type str"),
    ],
)
def test_wrong_parameters_stop_with_a_clear_message(project, passed, message):
    with pytest.raises(ValueError, match=message):
        resolve(passed)


def test_unknown_name_in_the_cell_or_in_a_profile_file(project):
    with pytest.raises(ValueError, match="'stepss' in the parameters cell: did you mean 'steps'"):
        resolve(stepss=3)
    (project / "notebooks/profiles/full/demo.yaml").write_text("PROFILE: full\nstep: 3\n")
    with pytest.raises(ValueError, match=r"unknown parameter 'step' in notebooks/profiles/full/demo\.yaml"):
        resolve(PROFILE="full")
    with pytest.raises(ValueError, match="'other' of demo has no value"):
        resolve(rules={**RULES, "other": int})


def test_rules_by_function_and_number_types(project):
    odd = {**RULES, "steps": lambda v: None if v % 2 else "steps must be odd"}
    with pytest.raises(ValueError, match=r"steps = 100 .*steps must be odd"):
        resolve(rules=odd)
    P = resolve(rules=RULES, lr=2, gammas=[3, 4.5])
    assert isinstance(P.lr, float) and P.gammas == [3.0, 4.5] and isinstance(P.gammas[0], float)
    assert isinstance(P.steps, int)


def test_missing_profile_file_is_named(project):
    (project / "notebooks/profiles/full/demo.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"notebooks/profiles/full/demo\.yaml"):
        resolve(PROFILE="full")


def test_parameters_cells_are_the_quick_profiles():
    for path in sorted(REPOSITORY.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
        quick = parameters.read_profile(path.stem, "quick")
        assert parameters.literals("".join(cell["source"])) == quick, path.name
        for profile in ("smoke", "full"):
            assert parameters.read_profile(path.stem, profile).keys() <= quick.keys(), path.name


@pytest.mark.parametrize("value", ["[.nan]", "[1.0, [-.inf, 2]]", "{a: .inf}"])
def test_an_unknown_name_is_seen_whatever_comes_with_it(project, value):
    """The cell as papermill itself writes it: nan and inf within lists are calls there."""
    from papermill.translators import PythonTranslator

    cell = PythonTranslator.codify(yaml.safe_load(f"{{step: 1, gammas: {value}}}"), "Parameters")
    scope = {**QUICK, "In": ["", "\n".join(f"{k} = {v!r}" for k, v in QUICK.items()), cell]}
    with pytest.raises(ValueError, match="unknown parameter 'step' passed by papermill: did you mean 'steps'"):
        parameters.resolve("demo", scope, **RULES)
    assert parameters.literals("a = [1, f(2)]") is None and parameters.literals("a = float('x')") is None


def test_papermills_own_paths_are_no_parameters(project):
    paths = {"PAPERMILL_INPUT_PATH": "demo.ipynb", "PAPERMILL_OUTPUT_PATH": "out.ipynb"}
    assert vars(resolve(passed={**paths, "steps": 3})) == {**QUICK, "steps": 3}
    with pytest.raises(ValueError, match="unknown parameter 'PAPERMILL_PATH'"):
        resolve(passed={"PAPERMILL_PATH": "x"})


def test_what_is_shown_in_a_terminal_and_in_a_notebook(project, capsys):
    resolve(PROFILE="smoke", data="mnist8")
    assert capsys.readouterr().out.splitlines() == [
        "Parameters of demo, profile smoke: 5, 2 not as in quick",
        "  data     = 'mnist8'  (quick: 'digits')",
        "  steps    = 2  (quick: 100)",
        "  lr       = 0.5",
        "  gammas   = [1.0, 10.0]",
        "  work_dir = ''",
    ]
    shown = parameters.Shown("demo", {**QUICK, "work_dir": "a <b>", "steps": 3}, QUICK)._repr_html_()
    assert shown.startswith("<details><summary>Parameters of demo, profile quick: 5, 2 not as in quick</summary><table")
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in shown.split("<tr>")[2:]]
    assert cells[1] == ["steps", "<b>3</b>", "100"] and cells[2] == ["lr", "0.5", "same"]
    assert cells[4] == ["work_dir", "<b>&#x27;a &lt;b&gt;&#x27;</b>", "&#x27;&#x27;"]
    assert "color" not in shown and "width" not in shown.replace("overflow-wrap", "")  # the page's own, light or dark


def test_a_notebook_gets_the_folded_table(project, monkeypatch):
    import IPython

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", shown.append)
    resolve()
    assert [type(one) for one in shown] == [parameters.Shown]


def rules_of(path, scratch):
    """The name and rules that a notebook hands to `resolve`."""
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    [source] = [source for source in sources if "P = parameters.resolve(" in source]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "resolve", lambda name, _, **rules: found.append((name, rules)))
        scratch.write_text(source.split("\n)\n")[0].removesuffix("\n)") + "\n)\n")
        runpy.run_path(str(scratch))
    return found[0]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_profile_by_name_and_its_file_are_the_same(path, tmp_path, monkeypatch):
    """papermill -p PROFILE full, and -f profiles/full/...; one more -p wins over either."""
    monkeypatch.setattr(places.RUN, "parameters", {})
    monkeypatch.setattr(places.RUN, "results", None)
    monkeypatch.setenv("BILEVEL_WORK_DIR", str(tmp_path))
    name, rules = rules_of(path, tmp_path / "cell.py")
    quick = parameters.read_profile(name, "quick")
    cell = "\n".join(f"{k} = {v!r}" for k, v in quick.items())
    for profile in ("smoke", "recorded", "full"):
        if not (REPOSITORY / f"notebooks/profiles/{profile}/{name}.yaml").is_file():
            continue
        file = parameters.read_profile(name, profile)
        found = []
        for passed in ({"PROFILE": profile}, file):
            for more in ({}, {"seed": 7} if "seed" in rules else {}):
                given = passed | more
                scope = quick | given
                lines = "".join(f"{k} = {v!r}\n" for k, v in given.items())
                scope["In"] = ["", cell, "# Parameters\n" + lines]
                found.append(vars(parameters.resolve(name, scope, **rules)))
        assert found[0] == found[2] and found[1] == found[3], profile
        assert found[0] == quick | file
        assert "seed" not in rules or found[1] == found[0] | {"seed": 7}


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebooks_seed_is_the_first_of_its_studys(path):
    """No study counts its seeds from 0 whatever `seed` says; what is recorded says the same."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cells)
    counted = re.findall(r".{0,30}range\(P\.(?:study|ablation)_seeds\)", code)
    assert all(
        found.endswith(("P.seed + i for i in range(P.study_seeds)", "P.seed + i for i in range(P.ablation_seeds)"))
        for found in counted
    ), counted
    if "study_seeds = " in code:
        assert "seed = 0  # of what is drawn live, and the first of the study's" in code
        assert re.search(r"first\"?[=:] ?P\.seed|run\(seeds|for run in runs", code)
        assert "seeds=list(range(P.seed," in code or "seeds=seeds" in code or "seeds=runs" in code
    for file in re.findall(r"write\w*\(.*book/results", code) + re.findall(r'store\([^)]*"book/results', code):
        raise AssertionError(f"{file}: a run of its own would replace the book's")


def test_literals_refuse_code():
    assert parameters.literals("a = 1\nb = [1, 'x']  # note\nc: float = -2.5") == {"a": 1, "b": [1, "x"], "c": -2.5}
    assert parameters.literals("a = f(1)") is None
    assert parameters.literals("import os") is None
    assert parameters.literals("%matplotlib inline") is None


def test_is_batch(monkeypatch):
    monkeypatch.delenv("BILEVEL_STATIC", raising=False)
    assert not parameters.is_batch()
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    assert parameters.is_batch()


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert parameters.choose_device() == torch.device("cpu")
    with pytest.raises(RuntimeError, match="no NVIDIA GPU: set device = 'auto' or 'cpu'"):
        parameters.choose_device("cuda")
    with pytest.raises(RuntimeError, match="no Apple GPU"):
        parameters.choose_device("mps")
    with pytest.raises(ValueError, match="device = 'gpu'"):
        parameters.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parameters.choose_device("auto") == torch.device("cuda")
    with pytest.raises(RuntimeError, match="there are 1 GPUs"):
        parameters.choose_device("cuda:1")
