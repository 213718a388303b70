"""Documents in, tokens out: a data set becomes shards of uint16 tokens with a manifest beside them.

    python data_generator.py                                     FineWeb-Edu 10B from the Hub: 20 GB, 100 shards
    python data_generator.py --preset demo                       Python's own documentation, no network needed
    python data_generator.py --dataset 'texts/*.txt' --data_dir mydata --shard_size 100000

A run that was interrupted goes on where it stopped: run the same command again. lib/shards.py reads
the shards back.
"""

import collections
import concurrent.futures
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
from tqdm import tqdm

from lib import shards
from lib.cli import PositiveInt, UserError, command, count, first_line, parse
from lib.files import only_writer
from lib.shards import DATA_DIR, DEMO_DATA_DIR, FINEWEB_EDU, ShardWriter, open_shard, read_manifest
from lib.tokenizer import get_tokenizer

FINEWEB_EDU_10B_TOKENS = 9_950_000_000  # of sample-10BT, about
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
BATCH = 256  # documents that go to a worker at a time
PAUSES = (
    1,
    10,
    60,
    300,
)  # seconds before each new try after a network error; the Hub's library has tried before


@dataclass(frozen=True)
class DataConfig:
    # the documents
    preset: Literal["fineweb-edu", "demo"] = (
        "fineweb-edu"  # defaults of the other flags; demo: --dataset pydoc, small
    )
    dataset: str = (
        FINEWEB_EDU  # a Hub data set, or pydoc, or local .txt .jsonl .parquet (path or glob)
    )
    name: str | None = (
        None  # configuration of the Hub data set (default: sample-10BT for FineWeb-Edu)
    )
    split: str = "train"  # split of the Hub data set
    text_field: str = "text"  # field or column that holds a document
    revision: str | None = None  # commit or branch of the Hub data set (default: its newest commit)
    # the shards
    data_dir: str = DATA_DIR  # directory to write
    shard_size: PositiveInt = 100_000_000  # tokens in a shard; shard 0 is for validation
    max_tokens: PositiveInt | None = (
        None  # stop after so many tokens, validation included (default: all there are)
    )
    tokenizer: Literal["gpt2", "bytes"] = (
        "gpt2"  # GPT-2's 50257 tokens, or 256 bytes and <|endoftext|>
    )
    # the work
    num_proc: PositiveInt = min(os.cpu_count() or 1, 8)  # processes that tokenize
    verify: bool = False  # check the shards in data_dir against their manifest, and write nothing


PRESETS = {
    "fineweb-edu": {},
    "demo": {
        "dataset": "pydoc",
        "data_dir": DEMO_DATA_DIR,
        "tokenizer": "bytes",
        "shard_size": 98_304,
    },
}


# ---- sources of documents: each yields (texts, its state after them), a batch at a time ----


def pydoc_batches(state: int | None):
    """Batches of Python's documentation: language topics and the doc strings of the standard
    library."""
    documents = pydoc_documents()
    for start in range(state or 0, len(documents), BATCH):
        yield documents[start : start + BATCH], start + BATCH


