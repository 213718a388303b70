"""Documents in, tokens out: a data set becomes shards of uint16 tokens with a manifest beside them.

    python data_generator.py                         FineWeb-Edu 10B from the Hub: 20 GB, 100 shards
    python data_generator.py --preset demo           Python's own documentation, no network needed
    python data_generator.py --dataset 'texts/*.txt' --data_dir mydata --shard_size 100000

An interrupted run resumes where it stopped: run the same command again. lib/documents.py has the
types of files; lib/shards.py reads the shards back.
"""

import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from lib.cli import (
    PositiveInt,
    UserError,
    command,
    count,
    one_line_error,
    parse,
    print_notes,
)
from lib.documents import NotText, documents, file_documents, local_files
from lib.files import only_writer, whole_file
from lib.hub import fetched, find_commit, find_files
from lib.shards import (
    DATA_DIR,
    DEMO_DATA_DIR,
    FINEWEB_EDU,
    Manifest,
    Position,
    ShardWriter,
    find_tokenizer,
    open_shard,
    read_manifest,
    verify_shard,
)
from lib.tokenizer import EncoderMismatch, Tokenizer, get_tokenizer

PYDOC = "Python's own documentation"
FINEWEB_EDU_10B_TOKENS = 9_950_000_000  # of sample-10BT, about
BATCH = 256  # documents that are tokenized at a time, or fewer that have
BATCH_CHARACTERS = 2**23  # together
MAX_SKIPPED_SHOWN = 3  # skipped documents whose location is printed


@dataclass(frozen=True)
class DataConfig:
    # the documents
    preset: Literal["fineweb-edu", "demo"] = "fineweb-edu"  # defaults of other flags
    dataset: str = FINEWEB_EDU  # a Hub data set, or pydoc, or local files (path, folder or glob)
    name: str | None = None  # configuration of the Hub data set (FineWeb-Edu: sample-10BT)
    split: str = "train"  # split of the Hub data set
    text_field: str = "text"  # field or column that holds a document; meta.text: inside another
    revision: str | None = None  # commit or branch of the Hub data set (default: its newest commit)
    skip_bad: bool = False  # skip documents that are no texts, and count them
    # the shards
    data_dir: str = DATA_DIR  # directory to write
    shard_size: PositiveInt = 100_000_000  # tokens in a shard; shard 0 is for validation
    max_tokens: PositiveInt | None = None  # stop after this many, with validation (default: all)
    tokenizer: str = "gpt2"  # gpt2, bytes, or a tokenizer.json or the folder that it is in
    # the work
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


# ---- the documents, from a place on ----


def pydoc_documents() -> list[str]:
    """Python's documentation: language topics and the doc strings of the standard library. Each
    text once, in an order that is shuffled but always the same, so that validation is a fair
    sample."""
    import ast
    import random
    import sysconfig
    from pydoc_data.topics import topics

    texts = dict.fromkeys(topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(library.rglob("*.py")):
        if others & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    texts[text] = None
    texts = list(texts)
    random.Random(1337).shuffle(texts)
    return texts


def pydoc_from(place: tuple[int, int]):
    """Yield (text, place after it) of Python's documentation."""
    _, skip = place
    texts = itertools.islice(pydoc_documents(), skip, None)
    for read, text in enumerate(texts, start=skip + 1):
        yield text, (0, read)


def hub_name(config: DataConfig) -> str | None:
    return "sample-10BT" if config.name is None and config.dataset == FINEWEB_EDU else config.name


def describe_source(config: DataConfig, files: list[str], manifest: Manifest | None) -> str:
    """What exactly is read, so that a rerun days later sees the same documents: a commit of the Hub
    data set, or how many local files there are, their bytes, and a digest of their names and
    sizes."""
    if config.dataset == "pydoc":
        return platform.python_version()
    if files:
        sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]
        return f"{count(len(files), 'file')}, {sum(size for _, size in sizes):,} bytes, {digest}"
    if manifest and config.revision in (None, manifest.revision):
        return manifest.revision
    return find_commit(config.dataset, config.revision)


