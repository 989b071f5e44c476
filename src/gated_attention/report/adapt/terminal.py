"""An adaptation as it shows in the terminal: a bar for each arm, then the tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import TaskID, TextColumn

from gated_attention.jobs.adapt_plan import AdaptPlan
from gated_attention.jobs.adapt_record import Adapted
from gated_attention.report.adapt.findings import compare_arms
from gated_attention.report.adapt.tables import change_table, main_table, verdict_table
from gated_attention.report.progress import Bars
from gated_attention.report.tables import rich_table
from gated_attention.train.callbacks import Progress


class AdaptDisplay(Bars):
    """Shows what `adapt` is doing, and at the end what it found."""

    def __init__(self, console: Console | None = None) -> None:
        steps, loss = TextColumn("{task.completed:>6,}/{task.total:,} steps"), TextColumn("{task.fields[loss]}")
        super().__init__(console or Console(), steps, loss)
        self._tasks: dict[str, TaskID] = {}

    def progress(self, name: str, progress: Progress) -> None:
        """Move an arm's bar."""
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=progress.steps, loss="")
        loss = "" if progress.loss_nats is None else f"loss {progress.loss_nats:.4f}"
        self.bars.update(self._tasks[name], completed=progress.step, loss=loss)

    def summary(self, plan: AdaptPlan, found: Sequence[Adapted]) -> None:
        """Print the tables, and where the model and the page lie."""
        findings = compare_arms(found)
        for table in (main_table(findings), verdict_table(findings), change_table(findings)):
            if table.rows and len(table.columns) > 1:
                self.console.print(rich_table(table, self.console.width))
        for one in found:
            if one.arm == "gated":
                self.console.print(f"model: {plan.model_folder(one.seed)}", soft_wrap=True)
        self.console.print(f"page: {plan.output / 'report.html'}", soft_wrap=True)
