"""The record of one trained arm: its schema, and how it is written and read."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config

from gated_attention.files import replacing, write_text
from gated_attention.registry.architectures import OWN
from gated_attention.registry.choices import TEXT
from gated_attention.study.record_types import Stored, find_fault
from gated_attention.typed import one_line, parse, read_bytes

SCHEMA = 1
"""Version of `result.json`; raised when a field changes its meaning."""

RESULT_NAME = "result.json"
ARRAYS_NAME = "arrays.npz"
METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.json"
FAILURE_NAME = "failure.json"

UNSAID = {
    "qk_norm": True,
    "optimizer": "adamw",
    "residual": "float32",
    "cuda_graphs": False,
    "task": TEXT,
    "architecture": OWN,
    "ffn_matrices": 3,
}
"""What records from before a setting existed were run with. Not `packing`: records without it are of a version that
held out other text and decayed other weights, so that no study goes on with them."""

CLOSED = ConfigDict(extra="forbid")
"""For records that hold their own fields and no others."""


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class Measure:
    """One measured number.

    Attributes:
        unit: E.g. `nats/token`; a `share` is 0 to 1.
        n: Number of observations that the value averages, e.g. tokens.
        definition: Version of the measure's definition; values of different versions are not comparable.
        per_layer: The same measure per layer, first layer first; empty if it has no layers.
    """

    value: float
    unit: str
    n: Annotated[int, Field(ge=0)]
    definition: Annotated[int, Field(ge=1)] = 1
    per_layer: tuple[float, ...] = ()


@with_config(CLOSED)
@dataclass(frozen=True, slots=True)
class Result:
    """The result of one arm: a variant trained with one seed.

    Attributes:
        config: The resolved configuration: `variant`, `model`, `parameters`, `data`, `train`.
        tokens_seen: Training tokens, including repetitions.
    """

    study: str
    variant: str
    seed: Annotated[int, Field(ge=0)]
    config: Mapping[str, Any]
    measures: Mapping[str, Measure]
    tokens_seen: Annotated[int, Field(ge=0)]
    device: str
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


_RESULT = TypeAdapter(Result)
_STORED = TypeAdapter(Stored)
_CURE = "move it away or choose another --output"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json` into an arm's folder, which marks the arm as finished."""
    write_json(folder / RESULT_NAME, asdict(result))


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        ValueError: if the file is not JSON, a field is missing or wrong, or it follows another schema.
    """
    text = read_bytes(path, _CURE)
    place = f"{path} is not a result of this tool: it"
    found = parse(_STORED, text, place, _CURE).get("schema")
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"{path} follows result schema {found!r}, this version reads {SCHEMA}; {_CURE}")
    return parse(_RESULT, text, place, _CURE)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a `config.json`.

    Raises:
        ValueError: as `read_result`.
    """
    content = parse(_STORED, read_bytes(path, _CURE), path, _CURE)
    if content.get("schema") != SCHEMA or "config" not in content:
        raise ValueError(f"{path} does not follow schema {SCHEMA}; {_CURE}")
    return dict(content["config"])


def find_results(study_folder: Path) -> list[Result]:
    """All finished arms below `runs/<study>`, by variant and seed.

    Raises:
        ValueError: as `read_result`, or if a result belongs to another arm than its folder.
    """
    results = {path: read_result(path) for path in sorted(study_folder.glob(f"*/seed*/{RESULT_NAME}"))}
    for path, result in results.items():
        variant, seed = result.variant, result.seed
        if path.parts[-3:-1] != (variant, f"seed{seed}"):
            raise ValueError(f"{path} is of {variant} seed {seed}; move it to {variant}/seed{seed}")
    return sorted(results.values(), key=lambda result: (result.variant, result.seed))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an arm's arrays atomically."""
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an arm by name; empty without a file.

    Raises:
        ValueError: if the file is not an archive of arrays, or an array that reports draw has a wrong form.
    """
    if not path.exists():
        return {}
    cure = "remove the arm and train it again"
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an archive of arrays ({one_line(error)}); {cure}") from error
    if fault := find_fault(arrays):
        raise ValueError(f"{path} has {fault}; {cure}")
    return arrays
