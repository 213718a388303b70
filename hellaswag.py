"""HellaSwag (Zellers et al. 2019): which of four endings goes with a context?

    python hellaswag.py --model log/model_checkpoint.pt      10,042 validation examples of the Hub
    python hellaswag.py --model gpt2 --style harness         as lm-evaluation-harness computes it
    python hellaswag.py --model GPT124M --data hellaswag_val.jsonl --limit 1000 --device cpu

The model picks the ending whose tokens it finds likeliest. There are two usual ways of computing
that, and the same weights get different numbers (GPT-2 124M: acc_norm 0.2955 and 0.3114), so every
result here names its style.

Shapes: B rows in a batch, T tokens in a row, M predicted tokens in a batch, C channels, V
vocabulary.
"""

import codecs
import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from GPT_Modules import GPT
from lib.cli import LocalPath, PositiveInt, UserError, command, one_line_error, parse, print_notes
from lib.device import changing_shapes, choose_device
from lib.pretrained import open_model
from lib.tokenizer import Tokenizer

VALIDATION_EXAMPLES = 10_042
# fields of an example that a style reads, beside endings and label
FIELDS = {"completion": ("ctx",), "harness": ("activity_label", "ctx_a", "ctx_b")}
# OpenAI's GPT-2 124M: (acc, acc_norm) as published by build-nanogpt and by lm-evaluation-harness
GPT2 = {"completion": (0.2859, 0.2955), "harness": (0.2892, 0.3114)}


@dataclass(frozen=True)
class HellaSwagConfig:
    # what to score
    model: LocalPath = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: LocalPath | None = None  # gpt2, bytes, or a tokenizer.json, for a model without one
    data: LocalPath | None = None  # .jsonl file in HellaSwag's own format (default: from the Hub)
    limit: PositiveInt | None = None  # score only the first N examples
    # how
    style: Literal["completion", "harness"] = "completion"  # by tokens, or as the harness does it
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute


# ---- examples ----


def load_examples(path: str | None = None, style: str = "completion") -> list[dict]:
    """The examples of a .jsonl file; without one the validation set from the Hub, which `datasets`
    fetches once, whichever rank comes first.

    Raises UserError naming the line of a bad example, or if the data is not available.
    """
    where = path or "Rowan/hellaswag"
    examples = []
    found = read_examples(path) if path else fetch_examples()
    for number, example in enumerate(found, start=1):
        try:
            if isinstance(example, bytes):
                if not example.strip():
                    continue
                example = json.loads(example.decode())
            examples.append(check_example(example, style))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, line {number}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {error}") from None
    if not examples:
        raise UserError(f"{where} has no examples")
    return examples


