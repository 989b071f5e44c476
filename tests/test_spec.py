"""Gates as data: what is refused, shapes and costs of the paper's rows, and the way to JSON and back."""

import json
import subprocess
import sys

import pytest

from gated_attention.spec import (
    SITE_LABELS,
    SITES,
    AttentionGeometry,
    GateSpec,
    as_gates,
    check_qk_norm,
)

MOE = AttentionGeometry(hidden_size=2048, num_heads=32, num_kv_heads=4, head_dim=128)  # Table 7, 24 layers
MOE_LAYERS = 24


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 160
    return message


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({"site": "mlp"}, "choose from sdpa, value, key, query, output"),
        ({"granularity": "tokenwise"}, "choose from headwise, elementwise"),
        ({"combine": "concat"}, "choose from multiply, add"),
        ({"activation": "tanh"}, "choose from sigmoid, silu, identity, ns_sigmoid, hard_sigmoid, softplus"),
        ({"input": "query"}, "choose from hidden_state, parameter"),
        ({"init": "ones"}, "choose from normal, zeros"),
        ({"dtype": "bfloat16"}, "choose from float32, model"),
        ({"site": "output", "granularity": "headwise"}, "use granularity='elementwise'"),
        ({"site": "output", "head_shared": True}, "use head_shared=False"),
        ({"granularity": "headwise", "head_shared": True}, "use 'elementwise'"),
        ({"input": "parameter", "input_dim": 8}, "leave input_dim and bias at None"),
        ({"input": "parameter", "bias": 0.0}, "leave input_dim and bias at None"),
        ({"input_dim": 0}, "gate input_dim is 0; it must be at least 1"),
        ({"input_dim": -4}, "gate input_dim is -4; it must be at least 1"),
        ({"scale": 0.0}, "finite and not zero"),
        ({"scale": float("inf")}, "finite and not zero"),
        ({"bias": float("nan")}, "gate bias is nan; it must be finite"),
    ],
)
def test_contradictions_are_refused_in_one_line_that_names_the_cure(fields, cure):
    with pytest.raises(ValueError, match=r"gate|head_shared|input") as error:
        GateSpec(**fields)
    assert cure in one_line(error)


@pytest.mark.parametrize("field", ["hidden_size", "num_heads", "num_kv_heads", "head_dim"])
def test_geometry_refuses_widths_below_one(field):
    widths = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, field: 0}
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        AttentionGeometry(**widths)


def test_geometry_refuses_unequal_groups():
    with pytest.raises(ValueError, match="num_heads 6 is not a multiple of num_kv_heads 4") as error:
        AttentionGeometry(48, 6, 4, 8)
    one_line(error)


def test_geometry_fills_in_what_one_head_layout_implies():
    assert AttentionGeometry.of(48, 6) == AttentionGeometry(48, 6, 6, 8)
    assert AttentionGeometry.of(48, 6, 2, 16) == AttentionGeometry(48, 6, 2, 16)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((50, 8), "hidden_size 50 is not a multiple of num_heads 8; give head_dim"),
        ((64, 0), "num_heads is 0"),
        ((64, 8, 0), "num_kv_heads is 0"),
        ((64, 8, 4, 0), "head_dim is 0"),
    ],
)
def test_geometry_does_not_take_zero_for_unset(widths, message):
    with pytest.raises(ValueError, match=message) as error:
        AttentionGeometry.of(*widths)
    one_line(error)


@pytest.mark.parametrize(
    ("row", "gate", "score_shape", "added_millions", "tolerance"),
    [  # Table 1: score shape without its token axis, added parameters over 24 layers
        (5, GateSpec(), (32, 128), 201, 1),
        (6, GateSpec("value"), (4, 128), 25, 1),
        (7, GateSpec("key"), (4, 128), 25, 1),
        (8, GateSpec("query"), (32, 128), 201, 1),
        (9, GateSpec("output"), (1, 2048), 100, 1),
        (10, GateSpec(granularity="headwise"), (32, 1), 1.6, 0.05),
        (11, GateSpec("value", "headwise"), (4, 1), 0.2, 0.05),
        (12, GateSpec(head_shared=True), (1, 128), 201, 1),
        (13, GateSpec("value", head_shared=True), (1, 128), 25, 1),
        (14, GateSpec(combine="add", activation="silu"), (32, 128), 201, 1),
        (15, GateSpec(activation="silu"), (32, 128), 201, 1),
    ],
)
def test_shapes_and_costs_are_those_of_table_1(row, gate, score_shape, added_millions, tolerance):
    assert gate.score_shape(MOE) == score_shape
    assert MOE_LAYERS * gate.num_parameters(MOE) / 1e6 == pytest.approx(added_millions, abs=tolerance)


def test_a_shared_gate_averages_scores_of_a_full_projection():
    shared, specific = GateSpec(head_shared=True), GateSpec()
    assert shared.logit_shape(MOE) == specific.logit_shape(MOE) == (32, 128)
    assert shared.num_parameters(MOE) == specific.num_parameters(MOE) == 32 * 128 * 2048


