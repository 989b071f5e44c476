"""Counts and balance of routers, by hand."""

import pytest
import torch

from gated_attention.nn.routing import count_experts, load_balance_loss


def test_pairs_are_counted_by_expert():
    chosen = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert count_experts(chosen, 5).tolist() == [2, 1, 0, 3, 0]


@pytest.mark.parametrize("top_k", [1, 4])
def test_balanced_router_has_a_load_balance_loss_of_one(top_k):
    even = torch.full((3, 8), 5 * top_k), torch.full((3, 8), 1 / 8)
    assert load_balance_loss(*even).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[40] * top_k + [0] * (8 - top_k)])
    assert load_balance_loss(collapsed, collapsed / collapsed.sum()).item() == pytest.approx(8 / top_k)
