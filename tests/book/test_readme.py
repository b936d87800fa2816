import base64
import fnmatch
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

import landing
import pages
from bilevel_core.lab import report
from bilevel_core.lab.gpu.pieces import all_pieces

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.slow
def test_the_readme_prints_what_it_says(root):
    text = (root / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line]) <= 10
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == printed
    learned, exact = (float(number) for number in re.findall(r"\d\.\d{3}", printed))
    assert abs(learned / exact - 1) < 0.05


def test_the_readme_names_the_commands_that_exist(root):
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?m)(?:^|`)make (\w+)", (root / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture(scope="module")
def claims():
    return report.claims()


def test_the_readme_has_the_chapters_of_the_book(root, claims):
    """`make readme` brings it up to date."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    listed = [pages.Chapter.read(root / f"{file}.ipynb") for file in files if file.startswith("notebooks/")]
    text = (root / "README.md").read_text()
    assert text == pages.between(text, "chapters", pages.readme_table(listed, pages.verdicts(claims)))


def test_the_readme_has_the_results_of_the_report(root, claims):
    """`make readme` brings it up to date."""
    names = [path.stem for path in sorted((root / "notebooks").glob("*.ipynb"))]
    text = (root / "README.md").read_text()
    assert text == pages.between(text, "results", pages.readme_results(claims, names))


def test_the_commands_of_the_results_can_be_given(root):
    """Notebooks, profiles and pieces exist; papermill has the options."""
    told = re.findall(r"`(\.venv/bin/papermill [^`]*|make gpu ONLY[^`]*)`", (root / "README.md").read_text())
    assert len(told) >= 8
    options = subprocess.run([sys.executable, "-m", "papermill", "--help"], capture_output=True, text=True).stdout
    for command in told:
        if command.startswith("make"):
            (pattern,) = re.findall(r"ONLY='([^']*)'", command)
            assert fnmatch.filter([piece.name for piece in all_pieces()], pattern)
            continue
        notebook, profile = re.search(r"notebooks/(\w+)\.ipynb .* PROFILE (\w+)$", command).groups()
        assert (root / "notebooks" / f"{notebook}.ipynb").is_file()
        assert (root / "notebooks" / "profiles" / profile / f"{notebook}.yaml").is_file()
        assert all(option in options for option in ("--cwd", "-k,", "-p,"))


def test_the_readme_leads_to_files_that_exist(root):
    links = re.findall(r"\]\(([^)#:]+)\)", (root / "README.md").read_text())
    assert len(links) > 10
    for link in links:
        assert (root / link).is_file(), link


def pixels(image: ElementTree.Element) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(image.get("href").split("base64,")[1]))).tobytes()


def test_the_figure_of_the_readme_is_drawn_from_the_recorded_results(root):
    """`make readme` draws it again."""
    kept = ElementTree.parse(root / "book" / "learning-lambda.svg").getroot()
    drawn = ElementTree.fromstring(landing.still(landing.stories()[0]))
    assert (root / "book" / "learning-lambda.svg").stat().st_size < 50_000
    for theirs, ours in zip(kept.iter(), drawn.iter(), strict=True):
        assert theirs.tag == ours.tag and theirs.text == ours.text
        if ours.tag == f"{SVG}image":  # compressed, by another version, to other bytes
            assert pixels(theirs) == pixels(ours)
        else:
            assert theirs.attrib == ours.attrib
