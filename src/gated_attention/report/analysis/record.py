"""An analysis as data: one JSON file with everything, one CSV file with a row for each number."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np

from gated_attention.analysis.definitions import ALL, Definition
from gated_attention.jobs.analyze import Analysis, AnalysisPlan
from gated_attention.report.tables import csv_of
from gated_attention.versions import library_versions

SCHEMA = 1
"""Version of `analysis.json`; raised when a field changes its meaning."""


def as_json(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> dict[str, Any]:
    """Everything that was measured, ready for JSON; NaN becomes null."""
    return {
        "schema": SCHEMA,
        "text": {"source": plan.source, "text_field": plan.text_field, "num_tokens": plan.num_tokens},
        "level": plan.level,
        "versions": library_versions(),
        "definitions": {
            name: {"title": d.title, "unit": d.unit, "axes": list(d.axes), "text": d.text, "source": d.source}
            for name, d in ALL.items()
        },
        "models": [_model(analysis) for analysis in analyses],
    }


def _model(analysis: Analysis) -> dict[str, Any]:
    found = analysis.inspection
    return {
        "model": analysis.label,
        **{name: getattr(analysis, name) for name in ("name", "family", "num_parameters", "dtype", "device")},
        "num_tokens": found.num_tokens,
        "num_sequences": found.num_sequences,
        "context": found.length,
        "layers_with_softmax_attention": np.flatnonzero(found.attention).tolist(),
        "unknown_gates": list(found.unknown_gates),
        "unmeasured_gates": found.unmeasured_gates,
        "summary": {name: _number(found.overall(name)) for name in found.measures if name != "sink_position"},
        "measures": {name: _nested(values) for name, values in found.measures.items()},
        "massive_activations": [
            {
                "layer": one.layer,
                "position": one.position,
                "channel": one.channel,
                "token": token,
                "token_id": one.token_id,
                "value": one.value,
                "over_median": _number(one.over_median),
                "share_of_sequences": one.share,
            }
            for one, token in zip(found.massive, analysis.massive_tokens, strict=True)
        ],
        "gates": {
            site: {
                "gate": gate.spec.to_dict(),
                "measures": {name: _nested(values) for name, values in gate.measures.items()},
                "histogram": {"edges": _nested(gate.edges), "counts": _nested(gate.histogram)},
                "by_token": [asdict(one) for one in analysis.token_gates[site]],
                "excerpt": _nested(gate.excerpt),
            }
            for site, gate in found.gates.items()
        },
        "excerpt": [
            {"token": token, "token_id": int(i)} for token, i in zip(analysis.excerpt, found.excerpt, strict=True)
        ],
        "attention_maps": {
            "layers": found.attention_layers.tolist(),
            "weights": _nested(found.attention_maps.astype(np.float64)),
        },
    }


def _nested(values: np.ndarray) -> list[Any]:
    """Nested lists of numbers with seven significant digits, null for NaN."""
    if values.ndim > 1:
        return [_nested(row) for row in values]
    return [_number(float(value)) for value in values]


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if isfinite(value) else None


def csv_text(analyses: Sequence[Analysis]) -> str:
    """A row for each finite number of a measure, layer and head.

    `head` is a query head, a key/value head (`value_drain`) or a head of the gate; `rank` is 1 for the largest.
    """
    rows = [["model", "site", "measure", "layer", "head", "rank", "value", "unit"]]
    for analysis in analyses:
        sites = {"": analysis.inspection.measures}
        sites |= {site: gate.measures for site, gate in analysis.inspection.gates.items()}
        for site, measures in sites.items():
            for name, values in measures.items():
                rows += _csv_rows(analysis.label, site, name, ALL[name], values)
    return csv_of(rows)


def _csv_rows(label: str, site: str, name: str, definition: Definition, values: np.ndarray) -> Iterator[list[str]]:
    for index in np.ndindex(values.shape):
        if not isfinite(values[index]):
            continue
        places = dict(zip(definition.axes, map(str, index), strict=True))
        rank = str(int(places["rank"]) + 1) if "rank" in places else ""
        head = places.get("head", places.get("kv_head", ""))
        yield [label, site, name, places["layer"], head, rank, f"{values[index]:.7g}", definition.unit]
