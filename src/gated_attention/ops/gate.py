"""The gate's mathematics: from gate logits to scores, and scores onto a tensor.

Two backends compute the same function. `eager` is plain PyTorch, which `torch.compile` fuses.
`recompute` is one registered op whose backward forms the scores again from the logits, so that
nothing is kept but its two inputs; outside `torch.compile` it is what `auto` takes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

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
}
"""Every activation a gate can have (`spec.Activation`), with sources in `GateSpec`."""


def gate_scores(gate_logits: Float[Tensor, "b t h #d"], spec: GateSpec) -> Float[Tensor, "b t #h #d"]:
    """Scores from logits: activation, mean over heads if shared, scale.

    Formed in float32 (or wider) unless `spec.dtype` is `model`, then in the dtype of the logits.
    """
    return _scores(gate_logits, spec.activation, spec.head_shared, spec.scale, spec.dtype)


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
    arguments = (spec.activation, spec.combine, spec.head_shared, spec.scale, spec.dtype)
    if choose_gate_backend(backend) == "eager":
        return _apply(y, gate_logits, *arguments)
    result: Tensor = _gate_op(y, gate_logits, *arguments)
    return result


def choose_gate_backend(backend: GateBackend = "auto") -> Literal["eager", "recompute"]:
    """The backend that `gate` runs for this request.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend not in get_args(GateBackend):
        raise ValueError(f"unknown gate backend {backend!r}; choose from {', '.join(get_args(GateBackend))}")
    if backend == "auto":
        return "eager" if torch.compiler.is_compiling() else "recompute"
    return backend


def _scores(gate_logits: Tensor, activation: str, head_shared: bool, scale: float, dtype: str) -> Tensor:
    x = _widen(gate_logits) if dtype == "float32" else gate_logits
    scores = ACTIVATIONS[activation].value(x)
    if head_shared:
        scores = scores.mean(2, keepdim=True)
    return scores if scale == 1.0 else scores * scale


def _apply(
    y: Tensor, gate_logits: Tensor, activation: str, combine: str, head_shared: bool, scale: float, dtype: str
) -> Tensor:
    scores = _scores(gate_logits, activation, head_shared, scale, dtype).to(y.dtype)
    return y * scores if combine == "multiply" else y + scores


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("gated_attention::gate", mutates_args=())
def _gate_op(
    y: Tensor, gate_logits: Tensor, activation: str, combine: str, head_shared: bool, scale: float, dtype: str
) -> Tensor:
    return _apply(y, gate_logits, activation, combine, head_shared, scale, dtype)


@_gate_op.register_fake
def _(y: Tensor, gate_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, gate_logits, *ctx.arguments = inputs
    ctx.save_for_backward(y, gate_logits)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, gate_logits = ctx.saved_tensors
    activation, combine, head_shared, scale, dtype = ctx.arguments
    multiply = combine == "multiply"
    grad_y = grad_logits = None
    if ctx.needs_input_grad[0]:
        grad_y = grad * _scores(gate_logits, activation, head_shared, scale, dtype).to(y.dtype) if multiply else grad
    if ctx.needs_input_grad[1]:
        x = _widen(gate_logits)
        grad_scores = _widen(grad) * _widen(y) if multiply else _widen(grad)
        if head_shared:
            grad_scores = grad_scores.mean(2, keepdim=True)
        grad_scores = grad_scores.sum_to_size(*_score_shape(gate_logits, head_shared))
        grad_logits = (grad_scores * ACTIVATIONS[activation].derivative(x) * scale).to(gate_logits.dtype)
    return grad_y, grad_logits, None, None, None, None, None


def _score_shape(gate_logits: Tensor, head_shared: bool) -> list[int]:
    b, t, h, d = gate_logits.shape
    return [b, t, 1 if head_shared else h, d]


_gate_op.register_autograd(_gate_backward, setup_context=_save_inputs)
