"""The penalties are what `analyze` measures, exactly, with the gradient of the whole attention matrix."""

import pytest
import torch
import transformers as tf

from gated_attention import GateSpec
from gated_attention.analysis import inspect_model
from gated_attention.models import add_gates
from gated_attention.train.adapt import AdaptConfig
from gated_attention.train.sink_losses import SinkLosses

WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def build(family, **changes):
    torch.manual_seed(0)
    kind, config = {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**WIDTHS)),
        "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**WIDTHS | SLIDING | changes)),
        "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**WIDTHS | SLIDING)),
    }[family]
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform attention
            parameter.mul_(4) if parameter.ndim > 1 else None
    return model


def config(**settings):
    return AdaptConfig(steps=1, batch_size=1, learning_rate=1e-3, **settings)


IDS = torch.randint(3, 61, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_penalties_are_the_measures_and_have_their_gradients(family, gated):
    model = build(family).double().eval()
    if gated:
        add_gates(model, GateSpec(init="normal"))
    measured = inspect_model(model, [IDS])
    logits = model(IDS).logits

    losses = SinkLosses(model, config(sink_weight=2.0, activation_weight=3.0))
    assert losses
    with losses.gather():
        found = model(IDS, labels=IDS)
    loss = losses.total(found.loss)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    logged = losses.read()
    losses.remove()

    torch.testing.assert_close(found.logits, logits)
    assert logged["first_token_attention"] == pytest.approx(measured.overall("f_attn"), rel=1e-6)

    model.set_attn_implementation("eager")  # whose softmax is float32
    out = model(IDS, labels=IDS, output_attentions=True, output_hidden_states=True)
    sink = torch.stack([weights[:, :, 1:, 0].mean() for weights in out.attentions]).mean()
    seen = []
    hooks = [layer.register_forward_hook(lambda m, i, o: seen.append(o)) for layer in model.model.layers]
    model(IDS)
    hidden = [one[0] if isinstance(one, tuple) else one for one in seen]
    size = torch.stack([h.abs().flatten(1).amax(-1).log().mean() for h in hidden]).mean()
    for hook in hooks:
        hook.remove()
    assert logged["log_max_activation"] == pytest.approx(size.item(), rel=1e-6)
    expected = torch.autograd.grad(out.loss + 2 * sink + 3 * size, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, out.loss + 2 * sink + 3 * size, rtol=1e-5, atol=0)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_window_that_never_reaches_token_0_counts_as_nothing():
    model = build("gemma3", layer_types=["sliding_attention"] * 3, sliding_window=2)
    losses = SinkLosses(model, config(activation_weight=0.0))
    with losses.gather():
        model(IDS)
    losses.loss()
    # Only query 1 still sees token 0.
    assert losses.read()["first_token_attention"] < 1 / 15
    losses.remove()


def test_without_weights_nothing_is_touched():
    model = build("llama")
    before = model.config._attn_implementation
    losses = SinkLosses(model, config(sink_weight=0.0, activation_weight=0.0))
    assert not losses
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())


def test_the_implementation_comes_back():
    model = build("gemma3")
    before, logits = model.config._attn_implementation, model(IDS).logits
    losses = SinkLosses(model, config())
    assert model.config._attn_implementation != before
    losses.remove()
    assert model.config._attn_implementation == before
    assert torch.equal(model(IDS).logits, logits)


def test_the_distance_to_a_teacher_replaces_the_cross_entropy():
    teacher, model = build("llama").eval(), build("llama").eval()
    losses = SinkLosses(model, config(sink_weight=0.0, activation_weight=0.0), teacher)
    with losses.gather():
        found = model(input_ids=IDS, labels=IDS)
    assert losses.total(found.loss).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    with losses.gather():
        found = model(input_ids=IDS, labels=IDS)
    distance = losses.total(found.loss)
    p, q = teacher(IDS).logits.log_softmax(-1), model(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(distance, (p.exp() * (p - q)).sum(-1).mean())
    losses.remove()


def test_scores_that_are_capped_are_refused_in_one_line():
    model = build("gemma2")
    losses = SinkLosses(model, config())
    with losses.gather(), pytest.raises(ValueError, match="the penalty on first-token attention does not know softcap"):
        model(IDS)
    losses.remove()
