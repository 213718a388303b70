"""The processes of a run (ranks): what they compute together, and the signals that stop them.

torchrun starts one process per GPU and tells each its rank. Without torchrun there is one process,
its world_size is 1, and everything here stays inside it.
"""

import contextlib
import ctypes
import datetime
import errno
import os
import platform
import resource
import signal
import sys

import torch
import torch.distributed as dist

from lib.cli import UserError, discard_output

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for --device: auto takes CUDA, then Apple's MPS, then the CPU. Raises UserError if
    it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind, is_there in there.items() if is_there) if name == "auto" else name
    if not there[kind]:
        raise UserError(
            f"--device {name}: this machine has none that torch can use; auto takes what there is"
        )
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} processes or more, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
        )
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


class Ranks:
    """rank: this process's number among world_size. device: what it computes on. main: does it
    print and write?"""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.signals = Signals()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.signals.forget()
        if dist.is_initialized() and not any(error):
            dist.destroy_process_group()

    def precision(self, dtype: str) -> str:
        """What --dtype means on this device: auto is the fastest that its hardware computes in
        itself."""
        if dtype != "auto":
            return dtype
        if (
            self.device.type == "cuda"
        ):  # from Ampere on; before, T4 and V100 have tensor cores for float16 only
            return (
                "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
            )
        fast = self.device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        return "bfloat16" if fast else "float32"

    def connect(self, timeout: int) -> None:
        """Start the process group. Input errors come before this: no rank waits here for one that
        has left."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # what stays in float32 may use TF32
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))

    def say(self, text: str) -> None:
        """Print, on the main rank only. Output that can't be written is no reason to stop: log.txt
        has the numbers."""
        if self.main:
            try:
                print(text, flush=True)
            except OSError as error:
                if (
                    error.errno != errno.ENOSPC
                ):  # a closed terminal stays closed, a full disk may have room again
                    discard_output()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: float) -> torch.Tensor:
        """The largest of the ranks' numbers, as a tensor on the device: reading it waits for the
        GPU."""
        tensor = torch.full((), float(number), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def stopping(self) -> torch.Tensor:
        """The signal that asks any rank to stop, as a tensor on the device; 0: none. It stays, once
        it is there."""
        return self.max(self.signals.pending())

    def until_stopped(self, items: list):
        """Yield the items until a signal asks any rank to stop. Every rank asks equally often, even
        with fewer items: else the others would wait for its answer for ever."""
        for number in range(int(self.max(len(items)))):
            if self.stopping():
                return
            if number < len(items):
                yield items[number]

    def check_same(self, model: torch.nn.Module, step: int) -> None:
        """Raise UserError, on every rank, if step or weights (by a checksum of their bits) are not
        the same."""
        if self.world_size == 1:
            return
        sums = [parameter.detach().view(torch.int32).sum() for parameter in model.parameters()]
        mine = torch.stack([torch.full_like(sums[0], step), *sums])
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        steps = [int(theirs[0]) for theirs in everyone]
        if len(set(steps)) > 1:
            raise UserError(
                f"the ranks would go on after different steps, {steps}: nothing is written.\n"
                "HINT: every machine must see the same --log_dir; if one sees its newest files late, try again",
                code=1,
            )
        if different := [
            rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])
        ]:
            raise UserError(
                f"at step {step} the weights of ranks {different} differ from rank 0's: nothing is saved.\n"
                "HINT: a GPU or its memory may be failing; the same command goes on from the last checkpoint",
                code=1,
            )

    def hardware(self) -> str:
        """8 x NVIDIA A100-SXM4-80GB, or 1 x CPU with 2 threads"""
        threads = f" with {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{self.world_size} x {device_name(self.device)}{threads}"

    def peak_memory(self) -> float:
        """The most memory that this process has used, in GB: the GPU's, or else the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def explain_out_of_memory(batch_size: int, recompute: bool):
    """Turn a GPU's or a CPU's lack of memory into a UserError that says what needs less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):  # GPU's, CPU's
            raise
        hints = (
            [f"--batch_size {2 ** (batch_size - 1).bit_length() // 2} needs about half"]
            if batch_size > 1
            else []
        )
        hints += [] if recompute else ["--recompute far less"]
        hint = (
            f"{' and '.join(hints)}; the result is the same" if hints else "choose a smaller model"
        )
        raise UserError(
            f"the model at --batch_size {batch_size} does not fit into memory.\nHINT: {hint}",
            alone=True,
        ) from None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step then reuses the memory of the one before, instead of
    page-faulting it in."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


class Signals:
    """Turns the signals that would end the process into a note, so that the step can be finished
    and saved first."""

    def __init__(self):
        self.received, self.handlers, self.parent = 0, {}, os.getppid()

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup: a closed terminal is to change nothing
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.received = number

    def pending(self) -> int:
        """The signal that asks this process to stop; 0: none."""
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return (
            signal.SIGTERM if orphaned else self.received
        )  # torchrun was killed, and can't send it any more

    def forget(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
