"""What gated Qwen3 models share, dense or mixture-of-experts: the attention's forward pass and the gates' start."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, eager_attention_forward

from gated_attention import ops
from gated_attention.models.configuration import GatedConfig
from gated_attention.nn import AttentionGate, GatedBlock
from gated_attention.nn.gate import LseGate
from gated_attention.ops.attention import AttentionBackend
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
        past_key_values: Cache | None = None,
        only_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Qwen3Attention.forward`; gated keys and values are what the cache stores.

        Args:
            only_causal: That the mask, if there is one, is causal and nothing else; see `OnlyCausal`.
        """
        x = hidden_states
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.gate("query", self.q_proj(x).view(heads), x)  # G4, (B, T, H, D)
        k, v, logits = self.keys_and_values(x, self.head_dim)  # (B, T, K, D), (B, T, H, 1) or None
        k = self.gate("key", k, x)  # G3
        v = self.gate("value", v, x)  # G2
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation
        if only_causal and self.sliding_window is None and implementation in (FUSED_ATTENTION, "sdpa"):
            attention_mask = None
        fused = self._fused_gate(implementation)
        if fused is not None:
            logits = self.gate_logits(fused, x, self.head_dim) if logits is None else logits
            kwargs["gate_logits"] = logits  # (B, T, H, D or 1)
        if self.reads_lse:
            attend = lse_attention(implementation)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        y, weights_or_lse = attend(
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
        if fused is None:
            y = self.transform_heads(y)
            y = self.gate("sdpa", y, x, lse=weights_or_lse, logits=logits)  # G1
        y = self.o_proj(y.reshape(*x.shape[:-1], -1))
        return self.gate("output", y, x), None if self.reads_lse else weights_or_lse  # G5

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


class OnlyCausal:
    """Tells the layers when their mask is the causal one; put before the transformers class of the decoder.

    While it compiles, transformers cannot see that positions it counted itself hold no packed documents, and builds
    a mask. PyTorch's attention would then score what the mask hides, on keys and values repeated for every head.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the decoder's."""
        given = (attention_mask, position_ids, past_key_values)
        return super().forward(  # type: ignore[misc]
            input_ids, *given, only_causal=all(value is None for value in given), **kwargs
        )


FUSED_ATTENTION = "gated_attention"
"""The name under which transformers knows `ops.gated_attention`: `model.set_attn_implementation("gated_attention")`."""


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    gate_logits: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, gated where logits are given."""
    if attention_mask is not None:
        raise ValueError(
            f"attention implementation {FUSED_ATTENTION!r} takes no mask: padding, sliding windows and chunks that "
            "continue a cache need one; use 'sdpa'"
        )
    if dropout:
        raise ValueError(
            f"attention implementation {FUSED_ATTENTION!r} has no dropout, {dropout} was asked for; use 0.0"
        )
    causal = query.shape[2] > 1  # without a mask a single token continues a cache and sees all of it
    if gate_logits is None:
        y, _lse = ops.attention(query, key, value, causal=causal, scale=scaling)
        return y.transpose(1, 2), None
    return ops.gated_attention(query, key, value, gate_logits, causal=causal, scale=scaling), None


AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionMaskInterface.register(FUSED_ATTENTION, sdpa_mask)


def _attend_with_lse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: AttentionBackend,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers calls it, with the log-sum-exp, (B, H, T), where others return weights."""
    if dropout:
        raise ValueError(f"a gate on the log-sum-exp has no attention dropout, {dropout} was asked for; use 0.0")
    mask = attention_mask
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask == 0)[..., : key.shape[-2]]  # eager's masks are biases
    y, lse = ops.attention(query, key, value, causal=mask is None, scale=scaling, mask=mask, backend=backend)
    return y.transpose(1, 2), lse


LSE_ATTENTION: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "eager": partial(_attend_with_lse, backend="eager"),
    "sdpa": partial(_attend_with_lse, backend="sdpa"),
}
"""Attention implementations, by transformers' names, that return the log-sum-exp in the place of the weights."""


def lse_attention(implementation: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation of that name for a block with a gate on the log-sum-exp.

    Raises:
        ValueError: if it returns none.
    """
    if implementation not in LSE_ATTENTION:
        raise ValueError(
            f"attention implementation {implementation!r} returns no log-sum-exp, which a gate reads; "
            f"choose from {', '.join(LSE_ATTENTION)}"
        )
    return LSE_ATTENTION[implementation]


class GateInitialisation:
    """Starts gates as their specs say; put before the transformers class that starts everything else."""

    config: GatedConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters: for the gate, never for its attention.
        # While it loads a checkpoint it guards torch.nn.init, so that parameters already read are left alone.
        if isinstance(module, AttentionGate | LseGate):
            module.reset_parameters(std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[misc]
