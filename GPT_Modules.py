"""GPT-2, each part from the ground up.

    config = GPTConfig()                                   # 124M
    model = GPT(config)
    _, loss = model(idx, targets)                          # training
    logits, _ = model(idx)                                 # inference
    tokens = model.generate(idx, max_new_tokens=64)        # sampling
    model = GPT.from_pretrained("gpt2")                    # OpenAI's weights, or a folder of ours

Shapes: B batch, T tokens, C channels (n_embd), H heads, D = C/H channels of a head, V vocabulary
(rows of wte). The names of the weights are those of OpenAI's GPT-2. In a block, attention moves
information between tokens, the MLP computes on each token alone, and both add their result to a
residual stream of C channels.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M (Radford et al. 2019). Raises ValueError if it
    can't be built."""

    block_size: int = 1024  # tokens of context at most
    vocab_size: int = (
        50257  # rows of the embedding table: 50,000 BPE merges + 256 bytes + <|endoftext|>
    )
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.n_embd % self.n_head:
            fits = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.n_head))
            raise ValueError(
                f"n_head {self.n_head} does not divide n_embd {self.n_embd}: n_head {nearest} would"
            )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v)
        )  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # each (B, H, tokens so far, D)
        # softmax(q @ k.T / sqrt(D)) @ v without ever storing the T x T matrix (flash attention).
        # Each token sees itself and those before it; a single new token with a cache sees
        # everything, which needs no mask.
        causal = mask is None and T == k.size(2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal
        )  # (B, H, T, D)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's own approximation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # compute each block's activations again in the backward pass, instead of keeping them
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = (
            self.transformer.wte.weight
        )  # tied: the same table reads tokens and writes them
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # 2 * n_layer projections add into the residual stream; 1/sqrt(2 * n_layer) keeps
                # their sum from growing
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """The last layer's output for tokens idx (B, T): (B, T, C), C channels for each token.

        pos (T,) or (B, T): positions, if they are not 0..T-1. mask (B, 1, T, T) bool: which tokens
        (last dimension) each token sees, if not itself and all before it. cache: a KVCache for each
        layer; idx is the whole prompt while they are empty, then one token at a time. Raises
        ValueError if a token would stand beyond block_size.
        """
        if pos is None:
            start = cache[0].length if cache else 0
            end = start + idx.size(1)
            if end > self.config.block_size:
                raise ValueError(
                    f"{end} tokens do not fit into block_size {self.config.block_size}"
                )
            pos = torch.arange(start, end, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        with (
            sdpa_kernel(CHANGING_SHAPES) if mask is not None or cache else contextlib.nullcontext()
        ):
            for layer, block in enumerate(self.transformer.h):
                if (
                    self.recompute and torch.is_grad_enabled()
                ):  # torch calls this activation checkpointing
                    x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, mask, cache[layer] if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean loss in nats
        per token).

        Never both: in training the loss is computed slice by slice, and the logits are never all in
        memory.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        # loss = F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten()), but with far
        # less memory:
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, n_vocab=None
    ):
        """Continue idx (B, T): yields max_new_tokens times the next tokens (B, 1).

        temperature 0 takes the likeliest token. top_k: only from the k likeliest. generator:
        torch.Generator on idx's device. n_vocab: only ids below it, so that rows that pad the table
        are never drawn. Beyond block_size it goes on from the last block_size tokens.
        """
        cache = [KVCache(self.config.block_size) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.config.block_size:
                x = self.hidden(idx[:, cache[0].length :], cache=cache)
            else:  # the window slides, so each token changes its position: nothing can be re-used
                x = self.hidden(idx[:, -self.config.block_size :])
            logits = self.lm_head(x[:, -1]).float()[:, :n_vocab]  # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=1)
                token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, n_vocab=None
    ):
        """idx (B, T) with its continuation, (B, T + max_new_tokens); the arguments are those of
        `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, generator, n_vocab)
        return torch.cat((idx, *tokens), dim=1)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, muon: bool = False
    ) -> torch.optim.AdamW:
        """AdamW as GPT-3's (Brown et al. 2020, appendix B): matrices decay, biases and LayerNorms
        don't.

        muon: Muon updates the matrices of the blocks, AdamW the rest, the token table at twice the
        learning rate.
        """
        parameters = dict(self.named_parameters())
        blocks = [
            p
            for name, p in parameters.items()
            if p.dim() == 2 and name.startswith("transformer.h.")
        ]
        tables = [self.transformer.wte.weight, self.transformer.wpe.weight]
        others = [p for p in parameters.values() if p.dim() < 2]
        if muon:
            groups = [
                {"params": blocks, "weight_decay": weight_decay, "muon": True},
                {"params": tables[:1], "weight_decay": weight_decay, "lr_factor": 2.0},
                {"params": tables[1:], "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
        else:
            groups = [
                {"params": tables + blocks, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
        assert sum(len(group["params"]) for group in groups) == len(parameters)
        kind = Muon if muon else torch.optim.AdamW
        return kind(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """A GPT-2 from a Hugging Face folder, or by its name (gpt2, gpt2-medium, ...) from the Hub.

        Raises ValueError if it is not a GPT-2 as this file builds it, OSError and huggingface_hub's
        errors if it can't be read or fetched.
        """
        from safetensors.torch import load_file

        if Path(name_or_folder).is_dir():
            config_file, weights_file = (
                Path(name_or_folder) / name for name in ("config.json", "model.safetensors")
            )
        else:
            from huggingface_hub import hf_hub_download

            config_file = hf_hub_download(name_or_folder, "config.json")
            weights_file = hf_hub_download(name_or_folder, "model.safetensors")
        config = json.loads(Path(config_file).read_text())
        usual = {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "tie_word_embeddings": True,
        }
        ours = {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            **usual,
        }
        for key, value in ours.items():
            if config.get(key, usual.get(key)) != value:  # a file may leave out what is usual
                raise ValueError(
                    f"{name_or_folder}: {key} is {config.get(key)!r} where a GPT-2 has {value!r}"
                )
        shape = {key: config[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        model = cls(GPTConfig(block_size=config["n_positions"], **shape))
        model.load_weights(load_file(weights_file), transposed=True)
        return model

    def load_weights(self, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
        """Copy in weights under any of their usual names: with or without transformer., module.,
        _orig_mod., masks and the tied lm_head. transposed: the matrices of TRANSPOSED are stored as
        OpenAI did. Raises ValueError if one is missing, left over, or of another shape."""
        own, seen = dict(self.named_parameters()), set()
        for name, tensor in weights.items():
            name = (
                name.replace("_orig_mod.", "").replace("module.", "").removeprefix("transformer.")
            )
            if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
                continue
            parameter = own.get(f"transformer.{name}")
            tensor = tensor.T if transposed and name.endswith(TRANSPOSED) else tensor
            if parameter is None or parameter.shape != tensor.shape:
                raise ValueError(
                    f"weight {name} of shape {tuple(tensor.shape)} does not fit into {self.config}"
                )
            parameter.data.copy_(tensor)
            seen.add(f"transformer.{name}")
        if missing := own.keys() - seen:
            raise ValueError(
                f"weights are missing: {', '.join(sorted(missing)[:3])} ({len(missing)} in all)"
            )


class KVCache:
    """Keys and values of one layer for the tokens so far: a new token then costs one row of
    attention, not T rows."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0

    def append(self, k, v):
        """Add keys and values of T new tokens, each (B, H, T, D); return those of all, each (B, H,
        length, D)."""
        assert self.length == 0 or k.size(2) == 1, (
            "after the prompt, one token at a time: there is no mask"
        )
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(2, B, H, self.block_size, D)
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def linear_cross_entropy(x, weight, targets):
    """F.cross_entropy(x @ weight.T, targets), the mean over n tokens in nats, without holding all
    the logits.

    x (n, C), weight (V, C), targets (n,) int64 -> (), float32; under autocast the products are in
    its dtype.

    Why not F.cross_entropy itself: at B=64, T=1024 the logits are 3.3 billion numbers, and it keeps
    them for the backward pass. But the loss is the last operation, so its gradient is known as soon
    as the logits are: d loss / d logits = (softmax(logits) - one_hot(targets)) / n. So the forward
    pass handles a slice of tokens at a time: logits, loss, and at once their part of the gradients;
    the backward pass only scales the gradients.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return LinearCrossEntropy.apply(
        x, weight, targets, torch.is_grad_enabled()
    )  # inside, it is always off


SLICE = {
    "cuda": 2**28,
    "cpu": 25_000_000,
}  # logits of a slice: few enough for memory, enough for a fast product


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, learning):
        n, V, w = x.size(0), weight.size(0), weight.to(x.dtype)
        slices = max(1, n * V // SLICE.get(x.device.type, SLICE["cpu"]))
        rows, vocabulary = math.ceil(n / slices), torch.arange(V, device=x.device)
        # When compiled, gather and scatter stop Inductor from fusing the operations around them,
        # and the slice's logits go to memory and back. So there the target's logit is a dot
        # product, and one_hot a comparison.
        fused = torch.compiler.is_compiling()
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if learning else None
        grad_weight = torch.zeros_like(weight) if learning else None
        for i in range(0, n, rows):
            x_i, targets_i = x[i : i + rows], targets[i : i + rows, None]  # (rows, C), (rows, 1)
            logits = (x_i @ w.T).float()  # (rows, V); from here in place, because it is large
            if fused:
                target_logits = (x_i.float() * w[targets_i[:, 0]].float()).sum(
                    dim=1, keepdim=True
                )  # (rows, 1)
            else:
                target_logits = logits.gather(1, targets_i)
            highest = logits.amax(dim=1, keepdim=True)
            probs = logits.sub_(highest).exp_()
            total = probs.sum(dim=1, keepdim=True)
            # not in place: compiled by torch 2.11, that loses the gradient
            loss = loss + (total.log() + highest - target_logits).sum() / n
            if learning:
                if fused:
                    grad_logits = probs / total - (vocabulary == targets_i).float()
                else:
                    grad_logits = probs.div_(total).scatter_add_(
                        1, targets_i, -torch.ones_like(total)
                    )
                grad_logits = grad_logits.to(x.dtype)
                del logits, probs  # free the float32 numbers before the products need memory
                grad_x[i : i + rows] = grad_logits @ w
                add_product(grad_weight, grad_logits, x_i)
        ctx.n = n
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        scale = (
            grad_loss / ctx.n
        )  # here and not above: in float16, a probability divided by n is often 0
        return grad_x * scale, grad_weight * scale, None, None


@torch.library.custom_op("gpt124m::add_product", mutates_args={"total"})
def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (V, C) float32 += left.T @ right, for left (rows, V) and right (rows, C) of any
    precision.

    An operator of its own, because Inductor would keep the products of all slices and add them up
    in one kernel.
    """
    if right.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif right.is_cuda:  # factors in half precision, sums in float32
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right


