"""Gated attention as one op: `sigmoid(gate_logits) * attention(q, k, v)`, the paper's G1 (eq. 5, T1.5 and T1.10).

Backends: `composed` is `attention`, then `gate`, and runs whatever they run. `shifted`, `triton` and `hopper` are
kernels; see `fused`. Callers compose other gates, sites and activations themselves.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gated_attention.ops.attention import attention, check_mask, is_empty
from gated_attention.ops.first_keys import check_first_keys, to_mask
from gated_attention.ops.fused import FusedBackend, run_fused, why_not
from gated_attention.ops.gate import gate
from gated_attention.ops.sdpa import HALF
from gated_attention.ranges import require_choice
from gated_attention.spec import GateSpec

GatedBackend = Literal["auto", "composed", "shifted", "triton", "hopper"]

_GATES = {True: GateSpec(granularity="headwise"), False: GateSpec()}


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
    backend: GatedBackend = "auto",
) -> Float[Tensor, "b t h d"]:
    """Attention, with its output multiplied by the sigmoid of one logit per head or per channel.

    The sigmoid is computed in float32 (float64 for float64 inputs). Heads, masks, scale and autocast are as in
    `attention`. The output is contiguous.

    Args:
        first_keys: The first key that each query sees, for packed documents, windows and left padding; see
            `find_first_keys`. A query sees its own key in any case. Causal attention only.
        backend: See the module; `choose_gated_backend` returns what `auto` takes.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs, or the mask or the first keys do not fit.
    """
    check_mask(mask, q, k)
    if first_keys is not None:
        first_keys = check_first_keys(first_keys, q, k, causal)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, gate_logits = q.to(dtype), k.to(dtype), v.to(dtype), gate_logits.to(dtype)
    chosen = choose_gated_backend(q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys, backend=backend)
    if chosen == "composed" or is_empty(q, k):
        if first_keys is not None:
            later = to_mask(first_keys, k.shape[2])
            mask = later if mask is None else mask & later
        y, _ = attention(q, k, v, causal=causal, scale=scale, mask=mask)
        return gate(y.transpose(1, 2), gate_logits, _GATES[gate_logits.shape[-1] == 1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run_fused(q, k, v, gate_logits, causal, scale, chosen, first_keys).transpose(1, 2)


def choose_gated_backend(
    q: Tensor,
    k: Tensor,
    gate_logits: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    backend: GatedBackend = "auto",
) -> Literal["composed", "shifted", "triton", "hopper"]:
    """The backend that `gated_attention` runs for these inputs.

    On a GPU in half precision `auto` takes `hopper` where it runs, else `shifted`, or with first keys `triton`;
    elsewhere `composed`.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs.
    """
    if backend == "composed":
        return "composed"
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype not in HALF:
            return "composed"
        fused: tuple[FusedBackend, ...] = ("hopper", "shifted") if first_keys is None else ("triton",)
        reasons = (why_not(name, q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys) for name in fused)
        return next((name for name, reason in zip(fused, reasons, strict=True) if reason is None), "composed")
    require_choice("gated attention backend", backend, get_args(GatedBackend))
    if reason := why_not(backend, q, k, gate_logits, causal=causal, mask=mask, first_keys=first_keys):
        raise ValueError(f"gated attention backend {backend!r} cannot run: {reason}; use 'composed' or 'auto'")
    return backend
