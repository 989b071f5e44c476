"""The measures, one definition each, as functions of what a layer computes.

Every measure is one value per sequence (and head), formed in float32 or wider; a measure of a model is
their mean over sequences in float64, unless it is a maximum. `definitions.MEASURES` names, cites and words
them. What reads whole tensors runs layer by layer and keeps little; what a measure takes from that is
formed of all layers at once, because small kernels cost a launch each and a median over one row keeps
one multiprocessor of a GPU busy.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gated_attention import ops
from gated_attention.analysis.attention import BLOCK_ELEMENTS, AttentionCall, by_query
from gated_attention.analysis.visible import seen_by
from gated_attention.spec import GateSpec

CANDIDATE_KEYS = 32
"""The strongest sink is sought among so many first keys, and among no more than half of a sequence."""

FIRST_QUERIES = 4
"""Queries that `f_attn_late` leaves out: they see few keys, so the first gets much of any attention."""

MEDIAN_TOKENS = 64
"""Evenly spaced tokens of a sequence over which the median activation is taken."""

TOP_ACTIVATIONS = 8
"""Largest activations of a sequence that are located."""

SPARSITY = (1e-2, 1e-3)
"""Absolute values below these count as zero, the one or the other."""

MASSIVE, MASSIVE_OVER_MEDIAN = 100.0, 1000.0
"""An activation is massive above both: in itself, and as a multiple of the median (Sun et al., arXiv 2402.17762)."""

HISTOGRAM_TOKENS = 256
"""Evenly spaced tokens of a sequence that enter the histogram of gate scores."""

NUM_BINS = 50
"""Bins of a gate histogram."""

_BOUNDED = {"sigmoid", "ns_sigmoid", "hard_sigmoid"}
_UNBOUNDED_RANGE = 3.0
_KERNEL_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


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
    if plain and _has_kernels(call.q, call.k, call.v, call.out, call.lse):
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
    norms: Tensor = torch.linalg.vector_norm(v, dim=-1, dtype=_wide(v))
    return norms


def value_drain(norms: Float[Tensor, "*b k t"]) -> Float[Tensor, "*b k"]:
    """Norm of token 0's value over the median norm of the other tokens' (the lower median of an even number)."""
    return norms[..., 0] / norms[..., 1:].median(-1).values


class ActivationRows(NamedTuple):
    """All of a layer's hidden states that its activation measures need; none of them views the whole.

    Attributes:
        largest: Largest |hidden state| of each token.
        values, places: Absolute values among which are the `TOP_ACTIVATIONS` largest of the sequence, and where in
            (T, C) they are.
        sampled: Hidden states of `MEDIAN_TOKENS` evenly spaced tokens from token 0 on.
    """

    largest: Float[Tensor, "*b t"]
    values: Float[Tensor, "*b n"]
    places: Int[Tensor, "*b n"]
    sampled: Float[Tensor, "*b m c"]


def activation_rows(hidden_states: Float[Tensor, "b t c"]) -> ActivationRows:
    """What `activations` reads, from one pass over the hidden states."""
    _, length, width = hidden_states.shape
    step = ceil(length / MEDIAN_TOKENS)
    if _has_kernels(hidden_states) and width >= TOP_ACTIVATIONS:
        from gated_attention.analysis import triton_rows

        values, places, sampled = triton_rows.activation_rows(hidden_states, TOP_ACTIVATIONS, step)
        return ActivationRows(values[..., 0], values.flatten(1), places.flatten(1), sampled)
    largest = _largest(hidden_states)
    tokens = largest.topk(min(TOP_ACTIVATIONS, length), sorted=False).indices  # they hold the largest values
    rows = hidden_states.gather(1, tokens[..., None].expand(-1, -1, width)).abs()
    places = tokens[..., None] * width + torch.arange(width, device=tokens.device)
    return ActivationRows(largest, rows.flatten(1), places.flatten(1), hidden_states[:, ::step].clone())


class Activations(NamedTuple):
    """The largest |hidden state| of each sequence with their places, the median, and how many tokens hold massive ones.

    `values` descend; `tokens` and `channels` say where each of them is.
    """

    values: Float[Tensor, "*b n"]
    tokens: Int[Tensor, "*b n"]
    channels: Int[Tensor, "*b n"]
    median: Float[Tensor, "*b"]
    num_massive_tokens: Int[Tensor, "*b"]


def activations(found: ActivationRows) -> Activations:
    """What M-Act, the top activations and the massive ones are read from, of any number of layers and sequences."""
    width = found.sampled.shape[-1]
    values, order = found.values.topk(min(TOP_ACTIVATIONS, found.values.shape[-1]))
    places = found.places.gather(-1, order)
    median = found.sampled.abs().flatten(-2).median(-1).values
    threshold = (MASSIVE_OVER_MEDIAN * median.to(_wide(median))).clamp(min=MASSIVE)
    num_massive = (found.largest > threshold[..., None]).sum(-1)
    return Activations(values, places // width, places % width, median, num_massive)


def _largest(x: Tensor) -> Tensor:
    """Largest absolute value along the last axis."""
    if x.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=-1)  # one kernel
        return norm
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(-low, high)


def moments(x: Float[Tensor, "b t c"]) -> Float[Tensor, "b 5 p"]:
    """Largest absolute value, mean, and sums of second to fourth powers of what is left without that mean.

    Those of each token, or of each sequence as one part, whose third moment does not count and is left at 0.
    """
    if _has_kernels(x):
        from gated_attention.analysis import triton_rows

        return triton_rows.moments(x)
    wide = _wide(x)
    mean = x.mean((1, 2), keepdim=True, dtype=wide)
    second = fourth = torch.zeros(len(x), dtype=wide, device=x.device)
    for part in torch.split(x, max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[2])), dim=1):
        squares = (part - mean).square_()
        second = second + squares.sum((1, 2))
        fourth = fourth + torch.linalg.vector_norm(squares, dim=(1, 2)).square()
    parts = (_largest(x.flatten(1)).to(wide), mean[:, 0, 0], second, torch.zeros_like(second), fourth)
    return torch.stack(parts, 1)[..., None]


def inf_norm(moments: Float[Tensor, "*b 5 p"]) -> Float[Tensor, "*b"]:
    """Largest absolute value."""
    return moments[..., 0, :].amax(-1)


def kurtosis(moments: Float[Tensor, "*b 5 p"], numel: int) -> Float[Tensor, "*b"]:
    """Fourth central moment over the squared variance, over all tokens and channels; 3 for a normal distribution.

    Args:
        moments: Of parts of equal size, merged in float64.
        numel: Numbers in all parts of a sequence.
    """
    means, second, third, fourth = moments[..., 1:, :].double().unbind(-2)
    size = numel // means.shape[-1]
    shift = means - means.mean(-1, keepdim=True)
    squares = shift.square()
    second_whole = (second + size * squares).sum(-1)
    fourth_whole = (fourth + 4 * shift * third + squares * (6 * second + size * squares)).sum(-1)
    return fourth_whole / second_whole.square() * numel


def mean_size(heads: Float[Tensor, "b t h d"]) -> Float[Tensor, "b h"]:
    """Mean absolute value over tokens and channels."""
    sums: Tensor = torch.linalg.vector_norm(heads, 1, dim=(1, 3), dtype=_wide(heads))
    return sums / (heads.shape[1] * heads.shape[3])


def head_shares(heads: Float[Tensor, "b t h d"]) -> Float[Tensor, "b p h 3"]:
    """Mean absolute value and shares below 1e-2 and 1e-3, over tokens and channels, as terms that add up over parts."""
    if _has_kernels(heads):
        from gated_attention.analysis import triton_rows

        return triton_rows.head_shares(heads, *SPARSITY)
    size = heads.abs()
    return torch.stack([mean_size(heads), *(_share(torch.lt, size, threshold) for threshold in SPARSITY)], -1)[:, None]


def _share(compare: Callable[..., Tensor], x: Tensor, threshold: float) -> Tensor:
    """Share of (T, D) for which the comparison holds, (B, H)."""
    # A sum of booleans would copy them to 64-bit integers first; CUDA adds up halves in float32 as they are read.
    flags = torch.empty(x.shape, dtype=torch.bfloat16 if x.is_cuda else x.dtype, device=x.device)
    count = compare(x, threshold, out=flags).sum((1, 3), dtype=_wide(x))
    return count / (x.shape[1] * x.shape[3])


class GateScores(NamedTuple):
    """All of a gate's scores that its measures need; none of them views the whole.

    Attributes:
        by_token: Means over a head's channels.
        shares: Shares below 0.1, above 0.9 and above 0 over tokens and channels, as terms that add up over parts.
        sampled: Logits of `HISTOGRAM_TOKENS` evenly spaced tokens of each sequence.
    """

    by_token: Float[Tensor, "*b t h"]
    shares: Float[Tensor, "*b p h 3"]
    sampled: Float[Tensor, "*b m h d"]


def gate_scores(logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> GateScores:
    """What the gate measures are read from; channels of a head, then tokens, count alike."""
    step = ceil(logits.shape[1] / HISTOGRAM_TOKENS)
    if _kernels_score(logits, spec):
        from gated_attention.analysis import triton_rows

        return GateScores(*triton_rows.gate_scores(logits, spec.activation, spec.scale, step))
    parts = [_gate_scores(_scores(part, spec)) for part in _groups(logits)]
    by_token, shares = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return GateScores(by_token, shares, logits[:, ::step].clone())


def _kernels_score(logits: Tensor, spec: GateSpec) -> bool:
    """Whether Triton kernels form this gate's scores: in float32, each head by itself."""
    return _has_kernels(logits) and spec.dtype == "float32" and not spec.head_shared


