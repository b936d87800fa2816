"""Every branch that a profile takes in a notebook: each study, small, at its recorded and full profile.

The book's build executes the smoke profile alone, so what only the others reach is executed here: results are written
to a temporary folder, and the cells that read them run on. Cells of the tag remove-cell assert what the text says of
the book's own numbers; they are left out.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell

from bilevel_core.lab import parameters

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
WITH_RESULTS = ("recorded", "full")

CHAPTER_8 = {"lower": "random", "steps": 2, "side": 16, "samples": 20, "batch": 4, "shown": 4, "trials": 2}
CHAPTER_8 |= {"dtype": "float32", "digit_samples": 40}
# Chapter: the sizes of a test, and the result that each profile leaves
STUDIES: dict[str, tuple[dict, dict[str, str]]] = {
    "01_diffusion": (
        {"data_name": "digits8", "train_steps": 3, "batch_size": 16, "T": 20, "sample_steps": [3], "study_seeds": 2}
        | {"study_train_steps": 2, "study_samples": 130, "study_grids": [3, 5]},
        {"recorded": "01_sampling_mnist8", "full": "01_sampling_mnist28"},
    ),
    "05_reward_finetuning_mnist": (
        {"shown": 2, "live_sweeps": 4, "live_warmup": 2, "live_chains": 2, "study": 2, "study_sweeps": 8}
        | {"study_warmup": 2, "study_chains": 2, "study_plain": 40, "study_budgets": [5000], "study_folds": 2}
        | {"study_drawn": 1, "study_particles": 4},
        {"recorded": "05_tilts", "full": "05_tilts_full"},
    ),
    "06_learning_noise_schedules": (
        {"repeats": 20, "live_train_steps": 2, "live_steps": 2, "data_name": "digits8", "study_seeds": 2}
        | {"study_train_steps": 2, "study_samples": 80, "study_warm": [1, 1]},
        {"recorded": "06_learning_noise_schedules", "full": "06_learning_noise_schedules_full"},
    ),
    "07_noise_schedule_mnist": (
        {"live_name": "digits8", "live_warm_steps": 5, "live_steps": 2, "live_samples": 70, "study_seeds": 2}
        | {"ablation_seeds": 2, "study_name": "digits8", "T": 50, "batch_size": 16, "warm_steps": 2, "trials": 3}
        | {"trial_steps": 1, "val_samples": 70, "val_steps": 10, "final_steps": 2, "study_samples": 70}
        | {"study_grids": [10, 20, 50], "live_train_steps": 2},
        {"recorded": "07_noise_schedule_mnist", "full": "07_noise_schedule_mnist_full"},
    ),
    "09_beyond_the_paper": (
        {"repeats": 2, "bias_samples": 100, "bias_seeds": 2, "study_repeats": 2, "study_bias_samples": 100}
        | {"study_bias_seeds": 2, "study_samples": 40, "cliff_train_steps": 2, "cliff_samples": 130},
        {"recorded": "09_lambda", "full": "09_lambda_full"},
    ),
    "appendix_text_models": (
        {"shown": 1, "study_seeds": 2, "choice_scales": [2.0], "choice_steps": [10], "study_samples": 18}
        | {"choice_samples": 18},
        {"recorded": "appendix_text_models", "full": "appendix_text_models_full"},
    ),
}
# What the quick profile alone enters
OTHERS = {
    "10_reproduction_report": {"draws": 200, "distances_drawn": 5, "left_out": [0, 1]},
    "appendix_classifiers": {"points": 100},
}
NEED_MNIST = ("05_reward_finetuning_mnist", "appendix_text_models")
# Of most, one profile is executed: full where a cell reads its result, else recorded. What the other would do besides
# giving its result another name, both are executed for.
FULL, BOTH = ("01_diffusion", "05_reward_finetuning_mnist", "appendix_text_models"), ("07_noise_schedule_mnist",)
RUNS = [(name, "full" if name in FULL else "recorded") for name in STUDIES] + [(name, "full") for name in BOTH]


def code_cells(path: Path) -> list[str]:
    """Sources of the code cells but the set-up's."""
    nb = nbformat.read(path, 4)
    return [c.source for c in nb.cells if c.cell_type == "code" and "setup" not in c.metadata.get("tags", ())]


