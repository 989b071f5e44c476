"""Exact conversion between the engine's weights and those of gated Qwen3 models, a tensor at a time."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from olmo_core.distributed.utils import distribute_like, get_local_tensor
from olmo_core.nn.moe import MoEBase
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from gated_attention.models.convert.storage import open_checkpoint

_OUTSIDE = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_INSIDE = {
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "post_attention_norm": "attention_output_layernorm",
    "post_feed_forward_norm": "feedforward_output_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward_moe.router": "mlp.gate",
}
"""Modules of a block, the longest name first where one begins with another."""
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def stored_names(name: str, num_experts: int) -> list[str]:
    """The tensors of a saved gated Qwen3 that an engine's weight holds: one, or one per expert.

    Raises:
        ValueError: if no weight of the engine has this name.
    """
    name = name.replace(_CHECKPOINT_PREFIX, "")  # of blocks that are computed again in the backward pass
    if name in _OUTSIDE:
        return [_OUTSIDE[name]]
    if found := _BLOCK.fullmatch(name):
        layer, rest = f"model.layers.{found[1]}", found[2]
        module, _, part = rest.rpartition(".")
        if module == "feed_forward_moe.experts.mlp":
            return [f"{layer}.mlp.experts.{i}.{_EXPERTS[part]}.weight" for i in range(num_experts)]
        for theirs in (module, rest.partition(".")[0]):
            if theirs in _INSIDE:
                return [f"{layer}.{_INSIDE[theirs]}{rest.removeprefix(theirs)}"]
    raise ValueError(f"{name} is no weight of a gated model on the engine")


def join(name: str, parts: list[Tensor]) -> Tensor:
    """An engine's weight from the tensors that `stored_names` lists."""
    if len(parts) > 1 or ".experts." in name:
        return torch.cat([part.T if name.endswith(".w2") else part for part in parts])  # (E F, C)
    return parts[0].flatten() if name.endswith(".router.weight") else parts[0]


def split(name: str, weight: Tensor, num_experts: int) -> list[Tensor]:
    """The tensors that `stored_names` lists, from an engine's weight."""
    if ".experts." in name:
        return [part.T if name.endswith(".w2") else part for part in weight.chunk(num_experts)]
    return [weight.view(num_experts, -1) if name.endswith(".router.weight") else weight]


def to_hugging_face(weights: Mapping[str, Tensor], num_experts: int = 0) -> dict[str, Tensor]:
    """The tensors of a saved gated Qwen3 from an engine's weights; tied ones twice."""
    return {
        stored: part
        for name, weight in weights.items()
        for stored, part in zip(stored_names(name, num_experts), split(name, weight, num_experts), strict=True)
    }


def num_experts_of(model: nn.Module) -> int:
    """Experts per block of a model of the engine; 0 in a dense one."""
    return next((module.num_experts for module in model.modules() if isinstance(module, MoEBase)), 0)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model of the engine, sharded or not, from a folder that a gated Qwen3 was saved to, tensor by tensor.

    Raises:
        ValueError: if a tensor is missing, left over, damaged or of another shape.
    """
    stored, num_experts = open_checkpoint(folder), num_experts_of(model)
    left = set(stored)
    for name, parameter in model.named_parameters():
        names = stored_names(name, num_experts)
        if missing := [part for part in names if part not in stored]:
            raise ValueError(f"{folder} lacks tensor {missing[0]}; give a folder saved from the same configuration")
        left -= set(names)
        weight = join(name, [stored[part].load() for part in names])
        if weight.shape != parameter.shape:
            expected, found = list(parameter.shape), list(weight.shape)
            raise ValueError(f"tensor {names[0]} of {folder} has shape {found}; the model's is {expected}")
        weight = weight.to(device=parameter.device, dtype=parameter.dtype)
        get_local_tensor(parameter).copy_(get_local_tensor(distribute_like(parameter, weight)))
    if left:
        raise ValueError(f"the model has no place for tensor {min(left)} of {folder}; give its own configuration")
