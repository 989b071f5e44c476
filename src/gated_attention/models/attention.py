"""What gated Qwen3 models share, dense or mixture-of-experts: the attention's forward pass and the gates' start."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, eager_attention_forward

from gated_attention.models.configuration_gated_qwen3 import GatedConfig
from gated_attention.models.implementations import FUSED_ATTENTION, lse_attention
from gated_attention.models.parent import take_cache, update_cache
from gated_attention.nn import GatedBlock
from gated_attention.nn.gate import initialise_gate
from gated_attention.spec import GateSpec


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
        self.add_block(config.block, config.geometry, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        only_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Qwen3Attention.forward`; gated keys and values are what the cache stores.

        Args:
            cache: Also taken as `past_key_values`, its name before transformers 5.24.
            only_causal: That the mask, if there is one, is causal and nothing else; see `causal.forward_of`.
            kwargs: For the attention function; ours refuse what they do not know.
        """
        x = hidden_states
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.gate("query", self.q_proj(x).view(heads), x)  # G4, (B, T, H, D)
        k, v, logits = self.keys_and_values(x, self.head_dim)  # (B, T, K, D), (B, T, H, 1) or None
        k = self.gate("key", k, x)  # G3
        v = self.gate("value", v, x)  # G2
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if (cache := take_cache(kwargs, cache)) is not None:
            k, v = update_cache(cache, k, v, self.layer_idx, kwargs)
        implementation = self.config._attn_implementation
        if only_causal and self.sliding_window is None and implementation in (FUSED_ATTENTION, "sdpa"):
            attention_mask = None
        elif implementation == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=q.dtype).masked_fill(
                ~attention_mask, torch.finfo(q.dtype).min
            )  # transformers would add its ones
        fused = self._fused_gate(implementation)
        if fused is not None:
            logits = self.gate_logits(fused, x, self.head_dim) if logits is None else logits
            kwargs["gate_logits"] = logits  # (B, T, H, D or 1)
        # vLLM's Transformers backend serves a forward pass whose source looks the function up and calls it once.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if self.reads_lse:
            attend = lse_attention(implementation)
        y, weights, *lse = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        y = y.reshape(heads)  # (B, T, H, D); other engines return heads side by side
        if fused is None:
            y = self.transform_heads(y)
            y = self.gate("sdpa", y, x, lse=lse[0] if lse else None, logits=logits)  # G1
        y = self.o_proj(y.reshape(*x.shape[:-1], -1))
        return self.gate("output", y, x), weights  # G5

    def _fused_gate(self, implementation: str) -> GateSpec | None:
        """The gate that the attention implementation applies by itself; with transformers' own none."""
        if implementation != FUSED_ATTENTION or not any(spec.site == "sdpa" for spec in self.gates):
            return None
        if self.fused_gate is None:
            raise ValueError(
                f"attention implementation {FUSED_ATTENTION!r} forms a plain sigmoid gate with the attention; "
                f"this block has {self.config.block.describe()}: use 'sdpa'"
            )
        return self.fused_gate


class GateInitialisation:
    """Starts gates as their specs say; put before the transformers class that starts everything else."""

    config: GatedConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters: for the gate, never for its attention.
        # While it loads a checkpoint it guards torch.nn.init, so that parameters already read are left alone.
        if not initialise_gate(module, self.config.initializer_range):
            super()._init_weights(module)  # type: ignore[misc]
