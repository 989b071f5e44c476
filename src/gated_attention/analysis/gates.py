"""The gates on the attention output in transformers' families, as rows of data.

A row describes a class of attention, not a model type: a model type may mix kinds of layers, and one class serves the
text model, its causal model and the model with images. Rows of classes that transformers lacks are never used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gated_attention.nn import AttentionGate
from gated_attention.nn.block import GateOwner
from gated_attention.nn.gate import by_head
from gated_attention.spec import GateSpec


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate as a family stores it.

    Attributes:
        spec: What it does to which tensor.
        module: The module whose output holds the gate logits.
        logits: Turns that output into logits, (B, T, heads, channels); B and T are 1 for a gate without input.
    """

    spec: GateSpec
    module: nn.Module
    logits: Callable[[Tensor], Tensor]


def _apart(attention: nn.Module, spec: GateSpec, projected: Tensor) -> Tensor:
    """Logits with a projection of their own."""
    return by_head(projected, spec, head_width(attention))


def _behind_queries(attention: nn.Module, spec: GateSpec, projected: Tensor) -> Tensor:
    """Logits in a projection whose rows are [query | gate] for each head."""
    width = head_width(attention)
    query_width = getattr(attention, "qk_head_dim", width)
    return torch.unflatten(projected, -1, (-1, query_width + width))[..., query_width:]


def _with_bias_by_head(attention: nn.Module, spec: GateSpec, projected: Tensor) -> Tensor:
    """Beam: one learned bias per head, for all of its channels."""
    return _apart(attention, spec, projected) + attention.gate_bias[:, None]  # type: ignore[index]


def _scaled_by_channel(attention: nn.Module, spec: GateSpec, projected: Tensor) -> Tensor:
    """Dory: the square of one learned factor per channel."""
    factor = (attention.s_gate * attention.s_gate_scale).square()  # type: ignore[operator]
    return _apart(attention, spec, projected * factor)


_ELEMENTWISE = GateSpec(dtype="model")
_HEADWISE = GateSpec(granularity="headwise", dtype="model")


@dataclass(frozen=True, slots=True)
class _Row:
    """One class of attention.

    Attributes:
        module: Path from the attention to the module that computes the logits.
        spec: The gate; an attention with `gate_per_head` set is headwise.
        logits: Turns the attention, the spec and the module's output into logits by head.
        output: Path to the projection of the gated heads, where the module of the usual name does more than project.
    """

    module: str
    spec: GateSpec = _ELEMENTWISE
    logits: Callable[[nn.Module, GateSpec, Tensor], Tensor] = _apart
    output: str | None = None


_PACKED = _Row("q_proj", logits=_behind_queries)
_OF_INKLING = _Row("o_proj.gate_proj", GateSpec(), output="o_proj.linear")

_ROWS: dict[str, _Row] = {
    "Qwen3NextAttention": _PACKED,
    "Qwen3_5Attention": _PACKED,
    "Qwen3_5MoeAttention": _PACKED,
    "Qwen4ExpTextAttention": _PACKED,
    "AXK2Attention": _Row("q_gate_proj", GateSpec(), _behind_queries),
    "AfmoeAttention": _Row("gate_proj"),
    "HrmTextAttention": _Row("gate_proj"),
    "MuseGlimmerTextAttention": _Row("gate_proj"),
    "MuseSparkTextAttention": _Row("gate_proj"),  # gates heads after a norm without weights
    "BeamAttention": _Row("gate_proj", GateSpec(bias=0.0, dtype="model"), _with_bias_by_head),
    "DoryAttention": _Row("gate_proj", logits=_scaled_by_channel),
    "HYV4Attention": _Row("gate_proj"),
    "HYV4VLAttention": _Row("gate_proj"),
    "Inkling2FullAttention": _OF_INKLING,
    "Inkling2SlidingAttention": _OF_INKLING,
    "Inkling2LoopFullAttention": _OF_INKLING,
    "Inkling2LoopSlidingAttention": _OF_INKLING,
    "Step3p7Attention": _Row("g_proj", _HEADWISE),
    "LagunaAttention": _Row("g_proj", GateSpec(activation="softplus")),
    "Lfm3Attention": _Row("g_proj", _HEADWISE),
    "BailingHybridAttention": _Row("g_proj", GateSpec(granularity="headwise")),
    "Dots3NoteTextAttention": _Row("g_proj", _HEADWISE),
}  # fmt: skip


def gates_of(attention: nn.Module) -> tuple[Gate, ...]:
    """The gates of an attention module, at most one per site; none if no layout is known."""
    if isinstance(attention, GateOwner):
        width, pairs = attention.gate_head_dim, attention.gate_modules()
        return tuple(Gate(spec, module, partial(by_head, spec=spec, head_dim=width)) for spec, module in pairs)
    if own := [module for module in attention.children() if isinstance(module, AttentionGate)]:
        return tuple(
            Gate(one.spec, one.logits, partial(by_head, spec=one.spec, head_dim=one.logit_shape[1])) for one in own
        )
    row = _row(attention)
    module = None if row is None else _at(attention, row.module)
    if row is None or module is None:  # a configuration may leave the gate out
        return ()
    spec = replace(row.spec, granularity="headwise") if getattr(attention, "gate_per_head", False) else row.spec
    return (Gate(spec, module, partial(row.logits, attention, spec)),)


def gated_projection(attention: nn.Module) -> nn.Module | None:
    """The projection of the gated heads if a row names it; None if it has a usual name."""
    row = _row(attention)
    return None if row is None or row.output is None else _at(attention, row.output)


def head_width(attention: nn.Module) -> int:
    """Channels per head of the attention output; values may be narrower than queries (latent attention)."""
    width = getattr(attention, "v_head_dim", None)
    return int(getattr(attention, "head_dim", 0) if width is None else width)


def _row(attention: nn.Module) -> _Row | None:
    names = (kind.__name__ for kind in type(attention).__mro__)
    return next((_ROWS[name] for name in names if name in _ROWS), None)


def _at(attention: nn.Module, path: str) -> nn.Module | None:
    try:
        return attention.get_submodule(path)
    except AttributeError:
        return None
