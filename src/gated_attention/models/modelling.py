"""Gated Qwen3: transformers' Qwen3 with the attention replaced and nothing else."""

from torch import nn
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from gated_attention.models.attention import GatedSelfAttention, GateInitialisation, OnlyCausal
from gated_attention.models.card import CardedModel
from gated_attention.models.configuration import GatedQwen3Config
from gated_attention.models.layer import GatedLayer


class GatedQwen3Attention(GatedSelfAttention, Qwen3Attention):  # type: ignore[misc]  # transformers is untyped
    """Qwen3's attention with gates."""


class GatedQwen3DecoderLayer(GatedLayer, Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3's decoder layer around gated attention."""

    def __init__(self, config: GatedQwen3Config, layer_idx: int) -> None:
        super(Qwen3DecoderLayer, self).__init__()  # past Qwen3DecoderLayer, which would build ungated attention
        self.hidden_size = config.hidden_size
        self.self_attn = GatedQwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.add_residual_control(config, Qwen3RMSNorm)


class GatedQwen3PreTrainedModel(CardedModel, GateInitialisation, Qwen3PreTrainedModel):  # type: ignore[misc]
    """Initialisation, recording and the model card, shared by the gated models."""

    config: GatedQwen3Config
    _no_split_modules = ["GatedQwen3DecoderLayer"]  # noqa: RUF012  transformers' own idiom
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GatedQwen3DecoderLayer,
        "attentions": GatedQwen3Attention,
    }


class GatedQwen3Model(OnlyCausal, GatedQwen3PreTrainedModel, Qwen3Model):  # type: ignore[misc]
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