def read_examples(path: str) -> list[bytes]:
    """The lines of a file."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"the HellaSwag file {path} can't be read: {error.strerror}") from None


def fetch_examples() -> Iterable[dict]:
    import datasets

    hint = (
        "HINT: give a .jsonl file (--data, in train.py --hellaswag_data), or switch it off"
        " (in train.py --hellaswag_every 0)"
    )
    try:
        examples = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # the Hub's errors are of many kinds, some of libraries below it
        raise UserError(
            f"HellaSwag can't be fetched from the Hub: {one_line_error(error)}\n{hint}"
        ) from None
    if len(examples) != VALIDATION_EXAMPLES:
        raise UserError(
            f"HellaSwag from the Hub has {len(examples)} examples instead of "
            f"{VALIDATION_EXAMPLES}\n{hint}"
        )
    return examples


def check_example(example: dict, style: str) -> dict:
    """The example with its label as a number; raises ValueError for one that can't be used."""
    if not isinstance(example, dict):
        raise ValueError("not an object {...}")
    if missing := [name for name in (*FIELDS[style], "endings", "label") if name not in example]:
        raise ValueError(f"{', '.join(missing)} missing")
    for name in FIELDS[style]:
        if not isinstance(example[name], str):
            raise ValueError(f"{name} is {example[name]!r}, not a text")
    if style == "completion" and not example["ctx"]:
        raise ValueError("ctx is empty")
    endings = example["endings"]
    if (
        not isinstance(endings, list)
        or len(endings) != 4
        or not all(isinstance(e, str) and e for e in endings)
    ):
        raise ValueError(f"endings is {endings!r}, not a list of four texts")
    if str(example["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"label is {example['label']!r}, not one of 0, 1, 2, 3")
    return example | {"label": int(example["label"])}


# ---- tokens ----


def encode_choice(example: dict, ending: str, tokenizer: Tokenizer, style: str):
    """(tokens of the context, tokens of one of its endings, length by which acc_norm divides the
    ending's loss: its tokens, or its characters)."""
    if style == "completion":
        tokens = tokenizer.encode(" " + ending)
        return tokenizer.encode(example["ctx"]), tokens, len(tokens)
    ctx_b = example["ctx_b"].capitalize()
    context = tidy(f"{example['activity_label']}: {example['ctx_a']} {ctx_b}")
    ending = tidy(ending)
    whole = tokenizer.encode(context + " " + ending)
    split = len(tokenizer.encode(context.rstrip()))
    return whole[:split], whole[split:], max(1, len(ending))


def tidy(text: str) -> str:
    """Text as lm-evaluation-harness cleans it: without WikiHow's marks, double spaces replaced in
    one pass."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True)
class Row:
    """A context and one of its endings, cut on the left to what fits into the model."""

    tokens: list[int]  # all but the last are inputs
    scored: int  # how many at the end are the ending's
    number: int  # of the ending: 4 x example + choice


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right, where causal attention never looks."""

    idx: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T): the tokens of the endings, -1 elsewhere
    endings: torch.Tensor  # (B,): their numbers


@dataclass(frozen=True)
class Questions:
    """Examples as tensors, ready for every evaluation of a run."""

    batches: list[Batch]
    labels: np.ndarray  # (n,): the right ending of each example
    lengths: np.ndarray  # (n, 4): by which acc_norm divides the loss of each ending
    n_vocab: int  # tokens; the rows that pad lm_head stay out of the softmax


def prepare(
    examples: list[dict], tokenizer: Tokenizer, style: str, block_size: int, batch_tokens: int
) -> Questions:
    """Tokenize examples, one row per ending, in batches of about batch_tokens tokens."""
    rows = []
    lengths = np.ones((len(examples), 4))
    for number, example in enumerate(examples):
        for choice, ending in enumerate(example["endings"]):
            context, answer, length = encode_choice(example, ending, tokenizer, style)
            tokens = ((context or [tokenizer.eot_token]) + answer)[-(block_size + 1) :]
            scored = min(len(answer), len(tokens) - 1)
            lengths[number, choice] = length if style == "harness" else scored
            rows.append(Row(tokens, scored, 4 * number + choice))
    rows.sort(key=lambda row: len(row.tokens))
    batches = []
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end - start + 1) * len(rows[end].tokens) > batch_tokens:
            batches.append(collate(rows[start:end]))
            start = end
    labels = np.array([example["label"] for example in examples])
    return Questions(batches, labels, lengths, tokenizer.n_vocab)


def collate(rows: list[Row]) -> Batch:
    T = max(len(row.tokens) for row in rows) - 1
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), -1)
    for b, row in enumerate(rows):
        n = len(row.tokens) - 1
        idx[b, :n] = torch.tensor(row.tokens[:-1])
        targets[b, n - row.scored : n] = torch.tensor(row.tokens[n + 1 - row.scored :])
    return Batch(idx, targets, torch.tensor([row.number for row in rows]))


# ---- scores ----


