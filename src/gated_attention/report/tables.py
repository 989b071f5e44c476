"""Tables of text that every page uses, their form in the terminal, and CSV."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import floor, isfinite, log10
from textwrap import wrap
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

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


def rich_table(table: Table, width: int | None = None) -> RichTable:
    """A table for a terminal: as it is, or on a narrow one a column for each row; `width` None for its own."""
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
        printed.add_column(Text("\n").join(heads), justify=justify, no_wrap=numeric, overflow="fold")
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


def csv_of(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV, None as an empty field."""
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def exact_text(value: float | None) -> str:
    """Ten significant digits, whole numbers in full; empty where there is nothing finite to say."""
    if value is None or not isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.10g}"
