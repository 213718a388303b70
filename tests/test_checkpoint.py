"""Checkpoints: whole, verified, plain data, found again; against damage, kills, and files that want
to run code."""

import dataclasses
import errno
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, flags, script, wait_for

import export
import hellaswag
import sample
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import (
    BEST,
    checkpoint_paths,
    link,
    load_checkpoint,
    newest_checkpoint,
    remove_older,
    save_checkpoint,
)
from lib.cli import UserError
from lib.pretrained import load_model

SHAPE = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32)


def content(step: int, seed=0) -> dict:
    """What train.py saves, after one update of a small model."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    optimizer = model.configure_optimizers(0.1, 1e-3)
    model(torch.randint(257, (2, 16)), torch.randint(257, (2, 16)))[1].backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": SHAPE,
        "step": step,
    }
    return state | {
        "scaler": {},
        "precision": "float32",
        "tokenizer": "bytes",
        "train_config": {"max_lr": 1e-3},
        "data": {"dataset": None},
    }


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_saved_is_loaded_and_the_link_is_relative(tmp_path):
    state = content(7)
    path = save_checkpoint(tmp_path, state)
    assert (
        path.name == "model_00007.pt"
        and os.readlink(tmp_path / "model_checkpoint.pt") == "model_00007.pt"
    )
    assert same(load_checkpoint(tmp_path / "model_checkpoint.pt"), state)
    assert same(torch.load(path), state)  # torch's default, weights_only=True
    assert not any("_orig_mod." in name or "module." in name for name in state["model"])


def test_the_last_two_and_every_keep_every_stay(tmp_path):
    (tmp_path / "model_notes.pt").write_text("not a checkpoint")
    for step in (3, 5, 6, 9, 10, 12):
        save_checkpoint(tmp_path, content(step))
        remove_older(tmp_path, step, 5)
    assert sorted(checkpoint_paths(tmp_path)) == [5, 10, 12]
    save_checkpoint(tmp_path, content(13))
    remove_older(tmp_path, 13, 5)
    assert sorted(checkpoint_paths(tmp_path)) == [5, 10, 12, 13]
    assert (tmp_path / "model_notes.pt").exists() and os.readlink(
        tmp_path / "model_checkpoint.pt"
    ) == "model_00013.pt"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    state = content(3)
    state["model"]["transformer.ln_f.bias"][0] = float("nan")
    with pytest.raises(UserError, match="the weights after step 3 have numbers that are not fin"):
        save_checkpoint(tmp_path, state)
    assert not list(tmp_path.iterdir())


def test_the_best_stays_beside_the_last_two(tmp_path):
    for step in range(1, 7):
        path = save_checkpoint(tmp_path, content(step))
        if step == 2:
            link(path, BEST)
        remove_older(tmp_path, step, 0)
    assert sorted(checkpoint_paths(tmp_path)) == [2, 5, 6]


def test_a_full_device_is_a_save_error_and_another_error_is_not(tmp_path, monkeypatch):
    (tmp_path / "model_00001.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"model_00001.pt could not be saved .* bytes are free"):
        save_checkpoint(tmp_path, content(1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="something else"):
        monkeypatch.setattr(
            torch, "save", lambda *words: (_ for _ in ()).throw(RuntimeError("something else"))
        )
        save_checkpoint(tmp_path, content(1))


def flip(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_damage_never_loads_as_something_else(tmp_path):
    state = content(4)
    path = save_checkpoint(tmp_path, state)
    good, dice = path.read_bytes(), random.Random(4)
    n = len(good)
    page = dice.randrange(n // 4096) * 4096
    damages = [flip(good, dice.randrange(8 * n)) for _ in range(300)]
    damages += [
        good[:size] for size in (0, 1, n // 100, n // 10, n // 2, n * 9 // 10, n * 99 // 100, n - 1)
    ]
    damages += [good[:page] + bytes(4096) + good[page + 4096 :]]
    refused = 0
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert same(loaded, state)
    assert refused > 290  # the rest are flips in the archive's padding


def test_the_newest_good_one_is_found(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 2):
        path = save_checkpoint(tmp_path, content(step))
    path.write_bytes(path.read_bytes()[:-1])
    newest = newest_checkpoint(tmp_path)
    path = newest.path
    assert newest.checkpoint["step"] == 1 and path.name == "model_00001.pt"
    assert len(newest.skipped) == 1 and "model_00002.pt" in newest.skipped[0]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* is good") as error:
        newest_checkpoint(tmp_path)
    assert "model_00001.pt" in str(error.value) and "model_00002.pt" in str(error.value)


def test_a_checkpoint_that_cannot_be_read_now_is_not_skipped(tmp_path, monkeypatch):
    """The run would resume from an older one, and lose the steps of the newest."""
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step))

    def failing_disk(path, *arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", failing_disk)
    with pytest.raises(UserError, match="model_00002.pt can't be read: Input/output error"):
        newest_checkpoint(tmp_path)


def test_every_script_refuses_a_damaged_file(tmp_path, capsys):
    path = save_checkpoint(tmp_path, content(1))
    path.write_bytes(flip(path.read_bytes(), 8 * 30_000))
    (tmp_path / "one.jsonl").write_text("{}")
    data, out = ["--data", str(tmp_path / "one.jsonl")], ["--out", str(tmp_path / "out")]
    for main, words in ((sample.main, ["x"]), (hellaswag.main, data), (export.main, out)):
        assert main([*words, "--model", str(path)]) == 2
        printed = capsys.readouterr()
        assert f"error: {path} is damaged" in printed.err and not printed.out.strip()
    assert not (tmp_path / "out").exists()


# ---- files that want to run code ----


class Run:
    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def test_nothing_runs_when_a_file_is_opened(tmp_path):
    import numpy as np

    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w').close()"
    evil = {
        "os.system": Run(os.system, f"touch {canary}"),
        "eval": Run(eval, touch),
        "nested": {"model": {"weight": [torch.zeros(2), Run(eval, touch)]}, "config": SHAPE},
        "object array": np.array([Run(eval, touch)], dtype=object),
    }
    files = {}
    for name, thing in evil.items():
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(evil["nested"], buffer, _use_new_zipfile_serialization=False)
    files["legacy format"] = buffer.getvalue()
    files["plain pickle"] = pickle.dumps(evil["eval"])
    for name, data in files.items():
        (tmp_path / "model_00001.pt").write_bytes(data)
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load_checkpoint(tmp_path / "model_00001.pt")
        assert not canary.exists(), name
    eval(touch)  # the canary does sing when the code runs
    assert canary.exists()


# ---- models by name ----


def test_load_model_reads_the_original_scripts_checkpoints(tmp_path):
    """As build-nanogpt and the seed wrote them: a compiled model's names, a config pickled as a
    class of __main__, and no word of the tokenizer, which is GPT-2's."""
    shape = dataclasses.replace(SHAPE, vocab_size=50304)
    model = GPT(shape)
    torch.save({"weights": model.state_dict()}, tmp_path / "weights.pt")
    program = """
import sys, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32
weights = torch.load(sys.argv[1])["weights"]
model = {"_orig_mod." + name: tensor for name, tensor in weights.items()}
torch.save({"model": model, "config": GPTConfig(), "step": 5, "val_loss": 3.3}, sys.argv[2])
"""
    words = [str(tmp_path / "weights.pt"), str(tmp_path / "model_00005.pt")]
    subprocess.run([sys.executable, "-c", program, *words], check=True)
    with pytest.warns(UserWarning, match="assuming GPT-2's tokens for its 50304 rows"):
        loaded, tokenizer = load_model(str(tmp_path / "model_00005.pt"))
    assert tokenizer.name == "gpt2" and loaded.config == shape and not loaded.training
    assert same(loaded.state_dict(), model.state_dict())


