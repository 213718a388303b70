"""The tokenizer: text to ids and back, the files that publish it, a prompt for samples, and what a
token is called.

encoding = get_tokenizer("gpt2")                       # 50257 tokens; "bytes": 256 bytes and <|endoftext|>
encoding.encode_ordinary("Hello")                      # [15496]
tokenizer_files("gpt2", block_size=1024)               # tokenizer.json and its kin, for Hugging Face
"""

import functools
import json
from pathlib import Path

import tiktoken

from lib.cli import UserError

END_OF_TEXT = "<|endoftext|>"  # stands before each document
GPT2_TOKENS = 50257
# what a token is called, and a prompt that shows what a model has learned
UNIT = {"gpt2": "token", "bytes": "byte"}
PROMPT = {"gpt2": "Hello, I'm a language model,", "bytes": "Return the "}


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50257 tokens) or "bytes" (256 bytes and <|endoftext|>).

    Raises UserError for another name, or if GPT-2's vocabulary can be neither found nor downloaded.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is not known: gpt2 and bytes are")
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        OSError,
        ValueError,
    ) as error:  # requests' ConnectionError; a file that is not the vocabulary
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and can't be downloaded ({type(error).__name__}).\nHINT: run"
            " once with a network and TIKTOKEN_CACHE_DIR set to a directory that this machine sees too, or use"
            " --tokenizer bytes"
        ) from None


def tokenizer_of(folder) -> str:
    """The name of the tokenizer of an exported folder: bytes is the one without merges."""
    path = Path(folder) / "tokenizer.json"
    return (
        "bytes"
        if path.exists() and not json.loads(path.read_bytes())["model"]["merges"]
        else "gpt2"
    )


# ---- Hugging Face's files ----


def byte_characters() -> dict[int, str]:
    """GPT-2 writes each byte as a printable character: itself where it is one, else the next from
    code point 256."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def recover_merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The BPE merges, in order, from the tokens in order of their ids: each came from joining two
    that were there."""
    ids = {token: id for id, token in enumerate(tokens)}
    merges = []
    for id, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # join the pair that was learned first
            first = min(range(len(parts) - 1), key=lambda i: ids.get(parts[i] + parts[i + 1], id))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_files(name: str, block_size: int) -> dict[str, str]:
    """{file name: text} of tokenizer.json, vocab.json, merges.txt, tokenizer_config.json,
    special_tokens_map.json."""
    encoding, character = get_tokenizer(name), byte_characters()
    tokens = [encoding.decode_single_token_bytes(id) for id in range(encoding.eot_token)]
    merges = [
        ["".join(character[byte] for byte in part) for part in pair]
        for pair in recover_merges(tokens)
    ]
    vocab = {"".join(character[byte] for byte in token): id for id, token in enumerate(tokens)}
    vocab[END_OF_TEXT] = encoding.eot_token
    end = {
        "id": encoding.eot_token,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [end | {"normalized": True, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    return {
        "tokenizer.json": json.dumps(whole, indent=2, ensure_ascii=False),
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "tokenizer_config.json": json.dumps(
            settings | roles | {"tokenizer_class": "GPT2Tokenizer"}, indent=2
        )
        + "\n",
        "special_tokens_map.json": json.dumps(roles, indent=2) + "\n",
    }
