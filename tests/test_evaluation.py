"""Measuring: --eval_only against the run's own log and transformers, bits per byte against the text
itself, several runs in one table and picture."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, torchrun, values, write_hellaswag, write_shards
from matplotlib.image import imread
from test_tokenizer import byte_level_bpe, random_texts, save

import data_generator
import metrics
import train
from lib.curve import draw_curve
from lib.log import Log, read_run, write_run


def numbers(printed: str) -> dict[str, float]:
    """{loss, perplexity, bits per byte, HellaSwag: number} of what --eval_only printed."""
    names = ("loss", "perplexity", "bits per byte", "HellaSwag")
    found = {name: re.search(rf"^{name} +(\d+\.\d+)", printed, re.M) for name in names}
    return {name: float(match[1]) for name, match in found.items() if match}


def contents(directory: Path) -> dict[str, tuple]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loss_of_a_run_is_what_the_run_has_logged(ranks, data_dir, trained):
    before = contents(trained)
    for step, model in ((8, trained), (8, trained / "model_checkpoint.pt")):
        words = [*flags(data_dir=data_dir, log_dir="none"), "--eval_only", f"--init_from={model}"]
        done = torchrun(ranks, "train.py", *words)
        assert done.returncode == 0, done.stderr
        found = numbers(done.stdout)
        logged = values(trained, "val")[step // 4]
        assert found["loss"] == pytest.approx(logged, abs=5.1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(logged), rel=1e-4)
        assert "256 validation tokens (bytes)" in done.stdout and ", float32:" in done.stdout
    assert contents(trained) == before and not Path("none").exists()


def test_a_run_is_measured_in_its_own_precision(data_dir, tmp_path, capsys):
    """One of the two is not what this machine would choose."""
    for own, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        common = {"data_dir": data_dir, "max_steps": 2, "log_dir": tmp_path / own}
        assert train.main(flags(**common, dtype=own)) == 0
        capsys.readouterr()
        for dtype, precision in (("auto", own), (other, other)):
            assert train.main([*flags(**common, dtype=dtype), "--eval_only"]) == 0
            assert f", {precision}:" in capsys.readouterr().out


def test_log_dirs_model_is_the_default_and_nothing_is_locked(data_dir, trained, capsys):
    from lib.files import only_writer

    with only_writer(trained):
        assert train.main([*flags(data_dir=data_dir, log_dir=trained), "--eval_only"]) == 0
    logged = values(trained, "val")[-1]
    assert numbers(capsys.readouterr().out)["loss"] == round(logged, 4)


def test_the_loss_is_transformers(tmp_path, capsys):
    """GPT-2's own tokens, a folder of transformers', the same windows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "model")
    streams = {"val": [5000], "train": [100]}
    tokens = torch.from_numpy(write_shards(tmp_path / "data", streams, 50257, manifest=False)[0])
    words = ["--eval_only", "--init_from", str(tmp_path / "model"), "--seq_len=64"]
    words += ["--total_batch_size=1024", "--val_tokens=4096", "--hellaswag_every=0"]
    words += ["--data_dir", str(tmp_path / "data"), "--device=cpu", "--dtype=float32"]
    printed = []
    loss_of = train.validation_loss
    try:
        train.validation_loss = lambda *words: printed.append(loss_of(*words)) or printed[0]
        assert train.main(words) == 0
    finally:
        train.validation_loss = loss_of
    idx = tokens[:4096].long().view(64, 64)
    targets = tokens[1:4097].long()
    with torch.no_grad():
        logits = theirs(idx).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert abs(printed[0] - expected) < 1e-5
    assert numbers(capsys.readouterr().out)["loss"] == round(expected, 4)


def test_hellaswag_is_measured_if_it_is_on(data_dir, tmp_path, capsys):
    write_hellaswag(tmp_path / "hella.jsonl", 12)
    common = {"data_dir": data_dir, "log_dir": tmp_path / "log"}
    words = [*flags(**common, hellaswag_every=8), f"--hellaswag_data={tmp_path / 'hella.jsonl'}"]
    words.append("--block_size=512")
    assert train.main(words) == 0
    capsys.readouterr()
    assert train.main([*words, "--eval_only"]) == 0
    printed = capsys.readouterr().out
    assert numbers(printed)["HellaSwag"] == round(values(tmp_path / "log", "hella")[-1], 4)
    assert "(style completion, 12 examples)" in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["--init_from=missing.pt"], "there is no checkpoint or folder missing.pt"),
        (["--seq_len=32"], "--seq_len 32 is more than the model's context 16"),
    ],
)
def test_what_cannot_be_measured(words, said, data_dir, trained, capsys):
    words = [*flags(data_dir=data_dir, log_dir=trained), "--eval_only", *words]
    assert train.main(words) == 2
    assert said in capsys.readouterr().err


# ---- bits per byte ----


def shards_of(tmp_path, tokenizer: str, texts: list[str]) -> str:
    name = Path(tokenizer).name
    (tmp_path / "texts.jsonl").write_text(
        "".join(f'{{"text": {data_generator.json.dumps(text)}}}\n' for text in texts)
    )
    words = ["--dataset", str(tmp_path / "texts.jsonl"), "--tokenizer", tokenizer]
    words += ["--data_dir", str(tmp_path / name), "--shard_size=2000"]
    assert data_generator.main(words) == 0
    return str(tmp_path / name)


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "own"])
def test_bytes_are_counted_as_the_text_has_them(kind, tmp_path):
    from lib.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(save(tmp_path / "own", byte_level_bpe()) if kind == "own" else kind)
    texts = [*random_texts(50), "", "é中🙂"]
    ids = tokenizer.encode_documents(texts)
    assert tokenizer.count_bytes(ids) == sum(len(text.encode()) for text in texts)
    assert tokenizer.count_bytes(ids[:1]) == 0  # the end of a document


def test_bits_per_byte_compare_models_of_different_tokenizers(tmp_path, capsys):
    """Two models that know nothing: the one of bytes needs 8 bits a byte, the one of GPT-2's tokens
    log2(50304) bits for several bytes; both lines say so, and run.json keeps the ratio."""
    texts = ["some words of a document that is one of many, number " + str(n) for n in range(400)]
    found = {}
    for tokenizer in ("bytes", "gpt2"):
        data_dir = shards_of(tmp_path, tokenizer, texts)
        log_dir = tmp_path / f"log_{tokenizer}"
        words = flags(data_dir=data_dir, log_dir=log_dir, max_steps=2, val_tokens=1024)
        assert train.main(words) == 0
        printed = capsys.readouterr().out
        loss, bits = map(float, re.findall(r"loss (\S+) \((\S+) bits per byte\)", printed)[0])
        assert train.main([*words, "--eval_only"]) == 0
        found[tokenizer] = numbers(capsys.readouterr().out)["bits per byte"]
        val = np.load(Path(data_dir) / "edufineweb_val_000000.npy")[1:1025]
        from lib.tokenizer import get_tokenizer

        ratio = get_tokenizer(tokenizer).count_bytes(val) / 1024
        assert read_run(log_dir).val_bytes_per_token == ratio
        assert bits == pytest.approx(loss / math.log(2) / ratio, abs=2e-4)
    assert found["bytes"] == pytest.approx(8.3, abs=0.3)
    assert 3 < found["gpt2"] < 6


# ---- several runs ----


@pytest.fixture
def two_runs(data_dir, trained, tmp_path) -> list[Path]:
    """A finished run, and one on other data that was stopped in its middle, without HellaSwag."""
    other = tmp_path / "other"
    assert train.main(flags(data_dir=data_dir, log_dir=other, max_lr=1e-3, max_steps=5)) == 0
    facts = read_run(other)
    write_run(other, dataclasses.replace(facts, config=facts.config | {"max_steps": 8}))
    return [trained, other]


def test_a_table_and_a_picture_of_several_runs(two_runs, tmp_path, capsys):
    finished, other = two_runs
    words = [*map(str, two_runs), "--out", str(tmp_path / "compare.png")]
    assert metrics.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "steps", "tokens"] and len(lines) == 4
    cells = lines[1].split()
    assert cells[:3] == [finished.name, "8", "1,024"] and cells[7] != "-"
    assert float(cells[3]) == round(values(finished, "val")[-1], 4)
    bits = read_run(finished).bits_per_byte(values(finished, "val")[-1])
    assert float(cells[5]) == round(bits, 4) and cells[6] == "-"
    assert lines[2].split()[:5] == ["other", "5", "of", "8", "640"]
    picture = imread(tmp_path / "compare.png")
    assert picture.shape[0] > 400 and picture[..., :3].std() > 0.05


def labels_of(monkeypatch) -> dict[str, list[float]]:
    """What is drawn: {label: values}."""
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def keep(self, x, y, *words, **options):
        drawn[options.get("label")] = [*map(float, y)]
        return plot(self, x, y, *words, **options)

    monkeypatch.setattr(Axes, "plot", keep)
    return drawn


def test_other_data_are_drawn_in_bits_per_byte(two_runs, tmp_path, capsys, monkeypatch):
    finished, other = two_runs
    drawn = labels_of(monkeypatch)
    words = [*map(str, two_runs), "--out", str(tmp_path / "compare.png")]
    assert metrics.main(words) == 0
    losses = values(other, "val")
    assert drawn[f"other ({losses[-1]:.4f})"] == losses
    facts = read_run(other)
    write_run(other, dataclasses.replace(facts, data=facts.data | {"sha256": "of other shards"}))
    drawn.clear()
    assert metrics.main(words) == 0
    assert "the data or the tokenizers differ: compare the bits" in capsys.readouterr().out
    bits = [facts.bits_per_byte(loss) for loss in losses]
    assert drawn[f"other ({bits[-1]:.4f})"] == pytest.approx(bits)
    write_run(other, dataclasses.replace(read_run(other), val_bytes_per_token=None))
    assert metrics.main(words) == 2
    assert "run.json of other does not have the bytes of a token" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_and_hellaswag_has_its_panel(
    trained, tmp_path, capsys, monkeypatch
):
    import shutil

    for name in ("a", "b $x^$"):
        shutil.copytree(trained, tmp_path / name / "log", symlinks=True)
        Log(tmp_path / name / "log", 99).write(8, hella=0.25 if name == "a" else 0.26)
    drawn = labels_of(monkeypatch)
    paths = [str(tmp_path / name / "log") for name in ("a", "b $x^$")]
    assert metrics.main([*paths, "--out", str(tmp_path / "compare.png")]) == 0
    assert f"{paths[0]} (0.2500)" in drawn and f"{paths[1]} (0.2600)" in drawn
    assert "0.2600" in capsys.readouterr().out


def test_what_cannot_be_compared(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert metrics.main([str(trained), str(tmp_path / "empty")]) == 2
    assert "empty has no run.json" in capsys.readouterr().err
    assert metrics.main([str(trained), str(trained), "--tracker=wandb"]) == 2
    assert "--tracker takes one run at a time" in capsys.readouterr().err


def test_the_curve_has_bits_per_byte_at_its_right(trained, monkeypatch):
    from matplotlib.axes import Axes

    scales = []
    secondary_yaxis = Axes.secondary_yaxis

    def keep(self, place, functions):
        scales.append((place, functions))
        return secondary_yaxis(self, place, functions=functions)

    monkeypatch.setattr(Axes, "secondary_yaxis", keep)
    draw_curve(trained)
    ((place, (to_bits, to_nats)),) = scales
    assert place == "right" and to_nats(to_bits(1.5)) == pytest.approx(1.5)
    assert to_bits(1.5) == pytest.approx(read_run(trained).bits_per_byte(1.5))
