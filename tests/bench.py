"""Ratios against a plain baseline in the same run; each part prints a markdown table.

    python tests/bench.py data                        tokenizing and loading
    python tests/bench.py train --size small          a training step; also wide (4 x 128, V 50304), 124M-256, 124M
    python tests/bench.py hellaswag --size 124M       an evaluation
    python tests/bench.py sample                      a token at 512, with and without the cache
    python tests/bench.py checkpoint                  saving the state of 124M
    python tests/bench.py gpu                         all that is to be known of a GPU, on one page, in under 9 minutes

The baselines are written as the well-known scripts do it. Ours and theirs take turns; the medians
are compared, for training steps the best rounds' medians.
"""

import argparse
import itertools
import json
import math
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
import tiktoken  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data_generator  # noqa: E402
import GPT_Modules  # noqa: E402
import hellaswag  # noqa: E402
import metrics  # noqa: E402
from GPT_Modules import GPT, GPTConfig  # noqa: E402
from lib.checkpoint import remove_older, save_checkpoint  # noqa: E402
from lib.ranks import Ranks, keep_freed_memory  # noqa: E402
from lib.shards import TokenLoader  # noqa: E402
from lib.tokenizer import get_tokenizer  # noqa: E402

SIZES = {  # shape, B and T
    "small": (GPTConfig(64, 320, 4, 4, 128), 8, 64),
    "wide": (GPTConfig(64, 50304, 4, 4, 128), 12, 64),
    "124M-256": (GPTConfig(1024, 50304), 4, 256),
    "124M": (GPTConfig(1024, 50304), 8, 1024),
    "124M-gpu": (GPTConfig(1024, 50304), 64, 1024),
    "small-gpu": (GPTConfig(1024, 50304, 2, 2, 128), 4, 1024),  # to run through `gpu` quickly
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines()
            if os.path.exists("/proc/cpuinfo")
            else []
        )
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        fast = "with" if Ranks("cpu").precision("auto") == "bfloat16" else "without"
        name = (
            f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads, {fast} bfloat16"
        )
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def table(title: str, head: list[str], *rows: list) -> None:
    print(f"\n{title} ({machine()})\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def wait() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_process(part: str, **options) -> dict:
    """A part of this file in a process of its own: what it prints last, as JSON; None if it
    fails."""
    words = [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]
    done = subprocess.run([sys.executable, __file__, part, *words], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---- data ----


def documents(n: int) -> list[str]:
    """English of FineWeb-Edu's lengths: log-normal, 5,000 characters on average."""
    text = " ".join(data_generator.pydoc_documents())
    random = np.random.default_rng(0)
    lengths = np.minimum(
        np.exp(random.normal(np.log(5000) - 0.5, 1.0, n)).astype(int) + 1, len(text) // 2
    )
    starts = random.integers(0, len(text) - lengths)
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def encode_plainly(text: str) -> np.ndarray:
    """One document at a time, as fineweb.py does it."""
    encoding = get_tokenizer("gpt2")
    tokens = np.array([encoding.eot_token, *encoding.encode_ordinary(text)])
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def bench_data(options) -> None:
    texts = documents(6_000)
    size, tokens, seconds = sum(map(len, texts)) / 1e6, 0, {"plain pool": [], "ours": []}
    with (
        multiprocessing.Pool(2, get_tokenizer, ("gpt2",)) as plain,
        data_generator.concurrent.futures.ProcessPoolExecutor(
            2, None, data_generator.start_worker, ("gpt2",)
        ) as pool,
        tempfile.TemporaryDirectory() as directory,
    ):
        plain.map(encode_plainly, ["warm"] * 8)
        list(pool.map(abs, range(8)))
        for _ in range(options.rounds):
            start = time.perf_counter()
            tokens = sum(len(array) for array in plain.imap(encode_plainly, texts, chunksize=16))
            seconds["plain pool"].append(time.perf_counter() - start)
            start = time.perf_counter()
            batches = (
                (texts[i : i + data_generator.BATCH], i)
                for i in range(0, len(texts), data_generator.BATCH)
            )
            assert tokens == sum(
                len(array) for array, _ in data_generator.tokenized(batches, pool, directory, 4)
            )
            seconds["ours"].append(time.perf_counter() - start)
    medians = [statistics.median(s) for s in seconds.values()]
    rows = [
        [name, f"{tokens / s:,.0f}", f"{size / s:.1f}"]
        for name, s in zip(seconds, medians, strict=True)
    ]
    title = f"Tokenizing {size:.0f} MB in documents of {1e6 * size / len(texts):,.0f} characters on 2 processes"
    table(title, ["", "tokens/s", "MB/s"], *rows, ["ratio", f"{medians[0] / medians[1]:.2f}x", ""])

    with tempfile.TemporaryDirectory() as directory:
        tokens = np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16)
        for number in range(2):
            np.save(Path(directory) / f"edufineweb_train_{number:06d}.npy", tokens)
        rows = []
        for name in ("plain", "ours", "ours, --shuffle"):
            figures = in_a_process("load", which=name, data=directory)
            rows.append(
                [
                    name,
                    f"{figures['rate']:,.0f}",
                    f"{figures['memory']:.0f} MB",
                    f"{figures['first']:.3f} s",
                ]
            )
        table(
            "Loading, B=64, T=1024",
            ["", "tokens/s", "memory of its own", "first batch after"],
            *rows,
        )


def part_load(options) -> dict:
    """One loader in a process of its own, so that its memory can be told."""

    def own() -> float:
        return (
            int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e6
        )

    before, start, B, T = own(), time.perf_counter(), 64, 1024
    if options.which.startswith("ours"):
        shuffle = 1 if "--shuffle" in options.which else None
        loader = TokenLoader(options.data, "train", T, B, B * T, shuffle=shuffle)
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
    start, n = (
        time.perf_counter(),
        1525 * (1 if "--shuffle" in options.which else 4),
    )  # batches of a shard
    for x, y in itertools.islice(batches, n):
        assert x[0, 1] == y[0, 0]
    return {
        "rate": n * B * T / (time.perf_counter() - start),
        "memory": own() - before,
        "first": first,
    }


# ---- training ----


class PlainGPT(nn.Module):
    """The same model as the ancestors run it: the forward pass returns all logits and the loss."""

    def __init__(self, config):
        super().__init__()
        self.gpt = GPT(config)

    def forward(self, idx, targets):
        logits = self.gpt(idx)[0]
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class TransformersGPT(nn.Module):
    """transformers' model; it moves the labels itself."""

    def __init__(self, config):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        shape |= {"vocab_size": config.vocab_size, "n_positions": config.block_size}
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        self.gpt = GPT2LMHeadModel(GPT2Config(**shape, **dropout, use_cache=False))

    def forward(self, idx, targets):
        return None, self.gpt(idx, labels=idx).loss


def part_step(options) -> dict:
    """Seconds of each step, of the first, and peak memory, in this process."""
    config, B, T = SIZES[options.size]
    ours, on, dtype = options.which == "ours", device(), getattr(torch, options.dtype)
    if on.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif ours:
        keep_freed_memory()
    if options.slice:
        GPT_Modules.SLICE[on.type] = options.slice
    autocast = torch.autocast(on.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(on.type, enabled=dtype == torch.float16)
    begin = time.perf_counter()
    torch.manual_seed(1337)
    with tempfile.TemporaryDirectory() as directory:
        top = min(50257, config.vocab_size)
        tokens = np.random.default_rng(0).integers(
            0, top, (options.steps + 3) * B * T, dtype=np.uint16
        )
        np.save(Path(directory) / "train_0.npy", tokens)
        raw = {"ours": GPT, "plain": PlainGPT, "transformers": TransformersGPT}[options.which](
            config
        ).to(on)
        raw.recompute = bool(options.recompute)
        if ours:
            optimizer = raw.configure_optimizers(0.1, 6e-4)
            loader = TokenLoader(directory, "train", T, B, B * T, pin_memory=on.type == "cuda")
            batches = (batch for step in range(options.steps + 1) for batch in loader.batches(step))
        else:
            groups = [
                {
                    "params": [p for p in raw.parameters() if (p.dim() == 2) == decays],
                    "weight_decay": decays * 0.1,
                }
                for decays in (1, 0)
            ]
            fused = options.which == "transformers"
            optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=fused)
            stream = torch.tensor(tokens.astype(np.int64))
            parts = (stream[i * B * T : (i + 1) * B * T + 1] for i in range(options.steps + 1))
            batches = ((part[:-1].view(B, T), part[1:].view(B, T)) for part in parts)
        model = raw
        if options.compile:
            mode = None if options.compile == "default" else options.compile
            model = torch.compile(raw, dynamic=False if ours else None, mode=mode)
        parameters = list(raw.parameters())
        seconds, last = [], wait()
        for x, y in batches:
            x, y = x.to(on, non_blocking=ours), y.to(on, non_blocking=ours)
            with autocast:
                _, loss = model(x, y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            now = wait()
            seconds.append(now - last)
            last = now
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if on.type == "cuda" else usage
    first, ms = last - sum(seconds[1:]) - begin, 1000 * statistics.median(seconds[1:])
    return {"first": first, "ms": ms, "peak": peak / 1e9, "tokens": B * T, "loss": loss.item()}


def measure(variants: dict[str, dict], size: str, steps: int, rounds: int, dtype: str) -> None:
    """A table of training variants, {name: options of `step`}; the last column compares them with
    the first one."""
    results = {name: [] for name in variants}
    for _ in range(rounds):
        for name, options in variants.items():
            results[name].append(
                in_a_process("step", size=size, steps=steps, **{"dtype": dtype} | options)
            )
    config, _, T = SIZES[size]
    peak = metrics.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    rows, base = [], None
    for name, runs in results.items():
        if None in runs:
            rows.append([name, "failed", "", "", "", "", ""])
            continue
        ms, memory, first = (
            min(run[key] for run in runs) for key in ("ms", "peak", "first")
        )  # noise only adds
        base = base or ms
        rate = runs[0]["tokens"] / ms * 1000
        mfu = f"{rate * metrics.flops_per_token(config, T) / peak:.1%}" if peak else "-"
        rows.append(
            [
                name,
                f"{rate:,.0f}",
                f"{ms:.1f}",
                mfu,
                f"{memory:.2f} GB",
                f"{first:.1f} s",
                f"{base / ms:.2f}x",
            ]
        )
    head = ["", "tokens/s", "ms/step", "MFU", "peak memory", "first step after", "speed"]
    table(f"Training, {size}, B={SIZES[size][1]}, T={T}, SDPA: {attention_backend()}", head, *rows)


def bench_train(options) -> None:
    compiled = "default" if options.compile else None
    names = ("plain", "transformers", "ours")
    dtypes = ["float32"] + ["bfloat16"] * (
        Ranks("cpu").precision("auto") == "bfloat16" and options.size != "small"
    )
    variants = {
        f"{n}, {d}": {"which": n, "dtype": d, "compile": compiled} for d in dtypes for n in names
    }
    measure(variants, options.size, options.steps, options.rounds, "float32")


def attention_backend() -> str:
    """Which implementation scaled_dot_product_attention takes here."""
    q = torch.randn(
        1,
        2,
        64,
        64,
        device=device(),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    names = [
        event.name
        for event in profile.events()
        if event.name.startswith("aten::_scaled_dot_product_")
    ]
    return names[0].removeprefix("aten::_scaled_dot_product_") if names else "math"


# ---- evaluation, generation, saving ----

WORDS = "a man sits on the roof and starts to pull up roofing while his dog looks at him".split()


def made_up_examples(n: int) -> list[dict]:
    """Examples of HellaSwag's lengths, in words: contexts of 10 to 80, endings of 5 to 40."""
    random = np.random.default_rng(0)

    def words(low, high):
        return " ".join(random.choice(WORDS, random.integers(low, high)))

    return [
        {"ctx": words(10, 80), "endings": [words(5, 40) for _ in range(4)], "label": i % 4}
        for i in range(n)
    ]


def word_tokenizer() -> tiktoken.Encoding:
    """One token for each of WORDS, so that no vocabulary must be fetched; its head is as wide as
    GPT-2's."""
    tokens = [bytes([byte]) for byte in range(256)] + [
        f" {word}".encode() for word in sorted(set(WORDS), key=len)
    ]
    pieces = {
        piece[:end] for piece in tokens[256:] for end in range(2, len(piece) + 1)
    }  # BPE joins them bit by bit
    ranks = {token: rank for rank, token in enumerate([*tokens[:256], *sorted(pieces, key=len)])}
    return tiktoken.Encoding(
        "words", pat_str=r" ?\w+|\s", mergeable_ranks=ranks, special_tokens={"end": 50256}
    )


@torch.no_grad()
def plain_losses(model, examples, encoding) -> np.ndarray:
    """One example at a time, four padded rows, all logits, as the ancestors do it."""
    out = []
    for example in examples:
        rows = [
            (encoding.encode(example["ctx"]), encoding.encode(" " + ending))
            for ending in example["endings"]
        ]
        longest = max(len(context) + len(ending) for context, ending in rows)
        tokens, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest)
        for i, (context, ending) in enumerate(rows):
            tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device()), mask.to(device())
        logits = model(tokens)[0]
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(4, -1)
        out.append((losses * mask[:, 1:]).sum(1).tolist())
    return np.array(out)


def bench_hellaswag(options) -> None:
    config, encoding = SIZES[options.size][0], get_tokenizer("gpt2")
    model = GPT(GPTConfig(**vars(config) | {"block_size": 1024})).to(device()).eval()
    examples = made_up_examples(options.examples)
    seconds = {"one at a time": [], "ours": []}
    for _ in range(options.rounds):
        start = wait()
        reference = plain_losses(model, examples, encoding)
        seconds["one at a time"].append(wait() - start)
        start = wait()
        questions = hellaswag.prepare(
            examples, encoding, "completion", 1024, hellaswag.token_budget(device())
        )
        ours = hellaswag.losses(model, questions)
        seconds["ours"].append(wait() - start)
        padding = np.abs(ours - reference).max() / reference.max()
        assert padding < 0.01, (
            padding
        )  # the reference's softmax has the rows that pad the vocabulary
    medians = [statistics.median(s) for s in seconds.values()]
    rows = [
        [name, f"{n:.2f} s", f"{options.examples / n:.1f}"]
        for name, n in zip(seconds, medians, strict=True)
    ]
    table(f"HellaSwag, {options.size}, {options.examples} examples", ["", "time", "examples/s"], *rows,
          ["ratio", f"{medians[0] / medians[1]:.2f}x", ""])  # fmt: skip


@torch.no_grad()
def bench_sample(options) -> None:
    model = GPT(
        SIZES[options.size][0] if options.size == "small-gpu" else GPTConfig(vocab_size=50304)
    )
    model = model.to(device()).eval()
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
        [f"cached, around {at}", f"{1000 * s:.1f}"]
        for at, s in ((10, near), (512, middle), (1000, far))
    ]
    rows += [
        ["recomputed, at 512", f"{1000 * recomputed:.1f}"],
        ["ratio at 512", f"{recomputed / middle:.1f}x"],
    ]
    table("Generating a token, 124M", ["", "ms"], *rows)


