"""Files change whole or not at all, and a folder belongs to one process at a time."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from gated_attention import files
from gated_attention.files import claimed, replacing, write_all, write_text, writing_to


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", refuse)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_replaced_whole_with_the_modes_of_the_umask(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o600)
    before = os.umask(0o027)
    try:
        write_text(path, "ä\ud800")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "ä\\ud800"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_every_old_file_and_is_one_line(tmp_path, full_disk):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with (
        pytest.raises(ValueError, match=r"cannot write to here \(No space left on device\); choose"),
        writing_to("here"),
    ):
        write_all(tmp_path, {"a": "new", "b": "new", "figures/c": "new"}, stale=["b", "d"])
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["old", "old"]
    assert names(tmp_path) == ["a", "b"]


def test_stale_files_go_when_the_new_ones_are_there(tmp_path):
    (tmp_path / "d").write_text("old")
    assert write_all(tmp_path, {"a": "1", "b/c": "2"}, stale=["d", "e", "a"]) == [tmp_path / "a", tmp_path / "b/c"]
    assert names(tmp_path) == ["a", "c"]


def test_links_are_followed_and_devices_are_written_to(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    write_text(tmp_path.__class__("/dev/null"), "gone")
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        write_text(tmp_path, "no")


def test_what_a_kill_leaves_is_removed_by_the_next_writer_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / ".part-0123").write_text("half")
    with replacing(tmp_path / "slow") as slow:
        slow.write(b"1")
        write_text(tmp_path / "fast", "2")
        slow.write(b"3")
    assert names(tmp_path) == ["fast", "slow"]
    assert (tmp_path / "slow").read_text() == "13"


HOLD = """
import pathlib, sys, time
from gated_attention.files import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_folder_is_refused_with_its_holder_until_that_is_killed(tmp_path):
    folder = tmp_path / "new" / "folder"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):
        with (
            pytest.raises(ValueError, match=f"{folder} is in use by process {holder.pid} on .*; wait"),
            claimed(folder),
        ):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with claimed(folder):
        assert names(folder) == [".lock"]
    with claimed(tmp_path / "other" / "folder"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # the other was made for nothing


def test_a_claim_leaves_a_used_folder_as_it_was(tmp_path):
    with claimed(tmp_path / "a" / "b"):
        write_text(tmp_path / "a" / "b" / "file", "x")
    assert names(tmp_path) == ["file"]
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*taken"), claimed(tmp_path / "taken" / "c"):
        time.sleep(0)
