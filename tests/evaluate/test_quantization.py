"""Rounding against its definition, whole passes against a model rounded by hand, and that nothing is left behind."""

import numpy as np
import pytest
import torch
from torch import nn

from gated_attention.evaluate.loss import held_out_loss
from gated_attention.evaluate.quantization import (
    GRANULARITIES,
    Scheme,
    fake_quantize,
    linear_layers,
    quantization_losses,
    quantize_activation,
    quantize_weight,
    scale_of,
)


def naive_round(x, bits, peak):
    """Element by element, in Python's own numbers."""
    top = 2 ** (bits - 1) - 1
    peak = np.broadcast_to(peak, x.shape)
    out = np.zeros_like(x)
    for index, value in np.ndenumerate(x):
        step = peak[index] / top if peak[index] else 1.0
        out[index] = step * min(top, max(-top, round(value / step)))
    return out


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activations_equal_rounding_by_hand(bits):
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    x[1, 2] = 0
    peaks = {
        "token": x.abs().amax(-1, keepdim=True).numpy(),
        "tensor-dynamic": x.abs().max().numpy(),
        "tensor-static": np.array(1.5),
    }
    for granularity in GRANULARITIES:
        found = quantize_activation(x, bits, granularity, torch.tensor(1.5, dtype=torch.float64))
        np.testing.assert_allclose(found.numpy(), naive_round(x.numpy(), bits, peaks[granularity]), atol=1e-12)
    assert quantize_activation(x, bits, "tensor-static", torch.tensor(1.5)).abs().max() < 1.5 + 1e-6


def test_weights_have_a_scale_for_each_output_channel(model):
    for module in linear_layers(model).values():
        weight = module.weight.detach()
        axis = 1 if isinstance(module, nn.Linear) else 0  # GPT-2 keeps (in, out)
        expected = naive_round(weight.numpy(), 8, weight.abs().amax(axis, keepdim=True).numpy())
        np.testing.assert_allclose(quantize_weight(module, 8).numpy(), expected, atol=1e-12)


def test_low_precision_keeps_its_dtype():
    x = torch.randn(3, 4).bfloat16()
    assert fake_quantize(x, 8, scale_of(x.abs().amax(), 8)).dtype == torch.bfloat16


def rounding(bits, granularity, peaks):
    def hook(module, args):
        x = args[0].detach()
        if granularity == "tensor-static":
            peak = peaks[module]
        else:
            peak = x.abs().amax(-1, keepdim=True) if granularity == "token" else x.abs().max()
        return (torch.from_numpy(naive_round(x.numpy(), bits, np.asarray(peak))),)

    return hook


def loss_with(model, batches, modules, hook):
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    loss = held_out_loss(model, batches).loss_nats
    for handle in handles:
        handle.remove()
    return loss


def test_losses_equal_a_model_rounded_by_hand_and_nothing_is_left_behind(model):
    batches, calibration = [torch.randint(0, 257, (2, 12))], [torch.randint(0, 257, (2, 12))]
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    found = quantization_losses(model, batches, calibration, [Scheme(6, 6)])
    for name, value in model.named_parameters():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
    assert not any(module._forward_pre_hooks for module in model.modules())
    plain = held_out_loss(model, batches).loss_nats
    assert found.loss_nats == pytest.approx(plain, abs=1e-12)
    layers = linear_layers(model)
    assert model.get_output_embeddings() not in layers.values()
    peaks = {}
    loss_with(model, calibration, layers.values(), lambda m, a: peaks.__setitem__(m, a[0].abs().max().numpy()))
    alone = {
        row.granularity: {
            name: loss_with(model, batches, [module], rounding(6, row.granularity, peaks)) - plain
            for name, module in layers.items()
        }
        for row in found.rows
    }
    for module in layers.values():
        module.weight.data.copy_(quantize_weight(module, 6))
    for row in found.rows:
        rows = [one for batch in batches for one in batch.split(1)]
        expected = loss_with(model, rows, layers.values(), rounding(6, row.granularity, peaks))
        assert row.loss_nats == pytest.approx(expected, abs=1e-8)
        assert row.change_nats == pytest.approx(expected - plain, abs=1e-8)
        changes = alone[row.granularity]
        assert row.worst.name == max(changes, key=changes.get)
        assert row.worst.change_nats == pytest.approx(changes[row.worst.name], abs=1e-8)


def test_losses_do_not_depend_on_how_many_sequences_pass_at_a_time(model):
    ids = torch.randint(0, 257, (5, 12))
    batched = ([ids], list(ids.split(1)), list(ids.split(2)))
    found = [quantization_losses(model, batches, [ids], [Scheme(6, 6)], find_worst=False) for batches in batched]
    assert [row.worst for row in found[0].rows] == [None] * 3
    for one in found[1:]:
        assert [row.loss_nats for row in one.rows] == pytest.approx([row.loss_nats for row in found[0].rows], abs=1e-9)


def test_a_planted_outlier_is_named_and_fewer_bits_cost_more(gated):
    victim = gated.model.layers[1].mlp
    with torch.no_grad():
        victim.up_proj.weight[3] *= 1e4  # one huge channel in what down_proj reads, which it ignores
        victim.down_proj.weight[:, 3] = 0
    start = torch.randint(0, 257, (4, 1))  # text that the model foresees, so that rounding can only hurt
    batch = gated.generate(start, max_new_tokens=23, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = quantization_losses(gated, [batch], [batch])
    dynamic = [row for row in found.rows if row.granularity == "tensor-dynamic"]
    assert {row.worst.name for row in dynamic} == {"model.layers.1.mlp.down_proj"}
    assert [row.scheme.label for row in dynamic] == ["W8A8", "W6A6", "W4A8"]
    assert 0 < found.share < 1


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="Embedding has no linear layers to quantise"):
        linear_layers(nn.Embedding(3, 4))
