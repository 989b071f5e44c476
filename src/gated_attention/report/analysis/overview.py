"""One figure of several models that read one text: attention maps, and sinks and gates by layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.report.attention_panel import add_attention_scale, draw_attention
from gated_attention.report.plots import Stroke, styled

_HOW_TO_READ = "A row shows where one token looks. A bright first column is an attention sink."
_PANEL = 2.5  # inches, of a map
_LABELLED_TOKENS = 26
"""Tokens up to which their texts stand at the axes; more would not be legible."""
_LABEL_CHARACTERS = 32
"""Characters of a model's name that fit above a column of maps."""


class ReadPrompt(NamedTuple):
    """What the figure shows of one model.

    Attributes:
        maps: Attention of the first queries, averaged over heads.
        layers: Of the maps.
        tokens: Texts of the tokens that the maps show.
        sinks: Attention on the first token, 0 to 1; NaN for layers without softmax attention.
        gates: Mean gate score of each layer by site, e.g. `G1`; empty without gates.
        uniform: `sinks` if attention were spread evenly.
    """

    maps: Float[np.ndarray, "n queries keys"]
    layers: Sequence[int]
    tokens: Sequence[str]
    sinks: Float[np.ndarray, " layers"]
    gates: Mapping[str, Float[np.ndarray, " layers"]]
    uniform: float


@styled
def overview(models: Mapping[str, ReadPrompt], strokes: Mapping[str, Stroke], title: str) -> Figure:
    """A column of attention maps for each model; below, attention on the first token and gate scores by layer.

    Args:
        models: By label.
        strokes: From `plots.strokes_for`.
        title: What all of them read.
    """
    num_rows = max(len(model.layers) for model in models.values())
    width, gated = max(7.2, _PANEL * len(models) + 0.6), any(model.gates for model in models.values())
    figure = Figure(figsize=(width, 2.2 + _PANEL * num_rows + 2.7), layout="constrained")
    figure.suptitle(f"{title}\n{_HOW_TO_READ}", fontsize="medium", x=0.01, ha="left")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.2 + _PANEL * num_rows, 2.7])[:, 0]
    grid = upper.subplots(num_rows, len(models), squeeze=False)
    image = None
    for column, (label, model) in enumerate(models.items()):
        for row in range(num_rows):
            ax = grid[row, column]
            if row >= len(model.layers):
                ax.set_visible(False)
                continue
            image = draw_attention(ax, model.maps[row])
            ax.set_title(f"Layer {model.layers[row]}")
            if row == 0:
                ax.annotate(
                    _shorten(label), (0, 1), (0, 20), "axes fraction", textcoords="offset points", fontweight="bold"
                )
            _name_tokens(ax, model.tokens)
    if image is not None:
        add_attention_scale(upper, image, grid, shrink=min(0.6, 4.0 / width))
    upper.supxlabel("Token that is looked at", fontsize="medium")
    upper.supylabel("Token that looks", fontsize="medium")
    panels = lower.subplots(1, 2 if gated else 1, squeeze=False)[0]
    _draw_sinks(panels[0], models, strokes)
    if gated:
        _draw_gates(panels[1], models, strokes)
    return figure


def _name_tokens(ax: Axes, tokens: Sequence[str]) -> None:
    if len(tokens) > _LABELLED_TOKENS:
        return
    texts = [token.strip() or "·" for token in tokens]
    ax.set_xticks(range(len(texts)), texts, rotation=90, fontsize=6)
    ax.set_yticks(range(len(texts)), texts, fontsize=6)


def _draw_sinks(ax: Axes, models: Mapping[str, ReadPrompt], strokes: Mapping[str, Stroke]) -> None:
    ax.set_title("Attention on the first token, by layer")
    for label, model in models.items():
        _draw_layers(ax, model.sinks, _shorten(label), strokes[label])
    evenly = {round(model.uniform, 6) for model in models.values()}
    if len(evenly) == 1:
        ax.axhline(
            evenly.pop(), linestyle="dashed", linewidth=0.9, color=ax.yaxis.label.get_color(), label="spread evenly"
        )
    ax.set_ylabel("Share, mean over heads")
    ax.set_ylim(bottom=0)
    _add_legend(ax)


def _draw_gates(ax: Axes, models: Mapping[str, ReadPrompt], strokes: Mapping[str, Stroke]) -> None:
    ax.set_title("Gate score, by layer")
    for label, model in models.items():
        for number, (site, scores) in enumerate(model.gates.items()):
            dashes = ("solid", "dashed", "dotted", "dashdot")[number % 4]
            _draw_layers(ax, scores, f"{_shorten(label)} ({site})", Stroke(strokes[label].color, dashes))
    ax.set_ylabel("Mean score, 0 is closed")
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.0, low), max(1.0, high))  # a sigmoid's whole range: 0 is closed, 1 is open
    _add_legend(ax)


def _shorten(label: str) -> str:
    """A label of any length as it fits above a panel, its ends kept: those of two paths differ there."""
    half = _LABEL_CHARACTERS // 2
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[:half]}…{label[-half:]}"


def _add_legend(ax: Axes) -> None:
    # Handed over one by one: left to itself, matplotlib drops those whose names begin with an underscore.
    ax.legend(handles=list(ax.lines), frameon=False, fontsize="small")


def _draw_layers(ax: Axes, values: np.ndarray, label: str, stroke: Stroke) -> None:
    found = np.flatnonzero(np.isfinite(values))
    ax.plot(
        found, values[found], color=stroke.color, linestyle=stroke.dashes, marker="o", markersize=3, linewidth=1.5,
        label=label,
    )  # fmt: skip
    ax.set_xlabel("Layer (0 is the first)")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
