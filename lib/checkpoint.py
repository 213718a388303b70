"""Checkpoints: the state of a run as plain data, written whole or not at all, verified when read.

    checkpoint = load_checkpoint("log/model_checkpoint.pt")      # a dict, verified
    model, tokenizer = load_model("log")                         # or a folder, or gpt2 from the Hub
    model, tokenizer = load_model("ckpt.pt", tokenizer="gpt2")   # nanoGPT's, which brings none

LOG_DIR/model_05000.pt is the state after 5000 updates; model_checkpoint.pt points to the newest
good one.
"""

import errno
import logging
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from GPT_Modules import GPT, GPTConfig, NotAGPT2
from lib.cli import UserError, one_line_error
from lib.files import if_possible, replace, whole_file
from lib.tokenizer import GPT2_TOKENS, Tokenizer, get_tokenizer, has_tokenizer

NEWEST = "model_checkpoint.pt"  # link to the newest checkpoint
BEST = "model_best.pt"  # link to the one with the lowest validation loss
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def save_checkpoint(log_dir, state: dict) -> Path:
    """Save the state of a run as LOG_DIR/model_NNNNN.pt, NNNNN its step, and link NEWEST to it.

    state: model, optimizer, scaler, config, step, tokenizer, precision, train_config, data.
    Raises OSError if the disk is full or fails, and UserError for weights that are not finite; then
    the earlier checkpoints are as they were.
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
            paths[number].unlink(missing_ok=True)


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


def checkpoint_paths(log_dir) -> dict[int, Path]:
    """{step: path} of the checkpoints in a directory, good or not."""
    paths = {}
    for path in Path(log_dir).glob("model_*.pt"):
        if match := re.fullmatch(r"model_(\d{5,})\.pt", path.name):
            paths[int(match[1])] = path
    return paths


class UnreadableCheckpoint(UserError):
    """A checkpoint that may be good, but can't be read now."""


# errors that say nothing about the content of a file
NOT_ITS_FAULT = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE}


def load_checkpoint(path) -> dict:
    """The content of a checkpoint, on the CPU; nanoGPT's has "model" and "config" alone.

    Nothing in the file is executed. Raises UserError if there is none, if it is damaged, if it
    holds anything but plain data, or if its model is not a GPT-2.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if part := archive.testzip():
                raise ValueError(f"the checksum of {part} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and "model_args" in content:
            content = from_nanogpt(content)
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
    except OSError as error:
        if error.errno in NOT_ITS_FAULT:
            raise UnreadableCheckpoint(f"{path} can't be read: {error.strerror}") from None
        raise UserError(f"{path} is damaged or not a checkpoint: {one_line_error(error)}") from None
    except NotAGPT2 as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # damaged files raise eight kinds
        raise UserError(f"{path} is damaged or not a checkpoint: {one_line_error(error)}") from None


def from_nanogpt(content: dict) -> dict:
    """What nanoGPT's train.py saved, in our words."""
    shape = content["model_args"]
    if not shape.get("bias", True):
        raise NotAGPT2("bias is False where a GPT-2 has True: it is another model")
    logging.getLogger("GPT124M").warning(
        "nanoGPT computes GELU exactly, and this model as GPT-2 does, by its tanh approximation"
    )
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = GPTConfig(**{name: shape[name] for name in names})
    return {"model": content["model"], "config": config}


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
        except UnreadableCheckpoint:
            raise  # to pass it over would lose the steps that it has
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        reasons = "\n".join(damaged)
        raise UserError(
            f"no checkpoint in {log_dir} is good:\n{reasons}\n"
            "HINT: restore one, or choose another --log_dir to start afresh"
        )
    return None


@dataclass(frozen=True)
class Opened:
    """A model, and what is known of it."""

    model: GPT  # on the CPU, in eval mode
    tokenizer: Tokenizer
    checkpoint: dict  # that it is from; {} if it is from a Hugging Face folder or the Hub
    path: Path | None  # of the checkpoint
    brings_tokenizer: bool  # False: the one that was given, or GPT-2's for what only has its rows


