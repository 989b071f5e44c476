"""Gated attention as one op against the float64 definition, and the LSE shift's identities."""

import re

import pytest
import torch

from gated_attention import ops
from gated_attention.ops import fused, lse_shift, reference
from gated_attention.spec import GateSpec

CASES = {  # t, s, heads, key/value heads, head_dim, causal
    "one token": (1, 1, 1, 1, 16, True),
    "odd, groups of 2": (63, 63, 4, 2, 64, True),
    "odd, groups of 8": (113, 113, 8, 1, 16, True),
    "several tiles": (300, 300, 4, 2, 128, True),
    "all see all": (33, 65, 4, 2, 64, False),
    "wide heads": (40, 40, 2, 2, 256, True),
}
LOGITS = {
    "ordinary": (1.0, 0.0),
    "closed": (1.0, -20.0),
    "shut": (0.0, -60.0),
    "open": (1.0, 20.0),
    "mixed": (20.0, 0.0),
}


def inputs(case, channels, logits, dtype, device="cpu"):
    t, s, h, k, d, _ = CASES[case]
    generator = torch.Generator().manual_seed(3)
    spread, shift = LOGITS[logits]
    shapes = [(2, h, t, d), (2, k, s, d), (2, k, s, d), (2, t, h, d if channels else 1), (2, t, h, d)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values[3] = values[3] * spread + shift
    return [value.bfloat16().to(device, dtype) for value in values]


def gradients(function, tensors, weight):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def truth(q, k, v, s, causal):
    y, _ = reference.attention(q, k, v, causal=causal)
    return reference.gate(y.transpose(1, 2), s, GateSpec())


def eager(q, k, v, s, causal):
    y, _ = ops.attention(q, k, v, causal=causal, backend="eager")
    return ops.gate(y.transpose(1, 2), s, GateSpec(), backend="eager")


def compare(case, channels, logits, dtype, device, backend):
    causal = CASES[case][-1]
    *tensors, weight = inputs(case, channels, logits, dtype, device)
    wide = [tensor.double() for tensor in tensors]
    expected = gradients(lambda *x: truth(*x, causal), wide, weight.double())
    plain = gradients(lambda *x: eager(*x, causal), tensors, weight)
    found = gradients(lambda *x: ops.gated_attention(*x, causal=causal, backend=backend), tensors, weight)
    names = ("out", "q", "k", "v", "gate_logits")
    # Alone, a token has no gradient of q and k: plain PyTorch gives exactly 0, a rounded output over g does not.
    # A shut gate makes the log-sum-exp large, so that its weights lose as many units in float32's last place.
    rounding = torch.finfo(dtype).eps if CASES[case][0] == 1 else 1e-5
    # In float16 a gate of e^-20 leaves nothing of the output that fused backwards could start from.
    lost = logits == "closed" and dtype == torch.float16
    for name, ours, theirs, exact in zip(names, found, plain, expected, strict=True):
        assert ours.isfinite().all(), name
        allowed = 2 * (theirs - exact).abs().max() + rounding * max(exact.abs().max(), expected[3].abs().max())
        if name == "out" or not lost:
            assert (ours - exact).abs().max() <= allowed, (name, (ours - exact).abs().max(), allowed)


@pytest.mark.parametrize("backend", ["composed", "shifted"])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_definition(case, channels, logits, backend):
    compare(case, channels, logits, torch.float32, "cpu", backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["shifted", "triton", "hopper"])
def test_the_gpu_is_no_worse_than_twice_plain_pytorch(case, channels, logits, dtype, backend):
    if logits == "shut" and dtype == torch.float16:
        pytest.skip("e^-60 is 0 in float16")
    if backend == "hopper" and CASES[case][4] < 64:
        pytest.skip("not its head_dim")
    compare(case, channels, logits, dtype, "cuda", backend)


@pytest.mark.gpu
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("case", ["odd, groups of 2", "several tiles"])
def test_hopper_is_no_worse_where_it_cuts_for_long_sequences(case, channels, logits, monkeypatch):
    from gated_attention.ops.hopper.forward_launch import CUTS

    d = CASES[case][4]
    monkeypatch.setitem(CUTS, d, CUTS[d]._replace(longest_short=0))
    compare(case, channels, logits, torch.bfloat16, "cuda", "hopper")


@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
def test_shift_alone_gives_the_gated_gradients(channels):
    """The stock kernel is given the raw gradient, the ungated output and the shifted log-sum-exp, and nothing else."""
    q, k, v, s, grad = inputs("odd, groups of 2", channels, "ordinary", torch.float64)
    o, lse = reference.attention(q, k, v)
    out = lse_shift.apply_gate(o, s)
    scaled, recovered, shifted, _ = lse_shift.prepare_backward(grad.transpose(1, 2), out, s, lse)
    torch.testing.assert_close(recovered, o)
    if channels:
        assert shifted is lse
    else:
        assert scaled.data_ptr() == grad.data_ptr()
        torch.testing.assert_close(shifted.exp(), (lse.exp() / torch.sigmoid(s[..., 0].transpose(1, 2))))


@pytest.mark.parametrize("channels", [False, True], ids=["headwise", "elementwise"])
def test_the_op_is_registered_whole(channels):
    *tensors, _ = inputs("odd, groups of 2", channels, "ordinary", torch.float32)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(fused.fused_attention, (*tensors, True, 0.125, "shifted"), atol=1e-5, rtol=1e-4)


def test_memory_layout_does_not_matter():
    q, k, v, s, weight = inputs("odd, groups of 2", True, "ordinary", torch.float32)
    expected = gradients(lambda *x: ops.gated_attention(*x, backend="shifted"), (q, k, v, s), weight)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    packed = torch.cat((s, s), dim=-1)[..., 64:]
    found = gradients(lambda *x: ops.gated_attention(*x, backend="shifted"), (*by_token, packed), weight)
    assert found[0].is_contiguous()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_keeps_only_what_it_needs():
    q, k, v, s, _ = inputs("odd, groups of 2", False, "ordinary", torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = ops.gated_attention(*(x.requires_grad_() for x in (q, k, v, s)), backend="shifted")
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v, s, y)}
    rest = [x for x in kept if x.untyped_storage().data_ptr() not in storages]
    assert [tuple(x.shape) for x in rest] == [(2, 4, 63)]  # the log-sum-exp


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_backend_names_the_choices():
    q, k, v, s, _ = inputs("one token", False, "ordinary", torch.float32)
    with pytest.raises(
        ValueError,
        match="unknown gated attention backend 'fast'; choose from auto, composed, shifted, triton, hopper, skip",
    ):
        ops.gated_attention(q, k, v, s, backend="fast")


