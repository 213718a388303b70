"""What a run has measured: log.txt and run.json, their curve, and the arithmetic of speed.

    python metrics.py log                           the last value of each stream; draws the curve
    python metrics.py log --tracker tensorboard     replays the log into a tracker (or wandb)
    python metrics.py log --tracker wandb --follow  and keeps up with the run

A line of log.txt is `step stream value`: `250 val 3.9518`.
"""

import collections
import dataclasses
import io
import json
import math
import os
import re
import secrets
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from GPT_Modules import GPTConfig
from lib.cli import UserError, command, one_line_error, parse
from lib.device import device_name
from lib.files import whole_file
from lib.shards import FINEWEB_EDU
from lib.tokenizer import UNIT

# OpenAI's GPT-2 124M: loss in nats per token on build-nanogpt's validation shard, and HellaSwag
# acc_norm in the completion style. GPT-3 124M: HellaSwag of table H.1 of Brown et al. 2020.
GPT2_VAL_LOSS = 3.2924
GPT2_HELLASWAG = 0.2955
GPT3_HELLASWAG = 0.337

# Peak dense bf16 TFLOP/s as published by the makers. A card not listed gets no MFU rather than a
# wrong one.
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "RTX A6000": 155,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "GH200": 989,
    "H20": 148, "B200": 2250, "L4": 121, "L40": 181, "L40S": 362, "RTX 6000 Ada": 364,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
}  # fmt: skip


@dataclass(frozen=True)
class MetricsConfig:
    log_dir: str = "log"  # directory of a run
    tracker: Literal["wandb", "tensorboard"] | None = None  # send every value there
    follow: bool = False  # go on until the run's last step is there, or Ctrl-C


# ---- the log ----


class Log:
    """LOG_DIR/log.txt. Where a run goes on from first_step, the lines of that step and later ones
    are dropped, because it measures them again.

    log_dir None writes nothing: for the ranks that don't keep the log.
    """

    def __init__(self, log_dir, first_step: int):
        self.file = None
        self.curve = Curve()
        if log_dir is None:
            return
        path = Path(log_dir) / "log.txt"
        with whole_file(path) as file:
            for step, stream, value in read_lines(path):
                if step < first_step:
                    file.write(format_line(step, stream, value).encode())
                    self.curve.add(step, stream, value)
        self.file = open(path, "a")

    def write(self, step: int, **values: float) -> None:
        """Append the values of a step, {stream: value}. Raises UserError if the disk is full."""
        if self.file is None:
            return
        try:
            for stream, value in values.items():
                line = format_line(step, stream, value)
                self.file.write(line)
                self.curve.add(step, stream, float(line.split()[2]))
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.file.name} can't be written: {error.strerror}.\n"
                "HINT: make room; the same command goes on from the last checkpoint",
                code=1,
            ) from None

    def sync(self) -> None:
        """Flush to the disk: before a checkpoint, so that the log has every step that it has."""
        self.file.flush()
        os.fsync(self.file.fileno())


def format_line(step: int, stream: str, value: float) -> str:
    return f"{step} {stream} {value:.6g}\n"


def read_lines(path: Path, streams: str = r"\w+") -> Iterator[tuple[int, str, float]]:
    """(step, stream, value) of each whole line of a log; of none, where there is no file.

    streams: only these, as a pattern: train|val. Lines that a power cut or an editor has torn or
    filled with something else are passed over. A block at a time: a log may have millions of lines.
    """
    number = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?|-?inf|nan"
    line = re.compile(rf"^(\d+) ({streams}) ({number})\n".encode(), re.MULTILINE)
    if not path.exists():
        return
    with open(path, "rb") as file:
        rest = b""
        while block := file.read(2**20):
            block = rest + block
            end = block.rfind(b"\n") + 1
            for match in line.finditer(block, 0, end):
                yield int(match[1]), match[2].decode(), float(match[3])
            rest = block[end:]


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
    data: dict  # TokenLoader.identity(), with the data set's public name
    parameters: int
    tokens_per_step: int
    hardware: str
    precision: str
    compiled: bool
    versions: dict


def without_paths(config: dict) -> dict:
    """A configuration that may be published: of an absolute path only its last part."""
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


