"""How fast texts become tokens and tokens become batches, beside the plain way, as markdown.

    python bench/data.py                      all of it, with 200 MB of text
    python bench/data.py --megabytes 1000     the same with 1 GB
    python bench/data.py --part generating    only one of: generating, tokenizer, loading

Each way is a process of its own, from its start to its end with the imports, and the ways
alternate; the medians are compared, and the shards must be equal, byte for byte. The plain ways:

    generating  build-nanogpt's fineweb.py: a pool of two processes, one document at a time
    tokenizer   a pool of two processes, 256 documents at a time, each encoded by `tokenizers`
    loading     build-nanogpt's loader: a shard as int64

The text is the doc strings of this Python's packages, in documents of FineWeb-Edu's lengths.
"""

import argparse
import filecmp
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
B = 64  # sequences of a batch
T = 1024  # tokens of a sequence
FINEWEB_EDU_TOKENS = 9_950_000_000  # of sample-10BT, about


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


# ---- the texts ----


def docstrings(characters: int) -> str:
    """What the installed packages and the standard library say of themselves, in English."""
    parts = []
    for place in ("purelib", "stdlib"):
        for path in sorted(Path(sysconfig.get_path(place)).rglob("*.py")):
            parts += re.findall(r'"""(.*?)"""', path.read_text(errors="replace"), re.DOTALL)
    texts = (part for part in dict.fromkeys(parts) if len(part) > 100)
    return re.sub(r"[ \n]+", " ", "\n".join(texts))[:characters]


def make_texts(megabytes: int):
    """Yield texts of 5,000 characters on average, their lengths log-normal, 1 to 100 kB."""
    source = docstrings(megabytes * 10**6)
    dice = np.random.default_rng(0)
    left = megabytes * 10**6
    place = 0
    while left > 0:
        length = int(np.clip(np.exp(dice.normal(np.log(5000) - 0.5, 1.0)), 1, 100_000))
        text = source[place : place + length]
        place = place + length if place + length < len(source) else int(dice.integers(5000))
        left -= len(text)
        yield text


