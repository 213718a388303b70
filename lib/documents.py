"""Documents: the texts in files, from any place on.

    files, notes = local_files("texts/*.jsonl.gz")
    for document, place in documents(files, "text"): ...  # each a str, or NotText
    documents(files, "text", place)                       # those after a place

| type                 | a document is                                                  |
|----------------------|----------------------------------------------------------------|
| .txt .md             | the file                                                       |
| .jsonl .ndjson .json | the field of an object: one a line, over lines, or in an array |
| .parquet             | the column of a row                                            |
| .csv .tsv            | the column of a row; the first row names the columns           |

all but .parquet plain or .gz .bz2 .xz .zst, in capitals too. Texts are UTF-8. A field may be inside
another: `meta.text`. Files without a document are skipped; other fields and columns don't matter.

A document is yielded as a str, or as NotText, which says where it is and what was found. A file
that can't be read raises UserError.
"""

import bz2
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections import Counter, deque
from dataclasses import dataclass

from lib.cli import UserError, count, one_line_error

BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which is no text
ROWS = 1024  # of a .parquet file that are read at a time
READ_ERRORS = (  # what damaged files raise, pyarrow's errors included
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
)


@dataclass(frozen=True)
class NotText:
    """What was found where a text should be."""

    what: str  # text is the number 4, not a text
    where: str = ""  # mine.jsonl line 4; file_documents adds it

    def __str__(self):
        return f"{self.where}: {self.what}"


def documents(files: list[str], text_field: str, place: tuple[int, int] = (0, 0)):
    """Yield (document, place after it) for each document of the files from a place on.

    A document is a str or NotText. A place is (number of the file, documents of it that are read).
    Raises UserError for a file that can't be read.
    """
    first, skip = place
    for number in range(first, len(files)):
        yield from file_documents(files[number], text_field, (number, skip), files[number])
        skip = 0


def file_documents(path, text_field: str, place: tuple[int, int], name: str, **options):
    """Yield (document, place after it) of one file.

    name: what messages call it; its ending is the type. options: delimiter and quoting of .csv.
    """
    number, skip = place
    read = READERS[file_type(name)]
    try:
        with opened(path) as file:
            if not file.peek(1):
                return
            if read is parquet_documents:  # which finds the place by itself, and faster
                found = read(file, text_field, skip)
            else:
                found = itertools.islice(read(file, text_field, **options), skip, None)
            for n, (where, document) in enumerate(found, start=skip + 1):
                if isinstance(document, NotText):
                    document = NotText(document.what, f"{name}{where}")
                yield document, (number, n)
    except UserError as error:  # of a reader, which says where in the file
        raise UserError(f"{name}{error}") from None
    except READ_ERRORS as error:
        message = f"{name} can't be read: {one_line_error(error)}"
        if name.lower().endswith(".zst"):  # a large window, perhaps, which the program can be told
            message += "\nHINT: `zstd -d --long=31` unpacks it, unless it is damaged"
        raise UserError(message) from None


# ---- the readers: each yields (where in the file, str or NotText) ----


def text_or_not(value, text_field: str) -> str | NotText:
    """A value of a field or a column, if it is a text that UTF-8 can hold."""
    if isinstance(value, str):
        try:
            if not value.isascii():
                value.encode()
            return value
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
            code = ord(value[error.start])
            return NotText(f"{text_field} has a lone surrogate, U+{code:04X}, which no UTF-8 has")
    if isinstance(value, bytes):  # as Spark and Impala may write a text into .parquet
        return decoded(value)
    kinds = {bool: "", type(None): "", dict: "the object ", list: "the list "}
    kind = kinds.get(type(value), "the number " if isinstance(value, int | float) else "the value ")
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) < 50 else shown[:50] + "..."
    return NotText(f"{text_field} is {kind}{shown}, not a text")


def decoded(content: bytes) -> str | NotText:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        return NotText(
            f"it is not UTF-8: byte 0x{byte:02X} at place {error.start} ({error.reason})"
        )


def text_document(file, text_field: str):
    if content := file.read().removeprefix(BOM):
        yield "", decoded(content)


