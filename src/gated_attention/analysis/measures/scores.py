"""Scores of gates: means, shares below and above thresholds, histograms."""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gated_attention import ops
from gated_attention.analysis.attention import BLOCK_ELEMENTS
from gated_attention.analysis.measures.whole_tensors import groups, has_kernels, share
from gated_attention.ops.sdpa import widen
from gated_attention.spec import GateSpec

HISTOGRAM_TOKENS = 256
"""Evenly spaced tokens of a sequence that enter the histogram of gate scores."""

NUM_BINS = 50
"""Bins of a gate histogram."""

_BOUNDED = {"sigmoid", "ns_sigmoid", "hard_sigmoid"}

_UNBOUNDED_RANGE = 3.0


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
    """What the gate measures read; channels of a head have equal weight, then tokens."""
    step = ceil(logits.shape[1] / HISTOGRAM_TOKENS)
    if _kernels_score(logits, spec):
        from gated_attention.analysis import triton_rows

        return GateScores(*triton_rows.gate_scores(logits, spec.activation, spec.scale, step))
    parts = [_gate_scores(_scores(part, spec)) for part in groups(logits)]
    by_token, shares = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return GateScores(by_token, shares, logits[:, ::step].clone())


def _kernels_score(logits: Tensor, spec: GateSpec) -> bool:
    """Whether Triton kernels form this gate's scores: in float32, each head by itself."""
    return has_kernels(logits) and spec.dtype == "float32" and not spec.head_shared


def channel_scores(logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> Float[Tensor, "#h #d"]:
    """Gate scores by channel: means over tokens, summed over sequences."""
    return torch.stack([_scores(part, spec).mean(1).sum(0) for part in groups(logits)]).sum(0)


def _gate_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    shares = [share(torch.lt, scores, 0.1), share(torch.gt, scores, 0.9), share(torch.gt, scores, 0.0)]
    return scores.mean(-1), torch.stack(shares, -1)[:, None]


def _scores(logits: Tensor, spec: GateSpec) -> Tensor:
    return widen(ops.gate_scores(logits, spec))  # (B, T, H, D)


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
