"""Documents of every type of file: the texts that went in, from any place on, here and from the
Hub; what is not a text is named, and a file that can't be read is not taken for one that can."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub import COMMIT, Hub

from lib.cli import UserError
from lib.documents import NotText, documents, file_type, local_files

TEXTS = [
    "plain words",
    "é中🙂 and a literal <|endoftext|>",
    "quotes \" and \\ and ' and, commas;\tand tabs",
    "lines\nand\r\nlines\n\nof another\u2028kind\x85",
    "",
    " space around ",
    "[looks like an array]",
    "long " * 50_000,
    "\ufeffa mark inside",
    "\x00 and \x1f",
    "null",
]


def as_jsonl(texts) -> bytes:
    rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    return "\n".join(rows).encode()


def as_jsonl_unescaped(texts) -> bytes:
    rows = [{"text": text, "id": str(n)} for n, text in enumerate(texts)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in rows).encode()


def as_array(texts) -> bytes:
    return json.dumps([{"text": text, "id": None} for text in texts], indent=2).encode()


def as_parquet(texts, **columns) -> bytes:
    file = io.BytesIO()
    columns = {"id": list(range(len(texts)))} | columns
    pq.write_table(pa.table(columns | {"text": texts}), file, row_group_size=4)
    return file.getvalue()


def as_separated(texts, delimiter) -> bytes:
    file = io.StringIO()
    rows = [["id", "text", "more"]] + [[n, text, ""] for n, text in enumerate(texts)]
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode()


FORMATS = {  # name of a file: bytes of texts
    "a.jsonl": as_jsonl,
    "b.NDJSON": as_jsonl_unescaped,
    "lines.json": as_jsonl,
    "array.json": as_array,
    "array.jsonl": as_array,
    "d.Parquet": as_parquet,
    "e.csv": lambda texts: as_separated(texts, ","),
    "f.tsv": lambda texts: as_separated(texts, "\t"),
    "g.txt": lambda texts: texts[0].encode(),
    "h.MD": lambda texts: texts[0].encode(),
}


def zstandard(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as parallel compressors write them
    return b"".join(
        pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]) if part
    )


COMPRESSIONS = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content[:50]) + gzip.compress(content[50:]),
    ".BZ2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}
CASES = [
    (name, suffix)
    for name, suffix in itertools.product(FORMATS, COMPRESSIONS)
    if not (name[0] == "d" and suffix)  # a .parquet has its compression inside
]


def write(directory, name, suffix, texts) -> str:
    path = directory / (name + suffix)
    path.write_bytes(COMPRESSIONS[suffix](FORMATS[name](texts)))
    return str(path)


def texts_of(name) -> list[str]:
    """What a file with TEXTS holds: a .txt is one document; csv can't have a NUL before 3.11."""
    if name[0] in "gh":
        return [TEXTS[1]]
    return [text.replace("\0", "0") for text in TEXTS]


@pytest.mark.parametrize("name, suffix", CASES)
def test_the_texts_that_went_in(name, suffix, tmp_path):
    """Two files, whole and from every place on."""
    texts = texts_of(name)
    files = 2 * [write(tmp_path, name, suffix, texts)]
    found = list(documents(files, "text"))
    assert [text for text, _ in found] == 2 * texts
    places = [(0, 0), *(place for _, place in found)]
    assert places[-1] == (1, len(texts)) and len(set(places)) == len(places)
    for n, place in enumerate(places):
        assert list(documents(files, "text", place)) == found[n:]


def test_the_same_from_the_hub(tmp_path):
    """Each file of a repository gives the texts that it gives here."""
    files = {
        name + suffix: COMPRESSIONS[suffix](FORMATS[name](texts_of(name))) for name, suffix in CASES
    }
    program = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lib.documents import file_documents
from lib.hub import fetched
folder = Path({str(tmp_path / "downloads")!r})
names = json.load(sys.stdin)
files = ["hf://datasets/org/all@{COMMIT}/" + name for name in names]
for name, file, path in zip(names, files, fetched(files, folder)):
    found = list(file_documents(path, "text", (0, 0), file))
    half = len(found) // 2
    assert list(file_documents(path, "text", found[half][1], file)) == found[half + 1:], name
    print(json.dumps([name, [text for text, _ in found]]))
