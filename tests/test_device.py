"""What computes: the device, its precision, what fits into its memory, recomputing."""

import math
import platform
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

from GPT_Modules import GPT, GPTConfig
from lib.cli import UserError
from lib.device import (
    USABLE,
    StepShape,
    choose_device,
    choose_precision,
    explain_compile_failure,
    explain_out_of_memory,
    largest_batch_size,
    recompute_blocks,
    step_memory,
)
from lib.ranks import Ranks

SMALL = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)


def test_auto_takes_what_there_is(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto").type == expected
        assert choose_device("cpu").type == "cpu"


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="--device cuda is not available on this machine; --device auto picks"
    ):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="3 processes or more, but 2 GPUs: lower --nproc_per_node"):
        choose_device("cuda", 2)


@pytest.mark.parametrize(
    "avx512, amx, expected",
    [(False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")],
)
def test_auto_is_the_fastest_precision_of_a_cpu(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision(torch.device("cpu"), "auto") == expected
    assert choose_precision(torch.device("cpu"), "float16") == "float16"


def test_auto_is_float32_on_mps():
    assert choose_precision(torch.device("mps"), "auto") == "float32"
    assert choose_precision(torch.device("mps"), "bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    "major, minor, expected",
    [(7, 0, "float16"), (7, 5, "float16"), (8, 0, "bfloat16"), (9, 0, "bfloat16")],
)
def test_auto_is_the_fastest_precision_of_a_gpu(monkeypatch, major, minor, expected):
    properties = types.SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert choose_precision(torch.device("cuda", 0), "auto") == expected


FAULTS = """
import resource, sys, torch
from GPT_Modules import GPT, GPTConfig
from lib.device import keep_freed_memory
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


def page_faults(what: str) -> int:
    command = [sys.executable, "-c", FAULTS, what]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_glibc_keeps_freed_memory():
    """Page faults of a step, in processes of their own: thousands without, next to none with."""
    plain = page_faults("plain")
    kept = page_faults("keep")
    assert plain > 5_000 and kept < 500, (plain, kept)


# ---- the batch that fits

MODELS = {
    "gpt2": GPTConfig(1024, 50304, 12, 12, 768),
    "gpt2-medium": GPTConfig(1024, 50304, 24, 16, 1024),
    "gpt2-large": GPTConfig(1024, 50304, 36, 20, 1280),
    "gpt2-xl": GPTConfig(1024, 50304, 48, 25, 1600),
}

# {batch size: GB at the peak of a step of two micro-batches at T=1024}, as torch 2.13's own
# allocator counted them on a GPU that computes nothing (a stub of the CUDA libraries, sm_80).
COUNTED = {
    "gpt2 bfloat16 eager": {1: 3.10, 2: 3.75, 4: 5.07, 8: 6.89, 16: 9.67, 32: 15.28, 64: 26.47},
    "gpt2-medium bfloat16 eager": {
        1: 7.84, 2: 9.07, 4: 11.53, 8: 15.62, 16: 22.99, 32: 37.71, 64: 67.17,
    },
    "gpt2-large bfloat16 eager": {
        1: 16.47, 2: 18.50, 4: 22.56, 8: 29.82, 16: 43.55, 32: 71.05, 64: 126.04,
    },
    "gpt2-xl bfloat16 eager": {
        1: 32.07, 2: 35.27, 4: 41.61, 8: 53.45, 16: 76.15, 32: 121.85, 64: 213.25,
    },
    "gpt2 bfloat16 eager recompute": {
        1: 2.78, 2: 3.15, 4: 3.86, 8: 4.46, 16: 4.83, 32: 5.59, 64: 7.09,
    },
    "gpt2-medium bfloat16 eager recompute": {
        1: 7.03, 2: 7.46, 4: 8.30, 8: 9.16, 16: 10.07, 32: 11.88, 64: 15.51,
    },
    "gpt2-large bfloat16 eager recompute": {
        1: 14.99, 2: 15.47, 4: 16.49, 8: 17.72, 16: 19.35, 32: 22.63, 64: 29.18,
    },
    "gpt2-xl bfloat16 eager recompute": {
        1: 29.52, 2: 30.11, 4: 31.38, 8: 33.10, 16: 35.77, 32: 41.12, 64: 51.82,
    },
    "gpt2 float32 eager": {1: 3.00, 2: 3.83, 4: 5.47, 8: 8.74, 16: 13.65, 32: 23.48, 64: 43.14},
    "gpt2-medium float32 eager": {
        1: 7.74, 2: 9.57, 4: 13.24, 8: 20.55, 16: 33.55, 32: 59.56, 64: 111.56,
    },
    "gpt2-large float32 eager": {
        1: 16.21, 2: 19.37, 4: 25.87, 8: 38.83, 16: 63.15, 32: 111.77, 64: 209.03,
    },
    "gpt2-xl float32 eager": {1: 31.24, 2: 36.25, 4: 46.98, 8: 67.80, 16: 108.31, 32: 189.22},
    "gpt2 float32 eager recompute": {
        1: 2.43, 2: 2.69, 4: 3.20, 8: 4.20, 16: 4.57, 32: 5.40, 64: 8.63,
    },
    "gpt2-medium float32 eager recompute": {
        1: 6.22, 2: 6.55, 4: 7.20, 8: 8.46, 16: 9.36, 32: 11.83, 64: 17.74,
    },
    "gpt2-large float32 eager recompute": {
        1: 13.40, 2: 13.72, 4: 14.55, 8: 16.17, 16: 17.80, 32: 22.31, 64: 31.71,
    },
    "gpt2 bfloat16 compiled": {1: 2.83, 4: 4.24, 16: 8.38, 64: 25.02},
    "gpt2-medium bfloat16 compiled": {64: 65.65},
    "gpt2-large bfloat16 compiled": {8: 28.41},
    "gpt2-xl bfloat16 compiled": {2: 34.63},
    "gpt2 float16 compiled": {16: 8.38},
    "gpt2 bfloat16 compiled recompute": {64: 7.12},
    "gpt2-large bfloat16 compiled recompute": {16: 17.00},
    "gpt2 float32 compiled": {16: 12.82},
    "gpt2 float32 compiled recompute": {16: 3.94},
}  # fmt: skip


def shape_of(words: str) -> StepShape:
    model, dtype, compiled, *recompute = words.split()
    return StepShape(
        MODELS[model], 1024, dtype != "float32", compiled == "compiled", bool(recompute)
    )


@pytest.mark.parametrize("words", COUNTED)
def test_the_memory_of_a_step_is_at_least_what_was_counted_and_at_most_a_tenth_more(words):
    for batch_size, counted in COUNTED[words].items():
        ratio = step_memory(shape_of(words), batch_size) / 1e9 / counted
        assert 1 <= ratio <= 1.1, (batch_size, counted, ratio)


def test_the_memory_of_a_step_is_an_h200s():
    """Measured on the card at B=64: 25.2 GB in a run; 6.7 in a step with --recompute and only one
    micro-batch, so that 0.5 of gradients were not there yet."""
    measured = {"gpt2 bfloat16 compiled": 25.2, "gpt2 bfloat16 compiled recompute": 6.7 + 0.5}
    for words, gigabytes in measured.items():
        assert 1 <= step_memory(shape_of(words), 64) / 1e9 / gigabytes <= 1.1, words


def test_the_largest_batch_that_fits_is_taken():
    shape = shape_of("gpt2 bfloat16 compiled")
    for batch_size in (1, 2, 4, 8, 16, 32, 64):
        just = step_memory(shape, batch_size) / USABLE
        assert largest_batch_size(shape, 512, just * 1.001) == batch_size
        if batch_size > 1:
            assert largest_batch_size(shape, 512, just * 0.999) == batch_size // 2
    assert largest_batch_size(shape, 512, 1e12) == 64
    assert largest_batch_size(shape, 24, 1e12) == 8  # the largest that divides the share
    assert largest_batch_size(shape, 3, 1e12) == 1
    assert [largest_batch_size(shape, share, math.inf) for share in (64, 12, 3)] == [8, 4, 1]


def test_where_not_one_sequence_fits():
    """--recompute is proposed where it is not on yet."""
    for words, hint in (
        ("gpt2-large bfloat16 compiled", "HINT: --recompute, or a smaller model"),
        ("gpt2-large bfloat16 compiled recompute", "HINT: a smaller model"),
    ):
        said = (
            r"one sequence of 1,024 tokens takes 1\d\.\d GB, and the GPU has 8.0 GB free.\n" + hint
        )
        with pytest.raises(UserError, match=said):
            largest_batch_size(shape_of(words), 512, 8e9)


def test_lack_of_memory_inside_the_compiler_is_lack_of_memory():
    """torch.compile wraps what it meets; the order of main()'s contexts unwraps it."""
    error = RuntimeError("as InductorError, whose arguments differ from version to version")
    error.inner_exception = torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(UserError, match="the run does not fit into memory"),
        Ranks("cpu") as ranks,
    ):
        ranks.enter_context(explain_out_of_memory())
        ranks.enter_context(explain_compile_failure())
        raise error


# ---- recomputed activations


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    gradients = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model)
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_recomputing_keeps_less():
    """What the forward pass keeps for the backward pass, counted as it is packed."""
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    kept = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model)
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx[:, :-1], idx[:, 1:])
    assert kept[1] < kept[0] / 3
