"""What causal attention leaves out before a query, as one number: the first key that the query sees.

It tells packed documents, sliding windows and left padding apart from plain causal attention without a T x S mask.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gated_attention.ranges import require_within


def find_first_keys(
    position_ids: Int[Tensor, "b t"], num_keys: int | None = None, *, window: int | None = None
) -> Int[Tensor, "b t"]:
    """The first key that each query sees, int32.

    Args:
        position_ids: Counted from 0 in every document, so also behind left padding. The queries are the last T tokens
            of all that have keys.
        num_keys: With those that a cache holds; None is T.
        window: How many keys a query sees at most, its own among them.

    Raises:
        ValueError: The window is below 1, or positions are no integers of that shape.
    """
    require_within("window", window, least=1)
    if position_ids.ndim != 2 or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}; give integers, (B, T)"
        )
    own = _own_keys(position_ids, position_ids.shape[1] if num_keys is None else num_keys)
    first = own - position_ids
    if window is not None:
        first = torch.maximum(first, own - (window - 1))
    return first.clamp_min(0).to(torch.int32)


def check_first_keys(first_keys: Tensor, q: Tensor, k: Tensor, causal: bool) -> Int[Tensor, "b t"]:
    """First keys as kernels read them: int32, adjacent, and none beyond the query's own key.

    Raises:
        ValueError: They have another shape, are no integers, or attention is not causal.
    """
    wanted = (q.shape[0], q.shape[2])
    if first_keys.shape != wanted or first_keys.is_floating_point() or first_keys.dtype == torch.bool:
        raise ValueError(
            f"first_keys is {first_keys.dtype} of shape {tuple(first_keys.shape)}; give integers, (B, T) = {wanted}"
        )
    if not causal or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"first_keys needs causal attention of at most as many queries as keys, not causal={causal} and "
            f"{q.shape[2]} queries of {k.shape[2]} keys; give a mask"
        )
    return torch.minimum(first_keys, _own_keys(first_keys, k.shape[2])).to(torch.int32).contiguous()


def to_mask(first_keys: Int[Tensor, "b t"], num_keys: int) -> Bool[Tensor, "b 1 t s"]:
    """Which keys lie at or after the first one; causality is not in it."""
    return (torch.arange(num_keys, device=first_keys.device) >= first_keys[..., None])[:, None]


def _own_keys(like: Tensor, num_keys: int) -> Tensor:
    t = like.shape[1]
    return torch.arange(num_keys - t, num_keys, device=like.device)
