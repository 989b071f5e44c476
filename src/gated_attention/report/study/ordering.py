"""Whether a study puts the paper's rows in the paper's order: rank correlation, swapped pairs, signs of differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial, isfinite

import numpy as np
from scipy.stats import permutation_test, rankdata, spearmanr

from gated_attention.registry.published import ROWS, PublishedRow
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import paired_difference, percentile_interval, resamples

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
class Swap:
    """Two variants in the other order than the paper's.

    Attributes:
        lower, higher: As they came out here.
        t: Of the difference, paired over seeds; None for fewer than two.
        is_significant: Whether that difference rejects 0 at 5 %.
    """

    lower: str
    higher: str
    t: float | None
    is_significant: bool


@dataclass(frozen=True, slots=True)
class Order:
    """One column of the paper's tables beside ours, over the rows of one setting that have both.

    Attributes:
        tables: One table, or all of a setting, which name a model once.
        setting: The paper's model and training tokens where a table has several, else empty. Numbers of different
            settings do not compare (Table 2).
        pairs: Cite to the paper's number and ours.
        correlation: Spearman's; None for fewer than three rows or where one side is constant.
        p_value: Share of all orders whose correlation is at least as far from 0.
        interval: Of the correlation, from 2.5 to 97.5 % of its values when seeds are drawn with replacement, the same
            for all rows; None for fewer than two common seeds.
        num_pairs: Pairs of rows whose numbers differ in the paper.
        swaps: Those of them that came out in the other order.
        num_signs: Rows whose difference to their baseline is known on both sides.
        num_agree: How many of these differences have the same sign on both sides.
    """

    tables: tuple[int, ...]
    setting: str
    title: str
    pairs: Mapping[str, tuple[float, float]]
    correlation: float | None
    p_value: float | None
    num_signs: int
    num_agree: int
    interval: tuple[float, float] | None = None
    num_pairs: int = 0
    swaps: tuple[Swap, ...] = ()

    @property
    def name(self) -> str:
        """What is compared, e.g. `Table 1, Perplexity`."""
        tables = f"Table{'s' * (len(self.tables) > 1)} {', '.join(map(str, self.tables))}"
        return ", ".join(filter(None, (tables, self.setting, self.title)))

    def describe(self) -> str:
        """The comparison in one sentence."""
        text = f"{self.name} over {len(self.pairs)} rows: "
        if self.correlation is None:
            text += "too few for a rank correlation"
        else:
            text += f"rank correlation {self.correlation:+.2f} (p = {self.p_value:.2g}"
            text += (
                ")" if self.interval is None else f", over seeds {self.interval[0]:+.2f} to {self.interval[1]:+.2f})"
            )
        if self.num_pairs:
            text += f", {len(self.swaps)} of {self.num_pairs} pairs swapped"
        if self.num_signs:
            text += f", sign of the difference to the baseline as in the paper in {self.num_agree} of {self.num_signs}"
        return text


def orders(comparison: Comparison) -> list[Order]:
    """Every table, setting and column of the paper of which the study has at least two rows.

    Where tables share a setting and together have more models than any of them, all of them follow as one.
    """
    cited = comparison.cited
    settings: dict[int, dict[str, list[PublishedRow]]] = {}
    for key, row in sorted(ROWS.items(), key=lambda item: item[1].table):
        if key in cited:
            settings.setdefault(row.table, {}).setdefault(row.setting, []).append(row)
    found = [
        order
        for table, groups in settings.items()
        for setting, rows in groups.items()
        for order in _columns((table,), setting if len(groups) > 1 else "", rows, cited)
    ]
    by_setting: dict[str, list[PublishedRow]] = {}
    for groups in settings.values():
        for setting, rows in groups.items():
            by_setting.setdefault(setting, []).extend(rows)
    for rows in by_setting.values():
        tables = tuple(dict.fromkeys(row.table for row in rows))
        alone = {order.title: len(order.pairs) for order in sorted(found, key=lambda one: len(one.pairs))}
        models: dict[str, PublishedRow] = {}
        for row in rows:
            models.setdefault(cited[row.cite].variant, row)
        joint = _columns(tables, "", list(models.values()), cited) if len(tables) > 1 else ()
        found += [order for order in joint if len(order.pairs) > alone.get(order.title, 0)]
    return found


def _columns(
    tables: tuple[int, ...], setting: str, rows: Sequence[PublishedRow], cited: Mapping[str, VariantRow]
) -> Iterator[Order]:
    for column, (title, measure) in COLUMNS.items():
        ours = {key: value for key, row in cited.items() if (value := row.mean(measure)) is not None}
        pairs = {
            row.cite: (theirs, ours[row.cite])
            for row in rows
            if (theirs := getattr(row, column)) is not None and row.cite in ours and isfinite(ours[row.cite])
        }
        if len(pairs) < 2:
            continue
        theirs, mine = zip(*pairs.values(), strict=True)
        correlation = spearman(theirs, mine)
        p_value = None if correlation is None else permutation_p(theirs, mine)
        signs = list(_signs(column, rows, ours))  # to a baseline of another table: Table 6 prints none
        by_seed = [cited[key].values.get(measure, {}) for key in pairs]
        interval = None if correlation is None else bootstrap_interval(theirs, by_seed)
        differing = [pair for pair in combinations(pairs, 2) if pairs[pair[0]][0] != pairs[pair[1]][0]]
        swaps = (_swap(pairs, pair, cited, measure) for pair in differing)
        yield Order(
            tables, setting, title, pairs, correlation, p_value, len(signs), sum(signs), interval, len(differing),
            tuple(filter(None, swaps)),
        )  # fmt: skip


def _swap(
    pairs: Mapping[str, tuple[float, float]], pair: tuple[str, str], cited: Mapping[str, VariantRow], measure: str
) -> Swap | None:
    """The pair if its order is the other one here."""
    lower, higher = sorted(pair, key=lambda key: pairs[key][1])
    if pairs[lower][1] == pairs[higher][1] or pairs[lower][0] < pairs[higher][0]:
        return None
    difference = paired_difference(cited[lower].values.get(measure, {}), cited[higher].values.get(measure, {}))
    is_significant = difference.t is not None and difference.verdict == "better"
    return Swap(cited[lower].variant, cited[higher].variant, difference.t, is_significant)


def bootstrap_interval(theirs: Sequence[float], by_seed: Sequence[Mapping[int, float]]) -> tuple[float, float] | None:
    """The interval of the rank correlation over seeds; every seed that is drawn is drawn for all rows.

    Few seeds understate the spread.

    Args:
        theirs: The paper's numbers.
        by_seed: Ours of the same rows, by seed; seeds that are missing or not finite anywhere are left out.
    """
    seeds = sorted(set.intersection(*({seed for seed, value in row.items() if isfinite(value)} for row in by_seed)))
    if len(seeds) < 2:
        return None
    values = np.array([[row[seed] for seed in seeds] for row in by_seed])  # (rows, seeds)
    ranks = rankdata(values[:, resamples(len(seeds))].mean(-1), axis=0)  # (rows, draws)
    ranks -= ranks.mean(0)
    centred = rankdata(theirs) - (len(theirs) + 1) / 2
    lengths = np.linalg.norm(ranks, axis=0) * np.linalg.norm(centred)
    found = (centred @ ranks)[lengths > 0] / lengths[lengths > 0]
    if not len(found):
        return None
    return percentile_interval(found)


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
