"""The gate and attention as functions of tensors; `reference` is their slow truth."""

from gated_attention.ops.attention import AttentionBackend, attention, choose_backend
from gated_attention.ops.first_keys import find_first_keys
from gated_attention.ops.gate import GateBackend, choose_gate_backend, gate, gate_scores
from gated_attention.ops.gated_attention import GatedBackend, choose_gated_backend, gated_attention
from gated_attention.ops.skip.op import SkipKernels, choose_skip_kernels

__all__ = [
    "AttentionBackend",
    "GateBackend",
    "GatedBackend",
    "SkipKernels",
    "attention",
    "choose_backend",
    "choose_gate_backend",
    "choose_gated_backend",
    "choose_skip_kernels",
    "find_first_keys",
    "gate",
    "gate_scores",
    "gated_attention",
]
