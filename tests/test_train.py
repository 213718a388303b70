"""The run: real processes, one or several, against arithmetic and against the uninterrupted run."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    comparable_log,
    flags,
    script,
    torchrun,
    torchrun_command,
    write_hellaswag,
    write_shards,
)

import metrics
import train
from lib.checkpoint import load_checkpoint
from lib.ranks import Ranks
from lib.shards import count_micro_steps
from train import TrainConfig, due, get_lr


def weights(log_dir) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(log_dir) / "model_checkpoint.pt")["model"]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---- arithmetic ----


def test_learning_rate():
    config = TrainConfig()
    expected = {
        0: 6e-4 / 715,
        714: 6e-4,
        715: 6e-4,
        (715 + 19073) // 2: 3.3e-4,
        19072: 6e-5,
        19073: 6e-5,
    }
    for step, lr in expected.items():
        assert math.isclose(get_lr(step, config), lr, rel_tol=1e-3), step
    assert get_lr(19073, config) == pytest.approx(6e-5, rel=1e-9)
    assert all(get_lr(s, config) >= get_lr(s + 1, config) for s in range(715, 19073))


def test_due():
    assert [step for step in range(11) if due(step, 4, 10)] == [0, 4, 8, 10]
    assert not any(due(step, 0, 10) for step in range(11))


# ---- what a run leaves ----


def test_log_and_files_of_a_run(trained, data_dir):
    log = [line.split() for line in (trained / "log.txt").read_text().splitlines()]
    steps = {
        stream: [int(step) for step, s, _ in log if s == stream]
        for stream in {s for _, s, _ in log}
    }
    assert steps["train"] == steps["lr"] == steps["norm"] == steps["tok_s"] == list(range(8))
    assert steps["val"] == steps["eval_s"] == [0, 4, 8] and steps["save_s"] == [3, 6, 8]
    assert "mfu" not in steps and "hella" not in steps
    assert all(f"{float(value):.6g}" == value for _, _, value in log)
    run = json.loads((trained / "run.json").read_text())
    assert (
        run["tokens_per_step"] == 128
        and run["model"]["vocab_size"] == 320
        and run["data"]["tokenizer"] == "bytes"
    )
    assert sorted(path.name for path in trained.iterdir() if path.name != ".lock") == [
        "curve.png", "log.txt", "model_00006.pt", "model_00008.pt", "model_checkpoint.pt", "run.json"
    ]  # fmt: skip
    assert os.readlink(trained / "model_checkpoint.pt") == "model_00008.pt"


def test_the_loss_falls_and_the_last_update_is_saved(trained, data_dir):
    """The validation loss in the log is that of the saved weights, computed by hand on tokens read
    by hand."""
    import numpy as np

    from GPT_Modules import GPT

    checkpoint = load_checkpoint(trained / "model_checkpoint.pt")
    assert checkpoint["step"] == 8
    model = GPT(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    tokens = torch.from_numpy(np.load(data_dir / "edufineweb_val_000000.npy").astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[:256].view(16, 16))[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:257])
    assert abs(loss - checkpoint["val_loss"]) < 1e-5
    losses = [float(line.split()[2]) for line in comparable_log(trained) if " val " in line]
    assert losses[-1] == float(f"{checkpoint['val_loss']:.6g}") < losses[0]


def test_a_checkpoint_says_when_its_loss_was_measured(data_dir, tmp_path):
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path, val_every=4, save_every=3)) == 0
    losses = dict(metrics.read_log(tmp_path)["val"])
    for step, val_step in ((6, 4), (8, 8)):
        checkpoint = load_checkpoint(tmp_path / f"model_{step:05d}.pt")
        assert checkpoint["val_step"] == val_step and losses[val_step] == float(
            f"{checkpoint['val_loss']:.6g}"
        )


def test_the_facts_of_a_run_name_no_directory_of_its_owner(tmp_path, data_dir):
    shutil.copytree(data_dir, tmp_path / "private" / "data")
    manifest = json.loads((tmp_path / "private" / "data" / "manifest.json").read_text())
    manifest["dataset"] = str(tmp_path / "private" / "text.txt")
    (tmp_path / "private" / "data" / "manifest.json").write_text(json.dumps(manifest))
    log_dir = tmp_path / "private" / "log"
    assert (
        train.main(flags(data_dir=tmp_path / "private" / "data", log_dir=log_dir, max_steps=1)) == 0
    )
    facts = (log_dir / "run.json").read_text()
    assert (
        "private" not in facts and '"dataset": "text.txt"' in facts and '"log_dir": "log"' in facts
    )


def test_the_readmes_snippet_runs_as_it_stands(trained):
    snippet = """
import torch
from GPT_Modules import GPTConfig, GPT
checkpoint = torch.load("model_checkpoint.pt", map_location="cpu")
config = checkpoint["config"]
model = GPT(config)
model.load_state_dict(checkpoint["model"])
model.eval()
torch.save(model.state_dict(), "trained_model.pth")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet], cwd=trained, env=environment, check=True
    )
    saved = torch.load(trained / "trained_model.pth")
    (trained / "trained_model.pth").unlink()
    for name, tensor in weights(trained).items():
        assert torch.equal(saved[name], tensor)


# ---- the same run on any number of ranks ----


