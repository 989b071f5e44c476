"""Panels of figures: their grid, their colour bar, and one attention map."""

from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

WIDTH = 7.2  # inches
LAYER_AXIS = "Layer (0 is the first)"

HISTOGRAM_CAPTION = (
    "How often each gate score occurs; each layer is scaled to its own peak and a tick marks its mean. Mass at 0 is a "
    "closed gate, mass at 1 an open one."
)
MAPS_CAPTION = (
    "Attention over the first positions of {text}, averaged over heads, on a logarithmic scale. A query looks along "
    "its row; a bright column is a key that all of them look at, at position 0 an attention sink."
)


def panel_grid(count: int, columns: int, top: float, row: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels, at most `columns` side by side, and its axes; spare panels are hidden.

    Args:
        top, row: Inches of height of the figure without panels, and of one row.
        options: For `Figure.subplots`.
    """
    columns = max(1, min(columns, count))
    rows = max(1, ceil(count / columns))
    figure = Figure(figsize=(WIDTH, top + rows * row), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in grid.flat[count:]:
        ax.set_visible(False)
    return figure, grid


def add_scale(figure: FigureBase, image: ScalarMappable, axes: Any, label: str, **options: Any) -> None:
    """A colour bar above the axes; `options` are those of `colorbar`."""
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, **{"shrink": 0.6, **options})
    bar.set_label(label)
    if isinstance(image.norm, LogNorm):
        bar.ax.xaxis.set_major_formatter(plain_numbers())
        bar.ax.xaxis.set_minor_formatter(NullFormatter())


def plain_numbers() -> FuncFormatter:
    """Tick labels without powers of ten."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def add_attention_scale(figure: FigureBase, image: ScalarMappable, axes: Any, shrink: float = 0.6) -> None:
    """The colour bar of attention maps."""
    add_scale(figure, image, axes, "Attention weight, mean over heads", shrink=shrink, extend="min")


def draw_attention(ax: Axes, weights: Float[np.ndarray, "queries keys"]) -> AxesImage:
    """Attention weights, 0 to 1, on a logarithmic scale: a row for each query, later keys masked."""
    later = np.triu(np.ones(weights.shape, dtype=bool), k=1)
    shown = np.ma.array(np.asarray(weights, dtype=np.float64), mask=later)
    image = ax.imshow(shown, norm=LogNorm(1e-3, 1.0, clip=True), cmap="viridis", interpolation="none")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image
