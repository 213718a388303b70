"""Who we are: the processes of a run, what they do together, and when they are asked to stop.

torchrun starts one process per GPU and tells each its rank. Without torchrun there is one process, its world_size is 1,
and everything here stays inside it.
"""

import datetime
import errno
import os
import signal
import sys

import torch
import torch.distributed as dist

from lib.cli import UserError, discard_output

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for --device: auto takes CUDA, then Apple's MPS, then the CPU. Raises UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, is_there in there.items() if is_there) if name == "auto" else name
    if not there[kind]:
        raise UserError(f"--device {name}: this machine has none that torch can use; auto takes what there is")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} processes or more, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
        )
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


class Ranks:
    """rank among world_size processes, local_rank among those of this machine, device; main: prints and writes."""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = choose_device(device, self.local_rank)

    def precision(self, dtype: str) -> str:
        """What --dtype means on this device: auto is bfloat16 on GPUs that have it, else float32."""
        if dtype != "auto":
            return dtype
        there = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if there else "float32"

    def connect(self, timeout: int) -> None:
        """Start the process group. Input errors come before this: no rank waits here for one that has left."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # what stays in float32 may use TF32
        if self.device.type == "cpu":
            # Freeing one 31 MB block raises glibc's mmap threshold, so activations are reused instead of page-faulted
            # in every step.
            torch.empty(31 * 2**18)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """Print, on the main rank only. Output that can't be written is no reason to stop: log.txt has the numbers."""
        if self.main:
            try:
                print(text, flush=True)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # a closed terminal stays closed, a full disk may have room again
                    discard_output()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: float) -> torch.Tensor:
        """The largest of the ranks' numbers, as a tensor on the device: reading it waits for the GPU."""
        tensor = torch.full((), float(number), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def check_same(self, model: torch.nn.Module, step: int) -> None:
        """Raise UserError, on every rank, if step or weights are not the same on all of them, bit for bit."""
        if self.world_size == 1:
            return
        sums = [parameter.detach().view(torch.int32).sum() for parameter in model.parameters()]
        mine = torch.stack([torch.full_like(sums[0], step), *sums])
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        if different := [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]:
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
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


class Signals:
    """Turns the signals that would end the process into a note, so that the step can be finished and saved first."""

    def __enter__(self):
        self.received, self.handlers, self.parent = 0, {}, os.getppid()
        return self

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
        return signal.SIGTERM if orphaned else self.received  # torchrun was killed, and can't send it any more

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
