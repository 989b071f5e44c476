"""Gates as modules: who owns the weight, and how logits come from what the gate reads."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gated_attention import ops
from gated_attention.spec import AttentionGeometry, GateSpec, Site

GATE_MODULES: dict[Site, str] = {
    "sdpa": "g_proj",
    "value": "v_g_proj",
    "key": "k_g_proj",
    "query": "q_g_proj",
    "output": "o_g_proj",
}
"""The attribute under which an attention block keeps the gate of each site."""


class AttentionGate(nn.Linear):
    """The projection of one gate: its forward turns what the gate reads into flat gate logits.

    It is a plain linear layer, so that tensor parallelism, LoRA and quantisation treat it as one. A
    gate without input owns its logits as the weight of a projection that reads a constant one.

    Args:
        spec: The gate.
        hidden_size: Width of the hidden state.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; None is `num_heads`.
        head_dim: Channels per head; None is `hidden_size // num_heads`.

    Raises:
        ValueError: if the gate does not fit the widths.
    """

    def __init__(
        self,
        spec: GateSpec,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        geometry = AttentionGeometry.of(hidden_size, num_heads, num_kv_heads, head_dim)
        heads, channels = self.logit_shape = spec.logit_shape(geometry)
        self.spec = spec
        super().__init__(spec.in_features(geometry), heads * channels, bias=spec.bias is not None)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise as the spec says; `std` is that of a normal start."""
        if self.spec.init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.constant_(self.bias, cast(float, self.spec.bias))

    def modulate(self, y: Float[Tensor, "b t h d"], hidden_states: Float[Tensor, "b t c"]) -> Float[Tensor, "b t h d"]:
        """`y` gated by `hidden_states`, e.g. the output of one's own attention before it is projected."""
        return apply_gate(self, self.spec, y, hidden_states)

    def extra_repr(self) -> str:
        """The widths and the gate in words."""
        return f"{super().extra_repr()}, {self.spec.describe()}"


class LseGate(nn.Module):
    """A gate on the log-sum-exp of the attention scores: its logits are that, plus one learned bias per head.

    The bias is the negative of a learned sink; without one there is nothing to learn.

    Raises:
        ValueError: if the gate does not fit the widths.
    """

    def __init__(self, spec: GateSpec, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.spec, self.logit_shape = spec, spec.logit_shape(geometry)
        self.bias = None if spec.bias is None else nn.Parameter(torch.empty(geometry.num_heads))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise the bias as the spec says; there is no weight that `std` could be for."""
        if self.bias is not None:
            nn.init.constant_(self.bias, cast(float, self.spec.bias))

    def forward(self, lse: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """Gate logits in the dtype of the log-sum-exp."""
        return lse if self.bias is None else lse + self.bias

    def extra_repr(self) -> str:
        """The gate in words."""
        return self.spec.describe()


def apply_gate(
    projection: nn.Module, spec: GateSpec, y: Float[Tensor, "b t h d"], hidden_states: Float[Tensor, "b t c"]
) -> Float[Tensor, "b t h d"]:
    """`y` gated through any module that maps what the gate reads to flat logits, e.g. one that PEFT wraps."""
    return ops.gate(y, gate_logits(projection, spec, hidden_states, y.shape[-1]), spec)


def gate_logits(
    projection: nn.Module, spec: GateSpec, hidden_states: Float[Tensor, "b t c"], head_dim: int
) -> Float[Tensor, "#b #t h #d"]:
    """A gate's logits by head, from the module that projects what the gate reads."""
    reads_nothing = spec.input == "parameter"
    gate_input = hidden_states.new_ones(1, 1, 1) if reads_nothing else hidden_states[..., : spec.input_dim]
    logits: Tensor = projection(gate_input)
    return torch.unflatten(logits, -1, (-1, 1 if spec.granularity == "headwise" else head_dim))