"""
    with Hub({"datasets/org/all": files}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(list(files)),
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == files.keys()
    for name, texts in found.items():
        assert texts == texts_of(name), name


def test_random_texts_in_every_format(tmp_path):
    """Any characters in any order, read to the end and from a random place."""
    dice = random.Random(5)
    alphabet = [
        '"',
        "'",
        ",",
        "\t",
        "\n",
        "\r",
        "\\",
        "{",
        "[",
        " ",
        "a",
        "é",
        "🙂",
        "\u2029",
        "\x1c",
    ]
    for number in range(60):
        texts = [
            "".join(dice.choices(alphabet, k=dice.randrange(12)))
            for _ in range(dice.randint(1, 30))
        ]
        name = dice.choice([name for name in FORMATS if name[0] not in "gh"])
        suffix = dice.choice([suffix for case, suffix in CASES if case == name])
        directory = tmp_path / str(number)
        directory.mkdir()
        file = write(directory, name, suffix, texts)
        found = list(documents([file], "text"))
        if name == "f.tsv":
            assert_right_or_refused([text for text, _ in found], texts)
        else:
            assert [text for text, _ in found] == texts, (name, suffix)
        n = dice.randrange(len(texts))
        assert list(documents([file], "text", found[n][1])) == found[n + 1 :]


@pytest.mark.parametrize("name", FORMATS)
def test_a_byte_order_mark_is_not_text(name, tmp_path):
    if name == "d.Parquet":
        return
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FORMATS[name](["one", "two"]))
    texts = [text for text, _ in documents([str(path)], "text")]
    assert texts == (["one"] if name[0] in "gh" else ["one", "two"])


@pytest.mark.parametrize("name, suffix", CASES)
def test_files_without_documents_are_passed(name, suffix, tmp_path):
    nothing = "" if name[0] in "gh" else None
    without_rows = FORMATS[name]([nothing] if nothing is not None else [])
    if name[0] == "d":
        without_rows = as_parquet(pa.array([], pa.string()))
    contents = [b"", COMPRESSIONS[suffix](b""), COMPRESSIONS[suffix](without_rows)]
    if name[0] in "gh":
        contents.append(COMPRESSIONS[suffix](b"\xef\xbb\xbf"))
    files = []
    for number, content in enumerate(contents):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / (name + suffix)
        path.write_bytes(content)
        files.append(str(path))
    (tmp_path / "last").mkdir()
    files.append(write(tmp_path / "last", name, suffix, ["a text"]))
    assert list(documents(files, "text")) == [("a text", (len(contents), 1))]


# ---- what is no text ----

NO_TEXT = {  # what stands there -> what is said
    "4": "text is the number 4, not a text",
    "1.5e3": "text is the number 1500.0, not a text",
    "NaN": "text is the number NaN, not a text",
    "true": "text is true, not a text",
    "null": "text is null, not a text",
    '["a", 1]': 'text is the list ["a", 1], not a text',
    '{"a": "b"}': 'text is the object {"a": "b"}, not a text',
    '"a \\ud800 b"': "text has a lone surrogate, U+D800, which no UTF-8 has",
    '"\\udce9"': "text has a lone surrogate, U+DCE9, which no UTF-8 has",
}


@pytest.mark.parametrize("found", NO_TEXT)
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_json_that_is_no_text(kind, found, tmp_path):
    rows = ['{"text": "one", "id": 1}', f'{{"text": {found}, "id": 2}}', '{"text": "three"}']
    path = tmp_path / "a.json"
    path.write_text("\n\n".join(rows) if kind == "lines" else f"[{','.join(rows)}]")
    where = f"{path} line 3" if kind == "lines" else f"{path} element 2"
    got = [document for document, _ in documents([str(path)], "text")]
    assert got == ["one", NotText(NO_TEXT[found], where), "three"]
    assert str(got[1]) == f"{where}: {NO_TEXT[found]}"


LINES = {  # a line that holds no document -> what is said
    b'{"text": "latin \xe9"}': "it is not UTF-8: byte 0xE9 at place 16 (invalid continuation byte)",
    b'{"text": "cut"': "it is not JSON: Expecting ',' delimiter at place 14",
    b"plain words": "it is not JSON: Expecting value at place 0",
    b'{"text": "a"} {"text": "b"}': "it is not JSON: Extra data at place 14",
    b'{"body": "a", "id": 1}': "--text_field text: there is no such field; it has body, id",
    b"{}": "--text_field text: there is no such field; it has none",
    b"7": "it is a number, not an object with the field text",
    b'["text"]': "it is a list, not an object with the field text",
    b'"text"': "it is a text, not an object with the field text",
    b"null": "it is null, not an object with the field text",
    rb'{"\ud800x": "hello"}': "--text_field text: there is no such field; it has \ud800x",
    b'{"text": ' + b"[" * 100_000: "it is not JSON that can be read: it is nested too deep",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("first", [True, False])
def test_lines_that_hold_no_document(line, first, tmp_path):
    good = b'{"text": "good"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line, good] if first else [good, line]))
    number = 1 if first else 2
    if line == b'["text"]' and first:  # a file that begins so is arrays
        said = "it is a text, not an object with the field text"
        got = [document for document, _ in documents([str(path)], "text")]
        assert got == [NotText(said, f"{path} element 1"), "good"]
        return
    bad = NotText(LINES[line], f"{path} line {number}")
    got = [document for document, _ in documents([str(path)], "text")]
    assert got == ([bad, "good"] if first else ["good", bad])


NAMES = [b"s3:a.parquet", b"file:a.parquet", b"100% a:b#.parquet", b"\xff.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_is_no_address_and_need_not_be_utf8(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        file.write(as_parquet(["one", "two"]))
    assert [text for text, _ in documents([os.fsdecode(name)], "text")] == ["one", "two"]


def test_parquet_values_that_are_no_text(tmp_path):
    schemas = {
        "number": (pa.array([1, 2]), ["text is the number 1, not a text"] * 1),
        "flag": (pa.array([True]), ["text is true, not a text"]),
        "list": (pa.array([["a"]]), ['text is the list ["a"], not a text']),
        "object": (pa.array([{"a": 1}]), ['text is the object {"a": 1}, not a text']),
        "null": (pa.array([None], pa.string()), ["text is null, not a text"]),
    }
    for name, (column, said) in schemas.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        first, _ = next(documents([str(path)], "text"))
        assert first == NotText(said[0], f"{path} row 1")


def test_parquet_strings_that_are_not_utf8(tmp_path):
    """Some writers call any bytes a string."""
    texts = pa.array([b"one", b"latin \xe9", b"three"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    said = "it is not UTF-8: byte 0xE9 at place 6 (unexpected end of data)"
    got = [document for document, _ in documents([str(path)], "text")]
    assert got == ["one", NotText(said, f"{path} row 2"), "three"]


@pytest.mark.parametrize("form", [pa.binary(), pa.large_binary(), pa.binary(6), pa.binary_view()])
def test_parquet_bytes_are_texts_if_they_are_utf8(form, tmp_path):
    texts = [b"c\xc3\xa9lxx", b"latin\xe9", None, b"second"]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, form)}), path)
    found = [document for document, _ in documents([str(path)], "text")]
    bad = NotText("it is not UTF-8: byte 0xE9 at place 5 (unexpected end of data)", f"{path} row 2")
    none = NotText("text is null, not a text", f"{path} row 3")
    assert found == ["célxx", bad, none, "second"]


def printed_by_hand(rows) -> str:
    texts = [json.dumps(row["text"]) for row in rows]
    return "\n".join(f'{{"text": {text},\n  "id": 7\n}}' for text in texts)


PRINTED = {  # JSON over several lines
    "one object": lambda rows: json.dumps(rows[0], indent=2),
    "objects": lambda rows: "\n".join(json.dumps(row, indent=4) for row in rows),
    "by hand": printed_by_hand,
    "behind empty lines": lambda rows: "\n \n" + json.dumps(rows[0], indent="\t"),
    "an array": lambda rows: json.dumps(rows, indent=1),
    "arrays": lambda rows: json.dumps(rows[:2], indent=1) + json.dumps(rows[2:]),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("how", PRINTED)
def test_json_over_several_lines(how, suffix, tmp_path):
    rows = [{"text": text, "id": n} for n, text in enumerate(TEXTS)]
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](PRINTED[how](rows).encode()))
    texts = TEXTS[:1] if how in ("one object", "behind empty lines") else TEXTS
    found = list(documents([str(path)], "text"))
    assert [text for text, _ in found] == texts
    assert list(documents([str(path)], "text", found[0][1])) == found[1:]


def test_a_window_that_the_reader_does_not_take(tmp_path):
    """The message names the program that takes it."""
    if not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    path = tmp_path / "a.jsonl.zst"
    content = b'{"text": "' + b"x" * 1000 + b'"}\n'
    pack = ["zstd", "-c", "--long=31", "--ultra", "-22"]
    path.write_bytes(subprocess.run(pack, input=content, capture_output=True, check=True).stdout)
    with pytest.raises(UserError, match="too much memory.*\nHINT: `zstd -d --long=31` unpacks"):
        list(documents([str(path)], "text"))
    subprocess.run(["zstd", "-d", "--long=31", "-q", path], check=True)
    assert len(list(documents([str(path.with_suffix(""))], "text"))) == 1


@pytest.mark.parametrize("form", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_parquet_strings_of_every_form(form, tmp_path):
    texts = ["a", "b", "a"]
    column = pa.array(texts, pa.string())
    column = column.dictionary_encode() if form == "dictionary" else column.cast(form)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    got = documents([str(tmp_path / "a.parquet")], "text")
    assert [document for document, _ in got] == texts


CSV = {  # the lines behind `id,text` -> the documents; a pair: the line and what is said of it
    '1,"a, b"\n2,c\n': ["a, b", "c"],
    '1,"two\nlines"\n\n2,c\n': ["two\nlines", "c"],
    '1,"a ""quoted"" word"\n': ['a "quoted" word'],
    "1,he said 'so' and \"so\"\n": ["he said 'so' and \"so\""],
    "1,Hello, world\n2,b\n": [("line 2", "it has 3 cells, the first line names 2"), "b"],
    '1,"two\nlines"\n2\n3,c\n': [
        "two\nlines",
        ("line 4", "it has 1 cells, the first line names 2"),
        "c",
    ],
    "1,\n": [""],
}


def test_csv_behind_empty_lines(tmp_path):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        lines = ["", "", delimiter.join(["id", "text"]), "", delimiter.join(["1", "a"])]
        (tmp_path / name).write_text("\r\n".join(lines))
        found = list(documents([str(tmp_path / name)], "text"))
        assert found == [("a", (0, 1))]


@pytest.mark.parametrize("rows", CSV)
def test_csv(rows, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n" + rows.encode())
    expected = [
        row if isinstance(row, str) else NotText(row[1], f"{path} {row[0]}") for row in CSV[rows]
    ]
    assert [document for document, _ in documents([str(path)], "text")] == expected


AMBIGUOUS = (
    "quotation marks may enclose a cell here, or belong to its text, and .tsv does not say which;"
    " .csv or .jsonl would"
)
TSV = {  # the lines behind `id text` -> the documents; the number of a line: that one is ambiguous
    "1\tOne\n2\t\"Two\" and 'so'\n3\tit's\n": ["One", "\"Two\" and 'so'", "it's"],
    '1\t"Stop," she said.\n2\tb\n': ['"Stop," she said.', "b"],
    '1\t"a ""quoted"" word"\n2\t"""so"""\n': ['a "quoted" word', '"so"'],
    '1\t"a\ttab"\n2\tb': ["a\ttab", "b"],
    '1\t"two\nlines"\n2\tb\n': ["two\nlines", "b"],
    f'1\t"{"long " * 50_000}\nlines"\n': ["long " * 50_000 + "\nlines"],
    '1\t"two\r\n\r\nlines and ""a mark"""\r\n2\tb\n': ['two\r\n\r\nlines and "a mark"', "b"],
    '1\t"two\n\tlines"\n2\tb\n': [2, "b"],
    '1\t"Hello."\n2\tb\n': [2, "b"],
    '1\t"Hello."\n2\t"a" b\n3\t"Hello."\n': [2, '"a" b', '"Hello."'],
    '1\t"Hello."\n2\t"a\tb"\n3\t"Hello."\n4\t"two\n\tlines"': [2, "a\tb", "Hello.", "two\n\tlines"],
    '1\tOne\n2\t"Hello, he said\n3\tTwo\n4\tThree\n5\tand then he left."\n6\tFour\n': [
        "One",
        3,
        "Four",
    ],
    '1\tan "a"\n2\t"Hello, he said\n3\tTwo\n4\tand then he left."': [
        'an "a"',
        '"Hello, he said',
        "Two",
        'and then he left."',
    ],
    '1\t"open\n2\tb\n3\t"c" d\n4\t"e""f"\n5\tg': ['"open', "b", '"c" d', '"e""f"', "g"],
    '1\t"open\n2\t3\t4\n': ['"open', (3, 3)],
}


