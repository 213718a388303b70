"""Sampling: a prompt in, text out.

python sample.py "Hello, I'm a language model," --model log/model_checkpoint.pt
python sample.py --model gpt2 --prompt_file prompt.txt --num_samples 1 --temperature 0.8
echo "def main():" | python sample.py - --model demo/log/model_checkpoint.pt
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from GPT_Modules import GPT
from lib.checkpoint import load_model
from lib.cli import PositiveInt, UserError, command, parse
from lib.ranks import choose_device
from lib.tokenizer import PROMPT, get_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    # the prompt
    prompt: str = (
        ""  # text to continue; - reads standard input; without one the model begins a document
    )
    prompt_file: str | None = None  # file with the text to continue
    # the model
    model: str = "log/model_checkpoint.pt"  # a checkpoint, an exported folder, or gpt2, gpt2-medium ... from the Hub
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    # the text
    num_samples: PositiveInt = 4  # texts to write
    max_new_tokens: PositiveInt = 64  # length of a text in tokens, unless the document ends before
    temperature: float = 1.0  # below 1 more predictable, 0 always the likeliest token
    top_k: int = 50  # choose among the so many likeliest tokens; 0: among all
    seed: int = 42  # the same seed gives the same text


def stream_text(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str,
    max_new_tokens: int,
    temperature=1.0,
    top_k=50,
    seed=42,
):
    """Yield the continuation of a prompt piece by piece, until max_new_tokens or the end of the
    document."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    idx = torch.tensor([tokens], device=device)  # (1, T)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    for token in model.stream(
        idx, max_new_tokens, temperature, top_k or None, generator, encoding.n_vocab
    ):
        if token.item() == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token.item()))
    yield decoder.decode(b"", final=True)


def show_samples(model: GPT, encoding: tiktoken.Encoding, autocast) -> str:
    """Two texts of a model in training, ready to print."""
    prompt, length, texts = PROMPT[encoding.name], 64 if encoding.name == "gpt2" else 256, []
    for seed in (42, 43):
        with autocast:
            text = prompt + "".join(
                stream_text(model, encoding, prompt, length, temperature=0.8, seed=seed)
            )
        texts.append("  sample\n  > " + printable(text).replace("\n", "\n  > "))
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
    model, tokenizer = load_model(config.model, choose_device(config.device))
    encoding = get_tokenizer(tokenizer)
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {number + 1} of {config.num_samples}")
        print(prompt, end="", flush=True)
        options = config.max_new_tokens, config.temperature, config.top_k, config.seed + number
        for piece in stream_text(model, encoding, prompt, *options):
            print(piece, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
