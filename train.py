"""Train GPT-2.

    python data_generator.py --preset demo && python train.py --preset demo     on a CPU, minutes
    torchrun --standalone --nproc_per_node=8 train.py                           124M on 8 GPUs
    python train.py                                                             the same on one
    python train.py --init_from gpt2 --data_dir mydata --log_dir tuned          OpenAI's weights
    python train.py --eval_only --init_from gpt2                                measure a model

The same command starts a run and resumes it. A step is one update of the weights, from
`total_batch_size` tokens; however many GPUs there are, they share these tokens, in micro-batches of
`batch_size` sequences. Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU and a closed terminal finish the
step (or drop one of many seconds), save, and exit.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import math
import os
import platform
import shlex
import signal
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import hellaswag
from lib.checkpoint import (
    BEST,
    NEWEST,
    checkpoint_paths,
    claim,
    link,
    remove_older,
    save_checkpoint,
)
from lib.cli import (
    LocalPath,
    PositiveFloat,
    PositiveInt,
    UserError,
    command,
    count,
    exit_process,
    one_line_error,
    parse,
)
from lib.curve import draw_curve
from lib.device import (
    StepShape,
    choose_precision,
    explain_compile_failure,
    explain_out_of_memory,
    free_memory,
    largest_batch_size,
    peak_memory,
    prepare_device,
    recompute_blocks,
)
from lib.files import only_writer
from lib.loader import TokenLoader
from lib.log import Log, RunFacts, without_paths, write_run
from lib.loss import linear_cross_entropy
from lib.muon import Muon, muon_groups
from lib.pretrained import open_model
from lib.ranks import Ranks, Stopped
from lib.shards import DATA_DIR, DEMO_DATA_DIR, public_name
from lib.speed import Speed, peak_tokens_per_second
from lib.start import find_start
from lib.tokenizer import Tokenizer, get_tokenizer
from sample import show_samples

Preset = Literal["gpt2", "gpt2-fast", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"]
MAX_SKIPS_IN_A_ROW = 10  # updates that are skipped for NaN or Inf before the run ends
PATIENCE = 5.0  # seconds; a longer step is checked for signals in its middle


@dataclass(frozen=True)
class TrainConfig:
    # the model
    preset: Preset = "gpt2"  # defaults of the other flags
    init_from: LocalPath = "scratch"  # first weights: scratch, a checkpoint, a folder, or gpt2 ...
    n_layer: PositiveInt | None = None  # transformer blocks (default: 12, or --init_from's)
    n_head: PositiveInt | None = None  # attention heads per block (default: 12, or --init_from's)
    n_embd: PositiveInt | None = None  # channels (default: 768, or --init_from's)
    vocab_size: PositiveInt | None = None  # rows of the token table (default: the ids, in 64s)
    block_size: PositiveInt | None = None  # tokens of context (default: seq_len, or --init_from's)
    # directories
    data_dir: LocalPath = DATA_DIR  # training and validation shards
    log_dir: LocalPath = "log"  # log, curve and checkpoints
    # a step
    total_batch_size: PositiveInt = 524_288  # tokens in a step, over all GPUs: 2^19, as GPT-3
    batch_size: PositiveInt | None = None  # sequences in a micro-batch (default: what fits)
    seq_len: PositiveInt = 1024  # tokens in a sequence
    # the schedule
    max_steps: PositiveInt = 19_073  # updates: 10 billion tokens in steps of 2^19
    warmup_steps: int = 715  # updates of linear warm-up: 375 million tokens, as GPT-3's
    schedule: Literal["cosine", "linear"] = "cosine"  # linear: constant, then a linear decay
    decay_steps: PositiveInt | None = None  # updates of the linear decay (default: half of all)
    max_lr: PositiveFloat = 6e-4  # learning rate after the warm-up: GPT-3 124M's
    min_lr: float = 6e-5  # learning rate at the end
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices
    weight_decay: float = 0.1  # of matrices and embedding tables
    grad_clip: PositiveFloat = 1.0  # largest norm of the gradient
    # evaluation and checkpoints
    val_every: int = 250  # steps between validations; 0 turns it off
    val_tokens: PositiveInt = 10_485_760  # tokens of a validation: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag evaluations; 0 turns it off
    hellaswag_data: LocalPath | None = None  # .jsonl file of examples (default: the Hub's)
    sample_every: int = 250  # steps between samples; 0 turns it off
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep_every: int = 5000  # keep checkpoints at its multiples; 0: the last two only
    keep_best: bool = False  # also save each lowest validation loss, linked as model_best.pt
    eval_only: bool = False  # measure --init_from's model, or else --log_dir's; write nothing
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: the fastest here
    recompute: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool | None = None  # torch.compile the model (default: on CUDA)
    timeout: PositiveInt = 600  # seconds that ranks wait for each other
    shuffle: bool = False  # read the sequences of each epoch in a new order (default: as stored)
    seed: int = 1337  # of the initial weights and of --shuffle


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


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of the next update, after `step` updates.

    Linear warm-up to max_lr. Then cosine: half a cosine down to min_lr at max_steps. Or linear:
    constant, then a linear decay to min_lr over the last decay_steps.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "linear":
        after_warmup = max(1, config.max_steps - config.warmup_steps)
        decay_steps = config.decay_steps or min(max(1, config.max_steps // 2), after_warmup)
        fraction = min(1, max(0, config.max_steps - step) / decay_steps)  # 1: max_lr, 0: min_lr
    else:
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        fraction = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.min_lr + fraction * (config.max_lr - config.min_lr)


def is_due(step: int, every: int, max_steps: int) -> bool:
    """True at every multiple of `every` and at the last step; every=0 turns it off."""
    return every > 0 and (step % every == 0 or step == max_steps)


def check_config(config: TrainConfig) -> None:
    """Raise UserError for values that contradict each other.

    The bounds of single values are in their fields' types.
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
    if config.keep_best and not config.val_every:
        raise UserError("--keep_best needs the validation loss, which --val_every 0 turns off")
    validates = config.val_every or config.eval_only
    if validates and config.val_tokens < config.total_batch_size:
        raise UserError(
            f"--val_tokens {config.val_tokens} is less than one step, --total_batch_size "
            f"{config.total_batch_size}: validation runs whole steps, so give at least as many"
        )


