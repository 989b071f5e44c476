"""What a training run reports while it runs: a metrics file, TensorBoard, and live progress."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from gated_attention.train.metrics import keep_metrics_until

AUXILIARY = (
    "load_balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "expert_load",
    "gate_penalty", "gate_score_mean", "gate_open_share", "first_token_attention", "log_max_activation", "kl_nats",
)  # fmt: skip
"""Keys of a training line that only some losses have; see `AuxiliaryLosses.read` and `SinkLosses`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        loss_nats: Mean training loss since the last report; None before the first.
        tokens_per_s: Training throughput since the last report, without evaluation and checkpoints.
    """

    step: int
    steps: int
    loss_nats: float | None = None
    tokens_per_s: float | None = None


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Appends a line to `metrics.jsonl` for every log and every evaluation, on the first rank only.

    A resumed run first drops the lines after its checkpoint, since those steps run again. A run whose loss is no longer
    finite stops.

    Args:
        path: The metrics file.
        report: Called with the progress after every logged step.
    """

    def __init__(self, path: Path, report: Callable[[Progress], None] | None = None) -> None:
        self.path, self.report = path, report
        self._start: tuple[float, int] | None = None  # of the throughput: time in s, and tokens seen by then
        self._compiling = True

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Drop the lines that the run will write again."""
        if state.is_world_process_zero:
            keep_metrics_until(self.path, state.global_step)  # of the checkpoint; 0 in a new run

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock after the first step, which compiles and allocates."""
        if self._start is None and not self._compiling:
            self._start = time.perf_counter(), state.num_input_tokens_seen
        self._compiling = False

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Write a training line; the Trainer's own summary and evaluation lines are ignored."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        tokens_per_s = None
        if self._start is not None and state.num_input_tokens_seen > self._start[1]:
            start, tokens = self._start
            tokens_per_s = (state.num_input_tokens_seen - tokens) / (time.perf_counter() - start)
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
        if not isfinite(logs["loss"]):  # nor are the weights, from here on
            control.should_training_stop = True
        if self.report:
            self.report(Progress(state.global_step, state.max_steps, logs["loss"], tokens_per_s))
        self._start = None

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Write a validation line."""
        if state.is_world_process_zero:
            self._append({"step": state.global_step, "val_loss_nats": metrics["eval_loss"]})
        self._start = None

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Exclude the time that a checkpoint takes from the throughput."""
        self._start = None

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


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
