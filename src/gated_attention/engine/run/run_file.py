"""A run as one TOML file: read, changed by `--set`, checked, its defaults filled in, and written again."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gated_attention.engine.run.sections import Auxiliary, Batch, Evaluation, Precision, Sections
from gated_attention.engine.run.shape import CUSTOM, block_of, size_of, variant_of
from gated_attention.ranges import require_folder_name, require_within
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.registry.settings import SETTINGS, Settings
from gated_attention.sizes import ModelSize
from gated_attention.spec import BlockSpec
from gated_attention.typed import first_difference, parse, read_toml, require_known

RUN_NAME = "run.toml"
"""The resolved file beside a run."""

CURE = "see docs/train.md"
_FREE = ("parallel", "checkpoints", "evaluation", "cost")
"""Sections that may change between a run and its resumption."""

_INSTEAD = {"steps": "tokens", "tokens": "steps", "text": "paths", "paths": "text"}
"""Settings in each other's place: `--set` of one takes the other out of the file."""

_SECTIONS = TypeAdapter(Sections)
_TABLES = {one.name: one.type for one in fields(Sections) if is_dataclass(one.type)}
_PLAIN_SETTINGS = Settings(1_000, 8, 1e-3)


@dataclass(frozen=True)
class Run:
    """A run: its file with every default filled in that does not need the data.

    Attributes:
        size: With the widths that the variant trains at; the vocabulary is the data's where it is known.
    """

    file: Sections
    size: ModelSize
    block: BlockSpec

    @property
    def variant(self) -> str:
        """Name of the variant, and of the run's folder."""
        return self.file.model.variant or CUSTOM

    def folder(self, output: Path) -> Path:
        """Where the run's records and checkpoints lie."""
        return output / "runs" / self.file.name / self.variant / f"seed{self.file.seed}"

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return self.file.data.context or self.size.context

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.file.schedule.steps or 0

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises, at least one."""
        return max(1, round((self.file.schedule.warmup or 0) * self.steps))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all GPUs in a step."""
        return (self.file.batch.sequences or 0) * self.context

    @cached_property
    def data_parallel(self) -> int:
        """GPUs that read different sequences."""
        parallel = self.file.parallel
        return parallel.gpus // (parallel.tensor * parallel.context)

    @property
    def learning_rate(self) -> float:
        """The peak, with the variant's factor."""
        chosen = variant_of(self.file.model)
        return (self.file.optimizer.learning_rate or 0.0) * (float(chosen.learning_rate) if chosen else 1.0)

    @property
    def auxiliary(self) -> AuxiliaryWeights:
        """Factors on the losses of routers."""
        given = {name: value for name, value in asdict(self.file.auxiliary).items() if value is not None}
        return AuxiliaryWeights(**given)

    @property
    def micro(self) -> int:
        """Sequences per GPU and pass: the largest number up to `batch.micro` that divides a GPU's share of a step."""
        share = (self.file.batch.sequences or 0) // self.data_parallel
        return max(one for one in range(1, min(share, self.file.batch.micro or 1) + 1) if share % one == 0)

    def with_vocabulary(self, vocab_size: int) -> "Run":
        """The run with the vocabulary of its data, or the larger one that the file asks for.

        Raises:
            ValueError: if it asks for a smaller one, or the vocabulary does not divide as the layout wants.
        """
        asked = self.file.model.vocab_size
        if asked is not None and asked < vocab_size:
            raise ValueError(f"model.vocab_size is {asked}; the data's tokenizer has {vocab_size} tokens; leave it out")
        return _checked(replace(self, size=replace(self.size, vocab_size=asked or vocab_size)))

    def toml(self) -> str:
        """The file with its defaults filled in; read again, it is the same run."""
        top, tables = [], []
        for key, value in asdict(self.file).items():
            if key not in _TABLES:
                top.append(f"{key} = {_toml(value)}\n")
            elif lines := [f"{name} = {_toml(one)}\n" for name, one in value.items() if one is not None]:
                tables.append(f"\n[{key}]\n" + "".join(lines))
        return "".join(top + tables)

    def require_same(self, written: Path) -> None:
        """Refuse to go on with a run whose `run.toml` says otherwise; its layout and what it writes may differ.

        Raises:
            ValueError: naming the first setting that differs.
        """
        found, wanted = (
            {key: value for key, value in content.items() if key not in _FREE}
            for content in (read_toml(written, CURE), tomllib.loads(self.toml()))
        )
        for content in (found, wanted):
            content["batch"].pop("micro", None)
            content["precision"].pop("compile", None)
        difference = first_difference(found, wanted) or first_difference(wanted, found)
        if difference:
            raise ValueError(f"{written.parent} was run with {difference}; choose another name or --output")


