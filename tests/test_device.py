"""What computes: recomputed activations."""

import torch

from GPT_Modules import GPT, GPTConfig
from lib.device import recompute_blocks

SMALL = GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    gradients = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model)
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_recomputing_keeps_less():
    """What the forward pass keeps for the backward pass, counted as it is packed."""
    model, idx = GPT(SMALL), torch.randint(101, (2, 33))
    kept = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model)
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx[:, :-1], idx[:, 1:])
    assert kept[1] < kept[0] / 3
