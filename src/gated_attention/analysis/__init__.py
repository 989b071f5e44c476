"""What attention, hidden states and gates of a model do."""

from gated_attention.analysis.measures import Inspection, inspect_model

__all__ = ["Inspection", "inspect_model"]
