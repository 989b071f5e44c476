"""Gates as modules: which module owns the weight, and how it computes logits from what the gate reads."""

import warnings
from collections.abc import Callable
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

Projection = Callable[[Tensor], Tensor]
"""Maps what a gate reads to its flat logits."""

_ALIGNED = 16
"""Matrix products, and kernels that read parts of their rows, are fast with multiples of this many columns."""


def gate_projection(spec: GateSpec, geometry: AttentionGeometry) -> nn.Module:
    """The module that computes the flat logits of a gate in an attention block.

    It is an `nn.Linear` and nothing else, since quantisers and adapters ask for that exact type, and carries its spec
    as the attribute `gate_spec`. A gate without input is one that reads a constant one. `LseGate` is the exception.

    Raises:
        ValueError: if the gate does not fit the widths.
    """
    if spec.input == "lse":
        return LseGate(spec, geometry)
    heads, channels = spec.logit_shape(geometry)
    projection = nn.Linear(spec.in_features(geometry), heads * channels, bias=spec.bias is not None)
    projection.gate_spec = spec  # type: ignore[assignment]
    initialise_gate(projection, std=0.02)
    return projection


def initialise_gate(module: nn.Module, std: float) -> bool:
    """Initialise a module made by `gate_projection` as its spec says; False for any other module.

    Args:
        std: For a normal initialisation.
    """
    if isinstance(module, AttentionGate | LseGate):
        module.reset_parameters(std=std)
    elif isinstance(module, nn.Linear) and isinstance(spec := getattr(module, "gate_spec", None), GateSpec):
        _initialise(module.weight, module.bias, spec, std)
    else:
        return False
    return True


def _initialise(weight: Tensor, bias: Tensor | None, spec: GateSpec, std: float) -> None:
    if spec.init == "zeros":
        nn.init.zeros_(weight)
    else:
        nn.init.normal_(weight, std=std)
    if bias is not None:
        nn.init.constant_(bias, cast(float, spec.bias))


class AttentionGate(nn.Module):
    """A gate for your own attention: `gate(y, x)` is `y` gated by the hidden states `x`.

    A gate without input owns its logits: the weight of a projection that reads a constant one.

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
        super().__init__()
        geometry = AttentionGeometry.of(hidden_size, num_heads, num_kv_heads, head_dim)
        heads, channels = self.logit_shape = spec.logit_shape(geometry)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(heads * channels, spec.in_features(geometry)))
        self.bias = None if spec.bias is None else nn.Parameter(torch.empty(heads * channels))
        self.logits = nn.Identity()  # the flat logits pass through it, where a forward hook may read them
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise as the spec says; `std` is for a normal initialisation."""
        _initialise(self.weight, self.bias, self.spec, std)

    def forward(self, y: Float[Tensor, "b t h d"], x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t h d"]:
        """`y`, e.g. the output of your attention by head before its projection, gated by the hidden states `x`."""
        return apply_gate(self._project, self.spec, y, x)

    def _project(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(F.linear(x, self.weight, self.bias))
        return logits

    def modulate(self, y: Float[Tensor, "b t h d"], hidden_states: Float[Tensor, "b t c"]) -> Float[Tensor, "b t h d"]:
        """Deprecated: call the gate, `gate(y, hidden_states)`."""
        message = "AttentionGate.modulate(y, hidden_states) is deprecated; call the gate: gate(y, hidden_states)"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        result: Tensor = self(y, hidden_states)
        return result

    def extra_repr(self) -> str:
        """The widths and the gate in words."""
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}, {self.spec.describe()}"


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
        """Initialise the bias as the spec says; `std` is unused, there is no weight."""
        if self.bias is not None:
            nn.init.constant_(self.bias, cast(float, self.spec.bias))

    def forward(self, lse: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """Gate logits in the dtype of the log-sum-exp."""
        return lse if self.bias is None else lse + self.bias

    def extra_repr(self) -> str:
        """The gate in words."""
        return self.spec.describe()


def apply_gate(
    projection: Projection, spec: GateSpec, y: Float[Tensor, "b t h d"], hidden_states: Float[Tensor, "b t c"]
) -> Float[Tensor, "b t h d"]:
    """`y` gated through anything that maps what the gate reads to flat logits, e.g. a module that PEFT wraps."""
    return ops.gate(y, gate_logits(projection, spec, hidden_states, y.shape[-1]), spec)


def apply_lse_gate(
    projection: Projection, spec: GateSpec, y: Float[Tensor, "b t h d"], lse: Float[Tensor, "b t h"]
) -> Float[Tensor, "b t h d"]:
    """`y` gated by the log-sum-exp; where a query sees no key its output stays 0, whatever -inf activates to."""
    empty = (lse == float("-inf"))[..., None]
    return apply_gate(projection, spec, y, lse.masked_fill(empty[..., 0], 0.0)).masked_fill(empty, 0.0)


def gate_logits(
    projection: Projection, spec: GateSpec, hidden_states: Float[Tensor, "b t c"], head_dim: int
) -> Float[Tensor, "#b #t h #d"]:
    """A gate's logits by head, from what projects its input to flat logits."""
    reads_nothing = spec.input == "parameter"
    gate_input = hidden_states.new_ones(1, 1, 1) if reads_nothing else hidden_states[..., : spec.input_dim]
    return by_head(projection(gate_input), spec, head_dim)


def by_head(logits: Float[Tensor, "#b #t n"], spec: GateSpec, head_dim: int) -> Float[Tensor, "#b #t h #d"]:
    """Flat gate logits split by head, those of an output gate as one head."""
    if spec.site == "output":
        return logits.unsqueeze(-2)
    return torch.unflatten(logits, -1, (-1, 1 if spec.granularity == "headwise" else head_dim))


def joint_projection(projection: nn.Module, gate: nn.Module, x: Float[Tensor, "b t c"]) -> tuple[Tensor, Tensor | None]:
    """`projection(x)`, and `gate(x)` if one product may compute both, else None.

    A product of few columns takes a GPU as long as one of hundreds. Use this beside values: the gradient of theirs
    comes from attention's kernel as it is and one copy joins it, that of queries or keys comes from a norm and RoPE,
    which a compiler then writes out twice.
    """
    if not _can_join(projection, gate):
        return projection(x), None
    projection, gate = cast(nn.Linear, projection), cast(nn.Linear, gate)
    widths = [projection.out_features, gate.out_features]
    widths.append(-sum(widths) % _ALIGNED)
    padding = gate.weight.new_zeros(widths[-1], gate.in_features)
    joint = F.linear(x, torch.cat((projection.weight, gate.weight, padding)))
    projected, logits, _ = torch.split(joint, widths, dim=-1)
    return projected, logits


def _can_join(projection: nn.Module, gate: nn.Module) -> bool:
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
