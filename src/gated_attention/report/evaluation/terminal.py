"""An evaluation as it shows in the terminal."""

from pathlib import Path

from rich.console import Console

from gated_attention.jobs.evaluation import Evaluation
from gated_attention.report.evaluation.task_tables import task_tables
from gated_attention.report.tables import rich_table


def print_evaluation(evaluation: Evaluation, folder: Path, console: Console | None = None) -> None:
    """Print a table for each task, and the place of the page."""
    console = console or Console()
    console.print(
        f"{evaluation.label} ({evaluation.family}, {evaluation.num_parameters / 1e6:,.1f}M parameters, "
        f"{evaluation.dtype}), context {evaluation.context}, {evaluation.device}"
    )
    for heading, table in task_tables(evaluation):
        console.print(f"\n[bold]{heading}[/]")
        console.print(rich_table(table, console.width))
    console.print(f"page: {folder / 'evaluation.html'}")
