"""Auxiliary losses against their formulas, and what may not change them: passes, compilation, recomputation."""

import pytest
import torch
from moe_model import AUXILIARY, HARD, Rows, batch, moe_model, train_tiny
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from gated_attention.models.build import build_model
from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.registry.penalty import TARGET_BAND, AuxiliaryWeights, GatePenalty
from gated_attention.sizes import SIZES
from gated_attention.spec import BlockSpec, GateSpec
from gated_attention.train.auxiliary import AuxiliaryLosses, penalty_pressure


def step(model, losses, passes, counts=None, run=None):
    """Loss of one optimizer step in these passes; gradients stay in the model."""
    model.zero_grad()
    total = 0.0
    for ids in passes:
        with losses.gather(), torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
            loss = (model if run is None else run)(input_ids=ids, labels=ids, use_cache=False).loss / len(passes)
        loss = loss + losses.loss(counts, len(passes))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(left, right):
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_losses_are_their_formulas():
    model = moe_model()
    losses = AuxiliaryLosses(model, AUXILIARY)
    with losses.gather(), torch.no_grad():
        output = model(input_ids=batch(), labels=batch(), output_router_logits=True)
    total = losses.loss()
    found = losses.read()
    logits = [layer.double() for layer in output.router_logits]
    k = model.config.num_experts_per_tok
    # transformers' own function on one layer at a time, in which a balanced router has k
    balance = [load_balancing_loss_func((layer,), 16, k).item() / k for layer in logits]
    assert found["load_balance_loss"] == pytest.approx(sum(balance) / 2, abs=1e-6)
    assert found["load_balance_loss"] > 1.1
    z = [layer.exp().sum(-1).log().square().mean().item() for layer in logits]
    assert found["router_z_loss"] == pytest.approx(sum(z) / 2)
    for layer, load in zip(logits, found["expert_load"], strict=True):
        sent = layer.topk(k).indices.flatten().bincount(minlength=16)
        assert load == pytest.approx((sent / sent.double().mean()).tolist(), abs=1e-4)
    assert found["expert_load_max"] == pytest.approx(max(map(max, found["expert_load"])), abs=1e-4)
    assert found["expert_load_min"] == pytest.approx(min(map(min, found["expert_load"])), abs=1e-4)
    assert total.item() == pytest.approx(
        0.5 * found["load_balance_loss"] + 0.1 * found["router_z_loss"] + 0.3 * found["gate_score_mean"]
    )


def test_gate_scores_are_counted_after_their_activation():
    model = moe_model(BlockSpec(GateSpec(granularity="headwise", activation="hard_sigmoid", bias=-2.5)))
    losses = AuxiliaryLosses(model, AUXILIARY)
    logits = []
    for layer in model.model.layers:
        layer.self_attn.g_proj.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with losses.gather():
        model(input_ids=batch(), use_cache=False)
    losses.loss()
    found, scores = losses.read(), (torch.stack(logits) / 6 + 0.5).clamp(0, 1)
    assert found["gate_score_mean"] == pytest.approx(scores.mean().item())
    assert found["gate_open_share"] == pytest.approx((scores > 0).double().mean().item())
    assert 0.1 < found["gate_open_share"] < 0.9
    assert found["gate_penalty"] == pytest.approx(0.3 * scores.mean().item())


def test_accumulated_passes_are_the_joined_batch():
    model = moe_model()
    losses = AuxiliaryLosses(model, AUXILIARY)
    loss, gradients = step(model, losses, [batch()])
    passes = batch().chunk(4)
    counts = losses.count(model, [{"input_ids": ids, "labels": ids} for ids in passes])
    assert counts.sum(-1).tolist() == [batch().numel() * 4] * 2
    accumulated, parts = step(model, losses, passes, counts)
    assert accumulated == pytest.approx(loss, abs=1e-6)
    assert largest_difference(parts, gradients) < 1e-6
    # Each pass with its own counts is another loss: the counting is not for nothing.
    alone, others = step(model, losses, passes)
    assert abs(alone - loss) > 1e-3
    assert largest_difference(others, gradients) > 1e-4


def test_recomputed_activations_change_nothing():
    model = moe_model()
    losses = AuxiliaryLosses(model, AUXILIARY)
    expected = step(model, losses, [batch()])
    enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
    (enable or model.gradient_checkpointing_enable)()
    found = step(model, losses, [batch()])
    assert found[0] == pytest.approx(expected[0], abs=1e-9)
    assert largest_difference(found[1], expected[1]) < 1e-9


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' version checks
def test_whole_model_compiles_with_its_hooks_under_autocast(compile_whole):
    model = moe_model().float()
    model.set_experts_implementation("grouped_mm")
    losses = AuxiliaryLosses(model, AUXILIARY)
    expected = step(model, losses, [batch()])
    compiled = compile_whole(model, backend="aot_eager")
    for _ in range(2):
        found = step(model, losses, [batch()], run=compiled)
        assert found[0] == pytest.approx(expected[0], abs=1e-3)
        for name, gradient in expected[1].items():  # up to bfloat16's rounding
            assert (found[1][name] - gradient).norm() < 0.03 * gradient.norm(), name
    with torch.autocast("cpu", torch.bfloat16):
        counts = [losses.count(run, [{"input_ids": batch()}]) for run in (compiled, model)]
    assert torch.equal(*counts)


