"""A study of many points in the terminal: what it will take, its progress, and where its report lies."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from gated_attention.report.study.terminal import Display
from gated_attention.report.tables import Column, Table, count_text, number_text, rich_table, significant, table_of
from gated_attention.study.arms import Arm, StudyPlan
from gated_attention.study.comparison import LOSS, diverged
from gated_attention.study.grid.estimate import Expected
from gated_attention.study.grid.run import Failure
from gated_attention.study.record import Result

_SHOWN = 40  # points of a plan that are printed one by one


def plan_table(expected: Sequence[Expected]) -> Table:
    """A row for each point, the first of many, and their sum."""
    shown = expected[:_SHOWN]
    rows = [
        [
            one.point or "one point", str(one.num_arms), f"{one.steps:,}", count_text(one.tokens),
            count_text(one.parameters), number_text(one.minutes, significant(2)),
        ]
        for one in shown
    ]  # fmt: skip
    if len(expected) > len(shown):
        rows.append([f"and {len(expected) - len(shown)} more", *[""] * 5])
    if len(expected) > 1:
        arms, minutes = sum(one.num_arms for one in expected), sum(one.minutes for one in expected)
        rows.append(["all", str(arms), "", "", "", number_text(minutes, significant(2))])
    units = {"Point": "", "Arms": "", "Steps": "", "Tokens": "per arm", "Parameters": "", "Time": "device minutes"}
    columns = [Column(head, unit, numeric=head != "Point") for head, unit in units.items()]
    return table_of(dict(zip(columns, zip(*rows, strict=True), strict=True)))


def print_plan(plans: Sequence[StudyPlan], expected: Sequence[Expected], source: str, num_devices: int) -> None:
    """Print what a study will take, and nothing else."""
    console, first = Console(), plans[0]
    arms, minutes = sum(one.num_arms for one in expected), sum(one.minutes for one in expected)
    tokens = sum(one.num_arms * one.tokens for one in expected)
    variants = list(dict.fromkeys(variant.name for plan in plans for variant in plan.variants))
    crossed = all(len(plan.variants) == len(variants) for plan in plans)
    factors = [_counted(len(plans), "point"), _counted(len(variants), "variant"), _counted(first.seeds, "seed")]
    number = " = " + " x ".join(factors) if crossed else f" at {factors[0]}, of {factors[1]}, {factors[2]} each"
    console.print(
        f"[bold]{first.name}[/]: {_counted(arms, 'arm')}{number}, {count_text(tokens)} tokens in all", highlight=False
    )
    console.print(f"variants: {', '.join(variants)}", highlight=False)
    console.print(rich_table(plan_table(expected)))
    needed = number_text(minutes / num_devices, significant(2))
    console.print(f"about {needed} minutes on {_counted(num_devices, 'device')}, by {source}", highlight=False)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


class GridDisplay(Display):
    """Watches a study of many points: a bar for each arm that trains, a line for each that ends."""

    def __init__(self, plans: Sequence[StudyPlan], device: torch.device, num_devices: int) -> None:
        self.num_arms, self.num_ended = sum(len(plan.arms) for plan in plans), 0
        super().__init__(plans[0], device, num_devices=num_devices, num_arms=self.num_arms)

    def headline(self) -> str:
        """What runs where."""
        return f"[bold]{self.plan.name}[/]: {self.num_arms} arms on {self.device}"

    def finish(self, arm: Arm, result: Result, kept: bool) -> None:
        """Say how the arm ended."""
        loss = "diverged" if diverged(result) else f"validation loss {result.measures[LOSS].value:.4f}"
        self._end(arm, f"kept from an earlier run, {loss}" if kept else loss)

    def fail(self, arm: Arm, reason: str) -> None:
        """Say why the arm has no result."""
        self._end(arm, f"failed, {reason}")

    def _end(self, arm: Arm, status: str) -> None:
        self.num_ended += 1
        if (task := self.tasks.pop(arm.key, None)) is not None:
            self.bars.remove_task(task)
        self.say(f"{self.num_ended}/{self.num_arms} {arm}: {status}")

    def close(self, results: Sequence[Result], failures: Sequence[Failure], report: Path) -> None:
        """Say what failed, and where the report lies."""
        if failures:
            self.console.print(f"{len(failures)} of {self.num_arms} arms failed; the same command tries them again")
        self.console.print(f"report: {report / 'report.html'}" if results else "no arm has a result, so no report")
