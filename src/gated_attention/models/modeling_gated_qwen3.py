"""Gated Qwen3: transformers' Qwen3 with the attention replaced and nothing else."""

from types import SimpleNamespace

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)

from gated_attention.models.attention import GatedSelfAttentionMixin, GateInitialisationMixin
from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config
from gated_attention.models.decoder import GatedDecoderLayerMixin, forward_of
from gated_attention.models.parent import init_with
from gated_attention.models.saved.card import ModelCardMixin


class GatedQwen3Attention(GatedSelfAttentionMixin, Qwen3Attention):  # type: ignore[misc]  # transformers is untyped
    """Qwen3's attention with gates."""


class GatedQwen3DecoderLayer(GatedDecoderLayerMixin, Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3's decoder layer around gated attention."""

    init_parent = init_with(Qwen3DecoderLayer, Qwen3Attention=GatedQwen3Attention)


class GatedQwen3PreTrainedModel(ModelCardMixin, GateInitialisationMixin, Qwen3PreTrainedModel):  # type: ignore[misc]
    """Initialisation, recording and the model card, shared by the gated models."""

    config: GatedQwen3Config
    _no_split_modules = ["GatedQwen3DecoderLayer"]  # noqa: RUF012  transformers' own idiom
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GatedQwen3DecoderLayer,
        "attentions": GatedQwen3Attention,
    }


class GatedQwen3Model(GatedQwen3PreTrainedModel, Qwen3Model):  # type: ignore[misc]
    """The decoder without a head."""

    __init__ = init_with(Qwen3Model, Qwen3DecoderLayer=GatedQwen3DecoderLayer)
    forward = forward_of(Qwen3Model)


class GatedQwen3ForCausalLM(GatedQwen3PreTrainedModel, Qwen3ForCausalLM):  # type: ignore[misc]
    """The language model; without gates its logits are `Qwen3ForCausalLM`'s exactly."""

    __init__ = init_with(Qwen3ForCausalLM, Qwen3Model=GatedQwen3Model)


_DECODER = SimpleNamespace(from_config=GatedQwen3Model._from_config)  # also where the Auto classes do not know it


class GatedQwen3ForSequenceClassification(GenericForSequenceClassification, GatedQwen3PreTrainedModel):  # type: ignore[misc]
    """The decoder and one score per label, read at the last token that is no padding."""

    __init__ = init_with(GenericForSequenceClassification, AutoModel=_DECODER)


class GatedQwen3ForTokenClassification(GenericForTokenClassification, GatedQwen3PreTrainedModel):  # type: ignore[misc]
    """The decoder and one score per label at every token."""

    __init__ = init_with(GenericForTokenClassification, AutoModel=_DECODER)


class GatedQwen3ForQuestionAnswering(GenericForQuestionAnswering, GatedQwen3PreTrainedModel):  # type: ignore[misc]
    """The decoder and the scores of every token as the start and the end of an answer."""

    __init__ = init_with(GenericForQuestionAnswering, AutoModel=_DECODER)