def test_ranks_share_a_step_and_change_nothing(data_dir, trained, tmp_path):
    gradients = ROOT / "tests" / "drivers.py"
    for ranks in (1, 2, 4):
        done = torchrun(ranks, str(gradients), "gradients", tmp_path / f"g{ranks}.pt", *flags(
            data_dir=data_dir, log_dir=tmp_path / str(ranks)))  # fmt: skip
        assert done.returncode == 0, done.stderr
    reference = torch.load(tmp_path / "g1.pt")
    for ranks in (2, 4):
        for name, gradient in torch.load(tmp_path / f"g{ranks}.pt")["gradients"].items():
            exact = reference["gradients"][name]
            assert (gradient - exact).norm() <= 1e-6 * exact.norm(), (ranks, name)
    for ranks, exchanges in (
        (2, 8),
        (4, 8),
    ):  # a step's gradients are exchanged once, whatever the micro-batches
        assert torch.load(tmp_path / f"g{ranks}.pt")["exchanges"] == exchanges
    assert comparable_log(tmp_path / "1") == comparable_log(trained)
    for ranks in (2, 4):
        assert_log_close(comparable_log(tmp_path / str(ranks)), comparable_log(trained))


def assert_log_close(one: list[str], other: list[str]):
    assert [line.split()[:2] for line in one] == [line.split()[:2] for line in other]
    for a, b in zip(one, other, strict=True):
        assert math.isclose(float(a.split()[2]), float(b.split()[2]), rel_tol=1e-5), (a, b)


def test_moving_from_2_ranks_to_1_to_4(data_dir, trained, tmp_path):
    common = {"data_dir": data_dir, "log_dir": tmp_path / "log"}
    for ranks, stop_after in ((2, 3), (1, 6), (4, 99)):
        done = torchrun(
            ranks, str(ROOT / "tests" / "drivers.py"), "stop_after", stop_after, *flags(**common)
        )
        assert ("stopped by SIGTERM" in done.stdout) == (stop_after < 99), done.stdout + done.stderr
    assert_log_close(comparable_log(tmp_path / "log"), comparable_log(trained))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_training_evaluates_samples_and_never_recompiles(ranks, data_dir, tmp_path):
    write_hellaswag(tmp_path / "hella.jsonl", 8)
    changes = {"hellaswag_data": tmp_path / "hella.jsonl", "hellaswag_every": 3, "sample_every": 4}
    words = [*flags(data_dir=data_dir, log_dir=tmp_path / "log", **changes), "--block_size=512"]
    done = torchrun(ranks, "train.py", *words, "--compile", env={"TORCH_LOGS": "recompiles"})
    assert done.returncode == 0, done.stderr
    assert (
        ", compiled;" in done.stdout
        and "HellaSwag acc_norm" in done.stdout
        and "  > " in done.stdout
    )
    # the one more graph is that of validation, which keeps no gradients
    assert done.stderr.count("Recompiling function forward") == ranks, done.stderr
    assert train.main([*words, f"--log_dir={tmp_path / 'eager'}"]) == 0
    assert_log_close(comparable_log(tmp_path / "log"), comparable_log(tmp_path / "eager"))


def test_demo_preset_is_a_run_of_the_script():
    config = train.parse(TrainConfig, ["--preset", "demo", "--max-steps", "7"], "", train.PRESETS)
    assert (config.data_dir, config.n_layer, config.max_steps) == ("demo/data", 4, 7)


@pytest.mark.parametrize("preset", [name for name in train.PRESETS if name != "demo"])
def test_presets_share_out_their_step_on_one_and_eight_gpus(preset):
    config = train.parse(TrainConfig, ["--preset", preset], "", train.PRESETS)
    train.check_config(config)
    for ranks in (1, 8):
        assert (
            count_micro_steps(config.seq_len, config.batch_size, config.total_batch_size, ranks)
            >= 1
        )


# ---- precision ----


def values(log_dir, stream) -> list[float]:
    return [value for _, value in metrics.read_log(log_dir)[stream]]


@pytest.mark.parametrize(
    "dtype, loss_off, norm_off", [("bfloat16", 0.01, 0.15), ("float16", 0.002, 0.02)]
)
def test_half_precision_learns_as_float32_does(dtype, loss_off, norm_off, data_dir, tmp_path):
    """200 steps side by side; norm is that of the gradient itself, not of the scaled loss."""
    common = {
        "data_dir": data_dir,
        "max_steps": 200,
        "val_every": 0,
        "save_every": 0,
        "batch_size": 8,
        "max_lr": 3e-3,
    }
    for name in ("float32", dtype):
        assert train.main(flags(log_dir=tmp_path / name, dtype=name, **common)) == 0
    for stream, off in (("train", loss_off), ("norm", norm_off)):
        exact, rounded = (np.array(values(tmp_path / name, stream)) for name in ("float32", dtype))
        assert np.all(np.abs(rounded / exact - 1) < off), (
            stream,
            np.abs(rounded / exact - 1).max(),
        )
    assert values(tmp_path / dtype, "train") != values(tmp_path / "float32", "train")
    assert values(tmp_path / dtype, "train")[-1] < values(tmp_path / dtype, "train")[0] - 0.1


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_half_precision_goes_on_exactly_and_on_any_number_of_ranks(dtype, data_dir, tmp_path):
    common = {"data_dir": data_dir, "dtype": dtype}
    assert train.main(flags(log_dir=tmp_path / "whole", **common)) == 0
    words = [
        ROOT / "tests" / "drivers.py",
        "stop_after",
        3,
        *flags(log_dir=tmp_path / "log", **common),
    ]
    assert "stopped by SIGTERM" in script(*words, env={"PYTHONPATH": str(ROOT)}).stdout
    assert load_checkpoint(tmp_path / "log" / "model_checkpoint.pt")["precision"] == dtype
    assert bool(load_checkpoint(tmp_path / "log" / "model_checkpoint.pt")["scaler"]) == (
        dtype == "float16"
    )
    assert train.main(flags(log_dir=tmp_path / "log", **common)) == 0
    assert_uninterrupted(tmp_path / "log", tmp_path / "whole")
    assert torchrun(2, "train.py", *flags(log_dir=tmp_path / "two", **common)).returncode == 0
    assert np.allclose(
        values(tmp_path / "two", "train"), values(tmp_path / "whole", "train"), rtol=1e-4
    )


def test_a_loss_scale_that_falls_does_not_end_the_run(data_dir, tmp_path):
    """It begins at 2^40, far too high: more than ten updates are skipped until it fits."""
    words = flags(data_dir=data_dir, log_dir=tmp_path, dtype="float16", max_steps=60, max_lr=3e-3)
    done = driver("high_scale", 40, *words)
    assert done.returncode == 0, done.stderr
    skipped = [step for step, _ in metrics.read_log(tmp_path)["skipped"]]
    assert skipped[:12] == list(range(12)) and len(skipped) < 30
    assert values(tmp_path, "train")[-1] < values(tmp_path, "train")[0]


@pytest.mark.slow
def test_float16_that_is_never_finite_ends_the_run(data_dir, tmp_path):
    """The scale falls from 2^16 to 1 in 16 steps, then ten more are enough."""
    done = driver(
        "nan_for_ever",
        0,
        *flags(data_dir=data_dir, log_dir=tmp_path, dtype="float16", max_steps=60),
    )
    assert done.returncode == 1 and "not finite 10 times in a row, up to step 25" in done.stderr, (
        done.stderr
    )


def test_a_run_keeps_its_precision(data_dir, tmp_path, monkeypatch, capsys):
    """Begun by --dtype auto on one machine, continued on another whose auto is another."""
    words = flags(data_dir=data_dir, log_dir=tmp_path, dtype=None)
    for fast, steps in ((True, 4), (False, 8)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert train.main([*words, f"--max_steps={steps}"]) == 0
        assert (
            "1 x CPU with" in (printed := capsys.readouterr().out)
            and ", bfloat16, not compiled" in printed
        )
    assert (
        "the run began in bfloat16 and goes on in it; a new one would take float32 here" in printed
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputing_compiled_activations_changes_nothing_and_recompiles_nothing(
    ranks, data_dir, tmp_path
):
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log")
    done = torchrun(
        ranks, "train.py", *words, "--compile", "--recompute", env={"TORCH_LOGS": "recompiles"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Recompiling function forward") == ranks, done.stderr
    assert train.main([*words, f"--log_dir={tmp_path / 'eager'}"]) == 0
    assert_log_close(comparable_log(tmp_path / "log"), comparable_log(tmp_path / "eager"))


# ---- opt-in ----


def test_a_linear_schedule_loses_nothing_when_it_is_extended(data_dir, tmp_path, capsys):
    common = {
        "data_dir": data_dir,
        "schedule": "linear",
        "min_lr": 0,
        "decay_steps": 4,
        "warmup_steps": 2,
    }
    config = train.parse(TrainConfig, flags(**common | {"max_steps": 12}), "", train.PRESETS)
    rates = [get_lr(step, config) / config.max_lr for step in range(13)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert train.main(flags(log_dir=tmp_path / "long", max_steps=12, **common)) == 0
    assert (
        train.main(
            flags(log_dir=tmp_path / "log", max_steps=8, save_every=4, keep_every=4, **common)
        )
        == 0
    )
    for path in tmp_path.glob("log/model_*8.pt"):
        path.unlink()  # the state before the decay
    assert train.main(flags(log_dir=tmp_path / "log", max_steps=12, **common)) == 0
    assert_same_weights(tmp_path / "log", tmp_path / "long")
    assert "max_steps was 8: from here the decay ends at 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", [{"preset": "gpt2-fast"}, pytest.param({"shuffle": None}, marks=pytest.mark.slow)]
)
def test_opt_ins_go_on_exactly_and_on_any_number_of_ranks(flag, data_dir, trained, tmp_path):
    (name, value), common = *flag.items(), {"data_dir": data_dir}
    extra = [f"--{name}" if value is None else f"--{name}={value}"]
    assert train.main([*flags(log_dir=tmp_path / "whole", **common), *extra]) == 0
    words = [
        ROOT / "tests" / "drivers.py",
        "stop_after",
        3,
        *flags(log_dir=tmp_path / "log", **common),
        *extra,
    ]
    assert "stopped by SIGTERM" in script(*words, env={"PYTHONPATH": str(ROOT)}).stdout
    assert train.main([*flags(log_dir=tmp_path / "log", **common), *extra]) == 0
    assert_uninterrupted(tmp_path / "log", tmp_path / "whole")
    assert (
        torchrun(2, "train.py", *flags(log_dir=tmp_path / "two", **common), *extra).returncode == 0
    )
    assert_log_close(comparable_log(tmp_path / "two"), comparable_log(tmp_path / "whole"))
    assert values(tmp_path / "whole", "train") != values(trained, "train")


def test_gpt2_fast_is_published_as_any_other_run(data_dir, tmp_path):
    import export

    assert (
        train.main([*flags(data_dir=data_dir, log_dir=tmp_path / "log"), "--preset=gpt2-fast"]) == 0
    )
    assert export.main(["--model", str(tmp_path / "log"), "--out", str(tmp_path / "GPT")]) == 0
    card = (tmp_path / "GPT" / "README.md").read_text()
    assert " of warm-up, constant, linear in the last 4 steps to " in card
    assert "| optimizer | Muon for the matrices of the blocks, else AdamW, betas " in card


def test_the_best_weights_are_kept(data_dir, tmp_path):
    """At a rate that is too high the loss turns; the best is exported with its own loss and
    step."""
    import export

    words = flags(
        data_dir=data_dir, log_dir=tmp_path, max_lr=0.3, val_every=1, save_every=4, warmup_steps=0
    )
    assert train.main([*words, "--keep_best"]) == 0
    losses = dict(metrics.read_log(tmp_path)["val"])
    step = min(losses, key=losses.get)
    assert step < 8  # else this test shows nothing
    best = load_checkpoint(tmp_path / "model_best.pt")
    assert (best["step"], best["val_step"]) == (step, step) and float(
        f"{best['val_loss']:.6g}"
    ) == losses[step]
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 8
    assert (tmp_path / "model_00004.pt").exists()  # saving the best removes no other
    assert (
        export.main(["--model", str(tmp_path / "model_best.pt"), "--out", str(tmp_path / "out")])
        == 0
    )
    assert (
        f"| validation loss | {best['val_loss']:.4f} nats per byte |"
        in (tmp_path / "out" / "README.md").read_text()
    )


BEST_AT_5 = {
    "max_lr": 0.015,
    "min_lr": 0.015,
    "max_steps": 6,
    "warmup_steps": 0,
    "val_every": 1,
    "save_every": 1,
}


def test_a_kill_does_not_lose_the_best_weights(data_dir, tmp_path):
    words = [*flags(data_dir=data_dir, log_dir=tmp_path, **BEST_AT_5), "--keep_best"]
    killed = script(
        str(ROOT / "tests" / "drivers.py"),
        "killed_before_the_best",
        5,
        *words,
        env={"PYTHONPATH": ROOT},
    )
    assert (
        killed.returncode == -signal.SIGKILL
        and load_checkpoint(tmp_path / "model_best.pt")["step"] == 4
    )
    assert script("train.py", *words).returncode == 0
    best = load_checkpoint(tmp_path / "model_best.pt")
    assert best["step"] == best["val_step"] == 5


def test_the_best_that_could_not_be_saved_is_not_taken_for_kept(data_dir, tmp_path):
    """Step 5 is the best and meets a full disk, step 6 is the second best."""
    words = [*flags(data_dir=data_dir, log_dir=tmp_path, **BEST_AT_5), "--keep_best"]
    done = driver("no_room_for_the_best", 5, *words)
    assert done.returncode == 0, done.stderr
    losses = dict(metrics.read_log(tmp_path)["val"])
    assert sorted(losses, key=losses.get)[:2] == [5, 6]
    assert (
        "WARNING: saving step 5 in " in done.stdout
        and load_checkpoint(tmp_path / "model_best.pt")["step"] == 6
    )
    assert [step for step, _ in metrics.read_log(tmp_path)["save_s"]] == [1, 2, 3, 4, 5, 6]


def test_a_worse_model_never_replaces_the_best(data_dir, tmp_path):
    """The run goes on from a checkpoint that is older than model_best.pt, and validates at other
    steps from there."""
    words = [
        *flags(data_dir=data_dir, log_dir=tmp_path, **BEST_AT_5 | {"save_every": 3}),
        "--keep_best",
    ]
    assert train.main(words) == 0 and load_checkpoint(tmp_path / "model_best.pt")["step"] == 5
    (tmp_path / "model_00006.pt").unlink()
    assert train.main([*words, "--val_every=6"]) == 0
    losses = dict(metrics.read_log(tmp_path)["val"])
    assert (
        load_checkpoint(tmp_path / "model_best.pt")["step"] == 5 and losses[6] < losses[3]
    )  # 6 is the best since 3


def test_a_new_run_does_not_compare_with_the_best_of_another(data_dir, trained, tmp_path):
    best = load_checkpoint(trained / "model_00008.pt") | {"val_loss": 0.1}
    torch.save(
        {name: value for name, value in best.items() if name != "optimizer"},
        tmp_path / "model_best.pt",
    )
    assert train.main([*flags(data_dir=data_dir, log_dir=tmp_path), "--keep_best"]) == 0
    assert load_checkpoint(tmp_path / "model_best.pt")["val_loss"] > 1


def test_without_keep_best_there_is_none(trained):
    assert not (trained / "model_best.pt").exists()


# ---- bad input ----

BAD = {
    "unknown flag": (["--batch", "4"], "unknown flag --batch"),
    "misspelt flag": (["--max_step=4"], "did you mean --max_steps"),
    "unknown preset": (["--preset", "gpt5"], "invalid choice: 'gpt5'"),
    "no number": (["--max_steps", "many"], "invalid int value: 'many'"),
    "heads": (["--n_head=3"], "n_head 3 does not divide n_embd 32: n_head 4 would|n_head 2 would"),
    "no layers": (["--n_layer=0"], "--n_layer is 0: it must be at least 1"),
    "total batch": (["--total_batch_size=100"], "100 is not a multiple.*\nHINT: --total_batch_size 96 fits"),
    "batch": (["--batch_size=3"], "--batch_size 3 x .*\nHINT: --batch_size 2 fits"),
    "no shards": (["--data_dir=nowhere"], "no train shards in nowhere: `python data_generator.py --data_dir nowhere`"),
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
    "validation": (["--val_tokens=64"], "--val_tokens 64 is less than one step.*it must be at least as many"),
    "interval": (["--save_every=-5"], "--save_every is -5"),
    "device": (["--device=cuda"], "--device cuda: this machine has none"),
    "seed": (["--seed=99999999999999999999"], "--seed is 99999999999999999999: it must be below"),
    "memory": (["--vocab_size=9999999999999"], "--batch_size 2 does not fit into memory.\nHINT: --batch_size 1"),
    "HellaSwag": (["--hellaswag_every=4", "--hellaswag_data=none.jsonl"], "none.jsonl can't be read"),
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
    assert (
        re.search(r"exitcode\s*: 2", done.stderr)
        and 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    )


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
    assert "data is not complete: a run can't go on after its data has grown" in printed
    assert "WARNING: --warmup_steps 2 > --max_steps 1: none has --max_lr" in printed
    assert (
        "validation uses 512 tokens: the whole steps in --val_tokens 5,000 and in the 600 of"
        in printed
    )
    assert printed.index("validation uses") < printed.index("step     0 |")


# ---- going on ----


def test_the_run_of_an_older_version_goes_on(tmp_path):
    """Its data, its checkpoint and its log up to the end: tests/before was written by the version
    before lib/."""
    shutil.copytree(ROOT / "tests" / "before", tmp_path, dirs_exist_ok=True)
    then = comparable_log(tmp_path / "log")
    words = flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log", n_layer=1, n_embd=8, total_batch_size=64,
                  max_steps=6, val_every=2, val_tokens=128, dtype=None)  # fmt: skip
    assert train.main(words) == 0
    now = comparable_log(tmp_path / "log")
    assert [line for line in now if int(line.split()[0]) < 3] == [
        line for line in then if int(line.split()[0]) < 3
    ]
    assert_log_close(now, then)


def test_a_finished_run_says_so_and_can_be_extended(data_dir, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    before = comparable_log(tmp_path / "log")
    again = flags(data_dir=data_dir, log_dir=tmp_path / "log", sample_every=4)
    assert train.main(again) == 0
    printed = capsys.readouterr().out
    assert (
        "finished at step 8: raise --max_steps or choose another --log_dir" in printed
        and "  > " in printed
    )
    assert "saved" not in printed and comparable_log(tmp_path / "log") == before
    assert train.main([*again, "--max_steps=10"]) == 0
    assert "from here the cosine ends at 10" in capsys.readouterr().out
    steps = [int(line.split()[0]) for line in comparable_log(tmp_path / "log") if " train " in line]
    assert steps == list(range(10))
    assert train.main([*again, "--resume=never"]) == 2
    assert "has checkpoints" in capsys.readouterr().err


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
def test_continuing_with_other_settings_names_the_difference(name, data_dir, trained, capsys):
    word, message = DIFFERENT[name]
    assert train.main([*flags(data_dir=data_dir, log_dir=trained), f"--{word}"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "--log_dir" in printed


def test_continuing_with_other_data_names_the_difference(trained, tmp_path, capsys):
    write_shards(tmp_path, {"val": [600], "train": [2000, 3000, 457]}, seed=5)
    assert train.main(flags(data_dir=tmp_path, log_dir=trained)) == 2
    assert "data (sha256) was" in capsys.readouterr().err


def test_settings_that_may_change(data_dir, trained, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    changes = {
        "val_every": 5,
        "val_tokens": 512,
        "save_every": 7,
        "batch_size": 4,
        "max_steps": 9,
        "timeout": 60,
    }
    assert (
        train.main(
            [
                *flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log", **changes),
                "--no-compile",
            ]
        )
        == 0
    )


def test_starting_from_other_weights(data_dir, trained, tmp_path, capsys):
    checkpoint = trained / "model_checkpoint.pt"
    shape = {
        "n_layer": None,
        "n_head": None,
        "n_embd": None,
        "init_from": checkpoint,
        "data_dir": data_dir,
    }
    assert train.main(flags(log_dir=tmp_path / "a", max_steps=4, **shape)) == 0
    losses = {
        log: [line.split()[2] for line in comparable_log(log) if " val " in line]
        for log in (trained, tmp_path / "a")
    }
    assert losses[tmp_path / "a"][0] == losses[trained][-1]  # it begins where the other ended
    capsys.readouterr()
    assert train.main([*flags(log_dir=tmp_path / "b", **shape), "--n_layer=3"]) == 2
    assert "--n_layer 3 contradicts --init_from" in capsys.readouterr().err


# ---- surviving the night ----


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def log_lines(log_dir) -> list[str]:
    path = Path(log_dir) / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def workers_of(pid: int, name=b"train.py") -> list[int]:
    """The training processes below a torchrun, from /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if (
                int(stat.read_text().rpartition(")")[2].split()[1]) == pid
                and name in (stat.parent / "cmdline").read_bytes()
            ):
                children.append(int(stat.parent.name))
        except (OSError, IndexError):
            pass
    return sorted(children)


def start_torchrun(ranks, *words, env=None, launcher=("--standalone",)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(torchrun_command(ranks, "train.py", *words, flags=launcher), env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


LONG = {"max_steps": 60, "val_every": 20, "save_every": 3}


@pytest.fixture(scope="module")
def long_run(data_dir, tmp_path_factory):
    """The uninterrupted run on 2 ranks that interrupted ones must equal."""
    log_dir = tmp_path_factory.mktemp("long")
    done = torchrun(2, "train.py", *flags(data_dir=data_dir, log_dir=log_dir, **LONG))
    assert done.returncode == 0, done.stderr
    return log_dir


def kill_and_resume(kills: int, data_dir, log_dir, dice: random.Random, env=None):
    """Run LONG on 2 ranks; SIGKILL a random rank at a random moment, so many times; then let it
    finish."""
    words = flags(data_dir=data_dir, log_dir=log_dir, **LONG)
    for _ in range(kills):
        before = len(log_lines(log_dir))
        process = start_torchrun(2, *words, env=env)
        target = before + dice.randrange(3, 60)
        wait_for(
            lambda target=target, process=process: (
                len(log_lines(log_dir)) >= target or process.poll() is not None
            )
        )
        if workers := workers_of(process.pid):
            os.kill(dice.choice(workers), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
    done = torchrun(2, "train.py", *words, env=env)
    assert done.returncode == 0, done.stderr
    return done


def assert_uninterrupted(log_dir, reference):
    assert_same_weights(log_dir, reference)
    assert comparable_log(log_dir) == comparable_log(reference)


def test_three_random_kills_leave_no_trace(data_dir, long_run, tmp_path):
    kill_and_resume(3, data_dir, tmp_path, random.Random(time.time()))
    assert_uninterrupted(tmp_path, long_run)


@pytest.mark.slow
def test_campaign_of_random_kills(data_dir, long_run, tmp_path, campaign):
    dice = random.Random(2026)
    for round_ in range(campaign(20)):
        kill_and_resume(1, data_dir, tmp_path / str(round_), dice)
        assert_uninterrupted(tmp_path / str(round_), long_run)


@pytest.mark.parametrize("what", ["optimizer", "step"])
def test_resume_without_a_part_of_the_state_is_noticed(what, data_dir, trained, tmp_path):
    """Negative control: the comparison above does see a state that is not whole."""
    done = script(
        "train.py", *flags(data_dir=data_dir, log_dir=tmp_path), env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0
    assert_same_weights(tmp_path, trained)
    (tmp_path / "model_00008.pt").unlink()
    path = tmp_path / "model_00006.pt"
    content = load_checkpoint(path)
    if what == "optimizer":
        content["optimizer"]["state"] = {}
    else:
        content["step"] = 5
    torch.save(content, path)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path)) == 0
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path, trained)


@pytest.mark.parametrize("to", ["torchrun", "rank"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signals_finish_the_step_save_and_leave(name, to, data_dir, long_run, tmp_path):
    launcher = ("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP")
    process = start_torchrun(
        2,
        *flags(data_dir=data_dir, log_dir=tmp_path, **LONG | {"save_every": 1000}),
        launcher=launcher,
    )
    wait_for(lambda: len(log_lines(tmp_path)) > 30)
    number, start = signal.Signals[name], time.time()
    os.kill(process.pid if to == "torchrun" else workers_of(process.pid)[1], number)
    output, _ = process.communicate(timeout=60)
    assert time.time() - start < 15 and f"stopped by {name}" in output, output
    steps = max(int(line.split()[0]) for line in log_lines(tmp_path) if " train " in line) + 1
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == steps  # none lost
    if to == "rank":
        assert re.search(rf"exitcode\s*: {128 + number}", output), output
    if name == "SIGTERM":  # the state that the others save is no other
        done = torchrun(
            2,
            "train.py",
            *flags(data_dir=data_dir, log_dir=tmp_path, **LONG | {"save_every": 1000}),
        )
        assert done.returncode == 0, done.stderr
        assert_uninterrupted(tmp_path, long_run)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["validation", "HellaSwag"])
def test_a_signal_in_the_middle_of_an_evaluation(what, data_dir, tmp_path):
    """An evaluation of a minute, at step 6: saved and gone within 10 s, no step lost, and the next
    run measures it."""
    write_shards(tmp_path / "data", {"val": [1_500_000], "train": [5457]})
    write_hellaswag(tmp_path / "few.jsonl", 10)
    write_hellaswag(tmp_path / "many.jsonl", 20_000)
    common = {
        "data_dir": tmp_path / "data",
        "val_every": 6,
        "hellaswag_every": 6,
        "block_size": 512,
        "n_embd": 64,
    }
    common |= {"hellaswag_data": tmp_path / "few.jsonl"}
    assert torchrun(2, "train.py", *flags(log_dir=tmp_path / "whole", **common)).returncode == 0
    words = [
        ROOT / "tests" / "drivers.py",
        "stop_after",
        3,
        *flags(log_dir=tmp_path / "log", **common),
    ]
    assert "stopped by SIGTERM after 4 steps" in torchrun(2, *words).stdout
    long = (
        {"val_tokens": 1_499_904}
        if what == "validation"
        else {"hellaswag_data": tmp_path / "many.jsonl"}
    )
    process = start_torchrun(2, *flags(log_dir=tmp_path / "log", **common | long))
    wait_for(lambda: any(line.startswith("5 train") for line in log_lines(tmp_path / "log")), 120)
    time.sleep(4)
    before, start = comparable_log(tmp_path / "log"), time.time()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert time.time() - start < 10 and "stopped by SIGTERM after 6 steps, saved" in output, output
    assert not [line for line in before if line.startswith("6 hella")]
    assert load_checkpoint(tmp_path / "log" / "model_checkpoint.pt")["step"] == 6
    assert torchrun(2, "train.py", *flags(log_dir=tmp_path / "log", **common)).returncode == 0
    assert_uninterrupted(tmp_path / "log", tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_exit_code_of_one_process(name, data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=40)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # these tests may themselves run under nohup
    )
    wait_for(lambda: len(log_lines(tmp_path)) > 8)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.Signals[name]
        and "the same command goes on from here" in output
    )


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    data_dir, tmp_path, monkeypatch, capsys
):
    validation_loss = train.validation_loss

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validation_loss(*arguments)

    monkeypatch.setattr(train, "validation_loss", signalled)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after 0 steps; the same command goes on" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt")) and "val" not in metrics.read_log(tmp_path)


def test_no_rank_leaves_before_the_last_save_is_done(data_dir, tmp_path):
    """After a signal torchrun would end rank 0 half a minute later, in a save that takes so
    long."""
    words = [
        str(ROOT / "tests" / "drivers.py"),
        "slow_save",
        "8",
        *flags(data_dir=data_dir, log_dir=tmp_path),
    ]
    process = subprocess.Popen(
        torchrun_command(2, *words),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    wait_for((tmp_path / "model_00008.pt").exists)
    time.sleep(1.5)
    assert len(workers_of(process.pid, b"drivers.py")) == 2
    assert process.wait(timeout=60) == 0


def test_what_gloo_has_left_to_do_does_not_spoil_the_exit_code(data_dir, tmp_path):
    """A thread of gloo's that gives a tensor back while Python shuts down aborts the process
    (-6)."""
    (tmp_path / "late.py").write_text(
        "import runpy, sys\n"
        "import torch, torch.distributed as dist\n"
        "def leave_work_behind():\n"
        "    for _ in range(1000):\n"
        "        dist.all_reduce(torch.ones(1000), async_op=True)\n"
        "dist.destroy_process_group = leave_work_behind\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [str(ROOT / "train.py"), *flags(data_dir=data_dir, log_dir=tmp_path)]
    done = torchrun(2, str(tmp_path / "late.py"), *words)
    assert done.returncode == 0, done.stderr


def test_a_run_outlives_its_terminal(data_dir, trained, tmp_path):
    """Under nohup a hangup is nothing; and when nobody reads its output any more, the run goes on
    without."""
    words = [
        "nohup",
        sys.executable,
        str(ROOT / "train.py"),
        *flags(data_dir=data_dir, log_dir=tmp_path),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    wait_for(lambda: log_lines(tmp_path))
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and "Traceback" not in process.stderr.read()
    assert_same_weights(tmp_path, trained)


def test_second_job_is_refused_and_orphans_leave(data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, **LONG | {"max_steps": 2000})
    process = start_torchrun(2, *words)
    wait_for(lambda: len(log_lines(tmp_path)) > 8)
    workers = workers_of(process.pid)
    second = script("train.py", *words)
    assert (
        second.returncode == 2 and f"is being written by process {workers[0]} on" in second.stderr
    ), second.stderr
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 30)
    steps = [line.split()[0] for line in log_lines(tmp_path) if " train " in line]
    assert len(steps) == len(set(steps)) and load_checkpoint(tmp_path / "model_checkpoint.pt")


def restart_run(data_dir, log_dir, hurt, timeout=600):
    """A torchrun that may restart 3 times, one of whose ranks is hurt on the way."""
    launcher = ("--standalone", "--max-restarts=3")
    words = flags(data_dir=data_dir, log_dir=log_dir, **LONG | {"timeout": timeout})
    process = start_torchrun(
        2, *words, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, launcher=launcher
    )
    wait_for(lambda: len(log_lines(log_dir)) > 40)
    os.kill(random.choice(workers_of(process.pid)), hurt)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_campaign_of_restarts(data_dir, long_run, tmp_path, campaign):
    for round_ in range(campaign(10)):
        restart_run(data_dir, tmp_path / str(round_), signal.SIGKILL)
        assert_uninterrupted(tmp_path / str(round_), long_run)


@pytest.mark.slow
def test_a_rank_that_hangs_runs_into_the_timeout(data_dir, long_run, tmp_path):
    restart_run(data_dir, tmp_path, signal.SIGSTOP, timeout=10)
    assert_uninterrupted(tmp_path, long_run)


def driver(what, *words, ranks=2, env=None):
    return torchrun(ranks, str(ROOT / "tests" / "drivers.py"), what, *words, env=env)


@pytest.mark.parametrize("poison", ["nan_loss", "inf_loss", "nan_gradient"])
def test_nan_on_one_rank_skips_the_update_on_all(poison, data_dir, tmp_path):
    """The poisoned step leaves weights and moments as they were: equal to a run that had no such
    step."""
    done = driver(
        poison,
        4,
        *flags(data_dir=data_dir, log_dir=tmp_path, max_steps=5, save_every=1, keep_every=1),
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in comparable_log(tmp_path) if "skipped" in line] == ["4 skipped 1"]
    before, after = (load_checkpoint(tmp_path / f"model_0000{step}.pt") for step in (4, 5))
    for name, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][name])
    for index, state in before["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, after["optimizer"]["state"][index][key])


def test_ten_skips_in_a_row_end_the_run(data_dir, tmp_path):
    done = driver("nan_for_ever", 4, *flags(data_dir=data_dir, log_dir=tmp_path, max_steps=30))
    assert done.returncode == 1 and "not finite 10 times in a row, up to step 13" in done.stderr
    assert re.search(r"exitcode\s*: 1", done.stderr)
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 12
    with_nan = weights(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in with_nan.values())


def test_ranks_that_drift_apart_stop_the_run(data_dir, tmp_path):
    done = driver("drift", 5, *flags(data_dir=data_dir, log_dir=tmp_path))
    assert (
        done.returncode == 1
        and "at step 6 the weights of ranks [1] differ from rank 0's" in done.stderr
    ), done.stderr
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 3


@pytest.mark.parametrize("link", ["model_00006.pt", None])
def test_the_newest_is_linked_again_where_a_kill_left_it_behind(link, data_dir, trained, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "model_checkpoint.pt").unlink()
    if link:
        (tmp_path / "model_checkpoint.pt").symlink_to(link)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path)) == 0
    assert os.readlink(tmp_path / "model_checkpoint.pt") == "model_00008.pt"


def test_what_is_not_measured_again_stays_in_the_log(data_dir, trained, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    before = metrics.read_log(tmp_path)["val"]
    assert before[-1][0] == 8
    assert (
        train.main(
            flags(data_dir=data_dir, log_dir=tmp_path, max_steps=12, val_every=5, val_tokens=256)
        )
        == 0
    )
    assert metrics.read_log(tmp_path)["val"][:3] == before


def test_a_machine_that_does_not_see_the_newest_checkpoint_is_told(data_dir, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    done = driver(
        "sees_no_checkpoint", 0, *flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=9)
    )
    assert (
        done.returncode == 1
        and "the ranks would go on after different steps, [8, 0]: nothing" in done.stderr
    )


def test_weights_that_overflow_end_the_run_with_a_message(data_dir, tmp_path):
    done = script(
        "train.py",
        *flags(data_dir=data_dir, log_dir=tmp_path, max_lr=1e18, warmup_steps=0, save_every=1),
    )
    assert (
        done.returncode == 1 and "has numbers that are not finite: it is not saved" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_costs_one_save_and_not_the_run(data_dir, trained, tmp_path):
    done = script(
        ROOT / "tests" / "drivers.py",
        "full_disk",
        3,
        *flags(data_dir=data_dir, log_dir=tmp_path),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"WARNING: .*model_00003.pt could not be saved .* bytes are free", done.stdout)
    assert not list(tmp_path.glob("*.tmp"))
    assert_same_weights(tmp_path, trained)


def test_a_rank_that_is_alone_with_bad_data_says_so(data_dir, tmp_path):
    """Step 2 is the sequences 16 to 23 of 16 tokens; 18 and 19 are rank 1's."""
    shutil.copytree(data_dir, tmp_path / "data")
    shard = tmp_path / "data" / "edufineweb_train_000001.npy"
    tokens = np.load(shard)
    tokens[18 * 16 + 5] = 300
    np.save(shard, tokens)
    done = torchrun(2, "train.py", *flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log"))
    assert (
        f"error: {shard} has token 300, which is not below" in done.stderr and done.returncode == 1
    ), done.stderr


def test_a_disk_without_any_room_costs_neither_log_nor_run(data_dir, trained, tmp_path):
    """From step 3 to 6 nothing can be written: a curve and a checkpoint fall out, the log catches
    up."""
    words = [
        ROOT / "tests" / "drivers.py",
        "no_room",
        3,
        *flags(data_dir=data_dir, log_dir=tmp_path),
    ]
    done = script(*words, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (
        "curve.png'; the curve is not drawn" in done.stdout
        and "earlier checkpoints are intact" in done.stdout
    )
    assert comparable_log(tmp_path) == comparable_log(trained)
    assert_same_weights(tmp_path, trained)


def test_an_older_checkpoint_that_stays_costs_a_warning(data_dir, trained, tmp_path, capsys):
    """A directory under a checkpoint's name can't be opened, so it can't be removed: the new
    checkpoint is good."""
    state = load_checkpoint(trained / "model_checkpoint.pt")
    (tmp_path / "model_00001.pt").mkdir()
    (tmp_path / "model_00002.pt").write_bytes(b"")
    config = train.parse(TrainConfig, flags(data_dir=data_dir, log_dir=tmp_path), "", train.PRESETS)
    assert train.save(config, Ranks("cpu"), metrics.Log(tmp_path, 0), state) is True
    printed = capsys.readouterr().out
    assert (
        "WARNING: an older checkpoint could not be removed: " in printed
        and "model_00001.pt" in printed
    )
    assert "saved " in printed and load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 8


def test_a_full_disk_at_the_last_save_is_a_failed_run(data_dir, tmp_path):
    done = script(
        ROOT / "tests" / "drivers.py",
        "full_disk",
        8,
        *flags(data_dir=data_dir, log_dir=tmp_path),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "the last checkpoint could not be saved" in done.stderr
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 6 and not list(
        tmp_path.glob("*.tmp")
    )


def test_a_damaged_newest_checkpoint_is_passed_over(data_dir, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    newest, older = tmp_path / "log" / "model_00008.pt", tmp_path / "log" / "model_00006.pt"
    damage(newest)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 0
    printed = capsys.readouterr().out
    assert f"WARNING: {newest} is damaged" in printed and f"going on from {older}" in printed
    assert_uninterrupted(tmp_path / "log", trained)
    damage(newest)
    damage(older)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 2
    printed = capsys.readouterr().err
    assert str(newest) in printed and str(older) in printed and "no checkpoint" in printed


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_two_machines_give_the_weights_of_one(data_dir, trained, tmp_path):
    import socket

    done = torchrun(2, "train.py", *flags(data_dir=data_dir, log_dir=tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = flags(data_dir=data_dir, log_dir=tmp_path / "two")
    nodes = []
    for node in range(2):
        launcher = (
            "--nnodes=2",
            f"--node_rank={node}",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        )
        nodes.append(start_torchrun(1, *words, launcher=launcher))
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output
    assert_uninterrupted(tmp_path / "two", tmp_path / "one")
