"""Gated Qwen3-MoE: transformers' Qwen3-MoE with the attention replaced and nothing else.

transformers lets a model choose how its experts run only if it reads `@use_experts_implementation` in
the file of the model's class. The decorated experts are Qwen3-MoE's own, and these words say so for it.
"""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from gated_attention.models.attention import GatedSelfAttention, GateInitialisation, OnlyCausal
from gated_attention.models.card import CardedModel
from gated_attention.models.configuration import GatedQwen3MoeConfig
from gated_attention.models.experts import GatedQwen3MoeSparseMoeBlock
from gated_attention.models.layer import GatedLayer


class GatedQwen3MoeAttention(GatedSelfAttention, Qwen3MoeAttention):  # type: ignore[misc]  # transformers is untyped
    """Qwen3-MoE's attention with gates."""


class GatedQwen3MoeDecoderLayer(GatedLayer, Qwen3MoeDecoderLayer):  # type: ignore[misc]
    """Qwen3-MoE's decoder layer around gated attention."""

    def __init__(self, config: GatedQwen3MoeConfig, layer_idx: int) -> None:
        super(Qwen3MoeDecoderLayer, self).__init__()  # past Qwen3MoeDecoderLayer, which would build ungated attention
        self.hidden_size = config.hidden_size
        self.self_attn = GatedQwen3MoeAttention(config, layer_idx)
        is_sparse = config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
        if is_sparse and layer_idx not in config.mlp_only_layers:
            self.mlp = GatedQwen3MoeSparseMoeBlock(config)
        else:
            self.mlp = Qwen3MoeMLP(config, intermediate_size=config.intermediate_size)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.add_residual_control(config, Qwen3MoeRMSNorm)


class GatedQwen3MoePreTrainedModel(CardedModel, GateInitialisation, Qwen3MoePreTrainedModel):  # type: ignore[misc]
    """Initialisation, recording and the model card, shared by the gated mixture-of-experts models."""

    config: GatedQwen3MoeConfig
    _no_split_modules = ["GatedQwen3MoeDecoderLayer"]  # noqa: RUF012  transformers' own idiom
    _can_record_outputs = {  # noqa: RUF012
        **Qwen3MoePreTrainedModel._can_record_outputs,
        "hidden_states": GatedQwen3MoeDecoderLayer,
        "attentions": GatedQwen3MoeAttention,
    }


class GatedQwen3MoeModel(OnlyCausal, GatedQwen3MoePreTrainedModel, Qwen3MoeModel):  # type: ignore[misc]
    """The decoder without a head."""

    def __init__(self, config: GatedQwen3MoeConfig) -> None:
        super(Qwen3MoeModel, self).__init__(config)  # past Qwen3MoeModel, which would build ungated layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            GatedQwen3MoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class GatedQwen3MoeForCausalLM(GatedQwen3MoePreTrainedModel, Qwen3MoeForCausalLM):  # type: ignore[misc]
    """The language model; without gates its logits are `Qwen3MoeForCausalLM`'s exactly."""

    def __init__(self, config: GatedQwen3MoeConfig) -> None:
        super(Qwen3MoeForCausalLM, self).__init__(config)  # past Qwen3MoeForCausalLM, which would build Qwen3MoeModel
        self.model = GatedQwen3MoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


# Without it experts are saved as fused tensors, which no other reader of Qwen3-MoE checkpoints knows. It may be there:
# a folder that carries its own code runs this beside the installed package.
register_checkpoint_conversion_mapping(
    GatedQwen3MoeConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
