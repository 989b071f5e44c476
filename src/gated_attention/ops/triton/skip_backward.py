"""Gated attention over open rows, backward: as `triton.backward`, on rows that are gathered by the list.

A block of keys takes the rows from the first that sees it on, which need not begin a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gated_attention.ops.launch import FUSION
from gated_attention.ops.skip.rows import GateActivation, Rows
from gated_attention.ops.triton.backward import find_last_queries, meet_keys
from gated_attention.ops.triton.skip_rows import (
    decode,
    find_tile,
    gate_and_slope,
    rows_of,
    split_keys_of_tile,
    starts_of,
)
from gated_attention.ops.triton.tiles import (
    LOG2E,
    choose_gathered_cut,
    first_keys_of,
    head_of,
    heads,
    read_tile,
    sees,
    write_tile,
)

_ROWS = 16


@triton.jit(do_not_specialize=["T", "K"])
def prepare_kernel(
    do, out, gate_logits, order, before, delta, grad_logits, T, K,
    G: tl.constexpr, HARD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dO * gated) / g of open rows, and the gradient of all logits."""
    head = tl.program_id(0)
    b, kv_head = head // K, head % K
    row = tl.cast(head, tl.int64) * (T * G)
    count = tl.load(before + tl.cast(head, tl.int64) * (T + 1) + T)
    places = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_open = places < count
    t, j = decode(order + row, places, T * G, G)
    h = kv_head * G + j
    grad = tl.load(rows_of(do, b, h, t, D), is_open[:, None], 0.0).to(tl.float32)
    gated = tl.load(rows_of(out, b, h, t, D), is_open[:, None], 0.0).to(tl.float32)
    g, slope = gate_and_slope(tl.load(starts_of(gate_logits, b, h, t), is_open, 0.0).to(tl.float32), HARD)
    row_delta = tl.sum(grad * gated, 1) / g
    tl.store(delta + row + places, row_delta, is_open)
    tl.store(starts_of(grad_logits, b, h, t), (row_delta * slope).to(grad_logits.ptr.dtype.element_ty), places < T * G)


