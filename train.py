"""Train GPT-2: the run.

    python data_generator.py --preset demo && python train.py --preset demo     two CPU cores, a few minutes
    torchrun --standalone --nproc_per_node=8 train.py                           GPT-2 124M on 8 GPUs
    python train.py --batch_size 16                                             the same steps on one smaller GPU
    python train.py --init_from gpt2 --data_dir mydata --log_dir tuned          from OpenAI's weights, on other data

The same command starts a run and continues it. A step is `total_batch_size` tokens whatever the
number of GPUs; they share it out in micro-batches of `batch_size` sequences. Ctrl-C, SIGTERM,
SIGUSR1 and a closed terminal finish the step, save, and leave.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import dataclasses
import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import tiktoken
import torch
from torch.nn.parallel import DistributedDataParallel

import hellaswag
import metrics
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import (
    NEWEST,
    best_loss,
    load_model,
    newest_checkpoint,
    point_newest,
    remove_older,
    save_checkpoint,
)
from lib.cli import PositiveFloat, PositiveInt, UserError, command, count, leave, parse
from lib.files import only_writer
from lib.ranks import Ranks, explain_out_of_memory
from lib.shards import DATA_DIR, DEMO_DATA_DIR, TokenLoader
from lib.tokenizer import get_tokenizer
from sample import show_samples


@dataclass(frozen=True)
class TrainConfig:
    # the model
    preset: Literal["gpt2", "gpt2-fast", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = (
        "gpt2"  # sets defaults
    )
    init_from: str = "scratch"  # first weights: scratch, a checkpoint, an exported folder, or gpt2, gpt2-medium ...
    n_layer: PositiveInt | None = None  # transformer blocks (default: 12, or what --init_from has)
    n_head: PositiveInt | None = (
        None  # attention heads per block (default: 12, or what --init_from has)
    )
    n_embd: PositiveInt | None = None  # channels (default: 768, or what --init_from has)
    vocab_size: PositiveInt | None = (
        None  # rows of the token table (default: the tokenizer's, up to a multiple of 64)
    )
    block_size: PositiveInt | None = (
        None  # longest context in tokens (default: seq_len, or what --init_from has)
    )
    # directories
    data_dir: str = DATA_DIR  # shards to learn from
    log_dir: str = "log"  # log, curve and checkpoints
    resume: Literal["auto", "never"] = (
        "auto"  # go on from log_dir's newest checkpoint; never: refuse to
    )
    # a step
    total_batch_size: PositiveInt = (
        524_288  # tokens in a step, over all GPUs: 2^19, about the 0.5M of GPT-3's paper
    )
    batch_size: PositiveInt = (
        64  # sequences in a micro-batch; memory decides, the result does not change
    )
    seq_len: PositiveInt = 1024  # tokens in a sequence
    # the schedule
    max_steps: PositiveInt = 19_073  # updates: 10 billion tokens in steps of 2^19
    warmup_steps: int = 715  # updates of linear warm-up: 375 million tokens, as GPT-3's
    schedule: Literal["cosine", "linear"] = (
        "cosine"  # to min_lr from the warm-up on, or in the last decay_steps only
    )
    decay_steps: PositiveInt | None = (
        None  # of the linear schedule: updates of its decay (default: half of max_steps)
    )
    max_lr: PositiveFloat = 6e-4  # learning rate after the warm-up: GPT-3 124M's
    min_lr: float = 6e-5  # learning rate at the end
    optimizer: Literal["adamw", "muon"] = (
        "adamw"  # muon: for the matrices of the blocks; the rest takes AdamW
    )
    weight_decay: float = 0.1  # of matrices and embedding tables
    grad_clip: PositiveFloat = 1.0  # largest norm of the gradient
    # evaluation and checkpoints
    val_every: int = 250  # steps between validations; 0 switches off
    val_tokens: PositiveInt = 10_485_760  # tokens of a validation: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag evaluations; 0 switches off
    hellaswag_data: str | None = None  # .jsonl file of HellaSwag examples (default: from the Hub)
    sample_every: int = 250  # steps between samples; 0 switches off
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep_every: int = 5000  # checkpoints at multiples of it are kept for good; 0: only the last two
    keep_best: bool = False  # keep the weights with the lowest validation loss as model_best.pt
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = (
        "auto"  # precision; auto: the fastest of this hardware
    )
    recompute: bool = False  # compute activations twice instead of keeping them: less memory, about 4/3 of the time
    compile: bool | None = None  # torch.compile the model (default: on CUDA)
    timeout: PositiveInt = 600  # seconds that ranks wait for each other
    shuffle: bool = False  # read the sequences in a new order in each epoch (default: as they come)
    seed: int = 1337  # of the first weights and of --shuffle


PRESETS = {  # gpt2 to gpt2-xl: learning rates of table 2.1 of Brown et al. 2020; batch_size: what fits into 80 GB
    "gpt2": {},
    "gpt2-fast": {"optimizer": "muon", "schedule": "linear", "max_lr": 1.8e-3, "min_lr": 0.0, "warmup_steps": 250,
                  "max_steps": 9536},  # half the tokens: "Sooner to the same loss" in README
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "max_lr": 3e-4, "min_lr": 3e-5},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "max_lr": 2.5e-4, "min_lr": 2.5e-5, "batch_size": 32},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "max_lr": 2e-4, "min_lr": 2e-5, "batch_size": 16},
    "demo": {
        "data_dir": DEMO_DATA_DIR, "log_dir": "demo/log", "n_layer": 4, "n_head": 4, "n_embd": 128, "seq_len": 128,
        "batch_size": 8, "total_batch_size": 1024, "max_steps": 2500, "warmup_steps": 100, "optimizer": "muon",
        "schedule": "linear", "max_lr": 4e-3, "min_lr": 0.0, "val_every": 250, "val_tokens": 76_800,
        "hellaswag_every": 0, "sample_every": 500, "save_every": 250, "keep_every": 0, "dtype": "float32",
    },
}  # fmt: skip

# What a continued run may change: no step's tokens change by it. max_steps may only grow; the
# schedule follows it.
MAY_CHANGE = {
    "preset", "data_dir", "log_dir", "resume", "batch_size", "max_steps", "val_every", "val_tokens", "hellaswag_every",
    "hellaswag_data", "sample_every", "save_every", "keep_every", "keep_best", "device", "compile", "recompute",
    "timeout",
}  # fmt: skip
MODEL_FLAGS = tuple(field.name for field in dataclasses.fields(GPTConfig))
SKIPS_IN_A_ROW = 10  # updates that may be skipped for NaN or Inf before the run is given up
NOT_FINITE = """loss or gradient were not finite {skips} times in a row, up to step {step}.
HINT: --init_from {log_dir} (its last good weights, if saved), another --log_dir, a lower --max_lr or --dtype float32"""


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: linear warm-up to max_lr, then down to
    min_lr at max_steps, by a cosine; or constant, then linearly over the last decay_steps."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "linear":
        decay_steps = config.decay_steps or max(1, config.max_steps // 2)
        share = min(
            1, max(0, (config.max_steps - step) / decay_steps)
        )  # of the way from min_lr to max_lr
    else:
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.min_lr + share * (config.max_lr - config.min_lr)


def due(step: int, every: int, max_steps: int) -> bool:
    """Is something that happens every so many steps due now? At the end it always is; every 0
    switches it off."""
    return every > 0 and (step % every == 0 or step == max_steps)


def check_config(config: TrainConfig) -> None:
    """Raise UserError for values that contradict each other; the bounds of single ones stand beside
    their fields."""
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr} is above --max_lr {config.max_lr}")
    if config.decay_steps and config.schedule == "cosine":
        raise UserError(
            f"--decay_steps {config.decay_steps} belongs to --schedule linear; the cosine has none"
        )
    if config.val_every and config.val_tokens < config.total_batch_size:
        raise UserError(
            f"--val_tokens {config.val_tokens} is less than one step, --total_batch_size {config.total_batch_size}: "
            "validation uses whole steps, so it must be at least as many"
        )


# ---- the parts of a run: data, model, and what a checkpoint says of both


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on."""

    train: TokenLoader
    val: TokenLoader | None  # None: no validation
    val_steps: int  # whole steps of the validation stream that are used
    encoding: tiktoken.Encoding
    examples: list[dict]  # HellaSwag's; empty: no HellaSwag


