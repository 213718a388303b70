"""Inside a GPT: one forward pass written out step by step, printed and drawn.

    python inside.py "The capital of France is" --model gpt2
    python inside.py "Return the " --model demo/log/model_checkpoint.pt --out inside.png
    python inside.py "one two one two one" --model demo/log/model_checkpoint.pt --layer 1 --head 2

`forward` is the lesson: the whole of GPT-2 in plain matrix operations, in the order in which a
sentence goes through it. Nothing in it calls the model: it takes the model's weights, and its
logits are the model's. What it keeps on its way is what is printed and drawn.

Shapes: T tokens, C channels, H heads, D = C/H channels of a head, V vocabulary. Layers, heads and
positions are counted from 0, as the weights' names count them.
"""

import functools
import math
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

import numpy as np

from GPT_Modules import GPT
from lib.cli import UserError, command, count, parse
from lib.files import whole_file
from lib.pretrained import load_model
from lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class InsideConfig:
    prompt: str = ""  # text to look into; without one, the end-of-text token alone
    model: str = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: str | None = None  # gpt2, bytes, or a tokenizer.json, for a model that brings none
    # the picture
    out: str = "inside.png"  # PNG to draw
    layer: int | None = None  # with --head: draw this one head large; layers count from 0
    head: int | None = None  # with --layer: its number in the layer, from 0


# ---- the forward pass ----


class Trace:
    """The values of a forward pass by name, in the order in which they arose, each with what it
    means in half a sentence."""

    def __init__(self):
        self.values = {}
        self.meanings = {}

    def keep(self, name: str, value: np.ndarray, meaning: str) -> np.ndarray:
        self.values[name] = value
        self.meanings[name] = meaning
        return value

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


def forward(weights: dict[str, np.ndarray], tokens: list[int], n_head: int) -> Trace:
    """One pass of GPT-2 over a prompt, with every intermediate value.

    weights: by GPT-2's names (`weights_of`). tokens: the prompt's ids, one at least and not more
    than there are positions. n_head: H, which the weights' shapes don't tell. The last values are
    "logits" (T, V) and "probabilities" (T, V): row t is what the model expects after token t.
    """
    trace = Trace()
    keep = trace.keep
    T = len(tokens)
    n_layer = sum(name.endswith("ln_1.weight") for name in weights)

    what = keep("wte[tokens]", weights["wte.weight"][tokens], "what each token is: a table's row")
    where = keep("wpe[:T]", weights["wpe.weight"][:T], "where it stands: a row for each position")
    x = keep("x", what + where, "their sum: the residual stream begins")  # (T, C)

    for layer in range(n_layer):
        h = f"h.{layer}."

        # Attention: each token gathers from itself and those before it.
        n = keep(h + "ln_1", layer_norm(x, weights, h + "ln_1"), "x with its size taken out")
        qkv = keep(h + "qkv", linear(n, weights, h + "attn.c_attn"), "three things of each token:")
        q, k, v = (heads(part, n_head) for part in np.split(qkv, 3, axis=1))  # (H, T, D) each
        keep(h + "q", q, "... the query: what it looks for, in each head")
        keep(h + "k", k, "... the key: what it can be found by")
        keep(h + "v", v, "... the value: what it hands over where it is found")
        D = q.shape[2]
        scores = keep(h + "scores", q @ k.mT / math.sqrt(D), "how well each query fits each key")
        triangle = keep("mask", np.tri(T, dtype=bool), "who may look at whom: never ahead")
        masked = keep(h + "masked", np.where(triangle, scores, -np.inf), "-inf for what is ahead")
        # (H, T, T): row t is where token t looks
        attention = keep(h + "attention", softmax(masked), "shares: each row sums to 1")
        mixed = keep(h + "mixed", attention @ v, "the values, mixed by these shares")  # (H, T, D)
        y = keep(h + "joined", mixed.transpose(1, 0, 2).reshape(T, -1), "the heads side by side")
        y = keep(h + "attn", linear(y, weights, h + "attn.c_proj"), "what attention adds to x")
        x = keep(h + "x + attn", x + y, "x after attention")  # (T, C)

        # The MLP: each token by itself.
        n = keep(h + "ln_2", layer_norm(x, weights, h + "ln_2"), "x with its size taken out again")
        y = keep(h + "c_fc", linear(n, weights, h + "mlp.c_fc"), "4 C features of each token")
        y = keep(h + "gelu", gelu(y), "those below zero are (almost) switched off")  # (T, 4C)
        y = keep(h + "mlp", linear(y, weights, h + "mlp.c_proj"), "what the MLP adds to x")
        x = keep(h + "x + mlp", x + y, "x after the block")  # (T, C)

    n = keep("ln_f", layer_norm(x, weights, "ln_f"), "x with its size taken out, for the head")
    logits = keep("logits", n @ weights["wte.weight"].T, "how well it fits each token's row of wte")
    keep("probabilities", softmax(logits), "of each token of the vocabulary to come next")  # (T, V)
    return trace


