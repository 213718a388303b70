"""The tokens on disk: shards of uint16 tokens, the manifest beside them, and the loader that reads
them back.

    writer = ShardWriter("mydata", manifest)                                      # documents' tokens in
    loader = TokenLoader("mydata", "train", seq_len=1024, batch_size=8, total_batch_size=65536)
    for x, y in loader.batches(step=0): ...                                       # (B, T) batches out

The shards of a split form one stream. Sequence i is its tokens i*T .. i*T+T, the last one only a
target; step s is the sequences s*N .. (s+1)*N-1, N to a step. So a step depends on its number
alone, whatever the number of ranks.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from lib.cli import UserError, first_line
from lib.files import again_if_stale, if_possible, whole_file
from lib.tokenizer import GPT2_TOKENS, get_tokenizer

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"  # the data set of GPT-2's default run
DATA_DIR, DEMO_DATA_DIR = "edu_fineweb10B", "demo/data"
BIN_MAGIC, BIN_HEADER = (
    20240520,
    256 * 4,
)  # llm.c's and modded-nanogpt's .bin shards; header in bytes


def is_on_hub(data: dict) -> bool:
    """Is a data set, given as TokenLoader.identity(), one of the Hub? Those have a commit as their
    revision."""
    return re.fullmatch(r"[0-9a-f]{40}", data.get("revision") or "") is not None


def public_name(data: dict) -> str | None:
    """The name of a data set as others may read it: of local files the base name alone."""
    dataset = data.get("dataset")
    return dataset if dataset in (None, "pydoc") or is_on_hub(data) else Path(dataset).name


# ---- the format ----


def read_manifest(data_dir) -> dict | None:
    """DATA_DIR/manifest.json, or None where there is none. Raises UserError for one that can't be
    read."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(again_if_stale(path.read_text))
        if "shards" not in manifest:
            raise ValueError("it lists no shards")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from None


def open_shard(path: Path, tokens: int | None = None):
    """The tokens of a .npy or .bin shard as a memory-mapped uint16 array (tokens,); where the file
    system can't map files, as FileTokens. Raises UserError if the file is not a whole shard, or has
    not as many tokens as given."""
    size = 0
    try:
        size, (offset, count) = again_if_stale(os.path.getsize, path), read_header(path)
        if size != offset + 2 * count:
            raise UserError(f"{path} is damaged or cut short: its header says {count:,} tokens, its size "
                            f"({size:,} bytes) {(size - offset) / 2:,.1f}")  # fmt: skip
        if tokens not in (None, count):
            raise UserError(f"{path} has {count:,} tokens, its manifest says {tokens:,}")
        with if_possible("memory maps", f"the tokens of {path.parent} are read piece by piece"):
            # a plain array, because each slice of a memmap is a new memmap, which takes longer to
            # make
            return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,)))
        return FileTokens(path, offset, count)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({size:,} bytes): {first_line(error)}"
        ) from None


def read_header(path: Path) -> tuple[int, int]:
    """(bytes before the first token, tokens) of a shard. Raises UserError if it is of another kind
    or type."""
    with open(path, "rb") as file:
        if path.suffix == ".bin":
            header = np.frombuffer(file.read(12), dtype="<i4")
            if len(header) < 3 or header[0] != BIN_MAGIC or header[1] != 1:
                raise UserError(
                    f"{path} is not a shard: its header is {header.tolist()}, not [{BIN_MAGIC}, 1, tokens]"
                )
            return BIN_HEADER, int(header[2])
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if dtype != np.uint16 or len(shape) != 1:
            raise UserError(
                f"{path} is not a shard: it holds {dtype} {shape}, not uint16 (tokens,)"
            )
        return file.tell(), shape[0]


