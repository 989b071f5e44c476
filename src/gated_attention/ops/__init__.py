"""The gate and attention as functions of tensors; `reference` is the slow truth beside them."""

from gated_attention.ops.attention import AttentionBackend, attention, choose_backend
from gated_attention.ops.gate import GateBackend, choose_gate_backend, gate, gate_scores

__all__ = [
    "AttentionBackend",
    "GateBackend",
    "attention",
    "choose_backend",
    "choose_gate_backend",
    "gate",
    "gate_scores",
]
