"""Gated attention as one op: `sigmoid(gate_logits) * attention(q, k, v)`, the paper's G1 (eq. 5, T1.5 and T1.10).

Backends: `composed` is `attention`, then `gate`, and runs whatever they run. `shifted`, `triton` and `hopper` are
kernels for a sigmoid; see `fused`. `skip` computes nothing where a gate per head is closed; see `skip.op`. Callers
compose other gates, sites and activations themselves.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gated_attention.ops.attention import attention, check_mask, is_empty
from gated_attention.ops.first_keys import check_first_keys, to_mask
from gated_attention.ops.fused import FusedBackend, run_fused, why_not
from gated_attention.ops.gate import gate
from gated_attention.ops.sdpa import HALF, widen
from gated_attention.ops.skip.op import run_skip, why_not_skip
from gated_attention.ops.skip.rows import GateActivation, closing_logit
from gated_attention.ranges import require_choice, require_within
from gated_attention.spec import GateSpec

GatedBackend = Literal["auto", "composed", "shifted", "triton", "hopper", "skip"]


def gated_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    gate_logits: Float[Tensor, "b t h #d"],
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Bool[Tensor, "#b #h #t s"] | None = None,
    first_keys: Int[Tensor, "b t"] | None = None,
    activation: GateActivation = "sigmoid",
    threshold: float = 0.0,
    backend: GatedBackend = "auto",
) -> Float[Tensor, "b t h d"]:
    """Attention, with its output multiplied by the sigmoid of one logit per head or per channel.

    The sigmoid is computed in float32 (float64 for float64 inputs). Heads, masks, scale and autocast are as in
    `attention`. The output is contiguous.

    Args:
        first_keys: The first key that each query sees, for packed documents, windows and left padding; see
            `find_first_keys`. A query sees its own key in any case. Causal attention only.
        activation: `hard_sigmoid`, clamp(s / 6 + 0.5, 0, 1), is exactly 0 for logits up to -3, and so is its gradient.
        threshold: Scores up to this one, and their gradients, count as 0, which changes a head's output by no more than
            `threshold * max|v|`. From 0 to below 1.
        backend: See the module; `choose_gated_backend` returns what `auto` takes.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs, or the threshold, the mask or the first keys do
            not fit.
    """
    check_mask(mask, q, k)
    require_within("gate threshold", threshold, least=0.0, below=1.0)
    require_within("scale", scale)
    if first_keys is not None:
        first_keys = check_first_keys(first_keys, q, k, causal)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, gate_logits = q.to(dtype), k.to(dtype), v.to(dtype), gate_logits.to(dtype)
    chosen = choose_gated_backend(
        q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys, activation=activation,
        threshold=threshold, backend=backend,
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_empty(q, k):
        chosen = "composed"  # the kernels divide by lengths
    if chosen == "skip":
        return run_skip(q, k, v, gate_logits, activation, threshold, causal, scale, first_keys).transpose(1, 2)
    if threshold > 0.0:
        closed = widen(gate_logits) <= closing_logit(activation, threshold)
        gate_logits = gate_logits.masked_fill(closed, float("-inf"))
    if chosen == "composed":
        if first_keys is not None:
            later = to_mask(first_keys, k.shape[2])
            mask = later if mask is None else mask & later
        y, _ = attention(q, k, v, causal=causal, scale=scale, mask=mask)
        spec = GateSpec(granularity="headwise" if gate_logits.shape[-1] == 1 else "elementwise", activation=activation)
        return gate(y.transpose(1, 2), gate_logits, spec)
    return run_fused(q, k, v, gate_logits, causal, scale, chosen, first_keys).transpose(1, 2)


def choose_gated_backend(
    q: Tensor,
    k: Tensor,
    gate_logits: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    activation: GateActivation = "sigmoid",
    threshold: float = 0.0,
    backend: GatedBackend = "auto",
) -> Literal["composed", "shifted", "triton", "hopper", "skip"]:
    """The backend that `gated_attention` runs for these inputs.

    For a sigmoid on a GPU in half precision `auto` takes `hopper` where it runs, else `shifted`, or with first keys
    `triton`; otherwise `composed`. It never takes `skip`, which is slower where few gates are closed.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs.
    """
    require_choice("gate activation", activation, get_args(GateActivation))
    if backend == "composed":
        return "composed"
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype not in HALF or activation != "sigmoid":
            return "composed"
        fused: tuple[FusedBackend, ...] = ("hopper", "shifted") if first_keys is None else ("triton",)
        reasons = (why_not(name, q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys) for name in fused)
        return next((name for name, reason in zip(fused, reasons, strict=True) if reason is None), "composed")
    require_choice("gated attention backend", backend, get_args(GatedBackend))
    if backend == "skip":
        reason = why_not_skip(q, k, gate_logits, activation, threshold, causal=causal, mask=mask)
    elif activation != "sigmoid":
        reason = f"it computes a sigmoid, not {activation!r}"
    else:
        reason = why_not(backend, q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys)
    if reason:
        raise ValueError(f"gated attention backend {backend!r} cannot run: {reason}; use 'composed' or 'auto'")
    return backend
