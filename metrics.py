"""What a run has measured, seen: the last values, the curve, and trackers.

    python metrics.py log                           the last value of each stream; draws the curve
    python metrics.py log --tracker tensorboard     replays the log into a tracker (or wandb)
    python metrics.py log --tracker wandb --follow  and keeps up with the run

A line of log.txt is `step stream value`: `250 val 3.9518`.
"""

import dataclasses
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.cli import UserError, command, one_line_error, parse
from lib.curve import draw_curve
from lib.log import RunFacts, read_lines, read_log, read_run


@dataclass(frozen=True)
class MetricsConfig:
    log_dir: str = "log"  # directory of a run
    tracker: Literal["wandb", "tensorboard"] | None = None  # send every value there
    follow: bool = False  # continue until the run's last step, or Ctrl-C


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
    streams = read_log(config.log_dir)
    if not streams:
        raise UserError(
            f"{config.log_dir} has no log.txt with values in it: is it the --log_dir of a run?"
        )
    for stream, points in streams.items():
        step, value = points[-1]
        print(f"{stream:8s} {value:<12.6g} at step {step}")
    if streams.keys() & {"train", "val"}:
        try:
            print(f"drawn: {draw_curve(config.log_dir, streams)}")
        except Exception as error:  # matplotlib's settings, a directory that can't be written
            print(f"WARNING: the curve is not drawn: {one_line_error(error)}")
    if config.tracker:
        replay(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