def open_data(config: TrainConfig, ranks: Ranks) -> Data:
    """Raises UserError if the shards, the tokenizer or HellaSwag can't be had, before anything is
    written."""
    layout = (
        config.seq_len,
        config.batch_size,
        config.total_batch_size,
        ranks.rank,
        ranks.world_size,
    )
    pin_memory = ranks.device.type == "cuda"
    shuffle = config.seed if config.shuffle else None
    train = TokenLoader(config.data_dir, "train", *layout, pin_memory=pin_memory, shuffle=shuffle)
    val = (
        TokenLoader(config.data_dir, "val", *layout, pin_memory=pin_memory)
        if config.val_every
        else None
    )
    val_steps = min(config.val_tokens // config.total_batch_size, val.steps) if val else 0
    examples = hellaswag.load_examples(config.hellaswag_data) if config.hellaswag_every else []
    return Data(train, val, val_steps, get_tokenizer(train.tokenizer), examples)


def first_model(config: TrainConfig, loader: TokenLoader) -> GPT:
    """The model before its first update, on the CPU: new weights, or those of --init_from."""
    given = {
        name: getattr(config, name) for name in MODEL_FLAGS if getattr(config, name) is not None
    }
    if config.init_from == "scratch":
        padded = math.ceil(loader.n_vocab / 64) * 64  # GPUs like multiples of 64
        torch.manual_seed(config.seed)
        try:
            model = GPT(GPTConfig(**{"vocab_size": padded, "block_size": config.seq_len} | given))
        except ValueError as error:
            raise UserError(f"--{error}") from None
    else:
        model, tokenizer = load_model(config.init_from)
        for name, value in given.items():
            if value != (has := getattr(model.config, name)):
                where = f"--init_from {config.init_from}, which has {has}"
                raise UserError(f"--{name} {value} contradicts {where}: leave the flag out")
        if tokenizer != loader.tokenizer:
            raise UserError(
                f"--init_from {config.init_from} reads {tokenizer} tokens, {config.data_dir} has {loader.tokenizer}"
            )
    if config.seq_len > model.config.block_size:
        raise UserError(
            f"--seq_len {config.seq_len} is more than the model's block_size {model.config.block_size}"
        )
    if loader.n_vocab > model.config.vocab_size:
        raise UserError(
            f"--vocab_size {model.config.vocab_size} is less than the tokenizer's {loader.n_vocab} tokens"
        )
    return model


def check_same_run(config: TrainConfig, data: dict, checkpoint: dict, path) -> None:
    """Raise UserError naming each setting in which this run differs from the one it would
    continue."""
    if config.resume == "never":
        raise UserError(
            f"{config.log_dir} has checkpoints: choose another --log_dir, or --resume auto to go on from {path.name}"
        )
    if "optimizer" not in checkpoint:
        raise UserError(
            f"{path} has weights only, no run to continue: use --init_from {path} and another --log_dir"
        )
    now, model = vars(config), vars(checkpoint["config"])
    then = vars(TrainConfig()) | checkpoint["train_config"]  # older checkpoints lack newer flags
    pairs = [
        (name, then[name], now[name]) for name in now if name not in {*MAY_CHANGE, *MODEL_FLAGS}
    ]
    pairs += [(name, model[name], now[name]) for name in MODEL_FLAGS if now[name] is not None]
    pairs += [
        (f"data ({name})", checkpoint["data"].get(name), value) for name, value in data.items()
    ]
    differences = [
        f"{name} was {before}, is {value}" for name, before, value in pairs if before != value
    ]
    if config.max_steps < then["max_steps"]:
        differences.append(
            f"max_steps was {then['max_steps']}, is {config.max_steps}, and may only grow"
        )
    if differences:
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --log_dir for a new run, or give the old settings to continue this one"
        )


