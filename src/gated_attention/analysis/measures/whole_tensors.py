"""What the measures share: whether kernels apply, shares, parts of tensors, dtypes."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from gated_attention.analysis.attention import BLOCK_ELEMENTS

_HAS_TRITON = find_spec("triton") is not None
_KERNEL_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def share(compare: Callable[..., Tensor], x: Tensor, threshold: float) -> Tensor:
    """Share of (T, D) for which the comparison holds, (B, H)."""
    # A sum of booleans would copy them to 64-bit integers first; CUDA sums halves in float32 as it reads them.
    flags = torch.empty(x.shape, dtype=torch.bfloat16 if x.is_cuda else x.dtype, device=x.device)
    count = compare(x, threshold, out=flags).sum((1, 3), dtype=wide_dtype(x))
    return count / (x.shape[1] * x.shape[3])


def groups(x: Tensor) -> Sequence[Tensor]:
    """The tensor in parts along its first axis, as large as `BLOCK_ELEMENTS` allows."""
    return torch.split(x, max(1, BLOCK_ELEMENTS // x[0].numel()))


def has_kernels(*tensors: Tensor) -> bool:
    """Whether `triton_rows` can read these: they are on a GPU and no wider than its float32 arithmetic."""
    return all(x.is_cuda and x.dtype in _KERNEL_DTYPES for x in tensors) and _HAS_TRITON


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a measure's arithmetic: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
