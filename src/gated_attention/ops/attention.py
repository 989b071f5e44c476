"""Softmax attention and its log-sum-exp behind one name.

Backends: `eager` materialises the scores and takes any mask; `sdpa` runs the fused kernels that
PyTorch ships (flash on the CPU; cuDNN on CUDA in half precision, memory-efficient in float32);
`flex` is FlexAttention. All are differentiable in the output and in the log-sum-exp.
"""

import functools
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

AttentionBackend = Literal["auto", "eager", "sdpa", "flex"]

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Bool[Tensor, "#b #h t s"] | None = None,
    backend: AttentionBackend = "auto",
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """Attention output and the natural log-sum-exp of its scaled scores.

    The log-sum-exp is float32 (float64 for float64 inputs); the softmax is computed in that dtype, from
    scores that only `eager` rounds to the dtype of its inputs first. Query head i reads key/value head
    `i // (h // k)`. With `causal`, the last query sees all keys, so a short query block continues a longer
    context. A query that sees no key has output 0 and log-sum-exp -inf. Under autocast the inputs are cast
    as PyTorch casts its own attention's.

    Args:
        scale: Factor on the scores; None is `d ** -0.5`.
        mask: True where a query may see a key; joined with the causal mask.
        backend: See the module; `choose_backend` says what `auto` takes.

    Raises:
        ValueError: if the backend is unknown or cannot run these inputs.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(q, k, v, mask=mask, backend=backend)
    if chosen == "flex":
        return _flex(q, k, v, causal, scale)
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        mask, causal = _join_causal(mask, q.shape[2], k.shape[2], q.device), False
    if chosen == "eager":
        return _eager(q, k, v, mask, causal, scale)
    # A registered op costs more to call than a small kernel to run; only gradients and tracing need one.
    run = _sdpa_op if torch.is_grad_enabled() or torch.compiler.is_compiling() else run_sdpa
    out, lse = run(q, k, v, mask, causal, scale)
    if mask is not None:
        lse = lse.masked_fill(~mask.any(-1), float("-inf"))
    return out, lse


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: AttentionBackend = "auto"
) -> Literal["eager", "sdpa", "flex"]:
    """The backend that `attention` runs for these inputs.

    Raises:
        ValueError: if the backend is unknown or cannot run these inputs.
    """
    check_backend(backend)
    if backend == "auto":
        return "eager" if _why_not_sdpa(q) else "sdpa"
    if backend == "sdpa" and (reason := _why_not_sdpa(q)):
        raise ValueError(f"attention backend 'sdpa' cannot run: {reason}; use 'eager' or 'auto'")
    if backend == "flex" and q.device.type != "cuda":
        raise ValueError(
            f"attention backend 'flex' returns a log-sum-exp on CUDA only, not on {q.device.type!r}; "
            "use 'eager', 'sdpa' or 'auto'"
        )
    if backend == "flex" and mask is not None:
        raise ValueError("attention backend 'flex' takes no mask tensor; use 'eager', 'sdpa' or 'auto'")
    return backend


def check_backend(backend: AttentionBackend) -> None:
    """Refuse what is no backend anywhere; whether it runs depends on the tensors.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"unknown attention backend {backend!r}; choose from {', '.join(get_args(AttentionBackend))}")


def _why_not_sdpa(q: Tensor) -> str | None:
    device, dtype, head_dim = q.device.type, q.dtype, q.shape[-1]
    if device not in ("cpu", "cuda"):
        return f"no kernel that returns the log-sum-exp on device {device!r}"
    if device == "cuda" and dtype == torch.float64:
        return "no CUDA kernel for float64"
    if device == "cuda" and dtype in _HALF and (head_dim % 8 or head_dim > 256):
        return f"head_dim {head_dim} is not a multiple of 8 up to 256"
    return None


def _is_cudnn(q: Tensor, k: Tensor) -> bool:
    # PyTorch keeps single tokens from cuDNN, whose backward pass crashes on them.
    return q.device.type == "cuda" and q.dtype in _HALF and min(q.shape[2], k.shape[2]) > 1


