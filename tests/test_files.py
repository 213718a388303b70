"""Files that are whole or absent, and directories with one writer."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, comparable_log, flags, script

from lib.checkpoint import load_checkpoint
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
    with (
        pytest.raises(OSError, match=r"No space left on device: .*file'"),
        whole_file(tmp_path / "file") as file,
    ):
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
    (tmp_path / "d" / "thesis.tmp").mkdir()
    with (
        pytest.raises(UserError, match=f"is being written by process {holder.pid} on "),
        only_writer(tmp_path / "d"),
    ):
        pass
    assert (tmp_path / "d" / "half.npy.tmp").exists()  # it may be the holder's
    holder.kill()
    holder.wait()
    with only_writer(tmp_path / "d", "*.npy"):
        assert (
            not (tmp_path / "d" / "half.npy.tmp").exists()
            and (tmp_path / "d" / "thesis.tmp").exists()
        )


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
    with (
        pytest.raises(UserError, match="cannot write to"),
        only_writer(tmp_path / "file" / "below"),
    ):
        pass


# ---- file systems that can't do everything: faults.c in a real process of each script ----

LOCKS = "has no locks: two jobs that write to"
LINKS = "has no symbolic links: model_checkpoint.pt is a copy of its checkpoint"
FLUSHES = "has no flushing of directories: after a power cut the newest files may be missing"
CASES = [  # script, call, error, path, times, what it says ("": nothing), exit code
    ("data_generator.py", "lock", "ENOLCK", ".lock", None, LOCKS, 0),
    ("train.py", "read", None, ".npy", None, "", 0),
    (
        "train.py",
        "fsync",
        "EIO",
        "model_00008.pt",
        None,
        "the last checkpoint could not be saved: ",
        1,
    ),
]
MORE_CASES = [
    ("train.py", "symlink", "EPERM", "model_checkpoint", None, LINKS, 0),
    ("data_generator.py", "flushdir", "EINVAL", "data", None, FLUSHES, 0),
    ("export.py", "fsync", "EIO", "model.safetensors", 1, "out can't be written: [Errno 5]", 1),
    ("data_generator.py", "lock", "ENOSYS", ".lock", None, LOCKS, 0),
    ("data_generator.py", "lock", "EOPNOTSUPP", ".lock", None, LOCKS, 0),
    ("data_generator.py", "flushdir", "EBADF", "data", None, FLUSHES, 0),
    ("data_generator.py", "read", None, "data/", None, "", 0),
    (
        "data_generator.py",
        "fsync",
        "EIO",
        "train_000002",
        1,
        "train_000002.npy can't be written",
        1,
    ),
    ("train.py", "lock", "ENOLCK", ".lock", None, LOCKS, 0),
    ("train.py", "symlink", "EOPNOTSUPP", "model_checkpoint", None, LINKS, 0),
    ("train.py", "flushdir", "EINVAL", "log", None, FLUSHES, 0),
    (
        "train.py",
        "fsync",
        "EIO",
        "model_00006.pt",
        1,
        "model_00006.pt could not be saved ([Errno 5]",
        0,
    ),
    ("export.py", "flushdir", "EINVAL", "out", None, FLUSHES, 0),
    ("export.py", "read", None, "model_0", None, "", 0),
]


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = ROOT / "tests" / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, data_dir, trained):
    """What each script makes where nothing fails."""
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "docs.jsonl").write_text(
        "".join(f'{{"text": "document {n}"}}\n' for n in range(400))
    )
    for name in ("data_generator.py", "export.py"):
        assert script(*command(name, directory, directory, data_dir, trained)).returncode == 0
    return directory


def command(name, directory, inputs, data_dir, trained) -> list:
    """A run of each script that writes below `directory`."""
    return {
        "data_generator.py": [
            name, "--dataset", inputs / "docs.jsonl", "--data_dir", directory / "data",
            "--tokenizer=bytes", "--shard_size=1000",
        ],
        "train.py": [name, *flags(data_dir=data_dir, log_dir=directory / "log")],
        "export.py": [name, "--model", trained / "model_00008.pt", "--out", directory / "out"],
    }[name]  # fmt: skip


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)],
    ids=lambda case: "-".join(map(str, case[:4])),
)
def test_what_a_file_system_cannot_do(case, faults, undisturbed, data_dir, trained, tmp_path):
    name, call, error, path, times, says, code = case
    environment = {
        "LD_PRELOAD": faults,
        "FAULT_CALL": call,
        "FAULT_PATH": path,
        "FAULT_TIMES": times,
    }
    environment["FAULT_ERRNO"] = getattr(errno, error) if error else None
    environment = {key: str(value) for key, value in environment.items() if value is not None}
    words = command(name, tmp_path, undisturbed, data_dir, trained)
    if (name, path) == ("train.py", "model_0"):  # a checkpoint to go on from
        shutil.copytree(trained, tmp_path / "log", symlinks=True)
        (tmp_path / "log" / "model_00008.pt").unlink()
    done = script(*words, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    printed = done.stdout + done.stderr
    assert printed.count(says) == 1 if says else "WARNING" not in printed, printed
    if (
        code or "could not be saved" in says
    ):  # a real fault: nothing that was whole is lost, and the next run goes on
        assert script(*words).returncode == 0
    if name == "train.py":
        newest = torch.load(tmp_path / "log" / "model_checkpoint.pt")
        assert "optimizer" in newest and newest["step"] == 8
        whole = load_checkpoint(tmp_path / "log" / "model_00008.pt")
        assert all(torch.equal(t, newest["model"][n]) for n, t in whole["model"].items())
        reference = load_checkpoint(trained / "model_00008.pt")
        assert all(torch.equal(t, reference["model"][n]) for n, t in whole["model"].items())
        assert comparable_log(tmp_path / "log") == comparable_log(trained)
    else:
        folder = "data" if name == "data_generator.py" else "out"
        assert contents(tmp_path / folder) == contents(undisturbed / folder)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_without_links_the_run_goes_on_and_every_script_finds_its_model(
    faults, data_dir, trained, tmp_path
):
    environment = {
        "LD_PRELOAD": str(faults),
        "FAULT_CALL": "symlink",
        "FAULT_ERRNO": str(errno.EPERM),
    }
    for steps in (3, 8):
        words = flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=steps)
        assert script("train.py", *words, env=environment).returncode == 0
    for model in (tmp_path / "log", tmp_path / "log" / "model_checkpoint.pt"):
        assert script("sample.py", "a", "--model", model, "--num_samples=1").returncode == 0
