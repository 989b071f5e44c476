"""Where each family of causal language models keeps its attention, its projections and its gates.

Nothing here runs a model. Queries, keys and values need no table, because every family hands them to
transformers' attention interface; what differs is names and how projections and gates are packed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.nn import AttentionGate, GatedBlock
from gated_attention.nn.gate import by_head
from gated_attention.spec import GateSpec, Site

_LAYER_LISTS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attn", "attention")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
_LOOKS_LIKE_A_GATE = ("g_proj", "gate_proj", "q_gate_proj", "output_gate")


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's softmax attention.

    Attributes:
        layer: Index of its decoder layer, 0 for the first.
        module: The module that calls transformers' attention interface.
        output_projection: What reads the concatenated heads.
        gates: Its gates, at most one per site.
    """

    layer: int
    module: nn.Module
    output_projection: nn.Module
    gates: tuple["Gate", ...]


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate as a family stores it.

    Attributes:
        spec: What it does to which tensor.
        module: Its output carries the gate logits.
        logits: Takes that output to logits, (B, T, heads, channels); one row stands for all where nothing is read.
    """

    spec: GateSpec
    module: nn.Module
    logits: Callable[[Tensor], Tensor]

    @property
    def site(self) -> Site:
        """Which tensor is gated."""
        return self.spec.site


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, first layer first.

    Raises:
        ValueError: if the model keeps them nowhere that is known.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name in _LAYER_LISTS:
        if isinstance(layers := getattr(decoder, name, None), nn.ModuleList):
            return list(layers)
    raise ValueError(f"{type(model).__name__} keeps no list of decoder layers; give a decoder-only causal model")


def find_attention(model: PreTrainedModel) -> list[Attention]:
    """The softmax attention of every layer that has one.

    Raises:
        ValueError: if there is none, or what projects its output is under no known name.
    """
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        module = _child(layer, _ATTENTION)
        if module is None:
            continue  # another token mixer, e.g. linear attention
        projection = _child(module, _OUTPUT_PROJECTIONS)
        if projection is None:
            raise ValueError(
                f"{type(module).__name__} of {type(model).__name__} projects its output under none of "
                f"{', '.join(_OUTPUT_PROJECTIONS)}; this architecture is not supported"
            )
        found.append(Attention(index, module, projection, _gates(module, model.config.model_type)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with attention under {', '.join(_ATTENTION)}; "
            "this architecture is not supported"
        )
    return found


def unknown_gates(model: PreTrainedModel) -> list[str]:
    """Submodules of attention that are named like a gate and that no row of the table covers, by name."""
    names = []
    for attention in find_attention(model):
        known = {id(gate.module) for gate in attention.gates}
        children = attention.module.named_children()
        names += [name for name, child in children if name in _LOOKS_LIKE_A_GATE and id(child) not in known]
    return sorted(set(names))


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


_ELEMENTWISE = GateSpec(dtype="model")

# Family to the submodule with the gate. In Qwen3-Next and its descendants each head's rows of q_proj are
# [query | gate]; AFMoE keeps the gate apart.
_GATES: dict[str, str] = {
    "qwen3_next": "q_proj",
    "qwen3_5_text": "q_proj",
    "qwen3_5_moe_text": "q_proj",
    "afmoe": "gate_proj",
}


def _gates(attention: nn.Module, family: str) -> tuple[Gate, ...]:
    head_dim = int(getattr(attention, "head_dim", 0))
    if isinstance(attention, GatedBlock):
        return tuple(
            Gate(spec, module, partial(by_head, spec=spec, head_dim=head_dim))
            for spec, module in attention.gate_modules()
        )
    own = [module for module in attention.children() if isinstance(module, AttentionGate)]
    if own:
        return tuple(
            Gate(gate.spec, gate, partial(by_head, spec=gate.spec, head_dim=gate.logit_shape[1])) for gate in own
        )
    name = _GATES.get(family, "")
    module = getattr(attention, name, None) if name else None
    if module is None:
        return ()
    if name == "q_proj":
        return (Gate(_ELEMENTWISE, module, lambda x: torch.unflatten(x, -1, (-1, 2 * head_dim))[..., head_dim:]),)
    return (Gate(_ELEMENTWISE, module, _unflatten(head_dim)),)


def _unflatten(channels: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.unflatten(x, -1, (-1, channels))


def value_and_output_maps(
    attention: nn.Module,
) -> tuple[Float[Tensor, "k d c"], Float[Tensor, "h c d"]] | None:
    """W_V of each key/value head and W_O of each query head, biases left out; None where W_V is not one matrix.

    Values that come out of a low-rank chain of projections (multi-head latent attention) or mix several (switch heads)
    have none.
    """
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if head_dim is None:
        return None
    output_rows = _rows(_child(attention, _OUTPUT_PROJECTIONS))  # (C, H * D)
    out = torch.unflatten(output_rows, 1, (-1, int(head_dim))).transpose(0, 1)  # (H, C, D)
    if isinstance(attention, GatedBlock) and attention.switch is not None:
        return None
    if (value := getattr(attention, "v_proj", None)) is not None:
        rows = _rows(value)
    elif (fused := getattr(attention, "query_key_value", None)) is not None:  # per head [query | key | value]
        return torch.unflatten(_rows(fused), 0, (-1, 3, int(head_dim)))[:, 2], out
    elif (fused := getattr(attention, "c_attn", None)) is not None:  # [queries | keys | values]
        rows = _rows(fused).chunk(3)[2]
    elif (fused := getattr(attention, "qkv_proj", None)) is not None:  # [queries | keys | values]
        num_kv_rows = (_rows(fused).shape[0] - output_rows.shape[1]) // 2
        rows = _rows(fused)[-num_kv_rows:]
    else:
        return None
    return torch.unflatten(rows, 0, (-1, int(head_dim))), out


def _rows(projection: nn.Module | None) -> Tensor:
    """A projection's weight with a row for each output channel."""
    weight = projection.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
