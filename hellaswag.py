"""HellaSwag (Zellers et al. 2019): which of four endings goes with a context?

    python hellaswag.py --model log/model_checkpoint.pt                 10,042 validation examples from the Hub
    python hellaswag.py --model gpt2 --style harness                    as lm-evaluation-harness computes it
    python hellaswag.py --model GPT124M --data hellaswag_val.jsonl --limit 1000 --device cpu

The model picks the ending whose tokens it finds likeliest. There are two usual ways of computing
that, and the same weights get different numbers (GPT-2 124M: acc_norm 0.2955 and 0.3114), so every
result here names its style.

Shapes: B rows in a batch, T tokens in a row, M predicted tokens in a batch, C channels, V
vocabulary.
"""

import contextlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from GPT_Modules import GPT
from lib.checkpoint import load_model
from lib.cli import PositiveInt, UserError, command, first_line, parse
from lib.ranks import choose_device
from lib.tokenizer import get_tokenizer

VALIDATION_EXAMPLES = 10_042
FIELDS = {
    "completion": ("ctx",),
    "harness": ("activity_label", "ctx_a", "ctx_b"),
}  # beside endings and label
# OpenAI's GPT-2 124M: (acc, acc_norm) as published by build-nanogpt and by lm-evaluation-harness
GPT2 = {"completion": (0.2859, 0.2955), "harness": (0.2892, 0.3114)}


@dataclass(frozen=True)
class HellaSwagConfig:
    # what to score
    model: str = "log/model_checkpoint.pt"  # a checkpoint, an exported folder, or gpt2, gpt2-medium ... from the Hub
    data: str | None = (
        None  # .jsonl file of examples in the original format (default: from the Hub)
    )
    limit: PositiveInt | None = None  # only the first so many examples
    # how
    style: Literal["completion", "harness"] = (
        "completion"  # raw text by tokens, or lm-evaluation-harness's way
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute


# ---- examples ----


def load_examples(path: str | None = None, style: str = "completion") -> list[dict]:
    """The examples of a .jsonl file, or the validation set from the Hub (`datasets` fetches it
    once, whichever rank comes first, and keeps it). Raises UserError naming the line of a bad
    example, or if the data can't be had."""
    if path is None:
        where, examples = "Rowan/hellaswag", fetch_examples()
        lines = enumerate(examples, start=1)
    else:
        where = path
        try:
            lines = [
                (n, line)
                for n, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1)
                if line.strip()
            ]
        except OSError as error:
            raise UserError(f"the HellaSwag file {path} can't be read: {error.strerror}") from None
    examples = []
    for number, line in lines:
        try:
            examples.append(check_example(json.loads(line.decode()) if path else line, style))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, line {number}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {error}") from None
    if not examples:
        raise UserError(f"{where} has no examples")
    return examples


