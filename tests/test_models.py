"""Models of other projects: each read as what it is, judged by transformers' logits, or refused."""

import dataclasses
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from conftest import flags, write_hellaswag
from safetensors.torch import load_file, save_file, save_model
from test_tokenizer import END_OF_TEXT, byte_level_bpe, save
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import data_generator
import export
import hellaswag
import inside
import sample
import train
from GPT_Modules import GPT, GPTConfig
from lib.cli import UserError
from lib.log import RunFacts
from lib.pretrained import load_model, open_model
from lib.tokenizer import get_tokenizer

SHAPES = {
    "1 layer": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16},
    "3 layers": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64},
    "wide head": {"n_layer": 2, "n_head": 2, "n_embd": 96, "n_positions": 33},
}


def small_gpt2(vocab_size=600, shape="3 layers", **changes) -> GPT2LMHeadModel:
    """transformers' GPT-2 with random weights, biases and LayerNorms included."""
    torch.manual_seed(0)
    words = SHAPES[shape] | {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**words | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def largest_difference(ours: GPT, theirs) -> float:
    idx = torch.randint(theirs.config.vocab_size, (3, ours.config.block_size))
    with torch.no_grad():
        return (ours(idx)[0] - theirs(idx).logits).abs().max().item()


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory):
    """A folder with nothing but a tokenizer.json of 600 ids."""
    return save(tmp_path_factory.mktemp("own"), byte_level_bpe())


def copy_tokenizer(own_tokenizer, folder):
    shutil.copy(own_tokenizer / "tokenizer.json", folder)


