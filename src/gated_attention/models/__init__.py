"""Hugging Face models with gated attention, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gated_attention.models.configuration import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.modelling import GatedQwen3ForCausalLM, GatedQwen3Model
from gated_attention.models.modelling_moe import GatedQwen3MoeForCausalLM, GatedQwen3MoeModel

__all__ = [
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedQwen3Model",
    "GatedQwen3MoeConfig",
    "GatedQwen3MoeForCausalLM",
    "GatedQwen3MoeModel",
]

for _config, _model, _causal in (
    (GatedQwen3Config, GatedQwen3Model, GatedQwen3ForCausalLM),
    (GatedQwen3MoeConfig, GatedQwen3MoeModel, GatedQwen3MoeForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal)
