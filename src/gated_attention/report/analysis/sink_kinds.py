"""No-op and broadcast sinks of an analysis: counts, words, and a figure with a mark for each head."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gated_attention.analysis import Inspection
from gated_attention.analysis.reduction import BROADCAST_RANK, BROADCAST_VALUE, NO_OP_VALUE, SINK_THRESHOLD
from gated_attention.report.panels import panel_grid, plain_numbers
from gated_attention.report.plots import INK, Stroke, styled

CAPTION = (
    f"A mark is a head. Right of {SINK_THRESHOLD:g} it has a sink: a no-op in the lower box, where the sink's value is "
    "near nothing; a broadcast in the upper box if its mark is filled, which is an update of one direction (stable "
    f"rank at most {BROADCAST_RANK:g})."
)

MOST = 0.5
"""Share of sequences from which a head counts as one that has a sink of a kind."""

_LEAST_VALUE = 1e-2
"""Smaller values are drawn here."""


def count_of(found: Inspection, name: str) -> str:
    """How many heads are sinks of this kind in at least half of the sequences, e.g. `3 of 48`."""
    heads = found.measures[name]
    return f"{_number(heads)} of {int(np.isfinite(heads).sum())}"


def _number(heads: np.ndarray) -> int:
    return int((heads >= MOST).sum())


def sink_kind_words(found: Inspection) -> str:
    """What kinds of sink the heads have, as a sentence; empty without a sink."""
    num_sinks = int((found.measures["sink_share"] > SINK_THRESHOLD).sum())
    if not num_sinks:
        return ""
    no_op, broadcast = (_number(found.measures[name]) for name in ("no_op_sink", "broadcast_sink"))
    others = max(0, num_sinks - no_op - broadcast)
    verbs = "is a no-op sink" if no_op == 1 else "are no-op sinks", "broadcasts" if broadcast == 1 else "broadcast"
    return (
        f"{no_op} of {np.isfinite(found.measures['sink_share']).sum()} heads {verbs[0]}, {broadcast} {verbs[1]}, and "
        f"{others} with a sink {'is' if others == 1 else 'are'} neither."
    )


@styled
def sink_kinds(models: Mapping[str, Inspection], strokes: Mapping[str, Stroke]) -> Figure:
    """Attention to the strongest position against the value there, a panel for each model."""
    values = np.concatenate([found.measures["sink_value"].ravel() for found in models.values()])
    top = 2 * float(np.max(values, where=np.isfinite(values), initial=2.0))
    figure, grid = panel_grid(len(models), 3, 0.5, 2.6, sharex=True, sharey=True)
    width = 1 - SINK_THRESHOLD
    for ax, (label, found) in zip(grid.flat, models.items(), strict=False):
        boxes = (_LEAST_VALUE / 2, NO_OP_VALUE, "no-op"), (BROADCAST_VALUE, top, "broadcast")
        for low, high, word in boxes:
            box = Rectangle((SINK_THRESHOLD, low), width, high - low, facecolor=INK, alpha=0.07, linewidth=0)
            ax.add_patch(box)
            place = ((1.0, high), (-4, -4), "top") if word == "broadcast" else ((1.0, low), (-4, 4), "bottom")
            ax.annotate(word, place[0], place[1], textcoords="offset points", ha="right", va=place[2], alpha=0.75)
        share, value, rank = (found.measures[name] for name in ("sink_share", "sink_value", "update_rank"))
        one_direction, value = rank <= BROADCAST_RANK, np.maximum(value, _LEAST_VALUE)
        color = strokes[label].color
        for chosen, face in ((~one_direction, "none"), (one_direction, color)):
            ax.scatter(share[chosen], value[chosen], s=22, facecolor=face, edgecolor=color, linewidth=1, zorder=3)
        ax.set(xlim=(0, 1), ylim=(_LEAST_VALUE / 2, top), yscale="log", title=label)
        ax.yaxis.set_major_formatter(plain_numbers())
    for ax in grid[:, 0]:
        ax.set_ylabel("Its value over the median")
    figure.supxlabel("Attention to the strongest position", fontsize="medium")
    return figure
