"""The benchmarks run at tiny sizes and print their tables; nothing here asserts a time."""

import re
import subprocess
import sys

import pytest

SMALL = ["--sizes", "tiny", "--batch", "2", "--steps", "2", "--repeats", "1", "--threads", "1", "--device", "cpu"]
RATIO = r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]"


def run(root, script, *arguments):
    command = [sys.executable, root / "benchmarks" / script, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variants"),
    [
        ("sampler.py", ["bare forwards", "sample_ddim", "diffusers loop", "... fast"]),
        ("guidance.py", ["bare pairs", "LookAhead", "... micro-batch", "... checkpoint"]),
        ("training.py", ["bare steps", "train_score"]),
    ],
)
def test_a_table_with_a_row_for_each_variant(root, script, variants):
    done = run(root, script, *SMALL)
    assert done.returncode == 0, done.stderr
    for line in ("hardware:", "device cpu, 1 threads", "torch ", "batch 2, 2 steps a run, 1 repeats", "cost unit:"):
        assert line in done.stdout
    rows = re.findall(rf"^tiny +(\S.*?) +[\d.]+ +{RATIO} +[\d,]+ +\d+$", done.stdout, re.MULTILINE)
    assert rows == variants, done.stdout
    assert "1.00 [1.00, 1.00]" in done.stdout


@pytest.mark.slow
def test_options_are_explained_and_checked(root):
    assert "--repeats" in run(root, "training.py", "--help").stdout
    wrong = run(root, "sampler.py", "--batch", "0")
    assert wrong.returncode == 2 and "--batch 0 must be at least 1" in wrong.stderr
