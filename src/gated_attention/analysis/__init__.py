"""Measures of a model's attention, hidden states and gates."""

from gated_attention.analysis.batches import InputBatch, TextBatch
from gated_attention.analysis.definitions import GATE_MEASURES, MEASURES, Definition
from gated_attention.analysis.experts import ExpertLoad, expert_load
from gated_attention.analysis.inspect import Inspection, inspect_model

__all__ = [
    "GATE_MEASURES",
    "MEASURES",
    "Definition",
    "ExpertLoad",
    "InputBatch",
    "Inspection",
    "TextBatch",
    "expert_load",
    "inspect_model",
]
