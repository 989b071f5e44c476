"""The lines of `metrics.jsonl`: their types, how they are read, and how a resumed run cuts them."""

from pathlib import Path
from typing import Annotated, Any, Required, cast

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from gated_attention.files import write_text
from gated_attention.typed import parse, read_bytes

_CURE = "repair it, or move the arm's folder away and train it again"


class MetricsLine(TypedDict, total=False):
    """A line of training or, with `val_loss_nats`, of validation; the losses of a diverged run are NaN."""

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
    """The lines of a `metrics.jsonl`, none if it does not exist. An incomplete last line, left by a kill, is skipped.

    Raises:
        ValueError: if the file or another line cannot be read.
    """
    return [record for _, record in _lines(path)]


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an incomplete last line, from a metrics file.

    Raises:
        ValueError: as in `read_metrics`.
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