@pytest.mark.parametrize(
    ("gate", "num_parameters"),
    [
        (GateSpec(granularity="headwise", input_dim=12), 32 * 12),
        (GateSpec(granularity="headwise", bias=1.0), 32 * 2048 + 32),
        (GateSpec(bias=0.0), 32 * 128 * 2049),
        (GateSpec(input="parameter"), 32 * 128),
        (GateSpec("value", "headwise", input="parameter"), 4),
    ],
)
def test_costs_of_narrow_biased_and_input_independent_gates(gate, num_parameters):
    assert gate.num_parameters(MOE) == num_parameters


def test_a_gate_cannot_read_more_channels_than_there_are():
    assert GateSpec(input_dim=2048).in_features(MOE) == 2048
    with pytest.raises(ValueError, match="input_dim 2049 exceeds hidden_size 2048; use at most that, or None") as error:
        GateSpec(input_dim=2049).num_parameters(MOE)
    one_line(error)


@pytest.mark.parametrize(
    "gate",
    [
        GateSpec(),
        GateSpec("value", "headwise", activation="hard_sigmoid", input_dim=12, init="zeros", bias=-1.5, scale=2.0),
        GateSpec("query", head_shared=True, combine="add", activation="identity", dtype="model"),
        GateSpec(input="parameter", init="zeros"),
    ],
)
def test_a_gate_survives_json(gate):
    stored = json.loads(json.dumps(gate.to_dict()))
    assert len(stored) == 11  # defaults too: a stored gate keeps its meaning when a default changes
    assert GateSpec.from_dict(stored) == gate


def test_from_dict_fills_in_defaults_and_refuses_unknown_fields():
    assert GateSpec.from_dict({"granularity": "headwise"}) == GateSpec(granularity="headwise")
    with pytest.raises(ValueError, match="unknown gate field 'granularty'; choose from site, granularity") as error:
        GateSpec.from_dict({"granularty": "headwise"})
    one_line(error)


def test_as_gates_takes_what_callers_write():
    headwise = GateSpec(granularity="headwise")
    assert as_gates(None) == as_gates(()) == ()
    assert as_gates(headwise) == as_gates([headwise]) == as_gates({"granularity": "headwise"}) == (headwise,)
    assert as_gates(iter([headwise])) == (headwise,)


def test_as_gates_puts_gates_in_site_order():
    gates = [GateSpec(site) for site in ("output", "key", "sdpa", "query")]
    assert [gate.site for gate in as_gates([*gates, {"site": "value"}])] == list(SITES)


def test_as_gates_refuses_two_gates_at_one_site():
    with pytest.raises(ValueError, match=r"two gates at site 'value'; .* at most one gate per site") as error:
        as_gates([GateSpec("value"), GateSpec(), GateSpec("value", "headwise")])
    one_line(error)


@pytest.mark.parametrize("gates", [["sdpa"], [None], "sdpa", 3])
def test_as_gates_refuses_what_is_not_a_gate(gates):
    with pytest.raises(ValueError, match=r"not a gate; pass GateSpec\(...\)") as error:
        as_gates(gates)
    one_line(error)


@pytest.mark.parametrize("site", ["query", "key"])
def test_a_factor_that_the_qk_norm_divides_out_is_refused(site):
    with pytest.raises(
        ValueError, match=f"headwise {site} gate is divided out .* use granularity='elementwise'"
    ) as error:
        check_qk_norm([GateSpec(), GateSpec(site, "headwise")])
    one_line(error)


def test_gates_that_the_qk_norm_keeps_are_allowed():
    check_qk_norm([GateSpec("query"), GateSpec("key", head_shared=True)])
    check_qk_norm([GateSpec("query", "headwise", combine="add"), GateSpec("value", "headwise"), GateSpec()])


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (GateSpec(), "G1 sdpa elementwise sigmoid"),
        (GateSpec("value", head_shared=True), "G2 value head-shared sigmoid"),
        (GateSpec(combine="add", activation="silu"), "G1 sdpa elementwise additive silu"),
        (GateSpec(granularity="headwise", init="zeros", scale=2.0), "G1 sdpa headwise 2*sigmoid zero init"),
        (GateSpec(input="parameter"), "G1 sdpa elementwise sigmoid input-independent"),
        (GateSpec("output", input_dim=12, bias=-1.5), "G5 output elementwise sigmoid reads 12 channels bias -1.5"),
        (GateSpec("query", dtype="model"), "G4 query elementwise sigmoid scores in model dtype"),
    ],
)
def test_a_gate_describes_what_is_special_about_it(gate, words):
    assert gate.describe() == words


def test_sites_carry_the_papers_labels():
    assert [GateSpec(site).label for site in SITES] == list(SITE_LABELS.values()) == ["G1", "G2", "G3", "G4", "G5"]


@pytest.mark.parametrize("module", ["gated_attention", "gated_attention.spec", "gated_attention.sizes"])
def test_data_opens_without_torch_or_transformers(module):
    check = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
