"""Muon: what its steps are, and that its other groups are AdamW's."""

import torch

from GPT_Modules import GPT, GPTConfig
from lib.muon import Muon, muon_groups, orthogonalize

SMALL = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)


def test_muon_makes_matrices_nearly_orthogonal_and_q_k_v_apart():
    torch.manual_seed(0)
    for shape in ((3, 48, 48), (2, 192, 48), (2, 48, 192)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert 0.6 < singular.min() and singular.max() < 1.25, singular
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    optimizer = Muon(muon_groups(model, 0.0), 1e-2)
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
    again = Muon(muon_groups(GPT(SMALL), 0.0), 1e-2)
    again.load_state_dict(optimizer.state_dict())


def test_muons_other_groups_are_adamws():
    """Where no group is Muon's, a step is AdamW's, bit for bit."""
    models = []
    for kind in ("adamw", "muon"):
        torch.manual_seed(0)
        model = GPT(SMALL)
        optimizer = model.configure_optimizers(0.1, 1e-2)
        if kind == "muon":
            optimizer = Muon(optimizer.param_groups, 1e-2)
        for _ in range(3):
            model(torch.arange(32)[None], torch.arange(1, 33)[None])[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
