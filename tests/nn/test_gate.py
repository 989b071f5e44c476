"""The gate as a module: its equation, its initialisation, its weights, and who may watch its logits."""

import copy

import pytest
import torch

from gated_attention.nn import AttentionGate
from gated_attention.nn.block import find_gates
from gated_attention.spec import GateSpec

B, T, C, H, K, D = 2, 5, 48, 6, 3, 8


def gate_for(spec):
    return AttentionGate(spec, C, H, K, D)


@pytest.mark.parametrize(
    ("spec", "heads", "channels"),
    [
        (GateSpec(), H, D),
        (GateSpec(granularity="headwise"), H, 1),
        (GateSpec("value"), K, D),
        (GateSpec("key", head_shared=True), K, D),
        (GateSpec("value", "headwise"), K, 1),
        (GateSpec("output"), 1, C),
    ],
)
def test_a_call_is_the_papers_equation(spec, heads, channels):
    gate = gate_for(spec).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    y = torch.randn(B, T, heads, C if spec.site == "output" else D, dtype=torch.float64)
    scores = torch.sigmoid(x @ gate.weight.mT).view(B, T, heads, channels)
    if spec.head_shared:
        scores = scores.mean(2, keepdim=True)
    torch.testing.assert_close(gate(y, x), y * scores)


def test_a_bias_opens_the_gate():
    gate = gate_for(GateSpec(granularity="headwise", init="zeros", bias=1.5))
    y, x = torch.randn(B, T, H, D), torch.randn(B, T, C)
    torch.testing.assert_close(gate(y, x), y * torch.sigmoid(torch.tensor(1.5)))


def test_a_narrow_gate_reads_only_its_channels():
    gate = gate_for(GateSpec(input_dim=12))
    y, x = torch.randn(B, T, H, D), torch.randn(B, T, C)
    changed = x.clone()
    changed[..., 12:] += 1.0
    assert gate.weight.shape == (H * D, 12)
    assert gate(y, changed).equal(gate(y, x))
    changed[..., 11] += 1.0
    assert not gate(y, changed).equal(gate(y, x))


def test_a_gate_without_input_is_the_same_for_every_token():
    gate = gate_for(GateSpec(input="parameter"))
    y, x = torch.ones(B, T, H, D), torch.randn(B, T, C, requires_grad=True)
    result = gate(y, x)
    torch.testing.assert_close(result, torch.sigmoid(gate.weight.view(H, D)).expand(B, T, H, D))
    result.sum().backward()
    assert gate.weight.grad.all()
    assert x.grad is None


def test_a_normal_start_has_the_released_models_spread():
    gate = AttentionGate(GateSpec(), 512, 8)
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(gate.weight.mean().item()) < 2e-4
    assert gate.bias is None
    gate.reset_parameters(std=0.3)
    assert gate.weight.std().item() == pytest.approx(0.3, rel=0.02)


def test_zeros_and_a_bias_start_as_they_say():
    gate = gate_for(GateSpec(granularity="headwise", init="zeros", bias=-2.5))
    assert not gate.weight.any()
    assert gate.bias.eq(-2.5).all()
    assert gate.bias.shape == (H,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("site", ["sdpa", "value", "key", "query", "output"])
def test_two_sigmoid_of_zero_starts_as_no_gate_at_all(site, dtype):
    gate = gate_for(GateSpec(site, init="zeros", scale=2.0)).to(dtype)
    heads = {"value": K, "key": K, "output": 1}.get(site, H)
    y = torch.randn(B, T, heads, C if site == "output" else D, dtype=dtype)
    assert gate(y, torch.randn(B, T, C, dtype=dtype)).equal(y)


def test_one_key_value_head_per_query_head_is_the_default():
    assert AttentionGate(GateSpec("value"), 48, 6).weight.shape == (48, 48)
    assert AttentionGate(GateSpec("value", "headwise"), 48, 6).weight.shape == (6, 48)


def test_modulate_is_the_old_name_of_the_call():
    gate, y, x = gate_for(GateSpec()), torch.randn(B, T, H, D), torch.randn(B, T, C)
    with pytest.warns(DeprecationWarning, match=r"gate\(y, hidden_states\)"):
        old = gate.modulate(y, x)
    assert old.equal(gate(y, x))


def test_the_state_dict_is_that_of_a_linear_layer_and_the_module_copies_and_prints():
    gate = gate_for(GateSpec(granularity="headwise", bias=0.0))
    gate.load_state_dict(torch.nn.Linear(C, H).state_dict())
    twin = copy.deepcopy(gate)
    assert twin.spec == gate.spec
    assert twin.weight.equal(gate.weight)
    assert "in_features=48, out_features=6, bias=True, G1 sdpa headwise sigmoid bias 0\n" in repr(gate)


def test_hooks_read_the_flat_logits():
    gate, x, seen = gate_for(GateSpec()), torch.randn(B, T, C), []
    [(spec, module, channels)] = find_gates(gate)
    module.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    gate(torch.randn(B, T, H, D), x)
    assert (spec, channels) == (gate.spec, D)
    torch.testing.assert_close(seen, [x @ gate.weight.mT])


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((50, 8), "hidden_size 50 is not a multiple of num_heads 8; give head_dim"),
        ((48, 6, 4), "num_heads 6 is not a multiple of num_kv_heads 4"),
        ((48, 6, 0), "num_kv_heads is 0; it must be at least 1"),
        ((8, 2), "input_dim 12 exceeds hidden_size 8"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, message):
    with pytest.raises(ValueError, match=message) as error:
        AttentionGate(GateSpec(input_dim=12), *widths)
    assert "\n" not in str(error.value)