def files_of_hub(paths, names: list[str], text_field: str, place: tuple[int, int], options: dict):
    """Yield the documents of each file from a place on; it is fetched when it is asked for."""
    first, skip = place
    for number, path in enumerate(paths, start=first):
        yield file_documents(path, text_field, (number, skip), names[number], **options)
        skip = 0


def batches_of(sources, position: Position, skip_bad: bool):
    """Yield (texts with the place after each, position after them, what was skipped among them), a
    batch at a time.

    sources: iterables of (document, place after it). A batch ends with its source, since the next
    one has perhaps to be fetched. Raises UserError for what is not a text, unless skip_bad.
    """
    skipped = position.skipped
    place = position.file, position.document
    for source in sources:
        texts = []
        not_texts = []
        characters = 0
        for document, place in source:
            if isinstance(document, str):
                texts.append((document, place))
                characters += len(document)
            elif skip_bad:
                not_texts.append(document)
                skipped += 1
            else:
                hint = "--skip_bad skips such documents and counts them"
                raise UserError(f"{document}\nHINT: {hint}")
            if len(texts) == BATCH or characters >= BATCH_CHARACTERS:
                yield texts, Position(*place, skipped), not_texts
                texts = []
                not_texts = []
                characters = 0
        yield texts, Position(*place, skipped), not_texts


# ---- the shards ----


def start_manifest(config: DataConfig, files: list[str], tokenizer: Tokenizer) -> Manifest:
    """The manifest of data_dir to resume from, or a new one. Raises UserError if data_dir has the
    shards of another run."""
    old = read_manifest(config.data_dir)
    new = Manifest(
        dataset=config.dataset,
        name=hub_name(config),
        revision=describe_source(config, files, old),
        split=config.split,
        text_field=config.text_field,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.n_vocab,
        shard_size=config.shard_size,
    )
    if isinstance(tokenizer.state, dict):
        new.tokenizer_sha256 = tokenizer.identity.removeprefix("sha256:")
    if old is None:
        for path in Path(config.data_dir).glob("*train*"):
            if path.suffix in (".npy", ".bin"):
                raise UserError(
                    f"{path} already exists, without a manifest.json: choose another --data_dir"
                )
        return new
    check_same_settings(config, old, new)
    kept = get_tokenizer(find_tokenizer(config.data_dir, old))
    if kept.eot_token != tokenizer.eot_token:
        raise UserError(
            f"{config.data_dir} was begun with token {kept.eot_token} before each document, but"
            f" the tokenizer now names {tokenizer.eot_token}: choose another --data_dir"
        )
    try:
        for entry in old.shards:
            open_shard(Path(config.data_dir) / entry.file, entry.tokens)
    except UserError as error:
        raise UserError(
            f"{error}\nHINT: restore it, or delete {config.data_dir} and run this again"
        ) from None
    return old


def check_same_settings(config: DataConfig, old: Manifest, new: Manifest) -> None:
    """Raise UserError naming each setting in which the new manifest differs from the old one."""
    settings = (
        "dataset",
        "name",
        "revision",
        "split",
        "text_field",
        "tokenizer",
        "vocab_size",
        "shard_size",
        "tokenizer_sha256",
    )
    differences = [
        f"{key} was {getattr(old, key)}, is {getattr(new, key)}"
        for key in settings
        if getattr(old, key) != getattr(new, key)
    ]
    if config.max_tokens is not None and old.tokens > config.max_tokens:
        differences.append(f"max_tokens is {config.max_tokens}, {old.tokens} are written")
    if differences:
        raise UserError(
            f"{config.data_dir} was begun with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --data_dir, or delete this one"
        )


def keep_tokenizer(data_dir: str, tokenizer: Tokenizer) -> None:
    """Copy a custom tokenizer into the data directory."""
    if isinstance(tokenizer.state, dict):
        for name, text in tokenizer.state.items():
            with whole_file(Path(data_dir) / name) as file:
                file.write(text.encode())


