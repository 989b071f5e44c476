"""Launch of the backward kernel for Hopper, between `triton.prepare` and the cast of dQ.

dQ is summed in float32, in an order that differs between runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gated_attention.ops.hopper.backward import COMPUTE_WARPS, backward_kernel
from gated_attention.ops.hopper.pipeline import describe, num_multiprocessors
from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.sdpa import adjacent
from gated_attention.ops.triton.prepare import prepare

NUM_QUERIES = {64: 128, 128: 64}  # per tile, by head dim
NUM_KEYS = 128  # per program
NUM_STAGES = 2
_ROWS = 16  # per program of `_finish_kernel`
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_SECTION_BYTES = 32 * 2**20
"""Queries, their gradients and dQ that programs work on at a time; they should stay in the L2 cache of 50 MB."""


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether this backward is measured faster than PyTorch's with a shifted log-sum-exp; see docs/kernels.md.

    It is where the queries that share a key head, and their gradients, stay in the L2 cache.
    """
    head = q.shape[2] * q.shape[3]
    return q.shape[3] in NUM_QUERIES and head <= 2**20 and head * (q.shape[1] // k.shape[1]) <= 2**21


@triton.jit
def _finish_kernel(total_ptr, dq_ptr, scale, T, H, sq_b, sq_h, sq_t, D: tl.constexpr, ROWS: tl.constexpr):
    head, t = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d = tl.arange(0, D)
    mask = (t < T)[:, None]
    dq = tl.load(total_ptr + (head.to(tl.int64) * T + t)[:, None] * D + d[None, :], mask)
    tl.store(dq_ptr + b * sq_b + h * sq_h + t[:, None].to(tl.int64) * sq_t + d[None, :], dq * scale, mask)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, see `fused.Backward`. P, dP and sums are float32; P and dS are rounded to the inputs' dtype."""
    scaled, stats, ds = prepare(grad, out, gate_logits, lse, padded_length(q))
    total, dk, dv = run_kernel(scaled, q, k, v, stats, causal, scale)
    dq = torch.empty_like(adjacent(q))
    B, H, T, D = dq.shape
    launch(
        _finish_kernel, (triton.cdiv(T, _ROWS), B * H, 1), launch_key(total, dq),
        total, dq, scale, T, H, *dq.stride()[:3], D=D, ROWS=_ROWS,
    )  # fmt: skip
    return dq, dk, dv, ds


def padded_length(q: Tensor) -> int:
    """Number of queries that the kernel reads, in whole tiles."""
    num_queries = NUM_QUERIES[q.shape[3]]
    return -(-q.shape[2] // num_queries) * num_queries


def run_kernel(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The unscaled dQ in float32, dK and dV, from what `lse_shift.prepare_kernels` returns."""
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.empty_like(adjacent(k)), torch.empty_like(adjacent(v))
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    group, flat, num_queries = H // K, stats.contiguous().view(-1), NUM_QUERIES[D]
    num_blocks = triton.cdiv(S, NUM_KEYS)
    head_bytes = group * T * D * (2 * q.element_size() + total.element_size())
    # Half of a head's blocks are drawn together: those of a section's heads should occupy the whole GPU.
    num_heads = max(_SECTION_BYTES // head_bytes, 2 * num_multiprocessors(q.device) // num_blocks)
    launch(
        backward_kernel, (B * K * num_blocks, 1, 1), launch_key(q, k, v, grad, dk, dv),
        describe(q, num_queries), describe(k, NUM_KEYS), describe(v, NUM_KEYS), describe(grad, num_queries),
        TensorDescriptor(flat, list(flat.shape), [1], [num_queries], _FLAT), describe(total, num_queries),
        dk, *dk.stride()[:3], dv, *dv.stride()[:3],
        B, K, T, S, stats.shape[-1], group, max(1, min(B * K, num_heads)), scale,
        BM=num_queries, BN=NUM_KEYS, D=D, STAGES=NUM_STAGES, CAUSAL=causal, num_warps=COMPUTE_WARPS,
    )  # fmt: skip
    return total, dk, dv
