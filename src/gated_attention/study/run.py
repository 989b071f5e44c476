"""Runs a study: trains, measures and records each arm that is not finished yet."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gated_attention.device import device_name
from gated_attention.files import claimed, remove_parts
from gated_attention.models import GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.study.arms import Arm, ArmObserver, Observer, StudyPlan
from gated_attention.study.measure import measure_arm, training_precision
from gated_attention.study.model_card import write_model_card
from gated_attention.study.record import (
    ARRAYS_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    RESULT_NAME,
    Result,
    git_commit,
    library_versions,
    read_result,
    write_arrays,
    write_json,
    write_result,
)
from gated_attention.study.samples import SAMPLES_NAME, write_samples
from gated_attention.study.workers import run_side_by_side
from gated_attention.train.callbacks import MetricsCallback, tensorboard_callback
from gated_attention.train.checkpoints import keep_newest, last_checkpoint
from gated_attention.train.text.data import PackedData, collate, load_data
from gated_attention.train.trainer import check_batch, load_weights, train


def run_study(
    plan: StudyPlan, device: torch.device, cache: Path, observer: Observer, side_by_side: int = 1
) -> list[Result]:
    """Train and measure every arm that is not finished; an interrupted one resumes from its last checkpoint.

    Training starts after the folders of all arms have been checked and the data is packed.

    Args:
        side_by_side: How many arms train at a time; if more than one, each in its own process, and on its own GPU.

    Raises:
        ValueError: if the plan contradicts what the folder holds, another process runs the study, the data is unfit, or
            nothing can be written.
    """
    with claimed(plan.runs):
        remove_parts(plan.runs)
        results = {arm.key: result for arm in plan.arms if (result := arm.finished())}
        for arm in plan.arms:
            if arm.key in results:
                observer.finish(arm, results[arm.key], kept=True)
        if missing := [arm for arm in plan.arms if arm.key not in results]:
            results |= _run_missing(missing, device, cache, observer, min(side_by_side, len(missing)))
    return [results[arm.key] for arm in plan.arms]


def _run_missing(
    arms: Sequence[Arm], device: torch.device, cache: Path, observer: Observer, num_workers: int
) -> dict[tuple[str, int], Result]:
    plan = arms[0].plan
    data = load_data(plan.data, cache, observer.say)
    check_batch(data.train, plan.train)
    if num_workers > 1:
        run_packed = partial(run_packed_arm, device=device, cache=cache)
        return run_side_by_side(arms, run_packed, observer, num_workers, on_gpus=device.type == "cuda")
    results = {}
    for arm in arms:
        results[arm.key] = run_arm(arm, data, device, observer)
        observer.finish(arm, results[arm.key], kept=False)
    return results


def run_packed_arm(arm: Arm, observer: ArmObserver, *, device: torch.device, cache: Path) -> Result:
    """`run_arm` in its own process, on the packed data in the cache."""
    return run_arm(arm, load_data(arm.plan.data, cache, observer.say), device, observer)


def run_arm(arm: Arm, data: PackedData, device: torch.device, observer: ArmObserver) -> Result:
    """Train one arm, from its last checkpoint if there is one, measure it and write its record."""
    plan, settings = arm.plan, arm.training
    observer.start(arm)
    arm.folder.mkdir(parents=True, exist_ok=True)
    model_config = arm.model_config(data)
    resolved = arm.resolve(model_config.vocab_size)
    write_json(arm.folder / CONFIG_NAME, resolved)
    torch.compiler.reset()  # each arm compiles its own model; without this, arms share one recompilation limit
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(model_config, arm.seed)
    if arm.start:
        _load_start(model, arm.start)
    callbacks = [MetricsCallback(arm.folder / METRICS_NAME, lambda progress: observer.progress(arm, progress))]
    if plan.tensorboard:
        callbacks.append(tensorboard_callback(arm.folder / "tensorboard"))
    num_tokens = train(
        model, settings, train_data=data.train, validation_data=data.validation_sample, collate=collate,
        tokenizer=data.tokenizer, output=arm.folder, seed=arm.seed, device=device, callbacks=callbacks,
        say=observer.say,
    )  # fmt: skip
    observer.say("measuring")
    measures, arrays = measure_arm(model, data, settings, arm.folder / METRICS_NAME)
    write_arrays(arm.folder / ARRAYS_NAME, arrays)
    write_samples(arm.folder / SAMPLES_NAME, model, data, training_precision(device, settings))
    result = Result(
        study=plan.name,
        variant=arm.variant.name,
        seed=arm.seed,
        config={
            **resolved["config"],
            "model": _model_record(model),
            "text": {**data.about, "curve_tokens": data.validation_sample.num_tokens},
            "study_learning_rate": plan.train.learning_rate,  # the variant may train with a multiple of it
        },
        measures=measures,
        tokens_seen=num_tokens,
        device=device_name(device),
        git_commit=git_commit(),
        versions=library_versions(),
    )
    if saved := last_checkpoint(arm.folder):
        write_model_card(saved, name=f"{arm.variant.name}-seed{arm.seed}", result=result)
    keep_newest(arm.folder)
    write_result(arm.folder, result)  # last: it marks the arm as finished
    return read_result(arm.folder / RESULT_NAME)


def _load_start(model: PreTrainedModel, checkpoint: Path) -> None:
    try:
        load_weights(model, checkpoint)
    except RuntimeError as error:  # PyTorch's, over names and shapes
        cure = "use the --size and the --tokenizer it was trained with"
        raise ValueError(f"{checkpoint} holds another model than this arm's; {cure}") from error


def _model_record(model: PreTrainedModel) -> dict[str, Any]:
    record: dict[str, Any] = model.config.to_dict()
    if isinstance(model.config, GatedQwen3MoeConfig):
        record["experts_implementation"] = model.config._experts_implementation  # transformers does not save it
    return record
