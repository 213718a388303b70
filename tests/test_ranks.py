"""Who we are: devices, one process without torchrun, signals as notes."""

import os
import platform
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

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


def test_auto_is_the_fastest_precision_of_the_hardware(monkeypatch):
    ranks = Ranks("cpu")
    for avx512, amx, expected in (
        (False, False, "float32"),
        (True, False, "bfloat16"),
        (False, True, "bfloat16"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert ranks.precision("auto") == expected and ranks.precision("float16") == "float16"
    ranks.device = torch.device("mps")
    assert ranks.precision("auto") == "float32" and ranks.precision("bfloat16") == "bfloat16"
    ranks.device = torch.device("cuda", 0)
    for capability, expected in (
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((9, 0), "bfloat16"),
    ):
        properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert ranks.precision("auto") == expected, capability


FAULTS = """
import resource, sys, torch
from GPT_Modules import GPT, GPTConfig
from lib.ranks import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
model, idx, faults = GPT(GPTConfig(64, 50304, 2, 2, 64)), torch.randint(50257, (8, 64)), []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(idx, idx)[1].backward()
    model.zero_grad()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[-3:]))  # a heap in pieces may have to grow once more in one of them
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_glibc_keeps_freed_memory():
    """Page faults of a step, in processes of their own: thousands without, next to none with."""
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, what], cwd=ROOT, capture_output=True, check=True
            ).stdout
        )
        for what in ("plain", "keep")
    )
    assert plain > 5_000 and kept < 500, (plain, kept)


def test_one_process_is_its_own_world():
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.main) == (0, 1, True)
    assert (
        ranks.sum(torch.tensor(3.0)) == 3
        and ranks.max(2) == 2
        and ranks.hardware().startswith("1 x CPU with ")
    )
    ranks.check_same(torch.nn.Linear(2, 2), 5)


def test_signals_are_noted_and_handlers_given_back():
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    signals.listen()
    assert signals.pending() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.pending() == signal.SIGTERM
    signals.forget()
    assert signal.getsignal(signal.SIGTERM) == before
