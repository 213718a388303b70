"""What computes: a GPU, Apple's MPS or the CPU; its precision, its memory, its name."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from GPT_Modules import GPTConfig
from lib.cli import UserError, one_line_error
from lib.loss import rows_of_a_slice

# Share of the free memory that a step may take: torch's allocator can't use every gap between
# tensors, and kernels and NCCL need some themselves.
USABLE = 0.92

# Fitted to what torch's allocator counts for GPT-2's four sizes at batch sizes 1 to 64:
BLOCK_BYTES = {"half": 37, "single": 65}  # that a block keeps, per token and channel
RECOMPUTED_BLOCK = 1.4  # peak of recomputing a block, relative to what a block keeps otherwise
ROUNDING = 1.03  # the allocator rounds sizes up


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for --device: auto takes CUDA, then Apple's MPS, then the CPU.

    local_rank: this process's number on its machine, which is also its GPU's. Raises UserError if
    there is no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind in available if available[kind]) if name == "auto" else name
    if not available[kind]:
        raise UserError(
            f"--device {name} is not available on this machine; --device auto picks one that is"
        )
    if kind != "cuda":
        return torch.device(kind)
    gpus = torch.cuda.device_count()
    if gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)  # Slurm's --gpus-per-task=1 shows each process its own
    if local_rank >= gpus:
        raise UserError(
            f"{local_rank + 1} processes or more, but {gpus} GPUs: lower --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def choose_precision(device: torch.device, dtype: str) -> str:
    """What --dtype means on a device: auto is the fastest that its hardware supports natively."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        # from Ampere on bfloat16; before, T4 and V100 have tensor cores for float16 only
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if bfloat16 else "float16"
    if device.type == "cpu":
        avx512 = torch.cpu._is_avx512_bf16_supported()
        amx = torch.cpu._is_amx_tile_supported()
        return "bfloat16" if avx512 or amx else "float32"
    return "float32"


def prepare_device(device: torch.device) -> None:
    """Process-wide settings that make training on this device faster."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays in float32 may use TF32
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that a step reuses the memory of the one before.

    Otherwise the kernel hands it out again, page fault by page fault.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD, as an unsigned number: the heap never shrinks


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used, in GB: the GPU's, or else the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def changing_shapes():
    """A context for attention whose shapes change from call to call.

    Without cuDNN's kernels, torch's choice on Hopper, which plan again for each new shape.
    """
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def recompute_blocks(model: torch.nn.Module) -> None:
    """Keep only the input of each block of a GPT for the backward pass, and compute the rest again.

    torch calls it activation checkpointing: far less memory, about 4/3 of the work.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


# ---- memory ----


@dataclass(frozen=True)
class StepShape:
    """What the memory of a training step depends on, besides its batch size."""

    model: GPTConfig
    seq_len: int
    half: bool  # computed in bfloat16 or float16, not in float32
    compiled: bool
    recompute: bool


def step_memory(shape: StepShape, batch_size: int) -> float:
    """Peak GPU memory of a training step in bytes, reached in the middle of the backward pass.

    Everything is counted but for the three fitted constants above. tests/test_device.py compares
    the sum with the counts of torch's allocator: never less, at most 10% more.
    """
    L = shape.model.n_layer
    C = shape.model.n_embd
    V = shape.model.vocab_size
    n = batch_size * shape.seq_len  # tokens
    number = 2 if shape.half else 4  # bytes
    matrices = 12 * L * C * C + V * C
    parameters = matrices + 13 * L * C + shape.model.block_size * C + 2 * C
    state = 16 * parameters  # weights, gradients and two moments of AdamW, in float32
    copies = 2 * matrices if shape.half else 0  # the weights in half precision
    if shape.compiled and shape.recompute:
        copies /= 2  # never all of them at a time
    table = 4 * V * C  # the gradient of the token table, before it is added to the others
    rows = rows_of_a_slice(V, "cuda")
    logits = number * V * min(n, rows)
    if not shape.compiled:
        # the previous slice's are still alive, and in half precision there are float32 ones as well
        logits = number * V * min(n, 2 * rows)
        logits += 4 * V * min(n, rows) if shape.half else 0
    head = logits + 12 * C * n  # with the loss's input and its gradient, in float32 and as they are
    block = BLOCK_BYTES["half" if shape.half else "single"] * C * n
    if shape.recompute:  # only the inputs of the blocks; one of them at a time is computed again
        kept = 4 * C * n * L + max(head, RECOMPUTED_BLOCK * block)
    else:
        kept = block * L + head
    return ROUNDING * (state + copies + table) + kept


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that no process has taken. On other devices, which share the machine's memory,
    infinity."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def largest_batch_size(shape: StepShape, share: int, free: float) -> int:
    """The largest batch size whose step fits into `free` bytes: a power of two that divides
    `share`, the sequences of a process in a step. It changes memory and speed, never the result.

    Raises UserError if not even one sequence fits.
    """
    most = 64 if math.isfinite(free) else 8  # on a CPU larger ones would hardly be faster
    sizes = [2**i for i in range(7) if share % 2**i == 0 and 2**i <= most]
    fitting = [B for B in sizes if step_memory(shape, B) <= USABLE * free]
    if not fitting:
        raise UserError(
            f"a step with one sequence of {shape.seq_len:,} tokens takes "
            f"{step_memory(shape, 1) / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free.\n"
            f"HINT: {'' if shape.recompute else '--recompute, or '}a smaller model (--n_layer, "
            "--n_embd); --batch_size 1 tries it anyway"
        )
    return max(fitting)


@contextlib.contextmanager
def explain_out_of_memory():
    """Turn a GPU's or a CPU's lack of memory into a UserError that says what needs less."""
    try:
        yield
    except RuntimeError as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not gpu and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            "the run does not fit into memory.\n"
            "HINT: half the --batch_size (the line `machine:` has it) needs about half,"
            " --recompute far less; the result is the same",
            alone=True,
        ) from None


@contextlib.contextmanager
def explain_compile_failure():
    """Turn a failure of torch.compile, whatever its cause, into a UserError."""
    try:
        yield
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        cause = getattr(error, "inner_exception", None)  # of what torch.compile itself raises
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        frames = traceback.extract_tb(error.__traceback__)
        in_compiler = any("_inductor" in frame.filename for frame in frames)
        if cause is None and (isinstance(error, RuntimeError) or not in_compiler):
            raise
        hint = "set TORCHINDUCTOR_CACHE_DIR to a directory that can be written"
        if not isinstance(cause or error, OSError):
            hint = (
                "it needs a C compiler and Python's headers (apt install gcc g++ python3-dev);"
                " --no-compile trains without"
            )
        message = f"torch.compile failed: {one_line_error(cause or error)}\nHINT: {hint}"
        raise UserError(message, code=1, alone=True) from None
