"""Attention to the first keys, the strongest key, entropy, and what values carry."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gated_attention.analysis.attention import AttentionCall, by_query
from gated_attention.analysis.measures.hidden_states import mean_size
from gated_attention.analysis.measures.whole_tensors import has_kernels, wide_dtype
from gated_attention.analysis.visible import seen_by

CANDIDATE_KEYS = 32
"""The strongest sink is sought among so many first keys, and among no more than half of a sequence."""

FIRST_QUERIES = 4
"""Queries that `f_attn_late` leaves out: they see few keys, so the first gets much of any attention."""


class SinkColumns(NamedTuple):
    """Attention to the first keys: summed over each part of the queries, and of the first queries to key 0."""

    sums: Float[Tensor, "b p h n"]
    first_rows: Float[Tensor, "b h m"]


def sink_columns(call: AttentionCall) -> SinkColumns:
    """What F-Attn, Sink^eps and the sink position are computed from, `exp(scale q_i . k_j - lse_i)` for few j.

    Weights are summed over queries in the dtype of the log-sum-exp, a block of queries at a time.
    """
    keys = slice(0, _num_candidates(call))
    sums: list[Tensor] = []
    first_rows: list[Tensor] = []
    for queries in call.query_blocks(keys.stop):
        weights = call.weights(queries, keys)
        sums.append(weights.sum(2))
        # No block is shorter than these rows; cloned, so that the block can go.
        first_rows = first_rows or [weights[:, :, :FIRST_QUERIES, 0].clone()]
    return SinkColumns(torch.stack(sums, dim=1).sum(1, keepdim=True), first_rows[0])


def _num_candidates(call: AttentionCall) -> int:
    return max(1, min(CANDIDATE_KEYS, call.length // 2))


class AttentionRows(NamedTuple):
    """All of a layer's attention that the cheap measures need.

    Attributes:
        sizes: Mean absolute output of each head, as terms that add up over parts of the tokens.
    """

    sums: Float[Tensor, "b p h n"]
    first_rows: Float[Tensor, "b h m"]
    value_norms: Float[Tensor, "b k t"]
    sizes: Float[Tensor, "b p h"]


def attention_rows(call: AttentionCall) -> AttentionRows:
    """What F-Attn, Sink^eps, the sink position, value drain and the output's size are read from."""
    plain = call.mask is None and call.softcap is None and call.bias is None
    if plain and has_kernels(call.q, call.k, call.v, call.out, call.lse):
        from gated_attention.analysis import triton_rows

        read = (call.q, call.k, call.v, call.out, call.lse)
        keys = _num_candidates(call)
        found = triton_rows.attention_rows(*read, scale=call.scale, keys=keys, first_queries=FIRST_QUERIES)
        return AttentionRows(*found)
    return AttentionRows(*sink_columns(call), value_norms(call.v), mean_size(call.out)[:, None])


class WholeAttention(NamedTuple):
    """What needs every weight: mean entropy of a query's attention, and the key that gets most on average."""

    entropy: Float[Tensor, "b h"]
    peak: Float[Tensor, "b h"]
    peak_position: Int[Tensor, "b h"]


def whole_attention(call: AttentionCall) -> WholeAttention:
    """Entropy and strongest key of a whole sequence, from all weights, a block of queries at a time.

    Entropy of query i is `lse_i - sum_j A_ij s_ij` over its scores s (nats), a learned sink counted as one more
    key, then the mean over queries. A key's attention is the mean over the queries that see it; the strongest is
    sought among the keys of the first half, each seen by half of the queries or more.
    """
    length, dtype = call.length, call.lse.dtype
    score_mean = torch.zeros(call.lse.shape[:2], dtype=dtype, device=call.lse.device)  # (B, H)
    sums = torch.zeros((*call.lse.shape[:2], length), dtype=dtype, device=call.lse.device)
    for queries in call.query_blocks(length):
        keys = slice(0, length if call.mask is not None else queries.stop)
        scores = call.scores(queries, keys)
        weights = call.weights(queries, keys, scores)
        sums[..., keys] += weights.sum(2)
        score_mean += scores.mul_(weights).sum((2, 3))
    entropy = call.lse.sum(-1) - score_mean
    if call.sinks is not None:
        sinks = by_query(call.sinks).to(dtype)  # (H, 1) or (B, H, T)
        entropy = entropy - (torch.exp(sinks - call.lse) * sinks).sum(-1)
    half = max(1, length // 2)
    peak, position = (sums[..., :half] / seen_by(call)[:, None, :half].clamp(min=1)).max(-1)
    return WholeAttention(entropy / length, peak, position)


def value_norms(v: Float[Tensor, "b k t d"]) -> Float[Tensor, "b k t"]:
    """Norm of every value."""
    norms: Tensor = torch.linalg.vector_norm(v, dim=-1, dtype=wide_dtype(v))
    return norms


def value_drain(norms: Float[Tensor, "*b k t"]) -> Float[Tensor, "*b k"]:
    """Norm of token 0's value over the median norm of the other tokens' (the lower median of an even number)."""
    return norms[..., 0] / norms[..., 1:].median(-1).values
