"""What reports read of a record: the types of its settings and the forms of its arrays."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from gated_attention.typed import open_dict

_Count = Annotated[int, Field(ge=1)]
_VARIANT = open_dict("Variant", name=str, description=str, cites=list[str])
_DATA = open_dict(
    "Data", source=str, validation=str | None, text_field=str, tokenizer=str, block_size=_Count, bos=bool, packing=str
)
_TRAIN = open_dict(
    "Train", steps=_Count, batch_size=_Count, accumulation=_Count, learning_rate=float, weight_decay=float,
    precision=str, compile=bool,
)  # fmt: skip
_SETTINGS = open_dict(
    "Settings", variant=_VARIANT, task=str, architecture=str, size=dict[str, Any], parameters=dict[str, int],
    data=_DATA, train=_TRAIN, model=dict[str, Any], text=dict[str, int], images=dict[str, int], start=str | None,
    rope_theta=float | None, study_learning_rate=float,
)  # fmt: skip

Stored = open_dict("Stored", schema=Any, config=_SETTINGS)
"""The part of `result.json` and `config.json` that is checked first, whatever their schema: settings vary between
versions, and those that are there must be right."""

_DIMENSIONS = {"attention_maps": 3, "attention_layers": 1, "gate_histogram_": 2, "gate_edges_": 1, "expert_load": 2}
"""Number of dimensions of arrays, by the prefix of their names."""


def find_fault(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The first array of a wrong form, in words; None if all are right."""
    for name, array in arrays.items():
        dimensions = next((count for start, count in _DIMENSIONS.items() if name.startswith(start)), array.ndim)
        if array.dtype.kind not in "fiub" or array.ndim != dimensions:
            return f"{name!r} of shape {array.shape} and type {array.dtype}, not numbers in {dimensions} dimensions"
    if arrays.get("attention_layers", np.zeros(0, int)).dtype.kind not in "iu":
        return "'attention_layers' that are no whole numbers"
    for name, layers in (("attention_maps", "attention_layers"), ("attention_layers", "attention_maps")):
        if name in arrays and (layers not in arrays or len(arrays[name]) != len(arrays[layers])):
            return f"{name!r} without as many {layers!r}"
    for name, counts in arrays.items():
        edges = arrays.get(name.replace("histogram", "edges"))
        if name.startswith("gate_histogram_") and (edges is None or len(edges) != counts.shape[1] + 1):
            return f"{name!r} without its edges"
    return None
