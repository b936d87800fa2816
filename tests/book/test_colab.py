"""The set-up cell, and a chapter run as on Colab: an empty folder, a fresh environment, only the notebook."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "book" / "setup_cell.py").read_text(encoding="utf-8").rstrip("\n")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_one_setup_cell(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if "setup" in c.metadata.get("tags", ())]
    assert [cell.source for cell in cells] == [SETUP], "copy book/setup_cell.py into the cell tagged setup"
    assert "hide-input" in cells[0].metadata["tags"]


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    code = SETUP + "\nprint(os.getcwd(), 'torch' in sys.modules, 'bilevel_core' in sys.modules)"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BILEVEL")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )


def test_setup_does_nothing_elsewhere(tmp_path):
    done = run_setup(tmp_path)
    assert done.stdout.split() == [str(tmp_path.resolve()), "False", "False"], done.stderr
    assert not list(tmp_path.iterdir())


def test_setup_without_an_address_says_what_to_do(tmp_path):
    done = run_setup(tmp_path, BILEVEL_COLAB=str(tmp_path))
    assert done.returncode != 0
    assert "REPOSITORY is empty: open this notebook by the badge" in done.stderr


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> dict[str, Path | str]:
    """A bare repository with an address, the exported notebooks, and an environment that brings torch as Colab does."""
    place = tmp_path_factory.mktemp("colab")
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(place / "book.git")], check=True)
    environment = os.environ | {"GITHUB_SERVER_URL": f"file://{place}", "GITHUB_REPOSITORY": "book.git"}
    environment["GITHUB_SHA"] = ref = subprocess.check_output(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True
    ).strip()
    export = [sys.executable, str(ROOT / "book" / "build.py"), "--export-colab", str(place / "export")]
    subprocess.run(export, env=environment, check=True)
    venv.create(place / "env", with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "env" / "lib" / version / "site-packages"
    # Stands for what Colab has installed. Import hooks of this environment's own (an editable bilevel-core)
    # are not followed from there, so the package can come from the clone alone.
    (packages / "preinstalled.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (place / "stubs" / "google" / "colab").mkdir(parents=True)
    (place / "stubs" / "google" / "colab" / "__init__.py").write_text("")
    stub = "import os\n\n\ndef mount(path):\n    os.makedirs(path + '/MyDrive', exist_ok=True)\n    print('mounted')\n"
    (place / "stubs" / "google" / "colab" / "drive.py").write_text(stub)
    return {"place": place, "python": place / "env" / "bin" / "python", "packages": packages, "ref": ref}


def execute(colab: dict, home: Path, notebook: nbformat.NotebookNode, *options: str) -> nbformat.NotebookNode:
    """Run a notebook that lies alone in `home` with the fresh environment; returns it executed."""
    (home / "notebook.ipynb").write_text(nbformat.writes(notebook))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BILEVEL", "PYTHON"))}
    environment |= {"BILEVEL_COLAB": str(home), "PYTHONPATH": str(colab["place"] / "stubs"), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(colab["python"]), "-m", "papermill", "notebook.ipynb", "out.ipynb", "-k", "python3", *options]
    done = subprocess.run([*command, "--no-progress-bar"], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return nbformat.read(home / "out.ipynb", as_version=4)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


LOOK = """import os, numpy, torch, bilevel_core
print(bilevel_core.__file__, torch.__file__, os.getcwd(), os.environ.get("BILEVEL_WORK_DIR"), sep="\\n")"""


@pytest.mark.slow
def test_a_chapter_runs_in_an_empty_folder(colab, tmp_path):
    notebook = nbformat.read(colab["place"] / "export" / "notebooks" / NOTEBOOKS[0].name, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "setup" in cell.metadata.get("tags", ()))
    again = new_code_cell(notebook.cells[place].source)
    notebook.cells[place + 1 : place + 1] = [again, new_code_cell(LOOK)]
    out = execute(colab, tmp_path, notebook, "-p", "PROFILE", "smoke")
    place = next(i for i, cell in enumerate(out.cells) if "setup" in cell.metadata.get("tags", ()))
    first, second, look = out.cells[place : place + 3]
    assert f"Installing file://{colab['place']}/book.git at {colab['ref'][:12]}" in printed(first)
    assert "No GPU is attached" in printed(first)
    assert "T4 GPU" in printed(first)
    assert "Installing" not in printed(second)
    package, torch, folder, work_dir = printed(look).split()
    assert package.startswith(str(colab["packages"]))
    assert not torch.startswith(str(colab["packages"]))  # the torch that was there is still the one
    assert Path(folder) == (tmp_path / "book" / "notebooks").resolve()
    assert work_dir == "None"
    assert (colab["packages"] / "bilevel_core" / "lab" / "models" / "weights").is_dir()
    pins = (tmp_path / "constraints-colab.txt").read_text().split()
    assert [pin.partition("==")[0] for pin in pins][:2] == ["numpy", "torch"]

    # Once more in the same place, now with Drive: nothing is installed again.
    setup = new_code_cell(again.source.replace("USE_DRIVE = False", "USE_DRIVE = True"))
    notebook.cells = [setup, new_code_cell(LOOK)]
    out = execute(colab, tmp_path, notebook)
    assert "Installing" not in printed(out.cells[0])
    assert "mounted" in printed(out.cells[0])
    assert printed(out.cells[1]).split()[-1] == str(tmp_path / "drive" / "MyDrive" / "book")
