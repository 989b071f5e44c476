"""A study as it shows in the terminal: live progress per arm, then the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import TaskID, TextColumn

from gated_attention.device import device_name
from gated_attention.models.build import count_of
from gated_attention.report.progress import Bars
from gated_attention.report.study.beside_the_paper import rows_table
from gated_attention.report.study.ordering import orders
from gated_attention.report.study.table import terminal_table
from gated_attention.report.tables import rich_table
from gated_attention.study.arms import Arm, StudyPlan
from gated_attention.study.comparison import LOSS, compare_variants, diverged
from gated_attention.study.record import Result
from gated_attention.train.callbacks import Progress as TrainingProgress


class Display(Bars):
    """Watches a study (`study.arms.Observer`): a bar for each arm, or lines where the output is no terminal."""

    def __init__(
        self,
        plan: StudyPlan,
        device: torch.device,
        console: Console | None = None,
        num_devices: int = 1,
        num_arms: int | None = None,
    ) -> None:
        console = console or Console()
        steps, status = TextColumn("{task.completed:>5}/{task.total} steps"), TextColumn("{task.fields[status]}")
        super().__init__(console, steps, status, disable=not (console.is_terminal or console.is_jupyter))
        self.plan = plan
        self.tasks: dict[tuple[str, str, int], TaskID] = {}
        count = min(num_devices, num_arms or len(plan.arms))
        self.device = f"{count} x {device_name(device)}" if count > 1 else device_name(device)

    def __enter__(self) -> Self:
        self.console.print(self.headline())
        for reason in self.plan.left_out:
            self.console.print(f"left out: {reason}", highlight=False)
        return super().__enter__()

    def headline(self) -> str:
        """What is trained, and where."""
        plan, train = self.plan, self.plan.train
        tokens = train.steps * train.sequences_per_step * plan.data.block_size
        parameters = count_of(plan.arms[0].model_config()).total
        return (
            f"[bold]{plan.name}[/]: {len(plan.variants)} variants x {plan.seeds} seed{'s' * (plan.seeds > 1)}, "
            f"{plan.architecture.title}, size {plan.size.name} ({parameters / 1e6:.1f}M parameters), "
            f"{tokens / 1e6:.1f}M tokens each, on {self.device}, {train.precision}"
        )

    def start(self, arm: Arm) -> None:
        """Add the arm's bar."""
        self.tasks[arm.key] = self.bars.add_task(str(arm), total=arm.plan.train.steps, status="starting")

    def progress(self, arm: Arm, progress: TrainingProgress) -> None:
        """Move the arm's bar; without bars, a line for each tenth of the steps."""
        status = "" if progress.loss_nats is None else f"loss {progress.loss_nats:.3f}"
        if progress.tokens_per_s is not None:
            status += f"  {progress.tokens_per_s:,.0f} tokens/s"
        self.bars.update(self.tasks[arm.key], completed=progress.step, status=status)
        if self.bars.disable and progress.step % max(1, progress.steps // 10) == 0:
            self.say(f"{arm}: {progress.step}/{progress.steps} steps, {status}")

    def finish(self, arm: Arm, result: Result, kept: bool) -> None:
        """Fill the arm's bar, or say how it ended."""
        status = "diverged" if diverged(result) else f"validation loss {result.measures[LOSS].value:.4f}"
        if kept:
            self.say(f"{arm}: kept from an earlier run, {status}")
            return
        self.bars.update(self.tasks[arm.key], completed=arm.plan.train.steps, status=status)
        if self.bars.disable:
            self.say(f"{arm}: {status}")

    def summary(self, results: Sequence[Result], report: Path) -> None:
        """Print the table, the paper's table beside it if that was asked for, and where the report lies."""
        comparison, table = compare_variants(results), self.plan.table
        self.console.print(terminal_table(results))
        if table is not None:
            self.console.print(
                f"[bold]Table {table} of the paper above this study[/], differences in nats to the baseline"
            )
            self.console.print(rich_table(rows_table(comparison, table)))
            for order in orders(comparison):
                if order.tables == (table,):
                    self.console.print(order.describe(), highlight=False)
        self.console.print(f"report: {report / 'report.html'}")
