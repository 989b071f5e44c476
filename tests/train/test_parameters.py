"""Weight decay acts on maps of what a module reads, in every variant, and on nothing else."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec
from gated_attention.train.parameters import decayed_names, parameter_groups
from gated_attention.train.trainer import TrainConfig

ATTENTION = {f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
DENSE = {f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}
MODULES = {"sdpa": "g_proj", "value": "v_g_proj", "key": "k_g_proj", "query": "q_g_proj", "output": "o_g_proj"}

CASES = [
    (size, name)
    for size in ("tiny", "moe-tiny")
    for name, variant in VARIANTS.items()
    if size == "moe-tiny" or not any(field == "num_experts" for field, _ in variant.widen)
]


def expected(size, block):
    gates = {f"self_attn.{MODULES[gate.site]}.weight" for gate in block.gates if gate.input == "hidden_state"}
    router = {"self_attn.switch_router.weight"} if block.switch else set()
    return ATTENTION | (EXPERTS if SIZES[size].num_experts else DENSE) | gates | router


@pytest.mark.parametrize(("size", "name"), CASES)
def test_what_decays_in_every_variant(size, name):
    variant = VARIANTS[name]
    shape = variant.resize(SIZES[size]) if variant.widen else SIZES[size]
    with torch.device("meta"):
        config = make_config(shape, variant.block, num_hidden_layers=1)
        model = AutoModelForCausalLM.from_config(config)
    found = decayed_names(model)
    outside = {name for name in found if "layers." not in name}
    assert outside == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {re.sub(r"^model\.layers\.0\.", "", name) for name in found - outside} == expected(size, variant.block)


def groups_of(block, **settings):
    model = build_model(make_config(SIZES["tiny"], block, num_hidden_layers=1), 0)
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1.0, weight_decay=0.1, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    found = {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}
    assert sorted(name for group in found.values() for name in group) == sorted(names.values())
    return found, {group["name"]: (group["weight_decay"], group["lr"]) for group in groups}


def test_groups_hold_every_parameter_once_and_gates_have_their_own_rate_and_decay():
    gate = "model.layers.0.self_attn.g_proj"
    found, settings = groups_of(BlockSpec(GateSpec(bias=0.0)), gate_learning_rate=0.5, gate_weight_decay=0.02)
    assert settings == {
        "decayed": (0.1, 1.0),
        "not decayed": (0.0, 1.0),
        "gates, decayed": (0.02, 0.5),
        "gates, not decayed": (0.0, 0.5),
    }
    assert (found["gates, decayed"], found["gates, not decayed"]) == ([f"{gate}.weight"], [f"{gate}.bias"])
    assert all(name.endswith("norm.weight") for name in found["not decayed"])


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (BlockSpec(GateSpec(input="parameter")), "g_proj.weight"),
        (BlockSpec(GateSpec(granularity="headwise", input="lse", bias=0.0)), "g_proj.bias"),
    ],
)
def test_a_gate_without_input_keeps_its_own_rate_and_never_decays(block, name):
    found, _ = groups_of(block, gate_learning_rate=0.5)
    assert "gates, decayed" not in found
    assert found["gates, not decayed"] == [f"model.layers.0.self_attn.{name}"]


def test_a_norm_of_a_matrix_of_scales_does_not_decay():
    found, _ = groups_of(BlockSpec(sdpa_transform="rms_norm"))
    assert "model.layers.0.self_attn.sdpa_norm.weight" in found["not decayed"]
