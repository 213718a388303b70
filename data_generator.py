"""Documents in, tokens out: shards of uint16 tokens, the manifest beside them, and the loader that reads them back.

    python data_generator.py                                     FineWeb-Edu 10B from the Hub: 20 GB, 100 shards
    python data_generator.py --preset demo                       Python's own documentation, no network needed
    python data_generator.py --dataset 'texts/*.txt' --data_dir mydata --shard_size 100000

A run that was interrupted goes on where it stopped: run the same command again.
"""

import collections
import concurrent.futures
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from lib.cli import UserError, command, first_line, parse
from lib.files import only_writer, whole_file

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_10B_TOKENS = 9_970_000_000  # of sample-10BT, give or take a few hundredths
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
BATCH = 256  # documents that go to a worker at a time
PAUSES = (1, 10, 60, 300)  # seconds between the tries after a network error; the Hub's library tries on its own before
BIN_MAGIC, BIN_HEADER = 20240520, 256 * 4  # llm.c's and modded-nanogpt's .bin shards; header in bytes


@dataclass(frozen=True)
class DataConfig:
    # the documents
    preset: Literal["fineweb-edu", "demo"] = "fineweb-edu"  # defaults of the other flags; demo: --dataset pydoc, small
    dataset: str = FINEWEB_EDU  # a Hub data set, or pydoc, or local .txt .jsonl .parquet (path or glob)
    name: str | None = None  # configuration of the Hub data set (default: sample-10BT for FineWeb-Edu)
    split: str = "train"  # split of the Hub data set
    text_field: str = "text"  # field or column that holds a document
    revision: str | None = None  # commit or branch of the Hub data set (default: its newest commit)
    # the shards
    data_dir: str = "edu_fineweb10B"  # directory to write
    shard_size: int = 100_000_000  # tokens in a shard; shard 0 is for validation
    max_tokens: int | None = None  # stop after so many tokens, validation included (default: all there are)
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's 50257 tokens, or 256 bytes and <|endoftext|>
    # the work
    num_proc: int = min(os.cpu_count() or 1, 8)  # processes that tokenize
    verify: bool = False  # check the shards in data_dir against their manifest, and write nothing


PRESETS = {
    "fineweb-edu": {},
    "demo": {"dataset": "pydoc", "data_dir": "demo/data", "tokenizer": "bytes", "shard_size": 98_304},
}


# ---- tokenizers ----


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50257 tokens) or "bytes" (256 bytes and <|endoftext|>).

    Raises UserError for another name, or if GPT-2's vocabulary can be neither found nor downloaded.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is not known: gpt2 and bytes are")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' ConnectionError is one
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and can't be downloaded ({type(error).__name__}).\nHINT: run"
            " once with a network and TIKTOKEN_CACHE_DIR set to a directory that this machine sees too, or use"
            " --tokenizer bytes"
        ) from None


# ---- documents: (texts, state after them), a batch at a time ----


def pydoc_batches(state: int | None):
    """Batches of Python's documentation: language topics and the doc strings of the standard library."""
    documents = pydoc_documents()
    for start in range(state or 0, len(documents), BATCH):
        yield documents[start : start + BATCH], start + BATCH


