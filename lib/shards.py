"""The tokens on disk: shards of uint16 tokens, and the manifest beside them.

    writer = ShardWriter("mydata", manifest, eot_token)  # the tokens of documents go in
    stream = open_stream("mydata", "train")              # the shards of a split, as one stream
    stream.read(start=0, n=1025)                         # uint16 (1025,)

The files of other projects are read too; what each kind looks like is said where it is opened.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.cli import UserError, one_line_error
from lib.files import sha256, whole_file
from lib.tokenizer import GPT2_TOKENS

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"  # the data set of GPT-2's default run
DATA_DIR = "edu_fineweb10B"
DEMO_DATA_DIR = "demo/data"
OWN_TOKENIZER = "tokenizer.json"  # beside the manifest if it is neither gpt2 nor bytes
BIN_MAGIC = 20240520  # llm.c's and modded-nanogpt's .bin shards: uint16 tokens of GPT-2
BIN_HEADER = 256 * 4  # bytes


def is_on_hub(data: dict) -> bool:
    """True if a data set, given as Stream.identity(), is from the Hub: only those have a commit as
    their revision."""
    return re.fullmatch(r"[0-9a-f]{40}", data.get("revision") or "") is not None


def public_name(data: dict) -> str | None:
    """A data set's name for publication: for local files the base name only."""
    dataset = data.get("dataset")
    return dataset if dataset in (None, "pydoc") or is_on_hub(data) else Path(dataset).name


# ---- the manifest ----


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard."""

    file: str
    tokens: int
    documents: int  # that begin in it
    sha256: str


@dataclass(frozen=True)
class Position:
    """Where the generator resumes: at a batch of documents, of whose tokens the first `used` are
    already in a shard."""

    file: int = 0  # number of the file in the list of the source's files
    document: int = 0  # documents of that file before the batch
    skipped: int = 0  # documents before the batch, in all files, that are not text
    used: int = 0  # tokens of the batch that are already in a shard


@dataclass
class Manifest:
    """DATA_DIR/manifest.json: where the tokens come from, and which shards hold them. It has no
    times, so that equal runs give equal bytes."""

    dataset: str
    name: str | None  # configuration of a Hub data set
    revision: str | None  # commit of the Hub; number, size and digest of local files
    split: str
    text_field: str
    tokenizer: str  # gpt2, bytes, or tokenizer.json: a file beside the manifest
    vocab_size: int  # ids of the tokenizer
    shard_size: int  # tokens in a shard; the last one may have fewer
    shards: list[ShardEntry] = dataclasses.field(default_factory=list)
    skipped: int = 0  # documents that are not text
    position: Position | None = None  # None at the beginning, and when complete
    complete: bool = False
    tokenizer_sha256: str | None = None  # of tokenizer.json

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.shards)


def read_manifest(data_dir) -> Manifest | None:
    """DATA_DIR/manifest.json, or None where there is none. Raises UserError for one that can't be
    read."""
    path = Path(data_dir) / "manifest.json"
    try:
        content = json.loads(path.read_text())
        content["shards"] = [ShardEntry(**entry) for entry in content["shards"]]
        if content["position"] is not None:
            content["position"] = Position(**content["position"])
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read: {one_line_error(error)}") from None


def write_manifest(data_dir, manifest: Manifest) -> None:
    content = dataclasses.asdict(manifest)
    if manifest.tokenizer_sha256 is None:
        del content["tokenizer_sha256"]
    with whole_file(Path(data_dir) / "manifest.json") as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def find_tokenizer(data_dir, manifest: Manifest) -> str:
    """What get_tokenizer takes for the tokens of a directory: "gpt2", "bytes", or the path of its
    tokenizer.json. Raises UserError if that file is not the one that made the tokens."""
    if manifest.tokenizer != OWN_TOKENIZER:
        return manifest.tokenizer
    path = Path(data_dir) / OWN_TOKENIZER
    if not path.exists():
        raise UserError(f"{path} is missing: the tokens of {data_dir} were made with it")
    if sha256(path) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path} is not the file that made the tokens of {data_dir}: its sha256 is not the"
            " manifest's.\nHINT: restore it"
        )
    return str(path)


# ---- a shard ----


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of uint16 tokens. It is read with `os.pread` and never mapped into memory: a mapped
    file that becomes shorter kills the process, a read raises an error."""

    path: Path
    offset: int  # bytes of its header
    tokens: int

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start+n-1, uint16 (n,). Raises UserError if the file has become shorter
        or unreachable since it was opened."""
        place = self.offset + 2 * start
        data = b""
        try:
            while missing := 2 * n - len(data):  # a read may return fewer bytes than asked for
                piece = os.pread(open_file(self).fileno(), missing, place + len(data))
                if not piece:
                    message = f"{self.path} has become shorter during the run"
                    raise UserError(message, code=1, alone=True)
                data += piece
        except OSError as error:
            message = f"{self.path} can't be read any more: {error.strerror}"
            raise UserError(message, code=1, alone=True) from None
        return np.frombuffer(data, "<u2")


@functools.lru_cache(maxsize=64)
def open_file(shard: Shard):
    """The file of a shard. The last 64 stay open: on a network file system opening one takes about
    a millisecond, and a shuffled batch reads from many."""
    return open(shard.path, "rb", buffering=0)


def open_shard(path: Path, tokens: int | None = None) -> Shard:
    """A .npy or .bin file as a Shard.

    A .bin file has llm.c's header, or is nanoGPT's train.bin or val.bin, which has none. Raises
    UserError if the file is not a whole shard, or does not have the given number of tokens.
    """
    try:
        with open(path, "rb") as file:
            offset, found = (
                read_npy_header(file) if path.suffix == ".npy" else read_bin_header(file)
            )
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short: {one_line_error(error)}") from None
    if size != offset + 2 * found:
        raise UserError(
            f"{path} is damaged or cut short: its header says {found:,} tokens, its size "
            f"({size:,} bytes) {(size - offset) / 2:,.1f}"
        )
    if tokens not in (None, found):
        raise UserError(f"{path} has {found:,} tokens, its manifest says {tokens:,}")
    return Shard(path, offset, found)


def read_npy_header(file) -> tuple[int, int]:
    """(bytes before the tokens, number of tokens) of a .npy file."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint16 or len(shape) != 1:
        raise UserError(
            f"{file.name} is not a shard: it holds {dtype} {shape}, not uint16 (tokens,)"
        )
    return file.tell(), shape[0]


