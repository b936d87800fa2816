"""book/build.py: addresses, badges, what is published of an executed notebook, re-use, and how failures read."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from meter import PeakMemory

ROOT = Path(__file__).resolve().parents[2]
CODE_WITH_WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["book_build"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def not_on_github(monkeypatch):
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_SHA"):
        monkeypatch.delenv(name, raising=False)


def small_notebook(*sources: str):
    nb = new_notebook(cells=[new_markdown_cell("# Title\n\nA question?")])
    setup = (ROOT / "book" / "setup_cell.py").read_text().rstrip("\n")
    nb.cells.append(new_code_cell(setup, metadata={"tags": ["setup"]}))
    nb.cells.append(new_code_cell('PROFILE = "quick"  # profile\nn = 3  # count', metadata={"tags": ["parameters"]}))
    nb.cells += [new_code_cell(source) for source in sources]
    return nb


# ---------------------------------------------------------------- the address


def test_without_an_address_nothing_points_anywhere(build):
    assert build.find_address({"repository": {"url": "", "branch": "colab"}}) is None
    nb = build.dress(small_notebook(), "01_diffusion", None, "badge.svg")
    assert build.UNFILLED in nb.cells[1].source
    assert "colab.research" not in nb.cells[0].source


def test_committed_configuration_is_the_one_place(build):
    """The address stands in _config.yml alone, or nowhere."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        assert "colab.research.google.com" not in text, path.name
        assert not url or url not in text, path.name


def test_address_on_github_comes_from_the_environment(build, monkeypatch):
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/some-book")
    monkeypatch.setenv("GITHUB_SHA", "a" * 40)
    address = build.find_address({"repository": {"url": "https://github.com/other/place", "branch": "colab"}})
    assert address == build.Address("https://github.com/someone/some-book", "a" * 40, "colab")
    page = "https://colab.research.google.com/github/someone/some-book/blob/colab/notebooks/01_diffusion.ipynb"
    assert address.colab("01_diffusion") == page
    nb = build.dress(small_notebook(), "01_diffusion", address, "badge.svg")
    assert nb.cells[0].source.splitlines()[:3] == ["# Title", "", f"[![Open in Colab](badge.svg)]({page})"]
    assert "A question?" in nb.cells[0].source
    line = f'REPOSITORY, REF = "https://github.com/someone/some-book", "{"a" * 40}"'
    assert line in nb.cells[1].source


def test_configured_address_takes_the_commit_of_the_checkout(build):
    address = build.find_address({"repository": {"url": "https://github.com/me/book.git", "branch": "colab"}})
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    assert address.ref == head
    assert "/github/me/book/blob/colab/" in address.colab("x")


def test_a_repository_off_github_has_no_badge_but_a_filled_cell(build):
    address = build.Address("file:///somewhere/book.git", "b" * 40, "colab")
    assert address.colab("01_diffusion") is None
    nb = build.dress(small_notebook(), "01_diffusion", address, "badge.svg")
    assert "Colab" not in nb.cells[0].source
    assert 'REPOSITORY, REF = "file:///somewhere/book.git"' in nb.cells[1].source


