"""What the kernels for Hopper share: rings of tiles in shared memory, draws of work, and tensor descriptors."""

import functools
from typing import NamedTuple

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


class Shape(NamedTuple):
    """Sizes of the problem; `section` heads of the batch are worked on at a time."""

    B: gl.tensor
    H: gl.tensor
    T: gl.tensor
    S: gl.tensor
    group: gl.tensor
    section: gl.tensor
    num_tiles: gl.tensor


@gluon.jit
def drawn_tile(shape, index):
    """(Tile of rows, head of the batch) drawn at `index`."""
    rank, head = draw(index, shape.B * shape.H, shape.section, shape.num_tiles, shape.num_tiles // 4)
    return shape.num_tiles - 1 - rank, head


@gluon.jit
def draw(index, heads, section, num_blocks, late):
    """(Block, by length, and head) to work on at `index`.

    Sections of heads follow each other, the longest blocks of each first. The `late` shortest blocks of every head come
    at the end, where they fill the multiprocessors that the long ones leave idle.
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

    @gluon.constexpr_function
    def __init__(self, places, ready, free):
        self.places = places
        self.ready = ready
        self.free = free

    @gluon.jit
    def turn(self, count):
        """Index of the place that the `count`-th write takes."""
        return count % self.ready.shape[0]

    @gluon.jit
    def tile(self, count):
        """The (rows, D) tile in that place."""
        return self.places.index(self.turn(count)).reshape([self.places.shape[3], self.places.shape[4]])

    @gluon.jit
    def await_free(self, count):
        """Wait until the `count`-th write may begin."""
        mbarrier.wait(self.free.index(self.turn(count)), ((count // self.ready.shape[0]) & 1) ^ 1)

    @gluon.jit
    def await_ready(self, count):
        """Wait until the `count`-th write has arrived."""
        mbarrier.wait(self.ready.index(self.turn(count)), (count // self.ready.shape[0]) & 1)

    @gluon.jit
    def release(self, count):
        """Report that this consumer has read the `count`-th write."""
        mbarrier.arrive(self.free.index(self.turn(count)), count=1)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def ring(places, SIZE: gl.constexpr, READERS: gl.constexpr):
    return Ring(places, barriers(SIZE, 1), barriers(SIZE, READERS))


@gluon.jit
def tell_draw(draws, t, index, shape, NUM_WARPS: gl.constexpr):
    """Tell the consumers the `t`-th draw: row tile, batch, head, and whether there is one."""
    total = shape.num_tiles * shape.B * shape.H
    tile, head = drawn_tile(shape, gl.minimum(index, total - 1))
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    field = gl.arange(0, 4, layout=layout)
    message = gl.where(field == 0, tile, gl.where(field == 1, head // shape.H, head % shape.H))
    message = gl.where(field == 3, (index < total).to(gl.int32), message)
    draws.await_free(t)
    draws.places.index(draws.turn(t)).store(message)
    mbarrier.arrive(draws.ready.index(draws.turn(t)), count=1)


@gluon.jit
def hear_draw(draws, t, NUM_WARPS: gl.constexpr):
    """(Row tile, batch, head, whether there is one) of the `t`-th draw."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    field = gl.arange(0, 4, layout=layout)
    draws.await_ready(t)
    message = draws.places.index(draws.turn(t)).load(layout)
    draws.release(t)
    tile = gl.sum(gl.where(field == 0, message, 0), 0)
    b = gl.sum(gl.where(field == 1, message, 0), 0)
    h = gl.sum(gl.where(field == 2, message, 0), 0)
    return tile, b, h, gl.sum(gl.where(field == 3, message, 0), 0)


class Descriptor(TensorDescriptor):  # type: ignore[misc]  # Triton has no types
    """A tensor descriptor without Triton's checks, which `describe` has made."""

    def __post_init__(self) -> None:
        pass


def describe(x: Float[Tensor, "b h t d"], rows: int) -> Descriptor:
    """How the copy engine finds tiles of `rows` rows. A tensor that it cannot address is copied first."""
    x, strides = addressable(x, 16 // x.element_size())
    width = x.shape[-1]
    return Descriptor(x, list(x.shape), strides, [1, 1, rows, width], _layout(rows, width, x.dtype))


def addressable(x: Tensor, aligned: int) -> tuple[Tensor, list[int]]:
    """A tensor, or a copy unless its rows begin at multiples of 16 bytes and of `aligned` numbers; and its strides."""
    strides = _strides(x.shape, x.stride(), aligned)
    if strides is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride())
    return x, strides


# The rest is cached: it is slow to build and needed at every launch.


@functools.lru_cache(maxsize=1024)
def _strides(shape: torch.Size, strides: tuple[int, ...], aligned: int) -> list[int] | None:
    """As the copy engine takes them; None unless rows begin at multiples of `aligned`. Sizes of 1 have any stride."""
    width = shape[-1]
    found = [stride if size > 1 else width for size, stride in zip(shape[:-1], strides[:-1], strict=True)]
    if strides[-1] != 1 or any(stride <= 0 or stride % aligned for stride in found):
        return None
    return [*found, 1]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _DTYPES[dtype])
