"""Quantisers of others on our models: gates are quantised as the projections beside them, and stay visible."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from gated_attention.analysis import inspect_model
from gated_attention.evaluate.quantization import linear_layers
from gated_attention.jobs.named_model import name_dtype
from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.models.build import build_model
from gated_attention.spec import GateSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantisers' own

WIDTHS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))


def eight_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def torchao_weights():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@torch.no_grad()
def rounded(model, quantised):
    """A plain copy whose linear layers hold the matrices that the quantised ones multiply by."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(quantised.get_submodule(name)(torch.eye(module.in_features)).T)
    return copied


# Largest error of logits whose standard deviation is 0.8: bitsandbytes' 8 bits round the activations too.
@pytest.mark.parametrize(("quantiser", "error"), [(eight_bits, 0.15), (four_bits, 1e-5), (torchao_weights, 1e-4)])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@torch.no_grad()
def test_a_gate_is_quantised_as_the_queries_are(granularity, quantiser, error, tmp_path):
    quantisation = quantiser()
    gates = GateSpec(granularity=granularity)
    plain = build_model(GatedQwen3Config(**WIDTHS, gates=gates), seed=0).eval()
    plain.save_pretrained(tmp_path / "plain")

    model = GatedQwen3ForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantisation, device_map="cpu", dtype=torch.float32
    )

    attention = model.model.layers[0].self_attn
    assert type(attention.g_proj) is type(attention.q_proj)
    assert type(attention.g_proj.weight) is type(attention.q_proj.weight) is not nn.Parameter
    reference = rounded(plain, model)
    assert not torch.equal(
        reference.model.layers[0].self_attn.g_proj.weight, plain.model.layers[0].self_attn.g_proj.weight
    )
    logits = model(IDS).logits
    torch.testing.assert_close(logits, reference(IDS).logits, atol=error, rtol=0)

    found, expected = (inspect_model(one, [IDS], level="full") for one in (model, reference))
    assert found.gates.keys() == {"sdpa"}
    assert found.unknown_gates == ()
    np.testing.assert_allclose(
        found.gates["sdpa"].by_layer("gate_mean"), expected.gates["sdpa"].by_layer("gate_mean"), atol=error
    )
    np.testing.assert_allclose(found.measures["effective_rank"], expected.measures["effective_rank"], rtol=1e-4)
    assert name_dtype(model) == f"float32, quantised by {model.config.quantization_config.quant_method.value}"
    with pytest.raises(ValueError, match="cannot be rounded; load the model unquantised"):
        linear_layers(model)

    model.save_pretrained(tmp_path / "quantised")
    again = GatedQwen3ForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize("quantiser", [eight_bits, four_bits])
def test_an_adapter_learns_over_a_quantised_gate(quantiser, tmp_path):
    peft = pytest.importorskip("peft")
    plain = build_model(GatedQwen3Config(**WIDTHS, gates=GateSpec(granularity="headwise")), seed=0)
    plain.save_pretrained(tmp_path)
    base = GatedQwen3ForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantiser(), device_map="cpu", dtype=torch.float32
    )
    adapted = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False),
        peft.LoraConfig(r=4, target_modules=["g_proj"], task_type="CAUSAL_LM"),
    ).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert inspect_model(adapted.base_model.model, [IDS]).gates.keys() == {"sdpa"}
