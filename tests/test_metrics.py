"""The log, the arithmetic of speed, the curve, the trackers."""

import dataclasses
import json
import math
import resource
import sqlite3
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, script

import metrics
from GPT_Modules import GPTConfig
from lib.cli import UserError
from lib.curve import draw_curve, finite, thin
from lib.log import Log, RunFacts, read_log, read_run
from lib.log import write_run as write_facts
from lib.speed import duration, flops_per_token, peak_flops


def test_flops_of_124m():
    assert (
        flops_per_token(GPTConfig(vocab_size=50304), 1024)
        == 854_654_976
        == 6 * 123_568_128 + 12 * 12 * 768 * 1024
    )


def test_peak_rates_by_name():
    rates = {
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA L4": 121, "NVIDIA L40S": 362,
        "NVIDIA A10G": 70, "NVIDIA H20": 148,
        "NVIDIA RTX 6000 Ada Generation": 364, "NVIDIA GeForce RTX 4090": 165,
    }  # fmt: skip
    for name, rate in rates.items():
        assert peak_flops(name) == rate * 1e12, name
    assert peak_flops("Tesla V100-SXM2-16GB") is None and peak_flops("Quadro RTX 6000") is None
    for name in ("GeForce RTX 3090 Ti", "GeForce RTX 4090 D", "RTX 4090 Laptop GPU", "H200 NVL"):
        assert peak_flops(f"NVIDIA {name}") is None, name
    assert peak_flops("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None


def test_duration():
    assert [duration(s) for s in (0, 61, 3600, 90_000)] == [
        "0m00s",
        "1m01s",
        "1h00m",
        "25h00m",
    ]


def test_log_lines_and_what_a_resumed_run_drops(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(6):
        log.write(step, train=1 / (step + 3), lr=1e-4)
    log.write(6, val=math.pi)
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("0 train 0.333333\n0 lr 0.0001\n") and text.endswith("6 val 3.14159\n")
    with open(tmp_path / "log.txt", "a") as file:
        file.write("7 train 0.1")  # torn: no end of line
    log = Log(tmp_path, 4)
    log.write(4, train=9.0)
    steps = [step for step, _ in read_log(tmp_path)["train"]]
    assert steps == [0, 1, 2, 3, 4] and read_log(tmp_path)["train"][-1] == (4, 9.0)
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(b"\0\0\0\0garbage\n")
    assert len(read_log(tmp_path)["train"]) == 5


def write_run(directory, train: int, val=True, hella=True, dataset="HuggingFaceFW/fineweb-edu"):
    log = Log(directory, 0)
    for step in range(train):
        log.write(step, train=3 + 8 / (1 + step / 40))
        if step % 25 == 0:
            log.write(
                step,
                **({"val": 3 + 8 / (1 + step / 40)} if val else {}),
                **({"hella": 0.25 + step / 9000} if hella else {}),
            )
    facts = RunFacts(
        config={"max_steps": train - 1},
        model={},
        data={"dataset": dataset, "tokenizer": "gpt2"},
        parameters=124_475_904,
        tokens_per_step=2**19,
        hardware="8 x NVIDIA A100",
        precision="bfloat16",
        compiled=True,
        versions={},
    )
    write_facts(directory, facts)
    assert read_run(directory) == facts


def test_a_full_disk_is_a_message_that_names_the_log(tmp_path):
    log = Log(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    try:
        with pytest.raises(UserError, match="log.txt can't be written: File too large") as error:
            log.write(0, train=5.12345)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert error.value.code == 1


def test_a_curve_is_thinned_by_means_and_keeps_its_ends():
    """100,000 steps: at most 4,000 points, each the mean of as many steps as the others."""
    points = thin(np.column_stack((np.arange(100_000), np.arange(100_000.0))))
    assert len(points) == 4000
    assert np.array_equal(points[:, 0], np.arange(24, 100_000, 25))
    assert np.array_equal(points[:, 1], points[:, 0] - 12)
    few = np.column_stack((np.arange(4000), np.arange(4000.0)))
    assert np.array_equal(thin(few), few) and thin(few[:0]).shape == (0, 2)


def test_points_that_are_not_finite_are_not_drawn():
    points = [(0, math.nan), (1, 2.0), (2, math.inf), (3, 4.0)]
    assert finite(points).tolist() == [[1, 2], [3, 4]] and len(finite([])) == 0


def test_a_resumed_log_has_the_values_of_one_that_was_never_stopped(tmp_path):
    """In memory, where the curve is drawn from, as in the file."""
    write_run(tmp_path, 300)
    log = Log(tmp_path, 300)
    log.write(300, train=3.0)
    assert log.streams == read_log(tmp_path) and len(log.streams["train"]) == 301


def test_nothing_is_dropped_before_its_successor_is_written(tmp_path):
    """A run that resumes at step 4, where it had validated, and maybe does not validate again."""
    lines = ["3 train 3", "4 val 3.5", "4 hella 0.25", "4 eval_s 1", "4 save_s 2", "4 train 9"]
    text = "".join(line + "\n" for line in [*lines, "5 train 9"])
    for values, left in (
        ({}, [*lines, "5 train 9"]),  # it never got so far
        ({"val": 3.25, "eval_s": 2}, ["3 train 3", "4 hella 0.25", "4 save_s 2", "4 val 3.25"]),
        ({"train": 8.0}, [*lines[:5], "4 train 8"]),
    ):
        (tmp_path / "log.txt").write_text(text)
        log = Log(tmp_path, 4)
        if values:
            log.write(4, **values)
        found = (tmp_path / "log.txt").read_text().splitlines()
        assert [line for line in found if line != "4 eval_s 2"] == left


def test_lines_that_are_torn_or_edited_are_skipped(tmp_path, capsys):
    (tmp_path / "log.txt").write_text(
        "0 val 5.5\n1 val 5,4\n2 val 5.\0\n3 val nan\n4 val -inf\n5 lr 6e-05\n6 val 5"
    )
    assert metrics.main([str(tmp_path)]) == 0
    assert [step for step, _ in read_log(tmp_path)["val"]] == [0, 3, 4] and read_log(tmp_path)[
        "lr"
    ] == [(5, 6e-5)]
    (tmp_path / "run.json").write_text("{")
    assert (
        metrics.main([str(tmp_path)]) == 2 and "run.json can't be read" in capsys.readouterr().err
    )
    assert (
        metrics.main([str(tmp_path), "--follow"]) == 2
        and "--tracker: give one" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"train": 1},
        {"train": 2, "hella": False},
        {"val": False, "hella": False},
        {"dataset": None},
    ],
)
def test_curves_of_all_kinds_of_runs(case, tmp_path):
    from matplotlib.image import imread

    write_run(tmp_path, **{"train": 300} | case)
    image = imread(draw_curve(tmp_path))
    assert image.shape[0] > 400 and image[..., :3].std() > 0.05


def test_a_curve_leaves_out_what_is_not_finite(tmp_path):
    nan, inf = float("nan"), float("inf")
    log = Log(tmp_path, 0)
    log.write(0, train=nan, val=nan, hella=nan)
    assert draw_curve(tmp_path).exists()  # empty axes
    log.write(1, train=5, val=inf)
    log.write(2, train=inf, val=5, hella=0.25)
    assert draw_curve(tmp_path).exists()


def test_reference_lines_stand_only_where_they_compare(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, axhline = [], Axes.axhline
    monkeypatch.setattr(
        Axes,
        "axhline",
        lambda self, y, **options: (lines.append(y), axhline(self, y, **options))[1],
    )
    write_run(tmp_path, 60)
    draw_curve(tmp_path)
    assert lines == [3.2924, 0.2955, 0.337]
    lines.clear()
    write_run(tmp_path, 60, dataset="roneneldan/TinyStories")
    draw_curve(tmp_path)
    assert lines == []


def test_command_line(tmp_path, capsys):
    write_run(tmp_path, 60)
    assert metrics.main([str(tmp_path)]) == 0
    assert "at step 59" in capsys.readouterr().out and (tmp_path / "curve.png").exists()
    assert metrics.main([str(tmp_path / "nothing")]) == 2
    assert "has no log.txt" in capsys.readouterr().err


def test_a_missing_tracker_is_one_message(tmp_path):
    write_run(tmp_path, 5)
    program = (
        "import sys; sys.modules['wandb'] = None\nsys.path.insert(0, sys.argv[1])\nimport metrics\n"
    )
    program += "sys.exit(metrics.main([sys.argv[2], '--tracker', 'wandb']))"
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(tmp_path)], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "the package wandb is not installed: pip install wandb" in done.stderr
    )


