"""The pass written out against the model's, transformers' and torch's own; what is printed of it;
and the numbers that the page gets. test_inside_page.py has what a browser shows of them."""

import base64
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import damage, script

import inside
from GPT_Modules import GPT, GPTConfig
from lib.pretrained import load_model
from lib.tokenizer import get_tokenizer

SHAPES = [
    GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=1, n_embd=8),
    GPTConfig(block_size=64, vocab_size=320, n_layer=3, n_head=4, n_embd=32),
    GPTConfig(block_size=96, vocab_size=257, n_layer=2, n_head=6, n_embd=48),
]


def random_model(config: GPTConfig, seed=0) -> GPT:
    """A model whose weights are all random, biases and LayerNorms too, and large enough that
    attention is far from even."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def random_tokens(config: GPTConfig, T: int, seed=0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (T,), generator=generator).tolist()


def run_pass(model: GPT, tokens: list[int]) -> SimpleNamespace:
    return inside.forward(inside.weights_of(model), tokens, model.config.n_head)


def save_model(model: GPT, path, tokenizer="bytes") -> str:
    """A file that --model takes."""
    content = {"model": model.state_dict(), "config": model.config, "tokenizer": tokenizer}
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return save_model(random_model(SHAPES[1]), tmp_path_factory.mktemp("inside") / "model.pt")


# ---- the numbers ----


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("T", [1, 2, 17, 64])
def test_logits_are_the_models(config, T):
    model, tokens = random_model(config, seed=T), random_tokens(config, T)
    with torch.no_grad():
        expected, _ = model(torch.tensor([tokens]))
    trace = run_pass(model, tokens)
    assert np.abs(trace.logits - expected[0].numpy()).max() < 1e-4
    for values in (trace, *trace.blocks):
        for name, value in vars(values).items():
            assert name in ("mask", "blocks") or value.dtype == np.float32, name


def test_logits_of_a_trained_model(trained):
    model, tokenizer = load_model(str(trained))
    tokens = tokenizer.encode_prompt("Return the ")
    with torch.no_grad():
        expected, _ = model(torch.tensor([tokens]))
    assert np.abs(run_pass(model, tokens).logits - expected[0].numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        {"n_layer": 2, "n_head": 2, "n_embd": 16},
        {"n_layer": 3, "n_head": 5, "n_embd": 40},
        {"n_layer": 1, "n_head": 12, "n_embd": 96},
    ],
)
def test_every_value_that_transformers_tells(shape, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=257, n_positions=32, attn_implementation="eager", **shape)
    theirs = GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    for name, content in get_tokenizer("bytes").files(32).items():
        (tmp_path / name).write_bytes(content)

    model, tokenizer = load_model(str(tmp_path))
    tokens = tokenizer.encode_prompt("The capital of France is")
    trace = run_pass(model, tokens)
    idx = torch.tensor([tokens])
    with torch.no_grad():
        expected = theirs(idx, labels=idx, output_attentions=True, output_hidden_states=True)

    def close(ours, tensor):
        assert np.abs(ours - tensor[0].numpy()).max() < 1e-4

    close(trace.logits, expected.logits)
    for block, attention in zip(trace.blocks, expected.attentions, strict=True):
        close(block.attention, attention)
    close(trace.x, expected.hidden_states[0])
    for block, x in zip(trace.blocks, expected.hidden_states[1:-1], strict=False):
        close(block.x_after_mlp, x)
    close(trace.ln_f, expected.hidden_states[-1])
    assert abs(np.nanmean(inside.surprise(trace.logits, tokens)) - expected.loss) < 1e-4


def test_what_a_pass_keeps():
    config = SHAPES[1]
    T, C, H = 11, config.n_embd, config.n_head
    trace = run_pass(random_model(config), random_tokens(config, T))
    x = trace.x
    assert len(trace.blocks) == config.n_layer
    for block in trace.blocks:
        assert block.attention.shape == (H, T, T)
        assert np.abs(block.attention.sum(axis=2) - 1).max() < 1e-6
        assert not np.triu(block.attention, k=1).any()
        assert block.q.shape == (H, T, C // H)
        assert np.abs(x + block.attn + block.mlp - block.x_after_mlp).max() < 1e-5
        x = block.x_after_mlp
    assert trace.mask.tolist() == [[column <= row for column in range(T)] for row in range(T)]
    assert trace.probabilities.shape == (T, config.vocab_size)
    assert {*vars(trace), *vars(trace.blocks[0])} - {"blocks"} == {*inside.MEANING}


def test_the_functions_are_torchs():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weights = {"n.weight": np.linspace(-1, 2, 32), "n.bias": np.linspace(3, 1, 32)}
    parameters = [torch.from_numpy(values).float() for values in weights.values()]
    for ours, theirs in (
        (inside.layer_norm(x.numpy(), weights, "n"), F.layer_norm(x, (32,), *parameters, 1e-5)),
        (inside.gelu(x.numpy()), F.gelu(x, approximate="tanh")),
        (inside.softmax(100 * x.numpy()), F.softmax(100 * x, dim=1)),
    ):
        assert np.abs(ours - theirs.numpy()).max() < 2e-6


def test_surprise_is_the_cross_entropy():
    logits = 30 * torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(GPTConfig(vocab_size=50), 9)
    ours = inside.surprise(logits.numpy(), tokens)
    theirs = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    assert math.isnan(ours[0]) and np.abs(ours[1:] - theirs.numpy()).max() < 1e-4


def test_the_lens_of_the_last_layer_is_the_output():
    config = SHAPES[1]
    model, tokens = random_model(config), random_tokens(config, 12)
    trace, weights = run_pass(model, tokens), inside.weights_of(model)
    likeliest, chances = inside.logit_lens(trace, weights, config.vocab_size, 2)
    assert likeliest.shape == chances.shape == (config.n_layer + 1, 10)
    probabilities = trace.probabilities[2:]
    assert likeliest[-1].tolist() == probabilities.argmax(axis=1).tolist()
    assert np.abs(chances[-1] - probabilities.max(axis=1)).max() < 1e-6
    with torch.no_grad():  # and that of the middle is the model's head on what the middle holds
        x = torch.from_numpy(trace.blocks[0].x_after_mlp[2:])
        expected = model.lm_head(model.transformer.ln_f(x)).softmax(dim=1)
    assert np.abs(chances[1] - expected.max(dim=1).values.numpy()).max() < 1e-5
    likeliest, _ = inside.logit_lens(trace, weights, 5, 0)
    assert likeliest.max() < 5  # rows that pad the table are never the likeliest


def test_kinds_of_heads():
    tokens = [7, 8, 9, 7, 8, 9, 7]
    T = len(tokens)
    looks_at = {
        "previous": lambda t: max(0, t - 1),
        "first": lambda t: 0,
        "itself": lambda t: t,
        "copy": lambda t: t - 2 if t >= 3 else 0,
    }
    for kind, place in looks_at.items():
        attention = np.zeros((2, T, T))
        for t in range(T):
            attention[0, t, place(t)] = 1
        places = inside.places(tokens).items()
        found = {other: inside.shares(attention, there) for other, there in places}
        assert found[kind].tolist() == [1, 0]
        assert max(share[0] for other, share in found.items() if other != kind) < 0.5
    for few in ([1], [1, 2]):
        assert not any(place.any() for place in inside.places(few).values())
    assert inside.shares(np.ones((2, 1, 1)), np.zeros((1, 1), bool)).tolist() == [0, 0]


def test_places_of_copies_by_brute_force():
    tokens = random_tokens(GPTConfig(vocab_size=4), 30)
    found = inside.places(tokens)["copy"]
    for t in range(30):
        after = [s + 1 for s in range(t - 1) if tokens[s] == tokens[t]] if t >= 2 else []
        assert np.flatnonzero(found[t]).tolist() == after


# ---- the words ----


def test_labels_show_what_can_not_be_seen():
    labels = {
        ("bytes", "a"): ["a"],
        ("bytes", " \n\t\x00"): ["·", "↵", "→", "\\x00"],
        ("bytes", "é"): ["#195", "#169"],
        ("gpt2", " the"): ["·the"],
        ("gpt2", "中文e\u0301"): ["中", "#23877", "#229", "e", "#136", "#223"],
        ("gpt2", "<|endoftext|>"): ["<|endoftext|>"],
    }
    for (name, text), expected in labels.items():
        tokenizer = get_tokenizer(name)
        shown = [inside.label(tokenizer, token) for token in tokenizer.encode_prompt(text)]
        assert shown == expected, text


def test_the_space_before_a_word_is_kept():
    """Some tokenizers leave it out at the beginning of a text."""
    import tokenizers

    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "<|endoftext|>": 3}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="s"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens(["<|endoftext|>"])
    tokenizer = get_tokenizer({"tokenizer.json": library.to_str()})
    assert library.decode([0]) == "the"
    assert [inside.label(tokenizer, id) for id in range(4)] == [
        "·the",
        "·cat",
        "s",
        "<|endoftext|>",
    ]
    assert inside.label(tokenizer, 9) == "#9"  # an id without a token, as the padding of wte has


def test_characters_that_would_spoil_a_line():
    shown = {"\u0301": "U+0301", "\u202e": "U+202E", "\x7f": "\\x7f", "é": "é", "中": "中"}
    assert {character: inside.visible(character) for character in shown} == shown


def test_what_is_printed(model_file, tmp_path, capsys):
    out = tmp_path / "x.html"
    assert inside.main(["ab\nab", "--model", model_file, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "5 tokens, each with its id:\n\n  a 97  b 98  ↵ 10  a 97  b 98" in text
    assert "  h.0.attention   (4, 5, 5)        shares: each row sums to 1\n" in text
    assert "h.1." not in text and "the same in 2 more blocks" in text
    assert "  logits          (5, 320) " in text and f"saved {out}" in text

    model, tokenizer = load_model(model_file)
    tokens = tokenizer.encode_prompt("ab\nab")
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0][0]
    chances, best = logits[-1].softmax(dim=0)[:257].topk(5)
    names = [inside.label(tokenizer, token) for token in best.tolist()]
    lines = [f"  {name:14} {p:7.2%}" for name, p in zip(names, chances, strict=True)]
    assert "\n".join(lines) in "\n".join(line.rstrip(" #") for line in text.splitlines())
    nats = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    for name, value in zip("b↵ab", nats, strict=True):
        assert f"  {name:14} {value:7.2f}  " in text
    assert f"  {'mean':14} {nats.mean():7.2f}\n" in text


def test_prompts_that_are_short_or_long(model_file, tmp_path, capsys):
    words = ["--model", model_file, "--out", str(tmp_path / "x.html")]
    assert inside.main(words) == 0
    text = capsys.readouterr().out
    assert "1 token, each with its id:\n\n  <|endoftext|> 256" in text and "mean" not in text
    assert inside.main(["a" + "b" * 64, *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "the prompt has 65 tokens, and the model's context is 64: only the last 64 are looked at\n"
    )
    assert "\n64 tokens, each with its id:\n\n  b 98  b 98" in text and "a 97" not in text


def test_bad_input(model_file, tmp_path, capsys):
    out = tmp_path / "x.html"
    folder = tmp_path / "folder.html"
    folder.mkdir()
    for words, message in (
        (["a", f"--out={tmp_path}/x.png"], "its name must end in .html"),
        (["a", f"--out={folder}"], f"--out {folder} is a directory"),
        (["a", f"--out={tmp_path}/none/x.html"], f"there is no directory {tmp_path}/none"),
        (["a", f"--model={tmp_path}/none.pt"], "there is no checkpoint or folder"),
        (["a", "--layer=1"], "unknown flag --layer"),
        (["a", "--history"], "--history: there are no checkpoints in"),
    ):
        assert inside.main(["--model", model_file, "--out", str(out), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_weights_that_are_not_finite(tmp_path, capsys):
    model = random_model(SHAPES[0])
    model.transformer.wpe.weight.data[0, 0] = math.nan
    words = ["--model", save_model(model, tmp_path / "m.pt"), "--out", str(tmp_path / "x.html")]
    assert inside.main(["a", *words]) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


# ---- the page ----


def page_data(path) -> dict:
    """The JSON in a page."""
    content = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', content)[1])


def maps_of(data: dict, number: int) -> np.ndarray:
    """(L, H, S, S): a pass's attention as its bytes say, 0 for what is ahead."""
    L, H, S = data["n_layer"], data["n_head"], len(data["tokens"])
    packed = np.frombuffer(base64.b64decode(data["passes"][number]["attention"]), np.uint8)
    maps = np.zeros((L, H, S, S))
    rows, columns = np.tril_indices(S)
    maps[:, :, rows, columns] = packed.reshape(L, H, -1) / 255
    return maps


def assert_page_has_the_pass(data: dict, number: int, model: GPT, tokenizer, tokens: list[int]):
    """Every number of a pass on the page is that of a new pass; the last 64 tokens are there."""
    trace, weights = run_pass(model, tokens), inside.weights_of(model)
    shown = data["passes"][number]
    first = max(0, len(tokens) - 64)
    assert data["tokens"] == tokens[first:]

    nats = inside.surprise(trace.logits, tokens)
    known = slice(1 if first == 0 else 0, None)
    assert np.allclose(shown["surprise"][known], nats[first:][known], atol=1e-6)
    assert first or shown["surprise"][0] is None
    assert (shown["mean"] is None) == (len(tokens) == 1)
    assert len(tokens) == 1 or math.isclose(shown["mean"], np.nanmean(nats), rel_tol=1e-6)

    p = trace.probabilities[first:, : tokenizer.n_vocab]
    assert np.allclose(shown["chances"], -np.sort(-p, axis=1)[:, :5], atol=1e-6)
    for t, (ids, chances) in enumerate(zip(shown["likeliest"], shown["chances"], strict=True)):
        assert np.allclose(p[t, ids], chances, atol=1e-6) and len({*ids}) == 5
    for t, rank in enumerate(shown["rank"]):
        assert rank == 1 + (p[t] > p[t, data["tokens"][t + 1]]).sum()

    attention = np.array([block.attention[:, first:, first:] for block in trace.blocks])
    assert np.abs(maps_of(data, number) - attention).max() <= 0.5 / 255 + 1e-6
    lens_tokens, chances = inside.logit_lens(trace, weights, tokenizer.n_vocab, first)
    assert shown["lens"] == lens_tokens.T.tolist()
    assert np.allclose(shown["lens_chances"], chances.T, atol=1e-6)
    lengths = [
        [np.median(np.linalg.norm(x, axis=1)) for x in (b.attn, b.mlp, b.x_after_mlp)]
        for b in trace.blocks
    ]
    assert np.allclose(shown["lengths"], lengths, rtol=1e-5)
    ids = {*data["tokens"], *np.ravel(shown["likeliest"]), *np.ravel(shown["lens"])}
    for id in map(int, ids):
        assert data["labels"][str(id)] == inside.label(tokenizer, id)


@pytest.mark.parametrize("prompt", ["", "a", "Return the string", "b" + "a" * 63])
def test_the_page_has_the_numbers_of_the_pass(prompt, model_file, tmp_path, capsys):
    out = tmp_path / "x.html"
    assert inside.main([prompt, "--model", model_file, "--out", str(out)]) == 0
    data = page_data(out)
    model, tokenizer = load_model(model_file)
    assert data["prompt"] == prompt and data["model"] == model_file
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in data["about"]
    tokens = tokenizer.encode_prompt(prompt) or [tokenizer.eot_token]
    assert_page_has_the_pass(data, 0, model, tokenizer, tokens)


def test_the_last_64_tokens_are_shown(tmp_path, capsys):
    config = GPTConfig(block_size=80, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
    model, out = random_model(config), tmp_path / "x.html"
    words = ["--model", save_model(model, tmp_path / "m.pt"), "--out", str(out)]
    for length in (64, 65, 90):  # 90 is longer than the context too
        prompt = "".join(chr(97 + n % 26) for n in range(length))
        assert inside.main([prompt, *words]) == 0
        data, tokenizer = page_data(out), get_tokenizer("bytes")
        assert_page_has_the_pass(data, 0, model, tokenizer, tokenizer.encode(prompt)[-80:])
        cut = f"a prompt of {length} tokens, of which this page shows the last 64"
        assert data["about"].endswith(cut) == (length > 64)


def test_the_page_says_that_a_context_cuts_the_prompt(tmp_path, capsys):
    config = GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=1, n_embd=8)
    model, out = random_model(config), tmp_path / "x.html"
    words = ["--model", save_model(model, tmp_path / "m.pt"), "--out", str(out)]
    assert inside.main(["ab" * 10, *words]) == 0
    data = page_data(out)
    assert data["about"].endswith("a prompt of 20 tokens, of which this page shows the last 16")
    assert_page_has_the_pass(data, 0, model, get_tokenizer("bytes"), [97, 98] * 8)


def test_heads_with_more_than_half_in_one_place():
    tokens = [7, 8, 9, 7, 8, 9, 7]
    T = len(tokens)
    attention = np.full((3, T, T), 1 / T)
    attention[1] = np.eye(T, k=-1)  # the token before
    attention[2] = 0.4 * np.eye(T, k=-1) + 0.6 * np.eye(T)  # itself, more than the one before
    trace = SimpleNamespace(blocks=[SimpleNamespace(attention=attention)] * 2)
    kinds = inside.head_kinds(trace, tokens)
    assert {head: kind for head, (kind, _) in kinds.items()} == {
        (layer, head): kind for layer in (0, 1) for head, kind in ((1, "previous"), (2, "itself"))
    }
    assert kinds[0, 1][1] == 1 and math.isclose(kinds[1, 2][1], 0.6)


def test_a_page_of_gpt2s_size():
    """144 heads and 40 tokens are below 2 MB; with 64 tokens too."""
    rng = np.random.default_rng(0)
    trace = SimpleNamespace(x=rng.normal(size=(64, 24)), blocks=[])
    trace.logits = rng.normal(size=(64, 50257))
    trace.probabilities = inside.softmax(trace.logits)
    for _ in range(12):
        x = rng.normal(size=(64, 24))
        attention = inside.softmax(np.where(np.tri(64), rng.normal(size=(12, 64, 64)), -np.inf))
        block = SimpleNamespace(attn=x, mlp=x, x_after_mlp=x, attention=attention)
        trace.blocks.append(block)
    weights = {"wte.weight": rng.normal(size=(50257, 24))}
    weights |= {"ln_f.weight": np.ones(24), "ln_f.bias": np.zeros(24)}
    tokens = rng.integers(50257, size=64).tolist()
    summary = inside.summarize(trace, weights, tokens, 64, get_tokenizer("gpt2"), None)
    facts = {"model": "gpt2", "prompt": "x", "about": "", "n_vocab": 50257}
    assert len(inside.page([summary], [], facts).encode()) < 1_000_000


