"""Training past one GPU on OLMo-core, an optional extra: `pip install 'gated-attention[engine]'`.

The names below load on first use, and OLMo-core with them; a run's file is read and planned without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gated_attention.engine.checkpoints import GuardedCheckpointerConfig, export_checkpoint
    from gated_attention.engine.config import engine_config, undecayed, variant_config
    from gated_attention.engine.convert import load_weights
    from gated_attention.engine.mixer import GatedSelfAttention, GatedSelfAttentionConfig
    from gated_attention.engine.train_module import BalancedTrainModule

__all__ = [
    "BalancedTrainModule",
    "GatedSelfAttention",
    "GatedSelfAttentionConfig",
    "GuardedCheckpointerConfig",
    "engine_config",
    "export_checkpoint",
    "load_weights",
    "undecayed",
    "variant_config",
]

_HOMES = {
    "BalancedTrainModule": "train_module",
    "GatedSelfAttention": "mixer",
    "GatedSelfAttentionConfig": "mixer",
    "GuardedCheckpointerConfig": "checkpoints",
    "engine_config": "config",
    "export_checkpoint": "checkpoints",
    "load_weights": "convert",
    "undecayed": "config",
    "variant_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gated_attention.engine' has no attribute {name!r}")
    return getattr(import_module(f"gated_attention.engine.{_HOMES[name]}"), name)
