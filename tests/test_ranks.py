"""Who we are: devices, one process without torchrun, signals as notes."""

import os
import signal

import pytest
import torch

from lib.cli import UserError
from lib.ranks import Ranks, Signals, choose_device


def test_auto_takes_what_there_is(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto").type == expected and choose_device("cpu").type == "cpu"


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine has none"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="3 processes or more, but 2 GPUs: lower --nproc_per_node"):
        choose_device("cuda", 2)


def test_one_process_is_its_own_world():
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.main) == (0, 1, True)
    assert ranks.sum(torch.tensor(3.0)) == 3 and ranks.max(2) == 2 and ranks.hardware().startswith("1 x CPU with ")
    ranks.check_same(torch.nn.Linear(2, 2), 5)


def test_signals_are_noted_and_handlers_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.listen()
        assert signals.pending() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
