"""Inside a GPT: one forward pass written out step by step, printed, and shown on a page to click.

    python inside.py "The capital of France is" --model gpt2
    python inside.py "Return the " --model demo/log/model_checkpoint.pt --out return.html
    python inside.py "Return True if the string is a string" --model demo/log --history

`forward` is the lesson: the whole of GPT-2 in plain matrix operations, in the order in which a
sentence passes through it. It never calls the model: it takes the weights and computes the same
logits. The values that it names are what is printed and shown.

Shapes: T tokens, C channels, H heads, D = C/H channels of a head, V vocabulary. Layers, heads and
positions count from 0.
"""

import base64
import json
import math
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from GPT_Modules import GPT
from lib.checkpoint import checkpoint_paths
from lib.cli import LocalPath, UserError, command, count, parse, print_notes
from lib.files import whole_file
from lib.pretrained import open_model
from lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class InsideConfig:
    prompt: str = ""  # text to look into (default: the end-of-text token alone)
    model: LocalPath = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: LocalPath | None = None  # gpt2, bytes, or a tokenizer.json, for a model without one
    out: LocalPath = "inside.html"  # page to write
    history: bool = False  # show every checkpoint of the run in --model, with a slider


# ---- the forward pass ----


def forward(weights: dict[str, np.ndarray], tokens: list[int], n_head: int) -> SimpleNamespace:
    """One pass of GPT-2 over a prompt. Every value is an attribute; MEANING says what each one is.

    weights: by GPT-2's names (`weights_of`). tokens: the prompt's ids, at least one and no more
    than the model has positions. n_head: H, which the weights' shapes don't reveal. The values of a
    block are in `blocks[layer]`. Row t of `logits` and of `probabilities`, each (T, V), is what
    the model expects after token t.
    """
    T, C = len(tokens), weights["wte.weight"].shape[1]
    D = C // n_head
    n_layer = sum(name.endswith("ln_1.weight") for name in weights)
    t = SimpleNamespace(blocks=[])

    t.wte = weights["wte.weight"][tokens]  # (T, C)
    t.wpe = weights["wpe.weight"][:T]  # (T, C)
    t.mask = np.tri(T, dtype=bool)  # (T, T)
    x = t.x = t.wte + t.wpe  # (T, C)

    for layer in range(n_layer):
        h = f"h.{layer}."
        b = SimpleNamespace()
        t.blocks.append(b)

        # Attention: each token gathers from itself and those before it.
        b.ln_1 = layer_norm(x, weights, h + "ln_1")  # (T, C)
        b.qkv = linear(b.ln_1, weights, h + "attn.c_attn")  # (T, 3C)
        b.q, b.k, b.v = (heads(part, n_head) for part in np.split(b.qkv, 3, axis=1))  # (H, T, D)
        b.scores = b.q @ b.k.mT / math.sqrt(D)  # (H, T, T)
        b.masked = np.where(t.mask, b.scores, -np.inf)
        b.attention = softmax(b.masked)  # (H, T, T): row t is where token t looks
        b.mixed = b.attention @ b.v  # (H, T, D)
        b.joined = b.mixed.transpose(1, 0, 2).reshape(T, C)
        b.attn = linear(b.joined, weights, h + "attn.c_proj")  # (T, C)
        x = b.x_after_attn = x + b.attn

        # The MLP: each token by itself.
        b.ln_2 = layer_norm(x, weights, h + "ln_2")  # (T, C)
        b.c_fc = linear(b.ln_2, weights, h + "mlp.c_fc")  # (T, 4C)
        b.gelu = gelu(b.c_fc)
        b.mlp = linear(b.gelu, weights, h + "mlp.c_proj")  # (T, C)
        x = b.x_after_mlp = x + b.mlp

    t.ln_f = layer_norm(x, weights, "ln_f")  # (T, C)
    t.logits = t.ln_f @ weights["wte.weight"].T  # (T, V)
    t.probabilities = softmax(t.logits)
    return t


