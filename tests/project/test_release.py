"""A release: one version and one date everywhere, files for citation that agree, a workflow that publishes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import bilevel_core

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CFF = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
ZENODO = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PARTS = re.findall(r"(?m)^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", CHANGES)


def test_one_version_and_date_everywhere():
    version, date = PARTS[0]
    assert {PROJECT["version"], bilevel_core.__version__, CFF["version"], ZENODO["version"]} == {version}
    assert CFF["date-released"] == date
    assert PARTS == sorted(PARTS, key=lambda part: [int(n) for n in part[0].split(".")], reverse=True)


def test_files_for_citation_agree():
    assert CFF["title"] == ZENODO["title"]
    assert CFF["type"] == ZENODO["upload_type"]
    assert CFF["license"] == ZENODO["license"] == PROJECT["license"]
    authors = [who["name"] for who in CFF["authors"]]
    assert authors == [who["name"] for who in ZENODO["creators"]] == [who["name"] for who in PROJECT["authors"]]
    assert " ".join(CFF["abstract"].split()) == ZENODO["description"]
    number = CFF["preferred-citation"]["url"].rpartition("/")[2]
    assert [found["identifier"] for found in ZENODO["related_identifiers"]] == [f"arXiv:{number}"]


def test_nothing_is_published_unless_the_owner_says_so():
    jobs = WORKFLOW["jobs"]
    assert list(jobs) == ["package", "tag", "publish"]
    assert jobs["publish"]["if"] == "vars.PUBLISH == 'true'"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    steps = {name: json.dumps(job["steps"]) for name, job in jobs.items()}
    sends = [name for name, said in steps.items() if "publish" in said or "twine upload" in said]
    assert sends == ["publish"]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", [version for version, _ in PARTS])
def test_the_notes_of_a_release_are_its_part_of_the_changelog(version):
    (run,) = (step["run"] for step in WORKFLOW["jobs"]["tag"]["steps"] if "awk" in step.get("run", ""))
    command = run.splitlines()[0].partition(" > ")[0]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env={"VERSION": version})
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert CHANGES.index(done.stdout) > CHANGES.index(f"## {version} ")
    assert "\n## " not in done.stdout
