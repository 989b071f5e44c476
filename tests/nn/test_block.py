"""What a block's gates are made of, and what a gate on the log-sum-exp makes of a query that sees no key."""

import copy

import pytest
import torch
from torch import nn

from gated_attention import GatedAttention, GateSpec
from gated_attention.nn import AttentionGate
from gated_attention.nn.block import find_gates
from gated_attention.spec import SITES, SwitchSpec


def test_projections_of_gates_are_linear_layers_and_nothing_else():
    block = GatedAttention(48, 6, 3, 8, gates=[GateSpec(site) for site in SITES], switch=SwitchSpec())
    gates = [module for _, module, _ in find_gates(block)]
    assert len(gates) == len(SITES)
    assert all(type(module) is nn.Linear for module in (*gates, block.switch_router))


class Foreign(nn.Module):
    """A linear layer of someone else's, as servers, adapters and quantisers put them in the place of PyTorch's."""

    def __init__(self, linear):
        super().__init__()
        self.theirs = linear

    def forward(self, x):
        return self.theirs(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("maps", ["value", "key_value"])
def test_linear_layers_of_others_change_nothing(maps, training):
    gates = [GateSpec(site, "headwise" if site in ("sdpa", "value") else "elementwise") for site in SITES]
    block = GatedAttention(48, 6, 3, 8, gates=gates, switch=SwitchSpec(maps, 3, 2)).train(training)
    x = torch.randn(2, 5, 48)
    expected = block(x)
    for name, module in list(block.named_children()):
        if isinstance(module, nn.Linear):
            setattr(block, name, Foreign(module))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("spec", [GateSpec(), GateSpec("value", "headwise", bias=1.0), GateSpec(input="parameter")])
def test_state_dicts_of_an_attention_gate_and_of_a_block_are_one(spec):
    block, alone = GatedAttention(48, 6, 3, 8, gates=spec), AttentionGate(spec, 48, 6, 3, 8)
    [(found, module, _)] = find_gates(copy.deepcopy(block))
    assert found == spec
    module.load_state_dict(alone.state_dict())
    alone.load_state_dict(module.state_dict())


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("activation", ["sigmoid", "silu", "identity", "ns_sigmoid", "hard_sigmoid", "softplus"])
def test_a_query_that_sees_no_key_has_output_0_and_finite_gradients(activation, combine):
    spec = GateSpec(granularity="headwise", input="lse", bias=0.5, activation=activation, combine=combine)
    block = GatedAttention(32, 4, 2, gates=spec, rope_theta=None)
    x = torch.randn(2, 6, 32, requires_grad=True)
    mask = (torch.arange(6) >= torch.tensor([[0], [3]]))[:, None, None]  # (B, 1, 1, S)
    out = block(x, mask)
    out.sum().backward()
    assert not out[1, :3].any()
    assert out[1, 3:].ne(0).all()
    assert all(gradient.isfinite().all() for gradient in (x.grad, *(p.grad for p in block.parameters())))
    torch.testing.assert_close(out[1:, 3:], block(x[1:, 3:]))
