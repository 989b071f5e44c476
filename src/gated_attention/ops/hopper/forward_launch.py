"""Launch of the forward kernel for Hopper."""

from typing import NamedTuple

import torch
from torch import Tensor

from gated_attention.ops.hopper.attend import ROWS
from gated_attention.ops.hopper.forward import forward_kernel
from gated_attention.ops.hopper.pipeline import describe, num_multiprocessors
from gated_attention.ops.launch import launch, launch_key

_SECTION_BYTES = 24 * 2**20
"""Keys and values that programs work on at a time; they should stay in the L2 cache of 50 MB."""


class Blocks(NamedTuple):
    """How heads are cut into tiles, and the warpgroups that own queries.

    With `output_in_queries` the output leaves through the queries' shared memory because there is no other.
    """

    num_keys: int
    num_stages: int
    num_query_stages: int
    output_in_queries: bool
    num_consumers: int


class Cut(NamedTuple):
    """Blocks by number of keys. Three consumers on narrow tiles waste least of the diagonal of short sequences."""

    short: Blocks
    long: Blocks
    longest_short: int
    """Number of keys; measured, see docs/kernels.md."""

    def blocks(self, num_keys: int, causal: bool) -> Blocks:
        """The blocks for this many keys."""
        if not causal:
            return self.long._replace(num_consumers=2)  # three leave too few registers
        return self.short if num_keys <= self.longest_short else self.long


_WIDE_HEADS = Blocks(64, 2, 1, True, 2)
CUTS = {
    64: Cut(Blocks(64, 6, 2, False, 3), Blocks(128, 4, 2, False, 3), 4096),
    128: Cut(Blocks(64, 3, 1, False, 3), Blocks(128, 2, 2, False, 2), 2048),
    256: Cut(_WIDE_HEADS, _WIDE_HEADS, 0),
}
"""By head dim."""


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Gated output and log-sum-exp, see `fused.Forward`."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    blocks = CUTS[D].blocks(S, causal)
    elementwise = gate_logits.shape[-1] > 1
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    rows, group = ROWS.value, H // K
    num_tiles = -(-T // (rows * blocks.num_consumers))
    section = max(1, min(B * H, group * _SECTION_BYTES // (2 * S * D * q.element_size())))
    num_programs = min(num_tiles * B * H, num_multiprocessors(q.device))
    q_desc = describe(q, rows)
    launch(
        forward_kernel, (num_programs, 1, 1), launch_key(q, k, v, gate_logits),
        q_desc, describe(k, blocks.num_keys), describe(v, blocks.num_keys), describe(out, rows),
        describe(gate_logits.transpose(1, 2), rows) if elementwise else q_desc, gate_logits, lse, counter,
        B, H, T, S, group, section, num_tiles, scale, *gate_logits.stride()[:3],
        BN=blocks.num_keys, D=D, STAGES=blocks.num_stages, QUERY_STAGES=blocks.num_query_stages, CAUSAL=causal,
        ELEMENTWISE=elementwise, OUTPUT_IN_QUERIES=blocks.output_in_queries, CONSUMERS=blocks.num_consumers,
    )  # fmt: skip
    return out, lse