class FileTokens:
    """The tokens of a shard, read when they are asked for: slices of it are uint16 arrays."""

    def __init__(self, path: Path, offset: int, count: int):
        self.file, self.offset, self.count = open(path, "rb", buffering=0), offset, count

    def __len__(self):
        return self.count

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, _ = places.indices(self.count)
        parts, at, end = [], self.offset + 2 * start, self.offset + 2 * max(start, stop)
        while at < end:
            parts.append(os.pread(self.file.fileno(), end - at, at))  # may be less than asked for
            if not parts[-1]:
                raise UserError(f"{self.file.name} ends before token {stop:,}", alone=True)
            at += len(parts[-1])
        return np.frombuffer(b"".join(parts), dtype="<u2")

    def max(self) -> int:
        return max(int(self[i : i + 2**20].max()) for i in range(0, self.count, 2**20))


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def verify(data_dir, manifest: dict):
    """Check each shard against the manifest: presence, size, sha256, type and ids. Yields what is
    wrong, or None."""
    for entry in manifest["shards"]:
        path, wrong = Path(data_dir) / entry["file"], None
        try:
            largest = open_shard(path, entry["tokens"]).max()
            if sha256(path) != entry["sha256"]:
                wrong = f"{path}: its sha256 is not the manifest's"
            elif largest >= manifest["vocab_size"]:
                wrong = f"{path}: token {largest} is not below the vocabulary's {manifest['vocab_size']}"
        except UserError as error:
            wrong = str(error)
        yield wrong


# ---- writing ----


