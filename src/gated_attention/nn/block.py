"""What a variant adds to an attention block, for every block to inherit: gates, switch heads, a transform of heads."""

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
    can_join,
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

    transformers starts norms at one by their class names, which must hold "RMSNorm".
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__(head_dim, eps=eps)
        self.weight = nn.Parameter(self.weight.new_ones(num_heads, head_dim))

    def forward(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """The normalised heads, in the dtype of `x`."""
        normed = F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, eps=self.eps)
        return (normed * self.weight).to(x.dtype)


class GatedBlock(nn.Module):
    """An attention block with what a `BlockSpec` adds to it; blocks inherit and call `gate` at each site."""

    gates: tuple[GateSpec, ...]
    switch: SwitchSpec | None
    sdpa_transform: SdpaTransform | None
    fused_gate: GateSpec | None
    head_dim: int

    def add_block(self, block: BlockSpec, geometry: AttentionGeometry, eps: float) -> None:
        """Give the block its parts; each gate becomes the submodule that `GATE_MODULES` names.

        With switch heads `v_proj`, or `k_proj` and `v_proj`, are replaced, so they must be there already.

        Args:
            eps: Of the RMS norm of heads.
        """
        self.gates, self.switch, self.sdpa_transform = block.gates, block.switch, block.sdpa_transform
        self.fused_gate = block.fused_gate
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

    def gate_modules(self) -> tuple[tuple[GateSpec, nn.Module], ...]:
        """Each gate with the module that forms its flat logits, which an adapter or a quantiser may have replaced."""
        return tuple((spec, self.get_submodule(GATE_MODULES[spec.site])) for spec in self.gates)

    def gate_logits(self, spec: GateSpec, hidden_states: Tensor, head_dim: int) -> Tensor:
        """Logits of one of the block's gates, (B, T, H, D or 1)."""
        return gate_logits(self.get_submodule(GATE_MODULES[spec.site]), spec, hidden_states, head_dim)

    def keys_and_values(
        self, x: Float[Tensor, "b t c"], head_dim: int
    ) -> tuple[Float[Tensor, "b t k d"], Float[Tensor, "b t k d"], Float[Tensor, "b t h 1"] | None]:
        """Projected keys and values by head, from one map each or mixed from several; and logits that came along.

        They do in training, of one gate per head on the output of attention, unless its projection or the values' is
        more than a linear layer of one map.
        """
        scores = None if self.switch is None else switch_scores(self.switch_router(x), self.switch)
        k = self._project("k_proj", x, scores, head_dim)
        spec = self.fused_gate
        if self.training and scores is None and spec is not None and spec.granularity == "headwise":
            values, gate = (self.get_submodule(name) for name in ("v_proj", GATE_MODULES["sdpa"]))
            if can_join(values, gate):
                v, logits = joint_projection(cast(nn.Linear, values), cast(nn.Linear, gate), x)
                return k, torch.unflatten(v, -1, (-1, head_dim)), logits[..., None]
        return k, self._project("v_proj", x, scores, head_dim), None

    def _project(self, name: str, x: Tensor, scores: Tensor | None, head_dim: int) -> Tensor:
        y = self.get_submodule(name)(x)
        if scores is not None and self.switch is not None and name in _SWITCHED[self.switch.maps]:
            return mix_maps(y, scores, head_dim)
        return torch.unflatten(y, -1, (-1, head_dim))

    def transform_heads(self, y: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """The output of attention as the block's `sdpa_transform` changes it, before a gate there."""
        if self.sdpa_transform == "silu":
            return F.silu(y)
        return y if self.sdpa_transform is None else self.sdpa_norm(y)

    def gate(
        self,
        site: Site,
        y: Tensor,
        hidden_states: Tensor,
        lse: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """The tensor at this site, gated if the block has a gate there.

        Args:
            y: (B, T, H, D), or (B, T, C) at the output site.
            lse: (B, H, T), for a gate that reads it.
            logits: (B, T, H, D or 1), of the gate at this site, if they are there already.
        """
        for spec in self.gates:
            if spec.site == site:
                if logits is not None:
                    return ops.gate(y, logits, spec)
                projection = self.get_submodule(GATE_MODULES[site])
                if spec.input == "lse":
                    return apply_lse_gate(projection, spec, y, cast(Tensor, lse).transpose(1, 2))
                if site == "output":
                    return apply_gate(projection, spec, y.unsqueeze(-2), hidden_states).squeeze(-2)
                return apply_gate(projection, spec, y, hidden_states)
        return y


def find_gates(model: nn.Module) -> Iterator[tuple[GateSpec, nn.Module, int]]:
    """Every gate that projects or owns logits: its spec, what forms them, flat, and the channels of a head."""
    seen: set[int] = set()
    for block in model.modules():
        if isinstance(block, GatedBlock):
            for spec, module in block.gate_modules():
                seen |= {id(part) for part in module.modules()}
                if spec.input != "lse":
                    yield spec, module, block.head_dim
    for module in model.modules():
        if isinstance(module, AttentionGate) and id(module) not in seen:
            yield module.spec, module, module.logit_shape[1]
