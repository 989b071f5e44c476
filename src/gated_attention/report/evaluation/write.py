"""Writes an evaluation, and shows it in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from gated_attention.files import write_all, writing_to
from gated_attention.jobs.evaluate import Evaluation
from gated_attention.report.evaluation.figures import evaluation_figures
from gated_attention.report.evaluation.record import Number, csv_text, json_text, numbers

_HIDDEN = "loss_from_position_"  # profiles are for the figure and the files
_TITLES = {
    "perplexity": "Perplexity",
    "length": "Length: loss of the same tokens given more context; damage is against plain RoPE at 1x",
    "retrieval": "Retrieval: mean over depths",
    "benchmark": "Benchmarks",
    "quantization": "Quantisation: loss change, and the input that costs most alone",
}


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.json`, `evaluation.csv` and the figures; earlier figures there are removed.

    Raises:
        ValueError: if nothing can be written there.
    """
    files = {
        "evaluation.json": json_text(evaluation),
        "evaluation.csv": csv_text(numbers(evaluation)),
        **dict(evaluation_figures(evaluation)),
    }
    with writing_to(folder):
        return write_all(folder, files, stale=("length.svg", "retrieval.svg"))


def print_evaluation(evaluation: Evaluation, folder: Path, console: Console | None = None) -> None:
    """A table for each task, and where the files lie."""
    console = console or Console()
    console.print(
        f"{evaluation.label} ({evaluation.family}, {evaluation.num_parameters / 1e6:,.1f}M parameters, "
        f"{evaluation.dtype}), context {evaluation.context}, {evaluation.device}"
    )
    found = [one for one in numbers(evaluation) if not one.measure.startswith(_HIDDEN)]
    for task, title in _TITLES.items():
        if rows := [one for one in found if one.task == task]:
            console.print(f"\n[bold]{title}[/]")
            console.print(_table(_over_depths(rows) if task == "retrieval" else rows))
    console.print(f"data: {folder / 'evaluation.json'}")


def _table(rows: Sequence[Number]) -> Table:
    """A row for each item and rotary embedding, a column for each measure."""
    several = len({one.rope for one in rows}) > 1
    measures = list(dict.fromkeys((one.measure, one.unit) for one in rows))
    few = len(measures) <= 3  # more than that are benchmarks' metrics, which go one to a line
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    if several:
        table.add_column("RoPE", no_wrap=True)
    heads = [f"{name.replace('_', ' ')} ({unit})" if unit != "1" else name for name, unit in measures]
    for head in heads if few else ("metric", "value"):
        table.add_column(head, justify="right")
    table.add_column("n", justify="right")
    table.add_column("")
    places = dict.fromkeys((one.rope, one.item, "" if few else one.measure) for one in rows)
    for rope, item, metric in places:
        own = [o for o in rows if (o.rope, o.item) == (rope, item) and metric in ("", o.measure)]
        texts = {(one.measure, one.unit): _text(one) for one in own}
        cells = [texts.get(measure, "") for measure in measures] if few else [metric, *texts.values()]
        table.add_row(item, *([rope] if several else []), *cells, f"{own[0].n:,}", own[-1].note)
    return table


def _text(one: Number) -> str:
    text = f"{one.value:{'+' if one.measure in ('damage', 'loss_change') else ''}.4f}"
    return text if one.standard_error is None else f"{text} ± {one.standard_error:.4f}"


def _over_depths(rows: Sequence[Number]) -> list[Number]:
    groups: dict[tuple[str, str, str, str], list[Number]] = {}
    for one in rows:
        groups.setdefault((one.rope, one.item.split(" at ")[0], one.measure, one.unit), []).append(one)
    return [
        Number(
            "retrieval", rope, item, measure, sum(one.value for one in group) / len(group), None, unit,
            sum(one.n for one in group),
        )
        for (rope, item, measure, unit), group in groups.items()
    ]  # fmt: skip
