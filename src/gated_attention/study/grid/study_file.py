"""A study as one TOML file: the settings of `compare`, each a value or a list of values, which are crossed.

Beside the lists, `points` may name single departures: tables of settings, of which each makes a point of its own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, with_config

from gated_attention.ranges import require_choice, require_folder_name, require_once, require_within
from gated_attention.registry.architectures import OWN
from gated_attention.registry.choices import DEFAULT_SIZES, TEXT, choose_variants
from gated_attention.study.arms import Arm, StudyPlan
from gated_attention.study.plan import make_plan
from gated_attention.study.record import CLOSED
from gated_attention.train.optimizer import Optimizer
from gated_attention.train.text.blocks import Packing
from gated_attention.train.text.data import DataConfig
from gated_attention.train.trainer import Precision
from gated_attention.typed import parse, read_toml, require_known

STUDY_NAME = "study.toml"
"""The study's file beside its records."""

MAX_ARMS = 10_000

_CURE = "see docs/studies.md"
_SINGLE = {"name", "variants", "seeds", "first_seed", "device", "arms_per_device", "keep_checkpoints"}
"""Settings of the study, not of a point; `variants` is a list of its own."""


@with_config(CLOSED)
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One point of a study, as `compare` would be told of it; what is None follows from the size or the device.

    Attributes:
        optimizer, residual, cuda_graphs: As `TrainConfig`.
        qk_norm: As `make_plan`.
        arms_per_device: How many arms share a GPU; on a CPU, how many run at a time.
        keep_checkpoints: Whether finished arms keep their weights.
    """

    name: str
    variants: tuple[str, ...] | None = None
    seeds: int = 1
    first_seed: int = 0
    task: str = TEXT
    architecture: str = OWN
    size: str | None = None
    data: str = "stdlib"
    validation: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    context: int | None = None
    bos: bool = False
    packing: Packing = "stream"
    steps: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    learning_rate: float | None = None
    warmup: float | None = None
    weight_decay: float = 0.1
    optimizer: Optimizer = "adamw"
    qk_norm: bool = True
    residual: Precision = "float32"
    precision: Precision | None = None
    compile: bool | None = None
    cuda_graphs: bool = False
    log_every: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    arms_per_device: int = 1
    keep_checkpoints: bool = True

    def plan(self, point: str, output: Path, device: torch.device) -> StudyPlan:
        """The plan of this point."""
        return make_plan(
            name=self.name, variants=self.variants, size=self.size or DEFAULT_SIZES[self.task], seeds=self.seeds,
            output=output, device=device, task=self.task, architecture=self.architecture, point=point,
            keep_checkpoints=self.keep_checkpoints, first_seed=self.first_seed, qk_norm=self.qk_norm,
            data={**_take(self, _DATA), "source": self.data, "block_size": self.context}, train=_take(self, _TRAIN),
        )  # fmt: skip


_DATA = ("validation", "text_field", "tokenizer", "bos", "packing")
_TRAIN = (
    "steps", "batch_size", "accumulation", "learning_rate", "warmup", "weight_decay", "optimizer", "residual",
    "precision", "compile", "cuda_graphs", "log_every", "evaluate_every", "checkpoint_every",
)  # fmt: skip
_KEYS = [field.name for field in fields(Settings)]
_POINTS = "points"
_PLAIN_POINT = "plain"  # the name of a point that departs in its variants at most
_OF_A_POINT = set(_KEYS) - _SINGLE | {"variants"}
_SETTINGS = TypeAdapter(Settings)


@dataclass(frozen=True, slots=True)
class StudyFile:
    """A study's file.

    Attributes:
        values: What it says, by key.
        points: The settings of each point by the name of its folder; the name is empty if nothing is crossed.
    """

    values: Mapping[str, Any]
    points: Mapping[str, Settings]

    @property
    def settings(self) -> Settings:
        """Those of the first point; all agree on `name`, `seeds` and the device."""
        return next(iter(self.points.values()))

    def plans(self, output: Path, device: torch.device) -> list[StudyPlan]:
        """A plan for each point.

        Raises:
            ValueError: as `make_plan`, naming the point.
        """
        plans = []
        for name, settings in self.points.items():
            try:
                plans.append(settings.plan(name, output, device))
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from error
        return plans

    def resolved(self, plans: list[StudyPlan]) -> str:
        """The file with what its points agree on filled in; as a study's file it makes the same plans."""
        found = [_resolved(settings, plan) for settings, plan in zip(self.points.values(), plans, strict=True)]
        agreed = {key: value for key, value in found[0].items() if all(one[key] == value for one in found)}
        departs = {key for table in self.values.get(_POINTS, []) for key in table}
        values = {key: self.values.get(key, None if key in departs else agreed.get(key)) for key in _KEYS}
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None]
        if _POINTS in self.values:
            lines += [f"{_POINTS} = [\n", *(f"    {_inline(table)},\n" for table in self.values[_POINTS]), "]\n"]
        return "".join(lines)


