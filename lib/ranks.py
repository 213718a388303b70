"""The processes of a run (ranks): what they compute together, and the signals that stop them.

torchrun starts one process per GPU and tells each its rank. Without torchrun there is one process,
its world_size is 1, and nothing here communicates.
"""

import contextlib
import datetime
import errno
import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from lib.cli import UserError, count, discard_output
from lib.device import choose_device, device_name

# set by a launcher in each of its processes
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Ctrl-C, torchrun and Slurm, a closed terminal; what clusters send before a time limit
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip


class Stopped(Exception):
    """Raised on every rank, at the same place, when a signal asks the run to stop."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Ranks(contextlib.ExitStack):
    """The processes of a run, seen from one of them. Contexts that are entered here (a lock) are
    left when the run ends.

    rank: this process's number among world_size. is_main: is it the one that prints and writes?
    device: what it computes on. signals: those that ask this process to stop.
    """

    def __init__(self, device: str):
        super().__init__()
        check_launcher()
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.signals = Signals(announced=self.is_main)
        self.callback(self.signals.restore)

    def connect(self, timeout: int) -> None:
        """Start the process group; timeout: seconds that ranks wait for each other.

        Call it after checking the input, so that no rank waits here for one that has exited.
        """
        if self.world_size == 1:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        if backend == "nccl":
            self.push(disconnect)
        # gloo's group is never destroyed, since its destructor may wait forever for threads of
        # Python: lib.cli.exit_process ends the process instead

    def print(self, text: str) -> None:
        """Print, on the main rank only.

        Output that can't be written is no reason to stop: log.txt has the numbers. A closed
        terminal stays closed, but a full disk may have room again.
        """
        if not self.is_main:
            return
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                discard_output()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, *numbers: float) -> torch.Tensor:
        """The maximum of each number over all ranks, as a device tensor (numbers,); reading a value
        waits for the GPU."""
        # torch.full fills on the GPU; copying a host number would wait for it
        fills = [torch.full((), float(number), device=self.device) for number in numbers]
        tensor = torch.stack(fills)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def min(self, number: float) -> float:
        """The minimum over all ranks, exact to one part in a million (it travels as float32)."""
        return number if self.world_size == 1 else -self.max(-number).item()

    def stop_signal(self) -> int:
        """The signal that asks any rank to stop, the same on every rank; 0: none. With several
        ranks it waits for the GPU."""
        number = self.signals.received()
        return number if self.world_size == 1 else int(self.max(number))

    def check_signals(self) -> None:
        """Raise Stopped, on every rank, once any of them has received a signal."""
        if number := self.stop_signal():
            raise Stopped(number)

    def until_stopped(self, items: list):
        """Yield this rank's items; raise Stopped, on every rank, once any has received a signal.

        Every rank asks equally often, even with fewer items than others: otherwise the others
        would wait for its answer forever.
        """
        for number in range(int(self.max(len(items)))):
            self.check_signals()
            if number < len(items):
                yield items[number]

    def on_main(self, function: Callable[..., None], *arguments) -> None:
        """Call function(*arguments) on the main rank, while the others wait for its end.

        An OSError or UserError that it raises is raised on every rank, so that all decide alike.
        """
        outcome = [None]
        if self.is_main:
            try:
                function(*arguments)
            except (OSError, UserError) as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]

    def check_settings(self, facts: dict) -> None:
        """Raise UserError, on every rank, naming each fact that differs."""
        everyone = [facts] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, facts)
        differences = [
            f"{name} is {value} on rank 0, {theirs.get(name)} on rank {rank}"
            for name, value in everyone[0].items()
            for rank, theirs in enumerate(everyone)
            if theirs.get(name) != value
        ]
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"the ranks were started differently: {'; '.join(differences[:3])}{more}.\n"
                "HINT: start the same command with the same data on every machine"
            )

    def check_weights(self, model: torch.nn.Module, step: int) -> None:
        """Compare step and weights (by a checksum of their bits) of all ranks.

        Raises UserError, on every rank, if they are not the same.
        """
        if self.world_size == 1:
            return
        sums = [parameter.detach().view(torch.int32).sum() for parameter in model.parameters()]
        mine = torch.stack([torch.full_like(sums[0], step), *sums])
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        steps = [int(theirs[0]) for theirs in everyone]
        if len(set(steps)) > 1:
            raise UserError(
                f"the ranks would start from different steps, {steps}: nothing is written.\n"
                "HINT: every machine must see the same --log_dir; "
                "if one sees its newest files late, try again",
                code=1,
            )
        different = [r for r in range(self.world_size) if not torch.equal(everyone[r], everyone[0])]
        if different:
            raise UserError(
                f"at step {step} the weights of ranks {different} differ from rank 0's: "
                "nothing is saved.\nHINT: a GPU or its memory may be failing; "
                "the same command resumes from the last checkpoint",
                code=1,
            )

    def hardware(self) -> str:
        """8 x NVIDIA A100-SXM4-80GB, or 1 x CPU with 2 threads"""
        threads = ""
        if self.device.type == "cpu":
            threads = f" with {count(torch.get_num_threads(), 'thread')}"
        return f"{self.world_size} x {device_name(self.device)}{threads}"


def disconnect(error_type, error, traceback) -> None:
    """End the process group, unless an error ends the run: the other ranks may not take part."""
    if error is None:
        dist.destroy_process_group()


def check_launcher() -> None:
    """Raise UserError if a launcher set only some of its variables: with RANK=1 and no WORLD_SIZE a
    process would train, and write nothing."""
    missing = [name for name in LAUNCHER if name not in os.environ]
    found = [name for name in LAUNCHER[:3] if name in os.environ]
    if found and missing:
        raise UserError(
            f"{' and '.join(found)} set in the environment, but not {' and '.join(missing)}: a "
            "launcher such as torchrun sets all of them\n"
            f"HINT: for a single process `unset {' '.join(found)}`"
        )


class Signals:
    """Records stop signals instead of dying from them, so that the step can be finished and
    saved.

    announced: print a line as soon as a signal arrives.
    """

    def __init__(self, announced: bool = False):
        self.announced = announced
        self.number = 0  # the last one received
        self.handlers = {}
        self.parent = os.getppid()

    def listen(self) -> None:
        """Record STOP_SIGNALS from now on, except those that are ignored already, as nohup does
        with a hangup."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.handle)

    def handle(self, number, frame) -> None:
        self.number = number
        if self.announced:
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, f"{signal.Signals(number).name}: saving after this step\n".encode())

    def received(self) -> int:
        """The signal that asks this process to stop; 0: none.

        A torchrun that was killed can't forward signals, so losing it counts as SIGTERM.
        """
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return signal.SIGTERM if orphaned else self.number

    def restore(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
