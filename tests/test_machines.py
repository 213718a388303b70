"""Runs where ranks, machines and directories are not as one assumes: other launchers, ranks that
were started differently, copies of a run, long steps, directories that vanish."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_weights,
    assert_uninterrupted,
    comparable_log,
    damage,
    flags,
    log_lines,
    script,
    torchrun,
    torchrun_command,
    wait_for,
    write_hellaswag,
    write_shards,
)

import hellaswag
import metrics
import sample
import train
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.cli import UserError
from lib.device import choose_device
from lib.ranks import LAUNCHER, Ranks

# ---- ranks ----


@pytest.mark.parametrize(
    "found", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}]
)
def test_half_a_launcher_is_refused(found, data_dir, tmp_path):
    """RANK=1 alone would train to the end and write nothing."""
    done = script("train.py", *flags(data_dir=data_dir, log_dir=tmp_path / "log"), env=found)
    missing = " and ".join(name for name in LAUNCHER if name not in found)
    assert done.returncode == 2 and not (tmp_path / "log").exists()
    assert f"error: {' and '.join(found)} set in the environment, but not {missing}" in done.stderr
    assert f"HINT: for a single process `unset {' '.join(found)}`" in done.stderr


def test_an_address_that_is_left_over_is_no_launcher(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert Ranks("cpu").world_size == 1


def test_the_only_gpu_is_the_one(monkeypatch):
    """Slurm's --gpus-per-task=1 shows each process its own GPU; torchrun shows all to all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", local_rank=3) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="4 processes or more, but 1 GPUs"):
        choose_device("cuda", local_rank=3)


