"""Experts under autocast: the grouped product in bfloat16, at every width, compiled or not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gated_attention.models import GatedQwen3MoeConfig
from gated_attention.models.experts import GatedQwen3MoeExperts

NUM_EXPERTS, HIDDEN, TOKENS, TOP_K = 6, 32, 50, 2


class GroupedProducts(TorchDispatchMode):
    """Remembers dtype and shape of what enters a grouped product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "grouped_mm" in str(function):
            self.seen += [(x.dtype, x.shape) for x in args[:2]]
        return function(*args, **(kwargs or {}))


def build(width, implementation="grouped_mm", kind=GatedQwen3MoeExperts):
    config = GatedQwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=width, num_experts=NUM_EXPERTS)
    config._experts_implementation = implementation
    experts = kind(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.2, generator=generator)
    return experts


@pytest.fixture
def routed():
    x = torch.randn(TOKENS, HIDDEN)
    weights, chosen = torch.randn(TOKENS, NUM_EXPERTS).softmax(-1).topk(TOP_K)
    return x, chosen, weights


def run(experts, routed, autocast=True, function=None):
    experts.zero_grad()
    with torch.autocast(routed[0].device.type, torch.bfloat16, enabled=autocast):
        out = (experts if function is None else function)(*routed)
    out.float().square().sum().backward()
    return out.detach(), experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()


@pytest.mark.parametrize("width", [16, 20])
def test_without_autocast_they_are_transformers_own(routed, width):
    ours, theirs = build(width), build(width, kind=Qwen3MoeExperts)
    for found, expected in zip(run(ours, routed, False), run(theirs, routed, False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [16, 20, 3])
def test_autocast_multiplies_whole_16_bytes_of_bfloat16(routed, width):
    experts = build(width)
    with GroupedProducts() as products:
        run(experts, routed)
    assert products.seen
    for dtype, shape in products.seen:
        assert dtype == torch.bfloat16
        assert all(size % 8 == 0 for size in shape if size not in (NUM_EXPERTS, TOKENS * TOP_K))


@pytest.mark.parametrize("width", [16, 20, 3])
def test_autocast_result_is_that_of_the_loop_over_experts(routed, width, assert_within_twice):
    exact = run(build(width, "eager").double(), [x.double() if x.is_floating_point() else x for x in routed], False)
    loop, grouped = run(build(width, "eager", Qwen3MoeExperts), routed), run(build(width), routed)
    for name, found, plain, truth in zip(("output", "gate_up", "down"), grouped, loop, exact, strict=True):
        assert_within_twice(name, found, plain, truth, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' version checks
def test_compiled_autocast_keeps_the_grouped_product(routed, compile_whole):
    experts, graphs = build(20), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    expected = run(experts, routed)
    for found, wanted in zip(
        run(experts, routed, function=compile_whole(experts, backend=keep)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if "grouped" in str(node.target)]
    assert len(called) == 2
    assert not any("fallback" in name for name in called)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_runs_the_grouped_product(routed, width, compiled, without_shape_checks, assert_within_twice):
    exact = run(build(width, "eager").double(), [x.double() if x.is_floating_point() else x for x in routed], False)
    routed = [x.cuda() for x in routed]
    loop = run(build(width, "eager", Qwen3MoeExperts).cuda(), routed)
    experts = build(width).cuda()
    function = torch.compile(experts, fullgraph=True) if compiled else experts
    run(experts, routed, function=function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        grouped = run(experts, routed, function=function)
    names = {event.key for event in profile.key_averages()}
    assert any("_grouped_mm" in name for name in names)
    assert "transformers::grouped_mm_fallback" not in names
    for name, found, plain, truth in zip(("output", "gate_up", "down"), grouped, loop, exact, strict=True):
        assert_within_twice(name, found.cpu(), plain.cpu(), truth, atol=1e-3)
