"""Everything that is to be known of a GPU, on one page, in under 6 minutes.

    python bench/gpu.py                       prints the page as it comes, and appends it to gpu.md
    python bench/gpu.py --only parity ours    some parts of it
    python bench/gpu.py --size small          a tiny model, to see that everything runs

It needs no network. Each part is a process of its own with a time limit of its own, so what fails
or hangs costs its own lines only, and a page that is cut short still has the others. Parts compile
at the same time, as far as the GPU's memory goes, and take turns for what is timed.
"""

import argparse
import contextlib
import fcntl
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import hellaswag  # noqa: E402
from GPT_Modules import GPT, GPTConfig  # noqa: E402
from lib.device import prepare_device, recompute_blocks  # noqa: E402
from lib.log import read_log  # noqa: E402
from lib.loss import linear_cross_entropy  # noqa: E402
from lib.muon import Muon, muon_groups  # noqa: E402
from lib.shards import Manifest, ShardEntry, write_manifest  # noqa: E402
from lib.speed import flops_per_token, peak_flops  # noqa: E402

WHOLE = 350  # seconds for all parts together
CUDA = torch.device("cuda", 0)
SIZES = {  # shape, B and T
    "124M": (GPTConfig(1024, 50304), 64, 1024),
    "small": (GPTConfig(1024, 50304, 2, 2, 128), 4, 1024),
}


