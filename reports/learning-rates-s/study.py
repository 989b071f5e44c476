"""Study 2 of reports/README.md: the loss of three variants at seven learning rates, size `s`.

    python reports/learning-rates-s/study.py TRAIN.jsonl VALIDATION.jsonl OUTPUT

trains every arm that OUTPUT does not hold yet, one per GPU, seed 0 of every rate first, and leaves their records in
OUTPUT/runs/learning-rate-<rate>/<variant>/seed<k>/. It is interrupted and run again like `compare`.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch

from gated_attention.device import count_like, pick_device
from gated_attention.study.arms import Arm, StudyPlan
from gated_attention.study.plan import make_plan
from gated_attention.study.record import Result
from gated_attention.study.run import run_packed_arm
from gated_attention.study.workers import run_side_by_side
from gated_attention.train.callbacks import Progress
from gated_attention.train.text.data import load_data

SEEDS = {8e-3: 3, 3.2e-2: 3, 4e-3: 3, 1.6e-2: 3, 6.4e-2: 3, 2e-3: 3, 1e-3: 3}
"""Learning rate to number of seeds."""


def plan(rate: float, source: str, validation: str, output: Path, device: torch.device) -> StudyPlan:
    """The three variants at one learning rate."""
    return make_plan(
        name=f"learning-rate-{rate:g}",
        size="s",
        seeds=SEEDS[rate],
        output=output,
        device=device,
        data={"source": source, "validation": validation, "bos": True},
        train={"steps": 1800, "batch_size": 16, "learning_rate": rate, "warmup": 0.01, "checkpoint_every": 1800},
    )


class Lines:
    """An observer that prints a line per event."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def say(self, message: str) -> None:
        """Print it."""
        print(f"{time.perf_counter() - self.start_s:6.0f} s  {message}", flush=True)  # noqa: T201

    def start(self, arm: Arm) -> None:
        """Say that an arm starts."""
        self.say(f"{arm.plan.name} {arm}")

    def progress(self, arm: Arm, progress: Progress) -> None:
        """Nothing: an arm takes a minute."""

    def finish(self, arm: Arm, result: Result, kept: bool) -> None:
        """Say how it ended."""
        self.say(f"{arm.plan.name} {arm}: {result.measures['val_loss_nats'].value:.4f}")


def main() -> None:
    """Train what is missing."""
    source, validation, output = sys.argv[1:]
    device, cache, observer = pick_device("auto"), Path(output, "cache"), Lines()
    plans = [plan(rate, source, validation, Path(output), device) for rate in SEEDS]
    arms = sorted((arm for one in plans for arm in one.arms if not arm.finished()), key=lambda arm: arm.seed)
    load_data(plans[0].data, cache, observer.say)
    run = partial(run_packed_arm, device=device, cache=cache)
    run_side_by_side(arms, run, observer, min(count_like(device), len(arms)), on_gpus=device.type == "cuda")


if __name__ == "__main__":
    main()