def write_files(directory: Path, megabytes: int) -> dict[str, Path]:
    """{type: path} of a .parquet and a .jsonl file with the same texts."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"id": pyarrow.string(), "text": pyarrow.string()})
    paths = {kind: directory / f"a.{kind}" for kind in ("parquet", "jsonl")}
    with (
        open(paths["jsonl"], "w") as file,
        pyarrow.parquet.ParquetWriter(paths["parquet"], schema) as writer,
    ):
        texts = make_texts(megabytes)
        for number in itertools.count():
            rows = [{"id": str(number), "text": text} for text in itertools.islice(texts, 1000)]
            if not rows:
                return paths
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            file.writelines(json.dumps(row) + "\n" for row in rows)


# ---- a way: a process, its time and its memory ----


def memory_of(pid: int) -> int:
    """Bytes of a process and those below it, what they share counted once."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
        except OSError:  # it has ended
            pass
    family = [pid]
    for process in family:
        family += children.get(process, [])
    total = 0
    for process in family:
        try:
            sizes = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(sizes.split("Pss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            pass
    return total


def run(command: list) -> tuple[float, int]:
    """(seconds, largest memory in bytes) of a command."""
    peak = [0]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], memory_of(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        sys.exit(error.decode())
    return seconds, peak[0]


def compare(title: str, ways: dict[str, dict[str, list]], megabytes: int, rounds: int) -> None:
    """Run the ways of each kind alternately, compare their shards, and print a table.

    ways: {kind: {name: command}}; a command's last word is the directory for its shards. The first
    way is the baseline.
    """
    rows = []
    for kind, commands in ways.items():
        results = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                shutil.rmtree(command[-1], ignore_errors=True)
                results[name].append(run(command))
        directories = [Path(command[-1]) for command in commands.values()]
        plain, ours = ({path.name for path in folder.glob("*.npy")} for folder in directories)
        same = filecmp.cmpfiles(*directories, plain, shallow=False)[0]
        assert plain == ours == set(same), "the tokens differ"
        tokens = sum((directories[0] / name).stat().st_size // 2 for name in plain)
        baseline = None
        for name, measured in results.items():
            seconds = statistics.median(value for value, _ in measured)
            peak = max(value for _, value in measured)
            baseline = baseline or seconds
            rows.append(
                [
                    f"{kind}, {name}",
                    f"{seconds:.1f} s",
                    f"{megabytes / seconds:.1f}",
                    f"{tokens / seconds / 1e6:.2f}",
                    f"{peak / 1e6:,.0f} MB",
                    f"{FINEWEB_EDU_TOKENS * seconds / tokens / 60:.0f} min",
                    f"{baseline / seconds:.1f}x",
                ]
            )
    head = ["", "time", "MB/s", "million tokens/s", "peak memory", "10 billion tokens", "ratio"]
    table(f"{title}: {megabytes:,} MB of text, {tokens:,} tokens, the same", head, rows)


# ---- generating ----

PLAIN = """
import json
import multiprocessing
import os
import sys

import numpy as np
import pyarrow.parquet

path, tokenizer, shard_size, directory = sys.argv[1:]
shard_size = int(shard_size)


def documents():
    if path.endswith(".jsonl"):
        with open(path) as file:
            for line in file:
                yield json.loads(line)["text"]
    else:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column(0).to_pylist()


def start_gpt2():
    global encoding
    import tiktoken
    encoding = tiktoken.get_encoding("gpt2")


def tokenize(text):
    tokens = [encoding.eot_token]
    tokens.extend(encoding.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def start_json():
    global encoding
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers
    encoding = tokenizers.Tokenizer.from_file(tokenizer)
    encoding.encode_special_tokens = True


def tokenize_batch(texts):
    parts = []
    for text in texts:
        [found] = encoding.encode_batch_fast([text], add_special_tokens=False)
        parts.append(np.array([encoding.token_to_id("<|endoftext|>"), *found.ids], np.uint16))
    return np.concatenate(parts)


def batches():
    batch = []
    for text in documents():
        batch.append(text)
        if len(batch) == 256:
            yield batch
            batch = []
    yield batch


def arrays(pool):
    if tokenizer == "gpt2":
        return pool.imap(tokenize, documents(), chunksize=16)
    return pool.imap(tokenize_batch, filter(None, batches()))


if __name__ == "__main__":
    os.makedirs(directory)
    with multiprocessing.Pool(2, start_gpt2 if tokenizer == "gpt2" else start_json) as pool:
        shard = np.empty(shard_size, np.uint16)
        number = filled = 0
        for tokens in arrays(pool):
            while len(tokens):
                if filled == shard_size:
                    split = "train" if number else "val"
                    np.save(f"{directory}/edufineweb_{split}_{number:06d}", shard)
                    number += 1
                    filled = 0
                part = tokens[: shard_size - filled]
                shard[filled : filled + len(part)] = part
                filled += len(part)
                tokens = tokens[len(part) :]
        split = "train" if number else "val"
        np.save(f"{directory}/edufineweb_{split}_{number:06d}", shard[:filled])
"""


def bench_generating(files: dict[str, Path], directory: Path, tokenizer, options) -> None:
    """The whole command beside a plain script. tokenizer: gpt2, or the path of a tokenizer.json."""
    script = directory / "plain.py"
    script.write_text(PLAIN)
    shard_size = 20_000 * options.megabytes
    ours = [ROOT / "data_generator.py", f"--shard_size={shard_size}", f"--tokenizer={tokenizer}"]
    ways = {
        f".{kind}": {
            "a plain pool": [script, path, tokenizer, shard_size, directory / "plain"],
            "ours": [*ours, "--dataset", path, "--data_dir", directory / "ours"],
        }
        for kind, path in files.items()
    }
    name = "GPT-2's tokens" if tokenizer == "gpt2" else "Tokens of a tokenizer.json of 16,000 ids"
    compare(name, ways, options.megabytes, options.rounds)


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of 16,000 ids, as docs/data.md trains it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(10), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


# ---- loading ----

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
    for step in itertools.count():
        yield from loader.batches(step, B)
before = own()
start = time.perf_counter()
if which != "plain":
    from lib.loader import TokenLoader
    shuffle = 1 if which == "ours, --shuffle" else None
    loader = TokenLoader(directory, "train", T, B * T, shuffle=shuffle)
batches = plain() if which == "plain" else ours()
next(batches)
first = time.perf_counter() - start
n = 2000
waited = 0
for _ in range(n):
    start = time.perf_counter()
    x, y = next(batches)
    waited += time.perf_counter() - start
    assert x[0, 1] == y[0, 0]
reading = 0
if which != "plain":  # what the thread needs for one, while nothing else is done
    start = time.perf_counter()
    for step in range(n, 2 * n):
        loader.read_batch(step, 0, B)
    reading = time.perf_counter() - start
print(json.dumps([1000 * waited / n, 1000 * reading / n, own() - before, first]))
"""


def bench_loading(options) -> None:
    names = ["plain", "ours", "ours, --shuffle"]
    with tempfile.TemporaryDirectory() as directory:
        tokens = np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16)
        for number in range(4):
            np.save(Path(directory) / f"edufineweb_train_{number:06d}.npy", tokens)
        results = {name: [] for name in names}
        for _, name in itertools.product(range(options.rounds), names):
            command = [sys.executable, "-c", LOAD, name, directory, str(B), str(T)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            results[name].append(json.loads(done.stdout))
    rows = []
    for name, found in results.items():
        wait, reading, memory, first = map(statistics.median, zip(*found, strict=True))
        row = [f"{wait:.2f} ms", f"{reading:.2f} ms", f"{memory:.0f} MB", f"{first:.3f} s"]
        rows.append([name, *row])
    title = f"Loading batches of {B} x {T} tokens, one after another, from four shards of 100M"
    head = ["", "wait for a batch", "time of the thread", "memory of its own", "first batch after"]
    table(title, head, rows)


def main() -> None:
    parts = ("generating", "tokenizer", "loading")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=parts, help="only this one")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--megabytes", type=int, default=200, help="of text")
    options = parser.parse_args()
    if options.part in (None, "generating", "tokenizer"):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            files = write_files(directory, options.megabytes)
            if options.part != "tokenizer":
                bench_generating(files, directory, "gpt2", options)
            if options.part != "generating":
                files = {"parquet": files["parquet"]}
                bench_generating(files, directory, make_tokenizer(directory), options)
    if options.part in (None, "loading"):
        bench_loading(options)


if __name__ == "__main__":
    main()
