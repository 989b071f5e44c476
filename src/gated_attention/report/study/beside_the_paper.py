"""A study beside the paper: its numbers next to ours, and whether the rows come out in its order."""

from collections.abc import Sequence
from math import log

from gated_attention.registry.published import ROWS, PublishedRow, cite
from gated_attention.report.blocks import Block, Heading, Paragraph, TableBlock
from gated_attention.report.study.ordering import COLUMNS, orders
from gated_attention.report.study.sections import count_text, parameters_text
from gated_attention.report.study.table import difference_text, spread_text
from gated_attention.report.tables import ABSENT, Cell, Column, Table, fixed, table_of
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference


def beside_paper(results: Sequence[Result], comparison: Comparison) -> list[Block]:
    """The paper's own numbers for the variants that it has, its baseline beside them; empty where it has none."""
    entries = [(row, group) for row in comparison.rows for group in _published(row)]
    if not entries:
        return []
    rows, groups = zip(*entries, strict=True)
    baselines = [tuple(cite(row.baseline) for row in group if row.baseline) for group in groups]
    table = table_of(
        {
            Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
            Column("Row of the paper", beneath=True, numeric=False): [Cell(_names(group)) for group in groups],
            Column("PPL"): [_first(group, "perplexity", 3) for group in groups],
            Column("baseline's PPL", beneath=True): [_first(group, "perplexity", 3) for group in baselines],
            Column("ln PPL ratio", "nats"): [
                _difference_cell(_log_ratio(*pair)) for pair in zip(groups, baselines, strict=True)
            ],
            Column("here", "nats", beneath=True): [_difference(comparison, group) for group in groups],
            Column("F-Attn"): [_first(group, "f_attn", 3) for group in groups],
            Column("baseline's F-Attn", beneath=True): [_first(group, "f_attn", 3) for group in baselines],
            Column("M-Act"): [_first(group, "m_act", 0) for group in groups],
            Column("baseline's M-Act", beneath=True): [_first(group, "m_act", 0) for group in baselines],
            Column("Gate mean"): [_first(group, "gate_score", 3) for group in groups],
            Column("here", beneath=True): [_gate_mean(row) for row in rows],
        }
    )
    settings = " and ".join(dict.fromkeys(row.setting for group in groups for row in group))
    tokens = max(result.tokens_seen for result in results)
    scale = (
        f"The paper's numbers are of {settings}; this study's models have {parameters_text(comparison)}and saw "
        f"{count_text(tokens)} tokens. The scales differ by orders of magnitude: compare signs and ratios, not values."
    )
    notes = [
        "T1.5 is Table 1, row 5 of Qiu et al., arXiv 2505.06708; the paper has one run of each.",
        *(f"{row.cite}: {row.note}." for group in groups for row in group if row.note),
    ]
    return [
        Heading("Beside the paper"),
        Paragraph(scale),
        TableBlock(table),
        Paragraph(" ".join(notes), "note"),
        *_order_of_rows(comparison),
    ]


def _order_of_rows(comparison: Comparison) -> list[Block]:
    """Rank correlations with the paper's tables and the agreement of signs; empty where no table has two rows here."""
    found = orders(comparison)
    if not found:
        return []
    known = [order.correlation is not None for order in found]
    table = table_of(
        {
            Column("Table", numeric=False): [Cell(order.name) for order in found],
            Column("Rows"): [Cell(str(len(order.pairs))) for order in found],
            Column("Rank correlation"): [
                Cell(f"{order.correlation:+.2f}" if ok else ABSENT) for order, ok in zip(found, known, strict=True)
            ],
            Column("p", beneath=True): [
                Cell(f"{order.p_value:.2g}" if ok else ABSENT) for order, ok in zip(found, known, strict=True)
            ],
            Column("Same sign as in the paper"): [
                Cell(f"{order.num_agree} of {order.num_signs}" if order.num_signs else ABSENT) for order in found
            ],
        }
    )
    text = (
        "Do the rows come out in the paper's order? Spearman's rank correlation over the rows that both have, with the "
        "two-sided share of all orders that lie as far from 0; and the sign of each row's difference to its baseline. "
        "A correlation over few rows or within noise says little."
    )
    return [Heading("The order of the rows", level=3), Paragraph(text), TableBlock(table)]


