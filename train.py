"""Train GPT-2: the run.

    python data_generator.py --preset demo && python train.py --preset demo     two CPU cores, a few minutes
    torchrun --standalone --nproc_per_node=8 train.py                           GPT-2 124M on 8 GPUs
    python train.py --batch_size 16                                             the same steps on one smaller GPU
    python train.py --init_from gpt2 --data_dir mydata --log_dir tuned          from OpenAI's weights, on other data

The same command starts a run and continues it. A step is `total_batch_size` tokens whatever the number of GPUs; they
share it out in micro-batches of `batch_size` sequences. Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal finish the step,
save, and leave.

Shapes: B sequences in a micro-batch (batch_size), T tokens in a sequence (seq_len).
"""

import contextlib
import dataclasses
import datetime
import errno
import math
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hellaswag
import metrics
from GPT_Modules import GPT, GPTConfig
from lib.checkpoint import SaveError, load_model, newest_checkpoint, point_newest, save_checkpoint
from lib.cli import PositiveFloat, PositiveInt, UserError, choose_device, command, forget_output, parse
from lib.files import only_writer
from lib.shards import DATA_DIR, DEMO_DATA_DIR, TokenLoader
from lib.tokenizer import get_tokenizer
from sample import stream_text


@dataclass(frozen=True)
class TrainConfig:
    # the model
    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "demo"] = "gpt2"  # defaults of the other flags
    init_from: str = "scratch"  # first weights: scratch, a checkpoint, an exported folder, or gpt2, gpt2-medium ...
    n_layer: PositiveInt | None = None  # transformer blocks (default: 12, or what --init_from has)
    n_head: PositiveInt | None = None  # attention heads per block (default: 12, or what --init_from has)
    n_embd: PositiveInt | None = None  # channels (default: 768, or what --init_from has)
    vocab_size: PositiveInt | None = None  # rows of the token table (default: the tokenizer's, up to a multiple of 64)
    block_size: PositiveInt | None = None  # longest context in tokens (default: seq_len, or what --init_from has)
    # the places
    data_dir: str = DATA_DIR  # shards to learn from
    log_dir: str = "log"  # log, curve and checkpoints
    resume: Literal["auto", "never"] = "auto"  # go on from the newest checkpoint in log_dir, or insist on a new run
    # a step
    total_batch_size: PositiveInt = 524_288  # tokens in a step, over all GPUs: 2^19, about the 0.5M of GPT-3's paper
    batch_size: PositiveInt = 64  # sequences in a micro-batch; memory decides, the result does not change
    seq_len: PositiveInt = 1024  # tokens in a sequence
    # the schedule
    max_steps: PositiveInt = 19_073  # updates: 10 billion tokens in steps of 2^19
    warmup_steps: int = 715  # updates of linear warm-up: 375 million tokens, as GPT-3's
    max_lr: PositiveFloat = 6e-4  # learning rate after the warm-up: GPT-3 124M's
    min_lr: float = 6e-5  # learning rate at the end of the cosine
    weight_decay: float = 0.1  # AdamW's, on matrices only
    grad_clip: PositiveFloat = 1.0  # largest norm of the gradient
    # looking and keeping
    val_every: int = 250  # steps between validations; 0 switches off
    val_tokens: PositiveInt = 10_485_760  # tokens of a validation: 20 steps' worth
    hellaswag_every: int = 250  # steps between HellaSwag evaluations; 0 switches off
    hellaswag_data: str | None = None  # .jsonl file of HellaSwag examples (default: from the Hub)
    sample_every: int = 250  # steps between samples; 0 switches off
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep_every: int = 5000  # checkpoints at multiples of it are kept for good; 0: only the last two
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # precision; auto is bfloat16 on GPUs that have it
    compile: bool | None = None  # torch.compile the model (default: on CUDA)
    timeout: PositiveInt = 600  # seconds that ranks wait for each other
    seed: int = 1337  # of the first weights


PRESETS = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "demo": {
        "data_dir": DEMO_DATA_DIR, "log_dir": "demo/log", "n_layer": 4, "n_head": 4, "n_embd": 128, "seq_len": 64,
        "batch_size": 8, "total_batch_size": 512, "max_steps": 6000, "warmup_steps": 150, "max_lr": 3e-3,
        "min_lr": 0.0, "val_every": 500, "val_tokens": 76_800, "hellaswag_every": 0, "sample_every": 1500,
        "save_every": 500, "keep_every": 0,
    },
}  # fmt: skip

