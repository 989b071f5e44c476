"""Every variant of the registry, dense and as a mixture of experts, learns, compiles whole, and survives saving."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES, ModelSize, count_parameters, get_size
from gated_attention.train.auxiliary import AuxiliaryLosses

DENSE = ModelSize("dense", 2, 24, 4, 2, 8, 96, 31, 16, ffn_multiple=1)
MOE = ModelSize("moe", 2, 24, 4, 2, 8, 16, 31, 16, num_experts=4, num_experts_per_tok=2)
SMALL = [size for size in SIZES.values() if not size.cites]
PAPER = [size for size in SIZES.values() if size.cites]

UNFIT = {("switch-kv-8-top-8", size) for size in ("tiny", "xs", "s", "1.7b-48l")}
UNFIT |= {("experts-x1.03", size.name) for size in [DENSE, *SIZES.values()] if not size.num_experts}
"""Variants that dense sizes cannot have: maps that cost more than the FFN, experts where there are none."""


QUICK = {("sdpa-elementwise", "dense"), ("sdpa-headwise", "moe"), ("value-head-shared", "dense"), ("baseline", "moe")}


def every(*sizes, models_once=False, quick=None):
    """Every variant at every of these sizes that can have it; those that only train otherwise are one model.

    All but the `quick` pairs of names, if they are given, are left to `make trust`.
    """
    pairs = [(variant, size) for size in sizes for variant in VARIANTS.values()]
    fit = [pair for pair in pairs if (pair[0].name, pair[1].name) not in UNFIT]
    if models_once:
        fit = list({(variant.block, variant.resize(size)): (variant, size) for variant, size in reversed(fit)}.values())
    names = [(variant.name, size.name) for variant, size in fit]
    marks = [() if quick is None or pair in quick else (pytest.mark.trust,) for pair in names]
    rows = [
        pytest.param(*pair, id="-".join(name), marks=mark) for pair, name, mark in zip(fit, names, marks, strict=True)
    ]
    return pytest.mark.parametrize(("variant", "size"), rows)


def model_of(variant, size, **overrides):
    model = build_model(make_config(variant.resize(size), variant.block, initializer_range=0.1, **overrides), seed=0)
    model.set_experts_implementation("batched_mm")  # what compiles in float32
    return model


@every(*PAPER)
def test_it_has_the_parameters_that_the_registry_says(variant, size):
    resized = variant.resize(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(resized, variant.block))
    assert sum(p.numel() for p in model.parameters()) == count_parameters(resized, variant.block).total


@every(DENSE, MOE, quick=QUICK)
def test_thirty_steps_lower_its_loss(variant, size):
    model = model_of(variant, size)
    auxiliary = AuxiliaryLosses(model, AuxiliaryWeights(gate_penalty=variant.gate_penalty))
    ids = torch.randint(size.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3 * float(variant.learning_rate))
    losses, totals = [], []
    for _ in range(30):
        with auxiliary.gather():
            loss = model(input_ids=ids, labels=ids).loss
        total = loss + auxiliary.loss()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(loss.item())
        totals.append(total.item())
    assert losses[-1] < 0.8 * losses[0]
    assert totals[-1] < 0.8 * totals[0]


@every(DENSE, MOE)
def test_it_saves_loads_and_generates(variant, size, tmp_path):
    model = model_of(variant, size).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded.set_experts_implementation("batched_mm")
    assert loaded.config.block == variant.block
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    found = loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for end in range(5, 9):  # with the cache as without
        assert found[0, end] == model(found[:, :end]).logits[0, -1].argmax()


@pytest.mark.trust
@every(DENSE, MOE, models_once=True)
def test_it_compiles_into_one_graph(variant, size, compile_whole):
    model = model_of(variant, size, num_hidden_layers=1)
    ids = torch.arange(12)[None] % size.vocab_size

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    eager = loss(ids)
    compiled = compile_whole(loss, backend="eager")(ids)  # one graph is what is tested: Inductor takes seconds for each
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    compiled.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" not in name)


def test_dense_rows_agree_in_parameters():
    unmatched = set()
    for variant in VARIANTS.values():
        for size in SMALL:
            if size.num_experts or (variant.name, size.name) in UNFIT:
                continue
            if not variant.matches(size):
                unmatched.add(variant.name)
                continue
            ours = count_parameters(variant.resize(size), variant.block).total
            residue = ours / count_parameters(size).total - 1
            assert abs(residue) < 1e-3, (size.name, variant.name, residue)
    assert unmatched == {"kv-heads-x2", "query-heads-x1.5"}  # as in Table 1, where parameters are added


def test_the_papers_dense_sizes_agree_up_to_the_releases_rounding():
    for size in PAPER:
        step = size.num_hidden_layers * 3 * size.hidden_size * size.ffn_multiple
        for variant in VARIANTS.values():
            if (variant.name, size.name) not in UNFIT and variant.matches(size):
                ours = count_parameters(variant.resize(size), variant.block).total
                assert abs(ours - count_parameters(size).total) <= step / 2, (size.name, variant.name)


@pytest.mark.parametrize(("name", "size"), sorted(UNFIT))
def test_what_does_not_fit_says_so(name, size):
    with pytest.raises(ValueError, match="choose a"):
        VARIANTS[name].resize(DENSE if size == "dense" else get_size(size))
