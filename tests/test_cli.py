"""Dataclass -> flags and help; UserError -> one line and an exit code."""

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import ROOT, script

import data_generator
import export
import hellaswag
import inside
import metrics
import sample
import train
from lib import cli
from lib.cli import PositiveFloat, PositiveInt, UserError, command, parse

CONFIGS = {
    "train.py": train.TrainConfig, "data_generator.py": data_generator.DataConfig,
    "sample.py": sample.SampleConfig, "hellaswag.py": hellaswag.HellaSwagConfig,
    "export.py": export.ExportConfig, "metrics.py": metrics.MetricsConfig,
    "inside.py": inside.InsideConfig,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    # numbers
    some_steps: int = 5  # steps, 100% of them
    rate: float | None = None  # a rate
    # choices
    kind: Literal["a", "b"] = "a"  # which
    on: bool | None = None  # on or off
    flag: bool = False  # a switch
    place: str = "here"  # where


def test_words_become_fields():
    assert parse(Config, [], "") == Config()
    words = ["--some_steps=7", "--rate", "1e-3", "--kind=b", "--no-on", "--flag", "--place", "x y"]
    assert parse(Config, words, "") == Config(7, 1e-3, "b", False, True, "x y")
    assert parse(Config, ["--some-steps", "9"], "").some_steps == 9
    assert parse(Config, ["there", "--on"], "", positional="place") == Config(
        on=True, place="there"
    )
    assert parse(Config, ["--kind=b"], "", presets=None).kind == "b"
    assert parse(Config, ["--", "--a-text"], "", positional="place").place == "--a-text"


def test_presets_are_defaults():
    @dataclass(frozen=True)
    class WithPreset:
        preset: Literal["small", "large"] = "small"  # defaults
        size: int = 1  # size

    presets = {"small": {}, "large": {"size": 100}}
    assert parse(WithPreset, ["--preset=large"], "", presets).size == 100
    assert parse(WithPreset, ["--size=3", "--preset=large"], "", presets).size == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--some_step=1"], "unknown flag --some_step: did you mean --some_steps"),
        (["--xyz"], "unknown flag --xyz"),
        (["--kind=c"], "invalid choice: 'c'"),
        (["--some_steps=x"], "invalid int value"),
        (["--rate"], "expected one argument"),
        (["--fla"], "unknown flag --fla"),
    ],
)
def test_what_does_not_fit_is_a_user_error(words, message):
    with pytest.raises(UserError, match=message):
        parse(Config, words, "")


@dataclass(frozen=True)
class Bounds:
    steps: PositiveInt = 1  # a count
    rate: PositiveFloat | None = None  # a rate
    every: int = 0  # a number of steps, 0 for never
    share: float = 0.0  # a share


@pytest.mark.parametrize(
    "words, message",
    [
        ("--steps=0", "--steps is 0: it must be at least 1"),
        ("--rate=0", "--rate is 0.0: it must be a number above 0"),
        ("--rate=nan", "--rate is nan: it must be a number above 0"),
        ("--every=-1", "--every is -1: it must be at least 0"),
        ("--share=-0.1", "--share is -0.1: it must be a number of at least 0"),
        ("--share=inf", "--share is inf: it must be a number of at least 0"),
    ],
)
def test_a_bound_stands_beside_its_field(words, message):
    assert parse(Bounds, ["--steps=1", "--every=0"], "") == Bounds()
    with pytest.raises(UserError, match=message):
        parse(Bounds, [words], "")


def test_counts_agree_with_their_nouns():
    assert [cli.count(n, "document") for n in (0, 1, 2000)] == [
        "0 documents",
        "1 document",
        "2,000 documents",
    ]
    assert (
        cli.count(2, "micro-batch") == "2 micro-batches"
        and cli.count(1, "micro-batch") == "1 micro-batch"
    )


def test_help_is_read_from_the_comments(capsys):
    @command
    def main(argv=None):
        parse(Config, argv, "What it does.")

    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for piece in (
        "What it does.",
        "numbers:",
        "--some_steps N",
        "steps, 100% of them (default: 5)",
        "choices:",
        "which; a, b (default: a)",
    ):
        assert piece in printed


@pytest.mark.parametrize("name", CONFIGS)
def test_help_of_every_script(name):
    done = script(name, "--help")
    assert done.returncode == 0 and not done.stderr
    described = cli.field_comments(CONFIGS[name])
    for field in fields(CONFIGS[name]):
        assert described[field.name][1], field.name
        assert field.name in done.stdout.lower()
    examples = [
        line
        for line in done.stdout.splitlines()
        if line.strip().startswith(("python ", "torchrun ", "echo "))
    ]
    assert len(examples) >= 3


def test_errors_become_exit_codes(capsys, monkeypatch):
    @command
    def main(argv=None):
        raise argv

    assert main(UserError("wrong word")) == 2 and main(UserError("no luck", code=1)) == 1
    assert capsys.readouterr().err == "error: wrong word\nerror: no luck\n"
    assert main(KeyboardInterrupt()) == 130
    assert main(OSError(28, "No space left on device", "log/run.json")) == 1
    assert capsys.readouterr().err.endswith(
        "error: OSError: [Errno 28] No space left on device: 'log/run.json'\n"
    )
    with pytest.raises(ZeroDivisionError):  # what is not the user's is not hidden
        main(ZeroDivisionError())


@pytest.mark.parametrize(
    "ranks, waits",
    [
        ({"RANK": "3"}, False),  # not a launcher's, which sets WORLD_SIZE too
        ({"RANK": "3", "LOCAL_RANK": "3"}, False),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, False),  # the first of a machine
    ],
)
def test_other_ranks_let_the_first_one_speak(ranks, waits, capsys, monkeypatch):
    """If nobody has ended them after 10 s, the error was theirs alone, and they print it."""
    slept = []
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.time, "sleep", slept.append)

    @command
    def main(argv=None):
        raise argv

    assert main(UserError("wrong word")) == 2 and slept == ([10] if waits else [])
    assert capsys.readouterr().err == "error: wrong word\n"
    slept.clear()
    assert main(UserError("my GPU", alone=True)) == 2 and slept == []
    assert capsys.readouterr().err == "error: my GPU\n"


def test_nothing_happens_at_import():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import train, data_generator, hellaswag, export, sample, metrics, inside\n"
    )
    program += "import torch\nassert not torch.distributed.is_initialized()\n"
    program += (
        "bad = {'datasets', 'matplotlib', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
