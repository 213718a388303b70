"""Files that are whole or absent, and directories with one writer."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lib.cli import UserError
from lib.files import only_writer, whole_file


def test_whole_or_absent(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path):
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*file'"), whole_file(tmp_path / "file") as file:
        file.write(b"x" * 100_000)
    assert os.listdir(tmp_path) == []


HOLD = """
import sys
sys.path.insert(0, {root!r})
from lib.files import only_writer
with only_writer({directory!r}): {what}
"""


def test_one_writer_and_none_after_its_death(tmp_path):
    def process(what):
        program = HOLD.format(root=str(ROOT), directory=str(tmp_path / "d"), what=what)
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)

    holder = process("print(1, flush=True); import time; time.sleep(60)")
    assert holder.stdout.readline()
    (tmp_path / "d" / "half.npy.tmp").write_text("left over")
    with pytest.raises(UserError, match=f"is being written by process {holder.pid} on "), only_writer(tmp_path / "d"):
        pass
    assert (tmp_path / "d" / "half.npy.tmp").exists()  # it may be the holder's
    holder.kill()
    holder.wait()
    with only_writer(tmp_path / "d"):
        assert not (tmp_path / "d" / "half.npy.tmp").exists()


def test_a_child_does_not_keep_the_lock(tmp_path):
    program = "import os, time; os.fork() == 0 and time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT), directory=str(tmp_path), what=program)]
    )
    holder.wait()
    with only_writer(tmp_path):
        pass


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), only_writer(tmp_path / "file" / "below"):
        pass
