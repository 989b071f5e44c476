"""A study's comparison as a table of text, for Markdown, HTML and the terminal, and as CSV."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import floor, isfinite, log10
from typing import Literal, NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from gated_attention.studies.comparison import LOSS, Comparison, VariantRow, compare_variants
from gated_attention.studies.record import Result
from gated_attention.studies.statistics import PairedDifference, Spread, t_quantile

ABSENT = "-"
"""What a cell without content says."""

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


def spread_text(found: Spread | None, decimals: Callable[[float], int], count: bool = False) -> str:
    """Mean and standard deviation, `diverged` where no value is finite.

    Args:
        found: What to print; None prints as absent.
        decimals: Of the mean, which the deviation shares.
        count: Whether to say how many of the values diverged.
    """
    if found is None:
        return ABSENT
    if found.n == 0:
        return "diverged"
    places = decimals(found.mean)
    text = f"{found.mean:,.{places}f}"
    if found.sd is not None:
        text += f" ± {found.sd:,.{places}f}"
    if count and found.num_diverged:
        text += f" ({found.num_diverged} of {found.n + found.num_diverged} diverged)"
    return text


def difference_text(difference: PairedDifference) -> str:
    """Mean difference with its standard error."""
    if difference.n == 0:
        return ABSENT
    text = f"{difference.mean:+.4f}"
    return text if difference.standard_error is None else f"{text} ± {difference.standard_error:.4f}"


def verdict_text(difference: PairedDifference) -> str:
    """Verdict with the t statistic and the number of pairs it rests on."""
    verdict, t = difference.verdict, difference.t
    if t is None:
        return verdict
    return f"{verdict} (t = {t:+.1f}, n = {difference.n})"


def comparison_table(comparison: Comparison) -> Table:
    """Parameters, loss, paired difference and what the paper measures, a row for each variant."""
    rows = comparison.rows

    def spreads(measure: str, decimals: Callable[[float], int], count: bool = False) -> list[Cell]:
        return [_spread_cell(row.measures.get(measure), decimals, count) for row in rows]

    millions = [Cell(ABSENT if row.parameters is None else f"{row.parameters / 1e6:,.3f}") for row in rows]
    residues = [Cell(ABSENT if row.residue is None else f"{100 * row.residue:+.2f}") for row in rows]
    differences = [row.difference for row in rows]
    columns = {
        Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
        Column("Gate", beneath=True, numeric=False): [Cell(row.gate or ABSENT) for row in rows],
        Column("Parameters", "M"): millions,
        Column("Residue", "%", beneath=True): residues,
        Column("Validation loss", "nats/token"): spreads(LOSS, _LOSS_DIGITS, count=True),
        Column("PPL", beneath=True): spreads("val_perplexity", _PPL_DIGITS),
        Column("Difference", "nats/token"): [Cell(difference_text(d) if d else ABSENT) for d in differences],
        Column("Verdict", beneath=True): [_verdict_cell(d) for d in differences],
        Column("F-Attn"): spreads("f_attn", _SHARE_DIGITS),
        Column("Uniform", beneath=True): [_mean_cell(row, "f_attn_uniform", _SHARE_DIGITS) for row in rows],
        Column("M-Act"): spreads("m_act", _ACT_DIGITS),
        Column("Gate mean"): spreads("gate_score_mean", _SHARE_DIGITS),
        Column("Below 0.1", beneath=True): [_mean_cell(row, "gate_share_below_0.1", _SHARE_DIGITS) for row in rows],
        Column("Tokens/s"): [_mean_cell(row, "train_tokens_per_s", fixed(0)) for row in rows],
        Column("Memory", "GiB", beneath=True): [_mean_cell(row, "peak_memory_gib", fixed(2)) for row in rows],
    }
    return table_of(columns)


def _spread_cell(found: Spread | None, decimals: Callable[[float], int], count: bool) -> Cell:
    text = spread_text(found, decimals, count)
    return Cell(text, "bad" if found and found.num_diverged else "")


def _mean_cell(row: VariantRow, measure: str, decimals: Callable[[float], int]) -> Cell:
    found = row.measures.get(measure)
    return _spread_cell(found and Spread(found.mean, None, found.n, found.num_diverged), decimals, count=False)


def _verdict_cell(difference: PairedDifference | None) -> Cell:
    if difference is None:
        return Cell(ABSENT)
    tones: dict[str, Tone] = {"better": "good", "worse": "bad", "diverged": "bad"}
    return Cell(verdict_text(difference), tones.get(difference.verdict.split(";")[0], "muted"))


def terminal_table(results: Sequence[Result]) -> RichTable:
    """The comparison for a terminal, paired columns stacked.

    Raises:
        ValueError: as `compare_variants`.
    """
    table = comparison_table(compare_variants(results))
    styles = {"": "", "good": "green", "bad": "red", "muted": "dim"}
    printed = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    stacks = table.stacks()
    for stack in stacks:
        columns = [table.columns[index] for index in stack]
        header = Text("\n").join(Text(c.title, style="dim" if c.beneath else "bold") for c in columns)
        printed.add_column(header, justify="right" if columns[0].numeric else "left")
    for row in table.rows:
        cells = []
        for stack in stacks:
            lines = [
                Text(row[i].text, style=styles[row[i].tone] or ("dim" if table.columns[i].beneath else ""))
                for i in stack
            ]
            cells.append(Text("\n").join(lines))
        printed.add_row(*cells)
    return printed


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
