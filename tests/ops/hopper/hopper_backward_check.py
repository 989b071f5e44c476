"""Run by test_hopper_backward.py with Triton's interpreter switched on: all but the kernel, which is played in PyTorch.

The kernel's part is done from what it would be given, tile of keys by tile of keys, and from nothing else.
"""

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from gated_attention.ops import fused, reference
from gated_attention.ops.hopper import backward_launch as launch
from gated_attention.spec import GateSpec


def play(grad, q, k, v, stats, causal, scale):
    h, t, s = q.shape[1], q.shape[2], k.shape[2]
    lse2, delta = stats.unbind(0)
    assert lse2[..., t:].eq(float("inf")).all()
    assert delta[..., t:].eq(0).all()
    padded = torch.nn.functional.pad
    q, grad = (padded(x, (0, 0, 0, lse2.shape[-1] - t)) for x in (q, grad))
    key_padding = -s % launch.NUM_KEYS
    k, v = (padded(x, (0, 0, 0, key_padding)).repeat_interleave(h // k.shape[1], dim=1) for x in (k, v))
    seen = torch.arange(s + key_padding)[:, None] < s
    if causal:
        seen = torch.arange(s + key_padding)[:, None] <= torch.arange(q.shape[2])[None, :]
    scores = (k @ q.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    p = torch.exp2(scores * (scale * 1.4426950408889634) - lse2[:, :, None])
    ds = p * (v @ grad.transpose(-1, -2) - delta[:, :, None])
    assert ds.isfinite().all()
    total = (ds.transpose(-1, -2) @ k)[:, :, :t].contiguous()
    dk_raw, dv_raw = ((x @ y)[:, :, :s].unflatten(1, (-1, GROUP)).sum(2) for x, y in ((ds, q), (p, grad)))
    return total, dk_raw * scale, dv_raw


GROUP = 2
launch.run_kernel = play
fused._FORWARD["hopper"] = "lse_shift"


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
    given = (grad, q, k, v, logits, out, lse.detach().float(), causal, d**-0.5)
    found = {"eager": launch.attention_backward(*given), "traced": fused._traced_hopper_backward(*given)}
    found["compiled"] = compiled_gradients(*given)
    for way, gradients in found.items():
        for name, ours, exact in zip(("dq", "dk", "dv", "dgate_logits"), gradients, expected, strict=True):
            error = ((ours - exact).abs().max() / exact.abs().max()).item()
            assert error < 1e-4, f"{name}, {way}, {channels=}, {shift=}, {causal=}: {error:.1e}"


def compiled_gradients(grad, q, k, v, logits, out, lse, causal, scale):
    """Of the whole op as a compiler sees it, which finds the kernel alone."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    leaves = [x.detach().requires_grad_() for x in (q, k, v, logits)]
    torch.compiler.reset()
    compiler = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    run = torch.compile(lambda *x: fused.fused_attention(*x, causal, scale, "hopper")[0], backend=compiler)
    y = run(*leaves)
    torch.testing.assert_close(y, out, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(y, leaves, grad)
    assert "gated_attention.hopper_backward_kernel.default" in seen
    assert "gated_attention.fused_backward.default" not in seen
    return gradients


for channels in (False, True):
    for shift in (0.0, -60.0, 20.0):
        check(channels, shift, True, 133, 133)
    check(channels, -20.0, False, 40, 150)
