"""The published model: a folder in Hugging Face's format, its model card, and the upload.

python export.py --model log/model_checkpoint.pt --out GPT124M
python export.py --model log --push_to_hub YOUR_NAME/GPT124M        private; first `hf auth login`
python export.py --model demo/log/model_checkpoint.pt --out demo/GPT --overwrite
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from GPT_Modules import GPT
from lib.cli import UserError, command, parse, print_notes
from lib.files import sync
from lib.hub import explain
from lib.log import read_log, read_run
from lib.pretrained import LoadedModel, crop, open_model, read_folder, write_folder
from lib.shards import FINEWEB_EDU, is_on_hub, public_name
from lib.tokenizer import Tokenizer
from sample import Sampling, printable, stream_text

# Between logits of the same weights; cropping the vocabulary changes the order of some sums.
TOLERANCE = 1e-4

CARD = """\
---
{{ card_data }}
---

# {{ name }}

A GPT-2 of {{ "{:,}".format(parameters) }} parameters: {{ model.n_layer }} layers, \
{{ model.n_head }} heads, {{ model.n_embd }} channels, {{ model.vocab_size }} tokens in the \
vocabulary, {{ model.block_size }} of context. Made with GPT124M.
{% if curve %}
![Loss over the run](curve.png)
{% endif %}
## Use

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{{ name }}")
print(generator({{ prompt }}, max_new_tokens={{ length }})[0]["generated_text"])
```
{% if train %}
## Training

| | |
|---|---|
| data | {{ source }}: {{ "{:,}".format(step * train.total_batch_size) }} tokens seen, \
{{ "{:,}".format(data.tokens) }} in the data set |
| first weights | {{ first_weights }} |
| steps | {{ "{:,}".format(step) }} of {{ "{:,}".format(train.total_batch_size) }} tokens, \
sequences of {{ train.seq_len }} |
| learning rate | {{ "%g" % train.max_lr }} after {{ train.warmup_steps }} steps of warm-up, \
{% if train.schedule == "linear" %}constant, linear in the last \
{{ "{:,}".format(train.decay_steps or train.max_steps // 2) }} steps{% else %}cosine{% endif %} \
to {{ "%g" % train.min_lr }} at step {{ "{:,}".format(train.max_steps) }} |
| optimizer | {% if train.optimizer == "muon" %}\
Muon for the matrices of the blocks, else {% endif %}\
AdamW, betas 0.9 and 0.95, weight decay {{ "%g" % train.weight_decay }}, \
gradients clipped at {{ "%g" % train.grad_clip }} |
{% if run %}| hardware | {{ run.hardware }}, {{ run.precision }} |
{% endif %}{% if loss %}| validation loss | {{ "%.4f" % loss.value }} nats per {{ unit }}\
{{ loss.when(step) }} |
{% endif %}{% if hellaswag %}| HellaSwag | \
acc_norm {{ "%.4f" % hellaswag.value }} (completion style)\
{{ hellaswag.when(step) }} |
{% endif %}{% endif %}
## Samples

Temperature 1, the 50 likeliest tokens, not selected:
{% for text in samples %}
```text
{{ text }}
```
{% endfor %}
## Limits

A small base model: it continues text, and does not follow instructions. It repeats what its \
training text holds, errors and prejudices included, and states false things fluently. Don't rely \
on it for facts.
"""


@dataclass(frozen=True)
class ExportConfig:
    # the folder
    model: str = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: str | None = None  # for a model that brings none: gpt2, or a tokenizer.json
    out: str = "GPT124M"  # folder to write
    overwrite: bool = False  # replace the folder if it is there
    # the Hub
    push_to_hub: str | None = None  # repository to upload to, as YOUR_NAME/GPT124M
    public: bool = False  # create the repository public (default: private)


# ---- the model card ----


@dataclass(frozen=True)
class Measured:
    """What the card says of a value: the last one that was measured of the model's run."""

    value: float
    step: int  # updates made when it was measured

    def when(self, step: int) -> str:
        """When it was measured, for a model of `step` updates."""
        return "" if self.step == step else f", at step {self.step:,}"


def last_measured(points: list[tuple[int, float]], step: int) -> Measured | None:
    """The last of the (step, value) that does not lie beyond `step`."""
    known = [Measured(round(value, 4), at) for at, value in points if at <= step]
    return known[-1] if known else None


def example(tokenizer: Tokenizer, block_size: int) -> tuple[str, int]:
    """(Python expression of a prompt, tokens to add) for the card, so that both fit into the
    context."""
    room = block_size - len(tokenizer.encode(tokenizer.prompt))
    if not tokenizer.prompt or room < 1:
        return "generator.tokenizer.eos_token", max(1, min(50, block_size - 1))
    return json.dumps(tokenizer.prompt), min(50, room)


def model_card(name: str, model: GPT, loaded: LoadedModel) -> str:
    """README.md of the folder, from what the checkpoint and its log say; what was not measured is
    left out. model: the one that is published."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    tokenizer = loaded.tokenizer
    step = loaded.checkpoint.get("step")
    data = loaded.checkpoint.get("data", {})
    train = loaded.checkpoint.get("train_config", {})
    log_dir = log_directory(loaded)
    run = read_run(log_dir) if log_dir else None
    log = read_log(log_dir) if run else {}
    loss = last_measured(log.get("val", []), step)
    hellaswag = last_measured(log.get("hella", []), step)

    dataset = data["dataset"] if is_on_hub(data) else None
    names = {"pydoc": f"the documentation of Python {data.get('revision')}", None: "unnamed shards"}
    source = names.get(public_name(data), public_name(data))
    task = "text-generation"
    results = []
    if loss:
        where = (dataset or "validation", f"{source}, validation shard", "loss", loss.value)
        results.append(EvalResult(task, *where, metric_name=f"loss (nats per {tokenizer.unit})"))
    if hellaswag:
        where = ("Rowan/hellaswag", "HellaSwag (completion style)", "acc_norm", hellaswag.value)
        results.append(EvalResult(task, *where, metric_name="acc_norm"))
    header = ModelCardData(
        language="en" if data.get("dataset") in (FINEWEB_EDU, "pydoc") else None,
        license="mit",
        library_name="transformers",
        pipeline_tag=task,
        tags=["gpt2", task],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=results or None,
    )
    samples = []
    for seed in range(42, 46):
        pieces = stream_text(model, tokenizer, tokenizer.prompt, Sampling(seed=seed))
        text = printable(tokenizer.prompt + "".join(pieces))
        samples.append(text.replace("```", "'''"))
    prompt, length = example(tokenizer, model.config.block_size)
    card = ModelCard.from_template(
        header,
        template_str=CARD,
        name=name,
        model=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        prompt=prompt,
        length=length,
        source=source,
        data=data,
        train=train,
        first_weights=Path(train.get("init_from", "")).name,
        step=step,
        run=run,
        loss=loss,
        unit=tokenizer.unit,
        hellaswag=hellaswag,
        curve=log_dir is not None and (log_dir / "curve.png").exists(),
        samples=samples,
    )
    return str(card)


def log_directory(loaded: LoadedModel) -> Path | None:
    """Where the log of a model's run lies: beside its checkpoint. None for a model of elsewhere."""
    return loaded.path.resolve().parent if "train_config" in loaded.checkpoint else None


# ---- the folder ----


def write_export(config: ExportConfig, folder: Path) -> float:
    """Write every file into `folder`, read it back, and return the largest difference of logits;
    raises UserError if it is more than rounding."""
    loaded = open_model(config.model, config.tokenizer)
    print_notes(loaded.notes)
    tokenizer = loaded.tokenizer
    exported = crop(loaded.model, tokenizer.n_vocab)
    name = config.push_to_hub or Path(config.out).resolve().name
    card = model_card(name, exported, loaded)
    write_folder(exported, tokenizer, folder)
    (folder / "README.md").write_bytes(card.encode())
    log_dir = log_directory(loaded)
    if log_dir and (log_dir / "curve.png").exists():
        shutil.copyfile(log_dir / "curve.png", folder / "curve.png")

    tokens = tokenizer.encode(card)[: exported.config.block_size]
    idx = torch.tensor([tokens])  # (1, T)
    with torch.no_grad():
        before = loaded.model(idx)[0][..., : tokenizer.n_vocab]  # (1, T, V)
        after = read_folder(str(folder))(idx)[0]
    difference = (before - after).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported model computes something else: its logits differ by {difference:.2g}, "
            "nothing is kept",
            code=1,
        )
    return difference


def is_export(out: Path) -> bool:
    """May `out` be replaced? A folder that is empty, or has a model and no folders in it."""
    if not out.is_dir():
        return False
    paths = list(out.iterdir())
    model = {"config.json", "model.safetensors"} <= {path.name for path in paths}
    return not paths or (model and not any(path.is_dir() for path in paths))


def export(config: ExportConfig) -> None:
    """Make the folder --out, whole or not at all."""
    out = Path(config.out).resolve()  # of a link, the folder that it points to
    if not Path(config.out).name:
        raise UserError(f"--out {config.out}: give the folder a name, as in --out GPT124M")
    if out.exists() and not config.overwrite:
        raise UserError(
            f"{config.out} is there already: --overwrite replaces it, --out chooses another folder"
        )
    if out.exists() and not is_export(out):
        raise UserError(
            f"{config.out} is not an exported model: --overwrite won't replace it, "
            "--out chooses another folder"
        )
    temporary = out.with_name(out.name + ".new.tmp")
    old = out.with_name(out.name + ".old.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        difference = write_export(config, temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)  # of an earlier process that was killed
            out.rename(old)
        temporary.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{config.out} can't be written: {error}", code=1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(
        f"{config.out}: read back, logits differ from the checkpoint's by {difference:.2g} at most"
    )


# ---- the Hub ----


def check_identity(repository: str) -> None:
    """Raise UserError, before any work, for a bad name or for a token that the Hub does not
    know."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except Exception as error:
        raise explain(error, "--push_to_hub", repository) from None
    if "/" not in repository:
        raise UserError(f"--push_to_hub {repository}: whose? It looks like YOUR_NAME/{repository}")


def push(out: str, repository: str, public: bool) -> None:
    """Upload the folder in one commit and print its address."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=not public, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=out, commit_message="Upload GPT-2"
        )
    except Exception as error:
        explained = explain(error, "--push_to_hub", repository)
        again = f"{out} is whole: to run the same command again, add --overwrite"
        raise UserError(f"{explained}\n{again}", explained.code) from None
    print(f"uploaded {len(list(Path(out).iterdir()))} files: {commit.repo_url}")


@command
def main(argv=None) -> int:
    config = parse(ExportConfig, argv, __doc__)
    if config.push_to_hub is not None:
        check_identity(config.push_to_hub)
    export(config)
    if config.push_to_hub is not None:
        push(config.out, config.push_to_hub, config.public)
    else:
        words = ["python", "export.py", "--model", config.model]
        if config.tokenizer is not None:
            words += ["--tokenizer", config.tokenizer]
        words += ["--out", config.out, "--overwrite", "--push_to_hub", "YOUR_NAME/GPT124M"]
        print(f"next: {shlex.join(words)}")
        call = f'pipeline("text-generation", model={config.out!r})'
        print(f"      or, with transformers: {call}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
