"""Documents -> shards -> batches, against plain algorithms written out here, and against faults."""

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, flags, script
from hub import COMMIT, Hub

import data_generator
import lib.hub
from lib.shards import FINEWEB_EDU, find_tokenizer, read_manifest
from lib.tokenizer import get_tokenizer

HAZARDS = [
    "plain words", "", "a literal <|endoftext|> in the text", "a" * 1_000_000, "é中🙂" * 50,
    "  spaces\n\n\tand\r\nlines  ", "long " * 9_000, "a byte order mark inside: \ufeff",
]  # fmt: skip


def plain_shards(documents, tokenizer, shard_size) -> list[np.ndarray]:
    """The algorithm, as plain as it gets: one long stream, cut every shard_size."""
    gpt2 = tiktoken.get_encoding("gpt2")
    stream = []
    for text in documents:
        if tokenizer == "bytes":
            stream += [256, *text.encode()]
        else:
            stream += [gpt2.eot_token, *gpt2.encode_ordinary(text)]
    return [
        np.array(stream[i : i + shard_size], dtype=np.uint16)
        for i in range(0, len(stream), shard_size)
    ]


def assert_shards(data_dir, expected: list[np.ndarray], skipped=0):
    """The directory holds exactly these shards, byte for byte as np.save writes them, and a
    manifest that says so."""
    manifest = read_manifest(data_dir)
    assert (
        manifest.complete
        and manifest.position is None
        and manifest.skipped == skipped
        and len(manifest.shards) == len(expected)
    )
    for number, (entry, tokens) in enumerate(zip(manifest.shards, expected, strict=True)):
        assert entry.file == f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        content = (Path(data_dir) / entry.file).read_bytes()
        reference = io.BytesIO()
        np.save(reference, tokens)
        assert (
            content == reference.getvalue() and entry.sha256 == hashlib.sha256(content).hexdigest()
        )
        eot = get_tokenizer(find_tokenizer(data_dir, manifest)).eot_token
        assert entry.tokens == len(tokens) and entry.documents == (tokens == eot).sum()
    names = {path.name for path in Path(data_dir).iterdir()}
    assert names == {entry.file for entry in manifest.shards} | {"manifest.json", ".lock"}


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def parquet(documents, **columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        pa.table({"text": documents, "id": [str(n) for n in range(len(documents))]} | columns),
        file,
        row_group_size=90,
    )
    return file.getvalue()


def contents(directory) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != ".lock"
    }


def written_shards(data_dir) -> int:
    manifest = read_manifest(data_dir)
    return len(manifest.shards) if manifest else 0


def words_of(n: int, seed=0) -> list[str]:
    dice = random.Random(seed)
    return [
        " ".join(
            dice.choice(["the", "shard", "of", "tokens", "9"]) for _ in range(dice.randrange(60))
        )
        for _ in range(n)
    ]


# ---- shards ----


def test_shards_are_those_of_the_plain_algorithm(tmp_path):
    documents = HAZARDS + words_of(700)
    write_jsonl(tmp_path / "a.jsonl", documents)
    words = ["--dataset", str(tmp_path / "a.jsonl"), "--shard_size=5000"]
    assert data_generator.main([*words, f"--data_dir={tmp_path / 'data'}"]) == 0
    assert_shards(tmp_path / "data", plain_shards(documents, "gpt2", 5_000))


def test_one_text_file_and_max_tokens(tmp_path):
    text = "\n\n".join(words_of(300))
    (tmp_path / "a.txt").write_text(text)
    words = ["--dataset", str(tmp_path / "a.txt"), "--tokenizer=bytes", "--shard_size=3000"]
    assert data_generator.main([*words, f"--data_dir={tmp_path / 'all'}"]) == 0
    assert_shards(tmp_path / "all", plain_shards([text], "bytes", 3000))
    assert data_generator.main([*words, f"--data_dir={tmp_path / 'cut'}", "--max_tokens=7001"]) == 0
    shards = plain_shards([text], "bytes", 3000)
    assert_shards(tmp_path / "cut", [shards[0], shards[1], shards[2][:1001]])
    assert (
        data_generator.main([*words, f"--data_dir={tmp_path / 'full'}", "--max_tokens=6000"]) == 0
    )
    assert_shards(tmp_path / "full", shards[:2])


