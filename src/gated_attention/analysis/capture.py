"""What flows through a running causal language model, shown to whoever watches; by hooks only.

Queries, keys and values are taken where transformers hands them to its attention function, after norm
and RoPE, whatever the model family. No model code is touched and everything is restored on leaving.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from gated_attention.analysis.attention import AttentionCall, attend
from gated_attention.analysis.families import Attention, Gate, decoder_layers, find_attention
from gated_attention.models.implementations import LSE_ATTENTION

_IMPLEMENTATION = "gated_attention_capture"


class Watcher:
    """Sees a model run; every method may be overridden and does nothing here."""

    def attention(self, call: AttentionCall) -> None:
        """Softmax attention was computed."""

    def heads(self, attention: Attention, heads: Float[Tensor, "b t c"]) -> None:
        """The output projection is about to read these concatenated heads, gated if there is a gate."""

    def block_output(self, attention: Attention, output: Float[Tensor, "b t c"]) -> None:
        """The attention block returned this, before it is added to the residual."""

    def gate(self, attention: Attention, gate: Gate, logits: Float[Tensor, "b t h d"]) -> None:
        """A gate formed its logits."""

    def layer_output(self, layer: int, hidden_states: Float[Tensor, "b t c"]) -> None:
        """A decoder layer returned its hidden states."""


_current: ContextVar[tuple[Watcher, dict[int, int]]] = ContextVar("watcher and layers by attention module")


def _watched_lse_attention(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k s d"],
    value: Float[Tensor, "b k s e"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b t h e"], None, Float[Tensor, "b h t"]]:
    """Attention as transformers calls it, computed once with its log-sum-exp and shown to the watcher."""
    watcher, layers = _current.get()
    name = type(module).__name__
    if id(module) not in layers:
        raise ValueError(f"{name} attends outside of a decoder layer's own attention; this architecture is unsupported")
    if position_bias is not None or (attention_mask is not None and attention_mask.dtype != torch.bool):
        raise ValueError(f"{name} adds a bias to its attention scores; this architecture is not supported")
    if attention_mask is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} looks ahead; give a decoder-only causal model")
    if torch.is_autocast_enabled(query.device.type):  # weights must come from what the kernel reads
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out, lse = attend(query, key, value, scale=scale, mask=attention_mask, softcap=softcap, sinks=s_aux)
    layer = layers[id(module)]
    watcher.attention(AttentionCall(layer, query, key, value, out, lse, scale, softcap, attention_mask, s_aux))
    return out, None, lse


def _watched_attention(*args: Any, **kwargs: Any) -> tuple[Float[Tensor, "b t h e"], None]:
    out, *_ = _watched_lse_attention(*args, **kwargs)
    return out, None


AttentionInterface.register(_IMPLEMENTATION, _watched_attention)
LSE_ATTENTION[_IMPLEMENTATION] = _watched_lse_attention
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


@contextmanager
def watch(
    model: PreTrainedModel, watcher: Watcher, attention: Sequence[Attention] | None = None
) -> Iterator[Sequence[Attention]]:
    """Show the watcher whatever the model does, and yield the layers' attention.

    Args:
        model: Any decoder-only model of transformers that uses its attention interface.
        watcher: Whose methods are called.
        attention: From `find_attention`, if it was called already.

    Raises:
        ValueError: if the architecture is not supported.
    """
    found = find_attention(model) if attention is None else attention
    with ExitStack() as stack:
        token = _current.set((watcher, {id(one.module): one.layer for one in found}))
        stack.callback(_current.reset, token)
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(_IMPLEMENTATION)
        for one in found:
            stack.callback(one.output_projection.register_forward_pre_hook(_heads_hook(watcher, one)).remove)
            stack.callback(one.module.register_forward_hook(_output_hook(watcher, one)).remove)
            for gate in one.gates:
                stack.callback(gate.module.register_forward_hook(_gate_hook(watcher, one, gate)).remove)
        for index, layer in enumerate(decoder_layers(model)):
            stack.callback(layer.register_forward_hook(_layer_hook(watcher, index)).remove)
        yield found


_Hook = Callable[..., None]


def _heads_hook(watcher: Watcher, attention: Attention) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watcher.heads(attention, inputs[0])

    return hook


def _output_hook(watcher: Watcher, attention: Attention) -> _Hook:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        watcher.block_output(attention, _first(output))

    return hook


def _gate_hook(watcher: Watcher, attention: Attention, gate: Gate) -> _Hook:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        watcher.gate(attention, gate, gate.logits(output))

    return hook


def _layer_hook(watcher: Watcher, index: int) -> _Hook:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        watcher.layer_output(index, _first(output))

    return hook


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