def bench_checkpoint(options) -> None:
    model = GPT(GPTConfig(vocab_size=50304))
    optimizer = model.configure_optimizers(0.1, 6e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": model.config,
        "step": 0,
    }
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
            for name, save in (
                both if round_ % 2 else both[::-1]
            ):  # what the disk still has to do falls on both
                os.sync()
                start = time.perf_counter()
                save(round_)
                if (
                    round_ > 2
                ):  # before, the kernel meets the memory of its file cache for the first time
                    seconds[name].append(time.perf_counter() - start)
                if save == save_bare:  # it keeps two files as ours does, but is not timed for it
                    bare(round_ - 2).unlink(missing_ok=True)
        size = bare(round_).stat().st_size / 1e9
    medians = [statistics.median(s) for s in seconds.values()]
    rows = [[name, f"{n:.2f} s"] for name, n in zip(seconds, medians, strict=True)]
    table(
        f"Saving {size:.2f} GB", ["", "time"], *rows, ["ratio", f"{medians[1] / medians[0]:.2f}x"]
    )


# ---- a GPU, on one page ----


def part_parity(options) -> dict:
    """Loss and gradients of the compiled bf16 step against eager fp32, whose micro-batches are
    small."""
    config, B, T = SIZES[options.size]
    torch.manual_seed(1337)
    model = GPT(config).cuda()
    idx = torch.randint(50257, (B, T + 1), device="cuda")
    exact = 0.0
    for part in idx.split(max(1, B // 8)):
        loss = model(part[:, :-1], part[:, 1:])[1] * len(part) / B
        loss.backward()
        exact += loss.item()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.compile(model, dynamic=False)(
            idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        )[1]
    loss.backward()
    worst = max(
        (p.grad - reference[n]).norm().item() / reference[n].norm().item()
        for n, p in model.named_parameters()
    )
    return {"loss": abs(loss.item() - exact), "gradient": worst}


def write_random_shards(directory: Path, lengths: dict[str, int]) -> None:
    """Bytes, so that no vocabulary must be fetched."""
    directory.mkdir()
    for split, n in lengths.items():
        np.save(
            directory / f"{split}_0.npy",
            np.random.default_rng(0).integers(0, 256, n, dtype=np.uint16),
        )
    shards = [
        {"file": f"{split}_0.npy", "tokens": n, "documents": 1, "sha256": split}
        for split, n in lengths.items()
    ]
    manifest = {
        "dataset": "random",
        "name": None,
        "revision": None,
        "tokenizer": "bytes",
        "vocab_size": 257,
    }
    (directory / "manifest.json").write_text(
        json.dumps(manifest | {"shards": shards, "complete": True})
    )


def bench_resume(options) -> None:
    """Losses of a run, and of the same run stopped half-way and continued, as they stand in their
    logs."""
    config, B, T = SIZES[options.size]
    with tempfile.TemporaryDirectory() as directory:
        write_random_shards(Path(directory) / "data", {"val": B * T + 1, "train": 9 * B * T})
        words = f"--data_dir={directory}/data --batch_size={B} --seq_len={T} --total_batch_size={B * T} --max_lr=6e-4"
        words += (
            "".join(f" --{name}={value}" for name, value in vars(config).items())
            + " --warmup_steps=2"
        )
        words += f" --val_tokens={B * T} --val_every=4 --hellaswag_every=0 --sample_every=0 --save_every=4"
        logs = {}
        for name, ends in (("uninterrupted", [8]), ("stopped at 4", [4, 8])):
            for steps in ends:
                command = [
                    sys.executable,
                    str(ROOT / "train.py"),
                    *words.split(),
                    f"--log_dir={directory}/{name}",
                ]
                command += [
                    "--min_lr=6e-4",
                    f"--max_steps={steps}",
                ]  # constant, so that both have the same rates
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(done.stderr[-2000:], file=sys.stderr)
            logs[name] = metrics.read_log(Path(directory) / name).get("train", [])
    rows = [[name, *(f"{loss:.4f}" for _, loss in points)] for name, points in logs.items()]
    table(f"Resuming, {options.size}", ["train loss at step", *map(str, range(8))], *rows)


def bench_gpu(options) -> None:
    """The page: every figure that README owes a GPU."""
    start = time.time()
    size = "small-gpu" if options.size == "small-gpu" else "124M-gpu"
    figures = in_a_process("parity", size=size) or {"loss": math.nan, "gradient": math.nan}
    rows = [
        ["loss", f"{figures['loss']:.2e}", "1e-2"],
        ["worst gradient", f"{figures['gradient']:.2e}", "5e-2"],
    ]
    table(f"Compiled bf16 against eager fp32, {size}", ["", "difference", "bound"], *rows)
    compiled = {"which": "ours", "compile": "default"}
    variants = {
        "plain, eager": {"which": "plain"},
        "plain, compiled": {"which": "plain", "compile": "default"},
        "ours, compiled": compiled,
        "ours, slices of 2^29 logits": compiled | {"slice": 2**29},
        "ours, slices of 2^27 logits": compiled | {"slice": 2**27},
        "ours, --recompute": compiled | {"recompute": 1},
        "ours, --dtype float16": compiled | {"dtype": "float16"},
        "ours, max-autotune-no-cudagraphs": {
            "which": "ours",
            "compile": "max-autotune-no-cudagraphs",
        },
    }
    measure(variants, size, options.steps, 1, "bfloat16")
    options.examples, options.rounds = 10_042 if size == "124M-gpu" else 100, 1
    examples_size, options.size = options.size, size
    evaluate_hellaswag(options)
    bench_sample(options)
    bench_resume(options)
    options.size = examples_size
    print(f"\n{time.time() - start:.0f} s in all")


def evaluate_hellaswag(options) -> None:
    """All examples under bf16, as training does it; without the baseline, which takes minutes."""
    model = GPT(SIZES[options.size][0]).to(device()).eval()
    examples, encoding = made_up_examples(options.examples), word_tokenizer()
    start = wait()
    budget = hellaswag.token_budget(device())
    questions = hellaswag.prepare(examples, encoding, "completion", model.config.block_size, budget)
    prepared = wait()
    with torch.autocast(device().type, dtype=torch.bfloat16):
        hellaswag.losses(model, questions)
    rows = [
        ["tokenizing, once in a run", f"{prepared - start:.1f} s"],
        ["scoring", f"{wait() - prepared:.1f} s"],
    ]
    table(
        f"HellaSwag, {len(examples):,} examples, {len(questions.batches)} batches",
        ["", "time"],
        *rows,
    )


def main() -> None:
    parts = {
        name: function
        for name, function in globals().items()
        if name.startswith(("bench_", "part_"))
    }
    choices = {name.partition("_")[2]: function for name, function in parts.items()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benchmarks = ",".join(
        name.removeprefix("bench_") for name in parts if name.startswith("bench_")
    )
    parser.add_argument(
        "part", choices=choices, metavar=f"{{{benchmarks}}}"
    )  # the other parts run below these
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--compile", nargs="?", const="default", help="a mode of torch.compile")
    parser.add_argument("--data", default=None, help="directory to write to")
    for name in ("--which", "--dtype", "--slice", "--recompute"):
        parser.add_argument(
            name, help=argparse.SUPPRESS, type=str if name in ("--which", "--dtype") else int
        )
    options = parser.parse_args()
    if "TIKTOKEN_CACHE_DIR" not in os.environ and options.part in ("data", "hellaswag"):
        import conftest

        conftest.pytest_configure(None)
    figures = choices[options.part](options)
    if figures:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
