"""Where each family of causal language models keeps its layers, its attention and its projections.

Queries, keys and values need no table, because every family passes them to transformers' attention interface; names
and the packing of projections differ. `analysis/gates.py` has the gates.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.analysis.gates import Gate, gated_projection, gates_of, head_width
from gated_attention.nn import AttentionGate, GatedBlock

_LAYER_LISTS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attn", "attention")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOOKS_LIKE_A_GATE = re.compile(r"g_proj|(.*_)?gate(_proj|s)?")


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's softmax attention.

    Attributes:
        layer: Index of its decoder layer.
        module: The module that calls transformers' attention interface.
        output_projection: The module that reads the concatenated heads.
        gates: At most one per site.
    """

    layer: int
    module: nn.Module
    output_projection: nn.Module
    gates: tuple[Gate, ...]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in the order of one pass; a layer that runs again is listed again.

    Raises:
        ValueError: if there is no list of layers under a known name.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    kind, config = type(decoder).__name__, decoder.config
    if kind == "HrmTextModel":
        low, high = list(decoder.L_module.layers), list(decoder.H_module.layers)
        return (low * int(config.L_cycles) + high) * int(config.H_cycles)
    found = _child(decoder, _LAYER_LISTS)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} keeps no list of decoder layers; give a decoder-only causal model")
    layers = list(found)
    if kind == "DoryModel":
        start, times = config.n_input_layers, config.n_recurrent_loops
        end = start + config.n_recurrent_layers
    elif kind == "Inkling2LoopTextModel":
        start, end, times = config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes
    else:
        return layers
    return layers[:start] + layers[start:end] * int(times) + layers[end:]


def find_attention(model: PreTrainedModel) -> list[Attention]:
    """The attention of every layer that has one under a known name.

    Raises:
        ValueError: if there is none, it looks ahead, or its output projection has no known name.
    """
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        module = _child(layer, _ATTENTION)
        if module is None:
            continue  # another token mixer, e.g. linear attention
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"{type(module).__name__} looks ahead; give a decoder-only causal model")
        projection = gated_projection(module) or _child(module, _OUTPUT_PROJECTIONS)
        if projection is None:
            raise ValueError(
                f"{type(module).__name__} of {type(model).__name__} has no output projection called "
                f"{', '.join(_OUTPUT_PROJECTIONS)}; this architecture is not supported"
            )
        found.append(Attention(index, module, projection, gates_of(module)))
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


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def value_and_output_maps(attention: nn.Module) -> tuple[Float[Tensor, "k d c"], Float[Tensor, "h c d"]] | None:
    """W_V of each key/value head and W_O of each query head, without biases; None if W_V is not one matrix.

    It is none where values come out of a low-rank chain of projections (multi-head latent attention) or mix several
    projections (switch heads).
    """
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    projection = _child(attention, _OUTPUT_PROJECTIONS)
    if head_dim is None or head_width(attention) not in (0, head_dim) or not hasattr(projection, "weight"):
        return None
    if isinstance(attention, GatedBlock) and attention.switch is not None:
        return None
    output_rows = _rows(projection)  # (C, H * D)
    out = torch.unflatten(output_rows, 1, (-1, int(head_dim))).transpose(0, 1)  # (H, C, D)
    if (value := getattr(attention, "v_proj", None)) is not None:
        rows = _rows(value)
    elif (fused := getattr(attention, "query_key_value", None)) is not None:  # per head [query | key | value]
        return torch.unflatten(_rows(fused), 0, (-1, 3, int(head_dim)))[:, 2], out
    elif (fused := getattr(attention, "c_attn", None)) is not None:  # [queries | keys | values]
        rows = _rows(fused).chunk(3)[2]
    elif (fused := getattr(attention, "qkv_proj", None)) is not None:  # [queries | keys | values]
        rows = _rows(fused)[output_rows.shape[1] :].chunk(2)[1]
    else:
        return None
    return torch.unflatten(rows, 0, (-1, int(head_dim))), out


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
