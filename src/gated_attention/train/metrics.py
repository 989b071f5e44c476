"""The lines of `metrics.jsonl`: their types, and how they are read and cut."""

from pathlib import Path
from typing import Annotated, Any, Required, cast

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from gated_attention.files import write_text
from gated_attention.typed import parse, read_bytes

_CURE = "repair it, or move the arm's folder away and train it again"


class MetricsLine(TypedDict, total=False):
    """A line of training or, with `val_loss_nats`, of validation; losses of a run that diverged are NaN."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]  # a TypedDict of pydantic

    step: Required[Annotated[int, Field(ge=0)]]
    loss_nats: float | None
    val_loss_nats: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens: int
    tokens_per_s: float | None


_LINE = TypeAdapter(MetricsLine)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none without a file. A torn last line, left by a kill, is passed over.

    Raises:
        ValueError: if the file or another line cannot be read.
    """
    return [record for _, record in _lines(path)]


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that a kill tore, from a metrics file.

    Raises:
        ValueError: as `read_metrics`.
    """
    kept = [text + "\n" for text, record in _lines(path) if record["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(kept))


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    *whole, _ = read_bytes(path, _CURE).split(b"\n")  # whole lines end in a line break
    records = (parse(_LINE, line, f"{path} line {number}", _CURE) for number, line in enumerate(whole, start=1))
    return [(line.decode(), cast(dict[str, Any], record)) for line, record in zip(whole, records, strict=True)]