def read_bin_header(file) -> tuple[int, int]:
    """(bytes before the tokens, number of tokens) of a .bin file."""
    path = Path(file.name)
    header = np.frombuffer(file.read(12), "<i4").tolist()
    if has_no_header(path, header):
        if (path.parent / "meta.pkl").exists():
            raise UserError(
                f"{path} holds ids of its own vocabulary, which meta.pkl beside it describes"
                " (nanoGPT's characters), not GPT-2's tokens.\n"
                "HINT: make shards of the text itself with data_generator.py"
            )
        return 0, path.stat().st_size // 2
    if header[:2] != [BIN_MAGIC, 1] or len(header) < 3:
        raise UserError(
            f"{path} is not a shard: its header is {header}, not [{BIN_MAGIC}, 1, tokens]"
        )
    return BIN_HEADER, header[2]


def has_no_header(path: Path, header: list[int]) -> bool:
    """Is this nanoGPT's train.bin or val.bin? No header can be mistaken for such a file: as two
    tokens, the magic number is above GPT-2's vocabulary."""
    return path.name in ("train.bin", "val.bin") and header[:1] != [BIN_MAGIC]


def verify_shard(data_dir, manifest: Manifest, entry: ShardEntry) -> None:
    """Raises UserError if a shard is not what the manifest says: presence, size, type, sha256 and
    ids."""
    path = Path(data_dir) / entry.file
    shard = open_shard(path, entry.tokens)
    if sha256(path) != entry.sha256:
        raise UserError(f"{path}: its sha256 is not the manifest's")
    for start in range(0, shard.tokens, 2**24):
        largest = shard.read(start, min(2**24, shard.tokens - start)).max()
        if largest >= manifest.vocab_size:
            raise UserError(
                f"{path}: token {largest} is not below the vocabulary's {manifest.vocab_size}"
            )


# ---- writing ----