# What a continued run may change: it leaves tokens and mathematics as they were. max_steps may grow.
MAY_CHANGE = {
    "preset", "data_dir", "log_dir", "resume", "batch_size", "max_steps", "val_every", "val_tokens", "hellaswag_every",
    "hellaswag_data", "sample_every", "save_every", "keep_every", "device", "compile", "timeout",
}  # fmt: skip
MODEL_FLAGS = tuple(field.name for field in dataclasses.fields(GPTConfig))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SKIPS_IN_A_ROW = 10  # updates that may be skipped for NaN or Inf before the run is given up


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of the update after `step` updates: linear warm-up to max_lr, cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(1, progress))) * (config.max_lr - config.min_lr)


def due(step: int, every: int, max_steps: int) -> bool:
    """Is something that happens every so many steps due now? At the end it always is; every 0 switches it off."""
    return every > 0 and (step % every == 0 or step == max_steps)


def check_config(config: TrainConfig) -> None:
    """Raise UserError for values that contradict each other; the bounds of single ones stand beside their fields."""
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr} is above --max_lr {config.max_lr}")
    if config.val_every and config.val_tokens < config.total_batch_size:
        raise UserError(
            f"--val_tokens {config.val_tokens} is less than one step, --total_batch_size {config.total_batch_size}: "
            "validation uses whole steps, so it must be at least as many"
        )


def first_model(config: TrainConfig, loader: TokenLoader) -> GPT:
    """The model before its first update, on the CPU: new weights, or those of --init_from."""
    given = {name: getattr(config, name) for name in MODEL_FLAGS if getattr(config, name) is not None}
    if config.init_from == "scratch":
        padded = math.ceil(loader.n_vocab / 64) * 64  # GPUs like multiples of 64
        try:
            gpt_config = GPTConfig(**{"vocab_size": padded, "block_size": config.seq_len} | given)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        torch.manual_seed(config.seed)
        model = GPT(gpt_config)
    else:
        model, tokenizer = load_model(config.init_from)
        check_shape(given, model.config, f"--init_from {config.init_from}")
        if tokenizer != loader.tokenizer:
            raise UserError(
                f"--init_from {config.init_from} reads {tokenizer} tokens, {config.data_dir} has {loader.tokenizer}"
            )
    if config.seq_len > model.config.block_size:
        raise UserError(f"--seq_len {config.seq_len} is more than the model's block_size {model.config.block_size}")
    if loader.n_vocab > model.config.vocab_size:
        raise UserError(f"--vocab_size {model.config.vocab_size} is less than the tokenizer's {loader.n_vocab} tokens")
    return model


def check_shape(given: dict, shape: GPTConfig, where: str) -> None:
    for name, value in given.items():
        if value != getattr(shape, name):
            raise UserError(
                f"--{name} {value} contradicts {where}, which has {getattr(shape, name)}: leave the flag out"
            )


