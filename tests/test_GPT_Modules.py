"""The model against transformers' GPT-2, and against what its paper says."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from GPT_Modules import GPT, GPTConfig, KVCache
from lib.pretrained import TRANSPOSED, load_weights

SMALL = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)


def huggingface_twin(config: GPTConfig) -> GPT2LMHeadModel:
    """transformers' model with random weights, biases and LayerNorms included."""
    shape = {"n_positions": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer}
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_head=config.n_head,
            bos_token_id=0,
            eos_token_id=0,
            **shape,
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return twin


@pytest.fixture(scope="module", params=["small", "124M"])
def pair(request):
    config = SMALL if request.param == "small" else GPTConfig()
    twin, model = huggingface_twin(config), GPT(config)
    load_weights(model, twin.state_dict(), transposed=True)
    return model, twin


def test_logits_and_loss_are_transformers(pair):
    model, twin = pair
    idx = torch.randint(model.config.vocab_size, (2, 32))
    with torch.no_grad():
        logits, none = model(idx)
        reference = twin(idx, labels=idx)
        no_logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert none is None and no_logits is None
    assert (logits - reference.logits).abs().max() < 1e-5
    assert abs(loss - reference.loss) < 1e-5


def test_gradients_are_transformers():
    twin, model = huggingface_twin(SMALL), GPT(SMALL)
    load_weights(model, twin.state_dict(), transposed=True)
    idx = torch.randint(101, (2, 32))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    twin(idx, labels=idx).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        reference = theirs[name].grad.T if name.endswith(TRANSPOSED) else theirs[name].grad
        assert torch.allclose(parameter.grad, reference, atol=1e-5), name


def test_bfloat16_autocast_is_near_float32():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    exact = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded = model(idx[:, :-1], idx[:, 1:])
    rounded.backward()
    assert rounded.dtype == torch.float32 and abs(rounded - loss) < 0.01
    assert (model.transformer.wte.weight.grad - exact).norm() < 0.02 * exact.norm()


def test_a_file_that_has_only_the_model_beside_it_loads_a_checkpoint_and_trains(trained, tmp_path):
    """GPT_Modules.py imports nothing of the project: copied alone, it is enough."""
    shutil.copy(ROOT / "GPT_Modules.py", tmp_path)
    program = f"""
import torch
from GPT_Modules import GPT
checkpoint = torch.load({str(trained / "model_checkpoint.pt")!r}, map_location="cpu")
model = GPT(checkpoint["config"])
model.load_state_dict(checkpoint["model"])
optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3)
idx = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(0))
for _ in range(5):
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
"""
    (tmp_path / "learn.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "learn.py"], cwd=tmp_path, capture_output=True, text=True
    )
    losses = [float(line) for line in done.stdout.split()]
    assert done.returncode == 0 and losses == sorted(losses, reverse=True) and len(losses) == 5


def test_124m_parameters_init_and_groups():
    model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(24) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.01, name
        else:
            assert (parameter == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), (
                name
            )
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4)
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert (len(decayed), len(others)) == (50, 98)
    assert (
        optimizer.param_groups[0]["weight_decay"] == 0.1
        and optimizer.param_groups[1]["weight_decay"] == 0
    )
    assert len({id(p) for p in decayed + others}) == 148 == len(list(model.parameters()))
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.95)
    idx = torch.randint(50257, (2, 513))
    with torch.no_grad():
        loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert abs(loss - (math.log(50257) + 768 * 0.02**2 / 2)) < 0.05


def test_causal():
    model, idx = GPT(SMALL), torch.randint(101, (1, 32))
    with torch.no_grad():
        before = model(idx)[0]
        for t in (0, 7, 31):
            changed = idx.clone()
            changed[0, t] = (changed[0, t] + 1) % 101
            after = model(changed)[0]
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])


def test_generation_with_cache_is_transformers(pair):
    model, twin = pair
    idx = torch.randint(model.config.vocab_size, (2, 5))
    ours = model.generate(idx, 20, temperature=0)
    theirs = twin.generate(
        idx, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours, theirs)


def test_cached_logits_are_the_full_ones():
    model, idx = GPT(SMALL).eval(), torch.randint(101, (2, 32))
    cache = [KVCache(32) for _ in range(3)]
    with torch.no_grad():
        full = model(idx)[0]
        pieces = [
            model.lm_head(model.hidden(part, cache=cache))
            for part in idx.split([9] + [1] * 23, dim=1)
        ]
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-4
    with pytest.raises(ValueError, match="33 tokens do not fit into block_size 32"):
        model.hidden(idx[:, :1], cache=cache)
    cache[0].length = 9
    with pytest.raises(AssertionError, match="one token at a time"):
        model.hidden(idx[:, :2], cache=cache)


def test_generation_beyond_block_size_goes_on_from_the_last_tokens():
    model, idx = GPT(SMALL), torch.randint(101, (1, 30))
    text = model.generate(idx, 10, temperature=0)
    assert text.shape == (1, 40)
    for t in range(33, 40):
        assert text[0, t] == model(text[:, t - 32 : t])[0][0, -1].argmax()


def test_generation_draws_no_padding_and_only_the_top_k():
    model, idx = GPT(SMALL), torch.randint(90, (8, 4))
    with torch.no_grad():
        model.transformer.wte.weight[90:] *= 30  # padding rows that would be drawn all the time
    assert model.generate(idx, 25, n_vocab=90)[:, 4:].max() < 90
    assert model.generate(idx, 25)[:, 4:].max() >= 90
    likeliest = model(idx)[0][:, -1].topk(3).indices
    drawn = torch.cat([model.generate(idx, 1, top_k=3)[:, 4:] for _ in range(60)], dim=1)
    for row in range(8):
        assert set(drawn[row].tolist()) <= set(likeliest[row].tolist())


def test_generation_has_its_own_generator():
    model, idx = GPT(SMALL), torch.zeros(1, 1, dtype=torch.long)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global state must not matter
        texts.append(model.generate(idx, 20, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_from_pretrained_reads_both_naming_styles(tmp_path):
    from safetensors.torch import load_file, save_file

    twin = huggingface_twin(SMALL)
    twin.save_pretrained(tmp_path / "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    old = {
        name.removeprefix("transformer."): tensor for name, tensor in weights.items()
    }  # as OpenAI's own on the Hub
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(3)}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    idx = torch.randint(101, (1, 8))
    for style in ("new", "old"):
        model = GPT.from_pretrained(str(tmp_path / style))
        assert model.config == SMALL
        assert (model(idx)[0] - twin(idx).logits).abs().max() < 1e-5


def test_from_pretrained_refuses_what_is_not_a_gpt2(tmp_path):
    import json

    twin = huggingface_twin(SMALL)
    twin.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function is 'relu'"):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"scale_attn_weights": False}))
    with pytest.raises(ValueError, match="scale_attn_weights is False where a GPT-2 has True"):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ValueError, match="does not fit"):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    with pytest.raises(ValueError, match="missing"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_head": 5}, "n_head 5 does not divide n_embd 48: n_head 4 would"),
        ({"n_layer": 0}, "n_layer is 0: it must be"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**vars(SMALL) | change)
