"""Sampling: a prompt in, text out.

python sample.py "Hello, I'm a language model," --model log/model_checkpoint.pt
python sample.py --model gpt2 --prompt_file prompt.txt --num_samples 1 --temperature 0.8
echo "def main():" | python sample.py - --model demo/log/model_checkpoint.pt
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from GPT_Modules import GPT
from lib.checkpoint import load_model
from lib.cli import PositiveInt, UserError, command, parse
from lib.device import changing_shapes, choose_device
from lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    # the prompt
    prompt: str = ""  # text to continue; - reads standard input; none: begin a document
    prompt_file: str | None = None  # file with the text to continue
    # the model
    model: str = "log/model_checkpoint.pt"  # a checkpoint, a model's folder, or gpt2 ... of the Hub
    tokenizer: str | None = None  # for a model that brings none: gpt2, or a tokenizer.json
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    # the text
    num_samples: PositiveInt = 4  # texts to write
    max_new_tokens: PositiveInt = 64  # length of a text in tokens, unless the document ends before
    temperature: float = 1.0  # below 1 more predictable, 0 always the likeliest token
    top_k: int = 50  # choose among the so many likeliest tokens; 0: among all
    seed: int = 42  # the same seed gives the same text


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature=1.0,
    top_k=50,
    seed=42,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, until max_new_tokens or the end of the
    document."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = tokenizer.encode_prompt(prompt) or [tokenizer.eot_token]
    idx = torch.tensor([tokens], device=device)  # (1, T)
    decoder = tokenizer.decoder()
    with changing_shapes():
        for token in model.stream(
            idx, max_new_tokens, temperature, top_k or None, generator, tokenizer.n_vocab
        ):
            if token.item() == tokenizer.eot_token:
                break
            yield decoder.step(token.item())
    yield decoder.end()


def show_samples(model: GPT, tokenizer: Tokenizer, autocast) -> str:
    """Two texts of a model in training, ready to print."""
    length = 256 if tokenizer.unit == "byte" else 64
    texts = []
    for seed in (42, 43):
        with autocast:
            pieces = list(stream_text(model, tokenizer, tokenizer.prompt, length, 0.8, seed=seed))
        text = printable(tokenizer.prompt + "".join(pieces)).replace("\n", "\n  > ")
        texts.append(f"  sample\n  > {text}")
    return "\n".join(texts)


def printable(text: str) -> str:
    """The text with a replacement character for each control code."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


@command
def main(argv=None) -> int:
    config = parse(SampleConfig, argv, __doc__, positional="prompt")
    if config.prompt_file and config.prompt:
        raise UserError("give a prompt or --prompt_file, not both")
    try:
        prompt = config.prompt
        if config.prompt_file:
            prompt = Path(config.prompt_file).read_text(encoding="utf-8")
        elif prompt == "-":
            prompt = sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the prompt {config.prompt_file or '-'} can't be read as UTF-8 text: {error}"
        ) from None
    model, tokenizer = load_model(config.model, choose_device(config.device), config.tokenizer)
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {number + 1} of {config.num_samples}")
        print(prompt, end="", flush=True)
        options = config.max_new_tokens, config.temperature, config.top_k, config.seed + number
        for piece in stream_text(model, tokenizer, prompt, *options):
            print(piece, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
