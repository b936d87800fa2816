"""A small project for the tests of the floor: one notebook, `demo`, and its profiles."""

import json

import pytest

from bilevel_core.lab import places

QUICK = {"PROFILE": "quick", "data": "digits", "steps": 100, "lr": 0.5, "gammas": [1.0, 10.0], "work_dir": ""}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook, `demo`, and its profiles; the run of this process is forgotten afterwards."""
    for profile, text in {
        "smoke": "PROFILE: smoke\nsteps: 2\n",
        "quick": json.dumps(QUICK),
        "recorded": "PROFILE: recorded\nsteps: 500\n",
        "full": "PROFILE: full\ndata: mnist8\nsteps: 1000\ngammas: [1.0, 10.0, 100.0]\n",
    }.items():
        folder = tmp_path / "notebooks" / "profiles" / profile
        folder.mkdir(parents=True)
        (folder / "demo.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("BILEVEL_ROOT", "BILEVEL_WORK_DIR", "BILEVEL_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(places.RUN, "parameters", {})
    monkeypatch.setattr(places.RUN, "results", None)
    return tmp_path


@pytest.fixture
def quick():
    """The quick values of `demo`."""
    return dict(QUICK)
