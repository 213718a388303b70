"""How fast documents become tokens and tokens become batches, beside the plain way, as markdown.

    python bench/data.py                       all of it, with files of 200 MB
    python bench/data.py --megabytes 1000      the same with files of 1 GB
    python bench/data.py --part reading        only one of: tokenizing, reading, loading

Ours and theirs take turns in one run, and the medians are compared; a ratio above 1 means that ours
is faster. The baselines: a pool that takes a document at a time, as build-nanogpt's fineweb.py has
it; the streaming of `datasets`, with its position after each batch; a loader that keeps its shard
as int64, as build-nanogpt's.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import data_generator
from lib.shards import Position
from lib.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
B = 64  # sequences of a batch
T = 1024  # tokens of a sequence
WORKERS = 2


def machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def table(title: str, head: list[str], rows: list[list]) -> None:
    print(f"\n{title} ({machine()})\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def fineweb_like(characters: int) -> list[str]:
    """English of FineWeb-Edu's lengths: log-normal, 5,000 characters on average."""
    text = " ".join(data_generator.pydoc_documents())
    dice = np.random.default_rng(0)
    n = characters // 5000
    lengths = np.exp(dice.normal(np.log(5000) - 0.5, 1.0, n)).astype(int) + 1
    lengths = np.minimum(lengths, len(text) // 2)
    starts = dice.integers(0, len(text) - lengths)
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


# ---- tokenizing ----


def start_plain_worker() -> None:
    global gpt2
    gpt2 = get_tokenizer("gpt2").encoding


def encode_plainly(text: str) -> np.ndarray:
    """One document at a time, as fineweb.py does it."""
    tokens = np.array([gpt2.eot_token, *gpt2.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def tokenize_plainly(pool, texts: list[str]) -> int:
    return sum(len(array) for array in pool.imap(encode_plainly, texts, chunksize=16))


def tokenize_ours(pool, texts: list[str], directory: str) -> int:
    found = ((text, (0, n)) for n, text in enumerate(texts, start=1))
    batches = data_generator.batches_of(found, Position(), skip_bad=False, left_out=[])
    arrays = data_generator.tokenized(batches, pool, directory, in_flight=2 * WORKERS)
    return sum(len(array) for array, _ in arrays)


def make_tokenizer(directory: str, texts: list[str]) -> str:
    """A byte-level BPE of 16,000 ids, as docs/data.md trains it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = f"{directory}/tokenizer.json"
    tokenizer.save(path)
    return path


def bench_tokenizing(rounds: int) -> None:
    texts = fineweb_like(10_000_000)
    megabytes = sum(map(len, texts)) / 1e6
    executor = concurrent.futures.ProcessPoolExecutor
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as files:
        own = make_tokenizer(directory, texts[:500])
        with (
            multiprocessing.Pool(WORKERS, start_plain_worker) as plain,
            executor(WORKERS, None, data_generator.start_worker, ("gpt2",)) as pool,
            executor(WORKERS, None, data_generator.start_worker, (own,)) as own_pool,
        ):
            ways = {
                "gpt2, plain pool": lambda: tokenize_plainly(plain, texts),
                "gpt2, ours": lambda: tokenize_ours(pool, texts, files),
                "tokenizer.json of 16,000 ids, ours": lambda: tokenize_ours(own_pool, texts, files),
            }
            tokens = {name: way() for name, way in ways.items()}
            assert tokens["gpt2, plain pool"] == tokens["gpt2, ours"]
            seconds = {name: [] for name in ways}
            for _, (name, way) in itertools.product(range(rounds), ways.items()):
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    plain_median = statistics.median(seconds["gpt2, plain pool"])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = f"{tokens[name] / median:,.0f}"
        rows.append([name, rate, f"{megabytes / median:.1f}", f"{plain_median / median:.2f}x"])
    length = 1e6 * megabytes / len(texts)
    title = f"Tokenizing {megabytes:.0f} MB in documents of {length:,.0f} characters on {WORKERS}"
    table(f"{title} processes", ["", "tokens/s", "MB/s", "the plain pool's time / its"], rows)


# ---- reading files ----


def write_files(directory: Path, megabytes: int) -> dict[str, str]:
    """{type: path} of a .jsonl and a .parquet file of about so many megabytes of text."""
    import pyarrow
    import pyarrow.parquet

    texts = fineweb_like(20_000_000)
    jsonl = directory / "a.jsonl"
    parquet = directory / "a.parquet"
    table = pyarrow.table({"id": [str(n) for n in range(len(texts))], "text": texts})
    lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(texts)]
    part = "\n".join(lines) + "\n"
    with open(jsonl, "w") as file, pyarrow.parquet.ParquetWriter(parquet, table.schema) as writer:
        for _ in range(max(1, megabytes // 20)):
            file.write(part)
            writer.write_table(table, row_group_size=1000)
    return {"jsonl": str(jsonl), "parquet": str(parquet)}


READ = """
import time
start = time.perf_counter()
import json, sys
which, kind, path = sys.argv[1:]
if which == "ours":
    from lib.documents import documents
    found = (text for text, _ in documents([path], "text"))
else:
    import datasets
    builder = {"jsonl": "json", "parquet": "parquet"}[kind]
    stream = datasets.load_dataset(builder, data_files=path, split="train", streaming=True)
    stream = stream.select_columns(["text"]).with_format("arrow")
    def positioned():
        for table in stream.iter(batch_size=256):
            stream.state_dict()  # where to go on, which ours gives with each document
            yield from table.column("text").to_pylist()
    found = positioned()
begin = time.perf_counter()
characters = sum(len(text) for text in found)
end = time.perf_counter()
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
print(json.dumps([characters, end - start, end - begin, peak]))
"""


def read(which: str, kind: str, path: str) -> list[float]:
    """[characters, seconds with the imports, seconds of reading, peak of memory in MB] of a process
    that reads a file."""
    command = [sys.executable, "-c", READ, which, kind, path]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def bench_reading(rounds: int, megabytes: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for kind, path in write_files(Path(directory), megabytes).items():
            results = {"datasets, streaming": [], "ours": []}
            for _ in range(rounds):
                for name, found in results.items():
                    found.append(read(name, kind, path))
            medians = {}
            for name, found in results.items():
                characters, whole, reading, peak = map(statistics.median, zip(*found, strict=True))
                medians[name] = (whole, reading)
                rates = [f"{characters / value / 1e6:,.0f} MB/s" for value in (whole, reading)]
                rows.append([f".{kind}, {name}", *rates, f"{peak:,.0f} MB"])
            pairs = zip(medians["datasets, streaming"], medians["ours"], strict=True)
            ratios = [f"{theirs / ours:.2f}x" for theirs, ours in pairs]
            rows.append([f".{kind}, ratio", *ratios, ""])
    title = f"Reading documents of a file of {megabytes:,} MB of text"
    table(title, ["", "with the imports", "reading alone", "peak memory of the process"], rows)


# ---- loading tokens ----

LOAD = """
import itertools, json, sys, time
from pathlib import Path
import numpy as np
import torch
which, directory, B, T = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def own():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e6
def plain():
    for path in itertools.cycle(sorted(Path(directory).glob("*.npy"))):
        tokens = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
        for i in range(0, len(tokens) - B * T - 1, B * T):
            part = tokens[i : i + B * T + 1]
            yield part[:-1].view(B, T), part[1:].view(B, T)
def ours():
    from lib.loader import TokenLoader
    shuffle = 1 if which == "ours, --shuffle" else None
    loader = TokenLoader(directory, "train", T, B * T, shuffle=shuffle)
    for step in itertools.count():
        yield from loader.batches(step, B)
before = own()
start = time.perf_counter()
batches = plain() if which == "plain" else ours()
next(batches)
first = time.perf_counter() - start
n = 3000
waited = 0
for _ in range(n):
    start = time.perf_counter()
    x, y = next(batches)
    waited += time.perf_counter() - start
    assert x[0, 1] == y[0, 0]
print(json.dumps([1000 * waited / n, own() - before, first]))
"""


def bench_loading(rounds: int) -> None:
    names = ["plain", "ours", "ours, --shuffle"]
    with tempfile.TemporaryDirectory() as directory:
        tokens = np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16)
        for number in range(2):
            np.save(Path(directory) / f"edufineweb_train_{number:06d}.npy", tokens)
        results = {name: [] for name in names}
        for _, name in itertools.product(range(rounds), names):
            command = [sys.executable, "-c", LOAD, name, directory, str(B), str(T)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            results[name].append(json.loads(done.stdout))
    rows = []
    for name, found in results.items():
        wait, memory, first = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append([name, f"{wait:.2f} ms", f"{memory:.0f} MB", f"{first:.3f} s"])
    title = f"Loading batches of {B} x {T} tokens, one after another, from two shards of 100M"
    table(title, ["", "wait for a batch", "memory of its own", "first batch after"], rows)


def main() -> None:
    parts = ("tokenizing", "reading", "loading")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=parts, help="only this one")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--megabytes", type=int, default=200, help="of text in a file to read")
    options = parser.parse_args()
    if options.part in (None, "tokenizing"):
        bench_tokenizing(options.rounds)
    if options.part in (None, "reading"):
        bench_reading(options.rounds, options.megabytes)
    if options.part in (None, "loading"):
        bench_loading(options.rounds)


if __name__ == "__main__":
    main()