def tree(path: Path) -> ast.Module:
    lines = "\n".join(code_cells(path)).split("\n")
    return ast.parse("\n".join("" if line.startswith("%") else line for line in lines))


# ---------------------------------------------------------------- read, not run


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_names_that_a_notebook_takes_from_the_package_exist(path):
    """A cell that no test executes may have been left behind by a change of names."""
    code, modules = tree(path), {}
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bilevel_core"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    pytest.fail(f"{node.module} has no {alias.name}")
                if type(found) is type(ast):
                    modules[alias.asname or alias.name] = found
    assigned = {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in assigned:
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_writes_results_of_its_own_tier_and_of_no_small_profile(path):
    code = tree(path)
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and ast.unparse(n.func) == "results.write_result"]
    for call in calls:
        assert ast.unparse(call.args[1]) == "P.PROFILE" and ast.unparse(call.args[3]) == "P"
        around = [n.test for n in ast.walk(code) if isinstance(n, ast.If) and call in ast.walk(n)]
        assert any("P.PROFILE" in ast.unparse(test) for test in around), ast.unparse(call.args[0])


@pytest.mark.parametrize("name", STUDIES)
def test_a_profile_that_is_not_executed_would_do_nothing_else(name):
    code, left = tree(ROOT / "notebooks" / f"{name}.ipynb"), STUDIES[name][1]
    executed = {profile for each, profile in RUNS if each == name}
    values = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).strip("()") in ("STUDY", "name, kept"):
            value = ast.literal_eval(node.value)
            values |= {"name": value[0]} if isinstance(value, tuple) else {"STUDY": value}
    for node in ast.walk(code):
        if isinstance(node, ast.If):
            for part in node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]:
                if "P.PROFILE" in (text := ast.unparse(part)):
                    enters = {p for p in left if eval(text, {"P": SimpleNamespace(PROFILE=p)} | values)}
                    assert not enters or enters & executed, text
    for call in ast.walk(code):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "results.write_result":
            for profile, result in left.items():
                found = eval(ast.unparse(call.args[0]), {"P": SimpleNamespace(PROFILE=profile)} | values)
                assert found == result


UNCOMPARED = {"study_seeds": 1, "val_steps": 3, "study_grids": [2, 4]}  # refused by chapter 7


def executed(name: str) -> list[SimpleNamespace]:
    """The parameters of every run of a notebook in the tests: the build's, and those below."""
    runs = [("smoke", {})] + [(profile, STUDIES[name][0]) for each, profile in RUNS if each == name]
    runs += [("quick", OTHERS[name])] if name in OTHERS else []
    if name == "07_noise_schedule_mnist":
        runs.append(("smoke", UNCOMPARED))
    if name == "08_stable_diffusion":
        runs += [("full", CHAPTER_8 | {"model": "/a folder"}), ("full", {"dry_run": True})]
        runs += [("recorded", {"study_seeds": 1, "survey": True})]
    quick = parameters.read_profile(name, "quick")
    return [SimpleNamespace(**quick | parameters.read_profile(name, profile) | given) for profile, given in runs]


# Claims of the text about the quick profile's own numbers, which `make book` asserts.
LEFT_OUT = {
    ("03_learning_lambda", "P.PROFILE == 'quick'"),
    ("04_guided_sampling", "P.PROFILE == 'quick'"),
    ("06_learning_noise_schedules", "P.PROFILE == 'quick'"),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_branch_on_a_parameter_is_executed(name):
    for node in ast.walk(tree(ROOT / "notebooks" / f"{name}.ipynb")):
        if not isinstance(node, ast.If):
            continue
        used = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} - {"len"}
        text = ast.unparse(node.test)
        if used == {"P"} and (name, text) not in LEFT_OUT:
            found = {bool(eval(text, {"P": P})) for P in executed(name)}
            assert True in found, f"no test enters `if {text}:`"
            assert not node.orelse or False in found, f"no test enters the else of `if {text}:`"


