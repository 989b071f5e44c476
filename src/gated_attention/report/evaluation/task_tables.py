"""The tables of an evaluation, one for each task, for the page and the terminal."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from gated_attention.jobs.evaluation import Evaluation
from gated_attention.report.evaluation.record import AVERAGE, Number, numbers
from gated_attention.report.tables import Column, Table, table_of

TITLES = {
    "perplexity": "Perplexity",
    "length": "Loss by length",
    "retrieval": "Retrieval",
    "benchmark": "Benchmarks",
    "quantization": "Quantisation",
}
"""Task of a number to the title of its table."""

_MEASURES = {
    "loss": Column(
        "Loss", "nats/token", better="lower", meaning="mean cross-entropy per token, natural logarithm"
    ),
    "perplexity": Column("Perplexity", better="lower", meaning="exponential of the loss"),
    "bits_per_byte": Column(
        "Bits per byte", better="lower", meaning="the loss in bits, divided by the bytes of the text"
    ),
    "damage": Column("Damage", "nats", better="lower", meaning="loss at 1x minus that of plain RoPE at 1x"),
    "exact_match": Column(
        "Exact match", "share", better="higher",
        meaning="share of answers that are exactly right, averaged over depths",
    ),
    "loss_change": Column(
        "Loss change", "nats/token", better="lower",
        meaning="loss with weights and activations rounded, minus the loss without; the note names the input that "
        "costs most when it alone is rounded",
    ),
}  # fmt: skip
"""The columns of our own measures; those of benchmarks are lm-eval's."""

_IN_FIGURE = "loss_from_position_"  # only the figure and the files have it
_SIDE_BY_SIDE = 3  # columns of measures at most
_LAYER = re.compile(r"\S*\blayers\.(\d+)\.(\S+)")  # the whole name would not fit into 80 columns


def task_tables(evaluation: Evaluation) -> Iterator[tuple[str, Table]]:
    """Title and table of each task that has numbers."""
    found = [one for one in numbers(evaluation) if not one.measure.startswith(_IN_FIGURE)]
    found = [one for one in found if one.item != AVERAGE or one.n > 1]
    for task, title in TITLES.items():
        if rows := [one for one in found if one.task == task]:
            yield title, _table(_over_depths(rows) if task == "retrieval" else rows)


def _table(rows: Sequence[Number]) -> Table:
    """A row for each item and rotary embedding; a column for each measure, or a row where there are many."""
    several = len({one.rope for one in rows}) > 1
    measures = list(dict.fromkeys((one.measure, one.unit) for one in rows))
    few = len(measures) <= _SIDE_BY_SIDE
    groups = list(_grouped(rows, lambda one: (one.rope, one.item, "" if few else one.measure)).values())
    columns: dict[Column, list[str | None]] = {
        Column("Item", numeric=False): [group[0].item for group in groups],
        Column("RoPE", beneath=True, numeric=False): [group[0].rope if several else None for group in groups],
    }
    if few:
        for name, unit in measures:
            column = _MEASURES.get(name, Column(name.replace("_", " "), unit))
            columns[column] = [_value([one for one in group if one.measure == name]) for group in groups]
    else:
        columns[Column("Metric", numeric=False)] = [group[0].measure for group in groups]
        columns[Column("Value")] = [_value(group) for group in groups]
    columns[Column("n", meaning="number of tokens, domains, samples or questions")] = [
        f"{group[0].n:,}" for group in groups
    ]
    columns[Column("Note", numeric=False)] = [_LAYER.sub(r"layer \1, \2", group[-1].note) for group in groups]
    return table_of(columns)


def _value(found: Sequence[Number]) -> str | None:
    if not found:
        return None
    one = found[0]
    text = f"{one.value:{'+' if one.measure in ('damage', 'loss_change') else ''}.4f}"
    return text if one.standard_error is None else f"{text} ± {one.standard_error:.4f}"


def _over_depths(rows: Sequence[Number]) -> list[Number]:
    """Means over the depths of retrieval."""
    groups = _grouped(rows, lambda one: (one.rope, one.item.split(" at ")[0], one.measure))
    return [
        replace(group[0], item=item, value=sum(one.value for one in group) / len(group), n=sum(one.n for one in group))
        for (_, item, _), group in groups.items()
    ]


def _grouped(rows: Sequence[Number], key: Callable[[Number], tuple[str, ...]]) -> dict[tuple[str, ...], list[Number]]:
    groups: dict[tuple[str, ...], list[Number]] = {}
    for one in rows:
        groups.setdefault(key(one), []).append(one)
    return groups