def expected_tokens(config: DataConfig, files: list[str]) -> int | None:
    """About how many tokens data_dir will have at the end, or None if that can't be estimated."""
    if config.max_tokens is not None or config.dataset == "pydoc":
        return config.max_tokens
    if (config.dataset, hub_name(config)) == (FINEWEB_EDU, "sample-10BT"):
        return FINEWEB_EDU_10B_TOKENS if config.tokenizer == "gpt2" else None
    if files and all(file.lower().endswith((".txt", ".md")) for file in files):
        characters = sum(os.path.getsize(file) for file in files)
        return characters // (1 if config.tokenizer == "bytes" else 4)
    return None


def check_space(config: DataConfig, files: list[str], written: int) -> None:
    """Raise UserError if the bytes still to come, where they can be estimated, don't fit on the
    disk."""
    if (expected := expected_tokens(config, files)) is None:
        return
    needed = 2 * (expected - written)
    free = shutil.disk_usage(config.data_dir).free
    if free < 0.9 * needed:
        raise UserError(
            f"{config.data_dir} needs about {needed:,} bytes, {free:,} are free.\n"
            "HINT: choose a --data_dir on a larger disk, or fewer --max_tokens"
        )


def tokenized(batches, tokenizer: Tokenizer, files: list[str]):
    """Yield (tokens (n,) uint16, position after them, what was skipped) of each batch."""
    for texts, position, not_texts in batches:
        try:
            tokens = tokenizer.encode_documents([text for text, _ in texts])
        except EncoderMismatch as error:
            _, (file, number) = texts[error.index]
            raise UserError(f"{files[file]}, document {number}: {error}", code=1) from None
        yield tokens, position, not_texts


class Timed:
    """An iterator that measures how long its items take."""

    def __init__(self, items):
        self.items = iter(items)
        self.seconds = 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start


def generate(
    config: DataConfig, files: list[str], manifest: Manifest, tokenizer: Tokenizer
) -> list[NotText]:
    """Write the shards that the manifest does not have yet, and print where the time went; returns
    the first documents that were skipped. Raises UserError as ShardWriter does, and for a source
    that fills no more than the validation shard."""
    writer = ShardWriter(config.data_dir, manifest, tokenizer.eot_token)
    position = manifest.position or Position()
    place = position.file, position.document
    downloads = Path(config.data_dir) / "downloads.tmp"
    paths = Timed([])
    if config.dataset == "pydoc":
        names = [PYDOC]
        sources = [pydoc_from(place)]
    elif files:
        names = files
        sources = [documents(files, config.text_field, place)]
    else:
        name = hub_name(config)
        names, options = find_files(config.dataset, name, config.split, manifest.revision)
        # with a limit, fetch only the files that it needs
        paths = Timed(fetched(names[position.file :], downloads, config.max_tokens is None))
        sources = files_of_hub(paths, names, config.text_field, place, options)
    batches = Timed(batches_of(sources, position, config.skip_bad))
    arrays = Timed(tokenized(batches, tokenizer, names))
    first_skipped = []
    start = time.perf_counter()
    with tqdm(
        total=expected_tokens(config, files), initial=writer.tokens, unit=" tokens", unit_scale=True
    ) as bar:
        for tokens, position_after, not_texts in arrays:
            if config.max_tokens is not None:
                tokens = tokens[: config.max_tokens - writer.tokens + position.used]
            writer.add(tokens, position)
            bar.set_postfix_str(f"shard {len(manifest.shards)}", refresh=False)
            bar.update(writer.tokens - bar.n)
            position = position_after
            first_skipped = (first_skipped + not_texts)[:MAX_SKIPPED_SHOWN]
            if writer.tokens == config.max_tokens:
                break
    shutil.rmtree(downloads, ignore_errors=True)

    if not manifest.shards:
        if writer.tokens == 0:
            raise UserError(
                f"{config.dataset} has no documents"
                + (f" but {count(position.skipped, 'document')} skipped" if first_skipped else "")
            )
        raise UserError(
            f"{config.dataset} has {writer.tokens:,} tokens, which all fit into shard 0, the"
            " validation shard: nothing is left to train on.\n"
            f"HINT: --shard_size {max(1, writer.tokens // 10)}"
        )
    writer.finish(position.skipped)
    total = time.perf_counter() - start
    waited = f"waited for the network {paths.seconds:.0f} s, " if paths.seconds else ""
    print(
        f"read {batches.seconds - paths.seconds:.0f} s, {waited}tokenized"
        f" {arrays.seconds - batches.seconds:.0f} s, wrote {total - arrays.seconds:.0f} s"
    )
    return first_skipped


