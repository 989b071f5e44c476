"""Run by test_triton_gate.py with Triton's interpreter switched on, which must be before Triton is imported."""

import torch

from gated_attention.ops import lse_shift
from gated_attention.ops.triton import gate as triton_gate


def check(channels, dtype, by_token, d=24, h=3, t=7, b=2):
    generator = torch.Generator().manual_seed(0)
    o, grad = (torch.randn(b, h, t, d, generator=generator).to(dtype) for _ in range(2))
    if by_token:
        o, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (o, grad))
    s = 10 * torch.randn(b, t, h, 2 * channels, generator=generator)[..., :channels]  # strided
    s[0, 0, 0] = -60.0
    s = s.to(dtype)
    lse = torch.randn(b, h, t, generator=generator)
    expected = lse_shift.apply_gate(o, s)
    out = triton_gate.apply_gate(o.clone(memory_format=torch.preserve_format), s)
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    names = ("scaled", "o", "shifted", "grad_logits")
    ours, theirs = triton_gate.prepare_backward(grad, out, s, lse), lse_shift.prepare_backward(grad, expected, s, lse)
    for name, found, wanted in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


for dtype in (torch.float32, torch.float16):
    for by_token in (False, True):
        check(1, dtype, by_token)
        check(24, dtype, by_token)
