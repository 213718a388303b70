"""Where a run starts: new weights, those of --init_from, or its newest good checkpoint; and what
must be the same to resume.

`config` is the TrainConfig of train.py, which imports this file.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import newest_checkpoint
from lib.cli import UserError, count
from lib.log import read_lines
from lib.pretrained import open_model
from lib.tokenizer import Tokenizer

MODEL_FLAGS = tuple(field.name for field in dataclasses.fields(GPTConfig))

# Settings a resumed run may change. Only max_steps affects what the remaining steps compute: it may
# only grow, and the schedule stretches with it.
MAY_CHANGE = {
    "preset", "data_dir", "log_dir", "batch_size", "max_steps", "val_every", "val_tokens",
    "hellaswag_every", "hellaswag_data", "sample_every", "save_every", "keep_every", "keep_best",
    "eval_only", "device", "compile", "recompute", "timeout",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The state that a run starts from."""

    model: GPT  # on the CPU
    source: str  # where the weights come from, for messages
    precision: str  # bfloat16, float16 or float32
    step: int = 0  # completed updates
    best_val_loss: float = math.inf
    path: Path | None = None  # of the checkpoint; None: a new run
    optimizer: dict = field(default_factory=dict)  # its state
    scaler: dict = field(default_factory=dict)  # its state
    notes: list[str] = field(default_factory=list)  # for the run to print

    def restore(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Load the optimizer's and the loss scaler's state; a new run has none."""
        if self.path:
            optimizer.load_state_dict(self.optimizer)
            scaler.load_state_dict(self.scaler)


def find_start(
    config, identity: dict, tokenizer_spec: str, tokenizer: Tokenizer, new_precision: str
) -> Start:
    """The state in the newest good checkpoint of log_dir, or that of a run before its first update.

    identity, tokenizer_spec, tokenizer: of the training tokens. new_precision: of a new run. Raises
    UserError if the run can't be resumed, or started.
    """
    found = newest_checkpoint(config.log_dir)
    if found is None:
        check_nothing_lost(config.log_dir)
        return new_run(config, tokenizer_spec, tokenizer, new_precision)
    checkpoint = found.checkpoint
    check_same_run(config, identity, checkpoint, found.path)
    step = checkpoint["step"]
    notes = [f"WARNING: {reason}: skipped" for reason in found.skipped]
    notes.append(f"resuming from {found.path}, after {count(step, 'step')}")
    if checkpoint["precision"] != new_precision:
        notes.append(
            f"the run began in {checkpoint['precision']} and continues in it; a new one would use "
            f"{new_precision} here"
        )
    before = checkpoint["train_config"]["max_steps"]
    if before != config.max_steps:
        schedule = "decay" if config.schedule == "linear" else "cosine"
        notes.append(f"max_steps was {before}: the {schedule} now ends at {config.max_steps}")
    model = GPT(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return Start(
        model,
        source=str(found.path),
        precision=checkpoint["precision"],
        step=step,
        best_val_loss=checkpoint.get("best_val_loss", math.inf),
        path=found.path,
        optimizer=checkpoint["optimizer"],
        scaler=checkpoint["scaler"],
        notes=notes,
    )


def check_nothing_lost(log_dir: str) -> None:
    """Raise UserError if a run has saved checkpoints in a directory that has none now."""
    path = Path(log_dir) / "log.txt"
    if any(name == "save_s" for _, name, _ in read_lines(path)):
        raise UserError(
            f"{path} says that checkpoints were saved, but {log_dir} has none: nothing is changed"
            "\nHINT: restore model_NNNNN.pt or model_checkpoint.pt, or choose another --log_dir"
        )


def new_run(config, tokenizer_spec: str, tokenizer: Tokenizer, precision: str) -> Start:
    """The state before the first update: new weights, or those of --init_from."""
    n_vocab = tokenizer.n_vocab
    given = {name: getattr(config, name) for name in MODEL_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    notes = []
    if config.init_from == "scratch":
        if (config.vocab_size or n_vocab) < n_vocab:
            raise UserError(
                f"--vocab_size {config.vocab_size} is less than the tokenizer's {n_vocab} tokens"
            )
        padded = math.ceil(n_vocab / 64) * 64  # GPUs are faster with multiples of 64
        torch.manual_seed(config.seed)
        try:
            model = GPT(GPTConfig(**{"vocab_size": padded, "block_size": config.seq_len} | given))
        except ValueError as error:
            raise UserError(f"--{error}") from None
    else:
        loaded = open_model(config.init_from, tokenizer_spec)
        notes = loaded.notes
        if not loaded.own_tokenizer:
            notes = [
                *notes,
                f"{config.init_from} comes without a tokenizer; assuming the one of "
                f"{config.data_dir} ({tokenizer.name})",
            ]
        model = loaded.model
        for name, value in given.items():
            found = getattr(model.config, name)
            if value != found:
                raise UserError(
                    f"--{name} {value} contradicts --init_from {config.init_from}, which has "
                    f"{found}: leave the flag out"
                )
    if config.seq_len > model.config.block_size:
        raise UserError(
            f"--seq_len {config.seq_len} is more than the model's block_size "
            f"{model.config.block_size}"
        )
    return Start(model, config.init_from, precision, notes=notes)


def check_same_run(config, identity: dict, checkpoint: dict, path: Path) -> None:
    """Raise UserError naming each setting in which this run differs from the checkpoint's.

    identity: the data's, of Stream.identity. path: the checkpoint's, for the message.
    """
    if "optimizer" not in checkpoint:
        raise UserError(
            f"{path} has weights only, no run to resume: use --init_from {path} and another "
            "--log_dir"
        )
    defaults = {setting.name: setting.default for setting in dataclasses.fields(config)}
    before = defaults | checkpoint["train_config"]  # an older version may have had fewer settings
    was = {name: before[name] for name in defaults if name not in MAY_CHANGE}
    now = {name: getattr(config, name) for name in was}
    for name in MODEL_FLAGS:
        was[name] = getattr(checkpoint["config"], name)
        now[name] = was[name] if now[name] is None else now[name]  # left out: the checkpoint's
    for name, value in identity.items():
        was[f"data ({name})"] = checkpoint["data"].get(name, value)
        now[f"data ({name})"] = value
    differences = [
        f"{name} was {was[name]}, is {now[name]}" for name in was if was[name] != now[name]
    ]
    if config.max_steps < before["max_steps"]:
        differences.append(
            f"max_steps was {before['max_steps']}, is {config.max_steps}, and may only grow"
        )
    if differences:
        raise UserError(
            f"{path} is from a run with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --log_dir for a new run, or give the old settings to resume this "
            "one"
        )
