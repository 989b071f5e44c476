"""Makes a plan from names and options: checks everything, and fills in the defaults of size and device."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gated_attention.registry.architectures import OWN, Architecture
from gated_attention.registry.choices import TEXT, VISION, choose_shape, choose_variants
from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.vision import VISION_SETTINGS
from gated_attention.shards.mixture import find_shards
from gated_attention.sizes import ModelSize
from gated_attention.study.arms import StudyPlan
from gated_attention.study.record import CONFIG_NAME, read_config
from gated_attention.train.checkpoints import last_checkpoint
from gated_attention.train.images.data import ImageConfig
from gated_attention.train.text.blocks import Packing
from gated_attention.train.text.corpus import STDLIB
from gated_attention.train.text.data import DataConfig
from gated_attention.train.trainer import TrainConfig


def make_plan(
    *,
    variants: Sequence[str] | None = None,
    table: int | None = None,
    size: str,
    seeds: int,
    output: Path,
    device: torch.device,
    name: str | None = None,
    tensorboard: bool = False,
    start: Path | None = None,
    rope_theta: float | None = None,
    architecture: str = OWN,
    task: str = TEXT,
    point: str = "",
    keep_checkpoints: bool = True,
    first_seed: int = 0,
    qk_norm: bool = True,
    data: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> StudyPlan:
    """A study plan; fields of `data` and `train` that are missing or None take the size's defaults.

    Args:
        variants: Names; the default is `registry.choices.DEFAULT`.
        table: Trains all rows of that table of the paper instead. Rows that the size cannot have are left out, and the
            plan says why.
        start, rope_theta: As `StudyPlan`; with a start, the default tokenizer is that of its first arm. Without one, it
            is that of token shards, if text is given as such.
        architecture: Name of an architecture of the registry.
        task: One of `registry.choices.STUDY_TASKS`; of `data`, `vision` takes the source and the held-out images.
        point, keep_checkpoints, first_seed: As `StudyPlan`.
        qk_norm: False takes the norm of queries and keys from every variant.

    Raises:
        ValueError: if the start has no such arm, variants and a table are both given, a variant, a size or a setting is
            unknown or out of range, or the architecture cannot have one of them.
    """
    family, shape = choose_shape(size, architecture, task)
    defaults = asdict((SETTINGS if task == TEXT else VISION_SETTINGS)[size])
    on_gpu = device.type == "cuda"
    chosen, left_out = choose_variants(variants, table, size, architecture, task)
    text_values = {"tokenizer": defaults.pop("tokenizer"), "max_validation_tokens": defaults.pop("validation_tokens")}
    data_config: DataConfig | ImageConfig
    if task == VISION:
        _check_text_only(
            {**_given(data), "qk_norm": qk_norm, "rope_theta": rope_theta, "start": start, **_given(train)}
        )
        given = {name: value for name, value in _given(data).items() if name not in _TEXT_ONLY}
        data_config = ImageConfig(**{"block_size": shape.context} | given)
    else:
        if start is not None:
            first_arm = start / chosen[0].name / f"seed{first_seed}"
            _check_start(first_arm, family)
            text_values["tokenizer"] = str(last_checkpoint(first_arm) or start)
        elif shards := [found for key in ("source", "validation") for found in find_shards(_given(data).get(key, ""))]:
            text_values["tokenizer"] = str(shards[0][0].tokenizer)
        data_config = DataConfig(**{"block_size": shape.context} | text_values | _given(data))
        _check_settings(family, qk_norm=qk_norm, rope_theta=rope_theta, packing=data_config.packing)
        if not qk_norm:
            chosen = tuple(replace(variant, block=replace(variant.block, qk_norm=False)) for variant in chosen)
    if (train or {}).get("cuda_graphs"):
        _check_cuda_graphs(on_gpu, shape)
    precision = "bfloat16" if on_gpu else "float32"
    train_values = defaults | {"precision": precision, "compile": on_gpu} | _given(train)
    # About 50 points on the loss curve and ten on the validation curve; a resumed run repeats at most a tenth.
    tenth, fiftieth = (max(1, train_values["steps"] // parts) for parts in (10, 50))
    every = {"log_every": fiftieth, "evaluate_every": tenth, "checkpoint_every": tenth}
    words = [*([] if family.is_own or task == VISION else [architecture]), size]
    default_name = "-".join(["compare", *words] if table is None else [f"table-{table}", *words])
    if start is not None:
        default_name = f"{start.resolve().name}-{data_config.block_size}"
    return StudyPlan(
        name=name or default_name, architecture=family, variants=chosen, table=table, left_out=left_out,
        size=shape, seeds=seeds, data=data_config, train=TrainConfig(**{**every, **train_values}),
        output=output, tensorboard=tensorboard, start=start, rope_theta=rope_theta, point=point,
        keep_checkpoints=keep_checkpoints, first_seed=first_seed,
    )  # fmt: skip


_TEXT_ONLY = {
    "text_field": "text", "tokenizer": None, "block_size": None, "bos": False, "packing": "stream", "qk_norm": True,
    "rope_theta": None, "start": None, "residual": "float32", "optimizer": "adamw",
}  # fmt: skip
"""Settings that images do not have, and the values that leave them out."""


def _check_text_only(values: Mapping[str, Any]) -> None:
    """Refuse settings of text in a study of images."""
    for name, unset in _TEXT_ONLY.items():
        if values.get(name, unset) != unset:
            option = {"block_size": "context", "start": "from"}.get(name, name)
            raise ValueError(f"{option} is of text; task {VISION!r} has no such setting, leave it out")
    if values.get("source") in (None, STDLIB):
        raise ValueError("task 'vision' needs images; give data a Parquet file of images and labels, or a folder")


def _check_settings(family: Architecture, *, qk_norm: bool, rope_theta: float | None, packing: Packing) -> None:
    """Refuse settings that an architecture does not have."""
    if not qk_norm and not family.is_own:
        raise ValueError(f"qk_norm = false is of architecture {OWN!r}; {family.name!r} has the norms of its family")
    if rope_theta is not None and family.rope_fraction is None:
        raise ValueError(f"rope_theta is {rope_theta:g}; architecture {family.name!r} has no rotation with one base")
    if packing == "documents" and not family.packs_documents:
        raise ValueError(f"architecture {family.name!r} cannot keep packed documents apart; use packing 'stream'")


def _check_cuda_graphs(on_gpu: bool, size: ModelSize) -> None:
    """Refuse graphs where nothing can record them, and for experts, whose shapes follow from the data."""
    if not on_gpu:
        raise ValueError("cuda_graphs needs a GPU; leave it out")
    if size.num_experts:
        raise ValueError(f"cuda_graphs needs fixed shapes, and size {size.name!r} has experts; leave it out")


def _check_start(arm: Path, family: Architecture) -> None:
    """Refuse a study of another architecture; one that left no settings is refused where its weights are read."""
    path = arm / CONFIG_NAME
    found = read_config(path).get("architecture", OWN) if path.exists() else family.name
    if found != family.name:
        raise ValueError(f"{arm} is of architecture {found!r}, not {family.name!r}; use --architecture {found}")


def _given(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if value is not None}
