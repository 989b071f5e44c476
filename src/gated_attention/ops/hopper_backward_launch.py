"""Backward of gated attention on Hopper: what goes before, into and after `hopper_backward`'s kernel.

With `lse_shift`'s notation, a gate per head enters the kernel as LSE + softplus(-s) and Delta = rowsum(dO * gated) / g,
a gate per channel as the gradient g * dO. One pass over dO and the gated output writes these and the gradient of the
logits; the ungated output is never formed. dQ is summed in float32, in an order that differs from run to run, and
scaled and cast at the end.

A call costs the CPU some 250 us, hidden while the GPU is behind.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gated_attention.ops.hopper_backward import COMPUTE_WARPS, backward_kernel
from gated_attention.ops.hopper_pipeline import describe

_ROWS = 16  # of a program of the kernels before and after
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_SECTION_BYTES = 32 * 2**20
"""Queries, their gradients and dQ that programs work on at a time; they should stay in the L2 cache, of 50 MB."""


class Blocks(NamedTuple):
    """How a head size is cut: queries a tile, keys a program, and tiles in flight."""

    num_queries: int
    num_keys: int
    num_stages: int


BLOCKS = {
    64: Blocks(num_queries=128, num_keys=128, num_stages=2),
    128: Blocks(num_queries=64, num_keys=128, num_stages=2),
}


def pays(q: Float[Tensor, "b h t d"], k: Float[Tensor, "b k s d"]) -> bool:
    """Whether this backward is measured faster than PyTorch's with a shifted log-sum-exp; see docs/kernels.md.

    It is where the queries that share a key head, and their gradients, stay in the L2 cache.
    """
    head = q.shape[2] * q.shape[3]
    return q.shape[3] in BLOCKS and head <= 2**20 and head * (q.shape[1] // k.shape[1]) <= 2**21


@triton.jit
def _prepare_kernel(
    grad_ptr, out_ptr, s_ptr, lse_ptr, ds_ptr, scaled_ptr, stats_ptr, T, T_padded, H, delta_at,
    sg_b, sg_h, sg_t, so_b, so_h, so_t, ss_b, ss_t, ss_h, ss_d, sl_b, sl_h, sl_t,
    D: tl.constexpr, ROWS: tl.constexpr, ELEMENTWISE: tl.constexpr,
):  # fmt: skip
    head, t = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d = tl.arange(0, D)
    there = t < T
    mask = there[:, None]
    grad = tl.load(grad_ptr + b * sg_b + h * sg_h + t[:, None].to(tl.int64) * sg_t + d[None, :], mask, 0.0)
    grad = grad.to(tl.float32)
    out = tl.load(out_ptr + b * so_b + h * so_h + t[:, None].to(tl.int64) * so_t + d[None, :], mask, 0.0)
    product = grad * out.to(tl.float32)
    delta = tl.sum(product, 1)
    lse = tl.load(lse_ptr + b * sl_b + h * sl_h + t.to(tl.int64) * sl_t, there, 0.0)
    row = (b * T + t) * H + h  # of a contiguous (B, T, H, ...)
    s_at = s_ptr + b * ss_b + h * ss_h + t.to(tl.int64) * ss_t
    if ELEMENTWISE:
        s = tl.load(s_at[:, None] + d[None, :] * ss_d, mask, 0.0).to(tl.float32)
        at = row[:, None] * D + d[None, :]
        tl.store(ds_ptr + at, product * tl.sigmoid(-s), mask)
        tl.store(scaled_ptr + at, grad * tl.sigmoid(s), mask)
    else:
        s = tl.load(s_at, there, 0.0).to(tl.float32)
        tl.store(ds_ptr + row, delta * tl.sigmoid(-s), there)
        delta = delta / tl.maximum(tl.sigmoid(s), 1e-30)
        # softplus(-s), without overflow for a closed gate
        lse += tl.maximum(-s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
    # Rows that pad the last tile attend to nothing: exp(-inf) is exactly 0.
    stats_at = stats_ptr + head * T_padded + t
    tl.store(stats_at, tl.where(there, lse * 1.4426950408889634, float("inf")))
    tl.store(stats_at + delta_at, tl.where(there, delta, 0.0))


@triton.jit
def _finish_kernel(total_ptr, dq_ptr, scale, T, H, sq_b, sq_h, sq_t, D: tl.constexpr, ROWS: tl.constexpr):
    head, t = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d = tl.arange(0, D)
    mask = (t < T)[:, None]
    dq = tl.load(total_ptr + (head.to(tl.int64) * T + t)[:, None] * D + d[None, :], mask)
    tl.store(dq_ptr + b * sq_b + h * sq_h + t[:, None].to(tl.int64) * sq_t + d[None, :], dq * scale, mask)


def attention_backward(
    grad: Float[Tensor, "b h t d"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    gate_logits: Float[Tensor, "b t h #d"],
    out: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate's logits.

    P, dP and sums are float32; P and dS are rounded to the inputs' dtype for the products that follow.

    Args:
        grad: Of the gated output.
        out: The gated output.
        lse: Natural logarithm, of the ungated attention; float32.
        scale: Positive.
    """
    T = q.shape[2]
    blocks = BLOCKS[q.shape[3]]
    T_padded = triton.cdiv(T, blocks.num_queries) * blocks.num_queries
    scaled, stats, ds = _prepare(_by_row(grad), _by_row(out), gate_logits, lse, T_padded)
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.empty_like(_by_row(k)), torch.empty_like(_by_row(v))
    _launch(blocks, q, k, v, scaled, stats, total, dk, dv, causal, scale)
    return _finish(total, torch.empty_like(_by_row(q)), scale), dk, dv, ds


