"""Plays Gluon kernels with specialised warps on the CPU: what Triton's interpreter does for Triton.

A kernel's source is run as the Python that it is, with this module in the place of Gluon. Tensors are torch tensors
without layouts, every warp partition is a thread, and what is asynchronous happens as early or as late as it may:
copies into shared memory when they are asked for; products, copies out of it and gathers when they are waited for, and
until then what is to be gathered is NaN. So memory that is given back too soon, or never, shows as a wrong number or as
`Stuck`.
"""

import ast
import functools
import math
import threading
import time
import types
from pathlib import Path

import torch

from gated_attention.ops.launch import launch, launch_key
from gated_attention.ops.sdpa import adjacent

PATIENCE_S = 20.0
GIVE_WAY_S = 1e-4
_local = threading.local()


class Stuck(RuntimeError):  # noqa: N818
    """A partition waits for what nobody brings."""


class Value(torch.Tensor):
    """A tensor of a kernel; its layout is of no account."""

    type = types.SimpleNamespace(layout=None)

    def __hash__(self):
        return id(self)

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")  # as Triton divides

    def __iadd__(self, other):
        return self + other  # a name is bound anew; what else has the value keeps it

    def __isub__(self, other):
        return self - other


def value(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.tensor.dtype))

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)

    def __getitem__(self, key):
        return Pointer(self.tensor, self.offset[key])

    def view(self):
        """The memory from this tensor's first number on, whatever its strides."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))


class Descriptor:
    """A tensor to copy tiles of; `layout` is what the kernel passes on."""

    def __init__(self, tensor, shape=None, strides=None, block=None, layout=None):
        self.tensor, self.block, self.layout, self.dtype = tensor, block, None, tensor.dtype


class Shared:
    """A place in shared memory; `NaN` until it is written."""

    def __init__(self, tensor):
        self.tensor = tensor

    dtype = property(lambda self: self.tensor.dtype)
    shape = property(lambda self: self.tensor.shape)

    def index(self, i):
        assert 0 <= int(i) < len(self.tensor), f"place {int(i)} of {len(self.tensor)}"
        return Shared(self.tensor[int(i)])

    def reshape(self, shape):
        return Shared(self.tensor.view([int(size) for size in shape]))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def slice(self, start, length):
        return Shared(self.tensor[start : start + length])

    def load(self, layout=None):
        return value(self.tensor.clone())

    def store(self, x):
        self.tensor.copy_(x.view(self.tensor.shape))


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes are there."""

    changed = threading.Condition()

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.missing = count

    def note(self, arrivals=0, num_bytes=0):
        with self.changed:
            self.missing -= arrivals
            self.bytes += num_bytes
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity) or _grid.failed, PATIENCE_S):
                raise Stuck(f"a phase of parity {int(parity)} does not end")
        if _grid.failed:
            raise Stuck("another partition failed")


class Barriers:
    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, i):
        return self.all[int(i)]


class _Grid:
    """What the programs of a launch share."""

    failed = False
    program, num_programs, warps = 0, 1, 4


_grid = _Grid()


