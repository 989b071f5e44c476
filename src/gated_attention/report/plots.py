"""The style of all figures, and the figures of a comparison; `heatmaps` has those by head.

Every function that draws returns a matplotlib `Figure` and leaves pyplot and the caller's rcParams alone. Arms share a
figure as mappings from label to data, drawn in the mapping's order.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from io import StringIO
from itertools import chain
from math import ceil
from typing import IO, Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gated_attention.report import panels
from gated_attention.report.curves import Curve, curve_by_layer, mean_curve, paired_differences, smoothed
from gated_attention.report.fonts import FIRST, fallbacks

INK = "#22272e"
"""Colour of text and axes. Nothing else has it, so a page may replace it."""

PAPER = "#fffffe"
"""Colour of the background. Nothing else has it, so a page may replace it."""

# Okabe and Ito's colour-blind-safe palette without black and yellow, after a grey for the reference.
_COLORS = ("#7d8590", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1.5, 1)))

_STYLE: dict[str, Any] = {
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "font.size": 9.5,
    "font.family": ["sans-serif"],
    "font.sans-serif": [FIRST],
    "svg.fonttype": "none",
    "text.parse_math": False,  # names and tokens are text, dollar signs too
}

_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Stroke(NamedTuple):
    """How an arm is drawn: its colour and matplotlib line style."""

    color: str
    dashes: Any = "solid"

    @property
    def line(self) -> dict[str, Any]:
        """As arguments of `plot`."""
        return {"color": self.color, "linestyle": self.dashes}


class GateHistogram(NamedTuple):
    """Counts of gate scores in each layer; `edges` bound the bins."""

    label: str
    counts: Num[np.ndarray, "layers bins"]
    edges: Num[np.ndarray, " bins+1"]
    color: str


def strokes_for(labels: Iterable[str]) -> dict[str, Stroke]:
    """A stroke for each label, grey for the first, the reference; after seven, colours return dashed."""
    return {
        label: Stroke(_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)])
        for i, label in enumerate(labels)
    }


def styled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run under this module's style, whatever the caller's rcParams are."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `write_png` says which
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            return function(*args, **kwargs)

    return wrapper


@styled
def to_svg(figure: Figure, salt: str) -> str:
    """The figure as SVG without date, text as text; equal figures and salts give equal bytes.

    Args:
        salt: Makes ids differ between the figures of one page, e.g. the figure's name.
    """
    mpl.rcParams["svg.hashsalt"] = salt
    buffer = StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue())


@styled
def write_png(figure: Figure, file: IO[bytes], dpi: int) -> str:
    """Write the figure as PNG in whatever fonts are installed; return the characters that none of them has."""
    families, missing = fallbacks("".join(text.get_text() for text in figure.findobj(Text)))
    mpl.rcParams["font.sans-serif"] = [FIRST, *families]
    figure.savefig(file, format="png", dpi=dpi)
    return missing


def add_legend(figure: Figure, labels: Iterable[str], strokes: Mapping[str, Stroke]) -> None:
    """A legend above the axes; none without labels."""
    lines = [Line2D([], [], **strokes[label].line, linewidth=2.2, label=label) for label in labels]
    if lines:
        figure.legend(handles=lines, loc="outside upper left", ncols=3, frameon=False, handlelength=1.8)


@styled
def loss_curves(
    training: Mapping[str, Mapping[int, Curve]],
    validation: Mapping[str, Mapping[int, Curve]],
    strokes: Mapping[str, Stroke],
    reference: str | None = None,
    unit: str = "nats/token",
) -> Figure:
    """Smoothed training loss as lines and validation loss as points; with a reference, the difference to it.

    Thin lines are seeds; thick lines and points are their mean. A run whose loss stops being finite is left out of the
    mean and ends in a cross. The first fifth of training may leave the frame at the top, so that the end is legible.

    Args:
        training, validation: Loss in that unit, a curve for each seed.
        reference: Label whose validation loss the right panel subtracts, seed by seed.
    """
    trained = {label: [smoothed(curve) for curve in seeds.values()] for label, seeds in training.items()}
    validated = {label: list(seeds.values()) for label, seeds in validation.items()}
    pairs = paired_differences(validation, reference)
    figure = Figure(figsize=(panels.WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if pairs else 1, squeeze=False)[0]
    for label, curves in trained.items():
        _draw_seeds(axes[0], curves, strokes[label])
    for label, curves in validated.items():
        if mean := mean_curve(curves):
            axes[0].plot(*mean, "o", markersize=4.5, color=strokes[label].color, markeredgewidth=0)
    _frame(axes[0], [*chain(*trained.values()), *chain(*validated.values())])
    _mark_divergence(axes[0], trained or validated, strokes)
    axes[0].set_title("Training (line), validation (points)")
    axes[0].set_ylabel(f"Loss ({unit})")
    if pairs:
        axes[1].axhline(0.0, color=strokes[str(reference)].color, linewidth=1.9)
        for label, curves in pairs.items():
            _draw_seeds(axes[1], curves, strokes[label], marker="o")
        _frame(axes[1], [*chain(*pairs.values()), Curve(np.zeros(1), np.zeros(1))])
        _mark_divergence(axes[1], pairs, strokes)
        axes[1].set_title(f"Validation, minus {reference}")
    for ax in axes:
        ax.set_xlabel("Step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend(figure, {**training, **validation}, strokes)
    return figure


@styled
def per_layer(
    arms: Mapping[str, Sequence[Sequence[float]]],
    strokes: Mapping[str, Stroke],
    ylabel: str,
    log: bool = False,
    uniform: float | None = None,
) -> Figure:
    """A measure by layer, NaN left out: a thin line for each seed, a thick one with points for their mean.

    Args:
        arms: For each seed the values of all layers, first layer first.
        ylabel: Name and unit of the measure.
        log: Whether the value axis is logarithmic.
        uniform: Value under uniform attention, drawn as a dashed line.
    """
    figure = Figure(figsize=(panels.WIDTH, 3.1), layout="constrained")
    ax = figure.subplots()
    for label, seeds in arms.items():
        _draw_seeds(ax, [curve_by_layer(values) for values in seeds], strokes[label], marker="o")
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        steps = (1.0, 2.0, 5.0) if high > 20 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter(panels.plain_numbers())
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0.0)
    if uniform is not None:
        ax.axhline(uniform, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_ylim(top=max(ax.get_ylim()[1], 1.05 * uniform))
        ax.annotate(
            "uniform", (1.0, uniform), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", annotation_clip=False,
        )  # fmt: skip
    ax.set_xlabel(panels.LAYER_AXIS)
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.margins(x=0.03)
    add_legend(figure, arms, strokes)
    return figure


@styled
def gate_histograms(histograms: Sequence[GateHistogram], columns: int = 3) -> Figure:
    """Distribution of gate scores by layer, a panel for each gate, the first layer lowest.

    Every layer is scaled to its own peak. A tick marks its mean, taken at the bins' centres.
    """
    layers = max((len(histogram.counts) for histogram in histograms), default=1)
    row = 0.5 + layers * min(0.36, 5.0 / layers)
    figure, grid = panels.panel_grid(len(histograms), columns, 1.0, row, sharey=True)
    for ax, histogram in zip(grid.flat, histograms, strict=False):
        _draw_ridges(ax, histogram)
        ax.set_title(histogram.label)
    for ax in grid[:, 0]:
        ax.set_ylabel(panels.LAYER_AXIS)
    figure.supxlabel("Gate score", fontsize="medium")
    return figure


@styled
def attention_maps(
    maps: Mapping[str, Float[np.ndarray, "layers queries keys"]],
    layers: Sequence[int],
    num_positions: int = 64,
    most_columns: int = 4,
) -> Figure:
    """Attention averaged over heads, a column for each arm and a row for each layer, on a log scale.

    Args:
        maps: Attention weights of the first queries and keys of one text, 0 to 1.
        layers: Index of each layer in `maps`, 0 for the first.
        num_positions: Positions shown; few enough that a single column, such as a sink, stays visible.
        most_columns: Arms side by side; more are spread over blocks, one below the other.
    """
    labels = list(maps)
    blocks = max(1, ceil(len(labels) / most_columns))
    columns = max(1, ceil(len(labels) / blocks))
    rows = max(1, blocks * len(layers))
    figure = Figure(figsize=(panels.WIDTH, 1.4 + rows * (panels.WIDTH - 0.9) / max(columns, 2)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for ax in grid.flat:
        ax.set_axis_off()
    for index, label in enumerate(labels):
        block, column = divmod(index, columns)
        for row, layer in enumerate(layers):
            ax = grid[block * len(layers) + row, column]
            ax.set_axis_on()
            image = panels.draw_attention(ax, maps[label][row, :num_positions, :num_positions])
            if row == 0:
                ax.set_title(label)
            if column == 0:
                ax.set_ylabel(f"Layer {layer}")
            ax.tick_params(labelbottom=block * len(layers) + row == rows - 1)
    figure.supxlabel("Key position", fontsize="medium")
    figure.supylabel("Query position", fontsize="medium")
    if image is not None:
        panels.add_attention_scale(figure, image, grid)
    return figure


def _draw_seeds(ax: Axes, curves: Sequence[Curve], stroke: Stroke, marker: str = "") -> None:
    for curve in curves:
        ax.plot(*curve, linewidth=0.8, alpha=0.45, **stroke.line)
    if mean := mean_curve(curves):
        ax.plot(*mean, linewidth=1.9, marker=marker, markersize=3.5, **stroke.line)


def _mark_divergence(ax: Axes, arms: Mapping[str, Sequence[Curve]], strokes: Mapping[str, Stroke]) -> None:
    """A cross at the last finite value of each run that diverges, moved into the frame if it lies outside."""
    for label, curve in ((label, curve) for label, curves in arms.items() for curve in curves):
        finite = np.flatnonzero(np.isfinite(curve.values))
        if len(finite) and not curve.is_finite:
            height = np.clip(curve.values[finite[-1]], *ax.get_ylim())
            ax.plot(curve.steps[finite[-1]], height, "X", markersize=7, color=strokes[label].color, clip_on=False)


def _frame(ax: Axes, curves: Sequence[Curve]) -> None:
    """Limit the axis to the values after the first fifth of training, of runs that stay finite where there are any."""
    stable = [curve for curve in curves if curve.is_finite] or curves
    late = [curve.values[curve.steps >= 0.2 * curve.steps.max()] for curve in stable if len(curve.steps)]
    values = np.concatenate(late) if late else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values):
        margin = max(0.08 * (values.max() - values.min()), 1e-3)
        ax.set_ylim(float(values.min() - margin), float(values.max() + margin))


def _draw_ridges(ax: Axes, histogram: GateHistogram) -> None:
    """A filled outline for each layer, the first lowest, with a tick at its mean."""
    counts = np.asarray(histogram.counts, dtype=np.float64)
    edges = np.asarray(histogram.edges, dtype=np.float64)
    centres = (edges[:-1] + edges[1:]) / 2
    for layer in reversed(np.flatnonzero(counts.any(1)).tolist()):
        heights = layer + 0.88 * counts[layer] / counts[layer].max()
        ax.stairs(heights, edges, baseline=layer, fill=True, color=histogram.color, alpha=0.35, linewidth=0)
        ax.stairs(heights, edges, baseline=None, color=histogram.color, linewidth=1.0)
        mean = np.average(centres, weights=counts[layer])
        ax.plot([mean, mean], [layer, layer + 0.88], color=INK, linewidth=1.2)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(-0.15, len(counts))
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_yticks(range(0, len(counts), ceil(len(counts) / 12)))
