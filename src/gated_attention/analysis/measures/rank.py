"""How many directions the value and output maps of a head use together."""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(
    w_v: Float[Tensor, "k d c"], w_o: Float[Tensor, "h c d"], scores: Float[Tensor, "#h d"] | None = None
) -> Float[Tensor, " h"]:
    """Exponential of the entropy of the normalised singular values of each head's W_V diag(scores) W_O, 1 to D.

    Computed in float64 from D x D Gram matrices. Source: Roy and Vetterli, EUSIPCO 2007.
    """
    groups = w_o.shape[0] // w_v.shape[0]
    # In float64, because singular values are square roots here, which halves the digits of the small ones.
    gram_v = torch.stack([w.double() @ w.double().T for w in w_v]).repeat_interleave(groups, dim=0)  # (H, D, D)
    gram_o = torch.stack([w.double().T @ w.double() for w in w_o])
    if scores is not None:
        gram_v = gram_v * scores.double()[:, :, None] * scores.double()[:, None, :]
    values, vectors = torch.linalg.eigh(gram_v)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]  # gram_v = root root^T
    sizes = torch.linalg.eigvalsh(root.transpose(1, 2) @ gram_o @ root).clamp(min=0).sqrt()
    p = sizes / sizes.sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(p).sum(-1))
