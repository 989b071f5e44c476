"""Figures of a comparison, from plain arrays; `heatmaps` has those by head.

Every function returns a matplotlib `Figure` and leaves pyplot and the caller's rcParams alone. Arms
share a figure as mappings from label to data, drawn in the mapping's order; `strokes_for` gives
each label a colour that stays its own in every figure of a report. `to_svg` writes a figure so that
equal data gives equal bytes.
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gated_attention.report.attention_panel import add_attention_scale, draw_attention

INK = "#22272e"
"""Colour of text and axes; nothing else has it, so a page may swap it for its own."""

PAPER = "#fffffe"
"""Colour of the background; nothing else has it, so a page may swap it for its own."""

# Okabe and Ito's colour-blind-safe palette without black and yellow, behind a grey for the reference.
_COLORS = ("#7d8590", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1.5, 1)))

_WIDTH = 7.2  # inches
_STYLE: dict[str, Any] = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
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
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.5,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "text.parse_math": False,  # names and tokens are text, dollar signs too
}

_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Curve(NamedTuple):
    """One run's values by training step."""

    steps: Num[np.ndarray, " n"]
    values: Num[np.ndarray, " n"]


class Stroke(NamedTuple):
    """How an arm is drawn: its colour and matplotlib line style."""

    color: str
    dashes: Any = "solid"


class GateHistogram(NamedTuple):
    """How often each gate score occurs in each layer; `edges` bound the bins."""

    label: str
    counts: Num[np.ndarray, "layers bins"]
    edges: Num[np.ndarray, " bins+1"]
    color: str


def strokes_for(labels: Iterable[str]) -> dict[str, Stroke]:
    """A stroke for each label, grey for the first, the reference; colours return dashed after seven."""
    return {
        label: Stroke(_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)])
        for i, label in enumerate(labels)
    }


def styled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run under this module's style, whatever the caller's rcParams are."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # browsers have fonts of their own
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            return function(*args, **kwargs)

    return wrapper


@styled
def loss_curves(
    training: Mapping[str, Mapping[int, Curve]],
    validation: Mapping[str, Mapping[int, Curve]],
    strokes: Mapping[str, Stroke],
    reference: str | None = None,
) -> Figure:
    """Training loss as smoothed lines with validation loss as points; with a reference, the distance to it.

    Thin lines are seeds, thick lines and points their mean. A run whose loss stops being finite is
    left out of the mean and ends in a cross. The first fifth of training may leave the frame at the
    top, so that the end can be told apart.

    Args:
        training: Loss in nats per token, a curve for each seed.
        validation: The same on held-out text.
        strokes: From `strokes_for`.
        reference: Label whose validation loss the right-hand panel subtracts, seed by seed.
    """
    trained = {label: [_smoothed(curve) for curve in seeds.values()] for label, seeds in training.items()}
    validated = {label: list(seeds.values()) for label, seeds in validation.items()}
    pairs = paired_differences(validation, reference)
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if pairs else 1, squeeze=False)[0]
    for label, curves in trained.items():
        _draw_seeds(axes[0], curves, strokes[label])
    for label, curves in validated.items():
        mean = mean_curve(curves)
        if mean is not None:
            axes[0].plot(mean.steps, mean.values, "o", markersize=4.5, color=strokes[label].color, markeredgewidth=0)
    _frame(axes[0], [*chain(*trained.values()), *chain(*validated.values())])
    _mark_divergence(axes[0], trained or validated, strokes)
    axes[0].set_title("Training (line), validation (points)")
    axes[0].set_ylabel("Loss (nats/token)")
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
    _legend(figure, {**training, **validation}, strokes)
    return figure


@styled
def per_layer(
    arms: Mapping[str, Sequence[Sequence[float]]],
    strokes: Mapping[str, Stroke],
    ylabel: str,
    log: bool = False,
    uniform: float | None = None,
) -> Figure:
    """A measure layer by layer, NaN left out: a thin line for each seed, a thick one with points for their mean.

    Args:
        arms: For each seed the values of all layers, first layer first.
        strokes: From `strokes_for`.
        ylabel: Name and unit of the measure.
        log: Whether the value axis is logarithmic.
        uniform: Value under uniform attention, drawn as a dashed line.
    """
    figure = Figure(figsize=(_WIDTH, 3.1), layout="constrained")
    ax = figure.subplots()
    for label, seeds in arms.items():
        curves = [_of_layers(np.asarray(layers, dtype=np.float64)) for layers in seeds]
        _draw_seeds(ax, curves, strokes[label], marker="o")
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high > 20 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        )
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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
    ax.set_xlabel("Layer (0 is the first)")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.margins(x=0.03)
    _legend(figure, arms, strokes)
    return figure


