"""Spreads, paired differences and the t quantile."""

from math import inf, isnan, nan

import pytest

from gated_attention.study.statistics import (
    PairedDifference,
    paired_difference,
    spread,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Two-sided 95 % points as any printed table has them.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantile_agrees_with_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize(("confidence", "quantile"), [(0.90, 2.920), (0.99, 9.925)])
def test_t_quantile_at_other_levels(confidence, quantile):
    assert t_quantile(2, confidence) == pytest.approx(quantile, abs=5e-4)


def test_t_quantile_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match="degrees of freedom are 0"):
        t_quantile(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_quantile(2, 1.0)


def test_spread_uses_the_sample_deviation():
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.n, found.num_diverged) == (3.0, 3, 0)
    assert found.sd == pytest.approx(7.0**0.5)


def test_spread_counts_and_leaves_out_what_is_not_finite():
    found = spread([1.0, nan, 3.0, inf])
    assert (found.mean, found.n, found.num_diverged) == (2.0, 2, 2)
    assert isnan(spread([nan]).mean)
    assert spread([5.0]).sd is None


def test_differences_pair_by_seed_and_ignore_seeds_of_one_arm():
    found = paired_difference({0: 1.0, 1: 2.5, 9: 100.0}, {1: 2.0, 0: 1.5, 3: -7.0})
    assert (found.mean, found.n) == (0.0, 2)
    assert found.standard_error == pytest.approx(0.5)


def test_pairing_removes_what_seeds_share():
    baseline = {0: 1.0, 1: 2.0, 2: 3.0}
    found = paired_difference({seed: value - 0.1 + 0.001 * seed for seed, value in baseline.items()}, baseline)
    assert found.mean == pytest.approx(-0.099)
    assert found.standard_error == pytest.approx(0.001 / 3**0.5)
    assert found.verdict == "better"


def test_pairs_in_which_a_run_diverged_are_lost():
    found = paired_difference({0: nan, 1: 1.0, 2: 1.0}, {0: 1.0, 1: inf, 2: 1.5})
    assert (found.mean, found.n, found.num_lost) == (-0.5, 1, 2)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (PairedDifference(-4.31, 1.0, 3), "better"),
        (PairedDifference(-4.30, 1.0, 3), "within noise"),
        (PairedDifference(4.31, 1.0, 3), "worse"),
        (PairedDifference(-4.31, 1.0, 2), "within noise"),
        (PairedDifference(-0.1, 0.0, 3), "better"),
        (PairedDifference(0.0, 0.0, 3), "within noise"),
        (PairedDifference(-1.0, None, 1), "n = 1: no spread, not evidence"),
        (PairedDifference(nan, None, 0, num_lost=2), "diverged"),
        (PairedDifference(nan, None, 0), "no common seed"),
    ],
)
def test_verdicts(difference, verdict):
    assert difference.verdict == verdict
