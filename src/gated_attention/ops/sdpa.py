"""PyTorch's fused attention kernels and their log-sum-exp, differentiable in both, by undocumented calls."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gated_attention.ops.transforms import KernelFunction

HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def _is_cudnn(q: Tensor, k: Tensor) -> bool:
    # PyTorch does not give single tokens to cuDNN, whose backward pass crashes on them.
    return q.device.type == "cuda" and q.dtype in HALF and min(q.shape[2], k.shape[2]) > 1


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with one head for every query head.

    Raises:
        ValueError: if query heads do not share them in equal groups; PyTorch's CPU kernel would end the process.
    """
    groups, rest = divmod(q.shape[1], x.shape[1])
    if rest or not groups:
        raise ValueError(f"{q.shape[1]} query heads cannot share {x.shape[1]} key/value heads in equal groups")
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def widen(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's fused forward kernel: new tensors, the output laid out as (B, T, H, D), and the log-sum-exp."""
    bias = _bias(mask, q, k)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    if not _is_cudnn(q, k):
        k, v = repeat_heads(k, q), repeat_heads(v, q)
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    elif _is_cudnn(q, k):
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=scale)
        lse = lse.reshape(q.shape[:3])  # cuDNN's is (B, H, T, 1)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]  # padded to a multiple of 32 rows
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


_sdpa_op = torch.library.custom_op("gated_attention::sdpa", mutates_args=())(run_sdpa)


@_sdpa_op.register_fake
def fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Empty tensors as attention on these queries returns them."""
    b, h, t, d = q.shape
    lse = q.new_empty((b, h, t), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((b, t, h, d)).transpose(1, 2), lse


def run_sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PyTorch's fused backward kernel: gradients laid out as q, k and v, with attention weights computed from `lse`."""
    q_in, k_in, v_in = q, k, v
    if q.device.type == "cpu":
        # The CPU kernel sums the gradients of keys and values in the dtype of its inputs.
        grad, q, k, v, out = (widen(x) for x in (grad, q, k, v, out))
    bias = _bias(mask, q, k)
    grad, q, k, v = adjacent(grad), adjacent(q), adjacent(k), adjacent(v)
    if not _is_cudnn(q, k):
        k, v = repeat_heads(k, q), repeat_heads(v, q)
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        # Without dropout the kernels never read the random state in their signatures.
        unread = torch.zeros((), dtype=torch.int64, device=q.device)
        if _is_cudnn(q, k):
            if grad.stride() != out.stride():  # PyTorch caches cuDNN's plans by the strides of q, k and v alone
                grad = torch.empty_like(out).copy_(grad)
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, lse[..., None], unread, unread, bias, None, None,
                q.shape[2], k.shape[2], 0.0, causal, scale=scale,
            )  # fmt: skip
        else:
            padding = -lse.shape[-1] % 32
            grads = _aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, out, F.pad(lse, (0, padding), value=float("inf")),
                unread, unread, 0.0, [True, True, True, False], causal, scale=scale,
            )[:3]  # fmt: skip
    return _gradient_of(q_in, grads[0]), _gradient_of(k_in, grads[1]), _gradient_of(v_in, grads[2])


_sdpa_backward_op = torch.library.custom_op("gated_attention::sdpa_backward", mutates_args=())(run_sdpa_backward)


@_sdpa_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    # The memory-efficient kernel needs rows that start at multiples of 16 bytes.
    bias = F.pad(torch.zeros(mask.shape, dtype=q.dtype, device=q.device), (0, -mask.shape[-1] % 8))
    bias = bias[..., : mask.shape[-1]].masked_fill_(~mask, float("-inf"))
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def adjacent(x: Tensor) -> Tensor:
    """The same tensor with its channels adjacent in memory, which the kernels assume without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _gradient_of(x: Tensor, grad: Tensor) -> Tensor:
    """Summed over repeated heads, in the dtype of `x`, and laid out as the fake's `empty_like(x)`."""
    if grad.shape[1] != x.shape[1]:
        grad = torch.unflatten(grad, 1, (x.shape[1], -1)).sum(2)
    like = torch.empty_like(x, device="meta")
    if grad.dtype == x.dtype and grad.stride() == like.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _save_for_sdpa(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, *output)


def _sdpa_gradients(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    fixed = (mask, out, lse, ctx.causal, ctx.scale)
    grad_q = grad_k = grad_v = None
    if grad_out is not None:
        grad_q, grad_k, grad_v = backward(grad_out, q, k, v, *fixed)
    if grad_lse is not None:
        # d lse_i / d score_ij is the attention weight P_ij. With w = grad_lse * scale, grad_q gains w_i sum_j P_ij k_j,
        # which is attention with k in place of v. grad_k gains sum_i P_ij w_i q_i, which is the gradient of v with
        # w_i q_i in place of grad_out.
        weight = (grad_lse * ctx.scale)[..., None]
        mean_key, _ = forward(q, k, k, mask, ctx.causal, ctx.scale)
        lse_q = (weight * mean_key).to(q.dtype)
        weighted_query = (weight * q).to(q.dtype)
        lse_k = backward(weighted_query, q, k, k, mask, mean_key, lse, ctx.causal, ctx.scale)[2]
        grad_q = lse_q if grad_q is None else grad_q + lse_q
        grad_k = lse_k if grad_k is None else grad_k + lse_k
    return grad_q, grad_k, grad_v, None, None, None


_sdpa_op.register_autograd(partial(_sdpa_gradients, _sdpa_op, _sdpa_backward_op), setup_context=_save_for_sdpa)


class _SdpaBackward(KernelFunction):
    name, cure = "attention backend 'sdpa'", "backend='eager'"
    forward = staticmethod(run_sdpa_backward)


class _Sdpa(KernelFunction):
    name, cure = _SdpaBackward.name, _SdpaBackward.cure
    forward = staticmethod(run_sdpa)
    setup_context = staticmethod(_save_for_sdpa)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _sdpa_gradients(_Sdpa.apply, _SdpaBackward.apply, ctx, grad_out, grad_lse)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`run_sdpa` with gradients; a registered op under a compiler."""
    if torch.compiler.is_compiling():
        out, lse = _sdpa_op(q, k, v, mask, causal, scale)
    elif torch.is_grad_enabled():
        out, lse = _Sdpa.apply(q, k, v, mask, causal, scale)  # type: ignore[no-untyped-call]
    else:
        out, lse = run_sdpa(q, k, v, mask, causal, scale)  # `apply` would cost more than a small kernel
    return out, lse
