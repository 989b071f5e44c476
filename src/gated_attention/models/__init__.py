"""Hugging Face models with gated attention, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gated_attention.models.configuration import GatedQwen3Config
from gated_attention.models.modelling import GatedQwen3ForCausalLM, GatedQwen3Model

__all__ = ["GatedQwen3Config", "GatedQwen3ForCausalLM", "GatedQwen3Model"]

AutoConfig.register(GatedQwen3Config.model_type, GatedQwen3Config)
AutoModel.register(GatedQwen3Config, GatedQwen3Model)
AutoModelForCausalLM.register(GatedQwen3Config, GatedQwen3ForCausalLM)
