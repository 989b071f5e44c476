"""A study's comparison as a table of text, for Markdown, HTML and the terminal, and as CSV."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from math import floor, isfinite, log10
from textwrap import wrap
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gated_attention.study.comparison import LOSS, Comparison, compare_variants
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, t_quantile

ABSENT = "-"
"""What a cell without content says."""

WIDE = 110
"""Columns of a terminal that hold the comparison with a row for each variant."""

SIDE_BY_SIDE = 4
"""Variants that a narrower terminal holds side by side."""

Tone = Literal["", "good", "bad", "muted"]


class Cell(NamedTuple):
    """Text of a table's cell and how it is meant."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Column:
    """Head of a column.

    Attributes:
        beneath: Where space is short the column is stacked below the one before it.
        numeric: Set flush right.
    """

    header: str
    unit: str = ""
    beneath: bool = False
    numeric: bool = True

    @property
    def title(self) -> str:
        """Header with its unit."""
        return f"{self.header} ({self.unit})" if self.unit else self.header


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text, ready for Markdown, HTML or the terminal."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def stacks(self) -> list[list[int]]:
        """Indices of the columns that stand in one stack, from left to right."""
        stacks: list[list[int]] = []
        for index, column in enumerate(self.columns):
            if column.beneath and stacks:
                stacks[-1].append(index)
            else:
                stacks.append([index])
        return stacks


def table_of(columns: Mapping[Column, Sequence[Cell]]) -> Table:
    """The table with these columns, those without any content left out."""
    kept = {column: cells for column, cells in columns.items() if any(cell.text != ABSENT for cell in cells)}
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)))


def fixed(decimals: int) -> Callable[[float], int]:
    """Always this many decimals."""
    return lambda _: decimals


def significant(digits: int) -> Callable[[float], int]:
    """As many decimals as show this many significant digits; whole numbers are never cut."""
    return lambda value: 0 if value == 0.0 else max(0, digits - 1 - floor(log10(abs(value))))


_LOSS_DIGITS, _PPL_DIGITS, _SHARE_DIGITS, _ACT_DIGITS = fixed(4), significant(5), fixed(4), significant(3)


def spread_text(found: Spread | None, decimals: Callable[[float], int]) -> str:
    """Mean and standard deviation with as many decimals as suit the mean, `diverged` where no value is finite."""
    if found is None:
        return ABSENT
    if found.n == 0:
        return "diverged"
    places = decimals(found.mean)
    text = f"{found.mean:,.{places}f}"
    return text if found.sd is None else f"{text} ± {found.sd:,.{places}f}"


def difference_text(difference: PairedDifference) -> str:
    """Mean difference with its standard error."""
    if difference.n == 0:
        return ABSENT
    text = f"{difference.mean:+.4f}"
    return text if difference.standard_error is None else f"{text} ± {difference.standard_error:.4f}"


def verdict_text(difference: PairedDifference) -> str:
    """Verdict with the t statistic and the number of pairs it rests on."""
    verdict, t = difference.verdict, difference.t
    return verdict if t is None else f"{verdict} (t = {t:+.1f}, n = {difference.n})"


def comparison_table(comparison: Comparison) -> Table:
    """Parameters, loss, paired difference and what the paper measures, a row for each variant."""
    rows = comparison.rows

    def spreads(measure: str, decimals: Callable[[float], int]) -> list[Cell]:
        return [Cell(spread_text(row.measures.get(measure), decimals)) for row in rows]

    def means(measure: str, decimals: Callable[[float], int]) -> list[Cell]:
        return [Cell(spread_text(_without_sd(row.measures.get(measure)), decimals)) for row in rows]

    millions = [Cell(ABSENT if row.parameters is None else f"{row.parameters / 1e6:,.3f}") for row in rows]
    residues = [Cell(ABSENT if row.residue is None else f"{100 * row.residue:+.2f}") for row in rows]
    differences = [row.difference for row in rows]
    columns = {
        Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
        Column("Gate", beneath=True, numeric=False): [Cell(row.gate or ABSENT) for row in rows],
        Column("Parameters", "M"): millions,
        Column("Residue", "%", beneath=True): residues,
        Column("Validation loss", "nats/token"): spreads(LOSS, _LOSS_DIGITS),
        Column("PPL", beneath=True): spreads("val_perplexity", _PPL_DIGITS),
        Column("Diverged", beneath=True): [_diverged_cell(row.measures.get(LOSS)) for row in rows],
        Column("Difference", "nats/token"): [Cell(difference_text(d) if d else ABSENT) for d in differences],
        Column("Verdict", beneath=True): [_verdict_cell(d) for d in differences],
        Column("F-Attn"): means("f_attn", _SHARE_DIGITS),
        Column("Uniform", beneath=True): means("f_attn_uniform", _SHARE_DIGITS),
        Column("M-Act"): means("m_act", _ACT_DIGITS),
        Column("Gate mean"): means("gate_score_mean", _SHARE_DIGITS),
        Column("Below 0.1", beneath=True): means("gate_share_below_0.1", _SHARE_DIGITS),
        Column("Tokens/s"): means("train_tokens_per_s", fixed(0)),
        Column("Memory", "GiB", beneath=True): means("peak_memory_gib", fixed(2)),
    }
    return table_of(columns)


