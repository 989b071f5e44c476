"""The engine computes what transformers computes, and weights come back bit for bit."""

import pytest
import torch
from engine_models import DENSE, MOE, config_of, save
from test_config import SANDWICHES, fitting

from gated_attention.engine import engine_config, load_weights
from gated_attention.engine.convert import num_experts_of, to_hugging_face
from gated_attention.models.convert.storage import open_checkpoint

DENSE_VARIANTS = [variant.name for variant, _, _ in fitting(DENSE)]


def loaded(variant, size, folder):
    model = engine_config(config_of(variant, size)).build()
    load_weights(model, folder)
    return model.eval()


def check(variant, size, folder):
    """The same logits from the weights of a folder, and the same weights back."""
    ours = save(variant, size, folder)
    engine = loaded(variant, size, folder)
    ids = torch.randint(0, size.vocab_size, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(engine(ids), ours(ids).logits, rtol=0, atol=1e-5)
    stored = open_checkpoint(folder)
    back = to_hugging_face(dict(engine.named_parameters()), num_experts_of(engine))
    assert back.keys() == stored.keys()
    for name, tensor in back.items():
        assert tensor.equal(stored[name].load()), name


@pytest.mark.parametrize("variant", [variant.name for variant, _, _ in fitting(DENSE)])
def test_logits_are_the_same_and_weights_come_back(variant, tmp_path):
    check(variant, DENSE, tmp_path)


@pytest.mark.parametrize("variant", [variant.name for variant, _, _ in fitting(MOE) if variant.name not in SANDWICHES])
def test_so_they_are_with_experts(variant, tmp_path):
    check(variant, MOE, tmp_path)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("sdpa-elementwise", "lacks tensor model.layers.0.self_attn.g_proj.weight"),
        ("baseline-wide", "has shape"),
        ("baseline", "has no place for tensor model.layers.0.self_attn.g_proj.weight"),
    ],
)
def test_weights_of_another_model_are_refused(variant, message, tmp_path):
    save("baseline" if variant == "sdpa-elementwise" else "sdpa-headwise", DENSE, tmp_path)
    config = config_of("sdpa-headwise" if variant == "baseline-wide" else variant, DENSE)
    if variant == "baseline-wide":
        config.intermediate_size += 1
    elif variant == "baseline":
        config.intermediate_size = config_of("sdpa-headwise", DENSE).intermediate_size
    with pytest.raises(ValueError, match=message):
        load_weights(engine_config(config).build(), tmp_path)


def test_documents_are_kept_apart(tmp_path):
    save("sdpa-headwise", DENSE, tmp_path)
    engine = loaded("sdpa-headwise", DENSE, tmp_path)
    ids = torch.randint(0, DENSE.vocab_size, (1, 16))
    with torch.no_grad():
        packed = engine(ids, doc_lens=torch.tensor([[5, 11]]), max_doc_lens=[11])
        alone = torch.cat([engine(ids[:, :5]), engine(ids[:, 5:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
