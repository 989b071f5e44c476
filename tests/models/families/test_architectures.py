"""Every architecture of the registry, built at a small size with the variants that it carries."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.build import build_model, count_of, parameter_account
from gated_attention.models.families.architectures import architecture_config
from gated_attention.models.families.layers import decoder_layers
from gated_attention.registry.architectures import ARCHITECTURES
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES, count_parameters
from gated_attention.spec import BlockSpec
from gated_attention.train.optimizer import make_optimizer, round_residual
from gated_attention.train.trainer import TrainConfig

SMALL = replace(SIZES["tiny"], num_hidden_layers=2, vocab_size=61, context=64)
OTHERS = [name for name in ARCHITECTURES if name != "qwen3"]
GATED = ("sdpa-elementwise", "sdpa-headwise", "value-elementwise", "key-elementwise", "output-elementwise")


def config_of(name, variant="baseline", size=SMALL, **overrides):
    architecture, chosen = ARCHITECTURES[name], VARIANTS[variant]
    architecture.check(chosen)
    return architecture_config(architecture, chosen.resize(architecture.fit(size)), chosen.block, **overrides)


@pytest.mark.parametrize("name", OTHERS)
def test_gates_narrow_the_ffn_so_that_parameters_agree(name):
    baseline = count_of(config_of(name))
    for variant in GATED:
        found = count_of(config_of(name, variant))
        fitted = ARCHITECTURES[name].fit(SMALL)
        gates = VARIANTS[variant].block.num_parameters(fitted.geometry) * SMALL.num_hidden_layers
        assert found.gates == gates
        assert (found.embeddings, found.attention, found.norms) == (
            baseline.embeddings, baseline.attention, baseline.norms,
        )  # fmt: skip
        channel = SMALL.num_hidden_layers * (fitted.ffn_matrices * SMALL.hidden_size + 1)
        assert abs(found.total - baseline.total) <= channel / 2 + gates * 0.005  # the nearest width; a bias per channel


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", ["tiny", "s"])
def test_a_size_costs_about_the_same_in_every_architecture(name, size):
    ours = count_parameters(SIZES[size]).total
    assert count_of(config_of(name, size=SIZES[size])).total == pytest.approx(ours, rel=0.13)


def test_counting_the_model_agrees_with_the_formula_of_our_own():
    for variant in ("baseline", "sdpa-value-elementwise", "heads-rms-norm", "switch-kv-4-top-4", "learned-sink"):
        chosen = VARIANTS[variant]
        assert count_of(config_of("qwen3", variant)) == count_parameters(chosen.resize(SMALL), chosen.block)
    moe = SIZES["moe-tiny"]
    assert count_of(config_of("qwen3", "sdpa-headwise", moe)) == count_parameters(moe, VARIANTS["sdpa-headwise"].block)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gated_model_pairs_with_the_baseline_trains_and_loads_by_auto_class(name, tmp_path):
    plain, gated = (build_model(config_of(name, variant), seed=3) for variant in ("baseline", "sdpa-headwise"))
    weights = gated.state_dict()
    shared = [key for key, value in plain.state_dict().items() if value.shape == weights[key].shape]
    assert any("embed" in key for key in shared)
    assert all(torch.equal(plain.state_dict()[key], weights[key]) for key in shared)
    ids = torch.arange(40).reshape(2, 20)
    loss = gated(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gates = [parameter for key, parameter in gated.named_parameters() if ".g_proj." in key]
    assert len(gates) == 2
    assert all(gate.grad.abs().sum() > 0 for gate in gates)
    assert gated.get_input_embeddings().weight.grad[0].abs().sum() > 0  # no row is kept at zero for padding
    for kind, model in (("plain", plain), ("gated", gated.eval())):
        model.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        assert type(again) is type(model)
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ARCHITECTURES[name].packs_documents])
def test_packed_documents_do_not_see_each_other(name):
    model = build_model(config_of(name, "sdpa-headwise"), seed=0).eval()
    ids = torch.arange(40).reshape(1, 40)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 15:]
    torch.testing.assert_close(packed, model(input_ids=ids[:, 15:], use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ARCHITECTURES[name].windows])
def test_windows_leave_out_what_lies_further_back(name):
    model = build_model(config_of(name), seed=0).eval()
    model.set_attn_implementation("eager")
    weights = model(input_ids=torch.zeros(1, 64, dtype=torch.int64), output_attentions=True).attentions
    windows = ARCHITECTURES[name].windows
    seen = [(layer[0, 0, -1] > 0).sum().item() for layer in weights]
    expected = [64 // windows.divisor] * 2
    assert seen == (expected if not windows.full_every else [expected[0], 64])


def test_the_layers_of_gemma_3_that_see_all():
    kinds = config_of("gemma3", size=replace(SMALL, num_hidden_layers=13)).layer_types
    assert [index for index, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11, 12]


@pytest.mark.parametrize("name", OTHERS)
def test_the_residual_stream_is_rounded_before_every_layer(name):
    model = build_model(config_of(name), seed=0)
    seen = []
    round_residual(model, torch.bfloat16)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    assert seen == [torch.bfloat16] * 2


def test_muon_leaves_learned_positions_to_adamw():
    model = build_model(config_of("opt", "sdpa-headwise"), seed=0)
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, optimizer="muon")
    optimizer = make_optimizer(model, config, torch.optim.AdamW, {})
    muon = {id(parameter) for group in optimizer.parts[0].param_groups for parameter in group["params"]}
    names = {key for key, parameter in model.named_parameters() if id(parameter) in muon}
    assert "model.decoder.embed_positions.weight" not in names
    assert any("g_proj" in key for key in names)
    assert any("fc1" in key for key in names)


def test_an_account_has_every_parameter_once():
    model = build_model(config_of("gpt_neox", "sdpa-elementwise"), seed=0)
    account = parameter_account(model)
    assert account.total == model.num_parameters()
    assert account.gates == BlockSpec(VARIANTS["sdpa-elementwise"].block.gates).num_parameters(
        ARCHITECTURES["gpt_neox"].fit(SMALL).geometry
    ) * 2  # fmt: skip
