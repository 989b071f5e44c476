"""Sizes as data: exact parameter counts, and FFNs narrowed to equal cost."""

from dataclasses import replace

import pytest
import torch

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.sizes import SIZES, count_parameters, get_size, match_parameters
from gated_attention.spec import GateSpec, as_gates

HEADWISE = GateSpec(granularity="headwise")
ELEMENTWISE = GateSpec()
RELEASED = get_size("1.7b-28l")


def test_the_released_baseline_and_headwise_models_keep_the_wide_ffn():
    assert RELEASED.intermediate_size == 6144
    assert count_parameters(RELEASED).total == 1_720_837_120
    assert count_parameters(RELEASED, (HEADWISE,)).total == 1_721_754_624


def test_the_released_elementwise_model_is_what_matching_gives():
    matched = match_parameters(RELEASED, (ELEMENTWISE,))
    assert matched == replace(RELEASED, intermediate_size=5504)
    assert count_parameters(matched, (ELEMENTWISE,)).total == 1_728_177_152


GATE_SETS = {
    "none": (),
    "headwise": (HEADWISE,),
    "everywhere": (
        GateSpec(head_shared=True, bias=0.5),
        GateSpec("value", "headwise", input_dim=12),
        GateSpec("key"),
        GateSpec("query", bias=0.0),
        GateSpec("output"),
    ),
    "parameter": (GateSpec(input="parameter", init="zeros"),),
}


@pytest.mark.parametrize("gates", GATE_SETS.values(), ids=GATE_SETS.keys())
@pytest.mark.parametrize("name", SIZES)
def test_the_account_is_that_of_the_built_model(name, gates):
    with torch.device("meta"):
        model = GatedQwen3ForCausalLM(GatedQwen3Config.from_size(get_size(name), gates))
    account = count_parameters(get_size(name), gates)
    assert account.total == sum(parameter.numel() for parameter in model.parameters())  # tied weights once
    assert account.gates == sum(p.numel() for n, p in model.named_parameters() if "g_proj" in n)
    assert account.embeddings == model.get_input_embeddings().weight.numel()
    assert account.ffn == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert account.norms == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)


def test_an_untied_head_counts_as_embeddings():
    size = replace(get_size("tiny"), tie_word_embeddings=False)
    with torch.device("meta"):
        model = GatedQwen3ForCausalLM(GatedQwen3Config.from_size(size))
    account = count_parameters(size)
    assert account.embeddings == 2 * 257 * 128
    assert account.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("gates", [(HEADWISE,), (ELEMENTWISE,)], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("name", ["tiny", "xs", "s", "m"])
def test_matching_leaves_less_than_a_thousandth(name, gates):
    size = get_size(name)
    matched = match_parameters(size, gates)
    before, after = count_parameters(size).total, count_parameters(matched, gates).total
    assert abs(after - before) / before < 1e-3
    assert matched.intermediate_size <= size.intermediate_size
    assert matched.intermediate_size % size.ffn_multiple == 0


def test_no_gates_leave_a_size_as_it_is():
    assert match_parameters(get_size("s"), ()) == get_size("s")


def test_matching_rounds_to_the_nearest_multiple():
    size = replace(get_size("s"), ffn_multiple=64)
    # Elementwise: 768 of 3 * 512 parameters an FFN channel, 256 channels; the value gate at half the heads: 128.
    assert match_parameters(size, (ELEMENTWISE,)).intermediate_size == 1536 - 256
    assert match_parameters(size, as_gates((ELEMENTWISE, GateSpec("value")))).intermediate_size == 1536 - 384
    assert match_parameters(size, (HEADWISE,)).intermediate_size == 1536  # 2 channels round to none


def test_gates_dearer_than_the_ffn_are_refused():
    size = replace(get_size("tiny"), intermediate_size=32)
    with pytest.raises(ValueError, match="more than the FFN of size 'tiny'; use fewer gates or a wider FFN") as error:
        match_parameters(size, (ELEMENTWISE,))
    assert "\n" not in str(error.value)


def test_an_account_adds_up():
    account = count_parameters(get_size("tiny"), (HEADWISE,))
    stored = account.to_dict()
    assert stored.pop("total") == sum(stored.values()) == account.total


def test_an_unknown_size_names_the_choices():
    with pytest.raises(ValueError, match=r"unknown size 'huge'; choose from tiny, xs, s, m, 1\.7b-28l, 1\.7b-48l"):
        get_size("huge")
