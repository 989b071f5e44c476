"""Every attention backend against the float64 definition: output, log-sum-exp and all gradients."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gated_attention import ops
from gated_attention.ops import reference


class Case(NamedTuple):
    """Sizes and options of one attention; `mask` names a maker of masks below."""

    t: int
    s: int
    h: int = 4
    k: int = 2
    d: int = 64
    causal: bool = True
    mask: str | None = None
    scale: float | None = None
    b: int = 2

    def inputs(self, dtype=torch.float64, device="cpu"):
        """Seeded q, k, v, and a weight for each element of the output and of the log-sum-exp."""
        shapes = [(self.h, self.t, self.d), (self.k, self.s, self.d), (self.k, self.s, self.d)]
        shapes += [(self.h, self.t, self.d), (self.h, self.t)]
        generator = torch.Generator().manual_seed(1)
        # Rounded to bfloat16, so that every dtype starts from the same numbers.
        values = [torch.randn(self.b, *shape, generator=generator).bfloat16() for shape in shapes]
        return [value.to(device, dtype) for value in values]

    def options(self, device="cpu") -> dict[str, Any]:
        mask = None if self.mask is None else MASKS[self.mask](self.t, self.s, self.h).to(device)
        return {"causal": self.causal, "scale": self.scale, "mask": mask}


def left_padding(t, s, h):
    """Five keys of the first sequence are padding, so its first queries see nothing under a causal mask."""
    mask = torch.ones(2, 1, t, s, dtype=torch.bool)
    mask[0, :, :, :5] = False
    return mask


def per_head(t, s, h):
    """Random, another one for each head, with rows that see nothing."""
    mask = torch.rand(1, h, t, s, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[:, 0, :3] = False
    mask[:, -1, -1] = False
    return mask


def documents(t, s, h):
    """Two packed documents that do not see each other, one mask for every sequence and head."""
    document = torch.arange(s) >= s // 3
    return (document[s - t :, None] == document)[None, None]


MASKS = {"left_padding": left_padding, "per_head": per_head, "documents": documents}

CASES = {
    "one token": Case(1, 1, 1, 1, 16),
    "odd, groups of 2": Case(63, 63),
    "odd, one head each": Case(113, 113, 2, 2, 128),
    "odd, groups of 8": Case(113, 113, 8, 1, 16),
    "all see all": Case(113, 113, 8, 1, 128, causal=False),
    "long": Case(799, 799, 2, 1, b=1),
    "continuation": Case(7, 63),
    "one new token": Case(1, 113, 8, 1, 128),
    "more queries than keys": Case(63, 7),
    "cross attention": Case(113, 63, causal=False),
    "left padding": Case(63, 63, mask="left_padding"),
    "mask per head": Case(63, 63, 4, 1, mask="per_head"),
    "mask per head, all see all": Case(33, 65, causal=False, mask="per_head"),
    "documents": Case(63, 63, causal=True, mask="documents"),
    "sharp scores": Case(63, 63, 2, 2, 128, scale=1.0),
}
BACKENDS = ["eager", "sdpa"]


def outputs_and_gradients(attend, tensors, weights):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = attend(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weights[0].to(out.dtype), weights[1].to(lse.dtype)))
    return dict(
        zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out.detach(), lse.detach(), *gradients), strict=True)
    )


def plain_attention(q, k, v, *, causal, scale, mask):
    """What one writes in PyTorch without thinking further, in the dtype of its inputs: the error rule's yardstick."""
    groups, t, s = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(s - t)
    if mask is not None:
        visible = visible & mask
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).float()
    scores = scores.masked_fill(~visible, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(q.dtype).masked_fill(~visible, 0.0)
    return weights @ v, scores.logsumexp(-1).masked_fill(~visible.any(-1), float("-inf"))


def compare(case, dtype, backend, check, device="cpu"):
    options = case.options(device)
    exact_inputs = case.inputs(torch.float64, device)
    exact = outputs_and_gradients(lambda *x: reference.attention(*x, **options), exact_inputs[:3], exact_inputs[3:])
    inputs = case.inputs(dtype, device)
    plain = outputs_and_gradients(lambda *x: plain_attention(*x, **options), inputs[:3], inputs[3:])
    found = outputs_and_gradients(lambda *x: ops.attention(*x, **options, backend=backend), inputs[:3], inputs[3:])
    assert found["out"].dtype == dtype
    assert found["lse"].dtype == torch.float32
    for name, result in found.items():
        check(name, result, plain[name], exact[name], atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backends_are_no_worse_than_twice_plain_pytorch(case, backend, dtype, assert_within_twice):
    compare(case, dtype, backend, assert_within_twice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "long"])
def test_backends_are_exact_in_float64(name, backend):
    *tensors, grad_out, grad_lse = CASES[name].inputs()
    options = CASES[name].options()
    exact = outputs_and_gradients(lambda *x: reference.attention(*x, **options), tensors, (grad_out, grad_lse))
    found = outputs_and_gradients(
        lambda *x: ops.attention(*x, **options, backend=backend), tensors, (grad_out, grad_lse)
    )
    for key, result in found.items():
        torch.testing.assert_close(
            result, exact[key], rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_the_reference_is_softmax_attention():
    q, k, v, *_ = CASES["odd, groups of 8"].inputs()
    out, lse = reference.attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        lse[..., 0], (q[:, :, 0] * k[:, :, 0]).sum(-1) / q.shape[-1] ** 0.5
    )  # one key, one score


@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd, groups of 2", "left padding"])
def test_gradients_through_one_output_alone(name, backend, through):
    *tensors, grad_out, grad_lse = CASES[name].inputs()
    options = CASES[name].options()
    gradients = []
    for attend in (reference.attention, lambda *x, **o: ops.attention(*x, **o, backend=backend)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out, lse = attend(*leaves, **options)
        result, weight = (out, grad_out) if through == "out" else (lse, grad_lse)
        gradients.append(torch.autograd.grad(result, leaves, weight, allow_unused=True))
    for exact, found in zip(*gradients, strict=True):
        if exact is None:
            assert found is None
        else:
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["more queries than keys", "left padding", "mask per head"])
def test_a_query_that_sees_no_key_gives_zero_and_finite_gradients(name, backend, dtype):
    case = CASES[name]
    q, k, v, grad_out, grad_lse = case.inputs(dtype)
    visible = torch.ones(case.t, case.s, dtype=torch.bool).tril(case.s - case.t)
    if case.mask is not None:
        visible = visible & case.options()["mask"]
    blind = ~visible.any(-1).expand(q.shape[:3])
    assert blind.any()
    found = outputs_and_gradients(
        lambda *x: ops.attention(*x, **case.options(), backend=backend), (q, k, v), (grad_out, grad_lse)
    )
    assert not found["out"][blind].any()
    assert found["lse"].isneginf().equal(blind)
    assert not found["grad_q"][blind].any()
    assert all(found[key].isfinite().all() for key in ("out", "grad_q", "grad_k", "grad_v"))


def layouts(x):
    """The same numbers (B, H, T, D) in memory as (B, T, H, D), inside wider rows, and with every other channel."""
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield torch.stack((x, -x), -1)[..., 0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend, dtype, device):
    q, k, v, *weights = CASES["odd, groups of 2"].inputs(dtype, device)
    attend = functools.partial(ops.attention, backend=backend)
    expected = outputs_and_gradients(attend, (q, k, v), weights)
    for *tensors, weight in zip(*map(layouts, (q, k, v, weights[0])), strict=True):
        assert not tensors[0].is_contiguous()
        found = outputs_and_gradients(attend, tensors, (weight, weights[1]))
        for key, result in found.items():
            torch.testing.assert_close(result, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_sum_is_that_of_ones(backend, dtype, device):
    q, k, v, *_ = (x.requires_grad_() for x in CASES["odd, groups of 2"].inputs(dtype, device))
    out, lse = ops.attention(q, k, v, backend=backend)
    expected = torch.autograd.grad(
        (out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)), retain_graph=True
    )
    (out.sum() + lse.sum()).backward()  # the gradient arrives as one number, expanded to the shape
    for leaf, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_it_does_for_pytorchs_own_attention(backend):
    q, k, v, *_ = (x.requires_grad_() for x in CASES["odd, groups of 2"].inputs(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ops.attention(q, k, v, backend=backend)
    expected, expected_lse = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.equal(expected)
    assert lse.equal(expected_lse)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "chosen"),
    [
        ("cpu", torch.float64, 64, "sdpa"),
        ("cpu", torch.bfloat16, 20, "sdpa"),
        ("meta", torch.float32, 64, "eager"),
        ("cuda", torch.float64, 64, "eager"),
        ("cuda", torch.float32, 20, "sdpa"),
        ("cuda", torch.bfloat16, 64, "sdpa"),
        ("cuda", torch.bfloat16, 256, "sdpa"),
        ("cuda", torch.bfloat16, 20, "eager"),
        ("cuda", torch.float16, 264, "eager"),
    ],
)
def test_auto_takes_the_fused_kernels_where_they_run(device, dtype, head_dim, chosen):
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, head_dim, device=device, dtype=dtype)
        assert ops.choose_backend(q, q, q) == chosen
        assert ops.choose_backend(q, q, q, backend="eager") == "eager"
        if chosen == "eager":
            with pytest.raises(ValueError, match=r"'sdpa' cannot run: .*; use 'eager' or 'auto'") as error:
                ops.choose_backend(q, q, q, backend="sdpa")
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scores_may_be_scaled_by_what_is_not_positive(scale):
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("eager", "sdpa"):
        out, lse = ops.attention(q, k, v, scale=scale, backend=backend)
        results.append((out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), (q, k, v))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    gated = ops.gated_attention(q, k, v, torch.zeros(1, 5, 2, 1, dtype=torch.float64), scale=scale)
    torch.testing.assert_close(gated, results[0][0].transpose(1, 2) / 2)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale is .*; it must be finite"):
            ops.attention(q, k, v, scale=wrong)


