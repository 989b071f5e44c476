"""Rank correlation with the paper's rows, and signs of differences."""

from itertools import permutations

import numpy as np
import pytest

from gated_attention.report.study.ordering import orders, permutation_p, spearman
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import Spread


def test_spearman_is_pearson_of_ranks_ties_at_their_mean():
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 3.0]
    ranks = [3.0, 1.5, 4.0, 1.5, 5.0], [2.0, 4.0, 1.0, 5.0, 3.0]
    assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [5, 5, 5]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_the_p_value_counts_orders():
    x, y = [1, 2, 3, 4], [1, 2, 4, 3]
    observed = abs(spearman(x, y))
    extreme = [abs(spearman(x, order)) >= observed - 1e-12 for order in permutations(y)]
    assert permutation_p(x, y) == pytest.approx(np.mean(extreme))


def test_a_sampled_p_value_repeats_and_is_near_the_normal_one():
    x = list(range(12))
    y = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    assert permutation_p(x, y) == permutation_p(x, y) < 1e-3
    assert permutation_p(x, [5, 3, 9, 0, 11, 7, 2, 8, 4, 10, 1, 6]) > 0.3


def row(name, cites, loss, f_attn):
    measures = {"val_perplexity": Spread(loss, None, 1), "f_attn": Spread(f_attn, None, 1)}
    return VariantRow(name, "", cites, (0,), None, None, measures, None)


def test_rows_are_paired_by_cite_and_signs_by_the_papers_baseline():
    comparison = Comparison(
        "baseline",
        (
            row("baseline", ("T1.1", "T4.1"), 20.0, 0.30),
            row("sdpa-elementwise", ("T1.5", "T4.2"), 18.0, 0.10),
            row("sdpa-headwise", ("T1.10", "T4.3"), 21.0, 0.20),
        ),
    )
    found = {(order.table, order.title): order for order in orders(comparison)}
    assert found.keys() == {(1, "Perplexity"), (4, "Perplexity"), (4, "F-Attn")}
    table_1 = found[1, "Perplexity"]
    assert table_1.pairs == {"T1.1": (6.026, 20.0), "T1.5": (5.761, 18.0), "T1.10": (5.792, 21.0)}
    assert (table_1.num_agree, table_1.num_signs) == (1, 2)  # the headwise gate came out worse here
    assert table_1.correlation == pytest.approx(0.5)
    assert found[4, "F-Attn"].correlation == pytest.approx(1.0)
    assert table_1.describe().startswith("Table 1, Perplexity over 3 rows: rank correlation +0.50")


def test_table_2_is_compared_within_one_setting():
    names = {
        "baseline": ("T2.1", "T2.5"),
        "sdpa-elementwise": ("T2.2", "T2.8"),
        "sdpa-headwise": ("T2.9",),
        "baseline-lr-4.5": ("T2.3",),
    }
    rows = [row(name, cites, 20.0 - place, 0.1) for place, (name, cites) in enumerate(names.items())]
    found = {order.setting: order for order in orders(Comparison("baseline", tuple(rows)))}
    assert [list(order.pairs) for order in found.values()] == [["T2.1", "T2.2"], ["T2.5", "T2.8", "T2.9"]]
    order = found["1.7B dense, 48 layers, 400B tokens, batch 1024"]
    assert order.correlation == pytest.approx(0.5)  # headwise is second in the paper and first here
    assert order.name == "Table 2, 1.7B dense, 48 layers, 400B tokens, batch 1024, Perplexity"


def test_runs_that_diverged_do_not_count():
    lost = row("baseline-lr-8", ("T2.6",), 9.0, 0.1)
    lost.measures["val_perplexity"] = Spread(float("nan"), None, 0, 1)
    kept = row("baseline", ("T2.5",), 7.0, 0.1), row("sdpa-elementwise", ("T2.8",), 6.0, 0.1)
    comparison = Comparison(None, (*kept, lost))
    (order,) = orders(comparison)
    assert order.pairs.keys() == {"T2.5", "T2.8"}
    assert order.correlation is None
