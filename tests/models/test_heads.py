"""Classification, token classification and question answering: the heads of transformers on gated decoders."""

import json

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gated_attention.models import (
    GatedQwen3Config,
    GatedQwen3ForCausalLM,
    GatedQwen3Model,
    GatedQwen3MoeConfig,
    GatedQwen3MoeForCausalLM,
    GatedQwen3MoeModel,
)
from gated_attention.spec import GateSpec

WIDTHS = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
    "gates": GateSpec(granularity="headwise"),
}  # fmt: skip
CONFIGS = {
    "dense": GatedQwen3Config(**WIDTHS),
    "moe": GatedQwen3MoeConfig(**WIDTHS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
LANGUAGE_MODELS = {"dense": GatedQwen3ForCausalLM, "moe": GatedQwen3MoeForCausalLM}
DECODERS = {"dense": GatedQwen3Model, "moe": GatedQwen3MoeModel}
IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
ANSWER = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 8])}
HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}, "logits", (2, 3)),
    "token": (AutoModelForTokenClassification, {"labels": IDS % 3}, "logits", (2, 9, 3)),
    "answer": (AutoModelForQuestionAnswering, ANSWER, "start_logits", (2, 9)),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_takes_a_language_model_and_learns(kind, head, tmp_path):
    auto, labels, scores, shape = HEADS[head]
    LANGUAGE_MODELS[kind](CONFIGS[kind]).save_pretrained(tmp_path / "lm")
    model, found = auto.from_pretrained(tmp_path / "lm", output_loading_info=True)
    decoder = model.get_submodule(model.base_model_prefix)
    assert type(decoder) is DECODERS[kind]
    assert not any(name.startswith(model.base_model_prefix) for name in found["missing_keys"])
    output = model(IDS, **labels)
    assert output[scores].shape == shape
    output.loss.backward()
    assert decoder.layers[0].self_attn.g_proj.weight.grad.any()
    model.save_pretrained(tmp_path / "head")
    assert "auto_map" not in json.loads((tmp_path / "head" / "config.json").read_text())
    again = auto.from_pretrained(tmp_path / "head").eval()
    assert again(IDS)[scores].equal(model.eval()(IDS)[scores])
