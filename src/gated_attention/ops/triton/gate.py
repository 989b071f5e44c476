"""Two Triton kernels around a stock attention: the sigmoid gate after it, and the inputs of its backward pass.

One program takes a few rows; a row is the channels of one head of one token. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from gated_attention.ops.launch import FUSION
from gated_attention.ops.sdpa import adjacent

_ROWS = 16


@triton.jit
def _gate_kernel(
    o_ptr, s_ptr, out_ptr, num_rows, T, H, so_b, so_t, so_h, ss_b, ss_t, ss_h, ss_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ELEMENTWISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, t, b = row % H, (row // H) % T, row // (H * T)
    d = tl.arange(0, BLOCK_D)
    row_mask = row < num_rows
    mask = row_mask[:, None] & (d < D)[None, :]
    o = tl.load(o_ptr + (b * so_b + t * so_t + h * so_h)[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    s_at = s_ptr + b * ss_b + t * ss_t + h * ss_h
    if ELEMENTWISE:
        g = tl.sigmoid(tl.load(s_at[:, None] + d[None, :] * ss_d, mask, 0.0).to(tl.float32))
    else:
        g = tl.sigmoid(tl.load(s_at, row_mask, 0.0).to(tl.float32))[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], o * g, mask)


@triton.jit
def _prepare_kernel(
    grad_ptr, out_ptr, s_ptr, lse_ptr, o_ptr, ds_ptr, shifted_ptr, scaled_ptr,
    num_rows, T, H, sg_b, sg_t, sg_h, ss_b, ss_t, ss_h, ss_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ELEMENTWISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, t, b = row % H, (row // H) % T, row // (H * T)
    d = tl.arange(0, BLOCK_D)
    row_mask = row < num_rows
    mask = row_mask[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    grad = tl.load(grad_ptr + (b * sg_b + t * sg_t + h * sg_h)[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask, 0.0).to(tl.float32)
    s_at = s_ptr + b * ss_b + t * ss_t + h * ss_h
    if ELEMENTWISE:
        s = tl.load(s_at[:, None] + d[None, :] * ss_d, mask, 0.0).to(tl.float32)
        g = tl.sigmoid(s)
        tl.store(ds_ptr + at, grad * out * tl.sigmoid(-s), mask)
        tl.store(scaled_ptr + at, grad * g, mask)
        tl.store(o_ptr + at, out / tl.maximum(g, 1e-30), mask)
    else:
        s = tl.load(s_at, row_mask, 0.0).to(tl.float32)
        tl.store(ds_ptr + row, tl.sum(grad * out, 1) * tl.sigmoid(-s), row_mask)
        tl.store(o_ptr + at, out / tl.maximum(tl.sigmoid(s), 1e-30)[:, None], mask)
        lse_at = (b * H + h) * T + t
        # softplus(-s), without overflow for a closed gate
        softplus = tl.maximum(-s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
        tl.store(shifted_ptr + lse_at, tl.load(lse_ptr + lse_at, row_mask, 0.0) + softplus, row_mask)


def apply_gate(o: Float[Tensor, "b h t d"], gate_logits: Float[Tensor, "b t h #d"]) -> Float[Tensor, "b h t d"]:
    """`sigmoid(gate_logits) * o`, laid out as (B, T, H, D): in place if `o` is, so the caller must own `o`."""
    by_token = o.transpose(1, 2)  # (B, T, H, D)
    out = by_token if by_token.is_contiguous() else torch.empty_like(by_token, memory_format=torch.contiguous_format)
    _launch(_gate_kernel, by_token, gate_logits, o, gate_logits, out)
    return out.transpose(1, 2)


def prepare_backward(
    grad: Float[Tensor, "b h t d"],
    out: Float[Tensor, "b h t d"],
    gate_logits: Float[Tensor, "b t h #d"],
    lse: Float[Tensor, "b h t"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `lse_shift.prepare_backward`; `out` is laid out as (B, T, H, D)."""
    elementwise = gate_logits.shape[-1] > 1
    grad = adjacent(grad)
    ds = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    o = torch.empty_like(out)
    shifted = lse if elementwise else torch.empty_like(lse)
    scaled = torch.empty_like(out) if elementwise else grad
    _launch(_prepare_kernel, grad.transpose(1, 2), gate_logits, grad, out, gate_logits, lse, o, ds, shifted, scaled)
    return scaled, o, shifted, ds


def _launch(kernel: "triton.JITFunction", by_token: Tensor, gate_logits: Tensor, *tensors: Tensor) -> None:
    """Launch over the rows of a (B, T, H, D) tensor."""
    B, T, H, D = by_token.shape
    kernel[(triton.cdiv(B * T * H, _ROWS),)](
        *tensors, B * T * H, T, H, *by_token.stride()[:3], *gate_logits.stride(),
        D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=_ROWS, ELEMENTWISE=gate_logits.shape[-1] > 1, **FUSION,
    )  # fmt: skip
