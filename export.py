"""The published model: a folder in Hugging Face's format, its model card, and the upload.

python export.py --model log/model_checkpoint.pt --out GPT124M
python export.py --model log --push_to_hub YOUR_NAME/GPT124M        private; first `hf auth login`
python export.py --model demo/log/model_checkpoint.pt --out demo/GPT --overwrite
"""

import hashlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from GPT_Modules import GPT
from lib.cli import LocalPath, UserError, command, parse, print_notes
from lib.files import sha256, sync
from lib.hub import explain
from lib.log import read_log, read_run
from lib.pretrained import (
    HUB_NAMES,
    LoadedModel,
    crop,
    is_read_by_loaders,
    open_model,
    read_folder,
    write_folder,
)
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
vocabulary, {{ model.block_size }} of context. \
{% if train %}Trained{% else %}Exported{% endif %} with GPT124M.
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
| first weights | {% if first_weights == "scratch" %}random: trained from scratch{% else %}\
{{ first_weights }}{% endif %} |
| steps | {{ "{:,}".format(step) }} of {{ "{:,}".format(train.total_batch_size) }} tokens, \
sequences of {{ train.seq_len }} |
| learning rate | {{ "%g" % train.max_lr }} after {{ train.warmup_steps }} steps of warm-up, \
{% if train.schedule == "linear" %}constant, linear in the last \
{{ "{:,}".format(train.decay_steps or
[train.max_steps // 2, train.max_steps - train.warmup_steps]|min) }} steps\
{% else %}cosine{% endif %} \
to {{ "%g" % train.min_lr }} at step {{ "{:,}".format(train.max_steps) }} |
| optimizer | {% if train.optimizer == "muon" %}\
Muon for the matrices of the blocks, else {% endif %}\
AdamW, betas 0.9 and 0.95, weight decay {{ "%g" % train.weight_decay }}, \
gradients clipped at {{ "%g" % train.grad_clip }} |
{% if run %}| hardware | {{ run.hardware }}, {{ run.precision }} |
{% endif %}{% if loss %}| validation loss | {{ "%.4f" % loss.value }} nats per {{ unit }}\
{{ loss.when(step) }} |
{% endif %}{% if bits %}| bits per byte of text | {{ "%.4f" % bits }}{{ loss.when(step) }} |
{% endif %}{% if hellaswag %}| HellaSwag | \
acc_norm {{ "%.4f" % hellaswag.value }} (completion style\
{% if hellaswag_file %}, examples of {{ hellaswag_file }}{% endif %}){{ hellaswag.when(step) }} |
{% endif %}{% endif %}
## Samples

Temperature 1, the 50 likeliest tokens, not selected:
{% for text in samples %}
```text
{{ text }}
```
{% endfor %}
## Limits

{% if train %}A base model: it continues text, and does not follow instructions. {% endif %}\
A small model repeats what its training text holds, errors and prejudices included, and states \
false things fluently. Don't rely on it for facts.
"""


@dataclass(frozen=True)
class ExportConfig:
    # the folder
    model: LocalPath = "log/model_checkpoint.pt"  # a checkpoint, a folder, or gpt2 ... from the Hub
    tokenizer: LocalPath | None = None  # gpt2, bytes, or a tokenizer.json, for a model without one
    out: LocalPath = "GPT124M"  # folder to write
    overwrite: bool = False  # replace what export.py wrote into the folder before
    license: str | None = None  # of the weights, for the model card, as in mit (default: none)
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
    """The last of the (step, value) at or before `step`."""
    known = [Measured(round(value, 4), at) for at, value in points if at <= step]
    return known[-1] if known else None


def example(tokenizer: Tokenizer, block_size: int) -> tuple[str, int]:
    """(Python expression of a prompt, tokens to add) for the card, so that both fit into the
    context."""
    room = block_size - len(tokenizer.encode(tokenizer.prompt))
    if not tokenizer.prompt or room < 1:
        return "generator.tokenizer.eos_token", max(1, min(50, block_size - 1))
    return json.dumps(tokenizer.prompt), min(50, room)


def origin(name: str) -> dict[str, str | list[str] | None]:
    """{"language", "base_model"} of the weights that a model was made from, as far as they are
    known: of OpenAI's, and of a folder whose own card names them. name: --model or --init_from."""
    from huggingface_hub import metadata_load

    if name == "scratch":  # no folder of that name
        return {"language": None, "base_model": None}
    hub_name = name.removeprefix("openai-community/")
    if hub_name in HUB_NAMES:
        return {"language": "en", "base_model": f"openai-community/{hub_name}"}
    try:
        card = metadata_load(Path(name) / "README.md") or {}
    except Exception:  # no card, or none with YAML
        card = {}
    base = card.get("base_model")
    names = [base] if isinstance(base, str) else base or []
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names):
        base = None  # perhaps a path on its owner's machine
    return {"language": card.get("language"), "base_model": base}


def model_card(config: ExportConfig, model: GPT, loaded: LoadedModel) -> str:
    """README.md of the folder, from what the checkpoint and its log say; what was not measured, or
    is not known, is left out. model: the one that is published."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = config.push_to_hub or Path(config.out).resolve().name
    tokenizer = loaded.tokenizer
    step = loaded.checkpoint.get("step")
    data = loaded.checkpoint.get("data", {})
    train = loaded.checkpoint.get("train_config", {})
    log_dir = log_directory(loaded)
    run = read_run(log_dir) if log_dir else None
    log = read_log(log_dir) if run else {}
    loss = last_measured(log.get("val", []), step)
    hellaswag = last_measured(log.get("hella", []), step)
    # None: all of the validation set, from the Hub
    hellaswag_file = train.get("hellaswag_data") and Path(train["hellaswag_data"]).name

    dataset = data["dataset"] if is_on_hub(data) else None
    names = {"pydoc": f"the documentation of Python {data.get('revision')}", None: "unnamed shards"}
    source = names.get(public_name(data), public_name(data))
    task = "text-generation"
    results = []
    if loss:
        where = (dataset or "validation", f"{source}, validation shard", "loss", loss.value)
        results.append(EvalResult(task, *where, metric_name=f"loss (nats per {tokenizer.unit})"))
    if hellaswag and not hellaswag_file:
        where = ("Rowan/hellaswag", "HellaSwag (completion style)", "acc_norm", hellaswag.value)
        results.append(EvalResult(task, *where, metric_name="acc_norm"))
    made_from = origin(train.get("init_from", config.model))
    language = "en" if data.get("dataset") in (FINEWEB_EDU, "pydoc") else None
    header = ModelCardData(
        language=made_from["language"] or language,
        base_model=made_from["base_model"],
        license=config.license,
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
        bits=run.bits_per_byte(loss.value) if loss else None,
        hellaswag=hellaswag,
        hellaswag_file=hellaswag_file,
        curve=log_dir is not None and (log_dir / "curve.png").exists(),
        samples=samples,
    )
    return str(card)


def log_directory(loaded: LoadedModel) -> Path | None:
    """Directory of a run's log, which is its checkpoint's; None for a model from elsewhere."""
    return loaded.path.resolve().parent if "train_config" in loaded.checkpoint else None


# ---- the folder ----


def write_export(config: ExportConfig, folder: Path) -> float:
    """Write every file into `folder`, read it back, and return the largest difference of logits;
    raises UserError if it is more than rounding."""
    loaded = open_model(config.model, config.tokenizer)
    print_notes(loaded.notes)
    tokenizer = loaded.tokenizer
    exported = crop(loaded.model, tokenizer.n_vocab)
    card = model_card(config, exported, loaded)
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


def split_card(card: bytes) -> tuple[bytes, dict[str, str]]:
    """(card without its seal, seal). The seal is a comment in which export.py lists the files that
    it wrote, {name: sha256}, so that it can tell them from anyone else's. The digest of README.md
    is of the card without the seal."""
    seal = re.search(rb"\n<!-- written by export\.py, sha256:\n(.*?)-->\n", card, re.DOTALL)
    if seal is None:
        return card, {}
    lines = re.findall(r"(\S+) ([0-9a-f]{64})", seal[1].decode(errors="replace"))
    return card[: seal.start()] + card[seal.end() :], dict(lines)


def seal_card(folder: Path, edited_card: bytes | None) -> None:
    """Seal the card of a new export. edited_card: the text to keep in its place."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    card = (folder / "README.md").read_bytes() if edited_card is None else edited_card
    seal = f"\n<!-- written by export.py, sha256:\n{lines}-->\n"
    (folder / "README.md").write_bytes(card + seal.encode())


def is_as_written(card: bytes) -> bool:
    """Was this card written by export.py, and not edited since?"""
    text, digests = split_card(card)
    return digests.get("README.md") == hashlib.sha256(text).hexdigest()


def find_edited_card(out: Path) -> bytes | None:
    """The text of an export's README.md that was edited since; None if it was not. Raises
    UserError if the folder has anything else that export.py did not write."""
    readme = out / "README.md"
    card = readme.read_bytes() if readme.exists() else b""
    text, digests = split_card(card)
    others = [
        path.name
        for path in sorted(out.iterdir())
        if path != readme and (path.is_dir() or sha256(path) != digests.get(path.name))
    ]
    if others:
        raise UserError(
            f"{out} has files that export.py did not write, or that have changed since:"
            f" {', '.join(others)}.\nNothing is replaced: move them, or choose another folder with"
            " --out"
        )
    return text if readme.exists() and not is_as_written(card) else None


def export(config: ExportConfig) -> None:
    """Make the folder --out, whole or not at all."""
    out = Path(config.out).resolve()  # of a link, the folder that it points to
    if not Path(config.out).name:
        raise UserError(f"--out {config.out}: give the folder a name, as in --out GPT124M")
    temporary = out.with_name(out.name + ".new.tmp")
    old = out.with_name(out.name + ".old.tmp")
    if old.exists() and not out.exists():  # an earlier process was killed between the two renames
        old.rename(out)
    edited_card = None
    if out.exists():
        if not config.overwrite:
            raise UserError(
                f"{config.out} already exists: --overwrite replaces what export.py wrote there,"
                " --out chooses another folder"
            )
        edited_card = find_edited_card(out)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        difference = write_export(config, temporary)
        seal_card(temporary, edited_card)
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
    if edited_card is not None:
        print(f"{config.out}/README.md has been edited since export.py wrote it, and is kept")
    elif config.license is None:
        print("the model card names no licence: --license NAME adds one")
    print(
        f"{config.out}: read back, logits differ from the checkpoint's by {difference:.2g} at most"
    )


# ---- the Hub ----


def check_repository(repository: str, public: bool) -> None:
    """Raise UserError, before any work, for a bad name, for a token that the Hub does not know, and
    if an existing repository is public or private against the user's word."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    try:
        validate_repo_id(repository)
        api.whoami()
        exists = api.repo_exists(repository)
        is_public = not api.model_info(repository).private if exists else public
    except Exception as error:
        raise explain(error, "--push_to_hub", repository) from None
    if "/" not in repository:
        raise UserError(f"--push_to_hub {repository}: whose? It looks like YOUR_NAME/{repository}")
    if public and not is_public:
        raise UserError(
            f"{repository} exists and is private, and --public only makes new repositories public:"
            " leave --public out, or change the repository in its settings on the Hub"
        )
    if is_public and not public:
        raise UserError(
            f"{repository} exists and is public: add --public if the model is to be published there"
        )


def push(out: str, repository: str, public: bool) -> None:
    """Upload the folder in one commit, and print its address.

    The same commit removes what a loader would read beside the new files, or in place of them.
    Everything else in the repository is its owner's, and so is a card that export.py did not write.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        before = api.list_repo_files(repository)
        new = {path.name: path for path in Path(out).iterdir()}
        if "README.md" in before:
            card = Path(api.hf_hub_download(repository, "README.md")).read_bytes()
            if not is_as_written(card):
                del new["README.md"]
        removed = [file for file in before if is_read_by_loaders(file) and file not in new]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationDelete(file) for file in removed),
                *(CommitOperationAdd(name, path) for name, path in new.items()),
            ],
            commit_message="Upload GPT-2",
        )
    except Exception as error:
        explained = explain(error, "--push_to_hub", repository)
        again = f"{out} is whole: to run the same command again, add --overwrite"
        raise UserError(f"{explained}\n{again}", explained.code) from None
    for file in removed:
        print(f"removed {file}: loaders would read it with the new model, or instead of it")
    if "README.md" not in new:
        print(
            f"the README.md of {repository} is not export.py's, or was edited, and is kept; to"
            f" replace it: hf upload {repository} {out}/README.md README.md"
        )
    kind = "public" if public else "private"
    print(f"uploaded {len(new)} files to a {kind} repository: {commit.repo_url}")


@command
def main(argv=None) -> int:
    config = parse(ExportConfig, argv, __doc__)
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub, config.public)
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
