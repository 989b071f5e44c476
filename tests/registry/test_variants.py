"""The registry: every row of the paper, its cost, and how it is shown."""

import json
import subprocess
import sys

import pytest

from gated_attention.cli import main
from gated_attention.registry.published import ROWS
from gated_attention.registry.variants import TABLES, VARIANTS, get_variant, variants_of
from gated_attention.report import catalogue
from gated_attention.sizes import get_size

CITED = [key for variant in VARIANTS.values() for key in variant.cites]


def test_every_row_of_the_papers_tables_is_one_variant():
    for table in (1, 2, 3, 4, 6):
        rows = {key for key, row in ROWS.items() if row.table == table}
        assert {key for key in CITED if key.startswith(f"T{table}.")} == rows
    assert len(CITED) - CITED.count("A.6") == len({key for key in CITED if key != "A.6"})
    assert TABLES == [1, 2, 3, 4, 6]
    assert CITED.count("A.6") == 2  # clipped at 300 and at 100


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.table == 1])
def test_added_parameters_are_those_of_table_1(key):
    (variant,) = (variant for variant in VARIANTS.values() if key in variant.cites)
    added = catalogue.added_parameters(variant, get_size("15a2b")) / 1e6
    printed = ROWS[key].added_parameters_m
    if key == "T1.4":
        assert round(added) == 453
        assert "453M" in ROWS[key].note
        return
    headwise = variant.block.gates and variant.block.gates[0].granularity == "headwise"
    assert abs(added - printed) <= (0.05 if headwise else 1.0)


def test_rows_of_one_table_come_in_its_order():
    assert [variant.name for variant in variants_of(6)] == [
        "switch-kv-8-top-8", "switch-kv-4-top-4", "switch-v-4-top-4", "switch-v-8-top-2", "value-headwise",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no variant is a row of table 5; choose from 1, 2, 3, 4, 6"):
        variants_of(5)


def test_table_2_keeps_the_ratios_of_its_learning_rates():
    for variant in variants_of(2):
        rates = {ROWS[key].max_learning_rate for key in variant.cites if key.startswith("T2.")}
        assert [*rates] == pytest.approx([4e-3 * float(variant.learning_rate)])


def test_a_dense_size_is_matched_and_a_mixture_is_not():
    variant = get_variant("sdpa-elementwise")
    assert variant.resize(get_size("s")).intermediate_size < get_size("s").intermediate_size
    assert variant.resize(get_size("moe-s")) == get_size("moe-s")
    wider = get_variant("query-heads-x1.5").resize(get_size("s"))
    assert (wider.num_attention_heads, wider.intermediate_size) == (9, get_size("s").intermediate_size)


def test_experts_are_rounded_up():
    assert get_variant("experts-x1.03").resize(get_size("15a2b")).num_experts == 132
    assert get_variant("experts-x1.03").resize(get_size("moe-tiny")).num_experts == 17


def test_the_list_names_every_variant_and_marks_what_disagrees(capsys):
    with pytest.raises(SystemExit):
        main(["variants"])
    out = capsys.readouterr().out
    assert all(name in out for name in VARIANTS)
    assert "400 *" in out
    assert "453M if calculated from Table 7" in out
    assert "T1.5 is Table 1, row 5 of arXiv 2505.06708" in out
    assert "T1.12: not stated whether heads are averaged before or after the sigmoid" in out


def test_the_list_as_json(capsys):
    with pytest.raises(SystemExit):
        main(["variants", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == VARIANTS.keys()
    assert rows["sdpa-headwise"]["added_parameters"] == 24 * 2048 * 32
    assert rows["learned-sink"]["block"]["gates"][0]["input"] == "lse"


def test_one_variant_at_a_size(capsys):
    with pytest.raises(SystemExit):
        main(["variants", "sdpa-elementwise", "--size", "1.7b-28l"])
    out = capsys.readouterr().out
    assert "FFN 5504" in out
    assert "1,728,177,152" in out
    assert "FFN narrowed from 6144, to a multiple of 128; residue +0.427 %" in out
    assert "G1: 16 x 128 scores per token, 4,194,304 parameters per layer" in out
    with pytest.raises(SystemExit):
        main(["variants", "sdpa-elementwise", "--json"])
    assert json.loads(capsys.readouterr().out)["residue"] == 0.0


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("baseline", "tiny", "FFN as the baseline's, in multiples of 1; residue +0.000 %"),
        ("sdpa-elementwise-lr-8", "tiny", "peak learning rate 0.008"),
        ("kv-heads-x2", "moe-s", "parameters are added; residue +1.830 %"),
        ("experts-x1.03", "moe-tiny", "FFN 48 in each of 17 experts, 4 per token"),
    ],
)
def test_a_size_resolves_to_what_is_trained(name, size, said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["variants", name, "--size", size])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(0, "0"), (768, "0.0008"), (9_216, "0.009"), (98_304, "0.10"), (1_572_864, "1.57"), (201_326_592, "201")],
)
def test_small_costs_are_not_rounded_to_nothing(parameters, text):
    assert catalogue.millions(parameters) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "s"], "--size s is for one variant; name it, e.g. variants baseline --size s"),
        (["nothing"], "unknown variant 'nothing'"),
        (["baseline", "--size", "huge"], "unknown size 'huge'"),
        (["experts-x1.03"], "adds experts, and size 'tiny' has none; choose a mixture of experts, such as moe-tiny"),
    ],
)
def test_what_is_unknown_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["variants", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_registry_is_shown_without_torch():
    code = (
        "import sys; from gated_attention.report import catalogue_terminal as d; d.print_registry();"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
