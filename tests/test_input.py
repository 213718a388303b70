"""Bad input: one message that names the thing, exit code 2, no traceback, nothing written."""

import json
import re
import time

import pytest
import torch
from conftest import (
    ROOT,
    flags,
    script,
    torchrun,
    write_shards,
)

import train

BAD = {
    "unknown flag": (["--batch", "4"], "unknown flag --batch"),
    "misspelt flag": (["--max_step=4"], "did you mean --max_steps"),
    "unknown preset": (["--preset", "gpt5"], "invalid choice: 'gpt5'"),
    "no number": (["--max_steps", "many"], "invalid int value: 'many'"),
    "heads": (["--n_head=3"], "n_head 3 does not divide n_embd 32: n_head 4 would|n_head 2 would"),
    "no layers": (["--n_layer=0"], "--n_layer is 0: it must be at least 1"),
    "total batch": (
        ["--total_batch_size=100"],
        "100 is not a multiple.*\nHINT: a new run could use --total_batch_size 96",
    ),
    "batch": (["--batch_size=3"], "--batch_size 3 x .*\nHINT: --batch_size 2 fits"),
    "no shards": (
        ["--data_dir=nowhere"],
        "no train shards in nowhere: `python data_generator.py --data_dir nowhere`",
    ),
    "no demo": (["--data_dir=demo/nowhere"], "makes them"),
    "too short": (["--total_batch_size=8192", "--val_tokens=8192"], "one step needs 8,193"),
    "block size": (["--block_size=8"], "--seq_len 16 is more than the model's block_size 8"),
    "vocabulary": (["--vocab_size=200"], "--vocab_size 200 is less than the tokenizer's 257"),
    "no checkpoint": (["--init_from=missing.pt"], "there is no checkpoint or folder missing.pt"),
    "learning rates": (["--min_lr=1"], "--min_lr 1.0 is above --max_lr"),
    "decay": (["--decay_steps=4"], "--decay_steps 4 belongs to --schedule linear"),
    "learning rate": (["--max_lr=nan"], "--max_lr is nan"),
    "clip": (["--grad_clip=0"], "--grad_clip is 0.0: it must be a number above 0"),
    "warm-up": (["--warmup_steps=-1"], "--warmup_steps is -1: it must be at least 0"),
    "validation": (
        ["--val_tokens=64"], "--val_tokens 64 is less than one step.*give at least as many"
    ),
    "validation alone": (
        ["--eval_only", "--val_every=0", "--val_tokens=10"], "--val_tokens 10 is less than one step"
    ),
    "interval": (["--save_every=-5"], "--save_every is -5"),
    "device": (["--device=cuda"], "--device cuda is not available on this machine"),
    "memory": (
        ["--vocab_size=9999999999999"],
        "the run does not fit into memory.\nHINT: half the --batch_size",
    ),
    "HellaSwag": (
        ["--hellaswag_every=4", "--hellaswag_data=none.jsonl"], "none.jsonl can't be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_exit_code_2(name, data_dir, tmp_path, capsys):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    words, message = BAD[name]
    common = {} if "data_dir" in words[0] else {"data_dir": data_dir}
    assert train.main([*flags(log_dir=tmp_path / "log", **common), *words]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert "Traceback" not in printed.err and printed.err.startswith("error: ") and not printed.out
    assert not list((tmp_path / "log").glob("*.pt"))


def test_bad_input_is_the_same_on_every_rank(data_dir, tmp_path):
    start = time.time()
    done = torchrun(2, "train.py", *flags(data_dir=data_dir, log_dir=tmp_path, batch_size=3))
    assert done.returncode == 1 and time.time() - start < 30
    assert done.stderr.count("error: --total_batch_size 128 is not a multiple of") == 1
    assert re.search(r"exitcode\s*: 2", done.stderr)
    assert f'File "{ROOT / "train.py"}"' not in done.stderr  # only of torchrun


OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.mark.slow
def test_no_network_for_hellaswag(data_dir, tmp_path):
    environment = OFFLINE | {"HF_HOME": str(tmp_path)}
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log", hellaswag_every=4)
    done = script("train.py", *words, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "HellaSwag can't be fetched" in done.stderr and "--hellaswag_every 0" in done.stderr


def test_no_network_for_the_vocabulary(tmp_path):
    write_shards(tmp_path / "gpt2", {"val": [600], "train": [3000]}, manifest=False)
    environment = OFFLINE | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    done = script(
        "train.py", *flags(data_dir=tmp_path / "gpt2", log_dir=tmp_path / "log"), env=environment
    )
    assert done.returncode == 2 and "GPT-2's vocabulary is not on this machine" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_what_is_worth_knowing_is_said_before_the_first_step(tmp_path, capsys):
    write_shards(tmp_path / "data", {"val": [600], "train": [3000]})
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    words = flags(
        data_dir=tmp_path / "data", log_dir=tmp_path / "log", max_steps=1, val_tokens=5000
    )
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    assert "data is not complete: a run can't be resumed once its data has grown" in printed
    assert (
        "WARNING: --warmup_steps 2 > --max_steps 1: the learning rate never reaches --max_lr"
        in printed
    )
    assert (
        "validation uses 512 tokens: --val_tokens 5,000 and the 600 validation tokens, rounded"
        in printed
    )
    assert printed.index("validation uses") < printed.index("step     0 |")


DIFFERENT = {
    "max_lr": ("max_lr=1e-3", "max_lr was 0.0006, is 0.001"),
    "seed": ("seed=1", "seed was 1337, is 1"),
    "total_batch_size": ("total_batch_size=256", "total_batch_size was 128, is 256"),
    "seq_len": ("seq_len=8", "seq_len was 16, is 8"),
    "n_layer": ("n_layer=3", "n_layer was 2, is 3"),
    "init_from": ("init_from=gpt2", "init_from was scratch, is gpt2"),
    "dtype": ("dtype=bfloat16", "dtype was float32, is bfloat16"),
    "shuffle": ("shuffle", "shuffle was False, is True"),
    "schedule": ("schedule=linear", "schedule was cosine, is linear"),
    "max_steps": ("max_steps=5", "max_steps was 8, is 5, and may only grow"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_resuming_with_other_settings_names_the_difference(name, data_dir, trained, capsys):
    word, message = DIFFERENT[name]
    assert train.main([*flags(data_dir=data_dir, log_dir=trained), f"--{word}"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "--log_dir" in printed


def test_resuming_with_other_data_names_the_difference(trained, tmp_path, capsys):
    write_shards(tmp_path, {"val": [600], "train": [2000, 3000, 457]}, seed=5)
    assert train.main(flags(data_dir=tmp_path, log_dir=trained)) == 2
    assert "data (sha256) was" in capsys.readouterr().err