def pydoc_documents() -> list[str]:
    """Each text once, in an order that is shuffled but always the same, so that validation is a
    fair sample."""
    import ast
    import random
    import sysconfig
    from pydoc_data.topics import topics

    documents = dict.fromkeys(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        if others & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    documents[text] = None
    documents = list(documents)
    random.Random(1337).shuffle(documents)
    return documents


def local_files(dataset: str) -> list[str]:
    """The files that `dataset` names, as a path or a glob; none if it is the name of a data set on
    the Hub."""
    files = [dataset] if os.path.exists(dataset) else sorted(glob.glob(dataset, recursive=True))
    if not files and (file_type(dataset) in BUILDERS or glob.has_magic(dataset)):
        raise UserError(f"--dataset {dataset}: there is no such file")
    for file in files:
        if os.path.isdir(file):
            raise UserError(
                f"--dataset {dataset}: {file} is a directory; name its files, as in '{file}/*.txt'"
            )
        if file_type(file) not in BUILDERS:
            raise UserError(f"--dataset {dataset}: {file} is none of {' '.join(BUILDERS)}")
    if len({BUILDERS[file_type(file)] for file in files}) > 1:
        raise UserError(
            f"--dataset {dataset}: the files are of several types: give one type at a time"
        )
    return files


def file_type(file: str) -> str:
    """texts/a.jsonl.gz -> .jsonl"""
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_dataset(config: DataConfig, revision: str | None):
    """The data set as a stream of arrow tables with the text column only; raises UserError for a
    wrong text_field."""
    import datasets

    files = local_files(config.dataset)
    if files:
        builder = BUILDERS[file_type(files[0])]
        options = {"sample_by": "document"} if builder == "text" else {}
        what = {
            "path": builder,
            "data_files": {config.split: [glob.escape(file) for file in files]},
            **options,
        }
    else:
        what = {"path": config.dataset, "name": dataset_name(config), "revision": revision}
    builder = datasets.load_dataset_builder(**what)
    stream = builder.as_streaming_dataset(split=config.split)
    fields = stream.column_names or list(next(iter(stream), {}))
    if fields and config.text_field not in fields:
        raise UserError(
            f"--text_field {config.text_field}: {config.dataset} has no such field; it has {', '.join(fields)}"
        )
    if getattr(builder.config, "columns", ...) is None:  # parquet: fetch one column of many
        builder.config.columns = [config.text_field]
        stream = builder.as_streaming_dataset(split=config.split)
    return stream.select_columns([config.text_field]).with_format("arrow")


def dataset_batches(config: DataConfig, revision: str | None, state: dict | None):
    """Batches of a Hub data set or of local files. A network that fails is tried again, a little
    later each time."""
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
        except (
            datasets.exceptions.DatasetNotFoundError,
            datasets.exceptions.DataFilesNotFoundError,
        ) as error:
            raise UserError(f"--dataset {config.dataset}: {first_line(error)}") from None
        except UserError:
            raise
        except Exception as error:
            if local or (
                state is None and type(error) is ValueError
            ):  # a wrong configuration, split or file
                raise UserError(
                    f"--dataset {config.dataset} can't be read: {first_line(error)}"
                ) from None
            if failures == len(PAUSES) or (state is None and failures == 1):
                raise UserError(
                    f"{config.dataset} can't be fetched from the Hub: {first_line(error)}\nHINT: check the network and"
                    " run the same command again; what is written stays and is not fetched again",
                    code=2 if state is None else 1,
                ) from None
            tqdm.write(
                f"network: {first_line(error)}; next try in {PAUSES[failures]} s", file=sys.stderr
            )
            time.sleep(PAUSES[failures])
            failures += 1


def dataset_name(config: DataConfig) -> str | None:
    return "sample-10BT" if config.name is None and config.dataset == FINEWEB_EDU else config.name


def resolve_revision(config: DataConfig, manifest: dict | None) -> str | None:
    """What exactly is read, so that a rerun days later sees the same documents: a commit of the Hub
    data set, or how many local files there are, their bytes, and a digest of their names and
    sizes."""
    if config.dataset == "pydoc":
        return platform.python_version()
    if files := local_files(config.dataset):
        if (
            manifest and manifest["revision"] is None
        ):  # begun by an older version, which did not look
            return None
        sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]
        return f"{count(len(files), 'file')}, {sum(size for _, size in sizes):,} bytes, {digest}"
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
    """Ignore Ctrl-C, which the parent handles, and exit when the parent has died."""
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoding = get_tokenizer(tokenizer)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def encode_documents(texts: list[str], path: str) -> None:
    """Write <|endoftext|> and the tokens of each text to a file of uint16. The characters
    <|endoftext|> inside a text are encoded as any others."""
    arrays = []
    for text in texts:
        arrays.append(np.array([encoding.eot_token]))
        try:
            arrays.append(encoding.encode_to_numpy(text, disallowed_special=()))
        except UnicodeEncodeError:  # lone surrogates, which encode_ordinary replaces
            arrays.append(np.array(encoding.encode_ordinary(text)))
    np.concatenate(arrays).astype(np.uint16).tofile(
        path
    )  # both tokenizers have less than 2^16 tokens


def tokenized(batches, pool, directory: str, in_flight: int):
    """(tokens, position after the batch) for each (texts, position) of `batches`, in order, at most
    `in_flight` ahead.

    The tokens come in files of `directory`: a worker that is killed while it sends an array through
    the pool's pipe would leave the pool waiting for the rest of it for ever.
    """
    pending = collections.deque()
    for number, (texts, position) in enumerate(batches):
        path = os.path.join(directory, str(number))
        pending.append((pool.submit(encode_documents, texts, path), path, position))
        if len(pending) > in_flight:
            yield collect(*pending.popleft())
    while pending:
        yield collect(*pending.popleft())


