"""Run by test_hopper_backward.py with Triton's interpreter switched on: all but the kernel, which is played in PyTorch.

The kernel's part is done from what it would be given, tile of keys by tile of keys, and from nothing else.
"""

import torch

from gated_attention.ops import hopper_backward_launch as launch
from gated_attention.ops import reference
from gated_attention.spec import GateSpec


def play(blocks, q, k, v, grad, stats, total, dk, dv, causal, scale):
    h, t, s = q.shape[1], q.shape[2], k.shape[2]
    lse2, delta = stats.unbind(0)
    assert lse2[..., t:].eq(float("inf")).all()
    assert delta[..., t:].eq(0).all()
    padded = torch.nn.functional.pad
    q, grad = (padded(x, (0, 0, 0, lse2.shape[-1] - t)) for x in (q, grad))
    key_padding = -s % blocks.num_keys
    k, v = (padded(x, (0, 0, 0, key_padding)).repeat_interleave(h // k.shape[1], dim=1) for x in (k, v))
    seen = torch.arange(s + key_padding)[:, None] < s
    if causal:
        seen = torch.arange(s + key_padding)[:, None] <= torch.arange(q.shape[2])[None, :]
    scores = (k @ q.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    p = torch.exp2(scores * (scale * 1.4426950408889634) - lse2[:, :, None])
    ds = p * (v @ grad.transpose(-1, -2) - delta[:, :, None])
    assert ds.isfinite().all()
    total += (ds.transpose(-1, -2) @ k)[:, :, :t]
    dk_raw, dv_raw = ((x @ y)[:, :, :s].unflatten(1, (-1, GROUP)).sum(2) for x, y in ((ds, q), (p, grad)))
    dk.copy_(dk_raw * scale)
    dv.copy_(dv_raw)


GROUP = 2
launch._launch = play


def check(channels, shift, causal, t, s, d=64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, t, 2, d), (2, t, 2, d), (2, s, 1, d), (2, s, 1, d), (2, t, 2, 2 * d)]
    grad, q, k, v, logits = (torch.randn(shape, generator=generator) for shape in shapes)
    grad, q, k, v = (x.transpose(1, 2) for x in (grad, q, k, v))
    logits = logits[..., : d if channels else 1] + shift  # strided
    leaves = [x.double().requires_grad_() for x in (q, k, v, logits)]
    o, lse = reference.attention(*leaves[:3], causal=causal)
    gated = reference.gate(o.transpose(1, 2), leaves[3], GateSpec()).transpose(1, 2)
    expected = torch.autograd.grad(gated, leaves, grad.double())
    out = gated.detach().float()
    found = launch.attention_backward(grad, q, k, v, logits, out, lse.detach().float(), causal, d**-0.5)
    for name, ours, exact in zip(("dq", "dk", "dv", "dgate_logits"), found, expected, strict=True):
        error = ((ours - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-4, f"{name}, {channels=}, {shift=}, {causal=}: {error:.1e}"


for channels in (False, True):
    for shift in (0.0, -60.0, 20.0):
        check(channels, shift, True, 133, 133)
    check(channels, -20.0, False, 40, 150)
