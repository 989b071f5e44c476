"""Figures with a cell for each layer and head."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Num
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.report.panels import LAYER_AXIS, add_scale, panel_grid
from gated_attention.report.plots import styled


@styled
def head_heatmaps(
    models: Mapping[str, Num[np.ndarray, "layers heads"]],
    title: str,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    columns: int = 3,
) -> Figure:
    """A measure by layer and head, a panel for each model on one colour scale, the first layer lowest.

    Args:
        models: NaN where a layer or a head has no value.
        title: Name and unit of the measure, for the scale.
        low, high: Ends of the scale; None is the smallest and the largest value.
        log: Whether the scale is logarithmic.
        columns: Panels side by side.
    """
    values = np.concatenate([found[np.isfinite(found)] for found in models.values()])
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    norm = (LogNorm if log else Normalize)(low, high if high > low else low + 1.0, clip=True)
    deepest = max(len(found) for found in models.values())
    figure, grid = panel_grid(len(models), columns, 1.2, 0.6 + deepest * min(0.28, 4.2 / deepest))
    for ax, (label, found) in zip(grid.flat, models.items(), strict=False):
        edges = np.arange(found.shape[1] + 1) - 0.5, np.arange(found.shape[0] + 1) - 0.5
        # Cells as shapes: browsers blur an image when they enlarge it.
        image = ax.pcolormesh(*edges, np.ma.masked_invalid(found), norm=norm, cmap="viridis", edgecolors="none")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_title(label)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    for ax in grid[:, 0]:
        ax.set_ylabel(LAYER_AXIS)
    figure.supxlabel("Head", fontsize="medium")
    add_scale(figure, image, grid, title)
    return figure