def test_nothing_of_the_page_is_loaded_from_elsewhere():
    template = inside.TEMPLATE.read_text(encoding="utf-8")
    assert template.count("__DATA__") == 1
    assert max(map(len, template.splitlines())) <= 100
    assert not re.search(r"https?:|//\w|@import|url\(|src=|fetch|innerHTML|eval\(", template)
    assert re.findall(r'href="(.*?)"', template) == ["data:,"]


def test_a_prompt_that_looks_like_a_page(model_file, tmp_path, capsys):
    out = tmp_path / "x.html"
    for prompt in ("</script><script>alert(1)</script>", "<!-- __DATA__ \\u003c \u2028 \udcff 🙂"):
        assert inside.main([prompt, "--model", model_file, "--out", str(out)]) == 0
        assert page_data(out)["prompt"] == prompt
        content = out.read_text(encoding="utf-8")
        assert content.count("<script") == content.count("</script>") == 2
        assert content.count("<!--") == 1


# ---- the history of a run ----


@pytest.fixture
def history(tmp_path):
    """A log directory with three checkpoints, and the models by their steps."""
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    models = {step: random_model(SHAPES[1], seed=step) for step in (250, 500, 12_000)}
    for step, model in models.items():
        save_model(model, log_dir / f"model_{step:05d}.pt")
    (log_dir / "model_checkpoint.pt").symlink_to("model_12000.pt")
    return log_dir, models


