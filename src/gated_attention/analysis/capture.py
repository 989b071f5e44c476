"""Shows a watcher what flows through a running model, by hooks alone.

Queries, keys and values are read where transformers passes them to its attention function, after norm and RoPE, for
every model family. No model code is changed, and everything is restored afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gated_attention.analysis.attention import AttentionCall, attend
from gated_attention.analysis.families import Attention, find_attention, model_layers
from gated_attention.analysis.gates import Gate
from gated_attention.models.families.projections import GatedView
from gated_attention.models.implementations import LSE_ATTENTION

_IMPLEMENTATION = "gated_attention_capture"

_OVER_DEPTH = (
    "Inkling2BlockAttentionResidual",
    "Inkling2LoopBlockAttentionResidual",
    "Inkling2LoopMessageAttentionResidual",
)
"""Modules that mix outputs of earlier layers, not tokens, through the same interface. The watcher does not see them."""


class Watcher:
    """Sees a model run; its methods do nothing until they are overridden."""

    def attention(self, call: AttentionCall) -> None:
        """Softmax attention was computed."""

    def heads(self, attention: Attention, heads: Float[Tensor, "b t c"]) -> None:
        """The output projection is about to read these concatenated heads, after the gate if there is one."""

    def block_output(self, attention: Attention, output: Float[Tensor, "b t c"]) -> None:
        """The attention block returned this, before it is added to the residual."""

    def gate(self, attention: Attention, gate: Gate, logits: Float[Tensor, "b t h d"]) -> None:
        """A gate computed its logits."""

    def layer_output(self, layer: int, hidden_states: Float[Tensor, "b t c"]) -> None:
        """A layer returned its hidden states."""


_current: ContextVar[tuple[Watcher, dict[int, Iterator[int]]]] = ContextVar(
    "the watcher, and layers by id of their attention module"
)


def _watched_lse_attention(
    module: nn.Module | GatedView,
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
    """Attention as transformers calls it, computed once with its log-sum-exp, and shown to the watcher."""
    watcher, layers = _current.get()
    module = module.gated_module if isinstance(module, GatedView) else module
    name = type(module).__name__
    if id(module) not in layers:
        raise ValueError(f"{name} attends outside the attention of a layer; this architecture is not supported")
    if block_indices is not None:
        raise ValueError(f"{name} attends to blocks of keys that it selects; this architecture is not supported")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"{name} adds a bias to its attention scores; this architecture is not supported")
    if torch.is_autocast_enabled(query.device.type):  # measures must read what the kernel reads
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if indices is not None:  # sparse attention: the keys that each query selects, (B, T, n), beside the mask
        shape = (query.shape[0], 1, query.shape[2], key.shape[2])
        selected = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter_(-1, indices[:, None].long(), True)
        visible = torch.ones_like(selected[:1]).tril() if attention_mask is None else attention_mask
        attention_mask = selected & visible
    if sinks is not None:  # one per query, (B, H, T, 1)
        s_aux = sinks[..., 0]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer = next(layers[id(module)])
    call = attend(layer, query, key, value, scale, softcap, attention_mask, s_aux, position_bias, causal)
    watcher.attention(call)
    return call.out, None, call.lse


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
def watch(model: PreTrainedModel, watcher: Watcher, attention: Sequence[Attention] | None = None) -> Iterator[None]:
    """Show the watcher what a model does.

    Args:
        attention: From `find_attention`, if it was called already.

    Raises:
        ValueError: if the architecture is not supported.
    """
    found = find_attention(model) if attention is None else attention

    def show_gate(gate: Gate, one: Attention, output: Tensor) -> None:
        watcher.gate(one, gate, gate.logits(output))

    def show_layer(layer: int, output: Tensor) -> None:
        watcher.layer_output(layer, output.flatten(2))  # hyper-connections return residual streams, (B, T, streams, C)

    with ExitStack() as stack:
        by_module = _runs((one.module, one) for one in found)
        layers: dict[int, Iterator[int]] = {id(m): cycle([one.layer for one in runs]) for m, runs in by_module}
        token = _current.set((watcher, layers))
        stack.callback(_current.reset, token)
        parts = _with_own_configuration(model)
        for part in parts:
            stack.callback(part.set_attn_implementation, part.config._attn_implementation)
        for part in parts:
            part.set_attn_implementation(_IMPLEMENTATION)
        for _, runs in by_module:
            stack.enter_context(runs[0].output_projection.register_forward_pre_hook(_in_each_run(runs, watcher.heads)))
            stack.enter_context(runs[0].block.register_forward_hook(_in_each_run(runs, watcher.block_output)))
            for gate in runs[0].gates:
                show = partial(show_gate, gate)
                stack.enter_context(gate.module.register_forward_hook(_in_each_run(runs, show)))
        for layer, indices in _runs((layer, index) for index, layer in enumerate(model_layers(model))):
            stack.enter_context(layer.register_forward_hook(_in_each_run(indices, show_layer)))
        yield


def _with_own_configuration(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model, and parts with a copy of its configuration, as in T5; transformers 5.17 does not reach these."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    alike = {id(part.config): part for part in reversed(parts) if type(part.config) is type(model.config)}
    return list(alike.values())


_R = TypeVar("_R")


def _runs(pairs: Iterable[tuple[nn.Module, _R]]) -> list[tuple[nn.Module, list[_R]]]:
    """Each module once, with all of its runs in one pass."""
    runs: dict[nn.Module, list[_R]] = {}
    for module, run in pairs:
        runs.setdefault(module, []).append(run)
    return list(runs.items())


def _in_each_run(runs: Sequence[_R], show: Callable[[_R, Tensor], None]) -> Callable[..., None]:
    """A hook that calls `show` with the current run and the module's first output, or first input before it runs."""
    run = cycle(runs)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        seen = inputs if output is None else output
        show(next(run), seen[0] if isinstance(seen, tuple) else seen)

    return hook
