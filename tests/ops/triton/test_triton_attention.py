"""The portable kernels: what they compute, in Triton's interpreter, and how they compile for absent GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from absent import SHARED_MEMORY, assert_fast

from gated_attention import ops
from gated_attention.ops.triton import backward as triton_backward
from gated_attention.ops.triton import forward as triton_forward
from gated_attention.ops.triton.tiles import LARGE, SMALL, SMALL_WITH_FIRST_KEYS, heads

CUTS = {(80, False): SMALL, (80, True): SMALL_WITH_FIRST_KEYS, (90, False): LARGE, (90, True): LARGE}
CASES = [(c, d, causal, False) for c in SHARED_MEMORY for d in (64, 128, 256) for causal in (True, False)]
CASES += [(c, d, True, True) for c in SHARED_MEMORY for d in (16, 32, 64, 128, 256)]
EACH_KIND = [(90, 128, True, False), (80, 64, False, False), (80, 16, True, True)]


def test_kernels_compute_the_definition():
    script = Path(__file__).with_name("triton_attention_check.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("capability", "head_dim", "causal", "first_keys"),
    [pytest.param(*case, marks=[] if case in EACH_KIND else pytest.mark.trust) for case in CASES],
)
def test_nothing_spills_and_everything_fits(capability, head_dim, causal, first_keys, assemble):
    cut = CUTS[capability, first_keys][head_dim]
    x, one = (heads(torch.empty(1, 2, 64, channels, dtype=torch.bfloat16)) for channels in (head_dim, 1))
    logits = x if causal else one  # two of the four combinations that there are
    rows = torch.empty(1, 2, 64)
    first = torch.empty(1, 64, dtype=torch.int32) if first_keys else None
    options = {"D": head_dim, "CAUSAL": causal, "FIRST_KEYS": first_keys}
    sizes = (64, 64, 2, 1, 0.1)
    inputs = (x, x, x, logits, first, x, rows, *sizes)
    options_of_forward = options | cut.forward.options() | {"ELEMENTWISE": causal}
    forward = assemble(capability, triton_forward.forward_kernel, *inputs, **options_of_forward)
    assert_fast(capability, *forward)
    inputs, sizes = (x, x, x, x, rows, rows, first), (64, *sizes)
    for kernel, gradients, blocks in (
        (triton_backward.keys_kernel, (first, x, x), cut.keys),
        (triton_backward.queries_kernel, (x,), cut.queries),
    ):
        compiled = assemble(capability, kernel, *inputs, *gradients, *sizes, **options, **blocks.options())
        assert_fast(capability, *compiled)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are_and_not_on_the_current_device():
    q, k, v = (torch.randn(1, 4, 64, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    s = torch.randn(1, 64, 4, 1, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    with torch.cuda.device(0):
        for backend in ("shifted", "triton"):
            found, expected = (ops.gated_attention(q, k, v, s, backend=name) for name in (backend, "composed"))
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
            gradients = (torch.autograd.grad(y.float().square().sum(), (q, k, v, s)) for y in (found, expected))
            for left, right in zip(*gradients, strict=True):
                torch.testing.assert_close(left, right, rtol=0.05, atol=0.05)
