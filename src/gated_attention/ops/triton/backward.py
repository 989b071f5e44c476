"""Gated attention, backward, in portable Triton: two kernels, which both keep their sums in registers.

One has a program per block of keys, which takes the queries that see it, of all heads that share it. The other has a
program per tile of queries, which takes the keys that it sees. Both recompute the weights from the log-sum-exp:

    P = exp2(c Q K^T - LSE),  dS = P * (dO V^T - Delta),  dV = P^T dO,  dK = dS^T Q,  dQ = dS K

The first computes their transposes, so that P^T and dS^T are left factors. Nothing is summed in memory, so gradients
are deterministic. The gate enters through LSE and Delta, or through dO; see `triton.prepare`. P, dP and sums are
float32; P and dS are rounded to the inputs' dtype for the products that follow.

Source: FlashAttention-2 (Dao, 2023, algorithm 2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gated_attention.ops.triton.prepare import prepare
from gated_attention.ops.triton.tiles import (
    LOG2E,
    choose_cut,
    first_keys_of,
    head_of,
    heads,
    read_tile,
    sees,
    split_keys,
    write_tile,
)


@triton.jit(do_not_specialize=["T", "S", "H", "group"])
def keys_kernel(
    q, k, v, do, lse_ptr, delta_ptr, first_keys_ptr, last_queries_ptr, dk, dv, T, T_padded, S, H, group, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    num_blocks, num_kv_heads = tl.cdiv(S, BN), H // group
    head = tl.program_id(0) // num_blocks
    b, kv_head = head // num_kv_heads, head % num_kv_heads
    first = tl.program_id(0) % num_blocks * BN  # causal: the first keys are seen by the most queries
    keys = first + tl.arange(0, BN)
    k_block = read_tile(head_of(k, b, kv_head), first, S, BN, D, True)
    v_block = read_tile(head_of(v, b, kv_head), first, S, BN, D, True)
    dk_block = tl.zeros((BN, D), tl.float32)
    dv_block = tl.zeros((BN, D), tl.float32)
    qk_scale = scale * LOG2E
    begin, end, first_keys = 0, T, first_keys_ptr
    if CAUSAL:
        begin = tl.maximum(first - (S - T), 0) // BM * BM
    if FIRST_KEYS:
        first_keys = first_keys_of(first_keys_ptr, b, T, S)
        end = tl.load(last_queries_ptr + tl.cast(b, tl.int64) * S + tl.minimum(first + BN, S) - 1)
    for h in range(kv_head * group, (kv_head + 1) * group):
        q_head, do_head = head_of(q, b, h), head_of(do, b, h)
        row = tl.cast(b * H + h, tl.int64) * T_padded
        for at in range(begin, end, BM):
            queries = at + tl.arange(0, BM)
            q_tile = read_tile(q_head, at, T, BM, D, True)
            do_tile = read_tile(do_head, at, T, BM, D, True)
            # Queries from T on have an infinite LSE, hence no weight.
            p = tl.exp2(tl.dot(k_block, q_tile.T) * qk_scale - tl.load(lse_ptr + row + queries)[None, :])  # (BN, BM)
            if CAUSAL:
                # In every tile: a second loop for those that need a mask would take too many registers.
                own = queries + (S - T)
                p = tl.where(sees(own[None, :], keys[:, None], first_keys, S, True, FIRST_KEYS), p, 0.0)
            dv_block = tl.dot(p.to(do_tile.dtype), do_tile, dv_block)
            dp = tl.dot(v_block, do_tile.T)
            ds = p * (dp - tl.load(delta_ptr + row + queries)[None, :])
            dk_block = tl.dot(ds.to(q_tile.dtype), q_tile, dk_block)
    write_tile(head_of(dk, b, kv_head), first, S, dk_block * scale)
    write_tile(head_of(dv, b, kv_head), first, S, dv_block)


@triton.jit
def _meet_keys(
    dq, q, do, lse, delta, own, first_keys, k_head, v_head, first, last, S, qk_scale,
    BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys `first` to `last` to dQ."""
    D: tl.constexpr = q.shape[1]
    for at in range(first, last, BN):
        k = read_tile(k_head, at, S, BN, D, MASKED)
        v = read_tile(v_head, at, S, BN, D, MASKED)
        p = tl.exp2(tl.dot(q, k.T) * qk_scale - lse[:, None])  # (BM, BN)
        if MASKED:
            keys = at + tl.arange(0, BN)
            p = tl.where(sees(own[:, None], keys[None, :], first_keys, S, CAUSAL, FIRST_KEYS), p, 0.0)
        dp = tl.dot(do, v.T)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def meet_keys(
    q, do, lse, delta, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale,
    BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of queries from the keys that a tile of queries sees, whose parts are those of `split_keys`."""
    dq = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    dq = _meet_keys(
        dq, q, do, lse, delta, own, first_keys, k_head, v_head, whole, end, S, qk_scale,
        BN, CAUSAL, FIRST_KEYS, True,
    )  # fmt: skip
    dq = _meet_keys(
        dq, q, do, lse, delta, own, first_keys, k_head, v_head, clear, whole, S, qk_scale,
        BN, CAUSAL, FIRST_KEYS, False,
    )  # fmt: skip
    if FIRST_KEYS:
        dq = _meet_keys(
            dq, q, do, lse, delta, own, first_keys, k_head, v_head, begin, clear, S, qk_scale,
            BN, CAUSAL, True, True,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["T", "S", "H", "group"])
def queries_kernel(
    q, k, v, do, lse_ptr, delta_ptr, first_keys_ptr, dq, T, T_padded, S, H, group, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(T, BM)
    head = tl.program_id(0) // num_tiles
    b, h = head // H, head % H
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BM  # causal: the last queries see the most keys
    queries = first + tl.arange(0, BM)
    q_tile = read_tile(head_of(q, b, h), first, T, BM, D, True)
    do_tile = read_tile(head_of(do, b, h), first, T, BM, D, True)
    row = tl.cast(head, tl.int64) * T_padded
    lse, delta = tl.load(lse_ptr + row + queries), tl.load(delta_ptr + row + queries)
    k_head, v_head = head_of(k, b, h // group), head_of(v, b, h // group)
    qk_scale = scale * LOG2E
    own_first = first + (S - T)
    own = queries + (S - T)  # the key of each query, if causal
    first_keys = first_keys_ptr
    if FIRST_KEYS:
        first_keys = first_keys_of(first_keys_ptr, b, T, S)
    begin, clear, whole, end = split_keys(own, own_first, own_first + BM, first_keys, S, BN, CAUSAL, FIRST_KEYS)
    dq_tile = meet_keys(
        q_tile, do_tile, lse, delta, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale,
        BN, CAUSAL, FIRST_KEYS,
    )  # fmt: skip
    write_tile(head_of(dq, b, h), first, T, dq_tile * scale)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, first_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, see `fused.Backward`."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    _, by_key, by_query = choose_cut(q.device, D, first_keys is not None)
    tile = max(by_key.num_queries, by_query.num_queries)
    T_padded = triton.cdiv(T, tile) * tile
    do, (lse2, delta), grad_logits = prepare(grad, out, gate_logits, lse, T_padded)
    inputs = (heads(q), heads(k), heads(v), heads(do), lse2, delta, first_keys)
    last_queries = None if first_keys is None else find_last_queries(first_keys, S)
    sizes = (T, T_padded, S, H, H // K, scale)
    options = {"D": D, "CAUSAL": causal, "FIRST_KEYS": first_keys is not None}
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    keys_kernel[(B * K * triton.cdiv(S, by_key.num_keys),)](
        *inputs, last_queries, heads(dk), heads(dv), *sizes, **options, **by_key.options()
    )
    queries_kernel[(B * H * triton.cdiv(T, by_query.num_queries),)](
        *inputs, heads(dq), *sizes, **options, **by_query.options()
    )
    return dq, dk, dv, grad_logits


def find_last_queries(first_keys: Tensor, S: int) -> Tensor:
    """The number of queries that end with the last one to see a key, (B, S), for first keys in any order."""
    lowest_from = first_keys.flip(1).cummin(1).values.flip(1)
    keys = torch.arange(S, dtype=first_keys.dtype, device=first_keys.device).expand(first_keys.shape[0], -1)
    return torch.searchsorted(lowest_from, keys.contiguous(), right=True, out_int32=True)
