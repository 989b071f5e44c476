"""Models that accelerate offloads to memory or disk and brings back layer by layer."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload

from gated_attention.analysis import inspect_model
from gated_attention.evaluate.loss import held_out_loss
from gated_attention.evaluate.quantization import linear_layers
from gated_attention.models import (
    GatedQwen3Config,
    GatedQwen3ForCausalLM,
    GatedQwen3MoeConfig,
    GatedQwen3MoeForCausalLM,
)
from gated_attention.spec import GateSpec, SwitchSpec

WIDTHS = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64,
}  # fmt: skip
SINK = GateSpec(granularity="headwise", input="lse", bias=0.5)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}  # a width that bfloat16 pads
MODELS = {
    "headwise": lambda: GatedQwen3ForCausalLM(GatedQwen3Config(**WIDTHS, gates=GateSpec(granularity="headwise"))),
    "sink": lambda: GatedQwen3ForCausalLM(GatedQwen3Config(**WIDTHS, gates=SINK)),
    "switch": lambda: GatedQwen3ForCausalLM(GatedQwen3Config(**WIDTHS, switch=SwitchSpec("key_value", 3, 2))),
    "moe": lambda: GatedQwen3MoeForCausalLM(GatedQwen3MoeConfig(**WIDTHS, **EXPERTS, gates=GateSpec())),
}
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_an_offloaded_model_computes_the_same(kind, where, autocast, tmp_path):
    model = MODELS[kind]().eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(IDS).logits
        if where == "disk":
            disk_offload(model, tmp_path, execution_device="cpu")
        else:
            cpu_offload(model, execution_device="cpu")
        assert next(model.model.layers.parameters()).is_meta
        assert model(IDS).logits.equal(expected)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_is_measured_as_any_other(where, tmp_path):
    model = MODELS["headwise"]().eval()
    expected, loss = inspect_model(model, [IDS], level="full").measures, held_out_loss(model, [IDS])
    if where == "disk":
        disk_offload(model, tmp_path, execution_device="cpu")
    else:
        cpu_offload(model, execution_device="cpu")
    found = inspect_model(model, [IDS], level="full").measures
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    assert held_out_loss(model, [IDS]) == loss
    with pytest.raises(ValueError, match=r"q_proj is a Parameter of .* on meta, which cannot be rounded"):
        linear_layers(model)
