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

import math
from dataclasses import dataclass

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
        """Tokens idx (B, T) -> the output of ln_f, (B, T, C), from which lm_head predicts.

        cache: a KVCache for each layer. While they are empty, idx is the whole prompt, then one
        token at a time. Raises ValueError if a token would be beyond block_size.
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
        rows that pad the table are never drawn. Beyond block_size it continues from the last
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
        """A GPT-2 that Hugging Face's libraries saved: a folder, or gpt2, gpt2-medium, gpt2-large,
        gpt2-xl from the Hub. Raises as lib.pretrained.read_folder."""
        from lib.pretrained import read_folder

        return read_folder(name)


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


# Checkpoints hold their GPTConfig; torch.load opens plain data and what is named here, and nothing
# else. Checkpoints of the original scripts pickled it as a class of __main__.
torch.serialization.add_safe_globals([GPTConfig, (GPTConfig, "__main__.GPTConfig")])
