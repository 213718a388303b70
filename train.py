"""Train GPT-2.

    python data_generator.py --preset demo && python train.py --preset demo     on a CPU, minutes
    torchrun --standalone --nproc_per_node=8 train.py                           124M on 8 GPUs
    python train.py                                                             the same on one
    python train.py --init_from gpt2 --data_dir mydata --log_dir tuned          OpenAI's weights on

The same command starts a run and continues it. A step is `total_batch_size` tokens whatever the
number of GPUs; they share it out in micro-batches of `batch_size` sequences. Ctrl-C, SIGTERM,
SIGUSR1 and a closed terminal finish the step, save, and leave.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import dataclasses
import math
import platform
import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import hellaswag
import metrics
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import (
    BEST,
    NEWEST,
    checkpoint_paths,
    link,
    newest_checkpoint,
    open_model,
    remove_older,
    save_checkpoint,
)
from lib.cli import PositiveFloat, PositiveInt, UserError, command, count, exit_process, parse
from lib.device import (
    StepShape,
    choose_precision,
    explain_out_of_memory,
    fitting_batch_size,
    free_memory,
    peak_memory,
    prepare_device,
    recompute_blocks,
    step_memory,
)
from lib.files import only_writer
from lib.loader import TokenLoader
from lib.loss import linear_cross_entropy
from lib.muon import Muon, muon_groups
from lib.ranks import Ranks
from lib.shards import DATA_DIR, DEMO_DATA_DIR, public_name
from lib.tokenizer import Tokenizer, get_tokenizer
from sample import show_samples

Preset = Literal["gpt2", "gpt2-fast", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"]


@dataclass(frozen=True)
class TrainConfig:
    # the model
    preset: Preset = "gpt2"  # defaults of the other flags
    init_from: str = "scratch"  # first weights: scratch, a checkpoint, a folder, or gpt2 ...
    n_layer: PositiveInt | None = None  # transformer blocks (default: 12, or --init_from's)
    n_head: PositiveInt | None = None  # attention heads per block (default: 12, or --init_from's)
    n_embd: PositiveInt | None = None  # channels (default: 768, or --init_from's)
    vocab_size: PositiveInt | None = None  # rows of the token table (default: tokens, in 64s)
    block_size: PositiveInt | None = None  # tokens of context (default: seq_len, or --init_from's)
    # directories
    data_dir: str = DATA_DIR  # shards to learn from
    log_dir: str = "log"  # log, curve and checkpoints
    # a step
    total_batch_size: PositiveInt = 524_288  # tokens in a step, over all GPUs: 2^19, GPT-3's 0.5M
    batch_size: PositiveInt | None = None  # sequences in a micro-batch (default: what memory holds)
    seq_len: PositiveInt = 1024  # tokens in a sequence
    # the schedule
    max_steps: PositiveInt = 19_073  # updates: 10 billion tokens in steps of 2^19
    warmup_steps: int = 715  # updates of linear warm-up: 375 million tokens, as GPT-3's
    schedule: Literal["cosine", "linear"] = "cosine"  # linear: constant first, then down
    decay_steps: PositiveInt | None = None  # updates of linear's decay (default: half of max_steps)
    max_lr: PositiveFloat = 6e-4  # learning rate after the warm-up: GPT-3 124M's
    min_lr: float = 6e-5  # learning rate at the end
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    weight_decay: float = 0.1  # of matrices and embedding tables
    grad_clip: PositiveFloat = 1.0  # largest norm of the gradient
    # evaluation and checkpoints
    val_every: int = 250  # steps between validations; 0 switches off
    val_tokens: PositiveInt = 10_485_760  # tokens of a validation: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag evaluations; 0 switches off
    hellaswag_data: str | None = None  # .jsonl file of HellaSwag examples (default: from the Hub)
    sample_every: int = 250  # steps between samples; 0 switches off
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep_every: int = 5000  # checkpoints at multiples of it are kept for good; 0: the last two only
    keep_best: bool = False  # also save and keep at the lowest validation loss: model_best.pt
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: the fastest here
    recompute: bool = False  # compute activations twice, keep few: less memory, more time
    compile: bool | None = None  # torch.compile the model (default: on CUDA)
    timeout: PositiveInt = 600  # seconds that ranks wait for each other
    shuffle: bool = False  # read the sequences in a new order in each epoch (default: as they come)
    seed: int = 1337  # of the first weights and of --shuffle


PRESETS = {  # gpt2 to gpt2-xl: learning rates of table 2.1 of Brown et al. 2020
    "gpt2": {},
    "gpt2-fast": {  # half of gpt2's tokens: docs/faster.md
        "optimizer": "muon", "schedule": "linear", "max_lr": 1.8e-3, "min_lr": 0.0,
        "warmup_steps": 250, "max_steps": 9536,
    },
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4, "min_lr": 3e-5},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4, "min_lr": 2.5e-5},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "max_lr": 2e-4, "min_lr": 2e-5},
    "demo": {
        "data_dir": DEMO_DATA_DIR, "log_dir": "demo/log", "n_layer": 4, "n_head": 4, "n_embd": 128,
        "seq_len": 128, "batch_size": 8, "total_batch_size": 1024, "max_steps": 2500,
        "warmup_steps": 100, "optimizer": "muon", "schedule": "linear", "max_lr": 4e-3,
        "min_lr": 0.0, "val_every": 250, "val_tokens": 76_800, "hellaswag_every": 0,
        "sample_every": 500, "save_every": 250, "keep_every": 250, "dtype": "float32",
    },
}  # fmt: skip

# Settings that a continued run may change, because the steps that are left compute the same without
# regard to them. max_steps may only grow; the schedule follows it.
MAY_CHANGE = {
    "preset", "data_dir", "log_dir", "batch_size", "max_steps", "val_every", "val_tokens",
    "hellaswag_every", "hellaswag_data", "sample_every", "save_every", "keep_every", "keep_best",
    "device", "compile", "recompute", "timeout",
}  # fmt: skip
MODEL_FLAGS = tuple(field.name for field in dataclasses.fields(GPTConfig))
SKIPS_IN_A_ROW = 10  # updates that may be skipped for NaN or Inf before the run is given up


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of the update after `step` updates.

    First a straight line up to max_lr. Then cosine: along half a cosine down to min_lr at
    max_steps. Or linear: constant, and straight down to min_lr over the last decay_steps.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "linear":
        after_warmup = max(1, config.max_steps - config.warmup_steps)
        decay_steps = config.decay_steps or min(max(1, config.max_steps // 2), after_warmup)
        height = min(1, max(0, config.max_steps - step) / decay_steps)  # 1: max_lr, 0: min_lr
    else:
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.min_lr + height * (config.max_lr - config.min_lr)


def due(step: int, every: int, max_steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; 0: never."""
    return every > 0 and (step % every == 0 or step == max_steps)