def pydoc_documents() -> list[str]:
    """Each text once, in an order that is shuffled but always the same, so that validation is a fair sample."""
    import ast
    import random
    import sysconfig
    import warnings
    from pydoc_data.topics import topics

    documents = dict.fromkeys(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(
            path.parts[len(library.parts) :]
        ):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    documents[text] = None
    documents = list(documents)
    random.Random(1337).shuffle(documents)
    return documents


def local_files(dataset: str) -> list[str]:
    """The files that `dataset` names, as a path or a glob; none if it is the name of a data set on the Hub."""
    files = [dataset] if os.path.exists(dataset) else sorted(glob.glob(dataset, recursive=True))
    if not files and (file_type(dataset) in BUILDERS or glob.has_magic(dataset)):
        raise UserError(f"--dataset {dataset}: there is no such file")
    for file in files:
        if os.path.isdir(file):
            raise UserError(f"--dataset {dataset}: {file} is a directory; name its files, as in '{file}/*.txt'")
        if file_type(file) not in BUILDERS:
            raise UserError(f"--dataset {dataset}: {file} is none of {' '.join(BUILDERS)}")
    if len({BUILDERS[file_type(file)] for file in files}) > 1:
        raise UserError(f"--dataset {dataset}: the files are of several types: give one type at a time")
    return files


def file_type(file: str) -> str:
    """texts/a.jsonl.gz -> .jsonl"""
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_dataset(config: DataConfig, revision: str | None):
    """The data set as a stream of arrow tables with the text column only; raises UserError for a wrong text_field."""
    import datasets

    files = local_files(config.dataset)
    if files:
        builder = BUILDERS[file_type(files[0])]
        options = {"sample_by": "document"} if builder == "text" else {}
        what = {"path": builder, "data_files": {config.split: files}, **options}
    else:
        what = {"path": config.dataset, "name": dataset_name(config), "revision": revision}
    builder = datasets.load_dataset_builder(**what)
    if getattr(builder.config, "columns", ...) is None:  # parquet: fetch one column of many
        builder.config.columns = [config.text_field]
    try:
        stream = builder.as_streaming_dataset(split=config.split)
        fields = stream.column_names or list(next(iter(stream), {}))
    except (KeyError, ValueError):
        if getattr(builder.config, "columns", None) is None:
            raise
        builder.config.columns = None
        fields = list(next(iter(builder.as_streaming_dataset(split=config.split)), {}))
    if fields and config.text_field not in fields:
        raise UserError(
            f"--text_field {config.text_field}: {config.dataset} has no such field; it has {', '.join(fields)}"
        )
    return stream.select_columns([config.text_field]).with_format("arrow")


def dataset_batches(config: DataConfig, revision: str | None, state: dict | None):
    """Batches of a Hub data set or of local files. A network that fails is tried again, a little later each time."""
    import datasets

    local, failures = bool(local_files(config.dataset)), 0
    while True:
        try:
            stream = open_dataset(config, revision)
            if state is not None:
                stream.load_state_dict(state)
            for table in stream.iter(batch_size=BATCH):
                state, failures = stream.state_dict(), 0
                yield table.column(config.text_field).to_pylist(), state
            return
        except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError) as error:
            raise UserError(f"--dataset {config.dataset}: {first_line(error)}") from None
        except (UserError, GeneratorExit):
            raise
        except Exception as error:
            if local or (state is None and type(error) is ValueError):  # a wrong configuration, split or file
                raise UserError(f"--dataset {config.dataset} can't be read: {first_line(error)}") from None
            if failures == len(PAUSES) or (state is None and failures == 1):
                raise UserError(
                    f"{config.dataset} can't be fetched from the Hub: {first_line(error)}\nHINT: check the network and"
                    " run the same command again; what is written stays and is not fetched again",
                    code=2 if state is None else 1,
                ) from None
            tqdm.write(f"network: {first_line(error)}; next try in {PAUSES[failures]} s", file=sys.stderr)
            time.sleep(PAUSES[failures])
            failures += 1


def dataset_name(config: DataConfig) -> str | None:
    return "sample-10BT" if config.name is None and config.dataset == FINEWEB_EDU else config.name


def resolve_revision(config: DataConfig, manifest: dict | None) -> str | None:
    """What exactly is read: a commit of the Hub data set, so that a rerun days later sees the same documents."""
    if config.dataset == "pydoc":
        return platform.python_version()
    if local_files(config.dataset):
        return None
    if manifest and config.revision in (None, manifest["revision"]):
        return manifest["revision"]
    from huggingface_hub import HfApi

    for pause in (1, 2, None):
        try:
            return HfApi().dataset_info(config.dataset, revision=config.revision).sha
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if pause is None or 400 <= status < 500:
                raise UserError(
                    f"--dataset {config.dataset} can't be found on the Hub: {first_line(error)}\n"
                    "HINT: check the name and the network, or give local files"
                ) from None
            time.sleep(pause)


# ---- tokens: a pool of processes, documents in and arrays out, in order ----


def start_worker(tokenizer: str) -> None:
    """Leave Ctrl-C to the parent, and leave when it is gone."""
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoding = get_tokenizer(tokenizer)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def encode_documents(texts: list[str], path: str) -> None:
    """Write <|endoftext|> and the tokens of each text to a file of uint16. Text is text: a literal "<|endoftext|>" in
    it does not become the token."""
    tokens = []
    for text in texts:
        tokens.append(encoding.eot_token)
        tokens.extend(encoding.encode_ordinary(text))
    np.array(tokens, dtype=np.uint16).tofile(path)  # numpy raises for ids that don't fit


