"""What gated decoders share, dense or mixture-of-experts: the residual stream of layers, and masks."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gated_attention.models.configuration_gated_qwen3 import GatedConfigMixin
from gated_attention.models.implementations import OWN_ATTENTION
from gated_attention.models.parent import CACHE_NAME
from gated_attention.ops import find_first_keys

# Arguments that leave the mask as it would be without them.
_LEAVE_THE_MASK = {
    "input_ids",
    "inputs_embeds",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "use_cache",
}
_MASKED = ("eager", "sdpa", "flex_attention", *OWN_ATTENTION)
"""Attention implementations that learn of packed documents from the mask alone."""


class GatedDecoderLayerMixin(nn.Module):
    """The forward pass of Qwen3's decoder layer that normalises or clips what it adds to the residual stream.

    Sandwich norms (T2.7) follow the attention and the FFN; clipping (A.6) bounds their outputs, after the norm.
    """

    init_parent: Callable[..., None]
    """The constructor of the transformers layer, made by `parent.init_with`."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module  # before the FFN: Qwen3's name

    def __init__(self, config: GatedConfigMixin, layer_idx: int) -> None:
        self.init_parent(config, layer_idx)
        self.output_clip = config.output_clip
        self.sandwich_norm = config.sandwich_norm
        if config.sandwich_norm:
            norm = type(self.input_layernorm)
            self.attention_output_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.feedforward_output_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the decoder layers of Qwen3 and Qwen3-MoE."""
        y, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.sandwich_norm:
            y = self.attention_output_layernorm(y)
        hidden_states = hidden_states + self._clip(y)
        y = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.sandwich_norm:
            y = self.feedforward_output_layernorm(y)
        return hidden_states + self._clip(y)

    def _clip(self, y: Tensor) -> Tensor:
        return y if self.output_clip is None else y.clamp(-self.output_clip, self.output_clip)


def forward_of(parent: type) -> Callable[..., Any]:
    """The forward pass of the decoder `parent`, under its signature, with two additions.

    It tells layers `only_causal` where the caller asks for no more: while it compiles, transformers cannot see that
    positions it counted itself hold no packed documents, and builds a mask. PyTorch's attention would then score what
    the mask hides, on keys and values repeated for every head.

    It keeps packed documents apart or refuses them: transformers reads them from `position_ids`, but not beside a
    padding mask, nor when it makes a cache, as it does by default. It also refuses a static cache under FlexAttention,
    whose mask is wrong there.
    """
    decode = parent.forward  # type: ignore[attr-defined]
    names = list(signature(decode).parameters)[1:]

    @wraps(decode)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        implementation = self.config._attn_implementation
        cache = given.get(CACHE_NAME, given.get("past_key_values"))
        packed = implementation in _MASKED and _keep_documents_apart(implementation, given, has_cache=cache is not None)
        if implementation == "flex_attention" and getattr(cache, "is_compileable", False):
            raise ValueError(  # its mask holds the length that the cache counts on, and is read once that has grown
                "attention implementation 'flex_attention' takes no static cache, whose length it would read too late; "
                "use 'sdpa'"
            )
        if getattr(self.config, "is_causal", True) and given.keys() <= _LEAVE_THE_MASK:
            given["only_causal"] = True
        elif packed and implementation in OWN_ATTENTION:
            given |= {"only_causal": True, "first_keys": find_first_keys(given["position_ids"])}
        return decode(self, **given)

    return forward


def _keep_documents_apart(implementation: str, given: dict[str, Any], *, has_cache: bool) -> bool:
    """Turn off the cache beside packed documents, and refuse what would let them see each other.

    Args:
        given: Of the decoder's arguments; may gain `use_cache`.

    Returns:
        Whether there may be several documents in a row, which positions alone tell apart.
    """
    positions, lengths = given.get("position_ids"), given.get("cu_seq_lens_q")
    if positions is None:
        if lengths is not None and lengths.numel() > 2:
            raise ValueError(
                f"attention implementation {implementation!r} keeps packed documents apart by position_ids, "
                "not by cu_seq_lens_q alone; pass position_ids too"
            )
        return False
    mask = given.get("attention_mask")
    prepared = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
    if prepared or positions.ndim != 2 or positions.shape[1] == 1:
        return False
    if torch.compiler.is_compiling():  # positions cannot be read
        if not has_cache:
            given.setdefault("use_cache", False)
        return mask is None and not given.get("use_cache")
    if has_cache and mask is not None and mask.shape[-1] != positions.shape[-1]:
        return False  # of what the cache holds as well
    starts = positions[:, 1:] != positions[:, :-1] + 1
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        starts = starts & mask[:, 1:].bool() & mask[:, :-1].bool()  # those of padding are no documents
    if not starts.any():
        return False
    if mask is not None or has_cache or given.get("use_cache"):
        beside = "an attention_mask" if mask is not None else "a cache" if has_cache else "use_cache=True"
        raise ValueError(f"position_ids of packed documents do not keep them apart beside {beside}; leave it out")
    given["use_cache"] = False
    return True
