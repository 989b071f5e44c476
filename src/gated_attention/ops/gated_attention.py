"""Gated attention as one op: `sigmoid(gate_logits) * attention(q, k, v)`, the paper's G1 (eq. 5, T1.5 and T1.10).

Backends: `composed` is `attention`, then `gate`, and runs whatever they run. `shifted`, `triton` and `hopper` are
kernels; see `fused`. Callers compose other gates, sites and activations themselves.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gated_attention.ops.attention import attention, check_mask, is_empty
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
    backend: GatedBackend = "auto",
) -> Float[Tensor, "b t h d"]:
    """Attention, with its output multiplied by the sigmoid of one logit per head or per channel.

    The sigmoid is computed in float32 (float64 for float64 inputs). Heads, masks, scale and autocast are as in
    `attention`. The output is contiguous.

    Args:
        backend: See the module; `choose_gated_backend` returns what `auto` takes.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs, or the mask does not fit.
    """
    check_mask(mask, q, k)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, gate_logits = q.to(dtype), k.to(dtype), v.to(dtype), gate_logits.to(dtype)
    chosen = choose_gated_backend(q, k, gate_logits, causal=causal, mask=mask, backend=backend)
    if chosen == "composed" or is_empty(q, k):
        y, _ = attention(q, k, v, causal=causal, scale=scale, mask=mask)
        return gate(y.transpose(1, 2), gate_logits, _GATES[gate_logits.shape[-1] == 1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run_fused(q, k, v, gate_logits, causal, scale, chosen).transpose(1, 2)


def choose_gated_backend(
    q: Tensor,
    k: Tensor,
    gate_logits: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    backend: GatedBackend = "auto",
) -> Literal["composed", "shifted", "triton", "hopper"]:
    """The backend that `gated_attention` runs for these inputs.

    `auto` takes `hopper` where it runs, else `shifted` on a GPU in half precision, else `composed`. It never takes
    `triton`, which runs only where `shifted` does and is not faster.

    Raises:
        ValueError: The backend is unknown or cannot run these inputs.
    """
    if backend == "composed":
        return "composed"
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype not in HALF:
            return "composed"
        fused: tuple[FusedBackend, ...] = ("hopper", "shifted")
        runs = (name for name in fused if why_not(name, q, k, gate_logits, causal=causal, mask=mask) is None)
        return next(runs, "composed")
    require_choice("gated attention backend", backend, get_args(GatedBackend))
    if reason := why_not(backend, q, k, gate_logits, causal=causal, mask=mask):
        raise ValueError(f"gated attention backend {backend!r} cannot run: {reason}; use 'composed' or 'auto'")
    return backend