def check_config(config: TrainConfig) -> None:
    """Raise UserError for values that contradict each other.

    The bounds of single ones stand beside their fields.
    """
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr} is above --max_lr {config.max_lr}")
    if config.decay_steps and config.schedule == "cosine":
        raise UserError(
            f"--decay_steps {config.decay_steps} belongs to --schedule linear; the cosine has none"
        )
    if config.decay_steps and config.decay_steps + config.warmup_steps > config.max_steps:
        raise UserError(
            f"--decay_steps {config.decay_steps} and --warmup_steps {config.warmup_steps} are "
            f"together more than --max_steps {config.max_steps}"
        )
    if config.val_every and config.val_tokens < config.total_batch_size:
        raise UserError(
            f"--val_tokens {config.val_tokens} is less than one step, --total_batch_size "
            f"{config.total_batch_size}: it uses whole steps, so it must be at least as many"
        )


# ---- what a run is made of


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on."""

    train: TokenLoader
    val: TokenLoader | None  # None: no validation
    val_steps: int  # whole steps of the validation stream that are used
    tokenizer: Tokenizer
    examples: list[dict]  # HellaSwag's; empty: no HellaSwag


@dataclass(frozen=True)
class Start:
    """Where a run starts: at its first update, or where its newest good checkpoint left it."""

    step: int  # updates made already
    model: GPT  # on the CPU
    source: str  # where the weights are from
    precision: str  # bfloat16, float16 or float32
    optimizer: dict | None = None  # state of the optimizer; None: a new run
    scaler: dict | None = None  # state of the loss scale


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: TrainConfig
    ranks: Ranks
    data: Data
    questions: hellaswag.Questions  # this rank's share of the examples
    raw_model: GPT  # not compiled, so it takes batches of any shape: HellaSwag, samples, saving
    model: torch.nn.Module  # the same weights, compiled and in DDP: learns from batches (B, T)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    precision: str
    compiled: bool
    log: metrics.Log
    batch_size: int


def open_data(config: TrainConfig, ranks: Ranks) -> Data:
    """Raises UserError if the shards, the tokenizer or HellaSwag can't be had, before anything is
    written."""

    def open_split(split: str, shuffle: int | None = None) -> TokenLoader:
        return TokenLoader(
            config.data_dir, split, config.seq_len, config.total_batch_size,
            ranks.rank, ranks.world_size, pin_memory=ranks.device.type == "cuda", shuffle=shuffle,
        )  # fmt: skip

    train = open_split("train", config.seed if config.shuffle else None)
    train.micro_steps(config.batch_size or 1)
    val = open_split("val") if config.val_every else None
    val_steps = min(config.val_tokens // config.total_batch_size, val.steps) if val else 0
    examples = hellaswag.load_examples(config.hellaswag_data) if config.hellaswag_every else []
    return Data(train, val, val_steps, get_tokenizer(train.stream.tokenizer), examples)


def first_model(config: TrainConfig, ranks: Ranks, data: Data) -> GPT:
    """The model before its first update, on the CPU: new weights, or those of --init_from."""
    n_vocab = data.tokenizer.n_vocab
    given = {name: getattr(config, name) for name in MODEL_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if config.init_from == "scratch":
        padded = math.ceil(n_vocab / 64) * 64  # GPUs like multiples of 64
        torch.manual_seed(config.seed)
        try:
            model = GPT(GPTConfig(**{"vocab_size": padded, "block_size": config.seq_len} | given))
        except ValueError as error:
            raise UserError(f"--{error}") from None
    else:
        opened = open_model(config.init_from, data.train.stream.tokenizer)
        if not opened.brings_tokenizer:
            ranks.say(
                f"{config.init_from} brings no tokenizer: its tokens are taken for those of "
                f"{config.data_dir} ({data.tokenizer.name})"
            )
        model = opened.model
        for name, value in given.items():
            has = getattr(model.config, name)
            if value != has:
                raise UserError(
                    f"--{name} {value} contradicts --init_from {config.init_from}, which has "
                    f"{has}: leave the flag out"
                )
    if config.seq_len > model.config.block_size:
        raise UserError(
            f"--seq_len {config.seq_len} is more than the model's block_size "
            f"{model.config.block_size}"
        )
    if n_vocab > model.config.vocab_size:
        raise UserError(
            f"--vocab_size {model.config.vocab_size} is less than the tokenizer's {n_vocab} tokens"
        )
    return model


def check_same_run(config: TrainConfig, identity: dict, checkpoint: dict, path) -> None:
    """Raise UserError naming each setting in which this run differs from the one it would continue.

    identity: the data's, of TokenLoader. path: the checkpoint's, for the message.
    """
    if "optimizer" not in checkpoint:
        raise UserError(
            f"{path} has weights only, no run to continue: use --init_from {path} and another "
            "--log_dir"
        )
    then = checkpoint["train_config"]
    model_then = vars(checkpoint["config"])
    differences = []

    def compare(name, before, now):
        if before != now:
            differences.append(f"{name} was {before}, is {now}")

    for name, now in vars(config).items():
        if name in MODEL_FLAGS:
            compare(name, model_then[name], now if now is not None else model_then[name])
        elif name not in MAY_CHANGE:
            compare(name, then.get(name), now)
    for name, now in identity.items():
        compare(f"data ({name})", checkpoint["data"].get(name), now)
    if config.max_steps < then["max_steps"]:
        differences.append(
            f"max_steps was {then['max_steps']}, is {config.max_steps}, and may only grow"
        )
    if differences:
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --log_dir for a new run, or give the old settings to continue "
            "this one"
        )


def find_start(config: TrainConfig, ranks: Ranks, data: Data) -> Start:
    """The state of the newest good checkpoint, or of a run before its first update."""
    fastest = choose_precision(ranks.device, config.dtype)
    newest = newest_checkpoint(config.log_dir)
    if newest is None:
        return Start(0, first_model(config, ranks, data), config.init_from, fastest)
    checkpoint = newest.checkpoint
    path = newest.path
    check_same_run(config, data.train.stream.identity(), checkpoint, path)
    for reason in newest.damaged:
        ranks.say(f"WARNING: {reason}: passed over")
    if ranks.main:
        link(path, NEWEST)  # a process that was killed may not have done it
    ranks.say(f"going on from {path}, after {count(checkpoint['step'], 'step')}")
    if checkpoint["precision"] != fastest:
        ranks.say(
            f"the run began in {checkpoint['precision']} and goes on in it; "
            f"a new one would take {fastest} here"
        )
    before = checkpoint["train_config"]["max_steps"]
    if before != config.max_steps:
        schedule = "decay" if config.schedule == "linear" else "cosine"
        ranks.say(f"max_steps was {before}: from here the {schedule} ends at {config.max_steps}")
    model = GPT(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return Start(
        checkpoint["step"],
        model,
        str(path),
        checkpoint["precision"],
        checkpoint["optimizer"],
        checkpoint["scaler"],
    )


def set_up(config: TrainConfig, ranks: Ranks, data: Data) -> tuple[Run, int]:
    """The run and its first step: the state to go on from, model and optimizer, log."""
    start = find_start(config, ranks, data)
    raw_model = start.model
    compiled = ranks.device.type == "cuda" if config.compile is None else config.compile

    prepare_device(ranks.device)
    ranks.connect(config.timeout)
    batch_size = config.batch_size
    if batch_size is None:
        half = start.precision != "float32"
        shape = StepShape(raw_model.config, config.seq_len, half, compiled, config.recompute)
        batch_size = choose_batch_size(ranks, data, shape)
    batch_tokens = 4 * batch_size * config.seq_len  # fits, as no gradients are kept
    questions = hellaswag.share_out(
        data.examples, data.tokenizer, raw_model.config.block_size, ranks, batch_tokens
    )
    raw_model.to(ranks.device).train()
    raw_model.loss = linear_cross_entropy
    if config.recompute:
        recompute_blocks(raw_model)
    ranks.check_same(raw_model, start.step)
    if config.optimizer == "muon":
        optimizer = Muon(muon_groups(raw_model, config.weight_decay), config.max_lr)
    else:
        optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    # float16 holds 6e-8 to 65504: scaling the loss keeps small gradients from 0; an overflow halves
    # the scale
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=start.precision == "float16")
    if start.optimizer is not None:
        optimizer.load_state_dict(start.optimizer)
        scaler.load_state_dict(start.scaler)
    dtype = getattr(torch, start.precision)
    autocast = torch.autocast(ranks.device.type, dtype, enabled=start.precision != "float32")
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ranks.world_size > 1:
        # averages gradients over the ranks
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    log = metrics.Log(config.log_dir if ranks.main else None, start.step)
    run = Run(
        config, ranks, data, questions, raw_model, model, optimizer, scaler, autocast,
        start.precision, compiled, log, batch_size,
    )  # fmt: skip
    facts = describe(run)
    announce(run, facts, start.source)
    if ranks.main and start.step < config.max_steps:  # else it stays the machine's that trained it
        metrics.write_run(config.log_dir, facts)
    return run, start.step


def choose_batch_size(ranks: Ranks, data: Data, shape: StepShape) -> int:
    """Let the loaders have the largest micro-batches that fit: the same on every rank, and the
    result is the same whatever they are. Raises UserError if not even one sequence fits."""
    share = data.train.micro_steps(1)  # sequences of this process in a step
    if ranks.device.type == "cuda":
        free = ranks.min(free_memory(ranks.device))
        batch_size = fitting_batch_size(shape, share, free)
    else:  # its memory is the machine's, and larger batches would hardly be faster
        batch_size = math.gcd(share, 8)
    if batch_size == 0:
        need = step_memory(shape, 1) / 1e9
        raise UserError(
            f"a step with one sequence of {shape.seq_len:,} tokens takes {need:.1f} GB, and the "
            f"GPU has {free / 1e9:.1f} GB free.\nHINT: {what_fits(shape, share, free)}; "
            "--batch_size 1 tries it all the same"
        )
    return batch_size


def what_fits(shape: StepShape, share: int, free: float) -> str:
    """What needs less memory and fits: --recompute, else the largest smaller preset."""
    recomputed = dataclasses.replace(shape, recompute=True)
    if batch_size := fitting_batch_size(recomputed, share, free):
        return f"--recompute needs far less, {count(batch_size, 'sequence')} would fit"
    for preset in ("gpt2-large", "gpt2-medium", "gpt2"):
        flags = {name: PRESETS[preset][name] for name in MODEL_FLAGS if name in PRESETS[preset]}
        model = GPTConfig(shape.model.block_size, shape.model.vocab_size, **flags)
        smaller = dataclasses.replace(recomputed, model=model)
        if model.n_layer < shape.model.n_layer and fitting_batch_size(smaller, share, free):
            return f"--preset {preset} --recompute would fit"
    return "a smaller model would fit (--n_layer, --n_embd)"


def describe(run: Run) -> metrics.RunFacts:
    """The facts of a run, for its first lines and for run.json."""
    data = run.data.train.stream.identity()
    return metrics.RunFacts(
        config=metrics.without_paths(vars(run.config)),
        model=vars(run.raw_model.config),
        data=data | {"dataset": public_name(data)},
        parameters=sum(parameter.numel() for parameter in run.raw_model.parameters()),
        tokens_per_step=run.config.total_batch_size,
        hardware=run.ranks.hardware(),
        precision=run.precision,
        compiled=run.compiled,
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )


def announce(run: Run, facts: metrics.RunFacts, source: str) -> None:
    """Print the run's model, data and machine, and what to know of its data.

    source: where the weights are from.
    """
    config = run.config
    ranks = run.ranks
    data = run.data
    model = run.raw_model.config
    train = data.train
    epochs = config.max_steps * config.total_batch_size / train.stream.tokens
    ranks.say(
        f"model: {facts.parameters:,} parameters from {source}; {count(model.n_layer, 'layer')}, "
        f"{count(model.n_head, 'head')}, {count(model.n_embd, 'channel')}, {model.block_size} "
        f"tokens of context, a vocabulary of {model.vocab_size}"
    )
    ranks.say(
        f"data: {train.stream.tokens:,} tokens ({data.tokenizer.name}) to learn from in "
        f"{config.data_dir}; {count(config.max_steps, 'step')} of {config.total_batch_size:,} are "
        f"{epochs:.2f} epochs"
    )
    ranks.say(
        f"machine: {facts.hardware}, {facts.precision}, "
        f"{'compiled' if facts.compiled else 'not compiled'}; a step is "
        f"{count(train.micro_steps(run.batch_size), 'micro-batch')} of {run.batch_size} x {train.T} tokens for each "
        "process"
    )
    for note in train.stream.notes:
        ranks.say(note)
    if train.stream.manifest is None:
        ranks.say(f"{config.data_dir} has no manifest.json: its tokens are taken for gpt2's")
    elif not train.stream.manifest.complete:
        ranks.say(
            f"WARNING: {config.data_dir} is not complete: "
            "a run can't go on after its data has grown"
        )
    if config.warmup_steps > config.max_steps:
        ranks.say(
            f"WARNING: --warmup_steps {config.warmup_steps} > --max_steps {config.max_steps}: "
            "no step has --max_lr"
        )
    if data.val and data.val_steps * data.val.step_tokens != config.val_tokens:
        ranks.say(
            f"validation uses {data.val_steps * data.val.step_tokens:,} tokens: the whole steps in "
            f"--val_tokens {config.val_tokens:,} and in the {data.val.stream.tokens:,} of the validation "
            "shards"
        )


# ---- what the loop calls


def evaluation_due(step: int, config: TrainConfig) -> bool:
    every = (config.val_every, config.hellaswag_every, config.sample_every)
    return any(due(step, steps, config.max_steps) for steps in every)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Validation, HellaSwag and samples, as far as they are due: {stream: value}, logged.

    A signal cuts it short: then nothing is logged, and {} is returned.
    """
    config = run.config
    ranks = run.ranks
    start = time.perf_counter()
    measured = {}
    if due(step, config.val_every, config.max_steps):
        measured["val"] = validation_loss(run)
    if due(step, config.hellaswag_every, config.max_steps):
        n = len(run.data.examples)
        measured["hella"] = hellaswag.score(run.raw_model, run.questions, n, ranks, run.autocast)
    if ranks.stopping():
        return {}
    if "val" in measured:
        tokens = run.data.val_steps * run.data.val.step_tokens
        ranks.say(f"step {step:5d} | validation loss {measured['val']:.4f} on {tokens:,} tokens")
    if "hella" in measured:
        examples = count(len(run.data.examples), "example")
        ranks.say(
            f"step {step:5d} | HellaSwag acc_norm {measured['hella']:.4f} "
            f"(style completion, {examples})"
        )
    if due(step, config.sample_every, config.max_steps) and ranks.main:
        ranks.say(show_samples(run.raw_model, run.data.tokenizer, run.autocast))
    run.log.write(step, **measured, eval_s=time.perf_counter() - start)
    if "val" in measured and ranks.main:
        try:
            metrics.plot(config.log_dir, run.log.curve)
        except OSError as error:
            ranks.say(f"WARNING: the curve is not drawn: {error}")
    return measured


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean loss in nats per token over the first val_steps steps of the validation stream, on all
    ranks together. Once a signal asks the run to stop, the rest is left out."""
    val = run.data.val
    device = run.ranks.device
    micro_batches = run.data.val_steps * val.micro_steps(run.batch_size) * run.ranks.world_size
    total = torch.zeros((), device=device)
    for step in range(run.data.val_steps):
        for x, y in val.batches(step, run.batch_size):
            if run.ranks.stopping():
                return math.nan
            with run.autocast:
                _, loss = run.model(
                    x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                )
            total += loss / micro_batches
    return run.ranks.sum(total).item()


def is_best(run: Run, measured: dict[str, float]) -> bool:
    """With --keep_best: whether this validation is the lowest in log.txt, on every rank alike."""
    if not run.config.keep_best or not math.isfinite(measured.get("val", math.nan)):
        return False
    lowest = False
    if run.ranks.main:  # which has the log
        losses = [loss for _, loss in run.log.curve.val]  # the last one is this
        lowest = losses[-1] < min(losses[:-1], default=math.inf)
    return bool(run.ranks.max(lowest))


def keep_best(run: Run, step: int) -> None:
    """Link model_best.pt to the checkpoint of this step, unless the disk had no room for it."""

    def link_it():
        if path := checkpoint_paths(run.config.log_dir).get(step):
            link(path, BEST)

    run.ranks.on_main(link_it)


def save(run: Run, step: int, last: bool) -> None:
    """Save the state after `step` updates, by the main rank; the others wait.

    A disk that does not take it costs this save and not the run, but for the last one. Raises
    UserError on every rank: then, and for weights that are not finite.
    """
    config = run.config
    state = {
        "model": run.raw_model.state_dict(),
        "config": run.raw_model.config,
        "step": step,
        "tokenizer": run.data.tokenizer.state,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "precision": run.precision,
        "train_config": vars(config),
        "data": run.data.train.stream.identity(),
    }

    def write():
        start = time.perf_counter()
        run.log.sync()
        path = save_checkpoint(config.log_dir, state)
        seconds = time.perf_counter() - start
        run.ranks.say(f"saved {path} in {seconds:.1f} s")
        try:
            remove_older(config.log_dir, step, config.keep_every)
        except OSError as error:
            run.ranks.say(f"WARNING: an older checkpoint could not be removed: {error}")
        run.log.write(step, save_s=seconds)

    try:
        run.ranks.on_main(write)
    except OSError as error:
        if last:
            raise UserError(
                f"the last checkpoint could not be saved: {error}\n"
                "HINT: make room and run the same command again",
                code=1,
            ) from None
        run.ranks.say(f"WARNING: {error}; earlier checkpoints are intact, the run goes on")


# ---- the run


def train(run: Run, first_step: int) -> int:
    """Learn from first_step to max_steps, or until a signal. Returns the exit code."""
    config = run.config
    ranks = run.ranks
    data = run.data
    raw_model = run.raw_model
    model = run.model
    micro_steps = data.train.micro_steps(run.batch_size)
    optimizer = run.optimizer
    scaler = run.scaler
    speed = metrics.Speed(raw_model.config, config, ranks, run.precision)
    ranks.signals.listen()
    stop = 0  # the signal that asks the run to stop; 0: none
    skips = 0  # updates skipped in a row
    printed = 0.0  # when the last line was

    # step counts the updates made; after the last one there is one more turn, to evaluate and save.
    # The state of first_step is on the disk already, or it is a new run's
    for step in range(first_step, config.max_steps + 1):
        measured = {}
        if not stop and evaluation_due(step, config):
            measured = evaluate(run, step)
            stop = int(ranks.stopping())
        last = stop > 0 or step == config.max_steps
        best = is_best(run, measured)
        if step > first_step and (last or best or due(step, config.save_every, config.max_steps)):
            ranks.check_same(raw_model, step)
            save(run, step, last)
        if best:
            keep_best(run, step)
        if last:
            break

        start = time.perf_counter()
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)  # Muon's token table learns faster
        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step, (x, y) in enumerate(data.train.batches(step, run.batch_size)):
            x = x.to(ranks.device, non_blocking=True)  # (B, T)
            y = y.to(ranks.device, non_blocking=True)  # (B, T)
            # gradients add up on each rank; the last micro-batch averages them over the ranks
            model.require_backward_grad_sync = micro_step == micro_steps - 1
            with run.autocast:
                _, loss = model(x, y)
            scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach() / (micro_steps * ranks.world_size)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip)
        # the step's one wait for the GPU. All ranks stop after the same step, whichever of them had
        # the signal
        step_values = torch.stack((ranks.sum(loss_sum), norm, ranks.stopping()))
        loss, norm, stop = step_values.tolist()
        # loss and norm are over all ranks, so each of them decides the same
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            skips = 0
        else:
            # a loss scale above 1, which only float16 has, overflows now and then: that lowers it
            if scaler.get_scale() <= 1:
                skips += 1
            run.log.write(step, skipped=1)
            ranks.say(
                f"step {step:5d} | loss {loss} norm {norm}: not finite, the update is skipped"
            )
        scaler.update()
        optimizer.zero_grad()
        if skips == SKIPS_IN_A_ROW:
            raise UserError(
                f"loss or gradient were not finite {skips} times in a row, up to step {step}.\n"
                f"HINT: --init_from {config.log_dir} (its last good weights, if saved), another "
                "--log_dir, a lower --max_lr or --dtype float32",
                code=1,
            )
        timings = speed.measure(time.perf_counter() - start)
        run.log.write(step, train=loss, lr=lr, norm=norm, **timings)
        # a line a second is enough to read
        if time.perf_counter() - printed > 1 or step + 1 == config.max_steps:
            printed = time.perf_counter()
            rate = speed.line(config.max_steps - step - 1)
            ranks.say(f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {rate}")
    return report_end(run, first_step, step, int(stop))


def report_end(run: Run, first_step: int, step: int, stop: int) -> int:
    """Say how the run ended and what comes next. stop: the signal that ended it; 0: none.

    Returns the exit code.
    """
    ranks = run.ranks
    log_dir = run.config.log_dir
    if stop:
        saved = ", saved" if step else ""
        ranks.say(
            f"stopped by {signal.Signals(stop).name} after {count(step, 'step')}{saved}; "
            "the same command goes on from here"
        )
        return 128 + stop
    if first_step == run.config.max_steps:
        ranks.say(f"finished at step {step}: raise --max_steps or choose another --log_dir")
    else:
        peak = peak_memory(ranks.device)
        ranks.say(f"done: {count(step, 'step')}, peak memory {peak:.1f} GB per process")
    path = shlex.quote(f"{log_dir}/{NEWEST}")
    ranks.say(f"next: python sample.py --model {path}")
    ranks.say(f"      python export.py --model {path} --out GPT124M")
    return 0


@command
def main(argv=None) -> int:
    config = parse(TrainConfig, argv, __doc__, PRESETS)
    check_config(config)
    with Ranks(config.device) as ranks:
        data = open_data(config, ranks)
        written = ("*.pt", "log.txt", "run.json", "*.png")
        writer = only_writer(config.log_dir, *written) if ranks.main else nullcontext()
        with writer, explain_out_of_memory(config.batch_size or 1, config.recompute):
            run, first_step = set_up(config, ranks, data)
            return train(run, first_step)


if __name__ == "__main__":
    exit_process(main())
