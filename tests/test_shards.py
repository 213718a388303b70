"""Tokens on disk: every kind of shard, the manifest, and files that are bad."""

import hashlib
import io
import json

import numpy as np
import pytest
from conftest import write_shards

from lib.cli import UserError
from lib.shards import open_stream, read_manifest, write_manifest


def test_bin_shards_of_llm_c(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 900).astype(np.uint16)
    for name, part in (
        ("fineweb_val_000000.bin", tokens[:300]),
        ("fineweb_train_000001.bin", tokens[300:]),
    ):
        (tmp_path / name).write_bytes(bin_shard(part))
    stream = open_stream(tmp_path, "train")
    assert stream.tokenizer == "gpt2" and stream.tokens == 600
    assert np.array_equal(stream.read(0, 600), tokens[300:])


def bin_shard(tokens, magic=20240520, version=1) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.asarray(tokens, np.uint16).tobytes()


def test_raw_tokens_of_nanogpt(tmp_path):
    """train.bin and val.bin without a header are assumed to hold GPT-2's tokens, which is said."""
    tokens = np.random.default_rng(0).integers(0, 50257, 900).astype(np.uint16)
    tokens[:3] = 50256, 0, 1
    tokens[:600].tofile(tmp_path / "train.bin")
    tokens[600:].tofile(tmp_path / "val.bin")
    stream = open_stream(tmp_path, "train")
    assert stream.tokens == 600 and stream.tokenizer == "gpt2" and stream.n_vocab == 50257
    assert np.array_equal(stream.read(0, 600), tokens[:600])
    said = "has no header: assuming nanoGPT's format, raw uint16 tokens of GPT-2"
    assert stream.notes == [f"{tmp_path / 'train.bin'} {said}"]
    assert open_stream(tmp_path, "val").notes == [f"{tmp_path / 'val.bin'} {said}"]
    (tmp_path / "train.bin").write_bytes(bin_shard(tokens))  # with a header it is llm.c's
    stream = open_stream(tmp_path, "train")
    assert stream.tokens == 900 and stream.notes == []
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="train.bin is damaged or cut short"):
        open_stream(tmp_path, "train")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="its own vocabulary, which meta.pkl beside it"):
        open_stream(tmp_path, "val")


def test_no_shards_of_a_split(tmp_path):
    """The message gives a command that works."""
    with pytest.raises(UserError, match=r"there are no val shards in .*`python data_generator.py"):
        open_stream(tmp_path / "my data", "val")
    for manifest in (True, False):
        write_shards(tmp_path / str(manifest), {"train": [100]}, manifest=manifest)
        with pytest.raises(UserError) as error:
            open_stream(tmp_path / str(manifest), "val")
        assert str(error.value).endswith(
            "/" + str(manifest) + ": --val_every 0 trains without validation"
        )
    with pytest.raises(UserError, match=r"--data_dir '.*my data'` makes them"):
        open_stream(tmp_path / "my data", "train")


def test_a_tokenizer_beside_the_shards(tmp_path):
    write_shards(tmp_path, {"train": [100]})
    content = b'{"model": {}}'
    manifest = read_manifest(tmp_path)
    manifest.tokenizer = "tokenizer.json"
    manifest.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match="tokenizer.json is missing: the tokens of"):
        open_stream(tmp_path, "train")
    (tmp_path / "tokenizer.json").write_bytes(content)
    stream = open_stream(tmp_path, "train")
    assert stream.tokenizer == str(tmp_path / "tokenizer.json") and stream.n_vocab == 257
    assert stream.identity()["tokenizer"] == f"sha256:{manifest.tokenizer_sha256}"
    (tmp_path / "tokenizer.json").write_bytes(content + b" ")
    with pytest.raises(UserError, match="tokenizer.json is not the file that made the tokens of"):
        open_stream(tmp_path, "train")


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
    assert open_stream(tmp_path, "train").tokens == 100


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
        open_stream(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match="edufineweb_train_000002.npy is missing"):
        open_stream(tmp_path, "train")


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
            open_stream(tmp_path, "train")


def test_train_and_val_are_words_of_a_shards_name(tmp_path):
    """medieval_train.npy holds no validation, constraint_val.npy nothing to learn from."""
    for name, tokens in (("medieval_train_0.npy", 500), ("constraint_val_0.npy", 300)):
        np.save(tmp_path / name, np.zeros(tokens, dtype=np.uint16))
    np.save(tmp_path / "medieval_train_1.npy", np.zeros(0, dtype=np.uint16))  # nothing in it
    assert open_stream(tmp_path, "train").tokens == 500
    assert open_stream(tmp_path, "val").tokens == 300