@pytest.mark.parametrize("change", ["another size", "one more", "shard lost", "manifest lost"])
def test_what_has_changed_since_is_not_mixed(change, tmp_path, capsys):
    """A rerun over other files, or over shards that are not the manifest's, stops before it writes
    anything."""
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text("\n".join(words_of(60)))
    words = ["--dataset", str(tmp_path / "*.txt"), "--tokenizer=bytes", "--shard_size=3000"]
    words += [f"--data_dir={tmp_path / 'data'}"]
    assert data_generator.main(words) == 0 and data_generator.main(words) == 0
    if change == "shard lost":
        (tmp_path / "data" / "edufineweb_train_000002.npy").unlink()
    elif change == "manifest lost":
        (tmp_path / "data" / "manifest.json").unlink()
    else:
        (tmp_path / ("a.txt" if change == "one more" else "b.txt")).write_text("other text")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert data_generator.main(words) == 2
    says = {
        "shard lost": "000002.npy is missing\nHINT: restore",
        "manifest lost": "already exists, without a",
    }
    assert says.get(change, "revision was 2 files, ") in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_tiny_shakespeare(tmp_path):
    """Runs where the text is at hand; its tokens are pinned."""
    path = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not beside the repository")
    assert (
        data_generator.main(
            ["--dataset", str(path), "--data_dir", str(tmp_path), "--shard_size=100000"]
        )
        == 0
    )
    tokens = np.concatenate(
        [np.load(tmp_path / shard.file) for shard in read_manifest(tmp_path).shards]
    )
    assert len(tokens) == 338_026
    assert (
        hashlib.sha256(tokens.tobytes()).hexdigest()
        == "3c08715b1bf0b0a52f807249fd81a62086f0b8fab1ed0a4b23dfda14b61e9a78"
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_local_files_by_glob(kind, tmp_path):
    files = [words_of(40, seed) for seed in range(3)]
    # names that are patterns as well; brackets in the name of a packed file are more than
    # `datasets` can read
    names = ["a" if kind == "jsonl.gz" else "[A] b", "c*", "cd"]
    for number, documents in enumerate(files):
        path = tmp_path / "texts" / f"{names[number]}.{kind}"
        path.parent.mkdir(exist_ok=True)
        lines = "".join(
            json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)
        )
        if kind == "parquet":
            path.write_bytes(parquet(documents))
        elif kind == "txt":
            path.write_text("\n".join(documents))
        else:
            path.write_bytes(
                gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode()
            )
    words = [
        "--dataset",
        str(tmp_path / "texts" / f"*.{kind}"),
        "--tokenizer=bytes",
        "--shard_size=2000",
    ]
    assert data_generator.main([*words, f"--data_dir={tmp_path / 'data'}"]) == 0
    documents = ["\n".join(documents) for documents in files] if kind == "txt" else sum(files, [])
    assert_shards(tmp_path / "data", plain_shards(documents, "bytes", 2000))


@pytest.fixture(scope="session")
def documentation() -> list[str]:
    return data_generator.pydoc_documents()


def test_pydoc_has_each_text_once(documentation):
    assert len(documentation) == len(set(documentation)) > 3000
    assert any("zip" in text for text in documentation)


@pytest.fixture(scope="session")
def demo_shards(documentation) -> list[np.ndarray]:
    return plain_shards(documentation, "bytes", 98_304)


# ---- the Hub ----

README = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


@pytest.fixture
def fineweb():
    """A small repository of FineWeb-Edu's layout, served by this machine; the documents of its
    sample-10BT."""
    parts = [words_of(900, seed) for seed in range(3)]
    files = {f"sample/10BT/{n:03d}_00000.parquet": parquet(part) for n, part in enumerate(parts)}
    with Hub(
        {
            f"datasets/{FINEWEB_EDU}": {
                "README.md": README,
                "data/CC/0.parquet": parquet(["wrong"]),
                **files,
            }
        }
    ) as hub:
        yield hub, sum(parts, [])


def generate(hub, tmp_path, *words, **options):
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    data_dir = f"--data_dir={tmp_path / 'data'}"
    common = [data_dir, "--shard_size=4000", *words]
    return script("data_generator.py", *common, env=environment, **options)


IMPATIENT = """
import sys, data_generator, lib.hub
lib.hub.PAUSES = (0.1, 0.2, 0.3)
if __name__ == "__main__":
    sys.exit(data_generator.main(sys.argv[1:]))
"""


def generate_impatiently(hub, tmp_path, *words):
    """The same, with short pauses before each new try."""
    (tmp_path / "driver.py").write_text(IMPATIENT)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    common = [f"--data_dir={tmp_path / 'data'}", "--shard_size=4000", *words]
    return script(str(tmp_path / "driver.py"), *common, env=environment)


def test_the_pauses_before_each_new_try():
    assert lib.hub.PAUSES == (10, 60, 300)