@styled
def gate_histograms(histograms: Sequence[GateHistogram], columns: int = 3) -> Figure:
    """Distribution of gate scores in each layer, a panel for each gate, the first layer lowest.

    Every layer is scaled to its own peak; a tick marks its mean, taken at the bins' centres.
    """
    columns = max(1, min(columns, len(histograms)))
    rows = max(1, ceil(len(histograms) / columns))
    layers = max((len(histogram.counts) for histogram in histograms), default=1)
    height = 1.0 + rows * (0.5 + layers * min(0.36, 5.0 / layers))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax in grid.flat[len(histograms) :]:
        ax.set_visible(False)
    for ax, histogram in zip(grid.flat, histograms, strict=False):
        _draw_ridges(ax, histogram)
        ax.set_title(histogram.label)
    for ax in grid[:, 0]:
        ax.set_ylabel("Layer (0 is the first)")
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

    A bright first column is an attention sink.

    Args:
        maps: Attention weights of the first queries and keys of one text, 0 to 1.
        layers: Index of each layer in `maps`, 0 for the first.
        num_positions: How many positions are shown, so that one column stays visible.
        most_columns: Arms side by side; more are spread over blocks, one below the other.
    """
    labels = list(maps)
    blocks = max(1, ceil(len(labels) / most_columns))
    columns = max(1, ceil(len(labels) / blocks))
    rows = max(1, blocks * len(layers))
    figure = Figure(figsize=(_WIDTH, 1.4 + rows * (_WIDTH - 0.9) / max(columns, 2)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for ax in grid.flat:
        ax.set_axis_off()
    for index, label in enumerate(labels):
        block, column = divmod(index, columns)
        for row, layer in enumerate(layers):
            ax = grid[block * len(layers) + row, column]
            ax.set_axis_on()
            image = draw_attention(ax, maps[label][row, :num_positions, :num_positions])
            if row == 0:
                ax.set_title(label)
            if column == 0:
                ax.set_ylabel(f"Layer {layer}")
            ax.tick_params(labelbottom=block * len(layers) + row == rows - 1)
    figure.supxlabel("Key position", fontsize="medium")
    figure.supylabel("Query position", fontsize="medium")
    if image is not None:
        add_attention_scale(figure, image, grid)
    return figure


@styled
def to_svg(figure: Figure, salt: str) -> str:
    """The figure as SVG with text as text, without date; equal figures and salts give equal text.

    Args:
        figure: What to write.
        salt: Makes the ids inside differ between figures of one page, e.g. the figure's name.
    """
    mpl.rcParams["svg.hashsalt"] = salt
    buffer = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue())


@styled
def write_png(figure: Figure, file: IO[bytes], dpi: int) -> None:
    """Write the figure as PNG."""
    figure.savefig(file, format="png", dpi=dpi)


def _of_layers(values: np.ndarray) -> Curve:
    found = np.flatnonzero(np.isfinite(values))
    return Curve(found, values[found])


def _draw_seeds(ax: Axes, curves: Sequence[Curve], stroke: Stroke, marker: str = "") -> None:
    """Thin lines for the seeds and a thick one for their mean."""
    line = {"color": stroke.color, "linestyle": stroke.dashes}
    for curve in curves:
        ax.plot(curve.steps, curve.values, linewidth=0.8, alpha=0.45, **line)
    mean = mean_curve(curves)
    if mean is not None:
        ax.plot(mean.steps, mean.values, linewidth=1.9, marker=marker, markersize=3.5, **line)


def _mark_divergence(ax: Axes, arms: Mapping[str, Sequence[Curve]], strokes: Mapping[str, Stroke]) -> None:
    """A cross at the last finite value of each run that stops being finite, moved into the frame if need be."""
    for label, curves in arms.items():
        for curve in curves:
            finite = np.isfinite(curve.values)
            if finite.any() and not finite.all():
                last = np.flatnonzero(finite)[-1]
                height = np.clip(curve.values[last], *ax.get_ylim())
                ax.plot(curve.steps[last], height, "X", markersize=7, color=strokes[label].color, clip_on=False)


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean over the runs that stay finite, at the steps they share; None if there is none."""
    finite = [curve for curve in curves if len(curve.values) and np.isfinite(curve.values).all()]
    if not finite:
        return None
    steps = finite[0].steps
    for curve in finite[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in finite]
    return Curve(steps, np.mean(values, axis=0))


def _smoothed(curve: Curve) -> Curve:
    """Running mean over a twenty-fifth of the points, the window cut at both ends."""
    half = len(curve.values) // 50
    if half == 0:
        return curve
    values = [curve.values[max(0, i - half) : i + half + 1].mean() for i in range(len(curve.values))]
    return Curve(curve.steps, np.asarray(values))


def _frame(ax: Axes, curves: Sequence[Curve]) -> None:
    """Limit the axis to what follows the first fifth of training, diverging runs aside where others remain."""
    stable = [curve for curve in curves if np.isfinite(curve.values).all()] or curves
    late = [curve.values[curve.steps >= 0.2 * curve.steps.max()] for curve in stable if len(curve.steps)]
    values = np.concatenate(late) if late else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values):
        margin = max(0.08 * (values.max() - values.min()), 1e-3)
        ax.set_ylim(float(values.min() - margin), float(values.max() + margin))


def paired_differences(arms: Mapping[str, Mapping[int, Curve]], reference: str | None) -> dict[str, list[Curve]]:
    """Each other arm's curves minus the reference's of the same seed, at the steps that both have; none without one."""
    others = {} if reference is None else arms.get(reference, {})
    found: dict[str, list[Curve]] = {}
    for label, curves in arms.items():
        for seed in sorted(curves.keys() & others.keys()) if label != reference else ():
            steps, ours, theirs = np.intersect1d(curves[seed].steps, others[seed].steps, return_indices=True)
            if len(steps):
                difference = curves[seed].values[ours] - others[seed].values[theirs]
                found.setdefault(label, []).append(Curve(steps, difference))
    return found


def _draw_ridges(ax: Axes, histogram: GateHistogram) -> None:
    """One filled outline for each layer, the first lowest, with a tick at its mean."""
    counts = np.asarray(histogram.counts, dtype=np.float64)
    edges = np.asarray(histogram.edges, dtype=np.float64)
    centres = (edges[:-1] + edges[1:]) / 2
    for layer in reversed(range(len(counts))):
        if not counts[layer].any():
            continue
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


def _legend(figure: Figure, labels: Iterable[str], strokes: Mapping[str, Stroke]) -> None:
    lines = [
        Line2D([], [], color=strokes[label].color, linestyle=strokes[label].dashes, linewidth=2.2, label=label)
        for label in labels
    ]
    if lines:
        figure.legend(handles=lines, loc="outside upper left", ncols=3, frameon=False, handlelength=1.8)
