"""Sizes as data: exact parameter counts, and FFNs narrowed to equal cost."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gated_attention.models.configuration_gated_qwen3 import make_config
from gated_attention.sizes import SIZES, count_flops, count_parameters, get_size, match_parameters
from gated_attention.spec import BlockSpec, GateSpec, SwitchSpec

HEADWISE = GateSpec(granularity="headwise")
ELEMENTWISE = GateSpec()
RELEASED = get_size("1.7b-28l")


def test_the_released_baseline_and_headwise_models_keep_the_wide_ffn():
    assert RELEASED.intermediate_size == 6144
    assert count_parameters(RELEASED).total == 1_720_837_120
    assert count_parameters(RELEASED, BlockSpec((HEADWISE,))).total == 1_721_754_624


def test_the_released_elementwise_model_is_what_matching_gives():
    matched = match_parameters(RELEASED, BlockSpec((ELEMENTWISE,)))
    assert matched == replace(RELEASED, intermediate_size=5504)
    assert count_parameters(matched, BlockSpec((ELEMENTWISE,))).total == 1_728_177_152


BLOCKS = {
    "plain": BlockSpec(),
    "headwise": BlockSpec((HEADWISE,)),
    "everywhere": BlockSpec(
        (
            GateSpec(head_shared=True, bias=0.5),
            GateSpec("value", "headwise", input_dim=12),
            GateSpec("key"),
            GateSpec("query", bias=0.0),
            GateSpec("output"),
        )
    ),
    "parameter": BlockSpec((GateSpec(input="parameter", init="zeros"),)),
    "learned sink": BlockSpec((GateSpec(granularity="headwise", input="lse", bias=0.0),)),
    "softmax off by one": BlockSpec((GateSpec(granularity="headwise", input="lse"),)),
    "switched values": BlockSpec(switch=SwitchSpec("value", 8, 2)),
    "switched keys and values": BlockSpec(switch=SwitchSpec("key_value", 4, 4)),
    "norms": BlockSpec(sdpa_transform="rms_norm", sandwich_norm=True, output_clip=100.0),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("name", SIZES)
def test_the_account_is_that_of_the_built_model(name, block):
    size = get_size(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(size, block))
    account = count_parameters(size, block)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}  # tied weights once
    assert account.total == sum(sizes.values())
    assert account.gates == sum(count for name, count in sizes.items() if "g_proj" in name)
    assert account.embeddings == sum(count for name, count in sizes.items() if "embed" in name or "lm_head" in name)
    assert account.ffn == sum(count for name, count in sizes.items() if ".mlp." in name)
    assert account.norms == sum(count for name, count in sizes.items() if "norm" in name)
    added = count_parameters(size, block).total - count_parameters(size).total
    assert added == size.num_hidden_layers * block.num_parameters(size.geometry)


def test_an_untied_head_counts_as_embeddings():
    size = replace(get_size("tiny"), tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(size))
    account = count_parameters(size)
    assert account.embeddings == 2 * 257 * 128
    assert account.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("gate", [HEADWISE, ELEMENTWISE], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("name", ["tiny", "xs", "s", "m"])
def test_matching_leaves_less_than_a_thousandth(name, gate):
    size, block = get_size(name), BlockSpec((gate,))
    matched = match_parameters(size, block)
    before, after = count_parameters(size).total, count_parameters(matched, block).total
    assert abs(after - before) / before < 1e-3
    assert matched.intermediate_size <= size.intermediate_size
    assert matched.intermediate_size % size.ffn_multiple == 0


def test_no_gates_leave_a_size_as_it_is():
    assert match_parameters(get_size("s"), BlockSpec()) == get_size("s")


def test_matching_rounds_to_the_nearest_multiple():
    size = replace(get_size("s"), ffn_multiple=64)
    # Elementwise: 768 of 3 * 512 parameters an FFN channel, 256 channels; the value gate at half the heads: 128.
    assert match_parameters(size, BlockSpec((ELEMENTWISE,))).intermediate_size == 1536 - 256
    assert match_parameters(size, BlockSpec((ELEMENTWISE, GateSpec("value")))).intermediate_size == 1536 - 384
    assert match_parameters(size, BlockSpec((HEADWISE,))).intermediate_size == 1536  # 2 channels round to none


def test_gates_dearer_than_the_ffn_are_refused():
    size = replace(get_size("tiny"), intermediate_size=32)
    with pytest.raises(
        ValueError, match="more than the FFN of size 'tiny'; choose a cheaper variant or a wider FFN"
    ) as error:
        match_parameters(size, BlockSpec((ELEMENTWISE,)))
    assert "\n" not in str(error.value)


def test_an_account_adds_up():
    account = count_parameters(get_size("tiny"), BlockSpec((HEADWISE,)))
    stored = account.to_dict()
    assert stored.pop("total") == sum(stored.values()) == account.total


def test_an_unknown_size_names_the_choices():
    with pytest.raises(
        ValueError,
        match=r"unknown size 'huge'; choose from tiny, xs, s, m, moe-tiny, moe-xs, moe-s, 1\.7b-28l, 1\.7b-48l, 15a2b",
    ):
        get_size("huge")


def test_flops_follow_the_weights_that_a_token_meets():
    tiny, sparse = SIZES["tiny"], SIZES["moe-tiny"]
    weights = tiny.vocab_size * 128 + 4 * (128 * 18 * 32 + 3 * 128 * 384)
    assert count_flops(tiny, 256).total == 6 * (weights + 4 * 192 * 256)
    twin = 6 * (sparse.vocab_size * 128 + 4 * (128 * 18 * 32 + 4 * 3 * 128 * 48 + 128 * 16 + 192 * 256))
    assert count_flops(sparse, 256).total == twin
    assert count_flops(tiny, 256, BlockSpec(GateSpec())).gates == 6 * 4 * 128 * 192
