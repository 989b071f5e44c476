"""Run by test_triton_attention.py with Triton's interpreter switched on: kernels against the definition.

Memory that kernels are to fill, and memory around what they are to read, is NaN.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
from interpreted import first_keys_of, surrounded

from gated_attention import ops
from gated_attention.ops import reference
from gated_attention.ops.triton import backward as triton_backward
from gated_attention.ops.triton import forward as triton_forward
from gated_attention.ops.triton.tiles import LARGE, SMALL, Blocks, Cut
from gated_attention.spec import GateSpec


class Case(NamedTuple):
    t: int
    s: int
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    causal: bool = True
    channels: bool = False
    spread: float = 1.0
    shift: float = 0.0
    scale: float = 0.3
    batch: int = 1
    first_keys: str = ""


# Tiles of queries longer than those of keys, and the other way round.
TALL = Cut(Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(64, 16, 4, 1))
WIDE = Cut(Blocks(16, 32, 4, 1), Blocks(16, 64, 4, 1), Blocks(16, 32, 4, 1))
FAR = [(1.0, -20.0), (0.0, -60.0), (0.0, float("-inf")), (1.0, 20.0), (0.0, 60.0), (20.0, 0.0)]


def cases():
    """With small tiles, which are many soon; and once with every cut that is shipped."""
    cuts = itertools.cycle((TALL, WIDE))
    for case in (
        Case(1, 1),
        Case(1, 1, channels=True),
        Case(63, 63, heads=1, channels=True),
        Case(77, 77, batch=2),
        Case(77, 77, channels=True),
        Case(35, 35, heads=8),
        Case(1, 70, causal=False),
        Case(70, 1, causal=False, channels=True),
        Case(40, 83, causal=False),
        Case(40, 83, causal=False, channels=True),
        Case(64, 64, heads=1, causal=False, scale=-0.3),
        Case(50, 50, heads=1, scale=-0.3),
    ):
        yield next(cuts), case
    for case in (  # the first key that each query sees
        Case(40, 83),
        Case(1, 70, channels=True),
        Case(33, 50, heads=1, batch=2, first_keys="documents"),
        Case(77, 77, batch=2, channels=True, first_keys="documents"),
        Case(77, 77, heads=4, kv_heads=2, first_keys="window"),
        Case(70, 100, heads=1, channels=True, first_keys="window"),
        Case(65, 65, heads=1, batch=2, first_keys="padding"),
        Case(90, 90, heads=1, batch=2, first_keys="any order"),
    ):
        yield next(cuts), case
    for channels, (spread, shift) in itertools.product((False, True), FAR):
        yield next(cuts), Case(37, 37, heads=1, channels=channels, spread=spread, shift=shift)
    for index, (head_dim, cut) in enumerate((*LARGE.items(), *SMALL.items())):
        causal = index % 2 == 0
        yield cut, Case(140, 140, 1, head_dim=head_dim, causal=causal, channels=causal, scale=head_dim**-0.5)


def gradients(attend, gate, tensors, weight):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*leaves[:3])
    gated = gate(out.transpose(1, 2), leaves[3], GateSpec()).transpose(1, 2)
    return [gated.detach(), lse.detach(), *torch.autograd.grad(gated, leaves, weight.to(gated.dtype))]


def check(cut, case, dtype):
    for module in (triton_forward, triton_backward):
        module.choose_cut = lambda *_: cut
    generator = torch.Generator().manual_seed(5)
    t, s, h, k, d = case[:5]
    shapes = [(h, t, d), (k, s, d), (k, s, d), (t, h, d if case.channels else 1), (h, t, d)]
    q, key, v, logits, grad = (torch.randn(case.batch, *shape, generator=generator) for shape in shapes)
    q, key, v, logits, grad = (x.to(dtype) for x in (q, key, v, logits * case.spread + case.shift, grad))
    first = first_keys_of(case.first_keys, case.batch, t, s)
    mask = None if first is None else torch.arange(s)[None, None, None] >= first[:, None, :, None]
    options = {"causal": case.causal, "scale": case.scale, "mask": mask}
    wide = [x.double() for x in (q, key, v, logits)]
    exact = gradients(partial(reference.attention, **options), reference.gate, wide, grad)
    eager = partial(ops.attention, backend="eager", **options)
    plain = gradients(eager, partial(ops.gate, backend="eager"), [q, key, v, logits], grad)
    q, key, v, grad = (surrounded(x) for x in (q, key, v, grad))
    logits = surrounded(logits)
    out, lse = triton_forward.attention_forward(q, key, v, logits, case.causal, case.scale, first)
    assert out.transpose(1, 2).is_contiguous()
    found = triton_backward.attention_backward(grad, q, key, v, logits, out, lse, case.causal, case.scale, first)
    assert [x.stride() for x in found[:3]] == [torch.empty_like(x).stride() for x in (q, key, v)]
    names = ("out", "lse", "dq", "dk", "dv", "dgate_logits")
    # A single key leaves no gradient of queries and keys: plain PyTorch gives 0, a rounded output over g does not.
    rounding = max(2 * torch.finfo(dtype).eps if s == 1 else 0, 1e-5)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, ours, theirs, true in zip(names, (out, lse, *found), plain, exact, strict=True):
        assert ours.isfinite().all(), (name, case)
        if case.shift == float("-inf") and name != "lse":
            assert not ours.any(), (name, case)
            continue
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        allowed = 2 * allowed + rounding * max(true.abs().max(), exact[4].abs().max()).item() + smallest
        assert error <= allowed, f"{name}: off by {error:.1e}, allowed {allowed:.1e}, {case}, {cut}"


for name, step in (("float32", 1), ("float16", 3)):  # bfloat16 is computed wrongly by the interpreter
    for cut, case in list(cases())[::step]:
        check(cut, case, getattr(torch, name))
