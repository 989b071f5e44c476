"""The layouts that checkpoints use for the gate of the attention output, and exact conversions between them.

Three layouts are in use. H query heads form K groups of G; a head has D channels and d gate rows (headwise 1,
elementwise D). Everything is rows of a weight whose last dimension is the hidden size:

    A  per query head       q_proj = [q_0 | g_0 | q_1 | g_1 | ...]              Qwen3-Next, Qwen3.5 (d = D)
    B  per key/value group  q_proj = [q_0 .. q_G-1 | g_0 .. g_G-1 | q_G .. ]    the paper's release
    C  separate             q_proj = [q_0 | q_1 | ...], g_proj = [g_0 | g_1 | ...]   this package, OLMo-core, AFMoE

This package stores C.
"""

import torch
from torch import Tensor

from gated_attention.spec import AttentionGeometry


def split_per_head(packed: Tensor, geometry: AttentionGeometry) -> tuple[Tensor, Tensor]:
    """Layout A to C: (H * 2D, C) to q and g, (H * D, C) each."""
    q, g = torch.unflatten(packed, 0, (geometry.num_heads, 2, geometry.head_dim)).unbind(1)
    return q.flatten(0, 1), g.flatten(0, 1)


def join_per_head(q: Tensor, g: Tensor, geometry: AttentionGeometry) -> Tensor:
    """Layout C to A; a headwise g, (H, C), is repeated over the channels of its head."""
    if len(g) == geometry.num_heads:
        g = g.repeat_interleave(geometry.head_dim, dim=0)
    heads = (geometry.num_heads, geometry.head_dim)
    return torch.stack([torch.unflatten(x, 0, heads) for x in (q, g)], dim=1).flatten(0, 2)


def split_per_group(packed: Tensor, geometry: AttentionGeometry, gate_rows: int) -> tuple[Tensor, Tensor]:
    """Layout B to C: (H * D + H * d, C) to q, (H * D, C), and g, (H * d, C), with d = `gate_rows`."""
    group = geometry.num_heads // geometry.num_kv_heads
    grouped = torch.unflatten(packed, 0, (geometry.num_kv_heads, group * (geometry.head_dim + gate_rows)))
    q, g = torch.split(grouped, [group * geometry.head_dim, group * gate_rows], dim=1)
    return q.flatten(0, 1), g.flatten(0, 1)


def merge_rows(g: Tensor, geometry: AttentionGeometry) -> Tensor:
    """The headwise gate (H, C) that an elementwise one, (H * D, C), repeats over the channels of each head.

    Raises:
        ValueError: if the rows of a head differ.
    """
    heads = torch.unflatten(g, 0, (geometry.num_heads, geometry.head_dim))
    if not torch.equal(heads, heads[:, :1].expand_as(heads)):
        raise ValueError("the rows of a head differ, so the gate is not headwise")
    return heads[:, 0].clone()


def shift_exactly(weight: Tensor, by: float, dtype: torch.dtype) -> Tensor:
    """`weight + by` in `dtype` if it is exact there, else in float32 or float64, whichever first recovers `weight`.

    Zero-centred norms store `weight - 1`, which bfloat16 cannot represent for every weight.
    """
    exact = weight.double() + by
    if torch.equal(exact.to(dtype).double(), exact):
        return exact.to(dtype)
    shifted = exact.float()
    return shifted if torch.equal((shifted.double() - by).to(weight.dtype), weight) else exact
