"""Loss beyond the trained length: by position, and of the same tokens with more and more text before them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gated_attention.evaluate.loss import next_token_losses
from gated_attention.nn.eval_mode import evaluating

BUCKETS = 4
"""Position buckets per trained length."""


@dataclass(frozen=True, slots=True)
class LengthLoss:
    """Loss at one context length.

    Attributes:
        length: Tokens in the context.
        targets: Mean loss of each passage's targets, which are the same tokens at every length.
        starts, buckets: Mean loss of all tokens by position; bucket i begins at position `starts[i]`.
    """

    length: int
    targets: Float[np.ndarray, " passages"]
    starts: tuple[int, ...]
    buckets: tuple[float, ...]

    @property
    def loss_nats(self) -> float:
        """Mean loss of the targets."""
        return float(self.targets.mean())

    @property
    def standard_error(self) -> float | None:
        """The standard error of `loss_nats` over passages; None for a single one."""
        return standard_error(self.targets)


def standard_error(values: Float[np.ndarray, " n"]) -> float | None:
    """The standard error of the mean; None for a single value."""
    return float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True, slots=True)
class Damage:
    """The rise of the loss inside the trained length under another rotary embedding, paired over passages."""

    nats: float
    standard_error: float | None


def damage_inside(plain: LengthLoss, changed: LengthLoss) -> Damage:
    """The loss of the same targets at the same length, `changed` minus `plain`."""
    difference = changed.targets - plain.targets
    return Damage(float(difference.mean()), standard_error(difference))


def length_losses(
    model: nn.Module, passages: Int[Tensor, "n longest"], trained: int, lengths: Sequence[int], batch_tokens: int = 8192
) -> list[LengthLoss]:
    """The loss at each length, given the last `length` tokens of every passage; sums are float64.

    Targets are the last `trained // 2` tokens of a passage; even at the trained length as many tokens precede them.

    Args:
        passages: As long as the longest length.
        trained: The trained length.
        lengths: Tokens of context, each at least `trained`.
    """
    num_targets, width = max(1, trained // 2), max(1, trained // BUCKETS)
    found = []
    with evaluating(model) as device:
        for length in lengths:
            batches = torch.split(passages[:, passages.shape[1] - length :], max(1, batch_tokens // length))
            rows = [next_token_losses(model, batch.to(device)).double().cpu().numpy() for batch in batches]
            losses = np.concatenate(rows)  # (N, length - 1), column j is position j + 1
            starts = tuple(range(0, length, width))
            buckets = tuple(float(losses[:, max(0, s - 1) : s - 1 + width].mean()) for s in starts if s + width > 1)
            found.append(LengthLoss(length, losses[:, -num_targets:].mean(1), starts[-len(buckets) :], buckets))
    return found