# ---- speed ----


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """Floating point operations to learn from one token: 6 N + 12 L H Q T.

    Chowdhery et al. 2022, appendix B. N: the weights of the matrices that multiply, 12 L C^2 + V C;
    no positions, biases or norms. 124M: 854.65e6.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 6 * (12 * L * C * C + V * C) + 12 * L * C * seq_len


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that CUDA gives it; None if it is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    variants = {"Ti", "D", "Laptop", "MIG", "SUPER", "NVL"}  # other rates than the name alone has
    known = [name for name in known if words & variants <= set(name.split())]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


class Speed:
    """Tokens per second, MFU, and the time that is left, from how long steps take."""

    def __init__(self, model: GPTConfig, train, ranks, precision: str):
        """train: the TrainConfig of the run. ranks: its Ranks."""
        self.tokens_per_step = train.total_batch_size
        self.recent = collections.deque(maxlen=50)  # seconds of the last steps
        self.peak_tok_s = None  # tokens per second at the GPUs' peak
        if ranks.device.type == "cuda" and precision != "float32":
            if peak := peak_flops(device_name(ranks.device)):
                self.peak_tok_s = peak * ranks.world_size / flops_per_token(model, train.seq_len)

    def measure(self, seconds: float) -> dict[str, float]:
        """The log's values for a step of so many seconds: tok_s; mfu where the peak is known."""
        self.recent.append(seconds)
        values = {"tok_s": self.tokens_per_step / seconds}
        if self.peak_tok_s:
            values["mfu"] = values["tok_s"] / self.peak_tok_s
        return values

    def line(self, steps_left: int) -> str:
        """The last step's speed for people, and the time left at the median of the recent steps."""
        seconds = self.recent[-1]
        tok_s = self.tokens_per_step / seconds
        mfu = f" | MFU {tok_s / self.peak_tok_s:.1%}" if self.peak_tok_s else ""
        left = duration(steps_left * statistics.median(self.recent))
        return f"{1000 * seconds:.0f} ms | {tok_s:,.0f} tok/s{mfu} | ETA {left}"


def duration(seconds: float) -> str:
    """4000 -> 1h07m"""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{int(seconds) % 60:02d}s"


# ---- the curve ----


class Thinned:
    """A stream of (step, value) in bounded memory: when it is full, neighbours are averaged.

    So a curve is drawn in the same time after a thousand steps and after a million.
    """

    FULL = 4000  # points: more than a picture has pixels across

    def __init__(self):
        self.steps = []
        self.values = []
        self.width = 1  # values that a point is the mean of
        self.waiting = []  # values of the next point

    def add(self, step: int, value: float) -> None:
        self.waiting.append(value)
        if len(self.waiting) < self.width:
            return
        self.steps.append(step)
        self.values.append(statistics.fmean(self.waiting))
        self.waiting = []
        if len(self.steps) == self.FULL:
            self.steps = self.steps[1::2]
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(one + other) / 2 for one, other in pairs]
            self.width *= 2


class Curve:
    """The points of a log that are drawn: train thinned, each validation, each HellaSwag."""

    def __init__(self):
        self.train = Thinned()
        self.val = []  # (step, loss) each
        self.hella = []  # (step, acc_norm) each

    def add(self, step: int, stream: str, value: float) -> None:
        if not math.isfinite(value):
            return
        if stream == "train":
            self.train.add(step, value)
        elif stream == "val":
            self.val.append((step, value))
        elif stream == "hella":
            self.hella.append((step, value))


def read_curve(log_dir) -> Curve:
    curve = Curve()
    for step, stream, value in read_lines(Path(log_dir) / "log.txt", "train|val|hella"):
        curve.add(step, stream, value)
    return curve


def plot(log_dir, curve: Curve | None = None) -> Path:
    """Draw LOG_DIR/curve.png: loss, and HellaSwag if it was measured, over steps and tokens.

    curve: its points, if they are at hand (default: read from log.txt). Returns the path.
    """
    from matplotlib.figure import Figure

    curve = curve or read_curve(log_dir)
    run = read_run(log_dir)
    figure = Figure(figsize=(12 if curve.hella else 8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if curve.hella else 1, squeeze=False)[0]
    # OpenAI's losses are of this data's validation shard
    comparable = False
    if run:
        comparable = (run.data["dataset"], run.data["tokenizer"]) == (FINEWEB_EDU, "gpt2")
    draw_loss(axes[0], curve, run, comparable)
    if curve.hella:
        draw_hellaswag(axes[1], curve.hella, comparable)
    last = max([1, *curve.train.steps, *(step for step, _ in curve.val + curve.hella)])
    for axis in axes:
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend(framealpha=0.9, edgecolor="none")
        if run:
            add_tokens(axis, run.tokens_per_step)
    if run:
        directory = Path(log_dir).resolve()
        name = f"{directory.parent.name}/{directory.name}"
        figure.suptitle(f"{name}: {run.parameters / 1e6:,.1f}M parameters, {run.hardware}")
    path = Path(log_dir) / "curve.png"
    picture = io.BytesIO()  # first, so that the file is written in a moment: a viewer may write too
    figure.savefig(picture, format="png", dpi=120)
    with whole_file(path) as file:
        file.write(picture.getvalue())
    return path


def draw_loss(axis, curve: Curve, run: RunFacts | None, comparable: bool) -> None:
    if curve.train.steps:
        smoothed = smooth(curve.train.values)
        axis.plot(curve.train.steps, curve.train.values, color="tab:blue", alpha=0.2, linewidth=0.8)
        label = f"train, smoothed ({smoothed[-1]:.4f})"
        axis.plot(curve.train.steps, smoothed, color="tab:blue", label=label)
    if curve.val:
        steps, losses = zip(*curve.val, strict=True)
        label = f"validation ({losses[-1]:.4f})"
        axis.plot(steps, losses, "o-", color="tab:orange", markersize=4, label=label)
        low = min(losses)
        bottom = min(low, GPT2_VAL_LOSS) if comparable else low
        axis.set_ylim(bottom - 0.3, max(min(losses[0], low + 3), low + 0.5))
    if comparable:
        add_reference(axis, GPT2_VAL_LOSS, "tab:red", "GPT-2")
    unit = UNIT.get(run.data["tokenizer"], "token") if run else "token"
    axis.set(xlabel="step", ylabel=f"loss (nats per {unit})")


def draw_hellaswag(axis, points: list[tuple[int, float]], comparable: bool) -> None:
    steps, scores = zip(*points, strict=True)
    label = f"this model ({scores[-1]:.4f})"
    axis.plot(steps, scores, "o-", color="tab:blue", markersize=4, label=label)
    if comparable:
        add_reference(axis, GPT2_HELLASWAG, "tab:red", "GPT-2")
        add_reference(axis, GPT3_HELLASWAG, "tab:green", "GPT-3")
    axis.set(xlabel="step", ylabel="HellaSwag acc_norm")


def add_reference(axis, value: float, color: str, name: str) -> None:
    axis.axhline(value, color=color, linestyle="--", label=f"OpenAI {name} 124M ({value})")


def add_tokens(axis, tokens_per_step: int) -> None:
    """A second scale at the top: the steps in tokens."""
    from matplotlib.ticker import EngFormatter

    both_ways = (lambda step: step * tokens_per_step, lambda tokens: tokens / tokens_per_step)
    top = axis.secondary_xaxis("top", functions=both_ways)
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))


