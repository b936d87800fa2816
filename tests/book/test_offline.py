"""No network: what `make test` builds cannot reach another machine, and the quick profile asks for no more than it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from bilevel_core.lab import parameters

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = str(ROOT / "tests" / "offline")
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))

# Parameters that decide whether something is fetched, with the values at which nothing is. What else is a text or a
# switch is listed below; numbers are sizes. A new parameter has to be put into one of the two.
NOTHING_FETCHED = {
    "data_name": ("digits", "digits8"),
    "live_name": ("digits8",),
    "study_name": ("digits8",),
    "data_root": ("",),
    "download": (False,),
    "model": ("tiny",),
    "upper": ("clip",),  # of the tiny model: the shipped one
    "lower": ("random",),
    "clip_model": (["", ""],),
    "hps_file": ("",),
    "aesthetic_file": ("",),
    "survey": (False,),
}
HARMLESS = {
    *("PROFILE", "device", "work_dir", "dtype", "memory_saving", "dry_run"),
    *("prompt", "prompts", "study_prompts", "estimator", "how"),
}
# The data of a study that the quick profile does not run: without seeds its recorded result is shown.
ONLY_OF_THE_STUDY = {"06_learning_noise_schedules": "data_name", "07_noise_schedule_mnist": "study_name"}


def is_number(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_no_parameter_asks_for_a_download(name, profile):
    values = parameters.read_profile(name, "quick") | parameters.read_profile(name, profile)
    for parameter, value in values.items():
        if is_number(value) or parameter in HARMLESS:
            continue
        assert parameter in NOTHING_FETCHED, f"say whether {parameter} = {value!r} can fetch anything"
        if ONLY_OF_THE_STUDY.get(name) == parameter and profile == "quick":
            assert values["study_seeds"] == 0
            continue
        assert value in NOTHING_FETCHED[parameter], f"{parameter} = {value!r} may fetch something"


@pytest.mark.parametrize("name", NAMES)
def test_smoke_and_quick_differ_in_sizes_only(name):
    quick = parameters.read_profile(name, "quick")
    for parameter, value in parameters.read_profile(name, "smoke").items():
        if value != quick[parameter] and not is_number(value):
            assert parameter in HARMLESS or ONLY_OF_THE_STUDY.get(name) == parameter, parameter


def test_the_books_own_build_runs_without_a_network():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if "--profile smoke" in line and "build.py" in line)
    assert 'PYTHONPATH="$(CURDIR)/tests/offline"' in line
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            commands = " ".join(step.get("run", "") for step in job["steps"])
            assert "--profile smoke" not in commands, "the smoke book is built by make test alone"


# ---------------------------------------------------------------- it does catch a connection

ELSEWHERE = {
    "connect": "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
    "connect, IPv6": "import socket; socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))",
    "name": "import socket; socket.getaddrinfo('example.org', 80)",
    "old name": "import socket; socket.gethostbyname('example.org')",
    "datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "urllib": "import urllib.request; urllib.request.urlopen('http://example.org', timeout=1)",
    "child": "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import socket;"
    ' socket.create_connection(("192.0.2.1", 80), timeout=1)\']).returncode)',
}
HERE = """
import socket, threading, urllib.request
from http.server import HTTPServer, SimpleHTTPRequestHandler
server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
threading.Thread(target=server.handle_request, daemon=True).start()
assert urllib.request.urlopen(f"http://localhost:{server.server_port}/").status == 200
a, b = socket.socketpair()
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": OFFLINE}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_deliberate_connection_is_refused(way, tmp_path):
    done = python(ELSEWHERE[way], tmp_path)
    assert done.returncode != 0
    assert "the book must be built without a network" in done.stderr, done.stderr


def test_this_machine_may_be_reached(tmp_path):
    done = python(HERE, tmp_path)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- in kernels


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([OFFLINE, str(ROOT)]))
    monkeypatch.setenv("BILEVEL_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    return tmp_path


@pytest.mark.slow
def test_a_cell_that_connects_fails(offline):
    import nbformat

    code = "from bilevel_core.lab import data\n\ndata.load('mnist', 'test')"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), offline / "in.ipynb")
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    with pytest.raises(papermill.PapermillExecutionError, match="mnist could not be downloaded"):
        papermill.execute_notebook(str(offline / "in.ipynb"), str(offline / "out.ipynb"), **options)
    assert "the book must be built without a network" in (offline / "out.ipynb").read_text()


@pytest.mark.slow
def test_a_quick_notebook_needs_no_network_and_no_data(offline):
    """The rest of the quick profile differs from what `make test` builds in sizes alone, as is tested above."""
    name = "02_generative_bilevel"
    values = yaml.safe_load((ROOT / "notebooks" / "profiles" / "quick" / f"{name}.yaml").read_text())
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False, "cwd": str(ROOT / "notebooks")}
    source, out = ROOT / "notebooks" / f"{name}.ipynb", offline / "out.ipynb"
    papermill.execute_notebook(str(source), str(out), parameters=values, **options)
    assert json.loads(out.read_text())["cells"]
