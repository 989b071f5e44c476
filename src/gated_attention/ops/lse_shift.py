"""A sigmoid gate on a stock attention kernel, forward and backward: `out = sigmoid(s) * attention(q, k, v)`.

Let g = sigmoid(s), P the attention weights, O the ungated output and dO the gradient of the gated output. A gate per
head gives

    dV = (g P)^T dO,   dS = (g P) * (dO V^T - rowsum(dO * O)),   ds = (1 - g) * rowsum(dO * gated)

and g P = exp(S - (LSE + softplus(-s))). So the stock backward kernel returns the gated gradients from dO, O and the
*shifted* LSE. A gate per channel has no shift; there dO is first multiplied by g. O is the saved output over g; where g
underflows, the weights g P and O both vanish.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gated_attention.ops.sdpa import run_sdpa, run_sdpa_backward, widen

_SMALLEST_GATE = 1e-30


def apply_gate(o: Float[Tensor, "b h t d"], gate_logits: Float[Tensor, "b t h #d"]) -> Float[Tensor, "b h t d"]:
    """`sigmoid(gate_logits) * o` in float32 or wider; the slow truth of `triton.gate.apply_gate`."""
    return (widen(o) * torch.sigmoid(widen(gate_logits)).transpose(1, 2)).to(o.dtype)


def prepare_backward(
    grad: Float[Tensor, "b h t d"],
    out: Float[Tensor, "b h t d"],
    gate_logits: Float[Tensor, "b t h #d"],
    lse: Float[Tensor, "b h t"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the stock backward kernel (gradient, ungated output, log-sum-exp) and the gradient of the logits."""
    scaled, o, shifted, grad_logits = _ungated(grad, out, gate_logits, lse)
    return scaled, o.to(out.dtype), shifted, grad_logits


def prepare_kernels(
    grad: Float[Tensor, "b h t d"],
    out: Float[Tensor, "b h t d"],
    gate_logits: Float[Tensor, "b t h #d"],
    lse: Float[Tensor, "b h t"],
    T_padded: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of our own backward kernels and the gradient of the logits.

    The slow truth of `triton.prepare.prepare`, and its replacement under `torch.compile`, which fuses it with the
    kernels around it.

    Returns:
        The kernels' dO; their LSE (base 2) and Delta, (2, B, H, T_padded); the gradient of the logits.
    """
    scaled, o, shifted, grad_logits = _ungated(grad, out, gate_logits, lse)
    # Computed from the rounded dO that the kernels read: a query of one key has dP = Delta up to rounding.
    delta = (widen(scaled) * o).sum(-1)
    padding = (0, T_padded - lse.shape[-1])
    stats = torch.stack((F.pad(shifted * math.log2(math.e), padding, value=math.inf), F.pad(delta, padding)))
    return scaled, stats, grad_logits


def _ungated(grad: Tensor, out: Tensor, gate_logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, output (not rounded) and log-sum-exp of attention without a gate, and the gradient of the logits."""
    s = widen(gate_logits).transpose(1, 2)  # (B, H, T, D or 1)
    g = torch.sigmoid(s)
    product = widen(grad) * widen(out)
    o = widen(out) / g.clamp_min(_SMALLEST_GATE)
    if gate_logits.shape[-1] == 1:
        product, shifted, scaled = product.sum(-1, keepdim=True), lse + F.softplus(-s)[..., 0].to(lse.dtype), grad
    else:
        shifted, scaled = lse, (g * widen(grad)).to(grad.dtype)
    grad_logits = (product * torch.sigmoid(-s)).transpose(1, 2)
    return scaled, o, shifted, grad_logits.to(gate_logits.dtype).contiguous()


def _gate_functions(x: Tensor) -> tuple[Any, Any]:
    if x.device.type != "cuda":
        return apply_gate, prepare_backward
    from gated_attention.ops.triton import gate as triton_gate

    return triton_gate.apply_gate, triton_gate.prepare_backward


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Gated output and log-sum-exp, see `fused.Forward`."""
    o, lse = run_sdpa(q, k, v, None, causal, scale)
    gate, _ = _gate_functions(q)
    return gate(o, gate_logits).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, see `fused.Backward`."""
    _, prepare = _gate_functions(q)
    scaled, o, shifted, grad_logits = prepare(grad, out, gate_logits, lse)
    return *run_sdpa_backward(scaled, q, k, v, None, o, shifted, causal, scale), grad_logits
