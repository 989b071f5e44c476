"""Gated softmax attention: a library, and the experiments that test its claims.

The names below load on first use; importing the package imports neither torch nor transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gated_attention.moved import MovedModules
from gated_attention.spec import GateSpec

if TYPE_CHECKING:
    from gated_attention.models import (
        GatedQwen3Config,
        GatedQwen3ForCausalLM,
        GatedQwen3Model,
        GatedQwen3MoeConfig,
        GatedQwen3MoeForCausalLM,
        GatedQwen3MoeModel,
        add_gates,
        gated,
        remove_gates,
    )
    from gated_attention.nn import AttentionGate, GatedAttention

__all__ = [
    "AttentionGate",
    "GateSpec",
    "GatedAttention",
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedQwen3Model",
    "GatedQwen3MoeConfig",
    "GatedQwen3MoeForCausalLM",
    "GatedQwen3MoeModel",
    "add_gates",
    "gated",
    "remove_gates",
]

_MODULES = ("AttentionGate", "GatedAttention")


sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gated_attention' has no attribute {name!r}")
    home = "gated_attention.nn" if name in _MODULES else "gated_attention.models"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
