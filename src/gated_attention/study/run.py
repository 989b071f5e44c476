"""Runs a study: trains, measures and records each arm that is not finished yet."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gated_attention.device import device_name
from gated_attention.files import claimed, remove_parts
from gated_attention.models import GatedQwen3MoeConfig
from gated_attention.models.build import build_model, parameter_account
from gated_attention.study.arms import Arm, ArmObserver, Observer, StudyPlan
from gated_attention.study.measure import measure_arm
from gated_attention.study.model_card import write_model_card
from gated_attention.study.record import (
    ARRAYS_NAME,
    CONFIG_NAME,
    FAILURE_NAME,
    METRICS_NAME,
    RESULT_NAME,
    Result,
    read_result,
    write_arrays,
    write_json,
    write_result,
)
from gated_attention.study.samples import SAMPLES_NAME, write_samples
from gated_attention.study.workers import OnError, raise_error, run_side_by_side
from gated_attention.train.callbacks import MetricsCallback, tensorboard_callback
from gated_attention.train.checkpoints import keep_newest, last_checkpoint, load_weights
from gated_attention.train.images.data import ImageConfig, ImageData, collate_images, load_images
from gated_attention.train.optimizer import round_residual
from gated_attention.train.text.data import DataConfig, PackedData, collate, load_data
from gated_attention.train.trainer import check_batch, train, training_precision
from gated_attention.versions import git_commit, library_versions


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
        return run_arms(plan.arms, device, cache, observer, side_by_side)


def run_arms(
    arms: Sequence[Arm],
    device: torch.device,
    cache: Path,
    observer: Observer,
    side_by_side: int = 1,
    on_error: OnError = raise_error,
    begin: Callable[[], object] = lambda: None,
) -> list[Result]:
    """`run_study` for arms of any plans, in their order, within folders that the caller has claimed.

    Args:
        begin: Called before anything is written, when all is checked.
        on_error: Called with an arm and what ended it; if it returns, the others go on, and this one has no result.
    """
    results = {arm.key: result for arm in arms if (result := arm.finished())}
    for arm in arms:
        if arm.key in results:
            observer.finish(arm, results[arm.key], kept=True)
    if missing := [arm for arm in arms if arm.key not in results]:
        configs = dict.fromkeys(arm.plan.data for arm in missing)
        found = {config: _load(config, cache, observer.say) for config in configs}
        for arm in arms:  # those that are finished as well, which the others pair with
            if arm.plan.data in found:
                arm.check_data(found[arm.plan.data])
        for arm in missing:
            check_batch(found[arm.plan.data].train, arm.plan.train)
    begin()
    if missing:
        num_workers = min(side_by_side, len(missing))
        results |= _run_missing(missing, found, device, cache, observer, num_workers, on_error)
    return [results[arm.key] for arm in arms if arm.key in results]


def _run_missing(
    arms: Sequence[Arm],
    found: Mapping[DataConfig | ImageConfig, PackedData | ImageData],
    device: torch.device,
    cache: Path,
    observer: Observer,
    num_workers: int,
    on_error: OnError,
) -> dict[tuple[str, str, int], Result]:
    on_gpus = device.type == "cuda"
    if num_workers > 1 or (on_gpus and on_error is not raise_error):  # a GPU's error can end all that a process can do
        run_packed = partial(run_packed_arm, device=device, cache=cache)
        return run_side_by_side(arms, run_packed, observer, num_workers, on_gpus=on_gpus, on_error=on_error)
    results = {}
    for arm in arms:
        try:
            results[arm.key] = run_arm(arm, found[arm.plan.data], device, observer)
        except Exception as error:
            on_error(arm, error)
        else:
            observer.finish(arm, results[arm.key], kept=False)
    return results


def run_packed_arm(arm: Arm, observer: ArmObserver, *, device: torch.device, cache: Path) -> Result:
    """`run_arm` in its own process, on the packed data in the cache."""
    return run_arm(arm, _load(arm.plan.data, cache, observer.say), device, observer)


def _load(config: DataConfig | ImageConfig, cache: Path, say: Callable[[str], None]) -> PackedData | ImageData:
    return load_images(config, cache, say) if isinstance(config, ImageConfig) else load_data(config, cache, say)


def run_arm(arm: Arm, data: PackedData | ImageData, device: torch.device, observer: ArmObserver) -> Result:
    """Train one arm, from its last checkpoint if there is one, measure it and write its record."""
    plan, settings = arm.plan, arm.training
    observer.start(arm)
    arm.folder.mkdir(parents=True, exist_ok=True)
    (arm.folder / FAILURE_NAME).unlink(missing_ok=True)
    torch.compiler.reset()  # each arm compiles its own model; without this, arms share one recompilation limit
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(arm.model_config(data), arm.seed)
    resolved = arm.resolve(parameter_account(model))
    read = _record_of(data)
    write_json(arm.folder / CONFIG_NAME, {**resolved, "config": {**resolved["config"], **read}})
    if arm.start:
        _load_start(model, arm.start)
    if settings.residual == "bfloat16":
        round_residual(model, torch.bfloat16)
    callbacks = [MetricsCallback(arm.folder / METRICS_NAME, lambda progress: observer.progress(arm, progress))]
    if plan.tensorboard:
        callbacks.append(tensorboard_callback(arm.folder / "tensorboard"))
    num_tokens = train(
        model, settings, train_data=data.train, validation_data=data.validation_sample,
        collate=collate_images if isinstance(data, ImageData) else collate,
        tokenizer=None if isinstance(data, ImageData) else data.tokenizer, output=arm.folder, seed=arm.seed,
        device=device, callbacks=callbacks, say=observer.say,
    )  # fmt: skip
    observer.say("measuring")
    measures, arrays = measure_arm(model, data, settings, arm.folder / METRICS_NAME)
    write_arrays(arm.folder / ARRAYS_NAME, arrays)
    if isinstance(data, PackedData):
        write_samples(arm.folder / SAMPLES_NAME, model, data, training_precision(device, settings))
    result = Result(
        study=plan.name,
        variant=arm.variant.name,
        seed=arm.seed,
        config={
            **resolved["config"],
            "model": _model_record(model),
            **read,
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
    write_result(arm.folder, result)  # it marks the arm as finished
    if not plan.keep_checkpoints:
        keep_newest(arm.folder, 0)
    return read_result(arm.folder / RESULT_NAME)


def _record_of(data: PackedData | ImageData) -> dict[str, Any]:
    """What a record says of the data beside its settings."""
    if isinstance(data, ImageData):
        return {data.kind: {**data.about, "curve_images": len(data.validation_sample)}}
    return {data.kind: {**data.about, "curve_tokens": data.validation_sample.num_tokens}}


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