def _published(row: VariantRow) -> list[tuple[PublishedRow, ...]]:
    """The variant's rows in the paper, those that print one model in several tables together; no baselines."""
    groups: dict[tuple[str, float | None], list[PublishedRow]] = {}
    for key in row.cites:
        if key in ROWS and (found := cite(key)).baseline:
            groups.setdefault((found.setting, found.perplexity), []).append(found)
    return [tuple(group) for group in groups.values()]


def _names(group: Sequence[PublishedRow]) -> str:
    first = group[0]
    method = f"{first.method}, {first.activation}" if first.activation else first.method
    return f"{', '.join(row.cite for row in group)}: {method}"


def _first(group: Sequence[PublishedRow], column: str, decimals: int) -> Cell:
    """The column's number from the first of the rows that has it."""
    value = _number(group, column)
    return Cell(ABSENT if value is None else f"{value:,.{decimals}f}")


def _number(group: Sequence[PublishedRow], column: str) -> float | None:
    return next((value for row in group if (value := getattr(row, column)) is not None), None)


def _log_ratio(group: Sequence[PublishedRow], baselines: Sequence[PublishedRow]) -> float | None:
    ours, theirs = _number(group, "perplexity"), _number(baselines, "perplexity")
    return log(ours / theirs) if ours and theirs else None


def _difference_cell(difference: float | None) -> Cell:
    return Cell(ABSENT if difference is None else f"{difference:+.4f}")


def _difference(comparison: Comparison, group: Sequence[PublishedRow]) -> Cell:
    """Our loss against the same baseline as the paper's."""
    found = next(filter(None, (comparison.own_difference(row.cite) for row in group)), None)
    return Cell(difference_text(found) if found else ABSENT)


def _gate_mean(row: VariantRow) -> Cell:
    return Cell(spread_text(row.measures.get("gate_score_mean"), fixed(3)))


def rows_table(comparison: Comparison, table: int) -> Table:
    """One of the paper's tables, row by row: its numbers above ours, and whether differences to the baseline agree.

    The difference is the paper's logarithm of a perplexity ratio above our difference in loss, both in nats per token
    and against the baseline that the paper has for the row.
    """
    cited = comparison.cited
    rows = [row for key, row in ROWS.items() if row.table == table and key in cited]
    columns = [
        (Column("Variant", numeric=False), [Cell(cited[row.cite].variant) for row in rows]),
        (Column("Row", beneath=True, numeric=False), [Cell(row.cite) for row in rows]),
    ]
    for name, (title, measure) in COLUMNS.items():
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            columns.append((Column(title), [_value(value) for value in values]))
            columns.append((Column("here", beneath=True), [_value(cited[row.cite].mean(measure)) for row in rows]))
    ratios = [_log_ratio((row,), _baseline(row)) for row in rows]
    differences = [comparison.own_difference(row.cite) for row in rows]
    columns += [
        (Column("Difference"), [_difference_cell(ratio) for ratio in ratios]),
        (Column("here", beneath=True), [Cell(difference_text(d) if d else ABSENT) for d in differences]),
        (Column("Sign", numeric=False), [_sign(*pair) for pair in zip(ratios, differences, strict=True)]),
    ]
    return Table(tuple(column for column, _ in columns), tuple(zip(*(cells for _, cells in columns), strict=True)))


def _baseline(row: PublishedRow) -> tuple[PublishedRow, ...]:
    return (cite(row.baseline),) if row.baseline else ()


def _value(value: float | None) -> Cell:
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")


def _sign(ratio: float | None, difference: PairedDifference | None) -> Cell:
    if not ratio or difference is None or not difference.n:
        return Cell(ABSENT)
    same = (ratio < 0) == (difference.mean < 0)
    return Cell("same" if same else "opposite", "good" if same else "bad")
