"""Progress bars of long jobs in the terminal."""

from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from gated_attention.shards import TokenShards


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


class ShardsDisplay(Bars):
    """Shows how much of a text of unknown length is tokenised, and at the end what lies in the folder."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console(), TextColumn("{task.fields[done]}"))
        self._task: TaskID | None = None
        self._begin: tuple[float, int] | None = None

    def progress(self, documents: int, tokens: int) -> None:
        """Show the counts and the rate since the first call."""
        if self._task is None:
            self._task = self.bars.add_task("tokenising", total=None, done="")
        now = monotonic()
        since, before = self._begin = self._begin or (now, tokens)
        rate = f", {(tokens - before) / (now - since):,.0f} tokens/s" if tokens > before else ""
        self.bars.update(self._task, done=f"{documents:,} documents, {tokens:,} tokens{rate}")

    def summary(self, shards: TokenShards) -> None:
        """Print what the folder holds."""
        index = shards.index
        self.console.print(
            f"{shards.folder}: {index.documents:,} documents, {index.tokens:,} tokens ({index.dtype}), "
            f"{len(index.shards):,} shard{'s' * (len(index.shards) > 1)}, tokenizer {index.tokenizer.name} of "
            f"{index.tokenizer.vocab_size:,} tokens",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