def test_what_cannot_run_says_why():
    q, k, v, s, _ = inputs("odd, groups of 2", False, "ordinary", torch.float32)
    with pytest.raises(ValueError, match="'shifted' cannot run: it takes no mask"):
        ops.gated_attention(q, k, v, s, mask=torch.ones(1, 1, 63, 63, dtype=torch.bool), backend="shifted")
    with pytest.raises(ValueError, match="63 queries to 60 keys"):
        ops.gated_attention(q, k[:, :, :60], v[:, :, :60], s, backend="shifted")
    with pytest.raises(ValueError, match=r"'triton' cannot run: .*compute capability 8\.0 or newer, not device 'cpu'"):
        ops.gated_attention(q, k, v, s, backend="triton")
    with pytest.raises(
        ValueError, match=r"'hopper' cannot run: it needs a GPU of compute capability 9\.0.*device 'cpu'"
    ):
        ops.gated_attention(q, k, v, s, backend="hopper")
    assert ops.choose_gated_backend(q, k, s) == "composed"
    assert ops.choose_gated_backend(q, k, s, backend="shifted") == "shifted"


class OnAGPU(torch.Tensor):
    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("version", "why"),
    [(None, "Triton is not installed"), ("3.10.0", r"have run with Triton 3\.6\.x, .*, not with 3\.10\.0")],
)
def test_hopper_wants_the_triton_that_it_is_written_for(version, why, monkeypatch):
    monkeypatch.setattr(fused, "_TRITON", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16).as_subclass(OnAGPU)
    assert re.search(why, fused.why_not("hopper", q, q, q, causal=True, mask=None))
