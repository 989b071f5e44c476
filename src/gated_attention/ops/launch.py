"""Launches of Triton kernels that look up the compiled kernel here instead of in Triton.

Triton inspects every argument at every launch. For kernels of 30 arguments that is most of the CPU time of a launch.
"""

from collections.abc import Hashable
from typing import Any

from torch import Tensor

_compiled: dict[Hashable, Any] = {}

FUSION = {"enable_fp_fusion": True}
"""Option of all our kernels: fused multiply-add. Triton 3.9 warns that 3.10 will turn it off by default."""


def launch(
    kernel: Any, grid: tuple[int, int, int], like: Hashable, *args: Any, num_warps: int = 4, **constants: Any
) -> None:
    """`kernel[grid](*args, num_warps=num_warps, **FUSION, **constants)`.

    Args:
        like: Whatever else than the constants decides which kernel Triton compiles: `launch_key` of the tensors, and
            numbers that do not follow from them.
        constants: Compile-time constants, the kernel's last parameters, in their order.
    """
    key = (id(kernel), num_warps, like, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*args, *constants.values())
        return
    compiled = kernel[grid](*args, num_warps=num_warps, **FUSION, **constants)
    if compiled is not None:  # an interpreter returns None
        assert kernel.arg_names[-len(constants) :] == list(constants), "constants are not the last parameters, in order"
        _compiled[key] = compiled


def launch_key(*tensors: Tensor) -> Hashable:
    """Equal for tensors that Triton specialises alike: by dtype, sizes, strides and alignment to 16 bytes."""
    return (tensors[0].device, *((x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors))