def train(config: TrainConfig, ranks: Ranks) -> int:
    """Train, or resume training, up to max_steps or a signal. Returns the exit code."""
    # Tokens. Bad input is found here, on every rank alike, before anything is written.
    train_data = open_split("train", config, ranks)
    if config.batch_size:
        train_data.micro_steps(config.batch_size)  # refuses one that does not divide the share
    val_data = open_split("val", config, ranks) if config.val_every else None
    val_steps = min(config.val_tokens // config.total_batch_size, val_data.steps) if val_data else 0
    tokenizer = get_tokenizer(train_data.stream.tokenizer)
    examples = hellaswag.load_examples(config.hellaswag_data) if config.hellaswag_every else []

    # The state to start from: new weights, those of --init_from, or the newest checkpoint.
    if ranks.is_main:
        ranks.enter_context(only_writer(config.log_dir, "*.pt", "log.txt", "run.json", "*.png"))
    identity = train_data.stream.identity()
    new_precision = choose_precision(ranks.device, config.dtype)
    start = find_start(config, identity, train_data.stream.tokenizer, tokenizer, new_precision)
    for note in start.notes:
        ranks.print(note)

    # From here on the ranks talk to each other.
    prepare_device(ranks.device)
    ranks.connect(config.timeout)
    ranks.check_settings(facts_to_compare(config, identity, val_data, examples))
    if ranks.is_main and start.path:
        claim(start.path, start.step)

    # How to compute, and the largest batch that fits. It changes memory and speed, not the result.
    half = start.precision != "float32"
    autocast = torch.autocast(ranks.device.type, getattr(torch, start.precision), enabled=half)
    compiled = is_compiled(config, ranks)
    shape = StepShape(start.model.config, config.seq_len, half, compiled, config.recompute)
    free = ranks.min(free_memory(ranks.device))
    batch_size = config.batch_size or largest_batch_size(shape, train_data.share, free)
    micro_steps = train_data.micro_steps(batch_size)

    # Model and optimizer. raw_model and model have the same weights: raw_model is not compiled, so
    # it takes batches of any shape (HellaSwag, samples) and is saved; model learns.
    raw_model = start.model.to(ranks.device).train()  # for good: no dropout asks for eval()
    raw_model.loss = linear_cross_entropy  # the same value, without all the logits in memory
    ranks.check_weights(raw_model, start.step)
    if config.recompute:
        recompute_blocks(raw_model)
    if config.optimizer == "muon":
        optimizer = Muon(muon_groups(raw_model, config.weight_decay), config.max_lr)
    else:
        optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    # float16 holds 6e-8 to 65504: scaling the loss keeps small gradients from vanishing; an
    # overflow halves the scale
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=start.precision == "float16")
    start.restore(optimizer, scaler)
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ranks.world_size > 1:
        # averages gradients over the ranks
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    questions = hellaswag.questions_of_rank(
        examples, tokenizer, raw_model.config.block_size, ranks,
        most_tokens=4 * batch_size * config.seq_len,  # fits, as no gradients are kept
    )  # fmt: skip

    # What this run is, for its first lines, run.json and the curve.
    facts = RunFacts(
        config=without_paths(vars(config)),
        model=vars(raw_model.config),
        data=identity | {"dataset": public_name(identity)},
        parameters=sum(parameter.numel() for parameter in raw_model.parameters()),
        tokens_per_step=config.total_batch_size,
        hardware=ranks.hardware(),
        precision=start.precision,
        compiled=compiled,
        versions={"python": platform.python_version(), "torch": torch.__version__},
        val_bytes_per_token=val_data and bytes_per_token(val_data, val_steps, tokenizer),
    )
    ranks.print(summary(config, facts, tokenizer.name, start.source))
    ranks.print(
        f"machine: {facts.hardware}, {facts.precision}, "
        f"{'compiled' if compiled else 'not compiled'}; a step is "
        f"{count(micro_steps, 'micro-batch')} of {batch_size} x {config.seq_len} tokens for each "
        "process"
    )
    for remark in remarks(config, train_data, val_data, val_steps):
        ranks.print(remark)
    if ranks.is_main and start.step < config.max_steps:
        write_run(config.log_dir, facts)  # a finished run keeps that of the machine that trained it

    log = Log(config.log_dir if ranks.is_main else None, start.step)
    peak = peak_tokens_per_second(raw_model.config, config.seq_len, start.precision, ranks)
    speed = Speed(config.total_batch_size, peak)
    step = start.step  # completed updates
    saved_step = start.step  # step of the newest checkpoint
    best_val_loss = start.best_val_loss
    stop = 0  # the signal that ends the run; 0: none
    skips = 0  # consecutive updates that were skipped
    step_seconds = math.inf  # duration of the last step; not known yet
    check_every = 1  # micro-batches between checks for a signal
    printed_at = 0.0  # time of the last printed line
    ranks.signals.listen()

    # One extra iteration measures and saves after the last update.
    while True:
        # Measure what is due. A signal cuts it short; what is complete counts.
        begun = time.perf_counter()
        measured = {}  # {stream: value}
        try:
            if not stop and is_due(step, config.val_every, config.max_steps):
                loss = validation_loss(model, val_data, val_steps, batch_size, ranks, autocast)
                measured["val"] = loss
                ranks.print(
                    f"step {step:5d} | validation loss {loss:.4f} "
                    f"({facts.bits_per_byte(loss):.4f} bits per byte) "
                    f"on {val_steps * config.total_batch_size:,} tokens"
                )
            if not stop and is_due(step, config.hellaswag_every, config.max_steps):
                score = hellaswag.score(raw_model, questions, len(examples), ranks, autocast)
                measured["hella"] = score
                ranks.print(
                    f"step {step:5d} | HellaSwag acc_norm {score:.4f} "
                    f"(style completion, {count(len(examples), 'example')})"
                )
        except Stopped as stopped:
            stop = stopped.signal_number
        if ranks.is_main and not stop and is_due(step, config.sample_every, config.max_steps):
            ranks.print(show_samples(raw_model, tokenizer, autocast))
        if measured:
            log.write(step, **measured, eval_s=time.perf_counter() - begun)
        if "val" in measured and ranks.is_main:
            redraw_curve(config.log_dir, log, ranks)

        # Save what is due, the best so far, and the end.
        last = bool(stop) or step == config.max_steps
        val_loss = measured.get("val", math.nan)  # the same on all ranks
        # <=: a resumed run measures its own best checkpoint again
        is_best = config.keep_best and math.isfinite(val_loss) and val_loss <= best_val_loss
        if step > saved_step and (
            last or is_best or is_due(step, config.save_every, config.max_steps)
        ):
            ranks.check_weights(raw_model, step)
            state = {
                "model": raw_model.state_dict(),
                "config": raw_model.config,
                "step": step,
                "tokenizer": tokenizer.state,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "precision": start.precision,
                "best_val_loss": val_loss if is_best else best_val_loss,
                "train_config": vars(config),
                "data": identity,
            }
            try:
                ranks.on_main(save, config, state, is_best, log, ranks)
                saved_step = step
                best_val_loss = state["best_val_loss"]
            except OSError as error:  # costs this checkpoint, not the run, unless it is the last
                if last:
                    raise UserError(
                        f"the last checkpoint could not be saved: {error}\n"
                        f"HINT: run the same command again once {config.log_dir} can be written",
                        code=1,
                    ) from None
                ranks.print(f"WARNING: {error}; earlier checkpoints are intact, the run continues")
        elif is_best:  # of the step that the run started from
            best_val_loss = val_loss
            ranks.on_main(link_best, config.log_dir, step)
        if last:
            break

        # Update.
        begun = time.perf_counter()
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)  # Muon's token table learns faster
        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step, (x, y) in enumerate(train_data.batches(step, batch_size)):
            if micro_step > 0 and micro_step % check_every == 0:
                stop = ranks.stop_signal()
                if stop:
                    break
            x = x.to(ranks.device, non_blocking=True)  # (B, T)
            y = y.to(ranks.device, non_blocking=True)  # (B, T)
            # gradients add up on each rank; the last micro-batch averages them over the ranks
            model.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast:
                _, loss = model(x, y)
            scaler.scale(loss / micro_steps).backward()
            loss_sum += loss.detach() / (micro_steps * ranks.world_size)
        if stop:  # in a long step: its gradients are dropped, the weights from before it are saved
            continue
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip)
        # the step's only wait for the GPU; the signal is shared, so all ranks stop after the same
        # step
        stop_and_seconds = ranks.max(ranks.signals.received(), step_seconds)
        step_values = torch.stack((ranks.sum(loss_sum), norm, *stop_and_seconds))
        loss, norm, stop, slowest = step_values.tolist()
        # loss and norm are the same on all ranks, so all make the same decision
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            skips = 0
        else:
            # float16's loss scale may overflow, which lowers it: only skips at scale 1 count
            if scaler.get_scale() <= 1:
                skips += 1
            log.write(step, skipped=1)
            ranks.print(
                f"step {step:5d} | loss {loss} norm {norm}: not finite, the update is skipped"
            )
        scaler.update()
        optimizer.zero_grad()
        if skips == MAX_SKIPS_IN_A_ROW:
            raise UserError(
                f"the loss or its gradient was not finite {skips} times in a row, up to step "
                f"{step}.\nHINT: restart from the last saved weights: --init_from "
                f"{config.log_dir}, another --log_dir, and a lower --max_lr or --dtype float32",
                code=1,
            )
        step_seconds = time.perf_counter() - begun
        # steps that take longer are checked in their middle, by all ranks at the same place
        check_every = max(1, int(micro_steps * PATIENCE / max(slowest, PATIENCE)))
        timings = speed.measure(step_seconds)
        log.write(step, train=loss, lr=lr, norm=norm, **timings)
        # at most one line a second
        if time.perf_counter() - printed_at > 1 or step + 1 == config.max_steps:
            printed_at = time.perf_counter()
            rate = speed.line(config.max_steps - step - 1)
            ranks.print(
                f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {rate}"
            )
        step += 1

    # Report.
    if stop:
        ranks.print(
            f"stopped by {signal.Signals(int(stop)).name} after {count(step, 'step')}"
            f"{', saved' if step else ''}; the same command resumes from here"
        )
        return 128 + int(stop)
    if start.step == config.max_steps:
        ranks.print(f"finished at step {step}: raise --max_steps or choose another --log_dir")
    else:
        gigabytes = peak_memory(ranks.device)
        ranks.print(f"done: {count(step, 'step')}, peak memory {gigabytes:.1f} GB per process")
    path = shlex.quote(f"{config.log_dir}/{NEWEST}")
    ranks.print(f"next: python sample.py --model {path}")
    ranks.print(f"      python export.py --model {path} --out GPT124M")
    return 0


