"""Add gates to a model that was trained without one."""

from dataclasses import replace
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

from gated_attention.models.convert.canonical import Checkpoint, Shape, expected_shapes
from gated_attention.models.convert.read import model_dtype
from gated_attention.models.convert.storage import Stored
from gated_attention.nn.gate import GATE_MODULES
from gated_attention.spec import GateSpec, Init

WARNING = (
    "a gate added in plain continued training neither removes a model's sinks nor changes its quality: users report "
    "that 2*sigmoid from zero barely moves and that a random start spikes the loss; gated-attention adapt adds gates "
    "and trains them with penalties on the sink"
)
"""What a caller should know before continuing the training."""


def retrofit(checkpoint: Checkpoint, gates: tuple[GateSpec, ...], init: Init) -> Checkpoint:
    """The model with gates added; `init="zeros"` scales them so that the first forward pass is unchanged.

    Raises:
        ValueError: if the model has gates already, or zero weights cannot leave it unchanged.
    """
    config = checkpoint.config
    if config.gates:
        raise ValueError(
            f"the model has a gate already ({config.gates[0].describe()}); --add-gate is for models without one"
        )
    config.gates = initial_gates(gates, init)
    dtype = model_dtype(checkpoint.tensors)
    std = 0.0 if init == "zeros" else config.initializer_range
    tensors = dict(checkpoint.tensors)
    added = {GATE_MODULES[gate.site]: gate for gate in config.gates}
    for name, shape in expected_shapes(config).items():
        module, kind = name.split(".")[-2:]
        if name not in tensors and module in added:
            bias = added[module].bias
            load = partial(initial_weight, name, shape, dtype, std)
            if kind == "bias" and bias is not None:  # a constant, as in a model that is built
                load = partial(torch.full, shape, bias, dtype=dtype)
            tensors[name] = Stored(shape, dtype, load, "new")
    return replace(checkpoint, tensors=tensors)


def initial_gates(gates: tuple[GateSpec, ...], init: Init) -> tuple[GateSpec, ...]:
    """The gates as they are added: neutral for `zeros`.

    Raises:
        ValueError: if a gate with zero weights changes the model.
    """
    return tuple(gate.neutral() if init == "zeros" else replace(gate, init="normal") for gate in gates)


def initial_weight(name: str, shape: Shape, dtype: torch.dtype, std: float) -> Tensor:
    """An added gate's weight, which depends on its name and on no other weight; zeros for `std=0`."""
    if std == 0.0:
        return torch.zeros(shape, dtype=dtype)  # a product with 0 would have negative zeros
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * std).to(dtype)