def channel_scores(logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> Float[Tensor, "#h #d"]:
    """Gate scores by channel: means over tokens, summed over sequences."""
    return torch.stack([_scores(part, spec).mean(1).sum(0) for part in _groups(logits)]).sum(0)


def _gate_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    shares = [_share(torch.lt, scores, 0.1), _share(torch.gt, scores, 0.9), _share(torch.gt, scores, 0.0)]
    return scores.mean(-1), torch.stack(shares, -1)[:, None]


def _scores(logits: Tensor, spec: GateSpec) -> Tensor:
    scores = ops.gate_scores(logits, spec)
    return scores.to(_wide(scores))  # (B, T, H, D)


def _groups(x: Tensor) -> Sequence[Tensor]:
    """Some sequences at a time, as many as `BLOCK_ELEMENTS` allows."""
    return torch.split(x, max(1, BLOCK_ELEMENTS // x[0].numel()))


def score_range(spec: GateSpec) -> tuple[float, float]:
    """Where a histogram of this gate's scores begins and ends: the activation's range, or -3 to 3 if it has none."""
    if spec.activation in _BOUNDED:
        return min(0.0, spec.scale), max(0.0, spec.scale)
    return -_UNBOUNDED_RANGE, _UNBOUNDED_RANGE


def gate_histograms(sampled: Float[Tensor, "l b m h d"], spec: GateSpec) -> Float[Tensor, "l #h bins"]:
    """Histograms of all sequences' scores, by layer; scores outside the range in the end bins."""
    if _kernels_score(sampled, spec):
        from gated_attention.analysis import triton_rows

        counts = triton_rows.gate_histograms(
            sampled.flatten(0, 1), spec.activation, spec.scale, score_range(spec), NUM_BINS
        )  # (L * B, P, H, bins)
        return torch.unflatten(counts, 0, sampled.shape[:2]).sum((1, 2)).to(torch.float64)
    parts = torch.split(sampled, max(1, BLOCK_ELEMENTS // sampled[0].numel()))
    return torch.cat([_histograms(part, spec) for part in parts])


def _histograms(sampled: Tensor, spec: GateSpec) -> Tensor:
    low, high = score_range(spec)
    scores = torch.unflatten(_scores(sampled.flatten(0, 1), spec), 0, sampled.shape[:2])  # (L, B, M, H, D)
    layers, heads = len(scores), scores.shape[3]
    bins = ((scores - low) / (high - low) * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
    bins += torch.arange(layers * heads, device=scores.device).view(layers, 1, 1, heads, 1) * NUM_BINS
    # bincount would wait for the device to learn its largest index.
    counts = torch.zeros(layers * heads * NUM_BINS, dtype=scores.dtype, device=scores.device)
    ones = torch.ones((), dtype=scores.dtype, device=scores.device).expand(bins.numel())
    return counts.index_add_(0, bins.flatten(), ones).view(layers, heads, NUM_BINS)


def _has_kernels(*tensors: Tensor) -> bool:
    """Whether `triton_rows` reads these: on a GPU, and no wider than its float32 arithmetic."""
    return all(x.is_cuda and x.dtype in _KERNEL_DTYPES for x in tensors) and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