def _join_causal(mask: Tensor | None, t: int, s: int, device: torch.device) -> Tensor:
    causal = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)[None, None]
    return causal if mask is None else causal & mask


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = _widen(q @ k.transpose(-1, -2) * scale)  # (B, H, T, S)
    if causal:
        mask = _join_causal(None, q.shape[2], k.shape[2], q.device)
    if mask is None:
        return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)
    # Rows without a visible key would give NaN gradients; they are computed unmasked and then dropped.
    empty = ~mask.any(-1)  # (B, H, T)
    scores = scores.masked_fill(~mask & ~empty[..., None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
    return weights.to(v.dtype) @ v, scores.logsumexp(-1).masked_fill(empty, float("-inf"))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()
    block_mask = None
    if causal:
        build = _causal_block_mask if compiling else _cached_causal_block_mask
        block_mask = build(q.shape[2], k.shape[2], q.device)
    run = flex_attention if compiling else _compiled_flex()
    groups = q.shape[1] // k.shape[1]
    out, aux = run(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=groups > 1,
        return_aux=AuxRequest(lse=True),
        # Short queries with GQA would take the decoding kernel, which has no gradient of the log-sum-exp.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out, aux.lse


@functools.cache
def _compiled_flex() -> Any:
    # Uncompiled, FlexAttention materialises the scores that it exists to avoid: past the limit of compilations, raise.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _causal_block_mask(t: int, s: int, device: torch.device) -> BlockMask:
    offset = s - t
    return create_block_mask(lambda b, h, i, j: j <= i + offset, None, None, t, s, device=device)


_cached_causal_block_mask = functools.lru_cache(maxsize=32)(_causal_block_mask)


def run_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's fused forward kernel: new tensors, the output laid out as (B, T, H, D), and the log-sum-exp."""
    bias = _bias(mask, q, k)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    if not _is_cudnn(q, k):
        k, v = _repeat_heads(k, q), _repeat_heads(v, q)
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
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    lse = q.new_empty((b, h, t), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((b, t, h, d)).transpose(1, 2), lse


def run_sdpa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's fused backward kernel: gradients laid out as what they are of, weights formed from `lse`."""
    q_in, k_in, v_in = q, k, v
    if q.device.type == "cpu":
        # The CPU kernel adds up the gradients of keys and values in the dtype of its inputs.
        grad, q, k, v, out = (_widen(x) for x in (grad, q, k, v, out))
    bias = _bias(mask, q, k)
    grad, q, k, v = adjacent(grad), adjacent(q), adjacent(k), adjacent(v)
    if not _is_cudnn(q, k):
        k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        # Without dropout the kernels never read the random state that their signatures ask for.
        unread = torch.zeros((), dtype=torch.int64, device=q.device)
        if _is_cudnn(q, k):
            if grad.stride() != out.stride():  # PyTorch keeps cuDNN's plans by the strides of q, k and v alone
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
    grad_q, grad_k, grad_v = grads[:3]
    grad_k, grad_v = _sum_groups(grad_k, k_in.shape[1]), _sum_groups(grad_v, k_in.shape[1])
    return _laid_out_as(q_in, grad_q), _laid_out_as(k_in, grad_k), _laid_out_as(v_in, grad_v)


_sdpa_backward_op = torch.library.custom_op("gated_attention::sdpa_backward", mutates_args=())(run_sdpa_backward)


@_sdpa_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    # The memory-efficient kernel wants rows that start at multiples of 16 bytes.
    bias = F.pad(torch.zeros(mask.shape, dtype=q.dtype, device=q.device), (0, -mask.shape[-1] % 8))
    bias = bias[..., : mask.shape[-1]].masked_fill_(~mask, float("-inf"))
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def adjacent(x: Tensor) -> Tensor:
    """The same tensor with its channels side by side in memory, which the kernels take for granted unasked."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    # What `empty_like` gives is what the fake says, and what the kernels give too, unless heads were repeated.
    like = torch.empty_like(x, device="meta")
    if grad.dtype == x.dtype and grad.stride() == like.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _sum_groups(grad: Tensor, num_kv_heads: int) -> Tensor:
    """Gradients of repeated heads, summed back onto the heads they repeat."""
    if grad.shape[1] == num_kv_heads:
        return grad
    return torch.unflatten(grad, 1, (num_kv_heads, -1)).sum(2)


def _save_for_sdpa(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, *output)


def _sdpa_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    fixed = (mask, out, lse, ctx.causal, ctx.scale)
    grad_q = grad_k = grad_v = None
    if grad_out is not None:
        grad_q, grad_k, grad_v = _sdpa_backward_op(grad_out, q, k, v, *fixed)
    if grad_lse is not None:
        # d lse_i / d score_ij is the attention weight P_ij: with weights w = grad_lse * scale, grad_q gains
        # w_i sum_j P_ij k_j, attention with k in v's place, and grad_k gains sum_i P_ij w_i q_i, which is what
        # attention's backward returns for v when w_i q_i takes the place of grad_out.
        weight = (grad_lse * ctx.scale)[..., None]
        mean_key, _ = _sdpa_op(q, k, k, mask, ctx.causal, ctx.scale)
        lse_q = (weight * mean_key).to(q.dtype)
        weighted_query = (weight * q).to(q.dtype)
        lse_k = _sdpa_backward_op(weighted_query, q, k, k, mask, mean_key, lse, ctx.causal, ctx.scale)[2]
        grad_q = lse_q if grad_q is None else grad_q + lse_q
        grad_k = lse_k if grad_k is None else grad_k + lse_k
    return grad_q, grad_k, grad_v, None, None, None


_sdpa_op.register_autograd(_sdpa_backward, setup_context=_save_for_sdpa)
