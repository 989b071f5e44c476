"""What a training run tells while it runs: a metrics file, TensorBoard, and live progress."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gated_attention.train.metrics import keep_metrics_until

AUXILIARY = (
    *("load_balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "expert_load"),
    *("gate_penalty", "gate_score_mean", "gate_open_share"),
)
"""Keys of a training line that only models with routers or hard-sigmoid gates have; see `AuxiliaryLosses.read`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        loss_nats: Mean training loss since the last report; None before the first.
        tokens_per_s: Training throughput since the last report, evaluation and checkpoints left out.
    """

    step: int
    steps: int
    loss_nats: float | None = None
    tokens_per_s: float | None = None


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Appends a line to `metrics.jsonl` for every log and every evaluation, on the first rank alone.

    On a resumed run the lines after the checkpoint are dropped first, since those steps run again.

    Args:
        path: The metrics file.
        report: Called with the progress after every step that was logged.
    """

    def __init__(self, path: Path, report: Callable[[Progress], None] | None = None) -> None:
        self.path, self.report = path, report
        self._clock: _Clock | None = None
        self._compiling = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what the run writes again."""
        if state.is_world_process_zero:
            keep_metrics_until(self.path, state.global_step)  # of the checkpoint; 0 in a new run

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock once the first step, which compiles and allocates, is over."""
        if self._clock is None and not self._compiling:
            self._clock = _Clock(state.num_input_tokens_seen)
        self._compiling = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Write a training line; the Trainer's own summary and evaluation lines are passed over."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        tokens_per_s = self._clock.read(state.num_input_tokens_seen) if self._clock else None
        line = {
            "step": state.global_step,
            "loss_nats": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": state.num_input_tokens_seen,
            "tokens_per_s": tokens_per_s,
            **{name: logs[name] for name in AUXILIARY if name in logs},
        }
        self._append(line)
        if self.report:
            self.report(Progress(state.global_step, state.max_steps, logs["loss"], tokens_per_s))
        self._clock = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Write a validation line."""
        if state.is_world_process_zero:
            self._append({"step": state.global_step, "val_loss_nats": metrics["eval_loss"]})
        self._clock = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the time that a checkpoint takes out of the throughput."""
        self._clock = None

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(slots=True)
class _Clock:
    """Throughput from one count of tokens to a later one."""

    start_tokens: int
    start: float = field(default_factory=time.perf_counter)

    def read(self, tokens: int) -> float | None:
        if tokens == self.start_tokens:
            return None
        return (tokens - self.start_tokens) / (time.perf_counter() - self.start)


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """A callback that writes TensorBoard events below `folder`.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed; pip install gated-attention[tensorboard]") from error
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(tb_writer=SummaryWriter(log_dir=str(folder)))