def announce(config: TrainConfig, ranks: Ranks, data: Data, facts: dict, source) -> None:
    """Print the run's model, data and machine, and what to know of its data, before the first
    step."""
    ranks.say(metrics.in_words(facts, source, data.train))
    if data.train.manifest and not data.train.manifest.complete:
        ranks.say(
            f"WARNING: {config.data_dir} is not complete: a run can't go on after its data has grown"
        )
    if config.warmup_steps > config.max_steps:
        ranks.say(
            f"WARNING: --warmup_steps {config.warmup_steps} > --max_steps {config.max_steps}: none has --max_lr"
        )
    if data.val and (tokens := data.val_steps * data.val.step_tokens) != config.val_tokens:
        ranks.say(
            f"validation uses {tokens:,} tokens: the whole steps in --val_tokens {config.val_tokens:,} and in the "
            f"{data.val.tokens:,} of the validation shards"
        )


# ---- what the loop calls


def evaluate(
    step: int,
    config: TrainConfig,
    ranks: Ranks,
    data: Data,
    questions,
    model,
    raw_model: GPT,
    autocast,
    log,
):
    """Validation, HellaSwag and samples, as far as they are due: {stream: value}, logged, or None
    if a signal came."""
    every = config.val_every, config.hellaswag_every, config.sample_every
    validating, scoring, sampling = (due(step, steps, config.max_steps) for steps in every)
    measured, start, n = {}, time.time(), len(data.examples)
    if validating:
        if (loss := validation_loss(model, data, ranks, autocast)) is None:
            return None
        measured["val"] = loss
        ranks.say(
            f"step {step:5d} | validation loss {loss:.4f} on {data.val_steps * data.val.step_tokens:,} tokens"
        )
    if scoring:
        if (score := hellaswag.score(raw_model, questions, n, ranks, autocast)) is None:
            return None
        measured["hella"] = score
        ranks.say(
            f"step {step:5d} | HellaSwag acc_norm {score:.4f} (style completion, {count(n, 'example')})"
        )
    if sampling and ranks.main:
        ranks.say(show_samples(raw_model, data.encoding, autocast))
    if validating or scoring or sampling:
        log.write(step, **measured, eval_s=time.time() - start)
    if validating and ranks.main:
        try:
            metrics.plot(config.log_dir)
        except OSError as error:
            ranks.say(f"WARNING: {error}; the curve is not drawn")
    return measured


