"""The registry of variants: one row per model, gates as data. Imports neither torch nor transformers."""

from dataclasses import dataclass

from gated_attention.penalty import GatePenalty
from gated_attention.spec import BlockSpec, GateSpec

_PLAIN = BlockSpec()


@dataclass(frozen=True, slots=True)
class Variant:
    """One trainable model.

    Attributes:
        block: What every decoder block carries.
        cites: Rows of the paper's tables that are this model, e.g. `T1.5`.
        match_parameters: Whether the FFN is narrowed so that the block costs nothing extra.
        gate_penalty: Pressure on the block's hard-sigmoid gates to close, in training.
    """

    name: str
    block: BlockSpec = _PLAIN
    cites: tuple[str, ...] = ()
    match_parameters: bool = True
    gate_penalty: GatePenalty | None = None

    def describe(self) -> str:
        """The block in words, and what presses on its gates."""
        words = self.block.describe()
        return f"{words}, {self.gate_penalty.describe()}" if self.gate_penalty else words


def _gated(name: str, *gates: GateSpec, cites: tuple[str, ...] = ()) -> Variant:
    return Variant(name, BlockSpec(gates), cites)


_HARD = GateSpec(granularity="headwise", activation="hard_sigmoid")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("baseline", cites=("T1.1", "T3.1", "T4.1")),
        _gated("sdpa-elementwise", GateSpec(), cites=("T1.5", "T3.2", "T4.2")),
        _gated("sdpa-headwise", GateSpec(granularity="headwise"), cites=("T1.10", "T4.3")),
        _gated("value-elementwise", GateSpec("value"), cites=("T1.6", "T3.3", "T4.5")),
        _gated("value-headwise", GateSpec("value", "headwise"), cites=("T1.11",)),
        _gated("key-elementwise", GateSpec("key"), cites=("T1.7",)),
        _gated("query-elementwise", GateSpec("query"), cites=("T1.8",)),
        _gated("output-elementwise", GateSpec("output"), cites=("T1.9",)),
        _gated("sdpa-head-shared", GateSpec(head_shared=True), cites=("T1.12", "T4.4")),
        _gated("value-head-shared", GateSpec("value", head_shared=True), cites=("T1.13",)),
        _gated("sdpa-additive-silu", GateSpec(combine="add", activation="silu"), cites=("T1.14", "T3.4")),
        _gated("sdpa-silu", GateSpec(activation="silu"), cites=("T1.15",)),
        _gated("sdpa-additive-identity", GateSpec(combine="add", activation="identity"), cites=("T3.7",)),
        _gated("sdpa-parameter", GateSpec(input="parameter", init="zeros"), cites=("T4.6",)),
        _gated("sdpa-ns-sigmoid", GateSpec(activation="ns_sigmoid"), cites=("T4.7",)),
        _gated("sdpa-value-elementwise", GateSpec(), GateSpec("value")),
        _gated("sdpa-headwise-narrow", GateSpec(granularity="headwise", input_dim=12)),
        _gated("sdpa-headwise-open", GateSpec(granularity="headwise", init="zeros", scale=2.0)),
        _gated("sdpa-headwise-hard", _HARD),
        Variant("sdpa-headwise-sparse", BlockSpec((_HARD,)), gate_penalty=GatePenalty(0.05)),
        Variant("sdpa-headwise-sparse-40", BlockSpec((_HARD,)), gate_penalty=GatePenalty(0.5, target=0.4)),
    )
}
"""Every variant by name; a new one is a new row."""


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; choose from {', '.join(VARIANTS)}")
    return VARIANTS[name]
