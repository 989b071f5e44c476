"""Run by test_triton_skip.py with Triton's interpreter switched on: kernels that skip, against the definition.

Memory that kernels are to fill, memory around what they are to read, and closed rows of queries and of the gradient
are NaN.
"""

import itertools
import random
import sys
from functools import partial
from typing import NamedTuple

import torch
from interpreted import first_keys_of, surrounded

from gated_attention import ops
from gated_attention.ops import reference
from gated_attention.ops.skip import rows
from gated_attention.ops.triton import skip_backward, skip_forward, skip_rows
from gated_attention.ops.triton.tiles import GATHERED_SMALL, LARGE, Blocks, Cut
from gated_attention.spec import GateSpec


class Case(NamedTuple):
    t: int
    s: int
    group: int = 2
    kv_heads: int = 1
    share: float = 0.5
    pattern: str = "random"
    head_dim: int = 16
    causal: bool = True
    first_keys: str = ""
    activation: str = "hard_sigmoid"
    threshold: float = 0.0
    scale: float = 0.3
    batch: int = 1


TALL = Cut(Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(64, 16, 4, 1))
WIDE = Cut(Blocks(16, 32, 4, 1), Blocks(16, 64, 4, 1), Blocks(16, 32, 4, 1))
NARROW = Cut(*[Blocks(16, 16, 4, 1)] * 3)
RANDOM = len(sys.argv) > 1
SHARES = (0.0, 0.01, 0.25, 0.5, 0.9, 1.0)


def cases():
    """With small tiles, which are many soon; and once with cuts that are shipped."""
    cuts = itertools.cycle((TALL, WIDE))
    for share, (t, group) in zip(SHARES, itertools.cycle(((50, 4), (77, 1), (23, 8), (63, 3))), strict=False):
        yield next(cuts), Case(t, t, group, share=share)
    for case in (
        Case(1, 1),
        Case(1, 70, 4, causal=False),
        Case(40, 83, 1, 2),
        Case(40, 83, causal=False),
        Case(40, 40, kv_heads=2, pattern="a group"),
        Case(63, 63, 4, pattern="first and last"),
        Case(63, 63, 4, pattern="a burst"),
        Case(50, 50, pattern="barely"),
        Case(50, 50, scale=-0.3),
        Case(50, 50, activation="sigmoid", threshold=0.4),
        Case(33, 33, threshold=0.3),
        Case(33, 50, batch=2, first_keys="documents"),
        Case(77, 77, 4, share=0.25, first_keys="documents"),
        Case(63, 63, 2, 2, first_keys="window"),
        Case(63, 63, share=0.3, first_keys="any order"),
    ):
        yield next(cuts), case
    yield NARROW, Case(40, 40, 7, share=1.0, first_keys="window")  # the last queries of a window fill no tile
    for head_dim, cut in ((64, LARGE[64]), (128, GATHERED_SMALL[128])):
        yield cut, Case(150, 150, 1, head_dim=head_dim, scale=head_dim**-0.5)


def random_cases(number, seed):
    draw = random.Random(seed)
    for _ in range(number):
        t = draw.choice((1, 2, 7, 16, 31, 33, 64, 65, 100))
        causal = draw.random() < 0.8
        first_keys = draw.choice(("", "", "documents", "window", "any order")) if causal else ""
        activation = draw.choice(("hard_sigmoid", "hard_sigmoid", "sigmoid"))
        threshold = draw.choice((0.05, 0.5)) if activation == "sigmoid" else draw.choice((0.0, 0.0, 0.2))
        pattern = draw.choice(("random", "random", "barely", "a burst", "first and last", "a group"))
        s, group = t + draw.choice((0, 0, 1, 40)), draw.choice((1, 2, 3, 4, 8))
        # Several heads and sequences where they are short: long ones have many tiles, which are what takes the time.
        kv_heads, batch = (draw.choice((1, 2)) if t * group <= 130 else 1 for _ in range(2))
        case = Case(
            t, s, group, kv_heads, draw.random(), pattern, 16, causal, first_keys, activation, threshold,
            draw.choice((0.25, 0.5, -0.25)), batch,
        )  # fmt: skip
        blocks = [Blocks(draw.choice((16, 32, 64)), draw.choice((16, 32, 64)), 4, 1) for _ in range(3)]
        yield Cut(*blocks), case


