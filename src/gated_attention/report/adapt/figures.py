"""The figures of an adaptation: losses in training, the sink by layer, loss by position."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.report import plots
from gated_attention.report.adapt.findings import Findings
from gated_attention.report.blocks import FigureBlock, figure_block
from gated_attention.report.curves import Curve
from gated_attention.report.panels import WIDTH
from gated_attention.report.plots import INK, Stroke, add_legend, styled

FOLDER = "figures"
"""Where a report keeps its figures, beside `report.md`."""

NAMES = ("loss", "f_attn", "m_act", "position")
"""Every figure that a report may have, in its order."""

Lines = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
"""The lines of `metrics.jsonl` by arm and seed."""


def adapt_figures(findings: Findings, lines: Lines, context: int) -> Iterator[FigureBlock]:
    """The figures for which the records hold data."""
    strokes = plots.strokes_for(arm.name for arm in findings.arms)
    layers = {
        name: {arm.name: [run.by_layer[name] for run in arm.runs] for arm in findings.arms}
        for name in ("f_attn", "m_act")
    }
    uniform = findings.arms[0].runs[0].measures["f_attn_uniform"]
    yield figure_block(
        f"{FOLDER}/f_attn.svg", plots.per_layer(layers["f_attn"], strokes, "F-Attn (share)", uniform=uniform),
        "Attention to the first token",
        "By layer; thin lines are seeds. The dashed line is attention spread evenly.",
    )  # fmt: skip
    yield figure_block(
        f"{FOLDER}/m_act.svg", plots.per_layer(layers["m_act"], strokes, "Largest activation", log=True),
        "Largest activation", "By layer, logarithmic; thin lines are seeds.",
    )  # fmt: skip
    curves = {key: _curves(lines, key) for key in ("loss_nats", "val_loss_nats")}
    if any(seeds for seeds in curves["loss_nats"].values()):
        reference = findings.reference if findings.reference in curves["val_loss_nats"] else None
        yield figure_block(
            f"{FOLDER}/loss.svg", plots.loss_curves(curves["loss_nats"], curves["val_loss_nats"], strokes, reference),
            "Loss during training",
            "Cross-entropy, whatever was trained on. Points of validation use less text than the table.",
        )  # fmt: skip
    if positions := _positions(findings):
        yield figure_block(
            f"{FOLDER}/position.svg", draw_positions(positions, strokes, context),
            "Loss by position",
            "Mean over seeds, in steps of a quarter context. The dashed line is the end of one context.",
        )  # fmt: skip


@styled
def draw_positions(
    ropes: Mapping[str, Mapping[str, np.ndarray]], strokes: Mapping[str, Stroke], context: int
) -> Figure:
    """Loss by position, a panel for each rotary embedding."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(ropes), squeeze=False, sharey=True)[0]
    width = max(1, context // 4)
    for ax, (rope, arms) in zip(panels, ropes.items(), strict=True):
        for name, losses in arms.items():
            edges = np.arange(len(losses) + 1) * width
            ax.stairs(losses, edges, baseline=None, **strokes[name].line)
        ax.axvline(context, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_title(
            "Plain RoPE" if rope == "plain" and len(ropes) > 1 else rope.capitalize() if rope == "plain" else rope
        )
        ax.set_xlabel("Position")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel("Loss (nats/token)")
    add_legend(figure, next(iter(ropes.values())), strokes)
    return figure


def _positions(findings: Findings) -> dict[str, dict[str, np.ndarray]]:
    """Mean over seeds by rotary embedding and arm, for those that every seed has at equal length."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm in findings.arms:
        for rope in arm.runs[0].by_position:
            rows = [run.by_position[rope] for run in arm.runs if rope in run.by_position]
            if len({len(row) for row in rows}) == 1 and rows[0]:
                found.setdefault(rope, {})[arm.name] = np.mean(rows, axis=0)
    return found


def _curves(lines: Lines, key: str) -> dict[str, dict[int, Curve]]:
    found: dict[str, dict[int, Curve]] = {}
    for arm, seeds in lines.items():
        for seed, records in seeds.items():
            points = [(line["step"], line[key]) for line in records if line.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                found.setdefault(arm, {})[seed] = Curve(np.array(steps), np.array(values, dtype=np.float64))
    return found
