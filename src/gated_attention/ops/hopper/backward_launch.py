"""Backward of gated attention on Hopper: what goes before, into and after `hopper_backward`'s kernel.

`triton_prepare` writes what the kernel starts from. dQ is summed in float32, in an order that differs from run to run,
and scaled and cast at the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gated_attention.ops.hopper.backward import COMPUTE_WARPS, backward_kernel
from gated_attention.ops.hopper.pipeline import describe, num_multiprocessors
from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.sdpa import adjacent
from gated_attention.ops.triton.prepare import prepare

_ROWS = 16  # of a program of the kernel after
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_SECTION_BYTES = 32 * 2**20
"""Queries, their gradients and dQ that programs work on at a time; they should stay in the L2 cache, of 50 MB."""


class Blocks(NamedTuple):
    """How a head size is cut: queries per tile, keys per program, and tiles in flight."""

    num_queries: int
    num_keys: int
    num_stages: int


BLOCKS = {
    64: Blocks(num_queries=128, num_keys=128, num_stages=2),
    128: Blocks(num_queries=64, num_keys=128, num_stages=2),
}


def is_faster(q: Float[Tensor, "b h t d"], k: Float[Tensor, "b k s d"]) -> bool:
    """Whether this backward is measured faster than PyTorch's with a shifted log-sum-exp; see docs/kernels.md.

    It is where the queries that share a key head, and their gradients, stay in the L2 cache.
    """
    head = q.shape[2] * q.shape[3]
    return q.shape[3] in BLOCKS and head <= 2**20 and head * (q.shape[1] // k.shape[1]) <= 2**21


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
    scaled, stats, ds = prepare(grad, out, gate_logits, lse, padded_length(q))
    total, dk, dv = run_kernel(scaled, q, k, v, stats, causal, scale)
    return _finish(total, torch.empty_like(adjacent(q)), scale), dk, dv, ds


def padded_length(q: Float[Tensor, "b h t d"]) -> int:
    """Queries as the kernel reads them, in whole tiles."""
    num_queries = BLOCKS[q.shape[3]].num_queries
    return -(-q.shape[2] // num_queries) * num_queries


def run_kernel(
    grad: Float[Tensor, "b h t d"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    stats: Float[Tensor, "2 b h p"],
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b k s d"], Float[Tensor, "b k s d"]]:
    """The sum for dQ in float32, yet to be scaled, dK and dV, from what `lse_shift.prepare_kernels` gives."""
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.empty_like(adjacent(k)), torch.empty_like(adjacent(v))
    _launch(BLOCKS[q.shape[3]], q, k, v, grad, stats.contiguous(), total, dk, dv, causal, scale)
    return total, dk, dv


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
    num_heads = max(_SECTION_BYTES // head_bytes, 2 * num_multiprocessors(q.device) // num_blocks)
    launch(
        backward_kernel, (B * K * num_blocks, 1, 1), launch_key(q, k, v, grad, dk, dv),
        describe(q, by_query), describe(k, by_key), describe(v, by_key), describe(grad, by_query),
        TensorDescriptor(flat, list(flat.shape), [1], [by_query], _FLAT), describe(total, by_query),
        dk, *dk.stride()[:3], dv, *dv.stride()[:3],
        B, K, T, S, stats.shape[-1], group, max(1, min(B * K, num_heads)), scale,
        BM=by_query, BN=by_key, D=D, STAGES=blocks.num_stages, CAUSAL=causal, num_warps=COMPUTE_WARPS,
    )  # fmt: skip


def _finish(total: Tensor, dq: Tensor, scale: float) -> Tensor:
    B, H, T, D = dq.shape
    launch(
        _finish_kernel, (triton.cdiv(T, _ROWS), B * H, 1), launch_key(total, dq),
        total, dq, scale, T, H, *dq.stride()[:3], D=D, ROWS=_ROWS,
    )  # fmt: skip
    return dq
