"""README and docs/: their commands are words that the scripts' own parsers take, their Python runs
as printed, their links lead somewhere."""

import json
import math
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

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
POSITIONAL = {"sample.py": "prompt", "metrics.py": "log_dir", "inside.py": "prompt"}
PRESETS = {"train.py": train.PRESETS, "data_generator.py": data_generator.PRESETS}


def commands() -> list[tuple[str, list[str]]]:
    """(script, words) of each of our commands in a bash block or between backticks, on any page."""
    found = []
    for page in PAGES.values():
        blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        blocks += re.findall(r"`((?:python|torchrun) [^`]+)`", page)
        for line in "\n".join(blocks).splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                names = [word for word in words if word in CONFIGS]
                if names:
                    found.append((names[0], words[words.index(names[0]) + 1 :]))
    return found


def test_there_are_commands_for_every_script():
    assert {name for name, _ in commands()} == set(CONFIGS) and len(commands()) > 40


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
    demo = "python data_generator.py --preset demo && python train.py --preset demo"
    tests = "pip install -r tests/requirements.txt && pytest\n"
    assert "git clone https://github.com/YOU/GPT124M.git" in README and "hf auth login" in README
    assert f"pip install -r requirements.txt && {demo}\n" in README
    assert tests in README and tests in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Files and headings that a page names are there, and each page of docs/ leads back."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if not link.startswith("http"):
            assert (folder / link).exists(), link
    for file in re.findall(r"`((?:\w+/)?\w+\.py)`", PAGES[name]):
        assert any((ROOT / place / file).exists() for place in (".", "lib")), file
    if name != "README.md":
        assert "(../README.md)" in PAGES[name] and f"(docs/{name})" in README


def test_the_picture_of_the_model_has_its_parts():
    (picture,) = re.findall(r"```mermaid\n(flowchart TB.*?)```", README, re.DOTALL)
    model = GPT(GPTConfig(8, 16, 1, 1, 4))
    parts = {name.split(".")[-2] for name, _ in model.named_parameters()} | {"lm_head"}
    assert all(re.search(rf"\b{part}\b", picture) for part in parts), parts
    assert f"Block, {GPTConfig.n_layer} times" in picture


def python_block(containing: str) -> str:
    text = "\n".join(PAGES.values())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


@pytest.fixture
def small_gpt2(request, tmp_path):
    """tmp_path with log/model_checkpoint.pt and GPT124M, a small model with GPT-2's tokenizer. Its
    parameter is the context."""
    block_size = getattr(request, "param", 1024)
    shape = GPTConfig(block_size, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
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
        # OpenAI's weights need a network
        words = ["log/model_checkpoint.pt" if word == "gpt2" else word for word in words]
        done = script(name, *words, *(fewer if name == "train.py" else []), cwd=small_gpt2)
        assert done.returncode == 0, done.stderr
    lines = (small_gpt2 / "shakespeare" / "log" / "log.txt").read_text().splitlines()
    losses = [float(line.split()[2]) for line in lines if " val " in line]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.02 and "ROMEO:" in done.stdout


def conversations_as_printed(folder: Path) -> None:
    """The two files of docs/finetune.md."""
    blocks = re.findall(r"```json\n(.*?)```", PAGES["finetune.md"], re.DOTALL)
    for name, block in zip(("conversations.jsonl", "preferences.jsonl"), blocks, strict=True):
        (folder / name).write_text(block)


# The first four have no token of an answer within the context, and are left out. Of the last two
# one answer is only the end of its turn, and one is cut.
ODD_CONVERSATIONS = [
    [],
    [{"role": "user", "content": "Nobody answers this."}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "Late."}],
    [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}],
    [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "two " * 200},
    ],
]


def finetune(folder: Path, block: str) -> tuple[list[float], list[float]]:
    """Run docs/finetune.md's block in a folder with GPT124M. Returns the losses of SFT and DPO."""
    block += """
import json
rows = [trainer.state.log_history for trainer in (sft, dpo)]
losses = [[float(row["loss"]) for row in one if "loss" in row] for one in rows]
json.dump([losses, len(conversations)], open("losses.json", "w"))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("small_gpt2", [128], indirect=True)
def test_sft_and_dpo_as_printed(small_gpt2):
    """The loss is finite and falls, with conversations that have nothing to learn among them; DPO
    begins at ln 2."""
    conversations_as_printed(small_gpt2)
    with open(small_gpt2 / "conversations.jsonl", "a") as file:
        for messages in ODD_CONVERSATIONS:
            file.write(json.dumps({"messages": messages}) + "\n")
    (sft, dpo), kept = finetune(small_gpt2, python_block("SFTTrainer"))
    assert kept == 5 + 2
    assert all(map(math.isfinite, sft + dpo))
    assert sft[-1] < sft[0] < 12 and abs(dpo[0] - math.log(2)) < 1e-3 and dpo[-1] < dpo[0]
    assert (small_gpt2 / "GPT124M-dpo" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("small_gpt2", [128], indirect=True)
def test_it_learns_to_answer(small_gpt2):
    """By heart: a model of two layers from random weights, with a higher learning rate. The answers
    are sample.py's and transformers'."""
    from transformers import pipeline

    conversations_as_printed(small_gpt2)
    block = python_block("SFTTrainer").replace("learning_rate=1e-4", "learning_rate=1e-2")
    block = block.replace("num_train_epochs=20", "num_train_epochs=150")
    (sft, _), _ = finetune(small_gpt2, block)
    assert sft[-1] < 0.1
    folder = small_gpt2 / "GPT124M-sft"
    command = [sys.executable, "-c", python_block("generator(messages")]
    printed = subprocess.run(command, cwd=small_gpt2, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "Paris."
    generator = pipeline("text-generation", model=str(folder))
    for question, answer in (
        ("What is the capital of France?", "Paris."),
        ("What do you call a young dog?", "A puppy."),
    ):
        words = ["--chat", question, "--model", str(folder), "--num_samples=1", "--temperature=0"]
        done = script("sample.py", *words)
        assert done.stdout == f"{answer}\n", done.stderr
        messages = [{"role": "user", "content": question}]
        [theirs] = generator(messages, max_new_tokens=50, do_sample=False)
        assert theirs["generated_text"][-1]["content"] == answer
