"""A run from its file to its record: resumed, trained, exported."""

import logging
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gated_attention.engine.run.run_file import RUN_NAME, Run
from gated_attention.engine.whole import checkpoint_step, clear_unfinished, last_whole
from gated_attention.files import cache_folder, claimed, remove_parts, write_text
from gated_attention.study.engine_run.progress import PROBE_NAME, Lines
from gated_attention.study.engine_run.record import record, settings
from gated_attention.study.engine_run.tokens import find_tokens
from gated_attention.study.record import CONFIG_NAME, METRICS_NAME, RESULT_NAME, write_json, write_result
from gated_attention.train.metrics import keep_metrics_until

MODEL_NAME = "model"
"""The folder of a finished run that `from_pretrained` loads."""


def train_run(run: Run, output: Path, say: Callable[[str], None]) -> int:
    """Train a run to its end, from its last checkpoint if there is one; every process of torchrun calls this.

    Args:
        say: Prints a line, on the first process.

    Returns:
        0, or 128 and the number of the signal that stopped it.

    Raises:
        ValueError: if the folder holds another run, or the data or the settings are unfit.
    """
    logging.getLogger("olmo_core").setLevel(logging.ERROR)  # it says what it has not found when it is imported
    from gated_attention.engine.run import train as engine

    is_first = os.environ.get("RANK", "0") == "0"
    folder = run.folder(output)
    if (written := folder / RUN_NAME).exists():
        run.require_same(written)
    if (folder / RESULT_NAME).exists():
        say(f"{folder} is finished")
        return 0
    tokens = find_tokens(run, cache_folder(), say)
    run = run.with_vocabulary(tokens.vocab_size)
    engine.check_trainable(run, tokens)
    with claimed(folder) if is_first else nullcontext():
        if is_first:
            _prepare(run, folder, say)
        lines = Lines(run, folder, say)
        with engine.logged_to(folder / engine.LOG_NAME), engine.processes(run.file.seed) as rank:
            last = last_whole(folder)
            ended = None
            if last is None or checkpoint_step(last) < run.steps:
                ended = engine.train(run, tokens, folder, engine.Reports(lines.train, lines.held_out, lines.probe))
        if ended and ended.stopped_by:
            say(f"checkpoint at step {ended.step:,}")
            return 128 + signal.Signals[ended.stopped_by]
        if rank == 0:
            _finish(run, tokens, folder, say)
    return 0


def _prepare(run: Run, folder: Path, say: Callable[[str], None]) -> None:
    remove_parts(folder)
    last = clear_unfinished(folder, say)
    step = checkpoint_step(last) if last else 0
    say(f"{folder}: from step {step:,} of {run.steps:,}")
    write_text(folder / RUN_NAME, run.toml())
    write_json(folder / CONFIG_NAME, settings(run))
    for name in (METRICS_NAME, PROBE_NAME):
        keep_metrics_until(folder / name, step)


def _finish(run: Run, tokens: Any, folder: Path, say: Callable[[str], None]) -> None:
    from gated_attention.engine import export_checkpoint
    from gated_attention.engine.run.train import model_config

    last, model = last_whole(folder), folder / MODEL_NAME
    config = model_config(run, tokens)
    if run.file.checkpoints.export and last is not None and not model.exists():
        export_checkpoint(last, config, model)
        if tokens.tokenizer is not None:
            shutil.copytree(tokens.tokenizer, model, dirs_exist_ok=True)
        say(f"wrote {model}")
    write_result(folder, record(run, folder / METRICS_NAME, config.to_dict()))
    say(f"wrote {folder / RESULT_NAME}")
