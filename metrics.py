"""What runs have measured, seen: the last values, curves, a comparison, trackers.

    python metrics.py log                             the last value of each stream; draws the curve
    python metrics.py log log_fast --out compare.png  several runs in a table and in one picture
    python metrics.py log --tracker tensorboard       replays the log into a tracker
    python metrics.py log --tracker wandb --follow    and keeps up with the run

A line of log.txt is `step stream value`: `250 val 3.9518`.
"""

import dataclasses
import math
import secrets
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.cli import LocalPath, UserError, command, one_line_error, parse
from lib.curve import MeasuredRun, are_comparable, draw_comparison, draw_curve
from lib.log import RunFacts, read_lines, read_log, read_run


@dataclass(frozen=True)
class MetricsConfig:
    log_dir: tuple[LocalPath, ...] = ("log",)  # directory of a run, or of several to compare
    out: LocalPath = "compare.png"  # picture of several runs
    tracker: Literal["wandb", "trackio", "tensorboard"] | None = None  # send every value there
    follow: bool = False  # continue until the run's last step, or Ctrl-C


def read_values(log_dir: str) -> dict[str, list[tuple[int, float]]]:
    """{stream: [(step, value), ...]}. Raises UserError if there are none."""
    streams = read_log(log_dir)
    if not streams:
        raise UserError(
            f"{log_dir} has no log.txt with values in it: is it the --log_dir of a run?"
        )
    return streams


def show(log_dir: str) -> None:
    """Print the last value of each stream of a run, and draw its curve."""
    streams = read_values(log_dir)
    for stream, points in streams.items():
        step, value = points[-1]
        print(f"{stream:8s} {value:<12.6g} at step {step}")
    if streams.keys() & {"train", "val"}:
        try:
            print(f"drawn: {draw_curve(log_dir, streams)}")
        except UserError:
            raise
        except Exception as error:  # matplotlib's settings, a directory that can't be written
            print(f"WARNING: the curve is not drawn: {one_line_error(error)}")


# ---- several runs ----


def compare(log_dirs: tuple[str, ...], out: str) -> None:
    """Print a table of several runs, finished or not, and draw them in one picture."""
    names = [Path(log_dir).resolve().name for log_dir in log_dirs]
    runs = []
    for log_dir, name in zip(log_dirs, names, strict=True):
        facts = read_run(log_dir)
        if facts is None:
            raise UserError(f"{log_dir} has no run.json, which says what was run")
        name = name if names.count(name) == 1 else log_dir
        runs.append(MeasuredRun(name, facts, read_values(log_dir)))
    unknown = [run.name for run in runs if not run.facts.val_bytes_per_token]
    if unknown and not are_comparable(runs):
        raise UserError(
            "these runs have different data or tokenizers, which only bits per byte compare, and "
            f"the run.json of {', '.join(unknown)} does not have the bytes of a token"
        )
    rows = [("run", "steps", "tokens", "val loss", "best", "bits/byte", "HellaSwag", "tok/s", "h")]
    rows += [row_of(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join((name.ljust(widths[0]), *padded)))
    if not are_comparable(runs):
        print("the data or the tokenizers differ: compare the bits per byte only")
    draw_comparison(runs, Path(out))
    print(f"drawn: {out}")


def row_of(run: MeasuredRun) -> tuple[str, ...]:
    """The cells of a run in the table; - for what was not measured."""
    points = run.streams
    steps = 1 + points["train"][-1][0] if "train" in points else 0
    of = run.facts.config["max_steps"]
    losses = [loss for _, loss in points.get("val", []) if math.isfinite(loss)]
    bits = run.facts.bits_per_byte(losses[-1]) if losses else None
    rates = [rate for _, rate in points.get("tok_s", [])]
    seconds = sum(run.facts.tokens_per_step / rate for rate in rates)
    seconds += sum(value for name in ("eval_s", "save_s") for _, value in points.get(name, []))
    return (
        run.name,
        f"{steps:,}" if steps == of else f"{steps:,} of {of:,}",
        f"{steps * run.facts.tokens_per_step:,}",
        f"{losses[-1]:.4f}" if losses else "-",
        f"{min(losses):.4f}" if losses else "-",
        f"{bits:.4f}" if bits else "-",
        f"{points['hella'][-1][1]:.4f}" if "hella" in points else "-",
        f"{statistics.median(rates):,.0f}" if rates else "-",
        f"{seconds / 3600:.2f}",
    )


# ---- trackers ----


class TensorBoard:
    """Event files in LOG_DIR/tensorboard, rewritten, so that a replay has each step once."""

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
    """A wandb run of the log directory's own id, so that a second replay continues it."""

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


class Trackio(WeightsAndBiases):
    """A trackio run, with wandb's methods. It has a name and no id: each replay is a new run."""

    def __init__(self, log_dir: Path, run: RunFacts | None):
        import trackio

        config = dataclasses.asdict(run) if run else None
        name = log_dir.resolve().name
        self.run = trackio.init(project="GPT124M", name=name, config=config, embed=False)


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}


def replay(config: MetricsConfig) -> None:
    """Send the whole log to the tracker, a step at a time; with follow, until the last step."""
    log_dir = Path(config.log_dir[0])
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
            "--follow sends what a run writes to a --tracker: give one, as in --tracker wandb"
        )
    if len(config.log_dir) > 1:
        if config.tracker:
            raise UserError("--tracker takes one run at a time")
        compare(config.log_dir, config.out)
        return 0
    show(config.log_dir[0])
    if config.tracker:
        replay(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
