"""A study beside the paper: baselines of one learning rate, and parameters called matched only where they are."""

import pytest
from finished_arms import report_of, write_arm

from gated_attention.report.study.beside_the_paper import rows_table
from gated_attention.study.comparison import compare_variants
from gated_attention.study.record import find_results


def write_two_rates(runs):
    """A gate and its baseline at two learning rates, the second the double of the first."""
    study = runs / "rates"
    for name, loss, rate, cites in (
        ("baseline-lr-8", 2.3, 0.008, ("T2.6", "T2.12")),
        ("sdpa-elementwise-lr-8", 1.8, 0.008, ("T2.10", "T2.14")),
        ("baseline", 2.0, 0.004, ("T2.5",)),
        ("sdpa-elementwise", 2.1, 0.004, ("T2.8",)),
    ):
        config = {"train": {"steps": 100, "learning_rate": rate}, "study_learning_rate": 0.004}
        write_arm(study, name, 0, loss, cites=cites, config=config)
    return study


def test_rows_are_compared_with_the_papers_baseline_of_their_learning_rate(tmp_path):
    study = write_two_rates(tmp_path / "runs")
    table = rows_table(compare_variants(find_results(study)), 2)
    found = {row[1].text: [cell.text for cell in row] for row in table.rows}
    assert found["T2.8"][2:] == ["7.288", "8.166", "-0.0181", "+0.1000", "opposite"]
    assert found["T2.10"][4:] == ["-0.2274", "-0.5000", "same"]
    assert found["T2.14"][4:] == ["-", "-0.5000", "-"]  # its baseline diverged in the paper
    assert found["T2.5"][4:] == ["-", "-", "-"]
    (line,) = [line for line in report_of(study).splitlines() if "T2.10: SDPA elementwise" in line]
    assert "| -0.2274 | -0.5000 |" in line


def test_a_study_of_several_learning_rates_says_so(tmp_path):
    text = report_of(write_two_rates(tmp_path / "runs"))
    assert "One learning rate for each variant, a given multiple of the study's" in text
    assert "--learning-rate 0.004" in text  # variants multiply it again
    assert "--learning-rate 0.008" not in text


@pytest.mark.parametrize(
    ("width", "total", "words"),
    [
        (768, 1_002_000, "the table says and by up to 0.20 % in parameters;"),
        (700, 1_002_000, "the table says, the FFN narrowed so that parameter counts agree within 0.20 %;"),
        (768, 1_000_000, "the table says; parameter counts are equal;"),
        (768, 1_200_000, "the table says and by up to 20.0 % in parameters;"),
    ],
)
def test_parameters_are_called_matched_only_where_they_are(tmp_path, width, total, words):
    study = tmp_path / "runs" / "demo"
    for name, size, count in (("baseline", 768, 1_000_000), ("gate", width, total)):
        config = {"size": {"name": "moe-tiny", "intermediate_size": size}, "parameters": {"total": count}}
        write_arm(study, name, 0, config=config)
    assert words in report_of(study)
