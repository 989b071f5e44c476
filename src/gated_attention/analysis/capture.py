"""What flows through a running causal language model, shown to a watcher, by hooks alone.

Queries, keys and values are taken where transformers hands them to its attention function, after norm
and RoPE, whatever the model family. No model code is touched and everything is restored on leaving.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import cycle
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gated_attention.analysis.attention import AttentionCall, attend
from gated_attention.analysis.families import Attention, decoder_layers, find_attention
from gated_attention.analysis.gates import Gate
from gated_attention.models.implementations import LSE_ATTENTION

_IMPLEMENTATION = "gated_attention_capture"

_OVER_DEPTH = (
    "Inkling2BlockAttentionResidual",
    "Inkling2LoopBlockAttentionResidual",
    "Inkling2LoopMessageAttentionResidual",
)
"""Modules that mix the outputs of earlier layers, not tokens, through the same interface: run without being seen."""


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


_current: ContextVar[tuple[Watcher, dict[int, Iterator[int]]]] = ContextVar("watcher, and layers by attention module")


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
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b t h e"], None, Float[Tensor, "b h t"]]:
    """Attention as transformers calls it, computed once with its log-sum-exp and shown to the watcher."""
    watcher, layers = _current.get()
    name = type(module).__name__
    if id(module) not in layers:
        raise ValueError(f"{name} attends outside of a decoder layer's own attention; this architecture is unsupported")
    if block_indices is not None:
        raise ValueError(f"{name} attends to blocks of keys that it selects; this architecture is not supported")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"{name} adds a bias to its attention scores; this architecture is not supported")
    if attention_mask is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} looks ahead; give a decoder-only causal model")
    if torch.is_autocast_enabled(query.device.type):  # weights must come from what the kernel reads
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if indices is not None:
        attention_mask = _selected(indices, query, key, attention_mask)
    if sinks is not None:  # of every query, (B, H, T, 1)
        s_aux = sinks[..., 0]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out, lse = attend(
        query, key, value, scale=scale, mask=attention_mask, softcap=softcap, sinks=s_aux, bias=position_bias
    )
    layer = next(layers[id(module)])
    watcher.attention(
        AttentionCall(layer, query, key, value, out, lse, scale, softcap, attention_mask, s_aux, position_bias)
    )
    return out, None, lse


def _selected(
    indices: Int[Tensor, "b t n"], query: Tensor, key: Tensor, mask: Bool[Tensor, "#b #h t s"] | None
) -> Bool[Tensor, "b #h t s"]:
    """The mask of sparse attention, which hands over the keys that each query may see beside those that it may not."""
    shape = (indices.shape[0], 1, query.shape[2], key.shape[2])
    seen = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter_(-1, indices[:, None].long(), True)
    return seen & (torch.ones_like(seen[:1]).tril() if mask is None else mask)


def _watched_attention(*args: Any, **kwargs: Any) -> tuple[Float[Tensor, "b t h e"], None]:
    if type(args[0]).__name__ in _OVER_DEPTH:
        out, _ = sdpa_attention_forward(*args, **kwargs)
    else:
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
        by_module = _runs((one.module, one) for one in found)
        layers: dict[int, Iterator[int]] = {id(m): cycle([one.layer for one in runs]) for m, runs in by_module}
        token = _current.set((watcher, layers))
        stack.callback(_current.reset, token)
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(_IMPLEMENTATION)
        for module, runs in by_module:
            first = runs[0]
            stack.callback(first.output_projection.register_forward_pre_hook(_heads_hook(watcher, runs)).remove)
            stack.callback(module.register_forward_hook(_output_hook(watcher, runs)).remove)
            for gate in first.gates:
                stack.callback(gate.module.register_forward_hook(_gate_hook(watcher, runs, gate)).remove)
        for layer, indices in _runs((layer, index) for index, layer in enumerate(decoder_layers(model))):
            stack.callback(layer.register_forward_hook(_layer_hook(watcher, indices)).remove)
        yield found


_R = TypeVar("_R")


def _runs(pairs: Iterable[tuple[nn.Module, _R]]) -> list[tuple[nn.Module, list[_R]]]:
    """Every module once, with its runs in a pass; a hook goes round them."""
    runs: dict[nn.Module, list[_R]] = {}
    for module, run in pairs:
        runs.setdefault(module, []).append(run)
    return list(runs.items())


_Hook = Callable[..., None]


def _heads_hook(watcher: Watcher, runs: Sequence[Attention]) -> _Hook:
    run = cycle(runs)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watcher.heads(next(run), inputs[0])

    return hook


def _output_hook(watcher: Watcher, runs: Sequence[Attention]) -> _Hook:
    run = cycle(runs)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        watcher.block_output(next(run), _first(output))

    return hook


def _gate_hook(watcher: Watcher, runs: Sequence[Attention], gate: Gate) -> _Hook:
    run = cycle(runs)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        watcher.gate(next(run), gate, gate.logits(output))

    return hook


def _layer_hook(watcher: Watcher, indices: Sequence[int]) -> _Hook:
    run = cycle(indices)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden_states = _first(output)
        # Hyper-connections carry several residual streams, (B, T, streams, C): each adds channels.
        watcher.layer_output(next(run), hidden_states.flatten(2) if hidden_states.ndim == 4 else hidden_states)

    return hook


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
