"""The part that all gated attention shares: projections, gates, switch heads, and a transform of heads.

A block's forward pass is `project_heads`, its own rotation, cache and attention, `gate_heads`, `project_output`.
"""

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gated_attention import ops
from gated_attention.nn.gate import (
    GATE_MODULES,
    AttentionGate,
    apply_gate,
    apply_lse_gate,
    gate_logits,
    gate_projection,
    joint_projection,
)
from gated_attention.nn.switch import mix_maps, switch_projection, switch_router, switch_scores
from gated_attention.spec import AttentionGeometry, BlockSpec, GateSpec, SdpaTransform, Site, SwitchMaps, SwitchSpec

_SWITCHED: dict[SwitchMaps, tuple[str, ...]] = {"value": ("v_proj",), "key_value": ("k_proj", "v_proj")}
"""The projections that hold several maps for each head."""


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels of a head, in the dtype of its weight, so that autocast leaves it in float32."""

    def forward(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """The normalised heads, in the dtype of `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class GroupRMSNorm(HeadNorm):
    """RMS norm of each head with a weight of its own for every channel of every head (T3.5).

    transformers initialises norms to one by their class names, which must contain "RMSNorm".
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__(head_dim, eps=eps)
        self.weight = nn.Parameter(self.weight.new_ones(num_heads, head_dim))

    def forward(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """The normalised heads, in the dtype of `x`."""
        normed = F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, eps=self.eps)
        return (normed * self.weight).to(x.dtype)


class GateOwner(nn.Module):
    """A module with gates as submodules, which `GATE_MODULES` names."""

    gates: tuple[GateSpec, ...]
    gate_head_dim: int
    """Channels per head of what they gate."""

    def gate_modules(self) -> tuple[tuple[GateSpec, nn.Module], ...]:
        """Each gate with the module that computes its flat logits, perhaps one of an adapter or a quantiser."""
        return tuple((spec, self.get_submodule(GATE_MODULES[spec.site])) for spec in self.gates)


class GatedBlock(GateOwner):
    """An attention block with the parts that a `BlockSpec` adds; subclasses own the projections and the norms."""

    switch: SwitchSpec | None
    sdpa_transform: SdpaTransform | None
    fused_gate: GateSpec | None
    skippable_gate: GateSpec | None
    head_dim: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def add_block(self, block: BlockSpec, geometry: AttentionGeometry, eps: float) -> None:
        """Add the parts; each gate becomes the submodule that `GATE_MODULES` names.

        Switch heads replace `v_proj`, or `k_proj` and `v_proj`, so these must exist already.

        Args:
            eps: For the RMS norm of heads.
        """
        self.gates, self.switch, self.sdpa_transform = block.gates, block.switch, block.sdpa_transform
        self.fused_gate, self.skippable_gate = block.fused_gate, block.skippable_gate
        self.gate_head_dim = geometry.head_dim
        for spec in self.gates:
            self.add_module(GATE_MODULES[spec.site], gate_projection(spec, geometry))
        if block.switch is not None:
            self.switch_router = switch_router(block.switch, geometry)
            for name in _SWITCHED[block.switch.maps]:
                bias = cast(nn.Linear, self.get_submodule(name)).bias is not None
                setattr(self, name, switch_projection(block.switch, geometry, bias))
        if block.sdpa_transform == "rms_norm":
            self.sdpa_norm = GroupRMSNorm(geometry.num_heads, geometry.head_dim, eps)

    @property
    def reads_lse(self) -> bool:
        """Whether a gate needs the log-sum-exp of the attention scores."""
        return any(spec.input == "lse" for spec in self.gates)

    def gate_logits(self, spec: GateSpec, hidden_states: Tensor) -> Tensor:
        """Logits of one of the block's gates, (B, T, H, D or 1)."""
        return gate_logits(self.get_submodule(GATE_MODULES[spec.site]), spec, hidden_states, self.head_dim)

    def project_heads(self, x: Float[Tensor, "b t c"]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values, (B, T, H or K, D), gated and normalised; and logits, (B, T, H, 1), or None.

        In training the product of the values also computes the logits of a gate per head on the output of attention,
        see `joint_projection`.
        """
        scores = None if self.switch is None else switch_scores(self.switch_router(x), self.switch)
        q = self.gate("query", torch.unflatten(self.q_proj(x), -1, (-1, self.head_dim)), x)  # G4
        k = self.gate("key", self._by_head("k_proj", self.k_proj(x), scores), x)  # G3
        gate = self.fused_gate
        if self.training and scores is None and gate is not None and gate.granularity == "headwise":
            v, logits = joint_projection(self.v_proj, self.get_submodule(GATE_MODULES["sdpa"]), x)
        else:
            v, logits = self.v_proj(x), None
        v = self.gate("value", self._by_head("v_proj", v, scores), x)  # G2
        return self.q_norm(q), self.k_norm(k), v, None if logits is None else logits[..., None]

    def _by_head(self, name: str, y: Tensor, scores: Tensor | None) -> Tensor:
        if scores is not None and self.switch is not None and name in _SWITCHED[self.switch.maps]:
            return mix_maps(y, scores, self.head_dim)
        return torch.unflatten(y, -1, (-1, self.head_dim))

    def gate_heads(
        self, y: Float[Tensor, "b t h d"], x: Float[Tensor, "b t c"], lse: Tensor | None, logits: Tensor | None
    ) -> Float[Tensor, "b t h d"]:
        """The output of attention, transformed and gated (G1), unless the attention gated it already.

        Args:
            lse: (B, H, T), for a gate that reads it.
            logits: (B, T, H, 1), if `project_heads` computed them.
        """
        y = self.transform_heads(y)
        if logits is not None:
            return ops.gate(y, logits, cast(GateSpec, self.fused_gate))
        return self.gate("sdpa", y, x, lse)

    def project_output(self, y: Float[Tensor, "b t h d"], x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """Gated heads through the output projection, and the gate behind it (G5)."""
        return self.gate("output", self.o_proj(torch.flatten(y, -2)), x)

    def transform_heads(self, y: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """The output of attention after the block's `sdpa_transform`, before a gate there."""
        if self.sdpa_transform == "silu":
            return F.silu(y)
        return y if self.sdpa_transform is None else self.sdpa_norm(y)

    def gate(self, site: Site, y: Tensor, hidden_states: Tensor, lse: Tensor | None = None) -> Tensor:
        """`y`, gated if the block has a gate at this site.

        Args:
            y: (B, T, H, D), or (B, T, C) at the output site.
            lse: (B, H, T), for a gate that reads it.
        """
        for spec in self.gates:
            if spec.site == site:
                projection = self.get_submodule(GATE_MODULES[site])
                if spec.input == "lse":
                    return apply_lse_gate(projection, spec, y, cast(Tensor, lse).transpose(1, 2))
                if site == "output":
                    return apply_gate(projection, spec, y.unsqueeze(-2), hidden_states).squeeze(-2)
                return apply_gate(projection, spec, y, hidden_states)
        return y


def find_gates(model: nn.Module) -> Iterator[tuple[GateSpec, nn.Module, int]]:
    """Every gate that projects or owns logits: its spec, the module that outputs them flat, and a head's channels."""
    seen: set[int] = set()
    for block in model.modules():
        if isinstance(block, GateOwner):
            for spec, module in block.gate_modules():
                seen |= {id(part) for part in module.modules()}
                if spec.input != "lse":
                    yield spec, module, block.gate_head_dim
    for module in model.modules():
        if isinstance(module, AttentionGate) and id(module) not in seen:
            yield module.spec, module.logits, module.logit_shape[1]
