"""Muon, the other optimizer (Jordan 2024, kellerjordan.github.io/posts/muon).

    optimizer = Muon(muon_groups(model, weight_decay=0.1), lr=1.8e-3)

A matrix moves by the orthogonal matrix that is nearest to the momentum of its gradients: all
directions of the update get the same length, not only those with large gradients.
"""

import math

import torch

MOMENTUM = 0.95


def muon_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of a GPT for Muon: the matrices of the blocks take Muon's steps, the rest
    AdamW's, the token table with twice the learning rate."""
    table = model.transformer.wte.weight
    positions = model.transformer.wpe.weight
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay, "muon": True},
        {"params": [table], "weight_decay": weight_decay, "lr_factor": 2.0},
        {"params": [positions], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


class Muon(torch.optim.AdamW):
    """AdamW, but the parameters of groups marked "muon" take Muon's steps.

    A step is scaled to the size of AdamW's: 0.2 sqrt(max(rows, columns)) times the learning rate
    (Liu et al. 2025, arXiv 2502.16982). The rows of c_attn.weight are q, k and v: three matrices,
    each made orthogonal alone.
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group.get("muon"):
                for shape in dict.fromkeys(p.shape for p in group["params"]):
                    self.step_matrices([p for p in group["params"] if p.shape == shape], group)
                for p in group["params"]:
                    p.grad = None  # AdamW leaves a parameter without a gradient alone
        super().step()

    def step_matrices(self, parameters: list[torch.Tensor], group: dict) -> None:
        """Update matrices of one shape (rows, columns) together: their products are one batch."""
        rows, columns = parameters[0].shape
        directions = []
        for p in parameters:
            if not self.state[p]:
                # AdamW looks for "step" when it loads a state
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            directions.append(p.grad.lerp(momentum, MOMENTUM))  # Nesterov's momentum
        updates = torch.stack(directions)  # (n, rows, columns)
        if rows == 3 * columns:
            updates = updates.view(-1, columns, columns)
        updates = orthogonalize(updates) * (0.2 * math.sqrt(max(updates.shape[1:])))
        for p, update in zip(parameters, updates.view(-1, rows, columns), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update, alpha=group["lr"])


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same with all singular values near 1.

    Five steps of Jordan's Newton-Schulz iteration, in bfloat16 on a GPU.
    """
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = X.size(1) > X.size(2)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    if tall:
        X = X.mT
    return X.to(matrices.dtype)