def test_flex_is_refused_where_it_cannot_run():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="'flex' returns a log-sum-exp on CUDA only, not on 'cpu'; use") as error:
        ops.attention(q, q, q, backend="flex")
    assert "\n" not in str(error.value)
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, 16, device="cuda")
        mask = torch.ones(1, 1, 3, 3, device="cuda", dtype=torch.bool)
        assert ops.choose_backend(q, q, q, backend="flex") == "flex"
        with pytest.raises(ValueError, match="'flex' takes no mask tensor; use 'eager', 'sdpa' or 'auto'"):
            ops.choose_backend(q, q, q, mask=mask, backend="flex")


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_backend_names_the_choices():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; choose from auto, eager, sdpa, flex"):
        ops.attention(q, q, q, backend="flash")


def test_wrong_shapes_are_caught_by_the_test_run():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 8)
    with pytest.raises(Exception, match="Type-check error") as error:
        ops.attention(q, k, k)
    assert type(error.value).__name__ == "TypeCheckError"


@pytest.mark.usefixtures("without_shape_checks")  # opcheck traces with symbolic sizes
@pytest.mark.parametrize("name", ["odd, groups of 2", "left padding"])
def test_ops_are_registered_soundly(name):
    case = CASES[name]
    q, k, v, grad, _ = case.inputs(torch.float32)
    mask = case.options()["mask"]
    causal, scale = mask is None, 0.125
    with torch.no_grad():
        out, lse = torch.ops.gated_attention.sdpa(q, k, v, mask, causal, scale)
    torch.library.opcheck(torch.ops.gated_attention.sdpa_backward, (grad, q, k, v, mask, out, lse, causal, scale))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gated_attention.sdpa, (*leaves, mask, causal, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_compiles_whole(backend, compile_whole):
    case = CASES["left padding"]
    q, k, v, *weights = case.inputs(torch.float32)

    def attend(q, k, v):
        causal_only, lse = ops.attention(q, k, v, backend=backend)
        out, masked_lse = ops.attention(q, k, v, **case.options(), backend=backend)
        return causal_only + out, lse + masked_lse.clamp(min=-9.0)

    compiled = outputs_and_gradients(compile_whole(attend, backend="aot_eager"), (q, k, v), weights)
    for key, result in outputs_and_gradients(attend, (q, k, v), weights).items():
        torch.testing.assert_close(compiled[key], result, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
@pytest.mark.parametrize("name", CASES)
def test_backends_on_the_gpu_are_no_worse_than_twice_plain_pytorch(name, backend, dtype, assert_within_twice):
    case = CASES[name]
    if backend == "flex":
        if case.mask is not None:
            pytest.skip("flex takes no mask tensor")
        torch.compiler.reset()  # every case is another shape
    compare(case, dtype, backend, assert_within_twice, device="cuda")


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 5), (3, 0)])
def test_no_queries_or_no_keys_give_nothing(t, s, backend):
    q, k = torch.randn(2, 4, t, 8), torch.randn(2, 2, s, 8)
    for causal in (True, False):
        out, lse = ops.attention(q, k, k, causal=causal, backend=backend)
        assert out.equal(torch.zeros(2, 4, t, 8))
        assert lse.equal(torch.full((2, 4, t), float("-inf")))
    gated = ops.gated_attention(q, k, k, torch.randn(2, t, 4, 1), causal=False, backend="shifted")
    assert gated.equal(torch.zeros(2, t, 4, 8))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("mask", "cure"),
    [
        (torch.ones(2, 7, dtype=torch.bool), r"a padding mask \(B, S\) is mask\[:, None, None, :\]"),
        (torch.ones(7, 7, dtype=torch.bool), r"one \(T, S\) for all is mask\[None, None\]"),
        (torch.ones(2, 7, 7, dtype=torch.bool), r"use \(B, H, T, S\) = \(2, 4, 7, 7\)"),
        (torch.ones(2, 3, 7, 7, dtype=torch.bool), r"use \(B, H, T, S\) = \(2, 4, 7, 7\)"),
        (torch.ones(2, 1, 7, 1, dtype=torch.bool), r"use \(B, H, T, S\) = \(2, 4, 7, 7\)"),
        (torch.zeros(2, 1, 7, 7), "torch.float32 .* use a boolean one"),
        (torch.ones(2, 1, 7, 7, dtype=torch.int64), "torch.int64 .* use a boolean one"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(mask, cure):
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    for attend in (ops.attention, lambda q, k, v, mask: ops.gated_attention(q, k, v, q.transpose(1, 2), mask=mask)):
        with pytest.raises(ValueError, match=cure) as error:
            attend(q, k, k, mask=mask)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_padding_mask_hides_keys_from_every_query(backend):
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.arange(7) >= torch.tensor([[0], [3]])  # (B, S)
    given = ops.attention(q, k, k, mask=mask[:, None, None, :], backend=backend)
    full = ops.attention(q, k, k, mask=mask[:, None, None, :].expand(2, 4, 7, 7), backend="eager")
    torch.testing.assert_close(given, full)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_heads_that_do_not_share_in_equal_groups_are_refused(backend):
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 32, 8, 16)
    with pytest.raises(ValueError, match="4 query heads cannot share 32"):
        ops.attention(q, k, k, backend=backend)
