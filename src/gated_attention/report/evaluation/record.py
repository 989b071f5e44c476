"""An evaluation as data: a list of numbers, written as JSON and CSV and shown as tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

from gated_attention.jobs.evaluate import Evaluation, RopeEvaluation
from gated_attention.report.tables import csv_of
from gated_attention.study.record import library_versions

SCHEMA = 1
"""Version of `evaluation.json`; raised when a field changes its meaning."""

AVERAGE = "average over domains"
"""The item of perplexities in which every domain weighs the same."""


@dataclass(frozen=True, slots=True)
class Number:
    """One number that was found.

    Attributes:
        rope: The rotary embedding's label.
        item: What it is of: a domain, a length, a question, a scheme, a benchmark.
        n: How many observations it averages: tokens, documents' domains, passages, samples.
        note: What a reader needs beside it, e.g. the worst input of a scheme.
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
        whole = one.perplexity
        for domain, loss in whole.domains.items():
            n = loss.num_tokens
            yield Number("perplexity", label, domain, "loss", loss.loss_nats, loss.standard_error, "nats/token", n)
            spread = None if loss.standard_error is None else loss.perplexity * loss.standard_error
            yield Number("perplexity", label, domain, "perplexity", loss.perplexity, spread, "1", n)
            yield Number("perplexity", label, domain, "bits_per_byte", loss.bits_per_byte, None, "bits/byte", n)
        k = len(whole.domains)
        yield Number("perplexity", label, AVERAGE, "loss", whole.mean_loss_nats, whole.standard_error, "nats/token", k)
        yield Number("perplexity", label, AVERAGE, "perplexity", whole.mean_perplexity, None, "1", k)
        yield Number("perplexity", label, AVERAGE, "bits_per_byte", whole.mean_bits_per_byte, None, "bits/byte", k)
    for at in one.length:
        item, n = f"{at.length // context}x ({at.length})", len(at.targets)
        yield Number("length", label, item, "loss", at.loss_nats, at.standard_error, "nats/token", n)
        for start, loss_nats in zip(at.starts, at.buckets, strict=True):
            yield Number("length", label, item, f"loss_from_position_{start}", loss_nats, None, "nats/token", n)
    if one.damage:
        n = len(one.length[0].targets)
        yield Number(
            "length", label, f"1x ({context})", "damage", one.damage.nats, one.damage.standard_error, "nats", n
        )
    for score in one.retrieval:
        item = f"{score.kind} {score.length} at {score.depth:g}"
        yield Number("retrieval", label, item, "loss", score.loss_nats, None, "nats/token", score.num_samples)
        yield Number("retrieval", label, item, "exact_match", score.exact_match, None, "share", score.num_samples)
    for result in one.benchmarks:
        source = f" from {result.shots_from}" if result.shots and result.shots_from else ""
        note = f"{result.shots}-shot{source}"
        yield Number(
            "benchmark", label, result.task, result.metric, result.value, result.standard_error, "share",
            result.num_samples, note,
        )  # fmt: skip


def _quantization(evaluation: Evaluation) -> Iterator[Number]:
    whole = evaluation.quantization
    if whole is None:
        return
    note = f"{whole.share:.1%} of the parameters are rounded"
    n = whole.num_tokens
    yield Number("quantization", "plain", "unrounded", "loss", whole.loss_nats, None, "nats/token", n, note)
    for row in whole.rows:
        item = f"{row.scheme.label} {row.granularity}"
        worst = f"{row.worst.name} alone: {row.worst.change_nats:+.4f}"
        yield Number("quantization", "plain", item, "loss_change", row.change_nats, None, "nats/token", n, worst)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, ready for JSON; what is not finite becomes null."""
    plan = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(evaluation.plan).items()}
    return {
        "schema": SCHEMA,
        "is_complete": evaluation.is_complete,
        "model": evaluation.label,
        "family": evaluation.family,
        "num_parameters": evaluation.num_parameters,
        "dtype": evaluation.dtype,
        "device": evaluation.device,
        "context": evaluation.context,
        "plan": plan,
        "versions": {**library_versions(), **_harness_version(evaluation)},
        "numbers": [
            {
                **asdict(one),
                "value": one.value if isfinite(one.value) else None,
                "standard_error": one.standard_error if isfinite(one.standard_error or 0.0) else None,
            }
            for one in numbers(evaluation)
        ],
    }


def _harness_version(evaluation: Evaluation) -> dict[str, str]:
    return {"lm-eval": metadata.version("lm-eval")} if any(one.benchmarks for one in evaluation.ropes) else {}


def csv_text(found: Sequence[Number]) -> str:
    """A row for each number; empty where there is none."""
    return csv_of([[field.name for field in fields(Number)], *map(astuple, found)])


def json_text(evaluation: Evaluation) -> str:
    """`as_json` as text."""
    return json.dumps(as_json(evaluation), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