def test_the_default_command_on_the_hub(fineweb, tmp_path):
    hub, documents = fineweb
    done = generate(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_shards(tmp_path / "data", plain_shards(documents, "gpt2", 4000))
    manifest = read_manifest(tmp_path / "data")
    assert (manifest.dataset, manifest.name, manifest.revision) == (
        FINEWEB_EDU,
        "sample-10BT",
        COMMIT,
    )
    assert (
        f"{len(documents):,} documents" in done.stdout
        and "the last shard is shorter, as it should be" in done.stdout
    )


@pytest.mark.parametrize(
    "fault", ["503", "reset", "short", pytest.param("stall", marks=pytest.mark.slow)]
)
def test_network_faults_are_tried_again(fault, fineweb, tmp_path):
    hub, documents = fineweb
    left = [2]

    def answer(handler, path):
        if handler.command != "GET" or not path.endswith("001_00000.parquet") or not left[0]:
            return False
        left[0] -= 1
        content = hub.repositories[f"datasets/{FINEWEB_EDU}"]["sample/10BT/001_00000.parquet"]
        if fault == "503":
            handler.answer(503, b"busy")
        elif fault == "reset":
            handler.connection.close()
        else:  # half of the body; then the end of the line, or silence
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{len(content)}")
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            if fault == "stall":
                time.sleep(15)
        handler.close_connection = True
        return True

    hub.faults.append(answer)
    done = generate_impatiently(hub, tmp_path)
    assert done.returncode == 0 and left == [0], done.stderr
    assert_shards(tmp_path / "data", plain_shards(documents, "gpt2", 4000))


def test_a_body_that_lies_about_its_length_is_not_taken_for_a_whole_one(fineweb, tmp_path):
    hub, documents = fineweb
    left = [1]

    def answer(handler, path):
        if handler.command != "GET" or not path.endswith("001_00000.parquet") or not left[0]:
            return False
        left[0] -= 1
        content = hub.repositories[f"datasets/{FINEWEB_EDU}"]["sample/10BT/001_00000.parquet"]
        handler.answer(
            206,
            content[: len(content) // 2],
            {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"},
        )
        return True

    hub.faults.append(answer)
    done = generate_impatiently(hub, tmp_path)
    assert done.returncode == 0 and "next try in 0.1 s" in done.stderr, done.stderr
    assert_shards(tmp_path / "data", plain_shards(documents, "gpt2", 4000))


@pytest.mark.slow
def test_a_network_that_stays_away_ends_with_a_message_and_the_next_run_goes_on(fineweb, tmp_path):
    hub, documents = fineweb

    def down(handler, path):
        if "002_00000" in path:
            handler.answer(503, b"")
            return True

    hub.faults.append(down)
    done = generate_impatiently(hub, tmp_path)
    assert (
        done.returncode == 1
        and "can't be fetched from the Hub" in done.stderr
        and "run the same command again" in done.stderr
    )
    assert "Traceback" not in done.stderr and not read_manifest(tmp_path / "data").complete
    hub.faults.clear()
    assert generate(hub, tmp_path).returncode == 0
    assert_shards(tmp_path / "data", plain_shards(documents, "gpt2", 4000))


def test_other_hub_data_sets(tmp_path):
    rows = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in words_of(300)).encode()
    with Hub(
        {
            "datasets/org/tales": {
                "README.md": b"# tales",
                "train.jsonl": b'{"body": "no", "n": 0}\n',
                "test.jsonl": rows,
            }
        }
    ) as hub:
        common = ["--dataset=org/tales", "--split=test", "--tokenizer=bytes"]
        done = generate(hub, tmp_path, *common)
        assert (
            done.returncode == 2
            and "test.jsonl line 1: --text_field text: there is no such field; it has body, n"
            in done.stderr
        ), done.stderr
        done = generate(hub, tmp_path, *common, "--text_field=body")
        assert done.returncode == 0, done.stderr
        assert_shards(tmp_path / "data", plain_shards(words_of(300), "bytes", 4000))


CONFIGURATIONS = b"""---
configs:
- config_name: english
  data_files: [{split: train, path: en.txt}, {split: test, path: en2.txt}]
- config_name: french
  data_files: [{split: train, path: fr.csv.gz}]
---
"""
SEVERAL = {
    "README.md": CONFIGURATIONS,
    "fr.csv.gz": b"",
    "en.txt": b"one",
    "en2.txt": b"line\r\nline\n" * 800,
}
PLAIN = {"README.md": b"# texts", "train.jsonl": b'{"text": "a"}', "test.jsonl": b'{"text": "b"}'}
WRONG = {  # what is wrong -> (files of org/NAME, flags, what is said)
    "several configurations": (
        SEVERAL,
        [],
        "--dataset org/NAME has several configurations; choose one with --name: english, french",
    ),
    "no such configuration": (
        SEVERAL,
        ["--name=german"],
        "--dataset org/NAME has no configuration german; choose one with --name: english, french",
    ),
    "no such split": (
        SEVERAL,
        ["--name=english", "--split=dev"],
        "--split dev: org/NAME has no such split; it has train, test",
    ),
    "no such revision": (
        SEVERAL,
        ["--revision=old"],
        "org/NAME can't be found on the Hub: RevisionNotFo",
    ),
    "a loading script": (
        {"a_loading_script.py": b"import os", "data/a.jsonl": b"{}", "LICENSE": b""},
        [],
        "org/NAME is made by a loading script, a program, which is not run. Its files: data/a.jsonl"
        "\nHINT: `hf download org/NAME --repo-type dataset --local-dir FOLDER`",
    ),
    "gated": (
        SEVERAL,
        [],
        "--dataset org/NAME is gated: log in with `hf auth login` and accept its terms at"
        " HUB/datasets/org/NAME",
    ),
    "closed": (SEVERAL, [], "accept its terms at HUB/datasets/org/NAME"),
    "pictures": ({"a.png": b"", "b.png": b""}, [], "a.png is none of .txt .md .jsonl"),
    "nothing": ({"LICENSE": b""}, [], "org/NAME"),
    "no such data set": (SEVERAL, ["--dataset=org/none"], "org/none can't be found on the Hub"),
    "no such configuration of a plain folder": (
        PLAIN,
        ["--name=french", "--split=test"],
        "--dataset org/NAME has no configuration french; choose one with --name: default",
    ),
    "no such split of a plain folder": (
        PLAIN,
        ["--split=dev"],
        "--split dev: org/NAME has no such split; it has train, test",
    ),
    "a row that is null": (
        {"train.parquet": parquet(["a", None])},
        [],
        "train.parquet row 2: text is null, not a text",
    ),
    "a damaged file": (
        {"train.parquet": b"PAR1" + b"x" * 5000 + b"PAR1"},
        [],
        f"org/NAME@{COMMIT}/train.parquet can't be read: ",
    ),
    "another damaged file": ({"train.jsonl.gz": b"no"}, [], "can't be read: BadGzipFile"),
    "a row that is no text": (
        {"train.jsonl": b'{"text": "a"}\n{"text": 4}'},
        [],
        f"org/NAME@{COMMIT}/train.jsonl line 2: text is the number 4, not a text\nHINT: --skip_bad",
    ),
    "no such field": (
        {"train.parquet": parquet(["a"])},
        ["--text_field=body"],
        "train.parquet: --text_field body: there is no such field; it has text, id",
    ),
}


# Each line of standard input is a run of the generator in a child of a process that has imported
# the Hub's libraries: its words, and a file for what it prints.
IN_CHILDREN = """
import contextlib, json, os, sys
import data_generator, datasets
for line in sys.stdin:
    words, path = json.loads(line)
    if (child := os.fork()) == 0:
        for stream in (1, 2):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.exit(data_generator.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="session")
def wrong_on_the_hub(tmp_path_factory):
    """{what is wrong: (exit code, what was printed)}"""
    directory = tmp_path_factory.mktemp("wrong")

    def gate(handler, path):
        headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
        for name, status in (("gated", 401), ("closed", 403)):
            if f"org/{name}/resolve/" in path:
                handler.answer(status, b"", headers)
                return True
        return False

    names = {wrong: wrong.replace(" ", "_") for wrong in WRONG}
    hub = Hub({f"datasets/org/{names[wrong]}": WRONG[wrong][0] for wrong in WRONG})
    hub.faults.append(gate)
    lines = []
    for wrong, name in names.items():
        words = [f"--dataset=org/{name}", f"--data_dir={directory / name}", "--tokenizer=bytes"]
        lines.append(json.dumps([words + WRONG[wrong][1], str(directory / f"{name}.txt")]))
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(directory), "PYTHONPATH": str(ROOT)}
    with hub:
        done = subprocess.run(
            [sys.executable, "-c", IN_CHILDREN],
            input="\n".join(lines),
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    codes = map(int, done.stdout.splitlines())
    printed = [(directory / f"{name}.txt").read_text() for name in names.values()]
    return dict(zip(WRONG, zip(codes, printed, strict=True), strict=True)), hub.url


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_data_on_the_hub_is_not_a_network_fault(wrong, wrong_on_the_hub):
    found, url = wrong_on_the_hub
    code, printed = found[wrong]
    said = WRONG[wrong][2].replace("NAME", wrong.replace(" ", "_")).replace("HUB", url)
    assert code == 2 and said in printed, printed
    assert "Traceback" not in printed and "network: " not in printed


def test_the_same_file_gives_the_same_tokens_here_and_from_the_hub(tmp_path):
    (tmp_path / "en.txt").write_bytes(SEVERAL["en2.txt"])
    words = ["--tokenizer=bytes", "--shard_size=4000"]
    local = ["--dataset", str(tmp_path / "en.txt"), "--data_dir", str(tmp_path / "local")]
    assert data_generator.main([*words, *local]) == 0
    with Hub({"datasets/org/x": SEVERAL}) as hub:
        hub_words = ["--dataset=org/x", "--name=english", "--split=test"]
        done = generate(hub, tmp_path, *words, *hub_words)
    assert done.returncode == 0, done.stderr
    expected = plain_shards([SEVERAL["en2.txt"].decode()], "bytes", 4000)
    assert_shards(tmp_path / "local", expected)
    assert_shards(tmp_path / "data", expected)


def test_a_hub_library_without_a_place_for_its_files(tmp_path):
    for name, place in (("HF_HOME", "/dev/null/hf"), ("HOME", "/dev/null")):
        environment = {"HF_HOME": "", "XDG_CACHE_HOME": ""} | {name: place}
        environment = {key: value for key, value in (os.environ | environment).items() if value}
        command = [sys.executable, str(ROOT / "data_generator.py"), "--tokenizer=bytes"]
        command += ["--dataset=org/x", f"--data_dir={tmp_path}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert re.search(
            rf"error: {place}\S*, where the Hub's library keeps its files, can't be used: Not a dir"
            r".*\nHINT: set HF_HOME to a directory",
            done.stderr,
        ), done.stderr


def bin_shard(tokens) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes()


def test_ready_made_tokens_are_downloaded_trained_on_and_resumed(tmp_path):
    """README's command, against a local Hub: shards of the published names, in llm.c's format."""
    random_ = np.random.default_rng(0)
    names = [
        "finewebedu_val_000000.bin",
        "finewebedu_train_000001.bin",
        "finewebedu_train_000002.bin",  # which the command leaves out
    ]
    files = {name: bin_shard(random_.integers(0, 50257, 700)) for name in names}
    (line,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("hf download ")
    ]
    words = shlex.split(line)
    data_dir = tmp_path / words[words.index("--local-dir") + 1]
    with Hub({f"datasets/{words[2]}": files}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [str(Path(sys.executable).parent / "hf"), *words[1:]]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    (data_dir / "finewebedu_train_000003.bin.incomplete").write_bytes(b"half")
    for steps in (2, 4):
        words = flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=steps, n_embd=8)
        done = script("train.py", *words)
        assert done.returncode == 0, done.stderr
    assert "700 training tokens (gpt2)" in done.stdout and "resuming from" in done.stdout
    assert "has no manifest.json: assuming GPT-2's tokens" in done.stdout


@pytest.mark.slow
def test_stopping_early_ends_cleanly(fineweb, tmp_path, campaign):
    """Arrow's threads may be reading when --max_tokens is reached (huggingface/datasets 7566, 7879
    were of its streaming, which is not used any more)."""
    hub, _ = fineweb
    for number in range(campaign(80)):
        done = generate(hub, tmp_path / str(number), "--max_tokens=9000")
        assert done.returncode == 0, (number, done.stderr)


def test_no_network(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = script(
        "data_generator.py",
        f"--data_dir={tmp_path / 'data'}",
        "--max_tokens=200000000",
        env=environment,
    )
    assert (
        done.returncode == 2
        and "the Hub can't be reached" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "data").glob("*.npy"))


# ---- a tokenizer of one's own ----


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory):
    """A folder with a tokenizer.json of 500 tokens, whose documents end with <end>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet
    )
    own.train_from_iterator(words_of(500), trainer)
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return folder


def test_a_tokenizer_of_ones_own(own_tokenizer, tmp_path, capsys):
    """The tokens are those of `tokenizers`, the file lies beside them, and no other can take its
    place."""
    import tokenizers

    texts = [*HAZARDS, "a literal <end> in the text", *words_of(600)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    words = ["--dataset", str(tmp_path / "a.jsonl"), "--shard_size=5000"]
    words += ["--data_dir", str(tmp_path / "data")]
    assert data_generator.main([*words, "--tokenizer", str(own_tokenizer)]) == 0
    manifest = read_manifest(tmp_path / "data")
    content = (own_tokenizer / "tokenizer.json").read_bytes()
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == content
    assert manifest.tokenizer == "tokenizer.json"
    assert manifest.tokenizer_sha256 == hashlib.sha256(content).hexdigest()
    truth = tokenizers.Tokenizer.from_file(str(own_tokenizer / "tokenizer.json"))
    truth.encode_special_tokens = True
    assert manifest.vocab_size == truth.get_vocab_size()
    stream = []
    for text in texts:
        stream += [1, *truth.encode(text, add_special_tokens=False).ids]
    tokens = [np.load(tmp_path / "data" / entry.file) for entry in manifest.shards]
    assert np.concatenate(tokens).tolist() == stream
    assert sum(entry.documents for entry in manifest.shards) == len(texts)
    file = str(own_tokenizer / "tokenizer.json")
    assert data_generator.main([*words, "--tokenizer", file]) == 0  # it is complete already
    assert data_generator.main([*words, "--tokenizer=gpt2"]) == 2
    assert "tokenizer was tokenizer.json, is gpt2" in capsys.readouterr().err
    settings = own_tokenizer / "tokenizer_config.json"
    settings.write_text('{"eos_token": "<pad>"}')
    assert data_generator.main([*words, "--tokenizer", file]) == 2
    assert "begun with token 1 before each document, but" in capsys.readouterr().err
    settings.write_text('{"eos_token": "<end>"}')
    (tmp_path / "data" / "tokenizer.json").write_bytes(content + b"\n")
    for command in ([*words, "--tokenizer", file], ["--verify", *words]):
        assert data_generator.main(command) == 2
        said = "data/tokenizer.json is not the file that made the tokens of"
        assert said in capsys.readouterr().err


def test_killed_with_a_tokenizer_of_ones_own_it_goes_on(own_tokenizer, tmp_path):
    texts = words_of(4000)
    write_jsonl(tmp_path / "docs.jsonl", texts)
    words = ["--tokenizer", str(own_tokenizer), "--shard_size=3000"]
    for name in ("whole", "killed"):
        process = start(tmp_path, "--data_dir", str(tmp_path / name), *words)
        end = time.time() + 60
        while name == "killed" and written_shards(tmp_path / name) < 3 and time.time() < end:
            time.sleep(0.002)
        if name == "killed":
            process.kill()
        process.communicate()
    process = start(tmp_path, "--data_dir", str(tmp_path / "killed"), *words)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---- dying and going on ----


def start(tmp_path, *words, **environment):
    """The generator as a process, on docs.* of a directory."""
    (docs,) = tmp_path.glob("docs.*")
    command = [sys.executable, ROOT / "data_generator.py", "--dataset", docs]
    command += ["--shard_size=20000", "--tokenizer=bytes", "--skip_bad", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], env=os.environ | environment, **pipes)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A directory with docs.jsonl, and what an uninterrupted run makes of it."""
    return run_uninterrupted(tmp_path_factory.mktemp("uninterrupted"), "jsonl")


def run_uninterrupted(directory, kind: str):
    """Write docs.<kind> with 12,000 documents, every 500th of which is no text, and what an
    uninterrupted run makes of them."""
    texts = words_of(12_000)
    found = [None if n % 500 == 3 else text for n, text in enumerate(texts)]
    rows = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(found))
    if kind == "jsonl":
        content = rows.encode()
    elif kind == "jsonl.xz":
        content = lzma.compress(rows.encode(), preset=0)
    elif kind == "parquet":
        content = parquet(found)
    elif kind == "csv.gz":
        lines = [[n, text] if text is not None else [n] for n, text in enumerate(found)]
        file = io.StringIO()
        csv.writer(file).writerows([["id", "text"], *lines])
        content = gzip.compress(file.getvalue().encode())
    (directory / f"docs.{kind}").write_bytes(content)
    process = start(directory, "--data_dir", str(directory / "data"))
    _, error = process.communicate()
    assert process.returncode == 0, error
    texts = [text for text in found if text is not None]
    assert_shards(directory / "data", plain_shards(texts, "bytes", 20_000), skipped=24)
    return directory


def stop_once(directory, data_dir, dice, number=signal.SIGKILL):
    """Start, end it by a signal at a random moment, and check that it left at once."""
    process = start(directory, "--data_dir", str(data_dir))
    # most moments shall fall into reading and writing
    target = written_shards(data_dir) + dice.randrange(20)
    end = time.time() + 60
    while process.poll() is None and len(list(Path(data_dir).glob("*.npy"))) < target:
        assert time.time() < end
        time.sleep(0.001)
    time.sleep(dice.random() * 0.02)
    running = (Path(data_dir) / ".lock").exists()  # else Python may still be importing
    process.send_signal(number)
    begin = time.time()
    _, error = process.communicate(timeout=60)
    if number == signal.SIGINT and running and process.returncode != 0:
        assert process.returncode == 130 and "Traceback" not in error, error
        assert time.time() - begin < 1


def finish_and_compare(directory, data_dir):
    process = start(directory, "--data_dir", str(data_dir))
    _, error = process.communicate()
    assert process.returncode == 0, error
    ours, reference = contents(data_dir), contents(directory / "data")
    assert ours.keys() == reference.keys()
    assert all(ours[name] == reference[name] for name in ours)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_resumes_to_the_same_bytes(number, uninterrupted, tmp_path):
    stop_once(uninterrupted, tmp_path, random.Random(time.time()), number)
    finish_and_compare(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.xz", "parquet", "csv.gz"])
def test_campaign_of_kills(kind, tmp_path, campaign):
    """In full, twenty for each type of file."""
    (tmp_path / "uninterrupted").mkdir()
    directory = run_uninterrupted(tmp_path / "uninterrupted", kind)
    dice = random.Random(2026)
    for number in range(campaign(10)):
        for _ in range(2):
            stop_once(directory, tmp_path / str(number), dice)
        finish_and_compare(directory, tmp_path / str(number))


def test_a_second_writer_and_other_settings_are_refused(uninterrupted, capsys):
    import fcntl

    words = [
        "--dataset",
        str(uninterrupted / "docs.jsonl"),
        f"--data_dir={uninterrupted / 'data'}",
        "--tokenizer=bytes",
    ]
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from lib.files import only_writer
with only_writer({str(uninterrupted / 'data')!r}):
    print("held", flush=True)
    time.sleep(60)
"""], stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "held\n" and fcntl
    assert data_generator.main([*words, "--shard_size=20000"]) == 2
    assert f"is being written by process {holder.pid} on" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert data_generator.main([*words, "--shard_size=30000"]) == 2
    assert "shard_size was 20000, is 30000" in capsys.readouterr().err
    assert data_generator.main([*words[:-1], "--tokenizer=gpt2", "--shard_size=20000"]) == 2
    assert "tokenizer was bytes, is gpt2; vocab_size was 257, is 50257" in capsys.readouterr().err
    assert data_generator.main([*words, "--shard_size=20000"]) == 0
    assert "it was already complete\n" in capsys.readouterr().out
    assert data_generator.main([*words, "--shard_size=20000", "--max_tokens=9999999"]) == 0
    assert (
        "it was already complete and does not grow to --max_tokens 9,999,999"
        in capsys.readouterr().out
    )


def test_nothing_is_left_outside_the_data_directory(uninterrupted, tmp_path):
    (tmp_path / "system").mkdir()
    process = start(
        uninterrupted, f"--data_dir={tmp_path / 'data'}", TMPDIR=str(tmp_path / "system")
    )
    end = time.time() + 60
    while written_shards(tmp_path / "data") < 3:
        assert time.time() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not list((tmp_path / "system").iterdir())
    finish_and_compare(uninterrupted, tmp_path / "data")


def test_the_demo_is_made_without_torch_and_is_the_same_each_time(demo_shards, tmp_path):
    program = f"""
import sys
import data_generator
code = data_generator.main(["--preset=demo", "--data_dir={tmp_path / "data"}"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_shards(tmp_path / "data", demo_shards)


def test_leftovers_are_removed_and_never_read(uninterrupted, tmp_path):
    (tmp_path / "edufineweb_train_000003.npy.tmp").write_bytes(b"torn")
    (tmp_path / "manifest.json.tmp").write_bytes(b"{")
    finish_and_compare(uninterrupted, tmp_path)


def test_a_full_disk_leaves_what_is_whole(uninterrupted, tmp_path):
    words = ["--dataset", str(uninterrupted / "docs.jsonl"), "--data_dir", str(tmp_path)]
    words += ["--tokenizer=bytes", "--skip_bad", "--shard_size=20000"]
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data_generator
from lib.shards import ShardWriter
write, number = ShardWriter.write, []
def write_with_no_room_for_the_fourth(self, *position):
    number.append(1)
    if len(number) == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    write(self, *position)
ShardWriter.write = write_with_no_room_for_the_fourth
sys.exit(data_generator.main({words!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "edufineweb_train_000003.npy can't be written" in done.stderr, (
        done.stderr
    )
    assert (
        "it needs 40,128 bytes" in done.stderr and "the 3 shards before it are whole" in done.stderr
    )
    assert written_shards(tmp_path) == 3 and not list(tmp_path.glob("*.tmp"))
    enough = tmp_path.with_name("enough")  # three shards will do: there is no fourth, empty one
    shutil.copytree(tmp_path, enough)
    assert data_generator.main([*words, f"--data_dir={enough}", "--max_tokens=60000"]) == 0
    assert (
        written_shards(enough) == 3
        and data_generator.main([f"--data_dir={enough}", "--verify"]) == 0
    )
    finish_and_compare(uninterrupted, tmp_path)


def test_a_disk_that_is_too_small_is_said_before(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    words = [
        "--dataset",
        str(tmp_path / "a.txt"),
        "--data_dir",
        str(tmp_path / "data"),
        "--tokenizer=bytes",
    ]
    assert data_generator.main([*words, "--max_tokens=100000000000000"]) == 2
    config = data_generator.DataConfig
    assert data_generator.expected_tokens(config(), []) == 9_950_000_000
    assert data_generator.expected_tokens(config(tokenizer="bytes"), []) is None
    assert re.search(
        r"needs about 200,000,000,000,000 bytes, [\d,]+ are free", capsys.readouterr().err
    )


@pytest.mark.slow
def test_memory_stays_flat_whatever_the_size(tmp_path):
    """Endless documents: the memory after 40 MB of text is that after 10 MB."""
    program = f"""
import itertools, sys
sys.path.insert(0, {str(ROOT)!r})
import data_generator
peaks = []
def endless():
    for n in itertools.count():
        if n % 5000 == 0:
            status = open("/proc/self/status").read()
            peaks.append(int(status.split("VmRSS:")[1].split()[0]) / 1000)
        yield "some words of a document that is one of very many " * 20
data_generator.pydoc_documents = endless
words = "--dataset=pydoc --data_dir={tmp_path} --max_tokens=30000000 --shard_size=2000000"
code = data_generator.main(words.split())
print(*peaks)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    peaks = [float(word) for word in done.stdout.splitlines()[-1].split()]
    half = len(peaks) // 2
    assert max(peaks) < 500 and max(peaks[half:]) < max(peaks[2:half]) + 30, peaks


# ---- bad input ----


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset=nothing.txt"], "--dataset nothing.txt: there is no such file"),
        (["--dataset=no/*.parquet"], "there is no such file"),
        (
            ["--dataset=."],
            r"its files are of several types: give one type, as in '\./\*\*/\*",
        ),
        (["--dataset=lib"], "none of its files is .txt .md .jsonl"),
        (["--dataset=lib/cli.py"], "lib/cli.py is none of .txt .md .jsonl"),
        (["--shard_size=0"], "--shard_size is 0: it must be at least 1"),
        (["--tokenizer=gpt4"], "there is no tokenizer gpt4: give gpt2, bytes"),
        (["--shard=4"], "unknown flag --shard"),
        (
            ["--max_tokens=1000"],
            "all fit into shard 0.*\n.*HINT: --shard_size 100|HINT: --shard_size 100",
        ),
    ],
)
def test_bad_input(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert data_generator.main(["--data_dir", str(tmp_path / "data"), *words]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not list(tmp_path.glob("data/*.npy"))


def test_a_text_that_ends_inside_shard_0(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x" * 999)
    words = [
        "--dataset",
        str(tmp_path / "a.txt"),
        "--data_dir",
        str(tmp_path / "data"),
        "--tokenizer=bytes",
    ]
    for shard_size in (100_000, 1000):  # much too large, and exactly as large as the text
        assert data_generator.main([*words, f"--shard_size={shard_size}"]) == 2
        printed = capsys.readouterr().err
        assert (
            "1,000 tokens, which all fit into shard 0" in printed
            and "HINT: --shard_size 100" in printed
        )
    assert data_generator.main([*words, "--shard_size=100"]) == 0


def test_a_document_without_text_is_named(tmp_path, capsys):
    documents = words_of(600)
    lines = [json.dumps({"text": text}) for text in documents]
    lines[444] = '{"text": null}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = [
        "--dataset",
        str(tmp_path / "a.jsonl"),
        "--data_dir",
        str(tmp_path / "data"),
        "--tokenizer=bytes",
    ]
    assert data_generator.main([*words, "--shard_size=2000"]) == 2
    assert "a.jsonl line 445: text is null, not a text\nHINT: --skip_bad" in capsys.readouterr().err
    words += ["--data_dir", str(tmp_path / "other")]
    assert data_generator.main([*words, "--text_field=body", "--shard_size=2000"]) == 2
    assert "a.jsonl line 1: --text_field body: there is no" in capsys.readouterr().err


def test_a_file_that_is_not_utf8(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"latin \xe9\xe8")
    assert (
        data_generator.main(
            ["--dataset", str(tmp_path / "a.txt"), "--data_dir", str(tmp_path / "data")]
        )
        == 2
    )
    assert "a.txt: it is not UTF-8: byte 0xE9 at place 6" in capsys.readouterr().err


def test_what_is_no_text_is_left_out_and_counted(tmp_path, capsys):
    documents = words_of(3000)
    bad = {5: "4", 299: "null", 300: '["a"]', 2000: "true", 2999: '"\\udfff"'}
    lines = [f'{{"text": {bad.get(n, json.dumps(text))}}}' for n, text in enumerate(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = ["--dataset", str(tmp_path / "a.jsonl"), "--tokenizer=bytes", "--shard_size=9000"]
    words += ["--data_dir", str(tmp_path / "data")]
    assert data_generator.main(words) == 2
    said = f"{tmp_path}/a.jsonl line 6: text is the number 4, not a text"
    assert f"error: {said}\nHINT: --skip_bad skips such" in capsys.readouterr().err
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert data_generator.main([*words, "--skip_bad"]) == 0
    good = [text for n, text in enumerate(documents) if n not in bad]
    assert_shards(tmp_path / "data", plain_shards(good, "bytes", 9000), skipped=5)
    printed = capsys.readouterr().out
    assert "skipped, as no texts: 5 documents; the first here:\n" in printed
    assert [line.strip() for line in printed.splitlines() if "    " in line] == [
        said,
        f"{tmp_path}/a.jsonl line 300: text is null, not a text",
        f'{tmp_path}/a.jsonl line 301: text is the list ["a"], not a text',
    ]
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["skipped"] == 5


def test_nothing_but_what_is_no_text(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n' * 3)
    words = ["--dataset", str(tmp_path / "a.jsonl"), "--data_dir", str(tmp_path / "data")]
    assert data_generator.main([*words, "--skip_bad"]) == 2
    assert "a.jsonl has no documents but 3 documents skipped" in capsys.readouterr().err


def test_a_wrong_encoder_is_noticed_at_its_document(tmp_path, capsys):
    """Nothing of its batch is written; what was before it stays. Of the second batch the third text
    is compared, and gigatoken knows a letter of Unicode 17, which tiktoken does not."""
    text = chr(0x323B0) + "'d"
    tokenizer = get_tokenizer("gpt2")
    if tokenizer.encode_batch(["", "", text])[2].tolist() == tokenizer.encode(text):
        pytest.skip("both packages know the letter, or gigatoken is not installed")
    texts = words_of(300)
    write_jsonl(tmp_path / "a.jsonl", [*texts[:200]])
    write_jsonl(tmp_path / "b.jsonl", [*texts[200:258], text, *texts[258:]])
    words = ["--dataset", str(tmp_path / "*.jsonl"), "--shard_size=500"]
    words += [f"--data_dir={tmp_path / 'data'}"]
    assert data_generator.main(words) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path}/b.jsonl, document 59: gigatoken and tiktoken encode a text diff" in printed
    assert "\nHINT: `pip uninstall gigatoken`" in printed
    tokens = [np.load(tmp_path / "data" / s.file) for s in read_manifest(tmp_path / "data").shards]
    (whole,) = plain_shards(texts[:256], "gpt2", 10**6)
    tokens = np.concatenate(tokens)
    assert 0 < len(tokens) <= len(whole) and np.array_equal(tokens, whole[: len(tokens)])


def test_a_million_white_space_characters(tmp_path):
    """tiktoken can't take them at once; GPT-2's tokens decode to the same text."""
    texts = ["words" + " " * 1_100_000 + "more", "\n" * 1_000_001 + "x", "plain"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    words = ["--dataset", str(tmp_path / "a.jsonl"), "--data_dir", str(tmp_path / "data")]
    assert data_generator.main([*words, "--shard_size=1000000"]) == 0
    shards = read_manifest(tmp_path / "data").shards
    tokens = np.concatenate([np.load(tmp_path / "data" / entry.file) for entry in shards])
    gpt2 = tiktoken.get_encoding("gpt2")
    assert gpt2.decode(tokens).split("<|endoftext|>")[1:] == texts


def test_words_of_a_pattern_that_was_not_quoted(tmp_path, capsys):
    assert data_generator.main(["--dataset", "a.txt", "b.txt", "c.txt"]) == 2
    assert (
        "unexpected argument b.txt; quote prompts of several words and globs"
        in capsys.readouterr().err
    )


def test_the_next_command_is_quoted_for_the_shell(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text " * 100)
    data_dir = tmp_path / "it's my data"
    words = ["--dataset", str(tmp_path / "a.txt"), "--tokenizer=bytes", "--shard_size=100"]
    assert data_generator.main([*words, "--data_dir", str(data_dir)]) == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("next: ")]
    command = line.removeprefix("next: ")
    shell = subprocess.run(f"printf '%s\\n' {command}", shell=True, capture_output=True, text=True)
    assert shell.stdout.splitlines() == ["python", "train.py", "--data_dir", str(data_dir)]


# ---- verify ----


def test_verify_names_each_bad_file(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted / "data", tmp_path / "data")
    words = ["--verify", f"--data_dir={tmp_path / 'data'}"]
    assert data_generator.main(words) == 0
    assert "shards are good; the data set is complete" in capsys.readouterr().out
    shard = [tmp_path / "data" / entry.file for entry in read_manifest(tmp_path / "data").shards]
    flipped = bytearray(shard[1].read_bytes())
    flipped[5000] ^= 1
    shard[1].write_bytes(flipped)
    shard[2].write_bytes(shard[2].read_bytes()[:-2])
    shard[3].unlink()
    np.save(shard[4], np.load(shard[4]).astype(np.int32))
    assert data_generator.main(words) == 1
    printed = capsys.readouterr().err
    for number, what in {
        1: "its sha256 is not",
        2: "damaged or cut short",
        3: "is missing",
        4: "it holds int32",
    }.items():
        assert re.search(rf"{shard[number].name}.*{what}", printed), printed
    assert f"4 of {len(shard)} shards are bad" in printed
