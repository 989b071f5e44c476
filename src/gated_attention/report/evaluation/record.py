"""An evaluation as data: a list of numbers, written as JSON and CSV and shown as tables."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

from gated_attention.jobs.evaluation import Evaluation, RopeEvaluation
from gated_attention.report.tables import csv_of
from gated_attention.versions import library_versions

SCHEMA = 1
"""Version of `evaluation.json`; raised when a field changes its meaning."""

AVERAGE = "average over domains"
"""The item of perplexities in which every domain weighs the same."""


@dataclass(frozen=True, slots=True)
class Number:
    """One measured number.

    Attributes:
        rope: The rotary embedding's label.
        item: A domain, a length, a kind of question, a scheme or a benchmark.
        n: Number of tokens, domains, passages or samples that the value averages.
        note: What a reader must know beside it, e.g. the worst input of a scheme.
    """

    task: str
    rope: str
    item: str
    measure: str
    value: float
    standard_error: float | None
    unit: str
    n: int
    note: str = ""


def numbers(evaluation: Evaluation) -> list[Number]:
    """Every number, task by task under each rotary embedding."""
    found = [number for one in evaluation.ropes for number in _under(one, evaluation.context)]
    return found + list(_quantization(evaluation))


def _under(one: RopeEvaluation, context: int) -> Iterator[Number]:
    label = one.rope.label
    if one.perplexity:
        for domain, loss in one.perplexity.domains.items():
            spread = None if loss.standard_error is None else loss.perplexity * loss.standard_error
            values = ((loss.loss_nats, loss.standard_error), (loss.perplexity, spread), (loss.bits_per_byte, None))
            yield from _perplexities(label, domain, values, loss.num_tokens)
        mean = one.perplexity
        values = (
            (mean.mean_loss_nats, mean.standard_error), (mean.mean_perplexity, None), (mean.mean_bits_per_byte, None)
        )  # fmt: skip
        yield from _perplexities(label, AVERAGE, values, len(mean.domains))
    for at in one.length:
        item, n = f"{at.length // context}x ({at.length})", len(at.targets)
        yield Number("length", label, item, "loss", at.loss_nats, at.standard_error, "nats/token", n)
        for start, loss_nats in zip(at.starts, at.buckets, strict=True):
            yield Number("length", label, item, f"loss_from_position_{start}", loss_nats, None, "nats/token", n)
    if found := one.damage:
        n = len(one.length[0].targets)
        yield Number("length", label, f"1x ({context})", "damage", found.nats, found.standard_error, "nats", n)
    for score in one.retrieval:
        item = f"{score.kind} {score.length} at {score.depth:g}"
        yield Number("retrieval", label, item, "loss", score.loss_nats, None, "nats/token", score.num_samples)
        yield Number("retrieval", label, item, "exact_match", score.exact_match, None, "share", score.num_samples)
    for result in one.benchmarks:
        note = f"{result.shots}-shot"
        if result.shots and result.shots_from:
            note += f" from {result.shots_from}"
        yield Number(
            "benchmark", label, result.task, result.metric, result.value, result.standard_error, "share",
            result.num_samples, note,
        )  # fmt: skip


def _perplexities(label: str, item: str, values: Iterable[tuple[float, float | None]], n: int) -> Iterator[Number]:
    measures = (("loss", "nats/token"), ("perplexity", "1"), ("bits_per_byte", "bits/byte"))
    for (measure, unit), (value, error) in zip(measures, values, strict=True):
        yield Number("perplexity", label, item, measure, value, error, unit, n)


def _quantization(evaluation: Evaluation) -> Iterator[Number]:
    whole = evaluation.quantization
    if whole is None:
        return
    note, n = f"{whole.share:.1%} of the parameters are rounded", whole.num_tokens
    yield Number("quantization", "plain", "unrounded", "loss", whole.loss_nats, None, "nats/token", n, note)
    for row in whole.rows:
        item = f"{row.scheme.label} {row.granularity}"
        worst = f"{row.worst.name} alone: {row.worst.change_nats:+.4f}" if row.worst else ""
        yield Number("quantization", "plain", item, "loss_change", row.change_nats, None, "nats/token", n, worst)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, ready for JSON; what is not finite becomes null."""
    harness = {"lm-eval": metadata.version("lm-eval")} if any(one.benchmarks for one in evaluation.ropes) else {}
    rows = [asdict(number) for number in numbers(evaluation)]
    for row in rows:
        row |= {key: row[key] if isfinite(row[key] or 0.0) else None for key in ("value", "standard_error")}
    return {
        "schema": SCHEMA,
        "is_complete": evaluation.is_complete,
        "model": evaluation.label,
        **{name: getattr(evaluation, name) for name in ("family", "num_parameters", "dtype", "device", "context")},
        "plan": {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(evaluation.plan).items()
        },
        "versions": {**library_versions(), **harness},
        "numbers": rows,
    }


def csv_text(found: Sequence[Number]) -> str:
    """A row for each number; fields without a value are empty."""
    return csv_of([[field.name for field in fields(Number)], *map(astuple, found)])


def json_text(evaluation: Evaluation) -> str:
    """`as_json` as text."""
    return json.dumps(as_json(evaluation), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