# {a value of forward: (how it is printed, what it means)}
MEANING = {
    "wte": ("wte[tokens]", "what each token is: a table's row"),
    "wpe": ("wpe[:T]", "where it is: a row for each position"),
    "x": ("x", "their sum: the residual stream begins"),
    "ln_1": ("h.0.ln_1", "x with its size taken out"),
    "qkv": ("h.0.qkv", "three things of each token:"),
    "q": ("h.0.q", "... the query: what it looks for, in each head"),
    "k": ("h.0.k", "... the key: what it can be found by"),
    "v": ("h.0.v", "... the value: what it hands over where it is found"),
    "scores": ("h.0.scores", "how well each query fits each key"),
    "mask": ("mask", "who may look at whom: never ahead"),
    "masked": ("h.0.masked", "-inf for what is ahead"),
    "attention": ("h.0.attention", "shares: each row sums to 1"),
    "mixed": ("h.0.mixed", "the values, mixed by these shares"),
    "joined": ("h.0.joined", "the heads side by side"),
    "attn": ("h.0.attn", "what attention adds to x"),
    "x_after_attn": ("h.0.x + attn", "x after attention"),
    "ln_2": ("h.0.ln_2", "x with its size taken out again"),
    "c_fc": ("h.0.c_fc", "4 C features of each token"),
    "gelu": ("h.0.gelu", "those below zero are (almost) switched off"),
    "mlp": ("h.0.mlp", "what the MLP adds to x"),
    "x_after_mlp": ("h.0.x + mlp", "x after the block"),
    "ln_f": ("ln_f", "x with its size taken out, for the head"),
    "logits": ("logits", "how well it fits each token's row of wte"),
    "probabilities": ("probabilities", "of each token of the vocabulary to come next"),
}


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
    """Numbers of the last axis as shares of 1; subtracting the largest first keeps exp from
    overflowing."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def gelu(x):
    """x times (nearly) the probability that a normal variable is below x, by GPT-2's formula."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    """A model's weights by GPT-2's names: "wte.weight", "h.0.attn.c_attn.weight" (3C, C), ..."""
    return {name: weight.numpy() for name, weight in model.transformer.state_dict().items()}


# ---- what follows from it ----


def surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """(T,): -ln of the probability that the model gave each token, in nats; nan for the first,
    which nothing precedes. Their mean is the loss that training makes small."""
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    predicted = range(len(tokens) - 1)
    return np.array([np.nan, *(total[t] - logits[t, tokens[t + 1]] for t in predicted)])


def logit_lens(trace: SimpleNamespace, weights, n_vocab: int, first: int):
    """What the model would say if it ended after each layer: the final LayerNorm and the head,
    applied to the residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Returns the likeliest tokens and their probabilities, each (n_layer + 1, T - first) for the
    positions from `first` on; row 0 is before the first block, the last row is the output. Only
    the vocabulary's rows below n_vocab count: the others are padding.
    """
    likeliest, chances = [], []
    for x in [trace.x, *(block.x_after_mlp for block in trace.blocks)]:
        logits = layer_norm(x[first:], weights, "ln_f") @ weights["wte.weight"].T
        probabilities = softmax(logits)[:, :n_vocab]
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
    """{kind of KINDS: (T, T) bool}: the places at which a head of this kind looks, a row for each
    token from the third on (before, all kinds are the same). For "copy" they are those after
    earlier copies of the token."""
    T = len(tokens)
    same = np.equal.outer(tokens, tokens)
    after = np.zeros((T, T), dtype=bool)
    after[:, 1:] = same[:, :-1]
    masks = {
        "previous": np.eye(T, k=-1, dtype=bool),
        "first": np.arange(T) == np.zeros((T, 1)),
        "itself": np.eye(T, dtype=bool),
        "copy": after & np.tri(T, k=-1, dtype=bool),
    }
    third_on = np.arange(T)[:, None] >= 2
    return {kind: mask & third_on for kind, mask in masks.items()}


