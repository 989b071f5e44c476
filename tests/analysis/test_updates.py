"""The rank and the constant share of a head's outputs, where they are known."""

import numpy as np
import pytest
import torch
from naive_measures import naive_updates
from torch.testing import assert_close

from gated_attention.analysis.measures import head_updates, sampled_outputs

TOKENS, HEAD_DIM = 100, 16


def of(outputs):
    """Both measures of one head, whose outputs are (tokens, head_dim)."""
    rank, constant = head_updates(outputs[None, None, :, None])
    return rank.item(), constant.item()


def test_one_vector_for_every_token_has_rank_one_and_is_constant():
    assert of(torch.randn(HEAD_DIM).expand(TOKENS, -1)) == pytest.approx((1, 1), rel=1e-5)


def test_one_direction_with_both_signs_has_rank_one_and_is_not_constant():
    signs = torch.tensor([1.0, -1.0]).repeat(TOKENS // 2)
    assert of(signs[:, None] * torch.randn(HEAD_DIM)) == pytest.approx((1, 0), abs=1e-5)


@pytest.mark.parametrize("rank", [2, 7, 16])
def test_orthogonal_outputs_of_one_size_have_the_rank_of_their_number(rank):
    outputs = 3.0 * torch.eye(HEAD_DIM)[:rank]
    assert of(outputs) == pytest.approx((rank, 1 / rank), rel=1e-5)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 4e-4, 1e-4, 1e-5])
def test_close_singular_values_change_the_rank_by_less_than_a_thousandth(gap):
    sizes = torch.tensor([1.0, *[1 - gap] * 127])
    assert of(torch.diag(sizes))[0] == pytest.approx(sizes.square().sum().item(), rel=7e-4)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_size_of_the_outputs_does_not_matter(size):
    outputs = torch.randn(TOKENS, HEAD_DIM)
    assert of(size * outputs) == pytest.approx(of(outputs), rel=1e-4)


def test_a_head_that_adds_nothing_has_neither():
    assert np.isnan(of(torch.zeros(TOKENS, HEAD_DIM))).all()


def test_low_precision_is_widened_under_autocast_too():
    outputs = torch.randn(2, 3, TOKENS, 4, HEAD_DIM).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = head_updates(outputs)
    exact = head_updates(outputs.double())
    for found, expected in zip(low, exact, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_blocks_of_sequences_change_nothing(monkeypatch):
    outputs = torch.randn(2, 3, TOKENS, 4, HEAD_DIM, dtype=torch.float64)
    whole = head_updates(outputs)
    monkeypatch.setattr("gated_attention.analysis.measures.whole_tensors.BLOCK_ELEMENTS", 1)
    assert_close(head_updates(outputs), whole)
    for layer, rank, constant in zip(outputs, *whole, strict=True):
        naive = naive_updates(layer)
        np.testing.assert_allclose(rank.mean(0), naive["update_rank"], rtol=1e-3)
        np.testing.assert_allclose(constant.mean(0), naive["update_constant"])


def test_long_sequences_are_sampled_evenly_and_from_the_first_token_on():
    heads = torch.arange(600.0)[None, :, None, None]
    assert sampled_outputs(heads).flatten().tolist() == list(range(0, 600, 3))
    assert sampled_outputs(heads[:, :256]).shape[1] == 256
