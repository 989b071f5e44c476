"""What the choices of a router say of its balance; one definition for every trainer."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed


def count_experts(chosen: Int[Tensor, "n k"], num_experts: int) -> Int[Tensor, " e"]:
    """How many of the (token, choice) pairs went to each expert, int64."""
    flat = chosen.flatten()
    return flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))


def load_balance_loss(counts: Int[Tensor, "l e"], probabilities: Float[Tensor, "l e"]) -> Float[Tensor, ""]:
    """`E * sum_i f_i p_i` (Switch Transformer, arXiv 2101.03961, eq. 4), averaged over layers.

    `f_i` is the share of (token, choice) pairs sent to expert i. The shares sum to 1 for any k, and the loss of a
    balanced router is 1; transformers' function gives k.

    Args:
        counts: Pairs of the whole batch.
        probabilities: Mean router probability of any part of the batch, as the loss is linear in it.
    """
    shares = counts.to(probabilities.dtype) / counts.sum(-1, keepdim=True)
    return (counts.shape[-1] * (shares * probabilities).sum(-1)).mean()


def describe_load(counts: Float[Tensor, "l e"]) -> dict[str, Any]:
    """Pairs of each expert relative to a balanced router, by layer, and the largest and smallest of all."""
    load = counts / counts.mean(-1, keepdim=True)
    return {
        "expert_load_max": load.max().item(),
        "expert_load_min": load.min().item(),
        "expert_load": [[round(value, 4) for value in layer] for layer in load.tolist()],
    }


def num_ranks() -> int:
    """Processes of the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over the default process group, without a gradient; `x` itself stays as it is."""
    if num_ranks() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x)
    return x
