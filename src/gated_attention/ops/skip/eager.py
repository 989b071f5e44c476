"""Gated attention over open rows in plain PyTorch: the slow truth of the Triton kernels, and what a CPU runs.

Of every key/value head, a tile of open rows is gathered, meets the keys that any of them sees, and is scattered. The
backward pass computes the gated weights g P again, as exp(S - (LSE - log g)).
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gated_attention.ops.gate import ACTIVATIONS
from gated_attention.ops.sdpa import widen
from gated_attention.ops.skip.rows import GateActivation, Rows

_TILE = 128
"""Rows per tile; measured, see docs/skipping.md."""


class _Tile(NamedTuple):
    """Open rows that share keys and values."""

    batch: int
    kv_head: int
    places: slice
    """In the list of the head's rows."""
    positions: Tensor
    heads: Tensor
    keys: slice
    """All that a row sees, and more."""
    own: Tensor | None
    """The last key that each row sees, if causal."""
    first: Tensor | None
    """The first key that each row sees, if given."""


def _tiles(q: Tensor, k: Tensor, rows: Rows, causal: bool, first_keys: Tensor | None) -> Iterator[_Tile]:
    B, H, T = q.shape[:3]
    K, S = k.shape[1:3]
    for b, kv_head in itertools.product(range(B), range(K)):
        count = int(rows.before[b, kv_head, -1])
        for start in range(0, count, _TILE):
            places = slice(start, min(start + _TILE, count))
            code = rows.order[b, kv_head, places].long()
            t, h = code // (H // K), kv_head * (H // K) + code % (H // K)
            own = t + (S - T) if causal else None
            first = None if first_keys is None else first_keys[b, t]
            begin = 0 if first is None else int(first.min())
            keys = slice(begin, S if own is None else int(own[-1]) + 1)
            yield _Tile(b, kv_head, places, t, h, keys, own, first)


def _scores(tile: _Tile, q_rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled scores of a tile's rows and keys, -inf where a row does not see a key."""
    scores = (q_rows * scale) @ keys.T
    begin, end = tile.keys.start, tile.keys.stop
    if tile.own is not None:
        at = int(tile.own[0]) + 1  # every row sees the keys before
        scores[:, at - begin :].masked_fill_(torch.arange(at, end) > tile.own[:, None], -math.inf)
    if tile.first is not None:
        at = int(tile.first.max())  # every row sees the keys from here on, as far as it sees any
        scores[:, : at - begin].masked_fill_(torch.arange(begin, at) < tile.first[:, None], -math.inf)
    return scores


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, rows: Rows, activation: GateActivation,
    causal: bool, scale: float, first_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated output and log-sum-exp, see `op.Forward`."""
    B, H, T, D = q.shape
    out = q.new_zeros((B, T, H, D))
    lse = torch.zeros(rows.order.shape, dtype=torch.promote_types(q.dtype, torch.float32))
    wide_k, wide_v = widen(k), widen(v)
    for tile in _tiles(q, k, rows, causal, first_keys):
        b, kv_head, places, t, h, keys, *_ = tile
        scores = _scores(tile, widen(q[b, h, t]), wide_k[b, kv_head, keys], scale)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        g = ACTIVATIONS[activation].value(widen(gate_logits[b, t, h]))  # (rows, 1)
        out[b, t, h] = (weights @ wide_v[b, kv_head, keys] * (g / total)).to(out.dtype)
        lse[b, kv_head, places] = (highest + total.log() - g.log())[:, 0].to(lse.dtype) / math.log(2.0)
    return out.transpose(1, 2), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor, rows: Rows,
    activation: GateActivation, causal: bool, scale: float, first_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, see `op.Backward`."""
    dq, grad_logits = torch.zeros_like(q), torch.zeros(gate_logits.shape, dtype=gate_logits.dtype)
    wide_k, wide_v = widen(k), widen(v)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for tile in _tiles(q, k, rows, causal, first_keys):
        b, kv_head, places, t, h, keys, *_ = tile
        q_rows, do = widen(q[b, h, t]), widen(grad[b, h, t])
        keys_here, values = wide_k[b, kv_head, keys], wide_v[b, kv_head, keys]
        s = widen(gate_logits[b, t, h])
        shifted = lse[b, kv_head, places, None] * math.log(2.0)
        weights = _scores(tile, q_rows, keys_here, scale).sub_(shifted).exp_()  # g P
        dv[b, kv_head, keys].addmm_(weights.T, do)
        d_weights = do @ values.T
        # rowsum(dO * O), not from the gated output, which has been rounded.
        delta = (weights * d_weights).sum(-1, keepdim=True) / ACTIVATIONS[activation].value(s)
        d_scores = d_weights.sub_(delta).mul_(weights)
        dk[b, kv_head, keys].addmm_(d_scores.T, q_rows, alpha=scale)
        dq[b, h, t] = (d_scores @ keys_here).mul_(scale).to(dq.dtype)
        grad_logits[b, t, h] = (delta * ACTIVATIONS[activation].derivative(s)).to(grad_logits.dtype)
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv), grad_logits
