"""A GPT-2 of another language, from the texts to the published model: docs/data.md, as printed."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_models import small_gpt2
from test_tokenizer import (
    KINDS,
    NAMES,
    NAMES_ARE_WORDS,
    WORDS,
    byte_level_bpe,
    random_texts,
    save,
)
from tokenizers import Tokenizer as Library
from tokenizers import processors

import export
import sample
from lib.checkpoint import load_checkpoint
from lib.log import read_log
from lib.pretrained import load_model
from lib.shards import read_manifest
from lib.tokenizer import get_tokenizer

PAGE = (ROOT / "docs" / "data.md").read_text()
SMALL = {
    "data_generator.py": ["--shard_size=8000"],
    "train.py": [
        "--n_layer=2", "--n_head=2", "--n_embd=64", "--seq_len=32", "--batch_size=8",
        "--total_batch_size=512", "--max_steps=60", "--warmup_steps=5", "--max_lr=3e-3",
        "--val_every=20", "--val_tokens=4096", "--save_every=10", "--sample_every=0",
        "--device=cpu", "--dtype=float32",
    ],
    "sample.py": ["--num_samples=1", "--max_new_tokens=40"],
}  # fmt: skip

NOUNS = "hundo kato ĉevalo arbo ŝipo maljunulo vilaĝo".split()
NOUNS += "ĝardeno floro monto rivero reĝo infano".split()
ADJECTIVES = "granda malgranda bela malnova ruĝa verda saĝa ĝoja malriĉa forta".split()
VERBS = "vid ser am aŭd manĝ port aĉet vend ĵet konstru".split()
PLACES = "apud sub super antaŭ ĉe malantaŭ".split()


def esperanto(dice: random.Random, sentences: int) -> str:
    """Sentences with Esperanto's endings: nouns -o, plural -j, object -n, verbs -as -is -os."""

    def noun_phrase(case: str) -> str:
        ending = dice.choice(["", "j"]) + case
        adjective = dice.choice([dice.choice(ADJECTIVES) + ending + " ", ""])
        return f"la {adjective}{dice.choice(NOUNS)}{ending}"

    text = []
    for _ in range(sentences):
        verb = dice.choice(VERBS) + dice.choice(["as", "is", "os"])
        words = f"{noun_phrase('')} {verb} {noun_phrase('n')}"
        if dice.random() < 0.5:
            words += f" {dice.choice(PLACES)} {noun_phrase('')}"
        text.append(words[0].upper() + words[1:] + dice.choice([".", ".", "!", "?"]))
    return " ".join(text)


def commands() -> dict[str, list[str]]:
    """{script: its words} of the six commands of the page, the last one of a script."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    [block] = [block for block in blocks if "make_tokenizer" in block]
    lines = [shlex.split(line) for line in block.splitlines()]
    assert len(lines) == 6
    return {words[1]: words[2:] for words in lines if "--push_to_hub" not in words}


def python_block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    [block] = [block for block in blocks if containing in block]
    return block


def start(folder: Path, script: str, *more) -> subprocess.Popen:
    """A command of the page, in the folder, with the changes that make it small."""
    words = [*commands()[script], *SMALL.get(script, []), *more]
    path = folder / script if script == "make_tokenizer.py" else ROOT / script
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(path), *words], cwd=folder, **pipes)


def run(folder: Path, script: str, *more) -> str:
    process = start(folder, script, *more)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("kind", ["Unigram", "added tokens"])
def test_a_killed_generator_goes_on_to_the_same_tokens(kind, tmp_path):
    """The tokens on the disk are those of the package tokenizers, in the order of the documents."""
    make, end, end_name = KINDS[kind]
    save(tmp_path / "own", make(), end)
    # in a text of the others, the library takes the name of a special token for that token
    words = WORDS if kind in NAMES_ARE_WORDS else [*WORDS, *NAMES]
    texts = [text * 20 for text in random_texts(3000, words, seed=5)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "docs.jsonl").write_text("".join(lines))
    command = [sys.executable, str(ROOT / "data_generator.py"), "--dataset=docs.jsonl"]
    command += ["--tokenizer=own", "--data_dir=data", "--shard_size=50000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("data/*.npy"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not read_manifest(tmp_path / "data").complete
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    library = Library.from_file(str(tmp_path / "own" / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    stream = []
    for encoding in library.encode_batch(texts, add_special_tokens=False):
        stream += [library.token_to_id(end_name), *encoding.ids]
    shards = sorted(tmp_path.glob("data/*.npy"), key=lambda path: path.stem[-6:])
    assert np.concatenate([*map(np.load, shards)]).tolist() == stream
    manifest = read_manifest(tmp_path / "data")
    tokenizer = get_tokenizer(tmp_path / "data")  # in the data directory, whole
    assert tokenizer.identity == f"sha256:{manifest.tokenizer_sha256}"
    assert tokenizer.eot_token == library.token_to_id(end_name)


def test_a_template_is_left_out_of_training_and_of_what_is_published(tmp_path, capsys):
    """transformers' pipeline and sample.py continue a prompt with the same text."""
    from transformers import pipeline

    library = byte_level_bpe(special=["<s>", "</s>"])
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    library.post_processor = processors.TemplateProcessing(**template)
    small_gpt2().save_pretrained(save(tmp_path / "model", library, "</s>"))
    assert export.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    words = ["--num_samples=1", "--max_new_tokens=12", "--temperature=0"]
    generator = pipeline("text-generation", model=str(tmp_path / "out"))
    for prompt in ("import numpy", "def main(", "The"):
        capsys.readouterr()
        assert sample.main([prompt, "--model", str(tmp_path / "model"), *words]) == 0
        [answer] = generator(prompt, max_new_tokens=12, do_sample=False)
        assert capsys.readouterr().out == answer["generated_text"] + "\n"


