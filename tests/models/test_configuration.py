"""The configuration: gates survive JSON and assignment, and what does not fit is refused in one line."""

import json

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3Model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.models.parallel import HEAD_SHARED
from gated_attention.sizes import get_size
from gated_attention.spec import SITES, BlockSpec, GateSpec

WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
GATES = (GateSpec(granularity="headwise", init="zeros", scale=2.0), GateSpec("value", bias=-1.0, input_dim=12))


def test_gates_are_specs_in_site_order_whatever_was_written():
    assert GatedQwen3Config(**WIDTHS).gates == ()
    assert GatedQwen3Config(**WIDTHS, gates=None).gates == ()
    assert GatedQwen3Config(**WIDTHS, gates=GateSpec()).gates == (GateSpec(),)
    assert GatedQwen3Config(**WIDTHS, gates={"granularity": "headwise"}).gates == (GateSpec(granularity="headwise"),)
    mixed = [GATES[1], GATES[0].to_dict()]
    assert GatedQwen3Config(**WIDTHS, gates=mixed).gates == GATES


def test_the_configuration_survives_a_file(tmp_path):
    config = GatedQwen3Config(**WIDTHS, gates=GATES, attention_bias=True)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "gated_qwen3"
    assert stored["gates"] == [gate.to_dict() for gate in GATES]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GatedQwen3Config
    assert loaded.gates == GATES
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_short_gates_in_a_file_are_filled_in(tmp_path):
    GatedQwen3Config(**WIDTHS).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**stored, "gates": [{"site": "value"}, {"granularity": "headwise"}]})
    )
    assert AutoConfig.from_pretrained(tmp_path).gates == (GateSpec(granularity="headwise"), GateSpec("value"))


def test_gates_can_be_given_while_loading_and_are_checked_there_too(tmp_path):
    GatedQwen3Config(**WIDTHS).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, gates=GATES[0]).gates == (GATES[0],)
    with pytest.raises(ValueError, match="'headwise' is not a gate"):
        AutoConfig.from_pretrained(tmp_path, gates="headwise")


def test_assigned_gates_are_checked():
    config = GatedQwen3Config(**WIDTHS)
    config.gates = [{"site": "output"}]
    assert config.gates == (GateSpec("output"),)
    with pytest.raises(ValueError, match="divided out by the QK-norm"):
        config.gates = GateSpec("key", "headwise")
    assert config.gates == (GateSpec("output"),)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([{"site": "sdpaa"}], "unknown gate site 'sdpaa'; choose from sdpa"),
        ([{"position": "sdpa"}], "unknown gate field 'position'; choose from site"),
        ([GateSpec(), GateSpec(granularity="headwise")], "two gates at site 'sdpa'"),
        (GateSpec("query", "headwise"), "headwise query gate is divided out by the QK-norm"),
        (GateSpec("key", "headwise"), "headwise key gate is divided out by the QK-norm"),
        (GateSpec(input_dim=33), "input_dim 33 exceeds hidden_size 32"),
        (True, "True is not a gate"),
    ],
)
def test_what_does_not_fit_is_refused(gates, message):
    with pytest.raises(ValueError, match=message) as error:
        GatedQwen3Config(**WIDTHS, gates=gates)
    assert "\n" not in str(error.value)


def test_a_size_becomes_a_configuration():
    size = get_size("s")
    config = make_config(size, BlockSpec(GATES), attn_implementation="eager", num_hidden_layers=3)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 512, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 128)
    assert (config.vocab_size, config.max_position_embeddings) == (16_384, 1024)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.tie_word_embeddings
    assert config.gates == GATES
    assert config.geometry == size.geometry
    assert config._attn_implementation == "eager"


def test_two_configurations_do_not_share_their_gates():
    first, second = GatedQwen3Config(**WIDTHS, gates=GATES), GatedQwen3Config(**WIDTHS)
    assert first.gates == GATES
    assert second.gates == ()
    assert first != second


def test_the_auto_classes_know_the_models():
    config = AutoConfig.for_model("gated_qwen3", **WIDTHS, num_hidden_layers=1, vocab_size=8, gates=[{}])
    assert type(AutoModelForCausalLM.from_config(config)) is GatedQwen3ForCausalLM
    assert type(AutoModel.from_config(config)) is GatedQwen3Model


def test_gates_shard_with_the_heads_they_gate():
    plan = GatedQwen3Config(**WIDTHS, gates=[GateSpec(site) for site in SITES]).base_model_tp_plan
    names = {
        site: f"layers.*.self_attn.{name}g_proj" for site, name in zip(SITES, ("", "v_", "k_", "q_", "o_"), strict=True)
    }
    assert {site: plan.get(name) for site, name in names.items()} == {
        "sdpa": "colwise", "value": "colwise", "key": "colwise", "query": "colwise", "output": None,
    }  # fmt: skip
    assert plan["layers.*.self_attn.q_proj"] == "colwise"


def test_a_mean_over_heads_needs_the_gate_whole_on_every_rank():
    config = GatedQwen3Config(**WIDTHS, gates=GateSpec(head_shared=True))
    assert config.base_model_tp_plan["layers.*.self_attn.g_proj"] == HEAD_SHARED
    config.gates = GateSpec(granularity="headwise", input="lse")
    assert "layers.*.self_attn.g_proj" not in config.base_model_tp_plan


def test_every_configuration_has_an_auto_map_that_no_file_shows(tmp_path):
    config = GatedQwen3Config(gates=GateSpec())
    assert config.auto_map == {}  # what trl reads
    config.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert GatedQwen3Config.from_pretrained(tmp_path).auto_map == {}
