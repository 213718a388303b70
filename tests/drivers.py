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

import train

rank = int(os.environ.get("RANK", 0))
last_rank = int(os.environ.get("WORLD_SIZE", 1)) - 1
runs = []  # the Run, once it is set up
steps = [-1]  # the step that is under way, last


def before_each_step(action):
    """Call action(step) when a step begins: that is when it asks for its learning rate."""
    get_lr = train.get_lr

    def wrapped(step, config):
        steps.append(step)
        action(step)
        return get_lr(step, config)

    train.get_lr = wrapped


def once_set_up(action):
    """Call action(run) before the first step."""
    train_run = train.train

    def wrapped(run, first_step):
        runs.append(run)
        action(run)
        return train_run(run, first_step)

    train.train = wrapped


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
                runs[0].raw_model.transformer.ln_f.bias[0] += by

    once_set_up(lambda run: None)
    before_each_step(change)


def drift(argument):
    change_a_weight(argument, 1e-6)


def inf_weight(argument):
    change_a_weight(argument, float("inf"))


def poison_loss(argument, value, for_ever=False):
    def poison(run):
        loss_of = run.raw_model.loss

        def poisoned(x, weight, targets):
            loss = loss_of(x, weight, targets)
            now = steps[-1] == int(argument) or (for_ever and steps[-1] >= int(argument))
            if loss.requires_grad and rank == last_rank and now:
                loss = loss * value
            return loss

        run.raw_model.loss = poisoned

    once_set_up(poison)
    before_each_step(lambda step: None)


def nan_loss(argument):
    poison_loss(argument, float("nan"))


def inf_loss(argument):
    poison_loss(argument, float("inf"))


def nan_for_ever(argument):
    poison_loss(argument, float("nan"), for_ever=True)


def nan_gradient(argument):
    """One NaN in one gradient of one rank, before it is exchanged."""

    def poison(run):
        if rank == last_rank:
            run.raw_model.transformer.ln_f.bias.register_hook(
                lambda grad: grad * float("nan") if steps[-1] == int(argument) else grad
            )

    once_set_up(poison)
    before_each_step(lambda step: None)


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

    def fill(step):
        if step == int(argument):
            runs[0].log.file = open("/dev/full", "a")

    once_set_up(lambda run: None)
    before_each_step(fill)


def slow_save(argument):
    def slow(save, step):
        path = save()
        if step == int(argument):
            time.sleep(3)
        return path

    around_save(slow)


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
        train.newest_checkpoint = lambda log_dir: None


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
            named = runs[0].raw_model.named_parameters()
            kept["gradients"] = {name: parameter.grad.clone() for name, parameter in named}
        return clip(parameters, *rest)

    train.DistributedDataParallel = Counting
    torch.nn.utils.clip_grad_norm_ = keep
    once_set_up(lambda run: None)
    before_each_step(lambda step: None)
    return lambda: torch.save(kept, argument) if rank == 0 else None


FAULTS = {
    fault.__name__: fault
    for fault in (
        stop_after, drift, inf_weight, nan_loss, inf_loss, nan_for_ever, nan_gradient, full_disk,
        full_log,
        slow_save, killed_after_save, sees_no_checkpoint, high_scale, gradients,
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
