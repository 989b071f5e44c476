"""Stock architectures out: logits stay, the way back is exact to the bit, and the rest is refused."""

import json

import pytest
import torch
from checkpoints import (
    EXPERTS,
    STOCK,
    assert_same_model,
    distance,
    logits,
    random_model,
    read_config,
    save,
    sizes,
    weights,
    write_release,
)
from safetensors.torch import load_file, save_file

from gated_attention.models import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.models.convert import convert
from gated_attention.spec import GateSpec

GROUPS = pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
TARGETS = pytest.mark.parametrize("to", STOCK)
EXPORTS = ["qwen3_next", "qwen3_5", "llama_cpp"]

ROUNDING = 5e-6  # some units in the last place of logits up to 4: the products of CPUs differ


@GROUPS
@TARGETS
def test_stock_checkpoints_go_back(to, num_kv_heads, tmp_path):
    source = save(STOCK[to](num_kv_heads), tmp_path / "source")
    convert(source, tmp_path / "gated")
    convert(tmp_path / "gated", tmp_path / "back", to)
    assert distance(logits(tmp_path / "back"), logits(source)) <= ROUNDING
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_model(tmp_path / "gated", tmp_path / "again")


@GROUPS
@TARGETS
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("moe", [False, True])
def test_export_keeps_logits_and_comes_back(to, granularity, moe, num_kv_heads, tmp_path):
    gate = GateSpec(granularity=granularity)
    values = sizes(num_kv_heads) | (EXPERTS if moe else {})
    source = save((GatedQwen3MoeConfig if moe else GatedQwen3Config)(**values, gates=gate), tmp_path / "source")
    convert(source, tmp_path / "out", to)
    allowed = ROUNDING if granularity == "elementwise" and not moe else 2e-5
    assert distance(logits(tmp_path / "out"), logits(source)) <= allowed
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(source, tmp_path / "back")


@GROUPS
@TARGETS
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@torch.no_grad()
def test_the_release_becomes_a_stock_architecture(granularity, to, num_kv_heads, tmp_path):
    write_release(tmp_path / "release", granularity, num_kv_heads)
    convert(tmp_path / "release", tmp_path / "gated")
    convert(tmp_path / "release", tmp_path / "out", to)
    allowed = ROUNDING if granularity == "elementwise" else 1e-5
    assert distance(logits(tmp_path / "out"), logits(tmp_path / "gated")) <= allowed
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(tmp_path / "gated", tmp_path / "back")