class Kernel:
    """Stands for a jitted kernel: `kernel[grid](...)` plays its programs one after the other."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, enable_fp_fusion=True, **constants):
            _grid.num_programs, _grid.warps = math.prod(grid), num_warps
            given = [_argument(x) for x in args]
            for program in range(_grid.num_programs):
                _grid.program, _grid.failed = program, False
                self.function(*given, **constants)

        return launch


def _argument(x):
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    return value(x) if isinstance(x, int | float) else x


def _plays(function):
    return lambda *args, **options: value(function(*args, **options))


def _load(ptr, mask=None, other=0.0):
    at = torch.as_tensor(ptr.offset)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    memory = ptr.view()
    found = torch.full(at.shape, other, dtype=memory.dtype)
    found[mask] = memory[at[mask].long()]
    return value(found)


def _store(ptr, x, mask=None):
    at, x = torch.broadcast_tensors(torch.as_tensor(ptr.offset), x)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    memory = ptr.view()
    memory[at[mask].long()] = x[mask].to(memory.dtype)


def _atomic_add(ptr, x):
    old = ptr.view()[int(ptr.offset)].clone()
    ptr.view()[int(ptr.offset)] += x
    return value(old)


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0])
    empty = torch.full([int(size) for size in shape], -1 if dtype == torch.int32 else float("nan"), dtype=dtype)
    return Shared(empty)


def _warp_specialize(partitions, warps, registers):
    """Every partition in a thread; the first has the program's own warps."""
    errors = []

    def run(function, args, num_warps):
        _local.warps, _local.begun, _local.leaving, _local.gathers = num_warps, [], [], []
        try:
            function(*args)
            assert not _local.begun + _local.leaving + _local.gathers, "something is under way at the end"
        except BaseException as error:
            errors.append(error)
            _grid.failed = True
            with Barrier.changed:
                Barrier.changed.notify_all()

    assert len(warps) == len(registers) == len(partitions) - 1
    threads = [
        threading.Thread(target=run, args=(*partition, number), daemon=True)
        for partition, number in zip(partitions, [_grid.warps, *warps], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, Stuck)), errors[0])


class Product:
    """A product under way: formed when it is waited for, of what is in memory then."""

    def __init__(self, a, b, total, use_acc):
        self.a, self.b, self.total, self.use_acc, self.result = a, b, total, use_acc, None

    type = Value.type

    def form(self):
        a, b = ((x.tensor if isinstance(x, Shared) else x).float() for x in (self.a, self.b))
        product = value(a @ b)
        self.result = self.total + product if self.use_acc else product


def _mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    product = Product(a, b, acc, use_acc)
    _local.begun.append(product)
    return product


def _mma_wait(num_outstanding=0, deps=()):
    while len(_local.begun) > num_outstanding:
        _local.begun.pop(0).form()
    results = tuple(one.result for one in deps)
    assert all(one is not None for one in results), "a product is read that may not be formed yet"
    return results[0] if len(results) == 1 else results


def _bounds(descriptor, coordinates):
    """Where a tile and its tensor meet, in the tensor and in the tile."""
    outer, inner = [], []
    for at, size, limit in zip(map(int, coordinates), descriptor.block, descriptor.tensor.shape, strict=True):
        begin, end = max(at, 0), max(min(at + size, limit), at, 0)
        outer.append(slice(begin, min(end, max(limit, begin))))
        inner.append(slice(begin - at, end - at))
    return tuple(outer), tuple(inner)


def _copy_in(descriptor, coordinates, barrier, place):
    outer, inner = _bounds(descriptor, coordinates)
    tile = torch.zeros(descriptor.block, dtype=descriptor.dtype)
    found = descriptor.tensor[outer]
    tile[tuple(slice(s.start, s.start + n) for s, n in zip(inner, found.shape, strict=True))] = found
    place.tensor.copy_(tile.view(place.shape))
    barrier.note(num_bytes=-tile.numel() * tile.element_size())


def _copy_out(descriptor, coordinates, place, add=False):
    assert all(int(at) >= 0 for at in coordinates), "what is written may not lie before its tensor"

    def leave():
        outer, inner = _bounds(descriptor, coordinates)
        tile = place.tensor.view(descriptor.block)
        target = descriptor.tensor[outer]
        tile = tile[tuple(slice(s.start, s.start + n) for s, n in zip(inner, target.shape, strict=True))]
        target.copy_(target + tile if add else tile)

    _local.leaving.append(leave)


def _gather(place, pointer):
    found = _load(pointer)
    place.tensor.fill_(math.nan)
    _local.gathers.append((place.tensor, found))


def _gather_wait(pending):
    while len(_local.gathers) > pending:
        place, found = _local.gathers.pop(0)
        place.copy_(found)


def _store_wait(pending):
    while len(_local.leaving) > pending:
        _local.leaving.pop(0)()


class _Integer(int):
    value = property(int)


