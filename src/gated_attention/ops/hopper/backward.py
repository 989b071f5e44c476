"""Attention, backward, for Hopper: one program per block of keys keeps dK and dV in registers.

Warps are specialised. Two warpgroups compute, one warp copies tiles of queries and of the output's gradient to shared
memory, and one warp adds tiles of dQ to a float32 tensor. For a tile of queries and the program's keys,

    S^T = K Q^T,  dP^T = V dO^T,  P^T = exp2(c S^T - LSE),  dS^T = P^T * (dP^T - Delta)
    dV += P^T dO,  dK += dS^T Q,  dQ = dS K

P^T and dS^T stay in registers, as left operands of dV and dK. dS goes through shared memory to dQ, of which each
warpgroup computes a half. One program takes all query heads that share a key head, so only dQ is summed in memory. The
gate enters through LSE and Delta, or through dO; see `triton.prepare`.

Source: the backward pass of FlashAttention-3 (Shah et al., 2024, appendix B.1).
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gated_attention.ops.hopper.compat import async_atomic_add, async_load
from gated_attention.ops.hopper.pipeline import Ring, barriers, draw, ring

COMPUTE_WARPS = 8  # two warpgroups; with 240 registers per thread they leave 24 to the other warps
_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def _product(rows, columns):
    """Layout of a product: each warpgroup has half of the rows, or half of the columns where there are only 64 rows."""
    split = 1 if rows >= 128 else 2
    return gl.NVMMADistributedLayout([3, 0], [COMPUTE_WARPS // split, split], instr_shape=[16, columns // split, 16])


class _Shared(NamedTuple):
    """Shared memory. LSE and Delta of a tile take two places in `stats` and come and go with its queries."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    kv_ready: gl.shared_memory_descriptor
    q: Ring
    do: Ring
    stats: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: Ring


class _Work(NamedTuple):
    """A program's keys, from `first_key`, and the queries that see them: of `group` heads, from `first_query`."""

    b: gl.tensor
    kv_head: gl.tensor
    first_key: gl.tensor
    first_query: gl.tensor
    T: gl.tensor
    S: gl.tensor
    group: gl.tensor