class ShardWriter:
    """Cuts a stream of tokens into shards. Each is written whole, and then the manifest with the
    position after it.

    A position says where the stream goes on: the state of the source before a batch of documents,
    and under "skip" how many of that batch's tokens are in shards already.
    """

    def __init__(self, data_dir, manifest: dict):
        self.data_dir, self.manifest = Path(data_dir), manifest
        self.tokens = sum(
            shard["tokens"] for shard in manifest["shards"]
        )  # so far, with the buffered
        self.filled = 0
        try:
            self.buffer = np.empty(manifest["shard_size"], dtype=np.uint16)
        except (MemoryError, ValueError):
            raise UserError(
                f"--shard_size {manifest['shard_size']}: a shard does not fit into this machine's memory; 100000000"
                " takes 200 MB"
            ) from None

    def add(self, tokens: np.ndarray, position: dict) -> None:
        """Append a batch (tokens,) to the stream, from position["skip"] on. Raises UserError as
        `write`."""
        start = position["skip"]
        while start < len(tokens):
            if self.filled == len(
                self.buffer
            ):  # and a token is left: the last shard is write(None)'s, full or not
                self.write(position | {"skip": start})
            part = tokens[start : start + len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            start, self.filled, self.tokens = (
                start + len(part),
                self.filled + len(part),
                self.tokens + len(part),
            )

    def write(self, position: dict | None) -> None:
        """Write what is buffered as the next shard; position None: it is the last one.

        Raises UserError if the disk does not take it; what was there before is untouched.
        """
        number, tokens = len(self.manifest["shards"]), self.buffer[: self.filled]
        # the same prefix for every data set: the loader looks for train and val only
        path = self.data_dir / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        documents = int(
            np.count_nonzero(tokens == get_tokenizer(self.manifest["tokenizer"]).eot_token)
        )
        try:
            if (
                self.filled
            ):  # nothing is left where --max_tokens ends a continued run with its last whole shard
                with whole_file(path) as file:
                    np.save(file, tokens)
                entry = {
                    "file": path.name,
                    "tokens": len(tokens),
                    "documents": documents,
                    "sha256": sha256(path),
                }
                self.manifest["shards"].append(entry)
            self.manifest |= {"position": position, "complete": position is None}
            with whole_file(self.data_dir / "manifest.json") as file:
                file.write(json.dumps(self.manifest, indent=1).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"{path} can't be written: {error}; it needs {tokens.nbytes + 128:,} bytes, "
                f"{shutil.disk_usage(self.data_dir).free:,} are free.\n"
                f"HINT: the {number} shards before it are whole; make room and run the same command again",
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
    """

    def __init__(
        self, data_dir, split, seq_len, batch_size, total_batch_size, rank=0, world_size=1, *, pin_memory=False,
        shuffle=None,
    ):  # fmt: skip
        self.data_dir, self.T, self.B, self.rank, self.world_size = (
            data_dir,
            seq_len,
            batch_size,
            rank,
            world_size,
        )
        self.pin_memory, self.shuffle = pin_memory, shuffle
        self.micro_steps = count_micro_steps(seq_len, batch_size, total_batch_size, world_size)
        self.step_tokens, self.sequences_per_step = total_batch_size, total_batch_size // seq_len
        self.manifest = read_manifest(data_dir)
        self.tokenizer = self.manifest["tokenizer"] if self.manifest else "gpt2"
        self.n_vocab = self.manifest["vocab_size"] if self.manifest else GPT2_TOKENS
        self.paths, self.shards = open_shards(data_dir, split, self.manifest)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])
        self.sequences = (self.tokens - 1) // seq_len
        self.steps = (
            self.sequences // self.sequences_per_step
        )  # whole ones, before a sequence comes a second time
        if self.steps == 0:
            raise UserError(
                f"the {split} shards of {data_dir} have {self.tokens:,} tokens, one step needs {total_batch_size + 1:,}"
                " (--total_batch_size and one): take a smaller one, or more data"
            )
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self.ahead = {}  # (step, micro_step) -> future of the batch that will be wanted next

    def identity(self) -> dict:
        """What identifies the data, wherever the directory lies: a resumed run compares it with its
        checkpoint's."""
        manifest = self.manifest or {"shards": []}
        contents = [
            (path.name, len(shard)) for path, shard in zip(self.paths, self.shards, strict=True)
        ]
        contents += [shard["sha256"] for shard in manifest["shards"]]
        origin = {key: manifest.get(key) for key in ("dataset", "name", "revision")}
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        return origin | {"tokenizer": self.tokenizer, "tokens": self.tokens, "sha256": digest}

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
            following = (
                (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
            )
            self.ahead = {following: self.thread.submit(self.read_batch, *following)}
            yield future.result()

    def read_batch(self, step: int, micro_step: int):
        """One micro-batch. In a step, rank 0 takes the first B sequences, rank 1 the next B, and so
        on, in turn."""
        import torch

        first = step * self.sequences_per_step + (micro_step * self.world_size + self.rank) * self.B
        parts = []
        for start, n in self.spans(first):
            tokens = self.read(start * self.T, n * self.T + 1)
            parts.append((tokens[:-1].reshape(n, self.T), tokens[1:].reshape(n, self.T)))
        x, y = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )  # (B, T) each
        return (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)

    def spans(self, first: int):
        """The places in the stream of the B sequences from the one that is `first`, counted over
        all epochs: yields (sequence of the stream, how many from there on)."""
        if self.shuffle is not None:
            for i in range(first, first + self.B):
                epoch, place = divmod(i, self.sequences)
                yield shuffled(place, self.sequences, f"{self.shuffle} {epoch}"), 1
            return
        end = first + self.B
        while first < end:  # once, or twice where the stream begins again
            start = first % self.sequences
            n = min(end - first, self.sequences - start)
            yield start, n
            first += n

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


def shuffled(i: int, n: int, key: str) -> int:
    """Place i of a permutation of 0 .. n-1 that follows from the key, without a table: a Feistel
    network (Luby and Rackoff 1988) permutes 0 .. 4^bits - 1, at least n numbers, and is applied
    again while the result is n or more."""
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> bits, i & (2**bits - 1)
        for number in range(4):
            digest = hashlib.blake2b(f"{key} {number} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & (2**bits - 1))
        i = left << bits | right
        if i < n:
            return i


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
    raise UserError(
        f"--total_batch_size {total_batch_size} is not a multiple of --batch_size {batch_size} x --seq_len {seq_len}"
        f" x {world_size} ranks = {per_micro_step}\n"
        + (
            f"HINT: --batch_size {fits[-1]} fits"
            if fits
            else f"HINT: --total_batch_size {nearest} fits"
        )
    )


def open_shards(data_dir, split: str, manifest: dict | None) -> tuple[list[Path], list[np.ndarray]]:
    """(paths, tokens) of the shards of a split: those of the manifest, or without one all .npy and
    .bin files. Raises UserError if there are none, with the command that makes them."""
    if manifest:
        listed = {Path(data_dir) / shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    else:  # shards from elsewhere
        listed = {
            path: None
            for path in sorted(Path(data_dir).glob("*"))
            if path.suffix in (".npy", ".bin")
        }
    paths = [path for path in listed if split in path.name]
    if not paths:
        flags = {DATA_DIR: "", DEMO_DATA_DIR: " --preset demo"}.get(
            str(data_dir), f" --data_dir {data_dir}"
        )
        raise UserError(
            f"there are no {split} shards in {data_dir}: `python data_generator.py{flags}` makes them"
        )
    return paths, [open_shard(path, listed[path]) for path in paths]
