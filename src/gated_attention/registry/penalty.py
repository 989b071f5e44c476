"""Pressure on gates to close, as data. Imports no torch, so that the registry of variants can carry it."""

from dataclasses import dataclass
from math import isfinite

TARGET_BAND = 0.02
"""Excess over the target open share from which a penalty presses with its whole weight."""


@dataclass(frozen=True, slots=True)
class GatePenalty:
    """A loss `pressure * mean score` over all hard-sigmoid gates of a model: tokens, heads, channels and layers alike.

    A hard sigmoid is exactly 0 on its closed side, and what lies behind a closed gate need not be computed.
    The open share is the share of scores above 0.

    Attributes:
        weight: The pressure; at most that with a target.
        target: Open share at which the pressure ends; None presses all the time. The share of exact zeros
            has no gradient, so the pressure follows the share instead: `weight` while the pass's open share
            exceeds the target by `TARGET_BAND` or more, from there down to 0 at the target in proportion.
            Training settles where pressure and cross-entropy balance, within that band if `weight` suffices.
            The target is a ceiling: gates that close without being pressed are not opened again.

    Raises:
        ValueError: if a value is out of range.
    """

    weight: float
    target: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"gate penalty weight is {self.weight}; it must be positive and finite")
        if self.target is not None and not 0 <= self.target < 1:
            raise ValueError(
                f"gate penalty target is {self.target}; it must be an open share from 0 to below 1, or None"
            )

    def describe(self) -> str:
        """The penalty in words."""
        if self.target is None:
            return f"gate penalty {self.weight:g}"
        return f"gate penalty up to {self.weight:g}, open share {self.target:g}"
