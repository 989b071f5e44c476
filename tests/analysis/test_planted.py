"""A sink, its kind and a massive activation that were put there are found where they were put."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gated_attention.analysis import inspect_model

LENGTH, LAYER, HEAD, HEAD_DIM, SHARE = 64, 2, 1, 16, 0.6
PLACES = np.ones((4, 4), dtype=bool)
PLACES[LAYER, HEAD] = False


@pytest.fixture
def model():
    """GPT-2, which hands keys to attention as they leave their projection."""
    config = GPT2Config(
        n_embd=64, n_layer=4, n_head=4, vocab_size=50, n_positions=128, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, LENGTH))


def bias_that_takes(share, position):
    """The score b, over keys of score 0, with which a key gets that share on average of the queries that see it."""
    seen = np.arange(position, LENGTH)  # other keys that each of those queries sees
    biases = np.linspace(0, 12, 100_001)
    shares = np.mean([np.exp(biases) / (np.exp(biases) + n) for n in seen], axis=0)
    return float(biases[np.abs(shares - share).argmin()])


def plant_sink(model, position):
    bias = bias_that_takes(SHARE, position)

    def hook(module, inputs, output):
        q, k, v = (part.unflatten(-1, (4, HEAD_DIM)).clone() for part in output.chunk(3, dim=-1))
        q[:, :, HEAD, 0], k[:, :, HEAD, 0] = 1.0, 0.0
        q[:, :, HEAD, 1:] = 0.0
        k[:, position, HEAD, 0] = bias * HEAD_DIM**0.5
        return torch.cat([part.flatten(-2) for part in (q, k, v)], dim=-1)

    model.transformer.h[LAYER].attn.c_attn.register_forward_hook(hook)


@pytest.mark.parametrize("position", [0, 3])
def test_a_planted_sink_is_found_at_its_layer_head_and_position(model, ids, position):
    plant_sink(model, position)
    found = inspect_model(model, [ids], level="full").measures
    assert found["sink_position"][LAYER, HEAD] == position
    assert found["sink_share"][LAYER, HEAD] == pytest.approx(SHARE, abs=1e-3)
    assert found["peak"][LAYER, HEAD] == pytest.approx(SHARE, abs=1e-3)
    assert found["sink_share"][PLACES].max() < 0.2
    assert found["peak_elsewhere"][LAYER, HEAD] == (position != 0)
    assert found["entropy"][LAYER, HEAD] < found["entropy"][PLACES].min() - 0.5
    if position == 0:
        assert found["f_attn"][LAYER, HEAD] > SHARE - 0.05
        assert found["f_attn"][PLACES].max() < 0.15
        assert found["sink_rate"][LAYER, HEAD] == 1.0
        assert found["sink_rate"][PLACES].max() == 0.0
    else:
        assert found["f_attn"].max() < 0.15
        assert found["sink_rate"].max() == 0.0


def plant_values(model, size, position, share_of_others=1.0):
    """Scale the value of one position, and the values of all others, in the planted head."""

    def hook(module, inputs, output):
        q, k, v = (part.unflatten(-1, (4, HEAD_DIM)).clone() for part in output.chunk(3, dim=-1))
        at_position = v[:, position, HEAD] * size
        v[:, :, HEAD] *= share_of_others
        v[:, position, HEAD] = at_position
        return torch.cat([part.flatten(-2) for part in (q, k, v)], dim=-1)

    model.transformer.h[LAYER].attn.c_attn.register_forward_hook(hook)


def kinds(found):
    return found["no_op_sink"], found["broadcast_sink"]


def test_without_a_sink_no_head_is_of_either_kind(model, ids):
    found = inspect_model(model, [ids])
    for kind in ("no_op_sink", "broadcast_sink"):
        assert found.measures[kind].sum() == 0
        assert found.overall(kind) == 0


@pytest.mark.parametrize("position", [0, 3])
def test_a_sink_without_a_value_is_a_no_op(model, ids, position):
    plant_sink(model, position)
    plant_values(model, 0.0, position)
    found = inspect_model(model, [ids])
    no_op, broadcast = kinds(found.measures)
    assert found.measures["sink_value"][LAYER, HEAD] == 0
    assert no_op[LAYER, HEAD] == 1
    assert no_op[PLACES].sum() == broadcast.sum() == 0
    assert found.overall("no_op_sink") == pytest.approx(1 / 16)


@pytest.mark.parametrize("position", [0, 3])
def test_a_sink_whose_value_reaches_every_query_broadcasts(model, ids, position):
    plant_sink(model, position)
    plant_values(model, 20.0, position)
    found = inspect_model(model, [ids]).measures
    no_op, broadcast = kinds(found)
    assert found["sink_value"][LAYER, HEAD] > 10
    assert found["update_rank"][LAYER, HEAD] == pytest.approx(1, abs=0.05)
    assert found["update_constant"][LAYER, HEAD] > 0.8
    assert broadcast[LAYER, HEAD] == 1
    assert broadcast[PLACES].sum() == no_op.sum() == 0


def test_a_head_that_reads_one_token_only_adds_one_direction(model, ids):
    plant_sink(model, 0)
    plant_values(model, 1.0, 0, share_of_others=0.0)
    found = inspect_model(model, [ids]).measures
    assert found["update_rank"][LAYER, HEAD] == pytest.approx(1, abs=1e-5)


def test_a_sink_of_middling_value_is_of_neither_kind(model, ids):
    plant_sink(model, 0)
    plant_values(model, 0.3, 0)
    found = inspect_model(model, [ids]).measures
    assert 0.2 < found["sink_value"][LAYER, HEAD] < 0.5
    assert not any(kind.any() for kind in kinds(found))


def plant_activation(model, value, layer, position, channel):
    def hook(module, inputs, output):
        output = output.clone()
        output[:, position, channel] += value
        return output

    model.transformer.h[layer].mlp.register_forward_hook(hook)


def test_a_planted_massive_activation_is_found_at_its_layer_token_and_channel(model, ids):
    assert inspect_model(model, [ids]).massive == ()
    plant_activation(model, -3000.0, layer=1, position=5, channel=17)
    found = inspect_model(model, [ids])
    assert {(one.layer, one.position, one.channel) for one in found.massive} == {(n, 5, 17) for n in (1, 2, 3)}
    first = next(one for one in found.massive if one.layer == 1)
    assert first.share == 1.0
    assert first.value == pytest.approx(3000, abs=1)
    assert first.over_median == pytest.approx(first.value / found.measures["median_activation"][1], rel=0.1)
    assert first.token_id in ids[:, 5].tolist()
    np.testing.assert_array_equal(found.measures["massive_tokens"], [0, 1, 1, 1])
    np.testing.assert_allclose(found.measures["m_act"][1:], 3000, atol=1)


def test_large_is_not_massive_below_either_bound(model, ids):
    plant_activation(model, 99.0, layer=1, position=5, channel=17)  # above 1000 times the median, below 100
    found = inspect_model(model, [ids])
    assert found.measures["m_act"][1] > 1000 * found.measures["median_activation"][1]
    assert found.massive == ()


def test_a_large_median_makes_large_values_ordinary(model, ids):
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: output + 1.0)
    plant_activation(model, 900.0, layer=1, position=5, channel=17)
    found = inspect_model(model, [ids])
    assert found.measures["m_act"][1] > 100
    assert found.massive == ()
    assert found.measures["massive_tokens"].max() == 0.0
