"""The processes of a run (ranks): what they compute together, and the signals that stop them.

torchrun starts one process per GPU and tells each its rank. Without torchrun there is one process,
its world_size is 1, and everything here stays inside it.
"""

import datetime
import errno
import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from lib.cli import UserError, count, discard_output
from lib.device import choose_device, device_name

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Ranks:
    """The processes of a run, seen from one of them.

    rank: this process's number among world_size. main: is it the one that prints and writes?
    device: what it computes on. signals: those that ask this process to stop.
    """

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
        # gloo is left to lib.cli.leave: its destructor waits for threads that may wait for Python
        if self.device.type == "cuda" and dist.is_initialized() and not any(error):
            dist.destroy_process_group()

    def connect(self, timeout: int) -> None:
        """Start the process group; timeout: seconds that ranks wait for each other.

        Input errors come before this: no rank waits here for one that has left.
        """
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))

    def say(self, text: str) -> None:
        """Print, on the main rank only.

        Output that can't be written is no reason to stop: log.txt has the numbers. A closed
        terminal stays closed, but a full disk may have room again.
        """
        if not self.main:
            return
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                discard_output()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: float) -> torch.Tensor:
        """The largest of the ranks' numbers, as a tensor on the device, whose reading waits for
        the GPU."""
        tensor = torch.full((), float(number), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def min(self, number: float) -> float:
        """The smallest of the ranks' numbers, within a millionth."""
        return number if self.world_size == 1 else -self.max(-number).item()

    def stopping(self) -> torch.Tensor:
        """The signal that asks any rank to stop, as a tensor on the device; 0: none.

        Once it is there, it stays.
        """
        return self.max(self.signals.pending())

    def until_stopped(self, items: list):
        """Yield this rank's items until a signal asks any rank to stop.

        Every rank asks equally often, even with fewer items than others: otherwise the others
        would wait for its answer for ever.
        """
        for number in range(int(self.max(len(items)))):
            if self.stopping():
                return
            if number < len(items):
                yield items[number]

    def on_main(self, action: Callable[[], None]) -> None:
        """Run action() on the main rank while the others wait for its end.

        What it raises of OSError and UserError is raised on every rank, so that all decide alike.
        """
        outcome = [None]
        if self.main:
            try:
                action()
            except (OSError, UserError) as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]

    def check_same(self, model: torch.nn.Module, step: int) -> None:
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
                f"the ranks would go on after different steps, {steps}: nothing is written.\n"
                "HINT: every machine must see the same --log_dir; "
                "if one sees its newest files late, try again",
                code=1,
            )
        different = [r for r in range(self.world_size) if not torch.equal(everyone[r], everyone[0])]
        if different:
            raise UserError(
                f"at step {step} the weights of ranks {different} differ from rank 0's: "
                "nothing is saved.\nHINT: a GPU or its memory may be failing; "
                "the same command goes on from the last checkpoint",
                code=1,
            )

    def hardware(self) -> str:
        """8 x NVIDIA A100-SXM4-80GB, or 1 x CPU with 2 threads"""
        threads = ""
        if self.device.type == "cpu":
            threads = f" with {count(torch.get_num_threads(), 'thread')}"
        return f"{self.world_size} x {device_name(self.device)}{threads}"


class Signals:
    """Turns the signals that would end the process into a note.

    So the step can be finished and saved first.
    """

    def __init__(self):
        self.received = 0
        self.handlers = {}
        self.parent = os.getppid()

    def listen(self) -> None:
        """Note STOP_SIGNALS from now on, but for a hangup that nohup ignores already."""
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        self.received = number

    def pending(self) -> int:
        """The signal that asks this process to stop; 0: none.

        A torchrun that was killed can't send one any more: to lose it counts as SIGTERM.
        """
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return signal.SIGTERM if orphaned else self.received

    def forget(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