@torch.no_grad()
def validation_loss(model, data: Data, ranks: Ranks, autocast) -> float | None:
    """Mean loss in nats per token over the first val_steps steps of the validation stream, on all
    ranks together; None if a signal came meanwhile."""
    total = torch.zeros((), device=ranks.device)
    for step in range(data.val_steps):
        for x, y in data.val.batches(step):
            if ranks.stopping():
                return None
            with autocast:
                _, loss = model(
                    x.to(ranks.device, non_blocking=True), y.to(ranks.device, non_blocking=True)
                )
            total += loss / (data.val_steps * data.val.micro_steps * ranks.world_size)
    return ranks.sum(total).item()


def save(
    config: TrainConfig, ranks: Ranks, log: metrics.Log, state: dict, best: bool = False
) -> bool:
    """Save the state on the main rank. False if the disk did not take it, which costs this save and
    not the run."""
    if not ranks.main:
        return True
    start, step = time.time(), state["step"]
    try:
        log.sync()
        path = save_checkpoint(config.log_dir, state, best)
    except OSError as error:
        ranks.say(
            f"WARNING: saving step {step} in {config.log_dir}: {error}; earlier checkpoints are intact"
        )
        return False
    for problem in [] if best else remove_older(config.log_dir, step, config.keep_every):
        ranks.say(f"WARNING: an older checkpoint could not be removed: {problem}")
    if not best:
        log.write(step, save_s=time.time() - start)
    ranks.say(f"saved {path} in {time.time() - start:.1f} s")
    return True


# ---- the run