def to_bin(folder):
    """The same folder with pytorch_model.bin, one file or several, as older versions saved it."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if "lm_head.weight" not in weights and "transformer.wte.weight" in weights:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        name = path.name.replace("model", "pytorch_model", 1).replace("safetensors", "bin")
        torch.save(weights, folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace('"model', '"pytorch_model').replace("safetensors", "bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@dataclass(frozen=True)
class Saved:
    """How a model is saved."""

    options: dict = dataclasses.field(default_factory=dict)  # of transformers' save_pretrained
    as_bin: bool = False
    precision: torch.dtype = torch.float32


WAYS = {
    "safetensors": Saved(),
    "sharded safetensors": Saved({"max_shard_size": "20KB"}),
    "pytorch_model.bin": Saved(as_bin=True),
    "sharded pytorch_model.bin": Saved({"max_shard_size": "20KB"}, as_bin=True),
    "float16": Saved(precision=torch.float16),
    "bfloat16": Saved(precision=torch.bfloat16, as_bin=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_transformers_folders(way, shape, own_tokenizer, tmp_path):
    saved = WAYS[way]
    small_gpt2(shape=shape).to(saved.precision).save_pretrained(tmp_path, **saved.options)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    copy_tokenizer(own_tokenizer, tmp_path)
    if saved.as_bin:
        to_bin(tmp_path)
    if "max_shard_size" in saved.options:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    ours, tokenizer = load_model(str(tmp_path))
    assert largest_difference(ours, theirs) < 1e-5
    assert ours.lm_head.weight.dtype == torch.float32 and not ours.training
    assert tokenizer.identity == get_tokenizer(own_tokenizer).identity
    for path in sorted(tmp_path.glob("*model*"))[:3]:  # the path of a file of weights, too
        ours, tokenizer = load_model(str(path))
        assert largest_difference(ours, theirs) < 1e-5 and tokenizer.name == "tokenizer.json"


def test_openais_names_without_a_prefix_and_with_masks(own_tokenizer, tmp_path):
    """As on the Hub: h.0.attn.c_attn.weight, with the mask beside it, and no lm_head."""
    theirs = small_gpt2()
    theirs.save_pretrained(tmp_path)
    weights = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        weights[name.removeprefix("transformer.")] = tensor
    for layer in range(3):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(own_tokenizer, tmp_path)
    assert largest_difference(load_model(str(tmp_path))[0], theirs) < 1e-5


def test_the_token_table_under_the_name_of_the_head_alone(own_tokenizer, tmp_path):
    """As safetensors.torch.save_model stores a tied pair, here by the hand of a user."""
    theirs = small_gpt2()
    theirs.config.save_pretrained(tmp_path)
    save_model(theirs, str(tmp_path / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(tmp_path / "model.safetensors")
    copy_tokenizer(own_tokenizer, tmp_path)
    assert largest_difference(load_model(str(tmp_path))[0], theirs) < 1e-5


def test_gelu_by_its_other_name(own_tokenizer, tmp_path):
    theirs = small_gpt2(activation_function="gelu_pytorch_tanh")
    theirs.save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    assert largest_difference(load_model(str(tmp_path))[0], theirs) < 1e-5


OTHERS = {
    "activation_function": ("gelu", "activation_function is 'gelu' where a GPT-2 has 'gelu_new'"),
    "layer_norm_epsilon": (1e-6, "layer_norm_epsilon is 1e-06 where a GPT-2 has 1e-05"),
    "scale_attn_weights": (False, "scale_attn_weights is False where a GPT-2 has True"),
    "scale_attn_by_inverse_layer_idx": (True, "scale_attn_by_inverse_layer_idx is True where"),
    "add_cross_attention": (True, "add_cross_attention is True where a GPT-2 has False"),
    "tie_word_embeddings": (False, "tie_word_embeddings is False where a GPT-2 has True"),
    "n_inner": (64, "n_inner is 64 where a GPT-2 has 4 times n_embd"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_another_model_is_refused_by_the_key_that_differs(key, own_tokenizer, tmp_path):
    value, message = OTHERS[key]
    small_gpt2(**{key: value}).save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_what_does_not_change_the_maths_is_accepted(own_tokenizer, tmp_path):
    changes = {"reorder_and_upcast_attn": True, "attn_pdrop": 0.0, "n_inner": 4 * 32}
    theirs = small_gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    assert largest_difference(load_model(str(tmp_path))[0], theirs) < 1e-5


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_folders_are_refused(own_tokenizer, tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    change_config(tmp_path, model_type="llama")
    with pytest.raises(UserError, match="model_type is 'llama' where a GPT-2 has 'gpt2'"):
        load_model(str(tmp_path))
    change_config(tmp_path, model_type="gpt2", quantization_config={"load_in_8bit": True})
    with pytest.raises(UserError, match="quantization_config is {'load_in_8bit': True} where"):
        load_model(str(tmp_path))
    change_config(tmp_path, quantization_config=None)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name, tensor, message in (
        ("score.weight", torch.ones(2, 32), r"weight score.weight of shape \(2, 32\) does not fit"),
        ("transformer.ln_f.bias", torch.ones(32, dtype=torch.int8), "quantized weights are not"),
        ("lm_head.weight", torch.ones(600, 32), "lm_head.weight is not wte.weight"),
    ):
        save_file(weights | {name: tensor}, path)
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path))
    del weights["transformer.h.2.ln_1.bias"]
    save_file(weights, path)
    with pytest.raises(UserError, match="weights are missing: transformer.h.2.ln_1.bias"):
        load_model(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="it has none of model.safetensors, "):
        load_model(str(tmp_path))


def test_keys_that_config_json_lacks_are_named(own_tokenizer, tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for keys in (["n_positions"], ["vocab_size", "n_head"]):
        less = {key: value for key, value in config.items() if key not in keys}
        path.write_text(json.dumps(less))
        with pytest.raises(UserError) as error:
            load_model(str(tmp_path))
        assert str(error.value) == f"{tmp_path}: config.json has no {', '.join(keys)}"


FILES = {
    "model.gguf": (b"GGUF\x03\0\0\0", "is a GGUF file, for llama.cpp"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, TensorFlow's or Keras's"),
    "tokenizer.json": (b'{\n  "version": "1.0"}', "is a JSON file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    "notes": (b"To whom it may concern", "is not a checkpoint"),
    "nothing": (b"", "is not a checkpoint"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_model_is_called_what_it_is(name, tmp_path, capsys):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert sample.main(["Hi", "--model", str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / name} {said}" in printed and "; a model is a checkpoint, " in printed


def test_a_folder_cloned_without_git_lfs(own_tokenizer, tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(FILES["pointer"][0])
    with pytest.raises(UserError, match="model.safetensors is a pointer of Git LFS"):
        load_model(str(tmp_path))


def test_weights_that_would_run_code_are_not_read(own_tokenizer, tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    to_bin(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    torch.save({"x": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be read as a model folder: UnpicklingError"):
        load_model(str(tmp_path))


def test_damaged_files_are_not_read(own_tokenizer, tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:50_000])
    with pytest.raises(UserError, match="can't be read as a model folder: SafetensorError"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    to_bin(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64  # torch.load does not see it
    path.write_bytes(content)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged: the checksum of"):
        load_model(str(tmp_path))


def test_weights_in_torchs_old_format(own_tokenizer, tmp_path):
    theirs = small_gpt2()
    theirs.save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)
    assert largest_difference(load_model(str(tmp_path))[0], theirs) < 1e-5


# ---- tokenizers ----


def test_a_folders_own_tokenizer_is_used_never_assumed(tmp_path, capsys):
    """With GPT-2's own 50257 entries, and with two more for 50259 rows: both were once read as
    OpenAI's."""
    small_gpt2(vocab_size=50259).save_pretrained(tmp_path)
    whole = json.loads(get_tokenizer("gpt2").files(64)["tokenizer.json"])
    for id, name in ((50257, "<|user|>"), (50258, "<|bot|>")):
        whole["added_tokens"].append(whole["added_tokens"][0] | {"id": id, "content": name})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    model, tokenizer = load_model(str(tmp_path))
    assert model.config.vocab_size == tokenizer.n_vocab == 50259
    assert tokenizer.encode_prompt("<|user|>Hello<|bot|>") == [50257, 15496, 50258]
    out = tmp_path.with_name("out")
    assert export.main(["--model", str(tmp_path), "--out", str(out)]) == 0
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("<|user|>Hello<|bot|>")["input_ids"] == [50257, 15496, 50258]
    assert theirs.eos_token_id == 50256
    twin = AutoModelForCausalLM.from_pretrained(out)
    assert twin.config.vocab_size == 50259 and largest_difference(model, twin) < 1e-5
    words = ["--model", str(out), "--max_new_tokens=9", "--num_samples=1", "--temperature=1e-30"]
    assert sample.main(["<|user|>Hi", *words]) == 0
    assert "<|user|>Hi" in capsys.readouterr().out


