"""Which recipe reaches the final loss of GPT-2's own (A) in the fewest tokens? An experiment on two
CPU cores.

    python bench/recipe.py /tmp/recipe      what is missing in bench/recipe.json, then the picture

A GPT of 4 layers x 128 learns bytes of Python sources (of the standard library and the installed
packages; each is read once) in 500 steps of 4,096 tokens by one of four recipes:

    A  AdamW, cosine to a tenth of the learning rate: GPT-2's, as train.py has it by default
    B  AdamW, constant, and in the second half linear to zero
    C  Muon for the matrices of the blocks, c_attn as one matrix; the schedule is B's
    D  Muon, with q, k and v as three matrices; the schedule is B's

Each has its own learning rate, the best of a grid that goes on until the best lies inside; then
three other seeds at that rate; then the best recipe in fewer steps, each run with its own decay.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "recipe.json"
PICTURE = ROOT / "bench" / "recipe.png"
STEPS = 500
TOKENS_PER_STEP = 4096
WARMUP = 25
GRID = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SEEDS = (1, 2, 3)
# share of A's steps: which seeds
SHARES = {0.25: SEEDS, 0.15: SEEDS, 0.5: SEEDS, 0.66: SEEDS[:1], 0.8: SEEDS[:1]}
NAMES = {
    "A": "AdamW, cosine",
    "B": "AdamW, linear to 0",
    "C": "Muon, QKV whole",
    "D": "Muon, q, k, v apart",
}
LINEAR = ["--schedule=linear", "--min_lr=0"]
ARMS = {
    "A": [],
    "B": LINEAR,
    "C": [*LINEAR, "--optimizer=muon"],
    "D": [*LINEAR, "--optimizer=muon"],
}
MODEL = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--seq_len=128", "--batch_size=16"]
MODEL += ["--total_batch_size=4096"]


def write_data(directory: Path) -> None:
    """Shards of bytes: sources of the installed packages, shuffled, none longer than 50 KB, each
    once."""
    import data_generator

    sources = sorted(Path(os.__file__).parent.rglob("*.py"))
    sources += sorted(Path(sys.prefix).glob("lib/python3*/site-packages/**/*.py"))
    texts = {}
    for path in sources:
        content = path.read_bytes()
        if 500 < len(content) < 50_000:
            texts[hashlib.sha256(content).hexdigest()] = content.decode(errors="replace")
    texts = list(texts.values())
    random.Random(1337).shuffle(texts)
    directory.mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:6000]]
    (directory / "texts.jsonl").write_text("".join(lines))
    words = [f"--dataset={directory / 'texts.jsonl'}", f"--data_dir={directory / 'data'}"]
    words += ["--tokenizer=bytes", "--shard_size=1000000", "--max_tokens=12000000"]
    assert data_generator.main(words) == 0


def run(arm: str, lr: float, seed: int, steps: int, directory: Path) -> dict:
    """One finished run, in a process of its own with one thread."""
    log_dir = directory / f"{arm}-{lr:g}-{seed}-{steps}"
    words = [*MODEL, f"--max_steps={steps}", f"--warmup_steps={WARMUP}", f"--seed={seed}"]
    words += [f"--max_lr={lr}", f"--min_lr={lr / 10}", *ARMS[arm]]
    words += [f"--data_dir={directory / 'data'}", f"--log_dir={log_dir}"]
    words += [f"--val_every={steps}", "--val_tokens=524288", "--hellaswag_every=0"]
    words += ["--sample_every=0", "--save_every=0", "--device=cpu", "--dtype=float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "one", arm, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    losses = [float(value) for _, stream, value in log if stream == "val"]
    # one thread: the wall-clock of a machine that does nothing else
    cpu_seconds = float(done.stdout.splitlines()[-1])
    return {
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "val_loss": losses[-1],
        "cpu_seconds": round(cpu_seconds),
    }


def one(arm: str, *words: str) -> int:
    """The run itself. C differs from D in one thing: q, k and v are orthogonalised together."""
    import lib.muon
    import train

    apart = lib.muon.orthogonalize

    def together(matrices):
        n, C, _ = matrices.shape
        if n != 3 * 4:
            return apart(matrices)
        return 3**0.5 * apart(matrices.view(4, 3 * C, C)).view(n, C, C)

    if arm == "C":
        lib.muon.orthogonalize = together
    code = train.main(list(words))
    print(time.process_time())
    return code


class Experiment:
    def __init__(self, directory: Path):
        self.directory = directory
        self.runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []

    def complete(self, wanted: list[tuple]) -> None:
        """Run what is missing of (arm, lr, seed, steps), two at a time."""
        there = {(r["arm"], r["lr"], r["seed"], r["steps"]) for r in self.runs}
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(
                lambda job: run(*job, self.directory), [job for job in wanted if job not in there]
            ):
                self.runs.append(result)
                print(result, flush=True)
                self.write({})

    def losses(self, arm, lr=None, seeds=SEEDS, steps=STEPS) -> dict:
        """{(lr, seed): loss} of the runs of an arm."""
        chosen = [
            r for r in self.runs if r["arm"] == arm and r["steps"] == steps and r["seed"] in seeds
        ]
        return {(r["lr"], r["seed"]): r["val_loss"] for r in chosen if lr in (None, r["lr"])}

    def best_lr(self, arm: str) -> float:
        """The best of the grid, which grows until the best is not at its edge."""
        grid = list(GRID)
        while True:
            self.complete([(arm, lr, 0, STEPS) for lr in grid])
            losses = {lr: loss for (lr, _), loss in self.losses(arm, seeds=(0,)).items()}
            best = min(losses, key=losses.get)
            if min(losses) < best < max(losses):
                return best
            grid.append(best / 2 if best == min(losses) else best * 2)

    def mean(self, arm, lr, steps=STEPS) -> float:
        return statistics.mean(self.losses(arm, lr, steps=steps).values())

    def mean_seconds(self, arm) -> float:
        return statistics.mean(
            r["cpu_seconds"] for r in self.runs if r["arm"] == arm and r["steps"] == STEPS
        )

    def tokens_to_reach(self, loss: float, arm: str, lr: float, seed: int) -> float:
        """Tokens at which the arm's finished runs of this seed reach a loss, on the line between
        the nearest two."""
        mine = [r for r in self.runs if (r["arm"], r["lr"], r["seed"]) == (arm, lr, seed)]
        runs = sorted((r["steps"], r["val_loss"]) for r in mine)
        for (fewer, above), (more, below) in itertools.pairwise(runs):
            if above >= loss >= below:
                return TOKENS_PER_STEP * (fewer + (more - fewer) * (above - loss) / (above - below))
        return math.nan  # its shortest run is better already

    def draw(self, best: dict, winner: str) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for arm in ARMS:
            points = sorted((lr, loss) for (lr, _), loss in self.losses(arm, seeds=(0,)).items())
            left.plot(*zip(*points, strict=True), "o-", label=NAMES[arm])
        left.set(
            xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per byte)"
        )
        reference = self.losses("A", best["A"]).values()
        right.axhline(
            statistics.mean(reference),
            color="tab:blue",
            linestyle="--",
            label=f"{NAMES['A']}, all tokens",
        )
        right.axhspan(min(reference), max(reference), color="tab:blue", alpha=0.15)
        dots = []
        for r in self.runs:
            if r["arm"] == winner and r["lr"] == best[winner] and r["seed"] in SEEDS:
                dots.append((r["steps"] * TOKENS_PER_STEP, r["val_loss"]))
        label = f"{NAMES[winner]}, a run a dot"
        right.plot(*zip(*sorted(dots), strict=True), "o", color="tab:red", label=label)
        right.set(xlabel="tokens of the run", ylabel="final validation loss (nats per byte)")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(PICTURE, dpi=120)

    def write(self, summary: dict) -> None:
        setting = {
            "tokens_per_step": TOKENS_PER_STEP,
            "steps": STEPS,
            "warmup_steps": WARMUP,
            "model": MODEL,
        }
        lines = ",\n  ".join(json.dumps(r) for r in self.runs)
        RESULTS.write_text(
            f'{{"setting": {json.dumps(setting)},\n "summary": {json.dumps(summary)},\n'
            f' "runs": [\n  {lines}\n]}}\n'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="for the data and the runs; made if need be")
    directory = parser.parse_args().directory
    if not directory.exists():
        write_data(directory)
    experiment = Experiment(directory)
    best = {arm: experiment.best_lr(arm) for arm in ARMS}
    experiment.complete([(arm, best[arm], seed, STEPS) for arm in ARMS for seed in SEEDS])
    winner = min("BCD", key=lambda arm: experiment.mean(arm, best[arm]))
    experiment.complete(
        [(winner, best[winner], s, round(STEPS * share)) for share in SHARES for s in SHARES[share]]
    )
    target = experiment.mean("A", best["A"])
    tokens = [experiment.tokens_to_reach(target, winner, best[winner], seed) for seed in SEEDS]
    losses = {arm: list(experiment.losses(arm, best[arm]).values()) for arm in ARMS}
    seconds = {arm: experiment.mean_seconds(arm) for arm in ("A", winner)}
    summary = {
        "best_lr": best,
        "winner": winner,
        "losses_of_three_seeds": losses,
        "loss_to_reach": target,
    }
    shares = [t / (STEPS * TOKENS_PER_STEP) for t in tokens]
    shares_of_time = [share * seconds[winner] / seconds["A"] for share in shares]
    experiment.write(
        summary | {"share_of_tokens_to_reach_it": shares, "share_of_cpu_time": shares_of_time}
    )
    experiment.draw(best, winner)


if __name__ == "__main__":
    sys.exit(one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main())
