"""Rows of a comparison, and the table in its printed forms."""

import csv
from dataclasses import replace
from io import StringIO
from math import inf, nan

import pytest
from rich.console import Console

from gated_attention.report.study.table import comparison_table, csv_text, spread_text, terminal_table
from gated_attention.report.tables import ABSENT, fixed, significant
from gated_attention.study.comparison import compare_variants, variant_order
from gated_attention.study.record import Measure, Result
from gated_attention.study.statistics import spread


def make_result(variant, seed, loss, parameters=1_000_000, cites=(), **measures):
    config = {
        "variant": {"name": variant, "description": f"gate of {variant}", "cites": list(cites)},
        "parameters": {"total": parameters},
    }
    found = {"val_loss_nats": Measure(loss, "nats/token", 100)}
    found |= {name: Measure(value, "1", 100) for name, value in measures.items()}
    return Result("study", variant, seed, config, found, 1000, "CPU")


def make_study(**losses):
    """Results of variants with a loss for each seed."""
    return [
        make_result(name, seed, loss, f_attn=0.25, m_act=1053.4)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def column(results, title):
    """A printed column, by variant."""
    table = comparison_table(compare_variants(results))
    index = [column.title for column in table.columns].index(title)
    return {row[0].text: row[index] for row in table.rows}


def titles(results):
    return [column.title for column in comparison_table(compare_variants(results)).columns]


def test_the_baseline_comes_first_then_the_papers_order():
    results = [
        make_result("value", 0, 1.0, cites=("T1.6",)),
        make_result("own", 0, 1.0),
        make_result("headwise", 0, 1.0, cites=("T4.3", "T1.10")),
        make_result("elementwise", 0, 1.0, cites=("eq. 8", "T1.5")),
        make_result("baseline", 0, 1.0),
    ]
    assert variant_order(results) == ["baseline", "elementwise", "value", "headwise", "own"]


def test_differences_refer_to_the_baseline_seed_by_seed():
    results = make_study(other=(1.9, 2.8, 4.1), baseline=(2.0, 3.0, 4.0))
    rows = {row.variant: row for row in compare_variants(results).rows}
    assert rows["baseline"].difference is None
    assert rows["other"].difference.mean == pytest.approx((-0.1 - 0.2 + 0.1) / 3)
    assert column(results, "Difference ↓ (nats/token)")["other"].text == "-0.0667 ± 0.0882"
    assert column(results, "Verdict")["other"].text == "within noise (t = -0.8, n = 3)"


def test_a_study_without_baseline_compares_with_its_first_variant():
    comparison = compare_variants(make_study(b=(2.0,), a=(1.0,)))
    assert comparison.reference == "a"
    assert comparison.rows[1].difference.mean == 1.0


def test_a_single_variant_has_no_paired_columns():
    results = make_study(baseline=(2.0, 3.0))
    assert compare_variants(results).reference is None
    assert "Validation loss ↓ (nats/token)" in titles(results)
    assert not {"Difference ↓ (nats/token)", "Verdict", "Residue (%)"} & set(titles(results))


def test_columns_that_no_variant_fills_are_left_out():
    assert "Gate mean" not in titles(make_study(baseline=(1.0,)))
    assert "Gate mean" in titles([*make_study(baseline=(1.0,)), make_result("a", 0, 1.0, gate_score_mean=0.4)])


def test_one_seed_is_called_no_evidence():
    results = make_study(baseline=(2.0,), other=(1.0,))
    assert column(results, "Verdict")["other"].text == "n = 1: no spread, not evidence"
    assert column(results, "Validation loss ↓ (nats/token)")["other"].text == "1.0000"


def test_a_confirmed_difference_is_marked():
    results = make_study(baseline=(2.0, 3.0, 4.0), less=(1.9, 2.9001, 3.9), more=(2.1, 3.1001, 4.1))
    verdicts = column(results, "Verdict")
    assert verdicts["less"].tone == "good"
    assert verdicts["less"].text.startswith("better (t = -")
    assert verdicts["more"].tone == "bad"
    assert verdicts["more"].text.startswith("worse (t = +")


@pytest.mark.parametrize("lost", [nan, inf])
def test_diverged_runs_are_counted_and_left_out_of_every_mean(lost):
    results = [
        *make_study(baseline=(2.0, 3.0, 4.0)),
        make_result("other", 0, 1.9, f_attn=0.1),
        make_result("other", 1, lost, f_attn=0.9),
        make_result("other", 2, 3.8, f_attn=0.3),
    ]
    assert column(results, "Validation loss ↓ (nats/token)")["other"].text == "2.8500 ± 1.3435"
    assert column(results, "Diverged")["other"].text == "1 of 3 diverged"
    assert column(results, "Diverged")["baseline"].text == ABSENT
    assert column(results, "F-Attn ↓")["other"].text == "0.2000"
    difference = compare_variants(results).rows[1].difference
    assert (difference.n, difference.num_lost) == (2, 1)


def test_a_variant_whose_runs_all_diverged_says_so():
    results = make_study(baseline=(2.0, 3.0), other=(nan, inf))
    assert column(results, "Validation loss ↓ (nats/token)")["other"].text == "diverged"
    assert column(results, "Verdict")["other"] == ("diverged", "bad")
    assert column(results, "M-Act ↓")["other"].text == "diverged"


def test_better_on_the_survivors_is_not_praised():
    results = make_study(baseline=(2.0, 3.0, 4.0), other=(1.9, 2.9, nan))
    verdict = column(results, "Verdict")["other"]
    assert (verdict.text.split()[0], verdict.tone) == ("better", "muted")


def test_residue_is_relative_to_the_reference():
    results = [make_result("baseline", 0, 1.0, 1_000_000), make_result("wide", 0, 1.0, 1_002_500)]
    assert column(results, "Residue (%)")["wide"].text == "+0.25"
    assert column(results, "Parameters (M)")["wide"].text == "1.002"


def test_arms_that_read_different_text_are_not_compared():
    results = make_study(baseline=(2.0, 3.0), other=(2.1, 3.1))
    texts = [{"digest": 1, "train_tokens": 9}] * 3 + [{"digest": 2, "train_tokens": 9}]
    told = [replace(run, config={**run.config, "text": text}) for run, text in zip(results, texts, strict=True)]
    with pytest.raises(ValueError, match=r"other seed 1 was trained on other text than baseline seed 0"):
        compare_variants(told)
    before = [
        *told[:3],
        replace(told[3], config={**told[3].config, "text": {"train_tokens": 9}}),
    ]  # a digest was not kept
    assert len(compare_variants(before).rows) == 2


def test_two_results_of_one_arm_are_refused():
    with pytest.raises(ValueError, match="two results of a with seed 0"):
        compare_variants([make_result("a", 0, 1.0), make_result("a", 0, 2.0)])
    with pytest.raises(ValueError, match="no finished run"):
        compare_variants([])


@pytest.mark.parametrize(
    ("value", "text"), [(1053.4, "1,053"), (94.26, "94.3"), (8.4251, "8.43"), (0.012, "0.0120"), (0.0, "0")]
)
def test_significant_digits(value, text):
    assert spread_text(spread([value]), significant(3)) == text


def test_spread_text_gives_mean_and_deviation_the_same_decimals():
    assert spread_text(spread([1.0, 2.0]), fixed(2)) == "1.50 ± 0.71"
    assert spread_text(None, fixed(2)) == ABSENT


def test_csv_holds_the_numbers_of_the_table():
    results = make_study(baseline=(2.0, 3.0, 4.0), other=(1.9, 2.8, nan))
    baseline, other = csv.DictReader(StringIO(csv_text(compare_variants(results))))
    assert baseline["variant"] == "baseline"
    assert baseline["difference_nats"] == ""
    assert float(other["val_loss_nats"]) == pytest.approx(2.35)
    assert float(other["difference_nats"]) == pytest.approx(-0.15)
    assert float(other["t_quantile"]) == pytest.approx(12.706, abs=1e-3)
    assert (other["num_pairs"], other["num_diverged"], other["seeds"]) == ("2", "1", "0 1 2")
    assert other["verdict"] == "within noise"
    assert "nan" not in csv_text(compare_variants(make_study(baseline=(nan,), other=(nan,))))


def render(table, width):
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()


def test_the_terminal_table_has_a_row_for_each_variant():
    text = render(terminal_table(make_study(baseline=(2.0, 3.0), other=(1.9, 2.8)), width=130), 130)
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["other"]]
    assert "2.3500 ± 0.6364" in line
    assert "-0.1500 ± 0.0500" in line
    assert "…" not in text


def test_a_narrow_terminal_gets_variants_side_by_side():
    results = [make_result(f"variant-{i}", 0, 2.0 + i, gate_score_mean=0.5) for i in range(3)]
    text = render(terminal_table(results, width=80), 80)
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("Gate mean")]
    assert line.count("0.5000") == 3
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_width_is_the_terminals_unless_given(monkeypatch):
    results = make_study(baseline=(2.0,), other=(1.9,))
    for columns, header in (("80", ""), ("140", "Variant\nGate")):
        monkeypatch.setenv("COLUMNS", columns)
        assert str(terminal_table(results).columns[0].header) == header


def test_many_variants_keep_their_rows_on_a_narrow_terminal():
    results = [make_result(f"v{i}", 0, 2.0) for i in range(9)]
    text = render(terminal_table(results, width=80), 80)
    assert sum(line.strip().startswith("v") for line in text.splitlines()) == 9
