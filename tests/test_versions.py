"""What records say of the code: versions, and the commit of a checkout."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gated_attention import versions
from gated_attention.versions import git_commit, library_versions


def test_versions_name_what_numbers_depend_on():
    assert {"python", "torch", "transformers"} <= library_versions().keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_a_checkout_which_tracks_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "versions.py"
    source.write_text("1\n")
    monkeypatch.setattr(versions, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "someone else's commit")
    assert git_commit() is None
    git("add", "versions.py")
    git("commit", "-q", "-m", "source")
    assert git_commit() == git("rev-parse", "HEAD")
    source.write_text("2\n")
    assert git_commit() == git("rev-parse", "HEAD") + "+dirty"
    assert Path(versions.__file__) == source
