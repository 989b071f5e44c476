import numpy as np
import pytest
import torch

from gated_attention.analysis import expert_load
from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES


@pytest.fixture
def model():
    config = make_config(SIZES["moe-tiny"], num_hidden_layers=2, vocab_size=50, initializer_range=0.3)
    return build_model(config, 0)


def test_load_is_counted_over_all_blocks(model):
    blocks = [torch.randint(0, 50, (2, 30)), torch.randint(0, 50, (1, 30))]
    found = expert_load(model, blocks)
    assert not any(module._forward_hooks for module in model.modules())
    counts = np.zeros((2, 16), dtype=int)
    for block in blocks:
        with torch.no_grad():
            logits = model(block, output_router_logits=True).router_logits
        for layer, values in enumerate(logits):
            counts[layer] += values.topk(4).indices.flatten().bincount(minlength=16).numpy()
    assert (found.counts == counts).all()
    assert found.num_tokens == 90
    assert found.load.mean(1) == pytest.approx(1.0)
    assert model.training


def test_experts_that_no_token_reaches_are_dead(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # ties, which top-k breaks the same way for every token
    found = expert_load(model, [torch.randint(0, 50, (1, 20))])
    assert found.num_dead[1] == 12
    assert found.load[1].max() == pytest.approx(4.0)


def test_dense_models_have_no_load_and_no_text_is_refused(model):
    assert expert_load(build_model(make_config(SIZES["tiny"], num_hidden_layers=1), 0), []) is None
    with pytest.raises(ValueError, match="no text"):
        expert_load(model, [])
