"""Gated Qwen3-MoE: transformers' Qwen3-MoE with the attention replaced and nothing else.

transformers lets a model choose how its experts run only if it reads `@use_experts_implementation` in
the file of the model's class. The decorated experts are Qwen3-MoE's own, and these words say so for it.
"""

from types import SimpleNamespace

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
)

from gated_attention.models.attention import GatedSelfAttentionMixin, GateInitialisationMixin
from gated_attention.models.configuration_gated_qwen3 import GatedQwen3MoeConfig
from gated_attention.models.decoder import GatedDecoderLayerMixin, forward_of
from gated_attention.models.experts import GatedQwen3MoeSparseMoeBlock
from gated_attention.models.parent import init_with
from gated_attention.models.saved.card import ModelCardMixin


class GatedQwen3MoeAttention(GatedSelfAttentionMixin, Qwen3MoeAttention):  # type: ignore[misc]  # transformers is untyped
    """Qwen3-MoE's attention with gates."""


class GatedQwen3MoeDecoderLayer(GatedDecoderLayerMixin, Qwen3MoeDecoderLayer):  # type: ignore[misc]
    """Qwen3-MoE's decoder layer around gated attention."""

    init_parent = init_with(
        Qwen3MoeDecoderLayer,
        Qwen3MoeAttention=GatedQwen3MoeAttention,
        Qwen3MoeSparseMoeBlock=GatedQwen3MoeSparseMoeBlock,
    )


class GatedQwen3MoePreTrainedModel(ModelCardMixin, GateInitialisationMixin, Qwen3MoePreTrainedModel):  # type: ignore[misc]
    """Initialisation, recording and the model card, shared by the gated mixture-of-experts models."""

    config: GatedQwen3MoeConfig
    _no_split_modules = ["GatedQwen3MoeDecoderLayer"]  # noqa: RUF012  transformers' own idiom
    _can_record_outputs = {  # noqa: RUF012
        **Qwen3MoePreTrainedModel._can_record_outputs,
        "hidden_states": GatedQwen3MoeDecoderLayer,
        "attentions": GatedQwen3MoeAttention,
    }


class GatedQwen3MoeModel(GatedQwen3MoePreTrainedModel, Qwen3MoeModel):  # type: ignore[misc]
    """The decoder without a head."""

    __init__ = init_with(Qwen3MoeModel, Qwen3MoeDecoderLayer=GatedQwen3MoeDecoderLayer)
    forward = forward_of(Qwen3MoeModel)


class GatedQwen3MoeForCausalLM(GatedQwen3MoePreTrainedModel, Qwen3MoeForCausalLM):  # type: ignore[misc]
    """The language model; without gates its logits are `Qwen3MoeForCausalLM`'s exactly."""

    __init__ = init_with(Qwen3MoeForCausalLM, Qwen3MoeModel=GatedQwen3MoeModel)


_DECODER = SimpleNamespace(from_config=GatedQwen3MoeModel._from_config)  # also where the Auto classes do not know it


class GatedQwen3MoeForSequenceClassification(GenericForSequenceClassification, GatedQwen3MoePreTrainedModel):  # type: ignore[misc]
    """The decoder and one score per label, read at the last token that is no padding."""

    __init__ = init_with(GenericForSequenceClassification, AutoModel=_DECODER)


class GatedQwen3MoeForTokenClassification(GenericForTokenClassification, GatedQwen3MoePreTrainedModel):  # type: ignore[misc]
    """The decoder and one score per label at every token."""

    __init__ = init_with(GenericForTokenClassification, AutoModel=_DECODER)


class GatedQwen3MoeForQuestionAnswering(GenericForQuestionAnswering, GatedQwen3MoePreTrainedModel):  # type: ignore[misc]
    """The decoder and the scores of every token as the start and the end of an answer."""

    __init__ = init_with(GenericForQuestionAnswering, AutoModel=_DECODER)


# Without it experts are saved as fused tensors, which no other reader of Qwen3-MoE checkpoints knows. It may be there:
# a folder that carries its own code runs this beside the installed package.
register_checkpoint_conversion_mapping(
    GatedQwen3MoeConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
