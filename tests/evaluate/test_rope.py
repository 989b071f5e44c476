"""Overridden rotary embeddings against models that transformers builds with the same `rope_parameters`."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from gated_attention.evaluate.rope import Rope, overridden

from .conftest import build

TRAINED = 32
ROPES = [Rope(theta=1e6), Rope(yarn=4.0), Rope(theta=5e5, yarn=2.0)]


def gemma():
    """One layer with a window and one without, each kind with a rotary embedding of its own."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    kinds["rope_parameters"] = {name: {"rope_type": "default", "rope_theta": 1e4} for name in kinds["layer_types"]}
    config = Gemma3TextConfig(**shape, **kinds, vocab_size=257, max_position_embeddings=TRAINED, initializer_range=0.3)
    return Gemma3ForCausalLM(config).double().eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def transformers_own(model, rope, tmp_path):
    """The same weights read with `rope_parameters` written by hand."""
    model.save_pretrained(tmp_path)
    parameters = model.config.rope_parameters
    changed = {"rope_theta": rope.theta} if rope.theta else {}
    if rope.yarn:
        changed |= {"rope_type": "yarn", "factor": rope.yarn, "original_max_position_embeddings": TRAINED}
    if "full_attention" in parameters:  # the others keep theirs
        parameters = {**parameters, "full_attention": {**parameters["full_attention"], **changed}}
    else:
        parameters = {**parameters, **changed}
    positions = int(TRAINED * (rope.yarn or 1))
    changes = {"rope_parameters": parameters, "max_position_embeddings": positions}
    own = AutoModelForCausalLM.from_pretrained(tmp_path, **changes, dtype=torch.float32).double()
    if hasattr(model.config, "num_experts"):
        own.set_experts_implementation("eager")
    return own


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.label)
@pytest.mark.parametrize("family", ["gated", "llama", "moe", "gemma"])
def test_logits_equal_transformers_own(family, rope, tmp_path):
    model = gemma() if family == "gemma" else build(family)
    ids = torch.randint(0, 257, (2, 100))
    plain = logits(model, ids)
    expected = logits(transformers_own(model, rope, tmp_path), ids)
    before = copy.deepcopy(model.config.to_dict())
    with overridden(model, rope, TRAINED):
        changed = logits(model, ids)
    assert torch.equal(changed, expected)
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), plain)
    assert model.config.to_dict() == before


def test_plain_changes_nothing_on_a_model_without_rope():
    with overridden(build("gpt2"), Rope(), TRAINED):
        pass


def test_what_cannot_be_overridden_is_refused(gated):
    with pytest.raises(ValueError, match="gpt2 has no rotary embedding"), overridden(build("gpt2"), Rope(1e6), TRAINED):
        pass
    gated.config.rope_parameters = {"sliding_attention": {"rope_theta": 1e4}}
    with (
        pytest.raises(ValueError, match=r"per kind of layer \(sliding_attention\)"),
        overridden(gated, Rope(1e6), TRAINED),
    ):
        pass
    gated.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="RoPE is yarn already"), overridden(gated, Rope(yarn=2), TRAINED):
        pass
    with pytest.raises(ValueError, match=r"YaRN's factor is 1\.0; it must be above 1"):
        Rope(yarn=1.0)
    with pytest.raises(ValueError, match="base is 0; it must be above 1"):
        Rope(theta=0)


def test_labels():
    assert [Rope().label, *(rope.label for rope in ROPES)] == ["plain", "base 1e+06", "YaRN x4", "base 500000, YaRN x2"]
