"""The first screen of a report: the result strip and the forest plot say what the runs say."""

import re
from math import nan

import pytest
from finished_arms import report_of, write_arm

from gated_attention.report.plots import strokes_for
from gated_attention.report.study.figures import draw_forest, forest
from gated_attention.report.study.strip import interval_text, result_strip
from gated_attention.study.comparison import compare_variants
from gated_attention.study.record import find_results
from gated_attention.study.statistics import paired_difference

LOSSES = {"baseline": (2.0, 2.2, 2.4), "sdpa-headwise": (1.9, 2.11, 2.28)}


@pytest.fixture
def study(tmp_path):
    return tmp_path / "runs" / "demo"


def strip_of(study):
    results = find_results(study)
    return {row[0].text: [cell.text.replace("\u00a0", " ") for cell in row[1:]]
            for row in result_strip(compare_variants(results)).rows}  # fmt: skip


def test_an_interval_is_that_of_the_paired_t_test():
    # Differences -0.10, -0.09, -0.12: mean -0.10333, standard error 0.0088192, t quantile 4.302653 at two degrees.
    found = paired_difference(dict(enumerate(LOSSES["sdpa-headwise"])), dict(enumerate(LOSSES["baseline"])))
    assert found.half_width == pytest.approx(4.302653 * 0.0088192, rel=1e-4)
    assert interval_text(found) == "-0.1033 [-0.1413, -0.0654]"
    assert interval_text(paired_difference({0: 1.5}, {0: 2.0})) == "-0.5000"
    assert interval_text(paired_difference({0: nan}, {0: 2.0})) == "-"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1), ["sink", "removed"]),
        ((0.5, 0.5, 0.5), (0.2, 0.21, 0.22), ["sink", "weakened"]),
        ((0.5, 0.5, 0.5), (0.2, 0.6, 0.4), ["sink", "not weakened"]),
        ((0.15, 0.15, 0.15), (0.03, 0.03, 0.03), ["below 10x", "weakened"]),
        ((0.5, nan, nan), (0.4, nan, nan), ["sink", "not weakened"]),  # one pair is not evidence
    ],
)
def test_the_strip_says_what_became_of_the_sink(study, before, after, words):
    for variant, shares in (("baseline", before), ("sdpa-headwise", after)):
        for seed, share in enumerate(shares):
            write_arm(
                study, variant, seed, 2.0 + 0 * share, f_attn=share, m_act=10.0 * (1 + 3 * (variant != "baseline"))
            )
    rows = strip_of(study)
    assert [rows[variant][3] for variant in LOSSES] == words
    assert rows["sdpa-headwise"][4] == "40.0 (4.00x)"
    assert rows["sdpa-headwise"][5] == "100"
    assert rows["baseline"][2] == f"{before[0]:.4f} ({before[0] / 0.02:.1f}x)"


def test_the_plot_draws_every_seed_mean_and_interval_in_the_tables_order(study):
    for variant, losses in {"z-first": (1.5, 1.6, 1.8), **LOSSES}.items():
        for seed, loss in enumerate(losses):
            write_arm(study, variant, seed, loss, cites=("T1.10",) if variant == "sdpa-headwise" else ())
    comparison = compare_variants(find_results(study))
    rows = comparison.rows[1:]
    ax = draw_forest(rows, comparison.rows[0], strokes_for(row.variant for row in comparison.rows)).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sdpa-headwise", "z-first"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first is at the top
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert list(dots[0].get_xdata()) == pytest.approx([-0.1, -0.09, -0.12])
    means = [line for line in ax.lines if line.get_marker() == "s"]
    assert means[0].get_xdata() == pytest.approx(-0.31 / 3)
    (bar,) = ax.containers[0].lines[2]
    assert bar.get_segments()[0][:, 0] == pytest.approx([-0.14128, -0.06539], abs=1e-4)
    assert "lower is better" in ax.get_title(loc="left")


def test_variants_without_a_pair_or_an_interval_are_named(study):
    write_arm(study, "baseline", 0, 2.0)
    write_arm(study, "one", 0, 1.9)
    write_arm(study, "wild", 0, nan)
    comparison = compare_variants(find_results(study))
    caption = forest(comparison, strokes_for(row.variant for row in comparison.rows)).caption
    assert "One pair of runs has no interval: `one`." in caption
    assert "Without a finite pair: `wild`." in caption
    assert strip_of(study)["wild"][:2] == ["-", "diverged"]


def test_one_variant_has_neither(study):
    write_arm(study, "baseline", 0)
    text = report_of(study)
    assert "forest.svg" not in text
    assert not re.search(r"\| Verdict", text)