def check_same_run(config: TrainConfig, data: dict, checkpoint: dict, path) -> None:
    """Raise UserError naming each setting in which this run differs from the one it would continue."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} has weights only, no run to continue: use --init_from {path} and another --log_dir")
    now, then, shape = vars(config), checkpoint["train_config"], vars(checkpoint["config"])
    pairs = [
        (name, then.get(name, value), value) for name, value in now.items() if name not in {*MAY_CHANGE, *MODEL_FLAGS}
    ]
    pairs += [(name, shape[name], now[name]) for name in MODEL_FLAGS if now[name] is not None]
    pairs += [(f"data ({name})", checkpoint["data"].get(name), value) for name, value in data.items()]
    differences = [f"{name} was {before}, is {value}" for name, before, value in pairs if before != value]
    if config.max_steps < max(checkpoint["step"], then["max_steps"]):
        differences.append(f"max_steps was {then['max_steps']}, is {config.max_steps}, and may only grow")
    if differences:
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(differences)}.\n"
            "HINT: choose another --log_dir for a new run, or give the old settings to continue this one"
        )


def ranks_agree(raw_model: GPT, step: int, world_size: int) -> None:
    """Raise UserError, the same on every rank, if the weights or the step are not the same everywhere, bit for bit."""
    if world_size == 1:
        return
    sums = [parameter.detach().view(torch.int32).sum() for parameter in raw_model.parameters()]
    mine = torch.stack([torch.full_like(sums[0], step), *sums])
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine)
    if different := [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]:
        raise UserError(
            f"at step {step} the weights of ranks {different} differ from rank 0's: nothing is saved.\n"
            "HINT: a GPU or its memory may be failing; the same command goes on from the last checkpoint",
            code=1,
        )


@torch.no_grad()
def validation_loss(model, loader: TokenLoader, steps: int, device, autocast, world_size: int) -> float:
    """Mean loss in nats per token over the first `steps` steps of the validation stream, on all ranks together."""
    total = torch.zeros((), device=device)
    for step in range(steps):
        for x, y in loader.batches(step):
            with autocast:
                _, loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            total += loss / (steps * loader.micro_steps * world_size)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item()


def hellaswag_score(raw_model: GPT, questions, n: int, device, autocast, world_size: int) -> float:
    """acc_norm over n examples, of which this rank has a share."""
    with autocast:
        right = hellaswag.count_right(questions, hellaswag.losses(raw_model, questions))
    right = torch.tensor(right, device=device)
    if world_size > 1:
        dist.all_reduce(right)
    return right[1].item() / n


def hardware(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{world_size} x {device.type.upper()}{threads}"


def peak_memory(device: torch.device) -> float:
    """GB that this process has used at most, of the GPU's memory or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def run(config: TrainConfig, stack: contextlib.ExitStack) -> int:
    # ---- who we are
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )

    def say(text: str) -> None:
        if rank == 0:
            try:
                print(text, flush=True)
            except OSError as error:  # no reason to stop: log.txt has the numbers
                if error.errno != errno.ENOSPC:  # a terminal that is gone stays away, a full disk may have room again
                    forget_output()

    check_config(config)
    device = choose_device(config.device, local_rank)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and has_bf16)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays in fp32 may use TF32
    if device.type == "cpu":
        # glibc's malloc keeps free blocks as large as the largest that it has seen freed (32 MB at most); else it gives
        # the activations back to the kernel in every step, and fetches them again page by page
        torch.empty(31 * 2**18)

    # ---- tokens
    shape = config.seq_len, config.batch_size, config.total_batch_size, rank, world_size
    train_loader = TokenLoader(config.data_dir, "train", *shape)
    val_loader = TokenLoader(config.data_dir, "val", *shape) if config.val_every else None
    data, encoding = train_loader.identity(), get_tokenizer(train_loader.tokenizer)
    val_steps = min(config.val_tokens // config.total_batch_size, val_loader.steps) if val_loader else 0
    examples = hellaswag.load_examples(config.hellaswag_data) if config.hellaswag_every else []

    # ---- model and optimizer
    if rank == 0:
        stack.enter_context(only_writer(config.log_dir))
    checkpoint, path, damaged = newest_checkpoint(config.log_dir)
    if checkpoint and config.resume == "never":
        raise UserError(
            f"{config.log_dir} has checkpoints: choose another --log_dir, or --resume auto to go on from {path.name}"
        )
    if checkpoint:
        check_same_run(config, data, checkpoint, path)
        raw_model = GPT(checkpoint["config"])
        raw_model.load_state_dict(checkpoint["model"])
        start_step, val_loss = checkpoint["step"], checkpoint["val_loss"]
        last_max_steps = checkpoint["train_config"]["max_steps"]
    else:
        raw_model, start_step, val_loss, last_max_steps = first_model(config, train_loader), 0, None, config.max_steps
    gpt_config = raw_model.config
    questions = hellaswag.prepare(
        examples[rank::world_size], encoding, "completion", gpt_config.block_size, hellaswag.token_budget(device)
    )
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=config.timeout)
        )
    raw_model.to(device).train()
    ranks_agree(raw_model, start_step, world_size)
    optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    del checkpoint  # gigabytes
    compiled = device.type == "cuda" if config.compile is None else config.compile
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if world_size > 1:
        model = DistributedDataParallel(
            model, device_ids=[local_rank] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    # ---- the run's arithmetic, before it costs anything
    parameters = list(raw_model.parameters())
    n_parameters = sum(parameter.numel() for parameter in parameters)
    precision = "bfloat16" if bf16 else "float32"
    say(
        f"model: {n_parameters:,} parameters from {path or config.init_from}; {gpt_config.n_layer} layers, "
        f"{gpt_config.n_head} heads, {gpt_config.n_embd} channels, {gpt_config.block_size} tokens of context, "
        f"{gpt_config.vocab_size} words"
    )
    say(
        f"data: {train_loader.tokens:,} tokens ({train_loader.tokenizer}) to learn from in {config.data_dir}; "
        f"{config.max_steps:,} steps of {config.total_batch_size:,} are "
        f"{config.max_steps * config.total_batch_size / train_loader.tokens:.2f} epochs"
    )
    say(
        f"machine: {hardware(device, world_size)}, {precision}, {'compiled' if compiled else 'not compiled'}; a step "
        f"is {train_loader.micro_steps} micro-batches of {config.batch_size} x {config.seq_len} tokens for each process"
    )
    if device.type == "cuda" and not bf16 and config.dtype == "auto":
        say("this GPU has no bfloat16: training in float32, at a fraction of the speed")
    if not train_loader.complete:
        say(f"WARNING: {config.data_dir} is not complete: run data_generator.py again for the rest of its tokens")
    if val_loader and val_steps * config.total_batch_size != config.val_tokens:
        say(
            f"validation uses {val_steps * config.total_batch_size:,} tokens: the whole steps in --val_tokens "
            f"{config.val_tokens:,} and in the {val_loader.tokens:,} of the validation shards"
        )
    for reason in damaged:
        say(f"WARNING: {reason}: passed over")
    if path:
        say(f"going on from {path}, after {start_step:,} steps")
    if last_max_steps != config.max_steps:
        say(f"max_steps was {last_max_steps}: from here the cosine ends at {config.max_steps}")
    flops = metrics.flops_per_token(gpt_config, config.seq_len)
    peak_flops = metrics.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None

    log = None
    if rank == 0:
        log = metrics.Log(config.log_dir, start_step)
        if damaged:
            point_newest(path)
        metrics.write_run(
            config.log_dir,
            {
                "config": vars(config),
                "model": vars(gpt_config),
                "data": data,
                "parameters": n_parameters,
                "tokens_per_step": config.total_batch_size,
                "hardware": hardware(device, world_size),
                "precision": precision,
                "compiled": compiled,
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            },
        )

    # a signal only leaves a note; the ranks read it together at the end of the step
    received, parent = [], os.getppid()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            stack.callback(signal.signal, number, signal.signal(number, lambda number, frame: received.append(number)))

    def record(step, **values):
        if log:
            log.write(step, **values)

    def save(step) -> bool:
        if log is None:
            return True
        start = time.time()
        try:
            log.sync()
            saved = save_checkpoint(
                config.log_dir,
                config.keep_every,
                {
                    "model": raw_model.state_dict(),
                    "config": gpt_config,
                    "step": step,
                    "val_loss": val_loss,
                    "tokenizer": train_loader.tokenizer,
                    "optimizer": optimizer.state_dict(),
                    "train_config": vars(config),
                    "data": data,
                },
            )
        except (SaveError, OSError) as error:
            say(f"WARNING: saving step {step} in {config.log_dir}: {error}; earlier checkpoints are intact")
            return False
        record(step, save_s=time.time() - start)
        say(f"saved {saved} in {time.time() - start:.1f} s")
        return True

    # ---- the loop
    stop, skips, seconds, last_line, saved = 0, 0, [], 0.0, True
    for step in range(start_step, config.max_steps + 1):
        last = step == config.max_steps or stop
        validating, scoring, sampling = (
            not stop and due(step, every, config.max_steps)
            for every in (config.val_every, config.hellaswag_every, config.sample_every)
        )
        saving = (last or due(step, config.save_every, config.max_steps)) and step > start_step
        eval_start = time.time()
        if validating or saving:
            ranks_agree(raw_model, step, world_size)
        if validating:
            val_loss = validation_loss(model, val_loader, val_steps, device, autocast, world_size)
            record(step, val=val_loss)
            say(f"step {step:5d} | validation loss {val_loss:.4f} on {val_steps * config.total_batch_size:,} tokens")
        if scoring:
            score = hellaswag_score(raw_model, questions, len(examples), device, autocast, world_size)
            record(step, hella=score)
            say(f"step {step:5d} | HellaSwag acc_norm {score:.4f} (style completion, {len(examples):,} examples)")
        if sampling and rank == 0:
            show_samples(raw_model, encoding, autocast, say)
        if validating or scoring or sampling:
            record(step, eval_s=time.time() - eval_start)
        if validating and rank == 0:
            try:
                metrics.plot(config.log_dir)
            except OSError as error:
                say(f"WARNING: {error}; the curve is not drawn")
        if saving:
            saved = save(step)
        if last:
            break

        step_start = time.time()
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=device)
        for micro_step, (x, y) in enumerate(train_loader.batches(step)):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)  # (B, T)
            # gradients add up on each rank, and are averaged over the ranks with the last micro-batch only
            model.require_backward_grad_sync = micro_step == train_loader.micro_steps - 1
            with autocast:
                _, loss = model(x, y)
            (loss / train_loader.micro_steps).backward()
            loss_sum += loss.detach() / (train_loader.micro_steps * world_size)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        # one exchange and one synchronisation a step: loss, norm, and which signals the ranks have had
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent  # torchrun was killed
        notes = [number in received or (orphaned and number == signal.SIGTERM) for number in SIGNALS]
        shared = torch.cat((loss_sum.view(1), torch.tensor(notes).to(device, torch.float32, non_blocking=True)))
        if world_size > 1:
            dist.all_reduce(shared)
        loss, *notes, norm = torch.cat((shared, norm.view(1))).tolist()
        if math.isfinite(loss) and math.isfinite(norm):  # the same on every rank: both are sums over all of them
            optimizer.step()
            skips = 0
        else:
            record(step, skipped=1)
            skips += 1
            say(f"step {step:5d} | loss {loss} norm {norm}: not finite, the update is skipped")
        optimizer.zero_grad()
        seconds = [*seconds[-49:], time.time() - step_start]
        stop = next((number for number, count in zip(SIGNALS, notes, strict=True) if count), 0)
        if skips == SKIPS_IN_A_ROW:
            raise UserError(
                f"loss or gradient were not finite {skips} times in a row, up to step {step}.\nHINT: the last good "
                f"checkpoint is in {config.log_dir}; try a lower --max_lr or --dtype float32 from there",
                code=1,
            )
        tok_s = config.total_batch_size / seconds[-1]
        speed = {"tok_s": tok_s}
        if peak_flops:
            speed["mfu"] = tok_s * flops / (peak_flops * world_size)
        record(step, train=loss, lr=lr, norm=norm, **speed)
        if time.time() - last_line > 1 or step + 1 == config.max_steps:  # a line a second is enough to read
            last_line = time.time()
            eta = metrics.duration((config.max_steps - step - 1) * sorted(seconds)[len(seconds) // 2])
            mfu = f" | MFU {speed['mfu']:.1%}" if peak_flops else ""
            say(
                f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {1000 * seconds[-1]:.0f} ms |"
                f" {tok_s:,.0f} tok/s{mfu} | ETA {eta}"
            )

    # ---- the end
    saved = torch.tensor(float(saved), device=device)
    if world_size > 1:  # rank 0 may still be saving, and torchrun ends it half a minute after another rank has gone
        dist.all_reduce(saved, dist.ReduceOp.MIN)
    if not saved:
        raise UserError(
            f"the last checkpoint could not be saved in {config.log_dir}: make room and run the same command", code=1
        )
    if stop:
        say(f"stopped by {signal.Signals(stop).name} after {step:,} steps, saved; the same command goes on from here")
        return 128 + stop
    if start_step == config.max_steps:
        say(f"finished at step {step}: raise --max_steps or choose another --log_dir")
    else:
        say(f"done: {step:,} steps, peak memory {peak_memory(device):.1f} GB per process")
    say(
        f"next: python sample.py --model {config.log_dir}/model_checkpoint.pt\n"
        f"      python export.py --model {config.log_dir}/model_checkpoint.pt --out GPT124M"
    )
    return 0


def show_samples(raw_model: GPT, encoding, autocast, say) -> None:
    """Two texts that the model writes now, a little on the safe side."""
    prompt, length = ("Hello, I'm a language model,", 64) if encoding.name == "gpt2" else ("", 256)
    for seed in (42, 43):
        with autocast:
            text = prompt + "".join(stream_text(raw_model, encoding, prompt, length, temperature=0.8, seed=seed))
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)  # spares the terminal
        say("  sample\n  > " + text.replace("\n", "\n  > "))


@command
def main(argv=None) -> int:
    config = parse(TrainConfig, argv, __doc__, PRESETS)
    try:
        with contextlib.ExitStack() as stack:
            code = run(config, stack)
            if dist.is_initialized():
                dist.destroy_process_group()
            return code
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # GPU's, CPU's
            raise
        half = config.batch_size // 2
        hint = f"--batch_size {half} needs about half; the result is the same" if half else "choose a smaller model"
        raise UserError(
            f"the model at --batch_size {config.batch_size} does not fit into memory.\nHINT: {hint}", alone=True
        ) from None


if __name__ == "__main__":
    exit_code = main()
    if "RANK" in os.environ:  # no shutdown of Python: in it, a thread of gloo's that gives a tensor back aborts (-6)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
