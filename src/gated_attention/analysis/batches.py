"""What a model reads at once: token ids, or images or sound by the names of the model's inputs."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from gated_attention.analysis.encoders import PositionKind

NOTHING = "there is no text to measure on; give at least one block"
"""What is wrong without a batch."""


class TextBatch(NamedTuple):
    """Token ids of some sequences.

    Attributes:
        at_start: Which of them begin at a document's start; None if unknown.
        kinds: What each position is, in every sequence; empty if all are tokens of the text.
    """

    ids: Int[Tensor, "b t"]
    at_start: Bool[Tensor, " b"] | None = None
    kinds: tuple[PositionKind, ...] = ()

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The model's inputs."""
        return {"input_ids": self.ids}


class InputBatch(NamedTuple):
    """Inputs that are no text, by the names of the model's arguments: `pixel_values` or `input_features`, (B, ...)."""

    inputs: Mapping[str, Tensor]