def open_model(name: str, tokenizer: str | None = None) -> Opened:
    """The model that --model names.

    name: a checkpoint (of the original scripts and of nanoGPT too), a run's log directory (its
    newest good checkpoint), a Hugging Face folder or a file of weights in it, or OpenAI's weights
    by name from the Hub. tokenizer: what get_tokenizer takes, for a model that brings none. Raises
    UserError if there is no such model, if it is damaged or not a GPT-2, or if nothing says which
    tokenizer is its own.
    """
    path = Path(name)
    if path.is_dir() and (newest := newest_checkpoint(path)):
        for reason in newest.damaged:
            logging.getLogger("GPT124M").warning("WARNING: %s: passed over", reason)
        return open_checkpoint(newest.checkpoint, newest.path, tokenizer)
    if path.is_dir():
        return open_folder(name, path, tokenizer)
    if path.name.endswith((".safetensors", ".bin", ".index.json")) and path.is_file():
        return open_folder(name, path.parent, tokenizer)
    if name in HUB_NAMES and not path.exists():
        return open_folder(name, None, tokenizer)
    return open_checkpoint(load_checkpoint(path), path, tokenizer)


def open_checkpoint(checkpoint: dict, path: Path, tokenizer: str | None) -> Opened:
    model = GPT(checkpoint["config"])
    try:
        model.load_weights(checkpoint["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    rows = model.config.vocab_size
    own = checkpoint.get("tokenizer")
    if own is None and tokenizer is None and rows in (GPT2_TOKENS, 50304):
        tokenizer = "gpt2"
        logging.getLogger("GPT124M").warning(
            "%s names no tokenizer: its %d rows are taken for GPT-2's tokens", path, rows
        )
    chosen = choose_tokenizer(own, tokenizer, rows, str(path))
    return Opened(model.eval(), chosen, checkpoint, path, own is not None)


def open_folder(name: str, folder: Path | None, tokenizer: str | None) -> Opened:
    """name: of the model; folder: where its files lie, None for the Hub."""
    if folder and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name} is a PEFT adapter, which changes a model that lies elsewhere: merge the two\n"
            "    from peft import AutoPeftModelForCausalLM\n"
            f'    AutoPeftModelForCausalLM.from_pretrained("{folder}")'
            '.merge_and_unload().save_pretrained("merged")\n'
            "and give --model merged --tokenizer gpt2 (or the tokenizer that the model had)"
        )
    try:
        model = GPT.from_pretrained(name)
    except NotAGPT2 as error:
        raise UserError(f"{name}: {error}") from None
    # what the Hub's HTTP library raises can't be named without naming the library
    except Exception as error:
        where = "as a model folder" if folder else "from the Hub"
        raise UserError(f"{name} can't be read {where}: {one_line_error(error)}") from None
    own = folder if folder and has_tokenizer(folder) else None
    if folder is None:
        own = "gpt2"
    chosen = choose_tokenizer(own, tokenizer, model.config.vocab_size, name)
    return Opened(model.eval(), chosen, {}, None, own is not None)


def choose_tokenizer(own, given, rows: int, name: str) -> Tokenizer:
    """The tokenizer of a model whose token table has so many rows.

    own: what get_tokenizer takes, of the one that the model brings; given: of the one that the user
    names; None where there is none.
    """
    if own is None and given is None:
        raise UserError(
            f"{name} brings no tokenizer: if its {rows:,} tokens are GPT-2's, add --tokenizer gpt2,"
            " else --tokenizer with the folder of its tokenizer.json"
        )
    tokenizer = get_tokenizer(given if own is None else own)
    if given is not None and get_tokenizer(given).identity != tokenizer.identity:
        raise UserError(
            f"{name} brings its own tokenizer ({tokenizer.identity}), which is not {given}"
        )
    if rows < tokenizer.n_vocab:
        raise UserError(
            f"{name} has {rows:,} rows in its token table, and its tokenizer ({tokenizer.name})"
            f" {tokenizer.n_vocab:,} ids: they don't belong together"
        )
    return tokenizer


def load_model(name: str, device="cpu", tokenizer: str | None = None) -> tuple[GPT, Tokenizer]:
    """(model on the device in eval mode, its tokenizer) of --model and --tokenizer: see
    open_model."""
    opened = open_model(name, tokenizer)
    return opened.model.to(device), opened.tokenizer
