"""The figures of an analysis, each with its caption."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from gated_attention.analysis.definitions import ALL
from gated_attention.jobs.analyze import Analysis
from gated_attention.report import plots
from gated_attention.report.blocks import FigureBlock, figure_block
from gated_attention.report.heatmaps import head_heatmaps
from gated_attention.spec import SITE_LABELS

FOLDER = "figures"
"""Where an analysis keeps its figures, beside the page."""

_PROFILES: dict[str, tuple[str, bool, str]] = {
    "f_attn": (
        "Attention on the first token",
        False,
        "Averaged over heads. A layer far above the dashed line, which is attention spread evenly, has a sink there.",
    ),
    "m_act": ("Largest |hidden state|", True, "M-Act of each layer, at the layer's output, on a logarithmic axis."),
    "kurtosis": (
        "Kurtosis",
        True,
        "Of the attention block's output; 3 is a normal distribution, outliers raise it. On a logarithmic axis.",
    ),
    "value_drain": (
        "First value over the median",
        False,
        "Norm of the first token's value over the median norm. Well below 1 that token takes attention and gives "
        "nothing: a sink that does no work.",
    ),
    "size_after_gate": (
        "Mean |input of o_proj|",
        True,
        "What the output projection reads: attention's output, gated where there is a gate. On a logarithmic axis.",
    ),
    "sparsity_1e-2": ("Share below 0.01", False, "Share of values below 0.01 in what the output projection reads."),
    "entropy": ("Attention entropy (nats)", False, "Averaged over heads; the dashed line is attention spread evenly."),
    "effective_rank": ("Effective rank of W_V W_O", False, "Averaged over heads, from the weights alone."),
}
_UNIFORM = {"f_attn": "f_attn_uniform", "entropy": "entropy_uniform"}
_HEADS = {
    "f_attn": (
        "Attention on the first token, by head",
        "A bright cell is a head that keeps its attention on the first token.",
    ),
    "sink_share": (
        "Attention on the strongest of the first 32 positions, by head",
        "Bright here and dark above is a sink at another position than the first.",
    ),
}
_HISTOGRAM_CAPTION = (
    "How often each score occurs; each layer is scaled to its own peak and a tick marks its mean. Mass at 0 is a "
    "closed gate, mass at 1 an open one."
)
_MAPS_CAPTION = (
    "Attention over the first positions of the first passage, averaged over heads, on a logarithmic scale. A query "
    "looks along its row; a bright column is a key that all of them look at."
)


def analysis_figures(analyses: Sequence[Analysis]) -> Iterator[FigureBlock]:
    """Layer profiles, head heat maps, gate histograms and attention maps."""
    strokes = plots.strokes_for(analysis.label for analysis in analyses)
    for name, (axis, log, caption) in _PROFILES.items():
        if name in analyses[0].inspection.measures:
            yield _block(name, _profile(analyses, name, axis, log, strokes), f"{axis}, by layer", caption)
    for name, (title, caption) in _HEADS.items():
        heads = {analysis.label: analysis.inspection.measures[name] for analysis in analyses}
        yield _block(f"{name}_heads", head_heatmaps(heads, ALL[name].title, 1e-3, 1.0, log=True), title, caption)
    gates = [
        (a, f"{a.label} ({SITE_LABELS[site]})", gate) for a in analyses for site, gate in a.inspection.gates.items()
    ]
    if gates:
        means = {label: gate.measures["gate_mean"] for _, label, gate in gates}
        yield _block(
            "gate_heads",
            head_heatmaps(means, ALL["gate_mean"].title, *_gate_range(analyses)),
            "Gate score, by head",
            "Mean over tokens and channels, from the gate's lowest score, dark, to its highest, bright.",
        )
        histograms = plots.gate_histograms(
            [
                plots.GateHistogram(label, gate.histogram.sum(1), gate.edges, strokes[analysis.label].color)
                for analysis, label, gate in gates
            ]
        )
        yield _block("gate_scores", histograms, "Gate scores, by layer", _HISTOGRAM_CAPTION)
    by_layers: dict[tuple[int, ...], list[Analysis]] = {}
    for analysis in analyses:  # maps of the same layers share a figure
        by_layers.setdefault(tuple(analysis.inspection.attention_layers.tolist()), []).append(analysis)
    for number, (layers, group) in enumerate(by_layers.items()):
        name = f"attention_maps_{number}" if number else "attention_maps"
        title = f"Attention maps: {', '.join(a.label for a in group)}" if len(by_layers) > 1 else "Attention maps"
        maps = {analysis.label: analysis.inspection.attention_maps.astype(np.float64) for analysis in group}
        yield _block(name, plots.attention_maps(maps, layers), title, _MAPS_CAPTION)


def _block(name: str, figure: Figure, title: str, caption: str) -> FigureBlock:
    return figure_block(f"{FOLDER}/{name}.svg", figure, title, caption)


def _profile(
    analyses: Sequence[Analysis], name: str, axis: str, log: bool, strokes: Mapping[str, plots.Stroke]
) -> Figure:
    values = {analysis.label: [analysis.inspection.by_layer(name).tolist()] for analysis in analyses}
    uniform = None
    if name in _UNIFORM:
        shares = {round(analysis.inspection.overall(_UNIFORM[name]), 6) for analysis in analyses}
        uniform = shares.pop() if len(shares) == 1 else None
    return plots.per_layer(values, strokes, axis, log=log, uniform=uniform)


def _gate_range(analyses: Sequence[Analysis]) -> tuple[float, float] | tuple[None, None]:
    """Lowest and highest score of the gates; None where a gate's scores have no closed end at 0."""
    edges = [gate.edges for analysis in analyses for gate in analysis.inspection.gates.values()]
    low, high = min(float(one[0]) for one in edges), max(float(one[-1]) for one in edges)
    return (low, high) if low == 0 else (None, None)
