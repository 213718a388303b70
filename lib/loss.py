"""The loss of training in a third of the memory: the head and its cross-entropy, slice by slice.

    model.loss = linear_cross_entropy      # the same number and gradients as the model's own loss

Shapes: n tokens of a micro-batch, C channels, V vocabulary (rows of the token table).
"""

import math

import torch

SLICE = {"cuda": 2**28, "cpu": 25_000_000}  # logits of a slice: few for memory, enough for speed


def linear_cross_entropy(x, weight, targets):
    """F.cross_entropy(x @ weight.T, targets) without ever holding all the logits.

    x (n, C), weight (V, C), targets (n,) int64 -> (), float32: the mean loss in nats per token.
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
        V = weight.size(0)
        w = weight.to(x.dtype)
        slices = max(1, n * V // SLICE.get(x.device.type, SLICE["cpu"]))
        rows = math.ceil(n / slices)
        vocabulary = torch.arange(V, device=x.device)
        # When compiled, gather and scatter stop Inductor from fusing the operations around them,
        # and the slice's logits go to memory and back. So there the target's logit is a dot
        # product, and one_hot a comparison.
        fused = torch.compiler.is_compiling()
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if learning else None
        grad_weight = torch.zeros_like(weight) if learning else None
        for i in range(0, n, rows):
            x_i = x[i : i + rows]  # (rows, C)
            targets_i = targets[i : i + rows, None]  # (rows, 1)
            logits = (x_i @ w.T).float()  # (rows, V); from here in place, because it is large
            if fused:
                dot_products = x_i.float() * w[targets_i[:, 0]].float()
                target_logits = dot_products.sum(dim=1, keepdim=True)  # (rows, 1)
            else:
                target_logits = logits.gather(1, targets_i)
            highest = logits.amax(dim=1, keepdim=True)
            probs = logits.sub_(highest).exp_()
            total = probs.sum(dim=1, keepdim=True)
            # not in place: compiled by torch 2.11, that loses the gradient
            loss = loss + (total.log() + highest - target_logits).sum() / n
            if learning:
                if fused:
                    grad_logits = probs / total - (vocabulary == targets_i).float()
                else:
                    probs.div_(total)
                    grad_logits = probs.scatter_add_(1, targets_i, -torch.ones_like(total))
                grad_logits = grad_logits.to(x.dtype)
                del logits, probs  # free the float32 numbers before the products need memory
                grad_x[i : i + rows] = grad_logits @ w
                add_product(grad_weight, grad_logits, x_i)
        ctx.n = n
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.n  # only here: in float16 a probability divided by n is often 0
        return grad_x * scale, grad_weight * scale, None, None


@torch.library.custom_op("gpt124m::add_product", mutates_args={"total"})
def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (V, C) float32 += left.T @ right, for left (rows, V) and right (rows, C).

    left and right are of one precision, any; the sums are float32. An operator of its own, because
    Inductor would keep the products of all slices and add them up in one kernel.
    """
    if right.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif right.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right
