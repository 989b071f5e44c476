"""Parts that stock architectures demand and that compute nothing, and how they are recognised on the way back."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gated_attention.models.convert.canonical import split_experts
from gated_attention.models.convert.storage import Stored

Tensors = dict[str, Stored]

IDLE_LAYER = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
"""The smallest linear attention that llama.cpp computes."""

_EXPERT = ".mlp.experts.0."
_ROUTER = ".mlp.gate.weight"
_SHARED = ".mlp.shared_expert"


def zeros(name: str, shape: Iterable[int], dtype: torch.dtype) -> Tensors:
    """A tensor of zeros by its name."""
    shape = tuple(shape)
    return {name: Stored(shape, dtype, partial(torch.zeros, shape, dtype=dtype), "new")}


def zero_shared_expert(mlp: str, like: Stored) -> Tensors:
    """A shared expert of width 1 that adds nothing.

    Args:
        mlp: Name of the block's feed-forward part, such as `model.layers.0.mlp`.
        like: A weight of the model's dtype and, last, its hidden size.
    """
    width, dtype = like.shape[-1], like.dtype
    expert: Tensors = {}
    for projection in ("gate_proj", "up_proj"):
        expert |= zeros(f"{mlp}.shared_expert.{projection}.weight", (1, width), dtype)
    expert |= zeros(f"{mlp}.shared_expert.down_proj.weight", (width, 1), dtype)
    return expert | zeros(f"{mlp}.shared_expert_gate.weight", (1, width), dtype)


def drop_zero_shared_experts(tensors: Tensors) -> Tensors:
    """The tensors without shared experts.

    Raises:
        ValueError: if one adds something.
    """
    for name, tensor in tensors.items():
        if name.endswith(f"{_SHARED}.down_proj.weight") and tensor.load().any():
            raise ValueError(f"tensor {name} of {tensor.origin} is a shared expert, which Qwen3-MoE does not have")
    return {name: tensor for name, tensor in tensors.items() if _SHARED not in name}


def as_one_expert(tensors: Tensors) -> Tensors:
    """A dense model as a mixture of one expert, whose weight in the mixture is 1 whatever the router says."""
    mixed: Tensors = {}
    for name, tensor in tensors.items():
        layer, found, projection = name.partition(".mlp.")
        if not found:
            mixed[name] = tensor
            continue
        mixed[f"{layer}{_EXPERT}{projection}"] = tensor
        if projection == "up_proj.weight":
            mixed |= zeros(f"{layer}{_ROUTER}", (1, tensor.shape[-1]), tensor.dtype)
            mixed |= zero_shared_expert(f"{layer}.mlp", tensor)
    return mixed


def from_one_expert(tensors: Tensors) -> Tensors:
    """The inverse of `as_one_expert`, after its shared experts are dropped."""
    return {name.replace(_EXPERT, ".mlp.", 1): tensor for name, tensor in tensors.items() if not name.endswith(_ROUTER)}


def idle_layer(stock: PreTrainedConfig, dtype: torch.dtype) -> Tensors:
    """Every weight of a configuration's last layer, zero: a block that adds nothing to the residual stream."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock)
    prefix = f"model.layers.{stock.num_hidden_layers - 1}."
    layer: Tensors = {}
    for name, weight in model.state_dict().items():
        for part, shape in split_experts(name, tuple(weight.shape)) if name.startswith(prefix) else ():
            layer |= zeros(part, shape, dtype)
    return layer


def drop_idle_layer(tensors: Tensors, layer: int) -> Tensors:
    """The tensors without those of the last layer, which is linear attention.

    Raises:
        ValueError: if that layer adds something.
    """
    prefix = f"model.layers.{layer}."
    writes = (".linear_attn.out_proj.weight", ".down_proj.weight")
    for name, tensor in tensors.items():
        if name.startswith(prefix) and name.endswith(writes) and tensor.load().any():
            raise ValueError(
                f"tensor {name} of {tensor.origin} is not zero in a layer of linear attention; "
                "only full attention has a place here"
            )
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def head_of_its_own(tensors: Tensors) -> Tensors:
    """The tensors with the embedding repeated as the head, for readers that never tie them."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def is_tied(tensors: Tensors) -> bool:
    """Whether the head repeats the embedding."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    one: Tensor = head.load()
    return torch.equal(one, embedding.load())
