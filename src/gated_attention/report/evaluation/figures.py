"""The figures of an evaluation: loss by position, and retrieval by length and depth."""

from collections.abc import Iterator, Mapping
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from gated_attention.evaluate.retrieval import RetrievalScore
from gated_attention.jobs.evaluate import Evaluation
from gated_attention.report.plots import INK, strokes_for, styled, to_svg

_WIDTH = 7.2  # inches


def evaluation_figures(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """File names and SVG texts of the figures that the tasks give."""
    if any(one.length for one in evaluation.ropes):
        yield "length.svg", to_svg(length_profile(evaluation), salt="length")
    if grids := {one.rope.label: one.retrieval for one in evaluation.ropes if one.retrieval}:
        yield "retrieval.svg", to_svg(retrieval_grid(grids), salt="retrieval")


@styled
def length_profile(evaluation: Evaluation) -> Figure:
    """Loss of the same tokens by length on the left, loss by position in the longest context on the right."""
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    same, position = figure.subplots(1, 2, sharey=True)
    ropes = [one for one in evaluation.ropes if one.length]
    strokes = strokes_for(one.rope.label for one in ropes)
    for one in ropes:
        stroke = strokes[one.rope.label]
        lengths = [at.length for at in one.length]
        errors = [at.standard_error or 0.0 for at in one.length]
        same.errorbar(
            lengths, [at.loss_nats for at in one.length], yerr=errors, color=stroke.color, linestyle=stroke.dashes,
            marker="o", markersize=4, capsize=2,
        )  # fmt: skip
        longest = one.length[-1]
        edges = [*longest.starts, longest.length]
        position.stairs(longest.buckets, edges, baseline=None, color=stroke.color, linestyle=stroke.dashes)
    same.set_xscale("log", base=2)
    same.xaxis.set_minor_formatter(NullFormatter())
    same.set_xticks([at.length for at in ropes[0].length])
    same.set_xticklabels([f"{at.length // evaluation.context}x" for at in ropes[0].length])
    same.set_xlabel(f"Context, 1x is {evaluation.context} tokens")
    same.set_ylabel("Loss (nats/token)")
    same.set_title("The same tokens, more context")
    position.set_xlabel("Position")
    position.set_title(f"By position, {ropes[0].length[-1].length} tokens")
    _mark_context(position, evaluation.context)
    handles = [Line2D([], [], color=s.color, linestyle=s.dashes, label=label) for label, s in strokes.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _mark_context(ax: Axes, context: int) -> None:
    ax.axvline(context, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.annotate(" 1x", (context, 1.0), xycoords=("data", "axes fraction"), va="top")


@styled
def retrieval_grid(grids: Mapping[str, tuple[RetrievalScore, ...]]) -> Figure:
    """Exact match by length and depth, a panel for each rotary embedding and kind of question; loss in the cells."""
    panels = [
        (f"{kind}, {rope}", [score for score in scores if score.kind == kind])
        for rope, scores in grids.items()
        for kind in dict.fromkeys(score.kind for score in scores)
    ]
    columns = min(2, len(panels))
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH, 0.8 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for ax, (title, scores) in zip(axes.flat, panels, strict=True):
        lengths, depths = (sorted({getattr(score, axis) for score in scores}) for axis in ("length", "depth"))
        cells = np.full((len(depths), len(lengths)), np.nan)
        for score in scores:
            place = depths.index(score.depth), lengths.index(score.length)
            cells[place] = score.exact_match
            shade = "black" if score.exact_match > 0.6 else "white"
            ax.text(
                place[1], place[0], f"{score.loss_nats:.2f}", ha="center", va="center", color=shade, fontsize="small"
            )
        edges = np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5
        image = ax.pcolormesh(*edges, cells, norm=Normalize(0, 1), cmap="viridis")
        ax.grid(False)
        ax.set_title(title)
        ax.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        ax.invert_yaxis()
    figure.supxlabel("Length (tokens)", fontsize="medium")
    figure.supylabel("Depth of the needle (0 is the beginning)", fontsize="medium")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, location="top", shrink=0.6, aspect=40)
        bar.set_label("Exact match; in the cells the answer's loss (nats/token)")
    return figure
