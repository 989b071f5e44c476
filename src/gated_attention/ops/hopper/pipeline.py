"""What kernels for Hopper are built from: rings of tiles in shared memory, and what describes a tensor to copy."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@gluon.constexpr_function
def mma_layout(n):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@aggregate
class Shape:
    """Sizes of the problem; `section` is the number of heads of the batch that are worked on at a time."""

    B: gl.tensor
    H: gl.tensor
    T: gl.tensor
    S: gl.tensor
    group: gl.tensor
    section: gl.tensor
    num_tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, B, H, T, S, group, section, num_tiles):
        self.B = B
        self.H = H
        self.T = T
        self.S = S
        self.group = group
        self.section = section
        self.num_tiles = num_tiles

    @gluon.jit
    def tile(self, index):
        """Which rows of which head of the batch are drawn at `index`."""
        rank, head = draw(index, self.B * self.H, self.section, self.num_tiles, self.num_tiles // 4)
        return self.num_tiles - 1 - rank, head


@gluon.jit
def draw(index, heads, section, num_blocks, late):
    """(Which block, by length, of which head) is worked on at `index`.

    Section after section of heads, the longest blocks first; the `late` shortest of every head are kept for the end,
    where they fill what the long ones leave idle.
    """
    early = num_blocks - late
    is_late = index >= heads * early
    rest = gl.where(is_late, index - heads * early, index)
    blocks = gl.where(is_late, late, early)
    first = rest // (section * blocks) * section
    rest -= first * blocks
    width = gl.minimum(section, heads - first)
    return gl.where(is_late, early, 0) + rest // width, first + rest % width


@aggregate
class Ring:
    """Places in shared memory used in turn, each with a barrier for "ready to read" and one for "free to write"."""

    places: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    SIZE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, places, ready, free, SIZE):
        self.places = places
        self.ready = ready
        self.free = free
        self.SIZE = gl.constexpr(SIZE)

    @gluon.jit
    def await_free(self, count):
        """Wait until the `count`-th write may begin."""
        mbarrier.wait(self.free.index(count % self.SIZE), ((count // self.SIZE) & 1) ^ 1)

    @gluon.jit
    def await_ready(self, count):
        """Wait until the `count`-th write has arrived."""
        mbarrier.wait(self.ready.index(count % self.SIZE), (count // self.SIZE) & 1)

    @gluon.jit
    def release(self, count):
        """Say that this consumer has read what the `count`-th write brought."""
        mbarrier.arrive(self.free.index(count % self.SIZE), count=1)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def ring(places, SIZE: gl.constexpr, READERS: gl.constexpr):
    return Ring(places, barriers(SIZE, 1), barriers(SIZE, READERS), SIZE)


@gluon.jit
def tell_draw(draws, t, index, shape, NUM_WARPS: gl.constexpr):
    """Let the consumers know the `t`-th draw: row tile, batch, head, and whether there is one."""
    total = shape.num_tiles * shape.B * shape.H
    tile, head = shape.tile(gl.minimum(index, total - 1))
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    field = gl.arange(0, 4, layout=layout)
    message = gl.where(field == 0, tile, gl.where(field == 1, head // shape.H, head % shape.H))
    message = gl.where(field == 3, (index < total).to(gl.int32), message)
    draws.await_free(t)
    draws.places.index(t % draws.SIZE).store(message)
    mbarrier.arrive(draws.ready.index(t % draws.SIZE), count=1)


@gluon.jit
def hear_draw(draws, t, NUM_WARPS: gl.constexpr):
    """(Row tile, batch, head, whether there is one) of the `t`-th draw."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    field = gl.arange(0, 4, layout=layout)
    draws.await_ready(t)
    message = draws.places.index(t % draws.SIZE).load(layout)
    draws.release(t)
    tile = gl.sum(gl.where(field == 0, message, 0), 0)
    b = gl.sum(gl.where(field == 1, message, 0), 0)
    h = gl.sum(gl.where(field == 2, message, 0), 0)
    return tile, b, h, gl.sum(gl.where(field == 3, message, 0), 0)


class Descriptor(TensorDescriptor):  # type: ignore[misc]  # Triton has no types
    """How the copy engine finds tiles of a tensor; `describe` has checked that it can."""

    def __post_init__(self) -> None:
        pass


def describe(x: Float[Tensor, "b h t d"], rows: int) -> Descriptor:
    """How the copy engine finds tiles of `rows` rows; what it cannot address is copied first."""
    strides = _strides(x.shape, x.stride(), 16 // x.element_size())
    if strides is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride())
    width = x.shape[-1]
    return Descriptor(x, list(x.shape), strides, [1, 1, rows, width], _layout(rows, width, x.dtype))


# What follows is slow to make, and wanted at every launch.


@functools.lru_cache(maxsize=1024)
def _strides(shape: torch.Size, strides: tuple[int, ...], aligned: int) -> list[int] | None:
    """As the copy engine takes them, those of single places made up; None if rows do not begin at 16 bytes."""
    width = shape[-1]
    found = [stride if size > 1 else width for size, stride in zip(shape[:-1], strides[:-1], strict=True)]
    if strides[-1] != 1 or any(stride <= 0 or stride % aligned for stride in found):
        return None
    return [*found, 1]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _DTYPES[dtype])