@contextlib.contextmanager
def turn(options):
    """Only one part at a time measures; the others wait or compile meanwhile."""
    with open(options.lock, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def wait() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


# ---- a training step


class PlainGPT(nn.Module):
    """The same model as nanoGPT runs it: the forward pass returns all logits and the loss."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gpt = GPT(config)

    def forward(self, idx, targets):
        logits, _ = self.gpt(idx)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


@dataclass(frozen=True)
class Variant:
    """How a step is made."""

    plain: bool = False
    compile: bool = True
    recompute: bool = False
    muon: bool = False
    ddp: bool = False
    dtype: torch.dtype = torch.bfloat16


def measure_steps(options, variant: Variant) -> None:
    """Median and minimum of 20 steps of one micro-batch, with the optimizer."""
    config, B, T = SIZES[options.size]
    prepare_device(CUDA)
    torch.manual_seed(1337)
    with CUDA:
        raw_model = PlainGPT(config) if variant.plain else GPT(config)
    gpt = raw_model.gpt if variant.plain else raw_model
    gpt.loss = linear_cross_entropy
    if variant.recompute:
        recompute_blocks(gpt)
    if variant.muon:
        optimizer = Muon(muon_groups(gpt, 0.1), 1.8e-3)
    else:
        optimizer = gpt.configure_optimizers(0.1, 6e-4)
    model = torch.compile(raw_model, dynamic=False) if variant.compile else raw_model
    if variant.ddp:
        torch.distributed.init_process_group(
            "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler("cuda", enabled=variant.dtype == torch.float16)
    parameters = list(raw_model.parameters())
    batches = torch.randint(50257, (4, B, T + 1), device=CUDA)

    def step(i: int) -> float:
        batch = batches[i % 4]
        with torch.autocast("cuda", dtype=variant.dtype):
            _, loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return norm.item()

    step(0)
    norms = []
    seconds = []
    with turn(options):
        for i in range(3):
            step(i)
        for i in range(20):
            start = wait()
            norms.append(step(i))
            seconds.append(wait() - start)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    rate = B * T / statistics.median(seconds)
    peak = peak_flops(torch.cuda.get_device_name())
    mfu = f"{rate * flops_per_token(config, T) / peak:.1%} MFU, " if peak else ""
    print(
        f"{rate:,.0f} tokens/s, {mfu}{1000 * statistics.median(seconds):.1f} ms "
        f"(at least {1000 * min(seconds):.1f}), {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
        f"{skipped} of {len(norms)} updates skipped"
    )


def measure_parity(options) -> None:
    """Loss and gradients of the compiled step in bfloat16 against F.cross_entropy of the eager one
    in float32, whose micro-batches are small."""
    config, B, T = SIZES[options.size]
    torch.manual_seed(1337)
    with CUDA:
        model = GPT(config)
    idx = torch.randint(50257, (B, T + 1), device=CUDA)
    exact = 0.0
    for part in idx.split(max(1, B // 8)):
        _, loss = model(part[:, :-1], part[:, 1:])
        loss = loss * len(part) / B
        loss.backward()
        exact += loss.item()
    reference = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.loss = linear_cross_entropy
    compiled = torch.compile(model, dynamic=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, loss = compiled(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    loss.backward()
    pairs = zip(model.parameters(), reference, strict=True)
    errors = [(parameter.grad - true).norm() / true.norm() for parameter, true in pairs]
    worst = torch.stack(errors).max().item()  # nan if one is
    difference = abs(loss.item() - exact)
    well = difference < 1e-2 and worst < 5e-2
    print(
        f"{'well' if well else 'WRONG'}: loss differs by {difference:.1e} (bound 1e-2), the worst "
        f"gradient by {worst:.1e} of its norm (bound 5e-2)"
    )


# ---- evaluation


class Words:
    """A tokenizer of one token per word: no vocabulary must be fetched."""

    eot_token = 50256
    n_vocab = 50257

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


@torch.no_grad()
def measure_evaluation(options) -> None:
    """HellaSwag's validation set in length and number, made up; and sampling."""
    config, B, _ = SIZES[options.size]
    with CUDA:
        model = GPT(config).eval()
    random = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return " ".join(map(str, random.integers(0, 50000, random.integers(low, high))))

    n = 10_042 if B == 64 else 100
    examples = [
        {"ctx": words(10, 80), "endings": [words(5, 40) for _ in range(4)], "label": 0}
        for _ in range(n)
    ]
    batch = hellaswag.tokens_in_a_batch(CUDA)
    questions = hellaswag.prepare(examples, Words(), "completion", config.block_size, batch)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hellaswag.ending_losses(model, questions, questions.batches[:2])
        with turn(options):
            start = wait()
            hellaswag.ending_losses(model, questions, questions.batches)
            scoring = wait() - start
            ends = []
            prompt = torch.zeros(1, 16, dtype=torch.long, device=CUDA)
            for _ in model.stream(prompt, 200):
                ends.append(wait())
    a_token = statistics.median(np.diff(ends))
    print(f"HellaSwag, {n:,} examples: {scoring:.1f} s; a sampled token: {1000 * a_token:.1f} ms")


# ---- the run itself


def write_random_shards(directory: Path, lengths: dict[str, int]) -> None:
    """Bytes, so that no vocabulary must be fetched. lengths: tokens of each split."""
    directory.mkdir()
    entries = []
    for split, n in lengths.items():
        name = f"edufineweb_{split}_{len(entries):06d}.npy"
        np.save(directory / name, np.random.default_rng(0).integers(0, 256, n, dtype=np.uint16))
        entries.append(ShardEntry(file=name, tokens=n, documents=1, sha256=split))
    manifest = Manifest(
        dataset="random", name=None, revision=None, split="train", text_field="text",
        tokenizer="bytes", vocab_size=257, shard_size=max(lengths.values()), shards=entries,
        skipped=0, position=None, complete=True,
    )  # fmt: skip
    write_manifest(directory, manifest)


def run_to_its_end(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"train.py: {done.stderr}")


def measure_run(options) -> None:
    """train.py: 12 steps of one micro-batch; the same ended by SIGTERM, and continued."""
    config, B, T = SIZES[options.size]
    steps = 12
    with tempfile.TemporaryDirectory() as directory:
        tokens = {"val": B * T + 1, "train": (steps + 1) * B * T}
        write_random_shards(Path(directory) / "data", tokens)
        flags = vars(config) | {
            "data_dir": f"{directory}/data", "batch_size": B, "seq_len": T,
            "total_batch_size": B * T, "max_steps": steps, "warmup_steps": 2, "val_every": 6,
            "val_tokens": B * T, "hellaswag_every": 0, "sample_every": 0, "save_every": 6,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, "-u", str(ROOT / "train.py"), *words]
        whole = Path(directory) / "whole"
        cut = Path(directory) / "cut"
        with turn(options):
            run_to_its_end([*command, f"--log_dir={whole}"])
            with subprocess.Popen(
                [*command, f"--log_dir={cut}"], stdout=subprocess.PIPE, text=True
            ) as process:
                while not process.stdout.readline().startswith("step     0 | loss"):
                    assert process.poll() is None, "train.py ended before its first step"
                process.send_signal(signal.SIGTERM)
                start = time.perf_counter()
                process.communicate()
                left = time.perf_counter() - start
            run_to_its_end([*command, f"--log_dir={cut}"])
        log = read_log(whole)
        losses = dict(log["train"])
        again = dict(read_log(cut)["train"])
    rates = [rate for step, rate in log["tok_s"] if step > 1]
    apart = max(abs(again[step] - loss) / loss for step, loss in losses.items())
    print(
        f"train.py, one micro-batch a step: {statistics.median(rates):,.0f} tokens/s; validation "
        f"of {B * T:,} tokens {log['eval_s'][-1][1]:.1f} s; a save {log['save_s'][-1][1]:.1f} s; "
        f"SIGTERM: exit code {process.returncode} after {left:.1f} s; continued, its losses are "
        f"within {apart:.0e} of the uninterrupted run's"
    )


# ---- the page


def steps(**how) -> Callable:
    return lambda options: measure_steps(options, Variant(**how))


@dataclass(frozen=True)
class Part:
    title: str
    measure: Callable
    seconds: int  # after so many it is ended
    gigabytes: int  # of the GPU's memory at --size 124M, at most


PARTS = {
    "parity": Part("parity", measure_parity, 150, 30),
    "ours": Part("ours", steps(), 150, 28),
    "run": Part("a run", measure_run, 240, 28),
    "plain": Part("plain, compiled", steps(plain=True), 150, 50),
    "eager": Part("plain, eager", steps(plain=True, compile=False), 90, 76),
    "recompute": Part("--recompute", steps(recompute=True), 150, 9),
    "muon": Part("Muon", steps(muon=True), 150, 29),
    "float16": Part("--dtype float16", steps(dtype=torch.float16), 150, 28),
    "ddp": Part("DistributedDataParallel", steps(ddp=True), 150, 29),
    "evaluation": Part("evaluation", measure_evaluation, 90, 8),
}


def start_part(name: str, options) -> subprocess.Popen:
    command = [sys.executable, __file__, "--part", name, "--size", options.size]
    command += ["--lock", options.lock]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a session of its own, so that a process that it started ends with it
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def outcome(process: subprocess.Popen, timed_out: bool) -> str:
    if timed_out:
        os.killpg(process.pid, signal.SIGKILL)
    output, errors = process.communicate()
    if timed_out:
        return "took too long"
    if process.returncode:
        return f"failed: {(errors.strip().splitlines() or ['no message'])[-1]}"
    return output.strip()


def write_page(options) -> None:
    """Run the parts, as many at a time as the GPU's memory holds, and write what each has found."""
    begin = time.monotonic()
    free, _ = torch.cuda.mem_get_info(CUDA)
    free = free / 1e9 - 1
    waiting = list(options.only or PARTS)
    running = {}  # name -> (process, when it is ended)

    def write(line: str) -> None:
        print(line, flush=True)
        with open(options.out, "a") as file:
            file.write(line + "\n")

    _, B, T = SIZES[options.size]
    write(
        f"\n{torch.cuda.get_device_name()}; torch {torch.__version__}, Python "
        f"{platform.python_version()}; {options.size}, B={B}, T={T}\n\n| part | found |\n|---|---|"
    )
    while waiting or running:
        taken = sum(PARTS[name].gigabytes for name in running)
        for name in list(waiting):
            part = PARTS[name]
            alone = not running
            if (taken + part.gigabytes <= free or alone) and len(running) < os.cpu_count() // 2:
                waiting.remove(name)
                taken += part.gigabytes
                ends = min(time.monotonic() + part.seconds, begin + WHOLE)
                running[name] = (start_part(name, options), ends)
        time.sleep(0.2)
        for name, (process, ends) in list(running.items()):
            timed_out = time.monotonic() > ends
            if timed_out or process.poll() is not None:
                write(f"| {PARTS[name].title} | {outcome(process, timed_out)} |")
                del running[name]
    write(f"\n{time.monotonic() - begin:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts (default: all)")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--out", default="gpu.md", help="file to append the page to")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part].measure(options)
        return
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")
    with tempfile.TemporaryDirectory() as directory:
        options.lock = f"{directory}/turn"
        write_page(options)


if __name__ == "__main__":
    main()
