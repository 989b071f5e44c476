"""The kinds of sink on the page of an analysis: counts, words and marks."""

from types import SimpleNamespace

import numpy as np
import pytest

from gated_attention.report.analysis.sink_kinds import count_of, sink_kind_words, sink_kinds
from gated_attention.report.plots import strokes_for


def inspection(share, value, rank, no_op=0, broadcast=0):
    """Heads of one layer; the first are no-ops, the next broadcast."""
    heads = np.arange(len(share))
    kinds = {"no_op_sink": heads < no_op, "broadcast_sink": (heads >= no_op) & (heads < no_op + broadcast)}
    measures = {"sink_share": share, "sink_value": value, "update_rank": rank, **kinds}
    return SimpleNamespace(measures={name: np.array([values], dtype=float) for name, values in measures.items()})


MIXED = inspection([0.9, 0.8, 0.7, 0.5, 0.1], [0.0, 0.1, 2.0, 0.3, 1.0], [4.0, 5.0, 1.1, 1.2, np.nan], 2, 1)


def test_heads_are_counted_without_those_that_have_no_sink_measure():
    assert (count_of(MIXED, "no_op_sink"), count_of(MIXED, "broadcast_sink")) == ("2 of 5", "1 of 5")
    MIXED.measures["no_op_sink"] = np.vstack([MIXED.measures["no_op_sink"], np.full((1, 5), np.nan)])
    assert count_of(MIXED, "no_op_sink") == "2 of 5"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (MIXED, "2 of 5 heads are no-op sinks, 1 broadcasts, and 1 with a sink is neither."),
        (
            inspection([0.9], [0.0], [2.0], 1),
            "1 of 1 heads is a no-op sink, 0 broadcast, and 0 with a sink are neither.",
        ),
        (inspection([0.2], [0.0], [2.0]), ""),
    ],
)
def test_words_count_heads_and_say_nothing_without_a_sink(found, words):
    assert sink_kind_words(found) == words


def test_a_value_without_a_bound_leaves_the_axes_finite():
    figure = sink_kinds({"a": inspection([0.9, np.nan], [np.inf, np.nan], [1.0, np.nan])}, strokes_for(["a"]))
    assert figure.axes[0].get_ylim()[1] == 4.0


def test_each_head_is_a_mark_filled_if_its_update_is_one_direction():
    figure = sink_kinds({"a": MIXED}, strokes_for(["a"]))
    hollow, filled = figure.axes[0].collections
    np.testing.assert_allclose(filled.get_offsets(), [[0.7, 2.0], [0.5, 0.3]])
    np.testing.assert_allclose(hollow.get_offsets(), [[0.9, 0.01], [0.8, 0.1], [0.1, 1.0]])  # a value of 0 at the floor
