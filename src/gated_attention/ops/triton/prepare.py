"""Inputs of our own backward kernels: one pass over the gradient and the gated output.

In `lse_shift`'s notation, a gate per head enters those kernels through LSE + softplus(-s) and Delta = rowsum(dO *
gated) / g, a gate per channel through the gradient g * dO and its Delta. The same pass writes the gradient of the
logits.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.triton.tiles import LOG2E, head_of, heads, read_tile, write_tile

_ROWS = 16
_SMALLEST_GATE = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["T", "H"])
def _prepare_kernel(
    grad, out, gate_logits, lse, scaled, grad_logits, lse2, delta, T, T_padded, H,
    D: tl.constexpr, ROWS: tl.constexpr, ELEMENTWISE: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * ROWS
    b, h = head // H, head % H
    do = read_tile(head_of(grad, b, h), first, T, ROWS, D, True).to(tl.float32)
    gated = read_tile(head_of(out, b, h), first, T, ROWS, D, True).to(tl.float32)
    s = read_tile(head_of(gate_logits, b, h), first, T, ROWS, D if ELEMENTWISE else 1, True).to(tl.float32)
    row_lse = read_tile(head_of(lse, b, h), first, T, ROWS, 1, True)
    g = tl.sigmoid(s)
    if ELEMENTWISE:
        ds = do * gated * tl.sigmoid(-s)
        # Computed from the rounded dO that the kernels read: a query of one key has dP = Delta up to rounding.
        do = (do * g).to(scaled.ptr.dtype.element_ty)
        write_tile(head_of(scaled, b, h), first, T, do)
        row_delta = tl.sum(do.to(tl.float32) * (gated / tl.maximum(g, _SMALLEST_GATE)), 1, keep_dims=True)
    else:
        total = tl.sum(do * gated, 1, keep_dims=True)  # (ROWS, 1)
        ds = total * tl.sigmoid(-s)
        row_delta = total / tl.maximum(g, _SMALLEST_GATE)
        # softplus(-s), without overflow for a closed gate
        row_lse += tl.maximum(-s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
    write_tile(head_of(grad_logits, b, h), first, T, ds)
    # Padding rows attend to nothing: exp(-inf) is exactly 0.
    there = (first + tl.arange(0, ROWS) < T)[:, None]
    write_tile(head_of(lse2, b, h), first, T_padded, tl.where(there, row_lse * LOG2E, float("inf")))
    write_tile(head_of(delta, b, h), first, T_padded, tl.where(there, row_delta, 0.0))


def prepare(
    grad: Float[Tensor, "b h t d"],
    out: Float[Tensor, "b h t d"],
    gate_logits: Float[Tensor, "b t h #d"],
    lse: Float[Tensor, "b h t"],
    T_padded: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lse_shift.prepare_kernels`."""
    B, H, T, D = grad.shape
    elementwise = gate_logits.shape[-1] > 1
    grad_logits = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    scaled = torch.empty((B, T, H, D), dtype=grad.dtype, device=grad.device).transpose(1, 2) if elementwise else grad
    stats = torch.empty((2, B, H, T_padded), dtype=torch.float32, device=grad.device)
    launch(
        _prepare_kernel, (B * H, triton.cdiv(T_padded, _ROWS), 1), (launch_key(grad, out, gate_logits, lse), T_padded),
        heads(grad), heads(out), heads(gate_logits.transpose(1, 2)), heads(lse[..., None]), heads(scaled),
        heads(grad_logits.transpose(1, 2)), heads(stats[0, ..., None]), heads(stats[1, ..., None]), T, T_padded, H,
        D=D, ROWS=_ROWS, ELEMENTWISE=elementwise,
    )  # fmt: skip
    return scaled, stats, grad_logits
