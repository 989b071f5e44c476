"""The figures of an evaluation: loss by position, and retrieval by length and depth."""

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from gated_attention.evaluate.retrieval import RetrievalScore
from gated_attention.jobs.evaluation import Evaluation
from gated_attention.report.blocks import FigureBlock, figure_block
from gated_attention.report.panels import WIDTH, add_scale, panel_grid
from gated_attention.report.plots import INK, add_legend, strokes_for, styled


def evaluation_figures(evaluation: Evaluation) -> Iterator[FigureBlock]:
    """The figures of the tasks that were measured."""
    if any(one.length for one in evaluation.ropes):
        yield figure_block(
            "length.svg",
            length_profile(evaluation),
            "Loss by context length and position",
            "Left: the same tokens with more context. Right: loss by position in the longest context. The dashed line "
            "is the end of one context.",
        )
    if grids := {one.rope.label: one.retrieval for one in evaluation.ropes if one.retrieval}:
        yield figure_block(
            "retrieval.svg",
            retrieval_grid(grids),
            "Retrieval by length and depth",
            "Colour is the share of exact matches. The number in a cell is the loss of the answer in nats per token.",
        )


@styled
def length_profile(evaluation: Evaluation) -> Figure:
    """Left, loss of the same tokens by length; right, loss by position in the longest context."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    same, position = figure.subplots(1, 2, sharey=True)
    ropes = [one for one in evaluation.ropes if one.length]
    strokes = strokes_for(one.rope.label for one in ropes)
    for one in ropes:
        line = strokes[one.rope.label].line
        losses, errors = zip(*((at.loss_nats, at.standard_error or 0.0) for at in one.length), strict=True)
        lengths = [at.length for at in one.length]
        same.errorbar(lengths, losses, yerr=errors, marker="o", markersize=4, capsize=2, **line)
        longest = one.length[-1]
        position.stairs(longest.buckets, [*longest.starts, longest.length], baseline=None, **line)
    lengths = [at.length for at in ropes[0].length]
    same.set_xscale("log", base=2)
    same.xaxis.set_minor_formatter(NullFormatter())
    same.set_xticks(lengths, [f"{length // evaluation.context}x" for length in lengths])
    same.set_xlabel(f"Context, 1x is {evaluation.context} tokens")
    same.set_ylabel("Loss (nats/token)")
    same.set_title("The same tokens, more context")
    position.set_xlabel("Position")
    position.set_title(f"By position, {lengths[-1]} tokens")
    position.axvline(evaluation.context, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    position.annotate(" 1x", (evaluation.context, 1.0), xycoords=("data", "axes fraction"), va="top")
    add_legend(figure, strokes, strokes)
    return figure


@styled
def retrieval_grid(grids: Mapping[str, tuple[RetrievalScore, ...]]) -> Figure:
    """Exact match by length and depth, a panel for each rotary embedding and kind of question; loss in the cells."""
    panels = [
        (f"{kind}, {rope}", [score for score in scores if score.kind == kind])
        for rope, scores in grids.items()
        for kind in dict.fromkeys(score.kind for score in scores)
    ]
    figure, grid = panel_grid(len(panels), 2, 0.8, 2.2)
    for ax, (title, scores) in zip(grid.flat, panels, strict=False):
        lengths, depths = (sorted({getattr(score, axis) for score in scores}) for axis in ("length", "depth"))
        cells = np.full((len(depths), len(lengths)), np.nan)
        for score in scores:
            row, column = depths.index(score.depth), lengths.index(score.length)
            cells[row, column] = score.exact_match
            shade = "black" if score.exact_match > 0.6 else "white"
            text = f"{score.loss_nats:.2f}"
            ax.text(column, row, text, ha="center", va="center", color=shade, fontsize="small")
        edges = np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5
        image = ax.pcolormesh(*edges, cells, norm=Normalize(0, 1), cmap="viridis")
        ax.grid(False)
        ax.set_title(title)
        ax.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        ax.invert_yaxis()
    figure.supxlabel("Length (tokens)", fontsize="medium")
    figure.supylabel("Depth of the needle (0 is the beginning)", fontsize="medium")
    add_scale(figure, image, grid, "Exact match; in the cells the answer's loss (nats/token)")
    return figure
