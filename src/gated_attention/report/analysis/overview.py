"""One figure of several models that read one text: attention maps, and sinks and gates by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.analysis import Inspection
from gated_attention.report.curves import curve_by_layer
from gated_attention.report.panels import LAYER_AXIS, WIDTH, add_attention_scale, draw_attention
from gated_attention.report.plots import INK, Stroke, strokes_for, styled
from gated_attention.spec import SITE_LABELS, SITES

MAP_TOKENS = 64
"""Tokens that an attention map shows at most, so that a single column stays visible."""

_HOW_TO_READ = "A row shows where one token looks. A bright first column is an attention sink."
_PANEL = 2.5  # inches, of a map
_LABELLED_TOKENS = 26
"""Tokens up to which their texts stand at the axes; more would not be legible."""
_LABEL_CHARACTERS = 32
"""Characters of a model's name that fit above a column of maps."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One model's reading of the prompt; `label` is unique among the models of one call."""

    label: str
    tokens: tuple[str, ...]
    inspection: Inspection

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @cached_property
    def gates(self) -> Mapping[str, Float[np.ndarray, " layers"]]:
        """Mean gate score of each layer by site, e.g. `G1`, in the paper's order; empty without gates."""
        found = self.inspection.gates
        return {SITE_LABELS[site]: found[site].by_layer("gate_mean") for site in SITES if site in found}


@styled
def overview(readings: Sequence[Reading], title: str) -> Figure:
    """A column of attention maps for each model; below, attention on the first token and gate scores by layer."""
    strokes = strokes_for(reading.label for reading in readings)
    num_rows = max(len(reading.inspection.attention_layers) for reading in readings)
    width, gated = max(WIDTH, _PANEL * len(readings) + 0.6), any(reading.gates for reading in readings)
    figure = Figure(figsize=(width, 2.2 + _PANEL * num_rows + 2.7), layout="constrained")
    figure.suptitle(f"{title}\n{_HOW_TO_READ}", fontsize="medium", x=0.01, ha="left")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.2 + _PANEL * num_rows, 2.7])[:, 0]
    grid = upper.subplots(num_rows, len(readings), squeeze=False)
    for column, reading in zip(grid.T, readings, strict=True):
        layers = reading.inspection.attention_layers.tolist()
        for ax, layer, weights in zip(column, layers, reading.inspection.attention_maps, strict=False):
            image = draw_attention(ax, weights)
            ax.set_title(f"Layer {layer}")
            _name_tokens(ax, reading.tokens[:MAP_TOKENS])
        for ax in column[len(layers) :]:
            ax.set_visible(False)
        name, above = _shorten(reading.label), {"textcoords": "offset points", "fontweight": "bold"}
        column[0].annotate(name, (0, 1), (0, 20), "axes fraction", **above)
    add_attention_scale(upper, image, grid, shrink=min(0.6, 4.0 / width))
    upper.supxlabel("Token that is looked at", fontsize="medium")
    upper.supylabel("Token that looks", fontsize="medium")
    panels = lower.subplots(1, 2 if gated else 1, squeeze=False)[0]
    _draw_sinks(panels[0], readings, strokes)
    if gated:
        _draw_gates(panels[1], readings, strokes)
    for ax in panels:
        ax.set_xlabel(LAYER_AXIS)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        # Lines one by one: left to itself, matplotlib drops those whose names begin with an underscore.
        ax.legend(handles=list(ax.lines), frameon=False, fontsize="small")
    return figure


def _name_tokens(ax: Axes, tokens: Sequence[str]) -> None:
    if len(tokens) <= _LABELLED_TOKENS:
        texts = [token.strip() or "·" for token in tokens]
        ax.set_xticks(range(len(texts)), texts, rotation=90, fontsize=6)
        ax.set_yticks(range(len(texts)), texts, fontsize=6)


def _draw_sinks(ax: Axes, readings: Sequence[Reading], strokes: Mapping[str, Stroke]) -> None:
    ax.set_title("Attention on the first token, by layer")
    for reading in readings:
        _draw_layers(ax, reading.inspection.by_layer("f_attn"), _shorten(reading.label), strokes[reading.label])
    uniform = {round(reading.inspection.overall("f_attn_uniform"), 6) for reading in readings}
    if len(uniform) == 1:
        ax.axhline(uniform.pop(), linestyle="dashed", linewidth=0.9, color=INK, label="spread evenly")
    ax.set_ylabel("Share, mean over heads")
    ax.set_ylim(bottom=0)


def _draw_gates(ax: Axes, readings: Sequence[Reading], strokes: Mapping[str, Stroke]) -> None:
    ax.set_title("Gate score, by layer")
    for reading in readings:
        for number, (site, scores) in enumerate(reading.gates.items()):
            dashes = ("solid", "dashed", "dotted", "dashdot")[number % 4]
            stroke = Stroke(strokes[reading.label].color, dashes)
            _draw_layers(ax, scores, f"{_shorten(reading.label)} ({site})", stroke)
    ax.set_ylabel("Mean score, 0 is closed")
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.0, low), max(1.0, high))  # a sigmoid's whole range: 0 is closed, 1 is open


def _draw_layers(ax: Axes, values: np.ndarray, label: str, stroke: Stroke) -> None:
    ax.plot(*curve_by_layer(values), marker="o", markersize=3, linewidth=1.5, label=label, **stroke.line)


def _shorten(label: str) -> str:
    """A label that fits above a panel; both ends are kept, since two paths differ there."""
    half = _LABEL_CHARACTERS // 2
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[:half]}…{label[-half:]}"
