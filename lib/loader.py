"""How a step finds its tokens, on any number of GPUs.

    loader = TokenLoader("mydata", "train", seq_len=1024, total_batch_size=524288)
    for x, y in loader.batches(step=0, batch_size=8): ...       # 64 micro-batches, each (B, T)

The shards of a split form one stream. Sequence i is its tokens i*T .. i*T+T; the last of them is
only a target. Step s is the sequences s*N .. (s+1)*N-1, with N = total_batch_size / T; after the
last one the stream starts over. So the tokens of a step depend on its number alone: ranks and
micro-batches divide them up, and never change what is in a step.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lib.cli import UserError
from lib.shards import open_stream


class TokenLoader:
    """The tokens of one split of a data directory, step by step, for one rank.

    data_dir: a directory of shards. split: "train" or "val". seq_len (T), total_batch_size: tokens.
    pin_memory: batches are in page-locked memory, from which a GPU copies while it computes.
    shuffle: None, or a seed that gives each epoch its own order. Raises UserError if the directory
    has no such shards, a bad one, or too few tokens for one step, or if the ranks can't get equal
    shares of a step.
    """

    def __init__(
        self, data_dir, split, seq_len, total_batch_size, rank=0, world_size=1, *,
        pin_memory=False, shuffle=None,
    ):  # fmt: skip
        self.T = seq_len
        self.tokens_per_step = total_batch_size
        self.sequences_per_step = total_batch_size // seq_len
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.shuffle = shuffle
        self.share = self.micro_steps(batch_size=1)  # sequences of this rank in a step
        self.stream = open_stream(data_dir, split)
        self.sequences = (self.stream.tokens - 1) // seq_len  # in an epoch
        self.steps = self.sequences // self.sequences_per_step  # in an epoch, whole ones
        if self.steps < 1:
            raise UserError(
                f"the {split} shards of {data_dir} have {self.stream.tokens:,} tokens, but one step"
                f" needs {total_batch_size + 1:,} (--total_batch_size and one more): choose a"
                " smaller one, or more data"
            )
        self.shuffled_epoch = None  # the epoch whose order self.order is
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self.ahead = {}  # being read ahead: (step, micro_step, batch_size) -> future

    def micro_steps(self, batch_size: int) -> int:
        """Micro-batches of each rank in a step. Raises UserError unless they divide it evenly."""
        tokens = batch_size * self.T * self.world_size  # in a micro-step, over all ranks
        if self.tokens_per_step % tokens == 0:
            return self.tokens_per_step // tokens
        share, rest = divmod(self.tokens_per_step, self.T * self.world_size)
        if rest == 0:
            fits = max(B for B in range(1, batch_size) if share % B == 0)
            hint = f"--batch_size {fits} fits"
        else:
            nearest = max(1, round(self.tokens_per_step / tokens)) * tokens
            hint = f"a new run could use --total_batch_size {nearest}"
            if self.tokens_per_step % self.T == 0:  # the number of ranks may change on resuming
                n = self.sequences_per_step
                fits = max(ranks for ranks in range(1, self.world_size) if n % ranks == 0)
                hint = f"{fits} ranks (--nproc_per_node) fit; {hint}"
        of_batch = f"--batch_size {batch_size} x " if batch_size > 1 else ""
        raise UserError(
            f"--total_batch_size {self.tokens_per_step} is not a multiple of {of_batch}"
            f"--seq_len {self.T} x {self.world_size} ranks = {tokens}\nHINT: {hint}"
        )

    def batches(self, step: int, batch_size: int):
        """Yield this rank's micro-batches of a step: (x, y), each (B, T) int64; y is x shifted by
        one token.

        While the caller works on one, a thread reads the next. Raises what Stream.read raises.
        """
        micro_steps = self.micro_steps(batch_size)
        for micro_step in range(micro_steps):
            wanted = (step, micro_step, batch_size)
            following = (step, micro_step + 1, batch_size)
            if micro_step + 1 == micro_steps:
                following = (step + 1, 0, batch_size)
            batch = self.ahead.get(wanted) or self.thread.submit(self.read_batch, *wanted)
            self.ahead = {following: self.thread.submit(self.read_batch, *following)}
            yield batch.result()

    def read_batch(self, step: int, micro_step: int, batch_size: int):
        """One micro-batch: rank 0 takes the first batch_size sequences, rank 1 the next, ..."""
        first = step * self.sequences_per_step
        first += (micro_step * self.world_size + self.rank) * batch_size
        rows = [
            self.stream.read(self.place(number) * self.T, self.T + 1)
            for number in range(first, first + batch_size)
        ]
        tokens = np.stack(rows)  # (B, T + 1)
        x = torch.from_numpy(tokens[:, :-1].astype(np.int64))  # (B, T)
        y = torch.from_numpy(tokens[:, 1:].astype(np.int64))  # (B, T)
        return (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)

    def place(self, number: int) -> int:
        """Index in the stream of the number-th sequence a run reads, counted over all epochs."""
        epoch, place = divmod(number, self.sequences)
        if self.shuffle is None:
            return place
        if self.shuffled_epoch != epoch:  # RandomState's orders are the same in every numpy
            self.order = np.random.RandomState([self.shuffle, epoch]).permutation(self.sequences)
            self.shuffled_epoch = epoch
        return int(self.order[place])
