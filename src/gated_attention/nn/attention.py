"""Gated attention as one module, for models that are not built on transformers."""

from typing import cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gated_attention import ops
from gated_attention.nn.block import GatedBlock, HeadNorm
from gated_attention.ops.attention import AttentionBackend, check_backend
from gated_attention.ops.gated_attention import GatedBackend
from gated_attention.ops.skip.rows import GateActivation
from gated_attention.spec import AttentionGeometry, BlockSpec, Gates, SdpaTransform, SwitchSpec, as_gates, check_qk_norm


class GatedAttention(GatedBlock):
    """Grouped-query attention with RoPE, QK-norm and a gate at any of the five sites.

    Args:
        hidden_size: Width of the input and the output.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None is one per query head.
        head_dim: Channels per head; None is `hidden_size // num_heads`.
        gates: None, one `GateSpec`, or several, at most one per site.
        switch: Value maps, or key and value maps, as experts; see `SwitchSpec`.
        sdpa_transform: Applied to heads after attention and before a gate there; see `BlockSpec`.
        causal: Whether a token sees only itself and earlier ones.
        rope_theta: Base of the rotary position embedding; None for no position embedding.
        qk_norm: Whether queries and keys pass an RMS norm over each head before RoPE.
        bias: Whether the q, k, v and o projections have biases.
        backend: Attention backend, see `gated_attention.ops.attention`; with a plain sigmoid gate on the
            output of attention also one of `gated_attention.ops.gated_attention`, which compute both in one kernel;
            with one hard sigmoid per head there also its `skip`, which computes nothing where a gate is closed.

    Raises:
        ValueError: if the widths, the gates or the backend do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        gates: Gates = None,
        switch: SwitchSpec | None = None,
        sdpa_transform: SdpaTransform | None = None,
        causal: bool = True,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        bias: bool = False,
        backend: AttentionBackend | GatedBackend = "auto",
    ) -> None:
        super().__init__()
        geometry = AttentionGeometry.of(hidden_size, num_heads, num_kv_heads, head_dim)
        if rope_theta is not None and geometry.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of channels, head_dim {geometry.head_dim} is odd; use rope_theta=None")
        gates = as_gates(gates)
        if qk_norm:
            check_qk_norm(gates)
        block = BlockSpec(gates, switch, sdpa_transform)
        if backend not in get_args(GatedBackend):
            check_backend(cast(AttentionBackend, backend))
        elif backend != "auto" and (block.skippable_gate if backend == "skip" else block.fused_gate) is None:
            kind = "one hard_sigmoid per head" if backend == "skip" else "a plain sigmoid gate"
            raise ValueError(
                f"backend {backend!r} is for {kind} on the output of attention; this block has "
                f"{block.describe()}: use 'auto', 'eager', 'sdpa' or 'flex'"
            )
        self.head_dim, self.causal, self.rope_theta, self.backend = geometry.head_dim, causal, rope_theta, backend
        q_width, kv_width = num_heads * self.head_dim, geometry.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, q_width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, hidden_size, bias=bias)
        self.q_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.add_block(block, geometry, eps=1e-6)

    def forward(
        self, hidden_states: Float[Tensor, "b t c"], mask: Bool[Tensor, "#b #h #t t"] | None = None
    ) -> Float[Tensor, "b t c"]:
        """Attention within `hidden_states`, the pre-norm's output; `mask` is True where a query may look."""
        x = hidden_states
        q, k, v, logits = self.project_heads(x)  # (B, T, H or K, D); (B, T, H, 1) or None
        if self.rope_theta is not None:
            q, k = apply_rope(q, self.rope_theta), apply_rope(k, self.rope_theta)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        gate = self.skippable_gate if self.backend == "skip" else self.fused_gate
        if gate is not None and self.backend in get_args(GatedBackend):
            if logits is None:
                logits = self.gate_logits(gate, x)  # (B, T, H, D or 1)
            y = ops.gated_attention(  # G1
                q, k, v, logits, causal=self.causal, mask=mask, activation=cast(GateActivation, gate.activation),
                backend=cast(GatedBackend, self.backend),
            )  # fmt: skip
        else:
            plain = cast(AttentionBackend, self.backend)
            y, lse = ops.attention(q, k, v, causal=self.causal, mask=mask, backend=plain)
            y = self.gate_heads(y.transpose(1, 2), x, lse, logits)  # (B, T, H, D)
        return self.project_output(y, x)


def apply_rope(x: Float[Tensor, "b t h d"], theta: float) -> Float[Tensor, "b t h d"]:
    """Rotary position embedding for positions 0 to t - 1, channel i paired with i + d / 2; angles in float32."""
    d, half = x.shape[-1], x.shape[-1] // 2
    # As Qwen3 rounds it; theta ** -(i / half) differs in the last bit, which far positions multiply.
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * frequency  # (T, D / 2)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)  # (T, 1, D / 2)
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
