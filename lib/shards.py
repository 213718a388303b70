"""The tokens on disk: shards of uint16 tokens, the manifest beside them, and the loader that reads
them back.

    writer = ShardWriter("mydata", manifest, eot_token)                 # documents' tokens in
    loader = TokenLoader("mydata", "train", seq_len=1024, batch_size=8, total_batch_size=65536)
    for x, y in loader.batches(step=0): ...                             # (B, T) batches out

The shards of a split form one stream. Sequence i is its tokens i*T .. i*T+T, the last one only a
target; step s is the sequences s*N .. (s+1)*N-1, N to a step. So a step depends on its number
alone, whatever the number of ranks.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.cli import UserError, first_line
from lib.files import if_possible, whole_file
from lib.tokenizer import GPT2_TOKENS

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"  # the data set of GPT-2's default run
DATA_DIR = "edu_fineweb10B"
DEMO_DATA_DIR = "demo/data"
OWN_TOKENIZER = "tokenizer.json"  # lies beside the manifest if it is neither gpt2 nor bytes
BIN_MAGIC = 20240520  # llm.c's and modded-nanogpt's .bin shards: uint16 tokens of GPT-2
BIN_MAGIC_LLAMA = 20240801  # llm.c's .bin shards of Llama 3: uint32 tokens
BIN_HEADER = 256 * 4  # bytes


def is_on_hub(data: dict) -> bool:
    """Is a data set, given as TokenLoader.identity(), one of the Hub? Those have a commit as their
    revision."""
    return re.fullmatch(r"[0-9a-f]{40}", data.get("revision") or "") is not None


def public_name(data: dict) -> str | None:
    """The name of a data set as others may read it: of local files the base name alone."""
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
    """Where the generator goes on: at a batch of documents, the beginning of which may be in shards
    already."""

    file: int = 0  # number of the file in the list of the source's files
    document: int = 0  # documents of that file before the batch
    skipped: int = 0  # documents before the batch, in all files, that were left out
    used: int = 0  # tokens of the batch that are in shards already


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
    shard_size: int  # tokens in a shard, of which the last one may have fewer
    shards: list[ShardEntry] = dataclasses.field(default_factory=list)
    skipped: int = 0  # documents that were left out because they are no texts
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
        raise UserError(f"{path} can't be read: {first_line(error)}") from None


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


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


# ---- a shard ----


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """The tokens of a .npy or .bin shard: uint16 (tokens,), memory-mapped, or in memory where the
    file system can't map files.

    A .bin file has llm.c's header, or is nanoGPT's train.bin or val.bin, which has none. Raises
    UserError if the file is not a whole shard, or has not as many tokens as given.
    """
    try:
        shard = read_npy(path) if path.suffix == ".npy" else read_bin(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short: {first_line(error)}") from None
    if tokens not in (None, len(shard)):
        raise UserError(f"{path} has {len(shard):,} tokens, its manifest says {tokens:,}")
    return shard


def read_npy(path: Path) -> np.ndarray:
    with memory_maps(path):
        shard = np.load(path, mmap_mode="r")
        check_shard_type(path, shard)
        check_size(path, shard.offset, len(shard))
        return shard
    with open(path, "rb") as file:
        shard = np.load(file)
        check_shard_type(path, shard)
        check_size(path, file.tell() - shard.nbytes, len(shard))
        return shard


def check_shard_type(path: Path, shard) -> None:
    if not isinstance(shard, np.ndarray) or shard.dtype != np.uint16 or shard.ndim != 1:
        found = f"{shard.dtype} {shard.shape}" if isinstance(shard, np.ndarray) else type(shard)
        raise UserError(f"{path} is not a shard: it holds {found}, not uint16 (tokens,)")


def check_size(path: Path, offset: int, tokens: int) -> None:
    size = path.stat().st_size
    if size != offset + 2 * tokens:
        raise UserError(
            f"{path} is damaged or cut short: its header says {tokens:,} tokens, its size "
            f"({size:,} bytes) {(size - offset) / 2:,.1f}"
        )


def read_bin(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    if has_no_header(path, header):
        if (path.parent / "meta.pkl").exists():
            raise UserError(
                f"{path} holds ids of a vocabulary of its own, which meta.pkl beside it describes"
                " (nanoGPT's characters), not GPT-2's tokens.\n"
                "HINT: make shards of the text itself with data_generator.py"
            )
        offset = 0
        tokens = path.stat().st_size // 2
    elif header[:2] == [BIN_MAGIC, 1] and len(header) == 3:
        offset = BIN_HEADER
        tokens = header[2]
    elif header[:1] == [BIN_MAGIC_LLAMA]:
        raise UserError(
            f"{path} holds Llama 3's tokens (llm.c's magic number {BIN_MAGIC_LLAMA}, uint32), which"
            " are not GPT-2's.\nHINT: make shards of the text itself with data_generator.py"
        )
    else:
        raise UserError(
            f"{path} is not a shard: its header is {header}, not [{BIN_MAGIC}, 1, tokens]"
        )
    check_size(path, offset, tokens)
    with memory_maps(path):
        return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(tokens,))
    return np.fromfile(path, dtype="<u2", offset=offset)


def has_no_header(path: Path, header: list[int]) -> bool:
    """Is this nanoGPT's train.bin or val.bin? Neither magic number can begin such a file: as two
    tokens they are above GPT-2's vocabulary."""
    return path.name in ("train.bin", "val.bin") and (
        not header or header[0] not in (BIN_MAGIC, BIN_MAGIC_LLAMA)
    )


