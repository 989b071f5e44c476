"""Gated softmax attention as a library, and the bench on which its claims are tested.

The names below load on first use; importing the package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gated_attention.spec import GateSpec

if TYPE_CHECKING:
    from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3Model
    from gated_attention.nn import AttentionGate, GatedAttention

__all__ = [
    "AttentionGate",
    "GateSpec",
    "GatedAttention",
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedQwen3Model",
]

_HOMES = {
    "AttentionGate": "gated_attention.nn",
    "GatedAttention": "gated_attention.nn",
    "GatedQwen3Config": "gated_attention.models",
    "GatedQwen3ForCausalLM": "gated_attention.models",
    "GatedQwen3Model": "gated_attention.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gated_attention' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
