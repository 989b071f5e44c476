"""Passes over a layer's tensors on a GPU, each read once by one kernel.

The truth is the plain PyTorch code of `measures`, which calls these where they apply; arithmetic is float32. Kernels
give parts, by row or by block of tokens, which `measures` puts together for all layers at once.
"""

from contextlib import AbstractContextManager
from math import prod
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_BLOCK_TOKENS = 64
_TILE = 8192  # numbers that one program holds
_SMALLEST_DOT = 16  # tl.dot takes no smaller side

# no_type_check keeps type checkers, also those of an import hook, from wrapping what Triton must read itself.


@triton.jit
@no_type_check
def _moments_kernel(x_ptr, out_ptr, rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    largest = tl.max(tl.abs(x), axis=0)
    rest = tl.where(inside, x - mean, 0.0)
    squares = rest * rest
    tl.store(out_ptr + row, tl.where(mean != mean, mean, largest))  # noqa: PLR0124 - tl.max would pass over NaN
    tl.store(out_ptr + rows + row, mean)
    tl.store(out_ptr + 2 * rows + row, tl.sum(squares, axis=0))
    tl.store(out_ptr + 3 * rows + row, tl.sum(squares * rest, axis=0))
    tl.store(out_ptr + 4 * rows + row, tl.sum(squares * squares, axis=0))


@triton.jit
@no_type_check
def _head_tile(x_ptr, length, heads, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of some tokens of a (B, T, H, D) tensor, which numbers exist, and where its shares and tokens go."""
    part, head = tl.program_id(0), tl.program_id(1) % heads
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    tokens = part * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_D)
    inside = (tokens < length)[:, None] & (channels < width)[None, :]
    rows = (sequence * length + tokens) * heads + head
    x = tl.load(x_ptr + rows[:, None] * width + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    place = ((sequence * tl.num_programs(0) + part) * heads + head) * 3
    return x, inside, rows, tokens < length, place


@triton.jit
@no_type_check
def _head_shares_kernel(
    x_ptr, shares_ptr, length, heads, width, low, high, share, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    x, inside, _, _, place = _head_tile(x_ptr, length, heads, width, BLOCK_T, BLOCK_D)
    size = tl.abs(x)
    tl.store(shares_ptr + place, tl.sum(size) * share)
    tl.store(shares_ptr + place + 1, tl.sum(tl.where(inside & (size < high), 1.0, 0.0)) * share)
    tl.store(shares_ptr + place + 2, tl.sum(tl.where(inside & (size < low), 1.0, 0.0)) * share)


@triton.jit
@no_type_check
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "hard_sigmoid":
        scores = tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "ns_sigmoid":
        scores = 0.5 + 0.5 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "silu":
        scores = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "identity")
        scores = x
    return scores


@triton.jit
@no_type_check
def _gate_kernel(
    x_ptr, by_token_ptr, shares_ptr, length, heads, width, scale, share,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, inside, rows, exists, place = _head_tile(x_ptr, length, heads, width, BLOCK_T, BLOCK_D)
    scores = _activate(x, ACTIVATION) * scale
    tl.store(by_token_ptr + rows, tl.sum(tl.where(inside, scores, 0.0), axis=1) / width, mask=exists)
    tl.store(shares_ptr + place, tl.sum(tl.where(inside & (scores < 0.1), 1.0, 0.0)) * share)
    tl.store(shares_ptr + place + 1, tl.sum(tl.where(inside & (scores > 0.9), 1.0, 0.0)) * share)
    tl.store(shares_ptr + place + 2, tl.sum(tl.where(inside & (scores > 0.0), 1.0, 0.0)) * share)


@triton.jit
@no_type_check
def _sinks_kernel(
    q_ptr, k_ptr, lse_ptr, sums_ptr, first_rows_ptr, length, heads, groups, width, keys, first_queries, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, lse_b, lse_h, lse_t,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1) % heads
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    tokens = part * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    exists = tokens < length
    q_rows = sequence * q_b + head * q_h + tokens.to(tl.int64)[:, None] * q_t
    q = tl.load(q_ptr + q_rows + channels[None, :], mask=exists[:, None] & (channels < width)[None, :], other=0.0)
    k_rows = sequence * k_b + (head // groups) * k_h + columns.to(tl.int64)[None, :] * k_t
    k_inside = (columns < keys)[None, :] & (channels < width)[:, None]
    k = tl.load(k_ptr + k_rows + channels[:, None], mask=k_inside, other=0.0)
    lse = tl.load(lse_ptr + sequence * lse_b + head * lse_h + tokens.to(tl.int64) * lse_t, mask=exists, other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    seen = exists[:, None] & (columns[None, :] <= tokens[:, None])
    weights = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
    place = ((sequence * tl.num_programs(0) + part) * heads + head) * keys
    tl.store(sums_ptr + place + columns, tl.sum(weights, axis=0), mask=columns < keys)
    first = tl.sum(tl.where(columns[None, :] == 0, weights, 0.0), axis=1)
    row = (sequence * heads + head) * first_queries
    tl.store(first_rows_ptr + row + tokens, first, mask=tokens < first_queries)


def moments(x: Float[Tensor, "b t c"]) -> Float[Tensor, "5 b t"]:
    """Each token's largest absolute value, mean, and sums of second to fourth powers of the rest."""
    x = x.contiguous()
    out = x.new_empty((5, *x.shape[:2]), dtype=torch.float32)
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    block = triton.next_power_of_2(width)
    with _device_of(x):
        _moments_kernel[(rows,)](x, out, rows, width, BLOCK=block, num_warps=4 if block <= 4096 else 8)
    return out


def head_shares(heads: Float[Tensor, "b t h d"], high: float, low: float) -> Float[Tensor, "b p h 3"]:
    """Each block of tokens' part in the mean absolute value and in the shares below the two thresholds."""
    x = heads.contiguous()
    grid, shares, block_t, block_d = _blocks(x)
    with _device_of(x):
        _head_shares_kernel[grid](
            x, shares, *x.shape[1:], low, high, 1 / prod(x.shape[1::2]),
            BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
    return shares


def gate_scores(
    logits: Float[Tensor, "b t h d"], activation: str, scale: float
) -> tuple[Float[Tensor, "b t h"], Float[Tensor, "b p h 3"]]:
    """Mean score of each token and head, and each block's part in the shares below 0.1, above 0.9 and above 0.

    The activation is one of `ops.gate.ACTIVATIONS`, taken in float32.
    """
    x = logits.contiguous()
    by_token = x.new_empty(x.shape[:3], dtype=torch.float32)
    grid, shares, block_t, block_d = _blocks(x)
    with _device_of(x):
        _gate_kernel[grid](
            x, by_token, shares, *x.shape[1:], float(scale), 1 / prod(x.shape[1::2]), ACTIVATION=activation,
            BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
    return by_token, shares


def sink_columns(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k t d"],
    lse: Float[Tensor, "b h t"],
    *,
    scale: float,
    keys: int,
    first_queries: int,
) -> tuple[Float[Tensor, "b p h n"], Float[Tensor, "b h m"]]:
    """Causal attention to the first keys, summed over each block of queries, and of the first queries to key 0."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    b, h, t, d = q.shape
    parts = triton.cdiv(t, _BLOCK_TOKENS)
    sums = lse.new_empty((b, parts, h, keys), dtype=torch.float32)
    first_rows = lse.new_empty((b, h, min(first_queries, t)), dtype=torch.float32)
    with _device_of(q):
        _sinks_kernel[(parts, b * h)](
            q, k, lse, sums, first_rows, t, h, h // k.shape[1], d, keys, first_rows.shape[2], float(scale),
            *q.stride()[:3], *k.stride()[:3], *lse.stride(), BLOCK_T=_BLOCK_TOKENS,
            BLOCK_K=max(_SMALLEST_DOT, triton.next_power_of_2(keys)),
            BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(d)),
        )  # fmt: skip
    return sums, first_rows


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, where Triton launches."""
    device: AbstractContextManager[object] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return device


def _blocks(x: Tensor) -> tuple[tuple[int, int], Tensor, int, int]:
    """Programs over blocks of tokens and over sequences and heads, a place for what each finds, and its tile."""
    block_d = triton.next_power_of_2(x.shape[3])
    block_t = max(1, min(_BLOCK_TOKENS, _TILE // block_d))
    parts = triton.cdiv(x.shape[1], block_t)
    shares = x.new_empty((x.shape[0], parts, x.shape[2], 3), dtype=torch.float32)
    return (parts, x.shape[0] * x.shape[2]), shares, block_t, block_d
