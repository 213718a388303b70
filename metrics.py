"""What a run has measured: log.txt and run.json, their curve, and the arithmetic of speed.

    python metrics.py log                                  the last value of each stream; redraws log/curve.png
    python metrics.py log --tracker tensorboard            replays the log into a tracker (or wandb)
    python metrics.py log --tracker wandb --follow         and keeps up with the run

A line of log.txt is `step stream value`: `250 val 3.9518`.
"""

import collections
import contextlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from GPT_Modules import GPT, GPTConfig
from lib.cli import UserError, command, count, first_line, parse
from lib.files import whole_file
from lib.ranks import device_name
from lib.shards import FINEWEB_EDU, public_name
from lib.tokenizer import UNIT

# OpenAI's GPT-2 124M on build-nanogpt's validation shard (loss, nats per token) and on HellaSwag
# (acc_norm, completion style); GPT-3 124M on HellaSwag from table H.1 of Brown et al. 2020.
GPT2_VAL_LOSS, GPT2_HELLASWAG, GPT3_HELLASWAG = 3.2924, 0.2955, 0.337

# Peak dense bf16 TFLOP/s as published by the makers. A card not listed gets no MFU rather than a
# wrong one.
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "RTX A6000": 155, "H100": 989,
    "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "GH200": 989, "H20": 148, "B200": 2250, "L4": 121,
    "L40": 181, "L40S": 362, "RTX 6000 Ada": 364, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
}  # fmt: skip


LINE = r"\d+ \w+ (-?\d+(\.\d+)?(e[-+]\d+)?|-?inf|nan)\n"  # of log.txt: step, stream, value


@dataclass(frozen=True)
class MetricsConfig:
    log_dir: str = "log"  # directory of a run
    tracker: Literal["wandb", "tensorboard"] | None = None  # send every value there
    follow: bool = False  # go on until the run has ended, or Ctrl-C


# ---- the log ----


