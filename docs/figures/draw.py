"""Draws the figures of docs/mathematics.md. Run it after a change; equal code gives equal bytes."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from gated_attention.report.panels import WIDTH
from gated_attention.report.plots import INK, PAPER, styled, to_svg
from gated_attention.spec import SITE_LABELS

GREY, BLUE, ORANGE, GREEN = "#7d8590", "#0072b2", "#d55e00", "#009e73"
TIMES, SIGMA, MINUS = "\N{MULTIPLICATION SIGN}", "\N{GREEK SMALL LETTER SIGMA}", "\N{MINUS SIGN}"


def box(ax: Axes, x: float, y: float, text: str, width: float = 1.5) -> None:
    """A box with a word in it, centred."""
    shape = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.32), width, 0.64, shape, facecolor=PAPER, edgecolor=INK))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK) -> None:
    """A line through the points that ends in a head."""
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[:-1], ys[:-1], color=color, linewidth=1, solid_capstyle="butt")
    ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1})


def site(ax: Axes, x: float, y: float, label: str, color: str) -> None:
    """A multiplication, with the site's label."""
    ax.add_patch(Circle((x, y), 0.24, facecolor=PAPER, edgecolor=color, linewidth=1.6))
    ax.text(x, y, TIMES, ha="center", va="center", color=color, fontsize=12)
    ax.text(x, y + 0.34, label, ha="center", va="bottom", color=color, fontweight="bold")


@styled
def block() -> Figure:
    """The attention block with its five sites."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    ax = figure.add_subplot(xlim=(-0.5, 14.4), ylim=(-1.5, 4.6), aspect="equal")
    ax.set_axis_off()
    ax.text(0.2, 2, "X", ha="center", va="center", fontsize=12)
    for y, name, where in ((4, "q_proj", "query"), (2, "k_proj", "key"), (0, "v_proj", "value")):
        arrow(ax, (0.5, 2), (0.8, 2), (0.8, y), (1.3, y))
        box(ax, 2.05, y, name)
        arrow(ax, (2.8, y), (3.6, y))
        site(ax, 3.86, y, SITE_LABELS[where], ORANGE)
        if where == "value":
            arrow(ax, (4.1, y), (7.5, y), (7.5, 1.68))
        else:
            arrow(ax, (4.1, y), (4.7, y))
            box(ax, 5.6, y, "norm, RoPE", 1.8)
            arrow(ax, *([(6.5, y), (7.5, y), (7.5, 2.32)] if where == "query" else [(6.5, y), (6.9, y)]))
    box(ax, 7.5, 2, "SDPA", 1.2)
    arrow(ax, (8.1, 2), (8.9, 2))
    site(ax, 9.16, 2, SITE_LABELS["sdpa"], BLUE)
    arrow(ax, (9.4, 2), (10.2, 2))
    box(ax, 10.95, 2, "o_proj")
    arrow(ax, (11.7, 2), (12.4, 2))
    site(ax, 12.66, 2, SITE_LABELS["output"], ORANGE)
    arrow(ax, (12.9, 2), (13.8, 2))
    arrow(ax, (0.2, 1.65), (0.2, -1.1), (8.0, -1.1), color=BLUE)
    box(ax, 9.16, -1.1, f"{SIGMA}(X W)", 2.3)
    arrow(ax, (9.16, -0.78), (9.16, 1.74), color=BLUE)
    ax.text(10.5, -1.1, "g_proj: one score per head or channel", va="center", color=BLUE, fontsize=8)
    return figure


@styled
def nothing() -> Figure:
    """A head that adds nothing, by an attention sink and by a gate: an illustration with made-up numbers."""
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    without, gated = figure.subplots(1, 2, sharey=True)
    tokens = np.arange(8)
    sink = np.array([0.93] + [0.01] * 7)
    spread = np.array([0.13, 0.08, 0.2, 0.1, 0.15, 0.12, 0.12, 0.1])
    values = np.array([0.04, 1.0, 0.9, 1.1, 0.8, 1.0, 1.05, 0.95])
    for ax, weights, factor in ((without, sink, 1.0), (gated, spread, 0.05)):
        ax.bar(tokens - 0.2, weights, 0.38, color=BLUE, label="attention weight p")
        ax.bar(tokens + 0.2, factor * weights * values, 0.38, color=ORANGE, label="contribution, g p |v|")
        ax.set_xlabel("Key (0 is the first token)")
        ax.set_xticks(tokens)
        ax.grid(axis="x", visible=False)
    without.set_title("Softmax alone: a sink")
    without.text(0.5, 0.75, "weights must add up to 1, so they\ngo to a token whose value is ≈ 0", fontsize=8)
    gated.set_title("With a gate, g = 0.05")
    gated.text(-0.4, 0.75, "weights go anywhere,\nthe gate closes the head", fontsize=8)
    gated.legend(loc="upper right", fontsize=8, frameon=False)
    return figure


@styled
def log_sum_exp() -> Figure:
    """The factor by which one more term in the denominator scales a head."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    terms, factor = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for row, z in enumerate((-2.0, 0.0, 2.0)):
        kept = 1 / (1 + np.exp(z - 1.0))
        terms.barh(row, kept, color=BLUE)
        terms.barh(row, 1 - kept, left=kept, color=GREY)
        color = (GREEN, BLUE, ORANGE)[row]
        x = np.linspace(-6, 8, 200)
        factor.plot(x, 1 / (1 + np.exp(z - x)), color=color)
        factor.text(z - 0.25, 0.52, f"z = {z:g}".replace("-", MINUS), color=color, ha="right", fontsize=8)
    terms.set_yticks(range(3), [f"z = {MINUS}2", "z = 0", "z = 2"])
    terms.set_title("Attention at LSE = 1")
    terms.set_xlabel("Share: tokens (blue), sink (grey)")
    terms.grid(visible=False)
    factor.set_title("Factor on the head's output")
    factor.set_xlabel("LSE of the query's scores")
    factor.set_ylabel(f"{SIGMA}(LSE {MINUS} z)")
    return figure


FIGURES = {"block": block, "nothing": nothing, "log_sum_exp": log_sum_exp}


def main(folder: Path) -> None:
    """Write every figure into the folder."""
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(to_svg(draw(), salt=name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
