"""The backward pass for Hopper: what goes around its kernel on the CPU, and its gradients on a GPU."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gated_attention import ops
from gated_attention.ops import lse_shift, reference
from gated_attention.spec import GateSpec

pytest.importorskip("triton")

from gated_attention.ops.hopper.backward_launch import NUM_QUERIES, attention_backward

LENGTHS = {"a tile": 64, "odd": 113, "three blocks": 300, "many": 1024}
LOGITS = {"ordinary": (1.0, 0.0), "closed": (1.0, -20.0), "shut": (0.0, -60.0), "open": (1.0, 20.0)}


@pytest.mark.trust
def test_what_goes_around_the_kernel_computes_the_definition():
    script = Path(__file__).with_name("hopper_backward_check.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9")


def inputs(t, s, heads, kv_heads, d, channels, logits, dtype):
    generator = torch.Generator().manual_seed(3)
    spread, shift = LOGITS[logits]
    shapes = [(2, t, heads, d), (2, s, kv_heads, d), (2, s, kv_heads, d), (2, t, heads, d), (2, t, heads, d)]
    q, k, v, grad, gate_logits = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    gate_logits = (gate_logits * spread + shift)[..., : None if channels else 1]
    return *(x.transpose(1, 2) for x in (grad, q, k, v)), gate_logits


def exact_gradients(grad, q, k, v, gate_logits, causal):
    leaves = [x.double().requires_grad_() for x in (q, k, v, gate_logits)]
    o, lse = reference.attention(*leaves[:3], causal=causal)
    gated = reference.gate(o.transpose(1, 2), leaves[3], GateSpec()).transpose(1, 2)
    return gated.detach(), lse.detach(), torch.autograd.grad(gated, leaves, grad.double())


def eager_gradients(grad, q, k, v, gate_logits, causal):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, gate_logits)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in leaves[1:3])
    scores = leaves[0] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), float("-inf"))
    o = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values
    return torch.autograd.grad(lse_shift.apply_gate(o, leaves[3]), leaves, grad)


def compare(t, s, heads, kv_heads, d, channels, logits, causal, dtype):
    tensors = inputs(t, s, heads, kv_heads, d, channels, logits, dtype)
    out, lse, exact = exact_gradients(*tensors, causal)
    plain = eager_gradients(*tensors, causal)
    out = out.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    found = attention_backward(*tensors, out, lse.float(), causal, d**-0.5)
    torch.cuda.synchronize()
    report = []
    for name, ours, theirs, true in zip(("dq", "dk", "dv", "dgate_logits"), found, plain, exact, strict=True):
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        allowed = 2 * allowed + 1e-5 * true.abs().max().item()
        if s == 1:  # q and k have no gradient: plain PyTorch gives exactly 0, a rounded output over g does not
            allowed += torch.finfo(dtype).eps * exact[2].abs().max().item()
        report.append((name, error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"))
    assert all(good for _, good, _ in report), "; ".join(text for _, good, text in report if not good)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d", NUM_QUERIES)
def test_gradients_are_no_worse_than_twice_plain_pytorch(d, length, group, channels, causal, hopper):
    t = LENGTHS[length]
    compare(t, t, 8, 8 // group, d, channels, "ordinary", causal, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("logits", ["closed", "shut", "open"])
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("d", NUM_QUERIES)
def test_gradients_of_far_logits(d, channels, logits, hopper):
    compare(300, 300, 4, 2, d, channels, logits, True, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "s"), [(1, 300), (113, 1), (300, 500)])
@pytest.mark.parametrize("d", NUM_QUERIES)
def test_gradients_of_as_many_queries_as_one_likes(d, t, s, hopper):
    compare(t, s, 4, 2, d, False, "ordinary", False, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("d", NUM_QUERIES)
def test_gradients_in_float16(d, hopper):
    compare(300, 300, 4, 2, d, False, "ordinary", True, torch.float16)


@pytest.mark.gpu
def test_memory_layout_does_not_matter(hopper):
    grad, q, k, v, s = inputs(300, 300, 4, 2, 64, False, "ordinary", torch.bfloat16)
    out, lse, _ = exact_gradients(grad, q, k, v, s, True)
    out, lse = out.bfloat16(), lse.float()
    expected = attention_backward(grad, q, k, v, s, out, lse, True, 0.125)
    packed = torch.cat([x.transpose(1, 2) for x in (q, k, v)], dim=2).transpose(1, 2).split([4, 2, 2], dim=1)
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (grad, q, k, v)]  # channels not side by side
    wide = torch.cat((s, s), dim=-1)[..., 1:]
    for tensors in ((grad, *packed, wide), (*apart, s)):
        found = attention_backward(*tensors, out, lse, True, 0.125)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # sums of dQ in another order


@pytest.mark.gpu
@pytest.mark.parametrize("logits", ["ordinary", "closed", "open"])
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
def test_compiled_it_gives_what_it_gives_eagerly(channels, logits, hopper, compile_whole):
    grad, *tensors = inputs(300, 300, 4, 2, 128, channels, logits, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in tensors]
    compiled = compile_whole(lambda *x: ops.gated_attention(*x, backend="hopper"))
    eagerly, found = (
        torch.autograd.grad(run(*leaves), leaves, grad.transpose(1, 2))
        for run in (partial(ops.gated_attention, backend="hopper"), compiled)
    )
    for name, ours, theirs in zip("qkvs", found, eagerly, strict=True):
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm(), name


@pytest.mark.gpu
def test_a_kernel_is_launched_again_on_other_tensors(hopper):
    first, second = (inputs(300, 300, 4, 2, 128, False, name, torch.bfloat16)[1:] for name in ("ordinary", "open"))
    alone = [ops.gated_attention(*x, backend="hopper") for x in (first, second)]
    for _ in range(2):
        for tensors, expected in zip((first, second), alone, strict=True):
            assert torch.equal(ops.gated_attention(*tensors, backend="hopper"), expected)
    assert not torch.equal(*alone)
