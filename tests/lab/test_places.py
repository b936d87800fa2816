"""Where things lie: the project and the folder of a run."""

from pathlib import Path

import pytest

from bilevel_core.lab import data, places, results


def test_folders(project, tmp_path_factory, monkeypatch):
    assert places.project_root() == project
    assert places.work_dir("") == project / "_runs" and (project / "_runs").is_dir()
    monkeypatch.setenv("BILEVEL_WORK_DIR", str(project / "drive" / "here"))
    assert places.work_dir("") == project / "drive" / "here"
    assert places.work_dir(project / "other").is_dir()
    (project / "file").write_text("")
    with pytest.raises(OSError, match="choose a writable folder"):
        places.work_dir(project / "file" / "below")
    monkeypatch.setenv("BILEVEL_ROOT", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(FileNotFoundError, match="BILEVEL_ROOT"):
        places.project_root()


def test_a_folder_that_cannot_be_written_to_is_noticed_at_the_start(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=f"work_dir '{tmp_path}' cannot be written to .*Read-only.*a writable folder"):
        places.work_dir(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_no_one_can_write_to():
    with pytest.raises(OSError, match="work_dir '/proc' cannot be written to"):
        places.work_dir("/proc")


def test_no_such_users_home(monkeypatch):
    with pytest.raises(ValueError, match="work_dir = '~nouser/x': ~nouser is no user's home here; write the folder"):
        places.work_dir("~nouser/x")
    monkeypatch.setenv("BILEVEL_WORK_DIR", "~nouser")
    with pytest.raises(ValueError, match="BILEVEL_WORK_DIR = '~nouser'"):
        places.work_dir("")
    monkeypatch.setenv("BILEVEL_ROOT", "~nouser")
    with pytest.raises(ValueError, match="BILEVEL_ROOT = '~nouser'"):
        places.project_root()
    monkeypatch.setenv("BILEVEL_DATA", "~nouser")
    with pytest.raises(ValueError, match="BILEVEL_DATA = '~nouser'"):
        data.available("mnist")
    with pytest.raises(ValueError, match="root = '~nouser'"):
        data.load("mnist", root="~nouser")
    monkeypatch.setenv("BILEVEL_RESULTS", "~nouser")
    with pytest.raises(ValueError, match="BILEVEL_RESULTS = '~nouser'"):
        results.folder()
