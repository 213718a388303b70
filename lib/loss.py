"""The loss of training, slice by slice, so that the logits are never all in memory.

    model.loss = linear_cross_entropy      # the same number and gradients as the model's own loss

Shapes: n tokens of a micro-batch, C channels, V vocabulary (rows of the token table).
"""

import torch
import torch.nn.functional as F

# logits of a slice at most: few for memory, enough for speed. Tokens x GPT-2's vocabulary
SLICE = {"cuda": 4096 * 50304, "cpu": 768 * 50304}


def linear_cross_entropy(x, weight, targets):
    """F.cross_entropy(x @ weight.T, targets) without ever holding all the logits.

    x (n, C), weight (V, C), targets (n,) int64, all of them 0 .. V-1 -> (), float32: the mean loss
    in nats per token.
    Under autocast the matrix products are in its dtype.

    Why not F.cross_entropy itself: at B=64, T=1024 the logits are 3.3 billion numbers, and it keeps
    them for the backward pass. But the loss is the last operation, so its gradient is known as soon
    as the logits are: d loss / d logits = (softmax(logits) - one_hot(targets)) / n. So the forward
    pass takes a slice of tokens at a time: their logits, their loss, and at once their part of the
    gradients. The backward pass only scales the gradients.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    learning = torch.is_grad_enabled()  # asked here, because inside it is always off
    return LinearCrossEntropy.apply(x, weight, targets, learning)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, learning):
        n = x.size(0)
        w = weight.to(x.dtype)
        rows = rows_of_a_slice(weight.size(0), x.device.type)
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if learning else None
        grad_weight = torch.zeros_like(weight) if learning else None
        for i in range(0, n, rows):
            x_i = x[i : i + rows]  # (rows, C)
            targets_i = targets[i : i + rows]  # (rows,)
            if learning:
                losses, grad_logits = softmax_loss(x_i @ w.T, targets_i)
                grad_x[i : i + rows] = grad_logits @ w
                add_product(grad_weight, grad_logits, x_i)
            else:
                losses = F.cross_entropy((x_i @ w.T).float(), targets_i, reduction="none")
            # not in place: compiled by torch 2.11, that loses the gradient
            loss = loss + losses.sum() / n
        ctx.n = n
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.n  # only here: in float16 a probability divided by n is often 0
        return grad_x * scale, grad_weight * scale, None, None


def rows_of_a_slice(V: int, device: str) -> int:
    """Tokens whose logits are in memory at once: a multiple of 256, because GPUs multiply matrices
    of other shapes more slowly."""
    return max(1, SLICE.get(device, SLICE["cpu"]) // V // 256) * 256


def softmax_loss(logits, targets):
    """The loss of each token, and its gradient with respect to the token's logits.

    logits (rows, V), targets (rows,) -> losses (rows,) float32, gradient (rows, V) as the logits:
    loss = log(sum(exp(logits))) - logits[target], gradient = softmax(logits) - one_hot(target).
    Takes the memory of the logits.
    """
    if logits.is_cuda and torch.compiler.is_compiling():  # faster than what Inductor makes of it
        return softmax_loss_(logits, targets), logits
    dtype = logits.dtype
    logits = logits.float()  # from here in place, because it is large
    targets = targets[:, None]  # (rows, 1)
    target_logits = logits.gather(1, targets)  # (rows, 1)
    highest = logits.amax(dim=1, keepdim=True)
    probs = logits.sub_(highest).exp_()
    total = probs.sum(dim=1, keepdim=True)
    losses = total.log() + highest - target_logits
    probs.mul_(1 / total)
    gradient = probs.scatter_add_(1, targets, -torch.ones_like(total))
    return losses[:, 0], gradient.to(dtype)


@torch.library.custom_op("gpt124m::softmax_loss_", mutates_args={"logits"})
def softmax_loss_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """softmax_loss in one kernel: returns the losses, and writes the gradient into logits.

    A custom operator, so that torch.compile leaves it as it is.
    """
    from lib.softmax_kernel import softmax_loss_kernel

    rows, V = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    softmax_loss_kernel[(rows,)](logits, targets, losses, V, BLOCK=8192, num_warps=16)
    return losses


@softmax_loss_.register_fake
def _(logits, targets):
    return logits.new_empty(logits.size(0), dtype=torch.float32)


@torch.library.custom_op("gpt124m::add_product", mutates_args={"total"})
def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (V, C) float32 += left.T @ right, for left (rows, V) and right (rows, C).

    left and right have the same precision, any; the total is float32. A custom operator, because
    Inductor would keep the products of all slices and add them up in one kernel.
    """
    if right.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif right.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right
