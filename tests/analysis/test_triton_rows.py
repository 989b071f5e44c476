"""The kernels against the plain PyTorch code, in Triton's interpreter and, where there is one, on a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECKS = """
import sys
from itertools import product
from typing import get_args
import torch
from gated_attention.analysis import measures, triton_rows
from gated_attention.analysis.attention import AttentionCall
from gated_attention.spec import Activation, GateSpec

device, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]
torch.manual_seed(0)


def close(found, expected, what):
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-6, msg=lambda m: f"{what}: {m}")


for dtype in dtypes:
    for width in (100, 128):
        x = (torch.randn(2, 70, width, device=device) * 3 + 1).to(dtype)
        parts = measures.Moments(*triton_rows.moments(x))
        whole = measures.moments(x.double())
        close(measures.inf_norm(parts), measures.inf_norm(whole), "inf norm")
        close(measures.kurtosis(parts, 70 * width), measures.kurtosis(whole, 70 * width), "kurtosis")
    assert triton_rows.moments(torch.full((1, 1, 4), torch.nan, device=device))[0].isnan().all()
    heads = (torch.randn(2, 70, 3, 24, device=device) * 0.02).to(dtype)
    close(triton_rows.head_shares(heads, 1e-2, 1e-3).sum(1), measures.head_shares(heads.double()).sum(1), "heads")
    for activation, width in product(get_args(Activation), (1, 24)):
        logits = (torch.randn(2, 70, 3, width, device=device) * 4).to(dtype)
        spec = GateSpec(granularity="headwise" if width == 1 else "elementwise", activation=activation, scale=1.5)
        by_token, shares = triton_rows.gate_scores(logits, activation, 1.5)
        truth = measures.gate_scores(logits.double(), spec)
        close(by_token, truth.by_token, activation)
        close(shares.sum(1), truth.shares.sum(1), activation)
    for length, keys in ((70, 32), (3, 1)):
        q, k = torch.randn(2, length, 6, 24, device=device), torch.randn(2, length, 2, 24, device=device)
        q, k = q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)
        scores = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) * 0.3
        lse = scores.masked_fill(torch.ones(length, length, device=device).triu(1).bool(), -torch.inf).logsumexp(-1)
        found = triton_rows.sink_columns(q, k, lse.float(), scale=0.3, keys=keys, first_queries=4)
        call = AttentionCall(0, q.double(), k.double(), k.double(), q.double().transpose(1, 2), lse, 0.3)
        truth = measures.sink_columns(call)
        close(found[0].sum(1), truth.sums.sum(1), "sinks")
        close(found[1], truth.first_rows, "first rows")
"""


def check(device, *dtypes, **environment):
    run = subprocess.run(
        [sys.executable, "-c", CHECKS, device, *dtypes], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_kernels_equal_the_plain_code_in_the_interpreter():
    check("cpu", "float32", "float16", **{**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_kernels_equal_the_plain_code_on_a_gpu():
    check("cuda", "float32", "float16", "bfloat16", **os.environ)
