"""The gate against its float64 definition: every variant, both backends, forward and gradients."""

import shutil

import pytest
import torch

from gated_attention import ops
from gated_attention.ops import reference
from gated_attention.ops.gate import ACTIVATIONS
from gated_attention.spec import GateSpec

B, T, H, D = 2, 63, 4, 16
BACKENDS = ["eager", "recompute"]
LANDMARKS = [0.0, 3.0, -3.0, 20.0, -20.0, 60.0, -60.0]

VARIANTS = {
    f"{activation}, {combine}, {name}": GateSpec(activation=activation, combine=combine, **shape)
    for activation in ACTIVATIONS
    for combine in ("multiply", "add")
    for name, shape in {
        "headwise": {"granularity": "headwise"},
        "elementwise": {},
        "head-shared": {"head_shared": True},
    }.items()
}


def tensors(spec, dtype=torch.float64, broadcast=()):
    """Seeded y, logits that include the landmarks, and a weight for each element of the result."""
    generator = torch.Generator().manual_seed(3)
    y, weight = torch.randn(2, B, T, H, D, generator=generator).bfloat16()
    shape = [B, T, H, 1 if spec.granularity == "headwise" else D]
    for axis in broadcast:
        shape[axis] = 1
    logits = 3 * torch.randn(shape, generator=generator).bfloat16()
    landmarks = torch.tensor(LANDMARKS[: logits.numel()])
    logits.view(-1)[: len(landmarks)] = landmarks
    return y.to(dtype), logits.to(dtype), weight.to(dtype)


def result_and_gradients(apply, y, logits, weight):
    y, logits = y.clone().requires_grad_(), logits.clone().requires_grad_()
    result = apply(y, logits)
    gradients = torch.autograd.grad(result, (y, logits), weight.to(result.dtype))
    return dict(zip(("result", "grad_y", "grad_logits"), (result.detach(), *gradients), strict=True))


