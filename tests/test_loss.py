"""genome.py's loss kernel, in Triton's interpreter on the CPU, against torch's own cross entropy of capped logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import genome as g

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = """
import sys
sys.path[:0] = ["tests", "."]
import test_loss
test_loss.compare()
print("equal")
"""


def plain(x, matrix, targets):
    """The mean loss and its gradients, in float64, from the definition."""
    x, matrix = (t.detach().double().requires_grad_() for t in (x, matrix))
    nats = F.cross_entropy(15 * torch.tanh(x @ matrix.T / 15), targets, reduction="none")
    return nats.detach(), torch.autograd.grad(nats.mean(), (x, matrix))


def compare():
    """Run where TRITON_INTERPRET is set: the kernel takes tensors of the CPU then."""
    import triton
    import triton.language

    g.tl = triton.language
    kernel = triton.jit(g.logits_to_gradient)
    g.loss_kernel = lambda width, dtype: kernel
    torch.manual_seed(0)
    for vocab, rows, dtype, atol in (
        (100, 7, torch.float32, 1e-5),
        (257, 9, torch.float32, 1e-5),
        (640, 5, torch.bfloat16, 3e-2),
    ):
        x, matrix = (3 * torch.randn(n, 16).to(dtype) for n in (rows, vocab))  # some logits are far beyond the cap
        targets = torch.randint(vocab, (rows,))
        nats, (by_x, by_matrix) = plain(x, matrix, targets)
        ours = [t.requires_grad_() for t in (x, matrix)]
        loss = g.MeanNats.apply(*ours, targets)
        (loss / 4).backward()  # as a step of four parts does
        assert torch.allclose(loss.double(), nats.mean(), atol=atol, rtol=atol)
        assert torch.allclose(g.nats_and_gradient(*ours, targets, 1.0)[0].double(), nats, atol=10 * atol, rtol=atol)
        for mine, theirs in zip(ours, (by_x, by_matrix), strict=True):
            assert (4 * mine.grad.double() - theirs).abs().max() < 4 * atol * theirs.abs().max()


def test_the_kernel_is_the_capped_cross_entropy():
    pytest.importorskip("triton")  # there is none on macOS, and no GPU to need it
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-2_000:]


def test_a_mean_is_the_mean_of_the_parts():
    torch.manual_seed(0)
    model = g.Model(g.transformer(1, 64), 50)
    idx, targets = torch.randint(50, (2, 2, 9))
    nats = model(idx, targets, reduction="none")
    assert nats.shape == (2, 9) and torch.allclose(nats.mean(), model(idx, targets))
    logits = model(idx)
    assert logits.abs().max() <= g.LOGIT_CAP
    assert torch.allclose(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), nats.mean(), atol=1e-6)


def test_a_block_of_the_kernel_holds_a_row():
    for width in (1, 2, 3, 64, 65, 8_192, 50_257):
        size = g.kernel_size(width)
        assert width <= size["BLOCK"] < 2 * max(width, 1) and size["BLOCK"] & (size["BLOCK"] - 1) == 0


def test_without_triton_there_is_a_reason_and_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    g.loss_kernel.cache_clear()
    assert "triton" in g.loss_kernel(100, torch.float32)
    g.loss_kernel.cache_clear()
