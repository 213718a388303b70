"""Ratios against a plain baseline in the same run; each part prints a markdown table.

    python tests/bench.py data                        tokenizing and loading
    python tests/bench.py train --size demo           a training step; --size wide (4 x 128, 50304 words) or 124M
    python tests/bench.py hellaswag --size 124M       an evaluation
    python tests/bench.py sample                      a token at 512, with and without the cache
    python tests/bench.py checkpoint                  saving the state of 124M
    python tests/bench.py parity                      on a GPU: compiled bf16 against eager fp32 at the full shape

The baselines are written as the well-known scripts do it. Ours and theirs take turns; the medians are compared, for
training steps the best rounds' medians.
On a CPU the step of --size wide gains from MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647: --allocator sets them
for ours only, as the README advises.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data_generator  # noqa: E402
import hellaswag  # noqa: E402
import metrics  # noqa: E402
from GPT_Modules import GPT, GPTConfig  # noqa: E402
from lib.checkpoint import remove_older, save_checkpoint  # noqa: E402
from lib.shards import TokenLoader  # noqa: E402
from lib.tokenizer import get_tokenizer  # noqa: E402

SIZES = {  # shape, B and T on a CPU
    "demo": (GPTConfig(64, 320, 4, 4, 128), 8, 64),
    "wide": (GPTConfig(64, 50304, 4, 4, 128), 12, 64),
    "124M": (GPTConfig(1024, 50304), 8, 1024),
}
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def table(title: str, head: list[str], *rows: list) -> None:
    print(f"\n{title} ({machine()})\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def wait() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- data ----


def encode_plainly(text: str) -> np.ndarray:
    """One document at a time, as fineweb.py does it."""
    encoding = get_tokenizer("gpt2")
    tokens = np.array([encoding.eot_token, *encoding.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def bench_data(options) -> None:
    texts = (data_generator.pydoc_documents() * 9)[:24_000]
    size, tokens, seconds = sum(map(len, texts)) / 1e6, 0, {"plain pool": [], "ours": []}
    with (
        multiprocessing.Pool(2, get_tokenizer, ("gpt2",)) as plain,
        data_generator.concurrent.futures.ProcessPoolExecutor(2, None, data_generator.start_worker, ("gpt2",)) as pool,
    ):
        plain.map(encode_plainly, ["warm"] * 8)
        list(pool.map(abs, range(8)))
        for _ in range(3):
            start = time.perf_counter()
            tokens = sum(len(array) for array in plain.imap(encode_plainly, texts, chunksize=16))
            seconds["plain pool"].append(time.perf_counter() - start)
            start = time.perf_counter()
            batches = ((texts[i : i + data_generator.BATCH], i) for i in range(0, len(texts), data_generator.BATCH))
            assert tokens == sum(len(array) for array, _, _ in data_generator.tokenized(batches, pool, 4))
            seconds["ours"].append(time.perf_counter() - start)
    rows = [
        [name, f"{tokens / statistics.median(s):,.0f}", f"{size / statistics.median(s):.1f}"]
        for name, s in seconds.items()
    ]
    table(f"Tokenizing {size:.0f} MB on 2 processes", ["", "tokens/s", "MB/s"], *rows)

    with tempfile.TemporaryDirectory() as directory:
        tokens = np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16)
        for number in range(2):
            np.save(Path(directory) / f"edufineweb_train_{number:06d}.npy", tokens)
        rows = []
        for name in ("plain", "ours"):
            done = subprocess.run(
                [sys.executable, __file__, "load", "--which", name, "--data", directory], capture_output=True, text=True
            )
            figures = json.loads(done.stdout)
            rows.append([name, f"{figures['rate']:,.0f}", f"{figures['memory']:.0f} MB", f"{figures['first']:.3f} s"])
        table("Loading, B=64, T=1024", ["", "tokens/s", "memory of its own", "first batch after"], *rows)


def bench_load(options) -> None:
    """One loader in a process of its own, so that its memory can be told."""

    def own() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1000

    before, start, B, T = own(), time.perf_counter(), 64, 1024
    if options.which == "ours":
        loader = TokenLoader(options.data, "train", T, B, B * T)
        batches = (batch for step in itertools.count() for batch in loader.batches(step))
    else:

        def plain():
            for path in itertools.cycle(sorted(Path(options.data).glob("*.npy"))):
                tokens = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
                for i in range(0, len(tokens) - B * T - 1, B * T):
                    part = tokens[i : i + B * T + 1]
                    yield part[:-1].view(B, T), part[1:].view(B, T)

        batches = plain()
    next(batches)
    first = time.perf_counter() - start
    start, n = time.perf_counter(), 4 * 1525  # four shards
    for x, y in itertools.islice(batches, n):
        assert x[0, 1] == y[0, 0]
    print(json.dumps({"rate": n * B * T / (time.perf_counter() - start), "memory": own() - before, "first": first}))


# ---- training ----


class PlainGPT(nn.Module):
    """The same model as the ancestors run it: the forward pass returns all logits and the loss."""

    def __init__(self, config):
        super().__init__()
        self.gpt = GPT(config)

    def forward(self, idx, targets):
        logits = self.gpt(idx)[0]
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def train_steps(which: str, size: str, steps: int, compiled: bool) -> dict:
    """Seconds of each step, of the first, and peak memory, in this process."""
    config, B, T = SIZES[size]
    on = device()
    if on.type == "cuda":
        B = 64 if size == "124M" else B
        torch.set_float32_matmul_precision("high")
    autocast = torch.autocast(on.type, dtype=torch.bfloat16, enabled=on.type == "cuda")
    begin = time.perf_counter()
    torch.manual_seed(1337)
    with tempfile.TemporaryDirectory() as directory:
        tokens = np.random.default_rng(0).integers(
            0, min(50257, config.vocab_size), (steps + 3) * B * T, dtype=np.uint16
        )
        np.save(Path(directory) / "train_0.npy", tokens)
        if which == "ours":
            raw = GPT(config).to(on)
            optimizer = raw.configure_optimizers(0.1, 6e-4)
            loader = TokenLoader(directory, "train", T, B, B * T)
            batches = (batch for step in range(steps + 1) for batch in loader.batches(step))
            model = torch.compile(raw, dynamic=False) if compiled else raw
            if on.type == "cpu":
                torch.empty(31 * 2**18)  # as train.py: malloc keeps what it has
        else:
            raw = PlainGPT(config).to(on)
            groups = [
                {"params": [p for p in raw.parameters() if (p.dim() == 2) == decays], "weight_decay": decays * 0.1}
                for decays in (1, 0)
            ]
            optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=False)
            stream = torch.tensor(tokens.astype(np.int64))
            parts = (stream[i * B * T : (i + 1) * B * T + 1] for i in range(steps + 1))
            batches = ((part[:-1].view(B, T), part[1:].view(B, T)) for part in parts)
            model = torch.compile(raw) if compiled else raw
        parameters = list(raw.parameters())
        seconds, last = [], wait()
        for x, y in batches:
            x, y = x.to(on, non_blocking=which == "ours"), y.to(on, non_blocking=which == "ours")
            with autocast:
                _, loss = model(x, y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            norm.item()
            optimizer.step()
            optimizer.zero_grad()
            now = wait()
            seconds.append(now - last)
            last = now
    peak = (
        torch.cuda.max_memory_allocated()
        if on.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    first, ms = last - sum(seconds[1:]) - begin, 1000 * statistics.median(seconds[1:])
    return {"first": first, "ms": ms, "peak": peak / 1e9, "tokens": B * T, "loss": loss.item()}


def bench_train(options) -> None:
    rounds = []
    for _ in range(options.rounds):
        for which in ("plain", "ours"):
            command = [
                sys.executable,
                __file__,
                "step",
                "--which",
                which,
                "--size",
                options.size,
                "--steps",
                str(options.steps),
            ]
            command += ["--compile"] * options.compile
            environment = os.environ | (ALLOCATOR if options.allocator and which == "ours" else {})
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            rounds.append({"which": which} | json.loads(done.stdout.splitlines()[-1]))
    config = SIZES[options.size][0]
    flops = metrics.flops_per_token(config, config.block_size)
    peak = metrics.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    rows, best = [], {}
    for which in ("plain", "ours"):
        mine = [r for r in rounds if r["which"] == which]
        ms, memory, first = (min(r[key] for r in mine) for key in ("ms", "peak", "first"))  # noise only adds
        rate = mine[0]["tokens"] / ms * 1000
        mfu = f"{rate * flops / peak:.1%}" if peak else "-"
        best[which] = ms, memory
        rows.append([which, f"{rate:,.0f}", f"{ms:.1f}", mfu, f"{memory:.2f} GB", f"{first:.1f} s"])
    speedup, share = best["plain"][0] / best["ours"][0], best["ours"][1] / best["plain"][1]
    rows.append(["ratio", f"{speedup:.2f}x", "", "", f"{share:.2f}x", ""])
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    title = (
        f"Training, {options.size}, {precision}, {'compiled' if options.compile else 'eager'}, SDPA:"
        f" {attention_backend()}"
    )
    title += ", with the allocator variables for ours" if options.allocator else ""
    table(title, ["", "tokens/s", "ms/step", "MFU", "peak memory", "first step after"], *rows)


def attention_backend() -> str:
    """Which implementation scaled_dot_product_attention takes here."""
    q = torch.randn(1, 2, 64, 64, device=device(), dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    names = [event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product_")]
    return names[0].removeprefix("aten::_scaled_dot_product_") if names else "math"


# ---- evaluation, generation, saving, parity ----


@torch.no_grad()
def plain_losses(model, examples, encoding) -> np.ndarray:
    """One example at a time, four padded rows, all logits, as the ancestors do it."""
    out = []
    for example in examples:
        rows = [(encoding.encode(example["ctx"]), encoding.encode(" " + ending)) for ending in example["endings"]]
        longest = max(len(context) + len(ending) for context, ending in rows)
        tokens, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest)
        for i, (context, ending) in enumerate(rows):
            tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device()), mask.to(device())
        logits = model(tokens)[0]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        out.append((losses * mask[:, 1:]).sum(1).tolist())
    return np.array(out)


def bench_hellaswag(options) -> None:
    from conftest import write_hellaswag

    model, encoding = GPT(SIZES[options.size][0]).to(device()).eval(), get_tokenizer("gpt2")
    model = GPT(GPTConfig(**vars(model.config) | {"block_size": 1024})).to(device()).eval()
    examples = write_hellaswag(os.devnull, options.examples)
    seconds = {"one at a time": [], "ours": []}
    for _ in range(options.rounds):
        start = wait()
        reference = plain_losses(model, examples, encoding)
        seconds["one at a time"].append(wait() - start)
        start = wait()
        questions = hellaswag.prepare(examples, encoding, "completion", 1024, hellaswag.token_budget(device()))
        ours = hellaswag.losses(model, questions)
        seconds["ours"].append(wait() - start)
        padding = np.abs(ours - reference).max() / reference.max()
        assert padding < 0.01, padding  # the reference's softmax has the rows that pad the vocabulary
    medians = [statistics.median(s) for s in seconds.values()]
    rows = [[name, f"{n:.2f} s", f"{options.examples / n:.1f}"] for name, n in zip(seconds, medians, strict=True)]
    table(f"HellaSwag, {options.size}, {options.examples} examples", ["", "time", "examples/s"], *rows,
          ["ratio", f"{medians[0] / medians[1]:.2f}x", ""])  # fmt: skip


@torch.no_grad()
def bench_sample(options) -> None:
    model = GPT(GPTConfig(vocab_size=50304)).to(device()).eval()
    idx = torch.randint(50257, (1, 16), device=device())
    stamps = [wait()]
    for _ in model.stream(idx, 1000):
        stamps.append(wait())
    steps = np.diff(stamps)
    near, middle, far = (statistics.median(steps[a - 16 : a]) for a in (26, 512, 1000))
    window, plain = torch.randint(50257, (1, 512), device=device()), []
    for _ in range(5):
        start = wait()
        model(window)[0][:, -1].softmax(-1)
        plain.append(wait() - start)
    recomputed = statistics.median(plain)
    rows = [
        ["cached, around 10", f"{1000 * near:.1f}"],
        ["cached, around 512", f"{1000 * middle:.1f}"],
        ["cached, around 1000", f"{1000 * far:.1f}"],
    ]
    rows += [["recomputed, at 512", f"{1000 * recomputed:.1f}"], ["ratio at 512", f"{recomputed / middle:.1f}x"]]
    table("Generating a token, 124M", ["", "ms"], *rows)


def bench_checkpoint(options) -> None:
    model = GPT(GPTConfig(vocab_size=50304))
    optimizer = model.configure_optimizers(0.1, 6e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": model.config, "step": 0}
    seconds = {"bare torch.save + fsync": [], "ours, verified": []}
    with tempfile.TemporaryDirectory(dir=options.data) as directory:

        def bare(round_):
            return Path(directory) / f"bare_{round_}.pt"

        def save_bare(round_):
            with open(bare(round_), "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())

        def save_ours(round_):
            save_checkpoint(directory, content | {"step": round_})
            remove_older(directory, round_, 0)

        both = [("bare torch.save + fsync", save_bare), ("ours, verified", save_ours)]
        for round_ in range(2 * options.rounds + 3):
            for name, save in both if round_ % 2 else both[::-1]:  # what the disk still has to do falls on both
                os.sync()
                start = time.perf_counter()
                save(round_)
                if round_ > 2:  # before, the kernel meets the memory of its file cache for the first time
                    seconds[name].append(time.perf_counter() - start)
                if save == save_bare:  # it keeps two files as ours does, but is not timed for it
                    bare(round_ - 2).unlink(missing_ok=True)
        size = bare(round_).stat().st_size / 1e9
    medians = [statistics.median(s) for s in seconds.values()]
    rows = [[name, f"{n:.2f} s"] for name, n in zip(seconds, medians, strict=True)]
    table(f"Saving {size:.2f} GB", ["", "time"], *rows, ["ratio", f"{medians[1] / medians[0]:.2f}x"])


def bench_parity(options) -> None:
    """Loss and gradients of the compiled bf16 step against eager fp32, whose micro-batches are small."""
    if device().type != "cuda":
        sys.exit("parity is a check for a GPU: at B=64, T=1024 the logits pass 2^31 elements")
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304)).cuda()
    idx = torch.randint(50257, (64, 1025), device="cuda")
    exact = 0.0
    for part in idx.split(8):
        loss = model(part[:, :-1], part[:, 1:])[1] / 8
        loss.backward()
        exact += loss.item()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(model, dynamic=False)(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
    loss.backward()
    worst = max((p.grad - reference[n]).norm().item() / reference[n].norm().item() for n, p in model.named_parameters())
    off = abs(loss.item() - exact)
    rows = [["loss", f"{off:.2e}", "1e-2"], ["worst gradient, relative", f"{worst:.2e}", "5e-2"]]
    table("Compiled bf16 against eager fp32, B=64, T=1024", ["", "difference", "bound"], *rows)
    sys.exit(0 if off < 1e-2 and worst < 5e-2 else 1)


def main() -> None:
    parts = {name.removeprefix("bench_"): part for name, part in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "step"])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--allocator", action="store_true")
    parser.add_argument("--data", default=None, help="directory to write to")
    parser.add_argument("--which", choices=["plain", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        import conftest

        conftest.pytest_configure(None)
    if options.part == "step":
        print(json.dumps(train_steps(options.which, options.size, options.steps, options.compile)))
    else:
        parts[options.part](options)


if __name__ == "__main__":
    main()