def test_an_own_tokenizer_comes_back_byte_for_byte(own_tokenizer, tmp_path):
    small_gpt2(vocab_size=640).save_pretrained(tmp_path / "in")  # rows that pad the table
    copy_tokenizer(own_tokenizer, tmp_path / "in")
    out = tmp_path / "out"
    assert export.main(["--model", str(tmp_path / "in"), "--out", str(out)]) == 0
    own = (own_tokenizer / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == own
    twin = AutoModelForCausalLM.from_pretrained(out)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "in")
    idx = torch.randint(600, (2, 64))
    with torch.no_grad():
        assert (twin(idx).logits - theirs(idx).logits[..., :600]).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(out).eos_token_id == twin.config.eos_token_id == 0


def test_fewer_rows_than_ids_are_refused(own_tokenizer, tmp_path):
    small_gpt2(vocab_size=599).save_pretrained(tmp_path)
    copy_tokenizer(own_tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"has 599 rows in its token table, but its tokenizer \("):
        load_model(str(tmp_path))


def padded_folder(tmp_path, rows=600, **token) -> tuple[GPT2LMHeadModel, str]:
    """A GPT-2 to whose tokenizer a user has added [PAD], as transformers saves the two. Returns the
    model and the folder."""
    folder = tmp_path / "padded"
    model = small_gpt2(rows)
    model.save_pretrained(folder)
    save(folder, byte_level_bpe())
    theirs = AutoTokenizer.from_pretrained(folder)
    added = AddedToken("[PAD]", **{"special": True} | token)
    if added.special:
        theirs.add_special_tokens({"pad_token": added})
    else:
        theirs.add_tokens([added])
    theirs.save_pretrained(folder)
    return model, str(folder)


