"""The record of one trained arm: what is written, under which schema, and how it is read back."""

import json
import os
import platform
import subprocess
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
"""Version of `result.json`; raised when a field changes its meaning."""

RESULT_NAME = "result.json"
ARRAYS_NAME = "arrays.npz"
METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class Measure:
    """One measured number.

    Attributes:
        unit: Of the value, e.g. `nats/token`; `share` is 0 to 1.
        n: How many observations the value averages, e.g. tokens.
        definition: Version of the measure's definition; numbers of different versions do not compare.
        per_layer: The same measure layer by layer, first layer first; empty where it has none.
    """

    value: float
    unit: str
    n: int
    definition: int = 1
    per_layer: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What one arm (a variant trained with one seed) left behind.

    Attributes:
        config: The resolved configuration: `variant`, `model`, `parameters`, `data`, `train`.
        tokens_seen: Training tokens, repetitions counted.
    """

    study: str
    variant: str
    seed: int
    config: Mapping[str, Any]
    measures: Mapping[str, Measure]
    tokens_seen: int
    device: str
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a stop half-way leaves the old file or the new one, never a torn one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_result(folder: Path, result: Result) -> None:
    """Write `result.json` into an arm's folder; its presence says that the arm is finished."""
    write_json(folder / RESULT_NAME, asdict(result))


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        ValueError: if the file is not JSON, misses fields, or follows another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("schema")
        result = _as_result(content) if found == SCHEMA else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a result of this tool ({error}); move it away or choose another --output"
        ) from error
    if result is None:
        raise ValueError(
            f"{path} follows result schema {found!r}, this version reads {SCHEMA}; "
            "move the folder away or choose another --output"
        )
    return result


def _as_result(content: Mapping[str, Any]) -> Result:
    measures = {
        name: Measure(
            **{
                **values,
                "value": float(values["value"]),
                "per_layer": tuple(float(value) for value in values.get("per_layer", ())),
            }
        )
        for name, values in content["measures"].items()
    }
    return Result(**{**content, "measures": measures})


def find_results(study_folder: Path) -> list[Result]:
    """All finished arms below `runs/<study>`, by variant and seed."""
    paths = sorted(study_folder.glob(f"*/seed*/{RESULT_NAME}"))
    return sorted((read_result(path) for path in paths), key=lambda result: (result.variant, result.seed))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line, left by a kill, is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an arm's arrays, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    part.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an arm by name; none where it left none.

    Raises:
        ValueError: if the file is not an archive of arrays.
    """
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an archive of arrays ({error}); remove the arm and train it again") from error


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in ("gated-attention", "torch", "transformers", "accelerate", "datasets", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):  # benchmarks need fewer, and run from a source tree
            found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of the source tree, with `+dirty` where it has changes; None outside a checkout."""
    here = Path(__file__)
    try:
        # Installed below someone else's checkout, this file belongs to none of its commits.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        commit = _git(here.parent, "rev-parse", "HEAD")
        changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