def collect(future, path: str, position: dict) -> tuple[np.ndarray, dict]:
    future.result()
    tokens = np.fromfile(path, dtype=np.uint16)
    os.unlink(path)
    return tokens, position


def positioned(batches, config: DataConfig, documents: int):
    """(texts, position after them) for each (texts, state of the source after them). documents: how
    many came before.

    Raises UserError naming the first document without text.
    """
    for texts, source in batches:
        for number, text in enumerate(texts, start=documents):
            if not isinstance(text, str):
                raise UserError(
                    f"document {number} (counted from 0) has no text: its {config.text_field} is {text!r}"
                )
        documents += len(texts)
        yield texts, {"source": source, "documents": documents, "skip": 0}


# ---- the shards ----


def start_manifest(config: DataConfig) -> dict:
    """The manifest of data_dir to go on from, or a new one; raises UserError if what is there is of
    another run."""
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
        for path in Path(config.data_dir).glob("*train*"):
            if path.suffix in (".npy", ".bin"):
                raise UserError(
                    f"{path} is there already, without a manifest.json: choose another --data_dir"
                )
        return new | {"shards": [], "position": None, "complete": False}
    differences = [
        f"{key} was {old.get(key)}, is {value}"
        for key, value in new.items()
        if old.get(key) != value
    ]
    written = sum(shard["tokens"] for shard in old["shards"])
    if config.max_tokens is not None and written > config.max_tokens:
        differences.append(f"max_tokens is {config.max_tokens}, {written} are written")
    if differences:
        raise UserError(
            f"{config.data_dir} was begun with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --data_dir, or delete this one"
        )
    try:
        for shard in old["shards"]:
            open_shard(Path(config.data_dir) / shard["file"], shard["tokens"])
    except UserError as error:
        raise UserError(
            f"{error}\nHINT: restore it, or delete {config.data_dir} and run this again"
        ) from None
    return old


def expected_tokens(config: DataConfig) -> int | None:
    """About how many tokens data_dir will have at the end; None where that can't be known."""
    if config.max_tokens is not None or config.dataset == "pydoc":
        return config.max_tokens
    if (config.dataset, dataset_name(config), config.tokenizer) == (
        FINEWEB_EDU,
        "sample-10BT",
        "gpt2",
    ):
        return FINEWEB_EDU_10B_TOKENS
    files = local_files(config.dataset)
    if files and all(file_type(file) == ".txt" == Path(file).suffix for file in files):
        return sum(os.path.getsize(file) for file in files) // (
            1 if config.tokenizer == "bytes" else 4
        )
    return None


def check_space(config: DataConfig, written: int) -> None:
    """Compare the bytes that are still to come, where they can be known, with the bytes that are
    free."""
    if (expected := expected_tokens(config)) is None:
        return
    needed, free = 2 * (expected - written), shutil.disk_usage(config.data_dir).free
    if free < 0.9 * needed:
        raise UserError(
            f"{config.data_dir} needs about {needed:,} bytes, {free:,} are free.\n"
            "HINT: choose a --data_dir on a larger disk, or fewer --max_tokens"
        )