def read_run(path: Path, overrides: Sequence[str] = (), gpus: int | None = None, on_gpu: bool = True) -> Run:
    """Read and check a run's file.

    Args:
        overrides: `section.key=value` each, the value as TOML or else a string.
        gpus: How many processes run; None is what the file says.
        on_gpu: Whether they have GPUs, which the default precision follows.

    Raises:
        ValueError: if it cannot be read, has an unknown key or a wrong value, or its parts contradict each other.
    """
    values = read_toml(path, CURE)
    for override in overrides:
        _override(values, override)
    require_known(values, [one.name for one in fields(Sections)], path)
    for name, kind in _TABLES.items():
        if isinstance(table := values.get(name), Mapping):
            require_known(table, [one.name for one in fields(kind)], f"{path} [{name}]")
    file = parse(_SECTIONS, json.dumps(values, default=str), path, CURE)
    if gpus is not None:
        file = replace(file, parallel=replace(file.parallel, gpus=gpus))
    try:
        return _checked(_filled(file, on_gpu))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not key or not all(tables):
        raise ValueError(f"--set {override!r} sets nothing; write --set section.key=value")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override!r}: {table} is no section; write --set section.key=value")
    values.pop(_INSTEAD.get(key, ""), None)
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = text.strip()


def _filled(file: Sections, on_gpu: bool) -> Run:
    size, block = size_of(file), block_of(file.model)
    settings = SETTINGS[file.model.size] if file.model.size else _PLAIN_SETTINGS
    data, schedule, batch = file.data, file.schedule, file.batch
    if data.paths and data.text is not None:
        raise ValueError("data.text and data.paths are both given; keep one")
    if data.paths and (ignored := [name for name in ("tokenizer", "bos") if getattr(data, name)]):
        raise ValueError(f"data.{ignored[0]} is of text; the shards of data.paths are tokens already")
    if not data.paths:
        data = replace(data, text=data.text or "stdlib", tokenizer=data.tokenizer or settings.tokenizer)
    data = replace(data, context=data.context or size.context)
    batch = Batch(
        sequences=batch.sequences or settings.batch_size * settings.accumulation,
        micro=batch.micro or settings.batch_size,
    )
    if schedule.steps is not None and schedule.tokens is not None:
        raise ValueError("schedule.steps and schedule.tokens are both given; keep one")
    require_within("schedule.tokens", schedule.tokens, least=1, most=1e18)
    per_step = (batch.sequences or 1) * (data.context or 1)
    steps = schedule.steps or (settings.steps if schedule.tokens is None else ceil(schedule.tokens / per_step))
    warmup = settings.warmup if schedule.warmup is None else schedule.warmup
    often = max(1, min(steps // 10, 1000))
    shown, checkpoints = file.evaluation, file.checkpoints
    every = shown.every or max(1, min(steps // 5, 1000))
    file = replace(
        file,
        model=replace(file.model, variant=file.model.variant or (None if _is_custom(file) else "baseline")),
        data=data,
        batch=batch,
        optimizer=replace(file.optimizer, learning_rate=file.optimizer.learning_rate or settings.learning_rate),
        auxiliary=_auxiliary(file.auxiliary, size),
        schedule=replace(schedule, steps=steps, tokens=None, warmup=warmup),
        precision=_precision(file.precision, on_gpu),
        checkpoints=replace(checkpoints, every=checkpoints.every or often),
        evaluation=Evaluation(
            every=every,
            probe_every=every if shown.probe_every is None else shown.probe_every,
            tokens=shown.tokens or settings.validation_tokens,
            log_every=shown.log_every or max(1, min(steps // 50, 10)),
        ),
    )
    return Run(file, size, block)


def _is_custom(file: Sections) -> bool:
    return block_of(file.model) != BlockSpec()


def _auxiliary(given: Auxiliary, size: ModelSize) -> Auxiliary:
    if size.num_experts:
        weights = AuxiliaryWeights()
        return Auxiliary(
            load_balance=weights.load_balance if given.load_balance is None else given.load_balance,
            router_z=weights.router_z if given.router_z is None else given.router_z,
        )
    if named := [name for name, value in asdict(given).items() if value is not None]:
        raise ValueError(f"auxiliary.{named[0]} is of routers, which the model has not; leave it out")
    return given


def _precision(precision: Precision, on_gpu: bool) -> Precision:
    return replace(
        precision,
        compute=precision.compute or ("bfloat16" if on_gpu else "float32"),
        compile=on_gpu if precision.compile is None else precision.compile,
    )


def _checked(run: Run) -> Run:
    file, parallel = run.file, run.file.parallel
    require_folder_name("run name", file.name)
    optimizer, schedule = file.optimizer, file.schedule
    require_within("optimizer.learning_rate", optimizer.learning_rate, above=0, most=1000)
    for name in ("weight_decay", "eps", "max_grad_norm"):
        require_within(f"optimizer.{name}", getattr(optimizer, name), least=0)
    for name in ("beta1", "beta2"):
        require_within(f"optimizer.{name}", getattr(optimizer, name), least=0, below=1)
    require_within("schedule.warmup", schedule.warmup, least=0, most=1)
    require_within("schedule.min_learning_rate", schedule.min_learning_rate, least=0, most=1)
    require_within("cost.mfu", file.cost.mfu, above=0, most=1)
    require_within("cost.dollars_per_gpu_hour", file.cost.dollars_per_gpu_hour, least=0)
    require_within("schedule.steps", schedule.steps, least=1, most=10**9)
    whole = parallel.replicas * parallel.tensor * parallel.context
    if parallel.gpus % whole:
        raise ValueError(
            f"{parallel.gpus} GPUs do not make {parallel.replicas} replicas of tensor {parallel.tensor} x context "
            f"{parallel.context}; parallel.gpus must be a multiple of {whole}"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        for degree in (parallel.tensor, parallel.context):
            if (heads := getattr(run.size, name)) % degree:
                raise ValueError(f"{name} {heads} does not divide by {degree}; choose a smaller degree in [parallel]")
    for name in ("intermediate_size", "vocab_size"):
        if (width := getattr(run.size, name)) % parallel.tensor:
            cure = "model.ffn_multiple" if name == "intermediate_size" else "a larger model.vocab_size"
            raise ValueError(f"{name} {width} does not divide by parallel.tensor {parallel.tensor}; choose {cure}")
    for name, value in asdict(file.auxiliary).items():
        require_within(f"auxiliary.{name}", value, least=0)
    if run.size.num_experts and parallel.tensor > 1:
        raise ValueError("a mixture of experts is not trained with parallel.tensor above 1; use replicas or context")
    if run.context % (2 * parallel.context):
        raise ValueError(f"data.context {run.context} does not divide by 2 x parallel.context {parallel.context}")
    if parallel.context > 1 and file.data.packing == "documents":
        raise ValueError("context parallelism does not keep documents apart; use data.packing 'stream'")
    if file.data.bos and file.data.packing == "documents":
        raise ValueError(
            "data.bos with data.packing 'documents' is not on the engine, which finds documents by EOS alone"
        )
    if (file.batch.sequences or 0) % (readers := run.data_parallel):
        raise ValueError(
            f"batch.sequences {file.batch.sequences} does not divide by {readers}, the GPUs that read different ones"
        )
    return run


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