def _constexpr(x):
    return _Integer(x) if type(x) is int else x


class _SharedLayout:
    def __init__(self, **options):
        pass

    @staticmethod
    def get_default_for(block, dtype):
        return None


_LAYOUTS = ("SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout", "NVMMADistributedLayout")
gl = types.SimpleNamespace(
    constexpr=_constexpr, tensor=object, shared_memory_descriptor=object,
    int16=torch.int16, int32=torch.int32, int64=torch.int64,
    float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
    program_id=lambda axis: value(_grid.program), num_programs=lambda axis: value(_grid.num_programs),
    num_warps=lambda: _local.warps, static_range=range,
    arange=lambda start, end, layout=None: value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout=None: value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, x, dtype, layout=None: value(torch.full(shape, x, dtype=dtype)),
    where=_plays(lambda c, a, b: torch.where(torch.as_tensor(c), a, b)),
    minimum=_plays(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))),
    maximum=_plays(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b))),
    max=_plays(lambda x, axis: x.amax(axis)), sum=_plays(lambda x, axis: x.sum(axis)),
    exp2=_plays(torch.exp2), log2=_plays(torch.log2), cdiv=_plays(lambda a, b: (a + b - 1) // b),
    convert_layout=lambda x, layout: x, load=_load, store=_store, atomic_add=_atomic_add,
    allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    **dict.fromkeys(_LAYOUTS, lambda *args, **options: None),
    NVMMASharedLayout=_SharedLayout,
)  # fmt: skip
mbarrier = types.SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, parity: barrier.wait(parity),
    expect=lambda barrier, num_bytes: barrier.note(arrivals=1, num_bytes=num_bytes),
    arrive=lambda barrier, count=1: (barrier.note(arrivals=count), time.sleep(GIVE_WAY_S)),  # others go first
)
tma = types.SimpleNamespace(store_wait=_store_wait)
compat = types.SimpleNamespace(
    async_load=_copy_in,
    async_store=_copy_out,
    async_atomic_add=functools.partial(_copy_out, add=True),
    barrier=lambda: None,
)
async_copy = types.SimpleNamespace(
    async_copy_global_to_shared=_gather, commit_group=lambda: None, wait_group=_gather_wait
)
hopper = types.SimpleNamespace(
    async_copy=async_copy, fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma, warpgroup_mma=_mma,
    warpgroup_mma_wait=_mma_wait,
)  # fmt: skip


def _jit(function=None, **options):
    return functools.partial(_jit, **options) if function is None else function


gluon = types.SimpleNamespace(jit=_jit, constexpr_function=_jit)


triton = types.SimpleNamespace(jit=_jit, cdiv=lambda a, b: -(-a // b))
tl = types.SimpleNamespace(constexpr=_constexpr)


def _range(*bounds):
    return map(value, range(*map(int, bounds)))


def play(path: Path, *known: types.SimpleNamespace, **replaced: object) -> types.SimpleNamespace:
    """The names of a kernel's module, run with this module in the place of Triton and Gluon.

    Args:
        known: Modules of the package that it imports from, played before.
        replaced: What cannot be played, inline assembly say, by name.
    """
    tree = ast.parse(path.read_text(), str(path))
    names = {"__name__": f"played.{path.stem}", "gl": gl, "gluon": gluon, "triton": triton, "tl": tl}
    names |= {"aggregate": _jit, "TensorDescriptor": Descriptor, "range": _range}
    names |= {"launch": launch, "launch_key": launch_key, "adjacent": adjacent}
    names |= vars(hopper) | vars(compat)
    for module in known:
        names |= {name: thing for name, thing in vars(module).items() if not name.startswith("_")}
    tree.body = [node for node in tree.body if not _imports_kernels(node)]
    exec(compile(tree, str(path), "exec"), names)
    names |= replaced
    return types.SimpleNamespace(**names)


def _imports_kernels(node: ast.stmt) -> bool:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(module.split(".")[0] in ("triton", "gated_attention") for module in modules)
