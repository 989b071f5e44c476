"""Run by test_triton_skip.py with Triton's interpreter switched on: the work list, against a sort."""

import itertools

import interpreted  # noqa: F401  # as fast as it can be
import torch
from sorted_work import sorted_work

from gated_attention.ops.skip.rows import list_rows
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
