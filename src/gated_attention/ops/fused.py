"""One differentiable op over all kernels of gated attention.

It saves only the log-sum-exp and the gated output, which the projection after it saves anyway.
"""

import functools
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

from gated_attention.ops import lse_shift
from gated_attention.ops.attention import choose_backend
from gated_attention.ops.sdpa import HALF, adjacent, fake_attention
from gated_attention.ops.transforms import KernelFunction, has_tangent

FusedBackend = Literal["shifted", "triton", "hopper"]
"""`shifted`: PyTorch's kernels, see `lse_shift`. `triton`: ours in portable Triton. `hopper`: ours for Hopper, with
`shifted`'s backward where that is faster."""

Forward = Callable[..., tuple[Tensor, Tensor]]
"""From q, k, v, gate logits, `causal` and the scale to the gated output, (B, H, T, D) laid out as (B, T, H, D), and the
natural log-sum-exp of ungated attention, (B, H, T), float32 or wider. Causal attention has as many keys as queries,
unless it is `triton`'s, which also takes the first keys, (B, T)."""

Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
"""From the gradient of the gated output, the four inputs and both outputs of `Forward`, `causal`, the scale, and what
else `Forward` took to the gradients of q, k, v and the gate logits."""

_FORWARD = {"shifted": "lse_shift", "triton": "triton.forward", "hopper": "hopper.forward_launch"}
_BACKWARD = {"shifted": "lse_shift", "triton": "triton.backward", "hopper": "hopper.backward_launch"}
_HEAD_DIMS = {"triton": (16, 32, 64, 128, 256), "hopper": (64, 128, 256)}
_GLUON = ("3.6.", "3.7.", "3.8.", "3.9.")
"""Triton versions with which the Hopper kernels have run on a GPU; see `hopper.compat`."""


def _triton_version() -> str | None:
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


_TRITON = _triton_version()  # once, because torch.compile traces the choice of a backend


@functools.cache
def load_kernels(module: str) -> Any:
    """A module of kernels, imported where it is needed: most of them import Triton."""
    return import_module(f"gated_attention.ops.{module}")


def _backward_of(backend: str, q: Tensor, k: Tensor) -> str:
    """The module of the backward pass."""
    if backend == "hopper" and not load_kernels("hopper.backward_launch").is_faster(q, k):
        return "lse_shift"
    return _BACKWARD[backend]


def _if_given(first_keys: Tensor | None) -> tuple[Tensor, ...]:
    return () if first_keys is None else (first_keys,)


