"""The heads of an analysis by the rise of the loss without them: a map, and those that count most with their spread."""

from collections.abc import Iterator, Sequence

import numpy as np

from gated_attention.analysis.definitions import ALL
from gated_attention.jobs.analyze import Analysis
from gated_attention.report.analysis.figures import FOLDER
from gated_attention.report.analysis.sink_kinds import MOST
from gated_attention.report.blocks import Block, Heading, Paragraph, TableBlock, figure_block
from gated_attention.report.heatmaps import head_heatmaps
from gated_attention.report.tables import Column, table_of

LISTED = 8
"""Heads listed per model."""

_KINDS = {"no_op_sink": "no-op", "broadcast_sink": "broadcast"}


def ablation_blocks(analyses: Sequence[Analysis]) -> Iterator[Block]:
    """The section; nothing for an analysis without ablation."""
    found = {one.label: one.inspection.measures for one in analyses if "ablation" in one.inspection.measures}
    if not found:
        return
    title = ALL["ablation"].title
    yield Heading("What a head is worth")
    yield Paragraph(
        f"{title} (nats per token): {ALL['ablation'].text}. After ± stands the standard error over sequences. A head "
        "whose output is nearly the same in every text costs nothing, however much attention its sink gets."
    )
    rises = {label: measures["ablation"] for label, measures in found.items()}
    figure = head_heatmaps(rises, f"{title} (nats per token)")
    yield figure_block(
        f"{FOLDER}/ablation_heads.svg", figure, f"{title}, by head", "A bright cell is a head that counts."
    )
    rows = [(label, *row) for label, measures in found.items() for row in _largest(measures)]
    labels, layers, heads, texts, whole, kinds = zip(*rows, strict=True)
    yield TableBlock(
        table_of(
            {
                Column("Model", numeric=False): labels,
                Column("Layer"): layers,
                Column("Head"): heads,
                Column(title, "nats/token", meaning=ALL["ablation"].text): texts,
                Column("all heads of the layer", beneath=True, meaning=ALL["layer_ablation"].text): whole,
                Column("Sink", numeric=False): kinds,
            }
        )
    )


def _largest(measures: dict[str, np.ndarray]) -> Iterator[tuple[str, str, str, str, str | None]]:
    """The heads that cost most: layer, head, rise with its error, the layer's rise, and the kind of sink."""
    rises = measures["ablation"]
    for place in np.argsort(np.where(np.isnan(rises), -np.inf, rises), axis=None)[::-1][:LISTED]:
        layer, head = np.unravel_index(place, rises.shape)
        if np.isnan(rises[layer, head]):
            continue
        kind = next((word for name, word in _KINDS.items() if measures[name][layer, head] >= MOST), None)
        of_layer, of_head = (
            _with_error(*(float(measures[f"{name}{end}"][where]) for end in ("", "_error")))
            for name, where in (("layer_ablation", layer), ("ablation", (layer, head)))
        )
        yield str(layer), str(head), of_head, of_layer, kind


def _with_error(value: float, error: float) -> str:
    return f"{value:+.4f}" if np.isnan(error) else f"{value:+.4f} ± {error:.4f}"
