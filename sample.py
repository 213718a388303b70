"""Sampling: a prompt in, text out.

python sample.py "Hello, I'm a language model," --model log/model_checkpoint.pt
python sample.py --model gpt2 --prompt_file prompt.txt --num_samples 1 --temperature 0.8
echo "def main():" | python sample.py - --model demo/log/model_checkpoint.pt
python sample.py --chat "What is the capital of France?" --model GPT124M-sft
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from GPT_Modules import GPT
from lib.cli import LocalPath, PositiveInt, UserError, command, one_line_error, parse, print_notes
from lib.device import changing_shapes, choose_device
from lib.pretrained import open_model
from lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    # the prompt
    prompt: str = ""  # text to continue; - reads standard input; without one a document begins
    prompt_file: LocalPath | None = None  # file with the text to continue
    chat: bool = False  # answer the prompt, as the chat template of the model's folder puts it
    # the model
    model: LocalPath = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: LocalPath | None = None  # gpt2, bytes, or a tokenizer.json, for a model without one
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    # the text
    num_samples: PositiveInt = 4  # texts to write
    max_new_tokens: PositiveInt = 64  # length of a text in tokens, unless the document ends before
    temperature: float = 1.0  # below 1 more predictable, 0 always the likeliest token
    top_k: int = 50  # choose among this many of the likeliest tokens; 0: among all
    seed: int = 42  # the same seed gives the same text


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn from a model: see SampleConfig."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 42


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece, until max_new_tokens or the end of the
    document."""
    device = model.lm_head.weight.device
    prompt_tokens = tokenizer.encode_prompt(prompt)
    tokens = prompt_tokens or [tokenizer.eot_token]  # without a prompt a document begins
    stream = model.stream(
        torch.tensor([tokens], device=device),  # (1, T)
        sampling.max_new_tokens,
        sampling.temperature,
        sampling.top_k or None,
        torch.Generator(device).manual_seed(sampling.seed),
        tokenizer.n_vocab,
    )
    decoder = tokenizer.decoder(prompt_tokens)
    with changing_shapes():
        for token in stream:
            if token.item() == tokenizer.eot_token:
                break
            yield decoder.step(token.item())
    yield decoder.end()


def chat_prompt(tokenizer: Tokenizer, message: str, model_name: str) -> str:
    """A user's message in the tokenizer's chat template, up to where the answer begins.

    Rendered as transformers' apply_chat_template does. Raises UserError if there is no template, or
    if it fails.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{model_name} has no chat template: leave --chat out and it continues the prompt."
            " docs/finetune.md teaches a model to answer"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    messages = [{"role": "user", "content": message}]
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(
            messages=messages, add_generation_prompt=True, **tokenizer.special_tokens()
        )
    except Exception as error:  # whatever the template's code raises
        reason = one_line_error(error)
        raise UserError(f"the chat template of {model_name} fails: {reason}") from None


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} in a chat template, which marks answers for
    training: its content, unchanged."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)  # the tag itself
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def show_samples(model: GPT, tokenizer: Tokenizer, autocast) -> str:
    """Two texts of a model in training, ready to print."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        return "  no sample: the weights are not finite"
    length = 256 if tokenizer.unit == "byte" else 64
    texts = []
    for seed in (42, 43):
        sampling = Sampling(length, temperature=0.8, seed=seed)
        with autocast:
            pieces = stream_text(model, tokenizer, tokenizer.prompt, sampling)
            text = tokenizer.prompt + "".join(pieces)
        texts.append("  sample\n  > " + printable(text).replace("\n", "\n  > "))
    return "\n".join(texts)


def printable(text: str) -> str:
    """The text with a replacement character for each control code."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def read_prompt(config: SampleConfig) -> str:
    """The text to continue. Raises UserError if it can't be read, or is no text."""
    if config.prompt_file and config.prompt:
        raise UserError("give a prompt or --prompt_file, not both")
    try:
        prompt = config.prompt
        if config.prompt_file:
            prompt = Path(config.prompt_file).read_text(encoding="utf-8")
        elif prompt == "-":
            prompt = sys.stdin.read()
        prompt.encode()  # bytes of the command line that are not UTF-8 are lone surrogates here
    except (OSError, UnicodeError) as error:
        place = config.prompt_file or ("-" if config.prompt == "-" else "on the command line")
        raise UserError(f"the prompt {place} can't be read as UTF-8 text: {error}") from None
    return prompt.removeprefix("\ufeff")  # the byte order mark of a file


@command
def main(argv=None) -> int:
    config = parse(SampleConfig, argv, __doc__, positional="prompt")
    prompt = read_prompt(config)
    device = choose_device(config.device)
    loaded = open_model(config.model, config.tokenizer)
    print_notes(loaded.notes)
    model = loaded.model.to(device)
    tokenizer = loaded.tokenizer
    text = chat_prompt(tokenizer, prompt, config.model) if config.chat else prompt
    for number in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {number + 1} of {config.num_samples}")
        if not config.chat:
            print(prompt, end="", flush=True)
        seed = config.seed + number
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, seed)
        for piece in stream_text(model, tokenizer, text, sampling):
            print(piece, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
