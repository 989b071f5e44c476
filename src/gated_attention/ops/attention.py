"""Softmax attention and its log-sum-exp behind one name.

Backends: `eager` materialises the scores and takes any mask. `sdpa` runs PyTorch's fused kernels: flash on the CPU; on
CUDA, cuDNN in half precision and memory-efficient in float32. `flex` is FlexAttention. All are differentiable in the
output and in the log-sum-exp: `sdpa` and `flex` once, in reverse mode; `eager` under every transform of `torch.func`.
"""

import functools
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from gated_attention.ops.sdpa import HALF, repeat_heads, sdpa, widen
from gated_attention.ops.transforms import has_tangent
from gated_attention.ranges import require_choice, require_within

AttentionBackend = Literal["auto", "eager", "sdpa", "flex"]


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Bool[Tensor, "#b #h #t s"] | None = None,
    backend: AttentionBackend = "auto",
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """Attention output and the natural log-sum-exp of its scaled scores.

    Softmax and log-sum-exp are computed in float32 (float64 for float64 inputs); only `eager` first rounds the scores
    to the inputs' dtype. Query head i reads key/value head `i // (h // k)`. With `causal`, the last query sees all
    keys, so a short query block continues a longer context. A query that sees no key has output 0 and log-sum-exp -inf.
    Under autocast the inputs are cast as for PyTorch's own attention.

    Args:
        scale: Factor on the scores; None is `d ** -0.5`.
        mask: True where a query may see a key, (B, H, T, S), where B, H and T may be 1; combined with the causal mask.
            Pass a padding mask (B, S) as `mask[:, None, None, :]`.
        backend: See the module; `choose_backend` returns what `auto` takes.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs, the mask does not fit, or the scale is not
            finite.
        NotImplementedError: The backend lacks a derivative.
    """
    check_mask(mask, q, k)
    require_within("scale", scale)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(q, k, v, mask=mask, backend=backend)
    if chosen == "flex" and not is_empty(q, k):
        return _flex(q, k, v, causal, scale)
    in_full = chosen == "eager" or is_empty(q, k)  # the kernels divide by lengths
    if causal and (in_full or mask is not None or q.shape[2] != k.shape[2]):
        mask, causal = _join_causal(mask, q.shape[2], k.shape[2], q.device), False
    if in_full:
        out, _, lse = eager(q, k, v, mask, scale)
        return out, lse
    if scale <= 0:  # PyTorch's kernels multiply the -inf of what is masked by it
        q, scale = q * scale, 1.0
    out, lse = sdpa(q, k, v, mask, causal, scale)
    if mask is not None:
        lse = lse.masked_fill(~mask.any(-1), float("-inf"))
    return out, lse


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: AttentionBackend = "auto"
) -> Literal["eager", "sdpa", "flex"]:
    """The backend that `attention` runs for these inputs; `auto` takes `sdpa` where it runs, else `eager`.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs.
    """
    if backend == "auto":
        return "eager" if _why_not_sdpa(q, k, v) else "sdpa"
    check_backend(backend)
    if backend == "sdpa" and (reason := _why_not_sdpa(q, k, v)):
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
    """Refuse an unknown backend with a `ValueError`. Whether a backend runs depends on the tensors."""
    require_choice("attention backend", backend, get_args(AttentionBackend))


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Refuse a mask that is not boolean or has another shape with a `ValueError`; PyTorch would broadcast it."""
    if mask is None:
        return
    full = (*q.shape[:3], k.shape[2])
    given = f"attention mask is {mask.dtype} of shape {tuple(mask.shape)}"
    if mask.dtype != torch.bool:
        raise ValueError(f"{given}; use a boolean one, True where a query may see a key: `bias == 0` of a bias")
    fits = mask.ndim == len(full) and all(n in (1, m) for n, m in zip(mask.shape, full, strict=True))
    if not fits or mask.shape[3] != full[3]:
        raise ValueError(
            f"{given}; use (B, H, T, S) = {full}, where B, H and T may be 1: a padding mask (B, S) is "
            "mask[:, None, None, :], one (T, S) for all is mask[None, None]"
        )


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there are no queries or no keys."""
    return 0 in q.shape or 0 in k.shape


def _why_not_sdpa(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    device, dtype, head_dim = q.device.type, q.dtype, q.shape[-1]
    if device not in ("cpu", "cuda"):
        return f"no kernel that returns the log-sum-exp on device {device!r}"
    if device == "cuda" and dtype == torch.float64:
        return "no CUDA kernel for float64"
    if device == "cuda" and dtype in HALF and (head_dim % 8 or head_dim > 256):
        return f"head_dim {head_dim} is not a multiple of 8 up to 256"
    if has_tangent(q, k, v):
        return "no forward-mode derivative"
    return None


def _join_causal(mask: Tensor | None, t: int, s: int, device: torch.device) -> Tensor:
    causal = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)[None, None]
    return causal if mask is None else causal & mask


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and log-sum-exp from all scores; a query that sees no key gives 0 and -inf.

    Args:
        mask: As in `attention`, or a bias, which hides a key by the smallest number of its dtype.
    """
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    scores = widen(q @ k.transpose(-1, -2) * scale)  # (B, H, T, S)
    blind = None
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
        blind = hidden.all(-1, keepdim=True)  # scored unmasked and then dropped: their gradients would be NaN
        if mask.dtype != torch.bool:
            scores = scores + mask.masked_fill(hidden, 0.0)
        scores = scores.masked_fill(hidden & ~blind, float("-inf"))
    weights, lse = scores.softmax(-1), scores.logsumexp(-1)
    if blind is not None:
        weights, lse = weights.masked_fill(blind, 0.0), lse.masked_fill(blind.squeeze(-1), float("-inf"))
    weights = weights.to(v.dtype)
    return weights @ v, weights, lse


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()
    run = flex_attention if compiling else _compiled_flex()
    build_mask = _causal_block_mask if compiling else _cached_causal_block_mask
    block_mask = build_mask(q.shape[2], k.shape[2], q.device) if causal else None
    # Short queries with GQA would take the decoding kernel, which has no gradient of the log-sum-exp.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    grouped, request = q.shape[1] > k.shape[1], AuxRequest(lse=True)
    out, aux = run(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=grouped, return_aux=request, kernel_options=options
    )
    return out, aux.lse


@functools.cache
def _compiled_flex() -> Any:
    # Uncompiled, FlexAttention materialises the scores; fullgraph raises past the limit of compilations instead.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _causal_block_mask(t: int, s: int, device: torch.device) -> BlockMask:
    offset = s - t
    return create_block_mask(lambda b, h, i, j: j <= i + offset, None, None, t, s, device=device)


_cached_causal_block_mask = functools.lru_cache(maxsize=32)(_causal_block_mask)
