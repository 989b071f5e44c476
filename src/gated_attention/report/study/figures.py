"""A study's figures, each with its caption, from what its runs left behind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gated_attention.analysis.definitions import ALL
from gated_attention.registry.choices import TEXT
from gated_attention.report import panels, plots
from gated_attention.report.blocks import FigureBlock, figure_block
from gated_attention.report.curves import Curve, mean_curve, paired_differences
from gated_attention.report.panels import WIDTH
from gated_attention.report.plots import INK, Stroke, styled
from gated_attention.spec import SITE_LABELS, SITES
from gated_attention.study.comparison import Comparison, VariantRow, diverged
from gated_attention.study.record import Result
from gated_attention.study.samples import Sample
from gated_attention.study.statistics import CONFIDENCE

FOLDER = "figures"
"""Where a report keeps its figures, beside `report.md`."""

NAMES = ("forest", "loss", "f_attn", "no_op_sink", "broadcast_sink", "m_act", "gate_scores", "attention_maps")
"""Every figure that a report may have, in its order."""


class Run(NamedTuple):
    """One finished arm: its result, the lines of its `metrics.jsonl`, its arrays by name and its samples."""

    result: Result
    metrics: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, np.ndarray]
    samples: Sequence[Sample] = ()


Arms = Mapping[str, Sequence[Run]]
"""Runs by variant, in the order of the table, seeds in order."""


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
    figure = draw_forest(rows, reference, strokes, comparison.unit)
    return figure_block(f"{FOLDER}/forest.svg", figure, "Difference in validation loss", caption)


@styled
def draw_forest(
    rows: Sequence[VariantRow], reference: VariantRow, strokes: Mapping[str, Stroke], unit: str = "nats/token"
) -> Figure:
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
    ax.set_xlabel(f"Validation loss minus that of {reference.variant} ({unit})")
    ax.set_title("← lower is better")
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def study_figures(arms: Arms, comparison: Comparison) -> Iterator[FigureBlock]:
    """The figures for which the runs hold data; losses are also drawn against the reference's."""
    strokes = plots.strokes_for(arms)
    yield from _loss(arms, strokes, comparison)
    yield from _layers(arms, strokes)
    yield from _gate_scores(arms, strokes)
    yield from _attention_maps(arms, comparison.task)


def validation_differences(arms: Arms, reference: str | None) -> dict[str, Curve]:
    """By variant the validation loss minus that of `reference` with the same seed, mean over seeds, at each step."""
    pairs = paired_differences(_curves(arms, "val_loss_nats"), reference)
    return {label: mean for label, seeds in pairs.items() if (mean := mean_curve(seeds)) and len(mean.steps)}


def _loss(arms: Arms, strokes: Mapping[str, plots.Stroke], comparison: Comparison) -> Iterator[FigureBlock]:
    reference = comparison.reference
    training, validation = _curves(arms, "loss_nats"), _curves(arms, "val_loss_nats")
    if not training and not validation:
        return
    read = "text" if comparison.task == TEXT else "data"
    caption = (
        f"{_seeds_caption(arms)} Training loss is a running mean; points of validation use less {read} than "
        "the value in the table where that is long. The steep start lies above the frame."
    )
    if reference is not None:
        caption += f" Right: validation loss minus that of `{reference}` with the same seed; below zero is better."
    if any(diverged(run.result) for runs in arms.values() for run in runs):
        caption += " A cross marks the last finite loss of a run that diverged."
    figure = plots.loss_curves(training, validation, strokes, reference, comparison.unit)
    yield figure_block(f"{FOLDER}/loss.svg", figure, "Loss during training", caption)


