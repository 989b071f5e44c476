"""Gated attention over open rows, forward: a program per tile of them, or of closed rows, which it sets to 0.

A tile holds rows of all query heads that share keys and values. They are gathered; keys and values are read as they
lie; what a row sees follows from its own position. With every gate open this is attention with packed query heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gated_attention.ops.skip.rows import GateActivation, Rows
from gated_attention.ops.triton.forward import attend
from gated_attention.ops.triton.skip_rows import (
    decode,
    find_tile,
    gate_and_slope,
    rows_of,
    split_keys_of_tile,
    starts_of,
)
from gated_attention.ops.triton.tiles import LOG2E, choose_gathered_cut, first_keys_of, head_of, heads


@triton.jit(do_not_specialize=["T", "S", "K", "num_heads"])
def forward_kernel(
    q, k, v, gate_logits, first_keys_ptr, out, lse_ptr, order, before, T, S, K, num_heads, scale,
    G: tl.constexpr, HARD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    head, rank = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    b, kv_head = head // K, head % K
    num_places = T * G
    order += tl.cast(head, tl.int64) * num_places
    count = tl.load(before + tl.cast(head, tl.int64) * (T + 1) + T)
    first = find_tile(rank, count, BM)
    places = first + tl.arange(0, BM)
    there = (places >= 0) & (places < num_places)
    t, j = decode(order, places, num_places, G)
    h = kv_head * G + j
    to = rows_of(out, b, h, t, D)
    if first >= count:
        tl.store(to, tl.zeros((BM, D), out.ptr.dtype.element_ty), there[:, None])
    else:
        q_tile = tl.load(rows_of(q, b, h, t, D))
        k_head, v_head = head_of(k, b, kv_head), head_of(v, b, kv_head)
        qk_scale = scale * LOG2E
        own = t + (S - T)
        first_keys = first_keys_ptr
        if FIRST_KEYS:
            first_keys = first_keys_of(first_keys_ptr, b, T, S)
        begin, clear, whole, end = split_keys_of_tile(
            order, own, first, S - T, first_keys, S, G, BM, BN, CAUSAL, FIRST_KEYS
        )
        acc, m, l = attend(
            q_tile, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale, BN, CAUSAL, FIRST_KEYS
        )
        g, _ = gate_and_slope(tl.load(starts_of(gate_logits, b, h, t)).to(tl.float32), HARD)
        tl.store(lse_ptr + tl.cast(head, tl.int64) * num_places + places, m + tl.log2(l) - tl.log2(g), there)
        tl.store(to, (acc * (g / l)[:, None]).to(out.ptr.dtype.element_ty), there[:, None])


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, rows: Rows, activation: GateActivation,
    causal: bool, scale: float, first_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated output and log-sum-exp, see `skip.op.Forward`; the scale must not be 0."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if scale < 0:
        q, scale = -q, -scale  # the kernel assumes that the largest product is the largest score
    blocks = choose_gathered_cut(q.device, D, first_keys is not None).forward
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(rows.order.shape, dtype=torch.float32, device=q.device)
    # A head's open and closed rows may each leave a tile that is not full.
    forward_kernel[(B * K * (triton.cdiv(rows.order.shape[2], blocks.num_queries) + 1),)](
        heads(q), heads(k), heads(v), heads(gate_logits.transpose(1, 2)), first_keys, heads(out), lse, *rows,
        T, S, K, B * K, scale, G=H // K, HARD=activation == "hard_sigmoid",
        D=D, CAUSAL=causal, FIRST_KEYS=first_keys is not None, **blocks.options(),
    )  # fmt: skip
    return out, lse
