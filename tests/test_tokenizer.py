"""The tokenizers, and the files that publish them."""

import pytest
import tiktoken

from lib.cli import UserError
from lib.tokenizer import get_tokenizer


def test_a_vocabulary_that_arrives_altered_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "tiktoken.load.read_file", lambda address: b"<html>Log in to this network</html>"
    )
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(UserError, match=r"can't be downloaded \(ValueError\)"):
        get_tokenizer.__wrapped__("gpt2")


def test_tokenizers():
    assert get_tokenizer("gpt2").n_vocab == 50257 and get_tokenizer("bytes").n_vocab == 257
    assert isinstance(get_tokenizer("bytes"), tiktoken.Encoding)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert get_tokenizer("bytes").encode_ordinary(text) == list(text.encode())
    assert get_tokenizer("bytes").encode("a<|endoftext|>", allowed_special="all") == [97, 256]
    with pytest.raises(UserError, match="tokenizer 'gpt3' is not known"):
        get_tokenizer("gpt3")
