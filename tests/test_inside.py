"""The pass written out against the model's, transformers' and torch's own; what is printed of it;
and that no text of the picture lies on another."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import script
from matplotlib.image import imread

import inside
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import load_model
from lib.tokenizer import get_tokenizer

# a newline, a tab, an emoji and Chinese of several tokens, a combining accent, mathematics, a long
# word, control codes: what is hard to write into a picture
HARD = (
    "a\n\tb 🙂 中文 e\u0301 $x_1^{ $\\alpha$ \x1b[31m "
    "pneumonoultramicroscopicsilicovolcanoconiosis \u202e\u200b a\n\tb"
)
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


def run_pass(model: GPT, tokens: list[int]) -> inside.Trace:
    return inside.forward(inside.weights_of(model), tokens, model.config.n_head)


def save_model(model: GPT, path, tokenizer="bytes") -> str:
    content = {"model": model.state_dict(), "config": model.config, "tokenizer": tokenizer}
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
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
    assert np.abs(trace["logits"] - expected[0].numpy()).max() < 1e-4
    assert {value.dtype for name, value in trace.values.items() if name != "mask"} == {
        np.dtype("float32")
    }


def test_logits_of_a_trained_model(trained):
    model, tokenizer = load_model(str(trained))
    tokens = tokenizer.encode_prompt("Return the ")
    with torch.no_grad():
        expected, _ = model(torch.tensor([tokens]))
    assert np.abs(run_pass(model, tokens)["logits"] - expected[0].numpy()).max() < 1e-4


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

    close(trace["logits"], expected.logits)
    for layer, attention in enumerate(expected.attentions):
        close(trace[f"h.{layer}.attention"], attention)
    close(trace["x"], expected.hidden_states[0])
    for layer, x in enumerate(expected.hidden_states[1:-1]):
        close(trace[f"h.{layer}.x + mlp"], x)
    close(trace["ln_f"], expected.hidden_states[-1])
    assert abs(np.nanmean(inside.surprise(trace["logits"], tokens)) - expected.loss) < 1e-4


def test_what_a_pass_keeps():
    config = SHAPES[1]
    T, C, H = 11, config.n_embd, config.n_head
    tokens = random_tokens(config, T)
    trace = run_pass(random_model(config), tokens)
    for layer in range(config.n_layer):
        attention = trace[f"h.{layer}.attention"]
        assert attention.shape == (H, T, T)
        assert np.abs(attention.sum(axis=2) - 1).max() < 1e-6
        assert not np.triu(attention, k=1).any()
        assert trace[f"h.{layer}.q"].shape == (H, T, C // H)
        added = trace[f"h.{layer}.attn"] + trace[f"h.{layer}.mlp"]
        before = trace["x" if layer == 0 else f"h.{layer - 1}.x + mlp"]
        assert np.abs(before + added - trace[f"h.{layer}.x + mlp"]).max() < 1e-5
    assert trace["mask"].tolist() == [[column <= row for column in range(T)] for row in range(T)]
    assert trace["probabilities"].shape == (T, config.vocab_size)
    assert list(trace.values) == list(trace.meanings)


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
    likeliest, chances = inside.logit_lens(trace, weights, config.n_layer, config.vocab_size, 2)
    assert likeliest.shape == chances.shape == (config.n_layer + 1, 10)
    probabilities = trace["probabilities"][2:]
    assert likeliest[-1].tolist() == probabilities.argmax(axis=1).tolist()
    assert np.abs(chances[-1] - probabilities.max(axis=1)).max() < 1e-6
    with torch.no_grad():  # and that of the middle is the model's head on what the middle holds
        x = torch.from_numpy(trace["h.0.x + mlp"][2:])
        expected = model.lm_head(model.transformer.ln_f(x)).softmax(dim=1)
    assert np.abs(chances[1] - expected.max(dim=1).values.numpy()).max() < 1e-5
    likeliest, _ = inside.logit_lens(trace, weights, config.n_layer, 5, 0)
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
    assert inside.drawable("é中") == "éU+4E2D"  # what matplotlib's own fonts lack


def test_what_is_printed(model_file, tmp_path, capsys):
    out = tmp_path / "x.png"
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
    words = ["--model", model_file, "--out", str(tmp_path / "x.png")]
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
    out = tmp_path / "x.png"
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for words, message in (
        (["a", "--layer=3", "--head=0"], "--layer is 3: this model has layers 0 to 2"),
        (["a", "--layer=0", "--head=4"], "--head is 4: this model has heads 0 to 3"),
        (["a", "--layer=0"], "--layer and --head go together"),
        (["a", "--head=0"], "--layer and --head go together"),
        (["a", "--layer=-1", "--head=0"], "--layer is -1: it must be at least 0"),
        (["a", f"--out={tmp_path}/x.pdf"], "its name must end in .png"),
        (["a", f"--out={folder}"], f"--out {folder} is a directory"),
        (["a", f"--out={tmp_path}/none/x.png"], f"there is no directory {tmp_path}/none"),
        (["a", f"--model={tmp_path}/none.pt"], "there is no checkpoint or folder"),
        (["a", "--heads=1"], "unknown flag --heads=1: did you mean --head?"),
    ):
        assert inside.main(["--model", model_file, "--out", str(out), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_weights_that_are_not_finite(tmp_path, capsys):
    model = random_model(SHAPES[0])
    model.transformer.wpe.weight.data[0, 0] = math.nan
    words = ["--model", save_model(model, tmp_path / "m.pt"), "--out", str(tmp_path / "x.png")]
    assert inside.main(["a", *words]) == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


# ---- the picture ----


WIDE = GPTConfig(block_size=256, vocab_size=50304, n_layer=12, n_head=12, n_embd=24)
DEEP = GPTConfig(block_size=256, vocab_size=320, n_layer=14, n_head=32, n_embd=32)
PICTURES = {
    "one token": (SHAPES[0], "bytes", ""),
    "bytes": (SHAPES[1], "bytes", HARD[:60]),
    "hard tokens": (WIDE, "gpt2", HARD),
    "long words": (WIDE, "gpt2", " antidisestablishmentarianism counterrevolutionaries" * 9),
    "many layers and heads": (DEEP, "bytes", HARD),
}


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_lies_on_another(name):
    config, tokenizer, prompt = PICTURES[name]
    model, tokenizer = random_model(config), get_tokenizer(tokenizer)
    tokens = tokenizer.encode_prompt(prompt)[: config.block_size] or [tokenizer.eot_token]
    look, _ = inside.look_into(model, tokenizer, tokens, "log/" * 40 + "$x_^{$.pt")
    pages = [inside.draw(look), inside.draw_head(look, 0, 0)]
    if name == "bytes":  # a frame of each kind, so that the whole legend is there
        kinds = {(0, head): (kind, 0.9) for head, kind in enumerate(inside.KINDS)}
        pages.append(inside.draw(replace(look, kinds=kinds)))
    for page in pages:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a glyph that the font lacks
            boxes, texts = text_boxes(page)
        left, bottom, right, top = boxes.T
        width, height = page.figure.canvas.get_width_height()
        assert width == 1600
        assert left.min() >= 0 and bottom.min() >= 0
        assert right.max() <= width and top.max() <= height
        over = (left[:, None] < right - 0.5) & (right[:, None] - 0.5 > left)
        over &= (bottom[:, None] < top - 0.5) & (top[:, None] - 0.5 > bottom)
        pairs = np.argwhere(np.triu(over, k=1))
        assert not len(pairs), [(texts[i], texts[j]) for i, j in pairs[:5]]


def text_boxes(page) -> tuple[np.ndarray, list[str]]:
    """(left, bottom, right, top) in pixels of the ink of each text of a page, and the texts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(page.figure).get_renderer()
    extents = [text.get_window_extent(renderer).extents for text in page.texts]
    return np.array(extents), [text.get_text() for text in page.texts]