class Log:
    """LOG_DIR/log.txt, continued from a step: what was measured at this step or later is measured
    again.

    log_dir None writes nothing: for the ranks that don't keep the log. not_again: streams that are
    not measured again at the step itself, and keep their value there.
    """

    def __init__(self, log_dir, first_step: int, not_again=()):
        self.file = None
        if log_dir is None:
            return
        path = Path(log_dir) / "log.txt"
        with whole_file(path) as file:
            for line in whole_lines(path):
                step, stream, _ = line.split()
                if int(step) < first_step or (int(step) == first_step and stream in not_again):
                    file.write(line.encode())
        self.file = open(
            path, "a", buffering=2**24
        )  # bytes of lines that can wait for a disk with room

    def write(self, step: int, **values: float) -> None:
        if self.file is None:
            return
        for stream, value in values.items():
            self.file.write(f"{step} {stream} {value:.6g}\n")
        with contextlib.suppress(OSError):  # while the disk is full, lines wait in the buffer
            self.file.flush()

    def sync(self) -> None:
        """Flush to the disk: before a checkpoint, so that the log has every step that the
        checkpoint has."""
        self.file.flush()
        os.fsync(self.file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a log: not those that a power cut or an editor has torn or filled with
    something else."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if re.fullmatch(LINE, line)]


def read_log(log_dir) -> dict[str, list[tuple[int, float]]]:
    """{stream: [(step, value), ...]} of LOG_DIR/log.txt, in the order of the file."""
    streams = {}
    for line in whole_lines(Path(log_dir) / "log.txt"):
        step, stream, value = line.split()
        streams.setdefault(stream, []).append((int(step), float(value)))
    return streams


def describe(config: dict, ranks, model: GPT, data: dict, precision: str, compiled: bool) -> dict:
    """The facts of a run for run.json. It may be published, so absolute paths are cut to their last
    part.

    config: vars of its TrainConfig. data: TokenLoader.identity().
    """
    paths = {
        name: path for name, path in config.items() if isinstance(path, str) and os.path.isabs(path)
    }
    return {
        "config": config | {name: os.path.basename(path) for name, path in paths.items()},
        "model": vars(model.config),
        "data": data | {"dataset": public_name(data)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_step": config["total_batch_size"],
        "hardware": ranks.hardware(),
        "precision": precision,
        "compiled": compiled,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def in_words(facts: dict, source, loader) -> str:
    """The first lines of a run. facts: of `describe`. source: where its first weights are from.
    loader: its tokens."""
    config, model = facts["config"], GPTConfig(**facts["model"])
    epochs = config["max_steps"] * facts["tokens_per_step"] / loader.tokens
    return (
        f"model: {facts['parameters']:,} parameters from {source}; {count(model.n_layer, 'layer')}, "
        f"{count(model.n_head, 'head')}, {count(model.n_embd, 'channel')}, {model.block_size} tokens of context, "
        f"a vocabulary of {model.vocab_size}\n"
        f"data: {loader.tokens:,} tokens ({loader.tokenizer}) to learn from in {loader.data_dir}; "
        f"{count(config['max_steps'], 'step')} of {facts['tokens_per_step']:,} are {epochs:.2f} epochs\n"
        f"machine: {facts['hardware']}, {facts['precision']}, {'compiled' if facts['compiled'] else 'not compiled'}; a "
        f"step is {count(loader.micro_steps, 'micro-batch')} of {loader.B} x {loader.T} tokens for each process"
        + (
            ""
            if loader.manifest
            else f"\n{loader.data_dir} has no manifest.json: its tokens are taken for gpt2's"
        )
    )


def write_run(log_dir, facts: dict) -> None:
    """LOG_DIR/run.json: configuration, data, parameters, tokens per step, hardware, versions."""
    with whole_file(Path(log_dir) / "run.json") as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")


def read_run(log_dir) -> dict:
    path = Path(log_dir) / "run.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}; delete it if it is damaged") from None


# ---- speed ----


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """Floating point operations to learn from one token: 6 N + 12 L H Q T (Chowdhery et al. 2022,
    appendix B).

    N: the weights of the matrices that multiply, 12 L C^2 + V C; no positions, biases or norms.
    124M: 854.65e6.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 6 * (12 * L * C * C + V * C) + 12 * L * C * seq_len


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that CUDA gives it; None if it is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


class Speed:
    """Tokens per second, MFU, and the time that is left, from how long steps take."""

    def __init__(self, model: GPTConfig, train, ranks, precision: str):
        """train: the TrainConfig of the run. ranks: its Ranks."""
        self.tokens_per_step, self.recent = train.total_batch_size, collections.deque(maxlen=50)
        peak = (
            peak_flops(device_name(ranks.device))
            if ranks.device.type == "cuda" and precision != "float32"
            else None
        )
        self.peak_tok_s = (
            peak * ranks.world_size / flops_per_token(model, train.seq_len) if peak else None
        )

    def measure(self, seconds: float) -> dict[str, float]:
        """The log's values for a step that took so long: tok_s, and mfu where the GPU's peak is
        known."""
        self.recent.append(seconds)
        tok_s = self.tokens_per_step / seconds
        return {"tok_s": tok_s} | ({"mfu": tok_s / self.peak_tok_s} if self.peak_tok_s else {})

    def line(self, steps_left: int) -> str:
        """The last step's speed for people, with the time that the rest will take at the median of
        the recent steps."""
        seconds = self.recent[-1]
        tok_s, eta = (
            self.tokens_per_step / seconds,
            duration(steps_left * statistics.median(self.recent)),
        )
        mfu = f" | MFU {tok_s / self.peak_tok_s:.1%}" if self.peak_tok_s else ""
        return f"{1000 * seconds:.0f} ms | {tok_s:,.0f} tok/s{mfu} | ETA {eta}"


def duration(seconds: float) -> str:
    """4000 -> 1h07m"""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"


# ---- the curve ----


def plot(log_dir) -> Path | None:
    """Draw LOG_DIR/curve.png: loss, and HellaSwag if measured, over steps and tokens; None if there
    is no loss."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    finite = {
        name: [p for p in points if math.isfinite(p[1])]
        for name, points in read_log(log_dir).items()
    }
    log, run = {name: points for name, points in finite.items() if points}, read_run(log_dir)
    if not log.keys() & {"train", "val"}:
        return None
    data, tokens_per_step = run.get("data", {}), run.get("tokens_per_step", 0)
    tokenizer = data.get("tokenizer", "gpt2")
    comparable = (
        data.get("dataset") == FINEWEB_EDU and tokenizer == "gpt2"
    )  # GPT-2's loss is of this data's validation
    figure = Figure(figsize=(12 if "hella" in log else 8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if "hella" in log else 1, squeeze=False)[0]

    if "train" in log:
        steps, losses = zip(*log["train"], strict=True)
        axes[0].plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
        axes[0].plot(
            steps,
            smooth(losses),
            color="tab:blue",
            label=f"train, smoothed ({smooth(losses)[-1]:.4f})",
        )
    if "val" in log:
        steps, losses = zip(*log["val"], strict=True)
        axes[0].plot(
            steps,
            losses,
            "o-",
            color="tab:orange",
            markersize=4,
            label=f"validation ({losses[-1]:.4f})",
        )
        low, high = min(losses), losses[0]
        axes[0].set_ylim(
            min(low, GPT2_VAL_LOSS if comparable else low) - 0.3, max(min(high, low + 3), low + 0.5)
        )
    axes[0].set(xlabel="step", ylabel=f"loss (nats per {UNIT[tokenizer]})")
    if "hella" in log:
        steps, scores = zip(*log["hella"], strict=True)
        axes[1].plot(
            steps,
            scores,
            "o-",
            color="tab:blue",
            markersize=4,
            label=f"this model ({scores[-1]:.4f})",
        )
        axes[1].set(xlabel="step", ylabel="HellaSwag acc_norm")
    if comparable:
        for axis, value, color, name in [
            (axes[0], GPT2_VAL_LOSS, "tab:red", "GPT-2"),
            (axes[-1], GPT2_HELLASWAG, "tab:red", "GPT-2"),
            (axes[-1], GPT3_HELLASWAG, "tab:green", "GPT-3"),
        ][: 3 if "hella" in log else 1]:
            axis.axhline(value, color=color, linestyle="--", label=f"OpenAI {name} 124M ({value})")
    last = max(1, *(points[-1][0] for points in log.values()))
    for axis in axes:
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.grid(alpha=0.3)
        axis.legend(framealpha=0.9, edgecolor="none")
        if tokens_per_step:
            top = axis.secondary_xaxis(
                "top", functions=(lambda s: s * tokens_per_step, lambda t: t / tokens_per_step)
            )
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))
    if run:
        *_, parent, name = "", *Path(log_dir).resolve().parts
        figure.suptitle(
            f"{parent}/{name}: {run['parameters'] / 1e6:,.1f}M parameters, {run['hardware']}"
        )
    path = Path(log_dir) / "curve.png"
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path


