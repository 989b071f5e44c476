"""Figures of a study of many points: what variants reach at each learning rate."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from gated_attention.report.panels import panel_grid, plain_numbers
from gated_attention.report.plots import INK, Stroke, add_legend, styled
from gated_attention.study.grid.rates import Curve, Setting

_WIDEST = 4.0
"""Height of a frame over the distance from the lowest loss to the median, at most, so that the optimum is legible."""

Values = Callable[[Curve, float], Mapping[int, float]]
"""What is drawn of a variant at a rate, by seed."""


@styled
def rate_curves(
    settings: Sequence[Setting], strokes: Mapping[str, Stroke], values: Values, ylabel: str, *, log: bool = False
) -> Figure:
    """A panel for each setting: a line through the means over seeds, and the seeds as dots, against the learning rate.

    The line is thin where seeds are missing. A ring marks the lowest mean if the axis is not logarithmic. What is not
    finite or lies above the frame is a cross at its top.
    """
    figure, grid = panel_grid(len(settings), 2 if len(settings) > 1 else 1, 0.5, 3.0 if len(settings) > 1 else 3.6)
    for setting, ax in zip(settings, grid.flat, strict=False):
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(plain_numbers())
        top = None if log else _top(setting, values)
        for curve in setting.curves:
            _draw(ax, curve, strokes[curve.variant], values, top, marks_best=not log)
        if top is not None:
            ax.set_ylim(top=top)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(setting.rates))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(plain_numbers())
        ax.tick_params(axis="x", labelrotation=45 if len(setting.rates) > 5 and len(settings) > 1 else 0)
        ax.set_title(setting.label)
        ax.set_xlabel("Peak learning rate")
        ax.set_ylabel(ylabel)
    add_legend(figure, dict.fromkeys(curve.variant for setting in settings for curve in setting.curves), strokes)
    return figure


def _draw(ax: Axes, curve: Curve, stroke: Stroke, values: Values, top: float | None, *, marks_best: bool) -> None:
    seeds = {rate: values(curve, rate) for rate in sorted(curve.losses)}
    inside = {
        rate: [value for value in found.values() if isfinite(value) and (top is None or value <= top)]
        for rate, found in seeds.items()
    }
    means = {rate: sum(found) / len(found) for rate, found in inside.items() if len(found) == len(seeds[rate]) > 0}
    ax.plot(list(means), list(means.values()), **stroke.line, linewidth=0.8, alpha=0.6)
    whole = [rate for rate in means if len(inside[rate]) == max(map(len, seeds.values()))]
    ax.plot(whole, [means[rate] for rate in whole], **stroke.line, linewidth=1.9)
    for rate, found in inside.items():
        ax.plot([rate] * len(found), found, "o", color=stroke.color, markersize=3.8, alpha=0.75, markeredgewidth=0)
        lost = len(seeds[rate]) - len(found)
        if lost and top is not None:
            ax.plot([rate], [top], "x", color=stroke.color, markersize=7, clip_on=False)
    if marks_best and curve.best in means:
        ax.plot([curve.best], [means[curve.best]], "o", markersize=10, fillstyle="none", color=INK, markeredgewidth=1.0)


def _top(setting: Setting, values: Values) -> float | None:
    """Where the frame of a panel ends; None if nothing is finite."""
    found = sorted(
        value
        for curve in setting.curves
        for rate in curve.losses
        for value in values(curve, rate).values()
        if isfinite(value)
    )
    if not found:
        return None
    low, middle = found[0], found[len(found) // 2]
    return min(found[-1], low + _WIDEST * max(middle - low, 0.05)) + 0.02
