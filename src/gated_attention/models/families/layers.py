"""Where each family of causal language models keeps its decoder layers."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_LAYER_LISTS = ("layers", "h", "blocks")


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
    found = named_child(decoder, _LAYER_LISTS)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} keeps no list of layers under a known name; this architecture is not supported"
        )
    layers = list(found)
    if kind == "DoryModel":
        start, times = config.n_input_layers, config.n_recurrent_loops
        end = start + config.n_recurrent_layers
    elif kind == "Inkling2LoopTextModel":
        start, end, times = config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes
    else:
        return layers
    return layers[:start] + layers[start:end] * int(times) + layers[end:]


def named_child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule that has one of these names."""
    return next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)
