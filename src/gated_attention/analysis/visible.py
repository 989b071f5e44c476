"""How many keys each query sees, from the mask of an attention call."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from gated_attention.analysis.attention import BLOCK_ELEMENTS, AttentionCall


def seen_by(call: AttentionCall) -> Int[Tensor, "n t"]:
    """How many queries see each key, per sequence; one row for all without a mask."""
    if call.mask is None:
        return torch.arange(call.length, 0, -1, device=call.q.device)[None]
    return _each(call, lambda mask: torch.stack([rows.sum(0) for rows in _row_blocks(mask)]).sum(0))


def num_seen(call: AttentionCall) -> Int[Tensor, "n t"]:
    """How many keys each query sees; under uniform attention each of these keys gets one over that number."""
    if call.mask is None:
        return torch.arange(1, call.length + 1, device=call.q.device)[None]
    return _each(call, lambda mask: torch.cat([rows.sum(1) for rows in _row_blocks(mask)]))


def sees_first(call: AttentionCall) -> Int[Tensor, "n t"]:
    """1 for every query that sees key 0, otherwise 0."""
    if call.mask is None:
        return torch.ones(1, call.length, dtype=torch.long, device=call.q.device)
    return _each(call, lambda mask: mask[:, 0].long())


def _each(call: AttentionCall, of: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the first head's mask (T, T), per sequence where the masks differ (sparse attention)."""
    assert call.mask is not None
    mask = call.mask[:, 0]
    shared = mask.shape[0] == 1 or mask.stride(0) == 0
    return of(mask[0]).expand(len(call.q), -1) if shared else torch.stack([of(one) for one in mask])


def _row_blocks(mask: Tensor) -> Sequence[Tensor]:
    """A mask (T, T) in blocks of queries, since a sum copies booleans to 64-bit integers."""
    return torch.split(mask, max(1, BLOCK_ELEMENTS // mask.shape[-1]))
