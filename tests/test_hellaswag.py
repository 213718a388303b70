"""HellaSwag against a brute-force scorer, against lm-evaluation-harness itself, and from a local
Hub."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import flags, script, torchrun, write_hellaswag
from hub import Hub

import hellaswag
import train
from GPT_Modules import GPT, GPTConfig
from hellaswag import count_right, ending_losses, load_examples, prepare
from lib.cli import UserError
from lib.tokenizer import get_tokenizer

SHAPE = GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(3)
    model = GPT(SHAPE).eval()
    with torch.no_grad():  # far from uniform, so that mistakes show
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def brute_force(model, context: list[int], ending: list[int]) -> float:
    """Summed loss of an ending: one sequence, cut on the left, one forward pass."""
    tokens = (context + ending)[-(model.config.block_size + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0][0, :, :50257]
    return F.cross_entropy(logits[-len(ending) :], torch.tensor(ending), reduction="sum").item()


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_scores_are_those_of_brute_force(style, model, tmp_path):
    examples = write_hellaswag(tmp_path / "h.jsonl", 60)
    encoding = get_tokenizer("gpt2")
    questions = prepare(load_examples(str(tmp_path / "h.jsonl"), style), encoding, style, 64, 300)
    got = ending_losses(model, questions, questions.batches)
    right = right_norm = cut = 0
    for number, example in enumerate(examples):
        sums, means = [], []
        for choice, ending in enumerate(example["endings"]):
            if style == "completion":
                context, tokens = encoding.encode(example["ctx"]), encoding.encode(" " + ending)
                length = len(tokens)
            else:

                def clean(text):
                    return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace(
                        "  ", " "
                    )

                query = clean(
                    f"{example['activity_label']}: {example['ctx_a']} "
                    + example["ctx_b"].capitalize()
                )
                context = encoding.encode(query.rstrip())
                tokens = encoding.encode(query + " " + clean(ending))[len(context) :]
                length = len(clean(ending))
            cut += len(context) + len(tokens) - 1 > 64
            sums.append(brute_force(model, context, tokens))
            means.append(sums[-1] / length)
            assert abs(got[number, choice] - sums[-1]) < 2e-4 * max(1, sums[-1] / 10), (
                number,
                choice,
            )
        right += int(np.argmin(sums)) == int(example["label"])
        right_norm += int(np.argmin(means)) == int(example["label"])
    assert 0 < cut < 240  # both kinds are there
    assert count_right(questions, got) == (right, right_norm)


def test_batches_change_nothing(model, tmp_path):
    write_hellaswag(tmp_path / "h.jsonl", 30)
    examples = load_examples(str(tmp_path / "h.jsonl"))
    results = []
    for batch_tokens in (1, 200, 10**6):
        questions = prepare(examples, get_tokenizer("gpt2"), "completion", 64, batch_tokens)
        results.append(ending_losses(model, questions, questions.batches))
    assert np.allclose(results[0], results[1], atol=1e-4)
    assert np.allclose(results[0], results[2], atol=1e-4)


def test_of_equal_scores_the_first_counts():
    questions = hellaswag.Questions([], np.array([0, 1]), np.ones((2, 4)), 257)
    assert count_right(questions, np.array([[2.0, 2.0, 3.0, 3.0], [2.0, 2.0, 3.0, 3.0]])) == (1, 1)


GOOD = {
    "ctx": "a",
    "ctx_a": "a",
    "ctx_b": "",
    "activity_label": "x",
    "endings": ["a", "b", "c", "d"],
    "label": 1,
}


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"ctx": "\xff"}', "line 2: not UTF-8"),
        (b"{", "line 2: Expecting"),
        (b"[]", "line 2: not an object"),
        (json.dumps({"ctx": "a", "label": 1}).encode(), "line 2: endings missing"),
        (json.dumps(GOOD | {"label": 4}).encode(), "line 2: label is 4, not one of 0, 1, 2, 3"),
        (json.dumps(GOOD | {"label": ""}).encode(), "line 2: label is '', not one of"),
        (
            json.dumps(GOOD | {"endings": ["a", "b"]}).encode(),
            r"line 2: endings is \['a', 'b'\], not a list of four texts",
        ),
        (json.dumps(GOOD | {"ctx": None}).encode(), "line 2: ctx is None, not a text"),
        (json.dumps(GOOD | {"ctx": ""}).encode(), "line 2: ctx is empty"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path / "h.jsonl"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    examples = write_hellaswag(tmp_path / "a.jsonl", 2)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    found = load_examples(str(tmp_path / "b.jsonl"))
    assert [example["ctx"] for example in found] == [example["ctx"] for example in examples]


def test_labels_are_numbers_or_strings(tmp_path):
    (tmp_path / "h.jsonl").write_text(
        json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"label": "2"}) + "\n"
    )
    assert [example["label"] for example in load_examples(str(tmp_path / "h.jsonl"))] == [1, 2]
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in {"empty.jsonl": "has no examples", "none.jsonl": "can't be read"}.items():
        with pytest.raises(UserError, match=message):
            load_examples(str(tmp_path / name))


def test_command_line(trained, tmp_path):
    write_hellaswag(tmp_path / "h.jsonl", 20)
    done = script(
        "hellaswag.py",
        "--model",
        trained / "model_checkpoint.pt",
        "--data",
        tmp_path / "h.jsonl",
        "--limit=10",
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"hellaswag style=completion n=10 acc=0\.\d{4} acc_norm=0\.\d{4} stderr=0\.\d{4}", last
    ), last
    assert (
        "GPT-2 124M, published" in done.stdout
        and "0.2955" in done.stdout
        and "hellaswag: 100%" in done.stderr
    )
    done = script(
        "hellaswag.py",
        "--model",
        trained / "model_checkpoint.pt",
        "--data",
        tmp_path / "h.jsonl",
        "--style=harness",
    )
    assert (
        done.returncode == 0
        and "0.3114" in done.stdout
        and "hellaswag style=harness n=20" in done.stdout
    )


# ---- in training ----


def hella_lines(log_dir) -> list[str]:
    return [line for line in (log_dir / "log.txt").read_text().splitlines() if " hella " in line]


def test_the_score_of_a_run_is_the_same_for_any_number_of_ranks(data_dir, tmp_path):
    write_hellaswag(tmp_path / "h.jsonl", 23)
    common = {
        "data_dir": data_dir,
        "hellaswag_every": 4,
        "hellaswag_data": tmp_path / "h.jsonl",
        "seq_len": 64,
    }
    common |= {"batch_size": 1, "total_batch_size": 256, "max_steps": 4}
    assert train.main(flags(log_dir=tmp_path / "1", **common)) == 0
    assert (
        torchrun(
            3,
            "train.py",
            *flags(log_dir=tmp_path / "3", **common | {"total_batch_size": 192, "max_steps": 1}),
        ).returncode
        == 0
    )
    assert torchrun(4, "train.py", *flags(log_dir=tmp_path / "4", **common)).returncode == 0
    assert [line.split()[0] for line in hella_lines(tmp_path / "1")] == ["0", "4"]
    assert hella_lines(tmp_path / "1") == hella_lines(tmp_path / "4")
    assert hella_lines(tmp_path / "3")[0] == hella_lines(tmp_path / "1")[0]
    done = script(
        "hellaswag.py",
        "--model",
        tmp_path / "1" / "model_checkpoint.pt",
        "--data",
        tmp_path / "h.jsonl",
    )
    score = float(re.search(r"acc_norm=(\S+)", done.stdout.splitlines()[-1])[1])
    assert abs(score - float(hella_lines(tmp_path / "1")[-1].split()[2])) < 5e-5


# ---- from the Hub ----


def repository(n: int) -> dict[str, bytes]:
    rows = [GOOD | {"ind": i, "label": str(i % 4), "ctx": f"context {i}"} for i in range(n)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return {"README.md": b"# HellaSwag", "data/validation-00000-of-00001.parquet": file.getvalue()}


def data_requests(hub) -> list[str]:
    return [path for method, path in hub.requests if method == "GET" and path.endswith(".parquet")]


def test_the_hubs_data_is_fetched_once_and_counted(trained, tmp_path):
    words = ["hellaswag.py", "--model", trained / "model_checkpoint.pt", "--limit=50"]
    with Hub({"datasets/Rowan/hellaswag": repository(10_042)}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        for requests in (1, 0):
            done = script(*words, env=environment)
            assert done.returncode == 0 and "n=50" in done.stdout, done.stderr
            assert len(data_requests(hub)) == requests
            hub.requests.clear()
    with Hub({"datasets/Rowan/hellaswag": repository(77)}) as hub:
        done = script(*words, env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf2")})
        assert done.returncode == 2 and "has 77 examples instead of 10042" in done.stderr, (
            done.stderr
        )


@pytest.mark.slow
def test_one_rank_fetches_the_hubs_data(data_dir, tmp_path):
    changes = {"hellaswag_every": 1, "max_steps": 1, "n_layer": 1, "n_embd": 8, "val_every": 0}
    words = flags(data_dir=data_dir, log_dir=tmp_path / "log", **changes)
    with Hub({"datasets/Rowan/hellaswag": repository(10_042)}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        done = torchrun(2, "train.py", *words, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(data_requests(hub)) == 1
    assert "10,042 examples" in done.stdout and len(hella_lines(tmp_path / "log")) == 2


# ---- lm-evaluation-harness ----

HARNESS = """
import json, sys
import datasets, lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import process_docs
from lm_eval.api.task import ConfigurableTask

folder, data, out = sys.argv[1:]
config = {
    "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": data}},
    "output_type": "multiple_choice", "validation_split": "validation",
    "process_docs": process_docs,
    "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
task = ConfigurableTask(config=config)
model = HFLM(folder, device="cpu", batch_size=8)
results = lm_eval.simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0)
samples = []
for sample in results["samples"]["local"]:
    samples.append([float(choice[0]) for choice in sample["filtered_resps"]])
scores = results["results"]["local"]
scores = {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"]}
json.dump({"samples": samples} | scores, open(out, "w"))
"""


@pytest.mark.slow
def test_harness_style_is_lm_evaluation_harness(tmp_path, data_dir):
    """Example by example, on an exported folder of a small model with GPT-2's tokenizer."""
    import subprocess
    import sys

    import export
    from lib.pretrained import load_model

    torch.manual_seed(0)
    wide = GPT(GPTConfig(block_size=96, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        wide.transformer.wte.weight.mul_(8)
    torch.save(
        {"model": wide.state_dict(), "config": wide.config, "step": 1, "tokenizer": "gpt2"},
        tmp_path / "model_00001.pt",
    )
    assert (
        export.main(
            ["--model", str(tmp_path / "model_00001.pt"), "--out", str(tmp_path / "folder")]
        )
        == 0
    )
    write_hellaswag(tmp_path / "h.jsonl", 120)
    text = (tmp_path / "h.jsonl").read_text()  # labels as the Hub has them
    (tmp_path / "h.jsonl").write_text(re.sub(r'"label": (\d)', r'"label": "\1"', text))
    words = [str(tmp_path / name) for name in ("folder", "h.jsonl", "out.json")]
    done = subprocess.run([sys.executable, "-c", HARNESS, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    model, tokenizer = load_model(str(tmp_path / "folder"))
    questions = prepare(
        load_examples(str(tmp_path / "h.jsonl"), "harness"),
        tokenizer,
        "harness",
        96,
        2048,
    )
    ours = ending_losses(model, questions, questions.batches)
    assert np.abs(ours + np.array(theirs["samples"])).max() < 1e-4 * max(1, ours.max() / 10)
    right, right_norm = count_right(questions, ours)
    assert (right / 120, right_norm / 120) == (theirs["acc"], theirs["acc_norm"])
