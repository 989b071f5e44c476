"""The gate's mathematics: from gate logits to scores, and scores onto a tensor.

Two backends compute the same function. `eager` is plain PyTorch, which `torch.compile` fuses.
`recompute` forms the scores again in its backward pass, so that nothing is kept but its two inputs.
Both work under every transform of `torch.func`, and have gradients of every order.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gated_attention.ops.sdpa import widen
from gated_attention.ops.transforms import Function
from gated_attention.ranges import require_choice
from gated_attention.spec import GateSpec

GateBackend = Literal["auto", "eager", "recompute"]


class Activation(NamedTuple):
    """A gate's activation and its derivative, both as functions of the logits."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _sigmoid_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)  # g (1 - g) without the cancellation at large x


def _silu_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) + x * _sigmoid_derivative(x)


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
    "silu": Activation(F.silu, _silu_derivative),
    "identity": Activation(torch.clone, torch.ones_like),
    "ns_sigmoid": Activation(lambda x: 0.5 + 0.5 * torch.sigmoid(x), lambda x: 0.5 * _sigmoid_derivative(x)),
    # Its derivative is 0 at the two corners as well: a score of exactly 0 passes no gradient.
    "hard_sigmoid": Activation(F.hardsigmoid, lambda x: (x.abs() < 3).to(x.dtype) / 6),
    "softplus": Activation(F.softplus, torch.sigmoid),
}
"""Every activation a gate can have (`spec.Activation`), with sources in `GateSpec`."""


def gate_scores(gate_logits: Float[Tensor, "#b #t h #d"], spec: GateSpec) -> Float[Tensor, "#b #t #h #d"]:
    """Scores from logits: activation, mean over heads if shared, scale.

    Formed in float32 (or wider) unless `spec.dtype` is `model`, then in the dtype of the logits.
    """
    x = widen(gate_logits) if spec.dtype == "float32" else gate_logits
    scores = ACTIVATIONS[spec.activation].value(x)
    if spec.head_shared:
        scores = scores.mean(2, keepdim=True)
    return scores if spec.scale == 1.0 else scores * spec.scale


def gate(
    y: Float[Tensor, "b t h d"],
    gate_logits: Float[Tensor, "#b #t h #d"],
    spec: GateSpec,
    *,
    backend: GateBackend = "auto",
) -> Float[Tensor, "b t h d"]:
    """`y` with the gate applied (eq. 5), in the dtype of `y`.

    Args:
        y: The gated tensor; an output gate (G5) passes its channels as one head.
        gate_logits: One logit per head or per element, and per token unless the gate has no input.
        spec: Activation, combination, sharing, scale and score dtype are read from it.
        backend: See the module; `choose_gate_backend` says what `auto` takes.

    Raises:
        ValueError: if the backend is unknown.
    """
    if choose_gate_backend(backend, y, gate_logits) == "eager":
        return _apply(y, gate_logits, spec)
    if torch.compiler.is_compiling():  # which traces no function with a forward mode
        traced: Tensor = _gate_op(
            y, gate_logits, spec.activation, spec.combine, spec.head_shared, spec.scale, spec.dtype
        )
        return traced
    result: Tensor = _Recompute.apply(y, gate_logits, spec)  # type: ignore[no-untyped-call]
    return result


def choose_gate_backend(
    backend: GateBackend = "auto", y: Tensor | None = None, gate_logits: Tensor | None = None
) -> Literal["eager", "recompute"]:
    """The backend that `gate` runs for this request; without tensors, the one for tensors that want gradients.

    `auto` recomputes where there is something to keep: outside `torch.compile`, for tensors that want gradients.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend != "auto":
        require_choice("gate backend", backend, get_args(GateBackend))
        return backend
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return "eager"
    given = [x for x in (y, gate_logits) if x is not None]
    return "recompute" if not given or any(x.requires_grad for x in given) else "eager"


def _apply(y: Tensor, gate_logits: Tensor, spec: GateSpec) -> Tensor:
    scores = gate_scores(gate_logits, spec).to(y.dtype)
    return y * scores if spec.combine == "multiply" else y + scores


class _Recompute(Function):
    """The gate with only its inputs kept; its derivatives are plain PyTorch, so they have derivatives themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, gate_logits: Tensor, spec: GateSpec) -> Tensor:
        return _apply(y, gate_logits, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, gate_logits, ctx.spec = inputs
        ctx.save_for_backward(y, gate_logits)
        ctx.save_for_forward(y, gate_logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, gate_logits = ctx.saved_tensors
        spec: GateSpec = ctx.spec
        multiply = spec.combine == "multiply"
        grad_y = grad_logits = None
        if ctx.needs_input_grad[0]:
            grad_y = grad * gate_scores(gate_logits, spec).to(y.dtype) if multiply else grad
        if ctx.needs_input_grad[1]:
            grad_scores = widen(grad) * widen(y) if multiply else widen(grad)
            b, t, h, d = gate_logits.shape
            grad_scores = grad_scores.sum_to_size(b, t, 1 if spec.head_shared else h, d)
            if spec.head_shared:
                grad_scores = grad_scores / h  # of the logits: under tensor parallelism `y` holds fewer
            derivative = ACTIVATIONS[spec.activation].derivative(widen(gate_logits))
            grad_logits = (grad_scores * derivative * spec.scale).to(gate_logits.dtype)
        return grad_y, grad_logits, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, tangent_logits: Tensor | None, _: None) -> Tensor:
        y, gate_logits = (forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)  # type: ignore[no-untyped-call]
        spec: GateSpec = ctx.spec
        multiply = spec.combine == "multiply"
        # PyTorch turns forward mode off for this rule, and with it that of the transforms around this one.
        with forward_ad._set_fwd_grad_enabled(True):
            result = torch.zeros_like(y)
            if tangent is not None:
                result = tangent * gate_scores(gate_logits, spec).to(y.dtype) if multiply else tangent
            if tangent_logits is not None:
                scores = ACTIVATIONS[spec.activation].derivative(widen(gate_logits)) * tangent_logits * spec.scale
                scores = (scores.mean(2, keepdim=True) if spec.head_shared else scores).to(y.dtype)
                result = result + (y * scores if multiply else scores)
        return result


@torch.library.custom_op("gated_attention::gate", mutates_args=())
def _gate_op(
    y: Tensor, gate_logits: Tensor, activation: str, combine: str, head_shared: bool, scale: float, dtype: str
) -> Tensor:
    return _apply(y, gate_logits, _spec_of(activation, combine, head_shared, scale, dtype))


def _spec_of(activation: Any, combine: Any, head_shared: bool, scale: float, dtype: Any) -> GateSpec:
    return GateSpec(activation=activation, combine=combine, head_shared=head_shared, scale=scale, dtype=dtype)


@_gate_op.register_fake
def _(y: Tensor, gate_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, gate_logits, *fields = inputs
    ctx.save_for_backward(y, gate_logits)
    ctx.spec = _spec_of(*fields)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_Recompute.backward(ctx, grad), None, None, None, None


_gate_op.register_autograd(_op_backward, setup_context=_save_for_op)
