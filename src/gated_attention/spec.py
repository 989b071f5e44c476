"""Gates, and what else a variant changes in a decoder block, as data.

A gate multiplies a tensor inside the attention block by an activation of a learned function of the block's input,
`Y' = Y * sigmoid(X W)` (Qiu et al., arXiv 2505.06708, eq. 5), or adds the activation to it. This module says which
tensor, which function, and what it costs. It imports neither torch nor transformers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, log
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gated_attention.ranges import require_choice, require_within

Site = Literal["sdpa", "value", "key", "query", "output"]
Granularity = Literal["headwise", "elementwise"]
Combine = Literal["multiply", "add"]
Activation = Literal["sigmoid", "silu", "identity", "ns_sigmoid", "hard_sigmoid", "softplus"]
GateInput = Literal["hidden_state", "parameter", "lse"]
Init = Literal["normal", "zeros"]
ScoreDtype = Literal["float32", "model"]
SwitchMaps = Literal["value", "key_value"]
SdpaTransform = Literal["rms_norm", "silu"]

SITES: tuple[Site, ...] = get_args(Site)
"""The five sites in the paper's order: G1 to G5."""

SITE_LABELS: dict[Site, str] = {site: f"G{i}" for i, site in enumerate(SITES, start=1)}
"""How a site is printed: `sdpa` is G1, `value` G2, `key` G3, `query` G4, `output` G5."""


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The widths of an attention block that determine a gate's shape."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require_within(name, value, least=1)
        if self.num_heads % self.num_kv_heads:
            heads = f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            raise ValueError(f"{heads}; query heads share key/value heads in equal groups")

    @classmethod
    def of(
        cls, hidden_size: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None
    ) -> "AttentionGeometry":
        """The geometry with defaults for None: one key/value head per query head, and head_dim hidden_size / num_heads.

        Raises:
            ValueError: if the widths do not fit together.
        """
        if head_dim is None:
            head_dim, rest = divmod(hidden_size, max(num_heads, 1))
            if rest:
                raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; give head_dim")
        return cls(hidden_size, num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim)


