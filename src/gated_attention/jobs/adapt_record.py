"""The records of `adapt`: its settings, and what each trained model measured."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from gated_attention.files import write_text
from gated_attention.registry.choices import ARMS
from gated_attention.typed import parse, read_bytes

SCHEMA = 1
"""Version of the records; raised when a field changes its meaning."""

ORIGINAL = "original"
"""The arm that is the model as it came."""

SETTINGS_NAME = "adapt.json"
RESULT_NAME = "result.json"
METRICS_NAME = "metrics.jsonl"
_CURE = "move it away or choose another --output"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class Adapted:
    """What one model measured.

    Attributes:
        arm: `original`, or one of `ARMS`.
        measures: By name of `adapt_measures.measure_adapted`; what could not be measured is missing.
        by_layer: F-Attn, Sink^0.3 and M-Act of every layer.
        by_position: Loss by position under each rotary embedding, in steps of a quarter context.
        missing: Why a measure is missing, by its name.
    """

    arm: str
    seed: Annotated[int, Field(ge=0)]
    num_parameters: int
    num_gate_parameters: int
    tokens_seen: int
    measures: Mapping[str, float]
    by_layer: Mapping[str, tuple[float, ...]]
    by_position: Mapping[str, tuple[float, ...]]
    missing: Mapping[str, str]
    device: str
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str, int]:
        """Identifies it within its folder."""
        return self.arm, self.seed

    @property
    def doubt(self) -> str | None:
        """Why this may not be the model that was meant, in words; a tokenizer of another model shows here."""
        loss, guess = self.measures["loss_nats"], self.measures.get("frequency_nats", float("inf"))
        if loss <= guess:
            return None
        return (
            f"the held-out text costs the model {loss:.2f} nats per token, a guess by the frequencies of its tokens "
            f"{guess:.2f}: is the tokenizer the model's own?"
        )


_ADAPTED = TypeAdapter(Adapted)
_SETTINGS = TypeAdapter(dict[str, Any])


def arm_folder(records: Path, arm: str, seed: int) -> Path:
    """Where the record of an arm lies."""
    return records / arm / f"seed{seed}"


def write_record(records: Path, found: Adapted) -> None:
    """Write a record, which marks its arm as finished."""
    _write(arm_folder(records, found.arm, found.seed) / RESULT_NAME, asdict(found))


def read_record(path: Path) -> Adapted:
    """Read a record.

    Raises:
        ValueError: if it is not JSON, a field is missing or wrong, or it follows another schema.
    """
    found = parse(_ADAPTED, read_bytes(path, _CURE), path, _CURE)
    if found.schema != SCHEMA:
        raise ValueError(f"{path} follows schema {found.schema}, this version reads {SCHEMA}; {_CURE}")
    if path.parts[-3:-1] != (found.arm, f"seed{found.seed}"):
        raise ValueError(f"{path} is of {found.arm} seed {found.seed}; move it to {found.arm}/seed{found.seed}")
    return found


def read_records(records: Path) -> list[Adapted]:
    """All finished arms, the original first, then in the order of `ARMS`, by seed.

    Raises:
        ValueError: as in `read_record`.
    """
    paths = (path for arm in (ORIGINAL, *ARMS) for path in (records / arm).glob(f"seed*/{RESULT_NAME}"))
    found = [read_record(path) for path in paths]
    order = (ORIGINAL, *ARMS)
    return sorted(found, key=lambda one: (order.index(one.arm), one.seed))


def write_settings(records: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all arms share."""
    _write(records / SETTINGS_NAME, {"schema": SCHEMA, **settings})


def read_settings(records: Path) -> dict[str, Any] | None:
    """The settings of a folder of records; None if it has none.

    Raises:
        ValueError: if they are not JSON or follow another schema.
    """
    path = records / SETTINGS_NAME
    if not path.exists():
        return None
    found = parse(_SETTINGS, read_bytes(path, _CURE), path, _CURE)
    if found.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} does not follow schema {SCHEMA}; {_CURE}")
    return found


def unfinished(records: Path) -> Iterator[str]:
    """Arms that were begun and have no result, in words."""
    for path in sorted(records.glob(f"*/seed*/{METRICS_NAME}")):
        if not (path.parent / RESULT_NAME).exists():
            yield f"{path.parts[-3]} seed {path.parent.name.removeprefix('seed')}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
