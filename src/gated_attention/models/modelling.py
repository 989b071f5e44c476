"""Gated Qwen3: transformers' Qwen3 with the attention replaced and nothing else."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from gated_attention.models.configuration import GatedQwen3Config
from gated_attention.nn import AttentionGate, GatedBlock


class GatedQwen3Attention(Qwen3Attention, GatedBlock):  # type: ignore[misc]  # transformers is untyped
    """Qwen3's attention with a gate at any of the five sites."""

    config: GatedQwen3Config
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Qwen3RMSNorm
    k_norm: Qwen3RMSNorm

    def __init__(self, config: GatedQwen3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
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


class GatedQwen3DecoderLayer(Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3's decoder layer around gated attention."""

    def __init__(self, config: GatedQwen3Config, layer_idx: int) -> None:
        super(Qwen3DecoderLayer, self).__init__()  # past Qwen3DecoderLayer, which would build ungated attention
        self.hidden_size = config.hidden_size
        self.self_attn = GatedQwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class GatedQwen3PreTrainedModel(Qwen3PreTrainedModel):  # type: ignore[misc]
    """Initialisation and recording shared by the gated models."""

    config: GatedQwen3Config
    _no_split_modules = ["GatedQwen3DecoderLayer"]  # noqa: RUF012  transformers' own idiom
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GatedQwen3DecoderLayer,
        "attentions": GatedQwen3Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own parameters: for the gate, never for its attention.
        # While it loads a checkpoint it guards torch.nn.init, so that parameters already read are left alone.
        if isinstance(module, AttentionGate):
            module.reset_parameters(std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class GatedQwen3Model(GatedQwen3PreTrainedModel, Qwen3Model):  # type: ignore[misc]
    """The decoder without a head."""

    def __init__(self, config: GatedQwen3Config) -> None:
        super(Qwen3Model, self).__init__(config)  # past Qwen3Model, which would build ungated layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GatedQwen3DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()


class GatedQwen3ForCausalLM(GatedQwen3PreTrainedModel, Qwen3ForCausalLM):  # type: ignore[misc]
    """The language model; without gates its logits are `Qwen3ForCausalLM`'s exactly."""

    def __init__(self, config: GatedQwen3Config) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # past Qwen3ForCausalLM, which would build Qwen3Model
        self.model = GatedQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
