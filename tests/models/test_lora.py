"""LoRA through PEFT on the query projection and on the gate, and checkpoints in several files."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from gated_attention.analysis import inspect_model
from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM, GatedQwen3MoeConfig
from gated_attention.models.build import build_model
from gated_attention.spec import GateSpec

# PEFT asks for a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WIDTHS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
TARGETS = [["q_proj"], ["g_proj"], ["q_proj", "g_proj"]]
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def make_model(granularity="headwise", **experts):
    kind = GatedQwen3MoeConfig if experts else GatedQwen3Config
    return build_model(kind(**WIDTHS, **experts, gates=GateSpec(granularity=granularity)), seed=0)


def train(model, tokens, steps=12):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_adapters_train_alone_save_load_and_merge(targets, granularity, tmp_path):
    tokens = torch.randint(50, (4, 12))
    model = get_peft_model(make_model(granularity), LoraConfig(target_modules=targets, **LORA))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == set(targets)  # g_proj is not the MLP's gate_proj
    with torch.no_grad():  # an adapter starts at zero
        assert torch.equal(model.eval()(tokens).logits, make_model(granularity).eval()(tokens).logits)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    losses = train(model, tokens)

    assert losses[-1] < losses[0] - 0.01
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}

    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(make_model(granularity), tmp_path / "adapter").eval()
        assert torch.equal(again(tokens).logits, logits)
        merged = model.merge_and_unload()
        assert type(merged) is GatedQwen3ForCausalLM
        torch.testing.assert_close(merged(tokens).logits, logits, atol=1e-5, rtol=0)  # W + B A rounds once more
        assert (logits - make_model(granularity)(tokens).logits).abs().max() > 0.1
        merged.save_pretrained(tmp_path / "merged")
        plain = GatedQwen3ForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(plain(tokens).logits, merged(tokens).logits)


def test_an_adapted_gate_stays_visible():
    model, tokens = make_model().eval(), torch.randint(50, (2, 9))
    expected = inspect_model(model, [tokens]).gates
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "g_proj"], **LORA))  # starts at zero
    found = inspect_model(adapted.base_model.model, [tokens]).gates
    assert found.keys() == expected.keys() == {"sdpa"}


def test_ranks_are_those_of_the_adapted_maps():
    tokens = torch.randint(50, (2, 9))
    targets = ["v_proj", "o_proj", "g_proj"]
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=targets, lora_dropout=0.5, **LORA)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = inspect_model(merged, [tokens], level="full").measures
    before = inspect_model(make_model(), [tokens], level="full").measures
    found = inspect_model(adapted.base_model.model, [tokens], level="full").measures
    for name in ("effective_rank", "effective_rank_gated"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
        assert not np.allclose(found[name], before[name], rtol=1e-2)
    assert all(module.training for module in adapted.modules())


def test_the_gate_of_a_mixture_of_experts_adapts():
    tokens = torch.randint(50, (4, 12))
    base = make_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = get_peft_model(base, LoraConfig(target_modules=["g_proj"], **LORA))
    losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.01


def test_an_adapter_for_one_gate_does_not_fit_another(tmp_path):
    get_peft_model(make_model("headwise"), LoraConfig(target_modules=["g_proj"], **LORA)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(make_model("elementwise"), tmp_path)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}])
def test_a_checkpoint_in_several_files_comes_back_whole(experts, tmp_path):
    model, tokens = make_model("elementwise", **experts), torch.randint(50, (2, 9))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}])
def test_without_targets_peft_adapts_what_it_adapts_in_qwen3(experts):
    model = get_peft_model(make_model(**experts), LoraConfig(r=4, task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["qwen3"])