def json_documents(file, text_field: str):
    """One object a line. Or an array of objects, or objects printed over several lines: those are
    read as a whole."""
    start = file.peek(2**20).removeprefix(BOM).lstrip()
    array = start.startswith(b"[")
    if array or is_unfinished(start):
        content = file.read()
        try:
            rows = json_values(content.removeprefix(BOM).decode())
        except json.JSONDecodeError as error:
            if array:
                place = f" line {error.lineno}"
                raise UserError(f"{place}: the array is not JSON: {error.msg}") from None
            file = io.BytesIO(content)  # lines, the first of which is cut short
        else:
            for number, row in enumerate(rows, start=1):
                yield f" element {number}", json_text(row, text_field)
            return
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line := line.rstrip():
            yield f" line {number}", line_text(line, text_field)


def is_unfinished(start: bytes) -> bool:
    """Does a JSON value begin in the first line of a file, and end in a later one?"""
    line, newline, _ = start.partition(b"\n")
    text = line.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return bool(newline) and error.pos == len(text)
    except RecursionError:
        pass
    return False


def json_values(text: str) -> list:
    """The values of a JSON text, one behind another, and the elements of those that are arrays."""
    values = []
    end = 0
    while (start := re.compile(r"\s*").match(text, end).end()) < len(text):
        value, end = json.JSONDecoder().raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    return values


def line_text(line: bytes, text_field: str) -> str | NotText:
    """The document of a line of JSON."""
    text = decoded(line)
    if isinstance(text, NotText):
        return text
    try:
        return json_text(json.loads(text), text_field)
    except json.JSONDecodeError as error:
        return NotText(f"it is not JSON: {error.msg} at place {error.pos}")
    except RecursionError:
        return NotText("it is not JSON that can be read: it is nested too deep")


def json_text(row, text_field: str) -> str | NotText:
    """row[text_field], or for `meta.text` row["meta"]["text"]."""
    if not isinstance(row, dict):
        names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        kind = names.get(type(row), "a number")
        return NotText(f"it is {kind}, not an object with the field {text_field}")
    value = row
    for name in [text_field] if text_field in row else text_field.split("."):
        if not isinstance(value, dict) or name not in value:
            return NotText(no_field(text_field, list(row)))
        value = value[name]
    return text_or_not(value, text_field)


def parquet_documents(file, text_field: str, skip: int):
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    file = pyarrow.OSFile(os.fsencode(file.name))  # which is read faster without Python
    # without the next two a whole row group, perhaps the whole file, would be read at once
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**22)
    names = table.schema_arrow.names
    path = [text_field] if text_field in names else text_field.split(".")
    fields = table.schema_arrow
    for name in path:
        if fields is None or fields.get_field_index(name) < 0:
            raise UserError(": " + no_field(text_field, names))
        kind = fields.field(name).type
        fields = kind if pyarrow.types.is_struct(kind) else None
    row = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= skip:
            row += rows
            continue
        for batch in table.iter_batches(
            ROWS, row_groups=[group], columns=[text_field], use_threads=False
        ):
            column = batch.column(0)
            for name in path[1:]:
                column = pyarrow.compute.struct_field(column, name)
            start = max(0, skip - row)
            for number, document in enumerate(column_documents(column[start:], text_field), 1):
                yield f" row {row + start + number}", document
            row += len(column)


def column_documents(column, text_field: str):
    """The documents of a column of pyarrow."""
    try:
        return [text_or_not(value, text_field) for value in column.to_pylist()]
    except UnicodeDecodeError:  # some writers call any bytes a string
        return [text_or_not(value, text_field) for value in column.cast("binary").to_pylist()]


def separated_documents(file, text_field: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL):
    # a byte that is not UTF-8 becomes a surrogate, so that it matters in this column alone
    lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # characters of a cell
    if delimiter == "\t" and quoting != csv.QUOTE_NONE:
        rows = tsv_rows(lines)
    else:
        rows = csv_rows(lines, delimiter, quoting)
    _, names = next(rows, (1, []))
    if names and names.count(text_field) != 1:
        raise UserError(": " + no_field(text_field, names))
    for line, cells in rows:
        if cells is None:
            document = NotText(
                "quotation marks may enclose a cell here, or belong to its text, and .tsv does not"
                " say which; .csv or .jsonl would"
            )
        elif len(cells) != len(names):
            document = NotText(f"it has {len(cells)} cells, the first line names {len(names)}")
        else:
            cell = cells[names.index(text_field)]
            document = decoded(cell.encode("utf-8", "surrogateescape"))
        yield f" line {line}", document