def read_study(path: Path) -> StudyFile:
    """Read and check a study's file.

    Raises:
        ValueError: if it cannot be read, has an unknown key or a wrong value, or the arms are too many.
    """
    values = read_toml(path, _CURE)
    require_known(values, [*_KEYS, _POINTS], path)
    points, num_arms = {}, 0
    for name, point in _cross(values, path):
        if name in points:
            raise ValueError(f"{path} has two points {name!r}; name each value once")
        points[name] = parse(_SETTINGS, json.dumps(point, default=str), path, _CURE)
        require_within("arms_per_device", points[name].arms_per_device, least=1, most=100)
        one = points[name]
        require_choice("task", one.task, DEFAULT_SIZES)
        size = one.size or DEFAULT_SIZES[one.task]
        num_arms += len(choose_variants(one.variants, None, size, one.architecture, one.task)[0]) * one.seeds
        require_folder_name("study name", points[name].name)
    study = StudyFile(values, points)
    require_within("arms", num_arms, most=MAX_ARMS)
    return study


def arms_in_order(plans: list[StudyPlan]) -> list[Arm]:
    """The arms of all points, seeds outermost so that early results pair and curves are whole early."""
    return sorted((arm for plan in plans for arm in plan.arms), key=lambda arm: arm.seed)


def _cross(values: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the listed values, each with its name; of all departures, if there are some."""
    departures = _departures(values, path)
    shared = {key: value for key, value in values.items() if key != _POINTS}
    axes = {key: value for key, value in shared.items() if isinstance(value, list) and key not in _SINGLE}
    for key, listed in axes.items():
        if not listed:
            raise ValueError(f"{path} crosses no value of {key!r}; name one, or leave it out")
        require_once(key, listed)
    require_within(f"{path}: points", prod(map(len, axes.values())) * len(departures), most=MAX_ARMS)
    for departure in departures:
        for chosen in product(*axes.values()):
            point = dict(zip(axes, chosen, strict=True))
            named = {key: value for key, value in {**departure, **point}.items() if key != "variants"}
            name = "_".join(f"{key.replace('_', '-')}-{_word(value)}" for key, value in named.items())
            if not name and _POINTS in values:
                name = _PLAIN_POINT
            if name:
                require_folder_name(f"{path}: point", name)
            yield name, {**shared, **departure, **point}


def _departures(values: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The tables of `points`; one without a departure where the file names none.

    Raises:
        ValueError: if one is no table, sets what belongs to the whole study, a list, or what is crossed besides.
    """
    found = values.get(_POINTS, [{}])
    if not (isinstance(found, list) and found and all(isinstance(table, dict) for table in found)):
        raise ValueError(f"{path} has {_POINTS!r} wrong: write a list of tables, such as [{{}}, {{ qk_norm = false }}]")
    for table in found:
        require_known(table, sorted(_OF_A_POINT), f"{path}: {_POINTS}")
        for key, value in table.items():
            if key != "variants" and isinstance(value, list):
                raise ValueError(f"{path}: {_POINTS} gives {key!r} a list; write a table for each value")
            if key != "variants" and isinstance(values.get(key), list):
                raise ValueError(f"{path} crosses {key!r} and sets it in {_POINTS}; keep one")
    return found


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower().replace("/", "-")


def _inline(table: Mapping[str, Any]) -> str:
    """A table in one line of TOML."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }" if table else "{}"


def _take(settings: Settings, keys: Iterable[str]) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in keys}


def _resolved(settings: Settings, plan: StudyPlan) -> dict[str, Any]:
    """All settings, those that were None as the plan has them."""
    derived = {key: getattr(plan.train, key) for key in _TRAIN}
    derived |= {"size": plan.size.name, "variants": [variant.name for variant in plan.variants]}
    if isinstance(plan.data, DataConfig):
        derived |= {"tokenizer": plan.data.tokenizer, "context": plan.data.block_size}
    return {key: derived.get(key) if value is None else value for key, value in _take(settings, _KEYS).items()}
