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
def test_learning_a_schedule_is_compared_with_the_released_procedure(root):
    """At N = 5 the released procedure makes 26 N + 13 = 143 network calls; at its own N = 50 they are 1313."""
    small = ["--batch", "8", "--steps", "5", "--images", "40", "--draws", "3", "--train", "3", "--warm", "2"]
    done = run(root, "schedule.py", *SMALL, *small)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "143 network calls: used 15.4%, without effect 77.6%, only logged 7.0%" in text
    number = r" +-?[\d.,]+"
    names = ["released", "ours", "... at 5 DDIM steps", "chapter 7", "told the level"]
    outer = re.findall(rf"^({'|'.join(map(re.escape, names))})(?:{number}){{6}}", text, re.MULTILINE)
    assert outer == names, text
    assert re.search(rf"^told the level +{4 * 64 * 2} ", text, re.MULTILINE), text  # draws, images, there and back
    cost = 40 * (100 + 10 + 4 * 5) + 8 * (3 * 10 + 3 + 2 + 2)
    assert re.search(rf"^released +{cost:,} ", text, re.MULTILINE), text
    found = re.findall(rf"^(\S.*?)(?:{number}){{2}} {{2}}(?:{number}){{6}} +\d+\.\d\d$", text, re.MULTILINE)
    assert found[:3] == ["forward", "reverse", "... last third"] and len(found) == 7, text
    memory = re.findall(r"^([a-z]+)(?: +\d+){3}$", text, re.MULTILINE)
    assert memory[1:] == ["forward", "reverse", "checkpointed", "truncated"], text
    rates = re.findall(rf"^(\S.*?){number} +{RATIO}(?:{number}){{2}} +[\d.]+%$", text, re.MULTILINE)
    assert rates == ["float32", "... channels last", "bfloat16", "... bf16, last"], text


@pytest.mark.slow
def test_options_are_explained_and_checked(root):
    assert "--repeats" in run(root, "training.py", "--help").stdout
    wrong = run(root, "sampler.py", "--batch", "0")
    assert wrong.returncode == 2 and "--batch 0 must be at least 1" in wrong.stderr


@pytest.mark.browser
def test_the_live_figures_are_timed(root):
    done = run(root, "live.py", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(pull|grid) .*? (\d) +(\d+\.\d\d) \[\3, \3\] +\d+ +\d\.\d$", done.stdout, re.MULTILINE)
    assert [row[:2] for row in found] == [("pull", "2"), ("grid", "1")], done.stdout