def _layers(arms: Arms, strokes: Mapping[str, plots.Stroke]) -> Iterator[FigureBlock]:
    measures = [run.result.measures for runs in arms.values() for run in runs]
    uniform = {found["f_attn_uniform"].value for found in measures if "f_attn_uniform" in found}
    if layers := _per_layer(arms, "f_attn"):
        title = "Attention on the first token"
        figure = plots.per_layer(layers, strokes, title, uniform=uniform.pop() if len(uniform) == 1 else None)
        caption = (
            f"{_seeds_caption(arms)} F-Attn of each layer: a layer far above the dashed line, "
            "which is attention spread evenly over all earlier tokens, has an attention sink."
        )
        yield figure_block(f"{FOLDER}/f_attn.svg", figure, f"{title}, by layer", caption)
    for measure in ("no_op_sink", "broadcast_sink"):
        if layers := _per_layer(arms, measure):
            title = ALL[measure].title
            figure = plots.per_layer(layers, strokes, title)
            caption = f"{_seeds_caption(arms)} {ALL[measure].title} of each layer: {ALL[measure].text}."
            yield figure_block(f"{FOLDER}/{measure}.svg", figure, f"{title}, by layer", caption)
    if layers := _per_layer(arms, "m_act"):
        figure = plots.per_layer(layers, strokes, "Largest |hidden state|", log=True)
        caption = f"{_seeds_caption(arms)} M-Act of each layer, at the layer's output, on a logarithmic axis."
        yield figure_block(f"{FOLDER}/m_act.svg", figure, "Largest activation, by layer", caption)


def _gate_scores(arms: Arms, strokes: Mapping[str, plots.Stroke]) -> Iterator[FigureBlock]:
    histograms = []
    for label, runs in arms.items():
        for site in SITES:
            name = f"gate_histogram_{site}"
            found = [run.arrays for run in runs if name in run.arrays and not diverged(run.result)]
            if found:
                counts = np.asarray([arrays[name] for arrays in found], dtype=np.float64).sum(axis=0)
                title, edges = f"{label} ({SITE_LABELS[site]})", found[0][f"gate_edges_{site}"]
                histograms.append(plots.GateHistogram(title, counts, edges, strokes[label].color))
    if histograms:
        caption = f"{panels.HISTOGRAM_CAPTION} All seeds together."
        figure = plots.gate_histograms(histograms)
        yield figure_block(f"{FOLDER}/gate_scores.svg", figure, "Gate scores, by layer", caption)


def _attention_maps(arms: Arms, task: str) -> Iterator[FigureBlock]:
    shown: dict[str, Run] = {}
    for label, runs in arms.items():
        for run in runs:
            if "attention_maps" in run.arrays and not diverged(run.result):
                shown.setdefault(label, run)
    if not shown:
        return
    layers = next(iter(shown.values())).arrays["attention_layers"].tolist()
    maps = {
        label: run.arrays["attention_maps"].astype(np.float64)
        for label, run in shown.items()
        if run.arrays["attention_layers"].tolist() == layers
    }
    seeds = {run.result.seed for run in shown.values()}
    which = f"seed {seeds.pop()}" if len(seeds) == 1 else "the first seed that has them"
    caption = panels.MAPS_CAPTION.format(text=f"one held-out {'text' if task == TEXT else 'image'} ({which})")
    figure = plots.attention_maps(maps, layers)
    yield figure_block(f"{FOLDER}/attention_maps.svg", figure, "Attention maps", caption)


def _curves(arms: Arms, key: str) -> dict[str, dict[int, Curve]]:
    """Steps and values of one quantity by variant and seed; variants without it are left out."""
    curves: dict[str, dict[int, Curve]] = {}
    for label, runs in arms.items():
        for run in runs:
            points = [(line["step"], line[key]) for line in run.metrics if line.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                curve = Curve(np.asarray(steps), np.asarray(values, dtype=np.float64))
                curves.setdefault(label, {})[run.result.seed] = curve
    return curves


def _per_layer(arms: Arms, measure: str) -> dict[str, list[tuple[float, ...]]]:
    """Values layer by layer for each seed; variants without the measure are left out."""
    layers = {
        label: [
            found.per_layer
            for run in runs
            if not diverged(run.result) and (found := run.result.measures.get(measure)) and found.per_layer
        ]
        for label, runs in arms.items()
    }
    return {label: found for label, found in layers.items() if found}


def _seeds_caption(arms: Arms) -> str:
    several = any(len(runs) > 1 for runs in arms.values())
    return "Thin lines are seeds, thick lines their mean." if several else "One seed each."