@pytest.mark.parametrize("rows", TSV)
def test_tsv(rows, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"id\ttext\n" + rows.encode())
    expected = TSV[rows]
    for n, row in enumerate(expected):
        if isinstance(row, int):
            expected[n] = NotText(AMBIGUOUS, f"{path} line {row}")
        if isinstance(row, tuple):
            said = f"it has {row[1]} cells, the first line names 2"
            expected[n] = NotText(said, f"{path} line {row[0]}")
    found = list(documents([str(path)], "text"))
    assert [document for document, _ in found] == expected
    for n, (_, place) in enumerate(found):
        assert list(documents([str(path)], "text", place)) == found[n + 1 :]


def test_tsv_whose_marks_enclose_and_do_not(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"a ""b"""\n2\t"c" d\n')
    said = "a.tsv line 3: quotation marks are part of a text here, but enclose cells above"
    with pytest.raises(UserError, match=said):
        list(documents([str(path)], "text"))


def assert_right_or_refused(found, texts):
    """Ambiguous texts aside, the texts are those that went in."""
    assert len(found) == len(texts)
    for document, text in zip(found, texts, strict=True):
        if isinstance(document, NotText):
            assert document.what == AMBIGUOUS and '"' in text or "\n" in text or "\r" in text
        else:
            assert document == text


@pytest.mark.parametrize("writer", ["nothing enclosed", "what needs it", "all", "all texts"])
def test_tsv_of_every_writer(writer, tmp_path):
    """Random texts with marks, as pandas writes them in each of its ways, and as a program that
    knows of no quotation marks: no text comes back as another one."""
    import pandas

    dice = random.Random(7)
    alphabet = ['"', '""', '"', "a", "b ", ",", "'", "é", "\t", "\n", "\r\n"]
    if writer == "nothing enclosed":
        alphabet = alphabet[:-3]
    read = 0
    for _ in range(100):
        texts = ["".join(dice.choices(alphabet, k=dice.randrange(1, 9))) for _ in range(30)]
        path = tmp_path / "a.tsv"
        if writer == "nothing enclosed":
            lines = ["id\ttext"] + [f"{n}\t{text}" for n, text in enumerate(texts)]
            path.write_text("\n".join(lines))
        else:
            quoting = {"all": csv.QUOTE_ALL, "all texts": csv.QUOTE_NONNUMERIC}.get(writer, 0)
            table = pandas.DataFrame({"id": range(30), "text": texts})
            table.to_csv(path, sep="\t", index=False, quoting=quoting)
        try:
            found = [document for document, _ in documents([str(path)], "text")]
        except UserError:
            continue
        read += sum(isinstance(document, str) for document in found)
        if writer == "nothing enclosed":  # a refused row may have more than one line
            assert all(isinstance(document, NotText) or document in texts for document in found)
        else:
            assert_right_or_refused(found, texts)
    assert read > 2000
    assert writer in ("nothing enclosed", "what needs it") or read == 3000


def test_csv_bytes_that_are_not_utf8_matter_in_their_column_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n\xe9,good \xc3\xa9\n2,bad \xe9 byte\n")
    said = "it is not UTF-8: byte 0xE9 at place 4 (invalid continuation byte)"
    got = [document for document, _ in documents([str(path)], "text")]
    assert got == ["good é", NotText(said, f"{path} line 3")]


@pytest.mark.parametrize(
    "content, said",
    [
        ('id,text\n1,"abc"def\n', r"a.csv line 2: it is not CSV: ',' expected after '\"'"),
        ('id,text\n1,"never ends\n2,b\n', "a.csv line 3: it is not CSV: unexpected end of data"),
        ("text;id\na;1\n", "a.csv: --text_field text: there is no such field; it has text;id"),
        ("text,text\na,1\n", "a.csv: --text_field text: several columns have this name"),
    ],
)
def test_csv_whose_rows_cannot_be_told(content, said, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        list(documents([str(tmp_path / "a.csv")], "text"))


@pytest.mark.parametrize("name", ["g.txt", "h.MD"])
def test_a_text_file_that_is_not_utf8(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbflatin \xe9")
    ((document, place),) = documents([str(path)], "text")
    said = "it is not UTF-8: byte 0xE9 at place 6 (unexpected end of data)"
    assert document == NotText(said, str(path)) and place == (0, 1)


# ---- other fields ----


def test_what_stands_in_other_fields_does_not_matter(tmp_path):
    """Types that differ from row to row and file to file, columns of any kind."""
    rows = [
        {"text": "a", "id": 1},
        {"id": "x", "text": "b", "more": [1, {"text": 4}]},
        {"text": "c", "id": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "d", "id": {"deep": True}}))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [text for text, _ in documents(files, "text")] == list("abcd")
    columns = [{"id": [1, 2]}, {"id": ["x", None]}, {"id": [[1.5], []]}, {}]
    files = []
    for number, more in enumerate(columns):
        files.append(str(tmp_path / f"{number}.parquet"))
        with open(files[-1], "wb") as file:
            file.write(as_parquet(["a", "b"], **more))
    assert [text for text, _ in documents(files, "text")] == list("ab") * 4


def test_a_field_inside_another(tmp_path):
    rows = [
        {"meta": {"text": "a", "n": 1}},
        {"meta.text": "b", "meta": {"text": "no"}},
        {"meta": None},
        {"meta": {"n": 3}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = [document for document, _ in documents([str(tmp_path / "a.jsonl")], "meta.text")]
    said = "--text_field meta.text: there is no such field; it has meta"
    lines = [NotText(said, f"{tmp_path}/a.jsonl line {n}") for n in (3, 4)]
    assert got == ["a", "b", *lines]
    inside = [{"text": "a", "n": 1}, None, {"text": None, "n": 3}, {"text": "d", "n": 4}]
    pq.write_table(pa.table({"meta": inside, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    got = [document for document, _ in documents([str(tmp_path / "a.parquet")], "meta.text")]
    said = "meta.text is null, not a text"
    rows = [NotText(said, f"{tmp_path}/a.parquet row {n}") for n in (2, 3)]
    assert got == ["a", *rows, "d"]
    pq.write_table(pa.table({"meta.text": ["whole name"], "meta": ["no"]}), tmp_path / "b.parquet")
    assert next(documents([str(tmp_path / "b.parquet")], "meta.text"))[0] == "whole name"
    with pytest.raises(UserError, match="a.parquet: --text_field meta.body: there is no such fiel"):
        next(documents([str(tmp_path / "a.parquet")], "meta.body"))


# ---- files that can't be read ----


@pytest.mark.parametrize("name, suffix", [case for case in CASES if case[1] or case[0][0] == "d"])
def test_a_file_that_is_cut_short_or_something_else(name, suffix, tmp_path):
    path = tmp_path / (name + suffix)
    whole = COMPRESSIONS[suffix](FORMATS[name](texts_of(name)))
    for content in (whole[: len(whole) * 2 // 3], b"these are not the bytes of such a file"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="can't be read: "):
            list(documents([str(path)], "text"))
    path.unlink()
    with pytest.raises(UserError, match="can't be read: FileNotFoundError"):
        list(documents([str(path)], "text"))


def lines(numbers) -> bytes:
    return "".join(json.dumps({"text": str(n)}) + "\n" for n in numbers).encode()


PROGRAMS = {".xz": "xz", ".bz2": "bzip2", ".gz": "gzip", ".zst": "zstd"}
STREAMS = {  # what is made of three packed streams
    "three streams": b"".join,
    "padding": lambda parts: (4 * b"\0").join(parts),  # which is part of .xz alone
    "padding at the end": lambda parts: b"".join(parts) + 400 * b"\0",
    "a damaged first header": lambda parts: flipped(parts[0], 1) + parts[1] + parts[2],
    "a damaged later header": lambda parts: parts[0] + flipped(parts[1], 1) + parts[2],
    "a damaged later content": lambda parts: (
        parts[0] + flipped(parts[1], len(parts[1]) // 2) + parts[2]
    ),
    "a damaged later end": lambda parts: parts[0] + flipped(parts[1], -1) + parts[2],
    "cut short": lambda parts: b"".join(parts)[:-5],
    "cut in a header": lambda parts: parts[0] + parts[1] + parts[2][:3],
    "something behind it": lambda parts: b"".join(parts) + b"something else",
}


def flipped(content: bytes, place: int) -> bytes:
    content = bytearray(content)
    content[place] ^= 0x55
    return bytes(content)


@pytest.mark.parametrize("suffix", PROGRAMS)
@pytest.mark.parametrize("what", STREAMS)
def test_all_of_a_packed_file_or_none_of_it(what, suffix, tmp_path):
    """All that was packed, or a file that can't be read; and what its program unpacks, if that does
    so without a word."""
    program = PROGRAMS[suffix]
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    pack = [program, "-c", *(["--check"] if program == "zstd" else [])]
    parts = [
        subprocess.run(pack, input=lines(range(n, n + 10)), capture_output=True, check=True).stdout
        for n in (0, 10, 20)
    ]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(STREAMS[what](parts))
    try:
        found = b"".join(lines([text]) for text, _ in documents([str(path)], "text"))
    except UserError as error:
        assert f"{path} can't be read: " in str(error)
        found = None
    truth = subprocess.run([program, "-dc", path], capture_output=True)
    if truth.returncode == 0 and not truth.stderr:
        assert found == truth.stdout
    assert found in (None, lines(range(30)))


def test_an_array_that_is_cut_short(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(as_array(["a", "b"])[:-20])
    with pytest.raises(UserError, match=f"{path} line 8: the array is not JSON: Expecting"):
        list(documents([str(path)], "text"))


# ---- finding local files ----


def test_a_directory_is_its_files_of_one_type(tmp_path):
    for name in ("b.jsonl", "a.NDJSON.gz", "deep/c.json", "LICENSE", "data.bin", ".git/x.json"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found, notes = local_files(str(tmp_path / "texts"))
    assert notes == ["not read, as of other types: 2 files (1 .bin, 1 without ending)"]
    assert [os.path.relpath(f, tmp_path / "texts") for f in found] == [
        "a.NDJSON.gz",
        "b.jsonl",
        "deep/c.json",
    ]
    (tmp_path / "texts" / "README.md").write_text("")
    with pytest.raises(UserError) as error:
        local_files(str(tmp_path / "texts"))
    for pattern in ("/texts/**/*.jsonl'", "/texts/**/*.md'"):
        assert pattern in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of its files is .txt .md"):
        local_files(str(tmp_path / "empty"))


def test_files_of_a_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.TXT.gz", "[c].txt", "x.csv", "y.tsv", "z.doc"):
        (tmp_path / name).write_text("")
    assert local_files("?.txt") == (["b.txt"], [])
    assert local_files("[c].txt") == (["[c].txt"], [])
    assert local_files("org/name") == ([], [])
    for dataset, said in {
        "no.txt": "there is no such file",
        "no/*": "there is no such file",
        "[xy].?sv": "several types: give one type, as in '*.csv' or '*.tsv'",
        "z.doc": "z.doc is none of .txt .md",
        "*": "z.doc is none of",
    }.items():
        with pytest.raises(UserError) as error:
            local_files(dataset)
        assert said in str(error.value) and f"--dataset {dataset}" in str(error.value)
    (tmp_path / "below").mkdir()
    with pytest.raises(UserError, match="below is a directory; name its files, as in 'below/"):
        local_files("bel*")


@pytest.mark.parametrize("dataset", [".", "**/*.jsonl", "../texts/**/*.jsonl", "*/**/*.jsonl"])
def test_each_file_once_whatever_links_there_are(dataset, tmp_path, monkeypatch):
    """Two links to the parent, one from elsewhere, one to a directory of elsewhere, and one to a
    file."""
    for name in ("texts/deep/a.jsonl", "texts/deep/b.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "texts" / "deep" / "up").symlink_to("..")
    (tmp_path / "texts" / "deep" / "up too").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "deep" / "z.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path / "texts")
    files, notes = local_files(dataset)
    assert [os.path.basename(file) for file in files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert not notes and all(map(os.path.exists, files))


def test_types_that_are_not_read_are_said(tmp_path):
    for name in ("a.jsonl", "b.jsonl.lz4", "deep/c.zip", "d.text", "e.text", "LICENSE", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}')
    files, notes = local_files(str(tmp_path))
    assert files == [str(tmp_path / "a.jsonl")]
    others = "1 .lz4, 2 .text, 1 .zip, 1 without ending"
    assert notes == [f"not read, as of other types: 5 files ({others})"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=re.escape("none of its files is .txt .md .jsonl")) as error:
        local_files(str(tmp_path))
    assert others in str(error.value)


def test_a_folder_of_save_to_disk(tmp_path):
    """The message names the way out, and that is one."""
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    for dataset in (tmp_path / "saved", tmp_path / "saved" / "*.arrow"):
        with pytest.raises(UserError) as error:
            local_files(str(dataset))
        assert "data-00000-of-00001.arrow is none of" in str(error.value)
        assert "datasets.load_from_disk(FOLDER).to_parquet(FILE)" in str(error.value)
    path = str(tmp_path / "a.parquet")
    datasets.load_from_disk(str(tmp_path / "saved")).to_parquet(path)
    assert [text for text, _ in documents([path], "text")] == ["one", "two"]


def test_the_type_of_a_file():
    assert file_type("a.b/C.JSONL.Gz") == ".jsonl" and file_type("a.parquet") == ".parquet"
    assert file_type("a.gz") == "" and file_type("a.txt.zip") == ".zip"
    assert file_type("a.parquet.gz") == ".gz"  # which is none that is read


# ---- what local files need ----


def test_local_files_need_no_library_of_the_hub_and_no_home(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("datasets", "fsspec", "huggingface_hub", "pyarrow"):
    sys.modules[name] = None
import data_generator
words = ["--dataset=a.jsonl", "--tokenizer=bytes", "--shard_size=1000", "--data_dir=data"]
sys.exit(data_generator.main(words))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"HOME": "/dev/null/none", "HF_HOME": "/dev/null/none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.csv.gz"])
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    """100 MB of texts, in .parquet as one row group, cost less than 60 MB."""
    texts = ["some words of a document " * 200] * 20_000
    content = io.BytesIO()
    if "parquet" in kind:
        numbered = [f"{n} {text}" for n, text in enumerate(texts)]
        pq.write_table(
            pa.table({"text": numbered}), content, row_group_size=10**6, compression="none",
            use_dictionary=False,
        )  # fmt: skip
        content = content.getvalue()
    else:
        content = as_separated(texts, ",") if "csv" in kind else as_jsonl(texts)
    suffix = os.path.splitext(kind)[1]
    if suffix in COMPRESSIONS:
        content = COMPRESSIONS[suffix](content)
    (tmp_path / kind).write_bytes(content)
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pyarrow.compute, pyarrow.parquet
from lib.documents import documents
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1000
before = peak()
assert sum(1 for _ in documents([{str(tmp_path / kind)!r}], "text")) == 20_000
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60
