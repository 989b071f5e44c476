"""The gate and gated attention as PyTorch modules."""

from gated_attention.nn.attention import GatedAttention
from gated_attention.nn.block import GatedBlock
from gated_attention.nn.gate import AttentionGate

__all__ = ["AttentionGate", "GatedAttention", "GatedBlock"]
