"""The README's commands are words that the scripts' own parsers take; its Python runs as
printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from test_cli import CONFIGS

import data_generator
import export
import train
from GPT_Modules import GPT, GPTConfig
from lib.cli import parse

README = (ROOT / "README.md").read_text()
POSITIONAL = {"sample.py": "prompt", "metrics.py": "log_dir"}
PRESETS = {"train.py": train.PRESETS, "data_generator.py": data_generator.PRESETS}


def commands() -> list[tuple[str, list[str]]]:
    """(script, words) of each of our commands in a bash block or between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(
        r"`((?:python|torchrun) [^`]+)`", README
    )
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    found = []
    for line in lines:
        words = shlex.split(line)
        names = [word for word in words if word in CONFIGS]
        if names:
            found.append((names[0], words[words.index(names[0]) + 1 :]))
    return found


def test_there_are_commands_for_every_script():
    assert {name for name, _ in commands()} == set(CONFIGS) and len(commands()) > 25


@pytest.mark.parametrize(
    "name, words",
    commands(),
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_commands_are_taken_by_the_parsers(name, words):
    config = parse(CONFIGS[name], words, "", PRESETS.get(name), POSITIONAL.get(name))
    if name == "train.py":
        train.check_config(config)


def test_the_clone_address_and_the_two_commands():
    for line in (
        "git clone https://github.com/YOU/GPT124M.git",
        "pip install -r requirements.txt && python data_generator.py --preset demo && python train.py --preset demo",
        "pip install -r tests/requirements.txt && pytest",
        "hf auth login",
    ):
        assert line in README
    assert "pip install -r tests/requirements.txt && pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_files_of_the_map_exist():
    for name in re.findall(r"`(\w+\.(?:py|png))`", README):
        assert (
            any((ROOT / place / name).exists() for place in (".", "lib")) or name == "curve.png"
        ), name


def test_the_picture_of_the_house_has_every_file():
    (house,) = re.findall(r"```mermaid\n(flowchart LR.*?)```", README, re.DOTALL)
    files = {
        str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")]
    }
    assert set(re.findall(r'"((?:lib/)?\w+\.py)"', house)) == files - {"lib/__init__.py"}


def test_the_picture_of_the_model_has_its_parts():
    (picture,) = re.findall(r"```mermaid\n(flowchart TB.*?)```", README, re.DOTALL)
    parts = {
        name.split(".")[-2] for name, _ in GPT(GPTConfig(8, 16, 1, 1, 4)).named_parameters()
    } | {"lm_head"}
    assert all(re.search(rf"\b{part}\b", picture) for part in parts), parts
    assert f"Block, {GPTConfig.n_layer} times" in picture


PRINTED_BY = {  # each message of Troubleshooting, and the test that has it printed
    "does not fit into memory": ("test_train", '"memory": (["--vocab_size'),
    "is not a multiple of --batch_size": ("test_train", "100 is not a multiple"),
    "there are no train shards in": ("test_train", "no train shards in nowhere"),
    "HellaSwag can't be fetched from the Hub": ("test_train", "HellaSwag can't be fetched"),
    "GPT-2's vocabulary is not on this machine": (
        "test_train",
        "GPT-2's vocabulary is not on this machine",
    ),
    "was begun with other settings": ("test_data_generator", "shard_size was 20000, is 30000"),
    "is of a run with other settings": ("test_train", "max_lr was 0.0006, is 0.001"),
    "is being written by process": ("test_files", "is being written by process"),
    "this file system has no locks": ("test_files", "has no locks: two jobs that write to"),
    "could not be saved": ("test_train", "model_00003.pt could not be saved"),
    "not finite, the update is skipped": ("test_train", '"4 skipped 1"'),
    "is damaged or not a checkpoint": ("test_checkpoint", "is damaged or not a checkpoint"),
}


def test_each_message_of_troubleshooting_is_printed_by_a_test():
    lines = re.findall(
        r'^- ((?:".*?",? ?)+): ', README.partition("## Troubleshooting")[2], re.MULTILINE
    )
    messages = re.findall(r'"(.*?)"', " ".join(lines))
    assert messages == list(PRINTED_BY)
    for name, text in PRINTED_BY.values():
        assert text in (ROOT / "tests" / f"{name}.py").read_text(), (name, text)


def python_block(containing: str) -> str:
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if containing in block
    ]
    return block


@pytest.fixture
def small_gpt2(tmp_path):
    """tmp_path with log/model_checkpoint.pt and GPT124M, a small model with GPT-2's tokenizer."""
    shape = GPTConfig(block_size=1024, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    (tmp_path / "log").mkdir()
    path = tmp_path / "log" / "model_checkpoint.pt"
    torch.save(
        {"model": GPT(shape).state_dict(), "config": shape, "step": 1, "tokenizer": "gpt2"}, path
    )
    assert export.main(["--model", str(path), "--out", str(tmp_path / "GPT124M")]) == 0
    return tmp_path


def test_the_weights_alone(small_gpt2):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", python_block("trained_model.pth")]
    subprocess.run(command, cwd=small_gpt2 / "log", env=environment, check=True)
    assert (small_gpt2 / "log" / "trained_model.pth").exists()


@pytest.mark.slow
def test_continued_pretraining_in_three_commands(small_gpt2):
    """With another text under the same name, Python's language reference, and fewer steps."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    (small_gpt2 / "tinyshakespeare.txt").write_text(text)
    three = [(name, words) for name, words in commands() if "shakespeare" in " ".join(words)]
    assert len(three) == 3
    fewer = ["--max_steps=12", "--warmup_steps=2", "--val_every=4", "--max_lr=3e-3"]
    for name, words in three:
        done = script(name, *words, *(fewer if name == "train.py" else []), cwd=small_gpt2)
        assert done.returncode == 0, done.stderr
    lines = (small_gpt2 / "shakespeare" / "log" / "log.txt").read_text().splitlines()
    losses = [float(line.split()[2]) for line in lines if " val " in line]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.02 and "ROMEO:" in done.stdout


@pytest.mark.slow
def test_sft_and_dpo_as_printed(small_gpt2):
    """One step and more of each: the loss is finite and falls; DPO begins at ln 2."""
    block = python_block("SFTTrainer")
    assert len([line for line in block.splitlines() if line]) <= 20
    block += "\nimport json\nlogs = [[l['loss'] for l in t.state.log_history if 'loss' in l] for t in (sft, dpo)]\n"
    block += "json.dump([[float(l) for l in log] for log in logs], open('losses.json', 'w'))\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=small_gpt2,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    sft, dpo = json.loads(Path(small_gpt2 / "losses.json").read_text())
    assert sft[-1] < sft[0] < 12 and abs(dpo[0] - 0.6931) < 1e-3 and dpo[-1] < dpo[0]
    assert (small_gpt2 / "GPT124M-dpo" / "model.safetensors").exists()
