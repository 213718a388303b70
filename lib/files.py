"""Files that are whole or absent, directories with one writer, and what a file system can't do.

Network and FUSE file systems lack some of what a local disk has. For each lack there is one
warning, which names the consequence, and the run continues; an error of the disk itself (EIO,
ENOSPC) is raised.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import socket
from pathlib import Path

from lib.cli import UserError

# what a call fails with that the file system does not support
UNSUPPORTED_ERRORS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EPERM,
    errno.EINVAL,
    errno.EBADF,
    errno.ENODEV,
    errno.EISDIR,
}


@functools.cache
def warn_once(what: str, consequence: str) -> None:
    """Warn, once in a process, of something that this file system does not have."""
    logging.getLogger("GPT124M").warning(
        "WARNING: this file system has no %s: %s", what, consequence
    )


@contextlib.contextmanager
def warn_if_unsupported(what: str, consequence: str):
    """Turn an error that says the file system can't do something into a warning."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
        warn_once(what, consequence)


@contextlib.contextmanager
def whole_file(path):
    """Open a binary file to write that appears under `path` complete, or not at all.

    The bytes go to `path`.tmp, are flushed to the disk, and the file is renamed; the directory is
    flushed as well, so that the name survives a power cut. After an error nothing of it is left.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a write that fails does not say where
        raise


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def replace(temporary: Path, path: Path) -> None:
    """Give a file its final name, in place of the file that has it."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    with warn_if_unsupported(
        "flushing of directories", "after a power cut the newest files may be missing"
    ):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def only_writer(directory, *names: str):
    """Hold the directory (made if need be) for this process; raises UserError naming the process
    that has it.

    The lock is fcntl's: the kernel drops it however the process ends, and children don't inherit
    it. names: patterns of what is written here; what an earlier writer left half-written, under
    such a name and .tmp, is removed.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    with file:
        try:
            consequence = f"two jobs that write to {directory} would not be noticed"
            with warn_if_unsupported("locks", consequence):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{directory} is being written by {file.read().strip() or 'another process'}: "
                "wait for it, or choose another directory"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for name in names:
            for leftover in directory.glob(f"{name}.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