@gluon.jit
def _copy_in(
    q_desc, k_desc, v_desc, do_desc, stats_desc, delta_at, heads, T_padded, mem, work,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    TILE_BYTES: gl.constexpr = BM * D * 2
    mbarrier.expect(mem.kv_ready.index(0), 2 * BN * D * 2)
    async_load(k_desc, [work.b, work.kv_head, work.first_key, 0], mem.kv_ready.index(0), mem.k.index(0))
    async_load(v_desc, [work.b, work.kv_head, work.first_key, 0], mem.kv_ready.index(0), mem.v.index(0))
    i = 0
    for h in range(work.kv_head * work.group, (work.kv_head + 1) * work.group):
        row = (work.b * heads + h) * T_padded
        for m in range(work.first_query, work.T, BM):
            stage = mem.q.turn(i)
            mem.q.await_free(i)
            q_ready = mem.q.ready.index(stage)
            mbarrier.expect(q_ready, TILE_BYTES + 2 * BM * 4)
            async_load(q_desc, [work.b, h, m, 0], q_ready, mem.q.places.index(stage))
            async_load(stats_desc, [row + m], q_ready, mem.stats.index(2 * stage))
            async_load(stats_desc, [delta_at + row + m], q_ready, mem.stats.index(2 * stage + 1))
            mem.do.await_free(i)
            do_ready = mem.do.ready.index(stage)
            mbarrier.expect(do_ready, TILE_BYTES)
            async_load(do_desc, [work.b, h, m, 0], do_ready, mem.do.places.index(stage))
            i += 1


@gluon.jit
def _add_dq(dq_desc, mem, work, BM: gl.constexpr):
    i = 0
    for h in range(work.kv_head * work.group, (work.kv_head + 1) * work.group):
        for m in range(work.first_query, work.T, BM):
            mem.dq.await_ready(i)
            async_atomic_add(dq_desc, [work.b, h, m, 0], mem.dq.places.index(0))
            tma.store_wait(0)  # until it has been read
            mem.dq.release(i)
            i += 1


@gluon.jit
def _begin(a, b, layout: gl.constexpr):
    """Start a product."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[1]
    zero = gl.zeros([M, N], gl.float32, layout)
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _begin_to_add(a, b, total):
    """Start to add the product of a matrix in registers and one in shared memory to a total."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=total.type.layout, k_width=2)
    return warpgroup_mma(gl.convert_layout(a.to(b.dtype), left), b, total, use_acc=True, is_async=True)


@gluon.jit
def _compute(
    dk_ptr, dk_b, dk_h, dk_t, dv_ptr, dv_b, dv_h, dv_t, scale, mem, work,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    scores: gl.constexpr = _product(BN, BM)
    by_query: gl.constexpr = gl.SliceLayout(0, scores)
    n = gl.arange(0, BN, layout=gl.SliceLayout(1, scores))
    m = gl.arange(0, BM, layout=by_query)
    dk = gl.zeros([BN, D], gl.float32, _product(BN, D))
    dv = gl.zeros([BN, D], gl.float32, _product(BN, D))
    scale_log2 = scale * _LOG2E
    query = work.first_query
    mbarrier.wait(mem.kv_ready.index(0), 0)
    for i in range(work.group * gl.cdiv(work.T - work.first_query, BM)):
        # 0, which hides from the compiler that addresses are the same in every step: it would keep them in registers.
        zero = i >> 30
        k = mem.k.index(zero).reshape([BN, D])
        v = mem.v.index(zero).reshape([BN, D])
        ds_tile = mem.ds.index(zero)
        stage = mem.q.turn(i)
        q = mem.q.tile(i)
        do = mem.do.tile(i)
        mem.q.await_ready(i)
        s_begun = _begin(k, q.permute((1, 0)), scores)
        mem.do.await_ready(i)
        dp_begun = _begin(v, do.permute((1, 0)), scores)
        s = warpgroup_mma_wait(1, deps=(s_begun,))
        if CAUSAL:
            if query < work.first_key + BN:
                # Only these two bits of a query's index depend on the thread: apart, they take one register.
                of_thread = (m & 6)[None, :] - (n + (work.first_key - query))[:, None]
                s = gl.where(of_thread >= -(m & ~6)[None, :], s, float("-inf"))
        elif work.first_key + BN > work.S:
            s = gl.where((n < work.S - work.first_key)[:, None], s, float("-inf"))
        lse = mem.stats.index(2 * stage).load(by_query)
        p = gl.exp2(s * scale_log2 - lse[None, :])
        dv_begun = _begin_to_add(p, do, dv)
        dp = warpgroup_mma_wait(1, deps=(dp_begun,))
        delta = mem.stats.index(2 * stage + 1).load(by_query)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        ds_tile.store(ds)
        fence_async_shared()
        dq_begun = _begin(ds_tile.permute((1, 0)), k, _product(BM, D))
        dk_begun = _begin_to_add(ds, q, dk)
        dv, dq = warpgroup_mma_wait(1, deps=(dv_begun, dq_begun))
        mem.dq.await_free(i)
        mem.dq.places.index(0).reshape([BM, D]).store(dq)
        fence_async_shared()
        mbarrier.arrive(mem.dq.ready.index(0), count=1)
        mem.do.release(i)
        dk = warpgroup_mma_wait(0, deps=(dk_begun,))
        mem.q.release(i)
        query += BM
        if query >= work.T:
            query = work.first_query
    b, h, first = work.b.to(gl.int64), work.kv_head.to(gl.int64), work.first_key.to(gl.int64)
    rows = work.S - work.first_key
    _store(dk_ptr + b * dk_b + h * dk_h + first * dk_t, dk_t, rows, dk * scale, mem.k.index(0).reshape([BN, D]))
    _store(dv_ptr + b * dv_b + h * dv_h + first * dv_t, dv_t, rows, dv, mem.v.index(0).reshape([BN, D]))


@gluon.jit
def _store(ptr, stride, num_rows, value, place):
    """Store the first `num_rows` rows by way of shared memory, so that a warp writes whole rows."""
    N: gl.constexpr = value.shape[0]
    D: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    place.store(value.to(place.dtype))
    n = gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + n[:, None] * stride + d[None, :], place.load(layout), mask=(n < num_rows)[:, None])


@gluon.jit(do_not_specialize=["B", "K", "T", "S", "T_padded", "group", "section"])  # a size of 1 stays a number
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dq_desc, dk_ptr, dk_b, dk_h, dk_t, dv_ptr, dv_b, dv_h, dv_t,
    B, K, T, S, T_padded, group, section, scale,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    k = gl.allocate_shared_memory(dtype, [1, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [1, 1, 1, BN, D], v_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q_desc.layout)
    do = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], do_desc.layout)
    dq = gl.allocate_shared_memory(gl.float32, [1, 1, 1, BM, D], dq_desc.layout)
    ds = gl.allocate_shared_memory(dtype, [1, BN, BM], gl.NVMMASharedLayout.get_default_for([BN, BM], dtype))
    stats = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BM], stats_desc.layout)
    mem = _Shared(k, v, barriers(1, 1), ring(q, STAGES, 1), ring(do, STAGES, 1), stats, ds, ring(dq, 1, 1))
    fence_async_shared()
    # The first keys, which most queries see, are the longest blocks.
    num_blocks = gl.cdiv(S, BN)
    block, head = draw(gl.program_id(0), B * K, section, num_blocks, num_blocks // 2)
    first_key = block * BN
    first_query = first_key * 0
    if CAUSAL:
        first_query = first_key
    work = _Work(head // K, head % K, first_key, first_query, T, S, group)
    heads = K * group
    delta_at = B * heads * T_padded
    gl.warp_specialize(
        [
            (_compute, (dk_ptr, dk_b, dk_h, dk_t, dv_ptr, dv_b, dv_h, dv_t, scale, mem, work, BM, BN, D, CAUSAL)),
            (_copy_in, (
                q_desc, k_desc, v_desc, do_desc, stats_desc, delta_at, heads, T_padded, mem, work, BM, BN, D,
            )),
            (_add_dq, (dq_desc, mem, work, BM)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
