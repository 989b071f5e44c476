"""The kernels for Hopper, played on the CPU: what they compute, and that no partition waits for ever."""

import math
from pathlib import Path
from types import SimpleNamespace

import gluon_player as player
import pytest
import torch

from gated_attention.ops import lse_shift, reference
from gated_attention.spec import GateSpec

OPS = Path(lse_shift.__file__).parent
FORWARD = {  # t, s, heads, key/value heads, causal
    "one token": (1, 1, 1, 1, True),
    "a tile": (64, 64, 1, 1, True),
    "odd, groups of 2": (63, 63, 2, 1, True),
    "several tiles": (300, 300, 2, 2, True),
    "many, more than programs": (520, 520, 3, 1, True),
    "all see all": (40, 150, 2, 1, False),
}


def describe(x, rows):
    return player.Descriptor(x, block=[1, 1, rows, x.shape[-1]])


@pytest.fixture
def pipeline(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    return player.play(OPS / "hopper/pipeline.py", describe=describe)


def inputs(t, s, heads, kv_heads, d, channels):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, t, heads, d), (2, s, kv_heads, d), (2, s, kv_heads, d), (2, t, heads, 2 * d), (2, t, heads, d)]
    q, k, v, logits, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return *(x.transpose(1, 2) for x in (q, k, v)), logits[..., : d if channels else 1], grad.transpose(1, 2)


@pytest.mark.parametrize("cut", ["short", "long"])
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("case", FORWARD)
def test_forward_computes_the_definition(case, d, channels, cut, pipeline):
    t, s, heads, kv_heads, causal = FORWARD[case]
    if (d, channels, causal) == (256, True, False):
        pytest.skip("not offered")
    if (d == 256 or not causal) and cut == "short":
        pytest.skip("cut like long ones")
    attend = player.play(
        OPS / "hopper/attend.py", pipeline, pack=lambda x, dtype: x.to(dtype), unpack=lambda x, dtype: x
    )
    kernel = player.play(OPS / "hopper/forward.py", pipeline, attend)
    kernel.forward_kernel = player.Kernel(kernel.forward_kernel)
    launch = player.play(OPS / "hopper/forward_launch.py", pipeline, attend, kernel)
    q, k, v, logits, _ = inputs(t, s, heads, kv_heads, d, channels)
    if cut == "long":
        launch.CUTS[d] = launch.CUTS[d]._replace(longest_short=0)
    out, lse = launch.attention_forward(q, k, v, logits, causal, d**-0.5)
    o, exact_lse = reference.attention(q.double(), k.double(), v.double(), causal=causal)
    exact = reference.gate(o.transpose(1, 2), logits.double(), GateSpec()).transpose(1, 2)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    assert ((out - exact).norm() / exact.norm()).item() < 4e-3


BACKWARD = {  # t, s, heads, key/value heads, causal
    "one token": (1, 1, 1, 1, True),
    "odd, groups of 2": (113, 113, 4, 2, True),
    "several blocks": (300, 300, 2, 2, True),
    "all see all": (40, 150, 2, 1, False),
    "one key": (70, 1, 2, 2, False),
}


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("case", BACKWARD)
def test_backward_computes_the_definition(case, d, pipeline, monkeypatch):
    t, s, heads, kv_heads, causal = BACKWARD[case]

    kernel = player.play(OPS / "hopper/backward.py", pipeline)
    kernel.backward_kernel = player.Kernel(kernel.backward_kernel)
    launch = player.play(OPS / "hopper/backward_launch.py", pipeline, kernel)
    q, k, v, _, grad = inputs(t, s, heads, kv_heads, d, False)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = reference.attention(*leaves, causal=causal)
    exact = torch.autograd.grad(o, leaves, grad.double())
    padding = (0, -t % launch.NUM_QUERIES[d])
    delta = (grad * o).sum(-1)
    lse2 = torch.nn.functional.pad(lse / math.log(2), padding, value=math.inf)
    stats = torch.stack((lse2, torch.nn.functional.pad(delta, padding))).detach().float()
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    total, dk, dv = launch.run_kernel(grad, q, k, v, stats, causal, d**-0.5)
    largest = max(x.norm().item() for x in exact)
    for name, ours, true in zip("qkv", (total * d**-0.5, dk, dv), exact, strict=True):
        assert (ours - true).norm().item() < 1e-2 * max(true.norm().item(), largest), name
