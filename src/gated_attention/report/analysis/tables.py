"""The tables of an analysis, a row for each model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gated_attention.analysis import Inspection
from gated_attention.analysis.definitions import ALL, GATE_MEASURES
from gated_attention.jobs.analyze import Analysis
from gated_attention.report.analysis.sink_kinds import count_of
from gated_attention.report.tables import Column, Decimals, Table, count_text, number_text, significant, table_of
from gated_attention.spec import SITE_LABELS


class _Head(NamedTuple):
    """The column of a measure."""

    header: str
    decimals: Decimals | int
    unit: str = ""
    beneath: bool = False


_MODEL = Column("Model", numeric=False)
_THREE = significant(3)
_SUMMARY = {
    "f_attn": _Head("F-Attn", 4),
    "f_attn_uniform": _Head("Uniform", 4, beneath=True),
    "m_act": _Head("M-Act", _THREE),
    "gate_mean": _Head("Gate mean", 3),
    "gate_share_below_0.1": _Head("below 0.1", 3, beneath=True),
    "gate_share_above_0.9": _Head("above 0.9", 3, beneath=True),
}
_DETAILS = (
    {
        "f_attn_start": _Head("F-Attn at starts", 4),
        "f_attn_middle": _Head("mid-document", 4, beneath=True),
        "f_attn_late": _Head("From query 4 on", 4),
        "f_attn_late_uniform": _Head("uniform then", 4, beneath=True),
        "sink_rate": _Head("Sink^0.3", 3),
        "value_drain": _Head("Value drain", 2),
        "entropy": _Head("Entropy", 2, "nats"),
        "entropy_uniform": _Head("uniform", 2, beneath=True),
    },
    {
        "attention_cls": _Head("To class tokens", 3),
        "strongest_cls": _Head("strongest", 3, beneath=True),
        "attention_register": _Head("To registers", 3),
        "strongest_register": _Head("strongest", 3, beneath=True),
        "attention_sep": _Head("To separators", 3),
        "strongest_sep": _Head("strongest", 3, beneath=True),
        "attention_content": _Head("To the rest", 3),
        "strongest_content": _Head("strongest", 3, beneath=True),
    },
    {
        "kurtosis": _Head("Kurtosis", _THREE),
        "inf_norm": _Head("Inf norm", _THREE, beneath=True),
        "size_before_gate": _Head("|SDPA output|", _THREE),
        "size_after_gate": _Head("after the gate", _THREE, beneath=True),
        "sparsity_1e-2": _Head("Outputs < 1e-2", 3),
        "sparsity_1e-3": _Head("< 1e-3", 3, beneath=True),
        "gate_first": _Head("Gate at first", 3),
        "gate_rest": _Head("at others", 3, beneath=True),
        "effective_rank": _Head("Effective rank", 1),
        "effective_rank_gated": _Head("with the gate", 1, beneath=True),
    },
)


def summary_table(analyses: Sequence[Analysis]) -> Table:
    """What each model is, its sinks, its activations and its gates."""
    kinds = [
        f"{analysis.family}, {count_text(analysis.num_parameters)} parameters, "
        f"{len(analysis.inspection.attention)} layers, {analysis.num_heads} heads"
        for analysis in analyses
    ]
    measures = [analysis.inspection.measures for analysis in analyses]
    strongest = [(found, largest(found["sink_share"])) for found in measures]
    massive = f"{ALL['massive_tokens'].text}, in the layer that has most"
    sites = [", ".join(SITE_LABELS[site] for site in analysis.inspection.gates) for analysis in analyses]
    return table_of(
        {
            _MODEL: [analysis.label for analysis in analyses],
            Column("Kind", beneath=True, numeric=False): kinds,
            **_measured(analyses, _SUMMARY),
            Column("Strongest key", meaning=ALL["sink_share"].text): [
                f"{found['sink_share'][place]:.3f}" for found, place in strongest
            ],
            Column("its position", beneath=True, meaning=ALL["sink_position"].text): [
                f"{found['sink_position'][place]:.0f}" for found, place in strongest
            ],
            Column("No-op sinks", meaning=ALL["no_op_sink"].text): [
                count_of(analysis.inspection, "no_op_sink") for analysis in analyses
            ],
            Column("broadcast", beneath=True, meaning=ALL["broadcast_sink"].text): [
                count_of(analysis.inspection, "broadcast_sink") for analysis in analyses
            ],
            Column("Massive tokens", meaning=massive): [f"{found['massive_tokens'].max():.2f}" for found in measures],
            Column("Gate sites", meaning="where the gates sit; slashes separate the numbers of several sites"): sites,
        }
    )


def detail_tables(analyses: Sequence[Analysis]) -> list[Table]:
    """The other measures: of attention, by kinds of positions if they have any, of activations and gates."""
    models = {_MODEL: [analysis.label for analysis in analyses]}
    known = {name for analysis in analyses for name in analysis.inspection.measures} | GATE_MEASURES.keys()
    tables = [heads for heads in _DETAILS if known & heads.keys() - GATE_MEASURES.keys()]
    return [table_of({**models, **_measured(analyses, heads)}) for heads in tables]


def _measured(analyses: Sequence[Analysis], heads: Mapping[str, _Head]) -> dict[Column, list[str | None]]:
    """A column for each measure; None for a model without it."""
    return {
        Column(head.header, head.unit, head.beneath, meaning=ALL[name].text): [
            _text(analysis.inspection, name, head.decimals) for analysis in analyses
        ]
        for name, head in heads.items()
    }


def _text(found: Inspection, name: str, decimals: Decimals | int) -> str | None:
    if name in GATE_MEASURES:
        means = [float(np.nanmean(gate.measures[name])) for gate in found.gates.values()]
        return " / ".join(number_text(mean, decimals) for mean in means)
    return number_text(found.overall(name), decimals) if name in found.measures else None


def largest(values: np.ndarray) -> tuple[int, int]:
    """Layer and head of the largest value."""
    layer, head = np.unravel_index(np.nanargmax(values), values.shape)
    return int(layer), int(head)
