"""Attention functions of our own, behind the call that transformers' attention makes.

What a mask of None means is theirs to say: one query sees every key, several see the upper-left triangle, so that
keys beyond them are the unused end of a static cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from gated_attention import ops
from gated_attention.models.families.projections import GatedView
from gated_attention.ops.attention import AttentionBackend, eager
from gated_attention.ops.first_keys import to_mask

FUSED_ATTENTION = "gated_attention"
"""The name under which transformers knows `ops.gated_attention`: `model.set_attn_implementation("gated_attention")`."""

SKIP_ATTENTION = "gated_attention_skip"
"""The name of its backend `skip`, which computes nothing where a hard sigmoid per head is closed."""

OWN_ATTENTION = (FUSED_ATTENTION, SKIP_ATTENTION)

LseAttention = Callable[..., tuple[Tensor, Tensor | None, Tensor]]
"""Attention as transformers calls it: the output, (B, T, H, D), the weights or None, and the log-sum-exp, (B, H, T)."""

# What callers pass along that changes no score once the mask is made.
_SAY_NO_MORE = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "use_cache",
}


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    gate_logits: Tensor | None = None,
    first_keys: Tensor | None = None,
    *,
    skip: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, gated where logits are given."""
    name = f"attention implementation {SKIP_ATTENTION if skip else FUSED_ATTENTION!r}"
    if dropout:
        raise ValueError(f"{name} has no dropout, {dropout} was asked for; use 0.0")
    mask = _mask_of(key, attention_mask, name)
    key, value, causal = _visible(name, module, query, key, value, mask, **options)
    if gate_logits is None and isinstance(module, GatedView):
        gate_logits = module.take_gate_logits(SKIP_ATTENTION if skip else None)
    if gate_logits is not None and skip:
        if mask is not None:
            raise ValueError(f"{name} takes no mask, as of padding, a window or a static cache; use 'sdpa'")
        return ops.gated_attention(
            query, key, value, gate_logits, causal=causal, scale=scaling, first_keys=first_keys,
            activation="hard_sigmoid", backend="skip",
        ), None  # fmt: skip
    if gate_logits is None:
        if first_keys is not None and mask is None:
            mask = to_mask(first_keys, key.shape[2])
        y, _lse = ops.attention(query, key, value, causal=causal, scale=scaling, mask=mask)
        return y.transpose(1, 2), None
    return ops.gated_attention(
        query, key, value, gate_logits, causal=causal, scale=scaling, mask=mask, first_keys=first_keys
    ), None


AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionInterface.register(SKIP_ATTENTION, partial(_fused_attention, skip=True))
for _name in OWN_ATTENTION:
    AttentionMaskInterface.register(_name, sdpa_mask)


def _attend_with_lse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: AttentionBackend,
    asked_by: str = "a gate on the log-sum-exp",
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    if dropout:
        raise ValueError(f"{asked_by} has no attention dropout, {dropout} was asked for; use 0.0")
    mask = _mask_of(key, attention_mask, asked_by, takes_bias=backend == "eager")
    key, value, causal = _visible(asked_by, module, query, key, value, mask, **options)
    if backend == "eager":
        if causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        y, weights, lse = eager(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return y.transpose(1, 2), weights, lse
    y, lse = ops.attention(query, key, value, causal=causal, scale=scaling, mask=mask, backend=backend)
    return y.transpose(1, 2), None, lse


LSE_ATTENTION: dict[str, LseAttention] = {
    "eager": partial(_attend_with_lse, backend="eager"),
    "sdpa": partial(_attend_with_lse, backend="sdpa"),
}
"""Attention implementations, by transformers' names, that return the log-sum-exp as well.

Their option `asked_by` is what messages call who needs it.
"""


def lse_attention(implementation: str) -> LseAttention:
    """The implementation of that name for a block with a gate on the log-sum-exp.

    Raises:
        ValueError: if it returns none.
    """
    if implementation not in LSE_ATTENTION:
        raise ValueError(
            f"attention implementation {implementation!r} returns no log-sum-exp, which a gate reads; "
            f"choose from {', '.join(LSE_ATTENTION)}"
        )
    return LSE_ATTENTION[implementation]


def _mask_of(key: Tensor, mask: Tensor | None, name: str, *, takes_bias: bool = False) -> Tensor | None:
    """The mask of these keys; transformers makes one as long as a static cache.

    Raises:
        ValueError: if it is of integers, or a bias that is not taken.
    """
    if mask is None:
        return None
    is_bias = mask.is_floating_point()
    if mask.dtype != torch.bool and not (is_bias and takes_bias):
        cure = "use 'eager' for a bias" if is_bias else "give mask.bool()"
        raise ValueError(f"{name} takes boolean masks, not {mask.dtype}; {cure}")
    return mask[..., : key.shape[-2]]


def _visible(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, bool]:
    """The keys and values that any query may see, and whether the causal triangle still applies to them.

    Raises:
        ValueError: if something was asked for that `name` does not know or cannot do.
    """
    if unknown := [f"{key}={value!r}" for key, value in others.items() if _matters(key, value)]:
        raise ValueError(f"{name} does not know {unknown[0]}; use 'eager' or 'sdpa' with a gate that reads no scores")
    if mask is not None:
        return key, value, False
    length = query.shape[2]
    causal = length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(f"{name} sees a window of {sliding_window} keys through a mask, and was given none")
    return key, value, causal


def _matters(name: str, value: Any) -> bool:
    return value is not None and value is not False and name not in _SAY_NO_MORE
