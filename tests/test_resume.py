"""Going on: after kills, signals, other ranks and machines, against the uninterrupted run."""

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
    LONG,
    ROOT,
    assert_log_close,
    assert_same_weights,
    assert_uninterrupted,
    comparable_log,
    driver,
    flags,
    log_lines,
    script,
    start_torchrun,
    torchrun,
    torchrun_command,
    values,
    wait_for,
    workers_of,
    write_hellaswag,
    write_shards,
)

import train
from lib.checkpoint import load_checkpoint
from lib.log import read_log
from train import TrainConfig, get_lr


def test_moving_from_2_ranks_to_1_to_4(data_dir, trained, tmp_path):
    common = {"data_dir": data_dir, "log_dir": tmp_path / "log"}
    for ranks, stop_after in ((2, 3), (1, 6), (4, 99)):
        done = torchrun(
            ranks, str(ROOT / "tests" / "drivers.py"), "stop_after", stop_after, *flags(**common)
        )
        assert ("stopped by SIGTERM" in done.stdout) == (stop_after < 99), done.stdout + done.stderr
    assert_log_close(comparable_log(tmp_path / "log"), comparable_log(trained))


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
        "the run began in bfloat16 and continues in it; a new one would use float32 here" in printed
    )


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
    assert "max_steps was 8: the decay now ends at 12" in capsys.readouterr().out


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
    assert "the cosine now ends at 10" in capsys.readouterr().out
    steps = [int(line.split()[0]) for line in comparable_log(tmp_path / "log") if " train " in line]
    assert steps == list(range(10))


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


@pytest.mark.slow
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


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "name, to",
    [
        ("SIGTERM", "torchrun"),
        pytest.param("SIGTERM", "rank", **SLOW),
        pytest.param("SIGINT", "torchrun", **SLOW),
        pytest.param("SIGUSR1", "rank", **SLOW),
        pytest.param("SIGHUP", "torchrun", **SLOW),
        pytest.param("SIGINT", "rank", **SLOW),
        pytest.param("SIGUSR1", "torchrun", **SLOW),
        pytest.param("SIGHUP", "rank", **SLOW),
    ],
)
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


@pytest.mark.parametrize(
    "name",
    ["SIGINT", *(pytest.param(name, **SLOW) for name in ("SIGTERM", "SIGUSR1", "SIGHUP"))],
)
def test_exit_code_of_one_process(name, data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        # these tests may themselves run under nohup, or in the background of a shell
        preexec_fn=lambda: signal.signal(signal.Signals[name], signal.SIG_DFL),
    )
    wait_for(lambda: len(log_lines(tmp_path)) > 8)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.Signals[name]
        and "the same command resumes from here" in output
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
    assert "stopped by SIGTERM after 0 steps; the same command resumes" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt")) and "val" not in read_log(tmp_path)


@pytest.mark.slow
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
    """A thread of gloo's that gives tensors back at the end may abort the process (-6) while Python
    shuts down, and must not hold it up."""
    (tmp_path / "late.py").write_text(
        "import runpy, sys\n"
        "import torch, torch.distributed as dist\n"
        "from lib.ranks import Ranks\n"
        "end = Ranks.__exit__\n"
        "def leave_work_behind(ranks, *error):\n"
        "    for _ in range(1000):\n"
        "        dist.all_reduce(torch.ones(1000), async_op=True)\n"
        "    end(ranks, *error)\n"
        "Ranks.__exit__ = leave_work_behind\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [str(ROOT / "train.py"), *flags(data_dir=data_dir, log_dir=tmp_path)]
    done = torchrun(2, str(tmp_path / "late.py"), *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("link", ["model_00006.pt", None])
def test_the_newest_is_linked_again_where_a_kill_left_it_behind(link, data_dir, trained, tmp_path):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "model_checkpoint.pt").unlink()
    if link:
        (tmp_path / "model_checkpoint.pt").symlink_to(link)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path)) == 0
    assert os.readlink(tmp_path / "model_checkpoint.pt") == "model_00008.pt"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_kill_between_the_best_checkpoint_and_its_link_leaves_no_trace(data_dir, tmp_path):
    """The best is at step 5; the process is killed when its checkpoint is there, its link not."""
    best_at_5 = {"max_lr": 0.015, "min_lr": 0.015, "max_steps": 6, "warmup_steps": 0}
    common = best_at_5 | {"data_dir": data_dir, "val_every": 1, "save_every": 1}
    words = [*flags(log_dir=tmp_path / "log", **common), "--keep_best"]
    done = driver("killed_after_save", 5, *words, ranks=1)
    assert done.returncode != 0
    assert os.readlink(tmp_path / "log" / "model_best.pt") == "model_00004.pt"
    assert (tmp_path / "log" / "model_00005.pt").exists()
    assert train.main(words) == 0
    losses = dict(read_log(tmp_path / "log")["val"])
    assert min(losses, key=losses.get) == 5
    assert os.readlink(tmp_path / "log" / "model_best.pt") == "model_00005.pt"


def test_the_best_is_kept_where_a_run_was_stopped_before_it_was_measured(data_dir, tmp_path):
    """Stopped after 5 steps without the validation there, which is the lowest of the run."""
    common = {"max_lr": 0.015, "min_lr": 0.015, "max_steps": 6, "warmup_steps": 0, "save_every": 3}
    words = [*flags(data_dir=data_dir, log_dir=tmp_path, val_every=5, **common), "--keep_best"]
    driving = {"PYTHONPATH": str(ROOT)}
    done = script(ROOT / "tests" / "drivers.py", "stop_after", 4, *words, env=driving)
    assert "stopped by SIGTERM after 5 steps, saved" in done.stdout, done.stderr
    assert not (tmp_path / "model_best.pt").exists()
    assert train.main(words) == 0
    losses = dict(read_log(tmp_path)["val"])
    assert min(losses, key=losses.get) == 5
    assert load_checkpoint(tmp_path / "model_best.pt")["step"] == 5


def test_a_best_that_could_not_be_saved_is_not_the_best(data_dir, tmp_path, monkeypatch):
    """Validations of 3.0, which the disk does not take, and of 3.5: the second is the best kept."""
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=4, val_every=1, save_every=0)
    losses = iter((5.0, 4.0, 3.0, 3.5, 6.0))
    monkeypatch.setattr(train, "validation_loss", lambda *words: next(losses))
    save_checkpoint = train.save_checkpoint

    def full_at_step_2(log_dir, state):
        if state["step"] == 2:
            raise OSError(28, "No space left on device")
        return save_checkpoint(log_dir, state)

    monkeypatch.setattr(train, "save_checkpoint", full_at_step_2)
    assert train.main([*words, "--keep_best"]) == 0
    assert os.readlink(tmp_path / "model_best.pt") == "model_00003.pt"
    assert load_checkpoint(tmp_path / "model_00004.pt")["best_val_loss"] == 3.5


def test_a_validation_that_is_not_finite_is_not_the_best(data_dir, tmp_path, monkeypatch):
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=5, val_every=1, save_every=0)
    losses = iter((math.nan, 3.0, math.inf, 3.5, 2.5, math.nan))
    monkeypatch.setattr(train, "validation_loss", lambda *words: next(losses))
    assert train.main([*words, "--keep_best"]) == 0
    assert os.readlink(tmp_path / "model_best.pt") == "model_00004.pt"
    assert load_checkpoint(tmp_path / "model_best.pt")["best_val_loss"] == 2.5
    saved = [step for step, _ in read_log(tmp_path)["save_s"]]
    assert saved == [1, 4, 5] and load_checkpoint(tmp_path / "model_00005.pt")["step"] == 5
