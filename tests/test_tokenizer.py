"""The tokenizers, judged by tiktoken and by the package tokenizers, and the files that publish
them, by transformers."""

import functools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Library

from lib import tokenizer as tokenizer_module
from lib.cli import UserError
from lib.tokenizer import END_OF_TEXT, EncoderMismatch, get_tokenizer

TEXTS = [
    *(path.read_text() for path in sorted((ROOT / "lib").glob("*.py"))),
    *["Zażółć gęślą jaźń, größe élan, Ελληνικά, русский язык"] * 20,
    *["中文字符, 日本語, العربية 12345 '"] * 20,
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level_bpe(before=None, special=(END_OF_TEXT,), vocab_size=600) -> Library:
    """Byte-level BPE; before: how a text is cut into words (GPT-2's pattern if it isn't given)."""
    library = Library(models.BPE())
    library.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


def another_pattern() -> Library:
    words = Regex(r"\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), level])
    return byte_level_bpe(before, special=("<pad>", "<unk>", "</s>"))


def with_prefix_space() -> Library:
    return byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))


@functools.cache  # its training takes seconds
def unigram_json() -> str:
    """With a template, truncation and padding, none of which belongs to a document's tokens."""
    library = Library(models.Unigram())
    library.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>")
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.enable_truncation(8)
    library.enable_padding(length=20, pad_id=2, pad_token="</s>")
    return library.to_str()


def unigram() -> Library:
    return Library.from_str(unigram_json())


def bytes_fall_back() -> Library:
    """As Llama's: a character that has no token is the tokens of its bytes."""
    whole = json.loads(unigram_json())
    whole["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    whole["model"]["byte_fallback"] = True
    whole["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return Library.from_str(json.dumps(whole))


def word_piece() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=special)
    library.train_from_iterator(TEXTS, trainer)
    return library


def added() -> Library:
    library = byte_level_bpe()
    library.add_tokens(["Größe", AddedToken("def", single_word=True)])
    library.add_special_tokens(["<user>"])
    return library


# name: (the tokenizer, the eos_token of its tokenizer_config.json or None, the token that ends)
KINDS = {
    "GPT-2's pattern": (byte_level_bpe, None, END_OF_TEXT),
    "prefix space": (with_prefix_space, None, END_OF_TEXT),
    "another pattern": (another_pattern, "</s>", "</s>"),
    "Unigram": (unigram, {"content": "</s>", "lstrip": False, "__type": "AddedToken"}, "</s>"),
    "byte fallback": (bytes_fall_back, "</s>", "</s>"),
    "WordPiece": (word_piece, "[SEP]", "[SEP]"),
    "added tokens": (added, None, END_OF_TEXT),
}


def save(folder: Path, library: Library, end=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    if end is not None:
        # the class and the new token are what transformers would go wrong by
        settings = {"eos_token": end, "tokenizer_class": "GPT2Tokenizer", "pad_token": "<new>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder with its tokenizer.json}"""
    place = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(place / kind, make(), end) for kind, (make, end, _) in KINDS.items()}


# the model itself would take the name of a special token in a text for that token
NAMES_ARE_WORDS = ("Unigram", "byte fallback")
SCRIPTS = [(0, 0x80)] * 6 + [
    (0x80, 0x250), (0x370, 0x590), (0x600, 0x700), (0x900, 0xE00), (0x1000, 0x1100),
    (0x2000, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F700),
    (0, 0xD800), (0xE000, 0x110000),
]  # fmt: skip
WORDS = ["", " ", "  ", "\n\n", "\t", " the", "def", "Größe", "12345"]
NAMES = [END_OF_TEXT, "</s>", "<s>", "[SEP]", "<user>"]


def random_texts(n: int, words=(*WORDS, *NAMES), seed=0):
    """Random characters of every script between words, spaces and names of special tokens."""
    dice = random.Random(seed)
    for _ in range(n):
        parts = []
        for _ in range(dice.randint(0, 6)):
            low, high = dice.choice(SCRIPTS)
            parts += [chr(dice.randrange(low, high)) for _ in range(dice.randint(0, 8))]
            parts.append(dice.choice(words))
        yield "".join(parts)


SPECIAL_TEXTS = [
    "",
    "\0",
    "a\0b",
    "a\ud800b",
    END_OF_TEXT,
    f"a{END_OF_TEXT}{END_OF_TEXT} b",
    "\uffff",
]


def decode(tokenizer, ids) -> str:
    decoder = tokenizer.decoder()
    return "".join([*map(decoder.step, ids), decoder.end()])


# ---- gpt2 and bytes ----


def test_gpt2_and_bytes():
    gpt2, plain = get_tokenizer("gpt2"), get_tokenizer("bytes")
    assert (gpt2.n_vocab, gpt2.eot_token, gpt2.unit) == (50257, 50256, "token")
    assert (plain.n_vocab, plain.eot_token, plain.unit) == (257, 256, "byte")
    for tokenizer in (gpt2, plain):
        assert tokenizer.name == tokenizer.state == tokenizer.identity
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert plain.encode(text) == list(text.encode())
    assert plain.encode_prompt("a<|endoftext|>") == [97, 256]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.encode_prompt("<|endoftext|>Hello") == [50256, 15496]


def test_a_vocabulary_that_arrives_altered_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "tiktoken.load.read_file", lambda address: b"<html>Log in to this network</html>"
    )
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(UserError, match=r"can't be downloaded \(ValueError\)"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_million_spaces(name):
    tokenizer = get_tokenizer(name)
    token_bytes = tokenizer.decoder().token_bytes
    for space in (" ", "\n", "\t"):
        text = "a" + space * 1_200_000 + "b" + space * 600_000 + "<|endoftext|> c"
        ids = tokenizer.encode(text)
        assert b"".join(map(token_bytes, ids)).decode() == text
        assert tokenizer.encode_documents([text]).tolist() == [tokenizer.eot_token, *ids]
        prompt = tokenizer.encode_prompt(text)
        assert b"".join(map(token_bytes, prompt)).decode() == text
        assert prompt.count(tokenizer.eot_token) == 1 and tokenizer.eot_token not in ids


def test_long_texts_are_cut_nowhere_else():
    tokenizer = get_tokenizer("gpt2")
    text = "It's a  line of 12 words.\n\n\tAnother\u3000line. " * 20_000
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_documents_and_decoding(name):
    tokenizer = get_tokenizer(name)
    texts = [*random_texts(3000), *SPECIAL_TEXTS]
    stream = []
    for text in texts:
        replaced = text.replace("\ud800", "\ufffd")
        ids = tokenizer.encoding.encode_ordinary(text) if name == "gpt2" else replaced.encode()
        stream += [tokenizer.eot_token, *ids]
        assert tokenizer.encode(text) == list(ids)
        assert decode(tokenizer, ids) == replaced
    documents = tokenizer.encode_documents(texts)
    assert documents.dtype == np.uint16 and documents.tolist() == stream
    assert len(tokenizer.encode_documents([])) == 0


def test_a_folder_that_has_gpt2s_own_tokenizer_is_gpt2(tmp_path):
    for name in ("gpt2", "bytes"):
        (tmp_path / name).mkdir()
        for file, content in get_tokenizer(name).files(64).items():
            (tmp_path / name / file).write_bytes(content)
        assert get_tokenizer(tmp_path / name).name == name
        assert get_tokenizer(str(tmp_path / name / "tokenizer.json")).name == name
    path = tmp_path / "gpt2" / "tokenizer.json"
    whole = json.loads(path.read_text())
    del whole["model"]["vocab"][END_OF_TEXT]  # in some files only the added tokens have it
    whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
    path.write_text(json.dumps(whole))
    assert get_tokenizer(path).name == "gpt2"
    path.unlink()
    assert get_tokenizer(tmp_path / "gpt2").name == "gpt2"  # by vocab.json and merges.txt


CHANGES = {
    "an added token": lambda w: w["added_tokens"].append(
        w["added_tokens"][0] | {"id": 50257, "content": "<user>"}
    ),
    "a prefix space": lambda w: w["pre_tokenizer"].update(add_prefix_space=True),
    "a normalizer": lambda w: w.update(normalizer={"type": "NFC"}),
    "a merge less": lambda w: w["model"]["merges"].pop(),
    "two merges swapped": lambda w: w["model"]["merges"].insert(5, w["model"]["merges"].pop(9)),
    "two ids swapped": lambda w: w["model"]["vocab"].update(Hello=31373, hello=15496),
    "whole words": lambda w: w["model"].update(ignore_merges=True),
    "another end": lambda w: w["added_tokens"][0].update(lstrip=True),
}


NOT_SLOW = ("a normalizer", "two merges swapped", "another end")


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[] if c in NOT_SLOW else pytest.mark.slow) for c in CHANGES]
)
def test_a_tokenizer_that_is_almost_gpt2s_is_its_own(change, tmp_path):
    whole = json.loads(get_tokenizer("gpt2").files(64)["tokenizer.json"])
    CHANGES[change](whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = get_tokenizer(tmp_path)
    assert tokenizer.name == "tokenizer.json" and tokenizer.eot_token == 50256
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    for text in random_texts(300, [*WORDS, "<user>"]):
        assert tokenizer.encode_prompt(text) == library.encode(text).ids


# ---- many texts at once ----

CONTEXTS = ["{}", " {}", "a{}b", "1{}2", "!{}?", "{}'s", "'{}", "  {}  "]
# Letters and digits that Unicode 17 added: gigatoken knows them and tiktoken does not, which shows
# before 's, 'd and the like. The last range is CJK Extension J.
NEW = """88F C5C CDC A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9
16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2
1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479"""
UNICODE_17 = []
for part in NEW.split():
    first, _, last = part.partition("-")
    UNICODE_17 += range(int(first, 16), int(last or first, 16) + 1)
KNOWN = sorted({*range(0xD800), *range(0xE000, 0x110000)} - set(UNICODE_17))


def differences(tokenizer, texts: list[str]) -> list[str]:
    """The texts of which the fast encoder and the truth make different ids."""
    found = []
    encoder = tokenizer.batch_encoder
    for text, true_ids in zip(texts, encoder.truth(texts), strict=True):
        if not np.array_equal(encoder.gigatoken.encode(text), true_ids):
            found.append(text)
    return found


def code_points(context: str, numbers: list[int]) -> list[str]:
    """Texts in which each code point stands in a context, 500 in each text."""
    lines = [context.format(chr(number)) for number in numbers]
    return ["\n".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]


@pytest.mark.parametrize("context", CONTEXTS)
def test_code_points_are_encoded_as_tiktoken_does_it(context):
    assert not differences(get_tokenizer("gpt2"), code_points(context, KNOWN[::23]))


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_all_code_points_are_encoded_as_tiktoken_does_it(context):
    assert not differences(get_tokenizer("gpt2"), code_points(context, KNOWN))


@pytest.mark.slow
def test_random_mixtures_are_encoded_as_tiktoken_does_it():
    words = [*WORDS, *NAMES, "'s", "'ll", " '", "\r\n", "\u3000", "\u200d", "e\u0301", "👍🏽"]
    different = differences(get_tokenizer("gpt2"), [*random_texts(100_000, words, seed=1)])
    assert all(set(UNICODE_17) & set(map(ord, text)) for text in different)


def test_letters_of_unicode_17_are_the_known_difference_and_are_caught():
    tokenizer = get_tokenizer("gpt2")
    texts = [f"a {chr(number)}'s and {chr(number)}'d" for number in reversed(UNICODE_17)]
    if not differences(tokenizer, texts):
        pytest.skip("this tiktoken knows Unicode 17")
    assert differences(tokenizer, texts) == texts
    with pytest.raises(EncoderMismatch) as error:
        tokenizer.encode_documents(["fine", texts[0]])
    assert error.value.index == 1
    first, gigatoken, tiktoken, hint = str(error.value).splitlines()
    assert first == "gigatoken and tiktoken encode a text differently, from token 6 on:"
    assert gigatoken.startswith("    gigatoken   [338, 290, 220, 172,") and "'s and" in gigatoken
    assert tiktoken.startswith("    tiktoken    [6, 82, 290, 220,") and "'s and" in tiktoken
    assert hint == "HINT: `pip uninstall gigatoken`, and tiktoken encodes everything"


class Wrong:
    """An encoder that is wrong in one way."""

    def __init__(self, right, wrong):
        self.encode = lambda text: wrong(right.encode(text))
        self.decode = right.decode


WRONG = {
    "another id": lambda ids: np.append(ids[:-1], ids[-1:] + 1),
    "one less": lambda ids: ids[:-1],
    "one more": lambda ids: np.append(ids, 0),
    "none": lambda ids: ids[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["gpt2", "GPT-2's pattern"])
def test_a_wrong_encoder_is_noticed_within_one_batch(kind, wrong, folders):
    tokenizer = get_tokenizer(folders.get(kind, kind))
    encoder = tokenizer.batch_encoder
    encoder.gigatoken = Wrong(encoder.gigatoken, WRONG[wrong])
    texts = [f"The {n}th text of a batch." for n in range(256)]
    with pytest.raises(EncoderMismatch, match=f"gigatoken and {encoder.truth_name} encode a te"):
        tokenizer.encode_documents(texts)
    with pytest.raises(EncoderMismatch, match="encode a text differently"):
        tokenizer.encode_documents(["a book " * 100_000])  # of which a piece is compared


def test_where_a_long_text_differs_is_found_in_the_end():
    tokenizer = get_tokenizer("gpt2")
    text = "a book " * 100_000 + chr(UNICODE_17[-1]) + "'s"
    if not differences(tokenizer, [text]):
        pytest.skip("this tiktoken knows Unicode 17")
    with pytest.raises(EncoderMismatch):
        for _ in range(20):
            tokenizer.encode_documents([text])


@pytest.mark.parametrize("kind", ["gpt2", "GPT-2's pattern", "prefix space", "another pattern"])
def test_without_gigatoken_the_ids_are_the_same(kind, folders, monkeypatch):
    texts = [*random_texts(2000), *SPECIAL_TEXTS, "a" + " " * 600_000 + "b" + "\n" * 600_000]
    fast = get_tokenizer(folders.get(kind, kind))
    documents = fast.encode_documents(texts)
    assert fast.encoder.startswith("gigatoken, checked against") == (kind != "another pattern")
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    slow = get_tokenizer(folders.get(kind, kind))
    assert np.array_equal(slow.encode_documents(texts), documents)
    assert slow.encoder.startswith("tiktoken in " if kind == "gpt2" else "tokenizers in ")


def test_what_encodes(folders):
    encoders = {kind: get_tokenizer(folder).encoder for kind, folder in folders.items()}
    assert [kind for kind in encoders if "gigatoken" in encoders[kind]] == [
        "GPT-2's pattern", "prefix space"
    ]  # fmt: skip
    assert get_tokenizer("bytes").encoder == "UTF-8"


def test_gigatoken_forgets_its_words_and_the_ids_stay(monkeypatch):
    tokenizer = get_tokenizer("gpt2")
    texts = [*random_texts(200)]
    documents = tokenizer.encode_documents(texts)
    first = tokenizer.batch_encoder.gigatoken
    assert np.array_equal(tokenizer.encode_documents(texts), documents)
    assert tokenizer.batch_encoder.gigatoken is first
    monkeypatch.setattr(tokenizer_module, "MEMORY_LIMIT", -(10**12))
    assert np.array_equal(tokenizer.encode_documents(texts), documents)
    assert tokenizer.batch_encoder.gigatoken is not first
    # as on macOS, where only the amount of text is known
    monkeypatch.setattr(tokenizer_module, "STATM", Path("/nowhere"))
    monkeypatch.setattr(tokenizer_module, "MEMORY_LIMIT", 6 * sum(map(len, texts)))
    made = [tokenizer.batch_encoder.gigatoken]
    for _ in range(9):
        tokenizer.encode_documents(texts)
        if tokenizer.batch_encoder.gigatoken is not made[-1]:
            made.append(tokenizer.batch_encoder.gigatoken)
    assert 3 <= len(made) <= 5


@pytest.mark.slow
def test_the_memory_of_a_gigabyte_of_random_words_is_bounded():
    """Words with an endless tail: each of 10^9 ranks is a word of 3 to 12 letters."""
    program = f"""
import resource, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from lib.tokenizer import get_tokenizer

def texts(dice):
    ranks = (1 - dice.random(100_000) * (1 - 1e9**-0.15)) ** (-1 / 0.15)
    hashes = ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    lengths = (3 + (hashes >> np.uint64(60)) % 10).astype(int).tolist()
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkqjxz", np.uint8)
    digits = [letters[(hashes // np.uint64(26**n) % np.uint64(26)).astype(int)] for n in range(12)]
    words = np.stack(digits, 1).tobytes().decode()
    text = " ".join(words[12 * n : 12 * n + length] for n, length in enumerate(lengths))
    return [text[start : start + 5000] for start in range(0, len(text), 5000)]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tokenizer = get_tokenizer("gpt2")
tokenizer.encode_documents(texts(np.random.default_rng(0)))
dice, encoded, before = np.random.default_rng(1), 0, peak()
while encoded < 10**9:
    batch = texts(dice)
    tokenizer.encode_documents(batch)
    encoded += sum(map(len, batch))
print(tokenizer.encoder, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("gigatoken"), done.stderr
    assert int(done.stdout.split()[-1]) < 500_000_000


@pytest.mark.slow
def test_a_document_of_200_mb():
    tokenizer = get_tokenizer("gpt2")
    paragraph = "\n".join(TEXTS[:8])
    text = paragraph * (200_000_000 // len(paragraph))
    ids = tokenizer.encode_documents([text, "end"])
    assert decode(tokenizer, ids[-1:].tolist()) == "end"
    assert tokenizer.encoding.decode_bytes(ids[1:-2].tolist()) == text.encode()


# ---- any tokenizer.json ----


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_package_tokenizers(kind, folders):
    tokenizer = get_tokenizer(folders[kind])
    library = Library.from_file(str(folders[kind] / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    _, _, end = KINDS[kind]
    assert tokenizer.eot_token == library.token_to_id(end)
    assert tokenizer.n_vocab == library.get_vocab_size(with_added_tokens=True)
    texts = [*random_texts(10_000)]
    prompts = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    library.encode_special_tokens = True
    special = {token.content for token in library.get_added_tokens_decoder().values()}
    stream = []
    for text, prompt in zip(texts, prompts, strict=True):
        assert tokenizer.encode_prompt(text) == prompt, text
        ids = library.encode(text, add_special_tokens=False).ids
        if kind in NAMES_ARE_WORDS and any(name in text for name in special):
            ids = tokenizer.encode(text)
            assert not {1, 2} & set(ids)
            back = decode(tokenizer, ids)
            assert all(back.count(name) >= text.count(name) for name in special)
        if len(stream) < 20_000:
            assert decode(tokenizer, ids) == library.decode(ids, skip_special_tokens=False), text
        stream += [tokenizer.eot_token, *ids]
    assert tokenizer.encode_documents(texts).tolist() == stream


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_can_be_decoded(kind, folders):
    """Also bytes that are no UTF-8. Where they follow bytes that are, byte fallback makes
    replacement characters of them all; what was shown before stays."""
    tokenizer = get_tokenizer(folders[kind])
    dice = random.Random(1)
    for _ in range(1000):
        ids = [dice.randrange(tokenizer.n_vocab) for _ in range(20)]
        text = decode(tokenizer, ids)
        if kind != "byte fallback":
            assert text == tokenizer.library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_published(kind, folders, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = get_tokenizer(folders[kind])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in tokenizer.files(64).items():
        (tmp_path / name).write_bytes(content)
    own = (folders[kind] / "tokenizer.json").read_bytes()
    has_template = kind in ("Unigram", "byte fallback")
    assert ((tmp_path / "tokenizer.json").read_bytes() != own) == has_template
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.n_vocab and theirs.model_max_length == 64
    assert theirs.eos_token_id == tokenizer.eot_token
    for text in random_texts(1000):
        ids = tokenizer.encode_prompt(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.library.decode(ids, skip_special_tokens=False)


def test_a_state_is_the_tokenizer(folders):
    for kind, folder in folders.items():
        tokenizer = get_tokenizer(str(folder / "tokenizer.json"))
        again = get_tokenizer(pickle.loads(pickle.dumps(tokenizer.state)))
        assert again.identity == tokenizer.identity and again.identity.startswith("sha256:")
        assert (again.eot_token, again.n_vocab) == (tokenizer.eot_token, tokenizer.n_vocab)
        assert again.encode("Größe 中 </s>") == tokenizer.encode("Größe 中 </s>"), kind
        assert again.files(64) == tokenizer.files(64)
    assert len({get_tokenizer(folder).identity for folder in folders.values()}) == len(folders)


def test_a_lone_surrogate_becomes_the_replacement_character(folders):
    tokenizer = get_tokenizer(folders["GPT-2's pattern"])
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_a_million_spaces_of_an_own_tokenizer(folders):
    for kind in ("GPT-2's pattern", "another pattern"):
        tokenizer = get_tokenizer(folders[kind])
        text = "a" + " " * 1_200_000 + "b"
        assert tokenizer.library.decode(tokenizer.encode(text)) == text


# ---- a language model's tokenizer gives the text back ----


def test_every_kind_but_the_plain_ones_says_what_it_changes(folders):
    notes = {kind: get_tokenizer(folder).notes for kind, folder in folders.items()}
    assert notes["GPT-2's pattern"] == notes["another pattern"] == []
    # the library's decoder takes the letters of an added token for bytes
    changed = "'Größe GrößeGröße aGrößea' comes back as 'Gr\ufffd\ufffde "
    assert notes["added tokens"][0].startswith(f"this tokenizer changes texts: {changed}")
    assert notes["WordPiece"] == [
        "this tokenizer changes texts: 'É' comes back as 'e', 'Hello, World!' comes back as"
        " 'hello, world!', 'two  spaces\\n\\n\\ta tab\\r\\n' comes back as 'two spaces a tab'"
    ]
    assert notes["prefix space"][0].startswith(
        "this tokenizer changes texts: 'É' comes back as ' É'"
    )
    assert "'ﬁ' comes back as 'fi'" in notes["byte fallback"][0]
    assert "<unk>a tab<unk>" in notes["Unigram"][0]
    assert get_tokenizer("gpt2").notes == get_tokenizer("bytes").notes == []


def words(unk: str | None) -> Library:
    """A token per word."""
    vocab = {"[unk]": 0, "</s>": 1, "the": 2, "cat": 3}
    library = Library(models.WordLevel(vocab, **({"unk_token": unk} if unk else {})))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    return library


def characters(unk: str | None) -> Library:
    """BPE over characters, of which it knows those of TEXTS."""
    library = Library(models.BPE(**({"unk_token": unk} if unk else {})))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[unk]", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=90)
    library.train_from_iterator(TEXTS, trainer)
    return library


def unigram_without_unk() -> Library:
    whole = json.loads(unigram_json())
    whole["model"]["unk_id"] = None
    return Library.from_str(json.dumps(whole))


LOSSES = {
    "a BPE without unk_token": (lambda: characters(None), "'.*' comes back as ''"),
    "an unk_token that ends documents": (lambda: words("</s>"), "'É' comes back as '</s>'"),
    "a WordLevel without unk_token": (lambda: words(None), "'É' can't be encoded .WordLevel error"),
    "a Unigram without unk_id": (
        unigram_without_unk,
        ".* can't be encoded .Encountered an",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_loses_text_is_refused(case, tmp_path):
    make, message = LOSSES[case]
    with pytest.raises(UserError, match=f"tokenizer.json loses text: {message}"):
        get_tokenizer(save(tmp_path, make(), "</s>"))


def test_an_unknown_token_is_a_change_and_no_loss(tmp_path):
    for name, make in {"words": words, "characters": characters}.items():
        tokenizer = get_tokenizer(save(tmp_path / name, make("[unk]"), "</s>"))
        assert "comes back as '[unk]'" in tokenizer.notes[0]
        assert tokenizer.encode_documents(["日本"]).tolist()[:2] == [1, 0]


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path, folders):
    """Also where the model's own vocabulary has it as a word."""
    tokenizer = get_tokenizer(save(tmp_path, words("[unk]"), "</s>"))
    assert tokenizer.encode_documents(["the </s> cat", "</s>"]).tolist() == [1, 2, 0, 3, 1, 0]
    assert tokenizer.encode_prompt("the </s> cat") == [2, 1, 3]
    for kind in NAMES_ARE_WORDS:
        tokenizer = get_tokenizer(folders[kind])
        assert decode(tokenizer, tokenizer.encode("a</s>b <s> c")) == "a</s>b <s> c"
        assert np.count_nonzero(tokenizer.encode_documents(["a</s>b"] * 9) == 2) == 9


def test_a_text_can_not_end_in_its_middle(folders):
    """By the hidden name of the token that ends documents."""
    for kind in ("gpt2", "Unigram"):
        tokenizer = get_tokenizer(folders.get(kind, kind))
        text = "a\uffff<|endoftext|>b\uffff</s>c"
        with pytest.raises(EncoderMismatch) as error:
            tokenizer.encode_documents(["fine", text])
        assert error.value.index == 1


def test_dropout_is_switched_off(tmp_path):
    text = TEXTS[-1]
    whole = json.loads(byte_level_bpe().to_str())
    whole["model"]["dropout"] = 0.5
    library = Library.from_str(json.dumps(whole))
    assert len({tuple(library.encode(text).ids) for _ in range(20)}) > 1
    tokenizer = get_tokenizer(save(tmp_path, library))
    ids = byte_level_bpe().encode(text).ids
    assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == ids
    assert tokenizer.encode_documents([text]).tolist() == [0, *ids]
    published = Library.from_str(tokenizer.files(64)["tokenizer.json"].decode())
    assert published.encode(text).ids == ids


def test_an_end_that_only_special_tokens_map_names(tmp_path):
    """As folders of older versions of transformers have it; judged by transformers."""
    from transformers import AutoTokenizer

    library = byte_level_bpe(special=["<pad>", END_OF_TEXT, "</s>"])
    other = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    for name, end, config in (
        ("string", "</s>", {}),
        ("written out", other | {"single_word": False}, {}),
        ("overrules", "</s>", {"eos_token": "<pad>"}),
        ("is older", "<pad>", {"eos_token": "</s>", "added_tokens_decoder": {}}),
    ):
        folder = save(tmp_path / name, library)
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = get_tokenizer(folder)
        assert tokenizer.eot_token == AutoTokenizer.from_pretrained(folder).eos_token_id == 2, name
        assert get_tokenizer(tokenizer.state).eot_token == 2


# ---- known by what it does ----


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "bytes"])
def test_what_transformers_has_loaded_and_saved_is_the_same_tokenizer(kind, folders, tmp_path):
    from transformers import AutoTokenizer

    first = get_tokenizer(folders.get(kind, kind))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in first.files(64).items():
        (tmp_path / name).write_bytes(content)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    path = tmp_path / "again" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # some versions save the same bytes
    again = get_tokenizer(path)
    assert again.behavior == first.behavior and again.name == first.name
    assert kind in ("gpt2", "bytes") or again.identity != first.identity


