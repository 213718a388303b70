"""Run train.py with one thing gone wrong: python drivers.py WHAT STEP TRAIN_FLAGS...

The product has no switches for faults; these wrap a function of it, in a real process of the run.
"""

import os
import signal
import sys
import time

import torch

import train
from GPT_Modules import GPT

what, argument, *words = sys.argv[1:]
rank, last_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - 1
forward, lr_of, save, clip = (
    GPT.forward,
    train.get_lr,
    train.save_checkpoint,
    torch.nn.utils.clip_grad_norm_,
)
step = -1


def get_lr(now, config):
    """Called once at the beginning of each step: tells which one it is."""
    global step
    step = now
    if what == "stop_after" and step == int(argument) and rank == last_rank:
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "no_room" and step in (
        int(argument),
        int(argument) + 3,
    ):  # for three steps no file can grow
        import resource

        limit = 1 if step == int(argument) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if what == "drift" and step == int(argument) and rank == last_rank:
        with torch.no_grad():
            models[0].transformer.ln_f.bias[0] += 1e-6
    return lr_of(now, config)


def poisoned(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    now = step == int(argument) or (what == "nan_for_ever" and step >= int(argument))
    if loss is not None and loss.requires_grad and rank == last_rank and now:
        loss = loss * (float("inf") if what == "inf_loss" else float("nan"))
    return logits, loss


def disk_is_full(log_dir, state, best):
    if state["step"] != int(argument) or (what == "no_room_for_the_best" and not best):
        return save(log_dir, state, best)
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        return save(log_dir, state, best)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def killed_before_the_best(log_dir, state, best):
    if best and state["step"] == int(argument):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(log_dir, state, best)


def take_long(log_dir, state, best):
    path = save(log_dir, state, best)
    time.sleep(3 if state["step"] == int(argument) else 0)
    return path


def keep_gradients(parameters, *rest):
    if step == 0 and rank == 0:
        gradients = {
            name: parameter.grad.clone() for name, parameter in models[0].named_parameters()
        }
        torch.save({"gradients": gradients}, argument)
    return clip(parameters, *rest)


models, exchanges = [], 0
to = GPT.to


def remember(self, device):
    models.append(self)
    if what == "nan_gradient" and rank == last_rank:
        bias = (
            self.transformer.ln_f.bias
        )  # one NaN in one gradient of one rank, before it is exchanged
        bias.register_hook(lambda grad: grad * float("nan") if step == int(argument) else grad)
    return to(self, device)


class HighScale(torch.amp.GradScaler):
    def __init__(self, device, enabled):
        super().__init__(device, init_scale=2.0 ** int(argument), enabled=enabled)


GPT.to = remember
if what == "high_scale":
    torch.amp.GradScaler = HighScale
train.get_lr = get_lr
if what in ("nan_loss", "inf_loss", "nan_for_ever"):
    GPT.forward = poisoned
if what in ("full_disk", "no_room_for_the_best"):
    train.save_checkpoint = disk_is_full
if what == "killed_before_the_best":
    train.save_checkpoint = killed_before_the_best
if what == "sees_no_checkpoint" and rank == last_rank:
    train.newest_checkpoint = lambda log_dir: (None, None, [])
if what == "slow_save":
    train.save_checkpoint = take_long
if what == "gradients":
    torch.nn.utils.clip_grad_norm_ = keep_gradients
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    class Counting(DistributedDataParallel):
        """DDP that counts how often its first bucket is exchanged."""

        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            self.register_comm_hook(None, count)

    def count(state, bucket):
        global exchanges
        exchanges += bucket.is_last()
        return allreduce_hook(state, bucket)

    train.DistributedDataParallel = Counting

code = train.main(words)
if what == "gradients" and rank == 0:
    torch.save(torch.load(argument) | {"exchanges": exchanges}, argument)
sys.stdout.flush()
os._exit(code)  # as train.py does
