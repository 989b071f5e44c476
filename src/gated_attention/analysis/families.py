"""Where each family of causal language models keeps its layers, its attention and its projections.

Nothing here runs a model. Queries, keys and values need no table, because every family hands them to
transformers' attention interface; what differs is names and how projections are packed. `analysis/gates.py` has
the gates.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.analysis.gates import Gate, gated_projection, gates_of, head_width
from gated_attention.nn import GatedBlock

_LAYER_LISTS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attn", "attention")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOOKS_LIKE_A_GATE = re.compile(r"g_proj|(.*_)?gate(_proj|s)?")


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
    gates: tuple[Gate, ...]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers in the order in which one pass runs them; one that runs again is there again.

    Raises:
        ValueError: if the model keeps them nowhere that is known.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if (runs := _REPEATED.get(type(decoder).__name__)) is not None:
        return runs(decoder)
    for name in _LAYER_LISTS:
        if isinstance(layers := getattr(decoder, name, None), nn.ModuleList):
            return list(layers)
    raise ValueError(f"{type(model).__name__} keeps no list of decoder layers; give a decoder-only causal model")


def _runs_of_hrm(decoder: Any) -> list[nn.Module]:
    low, high = list(decoder.L_module.layers), list(decoder.H_module.layers)
    runs: list[nn.Module] = (low * decoder.config.L_cycles + high) * decoder.config.H_cycles
    return runs


def _runs_of_dory(decoder: Any) -> list[nn.Module]:
    start, loops = decoder.config.n_input_layers, decoder.config.n_recurrent_loops
    return _repeated(list(decoder.layers), start, start + decoder.config.n_recurrent_layers, loops)


def _runs_of_inkling(decoder: Any) -> list[nn.Module]:
    start, end = decoder.config.loop_layer_index_start, decoder.config.loop_layer_index_end
    return _repeated(list(decoder.layers), start, end, decoder.config.loop_num_passes)


def _repeated(layers: list[nn.Module], start: int, end: int, times: int) -> list[nn.Module]:
    return layers[:start] + layers[start:end] * times + layers[end:]


_REPEATED: dict[str, Callable[[Any], list[nn.Module]]] = {
    "HrmTextModel": _runs_of_hrm,
    "DoryModel": _runs_of_dory,
    "Inkling2LoopTextModel": _runs_of_inkling,
}


def find_attention(model: PreTrainedModel) -> list[Attention]:
    """The attention of every layer that has one under a known name.

    Raises:
        ValueError: if there is none, it looks ahead, or what projects its output is under no known name.
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
                f"{type(module).__name__} of {type(model).__name__} projects its output under none of "
                f"{', '.join(_OUTPUT_PROJECTIONS)}; this architecture is not supported"
            )
        found.append(Attention(index, module, projection, gates_of(module)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with attention under {', '.join(_ATTENTION)}; "
            "this architecture is not supported"
        )
    return found


def unmeasured_gates(attention: Sequence[Attention], measured: Iterable[int]) -> dict[str, str]:
    """Submodules of attention that are named like a gate and were not measured, by name, and why.

    Args:
        attention: Of all layers.
        measured: The layers whose softmax attention was seen.
    """
    reasons = {}
    with_softmax = set(measured)
    for one in attention:
        known = {id(gate.module) for gate in one.gates}
        for path, child in one.module.named_modules():
            name = path.rpartition(".")[2]
            if not _LOOKS_LIKE_A_GATE.fullmatch(name) or id(child) in known:
                continue
            kind = type(one.module).__name__
            softmax = one.layer in with_softmax
            reasons[name] = f"the layout of {kind} is not known" if softmax else f"{kind} is not softmax attention"
    return dict(sorted(reasons.items()))


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def value_and_output_maps(
    attention: nn.Module,
) -> tuple[Float[Tensor, "k d c"], Float[Tensor, "h c d"]] | None:
    """W_V of each key/value head and W_O of each query head, biases left out; None where W_V is not one matrix.

    Values that come out of a low-rank chain of projections (multi-head latent attention) or mix several (switch heads)
    have none.
    """
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    projection = _child(attention, _OUTPUT_PROJECTIONS)
    if head_dim is None or head_width(attention) not in (0, head_dim) or not hasattr(projection, "weight"):
        return None
    output_rows = _rows(projection)  # (C, H * D)
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
    """The matrix by which a projection multiplies, with a row for each output channel."""
    assert projection is not None
    weight = getattr(projection, "weight", None)
    if type(projection) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta:
        return weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
    # An adapter adds to the weight, a quantiser packs it, offloading takes it away: ask for the image of every unit.
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in _WEIGHT_DTYPES else torch.float32
    device = None if not isinstance(weight, Tensor) or weight.is_meta else weight.device
    width = cast(int, projection.in_features)
    origin = torch.zeros(1, width, dtype=dtype, device=device)
    images: Tensor = projection(torch.eye(width, dtype=dtype, device=device)) - projection(origin)
    return images.detach().T
