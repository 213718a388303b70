"""The tokenizer: text to ids and back. One interface for all kinds.

    tokenizer = get_tokenizer("gpt2")                  # 50257 tokens, by tiktoken
    tokenizer = get_tokenizer("bytes")                 # 256 bytes and <|endoftext|>
    tokenizer = get_tokenizer("esperanto")             # any tokenizer.json, by tokenizers
    tokenizer.encode("Hello")                          # a list of ids
    tokenizer.encode_documents(texts)                  # uint16 (tokens,), at 100 MB/s and more
    tokenizer.files(block_size=1024)                   # what publishes it in a Hugging Face folder

Tokens are stored as uint16, so a tokenizer has fewer than 65,536 ids.
"""

import codecs
import hashlib
import json
import os
import re
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from lib.cli import UserError, one_line_error

END_OF_TEXT = "<|endoftext|>"
GPT2_TOKENS = 50257
MOST_TOKENS = 2**16 - 1
UNIT = {"gpt2": "token", "bytes": "byte"}  # what a token is called; of any other tokenizer: token
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# sha256 of OpenAI's encoder.json and vocab.bpe
GPT2_VOCAB = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# beside a tokenizer.json
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATE = "chat_template.jinja"
# what a tokenizer is stored in where there is no tokenizer.json
OTHER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = ("tokenizer.json", *SETTINGS, CHAT_TEMPLATE, *OTHER_FILES)


def get_tokenizer(tokenizer_spec) -> "Tokenizer":
    """The tokenizer that a tokenizer_spec names.

    tokenizer_spec: "gpt2" (50257 tokens), "bytes" (256 bytes and <|endoftext|>), a folder with a
    tokenizer.json, the path of a tokenizer.json, or the `.state` of a tokenizer. A tokenizer.json
    that holds GPT-2's own tokenizer or ours of bytes is that one. Raises UserError if there is no
    such tokenizer, or if it can't be used.
    """
    if isinstance(tokenizer_spec, dict):
        return tokenizer_from_files(tokenizer_spec, "the tokenizer of the checkpoint")
    if tokenizer_spec in BUILT_IN:
        return BUILT_IN[tokenizer_spec]()
    path = Path(tokenizer_spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.name == "tokenizer.json" and not path.exists():
        return tokenizer_without_json(path.parent)
    if not path.is_file():
        raise UserError(
            f"there is no tokenizer {tokenizer_spec}: give gpt2, bytes, a folder with a"
            " tokenizer.json, or the path of one"
        )
    return tokenizer_from_files(
        {"tokenizer.json": read_text(path)} | settings_in(path.parent), str(path)
    )


def settings_in(folder: Path) -> dict[str, str]:
    """{file name: text} of what says more about the tokenizer of a folder."""
    paths = [folder / name for name in (*SETTINGS, CHAT_TEMPLATE)]
    return {path.name: read_text(path) for path in paths if path.exists()}


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are, so that encoding it gives the same bytes again."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as UTF-8 text: {error}") from None


def tokenizer_from_files(files: dict[str, str], place: str) -> "Tokenizer":
    """The tokenizer of {"tokenizer.json": text} and settings_in its folder. place: what a message
    calls it."""
    tokenizer = JsonTokenizer(files, place)
    for built_in in BUILT_IN.values():
        if tokenizer.behavior == built_in.behavior and not tokenizer.chat_template:
            return built_in()
    return tokenizer


def tokenizer_without_json(folder: Path) -> "Tokenizer":
    """The tokenizer of a folder that has no tokenizer.json: GPT-2's if its vocab.json and
    merges.txt say so, else a UserError that says how to make a tokenizer.json."""
    names = [path.name for path in sorted(folder.glob("*")) if path.name in OTHER_FILES]
    if names == ["merges.txt", "vocab.json"]:
        try:
            text = tokenizer_json({name: (folder / name).read_bytes() for name in names})
        except Exception as error:  # the package raises a bare Exception
            message = f"{folder / 'vocab.json'} is damaged: {one_line_error(error)}"
            raise UserError(message) from None
        files = {"tokenizer.json": text} | settings_in(folder)
        tokenizer = tokenizer_from_files(files, str(folder))
        if tokenizer.behavior == GPT2Tokenizer.behavior:
            return tokenizer
    others = f", only {', '.join(names)}: transformers makes one" if names else ""
    raise UserError(
        f"{folder} has no tokenizer.json{others}:\n"
        "    from transformers import AutoTokenizer\n"
        f'    AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
    )


def has_tokenizer(folder: Path) -> bool:
    """Does a model's folder have a tokenizer, usable or not?"""
    return any((folder / name).exists() for name in ("tokenizer.json", *OTHER_FILES))


class Tokenizer:
    """What every tokenizer has.

    name: "gpt2", "bytes" or "tokenizer.json". n_vocab: the number of ids. eot_token: the id that
    begins each document. unit: what a token is called. prompt: a text that shows what a
    model learned ("": begin a document). state: plain data, for a checkpoint, from which
    get_tokenizer makes it again. identity: says which files it was made from. behavior: says what
    it does; equal for equal tokenizers, whatever their files look like. chat_template: how messages
    become a prompt, in Jinja. notes: what a user should know of it, for the command to print.
    """

    name: str
    n_vocab: int
    eot_token: int
    unit: str
    prompt: str
    state: str | dict[str, str]
    identity: str
    behavior: str
    chat_template: str | None = None
    notes: list[str] = []

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The name of a special token in it is text like any other."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are those tokens."""
        raise NotImplementedError

    @cached_property
    def batch_encoder(self) -> "BatchEncoder":
        raise NotImplementedError

    @property
    def encoder(self) -> str:
        """What encodes documents, in words."""
        return self.batch_encoder.name

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """uint16 (tokens,): for each text eot_token and its tokens, in order.

        A lone surrogate in a text becomes U+FFFD. Raises EncoderMismatch if gigatoken is wrong, or
        if a text would end in its middle.
        """
        end = np.array([self.eot_token])
        parts = [np.empty(0, np.uint16)]
        for ids in self.encode_batch(texts):
            parts += [end, ids]
        tokens = np.concatenate(parts, dtype=np.uint16, casting="unsafe")
        if np.count_nonzero(tokens == self.eot_token) != len(texts):
            index = next(n for n, ids in enumerate(parts[2::2]) if self.eot_token in ids)
            message = "a text holds U+FFFF and the name of the token that ends documents"
            raise EncoderMismatch(message, index)
        return tokens

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as `encode` gives them."""
        return self.batch_encoder.encode(texts)

    def decoder(self, prompt: list[int] = ()) -> "ByteDecoder | JsonDecoder":
        """Decodes as tokens come: .step(id) is the text that is certain now, .end() the rest. A
        character may span tokens.

        prompt: the ids before the first one, whose text is not given again.
        """
        raise NotImplementedError

    def crop(self, rows: int) -> "Tokenizer":
        """The tokenizer for a token table with this number of rows: without special tokens that
        have none, like a [PAD] that was added and never learned. To a text they are text."""
        return self

    def count_bytes(self, ids: np.ndarray) -> int:
        """The length in UTF-8 of the text of ids (n,), in bytes. Ends of documents have none."""
        raise NotImplementedError

    def files(self, block_size: int) -> dict[str, bytes]:
        """{file name: content} of what publishes it in a Hugging Face folder.

        block_size: the tokens of context of the model that it is for."""
        raise NotImplementedError


# ---- gpt2 and bytes ----


class GPT2Tokenizer(Tokenizer):
    """GPT-2's tokens. Raises UserError if its vocabulary is not on this machine and can't be
    downloaded."""

    name = state = identity = "gpt2"
    unit = UNIT["gpt2"]
    prompt = "Hello, I'm a language model,"
    n_vocab = GPT2_TOKENS
    eot_token = GPT2_TOKENS - 1
    behavior = "f2799f32d9353fdb887c221a95cc535e933f4d2b4e1f7a097492c5304cd94951"

    def __init__(self):
        self.encoding = gpt2_encoding()

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([*map(encode, pieces(utf8(text).decode()))])

    def encode_prompt(self, text):
        encode = partial(self.encoding.encode, allowed_special="all")
        return list(chain.from_iterable(map(encode, pieces(text))))

    @cached_property
    def batch_encoder(self):
        def encode_in_threads(texts):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                return [*threads.map(self.encode_array, texts)]

        whole = json.loads(tokenizer_json(gpt2_files()))
        return BatchEncoder(encode_in_threads, "tiktoken", hide_names(whole, END_OF_TEXT), PROBES)

    def decoder(self, prompt=()):
        return ByteDecoder(self.encoding.decode_single_token_bytes)

    def count_bytes(self, ids):
        lengths = [len(self.encoding.decode_single_token_bytes(id)) for id in range(self.eot_token)]
        return int(np.array([*lengths, 0])[ids].sum())

    def files(self, block_size):
        return published_files(gpt2_files(), block_size)


def gpt2_encoding() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    # requests' ConnectionError is an OSError; a file that is not the vocabulary a ValueError
    except (OSError, ValueError) as error:
        raise UserError(
            "GPT-2's vocabulary is not on this machine and can't be downloaded"
            f" ({type(error).__name__}).\nHINT: run once with a network and TIKTOKEN_CACHE_DIR set"
            " to a directory that this machine sees too, or use --tokenizer bytes"
        ) from None


def pieces(text: str) -> list[str]:
    """The text, cut inside runs of 500,000 white-space characters: tiktoken fails at a million."""
    if len(text) <= 500_000:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + 500_000, run.end(), 500_000)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


class BytesTokenizer(Tokenizer):
    """The bytes of a text's UTF-8, and <|endoftext|>."""

    name = state = identity = "bytes"
    unit = UNIT["bytes"]
    prompt = "Return the "
    n_vocab = 257
    eot_token = 256
    behavior = "0bb573f72f5a7b6b4477f0459310b5370d7a1dfa9ca222ac3f59c1eb02fadc0f"
    encoder = "UTF-8"

    def encode(self, text):
        return list(utf8(text))

    def encode_prompt(self, text):
        parts = [[self.eot_token, *self.encode(part)] for part in text.split(END_OF_TEXT)]
        return [*chain.from_iterable(parts)][1:]

    def encode_batch(self, texts):
        return [np.frombuffer(utf8(text), np.uint8) for text in texts]

    def decoder(self, prompt=()):
        return ByteDecoder(lambda id: bytes([id]) if id < 256 else END_OF_TEXT.encode())

    def count_bytes(self, ids):
        return int(np.count_nonzero(ids != self.eot_token))

    def files(self, block_size):
        return published_files(bytes_files(), block_size)


