"""Watching a model changes nothing, and shows what enters its attention."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from gated_attention.analysis import inspect_model
from gated_attention.analysis.capture import Watcher, watch
from gated_attention.analysis.families import Attention, find_attention, unmeasured_gates
from gated_attention.analysis.gates import gates_of
from gated_attention.nn import AttentionGate
from gated_attention.spec import GateSpec

FAMILIES = ("llama", "mistral", "gemma2", "gpt_neox", "gpt2", "gpt_oss", "olmo2", "qwen3_next", "afmoe")


class Calls(Watcher):
    def __init__(self):
        self.layers = []

    def attention(self, call):
        self.layers.append(call.layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_eager_attention_and_padding_reaches_it(name, build_family):
    model = build_family(name).float()  # eager masks of float64 overflow in its float32 softmax
    ids = torch.randint(0, 50, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.set_attn_implementation("eager")
    calls = Calls()
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with watch(model, calls):
            watched = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(watched[0, 7:], plain[0, 7:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(watched[1:], plain[1:], rtol=1e-3, atol=1e-3)
    assert calls.layers == [one.layer for one in find_attention(model)]


def test_unsupported_architectures_are_refused():
    small = {"hidden_size": 32, "vocab_size": 50}
    bloom = BloomForCausalLM(BloomConfig(**small, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        inspect_model(bloom, [torch.zeros(1, 8, dtype=torch.long)])


def test_a_gate_of_unknown_layout_is_named():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    assert inspect_model(model, [torch.zeros(1, 8, dtype=torch.long)]).unmeasured_gates == {}
    model.model.layers[0].self_attn.g_proj = nn.Linear(32, 2)
    found = inspect_model(model, [torch.zeros(1, 8, dtype=torch.long)])
    assert found.unmeasured_gates == {"g_proj": "the layout of LlamaAttention is not known"}
    assert found.unknown_gates == ("g_proj",)


def test_an_attention_gate_shows_its_logits_and_is_not_called_unknown():
    torch.manual_seed(0)
    gate, x = AttentionGate(GateSpec(granularity="headwise"), 32, 2), torch.randn(1, 8, 32)
    attention = nn.Module()
    attention.head_dim, attention.o_proj, attention.g_proj = 16, nn.Linear(32, 32), gate
    [found] = gates_of(attention)
    seen = []
    found.module.register_forward_hook(lambda _module, _inputs, output: seen.append(found.logits(output)))
    gate(torch.randn(1, 8, 2, 16), x)
    torch.testing.assert_close(seen, [(x @ gate.weight.mT)[..., None]])
    assert unmeasured_gates([Attention(0, attention, attention.o_proj, (found,), attention)], [0]) == {}