@TARGETS
@pytest.mark.parametrize("moe", [False, True])
def test_bfloat16_round_trip_is_bit_identical(to, moe, tmp_path):
    own, experts = (GatedQwen3MoeConfig, EXPERTS) if moe else (GatedQwen3Config, {})
    model = random_model(own(**sizes(), **experts, gates=GateSpec(dtype="model"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", to)
    assert done.widened > 0
    assert distance(logits(tmp_path / "out"), logits(tmp_path / "source")) <= (1e-5 if moe else ROUNDING)
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(tmp_path / "source", tmp_path / "back")


@TARGETS
def test_tied_heads_and_yarn_are_carried(to, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4}
    values = sizes() | {"tie_word_embeddings": True, "rope_parameters": yarn}
    source = save(GatedQwen3Config(**values, gates=GateSpec()), tmp_path / "source")
    convert(source, tmp_path / "out", to)
    has_head = to == "qwen3_next"  # vLLM never ties it
    assert ("lm_head.weight" in weights(tmp_path / "out")) == has_head
    assert read_config(tmp_path / "out")["tie_word_embeddings"] != has_head
    assert distance(logits(tmp_path / "out"), logits(source)) <= 1e-5
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(source, tmp_path / "back")


@pytest.mark.parametrize("to", EXPORTS)
def test_servers_read_what_transformers_moved(to, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec()), tmp_path / "source")
    convert(source, tmp_path / "out", to)
    config = read_config(tmp_path / "out")
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (10000.0, 1.0)
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config.get("full_attention_interval") == (None if to == "llama_cpp" else 1)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_channel_turns_by_an_axis_that_llama_cpp_gives_a_position(head_dim, tmp_path):
    source = save(GatedQwen3Config(**sizes() | {"head_dim": head_dim}, gates=GateSpec()), tmp_path / "source")
    convert(source, tmp_path / "out", "llama_cpp")
    sections = read_config(tmp_path / "out")["rope_parameters"]["mrope_section"]
    assert sum(sections) == head_dim // 2
    assert all(channel < 3 * sections[channel % 3] for channel in range(head_dim // 2))  # ggml's interleaved rotation


def test_qwen3_next_has_one_expert_where_the_model_is_dense(tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec(granularity="headwise")), tmp_path / "source")
    convert(source, tmp_path / "out", "qwen3_next")
    config, held = read_config(tmp_path / "out"), weights(tmp_path / "out")
    assert (config["num_experts"], config["num_experts_per_tok"], config["mlp_only_layers"]) == (1, 1, [])
    assert not held["model.layers.0.mlp.gate.weight"].any()
    assert held["model.layers.0.mlp.shared_expert.down_proj.weight"].shape == (32, 1)
    up = weights(source)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(held["model.layers.1.mlp.experts.0.up_proj.weight"], up)
    assert distance(logits(tmp_path / "out"), logits(source)) <= 2e-5


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("moe", [False, True])
def test_llama_cpp_gets_an_idle_layer_of_linear_attention(moe, granularity, tmp_path):
    own, experts = (GatedQwen3MoeConfig, EXPERTS) if moe else (GatedQwen3Config, {})
    values = sizes() | experts | {"tie_word_embeddings": True}
    source = save(own(**values, gates=GateSpec(granularity=granularity)), tmp_path / "source")
    convert(source, tmp_path / "out", "llama_cpp")
    config = read_config(tmp_path / "out")
    assert config["layer_types"] == ["full_attention", "full_attention", "linear_attention"]
    assert (config["linear_num_key_heads"], config["linear_value_head_dim"]) == (1, 128)
    idle = [tensor for name, tensor in weights(tmp_path / "out").items() if name.startswith("model.layers.2.")]
    assert len(idle) > 10
    assert not any(tensor.any() for tensor in idle)
    assert distance(logits(tmp_path / "out"), logits(source)) <= 2e-5
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(source, tmp_path / "back")
    path = next((tmp_path / "out").glob("*.safetensors"))
    name = "model.layers.2.linear_attn.out_proj.weight"
    save_file(load_file(path) | {name: torch.ones(32, 128)}, path)
    with pytest.raises(ValueError, match=f"tensor {name} of .* is not zero"):
        convert(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("num_tokens", "merges", "warned"),
    [(257, [], "no tokenizer without merges"), (300, ["a b"], "docs/checkpoints.md"), (50_000, ["a b"], "")],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_named(num_tokens, merges, warned, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec()), tmp_path / "source")
    model = {"type": "BPE", "vocab": {str(index): index for index in range(num_tokens)}, "merges": merges}
    (source / "tokenizer.json").write_text(json.dumps({"model": model}))
    warnings = convert(source, tmp_path / "out", "llama_cpp").warnings
    assert len(warnings) == bool(warned)
    assert all(warned in warning for warning in warnings)
    assert convert(source, tmp_path / "served", "qwen3_5").warnings == ()


def test_the_folder_says_what_it_is(tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec(granularity="headwise")), tmp_path / "source")
    card = source / "README.md"
    measured = "## Measures\n\n| | |\n|---|---|\n| Loss | 3.1 |\n"
    card.write_text(
        card.read_text().replace("tags:", "license: apache-2.0\ntags:").replace("## Loading", f"{measured}\n## Loading")
    )
    convert(source, tmp_path / "served", "qwen3_next")
    config, text = read_config(tmp_path / "served"), (tmp_path / "served" / "README.md").read_text()
    assert (config["model_type"], config["architectures"]) == ("qwen3_next", ["Qwen3NextForCausalLM"])
    assert config["attn_output_gate"] is True
    assert "license: apache-2.0" in text
    assert "- qwen3_next\n" in text
    assert "- gated_qwen3\n" not in text
    assert "G1 sdpa headwise sigmoid" in text
    assert "import gated_attention" not in text
    assert 'from_pretrained("served")' in text
    assert text.count(measured) == 1
    assert f"| Parameters | {sum(tensor.numel() for tensor in weights(tmp_path / 'served').values()):,} |" in text
    assert text.count("## Model\n") == text.count("## Citation\n") == 1


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        (GateSpec("value"), "exactly one gate, G1"),
        ((GateSpec(), GateSpec("value")), "exactly one gate, G1"),
        ((), "no gate"),
        (GateSpec(activation="silu"), "activation='silu'"),
        (GateSpec(combine="add"), "combine='add'"),
        (GateSpec(scale=2.0), "scale=2.0"),
        (GateSpec(head_shared=True), "head_shared=True"),
        (GateSpec(bias=0.0), "bias=0.0"),
        (GateSpec(input_dim=4), "input_dim=4"),
        (GateSpec(input="parameter"), "input='parameter'"),
        (GateSpec(granularity="headwise", input="lse"), "input='lse'"),
    ],
)
@TARGETS
def test_gates_that_stock_classes_cannot_express_are_refused(to, gate, field, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=gate), tmp_path / "source")
    with pytest.raises(ValueError, match=f"{field}.*--to gated"):
        convert(source, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"sandwich_norm": True}, "sandwich_norm"),
        ({"output_clip": 3.0}, "output_clip"),
        ({"sdpa_transform": "silu"}, "sdpa_transform"),
        ({"switch": {"maps": "value"}}, "switch"),
        ({"attention_bias": True}, "the gate a bias"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window=8"),
    ],
)
@TARGETS
def test_blocks_that_stock_classes_cannot_express_are_refused(to, block, field, tmp_path):
    source = save(GatedQwen3Config(**sizes(), gates=GateSpec(), **block), tmp_path / "source")
    with pytest.raises(ValueError, match=f"{field}.*--to gated"):
        convert(source, tmp_path / "out", to)


@pytest.mark.parametrize("experts", [{"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}])
def test_experts_that_only_qwen3_next_can_express(experts, tmp_path):
    source = save(GatedQwen3MoeConfig(**sizes(), **EXPERTS | experts, gates=GateSpec()), tmp_path / "source")
    with pytest.raises(ValueError, match=f"{next(iter(experts))}.*--to qwen3_next"):
        convert(source, tmp_path / "out", "qwen3_5")
    convert(source, tmp_path / "out", "qwen3_next")
    assert distance(logits(tmp_path / "out"), logits(source)) <= 1e-5
    convert(tmp_path / "out", tmp_path / "back")
    assert_same_model(source, tmp_path / "back")
