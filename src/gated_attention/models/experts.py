"""Experts that keep to the grouped matrix product when weights are float32 and the arithmetic is bfloat16.

transformers' `grouped_mm` experts multiply in the dtype of the weights. PyTorch's autocast does not
reach its operator (pytorch#174763), and its fast kernels, also those that `torch.compile` may use, take
bfloat16 only with rows of a multiple of 16 bytes. Everything else ends, without a word, in a loop over
experts. The weights are therefore cast, and their width padded, before transformers' experts see them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from gated_attention.models.parent import init_with

ALIGNMENT = 8
"""Multiple of channels to which a bfloat16 row fills whole 16 bytes."""


class GatedQwen3MoeExperts(Qwen3MoeExperts):  # type: ignore[misc]  # transformers is untyped
    """Qwen3-MoE's experts with their weights in autocast's dtype, and padded to whole 16 bytes in bfloat16.

    The cast reads every weight once per pass, 6 bytes a parameter; its gradient is as large. Padding adds
    channels that are zero and stay so.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As Qwen3-MoE's experts: (N, C) hidden states through the (N, k) experts, weighted and added."""
        dtype = product_dtype(hidden_states, self.gate_up_proj)
        padding = -self.down_proj.shape[-1] % ALIGNMENT if dtype == torch.bfloat16 else 0
        if self.gate_up_proj.dtype == dtype and not padding:
            plain: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return plain
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        if padding:
            gate_up = F.pad(gate_up.unflatten(1, (2, -1)), (0, 0, 0, padding)).flatten(1, 2)  # (E, 2 F, C)
            down = F.pad(down, (0, padding))
        # Not through `self`: hooks of those who offload would put the stored weights back and call this again.
        result: Tensor = Qwen3MoeExperts.forward(
            _WithWeights(self, gate_up, down), hidden_states, top_k_index, top_k_weights
        )
        return result


class _WithWeights:
    """Experts as their module describes them, with other weights."""

    def __init__(self, experts: Qwen3MoeExperts, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self._experts, self.gate_up_proj, self.down_proj = experts, gate_up_proj, down_proj

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply these: autocast's where it is on, else the weight's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def routers(model: nn.Module) -> list[Qwen3MoeTopKRouter]:
    """The routers of a model, first layer first; none in a dense one.

    The output of a router is (N, E) logits, (N, k) weights and (N, k) chosen experts.
    """
    return [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]


class GatedQwen3MoeSparseMoeBlock(Qwen3MoeSparseMoeBlock):  # type: ignore[misc]
    """Qwen3-MoE's router and the experts above."""

    __init__ = init_with(Qwen3MoeSparseMoeBlock, Qwen3MoeExperts=GatedQwen3MoeExperts)