def evaluate(config: TrainConfig, ranks: Ranks) -> int:
    """Measure a model on the validation shards, and on HellaSwag if it is on; write nothing."""
    name = config.log_dir if config.init_from == "scratch" else config.init_from
    val_data = open_split("val", config, ranks)
    val_steps = min(config.val_tokens // config.total_batch_size, val_data.steps)
    examples = hellaswag.load_examples(config.hellaswag_data) if config.hellaswag_every else []
    loaded = open_model(name, val_data.stream.tokenizer)
    block_size = loaded.model.config.block_size
    if config.seq_len > block_size:
        raise UserError(f"--seq_len {config.seq_len} is more than the model's context {block_size}")
    for note in (*loaded.notes, *val_data.stream.notes):
        ranks.print(note)
    prepare_device(ranks.device)
    ranks.connect(config.timeout)
    identity = val_data.stream.identity()
    ranks.check_settings(facts_to_compare(config, identity, val_data, examples))

    raw_model = loaded.model.to(ranks.device)
    raw_model.loss = linear_cross_entropy
    ranks.check_weights(raw_model, step=0)
    model = torch.compile(raw_model, dynamic=False) if is_compiled(config, ranks) else raw_model
    precision = choose_precision(ranks.device, config.dtype)
    if config.dtype == "auto":  # a run's own, so that the result is what the run has logged
        precision = loaded.checkpoint.get("precision", precision)
    half = precision != "float32"
    autocast = torch.autocast(ranks.device.type, getattr(torch, precision), enabled=half)
    batch_size = math.gcd(val_data.share, config.batch_size or 8)
    loss = validation_loss(model, val_data, val_steps, batch_size, ranks, autocast)
    tokens = val_steps * config.total_batch_size
    bits = loss / math.log(2) / bytes_per_token(val_data, val_steps, loaded.tokenizer)
    ranks.print(
        f"{name} on {tokens:,} validation tokens ({loaded.tokenizer.name}) of {config.data_dir}, "
        f"{precision}:\n"
        f"loss            {loss:.4f} nats per token\n"
        f"perplexity      {math.exp(loss):.4f}\n"
        f"bits per byte   {bits:.4f} (ends of documents count as tokens, but have no bytes)"
    )
    if examples:
        questions = hellaswag.questions_of_rank(
            examples, loaded.tokenizer, block_size, ranks, most_tokens=2**16
        )
        score = hellaswag.score(raw_model, questions, len(examples), ranks, autocast)
        shown = count(len(examples), "example")
        ranks.print(f"HellaSwag       {score:.4f} acc_norm (style completion, {shown})")
    return 0


def open_split(split: str, config: TrainConfig, ranks: Ranks) -> TokenLoader:
    """The tokens of "train" or "val" for this rank. Raises UserError for a bad data directory, and
    if the ranks can't get equal shares of a step."""
    return TokenLoader(
        config.data_dir, split, config.seq_len, config.total_batch_size, ranks.rank,
        ranks.world_size, pin_memory=ranks.device.type == "cuda",
        shuffle=config.seed if config.shuffle and split == "train" else None,
    )  # fmt: skip


def is_compiled(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the model is compiled: on CUDA by default, unless TORCH_COMPILE_DISABLE=1."""
    wanted = ranks.device.type == "cuda" if config.compile is None else config.compile
    return wanted and not torch._dynamo.config.disable


def facts_to_compare(config: TrainConfig, identity: dict, val_data, examples: list) -> dict:
    """What must be the same on every rank: all settings but paths, and the data."""
    paths = ("data_dir", "log_dir", "init_from", "hellaswag_data")
    facts = {f"--{name}": value for name, value in vars(config).items() if name not in paths}
    facts |= {f"data ({name})": value for name, value in identity.items()}
    if val_data:
        val_identity = val_data.stream.identity()
        facts |= {f"validation data ({name})": value for name, value in val_identity.items()}
    return facts | {"HellaSwag examples": len(examples)}


def summary(config: TrainConfig, facts: RunFacts, tokenizer_name: str, source: str) -> str:
    """Model and data of a run in two lines. source: where the weights come from."""
    shape = facts.model
    steps = f"{count(config.max_steps, 'step')} of {config.total_batch_size:,}"
    epochs = config.max_steps * config.total_batch_size / facts.data["tokens"]
    return (
        f"model: {facts.parameters:,} parameters from {source}; {count(shape['n_layer'], 'layer')},"
        f" {count(shape['n_head'], 'head')}, {count(shape['n_embd'], 'channel')}, "
        f"{shape['block_size']} tokens of context, a vocabulary of {shape['vocab_size']}\n"
        f"data: {facts.data['tokens']:,} training tokens ({tokenizer_name}) in {config.data_dir}; "
        f"{steps} are {epochs:.2f} epochs"
    )


def remarks(config: TrainConfig, train_data, val_data, val_steps: int) -> list[str]:
    """What to know about the data and the schedule before the run starts."""
    stream = train_data.stream
    lines = list(stream.notes)
    if stream.manifest is None:
        lines.append(f"{config.data_dir} has no manifest.json: assuming GPT-2's tokens")
    elif not stream.manifest.complete:
        lines.append(
            f"WARNING: {config.data_dir} is not complete: a run can't be resumed once its data has "
            "grown"
        )
    if config.warmup_steps > config.max_steps:
        lines.append(
            f"WARNING: --warmup_steps {config.warmup_steps} > --max_steps {config.max_steps}: "
            "the learning rate never reaches --max_lr"
        )
    used = val_steps * config.total_batch_size
    if val_data and used != config.val_tokens:
        lines.append(
            f"validation uses {used:,} tokens: --val_tokens {config.val_tokens:,} and the "
            f"{val_data.stream.tokens:,} validation tokens, rounded down to whole steps"
        )
    return lines


@torch.no_grad()
def validation_loss(
    model, val_data: TokenLoader, val_steps: int, batch_size: int, ranks: Ranks, autocast
) -> float:
    """Mean loss in nats per token over the first val_steps steps of the validation stream, on all
    ranks together. Raises Stopped."""
    micro_batches = val_steps * val_data.micro_steps(batch_size) * ranks.world_size
    total = torch.zeros((), device=ranks.device)
    for step in range(val_steps):
        for x, y in val_data.batches(step, batch_size):
            ranks.check_signals()
            x = x.to(ranks.device, non_blocking=True)  # (B, T)
            y = y.to(ranks.device, non_blocking=True)  # (B, T)
            with autocast:
                _, loss = model(x, y)
            total += loss / micro_batches
    return ranks.sum(total).item()


def bytes_per_token(val_data: TokenLoader, val_steps: int, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes per predicted token of the validation text."""
    n = val_steps * val_data.tokens_per_step
    return tokenizer.count_bytes(val_data.stream.read(1, n)) / n


def redraw_curve(log_dir: str, log: Log, ranks: Ranks) -> None:
    """Redraw the curve. A failure prints a warning: a picture must not end a run."""
    try:
        draw_curve(log_dir, log.streams)
    except Exception as error:
        ranks.print(f"WARNING: the curve is not drawn: {one_line_error(error)}")


def save(config: TrainConfig, state: dict, is_best: bool, log: Log, ranks: Ranks) -> None:
    """Save a checkpoint, link it, and remove those that need not be kept. Raises OSError if it
    can't be written, and UserError for weights that are not finite."""
    begun = time.perf_counter()
    if not os.path.isdir(config.log_dir):
        ranks.print(f"WARNING: {config.log_dir} has disappeared; creating it again")
    log.sync()
    path = save_checkpoint(config.log_dir, state)
    if is_best:
        link(path, BEST)
    seconds = time.perf_counter() - begun
    ranks.print(f"saved {path} in {seconds:.1f} s")
    try:
        remove_older(config.log_dir, state["step"], config.keep_every)
    except OSError as error:
        ranks.print(f"WARNING: an older checkpoint could not be removed: {error}")
    log.write(state["step"], save_s=seconds)


def link_best(log_dir: str, step: int) -> None:
    """Link BEST to the checkpoint of this step, if there is one."""
    if path := checkpoint_paths(log_dir).get(step):
        link(path, BEST)


@command
def main(argv=None) -> int:
    config = parse(TrainConfig, argv, __doc__, PRESETS)
    check_config(config)
    with Ranks(config.device) as ranks:
        ranks.enter_context(explain_out_of_memory())
        ranks.enter_context(explain_compile_failure())
        return evaluate(config, ranks) if config.eval_only else train(config, ranks)


if __name__ == "__main__":
    exit_process(main())
