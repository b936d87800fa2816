"""The examples of the page "Bring your own" run as they stand and print what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "book" / "bring_your_own.md"
EXAMPLES = re.findall(
    r"^## (.*?)\n.*?```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
)


def test_the_examples_are_short():
    titles = [title.removeprefix("Your own ") for title, *_ in EXAMPLES]
    wanted = [
        "reward",
        "reward where samples run out",
        "denoiser",
        "v-prediction",
        "schedule",
        "network in Algorithm 6",
        "data",
    ]
    assert [title for title in titles if title in wanted] == wanted
    assert len(titles) == PAGE.read_text("utf-8").count("\n## ")  # no section without an example that is executed
    assert max(len([line for line in code.splitlines() if line]) for _, code, _ in EXAMPLES) <= 36


def test_every_import_of_an_example_is_there():
    """In the fast tests, so that a module that moves does not leave the page behind."""
    for line in {line for _, code, _ in EXAMPLES for line in code.splitlines() if line.startswith("from bilevel_core")}:
        exec(line, {})


@pytest.mark.slow
@pytest.mark.parametrize(("code", "printed"), [example[1:] for example in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_an_example_prints_what_the_page_says(root, code, printed):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed
