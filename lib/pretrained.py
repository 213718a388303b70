"""A GPT-2 as others store it: Hugging Face's folder, read and written; the checkpoints of nanoGPT,
of build-nanogpt and of ours. `open_model` is what --model means, in every command.

    model, tokenizer = load_model("log")                         # a run's newest good checkpoint
    model, tokenizer = load_model("gpt2")                        # OpenAI's weights, from the Hub
    model, tokenizer = load_model("ckpt.pt", tokenizer="gpt2")   # nanoGPT's, without a tokenizer
    write_folder(model, tokenizer, Path("GPT124M"))              # for transformers and its kin
"""

import json
import shutil
import warnings
import zipfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import newest_checkpoint, read_verified
from lib.cli import UserError, one_line_error
from lib.tokenizer import GPT2_TOKENS, TOKENIZER_FILES, Tokenizer, get_tokenizer, has_tokenizer

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# Where a folder keeps the weights; an index names several files.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What loaders read of a folder, beside a model or instead of it.
READ_BY_LOADERS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "adapter_*",
    "additional_chat_templates/*",
    *TOKENIZER_FILES,
)

# What other files begin with, and what they are.
OTHER_KINDS = {
    b"GGUF": "is a GGUF file, for llama.cpp",
    b"\x89HDF": "is an HDF5 file, TensorFlow's or Keras's",
    b"version https://git-lfs": "is a pointer of Git LFS: `git lfs pull` fetches the file itself",
    b"{": "is a JSON file",
}

# OpenAI kept these weights as (inputs, outputs); nn.Linear wants (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# GPTConfig's names, and those of config.json.
SHAPE = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}

# What config.json must say for the model to be the one of GPT_Modules.py, the usual value first.
# A key that is missing has the usual value, but for model_type. gelu_pytorch_tanh is another name
# of gelu_new.
SAME_MODEL = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}

NANOGPT_NOTE = (
    "nanoGPT computes GELU exactly, this model by its tanh approximation, as GPT-2 does: their"
    " results differ slightly"
)


class NotAGPT2(UserError, ValueError):
    """What was to be a GPT-2 is another model, or has weights that are not finite."""


# ---- Hugging Face's folder ----


def read_folder(name: str) -> GPT:
    """The model in a folder, beside a file of weights, or under a name (gpt2, ...) on the Hub.

    Raises NotAGPT2 for another model or bad weights, OSError and huggingface_hub's errors if it
    can't be read or fetched.
    """
    path = Path(name)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        if path.is_dir() or "-of-" in path.name:  # one of several files of weights
            found = [file for file in WEIGHTS if (folder / file).exists()]
            if not found:
                raise FileNotFoundError(f"it has none of {', '.join(WEIGHTS)}")
            path = folder / found[0]
        config_file = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        config_file = Path(hf_hub_download(name, "config.json"))
        path = Path(hf_hub_download(name, "model.safetensors"))
    config = json.loads(config_file.read_text())
    if missing := [key for key in SHAPE.values() if key not in config]:
        raise NotAGPT2(f"config.json has no {', '.join(missing)}")
    for key, values in SAME_MODEL.items():
        value = config.get(key, values[0] if key != "model_type" else None)
        if value not in values:
            raise NotAGPT2(f"{key} is {value!r} where a GPT-2 has {values[0]!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise NotAGPT2(f"n_inner is {config['n_inner']} where a GPT-2 has 4 times n_embd")
    model = GPT(GPTConfig(**{field: config[key] for field, key in SHAPE.items()}))
    load_weights(model, read_weights(path), transposed=True)
    return model


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of Hugging Face's: safetensors, torch's format, or an index that names
    several such files. Nothing in a file is executed."""
    from safetensors.torch import load_file

    if path.suffix == ".json":
        weights = {}
        for name in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            weights |= read_weights(path.with_name(name))
        return weights
    if kind := other_kind(path):
        raise NotAGPT2(f"{path.name} {kind}")
    if path.suffix == ".safetensors":
        return load_file(path)
    # torch.load does not compare the checksums; older files have none
    if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"{path.name} is damaged: the checksum of {part} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def other_kind(path: Path) -> str | None:
    """What a file is, by what it begins with; None if it may hold weights."""
    beginning = first_bytes(path)
    return next((kind for magic, kind in OTHER_KINDS.items() if beginning.startswith(magic)), None)


def first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(24)


def load_weights(model: GPT, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
    """Copy weights of any precision into a model, under any of their usual names: with or without
    transformer., module., _orig_mod. and masks; the token table as wte, lm_head or both.

    transposed: the matrices of TRANSPOSED are stored as OpenAI did. Raises NotAGPT2 if a weight
    is missing, left over, of another shape, made of integers, or not finite.
    """
    parameters = dict(model.named_parameters())
    seen = set()
    for stored_name, tensor in weights.items():
        name = stored_name.replace("_orig_mod.", "").replace("module.", "")
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        name = "wte.weight" if name == "lm_head.weight" else name
        parameter = parameters.get(f"transformer.{name}")
        tensor = tensor.T if transposed and name.endswith(TRANSPOSED) else tensor
        if parameter is None or parameter.shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise NotAGPT2(f"weight {stored_name} of shape {shape} does not fit {model.config}")
        if not tensor.is_floating_point():
            raise NotAGPT2(
                f"weight {stored_name} is {tensor.dtype}: quantized weights are not read"
            )
        tensor = tensor.to(parameter.dtype)
        if not tensor.isfinite().all():
            raise NotAGPT2(f"weight {stored_name} has numbers that are not finite", code=1)
        if name in seen and not torch.equal(tensor, parameter):
            raise NotAGPT2("lm_head.weight is not wte.weight: in a GPT-2 they are one table")
        parameter.data.copy_(tensor)
        seen.add(name)
    missing = [name for name in parameters if name.removeprefix("transformer.") not in seen]
    if missing:
        raise NotAGPT2(f"weights are missing: {', '.join(missing[:3])} ({len(missing)} in all)")


def write_folder(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    model: without padded rows (see `crop`). Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ends = {"bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": model.config.vocab_size,
        "n_positions": model.config.block_size,
        "n_ctx": model.config.block_size,  # for llama.cpp's converter
        "n_embd": model.config.n_embd,
        "n_layer": model.config.n_layer,
        "n_head": model.config.n_head,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **ends,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
    }
    generation = ends | {"pad_token_id": tokenizer.eot_token}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name, content in tokenizer.files(model.config.block_size).items():
        (folder / name).write_bytes(content)
    weights = {  # under Hugging Face's names, as OpenAI stored them; lm_head is wte
        name: (parameter.T if name.endswith(TRANSPOSED) else parameter).detach().contiguous()
        for name, parameter in model.named_parameters()
    }
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from None
    # safetensors writes it with mode 600
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def crop(model: GPT, n_vocab: int) -> GPT:
    """The same model without the rows that pad its vocabulary."""
    cropped = GPT(GPTConfig(**vars(model.config) | {"vocab_size": n_vocab}))
    weights = dict(model.named_parameters())
    table = weights["transformer.wte.weight"]
    load_weights(cropped, weights | {"transformer.wte.weight": table[:n_vocab]})
    return cropped.eval()


def is_read_by_loaders(file: str) -> bool:
    """Would a loader of Hugging Face's formats read this file of a repository as part of it?"""
    return any(
        fnmatchcase(file, pattern) and file.count("/") == pattern.count("/")
        for pattern in READ_BY_LOADERS
    )


# ---- what --model names ----


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is known about it."""

    model: GPT  # on the CPU, in eval mode
    tokenizer: Tokenizer
    own_tokenizer: bool  # False: it came without one, which --tokenizer or a note replaces
    checkpoint: dict = field(default_factory=dict)  # its source; {} for a folder or the Hub
    path: Path | None = None  # of the checkpoint
    notes: list[str] = field(default_factory=list)  # what was assumed, for the command to print


def open_model(name: str, tokenizer: str | None = None) -> LoadedModel:
    """The model that --model names.

    name: a checkpoint (of ours, of build-nanogpt or of nanoGPT), a run's log directory (its newest
    good checkpoint), a Hugging Face folder or a file of weights in it, or one of HUB_NAMES.
    tokenizer: tokenizer_spec for a model that comes without one. Raises UserError if there is no
    such model, if it is damaged or not a GPT-2, or if nothing says which tokenizer it has.
    """
    path = Path(name)
    if path.is_dir() and (found := newest_checkpoint(path)):
        notes = [f"WARNING: {reason}: skipped" for reason in found.skipped]
        return open_checkpoint(found.checkpoint, found.path, tokenizer, notes)
    if path.is_dir():
        return open_folder(name, path, tokenizer)
    if path.name.endswith((".safetensors", ".bin", ".index.json")) and path.is_file():
        return open_folder(name, path.parent, tokenizer)
    if path.exists():
        if not first_bytes(path).startswith(b"PK"):  # a zip file, which torch.save writes
            raise UserError(
                f"{name} {other_kind(path) or 'is not a checkpoint'}; a model is a checkpoint, a"
                " run's log directory, or a folder with config.json and model.safetensors"
            )
        return open_checkpoint(read_verified(path), path, tokenizer, [])
    if name.removeprefix("openai-community/") in HUB_NAMES:
        return open_folder(name, None, tokenizer)
    names = ", ".join(HUB_NAMES)
    raise UserError(f"there is no checkpoint or folder {name}; the Hub's names are {names}")


def open_checkpoint(content, path: Path, tokenizer: str | None, notes: list[str]) -> LoadedModel:
    if isinstance(content, dict) and "model_args" in content:
        content, notes = from_nanogpt(content, path), [*notes, NANOGPT_NOTE]
    if not isinstance(content, dict) or not isinstance(content.get("config"), GPTConfig):
        raise UserError(f"{path} is not a checkpoint: it has no model with a GPTConfig")
    model = GPT(content["config"])
    try:
        load_weights(model, content["model"])
    except NotAGPT2 as error:
        raise UserError(f"{path}: {error}", error.code) from None
    rows = model.config.vocab_size
    own = content.get("tokenizer")
    if own is None and tokenizer is None and rows in (GPT2_TOKENS, 50304):
        tokenizer = "gpt2"
        notes = [*notes, f"{path} names no tokenizer: assuming GPT-2's tokens for its {rows} rows"]
    chosen = choose_tokenizer(own, tokenizer, rows, str(path))
    notes = [*notes, *chosen.notes]
    return LoadedModel(model.eval(), chosen, own is not None, content, path, notes)


def from_nanogpt(content: dict, path: Path) -> dict:
    """What nanoGPT's train.py saved, as a checkpoint of ours."""
    shape = content["model_args"]
    if not shape.get("bias", True):
        raise UserError(f"{path}: bias is False where a GPT-2 has True: it is another model")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = GPTConfig(**{name: shape[name] for name in names})
    return {"model": content["model"], "config": config}


def open_folder(name: str, folder: Path | None, tokenizer: str | None) -> LoadedModel:
    """name: of the model; folder: that has its files, None for the Hub."""
    if folder and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name} is a PEFT adapter, which changes another model: merge the two\n"
            "    from peft import AutoPeftModelForCausalLM\n"
            f'    AutoPeftModelForCausalLM.from_pretrained("{folder}")'
            '.merge_and_unload().save_pretrained("merged")\n'
            "and give --model merged --tokenizer gpt2 (or the tokenizer of that model)"
        )
    try:
        model = read_folder(name)
    except NotAGPT2 as error:
        raise UserError(f"{name}: {error}", error.code) from None
    # what the Hub's HTTP library raises can't be named without naming the library
    except Exception as error:
        where = "as a model folder" if folder else "from the Hub"
        raise UserError(f"{name} can't be read {where}: {one_line_error(error)}") from None
    own = "gpt2"
    if folder:
        own = folder if has_tokenizer(folder) else None
    chosen = choose_tokenizer(own, tokenizer, model.config.vocab_size, name)
    return LoadedModel(model.eval(), chosen, own is not None, notes=chosen.notes)


def choose_tokenizer(own, given, rows: int, name: str) -> Tokenizer:
    """The tokenizer of a model. rows: those of its token table.

    own: tokenizer_spec of the model's own tokenizer; given: of the one that the user names; None
    where there is none.
    """
    if own is None and given is None:
        raise UserError(
            f"{name} comes without a tokenizer: if its {rows:,} tokens are GPT-2's, add --tokenizer"
            " gpt2, else --tokenizer with the folder of its tokenizer.json"
        )
    tokenizer = get_tokenizer(given if own is None else own).crop(rows)
    if given is not None and get_tokenizer(given).crop(rows).behavior != tokenizer.behavior:
        raise UserError(
            f"{name} has its own tokenizer ({tokenizer.identity}), which is not {given}"
        )
    if rows < tokenizer.n_vocab:
        raise UserError(
            f"{name} has {rows:,} rows in its token table, but its tokenizer ({tokenizer.name}) has"
            f" {tokenizer.n_vocab:,} ids: they don't belong together"
        )
    return tokenizer


def load_model(name: str, device="cpu", tokenizer: str | None = None) -> tuple[GPT, Tokenizer]:
    """(model on the device in eval mode, its tokenizer) of --model and --tokenizer. See open_model;
    what it assumes is a Python warning here."""
    loaded = open_model(name, tokenizer)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model.to(device), loaded.tokenizer