def run_two_ranks(*commands: list[str]) -> list[subprocess.CompletedProcess]:
    """Two ranks, each with words of its own, as they are started by hand on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate(commands)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


OTHERS = {  # what rank 1 has -> what is said of it
    "batch_size": (4, "--batch_size is 2 on rank 0, 4 on rank 1"),
    "seq_len": (8, "--seq_len is 16 on rank 0, 8 on rank 1"),
    "val_tokens": (512, "--val_tokens is 256 on rank 0, 512 on rank 1"),
    "total_batch_size": (256, "--total_batch_size is 128 on rank 0, 256 on rank 1"),
    "max_lr": (3e-4, "--max_lr is 0.0006 on rank 0, 0.0003 on rank 1"),
    "schedule": ("linear", "--schedule is cosine on rank 0, linear on rank 1"),
    "seed": (1, "--seed is 1337 on rank 0, 1 on rank 1"),
    "data_dir": ("other", "data (sha256) is "),
    "val data": ("val", "validation data (sample) is "),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("max_lr", "data_dir") else pytest.mark.slow)
        for name in OTHERS
    ],
)
def test_ranks_that_were_started_differently(name, data_dir, tmp_path):
    value, said = OTHERS[name]
    if name == "data_dir":
        value = tmp_path / "other"
        write_shards(value, {"val": [600], "train": [2000, 3000, 457]}, seed=9)
    changes = {name: value}
    if name == "val data":
        shutil.copytree(data_dir, tmp_path / "other")
        shard = tmp_path / "other" / "edufineweb_val_000000.npy"
        np.save(shard, np.load(shard)[::-1])
        changes = {"data_dir": tmp_path / "other"}
    common = {"data_dir": data_dir, "log_dir": tmp_path / "log"}
    first, second = run_two_ranks(flags(**common), flags(**common | changes))
    assert first.returncode == second.returncode == 2, first.stderr + second.stderr
    for done in (first, second):
        assert f"error: the ranks were started differently: {said}" in done.stderr
    assert [path.name for path in (tmp_path / "log").iterdir()] == [".lock"]


@pytest.mark.slow
def test_ranks_that_were_started_by_hand_alike(data_dir, trained, tmp_path):
    common = {"data_dir": data_dir, "log_dir": tmp_path / "log"}
    first, second = run_two_ranks(flags(**common), flags(**common | {"data_dir": data_dir}))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    steps = [line.split()[:2] for line in comparable_log(tmp_path / "log")]
    assert steps == [line.split()[:2] for line in comparable_log(trained)]


@pytest.mark.slow
def test_an_error_is_printed_wherever_it_happens(tmp_path, data_dir):
    """With a rank of a launcher in the environment, and of rank 1 alone under torchrun."""
    begun = time.time()
    done = script("sample.py", "x", "--model=no.pt", env={"RANK": "3", "LOCAL_RANK": "3"})
    assert "error: there is no checkpoint or folder no.pt" in done.stderr
    assert time.time() - begun < 9
    (tmp_path / "driver.py").write_text(
        "import os, sys\nimport train\n"
        "words = sys.argv[1:]\n"
        "if os.environ['RANK'] == '1':\n    words += ['--min_lr=1']\n"
        "sys.exit(train.main(words))\n"
    )
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log", timeout=30)
    done = torchrun(2, tmp_path / "driver.py", *words)
    assert done.returncode == 1 and "error: --min_lr 1.0 is above --max_lr" in done.stderr


# ---- what a run did not write ----


def only_files(source, target, *names):
    """A copy in which links have become files, as a download makes it."""
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)


def test_a_copy_that_has_only_the_newest_is_resumed(data_dir, trained, tmp_path, capsys):
    log_dir = tmp_path / "log"
    only_files(trained, log_dir, "model_checkpoint.pt", "log.txt", "run.json")
    assert train.main(flags(data_dir=data_dir, log_dir=log_dir, max_steps=12)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert os.readlink(log_dir / "model_checkpoint.pt") == "model_00012.pt"
    assert load_checkpoint(log_dir / "model_00009.pt")["step"] == 9
    shutil.copytree(trained, tmp_path / "whole", symlinks=True)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "whole", max_steps=12)) == 0
    assert_uninterrupted(log_dir, tmp_path / "whole")


def test_a_copy_keeps_its_checkpoint_under_its_own_name(data_dir, trained, tmp_path):
    only_files(trained, tmp_path / "log", "model_checkpoint.pt")
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 0  # finished
    assert os.readlink(tmp_path / "log" / "model_checkpoint.pt") == "model_00008.pt"
    assert_same_weights(tmp_path / "log", trained)


def test_a_copy_that_has_only_the_best_is_resumed_from_it(trained, tmp_path):
    (tmp_path / "log").mkdir()
    shutil.copyfile(trained / "model_checkpoint.pt", tmp_path / "log" / "model_best.pt")
    assert newest_checkpoint(tmp_path / "log").checkpoint["step"] == 8


def test_the_newest_is_the_one_of_the_latest_step_whatever_its_name(data_dir, trained, tmp_path):
    """A download of model_checkpoint.pt beside an older checkpoint: its steps are not lost."""
    log_dir = tmp_path / "log"
    only_files(trained, log_dir, "model_00006.pt", "model_checkpoint.pt", "log.txt")
    assert newest_checkpoint(log_dir).checkpoint["step"] == 8
    assert train.main(flags(data_dir=data_dir, log_dir=log_dir)) == 0
    assert load_checkpoint(log_dir / "model_00008.pt")["step"] == 8
    damage(log_dir / "model_00008.pt")  # without links its copy is as good
    (log_dir / "model_checkpoint.pt").unlink()
    shutil.copyfile(trained / "model_checkpoint.pt", log_dir / "model_checkpoint.pt")
    found = newest_checkpoint(log_dir)
    assert found.checkpoint["step"] == 8 and len(found.skipped) == 1


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def test_checkpoints_that_were_saved_and_are_gone(data_dir, trained, tmp_path, capsys):
    only_files(trained, tmp_path / "log", "log.txt", "run.json", "curve.png")
    before = contents(tmp_path / "log")
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 2
    printed = capsys.readouterr().err
    assert "log.txt says that checkpoints were saved, but" in printed and "restore" in printed
    assert contents(tmp_path / "log") == before


def test_a_run_that_died_before_its_first_save_starts_again(data_dir, trained, tmp_path):
    (tmp_path / "log").mkdir()
    lines = (trained / "log.txt").read_text().splitlines(keepends=True)
    (tmp_path / "log" / "log.txt").write_text("".join(lines[:9]))
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 0
    assert_uninterrupted(tmp_path / "log", trained)


@pytest.mark.parametrize("how", ["SIGTERM", "no validation", "again"])
def test_a_finished_run_keeps_its_last_validation(how, data_dir, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log")
    if how == "SIGTERM":
        validation_loss = train.validation_loss

        def signalled(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return validation_loss(*arguments)

        monkeypatch.setattr(train, "validation_loss", signalled)
    words += ["--val_every=0"] if how == "no validation" else []
    assert train.main(words) == (143 if how == "SIGTERM" else 0)
    assert comparable_log(tmp_path / "log") == comparable_log(trained)


# ---- long steps, signals ----


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_long_step_is_left_in_its_middle(ranks, data_dir, tmp_path):
    """Steps of 4 s (2 s on two ranks) from step 4 on; the signal comes in step 6."""
    driving = [str(ROOT / "tests" / "drivers.py"), "slow_micro_batches", "4"]
    log_dir = tmp_path / "log"
    words = [*driving, *flags(data_dir=data_dir, log_dir=log_dir, batch_size=1, save_every=0)]
    process = subprocess.Popen(
        torchrun_command(ranks, *words),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if "micro-batch of step 6" in line:
            break
    process.send_signal(signal.SIGTERM)
    begun = time.time()
    output += process.communicate(timeout=60)[0].splitlines(keepends=True)
    seconds = time.time() - begun
    text = "".join(output)
    assert "SIGTERM: saving after this step" in text
    assert "stopped by SIGTERM after 6 steps, saved" in text, text
    assert output.count("micro-batch of step 6\n") < 7 and seconds < 10
    assert load_checkpoint(log_dir / "model_checkpoint.pt")["step"] == 6
    if ranks == 1:  # other numbers of ranks add up in another order
        common = {"data_dir": data_dir, "batch_size": 1, "save_every": 0}
        for name in ("log", "whole"):
            words = flags(log_dir=tmp_path / name, **common)
            done = script("train.py", *words, env={"OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
        assert_uninterrupted(tmp_path / "log", tmp_path / "whole")


def test_short_steps_are_not_asked(data_dir, tmp_path, monkeypatch):
    """Once it is known that steps are short, no micro-batch waits for an answer."""
    asked = []
    stop_signal = Ranks.stop_signal
    monkeypatch.setattr(Ranks, "stop_signal", lambda self: asked.append(1) or stop_signal(self))
    common = {"data_dir": data_dir, "batch_size": 1, "val_every": 0, "save_every": 0}
    counts = []
    for steps in (2, 8):
        asked.clear()
        words = flags(log_dir=tmp_path / str(steps), max_steps=steps, **common)
        assert train.main(words) == 0
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["SIGUSR2", pytest.param("SIGXCPU", marks=pytest.mark.slow)])
def test_signals_of_clusters_save(name, data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=4000)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(log_lines(tmp_path)) > 8)
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name] and f"stopped by {name}" in output
    assert errors.startswith(f"{name}: saving after this step\n")


@pytest.mark.slow
def test_a_signal_that_the_parent_ignores_stays_ignored(data_dir, trained, tmp_path):
    """A job in the background of a script has SIGINT ignored."""
    words = flags(data_dir=data_dir, log_dir=tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    wait_for(lambda: log_lines(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert_same_weights(tmp_path, trained)


# ---- directories ----


def test_a_log_directory_that_vanishes_costs_no_weights(data_dir, trained, tmp_path, monkeypatch):
    """Renamed at step 4, after the checkpoint of step 3."""
    get_lr = train.get_lr

    def rename(step, config):
        if step == 4:
            (tmp_path / "log").rename(tmp_path / "moved")
        return get_lr(step, config)

    monkeypatch.setattr(train, "get_lr", rename)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 0
    assert_same_weights(tmp_path / "log", trained)
    assert (tmp_path / "moved" / "model_00003.pt").exists()
    assert comparable_log(tmp_path / "moved") == comparable_log(trained)


def test_a_log_directory_that_cannot_be_made_again_is_named(
    data_dir, tmp_path, monkeypatch, capsys
):
    get_lr = train.get_lr

    def replace(step, config):
        if step == 4:
            (tmp_path / "log").rename(tmp_path / "moved")
            (tmp_path / "log").write_text("")
        return get_lr(step, config)

    monkeypatch.setattr(train, "get_lr", replace)
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log")) == 1
    printed = capsys.readouterr()
    assert f"WARNING: {tmp_path / 'log'} has disappeared" in printed.out
    assert f"once {tmp_path / 'log'} can be written" in printed.err
    assert "Traceback" not in printed.err


def test_an_address_is_no_directory(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags(data_dir=data_dir, log_dir="s3://bucket/log")) == 2
    assert "--log_dir: s3://bucket/log is a URL; give a path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(data_dir, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train.main(flags(data_dir=data_dir, log_dir="~/log")) == 0
    assert_same_weights(tmp_path / "log", trained)
    (tmp_path / "prompt.txt").write_text("x")
    assert sample.main(["--prompt_file=~/prompt.txt", "--model=~/log", "--num_samples=1"]) == 0
    write_hellaswag(tmp_path / "h.jsonl", 2)
    assert hellaswag.main(["--model=~/log", "--data=~/h.jsonl"]) == 0


def test_shards_of_the_same_names_and_sizes_are_other_data(data_dir, trained, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    words = flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log")
    assert train.main(words) == 0
    shard = tmp_path / "data" / "edufineweb_train_000002.npy"
    np.save(shard, np.load(shard)[::-1])
    assert train.main(words) == 2
    assert "data (sample) was" in capsys.readouterr().err


def test_the_best_needs_a_validation(data_dir, tmp_path, capsys):
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log", val_every=0)
    assert train.main([*words, "--keep_best"]) == 2
    assert "--keep_best needs the validation loss" in capsys.readouterr().err


@pytest.mark.slow
def test_run_json_knows_torchs_own_switch(data_dir, tmp_path):
    words = [*flags(data_dir=data_dir, log_dir=tmp_path, max_steps=1), "--compile"]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and ", not compiled;" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["compiled"] is False


# ---- pictures, samples, compilers ----


@pytest.mark.parametrize(
    "trouble",
    ["backend", *(pytest.param(name, marks=pytest.mark.slow) for name in ("usetex", "dollars"))],
)
def test_a_picture_never_ends_a_run(trouble, data_dir, trained, tmp_path):
    log_dir = tmp_path / ("a $x^$ b" if trouble == "dollars" else "log")
    environment = os.environ | {}
    if trouble == "backend":
        environment["MPLBACKEND"] = "nonsense"
    if trouble == "usetex":
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
        environment |= {"MATPLOTLIBRC": str(tmp_path), "PATH": os.path.dirname(sys.executable)}
    words = flags(data_dir=data_dir, log_dir=log_dir)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ("WARNING: the curve is not drawn" in done.stdout) == (trouble != "dollars")
    assert_same_weights(log_dir, trained)
    command = [sys.executable, str(ROOT / "metrics.py"), str(log_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "at step 7" in done.stdout, done.stderr


def test_metrics_needs_no_directory_that_it_can_write_to(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    (tmp_path / "log" / "curve.png.tmp").mkdir()  # root may write everywhere but there
    assert metrics.main([str(tmp_path / "log")]) == 0
    printed = capsys.readouterr().out
    assert "WARNING: the curve is not drawn: IsADirectoryError" in printed and "train" in printed


def test_a_sample_that_is_due_of_weights_that_are_nan(data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path, max_steps=30, save_every=1, val_every=0)
    words = ["nan_weight", "3", *words, "--sample_every=1"]
    done = script(ROOT / "tests" / "drivers.py", *words, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no sample: the weights are not finite" in done.stdout
    assert "was not finite 10 times in a row" in done.stderr or "are not saved" in done.stderr


@pytest.mark.slow
def test_no_compiler_is_two_lines(data_dir, tmp_path):
    words = [*flags(data_dir=data_dir, log_dir=tmp_path / "log"), "--compile"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment["PATH"] = str(tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2, done.stderr
    assert re.match(r"error: torch.compile failed: .*[Cc]ompiler", done.stderr)
    assert "--no-compile trains without" in done.stderr


def test_a_cache_that_cannot_be_written_is_two_lines(data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "below")}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2, done.stderr
    assert "HINT: set TORCHINDUCTOR_CACHE_DIR" in done.stderr


LACK = """
import resource, sys
import train
from lib.checkpoint import newest_checkpoint
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, resource.RLIM_INFINITY))
sys.exit(train.main(sys.argv[1:]))
"""


def test_lack_of_memory_is_no_damage(data_dir, trained, tmp_path):
    """An older checkpoint must not be taken in the place of one that this machine can't hold."""
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    large = load_checkpoint(trained / "model_00008.pt") | {"more": torch.zeros(100_000_000)}
    torch.save(large, tmp_path / "log" / "model_00008.pt")
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log")
    command = [sys.executable, "-c", LACK, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "model_00008.pt can't be read: this machine lacks the memory" in done.stderr


# ---- more ----


def test_a_setting_that_an_older_checkpoint_does_not_have_is_its_default(
    data_dir, trained, tmp_path, capsys
):
    shutil.copytree(trained, tmp_path / "log", symlinks=True)
    checkpoint = load_checkpoint(trained / "model_00008.pt")
    del checkpoint["train_config"]["shuffle"], checkpoint["best_val_loss"]
    torch.save(checkpoint, tmp_path / "log" / "model_00008.pt")
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log")
    assert train.main(words) == 0
    assert train.main([*words, "--shuffle"]) == 2
    assert "shuffle was False, is True" in capsys.readouterr().err


@pytest.mark.slow
def test_under_a_profiler(data_dir, trained, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path)
    command = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile")]
    done = subprocess.run([*command, str(ROOT / "train.py"), *words], capture_output=True)
    assert done.returncode == 0 and (tmp_path / "profile").exists()
    assert_same_weights(tmp_path, trained)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--compile=False"], "a switch takes no value: write --compile or --no-compile"),
        (["--recompute=1"], "a switch takes no value: write --recompute"),
        (["--compile", "False"], "unexpected argument False: a switch takes no value"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES=1 with --device cuda chooses this GPU"),
        (["--local_rank=0"], "unknown flag --local_rank: start with torchrun"),
        (["--local-rank=0"], "unknown flag --local_rank: start with torchrun"),
    ],
)
def test_what_to_write_instead(words, said, capsys):
    assert train.main(words) == 2
    assert said in capsys.readouterr().err


def test_empty_shards_are_passed(tmp_path, capsys):
    directory = tmp_path / "data"
    write_shards(directory, {"val": [600], "train": [2000, 0, 3000]}, manifest=False)
    header = np.array([20240520, 1, 0, *(253 * [0])], "<i4")
    (directory / "train_empty.bin").write_bytes(header.tobytes())
    assert train.main(flags(data_dir=directory, log_dir=tmp_path / "log", max_steps=2)) == 0
    assert "5,000 training tokens" in capsys.readouterr().out


def test_a_model_whose_logits_overflow_says_so(tmp_path, capsys):
    model = GPT(GPTConfig(16, 320, 1, 1, 8))
    model.transformer.wte.weight.data[3, 3] = float("inf")
    state = {"model": model.state_dict(), "config": model.config, "tokenizer": "bytes"}
    torch.save(state, tmp_path / "model.pt")
    assert sample.main(["x", "--model", str(tmp_path / "model.pt")]) == 1
    said = "model.pt: weight transformer.wte.weight has numbers that are not finite"
    assert said in capsys.readouterr().err
