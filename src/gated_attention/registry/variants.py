"""The registry of variants: one row of data per trained model.

Tables 1, 3, 4 and 6 add parameters to a mixture of experts, 15A2B; Table 2 compares dense models with equal parameter
counts. A study therefore narrows the FFN of a dense size, and not that of a mixture of experts.

The rows of Table 2 also differ in depth, tokens and batch size. A study has one size and one length, so rows that
differ only in these are one variant here. Its learning rates are factors of the lowest, 4.0e-3.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from gated_attention.ranges import require_choice
from gated_attention.registry.penalty import GatePenalty
from gated_attention.sizes import ModelSize, match_parameters
from gated_attention.spec import BlockSpec, GateSpec, SwitchSpec

BASELINE = "baseline"
"""Name of the variant that the others are compared with, if a study has it."""

_PLAIN = BlockSpec()

_WORDS = {"num_key_value_heads": "key/value heads", "num_attention_heads": "query heads", "num_experts": "experts"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One trainable model.

    Attributes:
        block: The block of every layer.
        cites: Rows of the paper's tables that are this model, e.g. `T1.5`; `A.6` is an appendix without a table.
        widen: Fields of the size and their growth factors; results are rounded up.
        learning_rate: Factor on the study's peak learning rate.
        match_parameters: Whether the FFN of a dense size is narrowed so that the parameter count stays equal.
        gate_penalty: Training penalty that closes the block's hard-sigmoid gates.
        registers: Learned tokens beside the patches of an image; see `registry.vision`.
    """

    name: str
    block: BlockSpec = _PLAIN
    cites: tuple[str, ...] = ()
    widen: tuple[tuple[str, Fraction], ...] = ()
    learning_rate: Fraction = Fraction(1)
    match_parameters: bool = True
    gate_penalty: GatePenalty | None = None
    registers: int = 0

    def describe(self) -> str:
        """The block in words, and what else departs from the baseline."""
        is_plain = self.block == _PLAIN and (self.widen or self.learning_rate != 1 or self.registers)
        words = [] if is_plain else [self.block.describe()]
        words += [f"{self.registers} registers"] if self.registers else []
        words += [f"{float(factor):g} times the {_WORDS[name]}" for name, factor in self.widen]
        if self.learning_rate != 1:
            words.append(f"{float(self.learning_rate):g} times the learning rate")
        if self.gate_penalty:
            words.append(self.gate_penalty.describe())
        return ", ".join(words)

    def resize(self, size: ModelSize) -> ModelSize:
        """The size at which this variant trains: widened, or with its FFN narrowed to an equal parameter count.

        Raises:
            ValueError: if the size has nothing to widen, or the block costs more than the FFN.
        """
        for name, factor in self.widen:
            if not getattr(size, name):
                raise ValueError(
                    f"variant {self.name!r} adds {_WORDS[name]}, and size {size.name!r} has none; "
                    "choose a mixture of experts, such as moe-tiny"
                )
            size = replace(size, **{name: ceil(getattr(size, name) * factor)})
        return match_parameters(size, self.block) if self.matches(size) else size

    def matches(self, size: ModelSize) -> bool:
        """Whether this variant trains with an equal parameter count at this size."""
        return self.match_parameters and not size.num_experts


def _gated(name: str, *gates: GateSpec, cites: tuple[str, ...] = ()) -> Variant:
    return Variant(name, BlockSpec(gates), cites)


def _wide(name: str, cite: str, field: str, factor: Fraction) -> Variant:
    return Variant(name, cites=(cite,), widen=((field, factor),), match_parameters=False)