DIFFERENT = {
    "two merges swapped": lambda w: w["model"]["merges"].insert(5, w["model"]["merges"].pop(9)),
    "a merge less": lambda w: w["model"]["merges"].pop(),
    "a prefix space": lambda w: w["pre_tokenizer"].update(add_prefix_space=True),
    "another normalizer": lambda w: w.update(normalizer={"type": "Lowercase"}),
    "no regex": lambda w: w["pre_tokenizer"].update(use_regex=False),
    "another decoder": lambda w: w.update(decoder={"type": "Fuse"}),
    "an added token": lambda w: w["added_tokens"].append(
        w["added_tokens"][0] | {"id": 600, "content": "<user>"}
    ),
    "a token that takes spaces": lambda w: w["added_tokens"][0].update(rstrip=True),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_does_something_else_is_another_tokenizer(change, folders, tmp_path):
    whole = json.loads((folders["GPT-2's pattern"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    same = get_tokenizer(tmp_path).behavior
    assert same == get_tokenizer(folders["GPT-2's pattern"]).behavior
    DIFFERENT[change](whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert get_tokenizer(tmp_path).behavior != same


def test_another_end_is_another_tokenizer(tmp_path):
    library = byte_level_bpe(special=["<pad>", END_OF_TEXT, "</s>"])
    ends = (None, END_OF_TEXT, "</s>", "<pad>")
    made = [get_tokenizer(save(tmp_path / str(end), library, end)).behavior for end in ends]
    assert made[0] == made[1] and len(set(made)) == 3


# ---- what is decoded ----


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "bytes"])
def test_prompt_and_continuation_are_together_what_all_ids_are(kind, folders):
    tokenizer = get_tokenizer(folders.get(kind, kind))
    pairs = zip(random_texts(500, seed=1), random_texts(500, seed=2), strict=True)
    for before, after in [("the man", "said so"), ("", "so it was"), *pairs]:
        prompt, ids = tokenizer.encode_prompt(before), tokenizer.encode(after)
        decoder = tokenizer.decoder(prompt)
        continuation = "".join([*map(decoder.step, ids), decoder.end()])
        assert decode(tokenizer, prompt) + continuation == decode(tokenizer, prompt + ids)
        if kind in folders:
            whole = tokenizer.library.decode(prompt + ids, skip_special_tokens=False)
            assert decode(tokenizer, prompt + ids) == whole


# ---- what is refused ----


def numbered(n: int) -> Library:
    """A tokenizer of n ids."""
    vocab = {f"w{id}": id for id in range(n - 2)} | {"<unk>": n - 2, END_OF_TEXT: n - 1}
    return Library(models.WordLevel(vocab, unk_token="<unk>"))


def test_65535_ids_and_no_more(tmp_path):
    tokenizer = get_tokenizer(save(tmp_path / "most", numbered(65_535)))
    assert tokenizer.encode_documents(["w65532"]).tolist() == [65_534, 65_532]
    with pytest.raises(UserError, match="has 65,536 ids: tokens are stored in 16 bits"):
        get_tokenizer(save(tmp_path / "more", numbered(65_536)))


def test_which_token_ends_a_document(tmp_path):
    library = byte_level_bpe(special=["<pad>", "</s>"], vocab_size=300)
    with pytest.raises(UserError) as error:
        get_tokenizer(save(tmp_path, library))
    assert "has no <|endoftext|>, and no tokenizer_config.json names another" in str(error.value)
    assert "its special tokens are <pad> </s>: write one of them as" in str(error.value)
    with pytest.raises(UserError, match="its eos_token '<end>' is not in its vocabulary"):
        get_tokenizer(save(tmp_path, library, "<end>"))
    assert get_tokenizer(save(tmp_path, library, "</s>")).eot_token == 1
    with pytest.raises(UserError, match="train it with a special token"):
        get_tokenizer(save(tmp_path / "none", byte_level_bpe(special=[], vocab_size=300)))


@pytest.mark.parametrize(
    "content, message",
    {
        "[]": "is not a tokenizer.json: invalid type: sequence, expected struct Tokenizer",
        "{": "is not a tokenizer.json: EOF while parsing",
        '{"model": {"type": "BPE", "vocab": {}}}': "is not a tokenizer.json: Missing vocab",
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}': "is not a tokenizer",
        b"\xff": "can't be read as UTF-8 text",
    }.items(),
)
def test_what_is_not_a_tokenizer(content, message, tmp_path):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    {
        "[]": "tokenizer_config.json or special_tokens_map.json of .* is damaged: TypeError",
        "{": "tokenizer_config.json or special_tokens_map.json of .* is damaged: JSONDecodeError",
        '{"eos_token": ["a"]}': "does not say which token ends a document",
        '{"eos_token": 5}': "does not say which token ends a document",
    }.items(),
)
def test_what_is_not_a_tokenizer_config(settings, message, folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(
        (folders["WordPiece"] / "tokenizer.json").read_bytes()
    )
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match=message):
        get_tokenizer(tmp_path)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer gpt3: give gpt2, bytes, a folder"):
        get_tokenizer("gpt3")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError) as error:
        get_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "only tokenizer.model: transformers makes one:" in str(error.value)
    assert f'AutoTokenizer.from_pretrained("{tmp_path}").save_pretrained(' in str(error.value)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="only merges.txt, tokenizer.model, vocab.json"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for content in ('{"a": "b"}', "{"):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(UserError, match="vocab.json is damaged: "):
            get_tokenizer(tmp_path)
