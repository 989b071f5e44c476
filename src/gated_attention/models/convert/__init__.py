"""Checkpoints in and out: the paper's release, Qwen3, Qwen3-Next and Qwen3.5."""

from gated_attention.models.convert.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