class Muon(torch.optim.AdamW):
    """AdamW; but groups marked "muon" take Muon's steps (Jordan 2024): a matrix moves by the
    orthogonal matrix that is nearest to the momentum of its gradients, scaled to the size of
    AdamW's steps (0.2 sqrt(max(rows, columns)), Liu et al. 2025, arXiv 2502.16982). The rows of
    c_attn.weight are q, k and v: three matrices, each made orthogonal alone.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                for shape in dict.fromkeys(
                    p.shape for p in group["params"]
                ):  # matrices of one shape go together
                    self.step_matrices([p for p in group["params"] if p.shape == shape], group)

    def step_matrices(self, parameters, group):
        rows, C = parameters[0].shape
        for p in parameters:
            if not self.state[p]:  # with the "step" that AdamW looks for when it loads a state
                self.state[p].update(
                    step=torch.zeros((), device=p.device), momentum=torch.zeros_like(p)
                )
            self.state[p]["momentum"].lerp_(p.grad, 1 - self.momentum)
        updates = torch.stack(
            [p.grad.lerp(self.state[p]["momentum"], self.momentum) for p in parameters]
        )
        if rows == 3 * C:
            updates = updates.view(-1, C, C)
        updates = orthogonalize(updates) * (0.2 * math.sqrt(max(updates.shape[1:])))
        for p, update in zip(parameters, updates.view(-1, rows, C), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def orthogonalize(matrices):
    """(n, rows, columns) -> the same with all singular values near 1, by 5 steps of a Newton-Schulz
    iteration."""
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    X = X.mT if X.size(1) > X.size(2) else X
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return (X.mT if matrices.size(1) > matrices.size(2) else X).to(matrices.dtype)


# Attention for shapes that change with every call: not cuDNN's (torch's choice on Hopper), which
# plans each shape anew.
CHANGING_SHAPES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# OpenAI kept these weights as (inputs, outputs); nn.Linear wants (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Checkpoints hold their GPTConfig; torch.load opens plain data and what is named here, and nothing
# else. Checkpoints of the original scripts pickled it as a class of __main__.
torch.serialization.add_safe_globals([GPTConfig, (GPTConfig, "__main__.GPTConfig")])
