"""The arithmetic of speed: floating point operations of a token, what a GPU could do at most, MFU,
and the time left.

MFU (model FLOPs utilization) is the share of the GPU's peak that the model's own operations reach.
"""

import collections
import re
import statistics

from GPT_Modules import GPTConfig
from lib.device import device_name

# Peak dense bf16 TFLOP/s as published by the makers. A card that is not listed gets no MFU rather
# than a wrong one.
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "RTX A6000": 155,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "GH200": 989,
    "H20": 148, "B200": 2250, "L4": 121, "L40": 181, "L40S": 362, "RTX 6000 Ada": 364,
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210,
}  # fmt: skip


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """Floating point operations of a training step per token: 6 N + 12 L H D T.

    Chowdhery et al. 2022, appendix B. N: the weights of the matrices that multiply, 12 L C^2 + V C;
    no positions, biases or norms. 124M: 854.65e6.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 6 * (12 * L * C * C + V * C) + 12 * L * C * seq_len


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that CUDA gives it; None if it is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    variants = {"Ti", "D", "Laptop", "MIG", "SUPER", "NVL"}  # other rates than the name alone has
    known = [name for name in known if words & variants <= set(name.split())]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def peak_tokens_per_second(config: GPTConfig, seq_len: int, precision: str, ranks) -> float | None:
    """Tokens per second if all GPUs of the Ranks computed at their peak in half precision; None if
    that is not known."""
    if ranks.device.type != "cuda" or precision == "float32":
        return None
    peak = peak_flops(device_name(ranks.device))
    return peak and peak * ranks.world_size / flops_per_token(config, seq_len)


class Speed:
    """Tokens per second, MFU and the time left, from the duration of the steps.

    peak_tok_s: tokens per second if all GPUs computed at their peak; None if that is not known.
    """

    def __init__(self, tokens_per_step: int, peak_tok_s: float | None):
        self.tokens_per_step = tokens_per_step
        self.peak_tok_s = peak_tok_s
        self.recent = collections.deque(maxlen=50)  # seconds of the last steps

    def measure(self, seconds: float) -> dict[str, float]:
        """The log's values for a step of this duration: tok_s, and mfu where the peak is known."""
        self.recent.append(seconds)
        values = {"tok_s": self.tokens_per_step / seconds}
        if self.peak_tok_s:
            values["mfu"] = values["tok_s"] / self.peak_tok_s
        return values

    def line(self, steps_left: int) -> str:
        """The last step's speed for people, and the time left at the median of the recent steps."""
        seconds = self.recent[-1]
        tok_s = self.tokens_per_step / seconds
        mfu = f" | MFU {tok_s / self.peak_tok_s:.1%}" if self.peak_tok_s else ""
        left = duration(steps_left * statistics.median(self.recent))
        return f"{1000 * seconds:.0f} ms | {tok_s:,.0f} tok/s{mfu} | ETA {left}"


def duration(seconds: float) -> str:
    """4000 -> 1h07m"""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{int(seconds) % 60:02d}s"
