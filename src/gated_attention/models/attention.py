"""What gated Qwen3 models share, dense or mixture-of-experts: the attention's forward pass and the gates' start."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, eager_attention_forward

from gated_attention.models.configuration import GatedConfig
from gated_attention.nn import AttentionGate, GatedBlock


class GatedSelfAttention(GatedBlock):
    """The forward pass of Qwen3's attention, dense or mixture-of-experts, with a gate at any of the five sites."""

    config: GatedConfig
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, config: GatedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # of the transformers attention behind this class
        self.add_gates(config.gates, config.geometry)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Qwen3Attention.forward`; gated keys and values are what the cache stores."""
        x = hidden_states
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.gate("query", self.q_proj(x).view(heads), x)  # G4, (B, T, H, D)
        k = self.gate("key", self.k_proj(x).view(heads), x)  # G3
        v = self.gate("value", self.v_proj(x).view(heads), x)  # G2
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, attention_weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # (B, T, H, D)
        y = self.gate("sdpa", y, x)  # G1
        y = self.o_proj(y.reshape(*x.shape[:-1], -1))
        return self.gate("output", y, x), attention_weights  # G5


class GateInitialisation:
    """Starts gates as their specs say; put before the transformers class that starts everything else."""

    config: GatedConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters: for the gate, never for its attention.
        # While it loads a checkpoint it guards torch.nn.init, so that parameters already read are left alone.
        if isinstance(module, AttentionGate):
            module.reset_parameters(std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[misc]