def fetch_examples():
    import datasets

    hint = (
        "HINT: give a .jsonl file (--data, in train.py --hellaswag_data), or switch it off (in train.py"
        " --hellaswag_every 0)"
    )
    try:
        examples = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except Exception as error:  # the Hub's errors are of many kinds, some of libraries below it
        raise UserError(
            f"HellaSwag can't be fetched from the Hub: {first_line(error)}\n{hint}"
        ) from None
    if len(examples) != VALIDATION_EXAMPLES:
        raise UserError(
            f"HellaSwag from the Hub has {len(examples)} examples instead of {VALIDATION_EXAMPLES}\n{hint}"
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


def encode_choice(
    example: dict, ending: str, encoding: tiktoken.Encoding, style: str
) -> tuple[list, list, int]:
    """(tokens of the context, tokens of the ending, length by which acc_norm divides) of one
    choice."""
    if style == "completion":
        tokens = encoding.encode_ordinary(" " + ending)
        return encoding.encode_ordinary(example["ctx"]), tokens, len(tokens)
    context = tidy(
        f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    )
    ending = tidy(ending)
    whole = encoding.encode_ordinary(context + " " + ending)
    split = len(encoding.encode_ordinary(context.rstrip()))
    return whole[:split], whole[split:], max(1, len(ending))


def tidy(text: str) -> str:
    """Text as lm-evaluation-harness cleans it: without WikiHow's marks, double spaces replaced in
    one pass."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True)
class Questions:
    """Examples as tensors: batches for `losses`, and for each example its label and the lengths of
    its four endings."""

    batches: list[dict[str, torch.Tensor]]
    labels: np.ndarray  # (n,)
    lengths: np.ndarray  # (n, 4)
    n_vocab: int  # tokens; the rows that pad lm_head stay out of the softmax


def prepare(
    examples: list[dict],
    encoding: tiktoken.Encoding,
    style: str,
    block_size: int,
    token_budget: int,
) -> Questions:
    """Tokenize examples, once for all evaluations of a run.

    The four endings of an example share its context, so one row of tokens holds the context once
    and the endings after it. Each ending has the positions that follow the context, and a mask
    hides the other endings from it:

        row        c0 c1 c2 | a0 a1 | b0 | d0 d1 d2 | e0        context of 3 tokens, endings of 3, 2, 4 and 2
        position    0  1  2 |  3  4 |  3 |  3  4  5 |  3        the last token of an ending is predicted, never read
        part        0  0  0 |  1  1 |  2 |  3  3  3 |  4        a token sees those before it of part 0 and of its own

    c2 predicts the first token of each ending, a0 the second of the first ending, and so on. Tokens
    that don't fit into block_size are cut on the left. Rows of similar length share a batch of
    about token_budget tokens.
    """
    rows, lengths = [], np.ones((len(examples), 4))
    for number, example in enumerate(examples):
        contexts = {}
        for choice, ending in enumerate(example["endings"]):
            context, tokens, length = encode_choice(example, ending, encoding, style)
            whole, tokens = context + tokens, tokens[-block_size:]
            context = tuple(
                whole[-(block_size + 1) : -len(tokens)]
            )  # all but the last token are inputs
            lengths[number, choice] = length if style == "harness" else len(tokens)
            contexts.setdefault(context, []).append((4 * number + choice, tokens))
        rows += contexts.items()
    rows.sort(key=row_length)
    batches, start = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end - start + 1) * row_length(rows[end]) > token_budget:
            batches.append(collate(rows[start:end]))
            start = end
    return Questions(
        batches, np.array([example["label"] for example in examples]), lengths, encoding.n_vocab
    )


def row_length(row) -> int:
    context, endings = row
    return len(context) + sum(len(tokens) - 1 for _, tokens in endings)


def collate(rows) -> dict[str, torch.Tensor]:
    """Rows of (context, [(slot, ending), ...]) as one batch. The slot of an ending is 4 x example +
    choice."""
    B, T = len(rows), max(map(row_length, rows))
    idx, pos, part = (np.zeros((B, T), dtype=np.int64) for _ in range(3))
    part[:] = 5  # padding, which no token of the others sees
    where, targets, slots = (
        [],
        [],
        [],
    )  # (M,) for each predicted token: its place in the B x T outputs, id, and ending
    for b, (context, endings) in enumerate(rows):
        n = len(context)
        idx[b, :n], pos[b, :n], part[b, :n] = context, range(n), 0
        last, start = b * T + n - 1, n
        for k, (slot, tokens) in enumerate(endings, start=1):
            end = start + len(tokens) - 1  # the last token is only a target
            idx[b, start:end], pos[b, start:end], part[b, start:end] = (
                tokens[:-1],
                range(n, n + end - start),
                k,
            )
            where += [last, *range(b * T + start, b * T + end)]
            targets += tokens
            slots += [slot] * len(tokens)
            start = end
    arrays = {
        "idx": idx,
        "pos": pos,
        "part": part,
        "where": where,
        "targets": targets,
        "slots": slots,
    }
    return {name: torch.as_tensor(np.asarray(array)) for name, array in arrays.items()}


# ---- scores ----


@torch.no_grad()
def losses(model: GPT, questions: Questions, batches=None) -> np.ndarray:
    """Summed loss of each ending in nats, (n, 4). The head is computed where an ending is
    predicted, nowhere else.

    batches: the same, from an iterator that shows progress or stops early (default:
    questions.batches).
    """
    device = model.lm_head.weight.device
    sums = torch.zeros(4 * len(questions.labels), device=device)
    for batch in batches or questions.batches:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        part, T = batch["part"], batch["part"].size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        mask = causal & (
            (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        )  # (B, T, T)
        hidden = model.hidden(batch["idx"], batch["pos"], mask[:, None])  # (B, T, C)
        hidden = hidden.flatten(0, 1)[batch["where"]]  # (M, C)
        head = model.lm_head.weight[: questions.n_vocab]  # (V, C)
        rows = 2**26 // questions.n_vocab
        for i in range(0, len(hidden), rows):  # (rows, V) logits at a time
            logits = F.linear(hidden[i : i + rows], head).float()
            loss = F.cross_entropy(logits, batch["targets"][i : i + rows], reduction="none")
            sums.index_add_(0, batch["slots"][i : i + rows], loss)
    return sums.view(len(questions.labels), 4).cpu().double().numpy()


def count_right(questions: Questions, sums: np.ndarray) -> tuple[int, int]:
    """(right by summed loss, right by loss per token or character); of equal scores the first
    ending wins."""
    right = sums.argmin(axis=1) == questions.labels
    right_norm = (sums / questions.lengths).argmin(axis=1) == questions.labels
    return int(right.sum()), int(right_norm.sum())


def share_out(
    examples: list[dict], encoding: tiktoken.Encoding, block_size: int, ranks
) -> Questions:
    """This rank's share of the examples, ready to be scored in training."""
    mine = examples[ranks.rank :: ranks.world_size]
    return prepare(mine, encoding, "completion", block_size, token_budget(ranks.device))


def score(model: GPT, questions: Questions, n: int, ranks, autocast) -> float | None:
    """acc_norm over the n examples of all ranks, of which `questions` are this rank's share; None
    if a signal came meanwhile. On a CPU always in float32."""
    with autocast if ranks.device.type != "cpu" else contextlib.nullcontext():
        sums = losses(model, questions, ranks.until_stopped(questions.batches))
    if ranks.stopping():
        return None
    _, right_norm = count_right(questions, sums)
    return ranks.sum(torch.tensor(right_norm, device=ranks.device)).item() / n


def token_budget(device: torch.device) -> int:
    """Tokens of a batch: many for a GPU, few for the caches of a CPU."""
    return 2**16 if device.type == "cuda" else 2**11


@command
def main(argv=None) -> int:
    config = parse(HellaSwagConfig, argv, __doc__)
    device = choose_device(config.device)
    model, tokenizer = load_model(config.model, device)
    examples = load_examples(config.data, config.style)[: config.limit]
    questions = prepare(
        examples,
        get_tokenizer(tokenizer),
        config.style,
        model.config.block_size,
        token_budget(device),
    )
    watched = tqdm(questions.batches, "hellaswag", unit=" batches")
    right, right_norm = count_right(questions, losses(model, questions, watched))
    n = len(examples)
    acc, acc_norm = right / n, right_norm / n
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / max(1, n - 1))
    gpt2_acc, gpt2_norm = GPT2[config.style]
    print(f"style {config.style}, {n:,} examples       acc      acc_norm")
    print(f"{config.model[-32:]:32s} {acc:8.4f}  {acc_norm:8.4f} +- {stderr:.4f}")
    print(f"{'GPT-2 124M, published':32s} {gpt2_acc:8.4f}  {gpt2_norm:8.4f}")
    print(
        f"hellaswag style={config.style} n={n} acc={acc:.4f} acc_norm={acc_norm:.4f} stderr={stderr:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
