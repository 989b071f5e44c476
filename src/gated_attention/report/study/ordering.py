"""Whether a study puts the paper's rows in the paper's order: rank correlation, and signs against the baseline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial, isfinite

import numpy as np
from scipy.stats import permutation_test, rankdata, spearmanr

from gated_attention.registry.published import ROWS, PublishedRow
from gated_attention.study.comparison import Comparison

COLUMNS = {
    "perplexity": ("Perplexity", "val_perplexity"),
    "f_attn": ("F-Attn", "f_attn"),
    "m_act": ("M-Act", "m_act"),
    "gate_score": ("Gate score", "gate_score_mean"),
}
"""The paper's columns that a study measures too: title, and the name of our measure."""

EXACT = 8
"""Rows up to which all orders are counted; beyond, as many as these have are drawn, always the same."""


@dataclass(frozen=True, slots=True)
class Order:
    """One column of one of the paper's tables beside ours, over the rows of one setting that have both.

    Attributes:
        setting: The paper's model and training tokens where a table has several, else empty. Numbers of different
            settings do not compare (Table 2).
        pairs: Cite to the paper's number and ours.
        correlation: Spearman's; None for fewer than three rows or where one side is constant.
        p_value: Share of all orders whose correlation is at least as far from 0.
        num_signs: Rows whose difference to their baseline is known on both sides.
        num_agree: How many of these differences have the same sign on both sides.
    """

    table: int
    setting: str
    title: str
    pairs: Mapping[str, tuple[float, float]]
    correlation: float | None
    p_value: float | None
    num_signs: int
    num_agree: int

    @property
    def name(self) -> str:
        """What is compared, e.g. `Table 1, Perplexity`."""
        return ", ".join(filter(None, (f"Table {self.table}", self.setting, self.title)))

    def describe(self) -> str:
        """The comparison in one sentence."""
        text = f"{self.name} over {len(self.pairs)} rows: "
        if self.correlation is None:
            text += "too few for a rank correlation"
        else:
            text += f"rank correlation {self.correlation:+.2f} (p = {self.p_value:.2g})"
        if self.num_signs:
            text += f", sign of the difference to the baseline as in the paper in {self.num_agree} of {self.num_signs}"
        return text


def orders(comparison: Comparison) -> list[Order]:
    """Every table, setting and column of the paper of which the study has at least two rows."""
    cited = comparison.cited
    settings: dict[int, dict[str, list[PublishedRow]]] = {}
    for key, row in sorted(ROWS.items(), key=lambda item: item[1].table):
        if key in cited:
            settings.setdefault(row.table, {}).setdefault(row.setting, []).append(row)
    found = []
    for table, groups in settings.items():
        for setting, rows in groups.items():
            for column, (title, measure) in COLUMNS.items():
                ours = {key: value for key, row in cited.items() if (value := row.mean(measure)) is not None}
                pairs = {
                    row.cite: (theirs, ours[row.cite])
                    for row in rows
                    if (theirs := getattr(row, column)) is not None and row.cite in ours and isfinite(ours[row.cite])
                }
                if len(pairs) > 1:
                    theirs, mine = zip(*pairs.values(), strict=True)
                    correlation = spearman(theirs, mine)
                    p_value = None if correlation is None else permutation_p(theirs, mine)
                    signs = list(_signs(column, rows, ours))  # to a baseline of another table: Table 6 prints none
                    name = setting if len(groups) > 1 else ""
                    found.append(Order(table, name, title, pairs, correlation, p_value, len(signs), sum(signs)))
    return found


def _signs(column: str, rows: Sequence[PublishedRow], ours: Mapping[str, float]) -> Iterator[bool]:
    for row in rows:
        if row.baseline is None or row.cite not in ours or row.baseline not in ours:
            continue
        value, baseline = getattr(row, column), getattr(ROWS[row.baseline], column)
        if value is not None and baseline is not None and value != baseline:
            yield (value < baseline) == (ours[row.cite] < ours[row.baseline])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None for fewer than three or a constant side."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(spearmanr(x, y).statistic)


def permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided probability of a rank correlation at least as far from 0 if the order of `y` were random.

    Exact up to `EXACT` values, then from random orders with a fixed seed, the observed one counted among them.
    """
    centred = rankdata(x) - (len(x) + 1) / 2

    def distance(order: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(np.abs((centred * order).sum(axis)))

    found = permutation_test(
        (rankdata(y),), distance, permutation_type="pairings", n_resamples=factorial(EXACT), alternative="greater",
        vectorized=True, rng=0,
    )  # fmt: skip
    return float(found.pvalue)
