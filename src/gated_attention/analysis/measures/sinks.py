"""Attention to the first keys, the strongest key, entropy, and value drain."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gated_attention.analysis.attention import AttentionCall, by_query, query_blocks, visible
from gated_attention.analysis.measures.hidden_states import mean_size
from gated_attention.analysis.measures.whole_tensors import has_kernels, wide_dtype

CANDIDATE_KEYS = 32
"""First keys among which the strongest sink is sought, though not beyond the first half of a sequence.

Where attention looks ahead, all keys are: every query sees them.
"""

FIRST_QUERIES = 4
"""Queries that `f_attn_late` leaves out: they see few keys, so the first key gets a large share of any attention."""


class AttentionRows(NamedTuple):
    """What the cheap measures need of a layer's attention.

    Attributes:
        sums: Attention to the first keys, summed over each part of the queries.
        first_rows: Attention of the first queries to key 0.
        value_norms: Norm of every value.
        sizes: Mean absolute output of each head, as terms that add up over parts of the tokens.
    """

    sums: Float[Tensor, "b p h n"]
    first_rows: Float[Tensor, "b h m"]
    value_norms: Float[Tensor, "b k t"]
    sizes: Float[Tensor, "b p h"]


def attention_rows(call: AttentionCall) -> AttentionRows:
    """The rows of F-Attn, Sink^eps, the sink position, value drain and the output's size.

    Of causal attention, only the weights of a few keys are computed. Sums over queries have the dtype of the
    log-sum-exp.
    """
    keys = slice(0, max(1, min(CANDIDATE_KEYS, call.length // 2)) if call.causal else call.length)
    plain = call.causal and call.mask is None and call.softcap is None and call.bias is None
    read = (call.q, call.k, call.v, call.out, call.lse)
    if plain and has_kernels(*read):
        from gated_attention.analysis.measures import triton_rows

        found = triton_rows.attention_rows(*read, scale=call.scale, keys=keys.stop, first_queries=FIRST_QUERIES)
        return AttentionRows(*found)
    sums: list[Tensor] = []
    first_rows: list[Tensor] = []
    for queries in query_blocks(call.q, keys.stop):
        weights = call.weights(queries, keys)
        sums.append(weights.sum(2))
        # The first block is never shorter than these rows; the clone lets the block be freed.
        first_rows = first_rows or [weights[:, :, :FIRST_QUERIES, 0].clone()]
    norms = torch.linalg.vector_norm(call.v, dim=-1, dtype=wide_dtype(call.v))
    return AttentionRows(torch.stack(sums, 1).sum(1, keepdim=True), first_rows[0], norms, mean_size(call.out)[:, None])


class WholeAttention(NamedTuple):
    """What needs every weight: the mean entropy of a query's attention, and the key with the most attention."""

    entropy: Float[Tensor, "b h"]
    peak: Float[Tensor, "b h"]
    peak_position: Int[Tensor, "b h"]


def whole_attention(call: AttentionCall) -> WholeAttention:
    """Entropy and strongest key of a whole sequence, from all weights, a block of queries at a time.

    The entropy of query i is `lse_i - sum_j A_ij s_ij` nats over its scores s, where a learned sink counts as one more
    key; the result is the mean over queries. The attention to a key is the mean over the queries that see it. The
    strongest key is one of the first half, which at least half of the queries see, or any where attention looks ahead.
    """
    length, dtype = call.length, call.lse.dtype
    score_mean = torch.zeros(call.lse.shape[:2], dtype=dtype, device=call.lse.device)  # (B, H)
    sums = torch.zeros((*call.lse.shape[:2], length), dtype=dtype, device=call.lse.device)
    for queries in query_blocks(call.q, length):
        keys = slice(0, queries.stop if call.mask is None and call.causal else length)
        scores = call.scores(queries, keys)
        weights = call.weights(queries, keys, scores)
        sums[..., keys] += weights.sum(2)
        score_mean += scores.mul_(weights).sum((2, 3))
    entropy = call.lse.sum(-1) - score_mean
    if call.sinks is not None:
        sinks = by_query(call.sinks).to(dtype)  # (H, 1) or (B, H, T)
        entropy = entropy - (torch.exp(sinks - call.lse) * sinks).sum(-1)
    half = max(1, length // 2) if call.causal else length
    peak, position = (sums[..., :half] / visible(call).seen_by[:, None, :half].clamp(min=1)).max(-1)
    return WholeAttention(entropy / length, peak, position)


def value_drain(norms: Float[Tensor, "*b k t"]) -> Float[Tensor, "*b k"]:
    """Norm of the first value over the median norm of the others (the lower median of an even number)."""
    return norms[..., 0] / norms[..., 1:].median(-1).values


def value_ratios(norms: Float[Tensor, "*b k t"], num_keys: int) -> Float[Tensor, "*b k n"]:
    """Norms of the first values over the median norm of all (the lower median of an even number)."""
    return norms[..., :num_keys] / norms.median(-1, keepdim=True).values