def state_to_go_on_from(config: TrainConfig, ranks: Ranks, data: Data) -> tuple[GPT, dict]:
    """(model on the CPU, the rest of the state) of the newest good checkpoint, or of a run before
    its first update."""
    state, path, damaged = newest_checkpoint(config.log_dir)
    precision = ranks.precision(config.dtype)
    if state is None:
        state = {"step": 0, "val_loss": None, "val_step": None, "precision": precision}
        return first_model(config, data.train), state | {"source": config.init_from}
    if "precision" not in state and config.dtype == "auto" and ranks.device.type == "cpu":
        precision = "float32"  # older checkpoints don't name theirs; on a CPU it was this
    state.setdefault("precision", precision)
    check_same_run(config, data.train.identity(), state, path)
    for reason in damaged:
        ranks.say(f"WARNING: {reason}: passed over")
    if (
        ranks.main and path.with_name(NEWEST).resolve() != path.resolve()
    ):  # killed before it was moved, or damaged
        point_newest(path)
    ranks.say(f"going on from {path}, after {count(state['step'], 'step')}")
    if state["precision"] != precision:
        ranks.say(
            f"the run began in {state['precision']} and goes on in it; a new one would take {precision} here"
        )
    if (before := state["train_config"]["max_steps"]) != config.max_steps:
        schedule = config.schedule.replace("linear", "decay")
        ranks.say(f"max_steps was {before}: from here the {schedule} ends at {config.max_steps}")
    model = GPT(state["config"])
    model.load_state_dict(state.pop("model"))
    return model, state | {"source": path}