def csv_rows(lines, delimiter: str, quoting: int = csv.QUOTE_MINIMAL):
    """Yield (number of its first line, cells) of each row that is not empty."""
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    end = 0
    try:
        for cells in rows:
            if cells:
                yield end + 1, cells
            end = rows.line_num
    except csv.Error as error:
        raise UserError(f" line {rows.line_num}: it is not CSV: {error}") from None


def tsv_rows(lines):
    """The same for tabs; cells is None for a row that can be read in two ways.

    Some programs, pandas and Excel among them, enclose a cell in quotation marks if it has a tab, a
    line end or such a mark in it. Others never do, and all marks belong to the texts. The first row
    that can be read in one of these ways only says which it is.
    """
    encloses = None  # whether this file does, once it is known
    width = 0
    number = 0
    waiting = deque()  # lines that were read ahead
    while line := next_line(waiting, lines):
        number += 1
        cells = plain_cells(line)
        if cells == [""]:
            continue
        if not width and line.startswith('"'):  # the names are enclosed, and so is every text
            yield from csv_rows(itertools.chain((number - 1) * ["\n"], [line], lines), "\t")
            return
        width = width or len(cells)
        if '"' not in line or encloses is False:
            yield number, cells
            continue
        row = [line]
        marks = line.count('"')
        while marks % 2 and (more := next_line(waiting, lines)):
            row.append(more)
            marks += more.count('"')
        enclosed = enclosed_cells(row)
        fits_plainly = len(cells) == width
        if len(enclosed) == width and enclosed != cells:
            if len(row) > 1 and not encloses:  # then each line of it would be a row
                fits_plainly &= any(len(plain_cells(line)) == width for line in row[1:])
            if not fits_plainly or (len(row) == 1 and '""' in line):
                encloses = True
            yield number, enclosed if encloses else None
            number += len(row) - 1
            continue
        if fits_plainly and encloses:
            message = "quotation marks are part of a text here, but enclose cells above"
            raise UserError(f" line {number}: {message}")
        if fits_plainly:
            encloses = False
        yield number, cells
        waiting.extendleft(reversed(row[1:]))


def next_line(waiting, lines) -> str:
    return waiting.popleft() if waiting else next(lines, "")


