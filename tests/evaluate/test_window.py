"""Attention without the first token is attention under that mask."""

import pytest
import torch
import transformers as tf
from test_sink_losses import IDS, build

from gated_attention.evaluate.loss import next_token_losses
from gated_attention.evaluate.window import late_loss, without_first_token


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("window", [3, 16])
def test_logits_are_those_under_the_mask(family, window):
    model = build(family).eval()
    place = torch.arange(16)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < window) & ((place > 0) | (place[:, None] == 0))
    masks = {"full_attention": seen, "sliding_attention": seen & (distance < 5)}
    masks = {name: mask[None, None].expand(3, 1, 16, 16) for name, mask in masks.items()}
    expected = model(IDS, attention_mask=masks if family == "gemma3" else masks["full_attention"]).logits
    before = model.config._attn_implementation
    with without_first_token(model, window):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
    assert model.config._attn_implementation == before


def test_late_losses_are_of_the_tokens_that_the_window_cuts_off():
    model = build("llama").eval()
    with torch.no_grad():
        losses = next_token_losses(model, IDS)
    assert late_loss(model, IDS, first=4) == pytest.approx(losses[:, 4:].mean().item(), rel=1e-5)
    assert late_loss(model, IDS, first=4, window=4) != pytest.approx(losses[:, 4:].mean().item(), rel=1e-4)
    assert late_loss(model, IDS, first=4, batch_tokens=16) == pytest.approx(losses[:, 4:].mean().item(), rel=1e-5)


def test_learned_sinks_are_refused():
    widths = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32, "head_dim": 8}
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**widths, **experts, vocab_size=61, layer_types=["full_attention"]))
    with pytest.raises(ValueError, match="has learned sinks, which no window hides"), without_first_token(model, 4):
        model(IDS, use_cache=False)