def test_the_picture_shows_the_numbers(model_file, tmp_path):
    """Pixels of one head's map are darker where it looks more; long prompts end in the picture."""
    model, tokenizer = load_model(model_file)
    look, trace = inside.look_into(model, tokenizer, list(range(60)), "m")
    assert look.first == 20 and look.lens_tokens.shape == (4, 40)
    page = inside.draw_head(look, 2, 1)
    [picture] = page.images
    shown = trace["h.2.attention"][1, 20:, 20:]
    colors = picture.get_array()
    for row, column in ((0, 0), (39, 3), (20, 19)):
        assert np.allclose(colors[row, column], inside.shade("Blues", shown[row, column] ** 0.5))
    assert np.allclose(colors[0, 1, :3], 0.93)
    texts = [text.get_text() for text in page.texts]
    assert "the last 40 of the prompt's 60 tokens" in texts
    assert f"{100 * shown.max():.0f}" in texts


def test_as_a_command(trained, tmp_path):
    out = tmp_path / "a.png"
    done = script("inside.py", "def f(x):\n", "--model", trained, "--out", out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert imread(out).shape[1] == 1600
    done = script("inside.py", "def", "--model", trained, "--out", out, "--layer=1", "--head=0")
    assert done.returncode == 0 and not done.stderr, done.stderr
