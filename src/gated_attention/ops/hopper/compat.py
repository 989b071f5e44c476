"""What Triton 3.6 to 3.9 call differently in Gluon, under the names of 3.9."""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma


@builtin
def _async_atomic_add(descriptor, coordinates, source, _semantic=None):
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


# `barrier`: of the threads of a warp partition.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # 3.6
if hasattr(tma, "async_load"):
    async_load, async_store, async_atomic_add = tma.async_load, tma.async_store, tma.async_atomic_add
else:  # 3.6, 3.7
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    async_atomic_add = _async_atomic_add
