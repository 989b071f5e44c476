"""The work list of the forward kernel that skips, the slow way."""

import torch


def sorted_work(rows, group, num_keys, causal, BM, BN):
    """As `skip_work.list_work`."""
    batch, kv_heads, num_places = rows.order.shape
    offset = num_keys - num_places // group if causal else 0
    found = []
    for head, (order, before) in enumerate(zip(rows.order.flatten(0, 1), rows.before.flatten(0, 1), strict=True)):
        for rank, first in enumerate(range(int(before[-1]) - BM, -BM, -BM)):
            last = int(order[first + BM - 1]) // group + offset if causal else num_keys - 1
            found.append((-(last // BN + 1), head, rank, first))
    entries = [(head, first, -n, 1) for n, head, _, first in sorted(found)]
    capacity = batch * kv_heads * -(-num_places // BM)
    return torch.tensor(entries + [(0, -1024, 0, 0)] * (capacity + 1 - len(entries)), dtype=torch.int32)
