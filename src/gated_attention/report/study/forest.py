"""The forest plot of a study: paired differences in validation loss with their intervals."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.report.blocks import FigureBlock, figure_block
from gated_attention.report.panels import WIDTH
from gated_attention.report.plots import INK, Stroke, styled
from gated_attention.report.study.figures import FOLDER
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import CONFIDENCE


def forest(comparison: Comparison, strokes: Mapping[str, Stroke]) -> FigureBlock | None:
    """The figure of all variants that have a finite pair of runs with the reference; None if none has."""
    rows = [row for row in comparison.rows if row.difference and row.difference.n]
    if not rows:
        return None
    reference = comparison.rows[0]
    caption = (
        f"Validation loss minus that of `{reference.variant}` with the same seed. Dots are seeds, squares their mean. "
        f"Bars are {100 * CONFIDENCE:.0f} % t intervals: a bar that crosses zero is not significant."
    )
    single = [f"`{row.variant}`" for row in rows if row.difference and row.difference.half_width is None]
    if single:
        caption += f" One pair of runs has no interval: {', '.join(single)}."
    lost = [f"`{row.variant}`" for row in comparison.rows if row.difference and not row.difference.n]
    if lost:
        caption += f" Without a finite pair: {', '.join(lost)}."
    figure = draw_forest(rows, reference, strokes)
    return figure_block(f"{FOLDER}/forest.svg", figure, "Difference in validation loss", caption)


@styled
def draw_forest(rows: Sequence[VariantRow], reference: VariantRow, strokes: Mapping[str, Stroke]) -> Figure:
    """A line per variant, the first at the top: seeds as dots, mean as a square, its interval as a bar."""
    figure = Figure(figsize=(WIDTH, 0.95 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0.0, color=INK, linewidth=1.0)
    for place, row in enumerate(rows):
        found = row.difference
        if found is None:
            continue
        color = strokes[row.variant].color
        if found.half_width is not None:
            ax.errorbar(found.mean, place, xerr=found.half_width, color=color, linewidth=1.6, capsize=3)
        ax.plot(found.mean, place, "s", color=color, markersize=5.5)
        seeds = row.losses.keys() & reference.losses.keys()
        values = [row.losses[seed] - reference.losses[seed] for seed in sorted(seeds)]  # NaN is not drawn
        ax.plot(values, [place + 0.25] * len(values), "o", color=color, markersize=3.5, alpha=0.7, markeredgewidth=0)
    ax.set_yticks(range(len(rows)), [row.variant for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.set_xlabel(f"Validation loss minus that of {reference.variant} (nats/token)")
    ax.set_title("← lower is better")
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure
