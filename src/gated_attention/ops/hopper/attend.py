"""What a consumer warpgroup of the forward kernels for Hopper does with its rows: attention over tiles of keys.

It scores a tile of keys while it multiplies the weights of the tile before it with their values. Scores and sums are
float32; weights are rounded to the dtype of the values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from gated_attention.ops.hopper.pipeline import mma_layout

ROWS = gl.constexpr(64)  # per consumer
LOG2E = gl.constexpr(1.4426950408889634)
_NO_MAXIMUM = gl.constexpr(-1e30)  # finite: a row whose first tile is all masked would compute -inf - -inf


@gluon.jit
def _score(q, k):
    """Start the product of a tile of queries with a tile of keys."""
    BN: gl.constexpr = k.shape[0]
    zero = gl.zeros([ROWS, BN], gl.float32, mma_layout(BN))
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def add(acc, weights, i, mem):
    """Start to add the product of the weights and values of key tile `i`."""
    left: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    mem.v.await_ready(i)
    v = mem.v.tile(i)
    return warpgroup_mma(gl.convert_layout(unpack(weights, v.dtype), left), v, acc, use_acc=True, is_async=True)


@gluon.jit
def pack(weights, dtype: gl.constexpr):
    """Two weights as one 32-bit number. Single weights would be unpacked and packed again at every step."""
    ROWS: gl.constexpr = weights.shape[0]
    HALF: gl.constexpr = weights.shape[1] // 2
    NAME: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    low, high = gl.split(weights.reshape([ROWS, HALF, 2]))
    return gl.inline_asm_elementwise("cvt.rn." + NAME + ".f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, True, 1)


@gluon.jit
def unpack(packed, dtype: gl.constexpr):
    ROWS: gl.constexpr = packed.shape[0]
    low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], (gl.int16, gl.int16), True, 1)
    return gl.join(low, high).to(dtype, bitcast=True).reshape([ROWS, packed.shape[1] * 2])


@gluon.jit
def _softmax(s, m, l, qk_scale, rows, at, S, MASKED: gl.constexpr, CAUSAL: gl.constexpr, DTYPE: gl.constexpr):
    """Packed weights of a tile of scores, the new maximum and sum, and the factor by which earlier sums shrink."""
    if MASKED:
        columns = at + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        if CAUSAL:
            s = gl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
        else:
            s = gl.where((columns < S)[None, :], s, float("-inf"))
    higher = gl.maximum(m, gl.max(s, 1) * qk_scale)
    p = gl.exp2(s * qk_scale - higher[:, None])
    shrink = gl.exp2(m - higher)
    return pack(p, DTYPE), higher, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(acc, weights, m, l, i, at, q, rows, qk_scale, mem, S, options, MASKED: gl.constexpr):
    """Score key tile `i` while the weights of the tile before it are multiplied with their values."""
    mem.k.await_ready(i)
    scoring = _score(q, mem.k.tile(i))
    adding = add(acc, weights, i - 1, mem)
    s = warpgroup_mma_wait(1, deps=(scoring,))
    mem.k.release(i)
    weights, m, l, shrink = _softmax(s, m, l, qk_scale, rows, at, S, MASKED, options.CAUSAL, mem.v.places.dtype)
    acc = warpgroup_mma_wait(0, deps=(adding,))
    mem.v.release(i - 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, mma_layout(options.D)))[:, None]
    return acc, weights, m, l, i + 1, at - options.BN


@gluon.jit
def attend(q, rows, n, seen, whole, i, t, qk_scale, mem, S, options):
    """Meet the tiles of keys, from the last to the first. The weights of the first wait to be added.

    Args:
        q: The queries, which are there when the `t`-th write of `mem.q` is.
        rows: The last key that each row sees.
        n, seen, whole: Tiles of keys that come for all consumers, that some row sees, and that every row sees entirely;
            at least one is seen and not whole.
        i: Tiles of keys so far.

    Returns:
        The sums, the weights, the largest scores, the sums of weights, and `i` after the last tile.
    """
    BN: gl.constexpr = options.BN
    by_row: gl.constexpr = rows.type.layout
    m = gl.full([ROWS], _NO_MAXIMUM, gl.float32, by_row)
    l = gl.full([ROWS], 0.0, gl.float32, by_row)
    acc = gl.zeros([ROWS, options.D], gl.float32, mma_layout(options.D))
    if options.CAUSAL:
        for _ in range(n - seen):  # key tiles that only other consumers see
            mem.k.await_ready(i)
            mem.k.release(i)
            mem.v.await_ready(i)
            mem.v.release(i)
            i += 1
    at = (seen - 1) * BN
    mem.q.await_ready(t)
    mem.k.await_ready(i)
    s = warpgroup_mma_wait(0, deps=(_score(q, mem.k.tile(i)),))
    mem.k.release(i)
    weights, m, l, _ = _softmax(s, m, l, qk_scale, rows, at, S, True, options.CAUSAL, mem.v.places.dtype)
    i += 1
    at -= BN
    if options.CAUSAL:
        for _ in range(seen - 1 - whole):
            acc, weights, m, l, i, at = _step(acc, weights, m, l, i, at, q, rows, qk_scale, mem, S, options, True)
    for _ in range(whole):
        acc, weights, m, l, i, at = _step(acc, weights, m, l, i, at, q, rows, qk_scale, mem, S, options, False)
    return acc, weights, m, l, i
