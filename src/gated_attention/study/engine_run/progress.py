"""The lines of a run: into `metrics.jsonl` and `probe.jsonl`, and in words on the terminal."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gated_attention.engine.run.plan import find_mfu
from gated_attention.engine.run.run_file import Run
from gated_attention.study.record import METRICS_NAME

PROBE_NAME = "probe.jsonl"
"""A line for each measurement inside of the model."""

_PAUSE_S = 1.0  # between lines on the terminal


class Lines:
    """Appends to a run's files and tells the progress."""

    def __init__(self, run: Run, folder: Path, say: Callable[[str], None]) -> None:
        self.run, self.folder, self.say = run, folder, say
        self.gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self._said = 0.0

    def train(self, line: dict[str, Any]) -> None:
        """A logged step."""
        speed, mfu = line["tokens_per_s"], None
        if speed and self.gpu:
            mfu = find_mfu(self.run, speed, self.gpu)
        self._append({**line, **({} if mfu is None else {"mfu": mfu})})
        if (now := time.monotonic()) - self._said < _PAUSE_S and line["step"] < self.run.steps:
            return
        self._said = now
        words = [f"step {line['step']:,}/{self.run.steps:,}"]
        words.append("skipped" if line["loss_nats"] is None else f"loss {line['loss_nats']:.4f}")
        if speed:
            left = (self.run.steps * self.run.tokens_per_step - line["tokens"]) / speed
            words += [f"{speed:,.0f} tokens/s", *([] if mfu is None else [f"MFU {mfu:.1%}"]), f"{_clock(left)} left"]
        self.say("  ".join(words))

    def held_out(self, step: int, loss: float) -> None:
        """A held-out loss."""
        self._append({"step": step, "val_loss_nats": loss})
        self.say(f"step {step:,}/{self.run.steps:,}  held-out loss {loss:.4f}")

    def probe(self, step: int, found: dict[str, list[float]]) -> None:
        """What was measured inside of the model, by layer."""
        self._append({"step": step, **found}, PROBE_NAME)

    def _append(self, line: dict[str, Any], name: str = METRICS_NAME) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02}:{minutes:02}:{seconds:02}" if days else f"{hours}:{minutes:02}:{seconds:02}"
