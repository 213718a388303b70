"""Text from a model: the same seed, the same text; as it is generated; from words, a file or
standard input."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script
from test_tokenizer import KINDS, save

import sample
from GPT_Modules import GPT, GPTConfig
from lib.tokenizer import get_tokenizer
from sample import SampleConfig, Sampling, stream_text

SHAPE = GPTConfig(block_size=32, vocab_size=320, n_layer=1, n_head=2, n_embd=16)


def test_pieces_are_the_text_of_generate():
    torch.manual_seed(0)
    model, tokenizer = GPT(SHAPE).eval(), get_tokenizer("bytes")
    with torch.no_grad():  # no end of the document
        model.transformer.wte.weight[256] = -10 * model.transformer.wte.weight[:256].mean(0)
    pieces = list(stream_text(model, tokenizer, "héllo", Sampling(60, seed=3)))
    assert len(pieces) == 61
    generator = torch.Generator().manual_seed(3)
    idx = torch.tensor([tokenizer.encode("héllo")])
    tokens = model.generate(idx, 60, 1.0, 50, generator, 257)[0, idx.size(1) :].tolist()
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")


def test_a_document_that_ends_ends_the_text():
    model, tokenizer = GPT(SHAPE), get_tokenizer("bytes")

    def end_after_two(idx, *rest):
        yield from (torch.tensor([[token]]) for token in (104, 105, 256, 120))

    model.stream = end_after_two
    assert "".join(stream_text(model, tokenizer, "", Sampling(60))) == "hi"


def test_a_character_of_several_tokens_comes_out_whole():
    model, tokenizer = GPT(SHAPE), get_tokenizer("bytes")
    model.stream = lambda *words: (torch.tensor([[byte]]) for byte in "é中🙂".encode())
    pieces = list(stream_text(model, tokenizer, "", Sampling(60)))
    assert "".join(pieces) == "é中🙂" and "�" not in "".join(pieces)


@pytest.mark.parametrize("kind", ["Unigram", "byte fallback", "WordPiece", "GPT-2's pattern"])
def test_the_space_between_prompt_and_continuation(kind, tmp_path):
    """The whole is what decoding all ids gives."""
    make, end, _ = KINDS[kind]
    tokenizer = get_tokenizer(save(tmp_path, make(), end))
    prompt, rest = tokenizer.encode("import the"), tokenizer.encode(" file of tokens")
    model = GPT(SHAPE)
    model.stream = lambda idx, *more: (torch.tensor([[id]]) for id in rest)
    text = "import the" + "".join(stream_text(model, tokenizer, "import the", Sampling(60)))
    whole = tokenizer.library.decode(prompt + rest, skip_special_tokens=False)
    assert text == whole.lstrip() == "import the file of tokens"
    begun = "".join(stream_text(model, tokenizer, "", Sampling(60)))
    assert begun == tokenizer.library.decode(rest, skip_special_tokens=False)


def test_a_byte_order_mark_at_the_start_of_a_prompt_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    for text, prompt in (("\ufeffdef", "def"), ("def", "def"), ("\n\ufeff", "\n\ufeff")):
        path.write_text(text, encoding="utf-8")
        assert sample.read_prompt(SampleConfig(prompt_file=str(path))) == prompt
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert sample.read_prompt(SampleConfig(prompt="-")) == prompt


def test_prompts_from_everywhere_and_seeds(trained, tmp_path, capsys, monkeypatch):
    words = [
        "--model",
        str(trained / "model_checkpoint.pt"),
        "--max_new_tokens=20",
        "--num_samples=2",
    ]
    texts = []
    (tmp_path / "prompt.txt").write_text("def f")
    for source in (
        ["def f"],
        ["-"],
        ["--prompt_file", str(tmp_path / "prompt.txt")],
        ["def f", "--seed=7"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
        assert sample.main([*words, *source]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3] and texts[0].count("def f") == 2
    assert sample.main([*words]) == 0  # without a prompt a document begins


def test_a_terminal_that_is_not_utf_8_shows_what_it_can(trained):
    done = script(
        ROOT / "sample.py",
        "中",
        "--model",
        trained,
        "--num_samples=1",
        env={"PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr


def test_bad_input(trained, tmp_path, capsys):
    model = ["--model", str(trained / "model_checkpoint.pt")]
    (tmp_path / "latin").write_bytes(b"\xff")
    for words, message in (
        (["x", "--num_samples=0"], "--num_samples is 0: it must be at least 1"),
        (["x", "--temperature=-1"], "--temperature is -1.0"),
        (["x", "--temperature=nan"], "--temperature is nan"),
        (["x", "--temperature=inf"], "--temperature is inf"),
        (["x", "--prompt_file=y"], "give a prompt or --prompt_file, not both"),
        (["\udcff"], "the prompt on the command line can't be read as UTF-8 text"),
        (["--prompt_file=/nowhere"], "can't be read as UTF-8 text"),
        (["--prompt_file", str(tmp_path / "latin")], "can't be read as UTF-8 text"),
    ):
        assert sample.main([*words, *model]) == 2
        assert message in capsys.readouterr().err


def test_as_a_command(trained):
    done = script(
        "sample.py",
        "-",
        "--model",
        trained / "model_checkpoint.pt",
        "--num_samples=1",
        input="class ",
    )
    assert done.returncode == 0 and "class " in done.stdout and not done.stderr


def test_nobody_listens_any_more(trained):
    words = [
        sys.executable,
        str(ROOT / "sample.py"),
        "a",
        "--model",
        str(trained / "model_checkpoint.pt"),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does when it has enough
    assert (
        process.wait(timeout=60) == 1
        and process.stderr.read() == "stopped: nobody reads the output\n"
    )


def test_a_million_spaces_and_a_temperature_that_is_almost_nothing(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("a" + " " * 1_000_000 + "b")
    words = ["--prompt_file", str(tmp_path / "prompt.txt"), "--model", str(trained)]
    words += ["--num_samples=1", "--max_new_tokens=5"]
    texts = []
    for temperature in ("0", "1e-30", "5e-324"):
        assert sample.main([*words, "--temperature", temperature]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 1_000_002


def test_a_model_with_gpt2s_tokens_reads_a_million_spaces(tmp_path, capsys):
    shape = GPTConfig(block_size=32, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)
    state = {"model": GPT(shape).state_dict(), "config": shape, "step": 1, "tokenizer": "gpt2"}
    torch.save(state, tmp_path / "model.pt")
    prompt = " " * 1_100_000 + "b"
    words = ["--model", str(tmp_path / "model.pt"), "--num_samples=1", "--max_new_tokens=5"]
    assert sample.main([prompt, *words]) == 0
    assert capsys.readouterr().out.startswith(prompt)
