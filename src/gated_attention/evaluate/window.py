"""The loss of a model whose attention does not see the first token, or only the last tokens and never the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gated_attention.evaluate.loss import next_token_losses
from gated_attention.nn.eval_mode import evaluating

_IMPLEMENTATION = "gated_attention_window"
_window: ContextVar[int] = ContextVar("tokens that a query sees, itself included")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if options.get("s_aux") is not None or options.get("sinks") is not None:
        raise ValueError(f"{type(module).__name__} has learned sinks, which no window hides; leave the window out")
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < _window.get()) & ((place > 0) | (place[:, None] == 0))
    mask = seen[None, None] if attention_mask is None else seen & attention_mask
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return out, None


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


@contextmanager
def without_first_token(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Let every query see the last `window` tokens, itself included, and token 0 only if it is that token.

    Windows of the model's own narrow this further. Whole sequences only, without a cache.
    """
    before, token = model.config._attn_implementation, _window.set(window)
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _window.reset(token)


def late_loss(
    model: PreTrainedModel,
    sequences: Int[Tensor, "n t"],
    first: int,
    window: int | None = None,
    batch_tokens: int = 8192,
) -> float:
    """Mean loss of the tokens after position `first`, whose queries would look further back than `first` tokens.

    Args:
        window: Tokens that a query sees, token 0 never; None is the model's own attention.
    """
    total, count = 0.0, 0
    with evaluating(model) as device:
        for batch in torch.split(sequences, max(1, batch_tokens // sequences.shape[1])):
            if window is None:
                losses = next_token_losses(model, batch.to(device))
            else:
                with without_first_token(model, window):
                    losses = next_token_losses(model, batch.to(device))
            total += losses[:, first:].double().sum().item()
            count += losses[:, first:].numel()
    return total / count