def _diverged_cell(loss: Spread | None) -> Cell:
    if loss is None or not loss.num_diverged:
        return Cell(ABSENT)
    return Cell(f"{loss.num_diverged} of {loss.n + loss.num_diverged} diverged", "bad")


def _without_sd(found: Spread | None) -> Spread | None:
    return found and replace(found, sd=None)


def _verdict_cell(difference: PairedDifference | None) -> Cell:
    if difference is None:
        return Cell(ABSENT)
    tones: dict[str, Tone] = {"better": "muted" if difference.num_lost else "good", "worse": "bad", "diverged": "bad"}
    return Cell(verdict_text(difference), tones.get(difference.verdict, "muted"))


def terminal_table(results: Sequence[Result], width: int | None = None) -> RichTable:
    """The comparison for a terminal: a row for each variant, or a column for each on a narrow one.

    Args:
        results: Finished runs.
        width: Columns to print in; None for those of the terminal.

    Raises:
        ValueError: as `compare_variants`.
    """
    return rich_table(comparison_table(compare_variants(results)), width)


def rich_table(table: Table, width: int | None = None) -> RichTable:
    """A table for a terminal: as it is, or on a narrow one a column for each row; `width` as in `terminal_table`."""
    narrow = (Console().width if width is None else width) < WIDE and len(table.rows) <= SIDE_BY_SIDE
    return _side_by_side(table) if narrow else _stacked(table)


def _stacked(table: Table) -> RichTable:
    printed = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    stacks = []
    for stack in table.stacks():
        columns = [table.columns[index] for index in stack]
        cells = [Text("\n").join(_line(table.columns[index], row[index]) for index in stack) for row in table.rows]
        heads = [Text("\n".join(filter(None, (c.header, c.unit and f"({c.unit})"))), _style(c)) for c in columns]
        numeric = columns[0].numeric  # numbers keep to their lines, the gate's words take what is left
        justify: Literal["right", "left"] = "right" if numeric else "left"
        printed.add_column(Text("\n").join(heads), justify=justify, no_wrap=numeric)
        stacks.append(cells)
    for row in zip(*stacks, strict=True):
        printed.add_row(*row)
    return printed


def _side_by_side(table: Table) -> RichTable:
    printed = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    printed.add_column("")
    for row in table.rows:
        printed.add_column(Text(row[0].text, "bold"), justify="right")
    for index, column in enumerate(table.columns[1:], start=1):
        printed.add_row(Text(column.title, _style(column)), *(_line(column, row[index]) for row in table.rows))
    return printed


def _style(column: Column) -> str:
    return "dim" if column.beneath else "bold"


def _line(column: Column, cell: Cell) -> Text:
    """A cell in the colour of its tone, a verdict's reasons on lines of their own."""
    styles = {"": "dim" if column.beneath else "", "good": "green", "bad": "red", "muted": "dim"}
    text = "" if column.beneath and cell.text == ABSENT else cell.text
    lines = [line for part in text.replace(" (", "\n(").split("\n") for line in wrap(part, 20)]
    return Text("\n".join(lines) if column.numeric else text, styles[cell.tone])


def csv_text(comparison: Comparison) -> str:
    """The comparison as CSV: numbers in the units of the column names, empty where there is none."""
    measures = dict.fromkeys(name for row in comparison.rows for name in row.measures)
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("variant", "gate", "cites", "seeds", "num_diverged", "parameters", "residue_share"),
            *("difference_nats", "standard_error_nats", "num_pairs", "t", "t_quantile", "verdict"),
            *(f"{name}{part}" for name in measures for part in ("", "_sd")),
        ]
    )
    for row in comparison.rows:
        loss = row.measures.get(LOSS)
        head = [row.variant, row.gate, " ".join(row.cites), " ".join(map(str, row.seeds))]
        head += [str(loss.num_diverged if loss else 0), _number(row.parameters), _number(row.residue)]
        spreads = [row.measures.get(name) for name in measures]
        tail = [_number(value) for found in spreads for value in ((found.mean, found.sd) if found else (None, None))]
        writer.writerow([*head, *_difference_fields(row.difference), *tail])
    return buffer.getvalue()


def _difference_fields(difference: PairedDifference | None) -> list[str]:
    if difference is None:
        return [""] * 6
    quantile = t_quantile(difference.n - 1) if difference.n > 1 else None
    numbers = (difference.mean, difference.standard_error, difference.n, difference.t, quantile)
    return [*map(_number, numbers), difference.verdict]


def _number(value: float | None) -> str:
    """Ten significant digits, whole numbers in full; empty where there is nothing finite to say."""
    if value is None or not isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.10g}"