def logits_of(case, generator):
    """Gate logits, (B, T, H, 1); a share of them open, some of these at the upper corner and beyond."""
    b, t, h = case.batch, case.t, case.group * case.kv_heads
    closed_at = rows.closing_logit(case.activation, case.threshold)

    def uniform():
        return torch.rand(b, t, h, 1, generator=generator)

    is_open = uniform() < case.share
    if case.pattern == "a group":
        is_open[:, :, : case.group] = False
    if case.pattern == "first and last":
        is_open[:] = False
        is_open[:, [0, -1]] = True
    if case.pattern == "a burst":
        is_open[:] = False
        is_open[:, t // 3 : t // 2 + 1] = True
    logits = torch.where(is_open, closed_at + 0.05 + uniform() * 4, torch.where(uniform() < 0.5, closed_at, -20.0))
    logits = torch.where(is_open & (uniform() < 0.2), torch.where(uniform() < 0.5, 3.0, 60.0), logits)
    if case.pattern == "barely" and case.activation == "hard_sigmoid" and not case.threshold:
        logits = torch.where(is_open & (uniform() < 0.3), -3 + 2.0**-8, logits)
    return logits


def gradients(tensors, weight, attend, gate, spec):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, _ = attend(*leaves[:3])
    gated = gate(out.transpose(1, 2), leaves[3], spec).transpose(1, 2)
    return [gated.detach(), *torch.autograd.grad(gated, leaves, weight.to(gated.dtype))]


def check(cut, case, dtype):
    for module in (skip_forward, skip_backward):
        module.choose_gathered_cut = lambda *_: cut
    generator = torch.Generator().manual_seed(5)
    t, s, k, d = case.t, case.s, case.kv_heads, case.head_dim
    h = case.group * k
    shapes = [(h, t, d), (k, s, d), (k, s, d), (h, t, d)]
    q, key, v, grad = (torch.randn(case.batch, *shape, generator=generator).to(dtype) for shape in shapes)
    logits = logits_of(case, generator).to(dtype)
    closed_at = rows.closing_logit(case.activation, case.threshold)
    closed = logits.float() <= closed_at
    first = first_keys_of(case.first_keys, case.batch, t, s)
    mask = None if first is None else torch.arange(s)[None, None, None] >= first[:, None, :, None]
    spec = GateSpec(granularity="headwise", activation=case.activation)
    options = {"causal": case.causal, "scale": case.scale, "mask": mask}
    tensors = [q, key, v, logits.masked_fill(closed, -700.0)]
    wide = [x.double() for x in tensors]
    exact = gradients(wide, grad, partial(reference.attention, **options), reference.gate, spec)
    eager = partial(ops.attention, backend="eager", **options)
    plain = gradients(tensors, grad, eager, partial(ops.gate, backend="eager"), spec)
    shut = closed[..., 0].transpose(1, 2)[..., None]
    q, grad = (x.masked_fill(shut, float("nan")) for x in (q, grad))
    q, key, v, grad, logits = (surrounded(x) for x in (q, key, v, grad, logits))
    listed = skip_rows.list_rows(logits[..., 0], k, closed_at)
    for ours, theirs in zip(listed, rows.list_rows(logits[..., 0], k, closed_at), strict=True):
        assert torch.equal(ours, theirs), case
    arguments = (case.activation, case.causal, case.scale, first)
    out, lse = skip_forward.attention_forward(q, key, v, logits, listed, *arguments)
    assert out.transpose(1, 2).is_contiguous()
    found = skip_backward.attention_backward(grad, q, key, v, logits, out, lse, listed, *arguments)
    assert [x.stride() for x in found[:3]] == [torch.empty_like(x).stride() for x in (q, key, v)]
    for name, x in (("out", out), ("dq", found[0]), ("dgate_logits", found[3].transpose(1, 2))):
        assert (x.masked_select(shut.expand_as(x)) == 0).all(), (name, case)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, ours, theirs, true in zip(("out", "dq", "dk", "dv", "ds"), (out, *found), plain, exact, strict=True):
        assert ours.isfinite().all(), (name, case)
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        # Rows of one key have no gradient of queries and keys: plain PyTorch gives 0, a rounded output over g does not.
        # Of few keys, or of weights that are nearly one key's, it is small: some random cases are such in float16.
        eps = torch.finfo(dtype).eps
        rounding = max(1e-5, eps) if t < 16 or RANDOM else 1e-5
        if true.abs().max() < 1e-9:
            rounding = 4 * case.group * eps
        allowed = 2 * allowed + rounding * max(true.abs().max(), exact[3].abs().max()).item() + smallest
        assert error <= allowed, f"{name}: off by {error:.1e}, allowed {allowed:.1e}, {case}, {cut}"


def fill(make):
    """What kernels leave out shows: as NaN, or as numbers out of range."""

    def filled(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.fill_(float("nan") if x.dtype.is_floating_point else 10**9)

    return filled


skip_rows._CHUNK = 64  # so that there are several
for module in (skip_forward, skip_backward, skip_rows):
    module.torch = type("torch", (), {**vars(torch), "empty": fill(torch.empty), "empty_like": fill(torch.empty_like)})
chosen = list(random_cases(*map(int, sys.argv[1:])) if RANDOM else cases())
for name, step in (("float32", 1), ("float16", 3)):  # bfloat16 is computed wrongly by the interpreter
    for cut, case in chosen[::step]:
        check(cut, case, getattr(torch, name))
