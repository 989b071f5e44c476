"""Gates as modules: who owns the weight, and how logits come from what the gate reads."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

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

_ALIGNED = 16
"""Columns that matrix products, and kernels that read parts of their rows, want in multiples to be fast."""


def gate_projection(spec: GateSpec, geometry: AttentionGeometry) -> nn.Module:
    """What turns the hidden state, nothing, or the log-sum-exp into the flat logits of a gate in an attention block.

    A gate that reads the hidden state is an `nn.Linear` and nothing else, since quantisers and adapters ask for that
    very type. It carries its spec as the attribute `gate_spec`, for those that initialise it.

    Raises:
        ValueError: if the gate does not fit the widths.
    """
    if spec.input == "lse":
        return LseGate(spec, geometry)
    if spec.input == "parameter":
        return AttentionGate(spec, geometry.hidden_size, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
    heads, channels = spec.logit_shape(geometry)
    projection = nn.Linear(spec.in_features(geometry), heads * channels, bias=spec.bias is not None)
    projection.gate_spec = spec  # type: ignore[assignment]
    initialise_projection(projection, spec)
    return projection


def initialise_projection(projection: nn.Linear, spec: GateSpec, std: float = 0.02) -> None:
    """Start the weights of a gate's projection as its spec says; `std` is that of a normal start."""
    if spec.init == "zeros":
        nn.init.zeros_(projection.weight)
    else:
        nn.init.normal_(projection.weight, std=std)
    if projection.bias is not None:
        nn.init.constant_(projection.bias, cast(float, spec.bias))


def initialise_gate(module: nn.Module, std: float) -> bool:
    """Start the weights of a module made by `gate_projection` as its spec says; False for any other module."""
    if isinstance(module, AttentionGate | LseGate):
        module.reset_parameters(std=std)
    elif isinstance(module, nn.Linear) and isinstance(spec := getattr(module, "gate_spec", None), GateSpec):
        initialise_projection(module, spec, std)
    else:
        return False
    return True


class AttentionGate(nn.Linear):
    """The projection of one gate, for models of one's own: its forward turns what the gate reads into flat gate logits.

    A gate without input owns its logits as the weight of a projection that reads a constant one.

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
        initialise_projection(self, self.spec, std)

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


def apply_lse_gate(
    projection: nn.Module, spec: GateSpec, y: Float[Tensor, "b t h d"], lse: Float[Tensor, "b t h"]
) -> Float[Tensor, "b t h d"]:
    """`y` gated by the log-sum-exp; where a query sees no key its output stays 0, whatever -inf is activated to."""
    empty = (lse == float("-inf"))[..., None]
    return apply_gate(projection, spec, y, lse.masked_fill(empty[..., 0], 0.0)).masked_fill(empty, 0.0)


def gate_logits(
    projection: nn.Module, spec: GateSpec, hidden_states: Float[Tensor, "b t c"], head_dim: int
) -> Float[Tensor, "#b #t h #d"]:
    """A gate's logits by head, from the module that projects what the gate reads."""
    reads_nothing = spec.input == "parameter"
    gate_input = hidden_states.new_ones(1, 1, 1) if reads_nothing else hidden_states[..., : spec.input_dim]
    return by_head(projection(gate_input), spec, head_dim)


def by_head(logits: Float[Tensor, "#b #t n"], spec: GateSpec, head_dim: int) -> Float[Tensor, "#b #t h #d"]:
    """Flat gate logits with their heads apart, an output gate's as one head."""
    if spec.site == "output":
        return logits.unsqueeze(-2)
    return torch.unflatten(logits, -1, (-1, 1 if spec.granularity == "headwise" else head_dim))


def can_join(projection: nn.Module, gate: nn.Module) -> bool:
    """Whether `joint_projection` forms what both modules would, and nobody would miss that they were not called."""
    if not (type(projection) is nn.Linear and type(gate) is nn.Linear):  # PEFT and quantisation put others there
        return False
    if projection.in_features != gate.in_features or projection.weight.requires_grad != gate.weight.requires_grad:
        return False
    return _is_plain(projection) and _is_plain(gate)


def _is_plain(linear: nn.Linear) -> bool:
    # Who gathers, offloads or watches does so by hooks or another `forward`; sharded weights are of another class.
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
    is_called_as_written = not any(hooks) and "forward" not in vars(linear)
    return is_called_as_written and type(linear.weight) is nn.Parameter and linear.bias is None


def joint_projection(projection: nn.Linear, gate: nn.Linear, x: Float[Tensor, "b t c"]) -> tuple[Tensor, Tensor]:
    """`projection(x)` and `gate(x)` by one product: one of few columns takes a GPU as long as one of hundreds.

    Best beside values: the gradient of theirs comes from attention's kernel as it is and is joined by one copy, that of
    queries or keys from a norm and RoPE, which a compiler then writes out twice.
    """
    widths = [projection.out_features, gate.out_features]
    widths.append(-sum(widths) % _ALIGNED)
    padding = gate.weight.new_zeros(widths[-1], gate.in_features)
    joint = F.linear(x, torch.cat((projection.weight, gate.weight, padding)))
    projected, logits, _ = torch.split(joint, widths, dim=-1)
    return projected, logits
