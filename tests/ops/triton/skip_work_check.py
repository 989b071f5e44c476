"""The work list for Hopper, the slow way; as a script, against the kernel that makes it.

Run by test_triton_skip.py with Triton's interpreter switched on.
"""

import itertools

import torch

from gated_attention.ops.skip.rows import list_rows


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


if __name__ == "__main__":
    import interpreted  # noqa: F401  # as fast as it can be

    from gated_attention.ops.triton import skip_work

    skip_work._RANKS, skip_work._HEADS = 8, 4  # so that there are several programs, and steps in them
    torch.manual_seed(0)
    TILES = itertools.cycle(((64, 64, 0), (192, 64, 37), (128, 128, 37), (192, 128, 0)))  # rows, keys, keys before
    SHARES = (0.0, 0.05, "by head", 1.0)
    for t, group, causal, share in itertools.product((1, 63, 300), (1, 4), (True, False), SHARES):
        open_share = torch.rand(2, 1, 3 * group) if share == "by head" else share
        rows = list_rows(torch.where(torch.rand(2, t, 3 * group) < open_share, 1.0, -3.0), 3, -3.0)
        BM, BN, more = next(TILES)
        arguments = (rows, group, t + more, causal, BM, BN)
        assert torch.equal(skip_work.list_work(*arguments), sorted_work(*arguments)), (t, group, share, causal, BM, BN)
