"""Every measure against a float64 computation that forms the whole attention matrix."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gated_attention.analysis import inspect_model
from gated_attention.analysis.capture import observe
from gated_attention.models import GatedQwen3Config
from gated_attention.models.build import build_model
from gated_attention.sizes import SIZES
from gated_attention.spec import GateSpec

GATES = {
    "none": (),
    "headwise": (GateSpec(granularity="headwise"),),
    "elementwise, value": (GateSpec(), GateSpec("value")),
    "head-shared": (GateSpec(head_shared=True),),
    "parameter": (GateSpec(input="parameter", init="normal"),),
    "silu": (GateSpec(activation="silu", combine="add"),),
    "output": (GateSpec("output"),),
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "initializer_range": 0.3,
}


def gated_model(gates):
    config = GatedQwen3Config.from_size(SIZES["tiny"], gates, vocab_size=50, initializer_range=0.3)
    return build_model(config, 0)


MODELS = {
    **{f"gated {name}": lambda gates=gates: gated_model(gates) for name, gates in GATES.items()},
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
}


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, 61))


def whole_attention(model, ids):
    """Attention (L, B, H, T, T) and layer outputs of the model's own eager implementation."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in model.model.layers
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(model(input_ids=ids, output_attentions=True).attentions)
    for hook in hooks:
        hook.remove()
    return attention.double().numpy(), [output.double() for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_sinks_and_activations_equal_the_whole_matrix(name, ids):
    model = MODELS[name]().double().eval()
    found = inspect_model(model, [ids[:2], ids[2:]])
    attention, outputs = whole_attention(model, ids)
    np.testing.assert_allclose(found.f_attn, attention[..., 1:, 0].mean((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.m_act, [float(o.abs().max()) for o in outputs], rtol=1e-5)
    expected = attention[found.attention_layers, 0, :, :48, :48].mean(1)
    np.testing.assert_allclose(found.attention_maps, expected, atol=1e-3)  # stored as float16
    assert found.num_tokens == ids.numel()
    assert found.f_attn_uniform == pytest.approx(np.mean([1 / (i + 1) for i in range(1, 61)]))


@pytest.mark.parametrize("name", [name for name in GATES if name != "none"])
def test_gate_scores_equal_their_formula(name, ids):
    model = gated_model(GATES[name]).double().eval()
    found = inspect_model(model, [ids])
    inputs = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for spec in GATES[name]:
        module = {"sdpa": "g_proj", "value": "v_g_proj", "output": "o_g_proj"}[spec.site]
        measured = found.gates[spec.site]
        for layer, x in zip(model.model.layers, inputs, strict=True):
            weight = getattr(layer.self_attn, module).weight
            logits = weight.T if spec.input == "parameter" else x @ weight.T
            scores = logits * torch.sigmoid(logits) if spec.activation == "silu" else torch.sigmoid(logits)
            if spec.head_shared:
                scores = scores.unflatten(-1, (6, 32)).mean(-2)
            index = layer.self_attn.layer_idx
            low, high = (-3, 3) if spec.activation == "silu" else (0, 1)
            scores = scores.detach().flatten().numpy()
            assert measured.mean[index] == pytest.approx(scores.mean(), rel=1e-5)
            assert measured.share_below[index] == pytest.approx((scores < 0.1).mean(), abs=1e-4)
            assert measured.share_above[index] == pytest.approx((scores > 0.9).mean(), abs=1e-4)
            counts, edges = np.histogram(np.clip(scores, low, high), bins=50, range=(low, high))
            assert np.abs(measured.histogram[index] - counts).sum() <= 1e-3 * len(scores)
            np.testing.assert_allclose(measured.edges, edges, atol=1e-12)


def test_several_batches_are_one_batch(ids):
    model = gated_model(GATES["headwise"]).eval()
    whole, parts = inspect_model(model, [ids]), inspect_model(model, [ids[:1], ids[1:]])
    np.testing.assert_allclose(whole.f_attn, parts.f_attn, rtol=1e-4)
    np.testing.assert_allclose(whole.gates["sdpa"].histogram, parts.gates["sdpa"].histogram)


def test_a_planted_sink_is_measured(ids):
    config = Qwen3Config(**SMALL, head_dim=16)
    model = Qwen3ForCausalLM(config).eval()
    plain = inspect_model(model, [ids]).f_attn
    layer = model.model.layers[1].self_attn

    def flat_queries(module, args, output):
        return torch.zeros_like(output) + 1.0

    def strong_first_key(module, args, output):
        output = output * 1e-3  # every other key scores about nothing
        output[:, 0] = 2.0
        return output

    hooks = [
        layer.q_norm.register_forward_hook(flat_queries),
        layer.k_norm.register_forward_hook(strong_first_key),
    ]
    planted = inspect_model(model, [ids]).f_attn
    for hook in hooks:
        hook.remove()
    assert planted[1].mean() > 3 * plain[1].mean()
    assert planted[1].mean() > 2 * planted[[0, 2]].mean()


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_square_matrix_is_formed():
    length = 1024
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, max_position_embeddings=length)).eval()
    with LargestTensor() as largest:
        inspect_model(model, [torch.randint(0, 50, (1, length))])
    assert largest.numel < length * length / 2


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(ids, fails):
    model = gated_model(GATES["headwise"]).train()
    model.set_attn_implementation("eager")

    def blocks():
        yield ids
        if fails:
            raise RuntimeError("the text broke off")

    if fails:
        with pytest.raises(RuntimeError, match="broke off"):
            inspect_model(model, blocks())
    else:
        inspect_model(model, blocks())
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_masks_reach_the_captured_attention(ids):
    model = gated_model(()).eval()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seen = []
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with observe(model, attention=seen.append):
            captured = model(input_ids=ids, attention_mask=mask).logits
    assert len(seen) == 4
    torch.testing.assert_close(captured[0, 7:], plain[0, 7:], atol=1e-5, rtol=1e-4)


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        inspect_model(gated_model(()), [])