def plain_cells(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def enclosed_cells(row: list[str]) -> list[str]:
    """The cells of the lines of a row, some of them enclosed; [] if these lines are not one row."""
    try:
        [cells] = csv.reader(row, delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return []
    return cells


def no_field(text_field: str, names: list[str]) -> str:
    if text_field in names:
        return f"--text_field {text_field}: several columns have this name"
    has = ", ".join(names) or "none"
    return f"--text_field {text_field}: there is no such field; it has {has}"


READERS = {
    ".txt": text_document,
    ".md": text_document,
    ".jsonl": json_documents,
    ".ndjson": json_documents,
    ".json": json_documents,
    ".parquet": parquet_documents,
    ".csv": functools.partial(separated_documents, delimiter=","),
    ".tsv": functools.partial(separated_documents, delimiter="\t"),
}
SAME_TYPE = {".ndjson": ".jsonl", ".json": ".jsonl"}


# ---- opening a file ----


def open_zstandard(file):
    """pyarrow has zstandard, which the standard library does not before Python 3.14."""
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    return io.BufferedReader(stream, 2**20)


class Unpacked(io.RawIOBase):
    """What `xz -dc` or `bzip2 -dc` make of a file: the content of all its streams.

    The standard library's own readers end without an error where a later stream is damaged, and
    where .xz has padding. decompressor: a class that decompresses one stream.
    """

    def __init__(self, file, decompressor):
        self.file = file
        self.decompressor = decompressor
        self.stream = decompressor()
        self.packed = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        data = b""
        while not data:
            if self.stream.eof:
                self.packed = self.stream.unused_data.lstrip(b"\0")  # without padding
                while not self.packed and (piece := self.file.read(2**20)):
                    self.packed = piece.lstrip(b"\0")
                if not self.packed:
                    return 0
                self.stream = self.decompressor()
            elif self.stream.needs_input and not self.packed:
                self.packed = self.file.read(2**20)
                if not self.packed:
                    raise EOFError("it is cut short")
            data = self.stream.decompress(self.packed, len(buffer))
            self.packed = b""
        buffer[: len(data)] = data
        return len(data)


def open_bzip2(file):
    return io.BufferedReader(Unpacked(file, bz2.BZ2Decompressor), 2**20)


def open_xz(file):
    return io.BufferedReader(Unpacked(file, lzma.LZMADecompressor), 2**20)


UNPACK = {".gz": gzip.open, ".bz2": open_bzip2, ".xz": open_xz, ".zst": open_zstandard}


def file_type(path: str) -> str:
    """texts/A.JSONL.gz -> .jsonl; but a.parquet.gz -> .gz, since .parquet compresses by itself."""
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in UNPACK and inner != ".parquet" else suffix


@contextlib.contextmanager
def opened(path):
    """A file to read, without its compression."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", 2**20))
        suffix = os.path.splitext(path)[1].lower()
        if suffix in UNPACK and file.peek(1):
            file = stack.enter_context(UNPACK[suffix](file))
        yield file


# ---- finding files ----


def local_files(dataset: str) -> tuple[list[str], list[str]]:
    """(files, notes): the files that a path, a directory or a glob names, each once; none if it is
    the name of a data set on the Hub. notes: what of a directory is not read, for the command to
    print.

    Raises UserError if the files are not of one type that can be read.
    """
    notes = []
    pattern = "*"
    if os.path.isdir(dataset):
        pattern = os.path.join(dataset, "**", "*")
        below = files_of(os.path.join(glob.escape(dataset), "**", "*"))
        below = [file for file in below if not os.path.isdir(file)]
        files = [file for file in below if file_type(file) in (*READERS, ".arrow")]
        others = [file for file in below if file_type(file) not in (*READERS, ".arrow")]
        if others:
            endings = Counter(os.path.splitext(file)[1] or "without ending" for file in others)
            listed = ", ".join(f"{n} {ending}" for ending, n in sorted(endings.items()))
            notes.append(f"not read, as of other types: {count(len(others), 'file')} ({listed})")
        if not files:
            types = " ".join(READERS)
            raise UserError(
                "; ".join([f"--dataset {dataset}: none of its files is {types}", *notes])
            )
    elif os.path.exists(dataset):
        files = [dataset]
    else:
        files = files_of(dataset)
        if not files and (file_type(dataset) in READERS or glob.has_magic(dataset)):
            raise UserError(f"--dataset {dataset}: there is no such file")
        if directories := [file for file in files if os.path.isdir(file)]:
            raise UserError(
                f"--dataset {dataset}: {directories[0]} is a directory; name its files, as in "
                f"'{directories[0]}/*.txt'"
            )
    check_types(dataset, files, pattern)
    return files, notes


def files_of(pattern: str) -> list[str]:
    """The files of a glob, in order, each once however many links lead to it."""
    files = {}
    for path in sorted(expanded(pattern)):
        files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def expanded(pattern: str) -> list[str]:
    """What a glob matches. glob's own `**` does not end where links lead back."""
    parts = re.split(r"(?:^|(?<=/))\*\*/", pattern, maxsplit=1)
    if len(parts) == 1:
        return glob.glob(pattern)
    found = []
    for top in glob.glob(parts[0]) if parts[0] else [""]:
        for directory in directories_below(top, set()):
            found += expanded(os.path.join(glob.escape(directory), parts[1]))
    return found


def directories_below(top: str, seen: set[str]):
    """Yield a directory and those in it, each once, without the hidden ones."""
    if os.path.realpath(top) in seen:
        return
    seen.add(os.path.realpath(top))
    yield top
    for name in sorted(os.listdir(top or ".")):
        path = os.path.join(top, name)
        if os.path.isdir(path) and not name.startswith("."):
            yield from directories_below(path, seen)


def check_types(dataset: str, files: list[str], pattern: str) -> None:
    """Raise UserError unless the files are of one type that can be read. pattern: what names those
    of one type with the suffix behind it."""
    for file in files:
        if file_type(file) not in READERS:
            message = f"--dataset {dataset}: {file} is none of {' '.join(READERS)}, all but"
            message += f" .parquet plain or {' '.join(UNPACK)}"
            if file.endswith(".arrow"):
                message += "\nHINT: datasets.load_from_disk(FOLDER).to_parquet(FILE) writes one"
            raise UserError(message)
    suffixes = list(dict.fromkeys(file_type(file) for file in files))
    if len({SAME_TYPE.get(suffix, suffix) for suffix in suffixes}) > 1:
        globs = " or ".join(f"'{pattern}{suffix}'" for suffix in suffixes)
        raise UserError(
            f"--dataset {dataset}: its files are of several types: give one type, as in {globs}"
        )
