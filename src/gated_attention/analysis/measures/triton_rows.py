"""Passes over a layer's tensors on a GPU; one kernel reads each tensor once.

`measures` calls these where they apply, and its plain PyTorch code is the reference. Arithmetic is float32. Kernels
return parts, by row or by block of tokens, which `measures` combines for all layers at once.
"""

from collections.abc import Hashable
from math import prod
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.sdpa import adjacent

_BLOCK_TOKENS = 64
_TILE = 4096  # elements that one program holds; twice as many spill
_SMALLEST_DOT = 16  # the smallest side that tl.dot takes

# no_type_check stops type checkers, import hooks among them, from wrapping functions that Triton must read.


@triton.jit
@no_type_check
def _moments_kernel(x_ptr, out_ptr, length, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    largest = tl.max(tl.abs(x), axis=0)
    rest = tl.where(inside, x - mean, 0.0)
    squares = rest * rest
    place = out_ptr + (row // length) * 5 * length + row % length
    tl.store(place, tl.where(mean != mean, mean, largest))  # noqa: PLR0124 - tl.max ignores NaN
    tl.store(place + length, mean)
    tl.store(place + 2 * length, tl.sum(squares, axis=0))
    tl.store(place + 3 * length, tl.sum(squares * rest, axis=0))
    tl.store(place + 4 * length, tl.sum(squares * squares, axis=0))


@triton.jit
@no_type_check
def _activations_kernel(
    x_ptr, values_ptr, places_ptr, sampled_ptr, length, width, step, num_sampled, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    sequence, token = row // length, row % length
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    if token % step == 0:
        tl.store(sampled_ptr + (sequence * num_sampled + token // step) * width + columns, x, mask=inside)
    x = x.to(tl.float32)
    is_nan = tl.max(tl.where(x != x, 1, 0), axis=0) > 0  # noqa: PLR0124
    left = tl.where(inside, tl.abs(x), -1.0)
    for rank in tl.static_range(TOP):
        largest, column = tl.max(left, axis=0, return_indices=True)
        tl.store(values_ptr + row * TOP + rank, tl.where(is_nan, float("nan"), largest))
        tl.store(places_ptr + row * TOP + rank, token * width + column)
        left = tl.where(columns == column, -1.0, left)


@triton.jit
@no_type_check
def _head_tile(x_ptr, length, heads, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of some tokens of a (B, T, H, D) tensor, which elements exist, and where its shares and tokens go."""
    part, head = tl.program_id(1), tl.program_id(0) % heads
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    tokens = tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_D)
    exists = tokens < length - part * BLOCK_T
    inside = exists[:, None] & (channels < width)[None, :]
    row = (sequence * length + part * BLOCK_T) * heads + head  # a scalar: a tile of 64-bit offsets would spill
    x = tl.load(x_ptr + row * width + tokens[:, None] * (heads * width) + channels[None, :], mask=inside, other=0.0)
    place = ((sequence * tl.num_programs(1) + part) * heads + head) * 3
    return x.to(tl.float32), inside, row, exists, place


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
    elif ACTIVATION == "softplus":
        scores = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    else:
        tl.static_assert(ACTIVATION == "identity")
        scores = x
    return scores


@triton.jit
@no_type_check
def _gate_kernel(
    x_ptr, by_token_ptr, shares_ptr, sampled_ptr, length, heads, width, scale, share, step, num_sampled,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, inside, row, exists, place = _head_tile(x_ptr, length, heads, width, BLOCK_T, BLOCK_D)
    scores = _activate(x, ACTIVATION) * scale
    mean = tl.sum(tl.where(inside, scores, 0.0), axis=1) / width
    tl.store(by_token_ptr + row + tl.arange(0, BLOCK_T) * heads, mean, mask=exists)
    tl.store(shares_ptr + place, tl.sum(tl.where(inside & (scores < 0.1), 1.0, 0.0)) * share)
    tl.store(shares_ptr + place + 1, tl.sum(tl.where(inside & (scores > 0.9), 1.0, 0.0)) * share)
    tl.store(shares_ptr + place + 2, tl.sum(tl.where(inside & (scores > 0.0), 1.0, 0.0)) * share)
    sequence, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    first = tl.program_id(1) * BLOCK_T // step
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    taken = (tokens // step - first)[:, None] * (heads * width) + tl.arange(0, BLOCK_D)[None, :]
    sampled_ptr += ((sequence * num_sampled + first) * heads + head) * width
    tl.store(sampled_ptr + taken, x, mask=inside & (tokens % step == 0)[:, None])


@triton.jit
@no_type_check
def _histogram_kernel(
    x_ptr, counts_ptr, length, heads, width, scale, low, high, bins,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_BINS: tl.constexpr,
):  # fmt: skip
    x, inside, _, _, place = _head_tile(x_ptr, length, heads, width, BLOCK_T, BLOCK_D)
    scores = _activate(x, ACTIVATION) * scale
    found = tl.minimum(tl.maximum((scores - low) / (high - low) * bins, 0.0), bins - 1.0).to(tl.int32)
    found = tl.where(inside, found, bins)  # an extra bin for elements that do not exist
    counts = tl.histogram(tl.reshape(found, [BLOCK_T * BLOCK_D]), BLOCK_BINS)
    columns = tl.arange(0, BLOCK_BINS)
    tl.store(counts_ptr + place // 3 * bins + columns, counts, mask=columns < bins)


@triton.jit
@no_type_check
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sums_ptr, first_rows_ptr, norms_ptr, sizes_ptr,
    length, heads, groups, width, value_width, keys, first_queries, scale, share,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, lse_b, lse_h, lse_t,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(1), tl.program_id(0) % heads
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = (part * BLOCK_T).to(tl.int64)
    rows = tl.arange(0, BLOCK_T)
    tokens = part * BLOCK_T + rows
    columns = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    exists = tokens < length
    q_ptr += sequence * q_b + head * q_h + start * q_t
    q_inside = exists[:, None] & (channels < width)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_t + channels[None, :], mask=q_inside, other=0.0)
    k_ptr += sequence * k_b + (head // groups) * k_h
    k_inside = (columns < keys)[None, :] & (channels < width)[:, None]
    k = tl.load(k_ptr + columns[None, :] * k_t + channels[:, None], mask=k_inside, other=0.0)
    lse = tl.load(lse_ptr + sequence * lse_b + head * lse_h + start * lse_t + rows * lse_t, mask=exists, other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    seen = exists[:, None] & (columns[None, :] <= tokens[:, None])
    weights = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
    place = (sequence * tl.num_programs(1) + part) * heads + head
    tl.store(sums_ptr + place * keys + columns, tl.sum(weights, axis=0), mask=columns < keys)
    first = tl.sum(tl.where(columns[None, :] == 0, weights, 0.0), axis=1)
    row = (sequence * heads + head) * first_queries
    tl.store(first_rows_ptr + row + tokens, first, mask=tokens < first_queries)
    parts = tl.arange(0, BLOCK_E)
    inside = exists[:, None] & (parts < value_width)[None, :]
    out_ptr += ((sequence * length + start) * heads + head) * value_width
    out = tl.load(out_ptr + rows[:, None] * (heads * value_width) + parts[None, :], mask=inside, other=0.0)
    tl.store(sizes_ptr + place, tl.sum(tl.abs(out.to(tl.float32))) * share)
    if head % groups == 0:
        v_ptr += sequence * v_b + (head // groups) * v_h + start * v_t
        v = tl.load(v_ptr + rows[:, None] * v_t + parts[None, :], mask=inside, other=0.0).to(tl.float32)
        norms_ptr += (sequence * (heads // groups) + head // groups) * length
        tl.store(norms_ptr + tokens, tl.sqrt(tl.sum(v * v, axis=1)), mask=exists)


def moments(x: Float[Tensor, "b t c"]) -> Float[Tensor, "b 5 t"]:
    """Each token's largest absolute value, mean, and sums of the second to fourth powers of deviations from it."""
    x = x.contiguous()
    b, t, width = x.shape
    out = x.new_empty((b, 5, t), dtype=torch.float32)
    _launch(_moments_kernel, (b * t, 1, 1), (), x, out, t, width, **_whole_row(width))
    return out


def activation_rows(
    hidden_states: Float[Tensor, "b t c"], top: int, step: int
) -> tuple[Float[Tensor, "b t n"], Int[Tensor, "b t n"], Float[Tensor, "b m c"]]:
    """Each token's largest absolute values, descending, their places in (T, C), and a copy of every `step`th token."""
    x = hidden_states.contiguous()
    b, t, width = x.shape
    values = x.new_empty((b, t, top), dtype=torch.float32)
    places = x.new_empty((b, t, top), dtype=torch.int64)
    sampled = x.new_empty((b, triton.cdiv(t, step), width))
    _launch(
        _activations_kernel, (b * t, 1, 1), step,
        x, values, places, sampled, t, width, step, sampled.shape[1], TOP=top, **_whole_row(width),
    )  # fmt: skip
    return values, places, sampled


def head_shares(heads: Float[Tensor, "b t h d"], high: float, low: float) -> Float[Tensor, "b p h 3"]:
    """Each block's part of the mean absolute value and of the shares below the two thresholds."""
    x = heads.contiguous()
    grid, shares, tile = _blocks(x)
    _launch(_head_shares_kernel, grid, (), x, shares, *x.shape[1:], low, high, 1 / prod(x.shape[1::2]), **tile)
    return shares


def gate_scores(
    logits: Float[Tensor, "b t h d"], activation: str, scale: float, step: int
) -> tuple[Float[Tensor, "b t h"], Float[Tensor, "b p h 3"], Float[Tensor, "b m h d"]]:
    """Mean score of each token and head, each block's part of the shares below 0.1, above 0.9 and above 0, and a copy.

    The copy is of every `step`th token's logits. The activation is one of `ops.gate.ACTIVATIONS`, computed in float32.
    """
    x = logits.contiguous()
    b, t, h, d = x.shape
    by_token = x.new_empty((b, t, h), dtype=torch.float32)
    sampled = x.new_empty((b, triton.cdiv(t, step), h, d))
    grid, shares, tile = _blocks(x)
    _launch(
        _gate_kernel, grid, step,
        x, by_token, shares, sampled, t, h, d, float(scale), 1 / (t * d), step, sampled.shape[1],
        ACTIVATION=activation, **tile,
    )  # fmt: skip
    return by_token, shares, sampled


def gate_histograms(
    logits: Float[Tensor, "n m h d"], activation: str, scale: float, edges: tuple[float, float], bins: int
) -> Int[Tensor, "n p h bins"]:
    """Each block's counts of scores in equal bins; the end bins count scores outside the edges."""
    x = logits.contiguous()
    grid, shares, tile = _blocks(x)
    counts = torch.empty((*shares.shape[:3], bins), dtype=torch.int32, device=x.device)
    _launch(
        _histogram_kernel, grid, bins,
        x, counts, *x.shape[1:], float(scale), *map(float, edges), bins,
        ACTIVATION=activation, **tile, BLOCK_BINS=triton.next_power_of_2(bins + 1),
    )  # fmt: skip
    return counts


def attention_rows(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k t d"],
    v: Float[Tensor, "b k t e"],
    out: Float[Tensor, "b t h e"],
    lse: Float[Tensor, "b h t"],
    *,
    scale: float,
    keys: int,
    first_queries: int,
) -> tuple[Float[Tensor, "b p h n"], Float[Tensor, "b h m"], Float[Tensor, "b k t"], Float[Tensor, "b p h"]]:
    """Causal attention to the first keys, summed over each block of queries, and of the first queries to key 0.

    Then the norm of every value, and each block's part of the mean absolute output.
    """
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    out = out.contiguous()
    (b, h, t, d), (num_kv_heads, e) = q.shape, v.shape[1::2]
    parts = triton.cdiv(t, _BLOCK_TOKENS)
    sums = lse.new_empty((b, parts, h, keys), dtype=torch.float32)
    first_rows = lse.new_empty((b, h, min(first_queries, t)), dtype=torch.float32)
    norms = lse.new_empty((b, num_kv_heads, t), dtype=torch.float32)
    sizes = lse.new_empty((b, parts, h), dtype=torch.float32)
    _launch(
        _attention_kernel, (b * h, parts, 1), (launch_key(k, v, out, lse), keys, first_queries),
        q, k, v, out, lse, sums, first_rows, norms, sizes,
        t, h, h // num_kv_heads, d, e, keys, first_rows.shape[2], float(scale), 1 / (t * e),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *lse.stride(), BLOCK_T=_BLOCK_TOKENS,
        BLOCK_K=max(_SMALLEST_DOT, triton.next_power_of_2(keys)),
        BLOCK_D=max(_SMALLEST_DOT, triton.next_power_of_2(d)), BLOCK_E=triton.next_power_of_2(e),
    )  # fmt: skip
    return sums, first_rows, norms, sizes


def _launch(
    kernel: Any, grid: tuple[int, int, int], like: Hashable, x: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Launch on the device of x, with whose key `like` decides which kernel Triton compiles."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        launch(kernel, grid, (launch_key(x), like), x, *arguments, **constants)


def _whole_row(width: int) -> dict[str, int]:
    """Options of a kernel in which one program reads a row of that width."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 4 if block <= 4096 else 8}


def _blocks(x: Tensor) -> tuple[tuple[int, int, int], Tensor, dict[str, int]]:
    """The grid over heads of sequences and blocks of tokens, memory for three shares per program, and the tile."""
    block_d = triton.next_power_of_2(x.shape[3])
    block_t = max(1, min(_BLOCK_TOKENS, _TILE // block_d))
    parts = triton.cdiv(x.shape[1], block_t)
    shares = x.new_empty((x.shape[0], parts, x.shape[2], 3), dtype=torch.float32)
    return (x.shape[0] * x.shape[2], parts, 1), shares, {"BLOCK_T": block_t, "BLOCK_D": block_d}