def tokenized(batches, pool, in_flight: int):
    """(tokens, state after the batch, documents in it) for each batch, in order, at most `in_flight` of them ahead.

    The tokens come in files: a worker that is killed while it sends an array through the pool's pipe would leave the
    pool waiting for the rest of it for ever.
    """
    pending = collections.deque()
    with tempfile.TemporaryDirectory(prefix="gpt124m-") as directory:

        def first():
            future, path, state, documents = pending.popleft()
            future.result()
            tokens = np.fromfile(path, dtype=np.uint16)
            os.unlink(path)
            return tokens, state, documents

        for number, (texts, state) in enumerate(batches):
            path = os.path.join(directory, str(number))
            pending.append((pool.submit(encode_documents, texts, path), path, state, len(texts)))
            if len(pending) > in_flight:
                yield first()
        while pending:
            yield first()


def checked(batches, text_field: str, documents: int):
    """The same batches; raises UserError naming the first document without text. documents: how many came before."""
    for texts, state in batches:
        for number, text in enumerate(texts, start=documents):
            if not isinstance(text, str):
                raise UserError(f"document {number} (counted from 0) has no text: its {text_field} is {text!r}")
        documents += len(texts)
        yield texts, state


# ---- shards and their manifest ----


def read_manifest(data_dir) -> dict | None:
    """DATA_DIR/manifest.json, or None where there is none. Raises UserError for one that can't be read."""
    path = Path(data_dir) / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from None


def write_shard(data_dir: Path, tokens: np.ndarray, manifest: dict, position: dict | None) -> None:
    """Write the next shard, whole, then the manifest. position: where the source goes on, None at its end.

    Raises UserError if the disk does not take them; what was there before is untouched.
    """
    number = len(manifest["shards"])
    path = data_dir / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
    begun = int(np.count_nonzero(tokens == get_tokenizer(manifest["tokenizer"]).eot_token))
    try:
        with whole_file(path) as file:
            np.save(file, tokens)
        entry = {"file": path.name, "tokens": len(tokens), "documents": begun, "sha256": sha256(path)}
        manifest["shards"].append(entry)
        manifest |= {"position": position, "complete": position is None}
        with whole_file(data_dir / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error}; it needs {tokens.nbytes + 128:,} bytes, "
            f"{shutil.disk_usage(data_dir).free:,} are free.\n"
            f"HINT: the {number} shards before it are whole; make room and run the same command again",
            code=1,
        ) from None


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def start_manifest(config: DataConfig) -> dict:
    """The manifest of data_dir to go on from, or a new one; raises UserError if it was begun with other settings."""
    old = read_manifest(config.data_dir)
    new = {
        "dataset": config.dataset,
        "name": dataset_name(config),
        "revision": resolve_revision(config, old),
        "split": config.split,
        "text_field": config.text_field,
        "tokenizer": config.tokenizer,
        "vocab_size": get_tokenizer(config.tokenizer).n_vocab,
        "shard_size": config.shard_size,
    }
    if old is None:
        return new | {"shards": [], "position": None, "complete": False}
    differences = [f"{key} was {old.get(key)}, is {value}" for key, value in new.items() if old.get(key) != value]
    written = sum(shard["tokens"] for shard in old["shards"])
    if config.max_tokens is not None and written > config.max_tokens:
        differences.append(f"max_tokens is {config.max_tokens}, {written} are written")
    if differences:
        raise UserError(
            f"{config.data_dir} was begun with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --data_dir, or delete this one"
        )
    return old


def check_space(config: DataConfig, written: int) -> None:
    """Compare the bytes that are still to come, where they can be known, with the bytes that are free."""
    files = [] if config.dataset == "pydoc" else local_files(config.dataset)
    if config.max_tokens is not None:
        tokens = config.max_tokens
    elif config.dataset == FINEWEB_EDU and dataset_name(config) == "sample-10BT":
        tokens = FINEWEB_EDU_10B_TOKENS
    elif files and all(file_type(file) == ".txt" == Path(file).suffix for file in files):
        tokens = sum(os.path.getsize(file) for file in files) // (1 if config.tokenizer == "bytes" else 4)
    else:
        return
    needed, free = 2 * (tokens - written), shutil.disk_usage(config.data_dir).free
    message = f"{config.data_dir} needs about {needed:,} bytes, {free:,} are free"
    if free < 0.9 * needed:
        raise UserError(f"{message}.\nHINT: choose a --data_dir on a larger disk, or fewer --max_tokens")
    if free < 1.1 * needed:
        print(f"warning: {message}: that is tight", file=sys.stderr)


