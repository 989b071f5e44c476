"""Switch heads: the key or value map of each head as a mixture of maps (Table 6; SwitchHead, arXiv 2312.07987)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gated_attention.ops.sdpa import widen
from gated_attention.spec import AttentionGeometry, SwitchSpec


def switch_router(spec: SwitchSpec, geometry: AttentionGeometry) -> nn.Linear:
    """The projection to one logit per map of every key/value head."""
    return nn.Linear(geometry.hidden_size, geometry.num_kv_heads * spec.num_experts, bias=False)


def switch_scores(logits: Float[Tensor, "b t ke"], spec: SwitchSpec) -> Float[Tensor, "b t k e"]:
    """The sigmoid of each map's logit in float32 or wider, the `top_k` best of every head kept and the others 0.

    Apart from the projection: tensor parallelism knows the layout of what a linear layer returns, not of this.
    """
    logits = torch.unflatten(logits, -1, (-1, spec.num_experts))
    scores = widen(logits).sigmoid()  # (B, T, K, E)
    if spec.top_k == spec.num_experts:
        return scores
    best, which = scores.topk(spec.top_k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, which, best)


def switch_projection(spec: SwitchSpec, geometry: AttentionGeometry, bias: bool = False) -> nn.Linear:
    """All maps of all heads as one projection, rows by head, then map, then channel.

    A plain linear layer, so that adapters, quantisers and servers may put their own in its place.
    """
    rows = geometry.num_kv_heads * spec.num_experts * geometry.head_dim
    return nn.Linear(geometry.hidden_size, rows, bias=bias)


def mix_maps(
    maps: Float[Tensor, "b t ked"], scores: Float[Tensor, "b t k e"], head_dim: int
) -> Float[Tensor, "b t k d"]:
    """The sum of the maps' outputs, each times its score, in the dtype of the maps' outputs.

    Every map is computed and those not picked are multiplied by 0: for the small key and value widths one
    dense product is faster than gathering, and its shape does not depend on the data.
    """
    maps = torch.unflatten(maps, -1, (*scores.shape[-2:], head_dim))  # (B, T, K, E, D)
    return torch.sum(maps * scores[..., None].to(maps.dtype), dim=-2)
