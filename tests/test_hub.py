"""Files of the Hub, fetched whole: what is fetched when, what is left after an interruption, what
is said of faults. The texts themselves are in test_documents.py and test_data_generator.py."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, wait_for
from hub import Hub

from lib.cli import UserError
from lib.documents import file_documents
from lib.hub import explain, one_ahead, reading_options
from lib.shards import read_manifest

README = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
---
"""


def parquet(texts) -> bytes:
    """A file of more than 30 MB, since what has come is written 10 MB at a time."""
    file = io.BytesIO()
    table = pa.table({"text": texts, "more": [bytes(10_000_000) for _ in texts]})
    pq.write_table(table, file, compression="none", use_dictionary=False)
    return file.getvalue()


@pytest.fixture
def hub():
    """A data set org/texts of three files, three texts in each."""
    texts = [[f"{number} {n} " * 100_000 for n in range(3)] for number in range(3)]
    files = {f"data/{number}.parquet": parquet(texts[number]) for number in range(3)}
    with Hub({"datasets/org/texts": {"README.md": README, **files}}) as hub:
        hub.texts = sum(texts, [])
        yield hub


def start(hub, tmp_path, *words, **environment):
    """The generator on org/texts, with short pauses before each new try."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import data_generator, lib.hub\n"
        "lib.hub.PAUSES = (0.1, 0.2, 0.3)\n"
        "sys.exit(data_generator.main(sys.argv[1:]))"
    )
    common = ["--dataset=org/texts", "--tokenizer=bytes", "--shard_size=500000"]
    return subprocess.Popen(
        [sys.executable, "-c", program, *common, f"--data_dir={tmp_path / 'data'}", *words],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # which the background of a shell ignores
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process, code=0) -> tuple[str, str]:
    """What a process printed, and that it ended with the code."""
    printed = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in printed[1], printed
    return printed


def assert_complete(tmp_path, texts):
    """The shards hold the texts, and nothing else is left."""
    data_dir = tmp_path / "data"
    tokens = np.concatenate([np.load(data_dir / s.file) for s in read_manifest(data_dir).shards])
    expected = b"".join(b"\0" + text.encode() for text in texts)
    assert np.where(tokens == 256, 0, tokens).astype(np.uint8).tobytes() == expected
    names = {path.name for path in data_dir.iterdir() if path.suffix != ".npy"}
    assert names == {"manifest.json", ".lock"}


def downloads(tmp_path, pattern="*") -> list[Path]:
    return list((tmp_path / "data" / "downloads.tmp").glob(pattern))


def content_of(hub, path) -> bytes:
    return hub.repositories["datasets/org/texts"][path.partition("/resolve/")[2].partition("/")[2]]


def half_then_silence(handler, path):
    """A fault: the first half of data/1.parquet comes, and then nothing."""
    if handler.command != "GET" or not path.endswith("1.parquet"):
        return False
    content = content_of(handler.hub, path)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    time.sleep(30)
    return True


def test_the_next_file_is_fetched_while_this_one_is_read(hub, tmp_path):
    """The second is asked for before the first's tokens are written; never more than two are on the
    disk, and none is left."""
    most = []

    def look(handler, path):
        most.append(len(downloads(tmp_path)))

    hub.faults.append(look)
    printed, progress = finish(start(hub, tmp_path))
    assert_complete(tmp_path, hub.texts)
    assert "1.parquet: " in progress
    assert max(most) <= 2, most
    assert "waited for the network " in printed
    written = []

    def count(handler, path):
        if path.endswith("1.parquet"):
            written.append(len([*(tmp_path / "other").glob("*.npy")]))

    hub.faults.append(count)
    # 600 shards of each file
    process = start(hub, tmp_path, f"--data_dir={tmp_path / 'other'}", "--shard_size=2000")
    wait_for(lambda: written)
    process.kill()
    process.communicate()
    assert written[0] < 500


def test_max_tokens_fetches_only_what_it_needs(hub, tmp_path):
    finish(start(hub, tmp_path, "--max_tokens=1000000"))
    asked_for = {path.rpartition("/")[2] for _, path in hub.requests}
    assert "0.parquet" in asked_for and "1.parquet" not in asked_for
    assert not downloads(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_download_is_resumed(number, hub, tmp_path):
    """Ctrl-C does not wait for the network. What has come is not asked for again."""
    hub.faults.append(half_then_silence)
    process = start(hub, tmp_path)
    wait_for(lambda: 10**7 <= sum(p.stat().st_size for p in downloads(tmp_path, "*-1.parquet")))
    wait_for(lambda: any((tmp_path / "data").glob("*.npy")))  # the first file is being read
    begin = time.time()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert time.time() - begin < 1
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in error, error
    (path,) = downloads(tmp_path, "*-1.parquet")
    size = path.stat().st_size
    hub.faults.clear()
    ranges = []

    def note(handler, path):
        if handler.command == "GET" and path.endswith("1.parquet"):
            ranges.append(handler.headers.get("Range"))

    hub.faults.append(note)
    finish(start(hub, tmp_path))
    assert ranges == [f"bytes={size}-"]
    assert_complete(tmp_path, hub.texts)


def test_what_came_wrong_is_fetched_again(hub, tmp_path):
    """Bytes that are others than the Hub names, and what an earlier process left: of these files
    more than there is, and of other files."""
    left = [1]

    def wrong(handler, path):
        if handler.command != "GET" or not path.endswith("0.parquet") or not left:
            return False
        left.clear()
        content = bytearray(content_of(hub, path))
        content[1000] ^= 1
        handler.answer(200, bytes(content))
        return True

    hub.faults.append(wrong)
    _, error = finish(start(hub, tmp_path, "--max_tokens=1000000"))
    said = "network: OSError: the bytes of data/0.parquet are not those that the Hub names"
    assert said in error and "next try in 0.1 s" in error

    hub.faults.append(half_then_silence)
    (tmp_path / "data").rename(tmp_path / "first")
    process = start(hub, tmp_path)
    wait_for(lambda: downloads(tmp_path, "*-1.parquet"))
    process.kill()
    process.communicate()
    (path,) = downloads(tmp_path, "*-1.parquet")
    path.write_bytes(bytes(50_000_000))
    another = path.with_name("another.parquet")
    another.write_bytes(b"of another data set")
    hub.faults.clear()
    still_there = []

    def look(handler, path):
        if path.endswith("0.parquet"):
            still_there.append(another.exists())

    hub.faults.append(look)
    finish(start(hub, tmp_path))
    assert_complete(tmp_path, hub.texts)
    assert still_there and not any(still_there)


def test_one_ahead():
    """The second is begun when the first is taken, and not the third; an error comes in its
    place."""
    begun = []

    def items():
        for n in range(3):
            begun.append(n)
            yield n
        raise UserError("the end")

    found = one_ahead(items())
    assert next(found) == 0
    wait_for(lambda: begun == [0, 1], 5)
    time.sleep(0.1)
    assert begun == [0, 1]
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(UserError, match="the end"):
        next(found)


SETTINGS = {  # what a README says of its files -> (the file, its documents or what is refused)
    'sep: "|"': (b"id|text\n1|a, b\n", ["a, b"]),
    'delimiter: ";"': (b'id;text\n1;"a; b"\n', ["a; b"]),
    'sep: "\\t"': (b"id\ttext\n1\ta b\n", ["a b"]),
    "quoting: 3": (b'id,text\n1,"Hello\n2,there"\n', ['"Hello', 'there"']),
    'sep: "\\t"\n  quoting: 3': (b'id\ttext\n1\t"Hello"\n', ['"Hello"']),
    "encoding: utf-8\n  chunksize: 5": (b"id,text\n1,a\n", ["a"]),
    "skiprows: 1": (b"about\nid,text\n1,a\n", "skiprows: 1"),
    "header: null\n  names: [id, text]": (b"1,a\n", "header: None, names: ['id', 'text']"),
    "encoding: latin-1": (b"id,text\n1,a\n", "encoding: latin-1"),
    "sep: '\\s+'": (b"id text\n1 a\n", "sep: \\s+"),
    'quotechar: "\'"': (b"id,text\n1,a\n", "quotechar: '"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_a_readme_says_of_its_files_is_followed_or_refused(settings, tmp_path):
    """datasets itself makes the configuration of the README, here of a folder, and reads it."""
    import datasets

    content, expected = SETTINGS[settings]
    configuration = f"- config_name: default\n  data_files: a.csv\n  {settings}\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configuration}---\n")
    (tmp_path / "a.csv").write_bytes(content)
    config = datasets.load_dataset_builder(str(tmp_path)).config
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            reading_options("org/texts", config)
        assert f"its README has its files read with {expected}, which is" in str(error.value)
        return
    options = reading_options("org/texts", config)
    found = file_documents(tmp_path / "a.csv", "text", (0, 0), "a.csv", **options)
    assert [document for document, _ in found] == expected
    rows = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in rows] == expected


def test_the_field_of_a_json_file_is_refused_by_name(tmp_path):
    readme = README.replace(b"path: data/*}]", b"path: data/*}]\n  field: data")
    files = {"README.md": readme, "data/a.json": json.dumps({"data": [{"text": "a"}]}).encode()}
    with Hub({"datasets/org/texts": files}) as hub:
        _, error = finish(start(hub, tmp_path), 2)
    assert "its README has its files read with field: data, which is not done here" in error


def test_the_separator_of_a_readme(tmp_path):
    readme = README.replace(b"path: data/*}]", b'path: data/*}]\n  sep: "|"')
    texts = [f"text, {n} " * 100_000 for n in range(3)]
    content = "id|text\n" + "".join(f"1|{text}\n" for text in texts)
    with Hub({"datasets/org/texts": {"README.md": readme, "data/a.csv": content.encode()}}) as hub:
        finish(start(hub, tmp_path))
    assert_complete(tmp_path, texts)


def test_the_hub_switched_off(hub, tmp_path):
    """At the start, and where a run is resumed whose files are known."""
    _, error = finish(start(hub, tmp_path, HF_HUB_OFFLINE="1"), 2)
    assert "unset HF_HUB_OFFLINE" in error
    process = start(hub, tmp_path)
    wait_for(lambda: (tmp_path / "data" / "manifest.json").exists())
    process.kill()
    process.communicate()
    _, error = finish(start(hub, tmp_path, HF_HUB_OFFLINE="1"), 2)
    assert "unset HF_HUB_OFFLINE" in error and "next try" not in error


def test_a_token_is_never_shown():
    said = explain(RuntimeError("refused: Bearer hf_Secret1"), "--dataset", "org/texts")
    assert "hf_Secret1" not in str(said) and "hf_..." in str(said)


def test_a_disk_that_is_full_is_no_network_fault(hub, tmp_path):
    """The download is too large for the disk: said at once, and not tried again."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data_generator
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
sys.exit(data_generator.main(sys.argv[1:]))
"""
    words = ["--dataset=org/texts", "--tokenizer=bytes", f"--data_dir={tmp_path / 'data'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "can't be written: OSError: [Errno 27]" in done.stderr
    assert "next try" not in done.stderr and "Traceback" not in done.stderr
