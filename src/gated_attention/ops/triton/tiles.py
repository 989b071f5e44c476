"""What the portable kernels share: tile sizes, how tiles are read and written, and masks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gated_attention.ops.launch import FUSION


class Heads(NamedTuple):
    """A (B, H, T, D) tensor of any layout, as an argument of a kernel."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    stride_d: int


class Head(NamedTuple):
    """One head, (T, D), inside a kernel."""

    ptr: tl.tensor
    stride_t: tl.tensor
    stride_d: tl.tensor


class Blocks(NamedTuple):
    """Queries and keys per tile, warps per program, and tiles in flight."""

    num_queries: int
    num_keys: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Arguments that a kernel is compiled with."""
        queries, keys, warps, stages = self
        return {"BM": queries, "BN": keys, "num_warps": warps, "num_stages": stages} | FUSION


class Cut(NamedTuple):
    """Blocks of each kernel: forward, gradient of keys and values, gradient of queries."""

    forward: Blocks
    keys: Blocks
    queries: Blocks


LOG2E = tl.constexpr(1.4426950408889634)
LARGE_MEMORY = 227 * 1024
"""Bytes of shared memory per program from compute capability 9.0 on (8.0: 163 KiB; 8.6, 8.9 and 12.0: 99 KiB)."""

LARGE = {
    16: Cut(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 4, 3)),
    32: Cut(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 4, 3)),
    64: Cut(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3)),
    128: Cut(Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 3)),
    256: Cut(Blocks(64, 64, 8, 2), Blocks(32, 32, 8, 3), Blocks(64, 64, 8, 2)),
}
SMALL = {
    16: Cut(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 2), Blocks(128, 32, 4, 3)),
    32: Cut(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 2), Blocks(128, 32, 4, 3)),
    64: Cut(Blocks(128, 64, 4, 3), Blocks(32, 128, 8, 3), Blocks(64, 64, 4, 2)),
    128: Cut(Blocks(128, 32, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    256: Cut(Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(64, 32, 8, 1)),
}
# First keys take registers, and so do gathered rows: with the tiles above, these kernels would spill.
SMALL_WITH_FIRST_KEYS = SMALL | {64: Cut(Blocks(128, 32, 4, 3), Blocks(32, 128, 8, 3), Blocks(64, 32, 4, 2))}
GATHERED_SMALL = SMALL_WITH_FIRST_KEYS | {
    128: SMALL[128]._replace(forward=Blocks(64, 32, 8, 3)),
    256: SMALL[256]._replace(forward=Blocks(32, 32, 8, 2)),
}
# Where rows are gathered, 128 keys per block fit the registers; an H200 takes 2.9 times cuDNN's backward with 64.
GATHERED_LARGE = LARGE | {128: LARGE[128]._replace(keys=Blocks(64, 128, 8, 3))}
GATHERED_LARGE_WITH_FIRST_KEYS = GATHERED_LARGE | {
    64: LARGE[64]._replace(forward=Blocks(128, 64, 8, 3)),
    128: LARGE[128]._replace(queries=Blocks(128, 32, 8, 3)),
    256: LARGE[256]._replace(forward=Blocks(64, 32, 8, 2), queries=Blocks(64, 32, 8, 2)),
}


def choose_cut(device: torch.device, head_dim: int, first_keys: bool) -> Cut:
    """The largest tiles for which the device has enough shared memory and registers."""
    small = SMALL_WITH_FIRST_KEYS if first_keys else SMALL
    return (LARGE if _has_large_memory(device) else small)[head_dim]


def choose_gathered_cut(device: torch.device, head_dim: int, first_keys: bool) -> Cut:
    """As `choose_cut`, for kernels that gather rows."""
    large = GATHERED_LARGE_WITH_FIRST_KEYS if first_keys else GATHERED_LARGE
    return (large if _has_large_memory(device) else GATHERED_SMALL)[head_dim]


def _has_large_memory(device: torch.device) -> bool:
    memory: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return memory >= LARGE_MEMORY


def heads(x: Tensor) -> Heads:
    """The argument that stands for a tensor."""
    return Heads(x, *x.stride())


@triton.jit
def head_of(x, b, h):
    ptr = x.ptr + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h
    return Head(ptr, x.stride_t, x.stride_d)


@triton.jit
def _addresses(head, first, ROWS: tl.constexpr, D: tl.constexpr):
    # Only the tile's offset can exceed 32 bits.
    start = head.ptr + tl.cast(first, tl.int64) * head.stride_t
    return start + (tl.arange(0, ROWS)[:, None] * head.stride_t + tl.arange(0, D)[None, :] * head.stride_d)


@triton.jit
def read_tile(head, first, end, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows from `first` on, (ROWS, D), zero from `end` on. Unmasked, the tile must end before `end`."""
    at = _addresses(head, first, ROWS, D)
    if MASKED:
        return tl.load(at, (first + tl.arange(0, ROWS) < end)[:, None], 0.0)
    return tl.load(at)


@triton.jit
def write_tile(head, first, end, value):
    """Write the rows from `first` on that lie before `end`."""
    ROWS: tl.constexpr = value.shape[0]
    at = _addresses(head, first, ROWS, value.shape[1])
    tl.store(at, value.to(head.ptr.dtype.element_ty), (first + tl.arange(0, ROWS) < end)[:, None])


@triton.jit
def first_keys_of(ptr, b, T, S):
    """Where a sequence's first keys would begin if it had a query for each of its S keys."""
    return ptr + (tl.cast(b, tl.int64) * T - (S - T))


@triton.jit
def read_first_keys(ptr, own, S):
    """The first keys of queries, which are named by the index of their own key; from S on, that of the last."""
    return tl.load(ptr + tl.minimum(own, S - 1))


@triton.jit
def sees(own, keys, first_keys, S, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr):
    """Whether queries, by the index of their own key if causal, see keys, which lie along another axis."""
    seen = own >= keys if CAUSAL else keys < S
    if FIRST_KEYS:
        seen = seen & (keys >= read_first_keys(first_keys, own, S))  # again for every tile: registers are full
    return seen


@triton.jit
def split_keys(own, first, last, first_keys, S, BN: tl.constexpr, CAUSAL: tl.constexpr, FIRST_KEYS: tl.constexpr):
    """Where the keys begin that a tile of queries sees, where they need no mask, need one again, and end.

    Kernels take the last part first, in a loop that is never empty. After a loop that may be empty, sums have two
    origins, and on Hopper ptxas would serialise the products (its advisory C7515).

    Args:
        own, first, last: The queries, the first of them and the last plus one, by the index of their own key if causal.
    """
    whole, end = (S - 1) // BN * BN, S
    if CAUSAL:
        whole, end = first // BN * BN, tl.minimum(last, S)
    tl.assume(whole < end)
    begin, clear = 0, 0
    if FIRST_KEYS:
        seen_from = read_first_keys(first_keys, own, S)
        begin = tl.min(seen_from) // BN * BN
        clear = tl.minimum(tl.cdiv(tl.max(seen_from), BN) * BN, whole)
    return begin, clear, whole, end
