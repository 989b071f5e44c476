"""The registry of variants: one row per model, gates as data. Imports neither torch nor transformers."""

from dataclasses import dataclass

from gated_attention.spec import GateSpec


@dataclass(frozen=True, slots=True)
class Variant:
    """One trainable model.

    Attributes:
        gates: The gates of every attention block.
        cites: Rows of the paper's tables that are this model, e.g. `T1.5`.
        match_parameters: Whether the FFN is narrowed so that the gates cost nothing.
    """

    name: str
    gates: tuple[GateSpec, ...] = ()
    cites: tuple[str, ...] = ()
    match_parameters: bool = True

    def describe(self) -> str:
        """The gates in words."""
        return " + ".join(gate.describe() for gate in self.gates) or "no gate"


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("baseline", cites=("T1.1", "T3.1", "T4.1")),
        Variant("sdpa-elementwise", (GateSpec(),), ("T1.5", "T3.2", "T4.2")),
        Variant("sdpa-headwise", (GateSpec(granularity="headwise"),), ("T1.10", "T4.3")),
        Variant("value-elementwise", (GateSpec("value"),), ("T1.6", "T3.3", "T4.5")),
        Variant("value-headwise", (GateSpec("value", "headwise"),), ("T1.11",)),
        Variant("key-elementwise", (GateSpec("key"),), ("T1.7",)),
        Variant("query-elementwise", (GateSpec("query"),), ("T1.8",)),
        Variant("output-elementwise", (GateSpec("output"),), ("T1.9",)),
        Variant("sdpa-head-shared", (GateSpec(head_shared=True),), ("T1.12", "T4.4")),
        Variant("value-head-shared", (GateSpec("value", head_shared=True),), ("T1.13",)),
        Variant("sdpa-additive-silu", (GateSpec(combine="add", activation="silu"),), ("T1.14", "T3.4")),
        Variant("sdpa-silu", (GateSpec(activation="silu"),), ("T1.15",)),
        Variant("sdpa-additive-identity", (GateSpec(combine="add", activation="identity"),), ("T3.7",)),
        Variant("sdpa-parameter", (GateSpec(input="parameter", init="zeros"),), ("T4.6",)),
        Variant("sdpa-ns-sigmoid", (GateSpec(activation="ns_sigmoid"),), ("T4.7",)),
        Variant("sdpa-value-elementwise", (GateSpec(), GateSpec("value"))),
        Variant("sdpa-headwise-narrow", (GateSpec(granularity="headwise", input_dim=12),)),
        Variant("sdpa-headwise-open", (GateSpec(granularity="headwise", init="zeros", scale=2.0),)),
        Variant("sdpa-headwise-hard", (GateSpec(granularity="headwise", activation="hard_sigmoid"),)),
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
