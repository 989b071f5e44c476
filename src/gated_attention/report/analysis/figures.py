"""The figures of an analysis, each with its caption."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from gated_attention.analysis.definitions import ALL
from gated_attention.analysis.reduction import GateMeasures
from gated_attention.jobs.analyze import Analysis
from gated_attention.report import panels, plots
from gated_attention.report.analysis.sink_kinds import CAPTION, sink_kinds
from gated_attention.report.blocks import Block, Details, FigureBlock, figure_block
from gated_attention.report.heatmaps import head_heatmaps
from gated_attention.spec import SITE_LABELS

FOLDER = "figures"
"""Where an analysis keeps its figures, beside the page."""

FIRST_PROFILES = 2
"""Measures by layer that are shown at once: the sink and the activations."""

_PROFILES = {
    "f_attn": ("Attention on the first token", False),
    "m_act": ("Largest |hidden state|", True),
    "kurtosis": ("Kurtosis", True),
    "value_drain": ("First value over the median", False),
    "size_after_gate": ("Mean |input of o_proj|", True),
    "sparsity_1e-2": ("Share below 0.01", False),
    "entropy": ("Attention entropy (nats)", False),
    "effective_rank": ("Effective rank of W_V W_O", False),
}
"""Measure to its axis, and whether that is logarithmic."""

_UNIFORM = {"f_attn": "f_attn_uniform", "entropy": "entropy_uniform"}
_HEADS = {
    "f_attn": (
        "Attention on the first token, by head",
        "A bright cell is a head that keeps its attention on the first token.",
    ),
    "sink_share": (
        "Attention on the strongest position, by head",
        "Bright here and dark above is a sink at another position than the first. It is sought among the first 32, and "
        "among all where attention looks ahead.",
    ),
}


def analysis_figures(analyses: Sequence[Analysis]) -> Iterator[Block]:
    """Sinks, activations, gates and attention maps; other measures by layer, and all heads, on demand."""
    strokes = plots.strokes_for(analysis.label for analysis in analyses)
    profiles = [_profile(analyses, name, strokes) for name in _PROFILES if name in analyses[0].inspection.measures]
    yield from profiles[:FIRST_PROFILES]
    kinds = sink_kinds({analysis.label: analysis.inspection for analysis in analyses}, strokes)
    yield _block("sink_kinds", kinds, "No-op and broadcast sinks", CAPTION)
    yield from _gate_scores(analyses, strokes)
    yield from _maps(analyses)
    yield Details("More measures by layer", profiles[FIRST_PROFILES:])
    yield Details("Head by head", list(_heads(analyses)))


def _heads(analyses: Sequence[Analysis]) -> Iterator[FigureBlock]:
    for name, (title, caption) in _HEADS.items():
        heads = {analysis.label: analysis.inspection.measures[name] for analysis in analyses}
        yield _block(f"{name}_heads", head_heatmaps(heads, ALL[name].title, 1e-3, 1.0, log=True), title, caption)
    if means := {label: gate.measures["gate_mean"] for _, label, gate in _gates(analyses)}:
        yield _block(
            "gate_heads",
            head_heatmaps(means, ALL["gate_mean"].title, *_gate_range(analyses)),
            "Gate score, by head",
            "Mean over tokens and channels, from the gate's lowest score, dark, to its highest, bright.",
        )


def _gates(analyses: Sequence[Analysis]) -> list[tuple[Analysis, str, GateMeasures]]:
    """Every gate with its model and a label."""
    return [
        (one, f"{one.label} ({SITE_LABELS[site]})", gate)
        for one in analyses
        for site, gate in one.inspection.gates.items()
    ]


def _gate_scores(analyses: Sequence[Analysis], strokes: Mapping[str, plots.Stroke]) -> Iterator[FigureBlock]:
    histograms = [
        plots.GateHistogram(label, gate.histogram.sum(1), gate.edges, strokes[analysis.label].color)
        for analysis, label, gate in _gates(analyses)
    ]
    if histograms:
        yield _block(
            "gate_scores", plots.gate_histograms(histograms), "Gate scores, by layer", panels.HISTOGRAM_CAPTION
        )


def _maps(analyses: Sequence[Analysis]) -> Iterator[FigureBlock]:
    by_layers: dict[tuple[int, ...], list[Analysis]] = {}
    for analysis in analyses:  # maps of the same layers share a figure
        by_layers.setdefault(tuple(analysis.inspection.attention_layers.tolist()), []).append(analysis)
    for number, (layers, group) in enumerate(by_layers.items()):
        name = f"attention_maps_{number}" if number else "attention_maps"
        title = f"Attention maps: {', '.join(a.label for a in group)}" if len(by_layers) > 1 else "Attention maps"
        maps = {analysis.label: analysis.inspection.attention_maps.astype(np.float64) for analysis in group}
        yield _block(
            name, plots.attention_maps(maps, layers), title, panels.MAPS_CAPTION.format(text="the first passage")
        )


def _block(name: str, figure: Figure, title: str, caption: str) -> FigureBlock:
    return figure_block(f"{FOLDER}/{name}.svg", figure, title, caption)


def _profile(analyses: Sequence[Analysis], name: str, strokes: Mapping[str, plots.Stroke]) -> FigureBlock:
    (axis, log), definition = _PROFILES[name], ALL[name]
    values = {analysis.label: [analysis.inspection.by_layer(name).tolist()] for analysis in analyses}
    caption, uniform = f"{definition.title}: {definition.text}.", None
    if name in _UNIFORM:
        shares = {round(analysis.inspection.overall(_UNIFORM[name]), 6) for analysis in analyses}
        if len(shares) == 1:
            uniform = shares.pop()
            caption += " The dashed line is attention spread evenly."
    figure = plots.per_layer(values, strokes, axis, log=log, uniform=uniform)
    return _block(name, figure, f"{axis}, by layer", f"{caption}{' Logarithmic axis.' * log}")


def _gate_range(analyses: Sequence[Analysis]) -> tuple[float, float] | tuple[None, None]:
    """Lowest and highest score of the gates; None where a gate's scores have no closed end at 0."""
    edges = [gate.edges for analysis in analyses for gate in analysis.inspection.gates.values()]
    low, high = min(float(one[0]) for one in edges), max(float(one[-1]) for one in edges)
    return (low, high) if low == 0 else (None, None)
