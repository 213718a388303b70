"""log.txt, what a run measured, and run.json, what was run.

log = Log("log", first_step=0)
log.write(250, val=3.9518)                      # appends the line `250 val 3.9518`
read_log("log")["val"]                          # [(250, 3.9518)]
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.cli import UserError
from lib.files import whole_file

# Streams measured before the update of their step. A run that resumes there may not measure them
# again, so they are kept until it does.
BEFORE_THE_UPDATE = ("val", "hella", "eval_s", "save_s")


class Log:
    """LOG_DIR/log.txt of a run that starts, or resumes, at first_step.

    The first write drops the lines that the run will write again: those from first_step on, except
    streams BEFORE_THE_UPDATE at first_step that this write does not replace. log_dir None: write
    nothing, for the ranks that don't keep the log.
    """

    def __init__(self, log_dir, first_step: int):
        self.path = None if log_dir is None else Path(log_dir) / "log.txt"
        self.first_step = first_step
        self.file = None  # opened by the first write
        self.streams = {}  # what the file has: {stream: [(step, value), ...]}

    def write(self, step: int, **values: float) -> None:
        """Append the values of a step, {stream: value}. Raises UserError if the disk is full."""
        if self.path is None:
            return
        try:
            if self.file is None:
                self.drop_replaced_lines(replaced=values)
                self.file = open(self.path, "a")
            for stream, value in values.items():
                self.file.write(format_line(step, stream, value))
                self.streams.setdefault(stream, []).append((step, float(f"{value:.6g}")))
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written: {error.strerror}.\n"
                "HINT: make room; the same command resumes from the last checkpoint",
                code=1,
            ) from None

    def drop_replaced_lines(self, replaced: dict[str, float]) -> None:
        with whole_file(self.path) as file:
            for step, stream, value in read_lines(self.path):
                before = stream in BEFORE_THE_UPDATE and stream not in replaced
                if step < self.first_step or (step == self.first_step and before):
                    file.write(format_line(step, stream, value).encode())
                    self.streams.setdefault(stream, []).append((step, value))

    def sync(self) -> None:
        """Flush to the disk before a checkpoint, so that the log has every step that it has."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())


def format_line(step: int, stream: str, value: float) -> str:
    return f"{step} {stream} {value:.6g}\n"


def read_lines(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, stream, value) of each line of a log; nothing if there is no file.

    Lines that a power cut or an editor has damaged are skipped.
    """
    if not path.exists():
        return
    with open(path, errors="replace") as file:
        for line in file:
            try:
                step, stream, value = line.split()
                if line.endswith("\n"):  # the last line may be cut off in the middle of a number
                    yield int(step), stream, float(value)
            except ValueError:
                continue


def read_log(log_dir) -> dict[str, list[tuple[int, float]]]:
    """{stream: [(step, value), ...]} of LOG_DIR/log.txt, in the order of the file."""
    streams = {}
    for step, stream, value in read_lines(Path(log_dir) / "log.txt"):
        streams.setdefault(stream, []).append((step, value))
    return streams


@dataclass(frozen=True)
class RunFacts:
    """What identifies a run and its machine: LOG_DIR/run.json."""

    config: dict  # vars of the TrainConfig, without_paths
    model: dict  # vars of the GPTConfig
    data: dict  # Stream.identity(), with the data set's public name
    parameters: int
    tokens_per_step: int
    hardware: str
    precision: str
    compiled: bool
    versions: dict
    val_bytes_per_token: float | None = None  # UTF-8 bytes of validation text per predicted token

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per token as bits per byte of text, which compares models with different
        tokenizers; None if it is not known how long the text is. Ends of documents are predicted
        tokens without a byte."""
        if not self.val_bytes_per_token:
            return None
        return loss / math.log(2) / self.val_bytes_per_token


def without_paths(config: dict) -> dict:
    """A configuration that is safe to publish: absolute paths keep their last part only."""
    return {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in config.items()
    }


def write_run(log_dir, facts: RunFacts) -> None:
    with whole_file(Path(log_dir) / "run.json") as file:
        file.write(json.dumps(dataclasses.asdict(facts), indent=1).encode() + b"\n")


def read_run(log_dir) -> RunFacts | None:
    """The facts of a run; None where there is no run.json. Raises UserError if it is damaged."""
    path = Path(log_dir) / "run.json"
    if not path.exists():
        return None
    try:
        return RunFacts(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read: {error}; delete it if it is damaged") from None
