"""Documents: the texts in files, local or on the Hub, from any place on.

    files = local_files("texts/*.jsonl.gz")              # or hub_files("org/name", split="train")
    for document, place in documents(files, "text"): ... # each a str, or NotText
    documents(files, "text", place)                      # those after a place

| type                 | a document is                                                  |
|----------------------|----------------------------------------------------------------|
| .txt .md             | the file                                                       |
| .jsonl .ndjson .json | the field of an object: one a line, or all in one array        |
| .parquet             | the column of a row                                            |
| .csv .tsv            | the column of a row; the first row names the columns           |

all but .parquet plain or .gz .bz2 .xz .zst, in capitals too. Texts are UTF-8. A field may be inside
another: `meta.text`. Files without a document are skipped; other fields and columns don't matter.

A document is yielded as a str, or as NotText, which says where it is and what was found. A file
that can't be read raises UserError, a network that fails NetworkFault.
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
import tempfile
import zlib
from dataclasses import dataclass

from lib.cli import UserError, one_line_error

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


class NetworkFault(Exception):
    """The network, or the Hub behind it, failed: the same may work later."""


def documents(files: list[str], text_field: str, place: tuple[int, int] = (0, 0)):
    """Yield (document, place after it) for each document of the files from a place on.

    A document is a str or NotText. A place is (number of the file, documents of it that are read).
    Raises UserError for a file that can't be read, or NetworkFault.
    """
    first, skip = place
    for number in range(first, len(files)):
        found = file_documents(files[number], text_field, skip)
        for read, document in enumerate(found, start=skip + 1):
            yield document, (number, read)
        skip = 0


def file_documents(path: str, text_field: str, skip: int):
    """Yield the documents of one file after the first `skip`."""
    read = READERS[file_type(path)]
    try:
        with opened(path) as file:
            if not file.peek(1):
                return
            if read is parquet_documents:  # which finds the place by itself, and faster
                found = read(file, text_field, skip)
            else:
                found = itertools.islice(read(file, text_field), skip, None)
            for where, document in found:
                if isinstance(document, NotText):
                    document = NotText(document.what, f"{path}{where}")
                yield document
    except UserError as error:  # of a reader, which says where in the file
        raise UserError(f"{path}{error}") from None
    except READ_ERRORS as error:
        raise UserError(f"{path} can't be read: {one_line_error(error)}") from None


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
    kinds = {bool: "", type(None): "", dict: "the object ", list: "the list ", bytes: "the bytes "}
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
    """One object a line, or one array of objects, which is read as a whole."""
    if file.peek(64)[:64].removeprefix(BOM).lstrip()[:1] == b"[":
        try:
            rows = json.loads(file.read().removeprefix(BOM).decode())
        except json.JSONDecodeError as error:
            raise UserError(f" line {error.lineno}: the array is not JSON: {error.msg}") from None
        for number, row in enumerate(rows, start=1):
            yield f" element {number}", json_text(row, text_field)
        return
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line := line.rstrip():
            yield f" line {number}", line_text(line, text_field)


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

    if isinstance(getattr(file, "name", None), str):  # a local file is read faster without Python
        file = pyarrow.OSFile(os.fsencode(file.name))
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
        values = column.cast("binary").to_pylist()
    return [text_or_not(v, text_field) if v is None else decoded(v) for v in values]


def separated_documents(file, text_field: str, delimiter: str):
    # a byte that is not UTF-8 becomes a surrogate, so that it matters in this column alone
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # characters of a field
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if names and names.count(text_field) != 1:
            raise UserError(": " + no_field(text_field, names))
        end = rows.line_num
        for cells in rows:
            line = end + 1
            end = rows.line_num
            if not cells:
                continue
            if len(cells) == len(names):
                cell = cells[names.index(text_field)]
                yield f" line {line}", decoded(cell.encode("utf-8", "surrogateescape"))
            else:
                what = f"it has {len(cells)} cells, the first line names {len(names)}"
                yield f" line {line}", NotText(what)
    except csv.Error as error:
        raise UserError(f" line {rows.line_num}: it is not CSV: {error}") from None


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


UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstandard}


def file_type(path: str) -> str:
    """texts/A.JSONL.gz -> .jsonl; but a.parquet.gz -> .gz, since .parquet compresses by itself."""
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in UNPACK and inner != ".parquet" else suffix


@contextlib.contextmanager
def opened(path: str):
    """A file to read, local or hf://, without its compression."""
    with contextlib.ExitStack() as stack:
        if path.startswith("hf://"):
            file = io.BufferedReader(stack.enter_context(HubFile(path)), 2**20)
        else:
            file = stack.enter_context(open(path, "rb", 2**20))
        suffix = os.path.splitext(path.lower())[1]
        if suffix in UNPACK and file.peek(1):
            file = stack.enter_context(UNPACK[suffix](file))
        yield file


