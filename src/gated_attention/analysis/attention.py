"""Attention as a running model computes it: output, log-sum-exp, and any block of its weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gated_attention import ops

BLOCK_ELEMENTS = 2**24
"""Elements of the largest temporary tensor of a measure: 64 MiB in float32."""

_SMALLEST_BLOCK = 4  # queries
_MASKED_QUERIES = 1024  # per call, since the kernels turn a boolean mask into a bias of the inputs' dtype


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """The attention of one layer over one batch, as it entered transformers' attention interface.

    Attributes:
        layer: Index of the decoder layer.
        q, k, v: After norm and RoPE, (B, H, T, D) and (B, K, T, D); query head i reads key/value head i // (H / K).
        out: Output before any gate, (B, T, H, D).
        lse: Natural logarithm of the softmax denominator, which includes learned sinks, (B, H, T).
        scale: Factor on the scores.
        softcap: Scores become `softcap * tanh(score / softcap)`; None for no cap.
        mask: True where a query sees a key, (B or 1, H or 1, T, T); None is all earlier keys and its own if `causal`,
            otherwise all.
        sinks: Learned scores in the denominator that belong to no token, (H,) (gpt-oss) or (B, H, T).
        bias: Added to the scores (relative positions), (B or 1, H or 1, T, T).
        causal: Whether a query sees no later key; with a mask, which says so by itself, for the measures to know.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    softcap: float | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = True

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.q.shape[2]

    def scores(self, queries: slice, keys: slice) -> Float[Tensor, "b h t s"]:
        """Scaled, capped and biased scores in float32 or wider, also of masked pairs."""
        bias = None if self.bias is None else self.bias[:, :, queries, keys]
        return _scores(self.q[:, :, queries], self.k[:, :, keys], self.scale, self.softcap, bias)

    def weights(
        self, queries: slice, keys: slice, scores: Float[Tensor, "b h t s"] | None = None
    ) -> Float[Tensor, "b h t s"]:
        """A block of the attention matrix: `exp(score - lse)`, 0 where masked.

        Args:
            queries, keys: With explicit start and stop.
            scores: From `scores`, if they were computed already; not changed.
        """
        lse = self.lse[:, :, queries, None]
        weights = (self.scores(queries, keys).sub_(lse) if scores is None else scores - lse).exp_()
        if self.mask is not None:
            return weights.masked_fill_(~self.mask[:, :, queries, keys], 0.0)
        if self.causal and keys.stop > queries.start + 1:  # later queries see all of these keys
            weights[:, :, : keys.stop - queries.start].tril_(queries.start - keys.start)
        return weights


def attend(
    layer: int,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s e"],
    scale: float,
    softcap: float | None,
    mask: Bool[Tensor, "#b #h t s"] | None,
    sinks: Float[Tensor, " h"] | Float[Tensor, "b h t"] | None,
    bias: Float[Tensor, "#b #h t s"] | None,
    causal: bool = True,
) -> AttentionCall:
    """Run attention, by the fused kernels unless scores are capped or biased.

    A sink with score s adds exp(s) to the denominator, which multiplies the output by `sigmoid(lse - s)`.
    """
    if softcap is None and bias is None and v.shape[-1] == q.shape[-1]:
        out, lse = _fused(q, k, v, scale, mask, causal)
    else:
        out, lse = _blockwise(q, k, v, scale, mask, softcap, bias, causal)
    out = out.transpose(1, 2).contiguous()  # (B, T, H, D); AFMoE views it as (B, T, H * D)
    if sinks is not None:
        total = torch.logaddexp(lse, by_query(sinks).to(lse.dtype))  # (B, H, T)
        out = out * torch.exp(lse - total).transpose(1, 2)[..., None].to(out.dtype)
        lse = total
    return AttentionCall(layer, q, k, v, out, lse, scale, softcap, mask, sinks, bias, causal)


class Visible(NamedTuple):
    """What the queries of a call may see, per sequence.

    Attributes:
        num_seen: How many keys each query sees; under uniform attention each of these keys gets one over that number.
        seen_by: How many queries see each key.
        sees_first: 1 for every query that sees key 0, otherwise 0.
    """

    num_seen: Int[Tensor, "n t"]
    seen_by: Int[Tensor, "n t"]
    sees_first: Int[Tensor, "n t"]


def visible(call: AttentionCall) -> Visible:
    """Counts from the mask of the first head; one row for all sequences without a mask."""
    if call.mask is None:
        num_seen = torch.arange(1, call.length + 1, device=call.q.device)[None]
        if not call.causal:
            num_seen = torch.full_like(num_seen, call.length)
        return Visible(num_seen, num_seen.flip(1), torch.ones_like(num_seen))
    mask = call.mask[:, 0]
    if mask.stride(0) == 0:  # one mask for all sequences
        mask = mask[:1]
    # A sum copies booleans to 64-bit integers.
    blocks = torch.split(mask, max(1, BLOCK_ELEMENTS // mask[:, 0].numel()), dim=1)
    num_seen = torch.cat([rows.sum(2) for rows in blocks], dim=1)
    seen_by = torch.stack([rows.sum(1) for rows in blocks]).sum(0)
    return Visible(*(counts.expand(len(call.q), -1) for counts in (num_seen, seen_by, mask[:, :, 0].long())))


def by_query(sinks: Tensor) -> Tensor:
    """Scores of sinks, broadcastable to (B, H, T)."""
    return sinks[:, None] if sinks.ndim == 1 else sinks


def query_blocks(q: Float[Tensor, "b h t d"], num_keys: int) -> Iterator[slice]:
    """Blocks of consecutive queries, each as large as `BLOCK_ELEMENTS` allows with that many keys."""
    b, h, t, d = q.shape
    size = max(_SMALLEST_BLOCK, BLOCK_ELEMENTS // (b * h * max(d, num_keys)))
    return (slice(start, min(start + size, t)) for start in range(0, t, size))


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    if mask is None:
        return ops.attention(q, k, v, causal=causal, scale=scale)
    blocks = [slice(start, start + _MASKED_QUERIES) for start in range(0, q.shape[2], _MASKED_QUERIES)]
    pairs = [ops.attention(q[:, :, b], k, v, causal=False, scale=scale, mask=mask[:, :, b]) for b in blocks]
    return torch.cat([out for out, _ in pairs], dim=2), torch.cat([lse for _, lse in pairs], dim=2)


def _blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    positions = torch.arange(k.shape[2], device=q.device)
    for queries in query_blocks(q, k.shape[2]):
        scores = _scores(q[:, :, queries], k, scale, softcap, None if bias is None else bias[:, :, queries])
        if mask is not None or causal:
            visible = positions <= positions[queries, None] if mask is None else mask[:, :, queries]
            scores = scores.masked_fill_(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        # A query that sees no key has lse -inf and output 0.
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).to(v.dtype)
        grouped = torch.unflatten(weights, 1, (-1, groups)).flatten(2, 3)  # (B, K, G * T, S)
        outs.append(torch.unflatten(grouped @ v, 2, (groups, -1)).flatten(1, 2))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    b, h, t, d = q.shape
    num_kv_heads = k.shape[1]
    # One kernel both casts and makes contiguous. The keys take the scale: they are as many as the queries or fewer.
    flat = q.to(wide, memory_format=torch.contiguous_format).reshape(b, num_kv_heads, -1, d)  # (B, K, G * T, D)
    with torch.autocast(q.device.type, enabled=False):
        scores = (flat @ (k.to(wide) * scale).transpose(-1, -2)).reshape(b, h, t, k.shape[2])
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias
