"""An analysis as it shows in the terminal: a bar for each model, then the table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import TextColumn

from gated_attention.analysis import InputBatch, TextBatch
from gated_attention.jobs.analyze import Analysis, Batches
from gated_attention.report.analysis.tables import detail_tables, summary_table
from gated_attention.report.progress import Bars
from gated_attention.report.tables import rich_table


class AnalysisDisplay(Bars):
    """Shows what `analyze` is doing, and at the end what it found."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console(), TextColumn("{task.completed:>7,}/{task.total:,} sequences"))

    def track(self, label: str, batches: Batches) -> Iterable[TextBatch | InputBatch]:
        """The batches, with a bar that follows them."""
        sizes = [len(next(iter(batch.inputs.values()))) for batch in batches]
        task = self.bars.add_task(label, total=sum(sizes))
        for batch, size in zip(batches, sizes, strict=True):
            yield batch
            self.bars.advance(task, size)

    def summary(self, analyses: Sequence[Analysis], folder: Path) -> None:
        """Print the table, and where the page lies."""
        for table in (summary_table(analyses), *detail_tables(analyses)):
            self.console.print(rich_table(table))
        self.console.print(f"page: {folder / 'analysis.html'}")
