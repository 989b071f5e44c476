"""One attention map on axes, and the scale that all of them share."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator


def draw_attention(ax: Axes, weights: Float[np.ndarray, "queries keys"]) -> AxesImage:
    """Attention weights, 0 to 1, on a logarithmic scale; a query looks along its row, at no later key."""
    above = np.triu(np.ones(weights.shape, dtype=bool), k=1)
    image = ax.imshow(
        np.ma.array(np.asarray(weights, dtype=np.float64), mask=above),
        norm=LogNorm(1e-3, 1.0, clip=True), cmap="viridis", interpolation="none",
    )  # fmt: skip
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def add_attention_scale(figure: FigureBase, image: AxesImage, axes: Any, shrink: float = 0.6) -> None:
    """The colour bar of attention maps, above the axes that it is for."""
    bar = figure.colorbar(image, ax=axes, location="top", shrink=shrink, aspect=40, extend="min")
    bar.set_label("Attention weight, mean over heads")
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
