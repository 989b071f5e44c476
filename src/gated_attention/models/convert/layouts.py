"""How checkpoints lay out the gate of the attention output, and exact ways between the layouts.

Three are in use. With H query heads in K groups of G, D channels per head and d gate rows per head (1 headwise, D
elementwise), and everything seen as rows of a weight whose last dimension is the hidden size:

    A  per query head       q_proj = [q_0 | g_0 | q_1 | g_1 | ...]              Qwen3-Next, Qwen3.5 (d = D)
    B  per key/value group  q_proj = [q_0 .. q_G-1 | g_0 .. g_G-1 | q_G .. ]    the paper's release
    C  separate             q_proj = [q_0 | q_1 | ...], g_proj = [g_0 | g_1 | ...]   this package, OLMo-core, AFMoE

C is what this package stores.
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
    heads = (geometry.num_heads, geometry.head_dim)
    return torch.stack(
        (torch.unflatten(q, 0, heads), torch.unflatten(repeat_rows(g, geometry), 0, heads)), dim=1
    ).flatten(0, 2)


def split_per_group(packed: Tensor, geometry: AttentionGeometry, gate_rows: int) -> tuple[Tensor, Tensor]:
    """Layout B to C: (H * D + H * d, C) to q, (H * D, C), and g, (H * d, C), with d = `gate_rows`."""
    group = geometry.num_heads // geometry.num_kv_heads
    grouped = torch.unflatten(packed, 0, (geometry.num_kv_heads, group * (geometry.head_dim + gate_rows)))
    q, g = torch.split(grouped, [group * geometry.head_dim, group * gate_rows], dim=1)
    return q.flatten(0, 1), g.flatten(0, 1)


def repeat_rows(g: Tensor, geometry: AttentionGeometry) -> Tensor:
    """A gate with one row per channel: the same function as the headwise gate it repeats; others are left alone."""
    return g.repeat_interleave(geometry.head_dim, dim=0) if len(g) == geometry.num_heads else g


def merge_rows(g: Tensor, geometry: AttentionGeometry) -> Tensor:
    """The inverse of `repeat_rows`.

    Raises:
        ValueError: if the rows of a head differ.
    """
    heads = torch.unflatten(g, 0, (geometry.num_heads, geometry.head_dim))
    if not torch.equal(heads, heads[:, :1].expand_as(heads)):
        raise ValueError("the rows of a head differ, so the gate is not headwise")
    return heads[:, 0].clone()


def shift_exactly(weight: Tensor, by: float, dtype: torch.dtype) -> Tensor:
    """`weight + by`: in `dtype` if that holds it exactly, else in the narrower of float32 and float64 that leads back.

    Zero-centred norms store `weight - 1`, which bfloat16 cannot hold for every weight.
    """
    exact = weight.double() + by
    if torch.equal(exact.to(dtype).double(), exact):
        return exact.to(dtype)
    shifted = exact.float()
    return shifted if torch.equal((shifted.double() - by).to(weight.dtype), weight) else exact
