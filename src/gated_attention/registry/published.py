"""The paper's tables as data, so that a report can show its own numbers beside them.

Qiu et al., "Gated Attention for Large Language Models" (arXiv 2505.06708), Tables 1 to 6. A row is
cited by table and row: `T1.5` is Table 1, row 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

MOE = "15A2B MoE, 400B tokens"
"""Setting of Tables 1, 3, 4 and 6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One row of one of the paper's tables; None where its table has no such column or no value.

    Attributes:
        setting: Model and training tokens.
        baseline: Cite of the row it is compared with, at equal data and learning rate where the
            paper has one; None for a baseline itself.
        score_shape: Gate scores of n tokens, with q query heads, k key/value heads, head width d_k.
        added_parameters_m: Parameters added to the baseline, in millions.
        max_learning_rate: Peak of the schedule.
        perplexity: Mean over held-out English, Chinese, code, mathematics, law and literature.
        gate_score: Mean gate score, 0 to 1.
        m_act: Largest absolute hidden state, mean over layers.
        f_attn: Share of attention on the first token, 0 to 1.
        scores: Benchmark name, or context length for RULER, to its score in percent.
        note: Where tables disagree, what the paper leaves open, or why values are missing.
    """

    table: int
    row: int
    method: str
    setting: str
    baseline: str | None = None
    activation: str | None = None
    score_shape: str | None = None
    added_parameters_m: float | None = None
    max_learning_rate: float | None = None
    perplexity: float | None = None
    gate_score: float | None = None
    m_act: float | None = None
    f_attn: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def cite(self) -> str:
        """The row's key, e.g. `T1.5`."""
        return f"T{self.table}.{self.row}"


_COLUMNS = {
    1: ("method activation score_shape added_parameters_m perplexity", "HellaSwag MMLU GSM8k C-eval"),
    2: ("baseline setting method max_learning_rate perplexity", "HumanEval MMLU GSM8k HellaSwag C-eval CMMLU"),
    3: ("method activation perplexity", "HellaSwag MMLU GSM8k C-eval"),
    4: ("method activation gate_score m_act f_attn perplexity", "HellaSwag MMLU GSM8k"),
    5: ("baseline setting method", "4k 8k 16k 32k 64k 128k"),
    6: ("method added_parameters_m perplexity", "MMLU GSM8k HellaSwag C-eval"),
}
"""By table, the order of a row's values: fields of `PublishedRow`, then scores."""

_BASELINES = {1: "T1.1", 3: "T3.1", 4: "T4.1", 6: "T1.1"}  # Table 6 has no baseline of its own; its model is Table 1's


def _row(table: int, row: int, *values: str | float | None, note: str = "") -> PublishedRow:
    fields, names = (columns.split() for columns in _COLUMNS[table])
    baseline = _BASELINES.get(table)
    cells: dict[str, Any] = {"setting": MOE, "baseline": None if baseline == f"T{table}.{row}" else baseline}
    cells |= zip(fields + names, values, strict=True)
    scores = {name: score for name in names if (score := cells.pop(name)) is not None}
    return PublishedRow(table=table, row=row, scores=MappingProxyType(scores), note=note, **cells)


_28L_400B = "1.7B dense, 28 layers, 400B tokens, batch 1024"
_28L_3500B = "1.7B dense, 28 layers, 3.5T tokens, batch 2048"
_48L_400B = "1.7B dense, 48 layers, 400B tokens, batch 1024"
_48L_1000B = "1.7B dense, 48 layers, 1T tokens, batch 4096"
_LONG = "1.7B dense, 28 layers, 3.5T tokens, then 80B tokens at 32k"

_T6_ADDED = "the added parameters do not follow from Table 7"
_HEAD_SHARED = "not stated whether heads are averaged before or after the sigmoid; this package does it after"

ROWS: dict[str, PublishedRow] = {
    row.cite: row
    for row in (
        _row(1, 1, "baseline (q 32, kv 4)", None, None, 0, 6.026, 73.07, 58.79, 52.92, 60.26),
        _row(1, 2, "k = 8", None, None, 50, 5.979, 73.51, 59.78, 52.16, 62.26),
        _row(1, 3, "q = 48", None, None, 201, 5.953, 73.59, 58.45, 53.30, 59.67),
        _row(1, 4, "add 4 experts", None, None, 400, 5.964, 73.19, 58.84, 52.54, 63.19,
            note="added parameters: 453M if calculated from Table 7"),
        _row(1, 5, "SDPA elementwise G1", "sigmoid", "n q d_k", 201, 5.761, 74.64, 60.82, 55.27, 62.20),
        _row(1, 6, "v elementwise G2", "sigmoid", "n k d_k", 25, 5.820, 74.38, 59.17, 53.97, 61.00,
            note="GSM8k: T4.5 prints 51.33 for this model"),
        _row(1, 7, "k elementwise G3", "sigmoid", "n k d_k", 25, 6.016, 72.88, 59.18, 50.49, 61.74),
        _row(1, 8, "q elementwise G4", "sigmoid", "n q d_k", 201, 5.981, 73.01, 58.74, 53.97, 62.14),
        _row(1, 9, "dense output G5", "sigmoid", "n d_model", 100, 6.017, 73.32, 59.41, 50.87, 59.43),
        _row(1, 10, "SDPA headwise G1", "sigmoid", "n q", 1.6, 5.792, 74.50, 60.05, 54.44, 62.61),
        _row(1, 11, "v headwise G2", "sigmoid", "n k", 0.2, 5.808, 74.38, 59.32, 53.53, 62.61,
            note="added parameters: T6.5 prints 3M for this model"),
        _row(1, 12, "SDPA head-shared G1", "sigmoid", "n d_k", 201, 5.801, 74.34, 60.06, 53.15, 61.01,
            note=_HEAD_SHARED),
        _row(1, 13, "v head-shared G2", "sigmoid", "n d_k", 25, 5.867, 74.10, 59.02, 53.03, 60.61,
            note=_HEAD_SHARED),
        _row(1, 14, "SDPA additive G1", "SiLU", "n q d_k", 201, 5.821, 74.81, 60.06, 53.30, 60.98),
        _row(1, 15, "SDPA elementwise G1", "SiLU", "n q d_k", 201, 5.822, 74.22, 60.49, 54.59, 62.34),
        _row(2, 1, None, _28L_400B, "baseline", 4.0e-3, 7.499, 28.66, 50.21, 27.82, 64.94, 49.15, 49.52),
        _row(2, 2, "T2.1", _28L_400B, "SDPA elementwise", 4.0e-3, 7.404, 29.27, 51.15, 28.28, 65.48, 50.72, 50.72),
        _row(2, 3, None, _28L_3500B, "baseline", 4.5e-3, 6.180, 34.15, 59.10, 69.07, 68.02, 68.19, 64.95),
        _row(2, 4, "T2.3", _28L_3500B, "SDPA elementwise", 4.5e-3, 6.130, 37.80, 59.61, 70.20, 68.84, 68.52, 65.76),
        _row(2, 5, None, _48L_400B, "baseline", 4.0e-3, 7.421, 28.05, 52.04, 32.98, 65.96, 51.11, 51.86),
        _row(2, 6, None, _48L_400B, "baseline", 8.0e-3, 9.195, 21.34, 44.28, 15.24, 57.00, 43.11, 42.63),
        _row(2, 7, "T2.6", _48L_400B, "baseline + sandwich norm", 8.0e-3,
            7.407, 30.49, 52.07, 32.90, 66.00, 52.04, 51.72),
        _row(2, 8, "T2.5", _48L_400B, "SDPA elementwise", 4.0e-3, 7.288, 31.71, 52.44, 32.37, 66.28, 52.06, 52.29),
        _row(2, 9, "T2.5", _48L_400B, "SDPA headwise", 4.0e-3, 7.370, 31.10, 53.83, 34.12, 65.59, 55.07, 52.38),
        _row(2, 10, "T2.6", _48L_400B, "SDPA elementwise", 8.0e-3, 7.325, 31.10, 54.47, 36.62, 66.40, 53.91, 53.80),
        _row(2, 11, None, _48L_1000B, "baseline", 5.3e-3, 7.363, 29.88, 54.44, 32.22, 65.43, 53.72, 53.37),
        _row(2, 12, None, _48L_1000B, "baseline", 8.0e-3, None, None, None, None, None, None, None, note="diverged"),
        _row(2, 13, "T2.11", _48L_1000B, "SDPA elementwise", 5.3e-3, 7.101, 34.15, 55.70, 36.69, 67.17, 54.51, 54.68),
        _row(2, 14, "T2.12", _48L_1000B, "SDPA elementwise", 8.0e-3, 7.078, 31.71, 56.47, 39.73, 67.38, 55.52, 55.77,
            note="the baseline at this learning rate, T2.12, diverged"),
        _row(3, 1, "baseline", None, 6.026, 73.07, 58.79, 52.92, 60.26),
        _row(3, 2, "SDPA elementwise gate", "sigmoid", 5.761, 74.64, 60.82, 55.27, 62.20),
        _row(3, 3, "v elementwise gate", "sigmoid", 5.820, 74.38, 59.17, 53.97, 61.00),
        _row(3, 4, "SDPA additive gate", "SiLU", 5.821, 74.81, 60.06, 53.30, 60.98),
        _row(3, 5, "SDPA GroupNorm", "RMSNorm", 5.847, 74.10, 60.15, 53.75, 61.14),
        _row(3, 6, "SDPA SiLU", "SiLU", 5.975, 73.34, 59.55, 53.19, 60.90),
        _row(3, 7, "SDPA additive gate", "identity", 5.882, 74.17, 59.20, 52.77, 59.86),
        _row(4, 1, "baseline", None, None, 1053, 0.467, 6.026, 73.07, 58.79, 52.92),
        _row(4, 2, "SDPA elementwise", "sigmoid", 0.116, 94, 0.048, 5.761, 74.64, 60.82, 55.27),
        _row(4, 3, "SDPA headwise", "sigmoid", 0.172, 98, 0.073, 5.792, 74.50, 60.05, 54.44),
        _row(4, 4, "SDPA elementwise head-shared", "sigmoid", 0.271, 286, 0.301, 5.801, 74.34, 60.06, 53.15,
            note=_HEAD_SHARED),
        _row(4, 5, "v elementwise", "sigmoid", 0.221, 125, 0.297, 5.820, 74.38, 59.17, 51.33,
            note="GSM8k: T1.6 prints 53.97 for this model"),
        _row(4, 6, "SDPA input-independent", "sigmoid", 0.335, 471, 0.364, 5.917, 73.64, 59.02, 52.40),
        _row(4, 7, "SDPA elementwise", "NS-sigmoid", 0.653, 892, 0.451, 5.900, 74.05, 60.05, 52.75,
            note="F-Attn: Fig. 6 prints 0.481"),
        _row(5, 1, None, _LONG, "baseline, trained to 32k", 88.89, 85.88, 83.15, 79.50, None, None),
        _row(5, 2, "T5.1", _LONG, "SDPA gate, trained to 32k", 90.56, 87.11, 84.61, 79.77, None, None),
        _row(5, 3, None, _LONG, "baseline + YaRN to 128k", 82.90, 71.52, 61.23, 37.94, 37.51, 31.65),
        _row(5, 4, "T5.3", _LONG, "SDPA gate + YaRN to 128k", 88.13, 80.01, 76.74, 72.88, 66.60, 58.82),
        _row(6, 1, "switch kv, 8 top 8", 38, 5.847, 59.17, 52.54, 73.32, 61.01, note=_T6_ADDED),
        _row(6, 2, "switch kv, 4 top 4", 13, 5.935, 58.14, 53.27, 73.75, 59.67, note=_T6_ADDED),
        _row(6, 3, "switch v, 4 top 4", 13, 5.820, 59.02, 52.77, 73.34, 61.74, note=_T6_ADDED),
        _row(6, 4, "switch v, 8 top 2", 25, 5.870, 59.10, 53.53, 74.17, 62.34, note=_T6_ADDED),
        _row(6, 5, "switch v, 1 top 1", 3, 5.808, 59.32, 53.53, 74.38, 62.61,
            note="added parameters: T1.11 prints 0.2M for this model"),
    )
}  # fmt: skip
"""Every row of Tables 1 to 6 by its cite."""


def cite(key: str) -> PublishedRow:
    """The published row of that cite, e.g. `T1.5`.

    Raises:
        ValueError: if Tables 1 to 6 have no such row.
    """
    if key not in ROWS:
        last_rows = {row.table: row.cite for row in ROWS.values()}
        ranges = ", ".join(f"T{table}.1 to {last}" for table, last in last_rows.items())
        raise ValueError(f"unknown cite {key!r}; choose a table row of the paper: {ranges}")
    return ROWS[key]
