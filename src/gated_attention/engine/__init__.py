"""Training past one GPU on OLMo-core, an optional extra: `pip install 'gated-attention[engine]'`."""

from gated_attention.engine.checkpoints import GuardedCheckpointerConfig, export_checkpoint
from gated_attention.engine.config import engine_config, undecayed, variant_config
from gated_attention.engine.convert import load_weights
from gated_attention.engine.mixer import GatedSelfAttention, GatedSelfAttentionConfig

__all__ = [
    "GatedSelfAttention",
    "GatedSelfAttentionConfig",
    "GuardedCheckpointerConfig",
    "engine_config",
    "export_checkpoint",
    "load_weights",
    "undecayed",
    "variant_config",
]
