"""Gated attention over open rows, forward, for Hopper: as `forward`, with rows gathered and scattered.

One warp draws tiles of open rows from a work list, those with most keys first, and gathers their queries by
asynchronous copies of 16 bytes. One copies keys and values, by the copy engine. One writes the zeros of closed rows.
Two or three consumer warpgroups own 64 rows each, which see keys up to their own positions, and scatter their outputs.
The lists are `skip.rows` and `triton.skip_work`.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from gated_attention.ops.hopper.attend import LOG2E, ROWS, add, attend
from gated_attention.ops.hopper.compat import async_load
from gated_attention.ops.hopper.pipeline import Ring, mma_layout, ring

_CHUNK = gl.constexpr(8)  # rows gathered at a time: 24 registers hold no more addresses
_SMALL_REGISTERS = gl.constexpr(24)


@aggregate
class _Options:
    """What the kernel is compiled for."""

    BN: gl.constexpr
    D: gl.constexpr
    G: gl.constexpr
    CAUSAL: gl.constexpr
    HARD: gl.constexpr
    OUTPUT_IN_QUERIES: gl.constexpr
    CONSUMERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, BN, D, G, CAUSAL, HARD, OUTPUT_IN_QUERIES, CONSUMERS):
        self.BN = gl.constexpr(BN)
        self.D = gl.constexpr(D)
        self.G = gl.constexpr(G)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.HARD = gl.constexpr(HARD)
        self.OUTPUT_IN_QUERIES = gl.constexpr(OUTPUT_IN_QUERIES)
        self.CONSUMERS = gl.constexpr(CONSUMERS)


class _Sizes(NamedTuple):
    """`heads` counts key/value heads of all the batch; a row at position t has the key t + `offset`."""

    heads: gl.tensor
    K: gl.tensor
    T: gl.tensor
    S: gl.tensor
    offset: gl.tensor
    capacity: gl.tensor


class _Tensor(NamedTuple):
    """A (B, H, T, D) tensor whose channels lie side by side."""

    ptr: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_t: gl.tensor


class _Shared(NamedTuple):
    """Shared memory: queries, keys, values, outputs, draws, and the codes of a draw's rows, which come with it."""

    q: Ring
    k: Ring
    v: Ring
    o: gl.shared_memory_descriptor
    draws: Ring
    codes: gl.shared_memory_descriptor


@gluon.jit
def _starts_of(x, head, code, sizes, options):
    """Where the rows of these codes begin."""
    h = head % sizes.K * options.G + code % options.G
    # Within a batch in 32 bits: wider strides would be formed at the kernel's entry and spilled there.
    return x.ptr + head // sizes.K * x.stride_b + (code // options.G * x.stride_t + h * x.stride_h)