@torch.no_grad()
def ending_losses(model: GPT, questions: Questions, batches: Iterable[Batch]) -> np.ndarray:
    """Summed loss of each ending in nats, (n, 4).

    batches: `questions.batches`, possibly wrapped in a progress bar or in an iterator that stops on
    a signal. The head is computed where an ending is predicted, nowhere else.
    """
    device = model.lm_head.weight.device
    head = model.lm_head.weight[: questions.n_vocab]  # (V, C)
    at_a_time = 2**26 // questions.n_vocab  # predictions whose logits are in memory at once
    sums = torch.zeros(4 * len(questions.labels), device=device)
    for batch in batches:
        endings = batch.endings.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        b, t = (targets >= 0).nonzero(as_tuple=True)  # (M,) each: where an ending is predicted
        with changing_shapes():
            hidden = model.hidden(batch.idx.to(device, non_blocking=True))[b, t]  # (M, C)
        for i in range(0, len(b), at_a_time):
            part = slice(i, i + at_a_time)
            logits = F.linear(hidden[part], head).float()  # (at_a_time, V)
            losses = F.cross_entropy(logits, targets[b[part], t[part]], reduction="none")
            sums.index_add_(0, endings[b[part]], losses)
    return sums.view(len(questions.labels), 4).cpu().double().numpy()


def count_right(questions: Questions, losses: np.ndarray) -> tuple[int, int]:
    """(right by summed loss, right by loss per token or character) of the losses (n, 4).

    Of equal losses the first ending wins.
    """
    right = losses.argmin(axis=1) == questions.labels
    right_norm = (losses / questions.lengths).argmin(axis=1) == questions.labels
    return int(right.sum()), int(right_norm.sum())


def questions_of_rank(
    examples: list[dict], tokenizer: Tokenizer, block_size: int, ranks, most_tokens: int
) -> Questions:
    """This rank's share of the examples, ready to be scored in training.

    most_tokens: upper limit for the tokens in a batch.
    """
    mine = examples[ranks.rank :: ranks.world_size]
    batch_tokens = min(most_tokens, tokens_in_a_batch(ranks.device))
    return prepare(mine, tokenizer, "completion", block_size, batch_tokens)


def score(model: GPT, questions: Questions, n: int, ranks, autocast) -> float:
    """acc_norm over the n examples of all ranks, of which `questions` are this rank's share.

    On a CPU always in float32. Raises Stopped.
    """
    with autocast if ranks.device.type != "cpu" else contextlib.nullcontext():
        losses = ending_losses(model, questions, ranks.until_stopped(questions.batches))
    _, right_norm = count_right(questions, losses)
    return ranks.sum(torch.tensor(right_norm, device=ranks.device)).item() / n


def tokens_in_a_batch(device: torch.device) -> int:
    """Many for a GPU, few for the caches of a CPU."""
    return 2**16 if device.type == "cuda" else 2**11


@command
def main(argv=None) -> int:
    config = parse(HellaSwagConfig, argv, __doc__)
    device = choose_device(config.device)
    loaded = open_model(config.model, config.tokenizer)
    print_notes(loaded.notes)
    model = loaded.model.to(device)
    tokenizer = loaded.tokenizer
    examples = load_examples(config.data, config.style)[: config.limit]
    block_size = model.config.block_size
    questions = prepare(examples, tokenizer, config.style, block_size, tokens_in_a_batch(device))
    watched = tqdm(questions.batches, "hellaswag", unit=" batches")
    right, right_norm = count_right(questions, ending_losses(model, questions, watched))
    n = len(examples)
    acc = right / n
    acc_norm = right_norm / n
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / max(1, n - 1))
    gpt2_acc, gpt2_norm = GPT2[config.style]
    print(f"style {config.style}, {n:,} examples       acc      acc_norm")
    print(f"{config.model[-32:]:32s} {acc:8.4f}  {acc_norm:8.4f} +- {stderr:.4f}")
    print(f"{'GPT-2 124M, published':32s} {gpt2_acc:8.4f}  {gpt2_norm:8.4f}")
    print(
        f"hellaswag style={config.style} n={n} acc={acc:.4f} acc_norm={acc_norm:.4f} "
        f"stderr={stderr:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
