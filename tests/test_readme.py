import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_readme_prints_what_it_says(root):
    text = (root / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == printed


def test_the_readme_names_the_commands_that_exist(root):
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", (root / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