def memory_maps(path: Path):
    return if_possible("memory maps", f"the tokens of {path.parent} are loaded a shard at a time")


def verify_shard(data_dir, manifest: Manifest, entry: ShardEntry) -> None:
    """Raises UserError if a shard is not what the manifest says: presence, size, type, sha256 and
    ids."""
    path = Path(data_dir) / entry.file
    largest = open_shard(path, entry.tokens).max()
    if sha256(path) != entry.sha256:
        raise UserError(f"{path}: its sha256 is not the manifest's")
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
        self.tokens = manifest.tokens  # so far, with the buffered
        self.filled = 0
        try:
            self.buffer = np.empty(manifest.shard_size, dtype=np.uint16)
        except (MemoryError, ValueError):
            raise UserError(
                f"--shard_size {manifest.shard_size}: a shard does not fit into this machine's"
                " memory; 100000000 takes 200 MB"
            ) from None

    def add(self, tokens: np.ndarray, position: Position) -> None:
        """Append a batch (tokens,), which begins at the position, to the stream, without the tokens
        that are in shards already. Raises UserError as `write`."""
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
        """Write what is buffered as the last shard. skipped: documents that were left out."""
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


class TokenLoader:
    """The tokens of one split of a directory of shards, step by step.

    After the last whole sequence the stream begins again.

    data_dir: the directory. split: "train" or "val". seq_len (T), total_batch_size: tokens.
    batch_size (B): sequences. pin_memory: batches lie in page-locked memory, which a GPU copies
    from while it computes. shuffle: None, or a seed by which each epoch has an order of its own.
    Raises UserError if the directory has no such shards, a bad one, or too few tokens for one step,
    or if a step can't be shared out evenly.

    tokenizer: what get_tokenizer takes for these tokens; n_vocab: its number of ids; notes: what a
    run has to say of files that are taken for something.
    """

    def __init__(
        self, data_dir, split, seq_len, batch_size, total_batch_size, rank=0, world_size=1, *,
        pin_memory=False, shuffle=None,
    ):  # fmt: skip
        self.data_dir = data_dir
        self.T = seq_len
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.shuffle = shuffle
        self.step_tokens = total_batch_size
        self.set_batch_size(batch_size)
        self.sequences_per_step = total_batch_size // seq_len
        self.manifest = read_manifest(data_dir)
        self.tokenizer = find_tokenizer(data_dir, self.manifest) if self.manifest else "gpt2"
        self.n_vocab = self.manifest.vocab_size if self.manifest else GPT2_TOKENS
        self.paths = []
        self.lengths = []
        self.maps = []  # of each shard its memory map, or None where there are none
        for path, tokens in find_shards(data_dir, split, self.manifest).items():
            shard = open_shard(path, tokens)
            if not len(shard):
                continue
            self.paths.append(path)
            self.lengths.append(len(shard))
            # the array below the map: each slice of a memmap is a new memmap, which takes longer
            self.maps.append(np.asarray(shard) if isinstance(shard, np.memmap) else None)
        self.notes = [
            f"{path} has no header: it is taken for nanoGPT's, raw uint16 tokens of GPT-2"
            for path in self.paths
            if path.suffix == ".bin" and has_no_header(path, np.fromfile(path, "<i4", 1).tolist())
        ]
        self.load_shard = functools.lru_cache(maxsize=2)(open_shard)
        self.ends = np.cumsum(self.lengths)
        self.tokens = int(self.ends[-1])
        self.sequences = (self.tokens - 1) // seq_len
        # whole ones, before a sequence comes a second time
        self.steps = self.sequences // self.sequences_per_step
        if self.steps == 0:
            raise UserError(
                f"the {split} shards of {data_dir} have {self.tokens:,} tokens, one step needs "
                f"{total_batch_size + 1:,} (--total_batch_size and one): take a smaller one, or"
                " more data"
            )
        self.epoch = None  # whose order is kept
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self.ahead = {}  # (step, micro_step) -> future of the batch that will be wanted next

    def set_batch_size(self, batch_size: int) -> None:
        """Share a step out in micro-batches of so many sequences. Raises UserError if it can't be
        shared out evenly."""
        self.B = batch_size
        self.micro_steps = count_micro_steps(self.T, self.B, self.step_tokens, self.world_size)

    def identity(self) -> dict:
        """What identifies the data, wherever the directory lies: a resumed run compares it with its
        checkpoint's."""
        contents = [[path.name, n] for path, n in zip(self.paths, self.lengths, strict=True)]
        origin = {"dataset": None, "name": None, "revision": None}
        tokenizer = self.tokenizer
        if self.manifest:
            contents += [entry.sha256 for entry in self.manifest.shards]
            origin = {key: getattr(self.manifest, key) for key in origin}
            if self.manifest.tokenizer_sha256:
                tokenizer = f"sha256:{self.manifest.tokenizer_sha256}"
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        return origin | {"tokenizer": tokenizer, "tokens": self.tokens, "sha256": digest}

    def batches(self, step: int):
        """Yield the micro-batches of this rank at a step: (x, y), each (B, T) int64; y is x one
        token ahead.

        While the caller works on one, a thread reads the next. Raises UserError if a token is not
        below the vocabulary.
        """
        for micro_step in range(self.micro_steps):
            future = self.ahead.pop((step, micro_step), None) or self.thread.submit(
                self.read_batch, step, micro_step
            )
            following = (step, micro_step + 1)
            if micro_step + 1 == self.micro_steps:
                following = (step + 1, 0)
            self.ahead = {following: self.thread.submit(self.read_batch, *following)}
            yield future.result()

    def read_batch(self, step: int, micro_step: int):
        """One micro-batch. In a step, rank 0 takes the first B sequences, rank 1 the next B, and so
        on, in turn."""
        import torch

        first = step * self.sequences_per_step + (micro_step * self.world_size + self.rank) * self.B
        epoch, place = divmod(first, self.sequences)
        if self.shuffle is None and place + self.B <= self.sequences:  # they lie one after another
            tokens = np.empty(self.B * self.T + 1, dtype=np.int64)
            self.read(place * self.T, tokens)
            x = tokens[:-1].reshape(self.B, self.T)
            y = tokens[1:].reshape(self.B, self.T)
        else:
            tokens = np.empty((self.B, self.T + 1), dtype=np.int64)
            for row in range(self.B):
                epoch, place = divmod(first + row, self.sequences)
                if self.shuffle is not None:
                    place = int(self.order(epoch)[place])
                self.read(place * self.T, tokens[row])
            x = tokens[:, :-1].copy()
            y = tokens[:, 1:].copy()
        x = torch.from_numpy(x)  # (B, T)
        y = torch.from_numpy(y)  # (B, T)
        return (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)

    def read(self, start: int, tokens: np.ndarray) -> None:
        """Fill an array (n,) with the tokens of the stream from `start` on."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        filled = 0
        while filled < len(tokens):  # once, or more often where they go on in the next shard
            offset = start + filled - int(self.ends[shard] - self.lengths[shard])
            part = self.shard(shard)[offset : offset + len(tokens) - filled]
            if part.max() >= self.n_vocab:
                self.refuse_token(shard, offset, part)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def shard(self, number: int) -> np.ndarray:
        """The tokens of a shard; without memory maps the two last ones stay in memory."""
        if self.maps[number] is not None:
            return self.maps[number]
        return self.load_shard(self.paths[number])

    def refuse_token(self, shard: int, offset: int, part: np.ndarray):
        at = int(np.argmax(part >= self.n_vocab))
        raise UserError(
            f"{self.paths[shard]} has token {part[at]}, which is not below the vocabulary's "
            f"{self.n_vocab}, at place {offset + at:,}: the file is damaged, or made with another"
            " tokenizer",
            alone=True,
        )

    def order(self, epoch: int) -> np.ndarray:
        """The sequences in the order of an epoch, (sequences,). RandomState's numbers are the same
        in every version of numpy."""
        if self.epoch != epoch:
            words = [self.shuffle % 2**32, epoch]
            if self.shuffle >= 2**32:
                words.append(self.shuffle // 2**32)
            order = np.random.RandomState(words).permutation(self.sequences)
            self.epoch_order = order.astype(np.uint32)
            self.epoch = epoch
        return self.epoch_order


def count_micro_steps(seq_len: int, batch_size: int, total_batch_size: int, world_size: int) -> int:
    """Micro-batches of each rank in a step. Raises UserError with the nearest settings that fit if
    they don't."""
    per_micro_step = seq_len * batch_size * world_size
    if total_batch_size % per_micro_step == 0:
        return total_batch_size // per_micro_step
    fits = [
        B for B in range(1, batch_size + 1) if total_batch_size % (B * seq_len * world_size) == 0
    ]
    nearest = max(1, round(total_batch_size / per_micro_step)) * per_micro_step
    fitting = f"--batch_size {fits[-1]}" if fits else f"--total_batch_size {nearest}"
    raise UserError(
        f"--total_batch_size {total_batch_size} is not a multiple of --batch_size {batch_size} x "
        f"--seq_len {seq_len} x {world_size} ranks = {per_micro_step}\nHINT: {fitting} fits"
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
