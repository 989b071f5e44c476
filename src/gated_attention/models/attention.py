"""The attention of gated Qwen3 models, dense or mixture-of-experts, and how their gates are initialised."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, eager_attention_forward

from gated_attention.models.configuration_gated_qwen3 import GatedConfigMixin
from gated_attention.models.implementations import OWN_ATTENTION, SKIP_ATTENTION, lse_attention
from gated_attention.models.parent import take_cache, update_cache
from gated_attention.nn import GatedBlock
from gated_attention.nn.gate import initialise_gate
from gated_attention.spec import GateSpec


class GatedSelfAttentionMixin(GatedBlock):
    """The forward pass of Qwen3's attention, dense or mixture-of-experts, with a gate at any of the five sites."""

    config: GatedConfigMixin
    layer_idx: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None

    def __init__(self, config: GatedConfigMixin, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # of the transformers attention behind this class
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
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
            only_causal: Whether the mask, if there is one, is causal and nothing else; see `decoder.forward_of`.
            kwargs: For the attention function; ours refuse what they do not know.
        """
        x = hidden_states
        q, k, v, logits = self.project_heads(x)  # (B, T, H or K, D); (B, T, H, 1) or None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if (cache := take_cache(kwargs, cache)) is not None:
            k, v = update_cache(cache, k, v, self.layer_idx, kwargs)
        implementation = self.config._attn_implementation
        if only_causal and self.sliding_window is None and implementation in (*OWN_ATTENTION, "sdpa"):
            attention_mask = None
        elif implementation == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=q.dtype).masked_fill(
                ~attention_mask, torch.finfo(q.dtype).min
            )  # transformers would add its ones
        fused = self._fused_gate(implementation)
        if fused is not None:
            logits = self.gate_logits(fused, x) if logits is None else logits
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
        y = y.reshape(*x.shape[:-1], -1, self.head_dim)  # (B, T, H, D); other engines return heads side by side
        if fused is None:
            y = self.gate_heads(y, x, lse[0] if lse else None, logits)
        return self.project_output(y, x), weights

    def _fused_gate(self, implementation: str) -> GateSpec | None:
        """The gate that the attention implementation applies itself; transformers' own apply none."""
        if implementation not in OWN_ATTENTION or not any(spec.site == "sdpa" for spec in self.gates):
            return None
        skips = implementation == SKIP_ATTENTION
        gate = self.skippable_gate if skips else self.fused_gate
        if gate is None:
            does = "skips closed gates, one hard_sigmoid per head" if skips else "computes a plain sigmoid gate"
            raise ValueError(
                f"attention implementation {implementation!r} {does} with the attention; "
                f"this block has {self.config.block.describe()}: use 'sdpa'"
            )
        return gate


def initial_std(config: Any) -> float:
    """The standard deviation of a family's fresh weights; 0.02 where it names none, or one per kind of layer."""
    std = getattr(config.get_text_config(), "initializer_range", None)
    return float(std) if isinstance(std, float) else 0.02


class GateInitialisationMixin:
    """Initialises gates as their specs say; put it before the transformers class that initialises the rest."""

    config: GatedConfigMixin

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters: for the gate, never for its attention.
        # While it loads a checkpoint it guards torch.nn.init, which then leaves loaded parameters alone.
        if not initialise_gate(module, initial_std(self.config)):
            super()._init_weights(module)  # type: ignore[misc]