@dataclass(frozen=True, slots=True)
class GateSpec:
    """One gate of an attention block.

    The default is the paper's best: G1, elementwise, head-specific, multiplicative, sigmoid (T1.5).

    Attributes:
        site: The gated tensor: the output of scaled dot-product attention before `o_proj` (`sdpa`, G1), the projected
            value, key or query before norm and RoPE (G2, G3, G4), or the block's output after `o_proj` (`output`, G5).
        granularity: One score per head, or one per element.
        head_shared: Average the scores over heads, after the activation, so that all heads share one score per
            channel. The projection keeps its full size (T1.12, T1.13).
        combine: `Y * score` or `Y + score`.
        activation: `ns_sigmoid` is `0.5 + 0.5 sigmoid(x)` (T4.7); `hard_sigmoid` is `clamp(x / 6 + 0.5, 0, 1)`, whose
            closed side is exactly zero; `softplus` is `log(1 + exp(x))` (Laguna).
        input: `hidden_state` is the normalised input that q, k and v also read. With `parameter` the logits are a
            learned parameter (T4.6). `lse` is the log-sum-exp of the attention scores: a head whose softmax has one
            more term exp(s) in its denominator is `Y * sigmoid(LSE - s)`. With `bias=0.0` the sink s is learned
            (gpt-oss) and stored as its negative; without a bias it is 0 (softmax-off-by-one).
        input_dim: Read only the first `input_dim` channels of the hidden state; None reads all.
        init: Initialisation of the weight: N(0, initializer_range), as in the released class, or zeros.
        bias: Initial value of a learned bias on the logits; None for no bias.
        scale: Constant factor on the activation; with 2.0 and `init="zeros"` the gate is initially one.
        dtype: Compute scores in float32 and cast them, or compute them in the model's dtype, which reproduces Hugging
            Face's bfloat16 rounding bit for bit.

    Raises:
        ValueError: if a value is unknown or two of them contradict each other.
    """

    site: Site = "sdpa"
    granularity: Granularity = "elementwise"
    head_shared: bool = False
    combine: Combine = "multiply"
    activation: Activation = "sigmoid"
    input: GateInput = "hidden_state"
    input_dim: int | None = None
    init: Init = "normal"
    bias: float | None = None
    scale: float = 1.0
    dtype: ScoreDtype = "float32"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            require_choice(f"gate {name}", getattr(self, name), choices)
        if self.granularity == "headwise" and self.site == "output":
            raise ValueError("an output gate (G5) acts after heads are merged; use granularity='elementwise'")
        if self.head_shared and self.site == "output":
            raise ValueError("an output gate (G5) has no heads to share; use head_shared=False")
        if self.head_shared and self.granularity == "headwise":
            raise ValueError("head_shared with granularity='headwise' leaves one score per token; use 'elementwise'")
        if self.input == "parameter" and (self.input_dim is not None or self.bias is not None):
            raise ValueError("input='parameter' reads nothing: leave input_dim and bias at None")
        if self.input == "lse" and (self.site, self.granularity) != ("sdpa", "headwise"):
            raise ValueError("input='lse' has one log-sum-exp per head of the attention; use site='sdpa', 'headwise'")
        if self.input == "lse" and (self.input_dim is not None or self.init != "normal"):
            raise ValueError("input='lse' has no projection: leave input_dim at None and init at 'normal'")
        require_within("gate input_dim", self.input_dim, least=1)
        if not isfinite(self.scale) or self.scale == 0.0:
            raise ValueError(f"gate scale is {self.scale}; it must be finite and not zero")
        require_within("gate bias", self.bias)

    def __deepcopy__(self, memo: object) -> "GateSpec":
        return self  # frozen; Whisper's forward pass copies its configuration, and torch.compile follows it

    @property
    def label(self) -> str:
        """The site as the paper prints it, G1 to G5."""
        return SITE_LABELS[self.site]

    def describe(self) -> str:
        """The gate in words; of the other fields, only those that differ from the defaults."""
        activation = self.activation if self.scale == 1.0 else f"{self.scale:g}*{self.activation}"
        words = {
            "additive": self.combine == "add",
            activation: True,
            "input-independent": self.input == "parameter",
            "of the log-sum-exp": self.input == "lse",
            f"reads {self.input_dim} channels": self.input_dim is not None,
            "zero init": self.init == "zeros",
            f"bias {self.bias or 0:g}": self.bias is not None,
            "scores in model dtype": self.dtype == "model",
        }
        start = [self.label, self.site, "head-shared" if self.head_shared else self.granularity]
        return " ".join(start + [word for word, holds in words.items() if holds])

    def logit_shape(self, geometry: AttentionGeometry) -> tuple[int, int]:
        """(heads, channels) of one token's gate logits, before heads are averaged."""
        if self.site == "output":
            return 1, geometry.hidden_size
        heads = geometry.num_kv_heads if self.site in ("value", "key") else geometry.num_heads
        return heads, 1 if self.granularity == "headwise" else geometry.head_dim

    def score_shape(self, geometry: AttentionGeometry) -> tuple[int, int]:
        """(heads, channels) of one token's gate scores, the paper's "score shape" column (Table 1)."""
        heads, channels = self.logit_shape(geometry)
        return (1 if self.head_shared else heads), channels

    def in_features(self, geometry: AttentionGeometry) -> int:
        """Channels that the gate's projection reads: 1 (a constant) for a learned parameter, 0 for a log-sum-exp.

        Raises:
            ValueError: if `input_dim` exceeds the hidden size.
        """
        if self.input != "hidden_state":
            return 1 if self.input == "parameter" else 0
        if self.input_dim is not None and self.input_dim > (width := geometry.hidden_size):
            raise ValueError(f"gate input_dim {self.input_dim} exceeds hidden_size {width}; use at most that, or None")
        return geometry.hidden_size if self.input_dim is None else self.input_dim

    def num_parameters(self, geometry: AttentionGeometry) -> int:
        """Parameters this gate adds to one attention block."""
        heads, channels = self.logit_shape(geometry)
        return heads * channels * (self.in_features(geometry) + (0 if self.bias is None else 1))

    def neutral(self) -> "GateSpec":
        """This gate with zero weights, scaled so that it changes nothing until it is trained: 2 for a sigmoid.

        Raises:
            ValueError: if there is no such scale.
        """
        start, is_added = _AT_ZERO[self.activation], self.combine == "add"
        if self.bias is not None or self.input == "lse" or is_added != (start == 0.0):
            raise ValueError(f"{self.describe()} with zero weights changes the model; choose another gate or init")
        return replace(self, init="zeros", scale=self.scale if is_added else 1.0 / start)

    def to_dict(self) -> dict[str, Any]:
        """Every field, including defaults, so that a stored gate keeps its meaning when a default changes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GateSpec":
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: if a field is unknown.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            require_choice("gate field", name, known)
        return cls(**values)


_AT_ZERO = {"sigmoid": 0.5, "silu": 0.0, "identity": 0.0, "ns_sigmoid": 0.75, "hard_sigmoid": 0.5, "softplus": log(2.0)}


@dataclass(frozen=True, slots=True)
class SwitchSpec:
    """Value projections, or key and value projections, as experts (Table 6; SwitchHead, arXiv 2312.07987).

    Each key/value head has `num_experts` maps. A router `sigmoid(X W)` scores them for every token; the outputs of the
    `top_k` best are scaled by their scores and added. One map with top 1 is the headwise value gate (T1.11).

    Attributes:
        maps: With `key_value` one router selects the key map and the value map together.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    maps: SwitchMaps = "value"
    num_experts: int = 4
    top_k: int = 4

    def __post_init__(self) -> None:
        require_choice("switch maps", self.maps, get_args(SwitchMaps))
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"switch top_k is {self.top_k}; choose from 1 to num_experts, {self.num_experts}")

    def describe(self) -> str:
        """The switch in the words of Table 6."""
        return f"switch {'kv' if self.maps == 'key_value' else 'v'} {self.num_experts} top {self.top_k}"

    def num_parameters(self, geometry: AttentionGeometry) -> int:
        """Parameters added to one attention block: all maps but the first, and the router."""
        num_maps = (self.num_experts - 1) * (2 if self.maps == "key_value" else 1)
        return geometry.hidden_size * geometry.num_kv_heads * (num_maps * geometry.head_dim + self.num_experts)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Everything that a variant changes in a decoder block.

    Attributes:
        gates: Anything that `as_gates` takes; stored as a tuple in site order.
        sdpa_transform: Applied to the output of attention, before a gate there: an RMS norm of each head with one
            weight per channel (T3.5), or SiLU (T3.6).
        sandwich_norm: Whether the outputs of attention and FFN are normalised before they are added to the residual
            stream (T2.7).
        output_clip: Bound on the absolute value of those outputs (A.6: 300 and 100); None for none.
        qk_norm: Whether queries and keys pass an RMS norm over each head, as Qwen3's do.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    gates: tuple[GateSpec, ...] = ()
    switch: SwitchSpec | None = None
    sdpa_transform: SdpaTransform | None = None
    sandwich_norm: bool = False
    output_clip: float | None = None
    qk_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", as_gates(self.gates))
        require_choice("sdpa_transform", self.sdpa_transform, (*get_args(SdpaTransform), None))
        require_within("output_clip", self.output_clip, above=0)

    def describe(self) -> str:
        """The block in words: its gates, and what else differs from Qwen3's."""
        words = [
            *(gate.describe() for gate in self.gates),
            self.switch.describe() if self.switch else "",
            {None: "", "rms_norm": "RMS norm of each head", "silu": "SiLU of each head"}[self.sdpa_transform],
            "sandwich norm" if self.sandwich_norm else "",
            f"outputs clipped to {self.output_clip:g}" if self.output_clip else "",
            "" if self.qk_norm else "no QK-norm",
        ]
        return " + ".join(filter(None, words)) or "no gate"

    @property
    def fused_gate(self) -> GateSpec | None:
        """The gate that `ops.gated_attention` can compute together with the attention; None if there is none.

        It multiplies the output of attention (G1) by a sigmoid, in float32, of logits computed from the hidden state.
        """
        return self._plain_gate(activation="sigmoid")

    @property
    def skippable_gate(self) -> GateSpec | None:
        """As `fused_gate`, but one hard sigmoid per head, whose closed rows the backend `skip` leaves out."""
        return self._plain_gate(activation="hard_sigmoid", granularity="headwise")

    def _plain_gate(self, **fixed: Any) -> GateSpec | None:
        for gate in self.gates if self.sdpa_transform is None else ():
            free = {name: getattr(gate, name) for name in ("granularity", "input_dim", "bias", "init")}
            if gate == GateSpec(**free | fixed):
                return gate
        return None

    def num_norm_parameters(self, geometry: AttentionGeometry) -> int:
        """Norm weights added to one block; negative where QK-norm is left out."""
        heads = geometry.num_heads * (self.sdpa_transform == "rms_norm") - 2 * (not self.qk_norm)
        return heads * geometry.head_dim + 2 * geometry.hidden_size * self.sandwich_norm

    def num_parameters(self, geometry: AttentionGeometry) -> int:
        """Parameters added to one block."""
        parts: list[GateSpec | SwitchSpec] = [*self.gates, *([self.switch] if self.switch else [])]
        return sum(part.num_parameters(geometry) for part in parts) + self.num_norm_parameters(geometry)


