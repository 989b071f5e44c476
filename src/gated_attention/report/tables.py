"""Tables of text for every page, their form in the terminal, CSV, and how numbers are printed."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from math import floor, isfinite, log10
from textwrap import wrap
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

ABSENT = "-"
"""Text of a cell without content."""

WIDE = 110
"""Terminal columns from which a table always has a line for each row."""

SIDE_BY_SIDE = 4
"""Rows that a narrower terminal shows side by side, as columns."""

Tone = Literal["", "good", "bad", "muted"]
Decimals = Callable[[float], int]
"""How many decimals a number is printed with."""


class Cell(NamedTuple):
    """Text of a table's cell, and its tone."""

    text: str
    tone: Tone = ""


class Column(NamedTuple):
    """Head of a column.

    Attributes:
        beneath: Stack the column below the one before it where space is short.
        numeric: Align right.
        meaning: What its cells say, as a phrase.
        better: Which of two values is the better one.
    """

    header: str
    unit: str = ""
    beneath: bool = False
    numeric: bool = True
    meaning: str = ""
    better: Literal["", "lower", "higher"] = ""

    @property
    def head(self) -> str:
        """Header with an arrow to where better values lie."""
        return self.header + {"": "", "lower": " ↓", "higher": " ↑"}[self.better]

    @property
    def title(self) -> str:
        """Head with its unit."""
        return f"{self.head} ({self.unit})" if self.unit else self.head

    @property
    def explanation(self) -> str:
        """The meaning as a sentence, and which values are better; empty without a meaning."""
        better = f" {self.better.capitalize()} is better." if self.better else ""
        return f"{self.meaning[0].upper()}{self.meaning[1:]}.{better}" if self.meaning else ""


class Table(NamedTuple):
    """A table of text, ready for Markdown, HTML or the terminal."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def stacks(self) -> list[list[int]]:
        """Indices of the columns in each stack, from left to right."""
        stacks: list[list[int]] = []
        for index, column in enumerate(self.columns):
            if column.beneath and stacks:
                stacks[-1].append(index)
            else:
                stacks.append([index])
        return stacks


def table_of(columns: Mapping[Column, Sequence[Cell | str | None]]) -> Table:
    """The table with these columns. None and "" are absent; a column without any content is left out."""
    kept = {}
    for column, content in columns.items():
        cells = [found if isinstance(found, Cell) else Cell(found or ABSENT) for found in content]
        if any(cell.text != ABSENT for cell in cells):
            kept[column] = cells
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)))


def fixed(decimals: int) -> Decimals:
    """Always this many decimals."""
    return lambda _: decimals


def significant(digits: int) -> Decimals:
    """As many decimals as show this many significant digits; whole numbers are never cut."""
    return lambda value: 0 if value == 0.0 else max(0, digits - 1 - floor(log10(abs(value))))


def number_text(value: float | None, decimals: Decimals | int, sign: Literal["", "+"] = "") -> str:
    """A number with thousands separators; absent if there is none or it is not finite."""
    if value is None or not isfinite(value):
        return ABSENT
    return f"{value:{sign},.{decimals if isinstance(decimals, int) else decimals(value)}f}"


def count_text(count: int) -> str:
    """A count with three digits: 8,192, 492k, 1.21M, 3.50B."""
    if count < 10_000:
        return f"{count:,}"
    scaled = ((float(f"{count / size:.3g}"), unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")))
    value, unit = next((value, unit) for value, unit in scaled if value >= 1.0)
    return number_text(value, significant(3)) + unit


def exact_text(value: float | None) -> str:
    """Ten significant digits, whole numbers in full; empty if there is none or it is not finite."""
    if value is None or not isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def csv_of(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV, None as an empty field."""
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def rich_table(table: Table, width: int | None = None) -> RichTable:
    """The table for a terminal, a column for each row where it is narrow; a width of None is the terminal's own."""
    printed = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    if (Console().width if width is None else width) < WIDE and len(table.rows) <= SIDE_BY_SIDE:
        printed.add_column("")
        for row in table.rows:
            printed.add_column(Text(row[0].text, "bold"), justify="right")
        for index, column in enumerate(table.columns[1:], start=1):
            printed.add_row(Text(column.title, _style(column)), *(_lines(column, row[index]) for row in table.rows))
        return printed
    stacks = table.stacks()
    for stack in stacks:
        columns = [table.columns[index] for index in stack]
        heads = [Text("\n".join(filter(None, (c.head, c.unit and f"({c.unit})"))), _style(c)) for c in columns]
        numeric = columns[0].numeric  # numbers keep to their lines, words take the width that is left
        justify: Literal["right", "left"] = "right" if numeric else "left"
        printed.add_column(Text("\n").join(heads), justify=justify, no_wrap=numeric, overflow="fold")
    for row in table.rows:
        cells = ([_lines(table.columns[index], row[index]) for index in stack] for stack in stacks)
        printed.add_row(*(Text("\n").join(stack) for stack in cells))
    return printed


def _style(column: Column) -> str:
    return "dim" if column.beneath else "bold"


def _lines(column: Column, cell: Cell) -> Text:
    """A cell in the colour of its tone; numbers and what follows in brackets get lines of their own."""
    styles = {"": "dim" if column.beneath else "", "good": "green", "bad": "red", "muted": "dim"}
    text = "" if column.beneath and cell.text == ABSENT else cell.text
    lines = [line for part in text.replace(" (", "\n(").split("\n") for line in wrap(part, 20)]
    return Text("\n".join(lines) if column.numeric else text, styles[cell.tone])
