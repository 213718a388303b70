"""Tokens on disk: the loader against one long array, shards that are bad, memory."""

import errno
import hashlib
import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shards

from lib.cli import UserError
from lib.shards import TokenLoader, read_manifest, write_manifest


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
        (tmp_path / name).write_bytes(bin_shard(part))
    loader = TokenLoader(tmp_path, "train", 10, 2, 20)
    assert loader.tokenizer == "gpt2" and loader.tokens == 600
    x, y = next(loader.batches(0))
    assert np.array_equal(x.flatten(), tokens[300:320]) and np.array_equal(
        y.flatten(), tokens[301:321]
    )


def order(directory, seed, epoch, world_size=1, B=1) -> list[int]:
    """The sequences of an epoch in the order in which they are read, told by their first token."""
    words = (directory, "train", 4, B, 4 * B * world_size)
    loaders = [TokenLoader(*words, r, world_size, shuffle=seed) for r in range(world_size)]
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


@pytest.mark.parametrize("seed", [0, 1337, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1])
def test_the_order_of_an_epoch_is_numpys(seed, tmp_path):
    np.save(tmp_path / "train_0.npy", np.repeat(np.arange(51), 4).astype(np.uint16))
    for epoch in (0, 1, 7):
        words = [seed, epoch] if seed < 2**32 else [seed % 2**32, epoch, seed // 2**32]
        expected = np.random.RandomState(words).permutation(50)
        assert order(tmp_path, seed, epoch) == expected.tolist()


def test_seeds_have_orders_of_their_own(tmp_path):
    np.save(tmp_path / "train_0.npy", np.repeat(np.arange(51), 4).astype(np.uint16))
    seeds = [1, 2, 2**32 + 1, 2**33 + 1]
    assert len({tuple(order(tmp_path, seed, 0)) for seed in seeds}) == len(seeds)


def without_memory_maps(monkeypatch):
    """What a file system that can't map files does to numpy."""

    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(np.memmap, "__new__", refuse)


def test_without_memory_maps_two_shards_are_kept(tmp_path, monkeypatch, caplog):
    """The same batches in the same order, and one warning."""
    write_shards(tmp_path / "npy", {"train": [301, 57, 300, 200]})
    bins = tmp_path / "bin"
    bins.mkdir()
    for number, path in enumerate(sorted((tmp_path / "npy").glob("*.npy"))):
        (bins / f"train_{number}.bin").write_bytes(bin_shard(np.load(path)))
    for directory in (tmp_path / "npy", bins):
        for shuffle in (None, 1):
            words = (directory, "train", 8, 2, 16)
            mapped = TokenLoader(*words, shuffle=shuffle)
            with monkeypatch.context() as patch:
                without_memory_maps(patch)
                loaded = TokenLoader(*words, shuffle=shuffle)
                assert loaded.maps == [None] * 4 and loaded.tokens == mapped.tokens == 858
                for step in range(2 * mapped.steps):
                    ((x, y),) = mapped.batches(step)
                    ((x2, y2),) = loaded.batches(step)
                    assert torch.equal(x, x2) and torch.equal(y, y2)
            assert loaded.load_shard.cache_info().currsize == 2
    assert "has no memory maps: the tokens of" in caplog.text
    assert caplog.text.count("WARNING: ") == 2  # one of each directory


def bin_shard(tokens, magic=20240520, version=1) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.asarray(tokens, np.uint16).tobytes()


def test_raw_tokens_of_nanogpt(tmp_path):
    """train.bin and val.bin without a header are taken for GPT-2's tokens, and said to be."""
    tokens = np.random.default_rng(0).integers(0, 50257, 900).astype(np.uint16)
    tokens[:3] = 50256, 0, 1
    tokens[:600].tofile(tmp_path / "train.bin")
    tokens[600:].tofile(tmp_path / "val.bin")
    loader = TokenLoader(tmp_path, "train", 10, 2, 20)
    assert loader.tokens == 600 and loader.tokenizer == "gpt2" and loader.n_vocab == 50257
    x, y = next(loader.batches(0))
    assert np.array_equal(x.flatten(), tokens[:20]) and np.array_equal(y.flatten(), tokens[1:21])
    said = "has no header: it is taken for nanoGPT's, raw uint16 tokens of GPT-2"
    assert loader.notes == [f"{tmp_path / 'train.bin'} {said}"]
    assert TokenLoader(tmp_path, "val", 10, 2, 20).notes == [f"{tmp_path / 'val.bin'} {said}"]
    (tmp_path / "train.bin").unlink()  # the loader's thread may read what it has mapped
    (tmp_path / "train.bin").write_bytes(bin_shard(tokens))  # with a header it is llm.c's
    loader = TokenLoader(tmp_path, "train", 10, 2, 20)
    assert loader.tokens == 900 and loader.notes == []
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="train.bin is damaged or cut short"):
        TokenLoader(tmp_path, "train", 10, 2, 20)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="a vocabulary of its own, which meta.pkl beside it"):
        TokenLoader(tmp_path, "val", 10, 2, 20)


