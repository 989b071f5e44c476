"""What the measures share: kernels where they run, parts of tensors, dtypes."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from gated_attention.analysis.attention import BLOCK_ELEMENTS

_KERNEL_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def share(compare: Callable[..., Tensor], x: Tensor, threshold: float) -> Tensor:
    """Share of (T, D) for which the comparison holds, (B, H)."""
    # A sum of booleans would copy them to 64-bit integers first; CUDA adds up halves in float32 as they are read.
    flags = torch.empty(x.shape, dtype=torch.bfloat16 if x.is_cuda else x.dtype, device=x.device)
    count = compare(x, threshold, out=flags).sum((1, 3), dtype=wide_dtype(x))
    return count / (x.shape[1] * x.shape[3])


def groups(x: Tensor) -> Sequence[Tensor]:
    """Some sequences at a time, as many as `BLOCK_ELEMENTS` allows."""
    return torch.split(x, max(1, BLOCK_ELEMENTS // x[0].numel()))


def has_kernels(*tensors: Tensor) -> bool:
    """Whether `triton_rows` reads these: on a GPU, and no wider than its float32 arithmetic."""
    return all(x.is_cuda and x.dtype in _KERNEL_DTYPES for x in tensors) and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a measure's arithmetic: float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)