def plain_gate(y, logits, spec):
    """What one writes in PyTorch without thinking further, in the dtype of its inputs: the error rule's yardstick."""
    scores = {
        "sigmoid": torch.sigmoid,
        "silu": torch.nn.functional.silu,
        "identity": lambda x: x,
        "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
        "hard_sigmoid": torch.nn.functional.hardsigmoid,
        "softplus": torch.nn.functional.softplus,
    }[spec.activation](logits)
    scores = spec.scale * (scores.mean(2, keepdim=True) if spec.head_shared else scores)
    return y * scores if spec.combine == "multiply" else y + scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_is_exact_in_float64(spec, backend):
    found = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), *tensors(spec))
    exact = result_and_gradients(lambda y, x: reference.gate(y, x, spec), *tensors(spec))
    # PyTorch's own derivative of the hard sigmoid multiplies by a sixth that it rounds to float32.
    tolerance = 1e-7 if (spec.activation, backend) == ("hard_sigmoid", "eager") else 1e-12
    for key, result in found.items():
        torch.testing.assert_close(
            result, exact[key], rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_is_no_worse_than_twice_plain_pytorch(spec, backend, dtype, assert_within_twice):
    exact = result_and_gradients(lambda y, x: reference.gate(y, x, spec), *tensors(spec))
    plain = result_and_gradients(lambda y, x: plain_gate(y, x, spec), *tensors(spec, dtype))
    found = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), *tensors(spec, dtype))
    for key, result in found.items():
        assert result.dtype == dtype
        assert_within_twice(key, result, plain[key], exact[key], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score_dtype", ["float32", "model"])
def test_a_closed_hard_sigmoid_is_zero_and_passes_no_gradient(score_dtype, dtype, backend):
    spec = GateSpec(granularity="headwise", activation="hard_sigmoid", dtype=score_dtype)
    inside = torch.nextafter(torch.tensor(-3.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    logits = torch.tensor([-60.0, -3.0, inside, 0.0, 3.0, 60.0], dtype=dtype)
    y = torch.randn(1, 6, 1, D).to(dtype)
    found = result_and_gradients(
        lambda y, x: ops.gate(y, x, spec, backend=backend), y, logits[None, :, None, None], torch.ones_like(y)
    )
    result, grad_y, grad_logits = (x.flatten(2)[0] for x in found.values())
    assert not result[:2].any()
    assert not grad_y[:2].any()
    assert result[2].any()
    assert result[4:].equal(y[0, 4:, 0])
    assert (grad_logits[:, 0] != 0).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_model_dtype_is_hugging_faces_expression_bit_for_bit(granularity, backend):
    y, gate, _ = tensors(GateSpec(granularity=granularity), torch.bfloat16)
    expected = y * torch.sigmoid(gate)
    assert ops.gate(y, gate, GateSpec(granularity=granularity, dtype="model"), backend=backend).equal(expected)
    wide = y * torch.sigmoid(gate.float()).bfloat16()
    assert ops.gate(y, gate, GateSpec(granularity=granularity), backend=backend).equal(wide)


def test_model_dtype_really_rounds_in_between():
    y, logits, _ = tensors(GateSpec(), torch.bfloat16)
    wide = GateSpec(activation="ns_sigmoid")
    narrow = GateSpec(activation="ns_sigmoid", dtype="model")
    assert not ops.gate(y, logits, wide).equal(ops.gate(y, logits, narrow))


@pytest.mark.parametrize("broadcast", [(0, 1), (0,), (1,)], ids=["parameter", "batch", "token"])
@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [{}, {"granularity": "headwise"}, {"head_shared": True}], ids=["elementwise", "headwise", "head-shared"]
)
def test_logits_are_broadcast_over_batch_and_tokens(shape, backend, combine, broadcast):
    spec = GateSpec(input="parameter", combine=combine, **shape)
    inputs = tensors(spec, broadcast=broadcast)
    found = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), *inputs)
    exact = result_and_gradients(lambda y, x: reference.gate(y, x, spec), *inputs)
    assert found["grad_logits"].shape == inputs[1].shape
    for key, result in found.items():
        torch.testing.assert_close(
            result, exact[key], rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_multiplies_scores_and_gradients(backend):
    inputs = tensors(GateSpec())
    single = result_and_gradients(lambda y, x: ops.gate(y, x, GateSpec(), backend=backend), *inputs)
    double = result_and_gradients(lambda y, x: ops.gate(y, x, GateSpec(scale=2.0), backend=backend), *inputs)
    for key, result in double.items():
        torch.testing.assert_close(result, 2 * single[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alone", ["y", "logits"])
def test_gradients_of_one_input_alone(alone, backend):
    spec = GateSpec(head_shared=True)
    y, logits, weight = tensors(spec)
    both = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), y, logits, weight)
    leaf = (y if alone == "y" else logits).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.gate(y, logits, spec, backend=backend), leaf, weight)
    torch.testing.assert_close(gradient, both[f"grad_{alone}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_y(backend):
    y, logits, _ = tensors(GateSpec(), torch.bfloat16)
    expected = ops.gate(y, logits, GateSpec(), backend=backend)
    logits = logits.float().requires_grad_()
    mixed = ops.gate(y, logits, GateSpec(), backend=backend)
    assert mixed.dtype == torch.bfloat16
    assert mixed.equal(expected)
    mixed.sum().backward()
    assert logits.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [GateSpec(), GateSpec(granularity="headwise")], ids=["elementwise", "headwise"])
def test_memory_layout_does_not_matter(spec, backend):
    y, logits, weight = tensors(spec)
    expected = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), y, logits, weight)
    y = y.transpose(1, 2).contiguous().transpose(1, 2)
    logits = torch.stack((logits, -logits), -1)[..., 0]
    found = result_and_gradients(lambda y, x: ops.gate(y, x, spec, backend=backend), y, logits, weight)
    for key, result in found.items():
        torch.testing.assert_close(result, expected[key])


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_scores_are_what_the_gate_multiplies_by(spec):
    _, logits, _ = tensors(spec)
    scores = ops.gate_scores(logits, spec)
    nothing = torch.ones(B, T, H, D, dtype=torch.float64)
    unshared = reference.gate(nothing, logits, spec) - (nothing if spec.combine == "add" else 0)
    torch.testing.assert_close(scores.expand_as(nothing), unshared, rtol=1e-12, atol=1e-12)
    assert scores.shape == (B, T, *((1 if spec.head_shared else H), logits.shape[-1]))


