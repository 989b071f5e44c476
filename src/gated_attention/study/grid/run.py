"""Runs a study of many points: every arm that is not finished, whatever becomes of the others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field, TypeAdapter, with_config

from gated_attention.device import count_like
from gated_attention.files import claimed, remove_parts, write_text
from gated_attention.study.arms import Arm, Observer
from gated_attention.study.grid.study_file import STUDY_NAME, StudyFile, arms_in_order
from gated_attention.study.record import CLOSED, FAILURE_NAME, RESULT_NAME, Result, find_results, write_json
from gated_attention.study.run import run_arms
from gated_attention.typed import parse, read_bytes

_LONGEST = 500  # characters of a reason


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class Failure:
    """An arm that ended without a result, in its folder until a later run of the study has one."""

    point: str
    variant: str
    seed: Annotated[int, Field(ge=0)]
    reason: str

    def __str__(self) -> str:
        return f"`{self.variant}` seed {self.seed}" + f" at `{self.point}`" * bool(self.point) + f": {self.reason}"


_FAILURE = TypeAdapter(Failure)


class GridObserver(Observer, Protocol):
    """Receives the progress of a study of many points."""

    def fail(self, arm: Arm, reason: str) -> None:
        """An arm failed, and the others go on."""


def run_grid(
    study: StudyFile, output: Path, device: torch.device, cache: Path, observer: GridObserver
) -> tuple[list[Result], list[Failure]]:
    """The results of all arms, and those that failed; run again, it keeps the former and tries the latter again.

    The resolved file is written beside the records before the first arm starts.

    Raises:
        ValueError: as `run_study`; what an arm alone gets wrong ends only that arm.
    """
    plans = study.plans(output, device)
    folder = output / "runs" / study.settings.name
    failures: list[Failure] = []

    def note(arm: Arm, error: Exception) -> None:
        failures.append(Failure(arm.plan.point, arm.variant.name, arm.seed, reason_of(error)))
        arm.folder.mkdir(parents=True, exist_ok=True)
        write_json(arm.folder / FAILURE_NAME, asdict(failures[-1]))  # a full disk ends the study here
        observer.fail(arm, failures[-1].reason)

    with claimed(folder):
        remove_parts(folder)
        arms = arms_in_order(plans)
        for arm in arms:
            arm.finished()  # refuses other settings before anything is written
        side_by_side = count_like(device) * study.settings.arms_per_device
        begin = partial(write_text, folder / STUDY_NAME, study.resolved(plans))
        return run_arms(arms, device, cache, observer, side_by_side, note, begin), failures


def reason_of(error: Exception) -> str:
    """What ended an arm, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {text}"[:_LONGEST]
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:_LONGEST]


def find_failures(folder: Path) -> list[Failure]:
    """The arms below a study's folder that failed and have no result."""
    paths = sorted(path for path in folder.rglob(FAILURE_NAME) if not (path.parent / RESULT_NAME).exists())
    cure = "remove it, and run the study again"
    return [parse(_FAILURE, read_bytes(path, cure), path, cure) for path in paths]


def find_points(folder: Path) -> Mapping[Path, list[Result]]:
    """The finished arms of each point of a study, by the point's folder.

    Raises:
        ValueError: as `find_results`.
    """
    folders = sorted({path.parent.parent.parent for path in folder.glob(f"*/*/seed*/{RESULT_NAME}")})
    return {point: find_results(point) for point in folders}
