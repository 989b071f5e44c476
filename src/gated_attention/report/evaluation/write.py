"""Writes an evaluation, and shows it in the terminal."""

from pathlib import Path

from rich.console import Console

from gated_attention.files import write_all, writing_to
from gated_attention.jobs.evaluate import Evaluation
from gated_attention.report.blocks import FigureBlock, html, markdown
from gated_attention.report.evaluation.page import evaluation_blocks, title
from gated_attention.report.evaluation.record import csv_text, json_text, numbers
from gated_attention.report.evaluation.task_tables import task_tables
from gated_attention.report.tables import rich_table


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.html`, `.md`, `.json`, `.csv` and the figures; earlier figures there are removed.

    Raises:
        ValueError: if nothing can be written there.
    """
    blocks = evaluation_blocks(evaluation)
    files = {
        "evaluation.html": html(title(evaluation), blocks),
        "evaluation.md": markdown(blocks),
        "evaluation.json": json_text(evaluation),
        "evaluation.csv": csv_text(numbers(evaluation)),
        **{block.path: block.svg for block in blocks if isinstance(block, FigureBlock)},
    }
    with writing_to(folder):
        return write_all(folder, files, stale=("length.svg", "retrieval.svg"))


def print_evaluation(evaluation: Evaluation, folder: Path, console: Console | None = None) -> None:
    """A table for each task, and where the page lies."""
    console = console or Console()
    console.print(
        f"{evaluation.label} ({evaluation.family}, {evaluation.num_parameters / 1e6:,.1f}M parameters, "
        f"{evaluation.dtype}), context {evaluation.context}, {evaluation.device}"
    )
    for heading, table in task_tables(evaluation):
        console.print(f"\n[bold]{heading}[/]")
        console.print(rich_table(table, console.width))
    console.print(f"page: {folder / 'evaluation.html'}")