def _prepare(
    grad: Tensor, out: Tensor, gate_logits: Tensor, lse: Tensor, T_padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's dO; LSE (base 2) and Delta, (2, B, H, T_padded); and the gradient of the logits."""
    B, H, T, D = grad.shape
    elementwise = gate_logits.shape[-1] > 1
    ds = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    scaled = torch.empty((B, T, H, D), dtype=grad.dtype, device=grad.device).transpose(1, 2) if elementwise else grad
    stats = torch.empty((2, B, H, T_padded), dtype=torch.float32, device=grad.device)
    _prepare_kernel[triton.cdiv(T_padded, _ROWS), B * H](
        grad, out, gate_logits, lse, ds, scaled, stats, T, T_padded, H, B * H * T_padded,
        *grad.stride()[:3], *out.stride()[:3], *gate_logits.stride(), *lse.stride(),
        D=D, ROWS=_ROWS, ELEMENTWISE=elementwise,
    )  # fmt: skip
    return scaled, stats, ds


def _launch(
    blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, stats: Tensor,
    total: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Fill dK and dV, and add dQ, which is yet to be scaled, to `total`."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    group, flat = H // K, stats.view(-1)
    by_query, by_key = blocks.num_queries, blocks.num_keys
    num_blocks = triton.cdiv(S, by_key)
    head_bytes = group * T * D * (2 * q.element_size() + total.element_size())
    # Half of a head's blocks are drawn together: the heads of a section should occupy the whole GPU with them.
    num_heads = max(
        _SECTION_BYTES // head_bytes, 2 * torch.cuda.get_device_properties(q.device).multi_processor_count // num_blocks
    )
    backward_kernel[(B * K * num_blocks,)](
        describe(q, by_query), describe(k, by_key), describe(v, by_key), describe(grad, by_query),
        TensorDescriptor(flat, list(flat.shape), [1], [by_query], _FLAT), describe(total, by_query),
        dk, *dk.stride()[:3], dv, *dv.stride()[:3],
        B, K, T, S, stats.shape[-1], group, max(1, min(B * K, num_heads)), scale,
        BM=by_query, BN=by_key, D=D, STAGES=blocks.num_stages, CAUSAL=causal, num_warps=COMPUTE_WARPS,
    )  # fmt: skip


def _finish(total: Tensor, dq: Tensor, scale: float) -> Tensor:
    B, H, T, D = dq.shape
    _finish_kernel[triton.cdiv(T, _ROWS), B * H](total, dq, scale, T, H, *dq.stride()[:3], D=D, ROWS=_ROWS)
    return dq


def _by_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