@triton.jit(do_not_specialize=["T", "S", "K", "num_heads"])
def keys_kernel(
    q, k, v, do, lse_ptr, delta_ptr, first_keys_ptr, order, before, last_queries_ptr, dk, dv, T, S, K, num_heads, scale,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads  # the first keys: the most rows
    b, kv_head = head // K, head % K
    row = tl.cast(head, tl.int64) * (T * G)
    order += row
    before += tl.cast(head, tl.int64) * (T + 1)
    count = tl.load(before + T)
    first = block * BN
    keys = first + tl.arange(0, BN)
    k_block = read_tile(head_of(k, b, kv_head), first, S, BN, D, True)
    v_block = read_tile(head_of(v, b, kv_head), first, S, BN, D, True)
    dk_block = tl.zeros((BN, D), tl.float32)
    dv_block = tl.zeros((BN, D), tl.float32)
    qk_scale = scale * LOG2E
    begin, end, first_keys = 0, count, first_keys_ptr
    if CAUSAL:
        begin = tl.load(before + tl.maximum(first - (S - T), 0))
    if FIRST_KEYS:
        first_keys = first_keys_of(first_keys_ptr, b, T, S)
        last = last_queries_ptr + tl.cast(b, tl.int64) * S + tl.minimum(first + BN, S) - 1
        end = tl.load(before + tl.load(last))
    for at in range(begin, end, BM):
        places = at + tl.arange(0, BM)
        t, j = decode(order, places, count, G)  # behind the last open row, that row again
        h = kv_head * G + j
        q_tile = tl.load(rows_of(q, b, h, t, D))
        do_tile = tl.load(rows_of(do, b, h, t, D))
        lse = tl.load(lse_ptr + row + places, places < count, float("inf"))  # which leaves it no weight
        delta = tl.load(delta_ptr + row + places, places < count, 0.0)
        p = tl.exp2(tl.dot(k_block, q_tile.T) * qk_scale - lse[None, :])  # (BN, BM)
        if CAUSAL:
            p = tl.where(sees((t + (S - T))[None, :], keys[:, None], first_keys, S, True, FIRST_KEYS), p, 0.0)
        dv_block = tl.dot(p.to(do_tile.dtype), do_tile, dv_block)
        dp = tl.dot(v_block, do_tile.T)
        ds = p * (dp - delta[None, :])
        dk_block = tl.dot(ds.to(q_tile.dtype), q_tile, dk_block)
    write_tile(head_of(dk, b, kv_head), first, S, dk_block * scale)
    write_tile(head_of(dv, b, kv_head), first, S, dv_block)


@triton.jit(do_not_specialize=["T", "S", "K", "num_heads"])
def queries_kernel(
    q, k, v, do, lse_ptr, delta_ptr, first_keys_ptr, order, before, dq, T, S, K, num_heads, scale,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    head, rank = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    b, kv_head = head // K, head % K
    num_places = T * G
    row = tl.cast(head, tl.int64) * num_places
    order += row
    count = tl.load(before + tl.cast(head, tl.int64) * (T + 1) + T)
    first = find_tile(rank, count, BM)
    places = first + tl.arange(0, BM)
    there = (places >= 0) & (places < num_places)
    t, j = decode(order, places, num_places, G)
    h = kv_head * G + j
    to = rows_of(dq, b, h, t, D)
    if first >= count:
        tl.store(to, tl.zeros((BM, D), dq.ptr.dtype.element_ty), there[:, None])
    else:
        q_tile = tl.load(rows_of(q, b, h, t, D))
        do_tile = tl.load(rows_of(do, b, h, t, D))
        lse = tl.load(lse_ptr + row + tl.maximum(places, 0))
        delta = tl.load(delta_ptr + row + tl.maximum(places, 0))
        k_head, v_head = head_of(k, b, kv_head), head_of(v, b, kv_head)
        qk_scale = scale * LOG2E
        own = t + (S - T)
        first_keys = first_keys_ptr
        if FIRST_KEYS:
            first_keys = first_keys_of(first_keys_ptr, b, T, S)
        begin, clear, whole, end = split_keys_of_tile(
            order, own, first, S - T, first_keys, S, G, BM, BN, CAUSAL, FIRST_KEYS
        )
        dq_tile = meet_keys(
            q_tile, do_tile, lse, delta, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale,
            BN, CAUSAL, FIRST_KEYS,
        )  # fmt: skip
        tl.store(to, (dq_tile * scale).to(dq.ptr.dtype.element_ty), there[:, None])


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor, rows: Rows,
    activation: GateActivation, causal: bool, scale: float, first_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, see `skip.op.Backward`."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    G, num_places = H // K, rows.order.shape[2]
    _, by_key, by_query = choose_gathered_cut(q.device, D, first_keys is not None)
    delta = torch.empty_like(lse)
    grad_logits = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    prepare_kernel[(B * K, triton.cdiv(num_places, _ROWS))](
        heads(grad), heads(out), heads(gate_logits.transpose(1, 2)), *rows, delta, heads(grad_logits.transpose(1, 2)),
        T, K, G=G, HARD=activation == "hard_sigmoid", D=D, ROWS=_ROWS, **FUSION,
    )  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    inputs = (heads(q), heads(k), heads(v), heads(grad), lse, delta, first_keys, *rows)
    last_queries = None if first_keys is None else find_last_queries(first_keys, S)
    sizes = (T, S, K, B * K, scale)
    options = {"G": G, "D": D, "CAUSAL": causal, "FIRST_KEYS": first_keys is not None}
    keys_kernel[(B * K * triton.cdiv(S, by_key.num_keys),)](
        *inputs, last_queries, heads(dk), heads(dv), *sizes, **options, **by_key.options()
    )
    queries_kernel[(B * K * (triton.cdiv(num_places, by_query.num_queries) + 1),)](
        *inputs, heads(dq), *sizes, **options, **by_query.options()
    )
    return dq, dk, dv, grad_logits
