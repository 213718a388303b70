"""Run train.py with one thing gone wrong: python drivers.py FAULT ARGUMENT TRAIN_FLAGS...

The product has no switches for faults; these wrap a function of it, in a real process of the run.
ARGUMENT is the step at which it happens, where nothing else is said.
"""

import os
import resource
import signal
import sys
import time

import torch

import lib.start
import train

rank = int(os.environ.get("RANK", 0))
last_rank = int(os.environ.get("WORLD_SIZE", 1)) - 1
models = []  # the raw_model, once there is a state to start from
steps = [-1]  # the step that is under way, last


def before_each_step(action):
    """Call action(step) when a step begins: that is when it asks for its learning rate."""
    get_lr = train.get_lr

    def wrapped(step, config):
        steps.append(step)
        action(step)
        return get_lr(step, config)

    train.get_lr = wrapped


def keep_model():
    """Put the model that the run starts from into `models`."""
    find_start = train.find_start

    def wrapped(*words):
        start = find_start(*words)
        models.append(start.model)
        return start

    train.find_start = wrapped


def around_save(action):
    """Save by action(save, step): save() is the real thing."""
    save_checkpoint = train.save_checkpoint
    train.save_checkpoint = lambda log_dir, state: action(
        lambda: save_checkpoint(log_dir, state), state["step"]
    )


def stop_after(argument):
    def stop(step):
        if step == int(argument) and rank == last_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_step(stop)


def change_a_weight(argument, by):
    def change(step):
        if step == int(argument) and rank == last_rank:
            with torch.no_grad():
                models[0].transformer.ln_f.bias[0] += by

    keep_model()
    before_each_step(change)


def drift(argument):
    change_a_weight(argument, 1e-6)


def inf_weight(argument):
    change_a_weight(argument, float("inf"))


def poison_loss(argument, value, forever=False):
    loss_of = train.linear_cross_entropy

    def poisoned(x, weight, targets):
        loss = loss_of(x, weight, targets)
        now = steps[-1] == int(argument) or (forever and steps[-1] >= int(argument))
        if loss.requires_grad and rank == last_rank and now:
            loss = loss * value
        return loss

    train.linear_cross_entropy = poisoned
    before_each_step(lambda step: None)


def nan_loss(argument):
    poison_loss(argument, float("nan"))


def inf_loss(argument):
    poison_loss(argument, float("inf"))


def nan_forever(argument):
    poison_loss(argument, float("nan"), forever=True)


def nan_gradient(argument):
    """One NaN in one gradient of one rank, before it is exchanged."""

    def poison(step):
        if rank == last_rank and not steps[:-2]:  # once, before the first step
            models[0].transformer.ln_f.bias.register_hook(
                lambda grad: grad * float("nan") if steps[-1] == int(argument) else grad
            )

    keep_model()
    before_each_step(poison)


def full_disk(argument):
    """For one save no file can grow beyond 20,000 bytes."""

    def limited(save, step):
        if step != int(argument):
            return save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            return save()
        finally:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    around_save(limited)


def full_log(argument):
    """From a step on the log's disk is full."""

    logs = []
    Log = train.Log
    train.Log = lambda *words: logs.append(Log(*words)) or logs[0]

    def fill(step):
        if step == int(argument):
            logs[0].file = open("/dev/full", "a")

    before_each_step(fill)


def slow_save(argument):
    def slow(save, step):
        path = save()
        if step == int(argument):
            time.sleep(3)
        return path

    around_save(slow)


def slow_micro_batches(argument):
    """Each micro-batch from step ARGUMENT on takes half a second; 0.7 s are a long step."""
    loss_of = train.linear_cross_entropy

    def slow(x, weight, targets):
        if torch.is_grad_enabled() and steps[-1] >= int(argument):
            time.sleep(0.5)
            print(f"micro-batch of step {steps[-1]}", flush=True)
        return loss_of(x, weight, targets)

    train.linear_cross_entropy = slow
    train.PATIENCE = 0.7
    before_each_step(lambda step: None)


def nan_weight(argument):
    """The weights are NaN from step ARGUMENT on, as a step of too high a rate can make them."""

    def change(step):
        if step == int(argument):
            with torch.no_grad():
                models[0].transformer.ln_f.bias[0] = float("nan")

    keep_model()
    before_each_step(change)


def killed_after_save(argument):
    """SIGKILL between a checkpoint and the link of the best to it."""

    def killed(path, name):
        if path.name == f"model_{int(argument):05d}.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return link(path, name)

    link = train.link
    train.link = killed


def sees_no_checkpoint(argument):
    """The last rank sees an empty log directory. ARGUMENT has no meaning."""
    if rank == last_rank:
        lib.start.newest_checkpoint = lambda log_dir: None
        lib.start.read_lines = lambda path: []


def high_scale(argument):
    """float16's loss scale begins at 2^ARGUMENT."""

    class HighScale(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0 ** int(argument), enabled=enabled)

    torch.amp.GradScaler = HighScale


def gradients(argument):
    """Write step 0's gradients and how often DDP exchanged in the run to the file ARGUMENT."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    kept = {"exchanges": 0}
    clip = torch.nn.utils.clip_grad_norm_

    class Counting(DistributedDataParallel):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            self.register_comm_hook(None, count)

    def count(state, bucket):
        kept["exchanges"] += bucket.is_last()
        return allreduce_hook(state, bucket)

    def keep(parameters, *rest):
        if steps[-1] == 0:
            named = models[0].named_parameters()
            kept["gradients"] = {name: parameter.grad.clone() for name, parameter in named}
        return clip(parameters, *rest)

    train.DistributedDataParallel = Counting
    torch.nn.utils.clip_grad_norm_ = keep
    keep_model()
    before_each_step(lambda step: None)
    return lambda: torch.save(kept, argument) if rank == 0 else None


FAULTS = {
    fault.__name__: fault
    for fault in (
        stop_after, drift, inf_weight, nan_loss, inf_loss, nan_forever, nan_gradient, full_disk,
        full_log, slow_save, slow_micro_batches, nan_weight, killed_after_save, sees_no_checkpoint,
        high_scale, gradients,
    )
}  # fmt: skip

if __name__ == "__main__":
    fault, argument, *words = sys.argv[1:]
    at_the_end = FAULTS[fault](argument)
    code = train.main(words)
    if at_the_end:
        at_the_end()
    sys.stdout.flush()
    os._exit(code)  # as train.py does