def test_special_tokens_beyond_the_table_are_left_out(tmp_path, capsys):
    """A text has [PAD] as text like any other then, also in a prompt."""
    theirs, folder = padded_folder(tmp_path)
    loaded = open_model(folder)
    plain = get_tokenizer(save(tmp_path / "plain", byte_level_bpe()))
    [note] = loaded.notes
    assert note == "[PAD] has no row in the token table, and is left out of the tokenizer"
    assert loaded.tokenizer.behavior == plain.behavior and loaded.tokenizer.n_vocab == 600
    assert get_tokenizer(loaded.tokenizer.state).behavior == plain.behavior
    assert loaded.tokenizer.encode_prompt("a[PAD]") == plain.encode("a[PAD]")
    assert largest_difference(loaded.model, theirs) < 1e-5
    write_hellaswag(tmp_path / "h.jsonl", 9)
    out = tmp_path / "out"
    assert export.main(["--model", folder, "--out", str(out)]) == 0
    exported = AutoTokenizer.from_pretrained(out)
    assert len(exported) == AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 600
    assert exported("a[PAD]")["input_ids"] == plain.encode("a[PAD]")
    shutil.copy(tmp_path / "plain" / "tokenizer.json", folder)  # the folder before the user came
    for command, words in (
        (sample, ["a[PAD]", "--num_samples=1"]),
        (hellaswag, ["--data", str(tmp_path / "h.jsonl")]),
    ):
        outputs = []
        for model in (folder, str(out)):
            assert command.main([*words, "--model", model]) == 0
            outputs.append(capsys.readouterr().out.splitlines()[-1])
        assert outputs[0] == outputs[1]


def test_gpt2s_tokenizer_with_a_pad_token_is_gpt2s(tmp_path):
    folder = tmp_path / "padded"
    small_gpt2(50257).save_pretrained(folder)
    for name, content in get_tokenizer("gpt2").files(64).items():
        (folder / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    loaded = open_model(str(folder), tokenizer="gpt2")
    assert loaded.tokenizer.name == "gpt2" and "[PAD]" in loaded.notes[0]


def test_tokens_that_a_text_can_have_are_refused_beyond_the_table(tmp_path):
    _, folder = padded_folder(tmp_path, special=False)
    with pytest.raises(UserError, match=r"has 600 rows .* 601 ids: they don't belong together"):
        load_model(folder)
    _, folder = padded_folder(tmp_path, rows=590)
    with pytest.raises(UserError, match=r"has 590 rows .* 600 ids: they don't belong together"):
        load_model(folder)
    _, folder = padded_folder(tmp_path)
    (tmp_path / "padded" / "tokenizer_config.json").write_text('{"eos_token": "[PAD]"}')
    with pytest.raises(UserError, match=r"has 600 rows .* 601 ids: they don't belong together"):
        load_model(folder)


def test_a_folder_without_a_tokenizer(own_tokenizer, tmp_path, capsys):
    small_gpt2(vocab_size=50257).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="comes without a tokenizer: if its 50,257 tokens are"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), tokenizer="gpt2")[1].name == "gpt2"
    loaded = open_model(str(tmp_path), str(own_tokenizer))
    assert loaded.tokenizer.n_vocab == 600 and not loaded.own_tokenizer
    words = ["--model", str(tmp_path), "--tokenizer=gpt2"]
    assert sample.main(["Hi", *words, "--max_new_tokens=3"]) == 0
    assert export.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert open_model(str(tmp_path / "out")).own_tokenizer
    capsys.readouterr()
    assert sample.main(["Hi", "--model", str(tmp_path / "out"), "--tokenizer=bytes"]) == 2
    assert "has its own tokenizer (gpt2), which is not bytes" in capsys.readouterr().err
    (tmp_path / "spiece.model").write_bytes(b"")
    assert sample.main(["Hi", *words]) == 2
    assert "only spiece.model: transformers makes one" in capsys.readouterr().err


