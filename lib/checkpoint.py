"""Checkpoints: the state of a run as plain data, whole and verified or not there at all.

    checkpoint = load_checkpoint("log/model_checkpoint.pt")      # a dict, verified
    model, tokenizer = load_model("log")                         # or a folder, or gpt2 from the Hub

LOG_DIR/model_05000.pt is the state after 5000 updates; model_checkpoint.pt points to the newest
good one.
"""

import logging
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from GPT_Modules import GPT, GPTConfig
from lib.cli import UserError, first_line
from lib.files import if_possible, replace, whole_file
from lib.tokenizer import get_tokenizer, tokenizer_of

NEWEST = "model_checkpoint.pt"  # link to the newest checkpoint
BEST = "model_best.pt"  # link to the one with the lowest validation loss
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def save_checkpoint(log_dir, state: dict) -> Path:
    """Save the state of a run as LOG_DIR/model_NNNNN.pt, NNNNN its step, and link NEWEST to it.

    state: model, optimizer, scaler, config, step, tokenizer, precision, train_config, data.
    Raises OSError if the disk is full or fails, and UserError for weights that are not finite; then
    nothing has changed on the disk.
    """
    if not all(weight.isfinite().all() for weight in state["model"].values()):
        raise UserError(
            f"the weights after step {state['step']} have numbers that are not finite: "
            "they are not saved, and the run ends",
            code=1,
        )
    path = Path(log_dir) / f"model_{state['step']:05d}.pt"
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


def remove_older(log_dir, step: int, keep_every: int) -> None:
    """Remove the checkpoints before `step` that need not be kept.

    Kept are the last one before it, multiples of keep_every (0: none), and the one that BEST links
    to. Raises OSError for one that can't be removed.
    """
    paths = checkpoint_paths(log_dir)
    older = sorted(s for s in paths if s < step)
    best = (Path(log_dir) / BEST).resolve()
    for number in older[:-1]:
        multiple = keep_every and number % keep_every == 0
        if not multiple and paths[number].resolve() != best:
            paths[number].unlink()


def link(path: Path, name: str) -> None:
    """Make `name`, beside the checkpoint `path`, a relative link to it, in one move.

    A copy where there are no links.
    """
    temporary = path.with_name(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    with if_possible("symbolic links", f"{name} is a copy of its checkpoint"):
        temporary.symlink_to(path.name)
        replace(temporary, path.with_name(name))
        return
    with whole_file(path.with_name(name)) as copy, open(path, "rb") as file:
        shutil.copyfileobj(file, copy)


def link_best(log_dir, losses: list[tuple[int, float]]) -> None:
    """Link BEST to the checkpoint of the lowest loss, if there is one of that step.

    losses: (step, validation loss) of log.txt.
    """
    if losses:
        step, _ = min(losses, key=lambda point: point[1])
        if path := checkpoint_paths(log_dir).get(step):
            link(path, BEST)


def checkpoint_paths(log_dir) -> dict[int, Path]:
    """{step: path} of the checkpoints in a directory, good or not."""
    paths = {}
    for path in Path(log_dir).glob("model_*.pt"):
        if match := re.fullmatch(r"model_(\d{5,})\.pt", path.name):
            paths[int(match[1])] = path
    return paths


def load_checkpoint(path) -> dict:
    """The content of a checkpoint, on the CPU. Nothing in the file is executed. Raises UserError if
    there is none, if it is damaged, or if it holds anything but plain data."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if part := archive.testzip():
                raise ValueError(f"the checksum of {part} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if (
            not isinstance(content, dict)
            or "model" not in content
            or not isinstance(content.get("config"), GPTConfig)
        ):
            raise ValueError("it has no model with a GPTConfig")
        return content
    except FileNotFoundError:
        names = ", ".join(HUB_NAMES)
        raise UserError(
            f"there is no checkpoint or folder {path}; by name from the Hub there are {names}"
        ) from None
    except PermissionError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except Exception as error:  # damaged files raise eight kinds
        raise UserError(f"{path} is damaged or not a checkpoint: {first_line(error)}") from None


@dataclass(frozen=True)
class Newest:
    """The newest good checkpoint of a directory, and why newer ones were passed over."""

    checkpoint: dict
    path: Path
    damaged: list[str]


def newest_checkpoint(log_dir) -> Newest | None:
    """The newest good checkpoint; None in a directory without any.

    Raises UserError with every reason if there are some and all are bad.
    """
    damaged = []
    for _, path in sorted(checkpoint_paths(log_dir).items(), reverse=True):
        try:
            return Newest(load_checkpoint(path), path, damaged)
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        reasons = "\n".join(damaged)
        raise UserError(
            f"no checkpoint in {log_dir} is good:\n{reasons}\n"
            "HINT: restore one, or choose another --log_dir to start afresh"
        )
    return None


def open_model(name: str) -> tuple[GPT, str, dict, Path | None]:
    """(model on the CPU, name of its tokenizer, the checkpoint it is from, the checkpoint's path)
    of --model.

    name: a checkpoint (the original scripts' too), a run's log directory (its newest good
    checkpoint), an exported folder, or OpenAI's weights by name from the Hub; of the last two the
    checkpoint is {} and its path None. Raises UserError if there is no such model, or if it is
    damaged.
    """
    path, checkpoint = Path(name), {}
    if path.is_dir() and (newest := newest_checkpoint(path)):
        checkpoint = newest.checkpoint
        path = newest.path
        for reason in newest.damaged:
            logging.getLogger("GPT124M").warning("WARNING: %s: passed over", reason)
    elif path.is_file() or (not path.is_dir() and name not in HUB_NAMES):
        checkpoint = load_checkpoint(path)
    if checkpoint:
        model = GPT(checkpoint["config"])
        try:
            model.load_weights(checkpoint["model"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return model.eval(), checkpoint.get("tokenizer", "gpt2"), checkpoint, path
    try:
        model, tokenizer = GPT.from_pretrained(name).eval(), tokenizer_of(name)
    except (
        Exception
    ) as error:  # what the Hub's HTTP library raises can't be named without naming the library
        where = "as a model folder" if path.is_dir() else "from the Hub"
        raise UserError(f"{name} can't be read {where}: {first_line(error)}") from None
    if model.config.vocab_size < get_tokenizer(tokenizer).n_vocab:
        raise UserError(
            f"{name} has a vocabulary of {model.config.vocab_size}: its tokenizer is not GPT-2's"
        )
    return model, tokenizer, {}, None


def load_model(name: str, device="cpu") -> tuple[GPT, str]:
    """(model on the device, name of its tokenizer) of --model: see open_model."""
    model, tokenizer, _, _ = open_model(name)
    return model.to(device), tokenizer
