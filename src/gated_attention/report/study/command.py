"""The `compare` call behind a study's runs, and what no call can say."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from gated_attention.registry.settings import SETTINGS
from gated_attention.report.study.sections import source_name
from gated_attention.study.comparison import Comparison
from gated_attention.study.record import Result
from gated_attention.train.auxiliary import AuxiliaryWeights
from gated_attention.train.text.data import DataConfig
from gated_attention.train.trainer import TrainConfig

# Option of `compare` to where a run's configuration keeps it.
_OPTIONS = {
    "size": ("size", "name"),
    "data": ("data", "source"),
    "validation": ("data", "validation"),
    "text-field": ("data", "text_field"),
    "tokenizer": ("data", "tokenizer"),
    "context": ("data", "block_size"),
    "bos": ("data", "bos"),
    "packing": ("data", "packing"),
    "steps": ("train", "steps"),
    "batch-size": ("train", "batch_size"),
    "accumulation": ("train", "accumulation"),
    "learning-rate": ("train", "learning_rate"),
    "warmup": ("train", "warmup"),
    "weight-decay": ("train", "weight_decay"),
    "compile": ("train", "compile"),
}
_FOLLOWS = {"log_every", "evaluate_every", "checkpoint_every", "precision"}
"""Settings that follow from others and the device."""


def compare_command(results: Sequence[Result], comparison: Comparison) -> str:
    """The `compare` call that makes these runs, every setting that it can take spelled out."""
    run = results[0]
    options: dict[str, object] = {
        "name": run.study,
        "variants": ",".join(row.variant for row in comparison.rows),
        "seeds": max(len(row.seeds) for row in comparison.rows),
        **{option: run.config.get(part, {}).get(key) for option, (part, key) in _OPTIONS.items()},
        "device": "cpu" if run.device.startswith("CPU") else None,
    }
    options["learning-rate"] = run.config.get("study_learning_rate", options["learning-rate"])
    if start := run.config.get("start"):
        study = PurePath(start).parents[2]
        options["from"] = PurePath(*study.parts[-2:]) if study.is_absolute() else study
        if PurePath(str(options["tokenizer"])).is_relative_to(study):
            del options["tokenizer"]  # which is that of the study
    options["rope-theta"] = run.config.get("rope_theta")
    words = ["gated-attention compare"]
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words += ["--no-compile"] if option == "compile" else []  # the other switches are off by default
        elif value is not None:
            words.append(f"--{option} {shlex.quote(source_name(str(value)))}")
    return " \\\n  ".join(words)


def without_option(results: Sequence[Result]) -> Iterator[str]:
    """A sentence on settings that are not what `compare` sets them to and that it has no option for."""
    config = results[0].config
    size = SETTINGS.get(config.get("size", {}).get("name", ""))
    expected = {"data": _defaults(DataConfig), "train": _defaults(TrainConfig)}
    expected["data"]["max_validation_tokens"] = size.validation_tokens if size else None
    expected["train"]["auxiliary"] = {
        "load_balance": AuxiliaryWeights().load_balance,
        "router_z": AuxiliaryWeights().router_z,
    }
    options = set(_OPTIONS.values())
    changed = [
        f"`{key}` {value}"
        for part in expected
        for key, value in config.get(part, {}).items()
        if (part, key) not in options and key in expected[part] and key not in _FOLLOWS and value != expected[part][key]
    ]
    if changed:
        yield f"No option of `compare` sets these as they were: {', '.join(changed)}"


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}
