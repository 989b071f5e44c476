"""Launch of the forward kernel for Hopper that skips closed gates."""

import torch
from torch import Tensor

from gated_attention.ops.hopper.attend import ROWS
from gated_attention.ops.hopper.forward_launch import Blocks
from gated_attention.ops.hopper.pipeline import addressable, describe, num_multiprocessors
from gated_attention.ops.hopper.skip_forward import skip_forward_kernel
from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.skip.rows import GateActivation, Rows
from gated_attention.ops.triton.skip_work import list_work

BLOCKS = {64: Blocks(128, 4, 2, False, 3), 128: Blocks(128, 2, 2, True, 2)}
"""By head dim. Queries have two stages, so that they are gathered while the tile before is computed."""


def choose_blocks(head_dim: int, causal: bool) -> Blocks:
    """The blocks for these heads."""
    return BLOCKS[head_dim] if causal else BLOCKS[head_dim]._replace(num_consumers=2)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, rows: Rows, activation: GateActivation,
    causal: bool, scale: float, first_keys: None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated output and log-sum-exp, see `skip.op.Forward`; the scale must not be 0, and there are no first keys."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if scale < 0:
        q, scale = -q, -scale  # the kernel assumes that the largest product is the largest score
    blocks = choose_blocks(D, causal)
    q, q_strides = addressable(q, 16)
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(rows.order.shape, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    work = list_work(rows, H // K, S, causal, ROWS.value * blocks.num_consumers, blocks.num_keys)
    capacity = work.shape[0] - 1
    launch(
        skip_forward_kernel, (min(capacity, num_multiprocessors(q.device)), 1, 1), launch_key(q, k, v, gate_logits),
        q, *q_strides[:3], describe(k, blocks.num_keys), describe(v, blocks.num_keys), out, *out.stride()[:3],
        gate_logits, *(gate_logits.stride(i) for i in (0, 1, 2)), rows.order, rows.before[..., -1].contiguous(), work,
        lse, counter, B * K, K, T, S, S - T if causal else 0, capacity, scale,
        BN=blocks.num_keys, D=D, G=H // K, STAGES=blocks.num_stages, QUERY_STAGES=blocks.num_query_stages,
        CAUSAL=causal, HARD=activation == "hard_sigmoid", OUTPUT_IN_QUERIES=blocks.output_in_queries,
        CONSUMERS=blocks.num_consumers,
    )  # fmt: skip
    return out, lse
