"""Faults: what the process survives, and what ends it with one message."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_weights,
    assert_uninterrupted,
    comparable_log,
    damage,
    driver,
    flags,
    script,
    torchrun,
    values,
    weights,
)

import train
from lib.checkpoint import load_checkpoint
from lib.log import read_log


@pytest.mark.slow
def test_a_loss_scale_that_falls_does_not_end_the_run(data_dir, tmp_path):
    """It begins at 2^40, far too high: more than ten updates are skipped until it fits."""
    words = flags(data_dir=data_dir, log_dir=tmp_path, dtype="float16", max_steps=60, max_lr=3e-3)
    done = driver("high_scale", 40, *words)
    assert done.returncode == 0, done.stderr
    skipped = [step for step, _ in read_log(tmp_path)["skipped"]]
    assert skipped[:12] == list(range(12)) and len(skipped) < 30
    assert values(tmp_path, "train")[-1] < values(tmp_path, "train")[0]


@pytest.mark.slow
def test_float16_that_is_never_finite_ends_the_run(data_dir, tmp_path):
    """The scale falls from 2^16 to 1 in 16 steps, then ten more are enough."""
    done = driver(
        "nan_forever",
        0,
        *flags(data_dir=data_dir, log_dir=tmp_path, dtype="float16", max_steps=60),
    )
    assert (
        done.returncode == 1 and "was not finite 10 times in a row, up to step 25" in done.stderr
    ), done.stderr


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
    done = driver("nan_forever", 4, *flags(data_dir=data_dir, log_dir=tmp_path, max_steps=30))
    assert done.returncode == 1 and "was not finite 10 times in a row, up to step 13" in done.stderr
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


def test_a_machine_that_does_not_see_the_newest_checkpoint_is_told(data_dir, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    done = driver(
        "sees_no_checkpoint", 0, *flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=9)
    )
    assert (
        done.returncode == 1
        and "the ranks would start from different steps, [8, 0]: nothing" in done.stderr
    )


def test_weights_that_are_not_finite_end_the_run_with_a_message(data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, save_every=1)
    driving = {"PYTHONPATH": str(ROOT)}
    done = script(ROOT / "tests" / "drivers.py", "inf_weight", 3, *words, env=driving)
    message = "the weights after step 4 have numbers that are not finite: they are not saved"
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "model_checkpoint.pt")["step"] == 3


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
    assert "earlier checkpoints are intact, the run continues" in done.stdout
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
    assert f"WARNING: {newest} is damaged" in printed and f"resuming from {older}" in printed
    assert_uninterrupted(tmp_path / "log", trained)
    damage(newest)
    damage(older)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 2
    printed = capsys.readouterr().err
    assert str(newest) in printed and str(older) in printed and "no checkpoint" in printed


def test_a_log_that_cannot_grow_ends_the_run_and_the_same_command_goes_on(
    data_dir, trained, tmp_path
):
    words = flags(data_dir=data_dir, log_dir=tmp_path)
    driving = {"PYTHONPATH": str(ROOT)}
    done = script(ROOT / "tests" / "drivers.py", "full_log", 4, *words, env=driving)
    assert (
        done.returncode == 1 and "log.txt can't be written: No space left on device" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert train.main(words) == 0
    assert_uninterrupted(tmp_path, trained)