@gluon.jit
def _hear(draws, t, NUM_WARPS: gl.constexpr):
    """The entry of the work list that the `t`-th draw brought."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    draws.await_ready(t)
    return _read(draws.places.index(draws.turn(t)).load(layout), layout)


@gluon.jit
def _read(entry, layout: gl.constexpr):
    """(Key/value head of the batch, place of the first row, tiles of keys, whether there is one) of an entry."""
    field = gl.arange(0, 4, layout=layout)
    head = gl.sum(gl.where(field == 0, entry, 0), 0)
    first = gl.sum(gl.where(field == 1, entry, 0), 0)
    n = gl.sum(gl.where(field == 2, entry, 0), 0)
    return head, first, n, gl.sum(gl.where(field == 3, entry, 0), 0)


@gluon.jit
def _gather(q, order_ptr, work_ptr, counter_ptr, mem, sizes, options):
    D: gl.constexpr = options.D
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, lanes)
    pairs: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    field = gl.arange(0, 4, layout=layout)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, lanes))
    index = gl.program_id(0)
    found = 1
    t = 0
    while found != 0:
        entry = gl.load(work_ptr + gl.minimum(index, sizes.capacity) * 4 + field)  # the last entry is none
        head, first, _, found = _read(entry, layout)
        order = order_ptr + head.to(gl.int64) * (sizes.T * options.G)
        mem.draws.await_free(t)
        mem.draws.places.index(mem.draws.turn(t)).store(entry)
        for c in gl.static_range(options.CONSUMERS):
            place = first + c * ROWS + gl.arange(0, ROWS, layout=pairs)
            code = gl.load(order + gl.maximum(place, 0))  # missing rows repeat the first one
            mem.codes.index(mem.draws.turn(t) * options.CONSUMERS + c).store(code)
        mbarrier.arrive(mem.draws.ready.index(mem.draws.turn(t)), count=1)
        if found != 0:
            mem.q.await_free(t)
            for c in gl.static_range(options.CONSUMERS):
                codes = mem.codes.index(mem.draws.turn(t) * options.CONSUMERS + c)
                queries = mem.q.places.index(mem.q.turn(t) * options.CONSUMERS + c)
                for r in gl.static_range(0, ROWS, _CHUNK):
                    at = _starts_of(q, head, codes.slice(r, _CHUNK).load(by_row), sizes, options)
                    async_copy.async_copy_global_to_shared(queries.slice(r, _CHUNK), at[:, None] + channel[None, :])
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            mbarrier.arrive(mem.q.ready.index(mem.q.turn(t)), count=1)
        t += 1
        index = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)


@gluon.jit
def _clear(out, order_ptr, counts_ptr, sizes, options):
    """Write the zeros of closed rows, a share of every head's."""
    D: gl.constexpr = options.D
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, lanes))
    row = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, lanes))
    size = sizes.T * options.G
    for head in range(sizes.heads):
        order = order_ptr + head.to(gl.int64) * size  # type: ignore[attr-defined]  # Triton has no types
        count = gl.load(counts_ptr + head)
        for first in range(count + gl.program_id(0) * _CHUNK, size, gl.num_programs(0) * _CHUNK):
            place = first + row
            at = _starts_of(out, head, gl.load(order + gl.minimum(place, size - 1)), sizes, options)
            zero = gl.zeros([_CHUNK, D], out.ptr.dtype.element_ty, lanes)
            gl.store(at[:, None] + channel[None, :], zero, mask=(place < size)[:, None])


@gluon.jit
def _produce(k_desc, v_desc, mem, sizes, options):
    KEY_BYTES: gl.constexpr = options.BN * options.D * 2
    i = 0
    t = 0
    head, _, n, found = _hear(mem.draws, t, 1)
    mem.draws.release(t)
    while found != 0:
        b = head // sizes.K
        kv_head = head % sizes.K
        for j in range(n):
            at = (n - 1 - j) * options.BN
            stage = mem.k.turn(i)
            mem.k.await_free(i)
            mbarrier.expect(mem.k.ready.index(stage), KEY_BYTES)
            async_load(k_desc, [b, kv_head, at, 0], mem.k.ready.index(stage), mem.k.places.index(stage))
            mem.v.await_free(i)
            mbarrier.expect(mem.v.ready.index(stage), KEY_BYTES)
            async_load(v_desc, [b, kv_head, at, 0], mem.v.ready.index(stage), mem.v.places.index(stage))
            i += 1
        t += 1
        head, _, n, found = _hear(mem.draws, t, 1)
        mem.draws.release(t)


