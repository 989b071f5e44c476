"""One differentiable op over the kernels that skip closed gates; `choose_skip_kernels` says which run."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gated_attention.ops.fused import load_kernels, why_not_gluon, why_not_triton
from gated_attention.ops.sdpa import fake_attention
from gated_attention.ops.skip.rows import GateActivation, Rows, closing_logit
from gated_attention.ops.transforms import KernelFunction, has_tangent

SkipKernels = Literal["eager", "triton", "hopper"]
"""`eager`: plain PyTorch, on a CPU. `triton`: ours in portable Triton. `hopper`: ours for Hopper, with `triton`'s lists
and backward pass."""

_LIST = {"eager": "skip.rows", "triton": "triton.skip_rows", "hopper": "triton.skip_rows"}
_FORWARD = {"eager": "skip.eager", "triton": "triton.skip_forward", "hopper": "hopper.skip_forward_launch"}
_BACKWARD = {"eager": "skip.eager", "triton": "triton.skip_backward", "hopper": "triton.skip_backward"}
_HEAD_DIMS = (64, 128)  # of `hopper`

Forward = Callable[..., tuple[Tensor, Tensor]]
"""From q, k, v, gate logits, rows, activation, `causal`, the scale and first keys or None to the gated output,
(B, H, T, D) laid out as (B, T, H, D) and 0 in closed rows, and LSE - log g of open rows by their place in the list,
(B, K, T * G), in base 2, float32 or wider; what it holds behind them means nothing."""

Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
"""From the gradient of the gated output, q, k, v, gate logits, both outputs of `Forward` and the rest of its arguments
to the gradients of q, k, v and the gate logits; those of closed rows are 0."""


@torch.library.custom_op("gated_attention::skip", mutates_args=())
def skip_op(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, activation: str, closed_at: float, causal: bool,
    scale: float, kernels: str, first_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs of `Forward`, and the rows; only the gated output has a gradient."""
    forward: Forward = load_kernels(_FORWARD[kernels]).attention_forward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        rows: Rows = load_kernels(_LIST[kernels]).list_rows(gate_logits[..., 0], k.shape[1], closed_at)
        return *forward(q, k, v, gate_logits, rows, activation, causal, scale, first_keys), *rows


@skip_op.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = fake_attention(q)
    B, H, T = q.shape[:3]
    K = k.shape[1]
    order = q.new_empty((B, K, T * (H // K)), dtype=torch.int32)
    return out, lse.view(order.shape), order, q.new_empty((B, K, T + 1), dtype=torch.int32)


@torch.library.custom_op("gated_attention::skip_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    order: Tensor, before: Tensor, activation: str, causal: bool, scale: float, kernels: str,
    first_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backward: Backward = load_kernels(_BACKWARD[kernels]).attention_backward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        rows = Rows(order, before)
        return backward(grad, q, k, v, gate_logits, out, lse, rows, activation, causal, scale, first_keys)


@_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), gate_logits.new_empty(gate_logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gate_logits, ctx.activation, _, ctx.causal, ctx.scale, ctx.kernels, first_keys = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, gate_logits, *output, first_keys)


def _gradients(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, first_keys = ctx.saved_tensors
    grads = backward(grad, *saved, ctx.activation, ctx.causal, ctx.scale, ctx.kernels, first_keys)
    return *grads, None, None, None, None, None, None


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_op, ctx, grad)


skip_op.register_autograd(_backward, setup_context=_save)


class _SkipBackward(KernelFunction):
    name, cure = "a kernel that skips closed gates", "ops.gated_attention with backend='composed'"
    forward = staticmethod(_backward_op)


class _Skip(_SkipBackward):
    forward = staticmethod(skip_op)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(_SkipBackward.apply, ctx, grad)


def run_skip(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, activation: GateActivation, threshold: float,
    causal: bool, scale: float, first_keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gated output, laid out as (B, T, H, D), with gradients."""
    as_function = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run: Any = _Skip.apply if as_function else skip_op
    closed_at = closing_logit(activation, threshold)
    kernels = choose_skip_kernels(q, gate_logits, first_keys)
    return cast(Tensor, run(q, k, v, gate_logits, activation, closed_at, causal, scale, kernels, first_keys)[0])


def choose_skip_kernels(q: Tensor, gate_logits: Tensor, first_keys: Tensor | None = None) -> SkipKernels:
    """The kernels that the backend `skip` runs for these inputs, which it can run.

    `hopper` where Gluon's kernels run, for head width 64 and 128, without first keys, and where a batch's numbers are
    counted in 31 bits; else `triton`, and on a CPU `eager`.
    """
    if q.device.type == "cpu":
        return "eager"
    if first_keys is not None or why_not_gluon(q, _HEAD_DIMS) is not None:
        return "triton"
    # Of queries and logits where they lie, and of the output, whose rows lie side by side.
    extents = [sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in (q, gate_logits)]
    return "hopper" if max(*extents, q[0].numel()) < 2**31 else "triton"


def why_not_skip(
    q: Tensor, k: Tensor, gate_logits: Tensor, activation: GateActivation, threshold: float,
    *, causal: bool, mask: Tensor | None,
) -> str | None:  # fmt: skip
    """Why these inputs cannot skip closed gates; None if they can."""
    if mask is not None:
        return "it takes no mask tensor"
    if gate_logits.shape[-1] > 1:
        return "it takes one gate per head, not one per channel"
    if activation == "sigmoid" and threshold == 0.0:
        return "a sigmoid closes no gate without a threshold"
    if has_tangent(q, k, gate_logits):
        return "it has no forward-mode derivative"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads in equal groups"
    if causal and q.shape[2] > k.shape[2]:
        return (
            f"causal attention of {q.shape[2]} queries to {k.shape[2]} keys; it needs at least as many keys as queries"
        )
    if q.device.type == "cpu":
        return None
    if q.dtype == torch.float16 != gate_logits.dtype:  # they open gates of 1e-7, under which an output has no digits
        return f"beside queries in float16 it takes gate logits in float16, not {gate_logits.dtype}"
    return why_not_triton(q)
