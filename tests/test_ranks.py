"""Who we are: one process without torchrun, signals that are recorded."""

import os
import signal

import torch
from conftest import torchrun

from lib.ranks import Ranks, Signals


def test_one_process_is_its_own_world():
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert (
        ranks.sum(torch.tensor(3.0)) == 3
        and ranks.max(2) == 2
        and ranks.hardware().startswith("1 x CPU with ")
    )
    ranks.check_weights(torch.nn.Linear(2, 2), 5)


def test_signals_are_recorded_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    signals.listen()
    assert signals.received() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received() == signal.SIGTERM
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before


SMALLEST = r"""
from lib.ranks import Ranks
with Ranks("cpu") as ranks:
    ranks.connect(60)
    smallest = ranks.min(85e9 - 1e9 * ranks.rank) / 1e9
    print(f"smallest {smallest:.1f}\n", end="", flush=True)  # in one piece: two ranks write
"""


def test_the_smallest_number_is_the_same_on_every_rank(tmp_path):
    (tmp_path / "smallest.py").write_text(SMALLEST)
    done = torchrun(2, tmp_path / "smallest.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("smallest 84.0") == 2, done.stdout
