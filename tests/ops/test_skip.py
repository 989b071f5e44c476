"""Attention that skips closed gates, against the dense op whose gates are exactly 0 there."""

import pytest
import torch

from gated_attention import ops
from gated_attention.ops import reference
from gated_attention.ops.skip import eager
from gated_attention.ops.skip.op import skip_op
from gated_attention.ops.skip.rows import closing_logit, list_rows
from gated_attention.spec import GateSpec

HARD = GateSpec(granularity="headwise", activation="hard_sigmoid")
NAMES = ("out", "q", "k", "v", "gate_logits")


def inputs(t, share, *, s=None, group=2, kv_heads=2, d=16, batch=2, dtype=torch.float32, seed=0):
    """q, k, v, gate logits with a share of open rows, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    h, s = group * kv_heads, t if s is None else s
    shapes = [(batch, h, t, d), (batch, kv_heads, s, d), (batch, kv_heads, s, d), (batch, t, h, d)]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    is_open = torch.rand(batch, t, h, 1, generator=generator) < share
    spread = torch.rand(batch, t, h, 1, generator=generator)
    logits = torch.where(is_open, 7 * spread - 2.9, torch.where(spread < 0.5, -3.0, -8.0))
    return [x.to(dtype) for x in (q, k, v, logits, grad)]


def gradients(function, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def skip(*tensors, **options):
    return ops.gated_attention(*tensors, activation="hard_sigmoid", backend="skip", **options)


def composed(*tensors, **options):
    return ops.gated_attention(*tensors, activation="hard_sigmoid", backend="composed", **options)


def truth(q, k, v, s, **options):
    y, _ = reference.attention(q, k, v, **options)
    return reference.gate(y.transpose(1, 2), s, HARD)


def assert_rule(found, plain, exact, device="cpu"):
    for name, ours, theirs, true in zip(NAMES, found, plain, exact, strict=True):
        assert ours.isfinite().all(), name
        error, allowed = ((x.double().to(device) - true).abs().max() for x in (ours, theirs))
        # Rows of one key have no gradient of queries and keys: plain PyTorch gives 0, a rounded output over g does not.
        rounding = 1e-5 if true.abs().max() > 1e-9 else 2 * torch.finfo(ours.dtype).eps
        assert error <= 2 * allowed + rounding * max(true.abs().max(), exact[3].abs().max()), (name, error, allowed)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("t", "options"),
    [
        (1, {"group": 1}),
        (1, {"s": 40, "group": 4}),
        (63, {"group": 1}),
        (113, {"group": 8, "kv_heads": 1}),
        (50, {"s": 83}),
        (300, {"group": 3, "batch": 1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_are_the_definition(t, options, share, dtype):
    *tensors, grad = inputs(t, share, dtype=dtype, **options)
    exact = gradients(truth, [x.double() for x in tensors], grad)
    assert_rule(gradients(skip, tensors, grad), gradients(composed, tensors, grad), exact)


DOCUMENTS = torch.arange(70, 153).expand(2, -1) % 37


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"scale": 0.7},
        {"threshold": 0.3},
        {"first_keys": ops.find_first_keys(DOCUMENTS, 83)},
        {"first_keys": ops.find_first_keys(DOCUMENTS, 83, window=9), "threshold": 0.2},
        {"first_keys": torch.arange(83).flip(0).expand(2, -1)},
    ],
)
def test_every_option_is_that_of_the_dense_op(options):
    *tensors, grad = inputs(83, 0.5, dtype=torch.float64)
    found, dense = (gradients(lambda *x, run=run: run(*x, **options), tensors, grad) for run in (skip, composed))
    for ours, theirs in zip(found, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_negative_scale_is_no_special_case():
    *tensors, grad = inputs(83, 0.5, dtype=torch.float64)
    found, exact = (gradients(lambda *x, run=run: run(*x, scale=-0.3), tensors, grad) for run in (skip, truth))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_closed_rows_are_zero_and_nothing_of_them_is_read():
    *tensors, grad = inputs(113, 0.5, group=4)
    tensors[3][:, :, :4] = -3.0  # all heads of a group
    expected = gradients(skip, tensors, grad)
    shut = (tensors[3] <= -3)[..., 0]
    tensors[0].transpose(1, 2)[shut] = torch.nan
    grad[shut] = torch.nan
    found = gradients(skip, tensors, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not any(x[shut].any() for x in (found[0], found[1].transpose(1, 2), found[4]))
    assert not found[2][:, 0].any()
    assert not found[3][:, 0].any()
    assert found[2][:, 1].any()


def test_a_nan_logit_is_open_and_shows():
    *tensors, _ = inputs(20, 0.5)
    tensors[3][0, 7, 2] = torch.nan
    assert skip(*tensors).isnan().all(-1).nonzero().tolist() == [[0, 7, 2]]


@pytest.mark.parametrize("activation", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.7])
def test_a_threshold_changes_no_head_by_more_than_it_allows(activation, threshold):
    q, k, v, _, _ = inputs(113, 1.0, dtype=torch.float64)
    logits = torch.randn(2, 113, 4, 1, dtype=torch.float64) * 3
    options = {"activation": activation}
    exact = ops.gated_attention(q, k, v, logits, **options)
    found = ops.gated_attention(q, k, v, logits, threshold=threshold, backend="skip", **options)
    left_out = (found == 0).all(-1)
    scores = ops.gate_scores(logits, GateSpec(granularity="headwise", activation=activation))[..., 0]
    assert torch.equal(left_out, scores <= threshold)
    assert 0 < left_out.double().mean() < 1
    torch.testing.assert_close(found[~left_out], exact[~left_out])
    largest = v.abs().amax((2, 3))[:, None].repeat_interleave(2, -1)[..., None]  # (B, 1, H, 1)
    assert ((found - exact).abs() <= threshold * largest).all()
    assert (found - exact).abs().max() > threshold / 100


@pytest.mark.parametrize("backend", ["composed", "shifted"])
def test_a_threshold_is_the_same_to_the_dense_backends(backend):
    *tensors, grad = inputs(63, 0.9, dtype=torch.float64)
    run = ops.gated_attention
    found, dense = (
        gradients(lambda *x, name=name: run(*x, threshold=0.3, backend=name), tensors, grad)
        for name in ("skip", backend)
    )
    for ours, theirs in zip(found, dense, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (found[0] == 0).all(-1).double().mean() > 0.2


def test_logits_close_at_the_threshold_in_float32_whatever_their_dtype():
    at = closing_logit("sigmoid", 0.1)
    logits = torch.tensor([at - 1e-3, at, at + 1e-3, torch.nan, -torch.inf]).view(1, 5, 1)
    for dtype, open_rows in ((torch.float32, [2, 3]), (torch.bfloat16, [3])):  # bfloat16 rounds down here
        rows = list_rows(logits.to(dtype), 1, at)
        assert rows.order[0, 0, : len(open_rows)].tolist() == open_rows
        assert rows.before[0, 0, -1] == len(open_rows)


def test_the_list_holds_open_rows_by_position_and_every_row_once():
    logits = torch.tensor([[[1.0, -4.0], [-3.0, 0.0], [2.0, 3.0]]])  # (B, T, H), one group
    rows = list_rows(logits, 1, -3.0)
    assert rows.order.tolist() == [[[0, 3, 4, 5, 2, 1]]]
    assert rows.before.tolist() == [[[0, 1, 2, 4]]]
    assert [x.shape for x in list_rows(logits, 2, -3.0)] == [(1, 2, 3), (1, 2, 4)]


def test_memory_layout_does_not_matter():
    q, k, v, s, grad = inputs(63, 0.5)
    expected = gradients(skip, (q, k, v, s), grad)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = gradients(skip, (*by_token, torch.cat((s, s), -1)[..., 1:]), grad)
    assert found[0].is_contiguous()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_op_is_registered_whole():
    *tensors, _ = inputs(20, 0.5)
    tensors = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(skip_op, (*tensors, "hard_sigmoid", -3.0, True, 0.25, "eager"), atol=1e-5, rtol=1e-4)


def test_it_compiles_whole_for_every_length(compile_whole):
    compiled = compile_whole(skip, backend="aot_eager", dynamic=True)
    for t in (63, 50):
        *tensors, grad = inputs(t, 0.5)
        for ours, theirs in zip(*(gradients(run, tensors, grad) for run in (compiled, skip)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_transforms_are_right_or_refused():
    q, k, v, s, grad = inputs(9, 0.5)
    weight = grad.sum(0)
    each = torch.stack(
        [torch.func.grad(lambda x: (skip(x[None], k[:1], v[:1], s[:1])[0] * weight).sum())(x) for x in q]
    )
    together = torch.func.vmap(torch.func.grad(lambda x: (skip(x[None], k[:1], v[:1], s[:1])[0] * weight).sum()))(q)
    torch.testing.assert_close(together, each)
    with pytest.raises(ValueError, match="it has no forward-mode derivative; use 'composed'"):
        torch.func.jvp(lambda x: skip(x, k, v, s), (q,), (q,))
    x = q.requires_grad_()
    (first,) = torch.autograd.grad(skip(x, k, v, s).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative; use"):
        first.sum().backward()


def test_more_open_rows_than_a_tile_holds(monkeypatch):
    *tensors, grad = inputs(63, 0.5, dtype=torch.float64)
    expected = gradients(skip, tensors, grad)
    monkeypatch.setattr(eager, "_TILE", 7)
    for ours, theirs in zip(gradients(skip, tensors, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_takes_it_by_itself():
    q, k, _, s, _ = inputs(9, 0.5)
    assert ops.choose_gated_backend(q, k, s, activation="hard_sigmoid") == "composed"
    assert ops.choose_gated_backend(q, k, s, threshold=0.5) == "composed"
    assert ops.choose_gated_backend(q, k, s, activation="hard_sigmoid", backend="skip") == "skip"


class OnAGPU(torch.Tensor):
    device = torch.device("cuda")


def test_on_a_gpu_nothing_takes_it_by_itself_either(monkeypatch):
    monkeypatch.setattr("gated_attention.ops.fused._TRITON", "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = torch.empty(1, 2, 8, 64, dtype=torch.bfloat16).as_subclass(OnAGPU)
    s = torch.empty(1, 8, 2, 1, dtype=torch.bfloat16)
    options = {"activation": "hard_sigmoid"}
    assert ops.choose_gated_backend(q, q, s, **options) == "composed"
    assert ops.choose_gated_backend(q, q, s, threshold=0.1) == "hopper"
    assert ops.choose_gated_backend(q, q, s, backend="skip", **options) == "skip"
    for x, why in (
        (q[..., :24], "head_dim 16, 32, 64, 128 and 256, not 24"),
        (q.float(), "float16 and bfloat16"),
        (q.half(), r"beside queries in float16 it takes gate logits in float16, not torch\.bfloat16"),
    ):
        with pytest.raises(ValueError, match=why):
            ops.choose_gated_backend(x, x, s, backend="skip", **options)


def test_which_kernels_run_is_known_before(monkeypatch):
    monkeypatch.setattr("gated_attention.ops.fused._TRITON", "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = torch.empty(1, 2, 8, 128, dtype=torch.bfloat16).as_subclass(OnAGPU)
    s = torch.empty(1, 8, 2, 1, dtype=torch.bfloat16)
    assert ops.choose_skip_kernels(q, s) == ops.choose_skip_kernels(q[..., :64], s) == "hopper"
    assert ops.choose_skip_kernels(q[..., :32], s) == "triton"
    assert ops.choose_skip_kernels(q, s, torch.zeros(1, 8, dtype=torch.int32)) == "triton"
    apart = torch.empty(2**32, dtype=torch.bfloat16, device="meta").as_strided((1, 2, 8, 128), (0, 2**31, 128, 1))
    assert ops.choose_skip_kernels(apart.as_subclass(OnAGPU), s) == "triton"
    assert ops.choose_skip_kernels(q, s.to("meta").as_strided((1, 8, 2, 1), (0, 2**29, 1, 1))) == "triton"
    assert ops.choose_skip_kernels(q.as_subclass(torch.Tensor), s) == "eager"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert ops.choose_skip_kernels(q, s) == "triton"


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)},
            "'skip' cannot run: it takes no mask tensor; use 'composed'",
        ),
        ({"activation": "sigmoid"}, "'skip' cannot run: a sigmoid closes no gate without a threshold"),
        ({"activation": "silu"}, "unknown gate activation 'silu'; choose from sigmoid, hard_sigmoid"),
        ({"activation": "hard_sigmoid", "backend": "shifted"}, "it computes a sigmoid, not 'hard_sigmoid'"),
        ({"threshold": 1.0}, r"gate threshold is 1\.0; it must be at least 0\.0 and below 1\.0"),
        ({"threshold": float("nan")}, "gate threshold is nan"),
    ],
)
def test_what_cannot_run_says_why(options, why):
    q, k, v, s, _ = inputs(9, 0.5)
    with pytest.raises(ValueError, match=why) as error:
        ops.gated_attention(q, k, v, s, **{"activation": "hard_sigmoid", "backend": "skip"} | options)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_says_why():
    q, k, v, s, _ = inputs(9, 0.5)
    with pytest.raises(ValueError, match="9 queries to 8 keys; it needs at least as many keys as queries"):
        skip(q, k[:, :, :8], v[:, :, :8], s)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads in equal groups"):
        skip(q[:, :3], k, v, s[:, :, :3])
    with pytest.raises(ValueError, match="it takes one gate per head, not one per channel"):
        skip(q, k, v, s.expand(-1, -1, -1, 16))
    assert skip(q[:, :, :0], k, v, s[:, :0]).shape == (2, 0, 4, 16)


@pytest.fixture(params=["triton", "hopper"])
def kernels(request, monkeypatch):
    """Every kernel that the GPU can run, also where another is chosen."""
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setattr("gated_attention.ops.skip.op.choose_skip_kernels", lambda *_: request.param)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", [{"d": 64}, {"d": 128, "group": 1}, {"d": 64, "group": 8, "s": 900}, {"d": 256}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpu_is_no_worse_than_twice_plain_pytorch(share, options, dtype, kernels):
    from gated_attention.ops.triton import skip_rows

    if (options["d"], kernels) == (256, "hopper"):
        pytest.skip("not offered")
    *tensors, grad = (x.cuda() for x in inputs(799, share, dtype=dtype, **options))
    exact = gradients(truth, [x.double() for x in tensors], grad)
    plain = gradients(composed, tensors, grad)
    for ours, theirs in zip(
        *(run(tensors[3][..., 0], 2, -3.0) for run in (list_rows, skip_rows.list_rows)), strict=True
    ):
        assert torch.equal(ours, theirs)
    shut = (tensors[3] <= -3)[..., 0]
    tensors[0].transpose(1, 2)[shut] = torch.nan
    grad[shut] = torch.nan
    found = gradients(skip, tensors, grad)
    assert not found[0][shut].any()
    assert_rule(found, plain, exact, "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_a_cuda_graph_follows_the_gates():
    q, k, v, s, _ = (x.cuda() for x in inputs(300, 0.5, d=64, dtype=torch.bfloat16))
    skip(q, k, v, s)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = skip(q, k, v, s)
    for share in (0.2, 0.9):
        s.copy_(inputs(300, share, seed=1)[3])
        graph.replay()
        assert torch.equal(out, skip(q, k, v, s))
