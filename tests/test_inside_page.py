"""The page of inside.py in a real browser: what a click, a key and the slider show, compared with
what `forward` computes; prompts that are hard to show; widths and colours."""

import json
import math

import numpy as np
import pytest
import tokenizers
import torch
from browser import CHROMIUM, Browser
from conftest import damage
from test_inside import random_model, run_pass, save_model

import inside
from GPT_Modules import GPTConfig
from lib.tokenizer import get_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

PROMPT = "one two, one two, one"
BYTES = get_tokenizer("bytes")
SMALL = GPTConfig(block_size=128, vocab_size=320, n_layer=3, n_head=4, n_embd=32)
STEPS = (250, 500, 1_000, 12_000)
# what a page or a line could take for something else, and what is hard to show
HOSTILE = {
    "script": "</script><script>alert(1)</script><!--",
    "quotes": """'a' "b" `c` ${d} \\n \\u003c &lt;&amp; <b>e</b> </h1></main> __DATA__""",
    "emoji": "🙂 👩‍👩‍👧 e\u0301 \u200b",
    "Arabic": "abc مرحبا بالعالم def שלום 123 \u202e xyz",
    "CJK": "中文 日本語 한국어",
    "lines": "\n\n a\tb\r\n\x00\x1b[31m\u2028 c  \n",
    "lone byte": "a\udcff b",
    "one token": "x",
    "empty": "",
    "long": "antidisestablishmentarianism " * 30,
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """Nothing goes wrong on a page, and nothing is loaded, in any of these tests."""
    yield chromium
    assert not chromium.problems()


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    """A run's checkpoints, one of them damaged."""
    directory = tmp_path_factory.mktemp("log")
    for step in (*STEPS, 750):
        save_model(random_model(SMALL, seed=step), directory / f"model_{step:05d}.pt")
    damage(directory / "model_00750.pt")
    return directory


@pytest.fixture(scope="module")
def history(log_dir, tmp_path_factory):
    """The page of these checkpoints."""
    out = tmp_path_factory.mktemp("page") / "history.html"
    assert inside.main([PROMPT, "--model", str(log_dir), "--history", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def traces():
    """What `forward` computes for each of these checkpoints."""
    return [run_pass(random_model(SMALL, seed=step), BYTES.encode(PROMPT)) for step in STEPS]


def page_of(prompt: str, config: GPTConfig, tokenizer, directory):
    """The page of a random model."""
    model = save_model(random_model(config), directory / "model.pt", tokenizer)
    out = directory / "page.html"
    assert inside.main([prompt, "--model", model, "--out", str(out)]) == 0
    return out


def lens_of(trace, step: int):
    """The guesses after each layer of the model of a step, and their probabilities."""
    weights = inside.weights_of(random_model(SMALL, seed=step))
    return inside.logit_lens(trace, weights, BYTES.n_vocab, 0)


def texts(browser, selector: str) -> list[str]:
    """The text of each of these elements."""
    return browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    )


def text(browser, selector: str) -> str:
    [found] = texts(browser, selector)
    return found


def centers(browser, selector: str, axis: str) -> np.ndarray:
    """The middles of elements, in pixels of the window."""
    elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
    boxes = f"{elements}.map(e => e.getBoundingClientRect())"
    size = {"x": "width", "y": "height"}[axis]
    return np.array(browser.evaluate(f"{boxes}.map(box => box.{axis} + box.{size} / 2)"))


def number(percent: str) -> float:
    return float(percent.strip(" ✓<%")) / 100


def chosen(browser, what: str) -> int:
    """The number of the button that is pressed in a group."""
    buttons = f"[...document.querySelectorAll('{what} button')]"
    return browser.evaluate(f"{buttons}.findIndex(b => b.ariaPressed === 'true')")


def assert_expectation(browser, trace, t: int):
    """The panels of a token say what `forward` computed: number by number."""
    tokens = BYTES.encode(PROMPT)
    p = trace.probabilities[t, : BYTES.n_vocab]
    best = np.argsort(-p, kind="stable")[:5].tolist()
    if t + 1 < len(tokens) and tokens[t + 1] not in best:
        best.append(tokens[t + 1])
    cells = texts(browser, "#expected > :not(.bar)")
    places, names, numbers = cells[::3], cells[1::3], cells[2::3]
    assert names == [inside.label(BYTES, id) for id in best]
    for id, place, shown in zip(best, places, numbers, strict=True):
        assert place.removeprefix("✓ ") == f"{1 + (p > p[id]).sum()}."
        right = t + 1 < len(tokens) and id == tokens[t + 1]
        assert place.startswith("✓ ") == right
        assert shown == "<0.1%" if p[id] < 0.0005 else abs(number(shown) - p[id]) < 0.00051
    widths = browser.evaluate(
        "[...document.querySelectorAll('#expected .bar')].map(e => e.style.getPropertyValue('--x'))"
    )
    assert np.allclose([*map(float, widths)], p[best], atol=1e-5)
    if t + 1 < len(tokens):
        nats = -math.log(trace.probabilities[t, tokens[t + 1]])
        assert text(browser, "#context").endswith(f", a surprise of {nats:.2f} nats.")


def assert_heads_view(browser, trace, layer: int, head: int, t: int):
    """The numbers below the tokens are where this head looks from token t."""
    assert text(browser, "#head") == f"layer {layer}, head {head}"
    row = trace.blocks[layer].attention[head, t]
    shown = texts(browser, "#prompt small.cool")
    for u, share in enumerate(row):
        assert abs((number(shown[u]) if shown[u] else 0) - share) < 0.0075, (u, share)


# ---- choosing ----


def test_a_click_on_a_token(browser, history, traces):
    browser.open(history)
    tokens, trace = BYTES.encode(PROMPT), traces[-1]
    names = texts(browser, "#prompt bdi")
    assert names == [inside.label(BYTES, id) for id in tokens]
    nats = inside.surprise(trace.logits, tokens)
    shown = texts(browser, "#prompt small.warm")
    assert shown[0] == "–" and np.allclose([*map(float, shown[1:])], nats[1:], atol=0.051)
    assert chosen(browser, "#prompt") == len(tokens) - 1
    for t in (3, 0, 11, len(tokens) - 1):
        browser.click(f"#prompt button:nth-child({t + 1})")
        assert chosen(browser, "#prompt") == t
        assert_expectation(browser, trace, t)
        lens, chances = lens_of(trace, STEPS[-1])
        cells = texts(browser, "#guesses > :not(.bar)")
        assert cells[1::3] == [inside.label(BYTES, int(id)) for id in lens[:, t]]
        assert np.allclose([*map(number, cells[2::3])], chances[:, t], atol=0.00051)
        assert texts(browser, "#lens tr.on td bdi") == cells[1::3]


def test_tokens_by_the_arrow_keys(browser, history, traces):
    browser.open(history)
    T = len(BYTES.encode(PROMPT))
    for key, t in (
        ("ArrowRight", T - 1),  # the last token has no right neighbour
        ("ArrowLeft", T - 2),
        ("ArrowLeft", T - 3),
        ("ArrowRight", T - 2),
    ):
        browser.press(key)
        assert chosen(browser, "#prompt") == t
        assert_expectation(browser, traces[-1], t)
    browser.click("#prompt button")
    browser.press("ArrowLeft")
    assert chosen(browser, "#prompt") == 0
    browser.press("ArrowRight")
    assert browser.evaluate("document.activeElement === $('prompt').children[1]")


def test_a_click_on_a_head_draws_its_map(browser, history, traces):
    browser.open(history)
    T = len(BYTES.encode(PROMPT))
    for layer, head in ((2, 3), (0, 0), (1, 2)):
        button = layer * SMALL.n_head + head
        browser.click(f"#heads button:nth-of-type({button + 1})")
        assert chosen(browser, "#heads") == button
        assert text(browser, "#which").startswith(f"Layer {layer}, head {head}")
        attention = traces[-1].blocks[layer].attention[head]
        assert_heads_view(browser, traces[-1], layer, head, T - 1)
        most = np.unravel_index(attention[5:-1].argmax(), (T - 6, T))
        browser.click("#prompt button:nth-child(2)")  # the frame is elsewhere
        picture = browser.pixels("#large")
        cell = picture.shape[0] / T
        for t, u in ((most[0] + 5, most[1]), (T - 2, 1), (9, 4)):
            color = picture[int((t + 0.5) * cell), int((u + 0.5) * cell)]
            blue = math.sqrt(round(255 * attention[t, u]) / 255)
            expected = 255 + blue * (np.array([0x00, 0x72, 0xB2]) - 255)
            assert np.abs(color - expected).max() < 4, (layer, head, t, u)
        grey = 255 + 40 / 255 * (128 - 255)
        assert np.abs(picture[int(0.5 * cell), int(7.5 * cell)] - grey).max() < 4
        browser.click(f"#prompt button:nth-child({T})")


def test_the_number_under_the_pointer(browser, history, traces):
    browser.open(history, "#layer=1&head=2")
    tokens, attention = BYTES.encode(PROMPT), traces[-1].blocks[1].attention[2]
    T = len(tokens)
    names = [inside.label(BYTES, id) for id in tokens]
    assert texts(browser, "#map .row") == texts(browser, "#map .column") == names
    for t, u in ((T - 1, T - 1), (12, 3), (5, 0)):
        browser.move("#large", (u + 0.5) / T, (t + 0.5) / T)
        before, shown, after = text(browser, "#cell").partition(" gives ")
        assert before == f"{names[t]} (token {t})"
        assert abs(number(after.split()[0]) - attention[t, u]) < 0.0026
        assert after.endswith(f" to {names[u]} (token {u}).")
    browser.move("#large", 0.9, 0.1)
    assert " can’t look ahead to " in text(browser, "#cell")
    browser.click("#large", 0.1, 4.5 / T)
    assert chosen(browser, "#prompt") == 4
    browser.move("#large", 0.1, 0.9)
    assert "(token 4)" not in text(browser, "#cell")
    browser.move("h1")  # back to where the head looks most from the chosen token
    u = int(attention[4].argmax())
    assert text(browser, "#cell").endswith(f" to {names[u]} (token {u}).")

    # each name is beside its row and above its column
    left, top, width, height = browser.box("#large")
    middles = (np.arange(T) + 0.5) / T
    assert np.abs(centers(browser, "#map .row", "y") - top - height * middles).max() < 1
    assert np.abs(centers(browser, "#map .column", "x") - left - width * middles).max() < 1


def test_everything_by_the_keyboard_alone(browser, history, traces):
    browser.open(history)
    T, stops = len(BYTES.encode(PROMPT)), []
    while stops[-1:] != [None]:  # behind the last one
        browser.press("Tab")
        stops.append(browser.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"play", "slider", "curve", "prompt", "heads", "large"} <= {*stops}
    assert stops.count("prompt") == stops.count("heads") == 1  # not a stop for each of them

    browser.evaluate("$('slider').focus()")
    browser.press("ArrowLeft")
    assert text(browser, "#step") == "step 1,000" and chosen(browser, "#prompt") == T - 1
    browser.evaluate("choose({layer: 0, head: 0})")
    browser.evaluate("heads[0][0].focus()")
    for key, layer, head in (
        ("ArrowUp", 0, 0),
        ("ArrowRight", 0, 1),
        ("ArrowDown", 1, 1),
        ("ArrowDown", 2, 1),
        ("ArrowDown", 2, 1),
        ("ArrowLeft", 2, 0),
        ("ArrowLeft", 2, 0),
        ("ArrowUp", 1, 0),
    ):
        browser.press(key)
        assert chosen(browser, "#heads") == layer * SMALL.n_head + head
        assert browser.evaluate(f"document.activeElement === heads[{layer}][{head}]")
        assert_heads_view(browser, traces[2], layer, head, T - 1)
    browser.evaluate("$('large').focus()")
    attention = traces[2].blocks[1].attention[0]
    browser.press("ArrowUp")
    u = browser.evaluate("state.column")
    for _ in range(3):
        browser.press("ArrowLeft")
        u = max(0, u - 1)
        answer = text(browser, "#cell").partition(" gives ")[2]
        assert abs(number(answer.split()[0]) - attention[T - 2, u]) < 0.0026
        assert answer.endswith(f"(token {u}).")
    browser.evaluate("$('play').focus()")
    browser.press("Enter")
    assert text(browser, "#play") == "❚❚ stop"
    browser.press("Enter")
    assert text(browser, "#play") == "▶ play"


# ---- the history ----


def test_the_slider_changes_the_step_and_all_numbers(browser, history, traces):
    tokens = BYTES.encode(PROMPT)
    browser.open(history)
    browser.evaluate("choose({token: 7})")
    assert browser.evaluate("[$('slider').min, $('slider').max]") == ["0", str(len(STEPS) - 1)]
    browser.evaluate("$('slider').focus()")
    for i in (3, 2, 1, 0):
        step, trace = STEPS[i], traces[i]
        assert text(browser, "#step") == f"step {step:,}"
        assert chosen(browser, "#curve") == i
        nats = inside.surprise(trace.logits, tokens)
        shown = texts(browser, "#prompt small.warm")
        assert np.allclose([*map(float, shown[1:])], nats[1:], atol=0.051)
        assert_expectation(browser, trace, 7)
        best = trace.probabilities[:, : BYTES.n_vocab].argmax(axis=1)
        assert texts(browser, "#guessed bdi") == [inside.label(BYTES, int(id)) for id in best]
        right = (best[:-1] == tokens[1:]).sum()
        said = f"{right} of 20 guesses for the next token are right (bold): "
        assert text(browser, "#guessed").startswith(said)
        assert len(texts(browser, "#guessed .right")) == right
        layer, head = browser.evaluate("[state.layer, state.head]")
        assert_heads_view(browser, trace, layer, head, 7)
        kinds = inside.head_kinds(trace, tokens)
        named = texts(browser, "#heads .named")
        assert named == [f"{kind} {share:.0%}" for kind, share in kinds.values()]
        lens, _ = lens_of(trace, step)
        cells = texts(browser, "#lens td bdi")
        assert cells == [inside.label(BYTES, int(id)) for id in lens.T.flat]
        sizes = [
            inside.median_length(x) for b in trace.blocks for x in (b.attn, b.mlp, b.x_after_mlp)
        ]
        cells = texts(browser, "#lengths > span:not(.bar)")[4:]
        numbers = [float(x.replace(",", "")) for x in cells if not x.startswith("layer")]
        assert np.allclose(numbers, sizes, rtol=0.006)
        browser.press("ArrowLeft")


def test_the_curve_the_play_button_and_the_skipped_checkpoint(browser, history, traces, log_dir):
    tokens = BYTES.encode(PROMPT)
    browser.open(history)
    means = [np.nanmean(inside.surprise(trace.logits, tokens)) for trace in traces]
    assert browser.evaluate("dots.map(dot => dot.title)") == [
        f"step {step:,}: {mean:.2f} nats" for step, mean in zip(STEPS, means, strict=True)
    ]
    # the numbers of the first steps are too near to each other to be shown
    assert texts(browser, "#curve span") == ["12,000", "1,000"]
    assert texts(browser, "#curve small") == [f"{means[3]:.2f}", f"{means[2]:.2f}"]
    left, top, width, height = browser.box("#curve svg")
    x = left + width * (np.array(STEPS) - STEPS[0]) / (STEPS[-1] - STEPS[0])
    y = top + height * (1 - np.array(means) / max(means))
    assert np.abs(centers(browser, "#curve button", "x") - x).max() < 1
    assert np.abs(centers(browser, "#curve button", "y") - y).max() < 1
    browser.click("#curve button:nth-of-type(3)")
    assert text(browser, "#step") == "step 1,000"
    assert text(browser, "#skipped").startswith(f"Skipped: {log_dir}/model_00750.pt is damaged")

    browser.evaluate("setInterval = (step, pause) => (window.step = step, pause)")
    browser.click("#play")
    for step in (12_000, 250, 500, 1_000):
        browser.evaluate("step()")
        assert text(browser, "#step") == f"step {step:,}"
    browser.click("#play")


def test_a_head_is_named_since_the_step_at_which_it_appeared(browser, tmp_path):
    """A run in which head 0.1 learns to look at the token before, by position alone, and then
    unlearns it."""
    config = GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=32)
    T = 16
    for step, strength in ((100, 0.0), (200, 0.1), (300, 1.0), (400, 2.0), (500, 0.0)):
        model = random_model(config)
        model.transformer.wte.weight.data.zero_()
        model.transformer.wpe.weight.data = torch.eye(T, 32)  # position t is the channel t
        ln_1, c_attn = model.transformer.h[0].ln_1, model.transformer.h[0].attn.c_attn
        for values, value in ((ln_1.weight, 1), (ln_1.bias, 0), (c_attn.weight, 0)):
            values.data.fill_(value)
        c_attn.bias.data.zero_()
        c_attn.weight.data[T : 2 * T, :T] = strength * torch.eye(T)  # head 1's query: t
        shifted = torch.diag(torch.ones(T - 1), diagonal=-1)
        c_attn.weight.data[3 * T : 4 * T, :T] = shifted  # its key: t + 1
        save_model(model, tmp_path / f"model_{step:05d}.pt")
    out = tmp_path / "page.html"
    assert inside.main(["abcdefghij", "--model", str(tmp_path), "--history", f"--out={out}"]) == 0
    browser.open(out)
    shares = []
    for checkpoint in range(5):
        browser.evaluate(f"choose({{checkpoint: {checkpoint}}})")
        model = random_model(config)
        content = torch.load(tmp_path / f"model_{100 * (checkpoint + 1):05d}.pt")
        model.load_state_dict(content["model"])
        tokens = BYTES.encode("abcdefghij")
        attention = run_pass(model, tokens).blocks[0].attention
        shares.append(inside.shares(attention, inside.places(tokens)["previous"])[1])
        named = text(browser, "#named")
        if shares[-1] <= 0.5:
            assert named == "No head has a dashed frame."
            assert not texts(browser, "#heads .named")
        else:
            since = f"layer 0, head 1: {shares[-1]:.0%}, more than half since step 300"
            assert named == f"the token before:{since}"
            assert texts(browser, "#heads .named") == [f"previous {shares[-1]:.0%}"]
    assert shares[1] < 0.5 < shares[2] < shares[3] and shares[4] < 0.5
    browser.evaluate("choose({checkpoint: 3})")
    browser.click("#heads button")
    assert text(browser, "#which") == "Layer 0, head 0"
    browser.click("#named button")
    share = f"{shares[3]:.0%} of its attention"
    assert text(browser, "#which") == f"Layer 0, head 1: the token before, {share}"


# ---- prompts, sizes, colours ----


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts(browser, name, tokenizer, tmp_path):
    prompt = HOSTILE[name]
    rows = {"bytes": 320, "gpt2": 50304}[tokenizer]
    config = GPTConfig(block_size=128, vocab_size=rows, n_layer=2, n_head=2, n_embd=16)
    out = page_of(prompt, config, tokenizer, tmp_path)
    codes = "[...{}].map(c => c.codePointAt(0))"  # a lone surrogate does not come through the pipe
    for width in (1280, 390):
        browser.open(out, width=width)
        shown = browser.evaluate(codes.format("$('text').textContent"))
        assert shown == [ord(character) for character in prompt or "(no prompt)"]
        if name == "lines":  # as lines
            assert browser.evaluate("$('text').innerText.split('\\n').length") > 3
        encoding = get_tokenizer(tokenizer)
        tokens = (encoding.encode_prompt(prompt) or [encoding.eot_token])[-128:][-64:]
        labels = [inside.label(encoding, id) for id in tokens]
        for selector in ("#prompt bdi", "#map .row", "#map .column", "#lens tr th:first-child bdi"):
            assert texts(browser, selector) == labels, selector
        assert browser.evaluate("document.title").startswith("Inside ")
        assert browser.evaluate("document.querySelectorAll('script').length") == 2
        assert browser.evaluate("document.querySelectorAll('section').length") == 8
        assert browser.evaluate("document.body.querySelectorAll('b, alert').length") == 0
        # tokens stay in their order, in rows from left to right, whatever their script
        x, y = centers(browser, "#prompt button", "x"), centers(browser, "#prompt button", "y")
        assert all((y[1:] > y[:-1] + 5) | (x[1:] > x[:-1]))
        for t in (0, len(tokens) - 1):
            browser.click(f"#prompt button:nth-child({t + 1})")
            assert chosen(browser, "#prompt") == t
            next_token = labels[t + 1 :][:1]
            before = labels[max(0, t - 15) : t + 1]
            assert texts(browser, "#context bdi") == before + next_token
            assert len(texts(browser, "#expected .right")) == (3 if next_token else 0)
        assert_no_scroll_bar(browser, width)
    cut = len(encoding.encode_prompt(prompt)) > 64
    assert ("of which this page shows the last 64." in text(browser, "#about")) == cut


def test_tokens_that_are_markup(browser, tmp_path):
    """Each word of this tokenizer is a token."""
    words = ["<b>bold</b>", "<script>alert(1)</script>", "<img/src=x/onerror=alert(1)>", "&amp;"]
    vocab = {word: id for id, word in enumerate([*words, "<|endoftext|>"])}
    model = tokenizers.models.WordLevel(vocab, unk_token="&amp;")
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<|endoftext|>"])
    config = GPTConfig(block_size=16, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    out = page_of(" ".join(words), config, {"tokenizer.json": library.to_str()}, tmp_path)
    browser.open(out)
    for selector in ("#prompt bdi", "#map .row", "#map .column"):
        assert [name.removeprefix("·") for name in texts(browser, selector)] == words
    assert {name.removeprefix("·") for name in texts(browser, "#expected bdi")} == {*vocab}
    assert browser.evaluate("document.body.querySelectorAll('b, img, bdi *').length") == 0


def assert_no_scroll_bar(browser, width: int):
    """The page is not wider than the window; its panels may be."""
    assert browser.evaluate("innerWidth") == width
    inner, outer = browser.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert inner <= outer


@pytest.mark.parametrize("n_head", [1, 12, 128])
def test_numbers_of_heads_are_above_their_maps(browser, n_head, tmp_path):
    config = GPTConfig(block_size=64, vocab_size=320, n_layer=3, n_head=n_head, n_embd=2 * n_head)
    out = page_of("abcdefghij" * 4, config, "bytes", tmp_path)
    for width in (1280, 390):
        browser.open(out, width=width)
        assert_no_scroll_bar(browser, width)
        numbers = texts(browser, "#heads > span")
        assert numbers == ["", *map(str, range(n_head)), "0", "1", "2"]
        x, y = (centers(browser, "#heads > span", axis) for axis in "xy")
        maps_x, maps_y = (centers(browser, "#heads canvas", axis) for axis in "xy")
        assert np.abs(maps_x.reshape(3, n_head) - x[1 : n_head + 1]).max() < 1
        assert np.abs(maps_y.reshape(3, n_head).T - y[n_head + 1 :]).max() < 1
        fits = "$('heads').scrollWidth <= $('heads').parentElement.clientWidth"
        assert browser.evaluate(fits) == (n_head <= 12)
        browser.click(f"#heads button:nth-of-type({3 * n_head})")
        assert text(browser, "#which").startswith(f"Layer 2, head {n_head - 1}")


# the ratio of WCAG: of the text of an element and of what is behind it
CONTRAST = """
(selector => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  function light(...colors) {
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const elements = [...document.querySelectorAll(selector)].filter(e => e.textContent.trim());
  return elements.map(element => {
    const behind = [];
    for (let e = element; e; e = e.parentElement)
      behind.unshift(getComputedStyle(e).backgroundColor);
    const [ground, ink] = [light(...behind), light(getComputedStyle(element).color)];
    const ratio = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
    return [ratio, `${element.tagName} ${element.textContent} in ${element.parentElement.id}`];
  });
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark(browser, history, traces, scheme, width):
    browser.open(history, "#checkpoint=1", width=width, scheme=scheme)
    assert_no_scroll_bar(browser, width)
    everything = "h1, h2, p, bdi, small, th, button, output, .rows > span, #heads > span"
    contrasts = browser.evaluate(f"{CONTRAST}({json.dumps(everything)})")
    assert len(contrasts) > 200 and min(contrasts)[0] > 4.5, sorted(contrasts)[:5]
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, page[4:-1].split(","))) / 3
    assert lightness > 230 if scheme == "light" else lightness < 40

    # a map that is drawn before the scheme changes is drawn again after it
    browser.evaluate("choose({token: 5, layer: 0, head: 0})")

    def color():  # of the first token, all of whose attention goes to itself
        return browser.pixels("#large")[4:8, 4:8].mean(axis=(0, 1))

    blue = {"light": [0x00, 0x72, 0xB2], "dark": [0x63, 0xB7, 0xF2]}
    assert np.allclose(color(), blue[scheme], atol=2)
    other = {"light": "dark", "dark": "light"}[scheme]
    features = [{"name": "prefers-color-scheme", "value": other}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    browser.evaluate("new Promise(requestAnimationFrame)")
    assert np.allclose(color(), blue[other], atol=2)


def test_the_chosen_rows_are_in_view(browser, tmp_path):
    """In panels that are too small for all of their rows; the page itself does not move."""
    config = GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=1, n_embd=8)
    browser.open(page_of("ü" * 32, config, "bytes", tmp_path))
    browser.evaluate("scrollTo(0, 300)")
    for t in (63, 0, 31, 32, 60, 5):
        browser.evaluate(f"choose({{token: {t}}})")
        assert browser.evaluate("scrollY") == 300
        for row, panel in (("#lens tr.on", "#lens"), ("#map .row.on", "#map")):
            [middle] = centers(browser, row, "y")
            top, bottom = browser.evaluate(
                f"(({{top, bottom}}) => [top, bottom])"
                f"(document.querySelector('{panel}').parentElement.getBoundingClientRect())"
            )
            assert top < middle < bottom and bottom - top < 730, (t, panel)


def test_the_address_chooses(browser, history):
    browser.open(history, "#checkpoint=1&token=3&layer=2&head=1")
    assert text(browser, "#step") == "step 500" and chosen(browser, "#prompt") == 3
    assert text(browser, "#which").startswith("Layer 2, head 1")
    browser.open(history, "#checkpoint=99&token=-5&layer=x&head=&y=1&token")
    assert text(browser, "#step") == "step 12,000" and chosen(browser, "#prompt") == 0