def generate(config: DataConfig, manifest: dict) -> None:
    """Write the shards that the manifest does not have yet.

    A position is where a shard ended: the source's state before the batch of documents that was being cut, how many
    documents came before that batch, and how many of its tokens are written.
    """
    data_dir = Path(config.data_dir)
    position = manifest["position"] or {"source": None, "documents": 0, "skip": 0}
    source, documents, skip = position["source"], position["documents"], position["skip"]
    try:
        buffer, filled = np.empty(config.shard_size, dtype=np.uint16), 0
    except (MemoryError, ValueError):
        raise UserError(
            f"--shard_size {config.shard_size}: a shard does not fit into this machine's memory; 100000000 takes 200 MB"
        ) from None
    total = sum(shard["tokens"] for shard in manifest["shards"])
    expected = config.max_tokens or (FINEWEB_EDU_10B_TOKENS if manifest["name"] == "sample-10BT" else None)

    with concurrent.futures.ProcessPoolExecutor(config.num_proc, None, start_worker, (config.tokenizer,)) as pool:
        # the workers start before the Hub's threads and locks exist: a fork would copy those half-way
        list(pool.map(abs, range(config.num_proc)))
        if config.dataset == "pydoc":
            batches = pydoc_batches(source)
        else:
            batches = dataset_batches(config, manifest["revision"], source)
        arrays = tokenized(checked(batches, config.text_field, documents), pool, in_flight=2 * config.num_proc)
        with tqdm(total=expected, initial=total, unit=" tokens", unit_scale=True) as bar:
            for tokens, source_after, documents_in_batch in arrays:
                if config.max_tokens is not None:
                    tokens = tokens[: config.max_tokens - total + skip]
                while skip < len(tokens):
                    if filled == config.shard_size:  # only now that more follows: the last shard may be exactly full
                        write_shard(
                            data_dir, buffer, manifest, {"source": source, "documents": documents, "skip": skip}
                        )
                        filled = 0
                        bar.set_postfix_str(f"shard {len(manifest['shards'])}")
                    part = tokens[skip : skip + config.shard_size - filled]
                    buffer[filled : filled + len(part)] = part
                    skip, filled, total = skip + len(part), filled + len(part), total + len(part)
                    bar.update(len(part))
                if total == config.max_tokens:
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
                source, documents, skip = source_after, documents + documents_in_batch, 0

    if not manifest["shards"]:
        raise UserError(
            f"{config.dataset} has {total:,} tokens, which all fit into shard 0, the validation shard: nothing is left"
            f" to train on.\nHINT: --shard_size {max(1, total // 10)}"
        )
    write_shard(data_dir, buffer[:filled], manifest, None)


def verify(config: DataConfig) -> int:
    """Check every shard of data_dir against its manifest: presence, size, sha256, type and ids; the exit code."""
    manifest = read_manifest(config.data_dir)
    if manifest is None:
        raise UserError(f"{config.data_dir} has no manifest.json to verify against")
    bad = []
    with tqdm(total=sum(2 * shard["tokens"] for shard in manifest["shards"]), unit="B", unit_scale=True) as bar:
        for shard in manifest["shards"]:
            path = Path(config.data_dir) / shard["file"]
            try:
                tokens = open_shard(path, shard["tokens"])
                if sha256(path) != shard["sha256"]:
                    raise UserError(f"{path}: its sha256 is not the manifest's")
                if tokens.max() >= manifest["vocab_size"]:
                    raise UserError(
                        f"{path}: token {tokens.max()} is not below the vocabulary's {manifest['vocab_size']}"
                    )
            except UserError as error:
                bad.append(str(error))
            bar.update(2 * shard["tokens"])
    if bad:
        raise UserError("\n".join([*bad, f"{len(bad)} of {len(manifest['shards'])} shards are bad"]), code=1)
    state = "complete" if manifest["complete"] else "not complete: run the generator again"
    print(f"{config.data_dir}: {len(manifest['shards'])} shards are good; the data set is {state}")
    return 0


