"""Files that are whole or absent, and directories with one writer."""

import contextlib
import fcntl
import os
import shutil
import socket
from pathlib import Path

from lib.cli import UserError


@contextlib.contextmanager
def whole_file(path):
    """Open a binary file to write that appears under `path` complete, or not at all.

    The bytes go to `path`.tmp, are flushed to the disk, and the file is renamed; the directory is flushed as well, so
    that the name survives a power cut. After an error nothing of it is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a write that fails does not say where
        raise
    sync_directory(path.parent)


def sync_directory(directory) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(directory):
    """Hold the directory (made if need be) for this process; raises UserError naming the process that has it.

    The lock is fcntl's: the kernel drops it however the process ends, and children don't inherit it. What an earlier
    writer left under a name in .tmp is removed.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{directory} is being written by {file.read().strip() or 'another process'}: wait for it, "
                "or choose another directory"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for leftover in directory.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
