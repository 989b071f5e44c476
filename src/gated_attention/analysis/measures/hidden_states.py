"""The largest activations, kurtosis, and the share of the heads' output that is near zero."""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gated_attention.analysis.attention import BLOCK_ELEMENTS
from gated_attention.analysis.measures.whole_tensors import has_kernels, share, wide_dtype

MEDIAN_TOKENS = 64
"""Evenly spaced tokens per sequence that the median activation is taken over."""

TOP_ACTIVATIONS = 8
"""Largest activations per sequence whose places are kept."""

SPARSITY = (1e-2, 1e-3)
"""Absolute values below these thresholds count as zero in the two sparsities."""

MASSIVE, MASSIVE_OVER_MEDIAN = 100.0, 1000.0
"""A massive activation exceeds both, the second as a multiple of the median (Sun et al., arXiv 2402.17762)."""


class ActivationRows(NamedTuple):
    """What the activation measures need of a layer's hidden states, in tensors that do not view the whole.

    Attributes:
        largest: Largest absolute value of each token.
        values, places: Absolute values that include the `TOP_ACTIVATIONS` largest of the sequence, and their flat
            indices in (T, C).
        sampled: Hidden states of `MEDIAN_TOKENS` evenly spaced tokens from token 0 on.
    """

    largest: Float[Tensor, "*b t"]
    values: Float[Tensor, "*b n"]
    places: Int[Tensor, "*b n"]
    sampled: Float[Tensor, "*b m c"]


def activation_rows(hidden_states: Float[Tensor, "b t c"]) -> ActivationRows:
    """The rows of `activations`, from one pass over the hidden states."""
    _, length, width = hidden_states.shape
    step = ceil(length / MEDIAN_TOKENS)
    if has_kernels(hidden_states) and width >= TOP_ACTIVATIONS:
        from gated_attention.analysis.measures import triton_rows

        values, places, sampled = triton_rows.activation_rows(hidden_states, TOP_ACTIVATIONS, step)
        return ActivationRows(values[..., 0], values.flatten(1), places.flatten(1), sampled)
    largest = _largest(hidden_states)
    tokens = largest.topk(min(TOP_ACTIVATIONS, length), sorted=False).indices  # they hold the largest values
    rows = hidden_states.gather(1, tokens[..., None].expand(-1, -1, width)).abs()
    places = tokens[..., None] * width + torch.arange(width, device=tokens.device)
    return ActivationRows(largest, rows.flatten(1), places.flatten(1), hidden_states[:, ::step].clone())


class Activations(NamedTuple):
    """Largest absolute values of a sequence, descending, and their places; the median; how many tokens are massive."""

    values: Float[Tensor, "*b n"]
    tokens: Int[Tensor, "*b n"]
    channels: Int[Tensor, "*b n"]
    median: Float[Tensor, "*b"]
    num_massive_tokens: Int[Tensor, "*b"]


def activations(found: ActivationRows) -> Activations:
    """The values of M-Act, the top activations and the massive ones, for any number of layers and sequences."""
    width = found.sampled.shape[-1]
    values, order = found.values.topk(min(TOP_ACTIVATIONS, found.values.shape[-1]))
    places = found.places.gather(-1, order)
    median = found.sampled.abs().flatten(-2).median(-1).values
    threshold = (MASSIVE_OVER_MEDIAN * median.to(wide_dtype(median))).clamp(min=MASSIVE)
    num_massive = (found.largest > threshold[..., None]).sum(-1)
    return Activations(values, places // width, places % width, median, num_massive)


def _largest(x: Tensor) -> Tensor:
    """Largest absolute value along the last axis."""
    if x.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=-1)  # a single kernel
        return norm
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(-low, high)


def moments(x: Float[Tensor, "b t c"]) -> Float[Tensor, "b 5 p"]:
    """Largest absolute value, mean, and sums of the second to fourth powers of deviations from that mean, by part.

    A part is a token, or a whole sequence, whose third powers are not needed and left at 0.
    """
    if has_kernels(x):
        from gated_attention.analysis.measures import triton_rows

        return triton_rows.moments(x)
    wide = wide_dtype(x)
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
        moments: Of parts of equal size, which are merged in float64.
        numel: Elements in all parts of a sequence.
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
    sums: Tensor = torch.linalg.vector_norm(heads, 1, dim=(1, 3), dtype=wide_dtype(heads))
    return sums / (heads.shape[1] * heads.shape[3])


def head_shares(heads: Float[Tensor, "b t h d"]) -> Float[Tensor, "b p h 3"]:
    """Mean absolute value and shares below 1e-2 and 1e-3 over tokens and channels, as terms that add up over parts."""
    if has_kernels(heads):
        from gated_attention.analysis.measures import triton_rows

        return triton_rows.head_shares(heads, *SPARSITY)
    size = heads.abs()
    return torch.stack([mean_size(heads), *(share(torch.lt, size, threshold) for threshold in SPARSITY)], -1)[:, None]