# ---- the loader ----


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """The tokens of a .npy or .bin shard as a memory-mapped uint16 array (tokens,).

    Raises UserError if the file is not a whole shard, or not of so many tokens.
    """
    try:
        size = path.stat().st_size
        if path.suffix == ".bin":
            header = np.fromfile(path, dtype="<i4", count=3)
            if len(header) < 3 or header[0] != BIN_MAGIC or header[1] != 1:
                raise UserError(f"{path} is not a shard: its header is {header.tolist()}, not [{BIN_MAGIC}, 1, tokens]")
            count, offset = int(header[2]), BIN_HEADER
            array = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))
        else:
            array = np.load(path, mmap_mode="r")
            if array.dtype != np.uint16 or array.ndim != 1:
                raise UserError(f"{path} is not a shard: it holds {array.dtype} {array.shape}, not uint16 (tokens,)")
            count, offset = len(array), array.offset
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise UserError(f"{path} is damaged or cut short ({size:,} bytes): {first_line(error)}") from None
    if size != offset + 2 * count:
        raise UserError(f"{path} is damaged: its header says {count:,} tokens, its size {(size - offset) / 2:,.1f}")
    if tokens is not None and count != tokens:
        raise UserError(f"{path} has {count:,} tokens, its manifest says {tokens:,}")
    return np.asarray(array)  # slices of the plain view cost less than a memmap's


