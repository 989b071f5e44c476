"""One differentiable op for every kernel of gated attention.

All keep the gated output, which the projection after it keeps anyway, and the log-sum-exp, and nothing else.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

from gated_attention.ops import lse_shift
from gated_attention.ops.attention import choose_backend
from gated_attention.ops.sdpa import adjacent
from gated_attention.ops.transforms import KernelFunction, has_tangent

FusedBackend = Literal["shifted", "triton", "hopper"]
"""`shifted`: PyTorch's kernels, see `lse_shift`. `triton`: `triton_forward`, `triton_backward`. `hopper`: our kernels
for Hopper, but `shifted`'s backward where that is faster."""


def _triton_version() -> str | None:
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


_TRITON = _triton_version()  # once, since torch.compile traces what chooses a backend
_GLUON = ("3.6.", "3.7.", "3.8.", "3.9.")
"""The Tritons with which the Hopper kernels have run on a GPU; see `hopper_compat`."""

_Forward = Callable[[Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
_Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor, Tensor]
]


def _forward_of(backend: str) -> _Forward:
    if backend == "shifted":
        return lse_shift.attention_forward
    if backend == "triton":
        from gated_attention.ops.triton import forward as triton_forward

        return triton_forward.attention_forward
    from gated_attention.ops.hopper import forward_launch as hopper_forward_launch

    return hopper_forward_launch.attention_forward


def _backward_of(backend: str, q: Tensor, k: Tensor) -> _Backward:
    if backend == "triton":
        from gated_attention.ops.triton import backward as triton_backward

        return triton_backward.attention_backward
    if backend == "hopper":
        from gated_attention.ops.hopper import backward_launch as hopper_backward_launch

        if hopper_backward_launch.is_faster(q, k):
            return hopper_backward_launch.attention_backward
    return lse_shift.attention_backward


@torch.library.custom_op("gated_attention::fused", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gated output, (B, H, T, D) laid out as (B, T, H, D), and log-sum-exp, (B, H, T), which has no gradient here."""
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        return _forward_of(backend)(q, k, v, gate_logits, causal, scale)


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    lse = q.new_empty((b, h, t), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((b, t, h, d)).transpose(1, 2), lse


@torch.library.custom_op("gated_attention::fused_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        return _backward_of(backend, q, k)(grad, q, k, v, gate_logits, out, lse, causal, scale)


@_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), gate_logits.new_empty(gate_logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate_logits, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate_logits, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    given = (grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    traced = None if type(grad) is Tensor else _traced_backward_of(ctx.backend, *ctx.saved_tensors[:2])
    grads = _backward_op(*given, ctx.backend) if traced is None else traced(*given)
    return *grads, None, None, None


def _traced_backward_of(backend: str, q: Tensor, k: Tensor) -> _Backward | None:
    """For a compiler, a backward of which only the kernel is opaque."""
    if backend == "hopper":
        from gated_attention.ops.hopper import backward_launch as hopper_backward_launch

        if hopper_backward_launch.is_faster(q, k):
            return _traced_hopper_backward
    return None


def _traced_hopper_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What goes before and after the kernel as plain PyTorch: whatever is compiled around it does that on the way."""
    from gated_attention.ops.hopper.backward_launch import padded_length

    scaled, stats, ds = lse_shift.prepare_kernels(grad, out, gate_logits, lse, padded_length(q))
    total, dk, dv = _hopper_kernel_op(scaled, q, k, v, stats, causal, scale)
    return (total * scale).to(q.dtype), dk, dv, ds


# Here, since a compiled graph that was kept on disk asks for it by name as soon as `ops` is imported.
@torch.library.custom_op("gated_attention::hopper_backward_kernel", mutates_args=())
def _hopper_kernel_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from gated_attention.ops.hopper import backward_launch as hopper_backward_launch

    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        return hopper_backward_launch.run_kernel(grad, q, k, v, stats, causal, scale)


@_hopper_kernel_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(adjacent(k)), torch.empty_like(adjacent(v))


fused_attention.register_autograd(_backward, setup_context=_save)


class _FusedBackward(KernelFunction):
    name, cure = "a kernel of gated attention", "ops.attention with backend='eager', then ops.gate"
    forward = staticmethod(_backward_op)


class _Fused(KernelFunction):
    name, cure = _FusedBackward.name, _FusedBackward.cure
    forward = staticmethod(fused_attention)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _FusedBackward.apply(  # type: ignore[no-untyped-call]
            grad, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.backend
        )
        return *grads, None, None, None


def run_fused(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, backend: FusedBackend
) -> Tensor:
    """The gated output of a kernel, laid out as (B, T, H, D), with gradients."""
    as_function = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run: Any = _Fused.apply if as_function else fused_attention
    out: Tensor = run(q, k, v, gate_logits, causal, scale, backend)[0]
    return out


def why_not(
    backend: FusedBackend, q: Tensor, k: Tensor, gate_logits: Tensor, *, causal: bool, mask: Tensor | None
) -> str | None:
    """Why the backend cannot run these inputs; None if it can."""
    if mask is not None:
        return "it takes no mask tensor"
    if has_tangent(q, k, gate_logits):
        return "it has no forward-mode derivative"
    if causal and q.shape[2] != k.shape[2]:
        return f"causal attention of {q.shape[2]} queries to {k.shape[2]} keys; it wants as many of both"
    return _WHY_NOT[backend](q, k, gate_logits, causal)


def _why_not_shifted(q: Tensor, k: Tensor, gate_logits: Tensor, causal: bool) -> str | None:
    if choose_backend(q, k, k) != "sdpa":
        return f"PyTorch has no fused kernel for {q.dtype}, head_dim {q.shape[-1]} on device {q.device.type!r}"
    return None


def _why_not_triton(q: Tensor, k: Tensor, gate_logits: Tensor, causal: bool) -> str | None:
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it is made for NVIDIA GPUs of compute capability 8.0 or newer, not for device {str(q.device)!r}"
    return _why_not_kernel(q, (16, 32, 64, 128, 256))


def _why_not_hopper(q: Tensor, k: Tensor, gate_logits: Tensor, causal: bool) -> str | None:
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"it is made for compute capability 9.0 (H100, H200), not for device {str(q.device)!r}"
    if q.shape[-1] == 256 and gate_logits.shape[-1] > 1 and not causal:
        return "with head_dim 256 and a gate per channel it must be causal"
    if _TRITON is not None and not _TRITON.startswith(_GLUON):
        return f"its kernels have run with Triton {', '.join(v + 'x' for v in _GLUON)}, not with {_TRITON}"
    return _why_not_kernel(q, (64, 128, 256))


def _why_not_kernel(q: Tensor, head_dims: tuple[int, ...]) -> str | None:
    if _TRITON is None:
        return "Triton is not installed"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in head_dims:
        return f"it takes head_dim {', '.join(map(str, head_dims[:-1]))} and {head_dims[-1]}, not {q.shape[-1]}"
    return None


_WHY_NOT = {"shifted": _why_not_shifted, "triton": _why_not_triton, "hopper": _why_not_hopper}