# ---------------------------------------------------------------- run


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Function that executes a notebook with parameters; returns it, executed, and the folder of its results."""
    for variable, folder in (("BILEVEL_RESULTS", "results"), ("BILEVEL_WORK_DIR", "work")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setenv("BILEVEL_STATIC", "1")
    monkeypatch.setenv("BILEVEL_ROOT", str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def execute(name: str, given: dict, first: str = "") -> tuple[nbformat.NotebookNode, Path]:
        nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        nb.cells = [cell for cell in nb.cells if "remove-cell" not in cell.metadata.get("tags", ())]
        if first:
            nb.cells.insert(0, new_code_cell(first))
        nbformat.write(nb, tmp_path / "in.ipynb")
        options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
        papermill.execute_notebook(
            str(tmp_path / "in.ipynb"),
            str(tmp_path / "out.ipynb"),
            parameters=given | ({"device": "cpu"} if "device" in parameters.read_profile(name, "quick") else {}),
            cwd=str(ROOT / "notebooks"),
            **options,
        )
        return nbformat.read(tmp_path / "out.ipynb", 4), tmp_path / "results"

    return execute


def printed(nb: nbformat.NotebookNode) -> str:
    outputs = [output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)


# One study has parts that no parameter makes small. Its own tests run them; here the book's record stands for what it
# returns, and the call must fit its signature.
RECORDED = """
from unittest.mock import create_autospec
from bilevel_core.lab import results
from bilevel_core.lab.studies import {module}
found = results.read_result("{result}")["data"]
{module}.{function} = create_autospec({module}.{function}, return_value={returned})
"""
# One standardises rewards on samples of a size that no parameter has.
FEWER = """
from functools import partial
from bilevel_core.lab.studies import tilted_truth
tilted_truth.problem = partial(tilted_truth.problem, draws=50)
"""
STANDS_IN = {
    "06_learning_noise_schedules": ("schedule_gradients", "gather", 'found["pieces"]'),
}


def stand_in(name: str) -> str:
    """The first cell of a notebook whose study is not run, or made smaller, else nothing."""
    if name not in STANDS_IN:
        return FEWER if name == "05_reward_finetuning_mnist" else ""
    module, function, returned = STANDS_IN[name]
    values = {"module": module, "function": function, "returned": returned}
    return RECORDED.format(result=STUDIES[name][1]["recorded"], **values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "profile"),
    [pytest.param(*run, marks=[pytest.mark.mnist] if run[0] in NEED_MNIST else []) for run in RUNS],
)
def test_a_study_leaves_the_result_of_its_tier_and_the_chapter_reads_it(play, name, profile):
    left = STUDIES[name][1]
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "book" / "results").iterdir()}
    _, folder = play(name, STUDIES[name][0] | {"PROFILE": profile}, stand_in(name))
    record = json.loads((folder / f"{left[profile]}.json").read_text())
    assert record["tier"] == record["provenance"]["parameters"]["PROFILE"] == profile
    assert [path.name for path in folder.glob("*.json")] == [f"{left[profile]}.json"]
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "book" / "results").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_quick_profile_alone_enters_runs(play, name):
    _, folder = play(name, OTHERS[name] | {"PROFILE": "quick"})
    assert not folder.exists()


@pytest.fixture
def my_model(tmp_path):
    """Parameters of a pipeline and a CLIP with random weights, in folders with a space in their names."""
    from bilevel_core.lab.models import pipelines

    pipelines.random_pipeline("tiny").save_pretrained(tmp_path / "my model")
    clip = pipelines.random_clip(tmp_path / "my clip")
    return {"model": str(tmp_path / "my model"), "clip_model": [f"local-dir:{clip}", ""]}


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["smoke", "full"])
def test_chapter_8_with_a_model_of_ones_own(play, my_model, profile):
    """A full run leaves a result of tier full; a smoke run shows its rows and records nothing."""
    prompts = ["a fox", "a dog"][: 1 + (profile == "full")]
    nb, folder = play("08_stable_diffusion", CHAPTER_8 | my_model | {"PROFILE": profile, "prompts": prompts})
    table = next(c for c in nb.cells if c.get("id") == "537a38e7").outputs[0]["data"]["text/plain"]
    assert table.count("a fox") == 7 and f"{profile}: " in table and "Algorithm 2" in table
    if profile == "smoke":
        assert not folder.exists() and "of which nothing is recorded" in table
        return
    record = json.loads((folder / "08_stable_diffusion.json").read_text())
    assert record["tier"] == record["provenance"]["parameters"]["PROFILE"] == "full"
    assert [row["prompt"] for row in record["data"]["rows"]] == ["a fox"] * 7 + ["a dog"] * 7
    assert record["data"]["learned"].keys() == set(prompts)
    assert record["provenance"]["parameters"]["model"] == ".../my model"  # no path of a machine


@pytest.mark.slow
def test_the_dry_run_of_chapter_8_says_the_price_and_starts_nothing(play):
    nb, folder = play("08_stable_diffusion", {"PROFILE": "full", "dry_run": True, "digit_samples": 40})
    said = printed(nb)
    assert "to download: stable-diffusion-v1-5/stable-diffusion-v1-5, 1.99 GiB" in said
    assert "to download: open_clip ViT-B-16-quickgelu, openai" in said and not folder.exists()
    assert "4 prompts, 256 samples, 50 steps" in said


@pytest.mark.slow
@pytest.mark.parametrize("which", ["an unknown id", "no folder", "no CLIP"])
def test_chapter_8_says_at_once_what_cannot_be_loaded(play, my_model, which, tmp_path):
    given, said = {
        "an unknown id": ({"model": "nosuch-org/nosuch-model"}, "nosuch-model cannot be loaded .*If you are offline"),
        "no folder": ({"model": str(tmp_path / "no model"), "dry_run": True}, "there is no folder .*no model"),
        "no CLIP": (my_model | {"clip_model": ["", ""]}, "weights openai of ViT-B-16-quickgelu cannot be loaded"),
    }[which]
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        play("08_stable_diffusion", {"PROFILE": "smoke"} | given)
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    ran = [cell for cell in cells if cell.cell_type == "code" and cell.execution_count]
    assert len(ran) <= 8, "nothing of the chapter ran before"


@pytest.mark.slow
def test_chapter_7_refuses_grids_on_which_nothing_could_be_compared(play):
    with pytest.raises(papermill.PapermillExecutionError, match=r"study_grids = \[2, 4\] must hold val_steps = 3"):
        play("07_noise_schedule_mnist", {"PROFILE": "smoke"} | UNCOMPARED)


# The survey's pieces as if they had been measured: what the book's own record holds.
KEPT_SURVEY = """
import json
from bilevel_core.lab import places, results
from bilevel_core.lab.studies import memory
rows = results.read_result("08_memory")["data"]["rows"]
for options, _ in memory.SETTINGS:
    row = next(r for r in rows if {k: v for k, v in r.items() if k not in ("counted", "measured")} == options)
    found = {key: row[key] for key in ("counted", "measured")}
    name = "_".join(f"{key}-{value}" for key, value in options.items())
    path = places.work_dir() / "stable_diffusion" / "recorded" / f"memory_{name}.json"
    memory.piece(path, {"options": options, "device": "cpu"}, lambda found=found: found)
"""


@pytest.mark.slow
def test_the_recorded_studies_of_chapter_8(play):
    small = {"study_seeds": 1, "study_prompts": 1, "study_samples": 40, "trials": 2, "digit_samples": 40, "steps": 2}
    _, folder = play("08_stable_diffusion", small | {"PROFILE": "recorded", "survey": True}, KEPT_SURVEY)
    for name in ("08_memory", "08_digits"):
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["tier"] == "recorded" and record["data"]["rows"]
    assert record["protocol"]["prompts"] == ["a bold eight"]
    assert {path.stem for path in folder.glob("*.json")} == {"08_memory", "08_digits"}
