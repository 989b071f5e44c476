"""Parts that stock architectures require but that compute nothing: how they are added, recognised and removed."""

from functools import partial

import torch
from transformers import PreTrainedConfig

from gated_attention.models.convert.canonical import EMBEDDING, HEAD, Shape, expected_shapes
from gated_attention.models.convert.storage import Stored, Tensors

_SMALLEST_LINEAR_ATTENTION = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
"""The smallest that llama.cpp computes."""

_EXPERT = ".mlp.experts.0."
_ROUTER = ".mlp.gate.weight"
_SHARED = ".mlp.shared_expert"


def _zeros(shape: Shape, dtype: torch.dtype) -> Stored:
    return Stored(shape, dtype, partial(torch.zeros, shape, dtype=dtype), "new")


def zero_shared_expert(mlp: str, like: Stored) -> Tensors:
    """A shared expert of width 1 that adds nothing.

    Args:
        mlp: Name of the block's feed-forward part, such as `model.layers.0.mlp`.
        like: A weight with the model's dtype, whose last dimension is the hidden size.
    """
    width = like.shape[-1]
    shapes = {
        "shared_expert.gate_proj": (1, width),
        "shared_expert.up_proj": (1, width),
        "shared_expert.down_proj": (width, 1),
        "shared_expert_gate": (1, width),
    }
    return {f"{mlp}.{name}.weight": _zeros(shape, like.dtype) for name, shape in shapes.items()}


def drop_zero_shared_experts(tensors: Tensors) -> Tensors:
    """The tensors without shared experts; a ValueError if one adds something."""
    why = "is a shared expert, which Qwen3-MoE does not have"
    return _drop(tensors, _SHARED, (f"{_SHARED}.down_proj.weight",), why)


def drop_idle_layer(tensors: Tensors, layer: int) -> Tensors:
    """The tensors without those of the last layer, linear attention; a ValueError if that layer adds something."""
    outputs = (".linear_attn.out_proj.weight", ".down_proj.weight")
    why = "is not zero in a layer of linear attention; only full attention can be converted"
    return _drop(tensors, f"model.layers.{layer}.", outputs, why)


def _drop(tensors: Tensors, part: str, outputs: tuple[str, ...], why: str) -> Tensors:
    """The tensors without those of a part, all of whose outputs must be zero."""
    for name, tensor in tensors.items():
        if part in name and name.endswith(outputs) and tensor.load().any():
            raise ValueError(f"tensor {name} of {tensor.origin} {why}")
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def as_one_expert(tensors: Tensors) -> Tensors:
    """A dense model as a mixture of one expert, whose weight in the mixture is 1 for any router logit."""
    mixed: Tensors = {}
    for name, tensor in tensors.items():
        layer, found, projection = name.partition(".mlp.")
        mixed[f"{layer}{_EXPERT}{projection}" if found else name] = tensor
        if found and projection == "up_proj.weight":
            mixed[layer + _ROUTER] = _zeros((1, tensor.shape[-1]), tensor.dtype)
            mixed |= zero_shared_expert(f"{layer}.mlp", tensor)
    return mixed


def from_one_expert(tensors: Tensors) -> Tensors:
    """The inverse of `as_one_expert`, once its shared experts are dropped."""
    return {name.replace(_EXPERT, ".mlp.", 1): tensor for name, tensor in tensors.items() if not name.endswith(_ROUTER)}


def append_idle_layer(stock: PreTrainedConfig, dtype: torch.dtype) -> Tensors:
    """Append a layer of linear attention to the configuration; returns its weights, all zero.

    The layer adds nothing to the residual stream. llama.cpp keeps these models in a hybrid memory, which must have a
    recurrent part.
    """
    stock.num_hidden_layers += 1
    stock.layer_types = [*stock.layer_types, "linear_attention"]
    del stock.full_attention_interval  # no interval describes such a model
    for name, value in _SMALLEST_LINEAR_ATTENTION.items():
        setattr(stock, name, value)
    prefix = f"model.layers.{stock.num_hidden_layers - 1}."
    return {name: _zeros(shape, dtype) for name, shape in expected_shapes(stock).items() if name.startswith(prefix)}


def is_tied(tensors: Tensors) -> bool:
    """Whether the head repeats the embedding."""
    return {HEAD, EMBEDDING} <= tensors.keys() and tensors[HEAD].equals(tensors[EMBEDDING])
