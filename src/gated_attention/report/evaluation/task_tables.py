"""The tables of an evaluation, one for each task, for the page and the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gated_attention.jobs.evaluate import Evaluation
from gated_attention.report.evaluation.record import Number, numbers
from gated_attention.report.tables import ABSENT, Cell, Column, Table, table_of

TITLES = {
    "perplexity": "Perplexity",
    "length": "Loss by length",
    "retrieval": "Retrieval",
    "benchmark": "Benchmarks",
    "quantization": "Quantisation",
}
"""Task of a number to the title of its table."""

_IN_FIGURE = "loss_from_position_"  # the profile is for the figure and the files
_SIDE_BY_SIDE = 3  # more measures than that go one to a line


def task_tables(evaluation: Evaluation) -> Iterator[tuple[str, Table]]:
    """Title and table of each task that has numbers."""
    found = [one for one in numbers(evaluation) if not one.measure.startswith(_IN_FIGURE)]
    for task, title in TITLES.items():
        if rows := [one for one in found if one.task == task]:
            yield title, _table(_over_depths(rows) if task == "retrieval" else rows)


def _table(rows: Sequence[Number]) -> Table:
    """A row for each item and rotary embedding, a column for each measure where these are few."""
    several = len({one.rope for one in rows}) > 1
    measures = list(dict.fromkeys((one.measure, one.unit) for one in rows))
    few = len(measures) <= _SIDE_BY_SIDE
    groups: dict[tuple[str, ...], list[Number]] = {}
    for one in rows:
        groups.setdefault((one.rope, one.item, "" if few else one.measure), []).append(one)
    own = list(groups.values())
    columns = {
        Column("Item", numeric=False): [Cell(group[0].item) for group in own],
        Column("RoPE", beneath=True, numeric=False): [Cell(group[0].rope if several else ABSENT) for group in own],
    }
    if few:
        for name, unit in measures:
            column = Column(name.replace("_", " "), "" if unit == "1" else unit)
            columns[column] = [_value([one for one in group if one.measure == name]) for group in own]
    else:
        columns[Column("Metric", numeric=False)] = [Cell(group[0].measure) for group in own]
        columns[Column("Value")] = [_value(group) for group in own]
    columns[Column("n")] = [Cell(f"{group[0].n:,}") for group in own]
    columns[Column("Note", numeric=False)] = [Cell(group[-1].note or ABSENT) for group in own]
    return table_of(columns)


def _value(found: Sequence[Number]) -> Cell:
    if not found:
        return Cell(ABSENT)
    one = found[0]
    text = f"{one.value:{'+' if one.measure in ('damage', 'loss_change') else ''}.4f}"
    return Cell(text if one.standard_error is None else f"{text} ± {one.standard_error:.4f}")


def _over_depths(rows: Sequence[Number]) -> list[Number]:
    groups: dict[tuple[str, str, str], list[Number]] = {}
    for one in rows:
        groups.setdefault((one.rope, one.item.split(" at ")[0], one.measure), []).append(one)
    return [
        replace(group[0], item=item, value=sum(one.value for one in group) / len(group), n=sum(one.n for one in group))
        for (_, item, _), group in groups.items()
    ]