class ShardWriter:
    """Cuts a stream of tokens into shards. Each is written whole, and then the manifest with the
    position after it."""

    def __init__(self, data_dir, manifest: Manifest, eot_token: int):
        self.data_dir = Path(data_dir)
        self.manifest = manifest
        self.eot_token = eot_token
        self.tokens = manifest.tokens  # so far, including the buffer
        self.filled = 0
        self.buffer = np.empty(manifest.shard_size, dtype=np.uint16)

    def add(self, tokens: np.ndarray, position: Position) -> None:
        """Append a batch (tokens,), which begins at the position, to the stream, but for the tokens
        that are already in a shard. Raises UserError as `write`."""
        start = position.used
        while start < len(tokens):
            # only if a token is left: the last shard, full or not, is written by `finish`
            if self.filled == len(self.buffer):
                self.write(dataclasses.replace(position, used=start), position.skipped)
            part = tokens[start : start + len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            start += len(part)
            self.filled += len(part)
            self.tokens += len(part)

    def finish(self, skipped: int) -> None:
        """Write what is buffered as the last shard. skipped: documents that are not text."""
        self.write(None, skipped)

    def write(self, position: Position | None, skipped: int) -> None:
        """Write what is buffered as the next shard; position None: it is the last one.

        Raises UserError if the disk does not take it; what was there before is untouched.
        """
        number = len(self.manifest.shards)
        tokens = self.buffer[: self.filled]
        # the same prefix for every data set: the loader looks for train and val only
        path = self.data_dir / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        documents = int(np.count_nonzero(tokens == self.eot_token))
        try:
            # nothing is left where --max_tokens ends a continued run with its last whole shard
            if self.filled:
                with whole_file(path) as file:
                    np.save(file, tokens)
                entry = ShardEntry(path.name, len(tokens), documents, sha256(path))
                self.manifest.shards.append(entry)
            self.manifest.position = position
            self.manifest.skipped = skipped
            self.manifest.complete = position is None
            write_manifest(self.data_dir, self.manifest)
        except OSError as error:
            raise UserError(
                f"{path} can't be written: {error}; it needs {tokens.nbytes + 128:,} bytes, "
                f"{shutil.disk_usage(self.data_dir).free:,} are free.\n"
                f"HINT: the {number} shards before it are whole; make room and run the same command"
                " again",
                code=1,
            ) from None
        self.filled = 0


# ---- reading ----


@dataclass(frozen=True)
class Stream:
    """The shards of one split, as one stream of tokens."""

    shards: list[Shard]
    ends: list[int]  # of each shard in the stream, in tokens
    manifest: Manifest | None
    tokenizer: str  # tokenizer_spec of these tokens
    n_vocab: int  # ids of that tokenizer
    notes: list[str]  # assumptions made about the files, for the run to print

    @property
    def tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start+n-1, uint16 (n,). Raises UserError for a token that is not below
        n_vocab, and as Shard.read."""
        number = bisect.bisect_right(self.ends, start)  # the shard that has the first one
        parts = []
        while n:
            shard = self.shards[number]
            offset = start - (self.ends[number] - shard.tokens)
            part = shard.read(offset, min(n, shard.tokens - offset))
            if part.max() >= self.n_vocab:
                wrong = int(np.argmax(part >= self.n_vocab))
                raise UserError(
                    f"{shard.path} has token {part[wrong]}, which is not below the vocabulary's "
                    f"{self.n_vocab}, at position {offset + wrong:,}: the file is damaged, or was"
                    " made with another tokenizer",
                    alone=True,
                )
            parts.append(part)
            start += len(part)
            n -= len(part)
            number += 1
        return np.concatenate(parts)

    def sample(self) -> str:
        """A digest of some tokens of each shard: at its start, in its middle, at its end."""
        digest = hashlib.sha256()
        for shard in self.shards:
            n = min(256, shard.tokens)
            for start in (0, (shard.tokens - n) // 2, shard.tokens - n):
                digest.update(shard.read(start, n).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict:
        """What identifies the data, whatever its directory: a resumed run compares it with its
        checkpoint's."""
        contents = [[shard.path.name, shard.tokens] for shard in self.shards]
        origin = {"dataset": None, "name": None, "revision": None}
        tokenizer = self.tokenizer
        if self.manifest:
            contents += [entry.sha256 for entry in self.manifest.shards]
            origin = {key: getattr(self.manifest, key) for key in origin}
            if self.manifest.tokenizer_sha256:
                tokenizer = f"sha256:{self.manifest.tokenizer_sha256}"
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        identity = origin | {"tokenizer": tokenizer, "tokens": self.tokens, "sha256": digest}
        return identity | {"sample": self.sample()}


def open_stream(data_dir, split: str) -> Stream:
    """The shards of a split ("train" or "val"). Raises UserError if there are none, or a bad
    one."""
    manifest = read_manifest(data_dir)
    found = find_shards(data_dir, split, manifest)
    shards = [open_shard(path, tokens) for path, tokens in found.items()]
    shards = [shard for shard in shards if shard.tokens]
    return Stream(
        shards,
        ends=list(itertools.accumulate(shard.tokens for shard in shards)),
        manifest=manifest,
        tokenizer=find_tokenizer(data_dir, manifest) if manifest else "gpt2",
        n_vocab=manifest.vocab_size if manifest else GPT2_TOKENS,
        notes=[
            f"{shard.path} has no header: assuming nanoGPT's format, raw uint16 tokens of GPT-2"
            for shard in shards
            if shard.path.suffix == ".bin" and shard.offset == 0
        ],
    )


def find_shards(data_dir, split: str, manifest: Manifest | None) -> dict[Path, int | None]:
    """{path: tokens} of the shards of a split: those of the manifest, or without one all .npy and
    .bin files, whose tokens are not known. Raises UserError if there are none, with a command that
    works."""
    if manifest:
        listed = {Path(data_dir) / entry.file: entry.tokens for entry in manifest.shards}
    else:  # shards from elsewhere
        paths = sorted(Path(data_dir).glob("*"))
        listed = {path: None for path in paths if path.suffix in (".npy", ".bin")}
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")  # medieval_train.npy is no validation shard
    found = {path: tokens for path, tokens in listed.items() if word.search(path.name)}
    if found:
        return found
    message = f"there are no {split} shards in {data_dir}"
    if listed and split == "val":
        raise UserError(f"{message}: --val_every 0 trains without validation")
    flags = {DATA_DIR: "", DEMO_DATA_DIR: " --preset demo"}.get(
        str(data_dir), f" --data_dir {shlex.quote(str(data_dir))}"
    )
    raise UserError(f"{message}: `python data_generator.py{flags}` makes them")
