"""Mean ablation against a model in which the head was replaced by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gated_attention.analysis import TextBatch
from gated_attention.analysis.ablation import mean_ablation

LENGTH, HEADS, WIDTH = 13, 2, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=HEADS * WIDTH, n_layer=2, n_head=HEADS, vocab_size=31, n_positions=32, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def texts(number, seed):
    return torch.randint(0, 31, (number, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(model, ids, layer=None, channels=None, mean=None):
    def replace(module, inputs):
        x = inputs[0].clone()
        x[..., channels] = mean[:, channels]
        return (x,)

    hook = None if layer is None else model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(replace)
    with torch.no_grad():
        logits = model(ids).logits
    if hook:
        hook.remove()
    found = [F.cross_entropy(one[:-1], text[1:]).item() for one, text in zip(logits, ids, strict=True)]
    return np.array(found)


def naive_means(model, ids):
    read = {}
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda m, i, n=n: read.update({n: i[0].mean(0)}))
        for n, block in enumerate(model.transformer.h)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return read


def test_the_loss_rises_as_with_the_head_replaced_by_hand(model):
    ids, other = texts(5, 1), texts(7, 2)
    found = mean_ablation(model, [TextBatch(ids[:3]), TextBatch(ids[3:])], [TextBatch(other[:4]), TextBatch(other[4:])])
    means, plain = naive_means(model, other), losses(model, ids)
    for layer in range(2):
        places = [slice(head * WIDTH, (head + 1) * WIDTH) for head in range(HEADS)]
        for head, channels in enumerate(places):
            rise = losses(model, ids, layer, channels, means[layer]) - plain
            assert found["ablation"][layer, head] == pytest.approx(rise.mean(), rel=1e-4, abs=1e-6)
            assert found["ablation_error"][layer, head] == pytest.approx(rise.std(ddof=1) / 5**0.5, rel=1e-4)
        rise = losses(model, ids, layer, slice(None), means[layer]) - plain
        assert found["layer_ablation"][layer] == pytest.approx(rise.mean(), rel=1e-4, abs=1e-6)


def test_a_head_that_adds_one_vector_to_every_text_is_worth_nothing(model):
    constant = torch.randn(LENGTH, WIDTH, dtype=torch.float64)

    def hook(module, inputs):
        x = inputs[0].clone()
        x[..., WIDTH:] = constant
        return (x,)

    model.transformer.h[1].attn.c_proj.register_forward_pre_hook(hook)
    found = mean_ablation(model, [TextBatch(texts(4, 1))], [TextBatch(texts(4, 2))])
    assert found["ablation"][1, 1] == pytest.approx(0, abs=1e-7)
    assert abs(found["ablation"][1, 0]) > 1e-3


def test_everything_is_restored_and_one_half_alone_is_refused(model):
    mean_ablation(model, [TextBatch(texts(1, 1))], [TextBatch(texts(1, 2))])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="other sequences"):
        mean_ablation(model, [TextBatch(texts(1, 1))], [])
