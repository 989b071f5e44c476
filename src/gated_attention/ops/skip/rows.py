"""The list of open rows: of every key/value head the pairs of position and query head whose gate is not closed.

Row (t, j), the j-th query head of its group at position t, has the code t * G + j.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gated_attention.ops.sdpa import widen

GateActivation = Literal["sigmoid", "hard_sigmoid"]


class Rows(NamedTuple):
    """Open rows, sorted by position. Shapes do not depend on how many there are, so nothing waits for the device."""

    order: Int[Tensor, "b k r"]
    """All T * G codes, int32: the open rows by position, then the closed ones from the last to the first."""
    before: Int[Tensor, "b k n"]
    """How many open rows lie before each position, (B, K, T + 1), int32; the last entry is the number of open rows."""


def closing_logit(activation: GateActivation, threshold: float) -> float:
    """The logit of a score: a gate is closed if its logit, in float32 or wider, is at most this. NaN is open."""
    if activation == "hard_sigmoid":
        return 6.0 * threshold - 3.0
    return math.log(threshold / (1.0 - threshold)) if threshold > 0.0 else -math.inf


def list_rows(gate_logits: Float[Tensor, "b t h"], num_kv_heads: int, closed_at: float) -> Rows:
    """In plain PyTorch; the slow truth of `triton.skip_rows.list_rows`."""
    B, T, H = gate_logits.shape
    G = H // num_kv_heads
    is_open = ~(widen(gate_logits) <= closed_at)
    flags = is_open.view(B, T, num_kv_heads, G).transpose(1, 2).reshape(B, num_kv_heads, T * G)
    total = flags.cumsum(-1, dtype=torch.int32)
    code = torch.arange(T * G, dtype=torch.int32, device=flags.device).expand_as(total)
    # Closed rows fill the list from its end, so that their places need no number of open ones.
    place = torch.where(flags, total - 1, T * G - 1 - (code - total))
    order = torch.empty_like(total).scatter_(-1, place.long(), code)
    return Rows(order, F.pad(total[..., G - 1 :: G], (1, 0)))
