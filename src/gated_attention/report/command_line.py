"""The command lines that repeat a study, an analysis or an evaluation, and what they cannot say."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from gated_attention.jobs.analyze import AnalysisPlan
from gated_attention.jobs.evaluation_plan import EvaluationPlan
from gated_attention.registry.architectures import OWN
from gated_attention.registry.choices import TEXT
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.registry.settings import SETTINGS
from gated_attention.study.comparison import Comparison
from gated_attention.study.record import Result
from gated_attention.train.images.data import ImageConfig
from gated_attention.train.text.data import DataConfig
from gated_attention.train.trainer import TrainConfig

_OPTIONS = {
    "source": "data",
    "block_size": "context",
    "domain_field": "field",
    "num_tokens": "tokens",
    "num_samples": "samples",
    "local": "local-dir",
}
"""Setting to option, where their names differ."""

_COMPARE = {
    "data": ("source", "validation", "text_field", "tokenizer", "block_size", "bos", "packing"),
    "train": ("steps", "batch_size", "accumulation", "learning_rate", "warmup", "weight_decay", "compile"),
}
"""Settings of a run that are options of `compare`."""

_FOLLOWS = {"log_every", "evaluate_every", "checkpoint_every", "precision"}
"""Settings that follow from others and from the device."""


def source_name(source: str) -> str:
    """A file or hub name without the folders of the machine it was read on."""
    return PurePath(source).name if PurePath(source).is_absolute() else source


def plan_command(name: str, models: Iterable[str], plan: AnalysisPlan | EvaluationPlan) -> str:
    """The call of `analyze` or `evaluate` that makes a plan; settings at their defaults are left out."""
    settings = {f.name: getattr(plan, f.name) for f in fields(plan) if f.default is not MISSING}
    defaults = _defaults(type(plan))
    return _call([name, *models], {name: value for name, value in settings.items() if value != defaults[name]})


def compare_command(results: Sequence[Result], comparison: Comparison) -> str:
    """The `compare` call that repeats these runs, with every setting that it has an option for."""
    run = results[0]
    settings: dict[str, Any] = {
        "name": run.study,
        "variants": ",".join(row.variant for row in comparison.rows),
        "seeds": max(len(row.seeds) for row in comparison.rows),
        "first_seed": min((seed for row in comparison.rows for seed in row.seeds), default=0) or None,
        "task": None if (task := run.config.get("task", TEXT)) == TEXT else task,
        "architecture": None if (family := run.config.get("architecture", OWN)) == OWN or task != TEXT else family,
        "size": run.config.get("size", {}).get("name"),
        **{key: run.config.get(part, {}).get(key) for part, keys in _COMPARE.items() for key in keys},
    }
    if task != TEXT:
        settings["block_size"] = None  # follows from the size
    settings["no_compile"] = settings["compile"] is False
    settings["device"] = "cpu" if run.device.startswith("CPU") else None
    settings["learning_rate"] = run.config.get("study_learning_rate", settings["learning_rate"])
    if start := run.config.get("start"):
        study = PurePath(start).parents[2]
        settings["from"] = PurePath(*study.parts[-2:]) if study.is_absolute() else study
        if PurePath(str(settings["tokenizer"])).is_relative_to(study):
            del settings["tokenizer"]  # the study's own, which is the default
    settings["rope_theta"] = run.config.get("rope_theta")
    return _call(["compare"], settings)


def train_commands(results: Iterable[Result]) -> str:
    """The calls of `train` that repeat these runs: each has its file beside its record."""
    return "\n".join(
        _call(["train", f"runs/{run.study}/{run.variant}/seed{run.seed}/run.toml"], {"output": "again"})
        for run in results
    )


def adapt_command(settings: Mapping[str, Any], arms: Iterable[str], seeds: int) -> str:
    """The `adapt` call that repeats these records."""
    data, train = settings["data"], settings["train"]
    layers = settings["layers"]
    given = {
        "data": data["source"],
        "validation": data["validation"],
        "text_field": data["text_field"],
        "context": data["block_size"],
        "variant": settings["variant"],
        "layers": ",".join(map(str, layers)) if isinstance(layers, list) else layers,
        "train": train["trained"],
        "loss": train["fit"],
        "lora_rank": train["lora_rank"] if train["trained"] == "lora" else None,
        **{name: train[name] for name in ("sink_weight", "activation_weight", "gate_steps", "steps", "batch_size")},
        **{name: train[name] for name in ("accumulation", "learning_rate")},
        "gate_learning_rate": train["gate_learning_rate"] * train["learning_rate"],
        "arms": ",".join(arms),
        "seeds": seeds,
        **{name: settings[name] for name in ("num_tokens", "window", "yarn")},
    }
    return _call(["adapt", settings["model"]], given)


def without_option(results: Sequence[Result]) -> Iterator[str]:
    """A sentence on settings that differ from what `compare` sets and that it has no option for."""
    config = results[0].config
    size = SETTINGS.get(config.get("size", {}).get("name", ""))
    kind = DataConfig if config.get("task", TEXT) == TEXT else ImageConfig
    expected = {"data": _defaults(kind), "train": _defaults(TrainConfig)}
    expected["data"]["max_validation_tokens"] = size.validation_tokens if size else None
    weights = AuxiliaryWeights()
    expected["train"]["auxiliary"] = {"load_balance": weights.load_balance, "router_z": weights.router_z}
    changed = [
        f"`{key}` {value}"
        for part, defaults in expected.items()
        for key, value in config.get(part, {}).items()
        if key in defaults.keys() - _FOLLOWS - set(_COMPARE[part]) and value != defaults[key]
    ]
    if changed:
        yield f"No option of `compare` sets these as they were: {', '.join(changed)}"


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _call(words: Iterable[str], settings: Mapping[str, object]) -> str:
    """A line for each option; True is a bare flag, None and False are left out."""
    lines = [" ".join(["gated-attention", *(shlex.quote(source_name(word)) for word in words)])]
    for name, value in settings.items():
        option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
        if value is True:
            lines.append(option)
        elif value is not None and value is not False:
            lines.append(f"{option} {shlex.quote(_word(value))}")
    return " \\\n  ".join(lines)


def _word(value: object) -> str:
    """An option's value as the command line reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return source_name(str(value))
