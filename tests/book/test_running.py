"""What the page on running the book says is what happens."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "running.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lines(text):
    return re.findall(r"^papermill .*", text, re.MULTILINE)


def test_the_table_of_profiles_is_complete():
    from bilevel_core.lab import places

    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == places.PROFILES
    recorded = {path.stem for path in (ROOT / "notebooks/profiles/recorded").glob("*.yaml")}
    chapters = {stem[:2] for stem in recorded if stem[0] != "a"}
    assert chapters == {"01", "05", "06", "07", "08", "09"} and recorded - {"appendix_text_models"} == {
        stem for stem in recorded if stem[:2] in chapters
    }


def test_all_pages_give_one_command():
    """From the folder of the notebooks, with the kernel named; a profile by its name."""
    pages = [PAGE, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    for path in NOTEBOOKS:
        pages += [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    found = [line for page in pages for line in re.findall(r"papermill \S+\.ipynb .*", page)]
    assert len(found) >= 5
    for line in found:
        words = shlex.split(line)
        assert words[2:5] == ["out.ipynb", "-k", "python3"] and (ROOT / "notebooks" / words[1]).is_file(), line
        assert "-f" not in words and all(page.count("cd notebooks") for page in pages if line in page), line


def test_the_plan_for_a_gpu_is_on_the_page_with_the_estimates_that_it_has():
    from bilevel_core.lab.gpu import pieces

    assert PAGE.count("<!-- gpu-plan -->") == 1
    slower = {piece.t4 for piece in pieces.all_pieces() if piece.name.startswith("sd15-512")}
    assert slower == {9.0, 16.0} and "it takes 9\nand 16 times" in PAGE
    names = re.findall(r"ONLY='([^']*)'", PAGE)[0].split()
    assert {piece.name.split("-")[0] for piece in pieces.only(pieces.all_pieces(), names)} == {"checks", "race28"}


@pytest.mark.slow
def test_the_flop_of_a_guided_step_are_those_of_the_page():
    """U-Net, twice, and decoder: forward, once more where they are recomputed, and backward into the input."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from bilevel_core.lab.models import pipelines

    mode, counts = FakeTensorMode(allow_non_fake_inputs=True), []
    pipe = pipelines.random_pipeline("sd15", dtype="float16", mode=mode)
    x, text = torch.zeros(2, 4, 64, 64).half(), torch.zeros(2, 77, 768).half()
    for call in (lambda: pipe.unet(x, 1, encoder_hidden_states=text), lambda: pipe.vae.decode(x[:1])):
        with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops() / 1e12)
    assert f"has {3 * sum(counts):.1f} TFLOP (a plain one {counts[0]:.1f})" in PAGE


@pytest.mark.slow
def test_the_one_line_runs_a_chapter_with_a_seed_and_a_folder_of_ones_own_and_resumes(tmp_path):
    """That line of the page, at smoke's sizes (but enough samples for a distance)."""
    [line] = [line for line in lines(PAGE) if "-p seed" in line]
    given = shlex.split(line)
    assert given[5:] == ["-p", "PROFILE", "full", "-p", "seed", "7", "-p", "work_dir", "/data/bilevel"]
    place, out = tmp_path / "data", tmp_path / "out.ipynb"
    given = [str(place) if word == "/data/bilevel" else str(out) if word == "out.ipynb" else word for word in given]
    small = yaml.safe_load((ROOT / "notebooks/profiles/smoke/01_diffusion.yaml").read_text()) | {"study_samples": 300}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", *given, "-f", str(tmp_path / "small.yaml"), "--inject-paths"]
    shown = ROOT / "book" / "results"
    before = {path: path.read_bytes() for path in shown.iterdir()}

    def run():
        done = subprocess.run(command, cwd=ROOT / "notebooks", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}

    made = run()
    study = sorted(path.name for path in made if path.parent.name == "study" and path.suffix == ".json")
    assert study == [f"digits8_{end}_{seed}.json" for end in ("0.98", "1") for seed in (7, 8)]
    [result] = [path for path in made if path.name == "01_sampling_mnist28.json"]
    assert result.parent.parent == place / "results"
    record = json.loads(result.read_text())
    assert record["provenance"]["seeds"] == [7, 8] and {row["seed"] for row in record["data"]["rows"]} == {7, 8}
    assert record["provenance"]["parameters"]["seed"] == 7
    cells = "".join(str(cell) for cell in nbformat.read(out, 4).cells)
    assert str(result) in cells and "<details><summary>Parameters of 01_diffusion, profile full" in cells
    assert {path: path.read_bytes() for path in shown.iterdir()} == before

    cut = place / "01_diffusion" / "study" / "digits8_1_8.json"  # as if killed before its last piece
    cut.unlink()
    again = run()
    assert again.keys() == made.keys()
    redone = {path for path in made if again[path] != made[path]}
    assert redone == {cut, result}
    shutil.rmtree(place)
