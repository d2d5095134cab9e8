"""Block-sparse attention for compute capability 9.0 in Gluon: copies, products and softmax in warps of their own.

After FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): one warp fetches key and value tiles with the copy engine,
one or two groups of four warps each attend 64 queries, and a group's softmax runs beside its own products of the tile
before. `hopper.py` launches it.
"""

# Gluon is not Python: pyright cannot follow constexprs, layouts and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_fetch import TILE_K, fetch, first_slot, heard, left_over, list_of, meet, release
from .quantised import LEAST_STEP, LEVELS

ROWS = gl.constexpr(64)  # queries of a group of four warps
LOG2_E = gl.constexpr(1.4426950408889634)
ZERO = gl.constexpr(12582912.0)  # 1.5 * 2**23: as bits, the integer that sums of int8 products start from
ZERO_BITS = gl.constexpr(0x4B400000)
MINUS_INF_BITS = gl.constexpr(-0x00800000)
TOP, LEAST = gl.constexpr(float(LEVELS)), gl.constexpr(LEAST_STEP)
# a name that Triton has changed since 3.6
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def _start_logits(q_tile, k_tile, S_LAYOUT: gl.constexpr):
    """Begin q k^T [ROWS, TILE_K] and don't wait for it."""
    INT8: gl.constexpr = q_tile.dtype == gl.int8
    if INT8:  # sums that, read as floats, are ZERO more than they are: no conversion
        start = gl.full([ROWS, TILE_K], ZERO_BITS, gl.int32, S_LAYOUT)
    else:
        start = gl.zeros([ROWS, TILE_K], gl.float32, S_LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), start, use_acc=INT8, is_async=True)


@gluon.jit
def _steps_of(steps, in_tile, BLOCK_K: gl.constexpr):
    """The steps of a tile's keys: of all, or [TILE_K] where two blocks share the tile."""
    both = steps.load(gl.BlockedLayout([2], [32], [4], [0]))
    which = gl.arange(0, 2, both.type.layout)
    step = gl.sum(gl.where(which == 0, both, 0.0), 0)
    if BLOCK_K < TILE_K:
        step = gl.where(in_tile < BLOCK_K, step, gl.sum(gl.where(which == 1, both, 0.0), 0))
    return step


