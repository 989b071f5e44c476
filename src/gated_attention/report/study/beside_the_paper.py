"""A study beside the paper: its numbers next to ours, and whether the rows come out in its order."""

from collections.abc import Iterator, Sequence
from math import log

from gated_attention.registry.published import ROWS, PublishedRow, cite
from gated_attention.report.blocks import Block, Bullets, Details, Heading, Paragraph, TableBlock
from gated_attention.report.study.ordering import COLUMNS, Order, orders
from gated_attention.report.study.sections import scale_text
from gated_attention.report.study.table import difference_text, spread_text
from gated_attention.report.tables import ABSENT, Cell, Column, Table, fixed, number_text, table_of
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference

_Group = Sequence[PublishedRow]
"""Rows of the paper that print one model."""


def beside_paper(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """The paper's own numbers for the variants that it has, its baseline beside them; nothing where it has none."""
    entries = [(row, group) for row in comparison.rows for group in _published(row)]
    if not entries:
        return
    rows, groups = zip(*entries, strict=True)
    baselines = [tuple(cite(row.baseline) for row in group if row.baseline) for group in groups]
    ratios = [_log_ratio(group, baseline) for group, baseline in zip(groups, baselines, strict=True)]
    gates = [row.measures.get("gate_score_mean") for row in rows]

    def first(groups: Sequence[_Group], column: str, decimals: int) -> list[str]:
        return [number_text(_first(group, column), decimals) for group in groups]

    settings = " and ".join(dict.fromkeys(row.setting for group in groups for row in group))
    yield Heading("Beside the paper")
    yield Paragraph(
        f"The paper's numbers are of {settings}; this study's are of {scale_text(results, comparison)}. "
        "The scales differ by orders of magnitude: compare signs and ratios, not values."
    )
    yield TableBlock(
        table_of(
            {
                Column("Variant", numeric=False): [row.variant for row in rows],
                Column("Row of the paper", beneath=True, numeric=False): [_names(group) for group in groups],
                Column("PPL"): first(groups, "perplexity", 3),
                Column("baseline's PPL", beneath=True): first(baselines, "perplexity", 3),
                Column("ln PPL ratio", "nats"): [number_text(ratio, 4, "+") for ratio in ratios],
                Column("here", "nats", beneath=True): [_own_difference(comparison, group) for group in groups],
                Column("F-Attn"): first(groups, "f_attn", 3),
                Column("baseline's F-Attn", beneath=True): first(baselines, "f_attn", 3),
                Column("M-Act"): first(groups, "m_act", 0),
                Column("baseline's M-Act", beneath=True): first(baselines, "m_act", 0),
                Column("Gate mean"): first(groups, "gate_score", 3),
                Column("here", beneath=True): [spread_text(mean, fixed(3)) for mean in gates],
            }
        )
    )
    notes = [
        "T1.5 is Table 1, row 5 of Qiu et al., arXiv 2505.06708; the paper has one run of each.",
        *(f"{row.cite}: {row.note}." for group in groups for row in group if row.note),
    ]
    yield Paragraph(" ".join(notes), "note")
    yield from _order_of_rows(comparison)


def _order_of_rows(comparison: Comparison) -> Iterator[Block]:
    """Rank correlations with the paper's tables and agreement of signs, where a table has two rows here."""
    found = orders(comparison)
    if not found:
        return
    yield Heading("The order of the rows", level=3)
    yield Paragraph(
        "Do the rows come out in the paper's order? Spearman's rank correlation over the rows that both have, with the "
        "two-sided share of all orders that lie as far from 0, and its interval when seeds are drawn with replacement, "
        "which few seeds make too narrow; pairs of rows in the other order than the paper's, and those of them whose "
        "paired difference is significant at 5 %; and the sign of each row's difference to its baseline. A correlation "
        "over few rows or within noise says little."
    )
    yield TableBlock(
        table_of(
            {
                Column("Table", numeric=False): [order.name for order in found],
                Column("Rows"): [str(len(order.pairs)) for order in found],
                Column("Rank correlation"): [number_text(order.correlation, 2, "+") for order in found],
                Column("p", beneath=True): [
                    None if order.p_value is None else f"{order.p_value:.2g}" for order in found
                ],
                Column("95 % interval", beneath=True): [_interval(order) for order in found],
                Column("Swapped pairs"): [f"{len(order.swaps)} of {order.num_pairs}" for order in found],
                Column("significantly", beneath=True): [_num_significant(order) for order in found],
                Column("Same sign as in the paper"): [
                    f"{order.num_agree} of {order.num_signs}" if order.num_signs else None for order in found
                ],
            }
        )
    )

    swaps = [text for order in found if (text := _swaps_text(order))]
    if swaps:
        yield Details("Rows that swap significantly", [Bullets(swaps)])


def _interval(order: Order) -> str | None:
    return None if order.interval is None else f"{order.interval[0]:+.2f} to {order.interval[1]:+.2f}"


def _num_significant(order: Order) -> str:
    return str(sum(swap.is_significant for swap in order.swaps))


def _swaps_text(order: Order) -> str:
    swaps = [f"`{swap.lower}` below `{swap.higher}` (t = {swap.t:+.1f})" for swap in order.swaps if swap.is_significant]
    return f"{order.name}: {', '.join(swaps)}." if swaps else ""


def _published(row: VariantRow) -> list[_Group]:
    """The variant's rows in the paper, those that print one model in several tables together; no baselines."""
    groups: dict[tuple[str, float | None], list[PublishedRow]] = {}
    for key in row.cites:
        if key in ROWS and (found := cite(key)).baseline:
            groups.setdefault((found.setting, found.perplexity), []).append(found)
    return list(groups.values())


def _names(group: _Group) -> str:
    first = group[0]
    method = f"{first.method}, {first.activation}" if first.activation else first.method
    return f"{', '.join(row.cite for row in group)}: {method}"


def _first(group: _Group, column: str) -> float | None:
    """The column's number from the first of the rows that has it."""
    return next((value for row in group if (value := getattr(row, column)) is not None), None)


def _log_ratio(group: _Group, baselines: _Group) -> float | None:
    ours, theirs = _first(group, "perplexity"), _first(baselines, "perplexity")
    return log(ours / theirs) if ours and theirs else None


def _own_difference(comparison: Comparison, group: _Group) -> str:
    """Our loss against the same baseline as the paper's."""
    return difference_text(next(filter(None, (comparison.own_difference(row.cite) for row in group)), None))


def rows_table(comparison: Comparison, table: int) -> Table:
    """One of the paper's tables, row by row: its numbers above ours, and whether differences to the baseline agree.

    The difference is the paper's logarithm of a perplexity ratio above our difference in loss, both in nats per token
    and against the baseline that the paper has for the row.
    """
    cited = comparison.cited
    rows = [row for key, row in ROWS.items() if row.table == table and key in cited]
    columns: list[tuple[Column, Sequence[Cell]]] = [
        (Column("Variant", numeric=False), [Cell(cited[row.cite].variant) for row in rows]),
        (Column("Row", beneath=True, numeric=False), [Cell(row.cite) for row in rows]),
    ]
    for name, (title, measure) in COLUMNS.items():
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            columns.append((Column(title), [_value(value) for value in values]))
            columns.append((Column("here", beneath=True), [_value(cited[row.cite].mean(measure)) for row in rows]))
    ratios = [_log_ratio((row,), (cite(row.baseline),) if row.baseline else ()) for row in rows]
    differences = [comparison.own_difference(row.cite) for row in rows]
    columns += [
        (Column("Difference"), [Cell(number_text(ratio, 4, "+")) for ratio in ratios]),
        (Column("here", beneath=True), [Cell(difference_text(difference)) for difference in differences]),
        (Column("Sign", numeric=False), [_sign(*pair) for pair in zip(ratios, differences, strict=True)]),
    ]
    return Table(tuple(column for column, _ in columns), tuple(zip(*(cells for _, cells in columns), strict=True)))


def _value(value: float | None) -> Cell:
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")


def _sign(ratio: float | None, difference: PairedDifference | None) -> Cell:
    if not ratio or difference is None or not difference.n:
        return Cell(ABSENT)
    same = (ratio < 0) == (difference.mean < 0)
    return Cell("same" if same else "opposite", "good" if same else "bad")