def test_scores_are_float32_unless_the_model_dtype_is_asked_for():
    _, logits, _ = tensors(GateSpec(), torch.bfloat16)
    assert ops.gate_scores(logits, GateSpec()).dtype == torch.float32
    assert ops.gate_scores(logits, GateSpec(dtype="model")).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stated_derivatives_are_those_of_the_values(activation):
    x = torch.tensor([*LANDMARKS, 1.0, -0.5, 2.5, -7.0], dtype=torch.float64, requires_grad=True)
    value, derivative = ACTIVATIONS[activation]
    (gradient,) = torch.autograd.grad(value(x).sum(), x)
    # PyTorch's are the less exact: g (1 - g) cancels at 20, and the hard sigmoid's sixth is a float32.
    torch.testing.assert_close(derivative(x.detach()), gradient, rtol=1e-7, atol=1e-20)


def kept_for_backward(backend):
    y, logits, _ = tensors(GateSpec(), torch.bfloat16)
    y, logits = y.requires_grad_(), logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.gate(y, logits, GateSpec(), backend=backend)
    inputs = {y.data_ptr(), logits.data_ptr()}
    return [x for x in kept if x.data_ptr() in inputs], [x for x in kept if x.data_ptr() not in inputs]


def test_recompute_keeps_nothing_but_its_inputs_for_backward():
    inputs, extra = kept_for_backward("recompute")
    assert len(inputs) == 2
    assert not extra
    assert kept_for_backward("eager")[1]  # what there is to save: the scores


def test_auto_recomputes_what_wants_gradients():
    y, logits, _ = tensors(GateSpec())
    assert ops.choose_gate_backend("auto", y, logits) == "eager"
    assert ops.choose_gate_backend("auto", y, logits.requires_grad_()) == "recompute"
    with torch.no_grad():
        assert ops.choose_gate_backend("auto", y, logits) == "eager"
    assert ops.choose_gate_backend() == ops.choose_gate_backend("auto") == "recompute"
    assert [ops.choose_gate_backend(backend) for backend in BACKENDS] == BACKENDS


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_backend_names_the_choices():
    y, logits, _ = tensors(GateSpec())
    with pytest.raises(ValueError, match="unknown gate backend 'fused'; choose from auto, eager, recompute") as error:
        ops.gate(y, logits, GateSpec(), backend="fused")
    assert "\n" not in str(error.value)


OPCHECKS = {
    "elementwise": (GateSpec(), ()),
    "headwise, additive": (GateSpec(granularity="headwise", combine="add", activation="silu", scale=2.0), ()),
    "head-shared parameter": (GateSpec(head_shared=True, input="parameter", dtype="model"), (0, 1)),
}


@pytest.mark.usefixtures("without_shape_checks")  # opcheck traces with symbolic sizes
@pytest.mark.parametrize(("spec", "broadcast"), OPCHECKS.values(), ids=OPCHECKS.keys())
def test_the_op_is_registered_soundly(spec, broadcast):
    y, logits, _ = tensors(spec, torch.float32, broadcast)
    arguments = (spec.activation, spec.combine, spec.head_shared, spec.scale, spec.dtype)
    y, logits = y.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), logits.requires_grad_()
    torch.library.opcheck(torch.ops.gated_attention.gate, (y, logits, *arguments))


@pytest.mark.parametrize("backend", ["auto", "recompute"])
def test_the_gate_compiles_whole(backend, compile_whole):
    spec = GateSpec(head_shared=True)
    inputs = tensors(spec, torch.float32)

    def apply(y, logits):
        # What `auto` takes shows in the result.
        plain = backend == "auto" and ops.choose_gate_backend() == "eager"
        return ops.gate(y, logits, spec, backend=backend) * (2 if plain else 1)

    compiled = result_and_gradients(compile_whole(apply, backend="aot_eager"), *inputs)
    for key, result in result_and_gradients(apply, *inputs).items():
        torch.testing.assert_close(compiled[key], result * (2 if backend == "auto" else 1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_inductor_fuses_the_gate_without_changing_it(compile_whole):
    spec = GateSpec(granularity="headwise")
    inputs = tensors(spec, torch.float32)
    compiled = result_and_gradients(compile_whole(lambda y, x: ops.gate(y, x, spec)), *inputs)
    for key, result in result_and_gradients(lambda y, x: ops.gate(y, x, spec), *inputs).items():
        torch.testing.assert_close(compiled[key], result)
