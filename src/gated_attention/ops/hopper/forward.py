"""Gated attention, forward, for Hopper: asynchronous copies, specialised warpgroups, the gate in the epilogue.

One producer warp draws tiles of query rows, longest first, from a counter that all programs share. It copies queries,
keys, values and elementwise gate logits to shared memory. Two or three consumer warpgroups own 64 rows each; see
`attend`.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from gated_attention.ops.hopper.attend import LOG2E, ROWS, add, attend
from gated_attention.ops.hopper.compat import async_load, async_store, barrier
from gated_attention.ops.hopper.pipeline import Ring, Shape, drawn_tile, hear_draw, mma_layout, ring, tell_draw

_LN2 = gl.constexpr(0.6931471805599453)
_PRODUCER_REGISTERS = gl.constexpr(24)


@aggregate
class _Options:
    """What the kernel is compiled for."""

    BN: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr
    ELEMENTWISE: gl.constexpr
    OUTPUT_IN_QUERIES: gl.constexpr
    CONSUMERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, BN, D, CAUSAL, ELEMENTWISE, OUTPUT_IN_QUERIES, CONSUMERS):
        self.BN = gl.constexpr(BN)
        self.D = gl.constexpr(D)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.ELEMENTWISE = gl.constexpr(ELEMENTWISE)
        self.OUTPUT_IN_QUERIES = gl.constexpr(OUTPUT_IN_QUERIES)
        self.CONSUMERS = gl.constexpr(CONSUMERS)


class _Shared(NamedTuple):
    """Shared memory: queries of all consumers, keys, values, outputs or gate logits, and draws."""

    q: Ring
    k: Ring
    v: Ring
    o: Ring
    draws: Ring


@gluon.jit
def _first_row(shape, tile, options):
    """First row of a tile. Tiles end where the rows end; an incomplete first tile starts before row 0."""
    return gl.cdiv(shape.T, ROWS) * ROWS - (shape.num_tiles - tile) * ROWS * options.CONSUMERS


@gluon.jit
def _num_key_tiles(shape, end, options):
    """Number of key tiles that some row before `end` sees."""
    return gl.cdiv(gl.minimum(shape.S, end) if options.CAUSAL else shape.S, options.BN)


@gluon.jit
def _produce(counter_ptr, q_desc, k_desc, v_desc, s_desc, mem, shape, options):
    TILE_BYTES: gl.constexpr = options.CONSUMERS * ROWS * options.D * 2
    KEY_BYTES: gl.constexpr = options.BN * options.D * 2
    index = gl.program_id(0)
    i = 0  # tiles of keys so far
    t = 0  # tiles of rows so far
    while index < shape.num_tiles * shape.B * shape.H:
        tell_draw(mem.draws, t, index, shape, 1)
        row_tile, head = drawn_tile(shape, index)
        b = head // shape.H
        h = head % shape.H
        row = _first_row(shape, row_tile, options)
        mem.q.await_free(t)
        q_ready = mem.q.ready.index(mem.q.turn(t))
        mbarrier.expect(q_ready, TILE_BYTES)
        for c in gl.static_range(options.CONSUMERS):
            q = mem.q.places.index(mem.q.turn(t) * options.CONSUMERS + c)
            async_load(q_desc, [b, h, row + c * ROWS, 0], q_ready, q)
        n = _num_key_tiles(shape, row + options.CONSUMERS * ROWS, options)
        kv_head = h // shape.group
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
        if options.ELEMENTWISE:
            # Where the output leaves through the queries' memory, that is free after their last product.
            mem.o.await_free(t + 1 if options.OUTPUT_IN_QUERIES else t)
            mbarrier.expect(mem.o.ready.index(0), TILE_BYTES)
            for c in gl.static_range(options.CONSUMERS):
                async_load(s_desc, [b, h, row + c * ROWS, 0], mem.o.ready.index(0), mem.o.places.index(c))
        t += 1
        index = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    tell_draw(mem.draws, t, index, shape, 1)


@gluon.jit
def _consume(o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, CONSUMER: gl.constexpr):
    BN: gl.constexpr = options.BN
    D: gl.constexpr = options.D
    output: gl.constexpr = mma_layout(D)
    by_row: gl.constexpr = gl.SliceLayout(1, mma_layout(BN))
    qk_scale = scale * LOG2E
    o = mem.o.places.index(CONSUMER)
    o_tile = o.reshape([ROWS, D])
    i = 0
    t = 0
    row_tile, b, h, found = hear_draw(mem.draws, t, 4)
    while found != 0:
        first = _first_row(shape, row_tile, options)
        row = first + CONSUMER * ROWS
        rows = row + gl.arange(0, ROWS, layout=by_row)
        there = (rows >= 0) & (rows < shape.T)
        n = _num_key_tiles(shape, first + options.CONSUMERS * ROWS, options)
        seen = n  # key tiles that some row here sees
        whole = shape.S // BN  # key tiles that every row here sees entirely
        if options.CAUSAL:
            seen = gl.maximum(_num_key_tiles(shape, row + ROWS, options), 1)
            whole = gl.minimum(gl.maximum(row + 1, 0) // BN, whole)
        whole = gl.minimum(whole, seen - 1)
        if not options.ELEMENTWISE:
            s_at = s_ptr + b.to(gl.int64) * ss_b + h * ss_h
            logits = gl.load(s_at + rows.to(gl.int64) * ss_t, there, 0.0).to(gl.float32)

        q = mem.q.places.index(mem.q.turn(t) * options.CONSUMERS + CONSUMER).reshape([ROWS, D])
        acc, weights, m, l, i = attend(q, rows, n, seen, whole, i, t, qk_scale, mem, shape.S, options)
        if not options.OUTPUT_IN_QUERIES:
            mem.q.release(t)
        elif options.ELEMENTWISE:
            mem.o.release(t)
        adding = add(acc, weights, i - 1, mem)
        lse_at = lse_ptr + (b * shape.H + h).to(gl.int64) * shape.T
        gl.store(lse_at + rows, (m + gl.log2(l)) * _LN2, there)
        acc = warpgroup_mma_wait(0, deps=(adding,))
        mem.v.release(i - 1)

        if options.ELEMENTWISE:
            mem.o.await_ready(t)
            shut = 1.0 + gl.exp2(-o_tile.load(output).to(gl.float32) * LOG2E)
            acc = acc / (shut * gl.convert_layout(l, gl.SliceLayout(1, output))[:, None])
        else:
            acc = (
                acc * gl.convert_layout(1.0 / (1.0 + gl.exp2(-logits * LOG2E)) / l, gl.SliceLayout(1, output))[:, None]
            )
            tma.store_wait(0)
            barrier()  # this warpgroup's last output has left
        o_tile.store(acc.to(o.dtype))
        fence_async_shared()
        # Copies may read before a tensor but not write there; they may write behind it.
        async_store(o_desc, [b, h, gl.where(row < 0, shape.T, row), 0], o)
        if options.OUTPUT_IN_QUERIES:
            tma.store_wait(0)
            mem.q.release(t)
        elif options.ELEMENTWISE:
            tma.store_wait(0)
            mem.o.release(t)
        t += 1
        row_tile, b, h, found = hear_draw(mem.draws, t, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "T", "S", "group", "section", "num_tiles"])  # a size of 1 stays a number
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, s_desc, s_ptr, lse_ptr, counter_ptr,
    B, H, T, S, group, section, num_tiles, scale, ss_b, ss_t, ss_h,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, QUERY_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    ELEMENTWISE: gl.constexpr, OUTPUT_IN_QUERIES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    options = _Options(BN, D, CAUSAL, ELEMENTWISE, OUTPUT_IN_QUERIES, CONSUMERS)
    shape = Shape(B, H, T, S, group, section, num_tiles)
    q = gl.allocate_shared_memory(dtype, [QUERY_STAGES * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    o = q
    if not OUTPUT_IN_QUERIES:
        o = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout)
    draws = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mem = _Shared(
        ring(q, QUERY_STAGES, CONSUMERS), ring(k, STAGES, CONSUMERS), ring(v, STAGES, CONSUMERS),
        ring(o, 1, CONSUMERS), ring(draws, 2, CONSUMERS),
    )  # fmt: skip
    fence_async_shared()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, 0)),
                (_consume, (o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, 1)),
                (_consume, (o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, 2)),
                (_produce, (counter_ptr, q_desc, k_desc, v_desc, s_desc, mem, shape, options)),
            ],
            [4, 4, 1],
            [160, 160, _PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, 0)),
                (_consume, (o_desc, s_ptr, lse_ptr, scale, ss_b, ss_t, ss_h, mem, shape, options, 1)),
                (_produce, (counter_ptr, q_desc, k_desc, v_desc, s_desc, mem, shape, options)),
            ],
            [4, 1],
            [240, _PRODUCER_REGISTERS],
        )