def verify(config: DataConfig) -> None:
    """Check every shard of data_dir against its manifest. Raises UserError naming each bad one."""
    manifest = read_manifest(config.data_dir)
    if manifest is None:
        raise UserError(f"{config.data_dir} has no manifest.json to verify against")
    find_tokenizer(config.data_dir, manifest)
    bad = []
    for entry in tqdm(manifest.shards, unit=" shards"):
        try:
            verify_shard(config.data_dir, manifest, entry)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(
            "\n".join([*bad, f"{len(bad)} of {len(manifest.shards)} shards are bad"]), code=1
        )
    state = "complete" if manifest.complete else "not complete: run the generator again"
    print(f"{config.data_dir}: {len(manifest.shards)} shards are good; the data set is {state}")


def write_data_set(config: DataConfig) -> Manifest:
    """Write data_dir, or resume writing it, to the end; returns its manifest."""
    tokenizer = get_tokenizer(config.tokenizer)
    files, notes = ([], []) if config.dataset == "pydoc" else local_files(config.dataset)
    with only_writer(config.data_dir, "*.npy", "manifest.json", "tokenizer*.json"):
        manifest = start_manifest(config, files, tokenizer)
        if manifest.complete:
            return manifest
        written = len(manifest.shards)
        check_space(config, files, manifest.tokens)
        source = PYDOC if config.dataset == "pydoc" else config.dataset
        print(
            f"{source} -> {config.data_dir}, tokenizer {config.tokenizer} ({tokenizer.encoder}),"
            f" shards of {config.shard_size:,} tokens"
            + (f"; resuming after {count(written, 'shard')}" if written else ""),
            flush=True,
        )
        print_notes([*tokenizer.notes, *notes])
        try:
            keep_tokenizer(config.data_dir, tokenizer)
            first_skipped = generate(config, files, manifest, tokenizer)
        except OSError as error:
            message = f"{config.data_dir} can't be written: {one_line_error(error)}"
            raise UserError(
                f"{message}\nHINT: make room and run the same command again", code=1
            ) from None
    if first_skipped:
        print(f"skipped, as no texts: {count(manifest.skipped, 'document')}; the first here:")
        for document in first_skipped:
            print(f"    {document}")
    return manifest


@command
def main(argv=None) -> int:
    config = parse(DataConfig, argv, __doc__, PRESETS)
    if config.verify:
        verify(config)
        return 0
    if config.max_tokens is not None and config.max_tokens <= config.shard_size:
        raise UserError(
            f"--max_tokens {config.max_tokens} all fit into shard 0, the validation shard: nothing"
            f" is left to train on.\nHINT: --shard_size {max(1, config.max_tokens // 10)}"
        )
    start = time.time()
    before = read_manifest(config.data_dir)
    manifest = write_data_set(config)
    documents_written = sum(entry.documents for entry in manifest.shards)
    how = f" in {time.time() - start:.0f} s"
    if before and before.complete:
        how = "; it was already complete"
        if config.max_tokens is not None and manifest.tokens < config.max_tokens:
            how += (
                f" and does not grow to --max_tokens {config.max_tokens:,}: choose another"
                " --data_dir for that"
            )
    print(
        f"{config.data_dir}: {count(documents_written, 'document')}, {manifest.tokens:,} tokens, "
        f"{count(len(manifest.shards), 'shard')}, {2 * manifest.tokens:,} bytes{how}"
    )
    last = manifest.shards[-1].tokens
    if last < config.shard_size:
        print(f"the last shard is shorter, as it should be: {count(last, 'token')}")
    print(f"next: {shlex.join(next_command(config))}")
    return 0


def next_command(config: DataConfig) -> list[str]:
    words = ["python", "train.py"]
    if config.preset == "demo":
        words += ["--preset", "demo"]
    if config.data_dir != PRESETS[config.preset].get("data_dir", DATA_DIR):
        words += ["--data_dir", config.data_dir]
    return words


if __name__ == "__main__":
    sys.exit(main())