@torch.library.custom_op("gated_attention::fused", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, backend: str,
    first_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated output and log-sum-exp, see `Forward`; the log-sum-exp has no gradient."""
    forward: Forward = load_kernels(_FORWARD[backend]).attention_forward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        return forward(q, k, v, gate_logits, causal, scale, *_if_given(first_keys))


fused_attention.register_fake(fake_attention)


@torch.library.custom_op("gated_attention::fused_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, backend: str, first_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backward: Backward = load_kernels(_backward_of(backend, q, k)).attention_backward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        return backward(grad, q, k, v, gate_logits, out, lse, causal, scale, *_if_given(first_keys))


@_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), gate_logits.new_empty(gate_logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate_logits, ctx.causal, ctx.scale, ctx.backend, first_keys = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate_logits, *output, first_keys)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, first_keys = ctx.saved_tensors
    given = (grad, *saved, ctx.causal, ctx.scale)
    if type(grad) is not Tensor and _backward_of(ctx.backend, *saved[:2]) == _BACKWARD["hopper"]:
        grads = _traced_hopper_backward(*given)
    else:
        grads = _backward_op(*given, ctx.backend, first_keys)
    return *grads, None, None, None, None


fused_attention.register_autograd(_backward, setup_context=_save)


def _traced_hopper_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch but for the kernel, so that a compiler fuses what surrounds the kernel with its neighbours."""
    padded_length = load_kernels("hopper.backward_launch").padded_length(q)
    scaled, stats, ds = lse_shift.prepare_kernels(grad, out, gate_logits, lse, padded_length)
    total, dk, dv = _hopper_kernel_op(scaled, q, k, v, stats, causal, scale)
    return (total * scale).to(q.dtype), dk, dv, ds


# Registered here, because a compiled graph loaded from disk looks it up by name once `ops` is imported.
@torch.library.custom_op("gated_attention::hopper_backward_kernel", mutates_args=())
def _hopper_kernel_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        grads: tuple[Tensor, Tensor, Tensor] = load_kernels("hopper.backward_launch").run_kernel(
            grad, q, k, v, stats, causal, scale
        )
    return grads


@_hopper_kernel_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(adjacent(k)), torch.empty_like(adjacent(v))


class _FusedBackward(KernelFunction):
    name, cure = "a kernel of gated attention", "ops.attention with backend='eager', then ops.gate"
    forward = staticmethod(_backward_op)


class _Fused(_FusedBackward):
    forward = staticmethod(fused_attention)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, first_keys = ctx.saved_tensors
        given = (grad, *saved, ctx.causal, ctx.scale, ctx.backend, first_keys)
        return *_FusedBackward.apply(*given), None, None, None, None  # type: ignore[no-untyped-call]


def run_fused(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float, backend: FusedBackend,
    first_keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gated output of a kernel, laid out as (B, T, H, D), with gradients."""
    as_function = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run: Any = _Fused.apply if as_function else fused_attention
    out: Tensor = run(q, k, v, gate_logits, causal, scale, backend, first_keys)[0]
    return out


def why_not(
    backend: FusedBackend,
    q: Tensor,
    k: Tensor,
    gate_logits: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    first_keys: Tensor | None = None,
) -> str | None:
    """Why the backend cannot run these inputs; None if it can."""
    if mask is not None:
        return "it takes no mask tensor"
    if has_tangent(q, k, gate_logits):
        return "it has no forward-mode derivative"
    if first_keys is not None and backend != "triton":
        return "it takes no first keys"
    if causal and (q.shape[2] > k.shape[2] or (backend != "triton" and q.shape[2] != k.shape[2])):
        needed = "at least as many" if backend == "triton" else "as many"
        return f"causal attention of {q.shape[2]} queries to {k.shape[2]} keys; it needs {needed} keys as queries"
    head_dim = q.shape[-1]
    if backend == "shifted":
        if choose_backend(q, k, k) == "sdpa":
            return None
        return f"PyTorch has no fused kernel for {q.dtype}, head_dim {head_dim} on device {q.device.type!r}"
    if backend == "triton":
        return why_not_triton(q)
    if head_dim == 256 and gate_logits.shape[-1] > 1 and not causal:
        return "with head_dim 256 and a gate per channel it must be causal"
    return why_not_gluon(q, _HEAD_DIMS["hopper"])


def why_not_gluon(q: Tensor, head_dims: tuple[int, ...]) -> str | None:
    """Why kernels for Hopper cannot run on these queries; None if they can."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    if capability != (9, 0):
        return f"it needs a GPU of compute capability 9.0 (H100, H200), not device {str(q.device)!r}"
    if _TRITON is not None and not _TRITON.startswith(_GLUON):
        return f"its kernels have run with Triton {', '.join(v + 'x' for v in _GLUON)}, not with {_TRITON}"
    return _why_not_kernels(q, head_dims)


def why_not_triton(q: Tensor) -> str | None:
    """Why kernels in portable Triton cannot run on these queries; None if they can."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    if capability < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, not device {str(q.device)!r}"
    return _why_not_kernels(q, _HEAD_DIMS["triton"])


def _why_not_kernels(q: Tensor, head_dims: tuple[int, ...]) -> str | None:
    if _TRITON is None:
        return "Triton is not installed"
    if q.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in head_dims:
        *dims, last = head_dims
        return f"it takes head_dim {', '.join(map(str, dims))} and {last}, not {q.shape[-1]}"
    return None
