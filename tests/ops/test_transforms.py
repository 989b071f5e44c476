"""The gate and attention under `torch.func`, in forward mode, and differentiated twice: eager's values or one line."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from gated_attention import ops
from gated_attention.spec import GateSpec

SPECS = {
    "elementwise": GateSpec(),
    "headwise": GateSpec(granularity="headwise", activation="ns_sigmoid", scale=2.0),
    "head-shared, additive": GateSpec(head_shared=True, activation="silu", combine="add"),
}


def gate_tensors(spec):
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    return y, torch.randn(2, 3, 4, 1 if spec.granularity == "headwise" else 5, dtype=torch.float64)


def along(function):
    return lambda x: jvp(function, (x,), (x.detach().cos(),))[1]


def gate_transforms(apply, y, x):
    def total(y, x):
        return apply(y[None], x[None]).sin().sum()

    found = {
        "grad": grad(lambda x: apply(y, x).sin().sum())(x),
        "vmap": vmap(lambda y, x: apply(y[None], x[None]))(y, x),
        "vmap over y alone": vmap(lambda y: apply(y[None], x[:1]))(y),
        "grad of each": vmap(grad(total, (0, 1)))(y, x),
        "grad of logits that all share": vmap(grad(lambda x, y: apply(y[None], x).sin().sum()), (None, 0))(x[:1], y),
        "jvp": jvp(apply, (y, x), (y.cos(), x.cos()))[1],
        "jvp of logits alone": jvp(lambda x: apply(y, x), (x,), (x.cos(),))[1],
        "jvp of y alone": jvp(lambda y: apply(y, x), (y,), (y.cos(),))[1],
        "hessian": hessian(lambda x: apply(y, x).sin().sum())(x),
        "jvp twice": along(along(lambda x: apply(y, x).sin().sum()))(x),
        "jvp twice of grad": along(along(lambda x: (grad(lambda x: apply(y, x).sin().sum())(x) * y.sum()).sum()))(x),
        "grad of jvp twice": grad(along(along(lambda x: apply(y, x).sin().sum())))(x),
    }
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(y.clone().requires_grad_(), y.cos())
        found["dual tensors that want gradients"] = forward_ad.unpack_dual(apply(dual, x)).tangent.detach()
    return found


@pytest.mark.parametrize("backend", ["auto", "recompute"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_gate_is_eager_under_every_transform(spec, backend):
    tensors = gate_tensors(spec)
    found = gate_transforms(lambda y, x: ops.gate(y, x, spec, backend=backend), *tensors)
    expected = gate_transforms(lambda y, x: ops.gate(y, x, spec, backend="eager"), *tensors)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_gates_derivatives_are_finite_differences(spec):
    leaves = [x[:1, :2].clone().requires_grad_() for x in gate_tensors(spec)]

    def apply(y, x):
        return ops.gate(y, x, spec, backend="recompute")

    torch.autograd.gradcheck(apply, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(apply, leaves, check_fwd_over_rev=True)


def heads():
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 5, 4, 1)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def sdpa(q, k, v, s):
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2] = False
    y, lse = ops.attention(q, k, v, mask=mask | torch.eye(5, dtype=torch.bool), backend="sdpa")
    return torch.cat((y, lse[..., None] * s.transpose(1, 2)), -1)


def truth_of_sdpa(q, k, v, s):
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2] = False
    y, lse = ops.attention(q, k, v, mask=mask | torch.eye(5, dtype=torch.bool), backend="eager")
    return torch.cat((y, lse[..., None] * s.transpose(1, 2)), -1)


def shifted(q, k, v, s):
    return ops.gated_attention(q, k, v, s, backend="shifted")


def truth_of_shifted(q, k, v, s):
    y, _ = ops.attention(q, k, v, backend="eager")
    return ops.gate(y.transpose(1, 2), s, GateSpec(granularity="headwise"))


KERNELS = {"sdpa": (sdpa, truth_of_sdpa), "shifted": (shifted, truth_of_shifted)}


@pytest.mark.parametrize(("kernel", "truth"), KERNELS.values(), ids=KERNELS.keys())
def test_kernels_are_differentiated_and_mapped_as_eager_attention(kernel, truth):
    every = tuple(range(4))
    tensors = heads()
    found = grad(lambda *x: kernel(*x).sin().sum(), every)(*tensors)
    expected = grad(lambda *x: truth(*x).sin().sum(), every)(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    q, k, v, s = tensors
    more = (torch.stack((q, q.cos(), -q)), k, torch.stack((v, v.sin(), -v), 2), s)
    for transform in (lambda f: f, lambda f: grad(lambda *x: f(*x).sin().sum(), every)):
        mapped = [vmap(transform(f), (0, None, 2, None))(*more) for f in (kernel, truth)]
        torch.testing.assert_close(*mapped, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
def test_auto_is_right_in_forward_mode(compiled, request):
    *qkv, s = heads()

    def tangent(backend):
        return jvp(lambda *x: ops.attention(*x, backend=backend), tuple(qkv), tuple(x.cos() for x in qkv))[1]

    run = request.getfixturevalue("compile_whole")(tangent, backend="eager") if compiled else tangent
    torch.testing.assert_close(run("auto"), tangent("eager"), rtol=1e-12, atol=1e-12)
    gated = jvp(lambda *x: ops.gated_attention(*x, s), tuple(qkv), tuple(qkv))[1]
    torch.testing.assert_close(gated, jvp(lambda *x: truth_of_shifted(*x, s), tuple(qkv), tuple(qkv))[1])


@pytest.mark.parametrize(("kernel", "truth"), KERNELS.values(), ids=KERNELS.keys())
def test_what_a_kernel_cannot_differentiate_is_refused_in_one_line(kernel, truth):
    tensors = tuple(heads())
    with pytest.raises(ValueError, match=r"cannot run: .*no forward-mode derivative; use ") as error:
        jvp(kernel, tensors, tensors)
    assert "\n" not in str(error.value)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative; use ") as error:
        jvp(grad(lambda *x: kernel(*x).sum()), tensors, tensors)
    assert "\n" not in str(error.value)
    q, *others = tensors
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(q, *others).sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative; use ") as error:
        gradient.sum().backward()
    assert "\n" not in str(error.value)
    (first,) = torch.autograd.grad(truth(q, *others).sin().sum(), q, create_graph=True)
    assert torch.autograd.grad(first.sum(), q)[0].any()  # eager, as the line says
