"""The columns of a study's tables: what each means, and the measure that it prints."""

from typing import NamedTuple

from gated_attention.analysis.definitions import ALL
from gated_attention.registry.choices import TEXT
from gated_attention.report.tables import Column, Decimals, fixed, significant
from gated_attention.study.comparison import LOSS, Comparison
from gated_attention.study.statistics import CONFIDENCE

SINK_FACTOR = 10.0
"""F-Attn over its uniform value from which a model counts as having an attention sink."""

REMOVED_SHARE = 1 / 3
"""A sink counts as removed if F-Attn falls to this share of the reference's."""


class MeasureColumn(NamedTuple):
    """A column and the measure that it prints, in the comparison with its standard deviation if `has_spread`."""

    column: Column
    measure: str
    decimals: Decimals
    has_spread: bool = False


def _over_heads(measure: str, rest: str = "heads and layers") -> str:
    return f"{ALL[measure].text}, then over {rest} ({ALL[measure].source})"


VARIANT = Column("Variant", numeric=False)
PARAMETERS = Column("Parameters", "M")
RESIDUE = Column(
    "Residue", "%", beneath=True, meaning="share of the reference's parameters by which a variant's exceed them"
)
VERDICT = Column(
    "Verdict", numeric=False,
    meaning=f"better or worse if a paired t test rejects a difference of 0 at {100 * (1 - CONFIDENCE):.0f} %: if |t| "
    "exceeds the two-sided quantile of Student's t for n - 1 degrees of freedom, 4.30 at n = 3",
)  # fmt: skip
F_ATTN = Column("F-Attn", better="lower", meaning=_over_heads("f_attn"))
M_ACT = Column("M-Act", better="lower", meaning=f"{ALL['m_act'].text} ({ALL['m_act'].source})")
GATE_MEAN = Column("Gate mean", meaning=_over_heads("gate_mean", "heads, layers and sites"))
INSIDE = (
    MeasureColumn(F_ATTN, "f_attn", fixed(4)),
    MeasureColumn(Column("Uniform", beneath=True, meaning=ALL["f_attn_uniform"].text), "f_attn_uniform", fixed(4)),
    MeasureColumn(Column("No-op sinks", better="lower", meaning=_over_heads("no_op_sink")), "no_op_sink", fixed(4)),
    MeasureColumn(
        Column("Broadcast sinks", beneath=True, meaning=_over_heads("broadcast_sink")), "broadcast_sink", fixed(4)
    ),
    MeasureColumn(Column("On the class token", meaning=_over_heads("attention_cls")), "attention_cls", fixed(4)),
    MeasureColumn(
        Column("On registers", beneath=True, meaning=_over_heads("attention_register")), "attention_register", fixed(4)
    ),
    MeasureColumn(
        Column("On the strongest patch", meaning=_over_heads("strongest_content")), "strongest_content", fixed(4)
    ),
    MeasureColumn(M_ACT, "m_act", significant(3)),
    MeasureColumn(GATE_MEAN, "gate_score_mean", fixed(4)),
    MeasureColumn(
        Column("Below 0.1", beneath=True, meaning=ALL["gate_share_below_0.1"].text), "gate_share_below_0.1", fixed(4)
    ),
    MeasureColumn(Column("Open gates", meaning=ALL["gate_share_open"].text), "gate_open_share", fixed(4)),
    MeasureColumn(
        Column(
            "Expert load", "highest",
            meaning="held-out tokens that a router sends to an expert, over those that each would get if all got the "
            "same",
        ), "expert_load_max", fixed(2),
    ),
    MeasureColumn(
        Column("Dead experts", beneath=True, meaning="experts that no held-out token reaches"), "dead_experts", fixed(0)
    ),
    MeasureColumn(
        Column(
            "Tokens/s", better="higher",
            meaning="median training throughput, evaluation and checkpoints left out, on the device named below",
        ), "train_tokens_per_s", fixed(0),
    ),
    MeasureColumn(
        Column(
            "Memory", "GiB", beneath=True, better="lower",
            meaning="peak device memory of a run; on a CPU, peak resident memory of the whole process up to then",
        ), "peak_memory_gib", fixed(2),
    ),
)  # fmt: skip


def losses(comparison: Comparison) -> tuple[MeasureColumn, ...]:
    """The columns of the loss that variants are compared by, and of what follows from the same predictions."""
    predicted = "the label of a held-out image"
    if comparison.task == TEXT:
        predicted = "the next token on held-out text"
    return (
        MeasureColumn(
            Column(
                "Validation loss", comparison.unit, better="lower",
                meaning=f"mean cross-entropy of {predicted}, natural logarithm",
            ), LOSS, fixed(4), has_spread=True,
        ),
        MeasureColumn(
            Column(
                "PPL", beneath=True, better="lower",
                meaning="perplexity, the exponential of the validation loss, per token of this study's tokenizer",
            ), "val_perplexity", significant(5), has_spread=True,
        ),
        MeasureColumn(
            Column(
                "Accuracy", beneath=True, better="higher",
                meaning="share of held-out images whose likeliest label is right",
            ), "accuracy", fixed(4), has_spread=True,
        ),
    )  # fmt: skip


def difference(comparison: Comparison) -> Column:
    """The column of the paired difference in loss."""
    return Column(
        "Difference", comparison.unit, better="lower",
        meaning="mean over seeds of the validation loss minus the reference's with the same seed",
    )  # fmt: skip
