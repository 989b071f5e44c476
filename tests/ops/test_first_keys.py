"""First keys tell documents, windows and padding apart as a mask does."""

import pytest
import torch

from gated_attention import ops
from gated_attention.ops import fused
from gated_attention.ops.first_keys import to_mask

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [1, 1, 0, 1, 2, 3]])  # three documents; two tokens of left padding


def test_a_document_begins_where_its_positions_do():
    assert ops.find_first_keys(POSITIONS).tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 2, 2, 2, 2]]


def test_a_window_ends_at_the_key_of_the_query():
    assert ops.find_first_keys(POSITIONS, window=2).tolist() == [[0, 0, 1, 3, 3, 5], [0, 0, 2, 2, 3, 4]]
    assert ops.find_first_keys(POSITIONS, window=1).tolist() == [list(range(6))] * 2


def test_queries_are_the_last_of_all_tokens_that_have_keys():
    continued = torch.tensor([[4, 5, 0]])  # five keys are in the cache, the first of another document
    assert ops.find_first_keys(continued, 8).tolist() == [[1, 1, 7]]


def inputs(t=6, s=6):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, t, 8), (2, 2, s, 8), (2, 2, s, 8), (2, t, 4, 1)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("t", "s"), [(6, 6), (6, 9)])
def test_they_are_a_mask_to_every_backend_that_takes_masks(t, s):
    tensors, first = inputs(t, s), ops.find_first_keys(POSITIONS, s, window=3)
    mask = to_mask(first, s)
    weight = torch.randn(2, t, 4, 8)
    also = torch.rand(2, 1, t, s) < 0.8
    for given in (None, also):
        found = ops.gated_attention(*tensors, mask=given, first_keys=first)
        expected = ops.gated_attention(*tensors, mask=mask if given is None else mask & given)
        for ours, theirs in zip(
            (found, *torch.autograd.grad(found, tensors, weight)),
            (expected, *torch.autograd.grad(expected, tensors, weight)),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_a_query_sees_its_own_key_whatever_is_asked():
    tensors = inputs()
    beyond = torch.full((2, 6), 100)
    assert torch.equal(
        ops.gated_attention(*tensors, first_keys=beyond),
        ops.gated_attention(*tensors, first_keys=torch.arange(6).expand(2, -1)),
    )


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("first_keys", "options", "match"),
    [
        (
            torch.zeros(2, 5, dtype=torch.int32),
            {},
            r"torch.int32 of shape \(2, 5\); give integers, \(B, T\) = \(2, 6\)",
        ),
        (torch.zeros(2, 6), {}, r"first_keys is torch.float32"),
        (torch.zeros(2, 6, dtype=torch.bool), {}, r"first_keys is torch.bool"),
        (torch.zeros(2, 6, dtype=torch.int64), {"causal": False}, "needs causal attention"),
        (torch.zeros(2, 6, dtype=torch.int64), {"backend": "shifted"}, "'shifted' cannot run: it takes no first keys"),
    ],
)
def test_what_does_not_fit_is_refused(first_keys, options, match):
    with pytest.raises(ValueError, match=match):
        ops.gated_attention(*inputs(), first_keys=first_keys, **options)


def test_a_window_of_no_keys_and_positions_of_another_form_are_refused(without_shape_checks):
    for positions in (torch.arange(3), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"give integers, \(B, T\)"):
            ops.find_first_keys(positions)
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        ops.find_first_keys(POSITIONS, window=0)


class OnAGPU(torch.Tensor):
    device = torch.device("cuda")


def test_on_a_gpu_the_portable_kernels_take_them(monkeypatch):
    monkeypatch.setattr(fused, "_TRITON", "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16).as_subclass(OnAGPU)
    first = torch.zeros(1, 8, dtype=torch.int32)
    assert ops.choose_gated_backend(q, q, q, first_keys=first) == "triton"
    assert ops.choose_gated_backend(q, q, q) == "hopper"
