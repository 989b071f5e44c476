"""OLMo-core's permutations of tokens among experts without its Triton kernels, so that its experts run on a CPU."""

import torch


def gather(x, indices, bin_ids, weights, bins, top_k):
    out = x[indices // top_k]
    return out if weights is None else out * weights[indices, None]


def scatter(x, indices, bin_ids, weights, bins, top_k):
    x = x if weights is None else x * weights[indices, None]
    return torch.empty_like(x).index_copy(0, indices.long(), x).unflatten(0, (-1, top_k)).sum(1)


def scatter_wgrad(x, grad, indices, bin_ids, bins, top_k):
    return torch.empty_like(x[:, 0]).index_copy(0, indices.long(), (x * grad[indices // top_k]).sum(-1))