def train(config: TrainConfig, ranks: Ranks, data: Data) -> int:
    """Start the run, or go on from its newest checkpoint, to max_steps or until a signal. Returns
    the exit code."""
    raw_model, state = state_to_go_on_from(config, ranks, data)
    first_step, precision, val_loss = state["step"], state["precision"], state["val_loss"]
    val_step = state.get("val_step", first_step)  # older checkpoints lack it
    questions = hellaswag.share_out(
        data.examples, data.encoding, raw_model.config.block_size, ranks
    )

    # ---- model and optimizer
    ranks.connect(config.timeout)
    raw_model.to(ranks.device).train()
    raw_model.recompute = config.recompute
    ranks.check_same(raw_model, first_step)
    lowest = ranks.max(
        best_loss(config.log_dir) if first_step else math.inf
    ).item()  # validation loss of model_best.pt
    optimizer = raw_model.configure_optimizers(
        config.weight_decay, config.max_lr, config.optimizer == "muon"
    )
    # float16 holds 6e-8 to 65504: scaling the loss keeps small gradients from 0; an overflow halves
    # the scale
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "float16")
    if first_step:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state.get("scaler", {}))
    autocast = torch.autocast(
        ranks.device.type, getattr(torch, precision), enabled=precision != "float32"
    )
    compiled = ranks.device.type == "cuda" if config.compile is None else config.compile
    # model learns, in the one shape of a micro-batch; raw_model, the same weights, takes all shapes
    # and is saved
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ranks.world_size > 1:
        model = DistributedDataParallel(
            model, gradient_as_bucket_view=True
        )  # averages gradients over the ranks

    # ---- log
    facts = metrics.describe(
        vars(config), ranks, raw_model, data.train.identity(), precision, compiled
    )
    announce(config, ranks, data, facts, state["source"])
    del state  # gigabytes
    evaluations = {"val": config.val_every, "hella": config.hellaswag_every}
    not_again = [
        name for name, every in evaluations.items() if not due(first_step, every, config.max_steps)
    ]
    log = metrics.Log(config.log_dir if ranks.main else None, first_step, not_again)
    speed = metrics.Speed(raw_model.config, config, ranks, precision)
    if ranks.main:
        metrics.write_run(config.log_dir, facts)
    ranks.signals.listen()
    constant = {"config": raw_model.config, "train_config": vars(config), "precision": precision}
    constant |= {"tokenizer": data.train.tokenizer, "data": data.train.identity()}

    # ---- the loop. step counts the updates made; after the last one there is one more turn, to
    # evaluate and save
    stop, skips, saved, printed = False, 0, True, 0.0
    for step in range(first_step, config.max_steps + 1):
        measured = (
            None
            if stop
            else evaluate(step, config, ranks, data, questions, model, raw_model, autocast, log)
        )
        stop = measured is None
        best = not stop and config.keep_best and measured.get("val", math.inf) < lowest
        if not stop and "val" in measured:
            val_loss, val_step = measured["val"], step
        last = step == config.max_steps or stop
        saving = (last or due(step, config.save_every, config.max_steps)) and step > first_step
        if saving or best:
            ranks.check_same(raw_model, step)
            state = constant | {
                "step": step,
                "val_loss": val_loss,
                "val_step": val_step,
                "scaler": scaler.state_dict(),
            }
            state |= {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}
            if best:
                failed = ranks.max(not save(config, ranks, log, state, best))
                lowest = lowest if failed else val_loss
            saved = save(config, ranks, log, state) if saving else saved
        if last:
            break

        start, lr = time.time(), get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step, (x, y) in enumerate(data.train.batches(step)):
            x, y = (
                x.to(ranks.device, non_blocking=True),
                y.to(ranks.device, non_blocking=True),
            )  # (B, T)
            # gradients add up on each rank; the backward pass of the last micro-batch averages them
            # over the ranks
            model.require_backward_grad_sync = micro_step == data.train.micro_steps - 1
            with autocast:
                _, loss = model(x, y)
            scaler.scale(loss / data.train.micro_steps).backward()
            loss_sum += loss.detach() / (data.train.micro_steps * ranks.world_size)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip)
        # the step's one wait for the GPU. All ranks stop after the same step, whichever of them had
        # the signal
        loss, norm, stop = torch.stack((ranks.sum(loss_sum), norm, ranks.stopping())).tolist()
        if math.isfinite(loss) and math.isfinite(
            norm
        ):  # both are over all ranks, so each of them decides the same
            optimizer.step()
            skips = 0
        else:
            if (
                scaler.get_scale() <= 1
            ):  # above 1, which only float16 has, overflows are normal: they lower it
                skips += 1
            log.write(step, skipped=1)
            ranks.say(
                f"step {step:5d} | loss {loss} norm {norm}: not finite, the update is skipped"
            )
        scaler.update()
        optimizer.zero_grad()
        if skips == SKIPS_IN_A_ROW:
            raise UserError(
                NOT_FINITE.format(skips=skips, step=step, log_dir=config.log_dir), code=1
            )
        log.write(step, train=loss, lr=lr, norm=norm, **speed.measure(time.time() - start))
        if (
            time.time() - printed > 1 or step + 1 == config.max_steps
        ):  # a line a second is enough to read
            printed, left = time.time(), config.max_steps - step - 1
            ranks.say(
                f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {speed.line(left)}"
            )

    # ---- the end. All wait here for rank 0's save: torchrun ends a rank half a minute after
    # another one has left
    if ranks.max(not saved):
        raise UserError(
            f"the last checkpoint could not be saved in {config.log_dir}: make room and rerun",
            code=1,
        )
    if stop:
        number = signal.Signals(int(ranks.stopping()))
        after = count(step, "step") + (", saved" if step else "")
        ranks.say(f"stopped by {number.name} after {after}; the same command goes on from here")
        return 128 + number
    if first_step == config.max_steps:
        ranks.say(f"finished at step {step}: raise --max_steps or choose another --log_dir")
    else:
        ranks.say(
            f"done: {count(step, 'step')}, peak memory {ranks.peak_memory():.1f} GB per process"
        )
    path = f"{config.log_dir}/model_checkpoint.pt"
    ranks.say(
        f"next: python sample.py --model {path}\n      python export.py --model {path} --out GPT124M"
    )
    return 0


@command
def main(argv=None) -> int:
    config = parse(TrainConfig, argv, __doc__, PRESETS)
    check_config(config)
    with Ranks(config.device) as ranks, explain_out_of_memory(config.batch_size, config.recompute):
        data = open_data(config, ranks)
        with (
            only_writer(config.log_dir, "*.pt", "log.txt", "run.json", "*.png")
            if ranks.main
            else nullcontext()
        ):
            return train(config, ranks, data)


if __name__ == "__main__":
    leave(main())
