"""The loader against one long array: any shards, ranks, batches and orders; what it refuses."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shards

from lib.cli import UserError
from lib.loader import TokenLoader


def read_step(loaders, step: int, B: int):
    """(x, y) of all ranks together, each (sequences, T), in the order of the stream."""
    batches = [list(loader.batches(step, B)) for loader in loaders]
    in_order = [batches[r][m] for m in range(len(batches[0])) for r in range(len(loaders))]
    return tuple(np.concatenate([pair[side].numpy() for pair in in_order]) for side in (0, 1))


def test_a_step_depends_on_its_number_alone(tmp_path):
    """200 random combinations of shards, T, B, ranks and step, against one long array."""
    dice = random.Random(7)
    for number in range(200):
        T = dice.randint(1, 9)
        B = dice.randint(1, 4)
        ranks = dice.choice([1, 2, 4])
        per_step = 4 * B * dice.randint(1, 3)  # sequences; enough for 1, 2 and 4 ranks
        lengths = [dice.randint(1, 4 * T * per_step) for _ in range(dice.randint(1, 5))]
        lengths.append(max(1, per_step * T + 1 - sum(lengths)))
        data_dir = tmp_path / str(number)
        stream = np.concatenate(write_shards(data_dir, {"train": lengths}, seed=number))
        sequences = (len(stream) - 1) // T
        step = dice.randrange(0, 3 * (sequences // per_step + 1))
        loaders = [TokenLoader(data_dir, "train", T, per_step * T, r, ranks) for r in range(ranks)]
        x, y = read_step(loaders, step, B)
        windows = [(step * per_step + i) % sequences for i in range(per_step)]
        assert np.array_equal(x, [stream[w * T : w * T + T] for w in windows])
        assert np.array_equal(y, [stream[w * T + 1 : w * T + T + 1] for w in windows])


def test_the_batch_size_may_change_from_step_to_step(tmp_path):
    """What was read ahead for another batch size is not used."""
    stream = np.concatenate(write_shards(tmp_path, {"train": [101, 57, 300]}))
    loader = TokenLoader(tmp_path, "train", 8, 32)
    for step, B in enumerate((1, 4, 2, 2, 1)):
        x, _ = read_step([loader], step, B)
        assert np.array_equal(x.flatten(), stream[32 * step : 32 * step + 32])


def test_memory_is_pinned_only_if_asked(tmp_path, monkeypatch):
    """--device cpu on a machine with GPUs: pinning would open CUDA."""
    write_shards(tmp_path, {"train": [100]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("pinned"))
    assert next(TokenLoader(tmp_path, "train", 8, 8).batches(0, 1))[0].shape == (1, 8)


def test_an_epoch_reads_every_sequence_once(tmp_path):
    stream = np.concatenate(write_shards(tmp_path, {"train": [101, 57, 300]}))
    loader = TokenLoader(tmp_path, "train", 8, 8)
    assert loader.sequences == (458 - 1) // 8 == 57
    seen = [tuple(x.flatten().tolist()) for step in range(57) for x, _ in loader.batches(step, 1)]
    assert seen == [tuple(stream[8 * i : 8 * i + 8]) for i in range(57)]
    assert seen[0] == tuple(next(loader.batches(57, 1))[0].flatten().tolist())


def order(directory, seed, epoch) -> list[int]:
    """The sequences of an epoch in the order in which they are read, told by their first token."""
    loader = TokenLoader(directory, "train", 4, 4, shuffle=seed)
    steps = range(epoch * loader.sequences, (epoch + 1) * loader.sequences)
    return [int(x[0, 0]) for step in steps for x, _ in loader.batches(step, 1)]


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
    for ranks, B in ((1, 5), (2, 1), (4, 5)):
        loaders = [TokenLoader(tmp_path, "train", 4, 80, r, ranks, shuffle=1) for r in range(ranks)]
        for step in (0, 7, 10, 13):  # the steps 10 and 13 are of the second epoch
            x, _ = read_step(loaders, step, B)
            expected = (orders[1, 0] + orders[1, 1])[20 * step : 20 * step + 20]
            assert x[:, 0].tolist() == expected


@pytest.mark.parametrize("seed", [0, 1337, 2**32 - 1])
def test_the_order_of_an_epoch_is_numpys(seed, tmp_path):
    np.save(tmp_path / "train_0.npy", np.repeat(np.arange(51), 4).astype(np.uint16))
    for epoch in (0, 1, 7):
        expected = np.random.RandomState([seed, epoch]).permutation(50)
        assert order(tmp_path, seed, epoch) == expected.tolist()


@pytest.mark.parametrize(
    "B, ranks, message",
    [
        (3, 1, "is not a multiple of --batch_size 3 x --seq_len 8 x 1 ranks = 24\nHINT: --batch_s"),
        (8, 2, "HINT: --batch_size 4 fits"),
        (1, 3, "HINT: 2 ranks (--nproc_per_node) fit; a new run could use --total_batch_size 72"),
    ],
)
def test_a_step_that_does_not_come_out_even(B, ranks, message, tmp_path):
    write_shards(tmp_path, {"train": [500]})
    with pytest.raises(UserError) as error:
        TokenLoader(tmp_path, "train", 8, 64, 0, ranks).micro_steps(B)
    assert message in str(error.value)


@pytest.mark.parametrize("lengths", [[64], [40, 24], [0], [0, 0]])
def test_too_few_tokens_for_one_step(lengths, tmp_path):
    write_shards(tmp_path, {"train": lengths})
    with pytest.raises(UserError, match=f"have {sum(lengths)} tokens, but one step needs 65 "):
        TokenLoader(tmp_path, "train", 8, 64)


@pytest.mark.parametrize("name, place, step", [("000000", 150, 4), ("000001", 5, 6)])
def test_ids_above_the_vocabulary_do_not_reach_the_model(name, place, step, tmp_path):
    """The file and the place are named, of a sequence that begins in the shard before as well."""
    write_shards(tmp_path, {"train": [200, 100]})
    path = tmp_path / f"edufineweb_train_{name}.npy"
    tokens = np.load(path)
    tokens[place] = 257
    np.save(path, tokens)
    loader = TokenLoader(tmp_path, "train", 30, 30)
    list(loader.batches(3, 1))
    said = f"{path} has token 257, which is not below the vocabulary's 257, at position {place}:"
    with pytest.raises(UserError, match=said):
        list(loader.batches(step, 1))


def test_a_shard_that_becomes_shorter_is_one_message(tmp_path):
    """A memory map would end the process by SIGBUS."""
    write_shards(tmp_path, {"train": [5000, 5000]})
    loader = TokenLoader(tmp_path, "train", 10, 100)
    list(loader.batches(60, 10))
    path = tmp_path / "edufineweb_train_000001.npy"
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=f"{path} has become shorter during the run") as error:
        list(loader.batches(70, 10))
    assert error.value.code == 1 and error.value.alone


def test_a_shard_that_can_no_longer_be_read_is_one_message(tmp_path):
    write_shards(tmp_path, {"train": [5000, 5000]})
    loader = TokenLoader(tmp_path, "train", 10, 100)
    path = tmp_path / "edufineweb_train_000001.npy"
    path.unlink()
    said = f"{path} can't be read any more: No such file or directory"
    with pytest.raises(UserError, match=said) as error:
        list(loader.batches(60, 10))
    assert error.value.code == 1 and error.value.alone


def test_more_shards_than_files_may_be_open(tmp_path):
    """Every file is read, shuffled, by a process that may open 100."""
    np.save(tmp_path / "train_all.npy", np.arange(3001, dtype=np.uint16))
    for number in range(300):
        part = np.arange(10 * number, 10 * number + 10, dtype=np.uint16)
        np.save(tmp_path / f"train_{number:03d}.npy", part)
    (tmp_path / "train_all.npy").unlink()
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from lib.loader import TokenLoader
loader = TokenLoader({str(tmp_path)!r}, "train", 10, 10, shuffle=3)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
print(sum(int(x[0, 0]) for step in range(loader.steps) for x, _ in loader.batches(step, 1)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(sum(range(0, 2990, 10))), done.stderr


def test_the_loader_adds_little_memory(tmp_path):
    write_shards(tmp_path, {"train": [30_000_000, 30_000_000]})
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from lib.loader import TokenLoader
def own():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1000
before = own()
loader = TokenLoader({str(tmp_path)!r}, "train", 1024, 65536)
for step in range(200):
    for _ in loader.batches(step, 64): pass
print(own() - before)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MB
