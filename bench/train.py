"""A training step of ours beside the same model as the well-known scripts train it.

    python bench/train.py --size small        4 layers x 128, V 320
    python bench/train.py --size wide         4 layers x 128, V 50304: the head is all
    python bench/train.py --size 124M-256     the real model, short sequences
    python bench/train.py --size 124M         the real model, T=1024
    python bench/train.py sample              a new token at 512, with and without the cache

Each variant runs in a process of its own, in turns; of the rounds' medians the best one counts,
because other work on the machine only adds. bench/gpu.py measures a GPU.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from GPT_Modules import GPT, GPTConfig  # noqa: E402
from lib.device import choose_device, choose_precision, prepare_device  # noqa: E402
from lib.loader import TokenLoader  # noqa: E402
from lib.loss import linear_cross_entropy  # noqa: E402

SIZES = {  # shape, B and T
    "small": (GPTConfig(64, 320, 4, 4, 128), 8, 64),
    "wide": (GPTConfig(64, 50304, 4, 4, 128), 12, 64),
    "124M-256": (GPTConfig(1024, 50304), 4, 256),
    "124M": (GPTConfig(1024, 50304), 8, 1024),
}


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    bfloat16 = choose_precision(torch.device("cpu"), "auto") == "bfloat16"
    return (
        f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads, "
        f"{'with' if bfloat16 else 'without'} bfloat16; torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title} ({cpu_name()})\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# ---- one variant, in a process of its own


class PlainGPT(nn.Module):
    """The same model as nanoGPT runs it: the forward pass returns all logits and the loss."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gpt = GPT(config)

    def forward(self, idx, targets):
        logits, _ = self.gpt(idx)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class TransformersGPT(nn.Module):
    """transformers' model; it moves the labels itself."""

    def __init__(self, config: GPTConfig):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        shape = GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
        )
        self.gpt = GPT2LMHeadModel(shape)

    def forward(self, idx, targets):
        return None, self.gpt(idx, labels=idx).loss


MODELS = {"ours": GPT, "plain": PlainGPT, "transformers": TransformersGPT}


def plain_optimizer(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def plain_batches(tokens: np.ndarray, B: int, T: int, steps: int):
    stream = torch.tensor(tokens.astype(np.int64))
    for i in range(steps):
        part = stream[i * B * T : (i + 1) * B * T + 1]
        yield part[:-1].view(B, T), part[1:].view(B, T)


def loaded_batches(loader: TokenLoader, B: int, steps: int):
    for step in range(steps):
        yield from loader.batches(step, B)


def measure_step(options) -> dict[str, float]:
    """Of this process: median milliseconds of a step, seconds to the first one, peak memory."""
    config, B, T = SIZES[options.size]
    ours = options.which == "ours"
    device = choose_device("cpu")
    if ours:
        prepare_device(device)
    dtype = getattr(torch, options.dtype)
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    start = time.perf_counter()
    torch.manual_seed(1337)
    with tempfile.TemporaryDirectory() as directory:
        top = min(50257, config.vocab_size)
        length = (options.steps + 3) * B * T
        tokens = np.random.default_rng(0).integers(0, top, length, dtype=np.uint16)
        np.save(Path(directory) / "train_0.npy", tokens)
        raw_model = MODELS[options.which](config)
        if ours:
            raw_model.loss = linear_cross_entropy
            optimizer = raw_model.configure_optimizers(0.1, 6e-4)
            loader = TokenLoader(directory, "train", T, B * T)
            batches = loaded_batches(loader, B, options.steps + 1)
        else:
            optimizer = plain_optimizer(raw_model, fused=options.which == "transformers")
            batches = plain_batches(tokens, B, T, options.steps + 1)
        model = torch.compile(raw_model) if options.compile else raw_model
        parameters = list(raw_model.parameters())
        ends = []
        for x, y in batches:
            with autocast:
                _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "first": ends[0] - start,
        "ms": 1000 * statistics.median(np.diff(ends)),
        "peak": peak / 1e9,
        "tokens": B * T,
    }


# ---- the parts


def in_a_process(options, which: str, dtype: str) -> dict[str, float]:
    words = [f"--which={which}", f"--dtype={dtype}", f"--size={options.size}"]
    words += [f"--steps={options.steps}"] + ["--compile"] * options.compile
    command = [sys.executable, __file__, "step", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{which}, {dtype} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_steps(options) -> None:
    """A table of plain, transformers and ours; the last column compares them with the first."""
    bfloat16 = choose_precision(torch.device("cpu"), "auto") == "bfloat16"
    dtypes = ["float32", "bfloat16"] if bfloat16 and options.size != "small" else ["float32"]
    results = {
        (which, dtype): [] for dtype in dtypes for which in ("plain", "transformers", "ours")
    }
    for _ in range(options.rounds):
        for variant, runs in results.items():
            runs.append(in_a_process(options, *variant))
    rows = []
    base = None
    for (which, dtype), runs in results.items():
        ms = min(run["ms"] for run in runs)
        peak = min(run["peak"] for run in runs)
        first = min(run["first"] for run in runs)
        base = base or ms
        rate = 1000 * runs[0]["tokens"] / ms
        rows.append(
            [
                f"{which}, {dtype}",
                f"{rate:,.0f}",
                f"{ms:.1f}",
                f"{peak:.2f} GB",
                f"{first:.1f} s",
                f"{base / ms:.2f}x",
            ]
        )
    _, B, T = SIZES[options.size]
    head = ["", "tokens/s", "ms/step", "peak memory", "first step after", "speed"]
    table(f"Training, {options.size}, B={B}, T={T}", head, rows)


@torch.no_grad()
def compare_sampling(options) -> None:
    model = GPT(GPTConfig(vocab_size=50304)).eval()
    ends = [time.perf_counter()]
    for _ in model.stream(torch.randint(50257, (1, 16)), 1000):
        ends.append(time.perf_counter())
    tokens = np.diff(ends)
    window = torch.randint(50257, (1, 512))
    plain = []
    for _ in range(5):
        start = time.perf_counter()
        model(window)[0][:, -1].softmax(-1)
        plain.append(time.perf_counter() - start)
    rows = [["recomputed, at 512", f"{1000 * statistics.median(plain):.1f}"]]
    for at in (26, 512, 1000):
        median = statistics.median(tokens[at - 16 : at])
        rows.append([f"cached, around {at}", f"{1000 * median:.1f}"])
    table("Generating a token, 124M", ["", "ms"], rows)


def print_step(options) -> None:
    print(json.dumps(measure_step(options)))


PARTS = {"train": compare_steps, "sample": compare_sampling, "step": print_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS, nargs="?", default="train", metavar="train|sample")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--which", choices=MODELS, default="ours", help="of the part step")
    parser.add_argument("--dtype", default="float32", help="of the part step")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