def smooth(values: list[float]) -> list[float]:
    """Debiased exponential moving average with a window of 1/50 of the values."""
    keep = 1 - 1 / max(1, len(values) // 50)
    total = 0.0
    weight = 0.0
    smoothed = []
    for value in values:
        total = total * keep + value
        weight = weight * keep + 1
        smoothed.append(total / weight)
    return smoothed


# ---- trackers ----


class TensorBoard:
    """Event files in LOG_DIR/tensorboard, written anew, so that a replay has each step once."""

    def __init__(self, log_dir: Path, run: RunFacts | None):
        import shutil

        from tensorboard.summary import Writer

        shutil.rmtree(log_dir / "tensorboard", ignore_errors=True)
        self.writer = Writer(str(log_dir / "tensorboard"))

    def send(self, step: int, values: dict[str, float]) -> None:
        for stream, value in values.items():
            self.writer.add_scalar(stream, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run of the log directory's own id, so that a second replay goes on in it."""

    def __init__(self, log_dir: Path, run: RunFacts | None):
        import wandb

        path = log_dir / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        self.run = wandb.init(
            project="GPT124M",
            name=log_dir.resolve().name,
            id=path.read_text().strip(),
            resume="allow",
            config=dataclasses.asdict(run) if run else None,
            dir=str(log_dir),
        )

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def replay(config: MetricsConfig) -> None:
    """Send the whole log to the tracker, a step at a time; with follow, until the last step."""
    log_dir = Path(config.log_dir)
    run = read_run(log_dir)
    last_step = run.config["max_steps"] if run else 0
    try:
        tracker = TRACKERS[config.tracker](log_dir, run)
    except ImportError:
        raise UserError(
            f"--tracker {config.tracker}: the package {config.tracker} is not installed: "
            f"pip install {config.tracker}"
        ) from None
    except Exception as error:  # of wandb's own kinds: no key, no network
        raise UserError(f"--tracker {config.tracker}: {one_line_error(error)}") from None
    try:
        sent = 0  # the tracker has the steps below it
        ended = False
        while not ended:
            steps = {}
            for step, stream, value in read_lines(log_dir / "log.txt"):
                if step >= sent:
                    steps.setdefault(step, {})[stream] = value
            newest = max(steps, default=0)
            ended = not config.follow or newest >= last_step
            for step in sorted(steps):
                if step < newest or ended:  # the newest step may still grow
                    tracker.send(step, steps[step])
                    sent = step + 1
            if not ended:
                time.sleep(2)
    except KeyboardInterrupt:
        pass
    finally:
        tracker.close()


@command
def main(argv=None) -> int:
    config = parse(MetricsConfig, argv, __doc__, positional="log_dir")
    if config.follow and not config.tracker:
        raise UserError(
            "--follow sends what a run writes to a --tracker: give one, wandb or tensorboard"
        )
    newest = {}
    for step, stream, value in read_lines(Path(config.log_dir) / "log.txt"):
        newest[stream] = (step, value)
    if not newest:
        raise UserError(
            f"{config.log_dir} has no log.txt with values in it: is it the --log_dir of a run?"
        )
    for stream, (step, value) in newest.items():
        print(f"{stream:8s} {value:<12.6g} at step {step}")
    if newest.keys() & {"train", "val"}:
        print(f"drawn: {plot(config.log_dir)}")
    if config.tracker:
        replay(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
