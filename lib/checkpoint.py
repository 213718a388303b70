"""Checkpoints: the state of a run as plain data, written whole or not at all, verified when read.

    save_checkpoint("log", state)
    checkpoint = load_checkpoint("log/model_checkpoint.pt")      # the state again, verified
    found = newest_checkpoint("log")                             # the newest good one

LOG_DIR/model_05000.pt is the state after 5000 updates; model_checkpoint.pt links to the newest.
"""

import errno
import itertools
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from GPT_Modules import GPTConfig
from lib.cli import UserError, one_line_error
from lib.files import UNSUPPORTED_ERRORS, replace, warn_once, whole_file

NEWEST = "model_checkpoint.pt"  # link to the newest checkpoint
BEST = "model_best.pt"  # link to the one with the lowest validation loss
# errors of the system, not of a file's content
TRANSIENT_ERRORS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE}


def save_checkpoint(log_dir, state: dict) -> Path:
    """Save the state of a run as LOG_DIR/model_NNNNN.pt, NNNNN its step, and link NEWEST to it.

    state: model, config, step, tokenizer, optimizer, scaler, precision, best_val_loss,
    train_config, data. Raises OSError if the disk is full or fails, and UserError for weights that
    are not finite; the earlier checkpoints are then untouched.
    """
    if not all(weight.isfinite().all() for weight in state["model"].values()):
        raise UserError(
            f"the weights after step {state['step']} have numbers that are not finite: "
            "they are not saved, and the run ends",
            code=1,
        )
    path = Path(log_dir) / f"model_{state['step']:05d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been renamed, or unmounted
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the OSError of a full disk behind a RuntimeError
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise
        free = shutil.disk_usage(log_dir).free
        message = f"{path} could not be saved ({error}); {free:,} bytes are free there"
        raise OSError(message) from error
    link(path, NEWEST)
    return path


def claim(path: Path, step: int) -> None:
    """Rename the checkpoint that a run resumes from to model_NNNNN.pt, and link NEWEST to it.

    A downloaded log may hold only a plain model_checkpoint.pt; a process that was killed may have
    saved without linking.
    """
    numbered = path.with_name(f"model_{step:05d}.pt")
    if path != numbered:
        replace(path, numbered)
    link(numbered, NEWEST)


def link(path: Path, name: str) -> None:
    """Make `name`, beside the checkpoint `path`, a relative link to it, atomically.

    A copy where the file system has no links.
    """
    temporary = path.with_name(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(path.name)
        replace(temporary, path.with_name(name))
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
        warn_once("symbolic links", f"{name} is a copy of its checkpoint")
        with whole_file(path.with_name(name)) as copy, open(path, "rb") as file:
            shutil.copyfileobj(file, copy)


def remove_older(log_dir, step: int, keep_every: int) -> None:
    """Remove the checkpoints before `step` that need not be kept.

    Kept are the last one before it, multiples of keep_every (0: none), and the one that BEST links
    to. Raises OSError for one that can't be removed.
    """
    paths = checkpoint_paths(log_dir)
    older = sorted(number for number in paths if number < step)
    best = (Path(log_dir) / BEST).resolve()
    for number in older[:-1]:
        multiple = keep_every and number % keep_every == 0
        if not multiple and paths[number].resolve() != best:
            paths[number].unlink(missing_ok=True)


def checkpoint_paths(log_dir) -> dict[int, Path]:
    """{step: path} of the checkpoints in a directory, good or not, in ascending order."""
    paths = {}
    for path in Path(log_dir).glob("model_*.pt"):
        if match := re.fullmatch(r"model_(\d{5,})\.pt", path.name):
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


class UnreadableCheckpoint(UserError):
    """A checkpoint that may be good, but can't be read now."""


def load_checkpoint(path) -> dict:
    """The state in a checkpoint, on the CPU. Raises UserError as read_verified, and if there is no
    model of ours in it."""
    content = read_verified(path)
    if not isinstance(content, dict) or not isinstance(content.get("config"), GPTConfig):
        raise UserError(f"{path} is not a checkpoint: it has no model with a GPTConfig")
    return content


def read_verified(path):
    """The plain data in a file that torch.save wrote, after its checksums were compared.

    Nothing in the file is executed. Raises UserError if there is no such file, if it is damaged, or
    if it holds anything but plain data.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if part := archive.testzip():
                raise ValueError(f"the checksum of {part} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # damaged files raise eight kinds
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRORS:
            raise UnreadableCheckpoint(f"{path} can't be read: {error.strerror}") from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            message = f"{path} can't be read: this machine lacks the memory"
            raise UnreadableCheckpoint(message, code=1) from None
        raise UserError(f"{path} is damaged or not a checkpoint: {one_line_error(error)}") from None


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest good checkpoint of a directory, and why newer ones were skipped."""

    checkpoint: dict
    path: Path
    skipped: list[str]


def newest_checkpoint(log_dir) -> FoundCheckpoint | None:
    """The newest good checkpoint; None in a directory without any.

    Raises UserError with every reason if there are some and all are bad.
    """
    skipped = []
    numbered = good_ones(reversed(checkpoint_paths(log_dir).values()), skipped)
    # a download turns the links into files, which may be newer than all others
    links = [Path(log_dir) / name for name in (NEWEST, BEST)]
    files = [path for path in links if path.is_file() and not path.is_symlink()]
    found = [*itertools.islice(numbered, 1), *good_ones(files, skipped)]
    if found:
        return max(found, key=lambda one: one.checkpoint.get("step", 0))
    if skipped:
        reasons = "\n".join(skipped)
        raise UserError(
            f"no checkpoint in {log_dir} is good:\n{reasons}\n"
            "HINT: restore one, or choose another --log_dir to start from the beginning"
        )
    return None


def good_ones(paths, skipped: list[str]):
    """Yield each of the checkpoints that can be loaded; the reasons for others join `skipped`."""
    for path in paths:
        try:
            yield FoundCheckpoint(load_checkpoint(path), path, skipped)
        except UnreadableCheckpoint:
            raise  # skipping it would lose its steps
        except UserError as error:
            skipped.append(str(error))