def test_every_checkpoint_of_a_run(history, tmp_path, capsys):
    (log_dir, models), out = history, tmp_path / "x.html"
    words = ["Return the", "--model", str(log_dir), "--out", str(out)]
    assert inside.main([*words, "--history"]) == 0
    printed, data, tokenizer = capsys.readouterr().out, page_data(out), get_tokenizer("bytes")
    assert [shown["step"] for shown in data["passes"]] == [250, 500, 12_000]
    tokens = tokenizer.encode("Return the")
    for number, (step, model) in enumerate(models.items()):
        assert_page_has_the_pass(data, number, model, tokenizer, tokens)
        mean = np.nanmean(inside.surprise(run_pass(model, tokens).logits, tokens))
        assert f"  step {step:<9,} {mean:7.2f}  " in printed
    assert "3 checkpoints, and the prompt's mean surprise at each:" in printed
    assert data["skipped"] == []

    assert inside.main(words) == 0  # what is printed first is the last one, as without --history
    alone, data = capsys.readouterr().out, page_data(out)
    assert printed.startswith(alone.partition("\nsaved ")[0])
    assert [shown["step"] for shown in data["passes"]] == [None]
    assert_page_has_the_pass(data, 0, models[12_000], tokenizer, tokens)


def test_a_checkpoint_that_can_not_be_shown_is_named(history, tmp_path, capsys):
    (log_dir, models), out = history, tmp_path / "x.html"
    words = ["Return the", "--model", str(log_dir), "--out", str(out)]
    tokens, tokenizer = get_tokenizer("bytes").encode("Return the"), get_tokenizer("bytes")
    damage(log_dir / "model_00500.pt")
    broken = random_model(SHAPES[1])
    broken.transformer.wpe.weight.data[0, 0] = math.nan
    save_model(broken, log_dir / "model_13000.pt")
    assert inside.main([*words, "--history"]) == 0
    printed, data = capsys.readouterr().out, page_data(out)
    assert [shown["step"] for shown in data["passes"]] == [250, 12_000]
    assert_page_has_the_pass(data, 0, models[250], tokenizer, tokens)
    assert_page_has_the_pass(data, 1, models[12_000], tokenizer, tokens)
    damaged, not_finite = data["skipped"]
    assert f"{log_dir}/model_00500.pt is damaged" in damaged
    assert f"{log_dir}/model_13000.pt: weight transformer.wpe.weight has numbers" in not_finite
    for reason in data["skipped"]:
        assert f"  skipped: {reason}\n" in printed

    # what is printed of the pass is of the last good one
    shutil.move(log_dir / "model_13000.pt", tmp_path / "elsewhere.pt")
    assert inside.main(words) == 0
    assert printed.startswith(capsys.readouterr().out.partition("\nsaved ")[0])

    out.unlink()
    for step in (250, 12_000):
        damage(log_dir / f"model_{step:05d}.pt")
    assert inside.main([*words, "--history"]) == 2
    errors = capsys.readouterr().err
    assert f"no checkpoint in {log_dir} is good" in errors and errors.count("is damaged") == 3
    assert not out.exists()


def test_the_history_of_one_token(history, tmp_path, capsys):
    (log_dir, _), out = history, tmp_path / "x.html"
    assert inside.main(["x", "--model", str(log_dir), "--out", str(out), "--history"]) == 0
    assert "  step 12,000\n" in capsys.readouterr().out
    assert [shown["mean"] for shown in page_data(out)["passes"]] == [None] * 3


def test_as_a_command(trained, tmp_path):
    """From another directory, with a run that train.py has made."""
    done = script(
        "inside.py", "def f(x):\n", "--model", trained, "--history", "--out=a.html", cwd=tmp_path
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    steps = [shown["step"] for shown in page_data(tmp_path / "a.html")["passes"]]
    assert steps == sorted(int(p.stem[6:]) for p in trained.glob("model_0*.pt"))
