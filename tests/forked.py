"""A process that has imported torch, and forks for each script or torchrun: saves 4 s of a core.

It reads requests, a line of JSON each: argv, env, cwd, and the files for stdin, stdout and stderr;
it answers with the exit code. torchrun is torch's own; its ranks are forked too, not started anew.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings

import matplotlib.figure  # noqa: F401
import pandas  # noqa: F401  # what datasets imports; datasets itself would read HF_HOME here
import pyarrow.dataset  # noqa: F401
import pyarrow.parquet  # noqa: F401
import safetensors.torch  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo  # every optimizer imports it
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


class Rank:
    """A forked rank, with what torchrun asks of a subprocess.Popen."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)  # torchrun's handlers are not the rank's
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(exit_code_of(argv, env))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        return self.returncode


def exit_code_of(argv: list[str], env: dict[str, str]) -> int:
    """Run a script as Python's main program would."""
    try:
        run(argv, env)
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(argv: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    if threads := env.get("OMP_NUM_THREADS"):  # which torch reads when it is imported
        torch.set_num_threads(int(threads))
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(":"))
    if argv[0] == "torchrun":
        torch.distributed.run.main(argv[1:])
    else:
        runpy.run_path(argv[0], run_name="__main__")


def start_rank(handler, command, env) -> Rank:
    """In place of SubprocessHandler._popen. command: python -u script.py ..."""
    return Rank(list(command[2:]), env)


def serve() -> dict:
    """Answer requests, and return one in the process that is forked for it."""
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    SubprocessHandler._popen = start_rank
    request = serve()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY if number else os.O_RDONLY), number)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", buffering=1)
    sys.stderr = open(2, "w", buffering=1)
    os.chdir(request["cwd"])
    run(request["argv"], request["env"])
