"""The model against transformers' GPT-2, and against what its paper says."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from GPT_Modules import (
    GPT,
    TRANSPOSED,
    GPTConfig,
    KVCache,
    Muon,
    linear_cross_entropy,
    orthogonalize,
)

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
    model.load_weights(twin.state_dict(), transposed=True)
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
    model.load_weights(twin.state_dict(), transposed=True)
    idx = torch.randint(101, (2, 32))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    twin(idx, labels=idx).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        reference = theirs[name].grad.T if name.endswith(TRANSPOSED) else theirs[name].grad
        assert torch.allclose(parameter.grad, reference, atol=1e-5), name


@pytest.mark.parametrize("V", [1000, 2**19])  # one slice of rows, three slices
def test_chunked_loss_is_cross_entropy(V):
    x, weight = torch.randn(130, 2, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    targets = torch.randint(V, (130,))
    truth = F.cross_entropy(x.double() @ weight.double().T, targets)
    torchs = F.cross_entropy(x @ weight.T, targets)
    ours = linear_cross_entropy(x, weight, targets)
    assert abs(ours - truth) <= 1e-6 * truth
    for name, parameter in (("x", x), ("weight", weight)):
        exact, plain = (
            torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (truth, torchs)
        )
        got = torch.autograd.grad(3 * ours, parameter, retain_graph=True)[0] / 3
        # no further from the truth than torch's own rounding takes it
        assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm(), name


@pytest.mark.parametrize("scale", [0.1, 3.0])  # losses of an untrained and of a well-trained model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_in_half_precision_is_as_near_the_truth_as_torchs(dtype, scale):
    """The truth is float64 on the same rounded inputs; torch's is F.cross_entropy of logits of that
    precision."""
    torch.manual_seed(0)
    weight, targets = 0.06 * torch.randn(1000, 64), torch.randint(1000, (2048,))
    x = scale * (torch.randn(2048, 64) + 10 * weight[targets])
    x, weight = (t.to(dtype).float().requires_grad_() for t in (x, weight))
    truth = F.cross_entropy(x.double() @ weight.double().T, targets)
    with torch.autocast("cpu", dtype=dtype):
        torchs = F.cross_entropy((x @ weight.T).float(), targets)
        ours = linear_cross_entropy(x, weight, targets)
    assert (
        ours.dtype == torch.float32 and abs(ours - truth) < 2 * abs(torchs - truth) + 1e-4 * truth
    )
    for parameter in (x, weight):
        losses = (truth, torchs, ours)
        exact, plain, got = (
            torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in losses
        )
        assert got.dtype == torch.float32 and (got - exact).norm() < 1.2 * (plain - exact).norm()


def test_chunked_loss_without_learning_keeps_no_gradient():
    x, weight = torch.randn(5, 4), torch.randn(11, 4, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, torch.randint(11, (5,)))
    assert not loss.requires_grad


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


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_recomputing_keeps_less():
    """What the forward pass keeps for the backward pass, counted as it is packed."""
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    kept = []
    for model.recompute in (False, True):
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx[:, :-1], idx[:, 1:])
    assert kept[1] < kept[0] / 3


def test_muon_makes_matrices_nearly_orthogonal_and_q_k_v_apart():
    torch.manual_seed(0)
    for shape in ((3, 48, 48), (2, 192, 48), (2, 48, 192)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert 0.6 < singular.min() and singular.max() < 1.25, singular
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    optimizer = model.configure_optimizers(0.0, 1e-2, muon=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(sum(groups, [])) == sorted(names.values()) and len(groups[0]) == 12
    assert groups[1:3] == [["transformer.wte.weight"], ["transformer.wpe.weight"]]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = before[name] - parameter.detach()
        if name in groups[0]:
            parts = step.view(-1, 48, 48) if name.endswith("c_attn.weight") else step[None]
            singular = torch.linalg.svdvals(parts) / (1e-2 * 0.2 * max(parts.shape[1:]) ** 0.5)
            assert 0.5 < singular.median() < 1.3, (name, singular)
    again = GPT(SMALL).configure_optimizers(0.0, 1e-2, muon=True)
    again.load_state_dict(optimizer.state_dict())


def test_muons_other_groups_are_adamws():
    """Where no group is Muon's, a step is AdamW's, bit for bit."""
    models = []
    for kind in (torch.optim.AdamW, Muon):
        torch.manual_seed(0)
        model = GPT(SMALL)
        optimizer = kind(
            model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        for _ in range(3):
            model(torch.arange(32)[None], torch.arange(1, 33)[None])[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


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