class HubFile(io.RawIOBase):
    """A file of the Hub. All that can go wrong while it is fetched is a NetworkFault, so that what
    goes wrong with its content is not taken for one; a file that may not be had is a UserError."""

    def __init__(self, path: str):
        import fsspec

        self.path = path
        with fetching(path):
            self.file = fsspec.open(path, "rb").open()
        self.place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer):
        wanted = min(len(buffer), max(0, self.file.size - self.place))
        if not wanted:
            return 0
        with fetching(self.path):
            self.file.seek(self.place)
            part = self.file.read(wanted)
        if len(part) != wanted:
            raise NetworkFault(f"{self.path}: {len(part):,} bytes came, {wanted:,} were asked for")
        buffer[:wanted] = part
        self.place += wanted
        return wanted

    def close(self):
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


@contextlib.contextmanager
def fetching(path: str):
    """Give what is raised while a file is fetched its name."""
    try:
        yield
    except Exception as error:
        if is_gated(error):
            dataset = path.removeprefix("hf://datasets/").partition("@")[0]
            raise UserError(explain_gate(dataset)) from None
        if isinstance(error, FileNotFoundError) or is_refusal(error):
            raise UserError(f"{path} can't be had from the Hub: {one_line_error(error)}") from None
        raise NetworkFault(one_line_error(error)) from None


# ---- finding the files ----


def local_files(dataset: str) -> list[str]:
    """The files that a path, a directory or a glob names; none if it is the name of a data set on
    the Hub. Raises UserError if they are not of one type that can be read."""
    directory = os.path.isdir(dataset)
    if directory:
        below = sorted(glob.glob(f"{glob.escape(dataset)}/**", recursive=True))
        files = [file for file in below if os.path.isfile(file) and file_type(file) in READERS]
        if not files:
            raise UserError(f"--dataset {dataset}: none of its files is {' '.join(READERS)}")
    elif os.path.exists(dataset):
        files = [dataset]
    else:
        files = sorted(glob.glob(dataset, recursive=True))
        if not files and (file_type(dataset) in READERS or glob.has_magic(dataset)):
            raise UserError(f"--dataset {dataset}: there is no such file")
        if directories := [file for file in files if os.path.isdir(file)]:
            raise UserError(
                f"--dataset {dataset}: {directories[0]} is a directory; name its files, as in "
                f"'{directories[0]}/*.txt'"
            )
    check_types(dataset, files, pattern=f"{dataset.rstrip('/')}/**/*" if directory else "*")
    return files


def check_types(dataset: str, files: list[str], pattern: str) -> None:
    """Raise UserError unless the files are of one type that can be read. pattern: what names those
    of one type with the suffix behind it."""
    for file in files:
        if file_type(file) not in READERS:
            packed = f", all but .parquet plain or {' '.join(UNPACK)}"
            raise UserError(f"--dataset {dataset}: {file} is none of {' '.join(READERS)}{packed}")
    suffixes = list(dict.fromkeys(file_type(file) for file in files))
    if len({SAME_TYPE.get(suffix, suffix) for suffix in suffixes}) > 1:
        globs = " or ".join(f"'{pattern}{suffix}'" for suffix in suffixes)
        raise UserError(
            f"--dataset {dataset}: its files are of several types: give one type, as in {globs}"
        )