BUILT_IN = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}


def utf8(text: str) -> bytes:
    """The text in UTF-8, which has no lone surrogates: each becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class ByteDecoder:
    """token_bytes: the bytes of a token."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self.token_bytes = token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, id: int) -> str:
        return self.utf8.decode(self.token_bytes(id))

    def end(self) -> str:
        return self.utf8.decode(b"", final=True)


# ---- any tokenizer.json ----

# what a tokenizer is tried on: letters of many scripts, white space, digits, code, an emoji
PROBES = [
    "É", "Hello, World!", "two  spaces\n\n\ta tab\r\n", "it's they'LL I'd", "0123456789 3.14",
    "def f(x): return x[0]", "großes", "ﬁ", "e\u0301", "Ελληνικά", "русский", "հայերեն",
    "עברית", "العربية", "हिन्दी", "বাংলা", "தமிழ்", "ไทย", "ქართული", "አማርኛ", "ខ្មែរ", "한국어",
    "ひらがな", "カタカナ", "汉字", "٣٤", "①½", "👍🏽",
]  # fmt: skip


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's format, by its own library, the package tokenizers.

    A document is all its tokens, always the same ones, and nothing else: what the file says of
    truncation, padding, dropout and a template is switched off. A language model's tokenizer gives
    the text back: one that loses text is refused, one that changes it says so in `notes`.

    files: as in tokenizer_from_files. Raises UserError if it can't be used, and says why.
    """

    name = "tokenizer.json"
    unit = "token"
    prompt = ""

    def __init__(self, files: dict[str, str], place: str):
        self.state = dict(files)
        try:
            self.library = Library.from_str(files["tokenizer.json"])
        except Exception as error:  # the package raises a bare Exception
            raise UserError(f"{place} is not a tokenizer.json: {error}") from None
        as_it_was = self.library.to_str()
        self.library.no_truncation()
        self.library.no_padding()
        if self.library.num_special_tokens_to_add(is_pair=False):
            self.library.post_processor = None
        if isinstance(self.library.model, models.BPE):
            self.library.model.dropout = None
        is_unchanged = self.library.to_str() == as_it_was
        self.json = files["tokenizer.json"] if is_unchanged else self.library.to_str(pretty=True)
        digest = hashlib.sha256(files["tokenizer.json"].encode()).hexdigest()
        self.identity = f"sha256:{digest}"
        ids = self.library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(ids.values(), default=-1) + 1  # ids may have gaps
        if not 0 < self.n_vocab <= MOST_TOKENS:
            raise UserError(
                f"{place} has {self.n_vocab:,} ids: tokens are stored in 16 bits, so there may be"
                f" 1 to {MOST_TOKENS:,}"
            )
        self.settings = read_settings(files, place)
        template = files.get(CHAT_TEMPLATE, self.settings.get("chat_template"))
        if isinstance(template, list):  # several by name, as older folders have them
            template = {one["name"]: one["template"] for one in template}.get("default")
        self.chat_template = template
        end = self.end_of_text(ids, place)
        self.eot_token = ids[end]
        self.documents_json = hide_names(json.loads(self.library.to_str()), end)
        self.documents = Library.from_str(self.documents_json)
        names = [token.content for token in self.library.get_added_tokens_decoder().values()]
        self.probes = [*PROBES, *(f"{name} {name}{name} a{name}a" for name in names)]
        self.notes = self.try_probes(place)

    def end_of_text(self, ids: dict[str, int], place: str) -> str:
        """The name of the token that ends a document: the eos_token of the settings, or
        <|endoftext|>."""
        end = content(self.settings.get("eos_token"))
        if end is None and END_OF_TEXT in ids:
            return END_OF_TEXT
        if end in ids:
            return end
        special = [t.content for t in self.library.get_added_tokens_decoder().values() if t.special]
        reason = f"its vocabulary has no {END_OF_TEXT}, and no tokenizer_config.json names another"
        if end is not None:
            reason = f"its eos_token {end!r} is not in its vocabulary"
        way_out = "train it with a special token"
        if special:
            line = json.dumps({"eos_token": special[0]})
            way_out = f"its special tokens are {' '.join(special[:9])}: write one of them as {line}"
            way_out += " into a tokenizer_config.json beside it"
        raise UserError(
            f"{place} does not say which token ends a document: {reason}\nHINT: {way_out}"
        )

    def try_probes(self, place: str) -> list[str]:
        """Encode and decode some texts. Returns notes of what it changes in them, and raises
        UserError if it loses one."""
        changes = []
        for text in self.probes:
            try:
                ids = self.encode(text)
                back = self.decode(ids)
                outcome = f"{text!r} comes back as {back!r}"
            except Exception as error:  # the package's, if what is unknown has no token
                ids = []
                outcome = f"{text!r} can't be encoded ({error})"
            if not ids or not back.strip() or self.eot_token in ids:
                raise UserError(
                    f"{place} loses text: {outcome}\nHINT: train it with a token for every byte, as"
                    " docs/data.md does, or with an unk_token that doesn't end documents"
                )
            if back != text:
                changes.append(outcome)
        return [f"this tokenizer changes texts: {', '.join(changes[:3])}"] if changes else []

    @cached_property
    def behavior(self):
        """A digest of the vocabulary and the merges, and of what it makes of some texts."""
        whole = json.loads(self.library.to_str())
        model = {key: value for key, value in whole["model"].items() if value and key != "vocab"}
        if isinstance(whole["model"]["vocab"], list):  # Unigram's, with scores
            model["vocab"] = whole["model"]["vocab"]
        every_token = self.decode([*range(self.n_vocab)])
        texts = [*self.probes, every_token]
        facts = [
            model,
            self.library.get_vocab(with_added_tokens=True),
            self.eot_token,
            [[self.encode(text), self.encode_prompt(text)] for text in texts],
            every_token,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        return self.encode_on_all_cores([text])[0].tolist()

    def encode_on_all_cores(self, texts: list[str]) -> list[np.ndarray]:
        texts = [utf8(text).decode() for text in texts]
        encodings = self.documents.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_prompt(self, text):
        return self.library.encode(utf8(text).decode(), add_special_tokens=False).ids

    @cached_property
    def batch_encoder(self):
        whole = json.loads(self.documents_json)
        is_bpe = whole["model"]["type"] == "BPE"
        is_byte_level = is_bpe and "ByteLevel" in json.dumps(whole["pre_tokenizer"])
        tokenizer = self.documents_json if is_byte_level else "{}"  # which gigatoken refuses
        return BatchEncoder(self.encode_on_all_cores, "tokenizers", tokenizer, self.probes)

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)

    def decoder(self, prompt=()):
        return JsonDecoder(self.decode, prompt)

    def count_bytes(self, ids):
        ends = np.flatnonzero(ids == self.eot_token)
        documents = [part[part != self.eot_token].tolist() for part in np.split(ids, ends)]
        texts = self.library.decode_batch(documents, skip_special_tokens=False)
        return sum(len(text.encode()) for text in texts)

    def crop(self, rows):
        whole = json.loads(self.state["tokenizer.json"])
        added = whole["added_tokens"]
        beyond = [
            token
            for token in added
            if token["id"] >= rows and token["special"] and token["id"] != self.eot_token
        ]
        if not beyond:
            return self
        whole["added_tokens"] = [token for token in added if token not in beyond]
        files = {**self.state, "tokenizer.json": json.dumps(whole, ensure_ascii=False, indent=2)}
        cropped = tokenizer_from_files(files, "its tokenizer")
        names = " ".join(token["content"] for token in beyond)
        note = f"{names} has no row in the token table, and is left out of the tokenizer"
        cropped.notes = [*cropped.notes, note]
        return cropped

    def files(self, block_size):
        end = self.library.id_to_token(self.eot_token)
        settings = {
            "bos_token": end,
            "pad_token": end,  # for batches of prompts
            **self.special_tokens(),
            "model_max_length": block_size,
            "clean_up_tokenization_spaces": False,
            # the class that takes tokenizer.json as it is; others build their own from its words
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        before = json.loads(self.json).get("pre_tokenizer") or {}
        if "add_prefix_space" in before:  # transformers takes the word of this file over its own
            settings["add_prefix_space"] = before["add_prefix_space"]
        files = {
            "tokenizer.json": self.json.encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }
        if self.chat_template:
            files[CHAT_TEMPLATE] = self.chat_template.encode()
        return files

    def special_tokens(self) -> dict[str, str]:
        """{"eos_token": "<|endoftext|>", ...}: the tokens that have a role, by their names."""
        ids = self.library.get_vocab(with_added_tokens=True)
        roles = {}
        for key, value in self.settings.items():
            # transformers would give one that is not in the vocabulary a new id
            if key.endswith("_token") and content(value) in ids:
                roles[key] = content(value)
        return roles | {"eos_token": self.library.id_to_token(self.eot_token)}


class JsonDecoder:
    """The package's own DecodeStream does the same, but raises on bytes that are not UTF-8."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]):
        self.decode = decode
        self.shown = [*prompt]  # ids whose text is out; how a token looks depends on them
        self.waiting = []  # ids since then

    def step(self, id: int) -> str:
        self.waiting.append(id)
        text = self.end()
        if not text or text.endswith("\ufffd"):  # perhaps a character that is not complete
            return ""
        self.shown, self.waiting = self.waiting, []
        return text

    def end(self) -> str:
        return self.decode(self.shown + self.waiting)[len(self.decode(self.shown)) :]


