"""Where each family of models keeps its layers, its attention and its projections.

Queries, keys and values need no table, because every family passes them to transformers' attention interface; names
and the packing of projections differ. `analysis/gates.py` has the gates.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.analysis.encoders import encoder_layers, encoder_of
from gated_attention.analysis.gates import Gate, gated_projection, gates_of, head_width
from gated_attention.models.families.layers import decoder_layers, named_child
from gated_attention.models.families.layouts import head_dim_of, layout_of
from gated_attention.nn import AttentionGate, GatedBlock

_ATTENTION = ("self_attn", "attn", "attention")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOOKS_LIKE_A_GATE = re.compile(r"g_proj|(.*_)?gate(_proj|s)?")


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's softmax attention.

    Attributes:
        layer: Index of its layer.
        module: The module that calls transformers' attention interface.
        output_projection: The module that reads the concatenated heads.
        gates: At most one per site.
        block: The module that returns what is added to the residual.
    """

    layer: int
    module: nn.Module
    output_projection: nn.Module
    gates: tuple[Gate, ...]
    block: nn.Module


def model_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in the order of one pass; a layer that runs again is listed again.

    Raises:
        ValueError: if there is no list of layers under a known name.
    """
    if (encoder := encoder_of(model)) is not None:
        return [layer for layer, _ in encoder_layers(encoder)]
    return decoder_layers(model)


def find_attention(model: PreTrainedModel) -> list[Attention]:
    """The attention of every layer that has one under a known name.

    Raises:
        ValueError: if there is none, or its output projection has no known name.
    """
    if (encoder := encoder_of(model)) is not None:
        return [
            Attention(
                index,
                one.module,
                one.output_projection,
                gates_of(one.module) + (() if one.sibling is None else gates_of(one.sibling)),
                one.module if one.sibling is None else one.output_projection,
            )
            for index, (_, one) in enumerate(encoder_layers(encoder))
        ]
    found = []
    for index, layer in enumerate(model_layers(model)):
        module = named_child(layer, _ATTENTION)
        if module is None:
            continue  # another token mixer, e.g. linear attention
        projection = gated_projection(module) or named_child(module, _OUTPUT_PROJECTIONS)
        if projection is None:
            raise ValueError(
                f"{type(module).__name__} of {type(model).__name__} has no output projection called "
                f"{', '.join(_OUTPUT_PROJECTIONS)}; this architecture is not supported"
            )
        found.append(Attention(index, module, projection, gates_of(module), module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with attention called {', '.join(_ATTENTION)}; "
            "this architecture is not supported"
        )
    return found


def unmeasured_gates(attention: Sequence[Attention], measured: Container[int]) -> dict[str, str]:
    """Submodules of attention whose name looks like a gate's and that were not measured, with the reason, by name.

    Args:
        attention: Of all layers.
        measured: The layers whose softmax attention was seen.
    """
    reasons = {}
    for one in attention:
        kind, known = type(one.module).__name__, [gate.module for gate in one.gates]
        softmax = one.layer in measured
        for path, child in one.module.named_modules():
            name = path.rpartition(".")[2]
            if not _LOOKS_LIKE_A_GATE.fullmatch(name) or child in known or isinstance(child, AttentionGate):
                continue
            reasons[name] = f"the layout of {kind} is not known" if softmax else f"{kind} is not softmax attention"
    return dict(sorted(reasons.items()))


def value_and_output_maps(one: Attention) -> tuple[Float[Tensor, "k d c"], Float[Tensor, "h c d"]] | None:
    """W_V of each key/value head and W_O of each query head, without biases; None if W_V is not one matrix.

    It is none where values come out of a low-rank chain of projections (multi-head latent attention) or mix several
    projections (switch heads).
    """
    attention, layout = one.module, layout_of(one.module)
    if layout is None or layout.value is None or not hasattr(one.output_projection, "weight"):
        return None
    if isinstance(attention, GatedBlock) and attention.switch is not None:
        return None
    output_rows = _rows(one.output_projection)  # (C, H * D)
    head_dim = head_dim_of(attention, layout, output_rows.shape[1])
    if head_width(attention) not in (0, head_dim):
        return None
    value = getattr(attention, layout.value)
    if not (isinstance(value, Conv1D) or hasattr(value, "in_features")):
        return None  # convolutions over tokens besides
    rows = _rows(value)
    if layout.packing == "blocks":  # [queries | keys | values]
        rows = rows[output_rows.shape[1] :].chunk(2)[1]
    values = torch.unflatten(rows, 0, (-1, head_dim))
    if layout.packing == "heads":  # per head [query | key | value]
        values = values[2::3]
    return values, torch.unflatten(output_rows, 1, (-1, head_dim)).transpose(0, 1)  # (H, C, D)


def _rows(projection: nn.Module | None) -> Tensor:
    """The matrix of a linear projection, with one row per output channel."""
    assert projection is not None
    weight = getattr(projection, "weight", None)
    if type(projection) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta:
        return weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
    # An adapter adds to the weight, a quantiser packs it, offloading removes it: project every unit vector instead.
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in _WEIGHT_DTYPES else torch.float32
    device = None if not isinstance(weight, Tensor) or weight.is_meta else weight.device
    width = cast(int, projection.in_features)
    origin = torch.zeros(1, width, dtype=dtype, device=device)
    images: Tensor = projection(torch.eye(width, dtype=dtype, device=device)) - projection(origin)
    return images.detach().T
