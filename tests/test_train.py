"""The run: real processes, one or several, against arithmetic and against truths."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_log_close,
    comparable_log,
    flags,
    torchrun,
    values,
    weights,
    write_hellaswag,
    write_shards,
)

import train
from lib.checkpoint import load_checkpoint
from lib.loader import TokenLoader
from lib.log import read_log
from train import TrainConfig, get_lr, is_due


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


def test_is_due():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [0, 4, 8, 10]
    assert not any(is_due(step, 0, 10) for step in range(11))


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
        "curve.png",
        "log.txt",
        "model_00006.pt",
        "model_00008.pt",
        "model_checkpoint.pt",
        "run.json",
    ]
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
    losses = values(trained, "val")
    assert abs(loss - losses[-1]) < 1e-5 and losses[-1] < losses[0]


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
def test_presets_share_out_their_step_on_one_and_eight_gpus(preset, tmp_path):
    config = train.parse(TrainConfig, ["--preset", preset], "", train.PRESETS)
    train.check_config(config)
    write_shards(tmp_path, {"train": [config.total_batch_size + 1]})
    for ranks in (1, 8):
        step = (config.seq_len, config.total_batch_size)
        assert TokenLoader(tmp_path, "train", *step, 0, ranks).micro_steps(1) % 64 == 0


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


def test_gpt2_fast_is_published_as_any_other_run(data_dir, tmp_path):
    import export

    assert (
        train.main([*flags(data_dir=data_dir, log_dir=tmp_path / "log"), "--preset=gpt2-fast"]) == 0
    )
    assert export.main(["--model", str(tmp_path / "log"), "--out", str(tmp_path / "GPT")]) == 0
    card = (tmp_path / "GPT" / "README.md").read_text()
    assert " of warm-up, constant, linear in the last 4 steps to " in card
    assert "| optimizer | Muon for the matrices of the blocks, else AdamW, betas " in card


# ---- --keep_best ----


def test_the_best_checkpoint_is_kept_whole(data_dir, tmp_path):
    """At a rate that is too high the loss turns; the best is exported with its own loss and
    step, and a run can go on from it."""
    import export

    rate = {"max_lr": 0.025, "min_lr": 0.025, "warmup_steps": 0}
    words = flags(data_dir=data_dir, log_dir=tmp_path, val_every=1, save_every=4, **rate)
    assert train.main([*words, "--keep_best"]) == 0
    losses = dict(read_log(tmp_path)["val"])
    step = min(losses, key=losses.get)
    assert 0 < step < 7  # else this test shows nothing: the last two are kept anyway
    assert os.readlink(tmp_path / "model_best.pt") == f"model_{step:05d}.pt"
    best = load_checkpoint(tmp_path / "model_best.pt")
    assert best["step"] == step and best["optimizer"]["state"]
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 8
    out = tmp_path / "out"
    assert export.main(["--model", str(tmp_path / "model_best.pt"), "--out", str(out)]) == 0
    assert (
        f"| validation loss | {losses[step]:.4f} nats per byte |" in (out / "README.md").read_text()
    )


def test_without_keep_best_there_is_none(trained):
    assert not (trained / "model_best.pt").exists()
