"""`adapt`: trains gates into a model that has none, beside controls on the same tokens, and measures each."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, PreTrainedModel

from gated_attention.device import device_name
from gated_attention.files import new_folder, remove_parts
from gated_attention.jobs.adapt_measures import LONG, HeldOut, held_out, measure_adapted
from gated_attention.jobs.adapt_plan import AdaptPlan
from gated_attention.jobs.adapt_record import (
    METRICS_NAME,
    ORIGINAL,
    RESULT_NAME,
    Adapted,
    arm_folder,
    read_record,
    read_settings,
    write_record,
    write_settings,
)
from gated_attention.jobs.named_model import (
    Checkpoint,
    check_tokenizer,
    find_checkpoint,
    load_checkpoint,
    num_positions,
    require_causal,
)
from gated_attention.models.configuration_gated_qwen3 import GatedConfigMixin
from gated_attention.models.families.add_gates import add_gates
from gated_attention.train.adapt import adapt_model
from gated_attention.train.callbacks import MetricsCallback, Progress
from gated_attention.train.parameters import gate_names
from gated_attention.train.quiet import quiet
from gated_attention.train.sink_losses import SinkLosses
from gated_attention.train.text.data import PackedData, collate, load_data
from gated_attention.train.trainer import check_batch, training_precision
from gated_attention.typed import contradict, first_difference
from gated_attention.versions import git_commit, library_versions


class Observer(Protocol):
    """Receives the progress of `adapt`."""

    def say(self, message: str) -> None:
        """A step begins that takes a while."""

    def progress(self, name: str, progress: Progress) -> None:
        """An arm made progress."""


def adapt(
    plan: AdaptPlan, device: torch.device, cache: Path, observer: Observer, finish: Callable[[], object]
) -> list[Adapted]:
    """Measure the model, then train and measure every arm that is not finished; an interrupted one resumes.

    Args:
        finish: Called when another arm is finished.

    Raises:
        ValueError: if the folder holds other settings, the model, the text and the gates do not fit together, or
            nothing can be written.
    """
    _check_settings(plan)
    remove_parts(plan.output)
    wanted = [(ORIGINAL, 0), *((arm, seed) for seed in range(plan.seeds) for arm in plan.arms)]
    paths = {key: arm_folder(plan.records, *key) / RESULT_NAME for key in wanted}
    found = {key: read_record(path) for key, path in paths.items() if path.exists()}
    if missing := [key for key in wanted if key not in found]:
        run = _prepare(plan, device, cache, observer)
        for key in missing:
            found[key] = run.arm(*key)
            finish()
    return [found[key] for key in wanted]


def _check_settings(plan: AdaptPlan) -> None:
    found = read_settings(plan.records)
    if found is not None and (difference := first_difference(found, plan.settings())):
        raise ValueError(f"{plan.output} was made with {difference}; choose another --output")


def _prepare(plan: AdaptPlan, device: torch.device, cache: Path, observer: Observer) -> "_Run":
    """Everything that the arms share; what does not fit is refused here, before anything is trained."""
    checkpoint = find_checkpoint(plan.model)
    observer.say(f"loading {checkpoint.name}")
    model, _ = load_checkpoint(checkpoint, torch.device("cpu"), plan.data.tokenizer)
    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{checkpoint.name} has quantised weights, which cannot be trained; give the model as it was")
    require_causal(model, checkpoint.name)
    positions = num_positions(model)
    if positions is not None and plan.data.block_size > positions:
        raise ValueError(
            f"context {plan.data.block_size} exceeds the {positions} positions of {checkpoint.name}; "
            "use at most that as --context"
        )
    _try_penalties(_gated(model, plan), plan)
    data = load_data(plan.data, cache, observer.say)
    found = read_settings(plan.records) or {}
    if contradict(found.get("text", {}), data.about):
        raise ValueError(
            f"{plan.output} was made from other text than {plan.data.source} holds now; bring that back, or choose "
            "another --output"
        )
    check_batch(data.train, plan.train)
    longest = plan.data.block_size * LONG
    if positions is not None and not getattr(config, "rope_parameters", None):
        longest = min(longest, positions)
    text = held_out(
        data, bos=plan.data.bos, num_tokens=plan.num_tokens, longest=longest, yarn=plan.yarn,
        window=plan.window or max(1, plan.data.block_size // 4),
    )  # fmt: skip
    check_tokenizer(model, int(max(part.ids.max() for part in (data.train, data.validation))), checkpoint.name)
    write_settings(plan.records, {**plan.settings(), "text": data.about})
    return _Run(plan, device, observer, checkpoint, data, text, positions)


def _gated(model: PreTrainedModel, plan: AdaptPlan) -> PreTrainedModel:
    """The model with the gates of a plan; a model of this package's own is made again with them."""
    if not isinstance(model.config, GatedConfigMixin):
        return add_gates(model, plan.gates, plan.layers)
    if model.config.gates:
        raise ValueError(f"{plan.model} has gates already; give the model without them")
    if plan.layers is not None:
        raise ValueError(
            f"{plan.model} is a {model.config.model_type}, which has its gates in all layers; leave out --layers"
        )
    config = copy(model.config)
    config.gates = plan.gates
    twin = type(model)(config).to(model.dtype)
    missing = twin.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert set(missing) == set(gate_names(twin))
    return twin.eval()


