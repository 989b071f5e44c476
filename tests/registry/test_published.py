"""The paper's tables: cells, structure, and that they open without torch."""

import subprocess
import sys
from collections import Counter

import pytest

from gated_attention.registry.published import ROWS, cite


def test_every_table_has_its_rows():
    assert Counter(row.table for row in ROWS.values()) == {1: 15, 2: 14, 3: 7, 4: 7, 5: 4, 6: 5}
    for table in range(1, 7):
        rows = [row.row for row in ROWS.values() if row.table == table]
        assert rows == list(range(1, len(rows) + 1))


def test_keys_are_the_rows_own_cites():
    assert all(key == row.cite for key, row in ROWS.items())


def test_baselines_are_rows_of_the_same_setting_without_a_baseline():
    for row in ROWS.values():
        if row.baseline is not None:
            assert cite(row.baseline).setting == row.setting
            assert cite(row.baseline).baseline is None
            assert cite(row.baseline).max_learning_rate == row.max_learning_rate


def test_cells_of_table_1():
    row = cite("T1.5")
    assert (row.method, row.activation, row.score_shape) == ("SDPA elementwise G1", "sigmoid", "n q d_k")
    assert (row.added_parameters_m, row.perplexity) == (201, 5.761)
    assert row.scores == {"HellaSwag": 74.64, "MMLU": 60.82, "GSM8k": 55.27, "C-eval": 62.20}
    assert cite("T1.10").added_parameters_m == 1.6


def test_cells_of_the_other_tables():
    assert cite("T2.9").scores["C-eval"] == 55.07
    assert cite("T2.14").max_learning_rate == 8.0e-3
    assert cite("T3.5").activation == "RMSNorm"
    assert cite("T5.4").scores == {"4k": 88.13, "8k": 80.01, "16k": 76.74, "32k": 72.88, "64k": 66.60, "128k": 58.82}
    assert cite("T6.1").added_parameters_m == 38
    sinks = cite("T4.2")
    assert (sinks.gate_score, sinks.m_act, sinks.f_attn, sinks.perplexity) == (0.116, 94, 0.048, 5.761)


def test_missing_cells_are_missing():
    diverged = cite("T2.12")
    assert diverged.perplexity is None
    assert not diverged.scores
    assert diverged.note == "diverged"
    assert list(cite("T5.1").scores) == ["4k", "8k", "16k", "32k"]
    assert cite("T4.1").gate_score is None


@pytest.mark.parametrize(("one", "other"), [("T1.5", "T3.2"), ("T1.5", "T4.2"), ("T1.14", "T3.4"), ("T1.11", "T6.5")])
def test_one_model_in_two_tables_has_one_perplexity(one, other):
    assert cite(one).perplexity == cite(other).perplexity
    assert cite(one).scores["MMLU"] == cite(other).scores["MMLU"]


@pytest.mark.parametrize(
    ("key", "column", "other"), [("T4.5", "GSM8k", "T1.6"), ("T4.7", "F-Attn", "Fig. 6"), ("T1.4", "added", "453M")]
)
def test_rows_that_the_paper_contradicts_say_so(key, column, other):
    assert column in cite(key).note
    assert other in cite(key).note


def test_table_6_notes_its_parameter_column():
    assert all(row.note for row in ROWS.values() if row.table == 6)
    assert "T1.11" in cite("T6.5").note


@pytest.mark.parametrize("key", ["T1.16", "T7", "T1.05", "t1.5", ""])
def test_an_unknown_cite_raises_one_line_with_the_choices(key):
    with pytest.raises(ValueError, match=r"T1\.1 to T1\.15") as caught:
        cite(key)
    assert "\n" not in str(caught.value)
    assert repr(key) in str(caught.value)


def test_rows_cannot_be_changed():
    with pytest.raises(TypeError):
        cite("T1.5").scores["MMLU"] = 100.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        cite("T1.5").perplexity = 1.0  # type: ignore[misc]


def test_the_tables_open_without_torch():
    program = (
        "import sys, gated_attention.registry.published; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
