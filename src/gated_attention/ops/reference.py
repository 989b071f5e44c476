"""The slow truth: every op written from its definition, in the dtype of its inputs.

It shares nothing with the fast code; the tests measure every backend against it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gated_attention.spec import GateSpec


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b k s d"],
    v: Float[Tensor, "b k s d"],
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Bool[Tensor, "#b #h t s"] | None = None,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """Softmax attention and the natural log-sum-exp of its scores; conventions as in `ops.attention`."""
    t, s, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(s - t)
    if mask is not None:
        visible = visible & mask
    weights = torch.where(visible, torch.exp(scores), 0.0)
    total = weights.sum(-1)
    out = torch.einsum("bhts,bhsd->bhtd", weights, v) / torch.where(total > 0, total, 1.0)[..., None]
    return out, torch.log(total)


def gate(
    y: Float[Tensor, "b t h d"], gate_logits: Float[Tensor, "#b #t h #d"], spec: GateSpec
) -> Float[Tensor, "b t h d"]:
    """Equation 5 and its variants (Tables 1, 3 and 4)."""
    x = gate_logits
    match spec.activation:
        case "sigmoid":
            scores = 1 / (1 + torch.exp(-x))
        case "silu":
            scores = x / (1 + torch.exp(-x))
        case "identity":
            scores = x
        case "ns_sigmoid":
            scores = 0.5 + 0.5 / (1 + torch.exp(-x))
        case "hard_sigmoid":
            # Constant at both corners: a score of exactly 0 or 1 passes no gradient.
            scores = torch.where(x.abs() < 3, x / 6 + 0.5, (x > 0).to(x.dtype))
        case "softplus":
            scores = torch.logaddexp(x, torch.zeros_like(x))
    if spec.head_shared:
        scores = scores.mean(2, keepdim=True)
    scores = scores * spec.scale
    return y * scores if spec.combine == "multiply" else y + scores
