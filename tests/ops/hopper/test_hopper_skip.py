"""The forward kernel for Hopper that skips closed gates, played on the CPU."""

import math
from pathlib import Path
from types import SimpleNamespace

import gluon_player as player
import pytest
import torch
from skip_work_check import sorted_work

from gated_attention.ops import reference, skip
from gated_attention.ops.skip.rows import GateActivation, Rows, closing_logit, list_rows
from gated_attention.spec import GateSpec

HOPPER = Path(skip.__file__).parent.with_name("hopper")
CASES = {  # t, s, key/value heads, group, share of open rows
    "one row": (1, 1, 1, 1, 1.0),
    "odd": (63, 63, 2, 1, 0.5),
    "groups of 4": (200, 200, 1, 4, 0.3),
    "groups of 8, few": (130, 130, 1, 8, 0.01),
    "all open, many tiles for a program": (200, 200, 2, 4, 1.0),
    "more keys": (63, 150, 1, 4, 0.4),
    "all closed": (70, 70, 2, 2, 0.0),
    "first and last": (300, 300, 1, 4, None),
}


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))

    def describe(x, rows):
        return player.Descriptor(x, block=[1, 1, rows, x.shape[-1]])

    pipeline = player.play(HOPPER / "pipeline.py", describe=describe)
    attend = player.play(HOPPER / "attend.py", pipeline, pack=lambda x, dtype: x.to(dtype), unpack=lambda x, dtype: x)
    kernel = player.play(HOPPER / "skip_forward.py", pipeline, attend)
    kernel.skip_forward_kernel = player.Kernel(kernel.skip_forward_kernel)
    cuts = player.play(HOPPER / "forward_launch.py", pipeline)
    rest = SimpleNamespace(list_work=sorted_work, Rows=Rows, GateActivation=GateActivation)
    return player.play(HOPPER / "skip_forward_launch.py", pipeline, attend, cuts, kernel, rest)


def inputs(t, s, kv_heads, group, share, d, activation, threshold):
    generator = torch.Generator().manual_seed(0)
    heads = kv_heads * group
    shapes = [(2, t, heads, d), (2, s, kv_heads, d), (2, s, kv_heads, d)]
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes)
    closed_at = closing_logit(activation, threshold)
    is_open = torch.rand(2, t, heads, 1, generator=generator) < (share or 0.0)
    if share is None:
        is_open[:, [0, -1]] = True
    spread = torch.rand(2, t, heads, 1, generator=generator)
    return q, k, v, torch.where(is_open, closed_at + 0.1 + 7 * spread, closed_at - spread).bfloat16(), closed_at


def assert_definition(launch, case, d, *, causal=True, activation="hard_sigmoid", threshold=0.0, scale=0.1):
    t, s, kv_heads, group, share = CASES[case]
    q, k, v, logits, closed_at = inputs(t, s, kv_heads, group, share, d, activation, threshold)
    shut = (logits.float() <= closed_at)[..., 0].transpose(1, 2)
    o, lse = reference.attention(q.double(), k.double(), v.double(), causal=causal, scale=scale)
    scores = reference.gate(
        torch.ones_like(o).transpose(1, 2), logits.double(), GateSpec(granularity="headwise", activation=activation)
    ).transpose(1, 2)
    exact = (o * scores).masked_fill(shut[..., None], 0.0)
    rows = list_rows(logits[..., 0], kv_heads, closed_at)
    q[shut] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **options: torch.zeros(*size, **options).fill_(math.nan))
        out, places = launch.attention_forward(q, k, v, logits, rows, activation, causal, scale, None)
    assert not out[shut].any()
    assert out.isfinite().all()
    assert (out - exact).norm().item() <= 4e-3 * exact.norm().item()
    shifted = (lse / math.log(2) - scores[..., 0].log2()).unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2)
    is_open = torch.arange(t * group) < rows.before[..., -1:]
    expected = shifted.gather(-1, rows.order.long())
    torch.testing.assert_close(places[is_open].double(), expected[is_open], atol=1e-3, rtol=1e-5)
    assert places[~is_open].isnan().all()  # not written


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_definition(case, d, launch):
    assert_definition(launch, case, d)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"activation": "sigmoid", "threshold": 0.1},
        {"threshold": 0.2},
        {"scale": -0.2},
    ],
)
def test_it_computes_every_option(options, launch):
    assert_definition(launch, "more keys", 64, **options)


def test_three_warpgroups_write_through_the_queries(launch):
    launch.BLOCKS[128] = launch.BLOCKS[128]._replace(num_keys=64, num_stages=3, num_consumers=3)
    assert_definition(launch, "all open, many tiles for a program", 128)


def test_two_warpgroups_have_memory_for_the_output(launch):
    launch.BLOCKS[64] = launch.BLOCKS[64]._replace(num_query_stages=1, num_consumers=2)
    assert_definition(launch, "groups of 4", 64)