def hub_commit(dataset: str, revision: str | None = None) -> str:
    """The commit that a data set of the Hub is at. Raises UserError or NetworkFault."""
    check_cache()
    from huggingface_hub import HfApi

    with finding(dataset):
        return HfApi().dataset_info(dataset, revision=revision).sha


def hub_files(dataset: str, name=None, split="train", revision=None) -> list[str]:
    """The files of a configuration and a split of a data set of the Hub, as hf:// addresses.

    Raises UserError if there is no such thing, and says what there is, or NetworkFault.
    """
    check_cache()
    import datasets

    with finding(dataset):
        try:
            builder = datasets.load_dataset_builder(dataset, name, revision=revision)
        except ValueError:
            names = datasets.get_dataset_config_names(dataset, revision=revision)
            if name in names or (name is None and len(names) < 2):
                raise
            have = f"has no configuration {name}" if name else "has several configurations"
            raise UserError(
                f"--dataset {dataset} {have}; choose one with --name: {', '.join(names)}"
            ) from None
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            raise UserError(explain_script(dataset, revision)) from None
    by_split = builder.config.data_files or {}
    if split not in by_split:
        splits = ", ".join(map(str, by_split)) or "no files that a split is made of"
        raise UserError(f"--split {split}: {dataset} has no such split; it has {splits}")
    files = [str(file) for file in by_split[split]]
    check_types(dataset, files, pattern="*")
    return files


def explain_script(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision)
    readable = [file for file in files if file_type(file) in READERS and file != "README.md"]
    shown = ", ".join((readable or files)[:10]) + (" ..." if len(readable or files) > 10 else "")
    return (
        f"--dataset {dataset} is made by a loading script, a program, which is not run. Its files:"
        f" {shown}\nHINT: `hf download {dataset} --repo-type dataset --local-dir FOLDER` and give"
        " those with the texts as --dataset"
    )


def check_cache() -> None:
    """Raise UserError if the Hub's library can't keep its files; its own error names others."""
    from huggingface_hub import constants

    try:
        os.makedirs(constants.HF_HOME, exist_ok=True)
        tempfile.TemporaryFile(dir=constants.HF_HOME).close()
    except OSError as error:
        raise UserError(explain_cache(error)) from None


def explain_cache(error: OSError) -> str:
    from huggingface_hub import constants

    return (
        f"{constants.HF_HOME}, where the Hub's library keeps its files, can't be used:"
        f" {error.strerror}\nHINT: set HF_HOME to a directory that can be written and locked"
    )


@contextlib.contextmanager
def finding(dataset: str):
    """Give what is raised while a data set of the Hub is looked for its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_gated(error):
            raise UserError(explain_gate(dataset)) from None
        if any(map(is_network, causes_of(error))):
            raise NetworkFault(one_line_error(error)) from None
        refused = is_refusal(error) or type(error).__name__ == "DatasetNotFoundError"
        if isinstance(error, OSError) and error.errno and not refused:
            raise UserError(explain_cache(error)) from None
        raise UserError(
            f"--dataset {dataset} can't be {'found' if refused else 'read'} on the Hub:"
            f" {one_line_error(error)}\nHINT: check the name, or give local files"
        ) from None


def is_gated(error) -> bool:
    """Is this the answer for a data set whose terms have to be accepted? datasets keeps only the
    text of it."""
    from huggingface_hub import errors

    return isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error)


def explain_gate(dataset: str) -> str:
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/datasets/{dataset}"
    return (
        f"--dataset {dataset} is gated: log in with `hf auth login` and accept its terms at {page}"
    )


def causes_of(error: BaseException) -> list[BaseException]:
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def status_of(error) -> int | None:
    """The status of the HTTP answer that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_refusal(error) -> bool:
    """Did the Hub answer, and will it answer so again?"""
    status = status_of(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def is_network(error) -> bool:
    if status_of(error) is not None:
        return not is_refusal(error)
    http = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp")
    return isinstance(error, ConnectionError | TimeoutError) or (
        type(error).__module__.partition(".")[0] in http
    )
