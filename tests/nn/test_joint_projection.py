"""In training, one product forms the values and the logits of a gate per head, where nothing else has to see them."""

import pytest
import torch
from torch import nn

from gated_attention import GatedAttention, GatedQwen3Config, GatedQwen3ForCausalLM, GateSpec

HEADWISE = GateSpec(granularity="headwise")


@pytest.fixture
def separate(monkeypatch):
    """How many gates formed their logits by themselves."""
    calls, forward = [], nn.Linear.forward

    def watched(linear, x):
        if hasattr(linear, "gate_spec"):
            calls.append(linear)
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    return calls


def block_of(gate=HEADWISE, **options):
    torch.manual_seed(0)
    return GatedAttention(48, 6, 3, 8, gates=gate, **options).double()


@pytest.mark.parametrize("backend", ["auto", "composed", "eager"])
def test_output_and_gradients_are_those_of_separate_projections(backend, separate):
    block, x = block_of(backend=backend), torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    found = []
    for mode in (True, False):
        y = block.train(mode)(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        assert len(separate) == (0 if mode else 1)
    for joint, apart in zip(*found, strict=True):
        torch.testing.assert_close(joint, apart)


def test_models_train_on_it(separate):
    torch.manual_seed(0)
    config = GatedQwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, gates=HEADWISE,
    )  # fmt: skip
    model = GatedQwen3ForCausalLM(config).double()
    ids = torch.randint(0, 50, (2, 7))
    found = []
    for implementation, mode in (("sdpa", True), ("gated_attention", True), ("sdpa", False)):
        model.set_attn_implementation(implementation)
        loss = model.train(mode)(ids, labels=ids).loss
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        assert len(separate) == (0 if mode else 2)
    for sdpa, fused, apart in zip(*found, strict=True):
        torch.testing.assert_close(sdpa, apart)
        torch.testing.assert_close(fused, apart)


class Adapted(nn.Linear):
    pass


def hook(block):
    block.g_proj.register_forward_hook(lambda *_: None)


def watch_gradients(block):
    block.v_proj.register_full_backward_hook(lambda *_: None)


def offload(block):
    block.g_proj.forward = block.g_proj.forward


def freeze(block):
    block.v_proj.weight.requires_grad = False


def adapt(block):
    block.v_proj = Adapted(48, 24, bias=False).double()


APART = {
    "a gate per channel": (GateSpec(), {}, None),
    "a bias of the gate": (GateSpec(granularity="headwise", bias=0.0), {}, None),
    "a bias of the values": (HEADWISE, {"bias": True}, None),
    "a gate of few channels": (GateSpec(granularity="headwise", input_dim=12), {}, None),
    "a hook": (HEADWISE, {}, hook),
    "a hook on gradients": (HEADWISE, {}, watch_gradients),
    "another forward": (HEADWISE, {}, offload),
    "frozen values": (HEADWISE, {}, freeze),
    "an adapter": (HEADWISE, {}, adapt),
}


@pytest.mark.parametrize("case", APART)
def test_what_must_be_seen_or_differs_stays_apart(case, separate):
    gate, options, change = APART[case]
    block = block_of(gate, **options)
    if change is not None:
        change(block)
    block(torch.randn(2, 5, 48, dtype=torch.float64))
    assert len(separate) == 1