def read_settings(files: dict[str, str], place: str) -> dict:
    """tokenizer_config.json and special_tokens_map.json as one, as transformers reads them."""
    try:
        settings = {**json.loads(files.get("tokenizer_config.json", "{}"))}
        if "added_tokens_decoder" in settings:  # written by a version that doesn't need the other
            return settings
        return settings | {**json.loads(files.get("special_tokens_map.json", "{}"))}
    except (ValueError, TypeError) as error:
        names = " or ".join(SETTINGS)
        raise UserError(f"{names} of {place} is damaged: {one_line_error(error)}") from None


def content(token) -> str | None:
    """The name of a token of the settings: a string, or an AddedToken written out."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


# what comes before the names of special tokens while documents are encoded: a code point that
# will never be a character
HIDDEN = "\uffff"


def hide_names(whole: dict, end: str) -> str:
    """The tokenizer.json of a tokenizer to which the names of special tokens are text like any
    other: the same ids have names that no text holds.

    end: the name of the token that ends a document, special or not.
    """
    special = {end} | {token["content"] for token in whole["added_tokens"] if token["special"]}

    def hide(name):
        return HIDDEN + name if name in special else name

    model = whole["model"]
    if isinstance(model["vocab"], dict):
        vocab = {hide(word): id for word, id in model["vocab"].items()}
    else:  # Unigram's
        vocab = [[hide(word), score] for word, score in model["vocab"]]
    added = [token | {"content": hide(token["content"])} for token in whole["added_tokens"]]
    model = model | {"vocab": vocab}
    if "unk_token" in model:
        model["unk_token"] = hide(model["unk_token"])
    return json.dumps(whole | {"added_tokens": added, "model": model})


# ---- many texts at once ----

CHECKED = 100_000  # characters of a text that both encoders encode, at most
MEMORY_LIMIT = 200_000_000  # bytes of memory for the words that gigatoken remembers
STATM = Path("/proc/self/statm")  # the memory of this process, on Linux


class EncoderMismatch(Exception):
    """The ids of a text are wrong. index: the number of the text in its batch."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class BatchEncoder:
    """Encodes many texts with gigatoken, ten times faster than the package that defines the
    tokenizer, and compares the two on one text of each batch.

    truth: encodes a list of texts with that package; truth_name: the package. tokenizer_json: the
    same tokenizer for gigatoken. examples: texts on which the two must agree. If they don't, or if
    gigatoken is not installed or can't read the tokenizer, the truth encodes everything.
    """

    def __init__(
        self,
        truth: Callable[[list[str]], list[np.ndarray]],
        truth_name: str,
        tokenizer_json: str,
        examples: list[str],
    ):
        self.truth = truth
        self.truth_name = truth_name
        self.tokenizer_json = tokenizer_json
        self.batches = 0
        try:
            self.make_gigatoken()
            ids = map(self.gigatoken.encode, examples)
            agree = all(map(np.array_equal, ids, truth(examples)))
        except (ImportError, RuntimeError):  # not installed; a tokenizer that it can't read
            agree = False
        self.name = f"gigatoken, checked against {truth_name}"
        if not agree:
            self.name = f"{truth_name} in {os.cpu_count()} threads"
            self.gigatoken = None

    def make_gigatoken(self) -> None:
        """Start with an empty memory: gigatoken remembers every word that it encodes."""
        from gigatoken import Tokenizer as Gigatoken

        self.gigatoken = Gigatoken.from_json(self.tokenizer_json)
        self.memory_before = memory_in_use()
        self.characters = 0  # encoded so far

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text. Raises EncoderMismatch if gigatoken is wrong."""
        if self.gigatoken is None:
            return self.truth(texts)
        if self.memory_of_words() > MEMORY_LIMIT:
            self.make_gigatoken()
        self.characters += sum(map(len, texts))
        arrays = [self.gigatoken.encode(utf8(text)) for text in texts]
        if texts:
            self.check(texts)
        return arrays

    def memory_of_words(self) -> int:
        """Bytes that gigatoken's words take: by how much the process has grown. macOS doesn't say
        that; there, what they would take if nearly all words were new."""
        if STATM.exists():
            return memory_in_use() - self.memory_before
        return 3 * self.characters

    def check(self, texts: list[str]) -> None:
        """Encode one of the texts, or a piece of it, with both. Raises EncoderMismatch."""
        self.batches += 1
        index = self.batches % len(texts)
        text = utf8(texts[index]).decode()
        start = CHECKED * (self.batches % (1 + len(text) // CHECKED))
        piece = text[start : start + CHECKED]
        ids = self.gigatoken.encode(piece)
        [true_ids] = self.truth([piece])
        if np.array_equal(ids, true_ids):
            return
        n = min(len(ids), len(true_ids))
        place = int(np.argmin([*(ids[:n] == true_ids[:n]), False]))  # of the first difference

        def show(name, ids):
            ids = ids[place : place + 8].tolist()
            return f"    {name:<12}{ids} {self.gigatoken.decode(ids).decode(errors='replace')!r}\n"

        raise EncoderMismatch(
            f"gigatoken and {self.truth_name} encode a text differently, from token {place:,} on:\n"
            + show("gigatoken", ids)
            + show(self.truth_name, true_ids)
            + f"HINT: `pip uninstall gigatoken`, and {self.truth_name} encodes everything",
            index,
        )


def memory_in_use() -> int:
    """The memory of this process in bytes; 0 if the system doesn't say it."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


