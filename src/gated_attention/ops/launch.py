"""Launching the kernel that Triton compiled for arguments like these, without asking it which one that was.

Triton works that out from every argument at every launch, which for kernels of 30 arguments is most of what a launch
costs the CPU.
"""

from collections.abc import Hashable
from typing import Any

from torch import Tensor

_compiled: dict[Hashable, Any] = {}

FUSION = {"enable_fp_fusion": True}
"""An option of every kernel of ours: a product and a sum in one instruction. Triton 3.9 warns that 3.10 will not."""


def launch(
    kernel: Any, grid: tuple[int, int, int], like: Hashable, *args: Any, num_warps: int = 4, **constants: Any
) -> None:
    """`kernel[grid](*args, num_warps=num_warps, **FUSION, **constants)`.

    Args:
        like: What, beside the constants, decides which kernel Triton compiles: `launch_key` of the tensors, and numbers
            that do not follow from them.
        constants: Compile-time constants, in the order of the kernel's parameters, of which they are the last.
    """
    key = (id(kernel), num_warps, like, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*args, *constants.values())
        return
    compiled = kernel[grid](*args, num_warps=num_warps, **FUSION, **constants)
    if compiled is not None:  # as an interpreter gives
        assert kernel.arg_names[-len(constants) :] == list(constants), "constants are not the last parameters, in order"
        _compiled[key] = compiled


def launch_key(*tensors: Tensor) -> Hashable:
    """Equal for tensors of which Triton knows the same: it makes use of sizes, strides, and multiples of 16 bytes."""
    return (tensors[0].device, *((x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors))