_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(GateSpec).items() if get_origin(kind) is Literal}

Gates = GateSpec | Mapping[str, Any] | Iterable[GateSpec | Mapping[str, Any]] | None
"""What callers may pass as `gates`: none, one, or several, as specs or as mappings of their fields."""


def as_gates(gates: Gates) -> tuple[GateSpec, ...]:
    """The gates of one block in site order, at most one per site.

    Raises:
        ValueError: if two gates share a site or an entry is not a gate.
    """
    gates = () if gates is None else gates
    if isinstance(gates, GateSpec | Mapping | str) or not isinstance(gates, Iterable):
        gates = (gates,)
    specs: dict[Site, GateSpec] = {}
    for gate in gates:
        spec = GateSpec.from_dict(gate) if isinstance(gate, Mapping) else gate
        if not isinstance(spec, GateSpec):
            raise ValueError(f"{gate!r} is not a gate; pass GateSpec(...) or a mapping of its fields")
        if spec.site in specs:
            raise ValueError(f"two gates at site {spec.site!r}; a block carries at most one gate per site")
        specs[spec.site] = spec
    return tuple(specs[site] for site in SITES if site in specs)


def check_qk_norm(gates: Iterable[GateSpec]) -> None:
    """Refuse gates that the RMS norm of queries and keys cancels.

    Raises:
        ValueError: for a multiplicative headwise gate on queries or keys: the norm of that head divides it out.
    """
    for gate in gates:
        if gate.site in ("query", "key") and gate.granularity == "headwise" and gate.combine == "multiply":
            cure = "use granularity='elementwise'"
            raise ValueError(f"a headwise {gate.site} gate is divided out by the QK-norm that follows; {cure}")
