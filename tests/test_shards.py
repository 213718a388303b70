"""Tokens on disk: the loader against one long array, shards that are bad, memory."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shards

from lib.cli import UserError
from lib.shards import TokenLoader, shuffled


def test_a_step_depends_on_its_number_alone(tmp_path):
    """200 random combinations of shards, T, B, ranks and step, against one long array."""
    dice = random.Random(7)
    for number in range(200):
        T, B, world_size, micro_steps = (
            dice.randint(1, 9),
            dice.randint(1, 4),
            dice.choice([1, 2, 4]),
            dice.randint(1, 3),
        )
        per_step = 4 * B * micro_steps  # sequences; enough for 1, 2 and 4 ranks
        lengths = [dice.randint(1, 4 * T * per_step) for _ in range(dice.randint(1, 5))]
        lengths.append(max(1, per_step * T + 1 - sum(lengths)))
        data_dir = tmp_path / str(number)
        stream = np.concatenate(write_shards(data_dir, {"train": lengths}, seed=number)).astype(
            np.int64
        )
        sequences = (len(stream) - 1) // T
        step = dice.randrange(0, 3 * (sequences // per_step + 1))
        loaders = [
            TokenLoader(data_dir, "train", T, B, per_step * T, rank, world_size)
            for rank in range(world_size)
        ]
        batches = [list(loader.batches(step)) for loader in loaders]
        in_turn = [batches[rank][m] for m in range(len(batches[0])) for rank in range(world_size)]
        x, y = (np.concatenate([pair[side].numpy() for pair in in_turn]) for side in (0, 1))
        windows = [(step * per_step + i) % sequences for i in range(per_step)]
        assert np.array_equal(x, [stream[w * T : w * T + T] for w in windows])
        assert np.array_equal(y, [stream[w * T + 1 : w * T + T + 1] for w in windows])


def test_memory_is_pinned_only_if_asked(tmp_path, monkeypatch):
    """--device cpu on a machine with GPUs: pinning would open CUDA."""
    write_shards(tmp_path, {"train": [100]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("pinned"))
    assert next(TokenLoader(tmp_path, "train", 8, 1, 8).batches(0))[0].shape == (1, 8)


def test_an_epoch_reads_every_sequence_once(tmp_path):
    stream = np.concatenate(write_shards(tmp_path, {"train": [101, 57, 300]}))
    loader = TokenLoader(tmp_path, "train", 8, 1, 8)
    assert loader.sequences == (458 - 1) // 8 == 57
    seen = [tuple(x.flatten().tolist()) for step in range(57) for x, _ in loader.batches(step)]
    assert seen == [tuple(stream[8 * i : 8 * i + 8]) for i in range(57)]
    assert seen[0] == tuple(next(loader.batches(57))[0].flatten().tolist())


def test_bin_shards_of_llm_c(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 900).astype(np.uint16)
    for name, part in (
        ("fineweb_val_000000.bin", tokens[:300]),
        ("fineweb_train_000001.bin", tokens[300:]),
    ):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, len(part)
        (tmp_path / name).write_bytes(header.tobytes() + part.tobytes())
    loader = TokenLoader(tmp_path, "train", 10, 2, 20)
    assert loader.tokenizer == "gpt2" and loader.tokens == 600
    x, y = next(loader.batches(0))
    assert np.array_equal(x.flatten(), tokens[300:320]) and np.array_equal(
        y.flatten(), tokens[301:321]
    )


def order(directory, seed, epoch, world_size=1, B=1) -> list[int]:
    """The sequences of an epoch in the order in which they are read, told by their first token."""
    loaders = [TokenLoader(directory, "train", 4, B, 4 * B * world_size, r, world_size, shuffle=seed)
               for r in range(world_size)]  # fmt: skip
    steps = range(epoch * loaders[0].sequences, (epoch + 1) * loaders[0].sequences)
    batches = [batch for step in steps for loader in loaders for batch in loader.batches(step)]
    return [int(row[0]) for x, _ in batches for row in x]


def test_a_shuffled_epoch_reads_every_sequence_once_in_an_order_of_its_own(tmp_path):
    tokens = np.repeat(np.arange(200), 4).astype(np.uint16)  # sequence i is four times the token i
    np.save(tmp_path / "train_0.npy", np.append(tokens, 0).astype(np.uint16))
    orders = {(seed, epoch): order(tmp_path, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    for places in orders.values():
        assert sorted(places) == list(range(200))
        steps = np.abs(np.diff(places))
        assert np.median(steps) > 30 and (steps == 1).sum() < 10  # neighbours are spread
    assert len(set(map(tuple, orders.values()))) == 4 and orders[1, 0] == order(tmp_path, 1, 0)
    assert order(tmp_path, None, 0) == order(tmp_path, None, 1) == list(range(200))
    for world_size, B in ((1, 5), (2, 1), (4, 5)):
        loaders = [
            TokenLoader(tmp_path, "train", 4, B, 80, r, world_size, shuffle=1)
            for r in range(world_size)
        ]
        for step in (0, 7, 13):  # the steps 10 and 13 are of the second epoch
            batches = [list(loader.batches(step)) for loader in loaders]
            in_turn = [batches[r][m] for m in range(len(batches[0])) for r in range(world_size)]
            got = [int(row[0]) for x, _ in in_turn for row in x]
            assert got == [(orders[1, 0] + orders[1, 1])[20 * step + i] for i in range(20)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    assert sorted(shuffled(i, n, "7 0") for i in range(n)) == list(range(n))


def test_all_places_are_equally_likely():
    """Where place 3 of 10 goes, over 2,000 keys: chi-squared with 9 degrees of freedom, 1 in 1,000
    is above 27.9."""
    counts = np.bincount([shuffled(3, 10, f"{key} 0") for key in range(2000)], minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_leftovers_of_a_download_are_no_shards(tmp_path):
    write_shards(tmp_path, {"val": [100], "train": [100]}, manifest=False)
    cache = tmp_path / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    for path in (
        cache / "train_1.bin.incomplete",
        tmp_path / "train_2.bin.incomplete",
        cache / "train_3.bin",
    ):
        path.write_bytes(b"half")
    assert TokenLoader(tmp_path, "train", 8, 1, 8).tokens == 100


DAMAGES = {
    "zero size": (lambda b: b"", "damaged or cut short"),
    "truncated": (lambda b: b[:-100], "damaged or cut short"),
    "header cut": (lambda b: b[:60], "damaged or cut short"),
    "too long": (lambda b: b + b"\0\0", "its header says 900 tokens"),
    "zeroed": (lambda b: bytes(len(b)), "damaged or cut short"),
    "another type": (lambda b: saved(np.zeros(900, np.int64)), r"it holds int64 \(900,\)"),
    "another shape": (
        lambda b: saved(np.zeros((30, 30), np.uint16)),
        r"it holds uint16 \(30, 30\)",
    ),
    "fewer tokens": (
        lambda b: saved(np.zeros(800, np.uint16)),
        "has 800 tokens, its manifest says 900",
    ),
}


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_shard_is_refused_at_opening(name, tmp_path):
    write_shards(tmp_path, {"val": [100], "train": [900, 900]})
    change, message = DAMAGES[name]
    path = tmp_path / "edufineweb_train_000002.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        TokenLoader(tmp_path, "train", 8, 1, 8)
    path.unlink()
    with pytest.raises(UserError, match="edufineweb_train_000002.npy is missing"):
        TokenLoader(tmp_path, "train", 8, 1, 8)


def test_a_bad_bin_shard_is_refused(tmp_path):
    path = tmp_path / "train_0.bin"
    for header, message in (
        ([1, 1, 5], "its header is"),
        ([20240520, 2, 5], "its header is"),
        ([20240520, 1, 500], "cut short"),
    ):
        content = np.zeros(256, dtype=np.int32)
        content[:3] = header
        path.write_bytes(content.tobytes() + bytes(10))
        with pytest.raises(UserError, match=message):
            TokenLoader(tmp_path, "train", 2, 1, 2)


def test_ids_above_the_vocabulary_do_not_reach_the_model(tmp_path):
    write_shards(tmp_path, {"train": [200]})
    tokens = np.load(tmp_path / "edufineweb_train_000000.npy")
    tokens[150] = 257
    np.save(tmp_path / "edufineweb_train_000000.npy", tokens)
    loader = TokenLoader(tmp_path, "train", 10, 1, 10)
    list(loader.batches(3))
    with pytest.raises(UserError, match="has token 257, which is not below the vocabulary's 257"):
        list(loader.batches(15))


def test_the_loader_adds_little_memory_and_is_there_at_once(tmp_path):
    write_shards(tmp_path, {"train": [30_000_000, 30_000_000]})
    program = f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from lib.shards import TokenLoader
def own():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1000
before, start = own(), time.time()
loader = TokenLoader({str(tmp_path)!r}, "train", 1024, 64, 65536)
next(loader.batches(0))
first = time.time() - start
for step in range(200):
    for _ in loader.batches(step): pass
print(first, own() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, done.stdout.split())
    assert megabytes < 64 and seconds < 1
