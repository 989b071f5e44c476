"""The gated mixture-of-experts model: Qwen3-MoE with the attention replaced and nothing else."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gated_attention.models import GatedQwen3MoeConfig, GatedQwen3MoeForCausalLM
from gated_attention.models.build import build_model
from gated_attention.spec import GateSpec

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 60,
    "initializer_range": 0.2,
}
GATES = (GateSpec(granularity="headwise"), GateSpec("value"))


@pytest.fixture
def ids():
    return torch.randint(0, 60, (2, 13))


@pytest.fixture
def model():
    return build_model(GatedQwen3MoeConfig(gates=GATES, **SMALL), 0).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dense_layers", [[], [1]])
def test_without_gates_logits_are_qwen3_moes_exactly(ids, attention, dense_layers):
    settings = SMALL | {"mlp_only_layers": dense_layers, "attn_implementation": attention}
    stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).eval()
    ours = GatedQwen3MoeForCausalLM(GatedQwen3MoeConfig(**settings)).eval()
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected, found = stock(ids, output_router_logits=True), ours(ids, output_router_logits=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.aux_loss, expected.aux_loss)


def test_experts_run_grouped_as_qwen3_moes_do(model, ids):
    assert (
        model.config._experts_implementation
        == Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL)).config._experts_implementation
    )
    with torch.no_grad():
        grouped = model(ids).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(ids).logits, grouped, atol=1e-5, rtol=1e-4)


def test_generation_with_the_cache_is_the_uncached_forward(model, ids):
    found = model.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for step in range(5):
            logits = model(found[:, : 13 + step], use_cache=False).logits[:, -1]
            assert torch.equal(logits.argmax(-1), found[:, 13 + step])


def test_checkpoints_hold_one_tensor_per_expert_and_round_trip(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.experts.5.down_proj.weight" in names
    assert "model.layers.1.self_attn.g_proj.weight" in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, GatedQwen3MoeForCausalLM)
    assert again.config.gates == GATES
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_gates_start_as_their_specs_say():
    gates = (GateSpec(init="zeros", bias=2.0), GateSpec("value", "headwise"))
    weights = GatedQwen3MoeForCausalLM(GatedQwen3MoeConfig(gates=gates, **SMALL)).state_dict()
    assert not weights["model.layers.1.self_attn.g_proj.weight"].any()
    assert (weights["model.layers.1.self_attn.g_proj.bias"] == 2.0).all()
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].std().item() == pytest.approx(0.2, rel=0.05)


def test_every_gate_receives_a_gradient(model, ids):
    model.train()(ids, labels=ids, output_router_logits=True).loss.backward()
    for name, parameter in model.named_parameters():
        if "g_proj" in name or "mlp.gate.weight" in name:
            assert parameter.grad.abs().sum() > 0, name


def test_defaults_are_the_papers_model():
    with torch.device("meta"):
        model = GatedQwen3MoeForCausalLM(GatedQwen3MoeConfig(gates=GateSpec()))
    gates = sum(p.numel() for name, p in model.named_parameters() if "g_proj" in name)
    assert gates == pytest.approx(201e6, abs=1e6)  # T1.5
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32 * 128, 2048)
    assert len(model.model.layers) == 24
