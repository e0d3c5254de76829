"""genome.py's loss kernels, in Triton's interpreter on the CPU, against torch's own cross entropy of capped logits."""

import importlib
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
    """Run where TRITON_INTERPRET is set: kernels take tensors of the CPU then. It cannot multiply bfloat16."""
    import triton
    import triton.language

    g.tl = triton.language
    kernels = triton.jit(g.gradient_of_all), triton.jit(g.gradient_of_targets)
    g.loss_kernels = lambda *key: kernels
    torch.manual_seed(0)
    for vocab, rows, d, dtype, atol in (
        (100, 7, 16, torch.float32, 1e-5),
        (257, 70, 96, torch.float32, 1e-5),
        (300, 130, 40, torch.float16, 3e-2),
    ):
        x, matrix = (12 * torch.randn(n, d).div(d).to(dtype) for n in (rows, vocab))
        x[0] *= 100  # its logits are far beyond the cap
        targets = torch.randint(vocab, (rows,))
        nats, (by_x, by_matrix) = plain(x, matrix, targets)
        ours = [t.requires_grad_() for t in (x, matrix)]
        loss = g.MeanNats.apply(*ours, targets)
        (loss / 4).backward()  # as a step of four parts does
        assert torch.allclose(loss.double(), nats.mean(), atol=atol, rtol=atol)
        assert torch.allclose(g.nats_and_gradient(*ours, targets)[0].double(), nats, atol=10 * atol, rtol=atol)
        for mine, theirs in zip(ours, (by_x, by_matrix), strict=True):
            assert (4 * mine.grad.double() - theirs).abs().max() < 4 * atol * theirs.abs().max()


def test_the_kernels_are_the_capped_cross_entropy():
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


@pytest.mark.parametrize(("card", "dtype"), [(75, "fp32"), (80, "bf16"), (89, "bf16"), (90, "bf16"), (120, "bf16")])
def test_the_kernels_compile_and_fit_on_cards_that_are_not_here(card, dtype, monkeypatch):
    """Compute capability 7.5 is a T4, 8.0 an A100, 8.9 an RTX 4090, 9.0 an H100, 12.0 an RTX 5090."""
    triton = pytest.importorskip("triton")
    compiler, backend = importlib.import_module("triton.compiler"), importlib.import_module("triton.backends.compiler")
    monkeypatch.setattr(g, "tl", importlib.import_module("triton.language"))
    types = dict.fromkeys(("x", "matrix", "gradient"), f"*{dtype}") | dict.fromkeys(("sums", "nats", "totals"), "*fp32")
    types |= {"targets": "*i64"} | dict.fromkeys(("n", "vocab_size", "tiles"), "i32")
    tile = g.tile_size(torch.float32 if dtype == "fp32" else torch.bfloat16)
    strip = g.strip_size(8_192 // tile["WORDS"])
    for function, size in ((g.gradient_of_all, tile), (g.gradient_of_targets, strip)):
        kernel, options = triton.jit(function), {k: v for k, v in size.items() if k.islower()}
        fixed = {"d": 256, **{k: v for k, v in size.items() if k.isupper()}}
        source = compiler.ASTSource(kernel, {k: types.get(k, "constexpr") for k in kernel.arg_names}, fixed)
        compiled = triton.compile(source, target=backend.GPUTarget("cuda", card, 32), options=options)
        assert compiled.metadata.shared <= (64 if card == 75 else 99) * 1024


def test_without_triton_there_is_a_reason_and_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    g.loss_kernels.cache_clear()
    assert "triton" in g.loss_kernels(100, 64, torch.float32)
    g.loss_kernels.cache_clear()