@pytest.mark.slow
def test_a_gpt2_of_another_language(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dice = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(esperanto(dice, 500))
    assert sum(path.stat().st_size for path in tmp_path.glob("texts/*")) > 300_000

    program = python_block("BpeTrainer").replace("16000", "500")
    assert len([line for line in program.splitlines() if " = " in line or "." in line]) <= 12
    (tmp_path / "make_tokenizer.py").write_text(program)
    run(tmp_path, "make_tokenizer.py")
    run(tmp_path, "data_generator.py")

    # killed in the middle, the same command ends as the run that nobody killed
    process = start(tmp_path, "train.py")
    log_dir = tmp_path / "esperanto" / "log"
    while not (log_dir / "model_00030.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run(tmp_path, "train.py")
    run(tmp_path, "train.py", "--log_dir=unkilled")
    last = load_checkpoint(log_dir / "model_00060.pt")
    unkilled = load_checkpoint(tmp_path / "unkilled" / "model_00060.pt")
    for name, weight in last["model"].items():
        assert torch.equal(weight, unkilled["model"][name]), name
    assert read_log(log_dir)["val"] == read_log(tmp_path / "unkilled")["val"]
    (_, first_loss), *_, (_, loss) = read_log(log_dir)["val"]
    assert loss < first_loss - 2

    # the checkpoint has the tokenizer whole
    own = (tmp_path / "esperanto" / "tokenizer.json").read_bytes()
    (tmp_path / "esperanto" / "tokenizer.json").unlink()
    (tmp_path / "esperanto" / "data").rename(tmp_path / "elsewhere")
    text = run(tmp_path, "sample.py")
    assert text.startswith("La malnova") and "\ufffd" not in text
    run(tmp_path, "export.py")

    folder = tmp_path / "GPT-esperanto"
    assert (folder / "tokenizer.json").read_bytes() == own
    theirs = AutoTokenizer.from_pretrained(folder)
    twin = AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load_model(str(log_dir))
    assert tokenizer.identity == get_tokenizer(folder).identity
    assert theirs.eos_token_id == tokenizer.eot_token == twin.config.eos_token_id
    for _ in range(200):
        text = esperanto(dice, 5)
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        idx = torch.tensor([ids[:32]])
        with torch.no_grad():
            ours = model(idx)[0][..., : tokenizer.n_vocab]
            assert (twin(idx).logits - ours).abs().max() < 1e-5

    # llama.cpp's converter, by the lines of the page
    program = python_block("convert_hf_to_gguf")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # transformers reads no context length from such a file, and takes 1,024
    options = {"gguf_file": "esperanto.gguf", "config": twin.config}
    back = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert (back(idx).logits - twin(idx).logits).abs().max() < 1e-5
    plain = python_block("convert_hf_to_gguf").replace("TextModel.get", "TextModel.not_get")
    done = subprocess.run([sys.executable, "-c", plain], cwd=tmp_path, capture_output=True)
    assert b"BPE pre-tokenizer was not recognized" in done.stderr