def test_tokens_of_llama_are_named(tmp_path):
    for name in ("fineweb_train_000001.bin", "train.bin"):
        (tmp_path / name).write_bytes(bin_shard(range(100), magic=20240801, version=7))
        with pytest.raises(UserError, match=f"{name} holds Llama 3's tokens .*20240801, uint32"):
            TokenLoader(tmp_path, "train", 10, 2, 20)
        (tmp_path / name).unlink()


def test_no_shards_of_a_split(tmp_path):
    """The message gives a command that works."""
    with pytest.raises(UserError, match=r"there are no val shards in .*`python data_generator.py"):
        TokenLoader(tmp_path / "my data", "val", 8, 1, 8)
    for manifest in (True, False):
        write_shards(tmp_path / str(manifest), {"train": [100]}, manifest=manifest)
        with pytest.raises(UserError) as error:
            TokenLoader(tmp_path / str(manifest), "val", 8, 1, 8)
        assert str(error.value).endswith(
            "/" + str(manifest) + ": --val_every 0 trains without validation"
        )
    with pytest.raises(UserError, match=r"--data_dir '.*my data'` makes them"):
        TokenLoader(tmp_path / "my data", "train", 8, 1, 8)


def test_a_tokenizer_beside_the_shards(tmp_path):
    write_shards(tmp_path, {"train": [100]})
    content = b'{"model": {}}'
    manifest = read_manifest(tmp_path)
    manifest.tokenizer = "tokenizer.json"
    manifest.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match="tokenizer.json is missing: the tokens of"):
        TokenLoader(tmp_path, "train", 8, 1, 8)
    (tmp_path / "tokenizer.json").write_bytes(content)
    loader = TokenLoader(tmp_path, "train", 8, 1, 8)
    assert loader.tokenizer == str(tmp_path / "tokenizer.json") and loader.n_vocab == 257
    assert loader.identity()["tokenizer"] == f"sha256:{manifest.tokenizer_sha256}"
    (tmp_path / "tokenizer.json").write_bytes(content + b" ")
    with pytest.raises(UserError, match="tokenizer.json is not the file that made the tokens of"):
        TokenLoader(tmp_path, "train", 8, 1, 8)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [], "position": null}', "\xff"])
def test_a_manifest_that_cannot_be_read(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json can't be read: "):
        read_manifest(tmp_path)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    write_shards(tmp_path, {"val": [10], "train": [100]})
    manifest = read_manifest(tmp_path)
    content = (tmp_path / "manifest.json").read_bytes()
    keys = "dataset name revision split text_field tokenizer vocab_size shard_size shards skipped"
    assert list(json.loads(content)) == [*keys.split(), "position", "complete"]
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == content


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


@pytest.mark.parametrize("name, place, step", [("000000", 150, 4), ("000001", 5, 6)])
def test_ids_above_the_vocabulary_do_not_reach_the_model(name, place, step, tmp_path):
    """The file and the place are named, of a sequence that begins in the shard before as well."""
    write_shards(tmp_path, {"train": [200, 100]})
    path = tmp_path / f"edufineweb_train_{name}.npy"
    tokens = np.load(path)
    tokens[place] = 257
    np.save(path, tokens)
    loader = TokenLoader(tmp_path, "train", 30, 1, 30)
    list(loader.batches(3))
    said = f"{path} has token 257, which is not below the vocabulary's 257, at place {place}:"
    with pytest.raises(UserError, match=said):
        list(loader.batches(step))


def test_the_loader_adds_little_memory(tmp_path):
    write_shards(tmp_path, {"train": [30_000_000, 30_000_000]})
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from lib.shards import TokenLoader
def own():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1000
before = own()
loader = TokenLoader({str(tmp_path)!r}, "train", 1024, 64, 65536)
for step in range(200):
    for _ in loader.batches(step): pass
print(own() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 64  # MB


def test_train_and_val_are_words_of_a_shards_name(tmp_path):
    """medieval_train.npy holds no validation, constraint_val.npy nothing to learn from."""
    for name, tokens in (("medieval_train_0.npy", 500), ("constraint_val_0.npy", 300)):
        np.save(tmp_path / name, np.zeros(tokens, dtype=np.uint16))
    np.save(tmp_path / "medieval_train_1.npy", np.zeros(0, dtype=np.uint16))  # nothing in it
    assert TokenLoader(tmp_path, "train", 8, 1, 8).tokens == 500
    assert TokenLoader(tmp_path, "val", 8, 1, 8).tokens == 300
