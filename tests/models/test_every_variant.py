"""Every variant of the registry learns, compiles into one graph, and survives saving."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.build import build_model
from gated_attention.models.configuration import make_config
from gated_attention.sizes import ModelSize, count_parameters, get_size
from gated_attention.studies.catalogue import PAPER_SIZE
from gated_attention.studies.variants import VARIANTS

SIZE = ModelSize("small", 2, 24, 4, 2, 8, 16, 31, 16, num_experts=4, num_experts_per_tok=2)
EVERY = pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)


def model_of(variant, **overrides):
    model = build_model(make_config(variant.resize(SIZE), variant.block, initializer_range=0.1, **overrides), seed=0)
    model.set_experts_implementation("batched_mm")  # what compiles in float32
    return model


@EVERY
def test_it_has_the_parameters_that_the_registry_says(variant):
    size = variant.resize(get_size(PAPER_SIZE))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(size, variant.block))
    assert sum(p.numel() for p in model.parameters()) == count_parameters(size, variant.block).total


@EVERY
def test_thirty_steps_lower_its_loss(variant):
    model = model_of(variant)
    ids = torch.randint(SIZE.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@EVERY
def test_it_saves_loads_and_generates(variant, tmp_path):
    model = model_of(variant).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded.set_experts_implementation("batched_mm")
    assert loaded.config.block == variant.block
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    found = loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for end in range(5, 9):  # with the cache as without
        assert found[0, end] == model(found[:, :end]).logits[0, -1].argmax()


@pytest.mark.parametrize("variant", {v.block: v for v in VARIANTS.values()}.values(), ids=lambda variant: variant.name)
def test_it_compiles_into_one_graph(variant, compile_whole):
    model = model_of(variant, num_hidden_layers=1)
    ids = torch.arange(12)[None] % SIZE.vocab_size

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    eager = loss(ids)
    compiled = compile_whole(loss, backend="eager")(ids)  # one graph is what is tested: Inductor takes seconds for each
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    compiled.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" not in name)


def test_dense_rows_agree_in_parameters():
    for name in ("tiny", "xs", "s", "m"):
        size = get_size(name)
        for variant in VARIANTS.values():
            try:
                resized = variant.resize(size)
            except ValueError:
                continue
            if not variant.matches(size):
                continue
            ours, theirs = count_parameters(resized, variant.block).total, count_parameters(size).total
            assert abs(ours / theirs - 1) < 1e-3, (name, variant.name, ours / theirs - 1)
