"""Gated attention, forward, in portable Triton: one program per tile of queries, the gate in its epilogue.

Key tiles at the diagonal come first, in a loop with masks; those that every query of the tile sees follow in a loop
without, then those that first keys cut. Tiles before the first keys are skipped.
Scores, sums and the gate are float32; weights are rounded to the dtype of the values.

Source: FlashAttention-2 (Dao, 2023, algorithm 1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc, m, l, q, own, first_keys, k_head, v_head, first, last, S, qk_scale,
    BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys `first` to `last` to the sums of weighted values and of weights 2^(score - m), m the largest score."""
    D: tl.constexpr = q.shape[1]
    for at in range(first, last, BN):
        k = read_tile(k_head, at, S, BN, D, MASKED)
        s = tl.dot(q, k.T)  # (BM, BN)
        if MASKED:
            keys = at + tl.arange(0, BN)
            seen = sees(own[:, None], keys[None, :], first_keys, S, CAUSAL, FIRST_KEYS)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1) * qk_scale)
        above = higher
        if MASKED and FIRST_KEYS:
            above = tl.where(higher == float("-inf"), 0.0, higher)  # queries that have seen no key yet
        p = tl.exp2(s * qk_scale - above[:, None])
        shrink = tl.exp2(m - above)
        v = read_tile(v_head, at, S, BN, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        l = l * shrink + tl.sum(p, 1)
        m = higher
    return acc, m, l


@triton.jit
def attend(
    q, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale,
    BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    """Sums over the keys that a tile of queries sees, whose parts are those of `split_keys`."""
    BM: tl.constexpr = q.shape[0]
    acc = tl.zeros((BM, q.shape[1]), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)  # until its first tile, in which every query sees a key
    acc, m, l = _attend(
        acc, m, l, q, own, first_keys, k_head, v_head, whole, end, S, qk_scale, BN, CAUSAL, FIRST_KEYS, True
    )
    acc, m, l = _attend(
        acc, m, l, q, own, first_keys, k_head, v_head, clear, whole, S, qk_scale, BN, CAUSAL, FIRST_KEYS, False
    )
    if FIRST_KEYS:
        acc, m, l = _attend(
            acc, m, l, q, own, first_keys, k_head, v_head, begin, clear, S, qk_scale, BN, CAUSAL, True, True
        )
    return acc, m, l


@triton.jit(do_not_specialize=["T", "S", "H", "group"])  # one compilation for all sizes
def forward_kernel(
    q, k, v, gate_logits, first_keys_ptr, out, lse_ptr, T, S, H, group, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(T, BM)
    head = tl.program_id(0) // num_tiles
    b, h = head // H, head % H
    first = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BM  # the last tiles see the most keys and start first
    queries = first + tl.arange(0, BM)
    q_tile = read_tile(head_of(q, b, h), first, T, BM, D, True)
    k_head, v_head = head_of(k, b, h // group), head_of(v, b, h // group)
    qk_scale = scale * LOG2E
    own_first = first + (S - T)
    own = queries + (S - T)  # the key of each query, if causal
    first_keys = first_keys_ptr
    if FIRST_KEYS:
        first_keys = first_keys_of(first_keys_ptr, b, T, S)
    begin, clear, whole, end = split_keys(own, own_first, own_first + BM, first_keys, S, BN, CAUSAL, FIRST_KEYS)
    acc, m, l = attend(
        q_tile, own, first_keys, k_head, v_head, begin, clear, whole, end, S, qk_scale, BN, CAUSAL, FIRST_KEYS
    )

    tl.store(lse_ptr + tl.cast(head, tl.int64) * T + queries, (m + tl.log2(l)) * _LN2, queries < T)
    s = read_tile(head_of(gate_logits, b, h), first, T, BM, D if ELEMENTWISE else 1, True)
    write_tile(head_of(out, b, h), first, T, acc * (1.0 / l)[:, None] * tl.sigmoid(s.to(tl.float32)))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, first_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated output and log-sum-exp, see `fused.Forward`; the scale must not be 0."""
    B, H, T, D = q.shape
    if scale < 0:
        q, scale = -q, -scale  # the kernel assumes that the largest product is the largest score
    blocks = choose_cut(q.device, D, first_keys is not None).forward
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    forward_kernel[(B * H * triton.cdiv(T, blocks.num_queries),)](
        heads(q), heads(k), heads(v), heads(gate_logits.transpose(1, 2)), first_keys, heads(out), lse,
        T, k.shape[2], H, H // k.shape[1], scale,
        D=D, CAUSAL=causal, FIRST_KEYS=first_keys is not None, ELEMENTWISE=gate_logits.shape[-1] > 1,
        **blocks.options(),
    )  # fmt: skip
    return out, lse
