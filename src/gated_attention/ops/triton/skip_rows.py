"""The list of open rows on a GPU, in one launch, and what kernels that read it share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gated_attention.ops.launch import FUSION
from gated_attention.ops.skip.rows import Rows
from gated_attention.ops.triton.tiles import split_keys

_CHUNK = 4096


@triton.jit
def _opens(logits, stride_t, stride_h, code, num_codes, closed_at, G: tl.constexpr):
    """1 for codes of open rows, else 0."""
    at = logits + (code // G).to(tl.int64) * stride_t + (code % G) * stride_h
    there = code < num_codes
    x = tl.load(at, there, 0.0).to(tl.float32)
    return tl.where((x <= closed_at) | (there == 0), 0, 1)


@triton.jit(do_not_specialize=["T", "K"])
def list_kernel(
    logits, stride_b, stride_t, stride_h, order, before, T, K, closed_at, G: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """A program counts what lies before its chunk itself, so that no program waits for another."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    logits += tl.cast(head // K, tl.int64) * stride_b + tl.cast(head % K * G, tl.int64) * stride_h
    order += tl.cast(head, tl.int64) * T * G
    before += tl.cast(head, tl.int64) * (T + 1)
    lane = tl.arange(0, CHUNK)
    earlier = tl.zeros((CHUNK,), tl.int32)
    for at in range(0, chunk * CHUNK, CHUNK):
        earlier += _opens(logits, stride_t, stride_h, at + lane, T * G, closed_at, G)
    code = chunk * CHUNK + lane
    is_open = _opens(logits, stride_t, stride_h, code, T * G, closed_at, G)
    total = tl.sum(earlier, 0) + tl.cumsum(is_open, 0)
    place = tl.where(is_open != 0, total - 1, T * G - 1 - (code - total))
    there = code < T * G
    tl.store(order + place, code, there)
    tl.store(before + code // G + 1, total, there & (code % G == G - 1))
    tl.store(before + lane, 0, (lane == 0) & (chunk == 0))


def list_rows(gate_logits: Tensor, num_kv_heads: int, closed_at: float) -> Rows:
    """As `skip.rows.list_rows`."""
    B, T, H = gate_logits.shape
    G = H // num_kv_heads
    order = torch.empty((B, num_kv_heads, T * G), dtype=torch.int32, device=gate_logits.device)
    before = torch.empty((B, num_kv_heads, T + 1), dtype=torch.int32, device=gate_logits.device)
    chunk = min(_CHUNK, triton.next_power_of_2(T * G))
    list_kernel[(B * num_kv_heads, triton.cdiv(T * G, chunk))](
        gate_logits, *gate_logits.stride(), order, before, T, num_kv_heads, closed_at, G=G, CHUNK=chunk, **FUSION
    )
    return Rows(order, before)


@triton.jit
def starts_of(x, b, h, t):
    """Where rows (h, t) of batch b begin, one address per row."""
    start = x.ptr + tl.cast(b, tl.int64) * x.stride_b
    return start + (h.to(tl.int64) * x.stride_h + t.to(tl.int64) * x.stride_t)


@triton.jit
def rows_of(x, b, h, t, D: tl.constexpr):
    """Addresses of rows (h, t) of batch b, (ROWS, D)."""
    return starts_of(x, b, h, t)[:, None] + tl.arange(0, D)[None, :] * x.stride_d


@triton.jit
def find_tile(rank, count, ROWS: tl.constexpr):
    """First place of a head's `rank`-th tile: of open rows from the last, which sees most keys, then of closed ones.

    Tiles end where the open rows do, so that the one that is not full is the lightest; its places from below 0 on
    stand for row 0 again, and are not written.
    """
    num_open = tl.cdiv(count, ROWS)
    return count + tl.where(rank < num_open, -1 - rank, rank - num_open) * ROWS


@triton.jit
def decode(order, places, num_places, G: tl.constexpr):
    """Positions and heads within the group, of places that are held to the list's length."""
    code = tl.load(order + tl.minimum(tl.maximum(places, 0), num_places - 1))
    return code // G, code % G


@triton.jit
def split_keys_of_tile(
    order, own, first, offset, first_keys, S,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr,
):  # fmt: skip
    """`split_keys` of the tile of open rows from place `first` on; the key of position t is t + offset."""
    own_first, own_last = first, first  # unless causal they are not read
    if CAUSAL:
        own_first = tl.load(order + tl.maximum(first, 0)) // G + offset
        own_last = tl.load(order + first + BM - 1) // G + offset
    return split_keys(own, own_first, own_last + 1, first_keys, S, BN, CAUSAL, FIRST_KEYS)


@triton.jit
def gate_and_slope(s, HARD: tl.constexpr):
    """Scores of open rows and the activation's derivative."""
    if HARD:
        return tl.where(s >= 3.0, 1.0, (s + 3.0) * (1.0 / 6.0)), tl.where(tl.abs(s) < 3.0, 1.0 / 6.0, 0.0)
    g = tl.sigmoid(s)
    return g, g * tl.sigmoid(-s)
