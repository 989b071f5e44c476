"""What flows through a running causal language model: attention, gate logits, layer outputs; by hooks only.

Queries, keys and values are taken where transformers hands them to its attention function, after norm
and RoPE, whatever the model family. No model code is touched and everything is restored on leaving.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from gated_attention import ops
from gated_attention.nn import AttentionGate

_IMPLEMENTATION = "gated_attention_capture"


class AttentionCall(NamedTuple):
    """One layer's attention: (B, H, T, D) queries, (B, K, S, D) keys and values, (B, H, T) log-sum-exp."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    scale: float


_observer: ContextVar[Callable[[AttentionCall], None]] = ContextVar("observer")


def _observed_attention(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k s d"],
    value: Float[Tensor, "b k s d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b t h d"], None]:
    """Attention as transformers calls it, computed once with its log-sum-exp and shown to the observer."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = ops.attention(query, key, value, causal=attention_mask is None, mask=attention_mask, scale=scale)
    _observer.get()(AttentionCall(cast(int, module.layer_idx), query, key, value, lse, scale))
    return out.transpose(1, 2), None


AttentionInterface.register(_IMPLEMENTATION, _observed_attention)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, first layer first.

    Raises:
        ValueError: if the model keeps them nowhere that is known.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} keeps no list of decoder layers; give a decoder-only causal model")
    return list(layers)


@contextmanager
def observe(
    model: PreTrainedModel,
    *,
    attention: Callable[[AttentionCall], None] | None = None,
    gate: Callable[[int, AttentionGate, Tensor], None] | None = None,
    layer_output: Callable[[int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call the given functions while the model runs.

    Args:
        model: Any decoder-only model of transformers that uses its attention interface.
        attention: Called with every attention.
        gate: Called with the layer, the gate and its flat logits, (B, T, heads * channels).
        layer_output: Called with the layer and its hidden state, (B, T, C).
    """
    layers = decoder_layers(model)
    with ExitStack() as stack:
        if attention is not None:
            token = _observer.set(attention)
            stack.callback(_observer.reset, token)
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(_IMPLEMENTATION)
        for index, layer in enumerate(layers):
            if layer_output is not None:
                stack.callback(layer.register_forward_hook(_output_hook(index, layer_output)).remove)
            for module in layer.modules():
                if gate is not None and isinstance(module, AttentionGate):
                    stack.callback(module.register_forward_hook(_gate_hook(index, module, gate)).remove)
        yield


def _output_hook(index: int, call: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        call(index, output[0] if isinstance(output, tuple) else output)

    return hook


def _gate_hook(
    index: int, gate: AttentionGate, call: Callable[[int, AttentionGate, Tensor], None]
) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        call(index, gate, output)

    return hook
