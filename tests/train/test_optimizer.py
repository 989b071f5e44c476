"""Muon on matrices and AdamW on the rest as one optimizer, and a residual stream in bfloat16."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.variants import get_variant
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec
from gated_attention.train.optimizer import Together, make_optimizer, round_residual
from gated_attention.train.trainer import TrainConfig

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95)}


def model_of(variant="sdpa-headwise", size="tiny", **changes):
    block = get_variant(variant).block
    return build_model(make_config(SIZES[size], block, num_hidden_layers=2, **changes), seed=0)


def optimizer_of(model, name="muon"):
    return make_optimizer(model, TrainConfig(9, 2, 1e-2, optimizer=name), torch.optim.AdamW, OPTIONS)


def step(model, optimizer, seed):
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_between_embedding_and_head(tied):
    model = model_of(tie_word_embeddings=tied)
    optimizer = optimizer_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert muon | adamw == set(names.values())
    assert not muon & adamw
    assert {name.split(".")[-2] for name in muon} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert ("lm_head.weight" in adamw) == (not tied)
    groups = [group for part in optimizer.parts for group in part.param_groups]
    assert all(group is other for group, other in zip(optimizer.param_groups, groups, strict=True))


def test_together_is_each_alone_and_resumes_to_the_bit():
    model, twin = model_of(), model_of()
    optimizer = optimizer_of(model)
    parts = [type(part)(part.param_groups) for part in optimizer_of(twin).parts]
    other = SimpleNamespace(step=lambda: [part.step() for part in parts], zero_grad=twin.zero_grad)
    for seed in range(2):
        step(model, optimizer, seed)
        step(twin, other, seed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    resumed = model_of()
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, of in ((model, optimizer), (resumed, again)):
        step(each, of, 2)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    torch.optim.lr_scheduler.LambdaLR(again, lambda count: 0.5)
    assert {group["lr"] for part in again.parts for group in part.param_groups} == {5e-3}


def test_muon_refuses_experts_and_adamw_is_unchanged():
    with pytest.raises(ValueError, match=r"Muon takes matrices, and .*experts.* is a stack of them; choose .*'adamw'"):
        optimizer_of(model_of("baseline", "moe-tiny"))
    assert not isinstance(optimizer_of(model_of(), "adamw"), Together)


def test_the_residual_stream_is_rounded_before_every_layer():
    model = model_of()
    model(input_ids=torch.arange(8)[None])
    seen = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    plain = model(input_ids=torch.arange(8)[None]).logits
    round_residual(model, torch.bfloat16)
    rounded = model(input_ids=torch.arange(8)[None]).logits
    assert [x.dtype for x in seen] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert 0 < (rounded.float() - plain).abs().max() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_block_without_qk_norm_has_no_norm_and_is_counted():
    block = BlockSpec(qk_norm=False)
    config = make_config(SIZES["tiny"], block)
    model = build_model(config, seed=0)
    assert not [name for name, _ in model.named_parameters() if "q_norm" in name or "k_norm" in name]
    normed = build_model(make_config(SIZES["tiny"]), seed=0)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, normed)]
    assert sizes[1] - sizes[0] == 4 * 2 * 32 == -4 * block.num_parameters(SIZES["tiny"].geometry)
    ids = torch.arange(8)[None]
    assert not torch.allclose(model(input_ids=ids).logits, normed(input_ids=ids).logits, atol=1e-3)
    assert block.describe() == "no QK-norm"