@gluon.jit
def _softmax(s, unit, step, total, top, INT8: gl.constexpr, PARTS: gl.constexpr):
    """One tile's weights, how much all before them shrinks, and the new sum and maximum of each row.

    What is subtracted is folded into one fused step. With int8 and one step a tile that is ZERO times the unit, too,
    some 2**10: rounding it moves all logits of the row in this tile, so the maximum that is kept is moved alike.
    """
    if INT8:
        x = s.to(gl.float32, bitcast=True)
        if PARTS == 2:
            x = (x - ZERO) * step[None, :]
            new_top = gl.maximum(top, gl.max(x, 1) * gl.max(unit, 1))
            p = gl.exp2(x * unit - new_top[:, None])
        else:
            each = gl.max(unit, 1) * step
            shift = gl.maximum(top, (gl.max(x, 1) - ZERO) * each) + ZERO * each
            new_top = gl.fma(each, gl.full([ROWS], -ZERO, gl.float32, each.type.layout), shift)
            p = gl.exp2(x * each[:, None] - shift[:, None])
    else:
        new_top = gl.maximum(top, gl.max(s, 1) * unit)
        p = gl.exp2(s * unit - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return p, decay, total * decay + gl.sum(p, 1), new_top


@gluon.jit
def _attend(
    GROUP: gl.constexpr, q_ptr, q_rooms, out_ptr, lse_ptr, q_order_ptr, k_order_ptr, k_tiles, v_tiles, ring, steps,
    told, lists, strides, mean_ptr, q_len, k_len, heads, heads_per_mean, tiles, scale,
    D: gl.constexpr, D_PAD: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, SPLIT: gl.constexpr,
    RANKED: gl.constexpr, RAGGED: gl.constexpr, Q_ORDER: gl.constexpr, K_ORDER: gl.constexpr, INT8: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps that attend 64 queries of each tile: p_j = exp2(s_j - m), out = sum_j p_j v_j / sum_j p_j."""
    PARTS: gl.constexpr = TILE_K // BLOCK_K
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 32 if INT8 else 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    S_COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D_PAD, D_PAD // 8], [4, 1], [1, 0])
    FLAT_ROW: gl.constexpr = gl.SliceLayout(1, FLAT)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_full, v_full, k_free, v_free, tile_full, tile_free = ring
    q_stride_b, q_stride_s, q_stride_h, q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h = strides
    q_tile = q_rooms.index(GROUP)
    d = gl.arange(0, D_PAD, gl.SliceLayout(0, FLAT))
    in_tile = gl.arange(0, TILE_K, S_COLUMN)
    one_each = gl.arange(0, TILE_K, gl.BlockedLayout([1], [32], [4], [0]))
    done, turn = 0, 0
    tile = heard(told, tile_full, tile_free, turn)
    while tile < tiles:
        row, h, b, index, n, n_masked, n_tiles = list_of(tile, lists, PARTS, SPLIT, RANKED)
        b64, h64 = b.to(gl.int64), h.to(gl.int64)
        q_tok = row * BLOCK_Q + GROUP * ROWS + gl.arange(0, ROWS, FLAT_ROW)
        if Q_ORDER:
            q_tok = gl.load(q_order_ptr + b64 * q_order_stride_b + h64 * q_order_stride_h + q_tok)
            q_ok = q_tok >= 0
        else:
            q_ok = q_tok < q_len
        inside = q_ok[:, None] & (d < D)[None, :]
        q_at = q_ptr + b64 * q_stride_b + h64 * q_stride_h + q_tok.to(gl.int64)[:, None] * q_stride_s + d[None, :]
        q = gl.load(q_at, mask=inside, other=0.0)
        unit = scale * LOG2_E  # of a product, in log2 units
        lost = gl.zeros([ROWS], gl.float32, FLAT_ROW)
        if INT8:
            mean_at = mean_ptr + (b64 * (heads // heads_per_mean) + h64 // heads_per_mean) * D + d
            mean = gl.load(mean_at, mask=d < D, other=0.0)
            q, step, lost = _rounded(q.to(gl.float32), mean, D_PAD)
            unit = gl.convert_layout(step * unit, S_ROW)[:, None]
        q_tile.store(q)
        fence_async_shared()
        meet()

        top = gl.full([ROWS], float("-inf"), gl.float32, S_ROW)
        total = gl.zeros([ROWS], gl.float32, S_ROW)
        acc = gl.zeros([ROWS, D_PAD], gl.float32, O_LAYOUT)

        step = gl.full([TILE_K], 1.0, gl.float32, S_COLUMN) if INT8 and PARTS == 2 else 1.0
        # tiles with holes, one after the other
        for i in range(n_masked):
            slots, real = _slots_of(index, n, i, one_each, BLOCK_K)
            if K_ORDER:
                real &= gl.load(k_order_ptr + b64 * k_order_stride_b + h64 * k_order_stride_h + slots) >= 0
            else:
                real &= slots < k_len
            real = gl.convert_layout(real, S_COLUMN)
            stage, phase = done % STAGES, (done // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s = _start_logits(q_tile, k_tiles.index(stage), S_LAYOUT)
            s = warpgroup_mma_wait(0, deps=(s,))
            if INT8:
                step = _steps_of(steps.index(stage), in_tile, BLOCK_K)
                s = (s.to(gl.float32, bitcast=True) - ZERO) * (step[None, :] if PARTS == 2 else step)
            release(k_free.index(stage))
            s = gl.where(real[None, :], s * unit, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
            shift = gl.where(new_top == float("-inf"), 0.0, new_top)
            p = gl.exp2(s - shift[:, None])
            decay = gl.exp2(top - shift)
            total = total * decay + gl.sum(p, 1)
            top = new_top
            acc = acc * gl.convert_layout(decay, O_ROW)[:, None]
            weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            release(v_free.index(stage))
            done += 1

        # full tiles: the logits of one are computed beside the softmax and the values of the one before
        if n_masked < n_tiles:
            stage, phase = done % STAGES, (done // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s = _start_logits(q_tile, k_tiles.index(stage), S_LAYOUT)
            s = warpgroup_mma_wait(0, deps=(s,))
            if INT8:
                step = _steps_of(steps.index(stage), in_tile, BLOCK_K)
            release(k_free.index(stage))
            if RAGGED:
                s = _cut(s, index, n, n_masked, k_len, in_tile, BLOCK_K)
            p, decay, total, top = _softmax(s, unit, step, total, top, INT8, PARTS)
            acc = acc * gl.convert_layout(decay, O_ROW)[:, None]
            weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
            for i in range(n_masked + 1, n_tiles):
                next_stage, next_phase = (done + 1) % STAGES, ((done + 1) // STAGES) & 1
                mbarrier.wait(k_full.index(next_stage), next_phase)
                s = _start_logits(q_tile, k_tiles.index(next_stage), S_LAYOUT)
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                if INT8:
                    step = _steps_of(steps.index(next_stage), in_tile, BLOCK_K)
                release(k_free.index(next_stage))
                if RAGGED:
                    s = _cut(s, index, n, i, k_len, in_tile, BLOCK_K)
                p, decay, total, top = _softmax(s, unit, step, total, top, INT8, PARTS)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                release(v_free.index(stage))
                acc = acc * gl.convert_layout(decay, O_ROW)[:, None]
                weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
                done += 1
                stage, phase = next_stage, next_phase
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            release(v_free.index(stage))
            done += 1

        # a row without a key has total = 0, top = -inf: out 0, lse -inf
        out = acc / gl.convert_layout(gl.where(total == 0.0, 1.0, total), O_ROW)[:, None]
        lse = gl.convert_layout((top + gl.log2(total)) * 0.6931471805599453, FLAT_ROW)
        if INT8:
            lse = gl.where(lse == float("-inf"), lse, lse + lost * scale)
        out_at = out_ptr + ((b64 * q_len + q_tok) * heads + h)[:, None] * D + d[None, :]
        gl.store(out_at, gl.convert_layout(out.to(dtype), FLAT), mask=inside)
        gl.store(lse_ptr + (b64 * heads + h) * q_len + q_tok, lse, mask=q_ok)
        turn += 1
        tile = heard(told, tile_full, tile_free, turn)


@gluon.jit
def _rounded(q, mean, D_PAD: gl.constexpr):
    """Queries as int8, a step for each (NaN where one is not finite), and their products with the keys' mean."""
    lost = gl.sum(q * mean[None, :], 1)
    finite = gl.abs(q) < float("inf")
    q = gl.where(finite, q, 0.0)
    step = gl.maximum(gl.div_rn(gl.max(gl.abs(q), 1), TOP), LEAST)
    q8 = gl.floor(q * gl.div_rn(1.0, step)[:, None] + 0.5).to(gl.int8)
    broken = gl.max(gl.where(finite, 0, 1), 1) > 0
    return q8, gl.where(broken, float("nan"), step), lost


@gluon.jit
def _slots_of(index, n, tile, in_tile, BLOCK_K: gl.constexpr):
    """The slot of each key of a tile, and whether it is one of the list's."""
    PARTS: gl.constexpr = TILE_K // BLOCK_K
    behind = tile * PARTS + in_tile // BLOCK_K - left_over(n, PARTS)
    return gl.load(index + (n - 1 - gl.maximum(behind, 0))) * BLOCK_K + in_tile % BLOCK_K, behind >= 0


@gluon.jit
def _cut(s, index, n, tile, k_len, in_tile, BLOCK_K: gl.constexpr):
    """Logits of a tile with -inf behind the last key."""
    if BLOCK_K == TILE_K:
        slots = first_slot(index, n, tile, 0, BLOCK_K) + in_tile
    elif BLOCK_K * 2 == TILE_K:
        slots = first_slot(index, n, tile, 0, BLOCK_K) + in_tile
        slots = gl.where(in_tile < BLOCK_K, slots, first_slot(index, n, tile, 1, BLOCK_K) + in_tile - BLOCK_K)
    else:
        slots = _slots_of(index, n, tile, in_tile, BLOCK_K)[0]
    least = MINUS_INF_BITS if s.dtype == gl.int32 else float("-inf")
    return gl.where((slots < k_len)[None, :], s, least)


@gluon.jit
def _in_parts(tiles, desc):
    """A ring of tiles, [STAGES, TILE_K, D_PAD], as the boxes that the copy engine fills one by one."""
    box: gl.constexpr = desc.block_type.shape
    count: gl.constexpr = tiles.shape[0] * tiles.shape[1] * tiles.shape[2] // (box[2] * box[3])
    return _view(tiles, tiles.dtype, [count] + box, desc.layout)


@gluon.jit
def attention_kernel(
    q_ptr, k_desc, v_desc, step_ptr, mean_ptr, out_ptr, lse_ptr,
    index_ptr, count_ptr, full_ptr, rank_ptr, q_order_ptr, k_order_ptr, next_ptr,
    q_stride_b, q_stride_s, q_stride_h, index_stride_b, index_stride_h, index_stride_q,
    count_stride_b, count_stride_h, count_stride_q, full_stride_b, full_stride_h, full_stride_q,
    rank_stride_b, rank_stride_h, q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    q_len, k_len, k_blocks, heads, heads_per_key_head, heads_per_value_head, heads_per_mean, q_tiles, tiles, list_width,
    scale,
    D: gl.constexpr, D_PAD: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, SPLIT: gl.constexpr,
    RANKED: gl.constexpr, RAGGED: gl.constexpr, Q_ORDER: gl.constexpr, K_ORDER: gl.constexpr, INT8: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Query tiles one after the other, each against its list of key blocks; see `_attend` and `_fetch`."""
    GROUPS: gl.constexpr = BLOCK_Q // ROWS
    K_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_K, D_PAD], k_desc.dtype)
    V_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_K, D_PAD], v_desc.dtype)
    q_rooms = gl.allocate_shared_memory(k_desc.dtype, [GROUPS, ROWS, D_PAD], K_TILE)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE_K, D_PAD], K_TILE)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE_K, D_PAD], V_TILE)
    steps = gl.allocate_shared_memory(gl.float32, [STAGES, 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # the same memory as the copy engine fills it: a chunk of columns of one block at a time
    k_parts = _in_parts(k_tiles, k_desc)
    v_parts = _in_parts(v_tiles, v_desc)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    told = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_free.index(i), count=GROUPS)
    ring = (k_full, v_full, k_free, v_free, tile_full, tile_free)
    lists = (
        q_tiles, heads, index_ptr, count_ptr, full_ptr, index_stride_b, index_stride_h, index_stride_q,
        count_stride_b, count_stride_h, count_stride_q, full_stride_b, full_stride_h, full_stride_q, list_width,
        rank_ptr, rank_stride_b, rank_stride_h,
    )  # fmt: skip
    strides = (
        q_stride_b, q_stride_s, q_stride_h, q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    )  # fmt: skip
    # written out, because a tuple that has a name loses its constants
    if GROUPS == 2:
        gl.warp_specialize([
            (_attend, (0, q_ptr, q_rooms, out_ptr, lse_ptr, q_order_ptr, k_order_ptr, k_tiles, v_tiles, ring, steps,
                       told, lists, strides, mean_ptr, q_len, k_len, heads, heads_per_mean, tiles, scale,
                       D, D_PAD, BLOCK_Q, BLOCK_K, SPLIT, RANKED, RAGGED, Q_ORDER, K_ORDER, INT8, STAGES)),
            (_attend, (1, q_ptr, q_rooms, out_ptr, lse_ptr, q_order_ptr, k_order_ptr, k_tiles, v_tiles, ring, steps,
                       told, lists, strides, mean_ptr, q_len, k_len, heads, heads_per_mean, tiles, scale,
                       D, D_PAD, BLOCK_Q, BLOCK_K, SPLIT, RANKED, RAGGED, Q_ORDER, K_ORDER, INT8, STAGES)),
            (fetch, (k_desc, v_desc, k_parts, v_parts, ring, steps, step_ptr, lists, tiles, k_blocks,
                      heads, heads_per_key_head, heads_per_value_head,
                      told, next_ptr, BLOCK_K, SPLIT, RANKED, INT8, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (0, q_ptr, q_rooms, out_ptr, lse_ptr, q_order_ptr, k_order_ptr, k_tiles, v_tiles, ring, steps,
                       told, lists, strides, mean_ptr, q_len, k_len, heads, heads_per_mean, tiles, scale,
                       D, D_PAD, BLOCK_Q, BLOCK_K, SPLIT, RANKED, RAGGED, Q_ORDER, K_ORDER, INT8, STAGES)),
            (fetch, (k_desc, v_desc, k_parts, v_parts, ring, steps, step_ptr, lists, tiles, k_blocks,
                      heads, heads_per_key_head, heads_per_value_head,
                      told, next_ptr, BLOCK_K, SPLIT, RANKED, INT8, STAGES)),
        ], [1], [24])  # fmt: skip