# ---- chat templates ----

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Bot:"


def chat_folder(kind, place, own_tokenizer, folder):
    """A folder's tokenizer with a chat template in one of its two places."""
    if kind == "own":
        files = {"tokenizer.json": (own_tokenizer / "tokenizer.json").read_bytes()}
    else:
        files = get_tokenizer("bytes" if kind == "bytes" else "gpt2").files(64)
    if kind == "vocab.json and merges.txt":
        del files["tokenizer.json"]
    if place == "tokenizer_config.json":
        settings = json.loads(files.get(place, "{}"))
        files[place] = json.dumps(settings | {"chat_template": TURNS}).encode()
    else:
        files[place] = TURNS.encode()
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def check_same_chat(folder, out):
    before, after = map(AutoTokenizer.from_pretrained, (folder, out))
    messages = [{"role": "user", "content": "É?"}]
    prompt = before.apply_chat_template(messages, tokenize=False)
    assert prompt == after.apply_chat_template(messages, tokenize=False) == "user: É?\nBot:"
    assert before(prompt)["input_ids"] == after(prompt)["input_ids"]


@pytest.mark.parametrize(
    "kind, place",
    [
        ("gpt2", "chat_template.jinja"),
        ("bytes", "tokenizer_config.json"),
        ("own", "chat_template.jinja"),
        pytest.param(
            "vocab.json and merges.txt", "tokenizer_config.json", marks=pytest.mark.slow
        ),
    ],
)
def test_a_chat_template_stays_with_the_tokenizer(kind, place, own_tokenizer, tmp_path):
    tokenizer = get_tokenizer(chat_folder(kind, place, own_tokenizer, tmp_path / "in"))
    assert tokenizer.chat_template == get_tokenizer(tokenizer.state).chat_template == TURNS
    (tmp_path / "out").mkdir()
    for name, content in tokenizer.files(64).items():
        (tmp_path / "out" / name).write_bytes(content)
    check_same_chat(tmp_path / "in", tmp_path / "out")


LISTED = [{"name": "tools", "template": "?"}, {"name": "default", "template": TURNS}]
GENERATION = (
    "{%- for m in messages %}\n    {% generation -%}\n  {{ m.content + eos_token }} "
    "{%- endgeneration %}\n{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ pad_token }}{{ nothing }}{% if add_generation_prompt %}\n  A:\n{% endif %}"
)


@pytest.mark.parametrize(
    "kind, template", [("gpt2", GENERATION), ("bytes", LISTED), ("own", TURNS), ("own", GENERATION)]
)
def test_a_message_in_the_chat_template_is_transformers(kind, template, own_tokenizer, tmp_path):
    """Its text, and its ids: the special tokens that the template writes are tokens."""
    folder = chat_folder(kind, "tokenizer_config.json", own_tokenizer, tmp_path / "in")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {"eos_token": END_OF_TEXT} | settings | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = AutoTokenizer.from_pretrained(folder), get_tokenizer(folder)
    for content in ("É?", "<|endoftext|> \n", ""):
        messages = [{"role": "user", "content": content}]
        prompt = sample.chat_prompt(ours, content, "x")
        kwargs = {"add_generation_prompt": True, "return_dict": False}
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, **kwargs)
        assert ours.encode_prompt(prompt) == theirs.apply_chat_template(messages, **kwargs)