class TokenLoader:
    """The tokens of a directory of shards, step by step.

    The shards of a split are one stream, which holds a sequence of seq_len tokens and their targets at each multiple of
    seq_len. Step s is the next total_batch_size tokens, whatever the number of ranks: a step depends on its number
    alone. After the last whole sequence the stream begins again.

    data_dir: the directory. split: "train" or "val". seq_len (T), total_batch_size: tokens. batch_size (B): sequences.
    Raises UserError if the directory has no such shards, a bad one, or too few tokens for one step.
    """

    def __init__(self, data_dir, split, seq_len, batch_size, total_batch_size, rank=0, world_size=1):
        self.T, self.B, self.rank, self.world_size = seq_len, batch_size, rank, world_size
        per_micro_step = seq_len * batch_size * world_size
        if total_batch_size % per_micro_step:
            raise UserError(
                f"--total_batch_size {total_batch_size} is not a multiple of --batch_size {batch_size} x --seq_len"
                f" {seq_len} x {world_size} ranks = {per_micro_step}\n"
                + what_fits(seq_len, batch_size, total_batch_size, world_size)
            )
        self.micro_steps = total_batch_size // per_micro_step
        self.sequences_per_step = total_batch_size // seq_len

        manifest = read_manifest(data_dir)
        if manifest:
            listed = {Path(data_dir) / shard["file"]: shard["tokens"] for shard in manifest["shards"]}
        else:  # shards from elsewhere
            listed = {path: None for path in sorted(Path(data_dir).glob("*")) if path.suffix in (".npy", ".bin")}
        self.paths = [path for path in listed if split in path.name]
        if not self.paths:
            raise UserError(f"there are no {split} shards in {data_dir}: `{how_to_make(data_dir)}` makes them")
        self.shards = [open_shard(path, listed[path]) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])
        self.complete = manifest is None or manifest["complete"]
        self.tokenizer = manifest["tokenizer"] if manifest else "gpt2"
        self.n_vocab = manifest["vocab_size"] if manifest else 50257
        self.origin = {key: manifest[key] if manifest else None for key in ("dataset", "name", "revision")}
        contents = [(path.name, len(shard)) for path, shard in zip(self.paths, self.shards, strict=True)]
        contents += [shard["sha256"] for shard in manifest["shards"]] if manifest else []
        self.digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        self.sequences = (self.tokens - 1) // seq_len
        self.steps = self.sequences // self.sequences_per_step  # whole ones, before a sequence comes a second time
        if self.steps == 0:
            raise UserError(
                f"the {split} shards of {data_dir} have {self.tokens:,} tokens, one step needs {total_batch_size + 1:,}"
                " (--total_batch_size and one): take a smaller one, or more data"
            )
        self.worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self.ahead = {}  # (step, micro_step) -> future of the batch that will be wanted next

    def identity(self) -> dict:
        """What makes it the same data for a run that is continued, wherever the directory lies: plain data."""
        return self.origin | {"tokenizer": self.tokenizer, "tokens": self.tokens, "sha256": self.digest}

    def batches(self, step: int):
        """Yield the micro-batches of this rank at a step: (x, y), each (B, T) int64; y is x one token ahead.

        The next one is read meanwhile. Raises UserError if a token is not below the vocabulary.
        """
        for micro_step in range(self.micro_steps):
            future = self.ahead.pop((step, micro_step), None) or self.worker.submit(self.read_batch, step, micro_step)
            following = (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
            self.ahead = {following: self.worker.submit(self.read_batch, *following)}
            yield future.result()

    def read_batch(self, step: int, micro_step: int):
        """One micro-batch. In a step, sequences go to the ranks in turn, B at a time."""
        first = step * self.sequences_per_step + (micro_step * self.world_size + self.rank) * self.B
        parts = []
        while (have := sum(len(x) for x, _ in parts)) < self.B:  # once round, but where the stream begins again
            start = (first + have) % self.sequences
            count = min(self.B - have, self.sequences - start)
            tokens = self.read(start * self.T, count * self.T + 1)
            parts.append((tokens[:-1].reshape(count, self.T), tokens[1:].reshape(count, self.T)))
        x, y = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))  # (B, T) each
        return (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream, as int64 (count,)."""
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while count:
            offset = start - (int(self.ends[shard - 1]) if shard else 0)
            part = self.shards[shard][offset : offset + count].astype(np.int64)
            if part.max() >= self.n_vocab:
                raise UserError(
                    f"{self.paths[shard]} has token {part.max()}, which is not below the vocabulary's "
                    f"{self.n_vocab}: the file is damaged, or made with another tokenizer",
                    alone=True,
                )
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


def what_fits(seq_len: int, batch_size: int, total_batch_size: int, world_size: int) -> str:
    """The nearest settings with which a step can be shared out."""
    fits = [B for B in range(1, batch_size + 1) if total_batch_size % (B * seq_len * world_size) == 0]
    if fits:
        return f"HINT: --batch_size {fits[-1]} fits"
    per_micro_step = seq_len * batch_size * world_size
    return f"HINT: --total_batch_size {max(1, round(total_batch_size / per_micro_step)) * per_micro_step} fits"


def how_to_make(data_dir) -> str:
    """The command that fills a directory."""
    for preset, values in PRESETS.items():
        if str(data_dir) == values.get("data_dir", DataConfig.data_dir):
            return "python data_generator.py" + (f" --preset {preset}" if values else "")
    return f"python data_generator.py --data_dir {data_dir}"


@command
def main(argv=None) -> int:
    config = parse(DataConfig, argv, __doc__, PRESETS)
    for name in ("shard_size", "num_proc", "max_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be at least 1")
    if config.verify:
        return verify(config)
    if config.max_tokens is not None and config.max_tokens <= config.shard_size:
        raise UserError(
            f"--max_tokens {config.max_tokens} all fit into shard 0, the validation shard: nothing is left to train "
            f"on.\nHINT: --shard_size {max(1, config.max_tokens // 10)}"
        )
    start = time.time()
    with only_writer(config.data_dir):
        manifest = start_manifest(config)
        before = len(manifest["shards"])
        if not manifest["complete"]:
            check_space(config, sum(shard["tokens"] for shard in manifest["shards"]))
            source = "Python's own documentation" if config.dataset == "pydoc" else config.dataset
            print(
                f"{source} -> {config.data_dir}, tokenizer {config.tokenizer}, shards of {config.shard_size:,} tokens"
                + (f"; going on after {before} shards" if before else ""),
                flush=True,
            )
            try:
                generate(config, manifest)
            except concurrent.futures.BrokenExecutor:
                raise UserError(
                    "a tokenizing process was killed (out of memory?).\n"
                    "HINT: run the same command again, perhaps with a smaller --num_proc",
                    code=1,
                ) from None
    shards = manifest["shards"]
    tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
    seconds = f" in {time.time() - start:.0f} s" if len(shards) > before else "; it was complete already"
    print(
        f"{config.data_dir}: {documents:,} documents, {tokens:,} tokens, {len(shards)} shards, {2 * tokens:,}"
        f" bytes{seconds}"
    )
    if shards[-1]["tokens"] < config.shard_size:
        print(f"the last shard is shorter, as it should be: {shards[-1]['tokens']:,} tokens")
    preset = " --preset demo" if config.preset == "demo" else ""
    usual = PRESETS[config.preset].get("data_dir", DataConfig.data_dir)
    where = "" if config.data_dir == usual else f" --data_dir {config.data_dir}"
    print(f"next: python train.py{preset}{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