def test_staging_with_and_without_address(build, tmp_path):
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    nb = tmp_path / "01_diffusion.ipynb"
    nbformat.write(small_notebook(), nb)
    build.stage(tmp_path / "a", config, {"01_diffusion": nb}, None, {"chapters": "the map"})
    staged = yaml.safe_load((tmp_path / "a" / "_config.yml").read_text())
    assert "launch_buttons" not in staged
    assert staged["repository"]["url"] == ""
    assert (tmp_path / "a" / "_vendor" / "jslib" / "mathjax" / "core.js").stat().st_size > 200_000
    assert not [path for path in (tmp_path / "a" / "book").rglob("*.*") if path.suffix in (".py", ".js", ".css")]
    assert "the map" in (tmp_path / "a" / "book" / "index.md").read_text()
    address = build.Address("https://github.com/me/book", "c" * 40, "colab")
    build.stage(tmp_path / "b", config, {"01_diffusion": nb}, address, {})
    staged = yaml.safe_load((tmp_path / "b" / "_config.yml").read_text())
    assert staged["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    assert staged["repository"] == {"url": "https://github.com/me/book", "branch": "colab"}
    badge = tmp_path / "b" / "notebooks" / build.SITE_BADGE
    assert badge.resolve().is_file()


def test_export_for_colab(build, tmp_path, monkeypatch, capsys):
    with pytest.raises(build.BuildError, match="no public address"):
        monkeypatch.setattr(build, "find_address", lambda config: None)
        build.export_colab(tmp_path)
    monkeypatch.setattr(build, "find_address", lambda c: build.Address("https://github.com/me/book", "d" * 40, "colab"))
    monkeypatch.setattr(build, "chapters", lambda toc: ["one"])
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    nbformat.write(small_notebook("print(1)"), tmp_path / "one.ipynb")
    build.export_colab(tmp_path / "out")
    nb = nbformat.read(tmp_path / "out" / "notebooks" / "one.ipynb", as_version=4)
    assert "d" * 40 in nb.cells[1].source
    assert not any(cell.get("outputs") for cell in nb.cells)
    assert "blob/colab/notebooks/one.ipynb" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------- what is published of a notebook


def test_clean_drops_paths_times_and_dead_widgets(build):
    nb = small_notebook("1 + 1")
    nb.metadata["papermill"] = {"input_path": "/secret"}
    nb.metadata["widgets"] = {"state": {}}
    cell = nb.cells[-1]
    cell.metadata["papermill"] = {"start_time": "now"}
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    cell.outputs = [
        new_output("display_data", data=CODE_WITH_WIDGET),
        new_output("execute_result", data={"text/plain": "2"}),
    ]
    text = nbformat.writes(build.clean(nb))
    assert "secret" not in text
    assert "now" not in text
    assert "widget" not in text
    assert [output.data for output in nb.cells[-1].outputs] == [{"text/plain": "2"}]


@pytest.mark.parametrize(("given", "hidden"), [("n = 3", True), ("n = 4", False), ('n = 3\nother = "x"', False)])
def test_injected_parameters_are_shown_when_they_change_something(build, given, hidden):
    nb = small_notebook()
    nb.cells.append(new_code_cell(f"# Parameters\n{given}", metadata={"tags": ["injected-parameters"]}))
    build.clean(nb)
    assert ("remove-cell" in nb.cells[-1].metadata["tags"]) is hidden


# ---------------------------------------------------------------- table of contents and profiles


def test_every_notebook_is_in_the_book_with_three_profiles(build):
    names = build.chapters(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    assert sorted(names) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for profile in ("smoke", "quick", "full"):
        files = {path.stem for path in (ROOT / "notebooks" / "profiles" / profile).glob("*.yaml")}
        assert files == set(names), profile


def test_a_missing_notebook_is_named(build):
    with pytest.raises(build.BuildError, match="99_nowhere"):
        build.chapters({"root": "book/index", "parts": [{"chapters": [{"file": "notebooks/99_nowhere"}]}]})


def test_later_chapters_are_ready_in_the_table_of_contents():
    text = (ROOT / "_toc.yml").read_text()
    for name in (
        "03_learning_lambda",
        "04_guided_sampling",
        "05_reward_finetuning_mnist",
        "06_learning_noise_schedules",
        "07_noise_schedule_mnist",
        "08_stable_diffusion",
        "09_beyond_the_paper",
        "10_reproduction_report",
    ):
        assert f"- file: notebooks/{name}" in text


# ---------------------------------------------------------------- execution, in a copy of the tree


@pytest.fixture
def tree(build, tmp_path, monkeypatch):
    """A tree with one notebook that needs no package, as the build's root."""
    for profile in ("smoke", "quick", "full"):
        (tmp_path / "notebooks" / "profiles" / profile).mkdir(parents=True)
        (tmp_path / "notebooks" / "profiles" / profile / "one.yaml").write_text(f"PROFILE: {profile}\nn: 2\n")
    (tmp_path / "bilevel_core").mkdir()
    (tmp_path / "book" / "results").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path


@pytest.mark.slow
def test_execute_uses_the_profile_and_reuses_unchanged_work(build, tree):
    nb = small_notebook('import os\n\nprint("n is", n, os.environ.get("BILEVEL_STATIC"))')
    nbformat.write(nb, tree / "notebooks" / "one.ipynb")
    out = tree / "out"
    first = build.execute("one", "smoke", out, force=False)
    assert not first.reused
    assert 0.02 < first.peak < 2  # GiB: a kernel that imports nothing
    done = first.path
    assert "n is 2" in nbformat.read(done, as_version=4).cells[-1].outputs[0].text
    assert sorted(path.name for path in out.iterdir()) == ["one.ipynb", "one.json"]
    again = build.execute("one", "smoke", out, force=False)
    assert again == build.Executed(done, first.seconds, first.peak, True)
    (tree / "bilevel_core" / "new.py").write_text("x = 1\n")
    assert build.execute("one", "smoke", out, force=False).reused is False
    done.write_text(done.read_text().replace("n is 2", "n is 7"))  # a tampered copy is not taken for the real one
    assert build.execute("one", "smoke", out, force=False).reused is False


@pytest.mark.slow
def test_a_failing_cell_is_described_and_the_notebook_kept(build, tree):
    nb = small_notebook("print('reached')", "value = 0\n1 / value")
    nbformat.write(nb, tree / "notebooks" / "one.ipynb")
    with pytest.raises(build.BuildError) as caught:
        build.execute("one", "smoke", tree / "out", force=False)
    message = str(caught.value)
    assert "notebooks/one.ipynb failed in code cell [5]" in message
    assert "value = 0" in message
    assert "ZeroDivisionError: division by zero" in message
    partial = tree / "out" / "one.partial.ipynb"
    assert str(partial) in message
    assert "reached" in partial.read_text()
    assert "\x1b" not in message


@pytest.mark.slow
def test_a_kernel_that_dies_is_reported(build, tree):
    nbformat.write(small_notebook("import os\n\nos._exit(3)"), tree / "notebooks" / "one.ipynb")
    with pytest.raises(build.BuildError, match="one failed outside its cells: .*[Kk]ernel died"):
        build.execute("one", "smoke", tree / "out", force=False)


ALL = """
import sys

sys.path.insert(0, {book!r})
import build

if __name__ == "__main__":
    try:
        done = build.execute_all(["one", "two", "three"], "smoke", build.ROOT / "out", False, 2)
        print([(name, executed.path.name, executed.reused) for name, executed in done.items()])
    except build.BuildError as error:
        print("build failed:", error)
"""


@pytest.mark.slow
def test_notebooks_are_executed_two_at_a_time_and_told_as_they_are_done(tmp_path):
    """The first waits for the second; the third fails at first."""
    book, notebooks = tmp_path / "book", tmp_path / "notebooks"
    shutil.copytree(ROOT / "book", book, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for folder in (book / "results", tmp_path / "bilevel_core", notebooks / "profiles" / "smoke"):
        folder.mkdir(parents=True)
    wait = "import time\nfrom pathlib import Path\n\nwhile not Path('../second').exists():\n    time.sleep(0.1)"
    for name, code in (("one", wait), ("two", "open('../second', 'w').close()"), ("three", "1 / 0")):
        nbformat.write(small_notebook(code), notebooks / f"{name}.ipynb")
        (notebooks / "profiles" / "smoke" / f"{name}.yaml").write_text("PROFILE: smoke\nn: 2\n")
    (tmp_path / "all.py").write_text(ALL.format(book=str(book)))

    def run() -> list[str]:
        done = subprocess.run([sys.executable, str(tmp_path / "all.py")], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    lines = run()
    assert any(line.startswith("[3/3]") and line.endswith("FAILED") for line in lines)
    assert any(line.startswith("build failed: notebooks/three.ipynb failed in code cell") for line in lines)
    nbformat.write(small_notebook("print('mended')"), notebooks / "three.ipynb")
    lines = run()
    assert [line.split()[0] for line in lines[:3]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert sum("(reused)" in line for line in lines) == 2
    assert lines[-1] == str([("one", "one.ipynb", True), ("two", "two.ipynb", True), ("three", "three.ipynb", False)])


def test_command_line_says_what_it_does_and_refuses_unknown_profiles(build, capsys):
    with pytest.raises(SystemExit) as caught:
        build.main(["--help"])
    assert caught.value.code == 0
    assert "--export-colab" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        build.main(["--profile", "fast"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_a_failed_build_ends_with_its_reason(build, monkeypatch, capsys):
    def fail(profile: str, force: bool, workers: int) -> None:
        raise build.BuildError("notebooks/one.ipynb failed")

    monkeypatch.setattr(build, "build", fail)
    assert build.main([]) == 1
    assert "build failed: notebooks/one.ipynb failed" in capsys.readouterr().err


def test_make_refuses_unknown_profiles_and_old_pythons(tmp_path):
    if shutil.which("make") is None:
        pytest.fail("make is not installed; on Debian and Ubuntu: sudo apt-get install make")
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    wrong = subprocess.run(["make", "book", "PROFILE=fast"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "PROFILE=fast: choose smoke" in wrong.stderr
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    wrong = subprocess.run(
        ["make", "book", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert wrong.returncode != 0
    assert "The book needs Python 3.11, 3.12 or 3.13" in wrong.stderr
    assert "Python 3.9.1" in wrong.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_peak_memory_is_that_of_the_largest_child():
    code = "import time; block = b'x' * {} ; time.sleep({})"
    before = subprocess.Popen([sys.executable, "-c", code.format(400_000_000, 5)])  # not ours to count
    time.sleep(0.5)
    with PeakMemory(every=0.05) as peak:
        for size in (150_000_000, 1):
            subprocess.run([sys.executable, "-c", code.format(size, 0.4)], check=True)
    before.kill()
    before.wait()
    assert 150e6 < peak.bytes < 250e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the peak of a process")
def test_peak_memory_keeps_what_was_freed():
    code = "import time; block = b'x' * 200_000_000; del block; time.sleep(0.6)"
    with PeakMemory(every=0.05) as peak:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert peak.bytes > 200e6


def test_downloads_are_clean_and_know_the_address(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    nbformat.write(small_notebook("print(1)"), tmp_path / "one.ipynb")
    build.offer_clean_notebooks(
        tmp_path / "html", ["one"], build.Address("https://github.com/me/book", "e" * 40, "colab")
    )
    nb = nbformat.read(tmp_path / "html" / "_sources" / "notebooks" / "one.ipynb", as_version=4)
    assert "e" * 40 in nb.cells[1].source
    assert build.COLAB_BADGE in nb.cells[0].source  # the site's own picture is not beside a downloaded notebook
    assert not any(cell.get("outputs") for cell in nb.cells)


@pytest.mark.browser
def test_status_of_the_built_site_is_complete(site):
    status = json.loads((site.parents[2] / "status.json").read_text())
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert names == set(status["seconds"]) == set(status["peak_gib"]) == set(status["page_bytes"])
    assert all(0.1 < peak < 16 for peak in status["peak_gib"].values())
    assert status["profile"] == "smoke"
    assert status["versions"]["torch"]
    assert status["hardware"]["cpu"]