@pytest.mark.slow
def test_a_tracker_without_a_key_is_one_message(tmp_path):
    write_run(tmp_path, 2)
    done = script(
        "metrics.py", tmp_path, "--tracker=wandb", env={"HOME": str(tmp_path), "WANDB_API_KEY": ""}
    )
    assert (
        done.returncode == 2 and "error: --tracker wandb: UsageError: No API key" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_tensorboard_has_every_value(follow, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, 60)
    if follow:
        facts = read_run(tmp_path)
        write_facts(tmp_path, dataclasses.replace(facts, config={"max_steps": 60}))
    command = [
        sys.executable,
        str(ROOT / "metrics.py"),
        str(tmp_path),
        "--tracker=tensorboard",
        *follow,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("drawn") for line in process.stdout)
    if follow:  # the run has its last step still to come
        time.sleep(3)
        Log(tmp_path, 60).write(60, val=3.5)
    assert process.wait(timeout=60) == 0
    if not follow:  # a second replay takes the place of the first
        subprocess.run(command, check=True, capture_output=True)
    events = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}
    ).Reload()
    for stream, points in read_log(tmp_path).items():
        if stream in events.Tags()["scalars"]:
            got = [(event.step, event.value) for event in events.Scalars(stream)]
        else:
            got = [
                (event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(stream)
            ]
        assert [step for step, _ in got] == [step for step, _ in points], stream
        assert all(
            math.isclose(a, b, rel_tol=1e-5) for (_, a), (_, b) in zip(got, points, strict=True)
        )


@pytest.mark.slow
def test_trackio_has_every_step(tmp_path):
    write_run(tmp_path, 60)
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = script("metrics.py", tmp_path, "--tracker=trackio", env=environment)
    assert done.returncode == 0, done.stderr
    rows = sqlite3.connect(tmp_path / "trackio" / "GPT124M.db").execute(
        "select step, metrics from metrics order by step"
    )
    got = {}
    for step, values in rows:
        for stream, value in json.loads(values).items():
            got.setdefault(stream, []).append((step, value))
    assert got == dict(read_log(tmp_path))


@pytest.mark.slow
def test_wandb_offline_has_every_step(tmp_path):
    write_run(tmp_path, 60)
    done = script(
        "metrics.py",
        tmp_path,
        "--tracker=wandb",
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stem == f"run-{(tmp_path / 'wandb_id.txt').read_text().strip()}"
    got = {}
    for row in wandb_history(path.read_bytes()):
        for stream, value in row.items():
            got.setdefault(stream, []).append((row["_step"], value))
    for stream, points in read_log(tmp_path).items():
        assert got[stream] == points, stream


def wandb_history(data: bytes):
    """The rows of a wandb file: LevelDB's log format, 7 bytes of header, blocks of 32 KB, pieces of
    7 + length."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another piece in this block
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole in one piece, or its last
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
