"""Gate scores: means, shares below and above thresholds, histograms."""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gated_attention import ops
from gated_attention.analysis.measures.whole_tensors import groups, has_kernels, share
from gated_attention.ops.sdpa import widen
from gated_attention.spec import GateSpec

HISTOGRAM_TOKENS = 256
"""Evenly spaced tokens per sequence in a histogram of gate scores."""

NUM_BINS = 50
"""Bins of a histogram of gate scores."""

_BOUNDED = {"sigmoid", "ns_sigmoid", "hard_sigmoid"}


class GateScores(NamedTuple):
    """What the measures need of a gate's scores, in tensors that do not view the whole.

    Attributes:
        by_token: Means over the channels of a head.
        shares: Shares below 0.1, above 0.9 and above 0 over tokens and channels, as terms that add up over parts.
        sampled: Logits of `HISTOGRAM_TOKENS` evenly spaced tokens per sequence.
    """

    by_token: Float[Tensor, "*b t h"]
    shares: Float[Tensor, "*b p h 3"]
    sampled: Float[Tensor, "*b m h d"]


def gate_scores(logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> GateScores:
    """The rows of the gate measures."""
    step = ceil(logits.shape[1] / HISTOGRAM_TOKENS)
    if _kernels_score(logits, spec):
        from gated_attention.analysis.measures import triton_rows

        return GateScores(*triton_rows.gate_scores(logits, spec.activation, spec.scale, step))
    by_token, shares = [], []
    for part in groups(logits):
        scores = _scores(part, spec)
        by_token.append(scores.mean(-1))
        limits = (torch.lt, 0.1), (torch.gt, 0.9), (torch.gt, 0.0)
        shares.append(torch.stack([share(compare, scores, limit) for compare, limit in limits], -1)[:, None])
    return GateScores(torch.cat(by_token), torch.cat(shares), logits[:, ::step].clone())


def _kernels_score(logits: Tensor, spec: GateSpec) -> bool:
    """Whether Triton kernels compute the scores of this gate: in float32, for each head by itself."""
    return has_kernels(logits) and spec.dtype == "float32" and not spec.head_shared


def channel_scores(logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> Float[Tensor, "#h #d"]:
    """Gate scores by channel: means over tokens, summed over sequences."""
    return torch.stack([_scores(part, spec).mean(1).sum(0) for part in groups(logits)]).sum(0)


def _scores(logits: Tensor, spec: GateSpec) -> Tensor:
    return widen(ops.gate_scores(logits, spec))  # (B, T, H, D)


def score_range(spec: GateSpec) -> tuple[float, float]:
    """The range of a histogram: that of a bounded activation times the scale, otherwise -3 to 3."""
    return (min(0.0, spec.scale), max(0.0, spec.scale)) if spec.activation in _BOUNDED else (-3.0, 3.0)


def gate_histograms(sampled: Float[Tensor, "l b m h d"], spec: GateSpec) -> Float[Tensor, "l #h bins"]:
    """Histograms over the scores of all sequences, by layer; the end bins count scores outside the range."""
    if _kernels_score(sampled, spec):
        from gated_attention.analysis.measures import triton_rows

        flat = sampled.flatten(0, 1)  # (L * B, M, H, D)
        counts = triton_rows.gate_histograms(flat, spec.activation, spec.scale, score_range(spec), NUM_BINS)
        return torch.unflatten(counts, 0, sampled.shape[:2]).sum((1, 2)).to(torch.float64)
    return torch.cat([_histograms(part, spec) for part in groups(sampled)])


def _histograms(sampled: Tensor, spec: GateSpec) -> Tensor:
    low, high = score_range(spec)
    scores = torch.unflatten(_scores(sampled.flatten(0, 1), spec), 0, sampled.shape[:2])  # (L, B, M, H, D)
    layers, heads = len(scores), scores.shape[3]
    bins = ((scores - low) / (high - low) * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
    bins += torch.arange(layers * heads, device=scores.device).view(layers, 1, 1, heads, 1) * NUM_BINS
    # bincount would synchronise with the device to learn the largest index.
    counts = torch.zeros(layers * heads * NUM_BINS, dtype=scores.dtype, device=scores.device)
    ones = torch.ones((), dtype=scores.dtype, device=scores.device).expand(bins.numel())
    return counts.index_add_(0, bins.flatten(), ones).view(layers, heads, NUM_BINS)