def shares(attention: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(H,): how much of each head's attention (H, T, T) goes to these places, on average over the
    tokens that have such a place; 0 if there are none."""
    rows = place.any(axis=1)
    if not rows.any():
        return np.zeros(len(attention))
    return (attention[:, rows] * place[rows]).sum(axis=2).mean(axis=1)


def head_kinds(trace: SimpleNamespace, tokens: list[int]) -> dict[tuple[int, int], tuple]:
    """{(layer, head): (kind, share)} of the heads with more than half of their attention in one
    kind of place."""
    kinds = {}
    masks = places(tokens)
    for layer, block in enumerate(trace.blocks):
        by_kind = {kind: shares(block.attention, mask) for kind, mask in masks.items()}
        for head in range(len(block.attention)):
            kind = max(by_kind, key=lambda kind: by_kind[kind][head])
            if by_kind[kind][head] > 0.5:
                kinds[layer, head] = kind, float(by_kind[kind][head])
    return kinds


def median_length(x: np.ndarray) -> float:
    """The length of a vector of x (T, C): the median over the tokens."""
    return float(np.median(np.linalg.norm(x, axis=1)))


SHOWN = 64  # tokens on the page; of a longer prompt the last ones


@dataclass(frozen=True)
class PassSummary:
    """What is printed and shown of a pass over a prompt of T tokens; the page shows those from
    `first` on, S = T - first."""

    step: int | None  # of the checkpoint, with --history
    n_prompt: int  # tokens of the whole prompt: more than T if the model's context is shorter
    tokens: list[int]  # the T that were looked at
    labels: dict[int, str]  # of every token named here
    surprise: np.ndarray  # (T,)
    first: int
    likeliest: np.ndarray  # (S, 5): the likeliest tokens after each one
    chances: np.ndarray  # (S, 5): their probabilities
    rank: np.ndarray  # (S - 1,): the place of the true next token, 1 for the likeliest
    attention: np.ndarray  # (L, H, S, S), L layers
    kinds: dict[tuple[int, int], tuple[str, float]]  # what head_kinds returns
    lens_tokens: np.ndarray  # (L + 1, S): what logit_lens returns
    lens_chances: np.ndarray  # (L + 1, S)
    lengths: np.ndarray  # (L, 3): attention's addition, the MLP's, x after both

    @property
    def mean_surprise(self) -> float | None:
        return float(np.nanmean(self.surprise)) if len(self.tokens) > 1 else None


def summarize(
    trace, weights, tokens: list[int], n_prompt: int, tokenizer: Tokenizer, step: int | None
) -> PassSummary:
    n_vocab = tokenizer.n_vocab
    first = max(0, len(tokens) - SHOWN)
    probabilities = trace.probabilities[first:, :n_vocab]
    likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    true_next = np.take_along_axis(probabilities[:-1], np.array(tokens)[first + 1 :, None], axis=1)
    lens_tokens, lens_chances = logit_lens(trace, weights, n_vocab, first)
    ids = {*tokens, *likeliest.flat, *lens_tokens.flat}
    parts = ("attn", "mlp", "x_after_mlp")
    return PassSummary(
        step=step,
        n_prompt=n_prompt,
        tokens=tokens,
        labels={int(token): label(tokenizer, int(token)) for token in ids},
        surprise=surprise(trace.logits, tokens),
        first=first,
        likeliest=likeliest,
        chances=np.take_along_axis(probabilities, likeliest, axis=1),
        rank=1 + (probabilities[:-1] > true_next).sum(axis=1),
        attention=np.array([block.attention[:, first:, first:] for block in trace.blocks]),
        kinds=head_kinds(trace, tokens),
        lens_tokens=lens_tokens,
        lens_chances=lens_chances,
        lengths=np.array([[median_length(vars(b)[part]) for part in parts] for b in trace.blocks]),
    )


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


VISIBLE = {" ": "·", "\n": "↵", "\t": "→"}


def visible(character: str) -> str:
    if character in VISIBLE:
        return VISIBLE[character]
    combining = unicodedata.category(character).startswith("M")
    if character.isprintable() and not combining:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"U+{code:04X}"


# ---- what is printed ----


def describe(summary: PassSummary, trace: SimpleNamespace) -> str:
    """The pass in words: the tokens, each step of the first block, what comes next, surprises."""
    T, n_layer = len(summary.tokens), len(trace.blocks)
    names = [summary.labels[token] for token in summary.tokens]
    lines = []
    if summary.n_prompt > T:
        text = f"the prompt has {summary.n_prompt:,} tokens, and the model's context is {T:,}"
        lines += [f"{text}: only the last {T:,} are looked at", ""]
    lines += [f"{count(T, 'token')}, each with its id:", "", " "]
    for name, token in zip(names, summary.tokens, strict=True):
        if len(lines[-1]) + len(name) > 88:
            lines.append(" ")
        lines[-1] += f" {name} {token} "

    lines += ["", "the forward pass, step by step:", ""]
    values = vars(trace) | vars(trace.blocks[0])
    for name, (printed, meaning) in MEANING.items():
        shape = str(values[name].shape).replace(",)", ")")
        lines.append(f"  {printed:15} {shape:16} {meaning}")
        if name == "x_after_mlp" and n_layer > 1:
            lines.append(f"  {'...':32} the same in {count(n_layer - 1, 'more block')}")

    lines += ["", "the likeliest next tokens:", ""]
    for token, chance in zip(summary.likeliest[-1], summary.chances[-1], strict=True):
        lines.append(f"  {summary.labels[token]:14} {chance:7.2%}  {bar(chance, 1)}")

    lines += ["", "how surprising each token was, in nats (-ln of its probability):", ""]
    lines.append(f"  {names[0]:14}       the first: nothing is before it")
    for name, nats in zip(names[1:], summary.surprise[1:], strict=True):
        lines.append(f"  {name:14} {nats:7.2f}  {bar(nats, 16)}")
    if T > 1:
        lines.append(f"  {'mean':14} {summary.mean_surprise:7.2f}")

    if summary.kinds:
        lines += ["", "heads with more than half of their attention in one place (layer.head):", ""]
    for kind, place in KINDS.items():
        of_kind = {head: share for head, (k, share) in summary.kinds.items() if k == kind}
        text = ", ".join(f"{layer}.{head} {share:.0%}" for (layer, head), share in of_kind.items())
        lines += [f"  {place}: {text}"] if text else []
    return "\n".join(line.rstrip() for line in lines)


def describe_history(passes: list[PassSummary], skipped: list[str]) -> str:
    """The prompt's mean surprise at each checkpoint, and the checkpoints that can't be shown."""
    lines = ["", f"{count(len(passes), 'checkpoint')}, and the prompt's mean surprise at each:", ""]
    for summary in passes:
        mean = summary.mean_surprise
        surprise = "" if mean is None else f"{mean:7.2f}  {bar(mean, 16)}"
        lines.append(f"  step {summary.step:<9,} {surprise}".rstrip())
    return "\n".join(lines + [f"  skipped: {reason}" for reason in skipped])


def bar(value: float, whole: float) -> str:
    return "#" * min(40, round(40 * value / whole))


# ---- the page ----

TEMPLATE = Path(__file__).parent / "lib" / "inside.html"


def page(passes: list[PassSummary], skipped: list[str], facts: dict) -> str:
    """The page as one HTML file: the template with the numbers as JSON in it.

    facts: model, prompt, about (of both, in a sentence) and n_vocab.
    """
    last = passes[-1]
    n_layer, n_head = last.attention.shape[:2]
    data = facts | {
        "n_layer": n_layer,
        "n_head": n_head,
        "kinds": KINDS,
        "tokens": last.tokens[last.first :],
        "labels": {id: name for summary in passes for id, name in summary.labels.items()},
        "passes": [numbers(summary) for summary in passes],
        "skipped": skipped,
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a prompt may have </script> in it
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)


def numbers(summary: PassSummary) -> dict:
    """A pass as plain data. Attention is one byte a number, 255 for a share of 1, of the places at
    or before each token only: those of token 0, then the two of token 1, ..."""
    rows, columns = np.tril_indices(summary.attention.shape[2])
    maps = np.round(255 * summary.attention[:, :, rows, columns]).astype(np.uint8)

    def rounded(values):
        return np.round(np.asarray(values, dtype=float), 6).tolist()

    surprise = rounded(summary.surprise[summary.first :])
    return {
        "step": summary.step,
        "mean": summary.mean_surprise,
        "surprise": [None, *surprise[1:]] if summary.first == 0 else surprise,
        "likeliest": summary.likeliest.tolist(),
        "chances": rounded(summary.chances),
        "rank": summary.rank.tolist(),
        "attention": base64.b64encode(maps.tobytes()).decode(),
        "kinds": {f"{i}.{j}": [kind, share] for (i, j), (kind, share) in summary.kinds.items()},
        "lens": summary.lens_tokens.T.tolist(),  # (S, L + 1): a row for each token
        "lens_chances": rounded(summary.lens_chances.T),
        "lengths": rounded(summary.lengths),
    }


# ---- the command ----


@command
def main(argv=None) -> int:
    config = parse(InsideConfig, argv, __doc__, positional="prompt")
    check_out(config.out)
    passes, skipped = [], []
    for step, name in models(config):
        try:
            summary, trace, facts = look_into(config, name, step)
        except UserError as error:
            if not config.history:
                raise
            skipped.append(str(error))
        else:
            passes.append(summary)
    if not passes:
        raise UserError("\n".join([f"no checkpoint in {config.model} is good:", *skipped]))

    print(describe(passes[-1], trace))
    if config.history:
        print(describe_history(passes, skipped))
    with whole_file(config.out) as file:
        file.write(page(passes, skipped, facts).encode())
    print(f"\nsaved {config.out}")
    return 0


def look_into(config: InsideConfig, name: str, step: int | None):
    """(summary of a pass, all its values, what the page says of model and prompt)."""
    loaded = open_model(name, config.tokenizer)
    print_notes(loaded.notes)
    model = loaded.model
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode_prompt(config.prompt) or [tokenizer.eot_token]
    tokens = prompt[-model.config.block_size :]
    weights = weights_of(model)
    trace = forward(weights, tokens, model.config.n_head)
    if not np.isfinite(trace.logits).all():
        raise UserError(f"{name}: its logits are not finite", code=1)
    shape = model.config
    about = [
        f"{count(shape.n_layer, 'layer')} of {count(shape.n_head, 'head')}",
        count(shape.n_embd, "channel"),
        count(sum(weight.size for weight in weights.values()), "parameter"),
        *(["bytes as tokens"] if tokenizer.unit == "byte" else []),
        f"a prompt of {count(len(prompt), 'token')}",
    ]
    shown = min(len(tokens), SHOWN)
    if shown < len(prompt):
        about.append(f"of which this page shows the last {shown}")
    facts = {
        "model": config.model,
        "prompt": config.prompt,
        "about": ", ".join(about),
        "n_vocab": tokenizer.n_vocab,
    }
    return summarize(trace, weights, tokens, len(prompt), tokenizer, step), trace, facts


def models(config: InsideConfig) -> list[tuple[int | None, str]]:
    """(step, what open_model takes) of the model, or of each checkpoint of its run."""
    if not config.history:
        return [(None, config.model)]
    paths = checkpoint_paths(config.model)
    if not paths:
        raise UserError(
            f"--history: there are no checkpoints in {config.model}; give --model the log directory"
            " of a run, as in --model demo/log"
        )
    return [(step, str(path)) for step, path in sorted(paths.items())]


def check_out(out: str) -> None:
    path = Path(out)
    if path.suffix.lower() != ".html":
        raise UserError(f"--out {out}: the page is HTML, so its name must end in .html")
    if path.is_dir():
        raise UserError(f"--out {out} is a directory: give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {path.parent}")


if __name__ == "__main__":
    sys.exit(main())
