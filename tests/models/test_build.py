import pytest
import torch

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec


def build(gates=(), seed=0):
    return build_model(make_config(SIZES["tiny"], BlockSpec(gates)), seed).state_dict()


def test_variants_of_one_seed_share_every_weight_they_have_in_common():
    plain, gated = build(), build(GateSpec("value", "headwise"))
    assert set(gated) - set(plain) == {f"model.layers.{i}.self_attn.v_g_proj.weight" for i in range(4)}
    assert all(torch.equal(plain[name], gated[name]) for name in plain)


def test_seeds_differ_and_repeat():
    first, again, other = build(seed=0), build(seed=0), build(seed=1)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_layers_start_from_different_weights():
    weights = build()
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_initialisation_is_the_specs():
    gates = (GateSpec(init="zeros", bias=1.5), GateSpec("query"))
    weights = build(gates)
    prefix = "model.layers.3.self_attn."
    assert not weights[prefix + "g_proj.weight"].any()
    assert (weights[prefix + "g_proj.bias"] == 1.5).all()
    assert abs(weights[prefix + "q_g_proj.weight"].std() - 0.02) < 0.001


def test_the_row_of_the_padding_token_is_zero_and_no_other():
    config = make_config(SIZES["tiny"], BlockSpec(), pad_token_id=3)
    weight = build_model(config, 0).state_dict()["model.embed_tokens.weight"]
    assert weight.any(-1).logical_not().nonzero().tolist() == [[3]]


def test_generators_of_other_devices_are_not_reseeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"GPUs were reseeded with {seed}"))
    build()


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(3), expected)
