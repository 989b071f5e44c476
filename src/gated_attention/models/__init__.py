"""Hugging Face models with gated attention, registered with the Auto classes on import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gated_attention.models.configuration_gated_qwen3 import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.families.add_gates import add_gates, gated, remove_gates
from gated_attention.models.families.configuration import make_types_known
from gated_attention.models.modeling_gated_qwen3 import (
    GatedQwen3ForCausalLM,
    GatedQwen3ForQuestionAnswering,
    GatedQwen3ForSequenceClassification,
    GatedQwen3ForTokenClassification,
    GatedQwen3Model,
)
from gated_attention.models.modeling_gated_qwen3_moe import (
    GatedQwen3MoeForCausalLM,
    GatedQwen3MoeForQuestionAnswering,
    GatedQwen3MoeForSequenceClassification,
    GatedQwen3MoeForTokenClassification,
    GatedQwen3MoeModel,
)
from gated_attention.models.modeling_register_vit import (
    RegisterViTConfig,
    RegisterViTForImageClassification,
    RegisterViTModel,
)

__all__ = [
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedQwen3ForQuestionAnswering",
    "GatedQwen3ForSequenceClassification",
    "GatedQwen3ForTokenClassification",
    "GatedQwen3Model",
    "GatedQwen3MoeConfig",
    "GatedQwen3MoeForCausalLM",
    "GatedQwen3MoeForQuestionAnswering",
    "GatedQwen3MoeForSequenceClassification",
    "GatedQwen3MoeForTokenClassification",
    "GatedQwen3MoeModel",
    "RegisterViTConfig",
    "RegisterViTForImageClassification",
    "RegisterViTModel",
    "add_gates",
    "gated",
    "remove_gates",
]

AutoConfig.register(GatedQwen3Config.model_type, GatedQwen3Config)
AutoConfig.register(GatedQwen3MoeConfig.model_type, GatedQwen3MoeConfig)
for _auto, _dense, _moe in (
    (AutoModel, GatedQwen3Model, GatedQwen3MoeModel),
    (AutoModelForCausalLM, GatedQwen3ForCausalLM, GatedQwen3MoeForCausalLM),
    (
        AutoModelForSequenceClassification,
        GatedQwen3ForSequenceClassification,
        GatedQwen3MoeForSequenceClassification,
    ),
    (AutoModelForTokenClassification, GatedQwen3ForTokenClassification, GatedQwen3MoeForTokenClassification),
    (AutoModelForQuestionAnswering, GatedQwen3ForQuestionAnswering, GatedQwen3MoeForQuestionAnswering),
):
    _auto.register(GatedQwen3Config, _dense)
    _auto.register(GatedQwen3MoeConfig, _moe)
AutoConfig.register(RegisterViTConfig.model_type, RegisterViTConfig)
AutoModel.register(RegisterViTConfig, RegisterViTModel)
AutoModelForImageClassification.register(RegisterViTConfig, RegisterViTForImageClassification)
make_types_known()
