"""Progress bars of long jobs in the terminal."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bars:
    """Bars that are live inside a `with` block; `columns` stand between a bar and its remaining time."""

    def __init__(self, console: Console, *columns: ProgressColumn, disable: bool = False) -> None:
        self.console = console
        self.bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=disable,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(f"[dim]{message}[/]")
