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

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M (Radford et al. 2019).

    Raises ValueError for a shape that can't be built.
    """

    block_size: int = 1024  # tokens of context at most
    vocab_size: int = 50257  # rows of wte: 50,000 BPE merges, 256 bytes, <|endoftext|>
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

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # each (B, H, tokens so far, D)
        # softmax(q @ k.T / sqrt(D)) @ v without ever storing the T x T matrix (flash attention).
        # Each token sees itself and those before it; a single new token with a cache sees all.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T == k.size(2))  # (B, H, T, D)
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

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.loss = cross_entropy  # train.py puts lib/loss.py's here: the same, in less memory
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one table reads and writes tokens
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # 2 * n_layer projections add into the residual stream: this keeps their sum small
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """The last layer's output for tokens idx (B, T): (B, T, C), C channels for each token.

        cache: a KVCache for each layer. While they are empty, idx is the whole prompt, then one
        token at a time. Raises ValueError if a token would stand beyond block_size.
        """
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size {self.config.block_size}")
        pos = torch.arange(start, end, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, loss).

        The loss is the mean over the tokens, in nats. Never both: in training, the logits need
        never be in memory all at once (lib/loss.py).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, self.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, n_vocab=None
    ):
        """Continue idx (B, T): yields max_new_tokens times the next tokens (B, 1).

        temperature: 0, or anything below 1e-6, takes the likeliest token. top_k: only from the k
        likeliest. generator: torch.Generator on idx's device. n_vocab: only ids below it, so that
        rows that pad the table are never drawn. Beyond block_size it goes on from the last
        block_size tokens.
        """
        cache = [KVCache(self.config.block_size) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.config.block_size:
                x = self.hidden(idx[:, cache[0].length :], cache)
            else:  # the window slides, so each token changes its position: nothing can be re-used
                x = self.hidden(idx[:, -self.config.block_size :])
            logits = self.lm_head(x[:, -1]).float()[:, :n_vocab]  # (B, V)
            if top_k:
                least = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature < 1e-6:
                token = logits.argmax(dim=1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=1)
                token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, n_vocab=None
    ):
        """idx (B, T) with its continuation: (B, T + max_new_tokens). Arguments as of `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, generator, n_vocab)
        return torch.cat((idx, *tokens), dim=1)

    def configure_optimizers(self, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
        """AdamW as GPT-3's (Brown et al. 2020, appendix B): biases and LayerNorms don't decay."""
        parameters = list(self.parameters())
        groups = [
            # matrices and tables
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """A GPT-2 as Hugging Face stores it: a folder, a file of weights with its config.json
        beside it, or a name (gpt2, gpt2-medium, ...) on the Hub.

        Raises NotAGPT2 if it is another model than this file builds, OSError and huggingface_hub's
        errors if it can't be read or fetched.
        """
        path = Path(name)
        if path.exists():
            folder = path if path.is_dir() else path.parent
            if path.is_dir() or "-of-" in path.name:  # one of several files of weights
                there = [file for file in WEIGHTS if (folder / file).exists()]
                if not there:
                    raise FileNotFoundError(f"there is none of {', '.join(WEIGHTS)}")
                path = folder / there[0]
            config_file = folder / "config.json"
        else:
            from huggingface_hub import hf_hub_download

            config_file = Path(hf_hub_download(name, "config.json"))
            path = Path(hf_hub_download(name, "model.safetensors"))
        config = json.loads(config_file.read_text())
        for key, values in SAME_MODEL.items():
            value = config.get(key, values[0] if key != "model_type" else None)
            if value not in values:
                raise NotAGPT2(f"{key} is {value!r} where a GPT-2 has {values[0]!r}")
        shape = {key: config[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
            raise NotAGPT2(f"n_inner is {config['n_inner']} where a GPT-2 has 4 times n_embd")
        model = cls(GPTConfig(block_size=config["n_positions"], **shape))
        model.load_weights(read_weights(path), transposed=True)
        return model

    def load_weights(self, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
        """Copy in weights of any precision, under any of their usual names: with or without
        transformer., module., _orig_mod., masks and the tied lm_head.

        transposed: the matrices of TRANSPOSED are stored as OpenAI did. Raises NotAGPT2 if one is
        missing, left over, of another shape, or made of integers, or if lm_head is not tied.
        """
        own = dict(self.named_parameters())
        head = own["transformer.wte.weight"]
        seen = set()
        for name, tensor in weights.items():
            name = name.replace("_orig_mod.", "").replace("module.", "")
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if name == "lm_head.weight":
                head = tensor
                continue
            parameter = own.get(f"transformer.{name}")
            tensor = tensor.T if transposed and name.endswith(TRANSPOSED) else tensor
            if parameter is None or parameter.shape != tensor.shape:
                shape = tuple(tensor.shape)
                raise NotAGPT2(f"weight {name} of shape {shape} does not fit into {self.config}")
            if not tensor.is_floating_point():
                raise NotAGPT2(f"weight {name} is {tensor.dtype}: quantized weights are not read")
            parameter.data.copy_(tensor)
            seen.add(f"transformer.{name}")
        if missing := own.keys() - seen:
            first = ", ".join(sorted(missing)[:3])
            raise NotAGPT2(f"weights are missing: {first} ({len(missing)} in all)")
        if not torch.equal(head.float(), self.lm_head.weight):
            raise NotAGPT2("lm_head.weight is not wte.weight: in a GPT-2 they are one table")


class NotAGPT2(ValueError):
    """A model from elsewhere computes something else than the GPT of this file."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of Hugging Face's: safetensors, torch's format, or an index that names
    several such files. Nothing in a file is executed."""
    from safetensors.torch import load_file

    if path.suffix == ".json":
        weights = {}
        for name in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            weights |= read_weights(path.with_name(name))
        return weights
    if path.suffix == ".safetensors":
        return load_file(path)
    # torch.load does not compare the checksums; older files have none
    if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"{path.name} is damaged: the checksum of {part} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def cross_entropy(x, weight, targets):
    """Mean loss in nats per token: x (n, C), weight (V, C), targets (n,) int64 -> ()."""
    return F.cross_entropy(x @ weight.T, targets)


class KVCache:
    """Keys and values of one layer for the tokens so far.

    With them a new token costs one row of attention instead of T rows.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0

    def append(self, k, v):
        """Add the keys and values of T new tokens, each (B, H, T, D).

        Returns those of all tokens so far, each (B, H, length, D).
        """
        assert self.length == 0 or k.size(2) == 1, "after the prompt, one token at a time"
        if self.length == 0:
            B, H, _, D = k.shape
            self.k = k.new_empty(B, H, self.block_size, D)
            self.v = v.new_empty(B, H, self.block_size, D)
        start = self.length
        self.length += k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


# OpenAI kept these weights as (inputs, outputs); nn.Linear wants (outputs, inputs).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Where Hugging Face's folders keep the weights; an index names several files.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What config.json must say, the usual value first, for the model to be the one of this file. What
# it leaves out is as usual, but for model_type. gelu_pytorch_tanh is gelu_new by another name.
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

# Checkpoints hold their GPTConfig; torch.load opens plain data and what is named here, and nothing
# else. Checkpoints of the original scripts pickled it as a class of __main__.
torch.serialization.add_safe_globals([GPTConfig, (GPTConfig, "__main__.GPTConfig")])