@gluon.jit
def _consume(out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, CONSUMER: gl.constexpr):
    BN: gl.constexpr = options.BN
    D: gl.constexpr = options.D
    G: gl.constexpr = options.G
    output: gl.constexpr = mma_layout(D)
    by_row: gl.constexpr = gl.SliceLayout(1, mma_layout(BN))
    scattered: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    qk_scale = scale * LOG2E
    i = 0
    t = 0
    head, first, n, found = _hear(mem.draws, t, 4)
    while found != 0:
        codes = mem.codes.index(mem.draws.turn(t) * options.CONSUMERS + CONSUMER)
        code = codes.load(by_row)
        rows = code // G + sizes.offset
        seen = n  # key tiles that some row here sees
        whole = sizes.S // BN  # key tiles that every row here sees entirely
        if options.CAUSAL:
            seen = (gl.sum(codes.slice(ROWS - 1, 1).load(one), 0) // G + sizes.offset) // BN + 1
            whole = (gl.sum(codes.slice(0, 1).load(one), 0) // G + sizes.offset) // BN
        whole = gl.minimum(whole, seen - 1)
        h = head % sizes.K * G + code % G
        logits = gl.load(s_ptr + head // sizes.K * ss_b + (code // G * ss_t + h * ss_h)).to(gl.float32)

        q = mem.q.places.index(mem.q.turn(t) * options.CONSUMERS + CONSUMER)
        acc, weights, m, l, i = attend(q, rows, n, seen, whole, i, t, qk_scale, mem, sizes.S, options)
        if not options.OUTPUT_IN_QUERIES:
            mem.q.release(t)
        adding = add(acc, weights, i - 1, mem)
        if options.HARD:
            g = gl.where(logits >= 3.0, 1.0, (logits + 3.0) * (1.0 / 6.0))
        else:
            g = 1.0 / (1.0 + gl.exp2(-logits * LOG2E))
        place = first + CONSUMER * ROWS + gl.arange(0, ROWS, layout=by_row)
        lse_at = lse_ptr + head.to(gl.int64) * (sizes.T * G) + place
        gl.store(lse_at, m + gl.log2(l) - gl.log2(g), place >= 0)
        acc = warpgroup_mma_wait(0, deps=(adding,))
        mem.v.release(i - 1)

        acc = acc * gl.convert_layout(g / l, gl.SliceLayout(1, output))[:, None]
        o = q if options.OUTPUT_IN_QUERIES else mem.o.index(CONSUMER)
        o.store(acc.to(o.dtype))
        to = _starts_of(out, head, codes.load(gl.SliceLayout(1, scattered)), sizes, options)
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, scattered))
        there = first + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scattered)) >= 0
        gl.store(to[:, None] + channel[None, :], o.load(scattered), mask=there[:, None])
        if options.OUTPUT_IN_QUERIES:
            mem.q.release(t)
        mem.draws.release(t)
        t += 1
        head, first, n, found = _hear(mem.draws, t, 4)


# A size of 1 stays a number; strides of q and of the output are never 1, and known to be multiples of 16.
@gluon.jit(do_not_specialize=["ss_b", "num_heads", "K", "T", "S", "offset", "capacity"])
def skip_forward_kernel(
    q_ptr, q_b: gl.int64, q_h, q_t, k_desc, v_desc, out_ptr, o_b: gl.int64, o_h, o_t, s_ptr, ss_b: gl.int64, ss_t, ss_h,
    order_ptr, counts_ptr, work_ptr, lse_ptr, counter_ptr, num_heads, K, T, S, offset, capacity, scale,
    BN: gl.constexpr, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, QUERY_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HARD: gl.constexpr, OUTPUT_IN_QUERIES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    options = _Options(BN, D, G, CAUSAL, HARD, OUTPUT_IN_QUERIES, CONSUMERS)
    sizes = _Sizes(num_heads, K, T, S, offset, capacity)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    q = gl.allocate_shared_memory(dtype, [QUERY_STAGES * CONSUMERS, ROWS, D], rows)
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    o = q
    if not OUTPUT_IN_QUERIES:
        o = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], rows)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    draws = gl.allocate_shared_memory(gl.int32, [2, 4], plain)
    codes = gl.allocate_shared_memory(gl.int32, [2 * CONSUMERS, ROWS], plain)
    mem = _Shared(
        ring(q, QUERY_STAGES, CONSUMERS), ring(k, STAGES, CONSUMERS), ring(v, STAGES, CONSUMERS), o,
        ring(draws, 2, CONSUMERS + 1), codes,
    )  # fmt: skip
    queries = _Tensor(q_ptr, q_b, q_h, q_t)
    out = _Tensor(out_ptr, o_b, o_h, o_t)
    fence_async_shared()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, 0)),
                (_consume, (out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, 1)),
                (_consume, (out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, 2)),
                (_produce, (k_desc, v_desc, mem, sizes, options)),
                (_gather, (queries, order_ptr, work_ptr, counter_ptr, mem, sizes, options)),
                (_clear, (out, order_ptr, counts_ptr, sizes, options)),
            ],
            [4, 4, 1, 1, 1],
            [160, 160, _SMALL_REGISTERS, _SMALL_REGISTERS, _SMALL_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, 0)),
                (_consume, (out, s_ptr, ss_b, ss_t, ss_h, lse_ptr, scale, mem, sizes, options, 1)),
                (_produce, (k_desc, v_desc, mem, sizes, options)),
                (_gather, (queries, order_ptr, work_ptr, counter_ptr, mem, sizes, options)),
                (_clear, (out, order_ptr, counts_ptr, sizes, options)),
            ],
            [4, 1, 1, 1],
            [240, _SMALL_REGISTERS, _SMALL_REGISTERS, _SMALL_REGISTERS],
        )