def smooth(values) -> list[float]:
    """Debiased exponential moving average with a window of 1/50 of the values."""
    width, total, weight, out = max(1, len(values) // 50), 0.0, 0.0, []
    for value in values:
        total, weight = total * (1 - 1 / width) + value, weight * (1 - 1 / width) + 1
        out.append(total / weight)
    return out


# ---- trackers ----


def open_tracker(name: str, log_dir: Path, run: dict):
    """A function (step, {stream: value}) that sends values to the tracker, and one that closes
    it."""
    try:
        if name == "wandb":
            import wandb

            session = wandb.init(
                project="GPT124M", name=log_dir.resolve().name, config=run, dir=str(log_dir)
            )
            return lambda step, values: session.log(values, step=step), session.finish
        from tensorboard.summary import Writer

        writer = Writer(str(log_dir / "tensorboard"))
        return lambda step, values: [
            writer.add_scalar(k, v, step) for k, v in values.items()
        ], writer.close
    except ImportError:
        raise UserError(
            f"--tracker {name}: the package {name} is not installed: pip install {name}"
        ) from None
    except Exception as error:  # of wandb's own kinds: no key, no network
        raise UserError(f"--tracker {name}: {first_line(error)}") from None


def replay(config: MetricsConfig) -> None:
    """Send the whole log to the tracker, a step at a time; with follow, go on until the last step
    is there."""
    log_dir, sent, waited = Path(config.log_dir), 0, 0
    run = read_run(log_dir)
    last_step = run.get("config", {}).get("max_steps", 0)
    send, close = open_tracker(config.tracker, log_dir, run)
    try:
        while True:
            steps = {}
            for line in whole_lines(log_dir / "log.txt"):
                step, stream, value = line.split()
                steps.setdefault(int(step), {})[stream] = float(value)
            newest = max(steps, default=0)
            # the last line is the time of the last save; a finished run that was run again has
            # none: a minute will do
            ended = not config.follow or "save_s" in steps.get(last_step, {}) or waited == 30
            for step in sorted(steps):
                if step >= sent and (step < newest or ended):  # the newest step may still grow
                    send(step, steps[step])
                    sent = step + 1
            if ended:
                return
            waited += newest >= last_step
            time.sleep(2)
    except KeyboardInterrupt:
        pass
    finally:
        close()


@command
def main(argv=None) -> int:
    config = parse(MetricsConfig, argv, __doc__, positional="log_dir")
    if config.follow and not config.tracker:
        raise UserError(
            "--follow sends what a run writes to a --tracker: give one, wandb or tensorboard"
        )
    log = read_log(config.log_dir)
    if not log:
        raise UserError(
            f"{config.log_dir} has no log.txt with values in it: is it the --log_dir of a run?"
        )
    for stream, points in log.items():
        print(f"{stream:8s} {points[-1][1]:<12.6g} at step {points[-1][0]}")
    if path := plot(config.log_dir):
        print(f"drawn: {path}")
    if config.tracker:
        replay(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
