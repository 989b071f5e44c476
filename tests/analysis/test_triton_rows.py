"""The kernels against the plain PyTorch code, in Triton's interpreter and, where there is one, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECKS = """
import sys
from itertools import product
from typing import get_args
import triton
import torch
from gated_attention.analysis import measures
from gated_attention.analysis.measures import triton_rows
from gated_attention.analysis.attention import AttentionCall
from gated_attention.spec import Activation, GateSpec

device, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]
torch.manual_seed(0)


def close(found, expected, what):
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-6, msg=lambda m: f"{what}: {m}")


for dtype in dtypes:
    for width in (100, 128):
        x = (torch.randn(2, 70, width, device=device) * 3 + 1).to(dtype)
        parts, whole = triton_rows.moments(x), measures.moments(x.double())
        close(measures.inf_norm(parts), measures.inf_norm(whole), "inf norm")
        close(measures.kurtosis(parts, 70 * width), measures.kurtosis(whole, 70 * width), "kurtosis")
        x[1, 33, [4, 7, 90]] = torch.tensor([300.0, -900.0, 500.0], device=device, dtype=dtype)
        values, places, sampled = triton_rows.activation_rows(x, 8, 9)
        found = measures.ActivationRows(values[..., 0], values.flatten(1), places.flatten(1), sampled)
        assert torch.equal(sampled, x[:, ::9]) and torch.equal(found.largest, x.abs().amax(-1).float())
        top, truth = measures.activations(found), measures.activations(measures.activation_rows(x.double()))
        assert torch.equal(top.values.double(), truth.values)
        assert top.tokens[1, :3].tolist() == [33] * 3 and top.channels[1, :3].tolist() == [7, 90, 4]
        places = top.tokens * width + top.channels  # equal values in any order
        assert torch.equal(x.abs().flatten(1).gather(1, places).float(), top.values)
        assert all(len(set(row)) == 8 for row in places.tolist())
    if device == "cuda" or triton.__version__ < "3.8":  # whose interpreter stops at a row of NaN
        nan = torch.full((1, 1, 8), torch.nan, device=device)
        assert triton_rows.moments(nan)[:, 0].isnan().all() and triton_rows.activation_rows(nan, 8, 1)[0].isnan().all()
    heads = (torch.randn(2, 70, 3, 24, device=device) * 0.02).to(dtype)
    close(triton_rows.head_shares(heads, 1e-2, 1e-3).sum(1), measures.head_shares(heads.double()).sum(1), "heads")
    for activation, width in product(get_args(Activation), (1, 24)):
        logits = (torch.randn(2, 70, 3, width, device=device) * 4).to(dtype)
        spec = GateSpec(granularity="headwise" if width == 1 else "elementwise", activation=activation, scale=1.5)
        by_token, shares, sampled = triton_rows.gate_scores(logits, activation, 1.5, 9)
        assert torch.equal(sampled, logits[:, ::9])
        edges = measures.score_range(spec)
        counts = triton_rows.gate_histograms(logits, activation, 1.5, edges, 50).sum(1)
        expected = measures.gate_histograms(logits.double()[:, None], spec)
        assert torch.equal(counts.sum(-1), torch.full((2, 3), 70 * width, device=device))
        assert (counts - expected).abs().sum() <= 4, activation  # scores on a bin's edge
        truth = measures.gate_scores(logits.double(), spec)
        close(by_token, truth.by_token, activation)
        off = (shares.sum(1) - truth.shares.sum(1)) * 70 * width
        assert off.abs().max() <= 1.01, activation  # one score on a threshold
    for length, keys, width in ((70, 32, 24), (3, 1, 20)):
        q, k = torch.randn(2, length, 6, 24, device=device), torch.randn(2, length, 2, 24, device=device)
        v = torch.randn(2, length, 2, width, device=device)
        q, k, v = (one.to(dtype).transpose(1, 2) for one in (q, k, v))
        scores = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) * 0.3
        scores = scores.masked_fill(torch.ones(length, length, device=device).triu(1).bool(), -torch.inf)
        out = (scores.softmax(-1) @ v.double().repeat_interleave(3, 1)).transpose(1, 2).contiguous().to(dtype)
        lse = scores.logsumexp(-1)
        found = triton_rows.attention_rows(q, k, v, out, lse.float(), scale=0.3, keys=keys, first_queries=4)
        call = AttentionCall(0, q.double(), k.double(), v.double(), out.double(), lse, 0.3)
        for name, parts, truth in zip(measures.AttentionRows._fields, found, measures.attention_rows(call)):
            in_parts = name in ("sums", "sizes")
            close(parts.sum(1) if in_parts else parts, truth.sum(1) if in_parts else truth, name)
"""


def check(device, *dtypes, **environment):
    run = subprocess.run(
        [sys.executable, "-c", CHECKS, device, *dtypes], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.trust)])
def test_kernels_equal_the_plain_code_in_the_interpreter(dtype):
    check("cpu", dtype, **{**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_kernels_equal_the_plain_code_on_a_gpu():
    check("cuda", "float32", "float16", "bfloat16", **os.environ)


KERNELS = {
    "_moments_kernel": {"BLOCK": 2048},
    "_activations_kernel": {"TOP": 8, "BLOCK": 2048},
    "_head_shares_kernel": {"BLOCK_T": 32, "BLOCK_D": 128},
    "_gate_kernel": {"ACTIVATION": "sigmoid", "BLOCK_T": 32, "BLOCK_D": 128},
    "_histogram_kernel": {"ACTIVATION": "sigmoid", "BLOCK_T": 32, "BLOCK_D": 128, "BLOCK_BINS": 64},
    "_attention_kernel": {"BLOCK_T": 64, "BLOCK_K": 32, "BLOCK_D": 128, "BLOCK_E": 128},
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_and_do_not_spill(name):
    import triton
    from triton.backends.compiler import GPUTarget

    from gated_attention.analysis.measures import triton_rows

    kernel, constants = getattr(triton_rows, name), KERNELS[name]

    def kind(argument):
        if not argument.endswith("_ptr"):
            return "fp32" if argument in ("scale", "share", "low", "high") else "i32"
        if argument[:-4] in ("q", "k", "v", "x", "sampled") or (argument, name) == ("out_ptr", "_attention_kernel"):
            return "*bf16"
        return {"places": "*i64", "counts": "*i32"}.get(argument[:-4], "*fp32")

    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={one: "constexpr" if one in constants else kind(one) for one in kernel.arg_names},
        constexprs={(kernel.arg_names.index(one),): value for one, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, one in enumerate(kernel.arg_names) if one.endswith("_ptr")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    said = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"],
        input=compiled.asm["ptx"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "0 bytes spill stores, 0 bytes spill loads" in said.stderr, said.stderr
