"""Checkpoints: the state of a run as plain data, whole and verified or not there at all.

    checkpoint = load_checkpoint("log/model_checkpoint.pt")      # a dict, verified
    model, tokenizer = load_model("log/model_checkpoint.pt")     # or an exported folder, or gpt2 from the Hub

LOG_DIR/model_05000.pt is the state after 5000 updates; model_checkpoint.pt points to the newest
good one.
"""

import logging
import math
import os
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from GPT_Modules import GPT, GPTConfig
from lib.cli import UserError, first_line
from lib.files import if_possible, replace, whole_file
from lib.tokenizer import get_tokenizer, tokenizer_of

NEWEST, BEST = "model_checkpoint.pt", "model_best.pt"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def save_checkpoint(log_dir, state: dict, best: bool = False) -> Path:
    """Save the state of a run as LOG_DIR/model_NNNNN.pt (NNNNN: its step), verify it, link
    model_checkpoint.pt to it.

    state: model, optimizer, scaler, config, step, val_loss, val_step, tokenizer, train_config,
    precision, data. best: save it without the optimizer, as model_best.pt instead. Raises OSError
    if the disk is full or fails, and UserError for weights or moments that are not finite; then
    nothing has changed on the disk.
    """
    check_finite(state)
    path = Path(log_dir) / f"model_{state['step']:05d}.pt"
    if best:
        path, state = path.with_name(BEST), without_optimizer(state)
    try:
        with whole_file(path) as file:
            torch.save(state, file)
            file.flush()
            with ThreadPoolExecutor(
                1
            ) as pool:  # the checksums are compared while the disk is still writing
                written = pool.submit(os.fsync, file.fileno())
                verify(file.name)
                written.result()
    except Exception as error:
        # torch's zip writer hides the OSError of a full disk behind a RuntimeError ("unexpected
        # pos")
        if not isinstance(error, OSError | zipfile.BadZipFile) and not isinstance(
            error.__context__, OSError
        ):
            raise
        free = shutil.disk_usage(log_dir).free
        raise OSError(
            f"{path} could not be saved ({error}); {free:,} bytes are free there"
        ) from error
    if not best:
        point_newest(path)
    return path


def remove_older(log_dir, step: int, keep_every: int) -> list[OSError]:
    """Remove the checkpoints before `step` but for the last one and each multiple of keep_every (0:
    none). Returns the errors of those that stay."""
    paths, errors = checkpoint_paths(log_dir), []
    for older in sorted(s for s in paths if s < step)[:-1]:
        if not (keep_every and older % keep_every == 0):
            try:
                file = open(paths[older], "rb")
                paths[
                    older
                ].unlink()  # the name goes now; freeing the blocks is slow: a thread closes the last handle
                threading.Thread(target=file.close).start()
            except OSError as error:
                errors.append(error)
    return errors


def best_loss(log_dir) -> float:
    """The validation loss of model_best.pt, which the next best has to beat; infinite if there is
    none."""
    path = Path(log_dir) / BEST
    return load_checkpoint(path)["val_loss"] if path.exists() else math.inf


def check_finite(state: dict) -> None:
    moments = [
        t
        for values in state["optimizer"]["state"].values()
        for t in values.values()
        if torch.is_tensor(t)
    ]
    norms = torch._foreach_norm([*state["model"].values(), *moments])
    if not all(torch.isfinite(norm) for norm in norms):
        what = f"the state after step {state['step']} has numbers that are not finite"
        raise UserError(f"{what}: it is not saved, and the run ends", code=1, alone=True)


def verify(path) -> None:
    """Compare every part of a checkpoint with its checksum, which torch.load does not; raises if
    one is wrong."""
    with zipfile.ZipFile(path) as archive:
        parts = sorted(archive.infolist(), key=lambda part: part.file_size)

    def check(some):
        with zipfile.ZipFile(path) as archive:
            for part in some:
                with archive.open(part) as file:  # raises at its end if the checksum is wrong
                    while file.read(2**20):
                        pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, (parts[first::4] for first in range(4))))


def point_newest(path: Path) -> None:
    """Make model_checkpoint.pt, beside it, a relative link to this checkpoint, in one move; where
    there are no links, a copy of what a model needs."""
    newest, temporary = path.with_name(NEWEST), path.with_name(NEWEST + ".tmp")
    temporary.unlink(missing_ok=True)
    with if_possible(
        "symbolic links", f"{NEWEST} is a copy of the newest checkpoint, without the optimizer"
    ):
        temporary.symlink_to(path.name)
        return replace(temporary, newest)
    with whole_file(newest) as file:
        torch.save(without_optimizer(load_checkpoint(path)), file)


def without_optimizer(state: dict) -> dict:
    """The state without optimizer and scaler: what a model needs, a third of the size."""
    return {name: value for name, value in state.items() if name not in ("optimizer", "scaler")}


def checkpoint_paths(log_dir) -> dict[int, Path]:
    """{step: path} of the checkpoints in a directory, good or not."""
    names = (
        (re.fullmatch(r"model_(\d{5,})\.pt", path.name), path)
        for path in Path(log_dir).glob("model_*.pt")
    )
    return {int(match[1]): path for match, path in names if match}


def load_checkpoint(path) -> dict:
    """The content of a checkpoint, on the CPU. Nothing in the file is executed. Raises UserError if
    there is none, if it is damaged, or if it holds anything but plain data."""
    try:
        verify(path)
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


def newest_checkpoint(log_dir) -> tuple[dict | None, Path | None, list[str]]:
    """(content, path, reasons why newer ones were passed over) of the newest good checkpoint;
    (None, None, []) in a directory without any. Raises UserError with every reason if all are
    bad."""
    reasons = []
    for _, path in sorted(checkpoint_paths(log_dir).items(), reverse=True):
        try:
            return load_checkpoint(path), path, reasons
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(
            "\n".join([f"no checkpoint in {log_dir} is good:", *reasons])
            + "\nHINT: restore one, or choose another --log_dir to start afresh"
        )
    return None, None, []


def open_model(name: str) -> tuple[GPT, str, dict, Path | None]:
    """(model on the CPU, name of its tokenizer, the checkpoint it is from, the checkpoint's path)
    of --model.

    name: a checkpoint (the original scripts' too), a run's log directory (its newest good
    checkpoint), an exported folder, or OpenAI's weights by name from the Hub; of the last two the
    checkpoint is {} and its path None. Raises UserError if there is no such model, or if it is
    damaged.
    """
    path, checkpoint = Path(name), {}
    if path.is_dir() and checkpoint_paths(path):
        checkpoint, path, damaged = newest_checkpoint(path)
        for reason in damaged:
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