_ELEMENTWISE, _HEADWISE = GateSpec(), GateSpec(granularity="headwise")
_HARD = GateSpec(granularity="headwise", activation="hard_sigmoid")
_LR_4_5, _LR_5_3, _LR_8 = Fraction(45, 40), Fraction(53, 40), Fraction(80, 40)  # of 4.0e-3

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, cites=("T1.1", "T2.1", "T2.5", "T3.1", "T4.1")),
        _wide("kv-heads-x2", "T1.2", "num_key_value_heads", Fraction(2)),
        _wide("query-heads-x1.5", "T1.3", "num_attention_heads", Fraction(3, 2)),
        _wide("experts-x1.03", "T1.4", "num_experts", Fraction(132, 128)),
        _gated("sdpa-elementwise", _ELEMENTWISE, cites=("T1.5", "T2.2", "T2.8", "T3.2", "T4.2")),
        _gated("value-elementwise", GateSpec("value"), cites=("T1.6", "T3.3", "T4.5")),
        _gated("key-elementwise", GateSpec("key"), cites=("T1.7",)),
        _gated("query-elementwise", GateSpec("query"), cites=("T1.8",)),
        _gated("output-elementwise", GateSpec("output"), cites=("T1.9",)),
        _gated("sdpa-headwise", _HEADWISE, cites=("T1.10", "T2.9", "T4.3")),
        _gated("value-headwise", GateSpec("value", "headwise"), cites=("T1.11", "T6.5")),
        _gated("sdpa-head-shared", GateSpec(head_shared=True), cites=("T1.12", "T4.4")),
        _gated("value-head-shared", GateSpec("value", head_shared=True), cites=("T1.13",)),
        _gated("sdpa-additive-silu", GateSpec(combine="add", activation="silu"), cites=("T1.14", "T3.4")),
        _gated("sdpa-silu", GateSpec(activation="silu"), cites=("T1.15",)),
        Variant("baseline-lr-4.5", cites=("T2.3",), learning_rate=_LR_4_5),
        Variant("sdpa-elementwise-lr-4.5", BlockSpec((_ELEMENTWISE,)), ("T2.4",), learning_rate=_LR_4_5),
        Variant("baseline-lr-8", cites=("T2.6", "T2.12"), learning_rate=_LR_8),
        Variant("sandwich-norm-lr-8", BlockSpec(sandwich_norm=True), ("T2.7",), learning_rate=_LR_8),
        Variant("sdpa-elementwise-lr-8", BlockSpec((_ELEMENTWISE,)), ("T2.10", "T2.14"), learning_rate=_LR_8),
        Variant("baseline-lr-5.3", cites=("T2.11",), learning_rate=_LR_5_3),
        Variant("sdpa-elementwise-lr-5.3", BlockSpec((_ELEMENTWISE,)), ("T2.13",), learning_rate=_LR_5_3),
        Variant("heads-rms-norm", BlockSpec(sdpa_transform="rms_norm"), ("T3.5",)),
        Variant("heads-silu", BlockSpec(sdpa_transform="silu"), ("T3.6",)),
        _gated("sdpa-additive-identity", GateSpec(combine="add", activation="identity"), cites=("T3.7",)),
        _gated("sdpa-parameter", GateSpec(input="parameter", init="zeros"), cites=("T4.6",)),
        _gated("sdpa-ns-sigmoid", GateSpec(activation="ns_sigmoid"), cites=("T4.7",)),
        Variant("switch-kv-8-top-8", BlockSpec(switch=SwitchSpec("key_value", 8, 8)), ("T6.1",)),
        Variant("switch-kv-4-top-4", BlockSpec(switch=SwitchSpec("key_value", 4, 4)), ("T6.2",)),
        Variant("switch-v-4-top-4", BlockSpec(switch=SwitchSpec("value", 4, 4)), ("T6.3",)),
        Variant("switch-v-8-top-2", BlockSpec(switch=SwitchSpec("value", 8, 2)), ("T6.4",)),
        # T2.7's structure at the study's own rate, and the gates in it: what the gate adds to a block that has it.
        Variant("sandwich-norm", BlockSpec(sandwich_norm=True)),
        Variant("sandwich-norm-sdpa-headwise", BlockSpec((_HEADWISE,), sandwich_norm=True)),
        Variant("sandwich-norm-sdpa-elementwise", BlockSpec((_ELEMENTWISE,), sandwich_norm=True)),
        Variant("clip-300-lr-8", BlockSpec(output_clip=300.0), ("A.6",), learning_rate=_LR_8),
        Variant("clip-100-lr-8", BlockSpec(output_clip=100.0), ("A.6",), learning_rate=_LR_8),
        _gated("sdpa-value-elementwise", _ELEMENTWISE, GateSpec("value")),
        _gated("sdpa-headwise-narrow", GateSpec(granularity="headwise", input_dim=12)),
        _gated("sdpa-headwise-open", GateSpec(granularity="headwise", init="zeros", scale=2.0)),
        _gated("learned-sink", GateSpec(granularity="headwise", input="lse", bias=0.0)),
        _gated("softmax-off-by-one", GateSpec(granularity="headwise", input="lse")),
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
    require_choice("variant", name, VARIANTS)
    return VARIANTS[name]


def gates_of(name: str) -> tuple[GateSpec, ...]:
    """The gates of a variant that consists of gates only.

    Raises:
        ValueError: if there is no such variant, or it changes something else in a block.
    """
    block = get_variant(name).block
    if not block.gates or block != BlockSpec(block.gates):
        raise ValueError(f"variant {name!r} is {block.describe()}; choose one that is gates and nothing else")
    return block.gates


def variants_of(table: int) -> list[Variant]:
    """The variants that are rows of one of the paper's tables, in the order of its rows.

    Raises:
        ValueError: if none is.
    """
    rows = {
        int(cite.split(".")[1]): variant
        for variant in VARIANTS.values()
        for cite in variant.cites
        if cite.startswith(f"T{table}.")
    }
    if not rows:
        raise ValueError(f"no variant is a row of table {table}; choose from {', '.join(map(str, TABLES))}")
    return list({rows[row].name: rows[row] for row in sorted(rows)}.values())


TABLES = sorted({int(cite[1]) for variant in VARIANTS.values() for cite in variant.cites if cite.startswith("T")})
"""The paper's tables that the registry holds."""
