"""The loss slice by slice is F.cross_entropy: plain, compiled, and in the GPU's kernel."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from GPT_Modules import GPT, GPTConfig
from lib import loss
from lib.loss import linear_cross_entropy


@pytest.fixture(params=[1, 3])
def slices(request, monkeypatch):
    """Take 600 rows of 1,000 logits in so many slices, the last one shorter."""
    rows = {1: 768, 3: 256}[request.param]
    monkeypatch.setitem(loss.SLICE, "cpu", rows * 1000)
    assert loss.rows_of_a_slice(1000, "cpu") == rows


def compiled():
    torch._dynamo.reset()
    return torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False)


def gradients(loss, *parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True)


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_cross_entropy(compile, slices):
    torch.manual_seed(0)
    x = torch.randn(600, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(1000, (600,))
    truth = F.cross_entropy(x.double() @ weight.double().T, targets)
    torchs = F.cross_entropy(x @ weight.T, targets)
    ours = compiled() if compile else linear_cross_entropy
    got = ours(x, weight, targets)
    assert got.dtype == torch.float32
    assert abs(got - truth) <= 1e-6 * truth
    exact = gradients(truth, x, weight)
    plain = gradients(torchs, x, weight)
    for mine, theirs, true in zip(gradients(3 * got, x, weight), plain, exact, strict=True):
        # no further from the truth than torch's own rounding takes it
        assert (mine / 3 - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_the_truth_as_torchs(dtype, compile):
    """The truth is float64 on the same rounded inputs; torch's is F.cross_entropy of logits of that
    precision."""
    torch.manual_seed(0)
    ours = compiled() if compile else linear_cross_entropy
    for scale in (0.1, 3.0):  # losses of an untrained and of a well-trained model
        weight = 0.06 * torch.randn(1000, 64)
        targets = torch.randint(1000, (2048,))
        x = scale * (torch.randn(2048, 64) + 10 * weight[targets])
        x, weight = (t.to(dtype).float().requires_grad_() for t in (x, weight))
        truth = F.cross_entropy(x.double() @ weight.double().T, targets)
        with torch.autocast("cpu", dtype=dtype):
            torchs = F.cross_entropy((x @ weight.T).float(), targets)
            got = ours(x, weight, targets)
        assert got.dtype == torch.float32
        assert abs(got - truth) < 2 * abs(torchs - truth) + 1e-4 * truth
        exact = gradients(truth, x, weight)
        plain = gradients(torchs, x, weight)
        for mine, theirs, true in zip(gradients(got, x, weight), plain, exact, strict=True):
            assert mine.dtype == torch.float32
            assert (mine - true).norm() < 1.2 * (theirs - true).norm()


def test_a_model_takes_it_for_its_own():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=4, n_embd=48))
    idx = torch.randint(101, (2, 33))
    parameters = list(model.parameters())
    _, own = model(idx[:, :-1], idx[:, 1:])
    model.loss = linear_cross_entropy
    _, sliced = model(idx[:, :-1], idx[:, 1:])
    assert abs(own - sliced) < 1e-6
    both = zip(gradients(own, *parameters), gradients(sliced, *parameters), strict=True)
    assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in both)


def test_without_learning_it_keeps_no_gradient():
    x = torch.randn(5, 4)
    weight = torch.randn(11, 4, requires_grad=True)
    targets = torch.randint(11, (5,))
    with torch.no_grad():
        got = linear_cross_entropy(x, weight, targets)
    assert not got.requires_grad
    assert abs(got - F.cross_entropy(x @ weight.T, targets)) < 1e-6


INTERPRETED = """
import torch
import torch.nn.functional as F
from lib.loss import softmax_loss_
torch.manual_seed(0)
# one block of 8,192 columns and a part of one; the interpreter rounds bfloat16 towards zero
for dtype, near in ((torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 5e-3)):
    for V in (1000, 8192, 20000):
        targets = torch.tensor([0, V - 1, 8191 % V, V // 2])
        logits = (5 * torch.randn(4, V)).to(dtype)
        exact = logits.double().requires_grad_()
        truth = F.cross_entropy(exact, targets, reduction="none")
        truth.sum().backward()
        losses = softmax_loss_(logits, targets)
        assert losses.dtype == torch.float32 and logits.dtype == dtype
        assert (losses - truth).abs().max() < 1e-5 * truth.max(), (dtype, V, losses, truth)
        assert (logits - exact.grad).abs().max() < near, (dtype, V)
"""


def test_the_gpus_kernel_interpreted_on_a_cpu():
    pytest.importorskip("triton", reason="triton, which runs the kernel, is not installed")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