def generate(config: DataConfig, manifest: dict) -> None:
    """Write the shards that the manifest does not have yet. Raises UserError as ShardWriter does,
    and for a source that fills no more than the validation shard."""
    writer = ShardWriter(config.data_dir, manifest)
    position = manifest["position"] or {"source": None, "documents": 0, "skip": 0}
    with (
        tempfile.TemporaryDirectory(
            prefix="tokens-", suffix=".tmp", dir=config.data_dir
        ) as directory,
        concurrent.futures.ProcessPoolExecutor(
            config.num_proc, None, start_worker, (config.tokenizer,)
        ) as pool,
        tqdm(
            total=expected_tokens(config), initial=writer.tokens, unit=" tokens", unit_scale=True
        ) as bar,
    ):
        # start the workers now: a fork copies locks that threads hold, and the Hub's library starts
        # threads
        list(pool.map(abs, range(config.num_proc)))
        if sys.version_info < (
            3,
            11,
            5,
        ):  # a pool with a killed worker waits for ever to hand over a batch
            pool._call_queue.cancel_join_thread()
        if config.dataset == "pydoc":
            batches = pydoc_batches(position["source"])
        else:
            batches = dataset_batches(config, manifest["revision"], position["source"])
        batches = positioned(batches, config, position["documents"])
        for tokens, position_after in tokenized(
            batches, pool, directory, in_flight=2 * config.num_proc
        ):
            if config.max_tokens is not None:
                tokens = tokens[
                    : config.max_tokens - writer.tokens + position["skip"]
                ]  # skip: those written already
            writer.add(tokens, position)
            bar.set_postfix_str(f"shard {len(manifest['shards'])}", refresh=False)
            bar.update(writer.tokens - bar.n)
            if writer.tokens == config.max_tokens:
                pool.shutdown(cancel_futures=True)
                break
            position = position_after

    if not manifest["shards"]:
        raise UserError(
            f"{config.dataset} has {writer.tokens:,} tokens, which all fit into shard 0, the validation shard: nothing"
            f" is left to train on.\nHINT: --shard_size {max(1, writer.tokens // 10)}"
        )
    writer.write(None)


def verify(config: DataConfig) -> None:
    """Check every shard of data_dir against its manifest. Raises UserError naming each bad one."""
    manifest = read_manifest(config.data_dir)
    if manifest is None:
        raise UserError(f"{config.data_dir} has no manifest.json to verify against")
    checked = shards.verify(config.data_dir, manifest)
    bad = [wrong for wrong in tqdm(checked, total=len(manifest["shards"]), unit=" shards") if wrong]
    if bad:
        raise UserError(
            "\n".join([*bad, f"{len(bad)} of {len(manifest['shards'])} shards are bad"]), code=1
        )
    state = "complete" if manifest["complete"] else "not complete: run the generator again"
    print(f"{config.data_dir}: {len(manifest['shards'])} shards are good; the data set is {state}")


def write_data_set(config: DataConfig) -> dict:
    """Begin data_dir or go on with it, to its end; returns its manifest."""
    with only_writer(config.data_dir, "*.npy", "manifest.json", "tokens-*"):
        manifest = start_manifest(config)
        written = len(manifest["shards"])
        if manifest["complete"]:
            return manifest
        check_space(config, sum(shard["tokens"] for shard in manifest["shards"]))
        source = "Python's own documentation" if config.dataset == "pydoc" else config.dataset
        print(
            f"{source} -> {config.data_dir}, tokenizer {config.tokenizer}, shards of {config.shard_size:,} tokens"
            + (f"; going on after {count(written, 'shard')}" if written else ""),
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
        except OSError as error:
            message = f"{config.data_dir} can't be written: {first_line(error)}"
            raise UserError(
                f"{message}\nHINT: make room and run the same command again", code=1
            ) from None
    return manifest


@command
def main(argv=None) -> int:
    config = parse(DataConfig, argv, __doc__, PRESETS)
    if config.verify:
        verify(config)
        return 0
    if config.max_tokens is not None and config.max_tokens <= config.shard_size:
        raise UserError(
            f"--max_tokens {config.max_tokens} all fit into shard 0, the validation shard: nothing is left to train "
            f"on.\nHINT: --shard_size {max(1, config.max_tokens // 10)}"
        )
    start, before = time.time(), (read_manifest(config.data_dir) or {"complete": False})["complete"]
    written = write_data_set(config)["shards"]
    tokens, documents = (sum(shard[key] for shard in written) for key in ("tokens", "documents"))
    seconds = "; it was complete already" if before else f" in {time.time() - start:.0f} s"
    if before and config.max_tokens is not None and tokens < config.max_tokens:
        seconds += f" and does not grow to --max_tokens {config.max_tokens:,}: that takes another --data_dir"
    print(
        f"{config.data_dir}: {count(documents, 'document')}, {tokens:,} tokens, {count(len(written), 'shard')}, "
        f"{2 * tokens:,} bytes{seconds}"
    )
    if written[-1]["tokens"] < config.shard_size:
        print(
            f"the last shard is shorter, as it should be: {count(written[-1]['tokens'], 'token')}"
        )
    preset = " --preset demo" if config.preset == "demo" else ""
    usual = PRESETS[config.preset].get("data_dir", DATA_DIR)
    where = "" if config.data_dir == usual else f" --data_dir {config.data_dir}"
    print(f"next: python train.py{preset}{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