def test_no_chat_template_and_one_that_fails(own_tokenizer, tmp_path, capsys):
    model = GPT(GPTConfig(64, 257, 1, 1, 8))
    state = {"model": model.state_dict(), "config": model.config, "step": 1, "tokenizer": "bytes"}
    torch.save(state, tmp_path / "m.pt")
    assert sample.main(["--chat", "Who?", "--model", str(tmp_path / "m.pt")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "m.pt has no chat template: leave --chat out" in printed.err
    folder = chat_folder("bytes", "chat_template.jinja", own_tokenizer, tmp_path / "in")
    small_gpt2(257).save_pretrained(folder)
    for template, reason in (("{% if %}", "TemplateSyntaxError"), ("{{ 1 / 0 }}", "ZeroDivision")):
        (folder / "chat_template.jinja").write_text(template)
        assert sample.main(["--chat", "Who?", "--model", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"the chat template of {folder} fails: {reason}" in error


@pytest.mark.parametrize("kind", ["bytes", "own"])
def test_a_chat_template_stays_with_the_model(kind, own_tokenizer, tmp_path):
    """From a folder, over a run on tokens made with it, to the published folder."""
    folder = chat_folder(kind, "chat_template.jinja", own_tokenizer, tmp_path / "in")
    small_gpt2({"own": 600, "bytes": 257}[kind]).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("Hello, I'm a language model.\n" * 400)
    words = ["--dataset", str(tmp_path / "text.txt"), "--data_dir", str(tmp_path / "data")]
    words += ["--tokenizer", str(folder), "--shard_size=1000"]
    assert data_generator.main(words) == 0
    changes = {"n_layer": None, "n_head": None, "n_embd": None, "max_steps": 2}
    changes |= {"data_dir": tmp_path / "data", "log_dir": tmp_path / "log", "init_from": folder}
    assert train.main(flags(**changes)) == 0
    for model in (folder, tmp_path / "log"):
        out = tmp_path / f"{model.name}-out"
        assert export.main(["--model", str(model), "--out", str(out)]) == 0
        check_same_chat(folder, out)


# ---- nanoGPT, PEFT ----


def nanogpt_checkpoint(path, theirs: GPT2LMHeadModel, prefix="", **args):
    """As nanoGPT saves it: nn.Linear's layout, the tied head, the shape in model_args."""
    config = theirs.config
    weights = {}
    for name, tensor in theirs.state_dict().items():
        is_matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[prefix + name] = tensor.T.contiguous() if is_matrix else tensor
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    shape |= {"block_size": config.n_positions, "vocab_size": config.vocab_size, "dropout": 0.0}
    checkpoint = {"model": weights, "model_args": shape | {"bias": True} | args, "iter_num": 9}
    checkpoint |= {"optimizer": {}, "best_val_loss": torch.tensor(3.2), "config": {"bias": True}}
    torch.save(checkpoint, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(prefix, own_tokenizer, tmp_path):
    theirs = small_gpt2(vocab_size=50304)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", theirs, prefix)
    loaded = open_model(str(tmp_path / "ckpt.pt"))
    # the sums of a head of 50,304 rows go in another order on some machines: 1.2e-5 was seen
    assert largest_difference(loaded.model, theirs) < 5e-5 and loaded.tokenizer.name == "gpt2"
    assert loaded.notes[0].startswith("nanoGPT computes GELU exactly")
    assert "names no tokenizer: assuming GPT-2's tokens for its 50304 rows" in loaded.notes[1]
    nanogpt_checkpoint(tmp_path / "ckpt.pt", small_gpt2(vocab_size=65))
    with pytest.raises(UserError, match="ckpt.pt comes without a tokenizer: if its 65 tokens"):
        load_model(str(tmp_path / "ckpt.pt"))
    nanogpt_checkpoint(tmp_path / "ckpt.pt", small_gpt2())
    assert load_model(str(tmp_path / "ckpt.pt"), tokenizer=own_tokenizer)[1].n_vocab == 600


def test_the_card_of_nanogpts_model_takes_nothing_from_another_run(tmp_path):
    """Also where its file lies in the directory of a run."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt", small_gpt2(vocab_size=50304))
    facts = dict.fromkeys(field.name for field in dataclasses.fields(RunFacts))
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "log.txt").write_text("3 val 2.5\n3 hella 0.3\n")
    (tmp_path / "curve.png").write_bytes(b"")
    words = ["--model", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")]
    assert export.main(words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "validation loss" not in card and "acc_norm" not in card and "curve" not in card


def test_nanogpt_without_biases_is_another_model(tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", small_gpt2(), bias=False)
    with pytest.raises(UserError, match="ckpt.pt: bias is False where a GPT-2 has True"):
        load_model(str(tmp_path / "ckpt.pt"))


def test_the_difference_of_nanogpts_gelu(tmp_path):
    """What the warning speaks of: small, but not rounding."""
    theirs = small_gpt2(vocab_size=50304)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", theirs)
    exact = small_gpt2(vocab_size=50304, activation_function="gelu")
    difference = largest_difference(load_model(str(tmp_path / "ckpt.pt"))[0], exact)
    assert 1e-5 < difference < 1e-2


@pytest.mark.slow  # peft comes with the requirements of the slow tests
def test_an_adapter_is_to_be_merged_with_the_lines_of_the_message(own_tokenizer, tmp_path):
    import peft

    small_gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **target)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a PEFT adapter") as error:
        load_model(str(tmp_path / "adapter"))
    lines = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    program = "\n".join(line.strip() for line in lines).replace('"merged"', f'"{tmp_path}/merged"')
    exec(program)
    ours, _ = load_model(str(tmp_path / "merged"), tokenizer=own_tokenizer)
    assert largest_difference(ours, adapted) < 1e-4


# ---- weights that are not finite ----

NOT_FINITE = {
    "NaN in the token table": ("transformer.wte.weight", float("nan")),
    "Inf in a bias": ("transformer.h.1.mlp.c_fc.bias", float("inf")),
    "above float32": ("transformer.ln_f.weight", 1e300),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_every_command_names_a_weight_that_is_not_finite(source, kind, data_dir, tmp_path, capsys):
    small_gpt2(vocab_size=257).save_pretrained(tmp_path / "folder")
    for file, content in get_tokenizer("bytes").files(64).items():
        (tmp_path / "folder" / file).write_bytes(content)
    ours = GPT.from_pretrained(tmp_path / "folder")
    weight, value = NOT_FINITE[kind]
    if source == "folder":
        model = tmp_path / "folder"
        weights = load_file(model / "model.safetensors")
        weights[weight] = weights[weight].double()
        weights[weight].view(-1)[1] = value
        save_file(weights, model / "model.safetensors")
    else:
        model = tmp_path / "model_00001.pt"
        weights = ours.state_dict()
        weights[weight] = weights[weight].double()
        weights[weight].view(-1)[1] = value
        state = {"model": weights, "config": ours.config, "step": 1, "tokenizer": "bytes"}
        torch.save(state, model)
    write_hellaswag(tmp_path / "h.jsonl", 3)
    capsys.readouterr()
    shape = {"n_layer": None, "n_head": None, "n_embd": None, "log_dir": tmp_path / "log"}
    run = flags(data_dir=data_dir, init_from=model, **shape)
    for command, words in (
        (sample, ["Hi", "--model", str(model), "--temperature=0"]),
        (hellaswag, ["--model", str(model), "--data", str(tmp_path / "h.jsonl")]),
        (export, ["--model", str(model), "--out", str(tmp_path / "out")]),
        (inside, ["Hi", "--model", str(model), "--out", str(tmp_path / "inside.html")]),
        (train, run),
        (train, [*run, "--eval_only"]),
    ):
        assert command.main(words) == 1
        printed = capsys.readouterr()
        assert printed.err == f"error: {model}: weight {weight} has numbers that are not finite\n"
    assert not {"out", "inside.html"} & {path.name for path in tmp_path.iterdir()}
