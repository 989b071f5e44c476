"""Rank correlation with the paper's rows, and signs of differences."""

from itertools import permutations

import numpy as np
import pytest

from gated_attention.report.study.ordering import bootstrap_interval, orders, permutation_p, spearman
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import Spread, spread


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
    found = {(order.tables[0], order.title): order for order in orders(comparison)}
    assert found.keys() == {(1, "Perplexity"), (4, "Perplexity"), (4, "F-Attn")}
    table_1 = found[1, "Perplexity"]
    assert table_1.pairs == {"T1.1": (6.026, 20.0), "T1.5": (5.761, 18.0), "T1.10": (5.792, 21.0)}
    assert (table_1.num_agree, table_1.num_signs) == (1, 2)  # the headwise gate came out worse here
    assert table_1.correlation == pytest.approx(0.5)
    assert found[4, "F-Attn"].correlation == pytest.approx(1.0)
    assert table_1.describe().startswith("Table 1, Perplexity over 3 rows: rank correlation +0.50")


def seeded(name, cites, *losses):
    values = dict(enumerate(losses))
    measures = {"val_perplexity": spread(values.values())}
    return VariantRow(name, "", cites, tuple(values), None, None, measures, None, {"val_perplexity": values})


def test_the_interval_draws_the_same_seeds_for_all_rows():
    rows = [{0: 1.0, 1: 4.0, 2: 9.0}, {0: 2.0, 1: 3.0}, {0: 3.0, 1: 5.0}]  # seeds 0 and 1 are common
    found = bootstrap_interval([1.0, 2.0, 3.0], rows)
    drawn = [spearman([1, 2, 3], [1, 2, 3]), *[spearman([1, 2, 3], [2.5, 2.5, 4])] * 2, spearman([1, 2, 3], [4, 3, 5])]
    assert found == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert bootstrap_interval([1.0, 2.0], [{0: 1.0}, {0: 2.0}]) is None
    assert bootstrap_interval([1.0, 2.0], [{0: 1.0, 1: float("nan")}, {0: 2.0, 1: 1.0}]) is None
    many = [{seed: float(seed * (row + 1) % 7) for seed in range(8)} for row in range(4)]  # too many draws to count all
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0], many)
    assert (low, high) == bootstrap_interval([1.0, 2.0, 3.0, 4.0], many)
    assert -1 <= low < high <= 1


def test_tables_of_one_setting_are_also_one_order_and_name_what_swaps():
    comparison = Comparison(
        "baseline",
        (
            seeded("baseline", ("T1.1", "T3.1", "T4.1"), 20.0, 20.2, 20.1),
            seeded("sdpa-elementwise", ("T1.5", "T3.2", "T4.2"), 18.0, 18.2, 18.1),
            seeded("key-elementwise", ("T1.7",), 20.9, 21.2, 20.8),  # below the baseline in the paper
            seeded("heads-silu", ("T3.6",), 20.0, 20.4, 20.1),  # above it, but not significantly
            seeded("sdpa-parameter", ("T4.6",), 19.0, 19.2, 19.1),
        ),
    )
    *single, joint = orders(comparison)
    assert [order.tables for order in single] == [(1,), (3,), (4,)]
    assert joint.name == "Tables 1, 3, 4, Perplexity"
    assert list(joint.pairs) == ["T1.1", "T1.5", "T1.7", "T3.6", "T4.6"]
    assert [(swap.lower, swap.higher, swap.is_significant) for swap in joint.swaps] == [
        ("baseline", "key-elementwise", True),
        ("baseline", "heads-silu", False),
    ]
    assert joint.num_pairs == 10
    assert joint.interval[0] <= joint.correlation <= joint.interval[1]
    assert "pairs swapped" in joint.describe()


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
