"""Small models of several families, in float64 so that measures can be held to 1e-9."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.spec import GateSpec

_SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 257, "max_position_embeddings": 32,
}  # fmt: skip

BUILD = {
    "gated": lambda: GatedQwen3ForCausalLM(GatedQwen3Config(**_SHAPE, gates=(GateSpec(granularity="headwise"),))),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=257, n_positions=32)),
}


def build(family):
    torch.manual_seed(0)
    model = BUILD[family]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from the initialisation that losses differ
            parameter.mul_(4) if parameter.ndim > 1 else None
    if family == "moe":
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model


@pytest.fixture(params=list(BUILD))
def model(request):
    return build(request.param)


@pytest.fixture
def gated():
    return build("gated")


@pytest.fixture
def naive_losses():
    """Loss of every token but the first of one sequence, by a softmax in float64, one prefix at a time."""

    def losses(model, ids):
        found = []
        for i in range(1, len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([list(ids[:i])]), use_cache=False).logits[0, -1].double()
            found.append(-(logits.softmax(-1)[ids[i]].log()).item())
        return found

    return losses
