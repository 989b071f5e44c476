"""Switch heads: the key or value map of each head as a mixture of maps (Table 6; SwitchHead, arXiv 2312.07987)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gated_attention.spec import AttentionGeometry, SwitchSpec


class SwitchRouter(nn.Linear):
    """Scores of every head's maps, `sigmoid(X W)`, of which the `top_k` best are kept and the others are 0."""

    def __init__(self, spec: SwitchSpec, geometry: AttentionGeometry) -> None:
        super().__init__(geometry.hidden_size, geometry.num_kv_heads * spec.num_experts, bias=False)
        self.spec = spec

    def forward(self, hidden_states: Float[Tensor, "b t c"]) -> Float[Tensor, "b t k e"]:
        """Scores in float32 or wider."""
        logits = torch.unflatten(super().forward(hidden_states), -1, (-1, self.spec.num_experts))
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()  # (B, T, K, E)
        if self.spec.top_k == self.spec.num_experts:
            return scores
        best, which = scores.topk(self.spec.top_k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, which, best)


class SwitchProjection(nn.Linear):
    """All maps of all heads as one projection, rows by head, then map, then channel.

    Every map is computed and those not picked are multiplied by 0: for the small key and value widths one
    dense product is faster than gathering, and its shape does not depend on the data.
    """

    def __init__(self, spec: SwitchSpec, geometry: AttentionGeometry, bias: bool = False) -> None:
        rows = geometry.num_kv_heads * spec.num_experts * geometry.head_dim
        super().__init__(geometry.hidden_size, rows, bias=bias)
        self.head_dim = geometry.head_dim

    def mix(self, hidden_states: Float[Tensor, "b t c"], scores: Float[Tensor, "b t k e"]) -> Float[Tensor, "b t k d"]:
        """The sum of the maps' outputs, each times its score, in the dtype of the maps' outputs."""
        maps = torch.unflatten(self(hidden_states), -1, (*scores.shape[-2:], self.head_dim))  # (B, T, K, E, D)
        return torch.sum(maps * scores[..., None].to(maps.dtype), dim=-2)