def layer_norm(x, weights, name):
    """Each row of x (T, C) at mean 0 and variance 1, then scaled and shifted channel by channel."""
    mean = x.mean(axis=1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=1, keepdims=True)
    normal = (x - mean) / np.sqrt(variance + 1e-5)
    return normal * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def heads(x, n_head):
    """(T, C) -> (H, T, D): head 0 has the first D channels, head 1 the next, and so on."""
    T, C = x.shape
    return x.reshape(T, n_head, C // n_head).transpose(1, 0, 2)


def softmax(x):
    """Numbers of the last axis as shares of 1; the largest is taken off before, so that exp can't
    overflow."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def gelu(x):
    """x times (nearly) the probability that a normal variable is below x, by GPT-2's formula."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- what follows from it ----


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    """A model's weights by GPT-2's names: "wte.weight", "h.0.attn.c_attn.weight" (3C, C), ..."""
    return {name: weight.numpy() for name, weight in model.transformer.state_dict().items()}


def surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """(T,): -ln of the probability that the model gave each token, in nats; nan for the first,
    before which there is nothing. Their mean is the loss that training makes small."""
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    known = range(len(tokens) - 1)
    return np.array([np.nan, *(total[t] - logits[t, tokens[t + 1]] for t in known)])


def logit_lens(trace: Trace, weights, n_layer: int, n_vocab: int, first: int):
    """What the model would say if it ended after each layer: the final LayerNorm and the head,
    applied to the residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Returns the likeliest tokens and their probabilities, each (n_layer + 1, T - first) for the
    positions from `first` on; row 0 is before the first block, the last row is the output. Of the
    vocabulary's rows only those below n_vocab can be the likeliest.
    """
    names = ["x", *(f"h.{layer}.x + mlp" for layer in range(n_layer))]
    likeliest, chances = [], []
    for name in names:
        stream = layer_norm(trace[name][first:], weights, "ln_f")
        probabilities = softmax(stream @ weights["wte.weight"].T)[:, :n_vocab]
        likeliest.append(probabilities.argmax(axis=1))
        chances.append(probabilities.max(axis=1))
    return np.array(likeliest), np.array(chances)


KINDS = {
    "previous": "the token before",
    "first": "the first token",
    "itself": "itself",
    "copy": "after an earlier copy",
}


def places(tokens: list[int]) -> dict[str, np.ndarray]:
    """{kind of KINDS: (T, T) bool}: the places to which a head of this kind looks, a row for each
    token from the third on (before, all kinds are the same), for "copy" where the token stood
    earlier."""
    T = len(tokens)
    same = np.equal.outer(tokens, tokens)
    after = np.zeros((T, T), dtype=bool)
    after[:, 1:] = same[:, :-1]
    there = {
        "previous": np.eye(T, k=-1, dtype=bool),
        "first": np.arange(T) == np.zeros((T, 1)),
        "itself": np.eye(T, dtype=bool),
        "copy": after & np.tri(T, k=-1, dtype=bool),
    }
    third_on = np.arange(T)[:, None] >= 2
    return {kind: place & third_on for kind, place in there.items()}


def shares(attention: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(H,): how much of each head's attention (H, T, T) goes to these places, on average over the
    tokens that have such a place; 0 if there are none."""
    rows = place.any(axis=1)
    if not rows.any():
        return np.zeros(len(attention))
    return (attention[:, rows] * place[rows]).sum(axis=2).mean(axis=1)


# ---- tokens as labels ----


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as something to see: a space as ·, a newline as ↵, other control codes as \\x1b,
    and one that is only a part of a character by its id, as #240."""
    decoder = tokenizer.decoder()
    decoder.step(token)  # some tokenizers leave out the space before the first word of a text
    text = decoder.step(token) + decoder.end()
    if not text or "\ufffd" in text:
        return f"#{token}"
    return "".join(visible(character) for character in text)


def visible(character: str) -> str:
    if character in VISIBLE:
        return VISIBLE[character]
    combining = unicodedata.category(character).startswith("M")
    return character if character.isprintable() and not combining else escaped(character)


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"U+{code:04X}"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


VISIBLE = {" ": "·", "\n": "↵", "\t": "→"}


# ---- what is printed ----


@dataclass(frozen=True)
class Look:
    """What is printed and drawn of a pass over a prompt of T tokens; the picture has those from
    `first` on, S = T - first."""

    title: str
    first: int
    tokens: list[int]
    labels: list[str]  # of the T tokens
    surprise: np.ndarray  # (T,)
    next: list[tuple[str, float]]  # the likeliest tokens after the last, with their probabilities
    attention: np.ndarray  # (L, H, S, S), L layers
    kinds: dict[tuple[int, int], tuple[str, float]]  # (layer, head): (kind, share above a half)
    lens_tokens: np.ndarray  # (L + 1, S): what logit_lens returns
    lens_labels: list[list[str]]  # lens_tokens as labels
    lens_chances: np.ndarray  # (L + 1, S)
    sizes: np.ndarray  # (L, 3): attention's addition, the MLP's, x after the block


def describe(look: Look, trace: Trace) -> str:
    """The pass in words: the tokens, each step of the first block, what comes next, surprises."""
    T = len(look.tokens)
    n_layer = len(look.attention)
    lines = [f"{count(T, 'token')}, each with its id:", "", " "]
    for name, token in zip(look.labels, look.tokens, strict=True):
        if len(lines[-1]) + len(name) > 88:
            lines.append(" ")
        lines[-1] += f" {name} {token} "
    lines += ["", "the forward pass, step by step:", ""]
    for name, value in trace.values.items():
        layer = name.split(".")[1] if name.startswith("h.") else "0"
        if layer == "0":
            shape = str(value.shape).replace(",)", ")")
            lines.append(f"  {name:15} {shape:16} {trace.meanings[name]}")
        elif name == f"h.{n_layer - 1}.x + mlp":
            lines.append(f"  {'...':32} the same in {count(n_layer - 1, 'more block')}")
    lines += ["", "the likeliest next tokens:", ""]
    lines += [f"  {name:14} {chance:7.2%}  {bar(chance, 1)}" for name, chance in look.next]
    lines += ["", "how surprising each token was, in nats (-ln of its probability):", ""]
    for name, nats in zip(look.labels, look.surprise, strict=True):
        known = "      the first: nothing stands before it" if np.isnan(nats) else ""
        lines.append(f"  {name:14} " + (known or f"{nats:7.2f}  {bar(nats, 16)}"))
    if T > 1:
        lines.append(f"  {'mean':14} {np.nanmean(look.surprise):7.2f}")
    lines += ["", "heads with more than half of their attention in one place (layer.head):", ""]
    for kind, place in KINDS.items():
        found = [f"{i}.{j} {share:.0%}" for (i, j), (k, share) in look.kinds.items() if k == kind]
        lines += [f"  {place}: {', '.join(found)}"] if found else []
    return "\n".join(line.rstrip() for line in (lines if look.kinds else lines[:-3]))


def bar(value: float, whole: float) -> str:
    return "#" * min(40, round(40 * value / whole))


# ---- what is drawn ----

SHOWN = 40  # tokens in the picture; of a longer prompt the last ones
WIDTH, MARGIN = 1600, 32  # pixels
SURPRISED = 8.0  # nats; the darkest colour, the same in every picture, so that two can be compared
COLOR = {"previous": "#d95f02", "first": "#1b9e77", "itself": "#7570b3", "copy": "#e7298a"}
PARTS = {"attention": "#e6a04b", "MLP": "#5aa9a3", "x after both": "#44546a"}
PANEL = 108  # from the top of a panel to its contents


def draw(look: Look):
    """The picture of a pass, a page: surprise, attention, the residual stream, the logit lens."""
    page = new_page()
    bottom = draw_prompt(page, look, draw_title(page, look))
    n_layer, n_head = look.attention.shape[:2]
    lens = Lens(look)
    room = WIDTH - 2 * MARGIN - 430 - lens.width  # for the maps, if the table stands beside them
    beside = room >= max(600, 120 * n_head)
    cell = min(180, (room if beside else 900) // n_head)
    right = draw_attention(page, look, MARGIN, bottom, cell)
    below = bottom + PANEL + n_layer * cell + 36
    if beside:
        draw_sizes(page, look, right, bottom, 320, cell)
        return cut(page, max(below, draw_lens(page, lens, right + 360, bottom)))
    draw_sizes(page, look, right, bottom, WIDTH - MARGIN - right, cell)
    return cut(page, draw_lens(page, lens, MARGIN, below))


def draw_head(look: Look, layer: int, head: int):
    """The picture of one head, large: a row for each token, a column for where it looks."""
    page = new_page()
    top = draw_title(page, look)
    shown = look.attention[layer, head]
    labels = [shortened(drawable(name), 14) for name in look.labels[look.first :]]
    T = len(labels)
    cell = min(64, 1240 // T)
    heading(page, MARGIN, top, f"layer {layer}, head {head}: where each token (row) looks (column)")
    kind, share = look.kinds.get((layer, head), ("", 0.0))
    what = f"{share:.0%} of its attention goes to {KINDS[kind]}; " if kind else ""
    caption(page, MARGIN, top + 28, f"{what}in the cells: per cent")
    left, top = MARGIN + 150, top + 72 + 9 * max(len(name) for name in labels)
    cells = np.where(np.tri(T, dtype=bool), shown, np.nan)
    image(page, cells, left, top, cell * T)
    for t, name in enumerate(labels):
        middle = (t + 0.5) * cell
        write(page, left - 8, top + middle, name, 15, ha="right", va="center", mono=True)
        options = {"rotation": 90, "ha": "center", "va": "bottom", "mono": True}
        write(page, left + middle, top - 8, name, 15, **options)
        for s in range(t + 1):
            if shown[t, s] >= 0.01:
                options = {"ha": "center", "va": "center", "color": ink(shown[t, s] ** 0.5)}
                text = f"{100 * shown[t, s]:.0f}"
                write(page, left + (s + 0.5) * cell, top + middle, text, 13, **options)
    return cut(page, top + cell * T)


def draw_title(page, look: Look) -> int:
    title = look.title if len(look.title) <= 70 else "…" + look.title[-69:]
    write(page, MARGIN, MARGIN, drawable(title), 26, weight="bold")
    if look.first:
        T = len(look.labels)
        caption(page, MARGIN, MARGIN + 38, f"the last {T - look.first} of the prompt's {T} tokens")
    return MARGIN + (80 if look.first else 56)


def draw_prompt(page, look: Look, top: int) -> int:
    heading(page, MARGIN, top, "the prompt, coloured by surprise")
    text = "below each token -ln of the probability that it was given, in nats: 0 is certain"
    caption(page, MARGIN, top + 28, text)
    left, top = MARGIN, top + 62
    for name, nats in zip(look.labels[look.first :], look.surprise[look.first :], strict=True):
        name = shortened(drawable(name), 16)
        width = max(38, 13 * len(name) + 12)
        if left + width > WIDTH - MARGIN:
            left, top = MARGIN, top + 62
        strength = 0.0 if np.isnan(nats) else min(1.0, nats / SURPRISED)
        box(page, left, top, width - 4, 34, shade("OrRd", 0.9 * strength))
        options = {"ha": "center", "va": "center", "color": ink(strength)}
        write(page, left + width / 2 - 2, top + 17, name, 20, mono=True, **options)
        below = "-" if np.isnan(nats) else f"{nats:.1f}"
        write(page, left + width / 2 - 2, top + 38, below, 13, ha="center", color="#666666")
        left += width
    top += 72
    write(page, MARGIN, top + 9, "next:", 16, va="center")
    left = MARGIN + 62
    for name, chance in look.next:
        name = shortened(drawable(name), 16)
        width = 11 * len(name) + 14
        box(page, left, top - 4, width, 28, shade("Greens", chance))
        options = {"ha": "center", "va": "center", "color": ink(chance)}
        write(page, left + width / 2, top + 10, name, 17, mono=True, **options)
        write(page, left + width + 6, top + 10, per_cent(chance), 15, va="center", color="#666666")
        left += width + 70
    return top + 62


def draw_attention(page, look: Look, left: int, top: int, cell: int) -> int:
    """A map for each head, layers downwards; returns where the panel ends at the right."""
    heading(page, left, top, "attention: layers downwards, heads across")
    n_layer, n_head, T = look.attention.shape[:3]
    framed = {kind for kind, _ in look.kinds.values()}
    text = "row t of a map: where token t looks"
    if framed:
        text += "; framed if on average more than half goes to"
    else:
        caption(page, left, top + 50, "no head has more than half of its attention in one place")
    caption(page, left, top + 28, text)
    at = left
    for kind in KINDS:
        if kind in framed:
            box(page, at, top + 54, 14, 14, "none", COLOR[kind], 2.5)
            caption(page, at + 22, top + 50, KINDS[kind])
            at += 44 + 8 * len(KINDS[kind])
    left, top = left + 30, top + PANEL
    triangle = np.tri(T, dtype=bool)
    for head in range(n_head):
        write(page, left + (head + 0.5) * cell, top - 6, str(head), 14, ha="center", va="bottom")
    for layer in range(n_layer):
        write(page, left - 8, top + (layer + 0.5) * cell, str(layer), 14, ha="right", va="center")
        for head in range(n_head):
            x, y = left + head * cell, top + layer * cell
            shown = look.attention[layer, head]
            gap = 3 if cell >= 40 else 1
            image(page, np.where(triangle, shown, np.nan), x + gap, y + gap, cell - 2 * gap)
            if (layer, head) in look.kinds:
                color = COLOR[look.kinds[layer, head][0]]
                box(page, x + gap, y + gap, cell - 2 * gap, cell - 2 * gap, "none", color, 2.5)
    return left + max(n_head * cell, 600) + 40


def draw_sizes(page, look: Look, left: int, top: int, width: int, cell: int) -> None:
    """Bars beside the rows of maps: what attention and the MLP add, and the stream after them."""
    heading(page, left, top, "what is added to x")
    caption(page, left, top + 28, "length of a token's vector (median)")
    at = left
    for name, color in PARTS.items():
        box(page, at, top + 54, 14, 14, color)
        caption(page, at + 20, top + 50, name)
        at += 34 + 8 * len(name)
    top += PANEL
    longest = look.sizes.max()
    height = min(26, (cell - 6) // 3)
    for layer, sizes in enumerate(look.sizes):
        for part, (size, color) in enumerate(zip(sizes, PARTS.values(), strict=True)):
            y = top + (layer + 0.5) * cell + (part - 1.5) * height
            length = (width - 60) * size / longest
            box(page, left, y + 1, length, height - 2, color)
            if height >= 12:
                write(page, left + length + 6, y + height / 2, f"{size:.3g}", 12, va="center")


class Lens:
    """The table of the logit lens: which layers are its columns, at most 14, and how wide it is."""

    def __init__(self, look: Look):
        n_layer = len(look.attention)
        every = math.ceil(n_layer / 12)
        self.columns = sorted({*range(0, n_layer + 1, every), n_layer})
        self.look = look
        self.cells = [
            [shortened(drawable(x), 9) for x in look.lens_labels[i]] for i in self.columns
        ]
        self.rows = [shortened(drawable(name), 12) for name in look.labels[look.first :]]
        longest = max(len(name) for cells in self.cells for name in cells)
        self.column = max(56, 9 * longest + 6)
        self.label = 12 + 9 * max(len(name) for name in self.rows)
        self.width = 2 * self.label + len(self.columns) * self.column + 20


def draw_lens(page, lens: Lens, left: int, top: int) -> int:
    look = lens.look
    heading(page, left, top, "what it would say after each layer")
    caption(page, left, top + 28, "the likeliest next token; darker: more probable")
    caption(page, left, top + 50, "framed: it is what comes next (at the right)")
    top += PANEL
    edge = left + lens.label
    for place, layer in enumerate(lens.columns):
        name = str(layer - 1) if layer else "start"
        write(page, edge + (place + 0.5) * lens.column, top - 6, name, 14, ha="center", va="bottom")
    for t, name in enumerate(lens.rows):
        y = top + 22 * t
        write(page, edge - 8, y + 11, name, 15, ha="right", va="center", mono=True)
        following = lens.rows[t + 1] if t + 1 < len(lens.rows) else "?"
        right = edge + len(lens.columns) * lens.column
        write(page, right + 8, y + 11, following, 15, va="center", mono=True, color="#888888")
        for place, layer in enumerate(lens.columns):
            x = edge + place * lens.column
            chance = look.lens_chances[layer, t]
            box(page, x + 1, y + 1, lens.column - 2, 20, shade("Greens", chance))
            options = {"ha": "center", "va": "center", "color": ink(chance), "mono": True}
            write(page, x + lens.column / 2, y + 11, lens.cells[place][t], 14, **options)
            tokens = look.tokens[look.first :]
            if t + 1 < len(tokens) and look.lens_tokens[layer, t] == tokens[t + 1]:
                box(page, x + 1, y + 1, lens.column - 2, 20, "none", "#222222", 1.5)
    return top + 22 * len(lens.rows)


# ---- the page: everything in pixels from the upper left corner ----


def new_page():
    """An empty page, WIDTH pixels wide; `cut` says how high it is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, 1), dpi=100, facecolor="white")
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    return page


def cut(page, bottom: float):
    """The page, as high as what is on it."""
    height = round(bottom) + MARGIN
    page.figure.set_size_inches(WIDTH / 100, height / 100)
    page.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    return page


def write(page, x, y, text, pixels, mono=False, va="top", **options) -> None:
    family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
    options |= {"fontsize": 0.72 * pixels, "family": family, "va": va}
    page.text(x, y, text, parse_math=False, **options)  # a prompt may have $ in it


def heading(page, x, y, text) -> None:
    write(page, x, y, text, 19, weight="bold")


def caption(page, x, y, text) -> None:
    write(page, x, y, text, 15, color="#555555")


def box(page, x, y, width, height, color, edge="none", line=0.0) -> None:
    from matplotlib.patches import Rectangle

    page.add_patch(
        Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=line)
    )


def image(page, shares: np.ndarray, x, y, size) -> None:
    """A square map of shares of 1, darker where they are larger; grey where they are nan."""
    colors = shade("Blues", np.sqrt(shares))  # the square root shows small shares too
    colors[np.isnan(shares)] = (0.93, 0.93, 0.93, 1)
    page.imshow(colors, extent=(x, x + size, y + size, y))


def shade(colors: str, strength):
    from matplotlib import colormaps

    return colormaps[colors](strength)


def ink(strength: float) -> str:
    """The colour in which a text can be read on a shade."""
    return "white" if strength > 0.6 else "black"


def per_cent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def drawable(text: str) -> str:
    """The text with U+1F600 in the place of each character that the picture's fonts lack."""
    has = glyphs()
    return "".join(c if ord(c) in has else escaped(c) for c in text)


@functools.cache
def glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans Mono")).get_charmap())


# ---- the command ----


def look_into(
    model: GPT, tokenizer: Tokenizer, tokens: list[int], title: str
) -> tuple[Look, Trace]:
    """A pass over the tokens, and what is shown of it."""
    weights = weights_of(model)
    n_layer = model.config.n_layer
    trace = forward(weights, tokens, model.config.n_head)
    if not np.isfinite(trace["logits"]).all():
        raise UserError(f"{title}: its weights or its logits are not finite", code=1)
    first = max(0, len(tokens) - SHOWN)
    lens_tokens, chances = logit_lens(trace, weights, n_layer, tokenizer.n_vocab, first)
    attention = [trace[f"h.{layer}.attention"] for layer in range(n_layer)]
    there = places(tokens)
    kinds = {}
    for layer, maps in enumerate(attention):
        found = {kind: shares(maps, place) for kind, place in there.items()}
        for head in range(model.config.n_head):
            kind = max(found, key=lambda kind: found[kind][head])
            if found[kind][head] > 0.5:
                kinds[layer, head] = kind, float(found[kind][head])
    last = trace["probabilities"][-1, : tokenizer.n_vocab]
    best = np.argsort(-last, kind="stable")[:5]
    parts = ("attn", "mlp", "x + mlp")
    sizes = [[size(trace[f"h.{i}.{part}"]) for part in parts] for i in range(n_layer)]
    look = Look(
        title=title,
        first=first,
        tokens=tokens,
        labels=[label(tokenizer, token) for token in tokens],
        surprise=surprise(trace["logits"], tokens),
        next=[(label(tokenizer, token), float(last[token])) for token in best],
        attention=np.array([layer[:, first:, first:] for layer in attention]),
        kinds=kinds,
        lens_tokens=lens_tokens,
        lens_labels=[[label(tokenizer, token) for token in row] for row in lens_tokens],
        lens_chances=chances,
        sizes=np.array(sizes),
    )
    return look, trace


def size(x: np.ndarray) -> float:
    """The length of a vector of x (T, C): the median over the tokens."""
    return float(np.median(np.linalg.norm(x, axis=1)))


@command
def main(argv=None) -> int:
    config = parse(InsideConfig, argv, __doc__, positional="prompt")
    check_out(config.out)
    model, tokenizer = load_model(config.model, tokenizer=config.tokenizer)
    check_head(config, model.config)
    tokens = tokenizer.encode_prompt(config.prompt) or [tokenizer.eot_token]
    room = model.config.block_size
    if len(tokens) > room:
        text = f"the prompt has {len(tokens):,} tokens, and the model's context is {room:,}"
        print(f"{text}: only the last {room:,} are looked at\n")
        tokens = tokens[-room:]
    look, trace = look_into(model, tokenizer, tokens, config.model)
    print(describe(look, trace))
    if config.layer is None:
        page = draw(look)
    else:
        page = draw_head(look, config.layer, config.head)
    with whole_file(Path(config.out)) as file:
        page.figure.savefig(file, format="png", dpi=100)
    print(f"\nsaved {config.out}")
    return 0


def check_out(out: str) -> None:
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG, so its name must end in .png")
    if path.is_dir():
        raise UserError(f"--out {out} is a directory: give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {path.parent}")


def check_head(config: InsideConfig, shape) -> None:
    if (config.layer is None) != (config.head is None):
        raise UserError("--layer and --head go together: one head is a head of a layer")
    if config.layer is not None:
        for name, number, there in (
            ("layer", config.layer, shape.n_layer),
            ("head", config.head, shape.n_head),
        ):
            if number >= there:
                raise UserError(f"--{name} is {number}: this model has {name}s 0 to {there - 1}")


if __name__ == "__main__":
    sys.exit(main())
