"""Losses beside the cross-entropy as data: the penalty that closes gates, which a variant can carry, and factors."""

from dataclasses import dataclass

from gated_attention.ranges import require_within

TARGET_BAND = 0.02
"""Excess over the target open share at which a penalty reaches its full weight."""


@dataclass(frozen=True, slots=True)
class GatePenalty:
    """A loss `pressure * mean score` over all hard-sigmoid gates of a model: tokens, heads, channels and layers alike.

    A closed hard sigmoid is exactly 0, so what lies behind it need not be computed. The open share is the share of
    scores above 0.

    Attributes:
        weight: The pressure, or its maximum if there is a target.
        target: Open share at which the pressure ends; None applies it always. The count of exact zeros has no
            gradient, so the pressure follows the open share: it is `weight` while the share of the pass exceeds the
            target by `TARGET_BAND` or more, and falls linearly from there to 0 at the target. Training settles where
            pressure and cross-entropy balance, within that band if `weight` suffices. The target is a ceiling: gates
            that close without pressure are not opened again.

    Raises:
        ValueError: if a value is out of range.
    """

    weight: float
    target: float | None = None

    def __post_init__(self) -> None:
        require_within("gate penalty weight", self.weight, above=0)
        require_within("gate penalty target", self.target, least=0, below=1)

    def describe(self) -> str:
        """The penalty in words."""
        if self.target is None:
            return f"gate penalty {self.weight:g}"
        return f"gate penalty up to {self.weight:g}, open share {self.target:g}"


@dataclass(frozen=True, slots=True)
class AuxiliaryWeights:
    """Factors on the auxiliary losses; they have no effect without routers, or without hard-sigmoid gates.

    The paper does not state its factors. The defaults are OLMoE's (arXiv 2409.02060): 0.01 on a load-balancing
    loss with the same normalisation, and ST-MoE's 0.001 on the z-loss (arXiv 2202.08906).

    Raises:
        ValueError: if a factor is negative.
    """

    load_balance: float = 1e-2
    router_z: float = 1e-3
    gate_penalty: GatePenalty | None = None

    def __post_init__(self) -> None:
        require_within("load_balance", self.load_balance, least=0)
        require_within("router_z", self.router_z, least=0)
