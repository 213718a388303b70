"""The curve of a run, or of several: loss, and HellaSwag if it was measured, over steps or tokens.

`draw_curve` draws LOG_DIR/curve.png of a run's log, `draw_comparison` several runs in one picture.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.files import whole_file
from lib.log import RunFacts, read_log, read_run
from lib.shards import FINEWEB_EDU
from lib.tokenizer import UNIT

# OpenAI's GPT-2 124M: loss in nats per token on build-nanogpt's validation shard, and HellaSwag
# acc_norm in the completion style. GPT-3 124M: HellaSwag of table H.1 of Brown et al. 2020.
GPT2_VAL_LOSS = 3.2924
GPT2_HELLASWAG = 0.2955
GPT3_HELLASWAG = 0.337


def draw_curve(log_dir, streams: dict[str, list[tuple[int, float]]] | None = None) -> Path:
    """Draw LOG_DIR/curve.png and return its path.

    streams: what the log has, {stream: [(step, value), ...]} (default: read from log.txt).
    """
    from matplotlib.figure import Figure

    streams = streams or read_log(log_dir)
    run = read_run(log_dir)
    train, val, hella = (finite(streams.get(name, [])) for name in ("train", "val", "hella"))
    figure = Figure(figsize=(12 if len(hella) else 8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if len(hella) else 1, squeeze=False)[0]
    # OpenAI's losses are those of this data's validation shard
    comparable = False
    if run:
        comparable = (run.data["dataset"], run.data["tokenizer"]) == (FINEWEB_EDU, "gpt2")
    draw_loss(axes[0], train, val, run, comparable)
    if len(hella):
        draw_hellaswag(axes[1], hella, comparable)
    last = max([1, *(points[-1, 0] for points in (train, val, hella) if len(points))])
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
        title = f"{name}: {run.parameters / 1e6:,.1f}M parameters, {run.hardware}"
        figure.suptitle(title, parse_math=False)  # a directory's name may have $ in it
    path = Path(log_dir) / "curve.png"
    save(figure, path)
    return path


def save(figure, path: Path) -> None:
    picture = io.BytesIO()  # first, so that the file is written in a moment: a viewer may write too
    figure.savefig(picture, format="png", dpi=120)
    with whole_file(path) as file:
        file.write(picture.getvalue())


def finite(points: list[tuple[int, float]]) -> np.ndarray:
    """(n, 2): the (step, value) whose value is a finite number."""
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[np.isfinite(array[:, 1])]


def thin(points: np.ndarray, most=4000) -> np.ndarray:
    """Neighbours averaged, so that a curve has at most `most` points: more than a picture has
    pixels. The step of a point is the last one that it averages."""
    width = math.ceil(len(points) / most) or 1
    n = len(points) // width * width
    steps = points[width - 1 : n : width, 0]
    return np.column_stack((steps, points[:n, 1].reshape(-1, width).mean(axis=1)))


def smooth(values: np.ndarray) -> list[float]:
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


def draw_loss(axis, train: np.ndarray, val: np.ndarray, run: RunFacts | None, comparable: bool):
    if len(train):
        steps, losses = thin(train).T
        smoothed = smooth(losses)
        axis.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
        label = f"train, smoothed ({smoothed[-1]:.4f})"
        axis.plot(steps, smoothed, color="tab:blue", label=label)
    if len(val):
        steps, losses = val.T
        label = f"validation ({losses[-1]:.4f})"
        axis.plot(steps, losses, "o-", color="tab:orange", markersize=4, label=label)
        low = min(losses)
        bottom = min(low, GPT2_VAL_LOSS) if comparable else low
        axis.set_ylim(bottom - 0.3, max(min(losses[0], low + 3), low + 0.5))
    if comparable:
        add_reference(axis, GPT2_VAL_LOSS, "tab:red", "GPT-2")
    unit = UNIT.get(run.data["tokenizer"], "token") if run else "token"
    axis.set(xlabel="step", ylabel=f"loss (nats per {unit})")
    if run and run.val_bytes_per_token:
        nats = 1 / run.bits_per_byte(1.0)  # of a bit per byte
        right = axis.secondary_yaxis("right", functions=(lambda x: x / nats, lambda x: x * nats))
        right.set_ylabel("bits per byte")


def draw_hellaswag(axis, hella: np.ndarray, comparable: bool) -> None:
    steps, scores = hella.T
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


# ---- several runs ----


@dataclass(frozen=True)
class MeasuredRun:
    """What a run has measured so far."""

    name: str
    facts: RunFacts
    streams: dict[str, list[tuple[int, float]]]  # {stream: [(step, value), ...]}


def are_comparable(runs: list[MeasuredRun]) -> bool:
    """Do the losses of these runs compare as they are: the same tokens, by the same tokenizer?"""
    data = [{key: run.facts.data.get(key) for key in ("tokenizer", "sha256")} for run in runs]
    return all(other == data[0] for other in data)


def draw_comparison(runs: list[MeasuredRun], path: Path) -> None:
    """Draw several runs in one picture: validation loss (training loss thin), and HellaSwag where
    it was measured, over tokens. Runs on different data or tokenizers are in bits per byte."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    scored = any("hella" in run.streams for run in runs)
    figure = Figure(figsize=(13 if scored else 9, 5), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    nats = are_comparable(runs)
    lowest = math.inf
    for number, run in enumerate(runs):
        color = f"C{number}"
        factor = 1.0 if nats else run.facts.bits_per_byte(1.0)
        tokens = run.facts.tokens_per_step
        train, val, hella = (
            finite(run.streams.get(name, [])) for name in ("train", "val", "hella")
        )
        if len(train):
            steps, losses = thin(train).T
            losses = factor * np.array(smooth(losses))
            axes[0].plot(tokens * steps, losses, color=color, alpha=0.5, linewidth=0.8)
        marks = {"color": color, "marker": "o", "markersize": 4}
        if len(val):
            steps, losses = val.T
            losses = factor * losses
            label = f"{run.name} ({losses[-1]:.4f})"
            axes[0].plot(tokens * steps, losses, label=label, **marks)
            lowest = min(lowest, losses.min())
        if len(hella):
            steps, scores = hella.T
            label = f"{run.name} ({scores[-1]:.4f})"
            axes[1].plot(tokens * steps, scores, label=label, **marks)
    if math.isfinite(lowest):
        height = 3.0 if nats else 1.0
        axes[0].set_ylim(lowest - 0.1 * height, lowest + height)
    axes[0].set_ylabel("nats per token" if nats else "bits per byte")
    more = "" if nats else ", in bits per byte: data or tokenizers differ"
    axes[0].set_title(f"validation loss{more}")
    if scored:
        axes[1].set_title("HellaSwag acc_norm")
    for axis in axes:
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            legend = axis.legend(framealpha=0.9, edgecolor="none")
            for text in legend.get_texts():
                text.set_parse_math(False)  # a directory's name may have $ in it
    save(figure, path)
