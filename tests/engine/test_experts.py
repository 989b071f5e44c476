"""Losses of routers on the engine, and their gradients, are those of `compare`'s trainer, in any number of passes."""

import pytest
import torch
from engine_models import MOE, save
from olmo_core.optim import AdamWConfig
from torch.nn import functional as F

from gated_attention.engine import BalancedTrainModule, engine_config, load_weights
from gated_attention.engine.convert import to_hugging_face
from gated_attention.engine.experts import LOAD_BALANCE, ROUTER_Z, expert_load
from gated_attention.registry.penalty import AuxiliaryWeights
from gated_attention.train.auxiliary import AuxiliaryLosses

WEIGHTS = AuxiliaryWeights(load_balance=0.5, router_z=0.1)
ROWS, LENGTH = 4, 16
VARIANT = "sdpa-elementwise"


@pytest.fixture
def ids():
    return torch.randint(0, MOE.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ours(tmp_path):
    return save(VARIANT, MOE, tmp_path).train()


@pytest.fixture
def engine(ours, tmp_path):
    """Makes the engine's module of the same weights, with so many sequences per pass."""

    def make(rows, recompute=False):
        module = BalancedTrainModule(
            engine_config(ours.config, WEIGHTS).build(),
            AdamWConfig(fused=False),
            rank_microbatch_size=rows * LENGTH,
            max_sequence_length=LENGTH,
            device=torch.device("cpu"),
        )
        if recompute:
            module.model.apply_activation_checkpointing("selected_modules", modules=["blocks.0", "blocks.1"])
        load_weights(module.model, tmp_path)
        module.metrics = {}
        module.record_metric = lambda name, value, *_, **__: module.metrics.__setitem__(name, float(value))
        module.record_ce_loss = lambda *_: None
        return module

    return make


def gradients(module):
    return to_hugging_face({name: one.grad for name, one in module.model.named_parameters()}, MOE.num_experts)


def expected(ours, ids):
    """Losses and gradients of a step of `compare`."""
    losses = AuxiliaryLosses(ours, WEIGHTS)
    with losses.gather():
        logits = ours(input_ids=ids, use_cache=False).logits
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    losses.total(cross_entropy).backward()
    return losses.read()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 1])
def test_losses_and_gradients_are_those_of_compare(ours, engine, ids, rows, recompute):
    read = expected(ours, ids)
    module = engine(rows, recompute)
    for _ in range(2):  # the second step keeps nothing of the first
        module.zero_grads()
        module.train_batch({"input_ids": ids})
    assert module.metrics[LOAD_BALANCE] / MOE.num_hidden_layers == pytest.approx(read["load_balance_loss"], abs=1e-6)
    assert module.metrics[ROUTER_Z] / MOE.num_hidden_layers == pytest.approx(read["router_z_loss"], abs=1e-6)
    assert read["load_balance_loss"] > 1.01
    assert expert_load(module.model) == {name: read[name] for name in read if name.startswith("expert_load")}
    found = gradients(module)
    for layer, block in enumerate(ours.model.layers):
        name = f"model.layers.{layer}.mlp"
        torch.testing.assert_close(found[f"{name}.gate.weight"], block.mlp.gate.weight.grad, rtol=0, atol=1e-6)
        for expert, gate_up in enumerate(block.mlp.experts.gate_up_proj.grad):
            gate, up = gate_up.chunk(2)
            torch.testing.assert_close(found[f"{name}.experts.{expert}.gate_proj.weight"], gate, rtol=0, atol=1e-6)
            torch.testing.assert_close(found[f"{name}.experts.{expert}.up_proj.weight"], up, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found[f"model.layers.{layer}.self_attn.g_proj.weight"],
            block.self_attn.g_proj.weight.grad,
            rtol=0,
            atol=1e-6,
        )


def test_experts_of_another_train_module_are_refused(engine, ids):
    model = engine(ROWS).model.train()
    with pytest.raises(ValueError, match="train a mixture of experts with BalancedTrainModule"):
        model(ids)