# ---- GPT-2's files ----


def bytes_vocab() -> dict[str, int]:
    """{character: byte}. GPT-2 writes each byte as a printable character: itself if it is one, else
    the next code point from 256 on."""
    others = iter(range(256, 512))
    vocab = {}
    for byte in range(256):
        is_printable = chr(byte).isprintable() and chr(byte) != " "
        vocab[chr(byte if is_printable else next(others))] = byte
    return vocab | {END_OF_TEXT: 256}


def gpt2_files() -> dict[str, bytes]:
    """OpenAI's vocabulary and merges, which tiktoken has fetched and checked."""
    return {
        "vocab.json": read_file_cached(f"{OPENAI}/encoder.json", GPT2_VOCAB),
        "merges.txt": read_file_cached(f"{OPENAI}/vocab.bpe", GPT2_MERGES),
    }


def bytes_files() -> dict[str, bytes]:
    """The same of the tokenizer of bytes, which has nothing to merge."""
    return {"vocab.json": json.dumps(bytes_vocab()).encode(), "merges.txt": b"#version: 0.2\n"}


def published_files(model_files: dict[str, bytes], block_size: int) -> dict[str, bytes]:
    """{file name: content} of what publishes a tokenizer of GPT-2's kind: see Tokenizer.files.

    model_files: its vocab.json and merges.txt.
    """
    # a pad token is for batches of prompts
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    roles = dict.fromkeys(names, END_OF_TEXT)
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        **roles,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return model_files | {
        "tokenizer.json": tokenizer_json(model_files).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(roles, indent=2) + "\n").encode(),
    }


def tokenizer_json(model_files: dict[str, bytes]) -> str:
    """tokenizer.json, from vocab.json and merges.txt."""
    vocab = json.loads(model_files["vocab.json"])
    _, *lines = model_files["merges.txt"].decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    library = Library(models.BPE(vocab, merges, **empty))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True)])
    return library.to_str(pretty=True)
