"""The work list of the forward kernel for Hopper that skips: tiles of open rows, those with most keys first.

It is one launch. Its length does not depend on the gates, so nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from gated_attention.ops.launch import FUSION
from gated_attention.ops.skip.rows import Rows

_RANKS, _HEADS = 16, 16  # tiles of a program, and heads that it looks up at a time


@triton.jit(do_not_specialize=["T", "S", "offset", "num_heads", "num_tiles"])
def work_kernel(
    order, before, work, T, S, offset, num_heads, num_tiles,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Place tiles without sorting them: among equals, the first head and its last rows come first.

    A head's tiles that see more than n tiles of keys are those whose last row comes behind the rows that see no more:
    cdiv(count - before[n * BN - offset], BM) of them. So a tile's place in the list is a sum over heads of numbers that
    are looked up, and no program waits for another.
    """
    head = tl.program_id(0)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    row = tl.cast(head, tl.int64)
    count = tl.load(before + row * (T + 1) + T)
    first = count - (rank + 1) * BM
    is_open = first + BM > 0
    n = tl.zeros((RANKS,), tl.int32) + tl.cdiv(S, BN)
    if CAUSAL:
        last = tl.load(order + row * T * G + tl.maximum(first + BM - 1, 0))
        n = (last // G + offset) // BN + 1
    place = rank * 0
    fillers = rank * 0  # of the heads before
    for from_head in range(0, num_heads, HEADS):
        h = from_head + tl.arange(0, HEADS)
        there = h < num_heads
        at = before + h.to(tl.int64) * (T + 1)
        counts = tl.load(at + T, there, 0)
        with_any = tl.cdiv(counts, BM)
        with_more = tl.zeros((RANKS, HEADS), tl.int32)
        with_as_many = with_more + with_any[None, :]
        if CAUSAL:
            more_from = tl.minimum(tl.maximum(n * BN - offset, 0), T)
            as_many_from = tl.minimum(tl.maximum((n - 1) * BN - offset, 0), T)
            fewer = tl.load(at[None, :] + more_from[:, None], there[None, :], 0)
            with_more = tl.cdiv(counts[None, :] - fewer, BM)
            fewer = tl.load(at[None, :] + as_many_from[:, None], there[None, :], 0)
            with_as_many = tl.cdiv(counts[None, :] - fewer, BM)
        ahead = tl.where((h < head)[None, :], with_as_many, with_more)
        ahead = tl.where((h == head)[None, :], rank[:, None], ahead)
        place += tl.sum(tl.where(there[None, :], ahead, 0), 1)
        fillers += tl.sum(tl.where(h < head, num_tiles - with_any, 0), 0)
    capacity = num_heads * num_tiles
    place = tl.where(is_open, place, capacity - 1 - (fillers + rank - tl.cdiv(count, BM)))
    field = tl.arange(0, 4)[None, :]
    entry = tl.where(field == 0, head, tl.where(field == 1, first[:, None], tl.where(field == 2, n[:, None], 1)))
    none = tl.where(field == 1, -1024, 0)
    entry = tl.where(is_open[:, None], entry, none)
    tl.store(work + place.to(tl.int64)[:, None] * 4 + field, entry, (rank < num_tiles)[:, None])
    if (head == 0) & (tl.program_id(1) == 0):
        tl.store(work + capacity * 4 + field, none)


def list_work(rows: Rows, group: int, num_keys: int, causal: bool, BM: int, BN: int) -> Int[Tensor, "n 4"]:
    """Entries of int32 (key/value head of the batch, place of the first row, tiles of keys, 1), then (0, -1024, 0, 0).

    Tiles of `BM` rows end where a head's open rows do, so the place of the first may be below 0: rows that are missing.
    There is one entry more than there can be tiles, so the last is none.
    """
    B, K, num_places = rows.order.shape
    T, num_tiles = num_places // group, triton.cdiv(num_places, BM)
    work = torch.empty(B * K * num_tiles + 1, 4, dtype=torch.int32, device=rows.order.device)
    work_kernel[(B * K, triton.cdiv(num_tiles, _RANKS))](
        *rows, work, T, num_keys, num_keys - T if causal else 0, B * K, num_tiles,
        G=group, BM=BM, BN=BN, CAUSAL=causal, RANKS=_RANKS, HEADS=_HEADS, **FUSION,
    )  # fmt: skip
    return work