def test_a_checkpoint_of_another_program_is_none_of_ours(tmp_path):
    torch.save({"model": {}, "config": {"n_layer": 12}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is not a checkpoint: it has no model with a GPT"):
        load_model(str(tmp_path / "ckpt.pt"))


def test_a_damaged_newest_checkpoint_is_not_skipped_silently(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step))
    (tmp_path / "model_00002.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="model_00002.pt is damaged or not a checkpoint.*skipped"):
        load_model(str(tmp_path))


def test_load_model_says_what_is_wrong(tmp_path):
    for name, message in {
        "nothing.pt": "there is no checkpoint or folder nothing.pt",
        str(tmp_path): "can't be read as a model folder",
    }.items():
        with pytest.raises(UserError, match=message):
            load_model(name)


@pytest.mark.slow
def test_no_network_for_the_hubs_weights(tmp_path):
    done = script(
        "sample.py",
        "x",
        "--model=gpt2",
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
    )
    assert (
        done.returncode == 2
        and "gpt2 can't be read from the Hub" in done.stderr
        and "Traceback" not in done.stderr
    )


# ---- kills ----

# Does nothing but save, in a child for each line of standard input.
SAVERS = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_checkpoint import content
from lib.checkpoint import newest_checkpoint, remove_older, save_checkpoint
from lib.files import only_writer
state = content(0)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        with only_writer({log_dir!r}):
            found = newest_checkpoint({log_dir!r})
            for step in range(found.checkpoint["step"] + 1 if found else 0, 10_000):
                save_checkpoint({log_dir!r}, state | {{"step": step}})
                remove_older({log_dir!r}, step, 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def kill_inside_the_save(log_dir, dice, rounds: int):
    """Kill a process that does nothing but save; then the newest checkpoint must load, and the link
    must be good."""
    program = SAVERS.format(root=str(ROOT), tests=str(ROOT / "tests"), log_dir=str(log_dir))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as savers:
        for _ in range(rounds):
            before = max(checkpoint_paths(log_dir), default=-1)
            savers.stdin.write("\n")
            savers.stdin.flush()
            child = int(savers.stdout.readline())
            wait_for(lambda before=before: max(checkpoint_paths(log_dir), default=-1) > before)
            time.sleep(dice.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            assert int(savers.stdout.readline()) == signal.SIGKILL
            newest = newest_checkpoint(log_dir)
            step = newest.checkpoint["step"]
            assert not newest.skipped and len(checkpoint_paths(log_dir)) <= 3
            assert load_checkpoint(log_dir / "model_checkpoint.pt")["step"] in (step, step - 1)


def test_kills_inside_the_save(tmp_path):
    kill_inside_the_save(tmp_path, random.Random(time.time()), 3)


@pytest.mark.slow
def test_campaign_of_kills_inside_the_save(tmp_path, campaign):
    kill_inside_the_save(tmp_path, random.Random(2026), campaign(100))


def test_a_run_with_only_weights_cannot_be_continued(data_dir, tmp_path, capsys):
    import train

    torch.save(
        {"model": GPT(SHAPE).state_dict(), "config": SHAPE, "step": 5, "val_loss": 1.0},
        tmp_path / "model_00005.pt",
    )
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path)) == 2
    assert "has weights only, no run to resume: use --init_from" in capsys.readouterr().err