def test_arithmetic_is_float32_under_autocast():
    model = moe_model().float()
    losses = AuxiliaryLosses(model, AUXILIARY)
    with torch.autocast("cpu", torch.bfloat16), losses.gather():
        model(input_ids=batch(), use_cache=False)
    assert losses.loss().dtype == torch.float32
    (router, *_), (gate, *_) = losses._router_sums, losses._gate_sums
    assert {router.probabilities.dtype, router.squared_lse.dtype, gate.mean.dtype} == {torch.float32}
    assert router.counts.sum() == batch().numel() * 4


def test_evaluation_and_a_trained_model_are_left_alone(tmp_path):
    model = moe_model()
    lines = train_tiny(tmp_path, model, batch_size=8)["lines"]
    validation = next(line for line in lines if "val_loss_nats" in line)
    assert set(validation) == {"step", "val_loss_nats"}
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    ids = Rows(8).ids
    with torch.no_grad():
        assert validation["val_loss_nats"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_logged_loss_is_the_cross_entropy_alone(tmp_path):
    with_losses = train_tiny(tmp_path, batch_size=8, accumulation=4, steps=1)["lines"][0]
    assert with_losses["load_balance_loss"] > 1
    rows = Rows().ids
    with torch.no_grad():
        expected = moe_model()(input_ids=rows, labels=rows).loss.item()
    assert with_losses["loss_nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.trust
def test_balance_improves_in_training(tmp_path):
    def last(weight):
        weights = AuxiliaryWeights(load_balance=weight, router_z=0.0)
        settings = {"batch_size": 8, "steps": 30, "learning_rate": 1e-2, "auxiliary": weights}
        return train_tiny(tmp_path / str(weight), **settings)["lines"][-2]

    balanced, free = last(1.0), last(0.0)
    assert balanced["load_balance_loss"] < free["load_balance_loss"] - 0.03


def test_pressure_ends_at_the_target():
    penalty = GatePenalty(0.5, target=0.3)
    shares = torch.tensor([1.0, 0.3 + TARGET_BAND, 0.3 + TARGET_BAND / 2, 0.3, 0.1])
    assert penalty_pressure(penalty, shares).tolist() == pytest.approx([0.5, 0.5, 0.25, 0.0, 0.0], abs=1e-6)
    assert penalty_pressure(GatePenalty(0.5), shares).tolist() == [0.5] * 5


@pytest.mark.trust
@pytest.mark.parametrize(("target", "weight", "steps"), [(0.7, 0.1, 150), (0.4, 1.0, 100)])
def test_open_share_reaches_its_target(tmp_path, target, weight, steps):
    model = build_model(make_config(SIZES["tiny"], BlockSpec(HARD), num_hidden_layers=2, vocab_size=60), 0)
    weights = AuxiliaryWeights(gate_penalty=GatePenalty(weight, target))
    settings = {"batch_size": 8, "steps": steps, "learning_rate": 1e-2, "auxiliary": weights, "max_grad_norm": 1.0}
    lines = train_tiny(tmp_path, model, **settings)["lines"]
    shares = [line["gate_open_share"] for line in lines if "gate_open_share" in line]
    assert shares[0] == 1.0
    assert sum(shares[-20:]) / 20 == pytest.approx(target, abs=0.05)


def test_what_cannot_be_gathered_is_refused():
    dense = build_model(make_config(SIZES["tiny"], num_hidden_layers=1), 0)
    assert not AuxiliaryLosses(dense, AuxiliaryWeights())
    with pytest.raises(ValueError, match="needs gates that close"):
        AuxiliaryLosses(dense, AUXILIARY)
    twice = moe_model(output_router_logits=True)
    with pytest.raises(ValueError, match="second load-balancing loss"):
        AuxiliaryLosses(twice, AUXILIARY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AuxiliaryWeights(load_balance=-1.0), "load_balance is -1"),
        (lambda: AuxiliaryWeights(router_z=float("nan")), "router_z is nan"),
    ],
)
def test_bad_weights_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.usefixtures("without_shape_checks")
def test_a_gpu_trains_compiled_in_bfloat16(tmp_path):
    model = build_model(make_config(SIZES["moe-tiny"], BlockSpec(HARD), num_hidden_layers=2, vocab_size=60), 0)
    settings = {"batch_size": 4, "accumulation": 2, "steps": 6, "compile": True, "precision": "bfloat16"}
    lines = train_tiny(tmp_path, model, device=torch.device("cuda"), **settings)["lines"]
    training = [line for line in lines if "loss_nats" in line]
    assert training[-1]["loss_nats"] < training[0]["loss_nats"]
    assert all(1 <= line["load_balance_loss"] < 4 for line in training)
    assert torch.isfinite(torch.tensor([line["val_loss_nats"] for line in lines if "val_loss_nats" in line])).all()