def _try_penalties(model: PreTrainedModel, plan: AdaptPlan) -> None:
    """Refuse a model whose penalties cannot be computed, before anything is trained."""
    config = plan.training("penalties")
    losses = SinkLosses(model.train(), config)
    try:
        with torch.no_grad(), losses.gather():
            model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; use --sink-weight 0") from error
    finally:
        losses.remove()


@dataclass(frozen=True)
class _Run:
    plan: AdaptPlan
    device: torch.device
    observer: Observer
    checkpoint: Checkpoint
    data: PackedData
    text: HeldOut
    positions: int | None

    def arm(self, arm: str, seed: int) -> Adapted:
        """The record of an arm, trained if it is one that is, from its last checkpoint if there is one."""
        plan, name = self.plan, arm if arm == ORIGINAL else f"{arm}, seed {seed}"
        model = self._load()
        plain = model.num_parameters()
        if arm == "gated":
            model = _gated(model, plan)
        num_tokens, added = 0, model.num_parameters() - plain
        folder = plan.output / "checkpoints" / f"{arm}-seed{seed}"
        if arm != ORIGINAL:
            self.observer.say(f"training {name}")
            num_tokens = self._train(model, arm, seed, folder)
            model = model.to(self._stored_dtype())
            if arm == "gated":
                self._save(model, plan.model_folder(seed))
        self.observer.say(f"measuring {name}")
        with training_precision(self.device, plan.train):
            found = measure_adapted(model.float().to(self.device), self.text, self.device, self.positions)
        record = Adapted(
            arm, seed, model.num_parameters(), added, num_tokens, found.measures, found.by_layer, found.by_position,
            found.missing, device_name(self.device), git_commit(), library_versions(),
        )  # fmt: skip
        if arm == ORIGINAL and record.doubt:
            self.observer.say(record.doubt)
        write_record(plan.records, record)  # it marks the arm as finished
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another arm's are there, or none ever was
            folder.parent.rmdir()
        return record

    def _load(self) -> PreTrainedModel:
        model, _ = load_checkpoint(self.checkpoint, torch.device("cpu"), self.plan.data.tokenizer)
        return model

    def _stored_dtype(self) -> torch.dtype:
        return AutoConfig.from_pretrained(self.checkpoint.path).dtype or torch.float32

    def _train(self, model: PreTrainedModel, arm: str, seed: int, folder: Path) -> int:
        settings, name = self.plan.training(arm), f"{arm} seed {seed}"
        metrics = arm_folder(self.plan.records, arm, seed) / METRICS_NAME
        folder.mkdir(parents=True, exist_ok=True)
        return adapt_model(
            model, settings, teacher=self._load() if settings.fit == "kl" else None, train_data=self.data.train,
            validation_data=self.data.validation_sample, collate=collate, output=folder, seed=seed,
            device=self.device, say=self.observer.say,
            callbacks=[MetricsCallback(metrics, lambda progress: self.observer.progress(name, progress))],
        )  # fmt: skip

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its record
        with quiet(), new_folder(folder) as part:
            model.save_pretrained(part)
            self.data.tokenizer.save_pretrained(part)
